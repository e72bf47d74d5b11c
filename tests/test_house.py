"""The rules of the house: what holds for every file, page, chapter and record, whoever wrote it.

Each rule is a function that returns the list of what breaks it. The repository must give an empty list, and a
planted case beside it shows that the rule can be broken.
"""

import ast
import builtins
import csv
import importlib
import json
import re
import shutil
import stat
import statistics
import subprocess
import symtable
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))
CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*.ipynb"))
EVIDENCE = sorted((ROOT / "book" / "evidence").glob("*.ipynb"))
NOTEBOOKS = CHAPTERS + EVIDENCE
PAGES = [ROOT / "book" / "intro.md", *sorted((ROOT / "book" / "guide").glob("*.md"))]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MIB = 2**20

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def cells(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def code_of(cell):
    """A code cell's source without IPython's magic lines."""
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source(cell).splitlines())


def chapter(*parts):
    """A notebook as read from a file, of (kind, source, tags) or (kind, source)."""
    made = [
        {
            "cell_type": part[0],
            "source": part[1],
            "metadata": {"tags": part[2] if len(part) > 2 else []},
            "outputs": [],
            "execution_count": None,
            "id": f"c{number}",
        }
        for number, part in enumerate(parts)
    ]
    return {"cells": made, "metadata": {}}


def tracked():
    """Files that are in the repository, or would be after `git add`; in an archive all but what was made."""
    if importlib.import_module("running").tree_state() is None:
        made = {
            "_build",
            "dist",
            "__pycache__",
            ".deepclust-env",
            ".ruff_cache",
            ".pytest_cache",
            ".venv",
            ".git",
        }
        files = (path for path in ROOT.rglob("*") if path.is_file() and not path.name.endswith(".part"))
        return [path for path in files if not made & set(path.relative_to(ROOT).parts)]
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


# ---------------------------------------------------------------- the repository's address


def wrong_addresses(text, slug, path=None):
    """Addresses of this repository in `text` that differ from _config.yml, or do not open `path`."""
    problems = []
    for match in re.finditer(r"github(?:\.com|usercontent\.com)?/([\w.-]+/deepclust[\w-]*)", text):
        if match[1] != slug:
            problems.append(f"{match[0]} is not the repository {slug}")
    for match in re.finditer(
        r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/([^\s)\"'>]+)", text
    ):
        if match[1] != slug:
            problems.append(f"{match[0]} is not the repository {slug}")
        if path and match[2] != f"{CONFIG['repository']['branch']}/{path}":
            problems.append(f"{match[0]} does not open {path}")
    return problems


SLUG = CONFIG["repository"]["url"].removeprefix("https://github.com/")


def test_addresses_are_those_of_the_config():
    problems = []
    for path in tracked():
        if path.suffix in (".md", ".cff", ".toml", ".py", ".yml", ".yaml", ".bib", ".ipynb"):
            relative = path.relative_to(ROOT).as_posix()
            # this file holds planted ones
            if relative != "tests/test_house.py":
                text = path.read_text(encoding="utf-8")
                problems += wrong_addresses(text, SLUG, relative if path.suffix == ".ipynb" else None)
    assert not problems


def test_a_wrong_address_is_found():
    good = f"https://colab.research.google.com/github/{SLUG}/blob/main/book/chapters/a.ipynb"
    assert not wrong_addresses(good, SLUG, "book/chapters/a.ipynb")
    assert wrong_addresses(good, SLUG, "book/chapters/b.ipynb")
    assert wrong_addresses(good, "someone/deepclust-nb", "book/chapters/a.ipynb")
    assert wrong_addresses("pip install git+https://github.com/other/deepclust-nb", SLUG)


@each_chapter
def test_a_chapter_links_to_itself_in_colab(path):
    link = f"colab.research.google.com/github/{SLUG}/blob/main/book/chapters/{path.name}"
    assert any(link in source(cell) for cell in cells(read(path), "markdown"))


# ---------------------------------------------------------------- environments and packaging


def requirement(text):
    packaging = importlib.import_module("packaging.requirements")
    return packaging.Requirement(text)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def extra(name):
    """The requirements of an extra, those that it takes from other extras included."""
    found = []
    for text in PROJECT["optional-dependencies"][name]:
        wanted = requirement(text)
        if canonical(wanted.name) == PROJECT["name"]:
            found += [item for inner in sorted(wanted.extras) for item in extra(inner)]
        else:
            found.append(wanted)
    return found


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonical(line.split("==")[0]): line.split("==")[1] for line in lines if line and line[0] != "#"}


def test_constraints_are_exact_and_cover_everything():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))
    exact = constraints()
    wanted = [requirement(text) for text in PROJECT["dependencies"]] + extra("dev")
    missing = [str(item) for item in wanted if canonical(item.name) not in exact]
    refused = [str(item) for item in wanted if exact.get(canonical(item.name)) not in (None,)]
    refused = [
        text
        for text in refused
        if not requirement(text).specifier.contains(exact[canonical(requirement(text).name)])
    ]
    assert not missing and not refused


def test_conda_people_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[dev]"]}
    assert "dev" in PROJECT["optional-dependencies"]


def test_one_version_and_one_oldest_python():
    package = importlib.import_module("deepclust_nb")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert package.__version__ == PROJECT["version"] == str(citation["version"])
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert oldest in workflow["jobs"]["test"]["strategy"]["matrix"]["python"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, from a copy, so that the checkout stays as it is."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("deepclust_nb", "data", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_carries_images_papers_and_records(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = ("data/bundled/", "data/papers/", "data/records/", "data/weights/")
    for path in tracked():
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(folders) and path.suffix != ".py":
            assert f"deepclust_nb/_data/{relative.removeprefix('data/')}" in names
        if relative.startswith("deepclust_nb/"):
            assert relative in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(("build.py", "make.py"))]


@pytest.mark.timeout(900)
def test_a_lone_chapter_runs_from_the_wheel(wheel, tmp_path):
    """An empty folder, the wheel's content, and no package that only the project's tools need."""
    nbclient, nbformat = importlib.import_module("nbclient"), importlib.import_module("nbformat")
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    absent = [
        "papermill",
        "pooch",
        "nbformat",
        "nbclient",
        "yaml",
        "myst_nb",
        "jupyter_book",
        "pytest",
        "nbval",
    ]
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent}:\n"
        "            raise ModuleNotFoundError('No module named ' + repr(name), name=name)\n"
        "sys.meta_path.insert(0, Absent())\n",
        encoding="utf-8",
    )
    path = ROOT / "book" / "chapters" / "foundations.ipynb"
    notebook = nbformat.read(shutil.copy(path, folder), as_version=4)
    where = "import deepclust_nb, sys\nassert deepclust_nb.__file__.startswith(%r), deepclust_nb.__file__"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(where % str(site)))
    environment = {
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_lone_chapter_runs_as_colab_runs_it(wheel, tmp_path, monkeypatch):
    """A real environment of the declared packages alone, the wheel without its dependencies, one file."""
    nbclient, nbformat = importlib.import_module("nbclient"), importlib.import_module("nbformat")
    python, folder = tmp_path / "env" / "bin" / "python", tmp_path / "empty"
    folder.mkdir()
    declared = [str(requirement(text).name) for text in PROJECT["dependencies"]]

    def run(*command):
        return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout

    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run(sys.executable, "-m", "venv", tmp_path / "env")
    run(*pip, "install", "--quiet", "--only-binary=:all:", "-c", ROOT / "constraints.txt", *declared)
    before = run(*pip, "freeze").splitlines()
    run(*pip, "install", "--quiet", "--no-deps", wheel)
    after = run(*pip, "freeze").splitlines()
    assert [line for line in after if line not in before] == [line for line in after if "deepclust" in line]
    assert set(before) < set(after)
    kernel = tmp_path / "jupyter" / "kernels" / "lone"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "lone", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = nbformat.read(
        shutil.copy(ROOT / "book" / "chapters" / "foundations.ipynb", folder), as_version=4
    )
    where = "import deepclust_nb\nassert %r in deepclust_nb.__file__, deepclust_nb.__file__"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(where % str(tmp_path / "env")))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="lone", resources={"metadata": {"path": str(folder)}}
    )
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    client.execute(env=environment)


# ---------------------------------------------------------------- sizes


def too_large(path, size):
    return size > (0.8 * MIB if path.suffix == ".ipynb" else 20 * MIB)


def test_files_are_small():
    assert not [str(path.relative_to(ROOT)) for path in tracked() if too_large(path, path.stat().st_size)]
    assert too_large(Path("a.ipynb"), 900_000) and too_large(Path("a.npz"), 21 * MIB)


def lines_without_docstrings(text):
    """How many lines a module has, docstrings and the blank lines of the formatter not counted."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for number, line in lines if line.strip() and number not in docstrings)


def test_the_helper_is_thin():
    """What chapters import, and the runner that none of them imports, each within its own room."""
    sizes = {
        path.relative_to(ROOT / "deepclust_nb"): lines_without_docstrings(path.read_text(encoding="utf-8"))
        for path in (ROOT / "deepclust_nb").rglob("*.py")
    }
    assert {name: size for name, size in sizes.items() if size > 300} == {}
    runner = sum(size for name, size in sizes.items() if name.parts[0] in ("sweep", "graphs.py"))
    assert runner <= 1000 and sum(sizes.values()) - runner <= 1600
    text = '"""One\ntwo."""\nx = 1\n\n\ndef f():\n    """Three."""\n    # why\n    return x\n'
    assert lines_without_docstrings(text) == 4


def test_arrows_point_one_way():
    """The helper imports no chapter, test or tool of the book, and at its top only what a chapter has; of the
    helper, only the runner imports the runner."""
    allowed = {canonical(requirement(text).name) for text in PROJECT["dependencies"]} | {"sklearn", "ipython"}
    allowed |= {canonical(name) for name in sys.stdlib_module_names} | {"deepclust-nb"}
    problems = []
    for path in (ROOT / "deepclust_nb").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and "sweep" in (node.module or "")
                and path.parent.name != "sweep"
            ):
                problems.append(f"{path.name} imports the runner")
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in (name.split(".")[0] for name in names):
                late = node in inner and name not in (
                    "book",
                    "tests",
                    "make",
                    "generated",
                    "refresh",
                    "running",
                )
                if canonical(name) not in allowed and not late:
                    problems.append(f"{path.name} imports {name}")
    assert not problems


# ---------------------------------------------------------------- chapters


def test_every_chapter_and_its_evidence_are_in_the_table_of_contents():
    running = importlib.import_module("running")
    assert sorted(running.chapters()) == [path.stem for path in CHAPTERS]
    assert CHAPTERS and sorted(running.notebooks()) == sorted(NOTEBOOKS)
    # every chapter of today has its page of evidence, in the same order
    assert running.chapters("evidence") == running.chapters()


def cell_lengths(notebook):
    """Lines of code in each code cell, without blank lines, comments and magics."""
    lines = [[line.strip() for line in source(cell).splitlines()] for cell in cells(notebook, "code")]
    return [sum(1 for line in cell if line and line[0] not in "#%!") for cell in lines]


HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
# A chapter is read in 45 minutes; what exceeds this room belongs on its evidence page.
ROOM = {"words": 4500, "visible lines of code": 300, "table rows": 60, "figures": 12}


def outputs_as(notebook, kind):
    """The outputs of a notebook that have a text of this kind, joined."""
    found = [output.get("data", {}) for cell in cells(notebook, "code") for output in cell["outputs"]]
    return ["".join(data[kind]) for data in found if kind in data]


def extent(notebook):
    """How much there is to read: the words of the text and of generated sentences, visible lines of code,
    rows of tables, figures."""
    pages = outputs_as(notebook, "text/html")
    text = "\n".join(source(cell) for cell in cells(notebook, "markdown"))
    said = [data for data in outputs_as(notebook, "text/markdown") if not data.startswith("|")]
    shown = {
        "cells": [c for c in notebook["cells"] if c["cell_type"] == "code" and not HIDDEN & set(tags(c))]
    }
    rows = sum(len(re.findall(r"<tr><td|<tr>\s*<td", page)) for page in pages)
    rows += len(re.findall(r"^\|(?!\s*:?-)", text, re.M)) - len(re.findall(r"^\|\s*:?-", text, re.M))
    return {
        "words": len(re.sub(r"<[^>]*>|\]\([^)]*\)|\||-{3,}", " ", "\n".join([text, *said])).split()),
        "visible lines of code": sum(cell_lengths(shown)),
        "table rows": rows,
        "figures": sum(len(re.findall(r"<figure\b|<div data-stepper=", page)) for page in pages),
    }


@each_chapter
def test_a_chapter_is_read_in_one_sitting(path):
    found = extent(read(path))
    assert {what: n for what, n in found.items() if n > ROOM[what]} == {}


def test_the_extent_counts_what_is_read():
    parts = [("markdown", "one two [three](a/b.md)\n\n| a | b |\n|---|---|\n| c | d |")]
    parts += [("code", "a = 1\n# why\n\nb = 2"), ("code", "c = 3", ["hide-input"]), ("code", "d = 4")]
    notebook = chapter(*parts)
    table, figure = "<table><tbody><tr><td>1</td></tr><tr><td>2</td></tr></tbody></table>", "<figure><img>"
    made = [{"text/html": table, "text/markdown": "| 1 |"}, {"text/html": figure}]
    made += [
        {"text/html": '<div data-stepper="a">'},
        {"text/markdown": "four five", "text/plain": "four five"},
    ]
    notebook["cells"][1]["outputs"] = [{"data": data} for data in made]
    counted = extent(notebook)
    assert counted.pop("words") == 3 + 4 + 2  # a table in the text is read too
    assert counted == {"visible lines of code": 3, "table rows": 3, "figures": 2}


def wrong_evidence(notebook):
    """What an evidence page holds that only a chapter may, or leaves in the reader's way."""
    problems, allowed = [], {"nbval-skip", "hide-input", "remove-input", "remove-cell"}
    for cell in cells(notebook, "code"):
        problems += [f"cell {cell['id']} has the tag {tag}" for tag in set(tags(cell)) - allowed]
        if not HIDDEN & set(tags(cell)):
            problems.append(f"cell {cell['id']} shows its source")
        imported = [node for node in ast.walk(ast.parse(code_of(cell))) if isinstance(node, ast.Import)]
        names = [alias.name.split(".")[0] for node in imported for alias in node.names]
        problems += [
            f"cell {cell['id']} imports {name}" for name in names if name in ("torch", "torchvision")
        ]
    about = notebook["metadata"].get("deepclust", {}).get("seconds", 0)
    return problems + ([f"it takes about {about} s, and 20 are allowed"] if about > 20 else [])


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_evidence_is_made_of_records_alone_and_in_seconds(path):
    notebook = read(path)
    assert not wrong_evidence(notebook)
    first = source(notebook["cells"][0])
    assert first.startswith("# Evidence: ") and f"(../chapters/{path.name})" in first
    linked = "\n".join(source(cell) for cell in cells(read(ROOT / "book/chapters" / path.name), "markdown"))
    assert f"(../evidence/{path.name}" in linked


def test_training_on_an_evidence_page_is_found():
    assert not wrong_evidence(chapter(("code", "from deepclust_nb import records", ["remove-input"])))
    for planted in (("import torch", ["remove-input"]), ("a = 1", ["run", "hide-input"]), ("a = 1", [])):
        assert wrong_evidence(chapter(("code", *planted))), planted
    slow = chapter()
    slow["metadata"]["deepclust"] = {"seconds": 30}
    assert wrong_evidence(slow)


@each_notebook
def test_cells_are_short(path):
    notebook = read(path)
    assert max(cell_lengths(notebook)) <= 40
    if path in EVIDENCE:  # whose source is not shown
        return
    shown = [cell for cell in cells(notebook, "code") if not HIDDEN & set(tags(cell))]
    lengths = sorted(cell_lengths({"cells": shown}))
    # at 80 columns the formatter makes a line of a hundred columns two
    assert statistics.median(lengths) <= 10
    assert lengths[max(0, -(-9 * len(lengths) // 10) - 1)] <= 32
    assert lengths[-1] <= 40


def wrong_definitions(notebook):
    """What a chapter's `definition` cells hold beside imports, functions, classes and constants, or read."""
    problems, trees = [], []
    for cell in cells(notebook, "code"):
        if "definition" in tags(cell):
            trees.append(ast.parse(code_of(cell)))
    defined = set(dir(builtins)) | {"__name__", "__file__"}
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined |= {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}
                if any(isinstance(x, ast.Call) for x in ast.walk(node)):
                    problems.append(f"a call at the top level: {ast.unparse(node)[:60]}")
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                problems.append(f"neither import, function, class nor constant: {ast.unparse(node)[:60]}")
    for tree in trees:
        stack = [symtable.symtable(ast.unparse(tree), "cell", "exec")]
        while stack:
            table = stack.pop()
            stack += table.get_children()
            for symbol in table.get_symbols():
                is_global = symbol.is_global() or table.get_type() == "module"
                if is_global and symbol.is_referenced() and symbol.get_name() not in defined:
                    problems.append(f"{table.get_name()} reads the global {symbol.get_name()}")
    return problems


def wrong_tags(notebook):
    """What is wrong with a chapter's tags, ids and stored outputs."""
    code, problems = cells(notebook, "code"), []
    for tag in ("parameters", "check"):
        count = sum(tag in tags(cell) for cell in code)
        if count != 1:
            problems.append(f"{count} cells are tagged {tag}, not 1")
    problems += [
        f"no cell is tagged {tag}" for tag in ("definition", "run") if not any(tag in tags(c) for c in code)
    ]
    known = {"parameters", "check", "definition", "run"}
    known |= {
        "nbval-check-output",
        "nbval-ignore-output",
        "nbval-skip",
        "hide-input",
        "hide-output",
        "hide-cell",
        "remove-cell",
        "remove-input",
        "raises-exception",
        "solution",
    }
    for cell in notebook["cells"]:
        problems += [f"cell {cell['id']} has the unknown tag {tag}" for tag in set(tags(cell)) - known]
    for cell in code:
        if "nbval-check-output" in tags(cell) and not (cell["outputs"] and cell["execution_count"]):
            problems.append(f"checked cell {cell['id']} has no stored output, so nothing would be compared")
    ids = [cell["id"] for cell in notebook["cells"]]
    problems += [f"the id {name} is used twice" for name in {name for name in ids if ids.count(name) > 1}]
    return problems


@each_chapter
def test_tags_keep_their_promises(path):
    assert not wrong_tags(read(path)) + wrong_definitions(read(path))


def test_broken_tags_are_found():
    good = [
        ("code", "a = 1", ["parameters"]),
        ("code", "checks.parameters(globals(), a=[1])", ["check"]),
        ("code", "import math", ["definition"]),
        ("code", "a", ["run"]),
    ]
    assert not wrong_tags(chapter(*good))
    assert wrong_tags(chapter(*good, good[0])) and wrong_tags(chapter(*good, good[1]))
    assert wrong_tags(chapter(*good[1:])) and wrong_tags(chapter(good[0], *good[2:]))
    assert wrong_tags(chapter(*good[:3]))
    assert wrong_tags(chapter(*good, ("code", "1", ["definitions"])))
    assert wrong_tags(chapter(*good, ("code", "print(1)", ["nbval-check-output"])))
    definitions = [
        "import math\nC = 2.0\n\ndef f(x, *, k=C):\n    y = math.sqrt(x)\n    return [y * k for z in ()]",
        "class A:\n    b = 1\n\n    def g(self):\n        return f(self.b)",
    ]
    assert not wrong_definitions(chapter(*[("code", text, ["definition"]) for text in definitions]))
    for planted in (
        "def f(x):\n    return x + seed",
        "print(1)",
        "model = dict(a=1)",
        "for i in range(2):\n    pass",
    ):
        assert wrong_definitions(chapter(("code", planted, ["definition"]))), planted


def wrong_outputs(notebook):
    """Stored outputs that show this machine, warnings, or a picture without words."""
    problems = []
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            name = f"cell {cell['id']}"
            if output.get("name") == "stderr":
                problems.append(f"{name} stores what was written to stderr")
            if output["output_type"] == "error" and "raises-exception" not in tags(cell):
                problems.append(f"{name} stores an error")
            data = output.get("data", {})
            if any(key.startswith("image/") for key in data):
                problems.append(f"{name} shows a bare picture: plots.show(fig, alt) gives it a text")
            texts = [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
            text = "\n".join("".join(item) for item in texts)
            if "<img" in text and not re.search(r"<figcaption>\s*\S|class=\"words\">\s*\S", text):
                problems.append(f"{name} shows a picture without a caption")
            for image in re.findall(r"<img\b[^>]*>", text):
                if not re.search(r"""\balt=(["'])(?=\s*\S)(?!\1)""", image):
                    problems.append(f"{name} shows a picture without alternative text")
            bare = re.sub(r"data:[\w/;+-]+base64,[\w+/=\s]*", "", text)
            if re.search(r"(?<![\w.:/])/(?:home|root|tmp|Users|work|opt)/\w", bare):
                problems.append(f"{name} stores a path of the machine it ran on")
    for cell in cells(notebook, "markdown"):
        if re.search(r"!\[\s*\]\(", source(cell)):
            problems.append(f"cell {cell['id']} shows a picture without alternative text")
        if re.search(r"^(```|:::)\{|\{[a-z:]+\}`", source(cell), re.M):
            problems.append(f"cell {cell['id']} uses a directive or role that Colab cannot show")
    return problems


@each_notebook
def test_outputs_are_fit_to_be_stored(path):
    assert not wrong_outputs(read(path))


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "stream", "name": "stderr", "text": ["a warning"]},
        {"output_type": "error", "ename": "E", "evalue": "", "traceback": []},
        {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "<Figure>"}},
        {"output_type": "display_data", "data": {"text/html": '<img src="data:image/png;base64,AA==">'}},
        {
            "output_type": "display_data",
            "data": {"text/html": '<img alt="" src="data:image/png;base64,AA==">'},
        },
        {"output_type": "stream", "name": "stdout", "text": ["saved to /tmp/x/model.pt"]},
        {
            "output_type": "display_data",
            "data": {"text/html": '<img alt="three curves" src="data:image/png;base64,AA==">'},
        },
    ],
)
def test_unfit_outputs_are_found(output):
    notebook = chapter(("code", "1"))
    notebook["cells"][0]["outputs"] = [output]
    assert wrong_outputs(notebook)


def test_fit_outputs_and_unfit_text():
    notebook = chapter(("code", "1"), ("markdown", "A [link](a.md) and ![words](a.png)"))
    html = '<img src="data:image/png;base64,A/tmp/A==" alt="three curves" style="max-width:100%">'
    html = f"<figure>{html}<figcaption>Three curves</figcaption></figure>"
    notebook["cells"][0]["outputs"] = [{"output_type": "display_data", "data": {"text/html": html}}]
    assert not wrong_outputs(notebook)
    assert wrong_outputs(chapter(("markdown", "![](a.png)")))
    assert wrong_outputs(chapter(("markdown", "see {ref}`there`")))


@each_notebook
def test_stored_outputs_are_of_current_code(path):
    code = importlib.import_module("deepclust_nb.digest")
    stored = read(path)["metadata"].get("deepclust", {}).get("shown")
    now = code.shown_digest(path.stem, path.parent.name)
    assert stored == now, "code or records changed since: run `make refresh`"
    digest = ROOT / "data" / "records" / path.stem / "digest.txt"
    assert digest.read_text(encoding="utf-8").strip() == code.code_digest(path.stem), "run `make refresh`"


# ---------------------------------------------------------------- numbers and links in the text


def facts():
    with open(ROOT / "data" / "papers" / "facts.csv", encoding="utf-8", newline="") as file:
        return {float(row["value"]) for row in csv.DictReader(file)}


# Not results: versions of Python, and places in a paper.
NOT_A_RESULT = (
    r"(?:Python|section|sections|§|eqs?\.|equations?|figures?|fig\.|tables?|arXiv:?|version)\s*\(?$"
)


def typed_numbers(text, known=()):
    """Decimals and percentages typed in Markdown outside mathematics, code, generated text and references."""
    text = re.split(r"^#+\s*References\s*$", text, maxsplit=1, flags=re.M)[0]
    for pattern in (
        r"<!-- generated: \w+ -->.*?<!-- end generated -->",
        r"<!--.*?-->",
        r"^(`{3,}|~{3,}).*?^\1",
        r"`[^`]*`",
        r"\$\$.*?\$\$",
        r"\$[^$]+\$",
        r"\]\([^)]*\)",
        r"<[^>]*>",
        r"https?://\S+",
    ):
        text = re.sub(pattern, " ", text, flags=re.S | re.M)
    found = []
    for match in re.finditer(r"(?<![\w.])(\d+(?:\.\d+)?)(\s?%|\s?per ?cent)?(?![\w]|\.\d)", text):
        if "." not in match[1] and not match[2]:
            continue
        value = float(match[1])
        here = text[max(0, match.start() - 20) : match.start()]
        listed = any(abs(value - v) < 1e-9 or abs(value - 100 * v) < 1e-9 for v in known)
        if not listed and not re.search(NOT_A_RESULT, here, re.I):
            found.append(match[0])
    return found


@pytest.mark.parametrize("path", TEXTS + NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_numbers_are_generated_or_listed(path):
    if path.suffix == ".ipynb":
        text = "\n\n".join(source(cell) for cell in cells(read(path), "markdown"))
    else:
        text = path.read_text(encoding="utf-8")
    assert not typed_numbers(text, facts())


def test_typed_numbers_are_found():
    assert typed_numbers("ACC rose to 0.912 and by 5 %, then 12%.") == ["0.912", "5 %", "12%"]
    assert not typed_numbers("by 0.843, which is 84.3 %", known=[0.843])
    assert not typed_numbers("`0.5` and $0.5$ in Python 3.11, section 3.2, 5,000 images\n\n```\n0.1\n```\n")
    assert not typed_numbers("text\n\n## References\n\nA 2016, 0.5")


def broken_links(text, folder):
    """Links and pictures in Markdown that name no file."""
    text = re.sub(r"^(`{3,}).*?^\1|`[^`\n]*`", "", text, flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target for target in targets if not (folder / target).exists()]


@pytest.mark.parametrize("path", TEXTS + NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(source(cell) for cell in cells(read(path), "markdown"))
    assert not broken_links(text, path.parent)
    assert broken_links("[a](no/such/page.md)", path.parent)


# ---------------------------------------------------------------- records, generated text, pages


def test_records_are_whole():
    """Each file is read by the one reader that trusts nothing, and no run is stored twice under one study."""
    records = importlib.import_module("deepclust_nb.records")
    seen = {}
    for path in (ROOT / "data" / "records").rglob("*.json"):
        for record in records.read(path):
            run = [record[key] for key in ("chapter", "study", "method", "parameters")]
            assert seen.setdefault(records.canonical(run), path.name) == path.name, f"{path} repeats a run"
    assert seen


@each_chapter
def test_a_check_cell_can_be_executed_by_a_sweep(path):
    """It names nothing but the modules `checks` and `data`, the parameters, and what it sets itself."""
    plan = importlib.import_module("deepclust_nb.sweep.plan")
    quick = plan.defaults(path)
    plan.refuse(path, quick)
    for name in quick:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            plan.refuse(path, quick | {name: "no such value"})


def test_recorded_sweeps_say_their_threads():
    for path in (ROOT / "book" / "experiments").glob("*.yaml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["threads"] == 1, path.name


def test_the_readme_shows_the_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    filled = importlib.import_module("generated").fill(text, "book/")
    assert text == filled, "run `make refresh`"


def test_tables_mark_older_code(monkeypatch):
    generated, results = importlib.import_module("generated"), importlib.import_module("deepclust_nb.results")
    records = importlib.import_module("deepclust_nb.records")
    record = {"chapter": "foundations", "dataset": "mnist", "profile": "laptop", "method": "DEC", "seed": 0}
    record |= {"study": "headline", "parameters": {"seed": 0}}
    record |= {"acc": 0.5, "nmi": 0.25, "current": True}
    monkeypatch.setattr(generated, "chapters", lambda: ["foundations"])
    monkeypatch.setattr(results, "paper", lambda chapter: [])
    for current in (True, False):
        found = [record, {**record, "seed": 1, "acc": 0.7, "current": current}]
        monkeypatch.setattr(records, "load", lambda found=found, **wanted: found)
        table = generated.status_table()
        assert "0.600 (0.500 to 0.700, 2 seeds)" in table
        assert ("older code" in table) is not current


def test_generated_text_is_replaced_once_and_only_once(monkeypatch):
    generated = importlib.import_module("generated")
    monkeypatch.setattr(generated, "GENERATED", {"chapters": lambda prefix: f"made {prefix}\n"})
    page = "before\n\n<!-- generated: chapters -->\n\nafter\n"
    once = generated.fill(page, "x/")
    assert once == "before\n\n<!-- generated: chapters -->\n\nmade x/\n\n<!-- end generated -->\n\nafter\n"
    assert generated.fill(once, "x/") == once
    assert "made y/" in generated.fill(once, "y/") and "made x/" not in generated.fill(once, "y/")


def test_pages_that_load_from_outside_are_found(tmp_path):
    loads = importlib.import_module("make").loads_from_outside
    good = (
        '<script src="_static/a.js"></script><a href="https://example.org/a.js">a</a><link rel="canonical" '
    )
    (tmp_path / "a.html").write_text(good + 'href="https://example.org/">', encoding="utf-8")
    assert not loads(tmp_path)
    for planted in (
        '<script defer src="https://example.org/a.js"></script>',
        "<script src=//example.org/a.js></script>",
        '<link href="https://example.org/a.css" rel="stylesheet">',
        '<link rel="preconnect" href="https://example.org">',
        '<img alt="a" src="http://example.org/a.png">',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>@font-face { src: url(https://example.org/a.woff2) }</style>",
    ):
        (tmp_path / "a.html").write_text(good.replace("<link", "<br", 1) + planted, encoding="utf-8")
        assert loads(tmp_path), planted


def test_refresh_keeps_what_did_not_change():
    refresh, nbformat = importlib.import_module("refresh"), importlib.import_module("nbformat").v4
    record = {"acc": 0.5, "seconds": 1.0, "versions": {"python": "3.11"}}

    def notebook(acc, seconds, printed):
        shown = {refresh.RECORD: {**record, "acc": acc, "seconds": seconds}, "text/plain": f"ACC {acc}"}
        run, checked = nbformat.new_code_cell("run()"), nbformat.new_code_cell("print()")
        run.id, checked.id = "run", "checked"
        run.outputs = [nbformat.new_output("display_data", data=shown)]
        run.outputs.append(nbformat.new_output("stream", name="stderr", text=f"{seconds} s"))
        checked.outputs = [nbformat.new_output("stream", name="stdout", text=text) for text in printed]
        checked.metadata = {"tags": ["nbval-check-output"], "papermill": {"duration": seconds}}
        return nbformat.new_notebook(cells=[run, checked])

    stored = notebook(0.5, 1.0, ["a\nb\n"])
    stored.cells[0].outputs.pop()
    before = json.dumps(stored.cells[0].outputs)
    assert refresh.merge(stored, notebook(0.5, 2.0, ["a\n", "b\n"])) == []
    assert json.dumps(stored.cells[0].outputs) == before and "papermill" not in stored.cells[1].metadata
    report = refresh.merge(stored, notebook(0.6, 2.0, ["a\n", "c\n"]))
    assert [line.strip() for line in report if line.strip()[0] in "+-"] == ["-b", "+c"]
    assert stored.cells[0].outputs[0].data[refresh.RECORD]["acc"] == 0.6
    assert len(stored.cells[0].outputs) == 1 and [cell.execution_count for cell in stored.cells] == [1, 2]


# ---------------------------------------------------------------- make env

PYTHON = """#!/bin/sh
# Stands in for Python: what it does is set by the files beside the Makefile.
case "$1 $2" in
  "-c import sys"*) [ ! -e too_old ] ;;
  "-c import venv"*) [ ! -e no_venv ] ;;
  "--version "*) echo "Python 3.9.2" ;;
  "-m deepclust_nb.sweep") shift 2; printf 'sweep %s\n' "$*" "$#" >> log ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >> log ;;
  "-m pip") shift 2; echo "pip $*" >> log; [ ! -e no_network ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "fake-python"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def make_env(folder, python="./fake-python"):
    done = subprocess.run(
        ["make", "-s", "env", f"PYTHON={python}"], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("missing", "no-such-python was not found: install Python 3.11 or newer"),
        ("too_old", "is too old (Python 3.9.2): Python 3.11 or newer is needed"),
        ("no_venv", "has no venv module: install it"),
        ("no_network", "could not be installed"),
    ],
)
def test_make_env_says_what_is_missing_and_recovers(checkout, condition, sentence):
    (checkout / condition).touch()
    code, text = make_env(checkout, "no-such-python" if condition == "missing" else "./fake-python")
    assert code != 0 and sentence in text
    assert not (checkout / ".deepclust-env" / "complete").exists()
    (checkout / condition).unlink()
    assert make_env(checkout)[0] == 0
    assert (checkout / ".deepclust-env" / "complete").exists()
    assert make_env(checkout) == (0, "")


def test_make_env_leaves_alone_what_it_did_not_make(checkout):
    """`.venv` is what editors and other tools call theirs."""
    for name in (".venv", "venv", "env"):
        (checkout / name / "bin").mkdir(parents=True)
        (checkout / name / "bin" / "python").touch()
    assert make_env(checkout)[0] == 0
    assert all((checkout / name / "bin" / "python").exists() for name in (".venv", "venv", "env"))


def test_two_make_env_do_it_once_and_the_second_says_that_it_waits(checkout):
    lock = checkout / ".deepclust-env.lock"
    lock.mkdir()
    command = ["make", "-s", "env", "PYTHON=./fake-python"]
    second = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True)
    line = second.stdout.readline()
    assert "Waiting: another make is installing the packages" in line and second.poll() is None
    assert not (checkout / "log").exists()
    lock.rmdir()
    assert second.wait(20) == 0 and (checkout / ".deepclust-env" / "complete").exists()
    assert not lock.exists()


def test_make_env_in_a_folder_that_cannot_be_written_says_so(checkout):
    text = (checkout / "Makefile").read_text(encoding="utf-8")
    (checkout / "Makefile").write_text(text.replace("LOCK := ", "LOCK := no/such/folder/"), encoding="utf-8")
    code, text = make_env(checkout)
    assert code != 0 and "cannot be written: make needs a folder of its own there" in text


def test_make_env_makes_a_half_made_environment_again(checkout):
    (checkout / ".deepclust-env" / "bin").mkdir(parents=True)
    (checkout / ".deepclust-env" / "left_over").touch()
    code, text = make_env(checkout)
    assert code == 0 and "half-made" in text and not (checkout / ".deepclust-env" / "left_over").exists()
    assert "--only-binary=:all:" in (checkout / "log").read_text(encoding="utf-8")


def test_make_env_follows_an_edited_list(checkout):
    assert make_env(checkout)[0] == 0
    (checkout / ".deepclust-env" / "kept").touch()
    with open(checkout / "constraints.txt", "a", encoding="utf-8") as file:
        file.write("six==1.16.0\n")
    code, text = make_env(checkout)
    assert code == 0 and "Installing" in text and (checkout / ".deepclust-env" / "kept").exists()


def test_a_sweep_file_may_have_a_space_in_its_name(checkout):
    command = ["make", "-s", "sweep", "FILE=my runs.yaml", "PYTHON=./fake-python"]
    assert subprocess.run(command, cwd=checkout).returncode == 0
    assert (checkout / "log").read_text(encoding="utf-8").endswith("sweep my runs.yaml\nsweep 1\n")


def test_workflows_use_what_people_use():
    runs = {}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in workflow["jobs"].values():
            assert job["runs-on"] == "ubuntu-latest" and job["timeout-minutes"] and job["steps"]
            runs.setdefault(path.stem, []).extend(step["run"] for step in job["steps"] if "run" in step)
    assert ".ci/run" in runs["tests"] and "make html" in runs["pages"]
    assert not any("constraints" in line for line in runs["weekly"])
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & stat.S_IXUSR and "make test" in ci.read_text(encoding="utf-8")
