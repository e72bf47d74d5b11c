"""The book's notebooks: their names and files, a run with a progress line, and places to work."""

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOK, BUILD = ROOT / "book", ROOT / "_build"


def chapters(folder="chapters"):
    """Names of the chapters in the table of contents, in its order; of folder "evidence", its pages."""
    import yaml

    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    pages = [entry for part in toc["parts"] for entry in part["chapters"]]
    files = [entry["file"] for page in pages for entry in (page, *page.get("sections", []))]
    return [Path(file).name for file in files if file.startswith(f"{folder}/")]


def notebooks(book=BOOK):
    """Files of all chapters, then of all evidence pages, below `book`, each in the contents' order."""
    return [
        book / folder / f"{name}.ipynb" for folder in ("chapters", "evidence") for name in chapters(folder)
    ]


def read_notebook(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def default_parameters(name):
    """The quick profile: what the chapter's `parameters` cell assigns, as a dict."""
    from deepclust_nb.sweep import plan

    return plan.defaults(BOOK / "chapters" / f"{name}.ipynb")


def tree_state():
    """What `git status` prints of this checkout, or None where it is none or git is not at hand."""

    def git(*command):
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)

    try:
        top = git("rev-parse", "--show-toplevel")
    except OSError:
        return None
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        return None
    return git("status", "--porcelain").stdout


@contextmanager
def work_folder(command):
    """A folder under _build for one command alone, removed when it ends: two may run side by side."""
    BUILD.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{command}-", dir=BUILD))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def alone(name, what):
    """Hold the lock `name`; another command that asks for it waits, and says so with `what` it waits for."""
    from deepclust_nb.sweep import run

    return run.alone(BUILD / f"{name}.lock", f"Waiting: {what} in this checkout.")


@contextmanager
def progress(label):
    """Show `label` with its running seconds until the block ends: one line on a terminal, two in a log."""
    start, done = time.monotonic(), threading.Event()

    def tick():
        while not done.wait(1):
            print(f"\r{label}  {time.monotonic() - start:.0f} s ", end="", flush=True)

    live = threading.Thread(target=tick, daemon=True)
    if sys.stdout.isatty():
        live.start()
    else:
        print(f"{label}  started", flush=True)
    try:
        yield
    finally:
        done.set()
        if live.is_alive():
            live.join()
        print(
            ("\r" if sys.stdout.isatty() else "") + f"{label}  {time.monotonic() - start:.0f} s", flush=True
        )


def run_chapter(source, target, parameters, threads=None):
    """Execute `source` into `target`; return (seconds, None) or (None, what failed)."""
    from deepclust_nb.sweep import run

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with progress(f"  {source.stem}"):
            return run.run_notebook(source, target, parameters, threads=threads), None
    except run.RunFailed as error:
        print(f"  {source.stem} failed: {error}", flush=True)
        return None, str(error)
