"""Which code a number comes from: digests of syntax trees, so that comments and docstrings never age a
record.

Two digests per chapter: `code_digest` for what decides the numbers, `shown_digest` for what the stored
outputs of its notebook depend on. Code counts when the chapter's cells or the recorder reach it by name; this
may take in a definition too many (any attribute of the same name does it), never one too few. `state` is a
kernel's word on what it runs.

This module runs no chapter code.
"""

import ast
import functools
import hashlib
import json
import os
import subprocess
from pathlib import Path

from .places import RECORDING, chapter_file, data_root, root, write_atomic

COMPUTING = ("data", "metrics", "networks", "training", "baselines", "mixtures")
LATER = ("mixtures",)
DECIDING = {"definition", "run"}  # tags of the cells that make numbers
DISPLAYING = (*COMPUTING, "checks", "plots", "records", "results")


def canonical(value):
    """JSON text with sorted keys and no spaces, the same for equal values; NumPy scalars become Python's."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=lambda scalar: scalar.item()
    )


def sha256(value):
    """SHA-256 of a value's canonical JSON: 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def code_digest(chapter):
    """Digest of the code that decides a chapter's numbers.

    Hashed are the syntax trees, without comments and docstrings, of the chapter's `definition` and `run`
    cells and of the top-level definitions of the computing modules (data, metrics, networks, training,
    baselines, mixtures) that those cells, or `records.record`, reach by name, directly or through one
    another. A definition that nothing of this reaches does not count.

    Returns: 64 hexadecimal digits, the same on every Python version and machine.
    Raises: FileNotFoundError when the checkout has no such chapter; SyntaxError for a cell that does not
    parse.
    """
    recorder = [node for _, name, node in _definitions("records") if name == "record"]
    return _digest(_statements(chapter_file(chapter), DECIDING), COMPUTING, reach=recorder)


def cells_digest(notebook):
    """Digest of the `definition` and `run` cells alone, of any notebook file: what an executed one ran."""
    return sha256(_tree(_statements(notebook, DECIDING)))


def shown_digest(chapter, folder="chapters"):
    """Digest of all that the stored outputs of a chapter, or of its page in `evidence`, depend on: its code
    cells, the definitions they reach in the helper (sweep left out), the papers' numbers, and the records and
    the code digest of the chapter and of every chapter it names (all records for one that has none).

    Returns: 64 hexadecimal digits.
    Raises: as `code_digest`.
    """
    statements = _statements(chapter_file(chapter, folder), None)
    named = {node.value for top in statements for node in ast.walk(top) if isinstance(node, ast.Constant)}
    records, papers = data_root() / "records", data_root() / "papers"
    every = not (records / chapter).is_dir()
    files = [path for path in papers.glob("*.csv")]
    for path in records.rglob("*.json"):
        if every or path.relative_to(records).parts[0] in {chapter, *named}:
            files.append(path)
    # As text with its line ends normalised: a checkout on Windows holds the same.
    contents = [[path.name, sha256(path.read_text(encoding="utf-8"))] for path in sorted(files)]
    # A record's mark "older code" depends on the code, of which an evidence page itself holds nothing.
    shown = sorted({path.relative_to(records).parts[0] for path in files if path.suffix == ".json"})
    contents += [[name, code_digest(name)] for name in shown if chapter_file(name).is_file()]
    return _digest(statements, DISPLAYING, contents)


def state():
    """What this kernel runs, while a sweep records it (DEEPCLUST_RECORDING): package, digest and commit.

    Taken at the first call, that of the `check` cell, so that a file saved or a commit made later changes
    nothing. The sweep compares it with what it meant to run.

    Returns: a dict with package (the folder it was imported from), digest and commit, or None without a
        recording sweep.
    """
    chapter = os.environ.get(RECORDING)
    return _stated(chapter) if chapter else None


@functools.cache
def _stated(chapter):
    digest = code_digest(chapter) if chapter_file(chapter).is_file() else None
    return {"package": str(root()), "digest": digest, "commit": commit()}


def commit():
    """The commit of this checkout, with "+changes" where its code differs; None outside one (a package that
    lies inside another repository included) and without git.
    """

    def git(*command):
        done = subprocess.run(["git", "-C", str(root()), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() != root():
            return None
        changed = git("status", "--porcelain", "--", "deepclust_nb", "book/chapters", "book/experiments")
        head = git("rev-parse", "HEAD")
    except OSError:
        return None
    return (head + ("+changes" if changed else "")) or None


def write_digest(chapter):
    """Store the chapter's code digest beside its records, for copies of these without the chapters."""
    write_atomic(data_root() / "records" / chapter / "digest.txt", code_digest(chapter) + "\n")


def digest_of_today(chapter):
    """The chapter's code digest; where there is no chapter, as in the wheel, the stored one, or None."""
    if chapter_file(chapter).is_file():
        modules = (*COMPUTING, "records")
        files = [chapter_file(chapter), *(Path(__file__).with_name(f"{module}.py") for module in modules)]
        return _remembered(chapter, tuple(file.read_bytes() for file in files))
    stored = data_root() / "records" / chapter / "digest.txt"
    return stored.read_text(encoding="utf-8").strip() if stored.is_file() else None


@functools.lru_cache(maxsize=16)
def _remembered(chapter, contents):
    # A page asks a hundred times, and parsing takes a tenth of a second; contents are the key alone.
    return code_digest(chapter)


def _digest(statements, modules, more=(), reach=()):
    names = {name for tree in (*statements, *reach) for name in _identifiers(tree)}
    left, reached, found = [x for module in modules for x in _definitions(module)], {}, [None]
    # Every module imports torch: a later one, of which nothing else is reached, has no part in a chapter and
    # ages none. Those that were there when the first records were made count with their imports, as then.
    part = set(modules) - set(LATER)
    while found:
        found = [x for x in left if x[1] in names]
        left = [x for x in left if x[1] not in names]
        for module, name, node in found:
            # One name may be defined by several statements: SIZES = ..., SIZES |= ...
            reached.setdefault((module, name), []).append(_tree(node))
            names |= _identifiers(node)
            if not isinstance(node, ast.Constant):  # which is what `_definitions` makes of an import
                part.add(module)
    counted = sorted([*key, *trees] for key, trees in reached.items() if key[0] in part)
    return sha256([_tree(statements), counted, list(more)])


def _statements(path, tags):
    if not path.is_file():
        raise FileNotFoundError(f"there is no chapter {path.stem!r} in {path.parent}")
    statements = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and (tags is None or tags & set(cell["metadata"].get("tags", []))):
            lines = "".join(cell["source"]).splitlines()
            statements += ast.parse("\n".join(x for x in lines if not x.lstrip().startswith(("%", "!")))).body
    return statements


def _definitions(module):
    for node in ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield module, node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:  # what a name stands for decides as much as what a function does
                source = [getattr(node, "module", None), getattr(node, "level", 0), alias.name]
                yield module, (alias.asname or alias.name).split(".")[0], ast.Constant(repr(source))
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in [x for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]:
                yield module, name.id, node


def _identifiers(tree):
    names = set()
    for node in ast.walk(tree):
        names |= {getattr(node, "id", None), getattr(node, "attr", None)}
        if isinstance(node, ast.alias):
            names |= set(node.name.split("."))
    return names - {None}


def _tree(node):
    # Not ast.dump: its text differs between Python versions, and a new interpreter must not age a record.
    if isinstance(node, list):
        return [_tree(child) for child in node if not _is_text(child)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    left_out = ("ctx", "kind", "type_comment")
    return [type(node).__name__, *([name, _tree(value)] for name, value in fields if name not in left_out)]


def _is_text(node):
    return isinstance(getattr(node, "value", None), ast.Constant) and isinstance(node, ast.Expr)
