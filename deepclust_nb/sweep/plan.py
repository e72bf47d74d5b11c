"""A sweep file read and checked as a whole: no mistake in it waits for a run to find it.

Besides names and types, each run's parameters go through the chapter's own `check` cell, the one source of
its limits. Nothing here imports torch, unless such a cell asks for the size of a data set.
"""

import ast
import importlib
import json
import re
from pathlib import Path

from .. import checks
from ..checks import suggestion
from ..digest import canonical
from ..places import chapter_file, root

KEYS = {"chapter": str, "dataset": str, "profile": str, "seeds": list, "parameters": dict}
FIXED = ("dataset", "profile", "seed")
RESERVED = ("headline",)  # the study of runs at a profile's own parameters


def need(package):
    """Import a package that only sweeps need; RuntimeError, saying what to install, where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise RuntimeError(f"sweeps need {package}: pip install 'deepclust-nb[sweep]'") from None


def plan(path):
    """Read a sweep file and check all of it.

    Parameters: path: a YAML file whose key `runs` is a list of {chapter, dataset, profile, seeds,
        parameters}, where profile is "quick" and parameters are empty if left out; a second key, `threads`,
        may tell the threads of each run (None in the runs if it is left out).
    Returns: a list of runs, one a seed: dicts of chapter, parameters (all of the chapter's), study, threads.
    Raises: ValueError with one sentence for the first mistake found.
    """
    path = Path(path)
    content = read_yaml(path)
    if path.stem in RESERVED:
        raise ValueError(
            f"{path.name} cannot name a sweep: {path.stem} is the study of runs at a profile's own parameters"
        )
    keys = set(content) if isinstance(content, dict) else set()
    if not {"runs"} <= keys <= {"runs", "threads"} or not isinstance(content["runs"], list):
        raise ValueError(f"{path.name} must hold one key, runs, with a list of runs, and may hold threads")
    threads = content.get("threads")
    if "threads" in keys and (type(threads) is not int or not 1 <= threads <= 1024):
        raise ValueError(f"{path.name}: threads must be an int between 1 and 1024, got {_short(threads)}")
    runs = []
    for number, entry in enumerate(content["runs"], 1):
        try:
            runs += [run | {"threads": threads} for run in _expanded(entry, path.stem)]
        except ValueError as error:
            raise ValueError(f"{path.name}, run {number}: {error}") from None
    seen = set()
    for run in runs:
        key = canonical([run["chapter"], run["parameters"]])
        if key in seen:
            raise ValueError(f"{path.name} asks twice for the run {name_of(run)}")
        seen.add(key)
    return runs


def name_of(run):
    """A run in a few words: chapter, data set, profile and seed."""
    p = run["parameters"]
    study = "" if run["study"] == "headline" else f" ({run['study']})"
    return f"{run['chapter']} {p['dataset']} {p['profile']} seed {p['seed']}{study}"


def chapter_path(chapter):
    """Where the notebook of a chapter lies.

    Returns: a pathlib.Path.
    Raises: ValueError when the checkout has no such chapter, naming the closest one, or when there is no
        checkout around the package.
    """
    path = chapter_file(str(chapter))
    known = sorted(other.stem for other in path.parent.glob("*.ipynb"))
    if not known:
        raise ValueError(f"there are no chapters in {path.parent}: run sweeps from a checkout of the book")
    if str(chapter) not in known:
        raise ValueError(f"there is no chapter {chapter!r}{suggestion(str(chapter), known)}")
    return path


def profile_parameters(chapter, profile, dataset):
    """The parameters that a profile sets for a chapter on a data set.

    They stand in book/experiments/profiles/CHAPTER.PROFILE.DATASET.yaml, a flat file that papermill takes
    with `-f`; the profile "quick" is the chapter's own defaults and needs no file.

    Returns: a dict with dataset and profile among its keys.
    Raises: ValueError when the file is missing, is not a flat mapping, or names another data set or profile.
    """
    for key, name in (("dataset", dataset), ("profile", profile)):
        if not re.fullmatch(r"\w{1,40}", name):
            raise ValueError(f"{key} must be a name of letters, digits and _, got {_short(name)}")
    path = root() / "book" / "experiments" / "profiles" / f"{chapter}.{profile}.{dataset}.yaml"
    values = read_yaml(path) if path.is_file() or profile != "quick" else {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path.name} must be a mapping from parameter to value, got {type(values).__name__}"
        )
    fixed = {"dataset": dataset, "profile": profile}
    for name in fixed:
        if values.get(name, fixed[name]) != fixed[name]:
            raise ValueError(f"{path.name} sets {name} to {values[name]!r}, its name says {fixed[name]!r}")
    return values | fixed


def cells_tagged(notebook, tag):
    """The sources of a notebook's cells with a tag, in order."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if tag in cell["metadata"].get("tags", [])]


def defaults(notebook):
    """What a notebook's `parameters` cell sets: a dict from name to value.

    Raises: ValueError for a value that is no literal.
    """
    found = {}
    cells = cells_tagged(notebook, "parameters")
    for name, value in (pair for cell in cells for pair in checks.assigned(cell)):
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:
            shown = f"{name} = {ast.unparse(value)}"
            problem = f"a parameter's default must be a literal, got {shown}"
            raise ValueError(f"{Path(notebook).name}: {problem}") from None
    return found


def resolve(notebook, parameters):
    """A notebook's parameters after some of them are overridden.

    Parameters: notebook: path of an .ipynb with a cell tagged `parameters`; parameters: name to value.
    Returns: a dict of all parameters; an int given for a float becomes a float.
    Raises: ValueError for an unknown name (with the closest known one), a value whose type is not the
        default's, or a default that is not a literal.
    """
    own = defaults(notebook)
    resolved = dict(own)
    for name, value in parameters.items():
        if name not in own:
            raise ValueError(f"{Path(notebook).stem} has no parameter {name}{suggestion(str(name), own)}")
        resolved[name] = _like(name, value, own[name])
    return resolved


def refuse(notebook, parameters):
    """Execute a notebook's `check` cell with these parameters, as the notebook itself will.

    Raises: ValueError with its sentence.
    """
    for source in cells_tagged(notebook, "check"):
        code = compile(source, f"<{Path(notebook).name}, check>", "exec")
        exec(code, parameters | {"checks": checks, "data": _Late()})


class _Late:
    """The module `data`, imported when it is used: torch takes seconds to load."""

    def __getattr__(self, name):
        return getattr(importlib.import_module("..data", __package__), name)


def _expanded(entry, stem):
    if not isinstance(entry, dict):
        raise ValueError(f"a run must be a mapping with chapter, dataset and seeds, got {_short(entry)}")
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{key} is not a key of a run{suggestion(str(key), KEYS)}")
    entry = {"profile": "quick", "parameters": {}} | entry
    for key, kind in KEYS.items():
        if not isinstance(entry.get(key), kind):
            raise ValueError(f"{key} must be of type {kind.__name__}, got {_short(entry.get(key))}")
    if not entry["seeds"] or any(type(seed) is not int for seed in entry["seeds"]):
        raise ValueError(f"seeds must be a list of ints with at least one, got {_short(entry['seeds'])}")
    chapter, dataset, overrides = entry["chapter"], entry["dataset"], entry["parameters"]
    notebook = chapter_path(chapter)
    for name in set(FIXED) & set(overrides):
        raise ValueError(f"{name} is a key of the run (seeds for seed), not one of its parameters")
    profile = profile_parameters(chapter, entry["profile"], dataset)
    runs = []
    for seed in entry["seeds"]:
        plain = resolve(notebook, profile | {"seed": seed})
        parameters = resolve(notebook, profile | overrides | {"seed": seed})
        try:
            refuse(notebook, parameters)
        except ValueError as error:
            raise ValueError("; ".join(str(error).splitlines())) from None
        study = "headline" if parameters == plain else stem
        runs.append({"chapter": chapter, "parameters": parameters, "study": study})
    return runs


def _like(name, value, default):
    wanted = type(default)
    if default is None or type(value) is wanted:
        return value
    if wanted is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is larger than any float: {_short(value)}") from None
    hint = "; YAML reads 1e-3 as text, write 1.0e-3" if wanted is float and isinstance(value, str) else ""
    raise ValueError(f"{name} must be of type {wanted.__name__}, got {_short(value)}{hint}")


def _short(value):
    try:
        text = repr(value)
    except ValueError:  # Python prints no int of more than 4,300 digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_yaml(path):
    """The content of a YAML file of plain values.

    Raises: ValueError, naming the file, where it cannot be read or is not YAML, and for what YAML would read
        otherwise than it looks: a key given twice, 010 (8), 1:4 (64), and names that stand for other parts.
    """
    yaml = need("yaml")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _strict(yaml))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}, {error}") from None


def _strict(yaml):
    class Strict(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                where = f"line {event.start_mark.line + 1}"
                raise ValueError(f"{where}: write *{event.anchor} out, names for other parts are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for number, (key, _) in enumerate(node.value):
                if key.value in keys[:number]:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            return super().construct_mapping(node, deep)

        def whole_number(self, node):
            value = super().construct_yaml_int(node)
            if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
                where = f"line {node.start_mark.line + 1}"
                raise ValueError(f"{where}: YAML reads {node.value} as {value}, write the number you mean")
            return value

    Strict.add_constructor("tag:yaml.org,2002:int", Strict.whole_number)
    return Strict
