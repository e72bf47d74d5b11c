"""Deep clustering built from its papers' equations: what the book's chapters share."""

__version__ = "0.1.0"

import os

if os.environ.get("DEEPCLUST_GRAPHS"):  # set for the kernels of `sweep --graphs`
    from . import graphs

    graphs.install()
