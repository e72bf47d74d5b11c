"""Deep clustering built from its papers' equations: what the book's chapters share."""

__version__ = "0.1.0"
