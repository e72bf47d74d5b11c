"""What a run measured: checked parameters in, records out, and the numbers that pages show.

A record is a plain dictionary for one method on one data set with one seed. A notebook only displays it
(`record`); a sweep reads it back from the executed notebook (`recorded`), adds what the kernel cannot know
and stores it. Pages read the stored ones (`load`) and the papers' numbers (`paper`, `fact`).

This module trains nothing, chooses nothing by a score and writes only what a sweep hands it.
"""

import base64
import csv
import difflib
import functools
import html
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np

from . import data, metrics
from .digest import canonical, digest_of_today, root, sha256
from .digest import code_digest as code_digest  # for readers of results
from .digest import shown_digest as shown_digest
from .digest import write_atomic as write_atomic
from .digest import write_digest as write_digest

MIME = "application/vnd.deepclust.record+json"
SCORES = {"acc": metrics.accuracy, "purity": metrics.purity, "nmi": metrics.nmi, "ari": metrics.ari}
SCALAR_BYTES, ARRAY_BYTES, ADDED_BYTES = 4096, 65536, 512
BAND_SEEDS, BAND_FLOOR = range(5), 0.02
PLAIN = (int, float, str, bool, type(None), list, tuple, dict)


def check_parameters(namespace, **allowed):
    """Check the values of a chapter's `parameters` cell and give them back as one dictionary.

    The first call in a kernel also refuses every other global with a plain value (int, float, str, bool,
    None, list, tuple, dict; names with a leading underscore and IPython's own left out), because a mistyped
    parameter that papermill injects is exactly that. A later call on the same namespace skips this part
    alone, so that a reader can run the cell again further down.

    Parameters: namespace: `globals()`; allowed: for each parameter a list (one of these; `[True, False]` for
        a bool), or a pair (lo, hi): ints ask for an int within, floats for a float or int within, ends
        included.
    Returns: a dict from name to value, in the order of `allowed`.
    Raises: ValueError with one sentence for each wrong, missing or undeclared parameter.
    """
    problems = [_problem(namespace, name, rule) for name, rule in allowed.items()]
    if "_deepclust_checked" not in namespace:
        plain = {name for name, value in namespace.items() if type(value) in PLAIN and name[0] != "_"}
        strangers = sorted(plain - set(allowed) - {"In", "Out"})
        problems += [f"{x} is not a parameter of this chapter{suggestion(x, allowed)}" for x in strangers]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError("\n".join(problems))
    namespace["_deepclust_checked"] = True
    return {name: namespace[name] for name in allowed}


def _problem(namespace, name, rule):
    if name not in namespace:
        return f"{name} is declared here, but the parameters cell does not set it"
    value = namespace[name]
    is_bool = isinstance(value, bool)
    if isinstance(rule, tuple):
        lo, hi = rule
        whole = isinstance(lo, int) and isinstance(hi, int)
        if is_bool or not isinstance(value, int if whole else int | float) or not lo <= value <= hi:
            return f"{name} must be {'an int' if whole else 'a number'} between {lo} and {hi}, got {value!r}"
    # 1 == True in Python, so a bool only matches a bool.
    elif not any(value == option and is_bool == isinstance(option, bool) for option in rule):
        return f"{name} must be one of {', '.join(map(repr, rule))}, got {value!r}"


def suggestion(name, names):
    """The end of a sentence about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, [str(known) for known in names], n=1)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(map(str, names))}"


def record(
    *,
    chapter,
    method,
    y_true,
    y_pred,
    parameters,
    trained_on,
    scored_on,
    seconds,
    device="cpu",
    precision="float32",
    arrays=None,
    **extra,
):
    """Score one method's labels and display the record; nothing is written.

    Parameters: chapter, method: names; y_true, y_pred: (n,) integers (y_pred None where a method assigns no
        clusters; its scores then come as `extra`); parameters: what `check_parameters` gave back, with
        dataset, profile and seed; trained_on, scored_on: "all", "train" or "test"; seconds: the method's
        wall-clock time; device, precision: what was used; arrays: name to array for figures, kept for seed 0
        alone, as float16; extra: further scalars and short lists, and `n` where the data set is larger than
        what is scored.
    Returns: the record, a dict that JSON can hold.
    Raises: ValueError when a key of the record is given twice, a value is not finite, the record without
        arrays exceeds 4 KiB, or the arrays exceed 64 KiB or the range of float16.
    """
    missing = {"dataset", "profile", "seed"} - set(parameters)
    if missing:
        raise ValueError(f"a record needs dataset, profile and seed in parameters, {min(missing)} is missing")
    body = {"chapter": chapter, "method": method, "dataset": parameters["dataset"]}
    body |= {"n": extra.pop("n", len(y_true)), "profile": parameters["profile"], "seed": parameters["seed"]}
    body |= {"parameters": dict(parameters), "trained_on": trained_on, "scored_on": scored_on}
    body["n_scored"] = len(y_true)
    if y_pred is not None:
        body |= {name: round(score(y_true, y_pred), 6) for name, score in SCORES.items()}
        body["acc_kind"] = "one_to_one"
    body |= {"seconds": round(float(seconds), 2), "device": _device_name(device), "precision": precision}
    body |= _environment()
    twice = set(body) & set(extra)
    if twice:
        raise ValueError(f"{min(twice)} is a key of every record and cannot be given as an extra value")
    body |= extra
    try:
        body = json.loads(canonical(body))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"a record holds finite numbers, text, lists and dicts only: {error}") from None
    _refuse_large(body, ADDED_BYTES)
    if arrays and parameters["seed"] == 0:
        body["arrays"] = _packed(arrays)
    _display({MIME: body, "text/plain": summary(body)})
    return body


def _device_name(device):
    import torch

    if str(device).startswith("cuda") and torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return str(device)


def _environment():
    import sklearn
    import torch

    from . import __version__

    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"scikit-learn": sklearn.__version__, "deepclust_nb": __version__}
    return {"threads": torch.get_num_threads(), "versions": versions}


def _packed(arrays):
    packed = {}
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(array, dtype=np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"array {name} does not fit float16: a value is not finite or above 65504")
        packed[name] = {"shape": list(half.shape), "float16": base64.b64encode(half.tobytes()).decode()}
    size = len(canonical(packed))
    if size > ARRAY_BYTES:
        raise ValueError(f"the arrays of a record may take {ARRAY_BYTES} bytes in all, these take {size}")
    return packed


def arrays(record):
    """The figure arrays of a record: a dict from name to float32 array, empty for seeds other than 0."""
    unpacked = {}
    for name, packed in record.get("arrays", {}).items():
        values = np.frombuffer(base64.b64decode(packed["float16"]), np.float16)
        unpacked[name] = values.reshape(packed["shape"]).astype(np.float32)
    return unpacked


def summary(record):
    """One line about a record: method, data set, seed and its scores."""
    scores = [f"{name.upper()} {record[name]:.3f}" for name in ("acc", "nmi", "ari") if name in record]
    scores = scores or [f"{key} {value:.3f}" for key, value in record.items() if key.startswith("neighbour_")]
    return f"{record['method']} on {record['dataset']}, seed {record['seed']}: {', '.join(scores)}"


def body_hash(record):
    """SHA-256 of a record's canonical JSON, 64 hexadecimal digits; its own hash and the `current` that `load`
    adds are left out.
    """
    return sha256({key: value for key, value in record.items() if key not in ("sha256", "current")})


def _refuse_large(body, reserve=0):
    size = len(canonical({key: value for key, value in body.items() if key != "arrays"})) + reserve
    if size > SCALAR_BYTES:
        raise ValueError(f"a record takes at most {SCALAR_BYTES} bytes, {body['method']} would take {size}")


def recorded(notebook_path, digest=None, study="headline"):
    """Read the records that an executed notebook displayed, and complete them.

    Added are what the kernel cannot know: commit (with "+changes" where the code in the checkout differs from
    it; None outside a checkout), digest of the code, study, and sha256, the hash of the body.

    Parameters: notebook_path: an executed .ipynb; digest: that of the code which ran, by default the
        chapter's now; study: "headline", or the name of the sweep whose parameters differ from the profile's.
    Returns: a list of records in the order displayed, empty when there are none.
    Raises: ValueError when a record exceeds 4 KiB without its arrays.
    """
    cells = json.loads(Path(notebook_path).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    found = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    commit, digests = _commit(), {}
    for body in found:
        chapter = body["chapter"]
        digests.setdefault(chapter, digest or digest_of_today(chapter))
        body |= {"commit": commit, "digest": digests[chapter], "study": study}
        _refuse_large(body)
        body["sha256"] = body_hash(body)
    return found


def _commit():
    def git(*command):
        done = subprocess.run(["git", "-C", str(root()), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "--", "deepclust_nb", "book/chapters", "book/experiments")
        commit = git("rev-parse", "HEAD")
    except OSError:
        return None
    return (commit + ("+changes" if changed else "")) or None


def _display(bundle, metadata=None):
    from IPython.display import display

    display(bundle, raw=True, metadata=metadata)


def load(chapter=None, dataset=None, profile=None, method=None, study="headline"):
    """The stored records, filtered by whatever is given; `study=None` takes those of every study.

    Returns: a list of records in order of chapter, data set, profile and seed, each with `current`: whether
        its code is the chapter's of today (in a copy without the chapters: that of the release).
    Raises: ValueError when the body of a record does not match its hash.
    """
    given = {"chapter": chapter, "dataset": dataset, "profile": profile, "method": method, "study": study}
    given = {key: value for key, value in given.items() if value is not None}
    found, digests = [], {}
    for path in sorted((data.data_root() / "records").glob(f"{chapter or '*'}/*/*/*.json")):
        try:
            bodies = _verified(path.name, path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # a sweep beside us has just replaced it
            continue
        for body in bodies:
            if all(body[key] == value for key, value in given.items()):
                if body["chapter"] not in digests:
                    digests[body["chapter"]] = digest_of_today(body["chapter"])
                found.append(body | {"current": body["digest"] == digests[body["chapter"]]})
    return sorted(found, key=lambda body: [body[key] for key in ("chapter", "dataset", "profile", "seed")])


@functools.lru_cache(maxsize=1000)
def _verified(name, text):
    bodies = json.loads(text)["records"]
    for body in bodies:
        if body.get("sha256") != body_hash(body):
            raise ValueError(f"{name}: record {body.get('method')} does not match its hash")
    return bodies


def variant(chapter, dataset, profile, method, /, **changed):
    """A method's records, of any study, whose parameters are the headline's but for those `changed`.

    Returns: as `load`; [] when there are none, or no headline record to compare with.
    """
    found = load(chapter, dataset, profile, study=None)
    headline = next((body["parameters"] for body in found if body["study"] == "headline"), None)
    wanted = headline and headline | changed | {"seed": None}
    found = [body for body in found if body["method"] == method]  # a rival may be in the variant alone
    return [body for body in found if body["parameters"] | {"seed": None} == wanted]


def mean(records, key):
    """The mean of one value over records, None when there are none."""
    return float(np.mean([body[key] for body in records])) if records else None


def verdict(hits, where=""):
    """Words for a claim that was tested once per run: hits, a list of bools; where, the end of the sentence.
    All hits is "holds", none "does not hold", anything between "partly", and no run "not run".
    """
    if not hits:
        return f"not run {where}".strip()
    word = "holds" if all(hits) else "partly" if any(hits) else "does not hold"
    return f"{word}, {sum(hits)} of {len(hits)} {where}".strip()


def by_method(records, metric="acc"):
    """One score by method: a dict from method to its values in the order of seeds; records without it left
    out."""
    groups = {}
    for body in sorted((body for body in records if metric in body), key=lambda body: body["seed"]):
        groups.setdefault(body["method"], []).append(body[metric])
    order = [body["method"] for body in records]
    return {method: groups[method] for method in sorted(groups, key=order.index)}


def paper(chapter):
    """What papers reported for a chapter's methods: a list of dicts with table, method, dataset, metric,
    value (float), std (float or None) and protocol.

    Raises: FileNotFoundError for a chapter without such a file.
    """
    rows = _csv(chapter)
    return [
        row | {"value": float(row["value"]), "std": float(row["std"]) if row["std"] else None} for row in rows
    ]


def fact(key):
    """A single number from the literature (float); its source stands beside it in data/papers/facts.csv.

    Raises: KeyError for an unknown key, naming the closest.
    """
    facts = {row["key"]: float(row["value"]) for row in _csv("facts")}
    if key not in facts:
        raise KeyError(f"there is no fact {key!r}{suggestion(key, facts)}")
    return facts[key]


def _csv(name):
    with open(data.data_root() / "papers" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def band(method, parameters, metric="acc", chapter=None):
    """The range in which a fresh quick run is expected: that of the recorded seeds 0 to 4, widened at both
    ends by their range or by 0.02, whichever is larger.

    Parameters: parameters: those of the run, the seed aside equal to the records'; chapter: by default any.
    Returns: (lo, hi), or None when fewer than five seeds are recorded.
    """
    rest = parameters | {"seed": None}
    found = load(chapter, parameters["dataset"], "quick", method)
    found = [b for b in found if b["parameters"] | {"seed": None} == rest and b["precision"] == "float32"]
    values = {b["seed"]: b[metric] for b in found if b["seed"] in BAND_SEEDS and metric in b}
    if len(values) < len(BAND_SEEDS):
        return None
    lo, hi = min(values.values()), max(values.values())
    margin = max(hi - lo, BAND_FLOOR)
    return lo - margin, hi + margin


def check_band(record, metric="acc"):
    """Print whether a score lies inside its band, in words that are the same on every machine.

    Only float32 runs of a recorded seed (0 to 4) with the recorded parameters are checked; for others the
    line says so. While a sweep records (DEEPCLUST_RECORDING=1), a score outside is printed and does not stop
    the run.

    Raises: AssertionError for a score outside.
    """
    name = f"{record['method']}: {metric.upper()}"
    limits = band(record["method"], record["parameters"], metric, record["chapter"])
    if limits is None or record["seed"] not in BAND_SEEDS or record["precision"] != "float32":
        print(f"{name} not checked: no band for these parameters")
        return
    inside = limits[0] <= record[metric] <= limits[1]
    print(f"{name} inside the band of its recorded seeds: {'yes' if inside else 'no'}")
    if not inside and os.environ.get("DEEPCLUST_RECORDING") != "1":
        raise AssertionError(f"{name} {record[metric]:.3f} lies outside [{limits[0]:.3f}, {limits[1]:.3f}]")


def glue(name, value):
    """Display a value so that pages of the book can show it by name, as myst-nb's glue does, without
    importing it.

    Raises: ValueError for a name with a colon, which a page reads as the start of a number format.
    """
    if ":" in name:
        raise ValueError(f"a glued name must not hold a colon, got {name!r}")
    from IPython.core.formatters import format_display_data

    # The repr of a NumPy scalar is no number to a format.
    bundle, metadata = format_display_data(value.item() if isinstance(value, np.generic) else value)
    _display(bundle, metadata | {"scrapbook": {"name": name, "mime_prefix": ""}})


def say(template, **values):
    """Display a Markdown sentence whose numbers come from values: `say("ACC {acc:.3f}",
    acc=record["acc"])`."""
    text = template.format(**values)
    _display({"text/markdown": text, "text/plain": text})


def table(rows, columns=None, formats=None):
    """Display rows as a table that scrolls inside its own box on a narrow page; Markdown where there is no
    HTML.

    Parameters: rows: a list of dicts; one whose `current` is False gets the mark "older code"; columns: keys
        to show, or a dict from key to heading, by default the first row's keys; formats: key to format, ".3f"
        for floats.
    """
    if columns is None:
        columns = [key for key in (rows[0] if rows else {}) if key != "current"]
    columns = columns if isinstance(columns, dict) else {key: key for key in columns}
    cells = [[_cell(row.get(key), (formats or {}).get(key)) for key in columns] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        if row.get("current") is False:
            line[0] += " (older code)"
    lines = [[*map(str, columns.values())], *cells]
    body = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in line) + "</tr>" for line in cells)
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in lines[0])
    lines.insert(1, ["---"] * len(columns))
    text = "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    box = f'<div style="overflow-x:auto">{inside}</div>'
    _display({"text/html": box, "text/markdown": text, "text/plain": text})


def _cell(value, form):
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item, form) for item in value)
    return format(value, form if form is not None else ".3f" if isinstance(value, float) else "")
