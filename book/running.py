"""The book's chapters: their names, their notebooks, and a run of one with a progress line."""

import ast
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOK, BUILD = ROOT / "book", ROOT / "_build"


def chapters():
    """Names of the chapters (notebooks) in the table of contents, in its order."""
    import yaml

    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [Path(file).name for file in files if file.startswith("chapters/")]


def read_notebook(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def write_atomically(path, text):
    """Write `text` to `path` by way of a file beside it, so that nobody reads half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def default_parameters(name):
    """The quick profile: what the chapter's `parameters` cell assigns, as a dict."""
    for cell in read_notebook(BOOK / "chapters" / f"{name}.ipynb").cells:
        if "parameters" in cell.metadata.get("tags", []):
            lines = [
                node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign | ast.AnnAssign)
            ]
            names = [node.targets[0] if isinstance(node, ast.Assign) else node.target for node in lines]
            return {
                target.id: ast.literal_eval(node.value) for target, node in zip(names, lines, strict=True)
            }
    raise SystemExit(f"{name}.ipynb has no cell tagged parameters.")


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
    from deepclust_nb import sweep

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with progress(f"  {source.stem}"):
            return sweep.run_notebook(source, target, parameters, threads=threads), None
    except sweep.RunFailed as error:
        print(f"  {source.stem} failed: {error}", flush=True)
        return None, str(error)
