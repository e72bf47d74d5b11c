"""Records: what one method reached on one data set with one seed, made, sealed, stored and read.

A record is a plain dictionary. A notebook only displays it (`record`); a sweep reads it back from the
executed notebook (`recorded`), adds what the kernel cannot know and stores the file; everybody reads through
`read`, which trusts nothing: a damaged file, an unknown form or a copy under another name is refused.

This module trains nothing, chooses nothing by a score and writes only what a sweep hands it.
"""

import base64
import functools
import json
import platform
from pathlib import Path

import numpy as np

from . import digest as code
from .digest import canonical, sha256
from .places import data_root, root, write_atomic

MIME, RAN = "application/vnd.deepclust.record+json", "application/vnd.deepclust.ran+json"
SCALAR_BYTES, ARRAY_BYTES, ADDED_BYTES = 4096, 65536, 512
SCHEMA = 2  # of a file of records; in those of schema 1, threads were no part of a run's key
PLACE = ("chapter", "dataset", "profile", "seed")


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

    What cannot be known before training never costs the run: an extra value that is not finite, and figure
    arrays that are not finite or too large, are left out of the record, which names them in `left_out`.

    Parameters: chapter, method: names; y_true, y_pred: (n,) integers (y_pred None where a method assigns no
        clusters; its scores then come as `extra`); parameters: what `checks.parameters` gave back, with
        dataset, profile and seed; trained_on, scored_on: "all", "train" or "test"; seconds: the method's
        wall-clock time; device, precision: what was used; arrays: name to array for figures, kept for seed 0
        alone, as float16, up to 64 KiB in all; extra: further scalars and short lists, and `n` where the data
        set is larger than what is scored.
    Returns: the record, a dict that JSON can hold.
    Raises: ValueError when a key of the record is given twice, a value is none that JSON knows, or the record
        without arrays exceeds 4 KiB.
    """
    from . import metrics

    missing = {"dataset", "profile", "seed"} - set(parameters)
    if missing:
        raise ValueError(f"a record needs dataset, profile and seed in parameters, {min(missing)} is missing")
    body = {"chapter": chapter, "method": method, "dataset": parameters["dataset"]}
    body |= {"n": extra.pop("n", len(y_true)), "profile": parameters["profile"], "seed": parameters["seed"]}
    body |= {"parameters": dict(parameters), "trained_on": trained_on, "scored_on": scored_on}
    body["n_scored"] = len(y_true)
    if y_pred is not None:
        body |= metrics.scores(y_true, y_pred) | {"acc_kind": "one_to_one"}
    body |= {"seconds": round(float(seconds), 2), "device": _device_name(device), "precision": precision}
    body |= _environment()
    twice = set(body) & set(extra)
    if twice:
        raise ValueError(f"{min(twice)} is a key of every record and cannot be given as an extra value")
    left_out = [name for name, value in extra.items() if _not_finite(value)]
    body |= {name: value for name, value in extra.items() if name not in left_out}
    try:
        body = json.loads(canonical(body))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"a record holds finite numbers, text, lists and dicts only: {error}") from None
    if arrays and parameters["seed"] == 0:
        body["arrays"], too_much = _packed(arrays)
        left_out += too_much
    if left_out:
        body["left_out"] = left_out
        print(f"left out of the record of {method}, not finite or too large: {', '.join(left_out)}")
    _refuse_large(body, ADDED_BYTES)
    stated = code.state()
    _display({MIME: body, "text/plain": summary(body)} | ({RAN: stated} if stated else {}))
    return body


def _not_finite(value):
    return isinstance(value, float | np.floating) and not np.isfinite(value)


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
    """What fits of the arrays, as float16 in base64, in the order given; and the names of the others."""
    packed, left_out = {}, []
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(array, dtype=np.float16)
        entry = {"shape": list(half.shape), "float16": base64.b64encode(half.tobytes()).decode()}
        if np.isfinite(half).all() and len(canonical(packed | {name: entry})) <= ARRAY_BYTES:
            packed[name] = entry
        else:
            left_out.append(name)
    return packed, left_out


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


def run_key(digest, parameters, threads):
    """Ten hexadecimal digits for code, parameters but the seed, and threads: what makes a run that run.

    threads: None for a run of schema 1, whose key had none.
    """
    rest = {name: value for name, value in parameters.items() if name != "seed"}
    return sha256([digest, rest] if threads is None else [digest, rest, threads])[:10]


def _refuse_large(body, reserve=0):
    size = len(canonical({key: value for key, value in body.items() if key != "arrays"})) + reserve
    if size > SCALAR_BYTES:
        raise ValueError(f"a record takes at most {SCALAR_BYTES} bytes, {body['method']} would take {size}")


def displayed(notebook_path):
    """What an executed notebook displayed: (its records in order, what their kernel said it ran: dicts)."""
    cells = json.loads(Path(notebook_path).read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [data[MIME] for data in shown if MIME in data], [data[RAN] for data in shown if RAN in data]


def recorded(notebook_path, digest, study="headline"):
    """Read the records that an executed notebook displayed, and seal them.

    Added are digest and commit of the code, which the kernel stated at its start, study, and sha256, the hash
    of the body.

    Parameters: notebook_path: an executed .ipynb; digest: of the code that was meant to run; study:
        "headline", or the name of the sweep whose parameters differ from the profile's.
    Returns: a list of records in the order displayed, empty when there are none.
    Raises: ValueError when a record exceeds 4 KiB without its arrays, when its kernel said that it ran other
        code or the package of another place, or did not say what it ran.
    """
    found, stated = displayed(notebook_path)
    if len(stated) < len(found):
        raise ValueError("the kernel did not state which code it ran")
    for body, ran in zip(found, stated, strict=True):
        if ran["package"] != str(root()):
            raise ValueError(f"the kernel imported deepclust_nb from {ran['package']}, not from {root()}")
        if ran["digest"] != digest:
            raise ValueError("the code changed while the run was starting: run it again")
        body |= {"commit": ran["commit"], "digest": digest, "study": study}
        _refuse_large(body)
        body["sha256"] = body_hash(body)
    return found


def write(path, found):
    """Store the records of one run, whole or not at all."""
    write_atomic(path, json.dumps({"schema": SCHEMA, "records": found}, indent=1) + "\n")


def read(path):
    """The records of one file, each checked.

    Returns: a list of records.
    Raises: ValueError, naming the file, when it is not whole, of an unknown schema, changed since it was
        sealed, or not at the place that its content names; FileNotFoundError when it is gone.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = _checked(text, *path.parts[-4:-1], path.stem)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        where = "/".join(path.parts[-4:])
        why = error if type(error) is ValueError else "it is no file of records"
        raise ValueError(f"the records {where} are damaged: {why}") from None
    return [dict(body) for body in found]


@functools.lru_cache(maxsize=2000)
def _checked(text, *place):
    content = json.loads(text)
    found, schema = content["records"], content.get("schema", 1)
    if schema not in (1, SCHEMA):
        raise ValueError(f"their schema {schema!r} is not known to this version")
    for body in found:
        if body.get("sha256") != body_hash(body):
            raise ValueError(f"record {body.get('method')} does not match its hash")
    first = found[0]
    key = run_key(first["digest"], first["parameters"], None if schema == 1 else first["threads"])
    own = (*(str(first[name]) for name in PLACE[:3]), f"{first['seed']}-{key}")
    if place != own:
        raise ValueError(f"by its content it is {'/'.join(own)}.json, which is another run")
    run = ("chapter", "parameters", "digest", "threads")
    if any(body[name] != first[name] for body in found for name in run):
        raise ValueError("its records are of different runs")
    return found


def load(chapter=None, dataset=None, profile=None, method=None, study="headline"):
    """The stored records, filtered by whatever is given; `study=None` takes those of every study.

    A run counts once: of records with the same parameters and method, made by several codes or under several
    numbers of threads, that of today's code is taken.

    Returns: a list of records in order of chapter, data set, profile and seed, each with `current`: whether
        its code is the chapter's of today (in a copy without the chapters: that of the release).
    Raises: ValueError, naming the file, for a damaged one.
    """
    given = {"chapter": chapter, "dataset": dataset, "profile": profile, "method": method, "study": study}
    given = {key: value for key, value in given.items() if value is not None}
    found, digests = {}, {}
    for path in sorted((data_root() / "records").glob(f"{chapter or '*'}/*/*/*.json")):
        try:
            bodies = read(path)
        except FileNotFoundError:  # a sweep beside us has just replaced it
            continue
        for body in bodies:
            if all(body[key] == value for key, value in given.items()):
                if body["chapter"] not in digests:
                    digests[body["chapter"]] = code.digest_of_today(body["chapter"])
                body |= {"current": body["digest"] == digests[body["chapter"]]}
                run = canonical([body["chapter"], body["method"], body["parameters"]])
                if run not in found or body["current"]:
                    found[run] = body
    return sorted(found.values(), key=lambda body: [body[key] for key in PLACE])


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


def by_method(records, metric="acc"):
    """One score by method: a dict from method to its values in the order of seeds; records without it left
    out."""
    groups = {}
    for body in sorted((body for body in records if metric in body), key=lambda body: body["seed"]):
        groups.setdefault(body["method"], []).append(body[metric])
    order = [body["method"] for body in records]
    return {method: groups[method] for method in sorted(groups, key=order.index)}


def _display(bundle):
    from IPython.display import display

    display(bundle, raw=True)
