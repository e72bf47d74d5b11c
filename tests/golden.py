"""Golden runs: a chapter's own cells on a few dozen digits, in float64 on one thread, every number kept.

`run` executes the cells of a chapter that decide numbers (tags parameters, check, definition, run) in this
process and notes what they do: each loss term and learning rate at each step, what k-means, mixtures, t-SNE
and regressions were given, each record. `summary` boils that down to numbers, and tests/golden/CHAPTER.json
holds those of today's code, so that a change in *how* something is trained shows, whatever it is.

    python tests/golden.py [CHAPTER ...]     stores the numbers of today's code

Store anew only where training was meant to change, and give the reason in the commit.
"""

import contextlib
import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path

import IPython.display
import numpy as np
import pytest
import torch
from loader import chapter_file
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch import nn

from deepclust_nb import baselines, checks, data, metrics, records, training

FOLDER = Path(__file__).parent / "golden"
DECIDING = {"parameters", "check", "definition", "run"}
# What one call costs on the clock that the cells see, so that a record's seconds tell what was counted.
COSTS = {KMeans: 100, GaussianMixture: 1000, TSNE: 10_000, LogisticRegression: 100_000}
COSTS |= {NearestNeighbors: 1_000_000}
ELSEWHERE = {"versions", "device", "threads"}  # what a record says of the machine


class Seen:
    """What a run did.

    steps: for each optimiser step a dict of loss, terms, lr and the batch's checksum; loops: for each loop
    its length and the optimiser's settings; fits: name and settings of each fitted estimator with the
    checksum of its data; records: as displayed; predicted: method -> labels that were scored; clock: seconds.
    """

    def __init__(self):
        self.steps, self.loops, self.fits, self.records, self.predicted = [], [], [], [], {}
        self.clock = 0.0


def digits(n_train=48, n_test=40, n_classes=3):
    """A stand-in for `data.load`: the first bundled digits of a few classes, under any name."""
    sets = {}
    for part, n in (("train", n_train), ("test", n_test)):
        whole = data.load("mnist_5k", part)
        few = whole.y < n_classes
        sets[part] = (whole.x[few][:n], whole.y[few][:n])

    def load(name, split="all"):
        parts = [sets[part] for part in (("train", "test") if split == "all" else (split,))]
        x, y = (torch.cat(both) for both in zip(*parts, strict=True))
        return data.Dataset(x, y, name, split)

    return load


def checksum(values):
    """Mean, and mean weighted by a wave (which sees an exchange of two entries), of any array of numbers."""
    flat = np.asarray(torch.as_tensor(values).detach().cpu()).astype(np.float64).ravel()
    return [float(flat.mean()), float((flat * np.cos(1 + np.arange(flat.size))).mean())] if flat.size else []


def weights(model):
    """Checksums of a model's parameters and buffers, by name."""
    return {name: checksum(value) for name, value in model.state_dict().items()}


@contextlib.contextmanager
def watched(load, double=True, picked=None, tiny=True):
    """Within: `data.load` is `load`, the clock counts work, and a Seen fills up.

    double: compute in float64, so that every processor gives the same; picked: the indices that
    `data.labelled_subset` gives, whatever the labels; tiny: let sizes pass that the check cell refuses.
    """
    seen, threads, dtype = Seen(), torch.get_num_threads(), torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        if tiny:
            patch.setattr(checks, "require", lambda holds, sentence: None)
        patch.setattr(time, "perf_counter", lambda: seen.clock)
        patch.setattr(IPython.display, "display", _display_spy(seen))
        patch.setattr(training.Steps, "update", _update_spy(seen, training.Steps.update))
        patch.setattr(records, "record", _record_spy(seen, records.record))
        for kind, cost in COSTS.items():
            name = "fit_transform" if kind is TSNE else "fit"
            patch.setattr(kind, name, _fit_spy(seen, kind, getattr(kind, name), cost))
        if picked is not None:
            patch.setattr(data, "labelled_subset", lambda y, n_labels, seed: torch.as_tensor(picked))
        if double:
            _in_double(patch)
        torch.set_num_threads(1)
        try:
            yield seen
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def _in_double(patch):
    def to_double(x):
        return x.to(torch.float64) / 255 if x.dtype == torch.uint8 else x.to(torch.float64)

    def kmeans(*given, **more):
        labels, centroids = found(*given, **more)
        return labels, centroids.astype(np.float64)

    found = baselines.kmeans
    torch.set_default_dtype(torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in (data, baselines):
        patch.setattr(module, "to_float", to_double)
    patch.setattr(baselines, "kmeans", kmeans)


def _display_spy(seen):
    def display(bundle, *rest, **more):
        if isinstance(bundle, dict) and records.MIME in bundle:
            seen.records.append(bundle[records.MIME])

    return display


def _record_spy(seen, record):
    def spy(**given):
        if given["y_pred"] is not None:
            seen.predicted[given["method"]] = np.asarray(given["y_pred"])
        return record(**given)

    return spy


def _update_spy(seen, update):
    def spy(loop, optimizer, loss, terms):
        if loop.number == 0:
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
            about = {"title": loop.title, "length": len(loop), "optimizer": type(optimizer).__name__}
            seen.loops.append(about | {"groups": groups, "weights": sizes})
        row = {"lr": [group["lr"] for group in optimizer.param_groups], "batch": checksum(loop.index)}
        row |= {name: value.item() for name, value in terms.items()} | {"loss": loss.item()}
        seen.steps.append(row)
        seen.clock += 1
        return update(loop, optimizer, loss, terms)

    return spy


def _fit_spy(seen, kind, fit, cost):
    def spy(estimator, x, *rest, **more):
        settings = {name: value for name, value in vars(estimator).items() if name in estimator.get_params()}
        about = {"kind": kind.__name__, "settings": {k: str(v) for k, v in settings.items()}}
        about |= {"shape": list(np.shape(x)), "x": checksum(x)}
        about |= {"y": checksum(rest[0])} if rest and rest[0] is not None else {}
        seen.fits.append(about)
        seen.clock += cost
        if kind is TSNE:  # a map is chaotic: its last digits differ between processors
            x = np.asarray(x, dtype=np.float64)  # its stand-in mixes all columns, for single ones may be dead
            return x @ np.cos(np.arange(x.shape[1] * estimator.n_components)).reshape(x.shape[1], -1)
        return fit(estimator, x, *rest, **more)

    return spy


def run(chapter, load=None, tags=DECIDING, double=True, picked=None, tiny=True, also=(), **parameters):
    """Execute a chapter's cells with some parameters changed.

    Parameters: load: stands in for `data.load`, by default `digits()`; tags: of the cells to execute, None
        for every code cell; double, picked, tiny: see `watched`; also: texts, each of which picks the further
        code cells that hold it; parameters: override the chapter's defaults.
    Returns: (namespace after the last cell, Seen).
    Raises: whatever a cell raises; KeyError for an unknown parameter.
    """
    path = chapter_file(chapter)
    namespace = {"__name__": f"golden_{chapter}"}
    with watched(load or digits(), double, picked, tiny) as seen:
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            own, whole = set(cell["metadata"].get("tags", [])), "".join(cell["source"])
            wanted = tags is None or own & tags or any(text in whole for text in also)
            if cell["cell_type"] != "code" or not wanted:
                continue
            lines = whole.splitlines()
            source = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)
            before = set(namespace)
            exec(compile(source, f"<{path.name}, cell {number}>", "exec"), namespace)
            if "parameters" in own:
                unknown = set(parameters) - (set(namespace) - before)
                if unknown:
                    raise KeyError(f"{chapter} has no parameter {min(unknown)}")
                namespace |= parameters
    return namespace, seen


def checked(chapter, tiny=False, **parameters):
    """The parameters of a run, as the chapter's own check gives them back, before anything is loaded."""
    tags = {"definition", "parameters", "check"}
    return run(chapter, tags=tags, tiny=tiny, **parameters)[0]["parameters"]


def assert_scored(seen, y, n=88):
    """Each record of a run holds the scores of the labels that its method predicted, against classes y, and
    says that all n images were loaded, trained on and scored.
    """
    for record in seen.records:
        labels = seen.predicted[record["method"]]
        for name in ("acc", "purity", "nmi", "ari"):
            score = getattr(metrics, "accuracy" if name == "acc" else name)(y, labels)
            assert record[name] == pytest.approx(score, abs=1e-6)
        assert (record["trained_on"], record["scored_on"], record["n"]) == ("all", "all", n)


def plain(value):
    """A value as JSON keeps it: numbers as floats, all else as text; sequences and dicts entry by entry."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else str(value)
    return str(value)


def summary(namespace, seen):
    """All numbers of a run, ready to be compared: loops, steps, fits, records and final weights."""
    kept_records = []
    for record in seen.records:
        kept = {key: value for key, value in record.items() if key not in ELSEWHERE | {"arrays"}}
        kept["~arrays"] = {key: checksum(value) for key, value in records.arrays(record).items()}
        kept_records.append(kept)
    models = {name: weights(value) for name, value in namespace.items() if isinstance(value, nn.Module)}
    found = {"loops": seen.loops, "steps": seen.steps, "fits": seen.fits, "records": kept_records}
    predicted = {name: checksum(value) for name, value in seen.predicted.items()}
    return plain(found | {"models": models, "predicted": predicted})


def differences(found, stored, place="", loose=False):
    """Where two summaries differ: sentences. Allowed is 1e-6 of a value, 2e-3 for arrays kept in float16.

    Below 1e-9 all is zero: a bias before batch normalisation has no gradient but rounding errors, which
    differ between processors.
    """
    if isinstance(stored, dict) and isinstance(found, dict):
        problems = [f"{place}/{key}: only in one" for key in sorted(set(found) ^ set(stored))]
        for key in stored:
            if key in found:
                within = loose or key.startswith("~")
                problems += differences(found[key], stored[key], f"{place}/{key}", within)
        return problems
    if isinstance(stored, list) and isinstance(found, list):
        if len(stored) != len(found):
            return [f"{place}: {len(found)} entries, stored are {len(stored)}"]
        pairs = enumerate(zip(found, stored, strict=True))
        return [x for i, (a, b) in pairs for x in differences(a, b, f"{place}[{i}]", loose)]
    tolerance = 2e-3 if loose else 1e-6
    if isinstance(stored, float) and isinstance(found, float):
        close = math.isclose(found, stored, rel_tol=tolerance, abs_tol=2e-3 if loose else 1e-9)
    else:
        close = found == stored
    return [] if close else [f"{place}: {found}, stored is {stored}"]


def cases(chapter):
    """The golden cases of a chapter, from tests/test_CHAPTER.py: GOLDEN, name -> function to a summary."""
    return importlib.import_module(f"test_{chapter}").GOLDEN


def other_versions():
    """Packages that compute and are of another version than in constraints.txt, of which the numbers are."""
    lines = (FOLDER.parent.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    names = ("torch", "numpy", "scipy", "scikit-learn")
    found = {name: importlib.metadata.version(name).split("+")[0] for name in names}
    return [f"{name} {version}" for name, version in found.items() if version != pinned[name]]


def check(chapter, name):
    """Fail with the first differences between a golden case and its stored numbers."""
    path = FOLDER / f"{chapter}.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(cases(chapter)[name]()))
    assert name in stored, f"{path.name} has no case {name}: run python tests/golden.py {chapter}"
    problems = differences(found, stored[name])
    assert not problems, "\n".join([f"{len(problems)} numbers differ, among them:", *problems[:8]])


def main(names):
    """Store the numbers of the named chapters, or of all that have golden cases."""
    FOLDER.mkdir(exist_ok=True)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        name = path.stem.removeprefix("test_")
        if name in names or (not names and "\nGOLDEN = " in path.read_text(encoding="utf-8")):
            found = {case: make() for case, make in cases(name).items()}
            text = json.dumps(found, indent=0, sort_keys=True)
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            print(f"{name}: {len(found)} cases, {len(text) // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
