"""Where the project's files lie, the environment variables that say otherwise, and how a file is written.

Imports nothing heavy, so that a mistake in a list of runs is told in a second.
"""

import os
from pathlib import Path

# Every environment variable that is ours.
DATA = "DEEPCLUST_DATA"  # a folder with stored full data sets
CACHE = "DEEPCLUST_CACHE"  # where downloaded data sets are kept
GRAPHS = "DEEPCLUST_GRAPHS"  # set for the kernels of `sweep --graphs`, which replay their steps
RECORDING = "DEEPCLUST_RECORDING"  # set by a sweep for the kernel: the chapter whose run it records
FOLDERS = (DATA, CACHE)


def root():
    """The folder that holds the package: the checkout, or site-packages once installed."""
    return Path(__file__).resolve().parents[1]


def data_root():
    """The folder that holds bundled/, papers/ and records/: in an installed package, or `data` of a checkout.

    Raises FileNotFoundError where neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_data", package.parent / "data"):
        if (folder / "bundled").is_dir():
            return folder
    raise FileNotFoundError(f"There is no data folder in {package} or beside it: install the package again.")


def chapter_file(chapter, folder="chapters"):
    """Where a chapter's notebook, or its page in `evidence`, lies in a checkout; the file need not exist."""
    return root() / "book" / folder / f"{chapter}.ipynb"


def absolute_folders():
    """Those of our variables that name folders, where set, as absolute paths: a kernel starts elsewhere."""
    return {name: os.path.abspath(os.environ[name]) for name in FOLDERS if os.environ.get(name)}


def write_atomic(path, text):
    """Write text so that neither a reader nor a killed writer meets half a file; folders are made at need."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
