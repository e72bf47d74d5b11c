"""What tests need to reach code that is not importable: the cells of chapters, and throw-away checkouts."""

import functools
import importlib.util
import itertools
import json
import linecache
import shutil
import sys
import types
from pathlib import Path

from deepclust_nb.digest import chapter_file

PACKAGE = Path(importlib.util.find_spec("deepclust_nb").origin).parent
PARAMETERS = {"dataset": "mnist_5k", "profile": "quick", "seed": 0, "lr": 0.1}  # of hand-made records
_numbers = itertools.count()


@functools.cache
def definitions(chapter):
    """A chapter's `definition` cells, run in order, as a module: the very lines that people read.

    `inspect.getsource` works on what it holds. Lines of IPython magic are left out.

    Raises: FileNotFoundError when there is no such chapter.
    """
    path = chapter_file(chapter)
    module = types.ModuleType(f"chapter_{chapter}", f"Definitions of {path.name}")
    sys.modules[module.__name__] = module
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if "definition" in cell["metadata"].get("tags", []):
            lines = "".join(cell["source"]).splitlines(keepends=True)
            lines = ["\n" if line.lstrip().startswith(("%", "!")) else line for line in lines]
            name = f"<{path.name}, cell {number}>"
            linecache.cache[name] = (len("".join(lines)), None, lines, name)
            exec(compile("".join(lines), name, "exec"), module.__dict__)
    return module


def cell_with(chapter, text):
    """The source of the one code cell of a chapter that holds a text."""
    cells = json.loads(chapter_file(chapter).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (source,) = (source for source in sources if text in source)
    return source


def notebook(cells, path):
    """Write a notebook: cells is a list of (source, tag or None, outputs or None)."""
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"cells": [], "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}
    for number, (source, tag, outputs) in enumerate(cells):
        metadata = {"tags": [tag]} if tag else {}
        cell = {"cell_type": "code", "id": f"cell-{number}", "metadata": metadata, "source": source}
        content["cells"].append(cell | {"execution_count": None, "outputs": outputs or []})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def checkout(folder):
    """A copy of the helper in an empty checkout, imported under a name of its own.

    Returns: (function from module name to module of the copy, the folder).
    """
    shutil.copytree(PACKAGE, folder / "deepclust_nb", ignore=shutil.ignore_patterns("__pycache__", "_data"))
    for name in ("data/bundled", "data/papers", "data/records", "book/chapters", "book/experiments/profiles"):
        (folder / name).mkdir(parents=True)
    name = f"deepclust_copy_{next(_numbers)}"
    init = folder / "deepclust_nb" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return lambda module: importlib.import_module(f"{name}.{module}"), folder


def store(records, folder, method="DEC", seed=0, schema=2, **changes):
    """Put one record into a checkout by hand, sealed and at the place that its content names.

    Parameters: records: that module of the checkout; changes: keys of the record; `parameters` adds to
        PARAMETERS.
    Returns: the file's path.
    """
    body = {"chapter": "tiny", "method": method, "dataset": "mnist_5k", "profile": "quick", "seed": seed}
    body |= {"acc": 0.8, "precision": "float32", "study": "headline", "digest": "0", "threads": 1} | changes
    own = {key: body[key] for key in ("dataset", "profile", "seed")}
    body["parameters"] = PARAMETERS | own | changes.get("parameters", {})
    body["sha256"] = records.body_hash(body)
    threads = body["threads"] if schema > 1 else None
    key = records.run_key(body["digest"], body["parameters"], threads)
    place = (body["chapter"], body["dataset"], body["profile"], f"{body['seed']}-{key}.json")
    path = folder.joinpath("data", "records", *place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": schema, "records": [body]}), encoding="utf-8")
    return path
