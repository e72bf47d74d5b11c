"""Deep clustering built from its papers' equations: what the book's chapters share."""

import os

from .places import GRAPHS

__version__ = "0.1.0"

if os.environ.get(GRAPHS):
    from . import graphs

    graphs.install()
