"""Sweeps on tiny notebooks in throw-away checkouts: what is refused, what is kept, what is run again."""

import concurrent.futures
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from loader import checkout, notebook

from deepclust_nb import records
from deepclust_nb.places import chapter_file
from deepclust_nb.sweep import plan
from deepclust_nb.sweep import run as run_module

SETTINGS = (
    'dataset = "mnist_5k"\nprofile = "quick"\nseed: int = 0\nlr = 0.1  # step size\nlayers = [500,\n    20]'
)
PROFILE = "chapter: tiny, dataset: mnist_5k, seeds: [0]"

CHECK = """parameters = checks.parameters(
    globals(), dataset=["mnist_5k", "usps"], profile=["quick", "laptop"], seed=(0, 99), lr=(0.0, 1.0),
    layers=[[500, 20]],
)
checks.require(lr < 0.9 or seed == 0, f"lr must be below 0.9 but for seed 0, got {lr}")"""
IMPORTS = "from deepclust_nb import checks, records"
RUN = """_ = records.record(
    chapter="tiny", method="k-means", y_true=[0, 0, 1, 1], y_pred=[1, 1, 0, seed % 2],
    parameters=parameters, trained_on="all", scored_on="all", seconds=0.0,
)
open("../../reached.txt", "w").close()"""
# Without the package, so that its kernel starts fast: says that it started, waits while a file is there,
# displays a record, with what it was told to be, and says that it ended.
LIGHT = f"""import json, os, pathlib, time
from IPython.display import display
folder = pathlib.Path("../..")
with open(folder / "started.txt", "a") as file:
    _ = file.write(f"{{seed}} {{os.getpid()}}\\n")
while seed == 1 and (folder / "block").exists():
    time.sleep(0.05)
parameters = dict(dataset=dataset, profile=profile, seed=seed, lr=lr, layers=layers)
record = dict(chapter="tiny", method="k-means", acc=seed / 4, parameters=parameters, threads=1)
stated = json.loads((folder / "stated.json").read_text())
display({{"{records.MIME}": record | parameters, "{records.RAN}": stated, "text/plain": ""}}, raw=True)
with open(folder / "ended.txt", "a") as file:
    _ = file.write(f"{{seed}}\\n")"""


CELLS = [(IMPORTS, "definition", None), (SETTINGS, "parameters", None), (CHECK, "check", None)]
CELLS += [(RUN, "run", None)]


@pytest.fixture
def copy(tmp_path):
    """A checkout with the chapter `tiny` and a laptop profile of it on USPS: (sweep module, folder)."""
    module, folder = checkout(tmp_path)
    notebook(CELLS, folder / "book/chapters/tiny.ipynb")
    profile = folder / "book/experiments/profiles/tiny.laptop.usps.yaml"
    profile.write_text("dataset: usps\nprofile: laptop\nlr: 0.5\n")
    return Sweep(module), folder


class Sweep:
    """The parts of the runner in one place, and the modules of the package beside it."""

    def __init__(self, module):
        self.module, self.plan_, self.run = module, module("sweep.plan"), module("sweep.run")
        self.plan, self.resolve, self.chapter_path = (
            self.plan_.plan,
            self.plan_.resolve,
            self.plan_.chapter_path,
        )
        self.profile_parameters, self.main = self.plan_.profile_parameters, module("sweep.__main__").main
        self.RunFailed, self.run_one, self.places = self.run.RunFailed, self.run.run_one, self.run.places
        self.run_notebook, self.execute = self.run.run_notebook, self.run.execute
        self.code_digest, self.records = module("digest").code_digest, module("records")


def write(folder, *runs, name="study"):
    path = folder / f"book/experiments/{name}.yaml"
    path.write_text("threads: 1\nruns:\n" + "".join(f"  - {{{run}}}\n" for run in runs))
    return path


def stated_by(sweep, folder):
    """What a kernel of this checkout says of its code."""
    return {"package": str(folder), "digest": sweep.code_digest("tiny"), "commit": None}


def executed(sweep, folder, parameters, path, chapter="tiny", threads=1, **stated):
    """Put a notebook where a run leaves it, with the record that such a run displays."""
    record = {
        "chapter": chapter,
        "method": "k-means",
        "acc": 0.5,
        "parameters": parameters,
        "threads": threads,
    }
    record |= {key: parameters[key] for key in ("dataset", "profile", "seed")}
    data = {records.MIME: record, records.RAN: stated_by(sweep, folder) | stated, "text/plain": ""}
    output = {"output_type": "display_data", "metadata": {}, "data": data}
    cells = json.loads((folder / "book/chapters/tiny.ipynb").read_text())["cells"]
    sources = [(cell["source"], next(iter(cell["metadata"].get("tags", [])), None), None) for cell in cells]
    notebook([*sources, ("x", None, [output])], path)


# the list


def test_a_plan_holds_every_parameter_of_every_run(copy):
    sweep, folder = copy
    runs = sweep.plan(
        write(
            folder,
            "chapter: tiny, dataset: mnist_5k, seeds: [0, 3]",
            "chapter: tiny, dataset: usps, profile: laptop, seeds: [0]",
            "chapter: tiny, dataset: usps, profile: laptop, seeds: [0], parameters: {lr: 1}",
        )
    )
    quick = {"dataset": "mnist_5k", "profile": "quick", "seed": 0, "lr": 0.1, "layers": [500, 20]}
    laptop = quick | {"dataset": "usps", "profile": "laptop", "lr": 0.5}
    wanted = [quick, quick | {"seed": 3}, laptop, laptop | {"lr": 1.0}]
    assert [run["parameters"] for run in runs] == wanted
    assert [run["study"] for run in runs] == ["headline", "headline", "headline", "study"]
    assert type(runs[3]["parameters"]["lr"]) is float


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("chapter: tiny, dataset: mnist_5k", "seeds must be of type list, got None"),
        (PROFILE + ", sedes: [1]", "sedes is not a key of a run: did you mean seeds"),
        ("chapter: tini, dataset: mnist_5k, seeds: [0]", "no chapter 'tini': did you mean tiny"),
        (
            "chapter: tiny, dataset: mnist5k, seeds: [0]",
            "dataset must be one of 'mnist_5k', 'usps', got",
        ),
        ("chapter: tiny, dataset: mnist_5k, seeds: 0", "seeds must be of type list, got 0"),
        ("chapter: tiny, dataset: mnist_5k, seeds: []", "seeds must be a list of ints"),
        ("chapter: tiny, dataset: mnist_5k, seeds: [0, true]", "seeds must be a list of ints"),
        (
            "chapter: tiny, dataset: mnist_5k, seeds: [0, 0]",
            "asks twice for the run tiny mnist_5k quick seed 0",
        ),
        (PROFILE + ", profile: laptop", "no file .*tiny.laptop.mnist_5k.yaml"),
        (PROFILE + ", parameters: {lrr: 1.0}", "tiny has no parameter lrr: did you mean lr"),
        (
            PROFILE + ", parameters: {lr: 1e-3}",
            "lr must be of type float, got '1e-3'; YAML reads 1e-3 as text",
        ),
        (PROFILE + ", parameters: {lr: true}", "lr must be of type float, got True"),
        (PROFILE + ", parameters: {layers: 3}", "layers must be of type list, got 3"),
        (PROFILE + ", parameters: {seed: 3}", "seed is a key of the run"),
        ("[1, 2]", "a run must be a mapping"),
        (PROFILE + ", parameters: {3: 4}", "tiny has no parameter 3"),
        ("chapter: tiny, dataset: mnist_5k, seeds: [-1]", "seed must be an int between 0 and 99, got -1"),
        (PROFILE + ", parameters: {lr: 1.5}", "lr must be a number between 0.0 and 1.0, got 1.5"),
        (PROFILE + ", parameters: {lr: .nan}", "lr must be a number between 0.0 and 1.0, got nan"),
        (
            "chapter: tiny, dataset: mnist_5k, seeds: [0, 7], parameters: {lr: 0.95}",
            "lr must be below 0.9 but for seed 0, got 0.95",
        ),
        (PROFILE + f", parameters: {{lr: {10**400}}}", "lr is larger than any float"),
        (PROFILE + ", profile: " + 300 * "a", "profile must be a name of letters"),
        (PROFILE + ", profile: ../quick", "profile must be a name of letters"),
        (PROFILE + ", seeds: [1]", "line 4: seeds is given twice"),
        (PROFILE + ", parameters: {lr: 0.2, lr: 0.3}", "line 4: lr is given twice"),
        ("chapter: tiny, dataset: mnist_5k, seeds: [010]", "line 4: YAML reads 010 as 8"),
        ("chapter: tiny, dataset: mnist_5k, seeds: [1:4]", "line 4: YAML reads 1:4 as 64"),
        ("chapter: tiny, dataset: mnist_5k, seeds: [0x10]", "line 4: YAML reads 0x10 as 16"),
        ("chapter: tiny, dataset: mnist_5k, seeds: &a [1, *a]", "line 4: write \\*a out"),
    ],
)
def test_a_mistake_anywhere_in_the_list_is_named_before_anything_runs(copy, capsys, run, says):
    sweep, folder = copy
    path = folder / "book/experiments/study.yaml"
    run = run if run.startswith("[") else f"{{{run}}}"
    path.write_text(f"threads: 1\nruns:\n  - {{{PROFILE}, parameters: {{lr: 0.2}}}}\n  - {run}\n")
    with pytest.raises(ValueError, match=says):
        sweep.plan(path)
    assert sweep.main([str(path)]) == 2
    assert "study.yaml" in capsys.readouterr().err
    assert not (folder / "_build").exists() and not (folder / "reached.txt").exists()


@pytest.mark.parametrize(
    "text",
    ["", "runs: 3", "runs: []\nmore: 1", "- 1", "run: []", "threads: 1"],
    ids=["empty", "number", "more", "list", "typo", "none"],
)
def test_a_file_that_is_no_list_of_runs_is_refused(copy, text):
    sweep, folder = copy
    path = folder / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.yaml must hold one key, runs"):
        sweep.plan(path)


def test_a_file_that_is_missing_or_not_yaml_is_named(copy):
    sweep, folder = copy
    with pytest.raises(ValueError, match="there is no file .*nowhere.yaml"):
        sweep.plan(folder / "nowhere.yaml")
    for content, says in (
        (b"runs: [", "x.yaml is not valid YAML"),
        (b"runs: caf\xe9", "x.yaml is not text in UTF-8"),
        (b"runs: []\nruns: []", "x.yaml, line 2: runs is given twice"),
        (b"runs:" + 5000 * b" [", "x.yaml is nested too deeply"),
    ):
        (folder / "x.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=says):
            sweep.plan(folder / "x.yaml")
    with pytest.raises(ValueError, match=f"{folder} cannot be read: is a directory"):
        sweep.plan(folder)


@pytest.mark.parametrize("threads", ["0", "1.5", "true", "many", "2000"])
def test_wrong_threads_are_refused(copy, threads):
    sweep, folder = copy
    path = write(folder, PROFILE)
    path.write_text(path.read_text().replace("threads: 1", f"threads: {threads}"))
    with pytest.raises(ValueError, match="study.yaml: threads must be an int between 1 and 1024"):
        sweep.plan(path)


def test_a_sweep_cannot_take_the_name_of_the_headline(copy, capsys):
    sweep, folder = copy
    path = write(folder, PROFILE + ", parameters: {lr: 0.2}", name="headline")
    assert sweep.main([str(path)]) == 2
    assert "headline.yaml cannot name a sweep" in capsys.readouterr().err


def test_a_sweep_without_chapters_says_what_it_needs(copy):
    sweep, folder = copy
    (folder / "book/chapters/tiny.ipynb").unlink()
    with pytest.raises(ValueError, match="there are no chapters in .*run sweeps from a checkout"):
        sweep.plan(write(folder, PROFILE))


def test_a_mistake_is_told_within_two_seconds(copy):
    """Without torch, papermill or scikit-learn, whose imports alone take longer."""
    _, folder = copy
    path = write(folder, PROFILE + ", parameters: {lr: 1.5}")
    heavy = "import sys; sys.argv = ['x', sys.argv[1]]\n"
    heavy += "for name in ('torch', 'sklearn', 'papermill', 'scipy'): sys.modules[name] = None\n"
    heavy += "import runpy; runpy.run_module('deepclust_nb.sweep', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", heavy, path], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "lr must be a number" in done.stderr


def test_the_check_cell_may_ask_for_the_size_of_a_data_set(copy):
    sweep, folder = copy
    size = CHECK + "\nchecks.require(data.size(dataset, 'train') < 5000, 'too many')"
    notebook([*CELLS[:2], (size, "check", None), CELLS[3]], folder / "book/chapters/tiny.ipynb")
    sweep.plan(write(folder, PROFILE))
    with pytest.raises(ValueError, match="study.yaml, run 1: too many"):
        sweep.plan(write(folder, "chapter: tiny, dataset: usps, profile: laptop, seeds: [0]"))


def test_a_missing_package_is_named_with_what_to_install(copy, capsys, monkeypatch):
    sweep, folder = copy
    path = write(folder, PROFILE)
    for package, code in (("yaml", 2), ("filelock", 1)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert sweep.main([str(path)]) == code
        shown = capsys.readouterr()
        assert f"sweeps need {package}: pip install 'deepclust-nb[sweep]'\n" in shown.err + shown.out


def test_a_profile_must_agree_with_its_name(copy):
    sweep, folder = copy
    assert sweep.profile_parameters("tiny", "quick", "usps") == {"dataset": "usps", "profile": "quick"}
    laptop = {"dataset": "usps", "profile": "laptop", "lr": 0.5}
    assert sweep.profile_parameters("tiny", "laptop", "usps") == laptop
    path = folder / "book/experiments/profiles/tiny.laptop.usps.yaml"
    path.write_text("dataset: mnist\n")
    with pytest.raises(ValueError, match="sets dataset to 'mnist', its name says 'usps'"):
        sweep.profile_parameters("tiny", "laptop", "usps")


def test_a_default_that_is_no_literal_is_refused(copy):
    sweep, folder = copy
    notebook([("seed = 2 ** 3", "parameters", None)], folder / "book/chapters/odd.ipynb")
    with pytest.raises(ValueError, match="odd.ipynb: a parameter's default must be a literal, got seed = 2"):
        sweep.resolve(sweep.chapter_path("odd"), {})


def test_a_record_s_place_follows_code_and_parameters_but_not_the_seed(copy):
    sweep, folder = copy
    run, other = sweep.plan(write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [0, 12]"))
    assert run["threads"] == 1
    target, executed_to, _ = sweep.places(run)
    assert target.parent == folder / "data/records/tiny/mnist_5k/quick"
    assert executed_to.parent == folder / "_build/sweeps/tiny/mnist_5k/quick"
    key = target.stem.removeprefix("0-")
    assert len(key) == 10 and sweep.places(other)[0].stem == f"12-{key}"
    changed = {**run, "parameters": run["parameters"] | {"lr": 0.2}}
    assert sweep.places(changed)[0] != target
    for name in run["parameters"]:
        if name not in ("seed", "dataset", "profile"):  # the seed is in the name, these in the folders
            other = {**run, "parameters": run["parameters"] | {name: "another"}}
            assert sweep.places(other)[0].name != target.name, name
    assert sweep.places({**run, "threads": 2})[0] != target
    notebook([*CELLS[:3], ("1", "run", None)], folder / "book/chapters/tiny.ipynb")
    assert sweep.places(run)[0] != target


@pytest.mark.parametrize("path", sorted(chapter_file("x").parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_parameter_of_every_chapter_makes_another_run(path):
    """Else a sweep would take the records of the one for those of the other."""
    quick = plan.defaults(path)
    run = {"chapter": path.stem, "parameters": quick, "study": "headline", "threads": 1}
    places = {run_module.places(run)[0]}
    for name in quick:
        changed = {**run, "parameters": quick | {name: "another"}}
        places |= set(run_module.places(changed)[:1])
    assert len(places) == 1 + len(quick)


# what is stored


@pytest.fixture
def planned(copy, monkeypatch):
    """Three planned runs whose execution is replaced by writing its result; seed 1 fails."""
    sweep, folder = copy
    calls = []

    def run_notebook(source, target, parameters, threads=None, recording=None, graphs=False):
        calls.append(parameters["seed"])
        assert recording == "tiny" and graphs == sweep.replayed
        if parameters["seed"] == 1:
            raise sweep.RunFailed("ValueError: lr is too large")
        executed(sweep, folder, parameters, target, threads=threads)
        return 1.0

    monkeypatch.setattr(sweep.run, "run_notebook", run_notebook)
    sweep.replayed = False  # whether runs should be asked to replay their steps
    path = write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [0, 1, 2]")
    return sweep, folder, path, calls


def test_graphs_are_asked_for_in_each_run_or_in_none(planned):
    sweep, folder, path, _ = planned
    sweep.replayed = True
    sweep.main([str(path), "--graphs"])
    assert stored(folder) == ["0", "2"]


def stored(folder):
    return sorted(path.name.split("-")[0] for path in (folder / "data/records").rglob("*.json"))


def test_a_failed_run_stops_no_other_and_is_listed_with_its_error(planned, capsys):
    sweep, folder, path, calls = planned
    assert sweep.main([str(path)]) == 1
    assert calls == [0, 1, 2] and stored(folder) == ["0", "2"]
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "failed: tiny mnist_5k quick seed 1: ValueError: lr is too large"
    (failure,) = (folder / "_build").rglob("*.failed.json")
    kept = json.loads(failure.read_text())
    assert (kept["status"], kept["error"]) == ("failed", "ValueError: lr is too large")
    assert kept["parameters"]["seed"] == 1


def test_what_is_recorded_is_skipped_and_what_failed_is_tried_again(planned, capsys):
    sweep, folder, path, calls = planned
    sweep.main([str(path)])
    sweep.main([str(path)])
    assert calls == [0, 1, 2, 1]
    assert "seed 0: skipped" in capsys.readouterr().out
    sweep.main([str(path), "--force"])
    assert calls == [0, 1, 2, 1, 0, 1, 2] and stored(folder) == ["0", "2"]


def test_an_executed_notebook_without_its_records_is_harvested(planned, capsys):
    sweep, folder, path, calls = planned
    sweep.main([str(path)])
    for record in (folder / "data/records").rglob("2-*.json"):
        record.unlink()
    capsys.readouterr()
    sweep.main([str(path), "--dry-run"])
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "recorded",
        "to run",
        "to harvest",
    ]
    sweep.main([str(path)])
    assert "seed 2: harvested" in capsys.readouterr().out
    assert calls == [0, 1, 2, 1] and stored(folder) == ["0", "2"]


def test_records_are_sealed_with_the_digest_of_the_code_that_ran(planned):
    sweep, folder, path, _ = planned
    sweep.main([str(path)])
    (file,) = (folder / "data/records").rglob("0-*.json")
    (record,) = json.loads(file.read_text())["records"]
    assert record["digest"] == sweep.code_digest("tiny") and record["study"] == "headline"
    assert record["sha256"] == records.body_hash(record)
    assert not list(folder.rglob("*.part*"))


def test_the_same_run_with_other_code_replaces_its_records(planned):
    sweep, folder, path, calls = planned
    sweep.main([str(path)])
    (before,) = (folder / "data/records").rglob("0-*.json")
    notebook([*CELLS[:3], ("1", "run", None)], folder / "book/chapters/tiny.ipynb")
    sweep.main([str(path)])
    assert calls == [0, 1, 2] * 2 and stored(folder) == ["0", "2"] and not before.exists()


def test_the_same_run_under_other_threads_is_run_again_and_replaces_its_records(planned):
    sweep, folder, path, calls = planned
    sweep.main([str(path)])
    path.write_text(path.read_text().replace("threads: 1", "threads: 2"))
    sweep.main([str(path)])
    assert calls == [0, 1, 2] * 2 and stored(folder) == ["0", "2"]
    assert [record["threads"] for record in sweep.records.load()] == [2, 2]


def test_seed_1_replaces_no_record_of_seeds_that_begin_with_1(planned):
    sweep, folder, _, _ = planned
    for lr in (0.1, 0.2):
        cells = [(SETTINGS.replace("0.1", str(lr)), "parameters", None), *CELLS[2:]]
        notebook([CELLS[0], *cells], folder / "book/chapters/tiny.ipynb")
        sweep.main(
            [
                str(
                    write(
                        folder, f"chapter: tiny, dataset: mnist_5k, seeds: [{2 if lr > 0.1 else '2, 20, 23'}]"
                    )
                )
            ]
        )
    found = sweep.records.load()
    assert [(r["seed"], r["parameters"]["lr"]) for r in found] == [(2, 0.2), (20, 0.1), (23, 0.1)]


def test_a_study_removes_no_record_of_another(planned):
    sweep, folder, _, calls = planned
    run = "chapter: tiny, dataset: mnist_5k, seeds: [0], parameters: {lr: 0.2}"
    sweep.main([str(write(folder, run, name="first"))])
    notebook([*CELLS[:3], ("1", "run", None)], folder / "book/chapters/tiny.ipynb")
    sweep.main([str(write(folder, run, name="second"))])
    assert calls == [0, 0] and sorted(r["study"] for r in all_of(sweep, folder)) == ["first", "second"]
    assert [r["study"] for r in sweep.records.load(study=None)] == ["second"]  # a run counts once


def test_a_study_keeps_all_its_variants_of_a_seed(planned):
    sweep, folder, _, _ = planned
    changes = [f"chapter: tiny, dataset: mnist_5k, seeds: [0], parameters: {{lr: {lr}}}" for lr in (0.2, 0.3)]
    for again in ([], ["--force"]):
        sweep.main([str(write(folder, *changes)), *again])
        assert sorted(r["parameters"]["lr"] for r in sweep.records.load(study="study")) == [0.2, 0.3]


def all_of(sweep, folder):
    return [r for path in (folder / "data/records").rglob("*.json") for r in sweep.records.read(path)]


@pytest.mark.parametrize(
    "damage", [lambda text: "", lambda text: text.replace("0.5", "0.9")], ids=["empty", "changed"]
)
def test_a_damaged_record_is_neither_skipped_nor_sealed_again_but_run_again(planned, capsys, damage):
    sweep, folder, path, calls = planned
    sweep.main([str(path)])
    (file,) = (folder / "data/records").rglob("0-*.json")
    good = file.read_text()
    for executed_notebook in (folder / "_build").rglob("0-*.ipynb"):
        executed_notebook.unlink()
    file.write_text(damage(good))
    sweep.main([str(path)])
    assert f"{file.name} are damaged" in capsys.readouterr().out
    assert calls == [0, 1, 2, 0, 1] and file.read_text() == good


def test_a_damaged_neighbour_is_left_for_people_to_look_at(planned):
    sweep, folder, path, _ = planned
    sweep.main([str(path)])
    (file,) = (folder / "data/records").rglob("0-*.json")
    neighbour = file.with_name("0-aaaaaaaaaa.json")
    neighbour.write_text("{")
    sweep.main([str(path), "--force"])
    assert file.exists() and neighbour.read_text() == "{"


def test_a_study_does_not_replace_the_headline(planned):
    sweep, folder, path, _ = planned
    sweep.main([str(path)])
    sweep.main([str(write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [0], parameters: {lr: 0.2}"))])
    assert stored(folder) == ["0", "0", "2"]


def test_a_run_whose_parameters_became_the_defaults_becomes_the_headline_and_back(planned):
    sweep, folder, path, calls = planned
    study = "chapter: tiny, dataset: mnist_5k, seeds: [0], parameters: {lr: 0.2}"
    sweep.main([str(write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [0]"))])
    sweep.main([str(write(folder, study))])
    cells = [*CELLS]
    cells[1] = (SETTINGS.replace("0.1", "0.2"), "parameters", None)
    notebook(cells, folder / "book/chapters/tiny.ipynb")
    sweep.main([str(path)])
    (file,) = (folder / "data/records").rglob("0-*.json")  # the old default's run is superseded
    (record,) = json.loads(file.read_text())["records"]
    assert (record["parameters"]["lr"], record["study"]) == (0.2, "headline") and calls == [0, 0]
    assert record["sha256"] == records.body_hash(record)
    other = write(folder, study).rename(folder / "book/experiments/other.yaml")
    cells[1] = (SETTINGS, "parameters", None)
    notebook(cells, folder / "book/chapters/tiny.ipynb")
    for file_of_runs, name in ((other, "other"), (write(folder, study), "other")):
        sweep.main([str(file_of_runs)])
        assert json.loads(file.read_text())["records"][0]["study"] == name
    assert calls == [0, 0]


FAULTS = {
    "none": {},
    "chapter": {"chapter": "other"},
    "parameters": {},
    "threads": {"threads": 2},
    "package": {"package": "/elsewhere"},
    "digest": {"digest": "0" * 64},
    "cells": {},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_notebook_without_the_records_of_its_run_fails_once_and_is_not_harvested_again(
    planned, monkeypatch, fault
):
    sweep, folder, path, calls = planned
    good = sweep.run.run_notebook

    def run_notebook(source, target, parameters, *rest, **more):
        seconds = good(source, target, parameters, *rest, **more)
        changed = {"lr": 0.7} if fault == "parameters" else {}
        executed(sweep, folder, parameters | changed, target, **FAULTS[fault])
        if fault == "none":
            notebook([("x", None, None)], target)
        elif fault == "cells":
            target.write_text(target.read_text().replace("seed % 2", "seed % 3"))
        return seconds

    monkeypatch.setattr(sweep.run, "run_notebook", run_notebook)
    assert sweep.main([str(path)]) == 1 and stored(folder) == []
    monkeypatch.setattr(sweep.run, "run_notebook", good)
    sweep.main([str(path)])
    assert calls == [0, 1, 2] * 2 and stored(folder) == ["0", "2"]


def test_any_executor_will_do(planned):
    sweep, folder, path, _ = planned

    class AtOnce(concurrent.futures.Executor):
        def submit(self, function, *arguments):
            future = concurrent.futures.Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

    failed = sweep.execute(sweep.plan(path), AtOnce())
    assert [run["parameters"]["seed"] for run, _ in failed] == [1] and stored(folder) == ["0", "2"]


# real executions: each costs seconds


def test_a_notebook_runs_with_this_interpreter_in_its_own_folder(copy, monkeypatch):
    sweep, folder = copy
    monkeypatch.setenv("DEEPCLUST_DATA", "relative")
    probe = "import os, sys\nprint(sys.executable, os.getcwd(), who, *map(os.environ.get, names), sep='|')"
    source, target = folder / "book/chapters/probe.ipynb", folder / "deep/er/out.ipynb"
    monkeypatch.setenv("DEEPCLUST_CACHE", "my/cache")
    monkeypatch.setenv("DEEPCLUST_RECORDING", "left over")
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "DEEPCLUST_RECORDING", "DEEPCLUST_GRAPHS"]
    names += ["DEEPCLUST_DATA", "DEEPCLUST_CACHE"]
    notebook([(f'who = ""\nnames = {names}', "parameters", None), (probe, None, None)], source)
    assert 0 < sweep.run_notebook(source, target, {"who": "me"}, threads=3, graphs=True) < 60
    (line,) = json.loads(target.read_text())["cells"][-1]["outputs"][0]["text"]
    there = [sys.executable, str(source.parent), "me", "3", "3", "None", "1", os.path.abspath("relative")]
    there += [os.path.abspath("my/cache")]
    assert line.strip().split("|") == there
    assert [path.name for path in target.parent.iterdir()] == ["out.ipynb"]


def test_a_failing_notebook_leaves_its_error_line_and_no_target(copy):
    sweep, folder = copy
    cells = [("a = 1", "parameters", None), ("raise ValueError(f'a is {a},\\n which is wrong')", None, None)]
    source, target = folder / "book/chapters/bad.ipynb", folder / "out.ipynb"
    notebook([*cells, ("open('after', 'w')", None, None)], source)
    with pytest.raises(ValueError, match="bad has no parameter b"):
        sweep.run_notebook(source, target, {"b": 2})
    with pytest.raises(sweep.RunFailed) as failure:
        sweep.run_notebook(source, target, {"a": 2})
    assert str(failure.value) == "ValueError: a is 2, which is wrong"
    assert not target.exists() and (folder / "out.failed.ipynb").exists()
    assert not (source.parent / "after").exists()


def test_a_typo_under_bare_papermill_stops_before_the_next_cell(copy, monkeypatch):
    import papermill

    _, folder = copy
    monkeypatch.setenv("PYTHONPATH", str(folder))
    source = folder / "book/chapters/tiny.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="sede is not a parameter.*did you mean seed"):
        papermill.execute_notebook(
            str(source), str(folder / "out.ipynb"), {"sede": 3}, cwd=str(source.parent), progress_bar=False
        )
    assert not (folder / "reached.txt").exists()


def test_a_real_run_ends_in_a_record(copy):
    sweep, folder = copy
    (run,) = sweep.plan(write(folder, PROFILE))
    done, (record,), seconds = sweep.run_one(run)
    assert done == "recorded" and seconds > 0 and (folder / "reached.txt").exists()
    assert (record["acc"], record["threads"], record["commit"]) == (1.0, 1, None)
    assert record["parameters"] == run["parameters"] and record["versions"]["python"] in sys.version
    assert record["digest"] == sweep.code_digest("tiny")
    assert sweep.records.load("tiny") == [record | {"current": True}]


def test_a_chapter_saved_while_its_run_starts_gives_no_record(copy, monkeypatch):
    """The kernel reads the file after the sweep has looked at it: what it says of itself is compared."""
    sweep, folder = copy
    (run,) = sweep.plan(write(folder, PROFILE))
    popen = subprocess.Popen

    def save_then_start(*command, **settings):
        path = folder / "book/chapters/tiny.ipynb"
        path.write_text(path.read_text().replace("seed % 2", "seed % 3"))
        return popen(*command, **settings)

    monkeypatch.setattr(sweep.run.subprocess, "Popen", save_then_start)
    with pytest.raises(sweep.RunFailed, match="the code changed while the run was starting"):
        sweep.run_one(run)
    assert stored(folder) == []


def test_the_package_of_another_place_gives_no_record(copy, monkeypatch, tmp_path_factory):
    sweep, folder = copy
    other = tmp_path_factory.mktemp("installed")
    shutil.copytree(folder / "deepclust_nb", other / "deepclust_nb")
    shutil.copytree(folder / "data", other / "data")
    (run,) = sweep.plan(write(folder, PROFILE))
    environment = sweep.run._environment
    monkeypatch.setattr(sweep.run, "_environment", lambda *a: environment(*a) | {"PYTHONPATH": str(other)})
    monkeypatch.setattr(sweep.run, "root", lambda: other)  # the child must start there too
    with pytest.raises(sweep.RunFailed, match="imported deepclust_nb from|the code changed"):
        sweep.run_one(run)
    assert stored(folder) == []


def test_a_path_that_separates_paths_is_refused(copy, monkeypatch):
    sweep, folder = copy
    monkeypatch.setattr(sweep.run, "root", lambda: folder / "a:b")
    with pytest.raises(sweep.RunFailed, match="holds ':', which separates paths"):
        sweep.run_notebook(folder / "book/chapters/tiny.ipynb", folder / "out.ipynb", {})


def test_threads_follow_the_environment_then_the_cores_that_are_ours(copy, monkeypatch):
    import joblib

    sweep, folder = copy
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [sweep.run.default_threads(workers) for workers in (1, 2, 4, 9)] == [6, 3, 1, 1]
    for told, threads in (("3", 3), ("4,2", 4), ("0", 3), ("many", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert sweep.run.default_threads(2) == threads
    asked = []
    monkeypatch.setattr(sweep.run, "execute", lambda runs, *rest: asked.append(runs[0]["threads"]) or [])
    path, free = write(folder, PROFILE), write(folder, PROFILE, name="free")
    free.write_text(free.read_text().replace("threads: 1\n", ""))
    given = [(path, []), (path, ["--threads", "5"]), (free, []), (free, ["--threads", "5"])]
    for file, more in (*given, (free, ["--workers", "2"]), (free, ["--workers", "2", "--threads", "5"])):
        assert sweep.main([str(file), *more]) == 0
    assert asked == [1, 1, 6, 5, 3, 5]


def test_a_build_folder_that_cannot_be_written_is_named(copy, capsys):
    sweep, folder = copy
    (folder / "_build").write_text("a file")
    assert sweep.main([str(write(folder, PROFILE))]) == 2
    assert f"{folder}/_build/sweeps cannot be written: " in capsys.readouterr().err


def _wait(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_of_the_leader_alone_stops_it_and_its_runs(copy, workers):
    parts, folder = copy
    path = write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [1, 2, 3]")
    block = LIGHT.replace("seed == 1", "seed > 0")
    notebook([(SETTINGS, "parameters", None), (block, "run", None)], folder / "book/chapters/tiny.ipynb")
    (folder / "block").touch()
    command = [sys.executable, "-m", "deepclust_nb.sweep", str(path), "--workers", workers]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Tests that a shell started in the background inherit that interrupts are ignored.
    attend = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sweep = subprocess.Popen(command, cwd=folder, preexec_fn=attend, **pipes)
    started = folder / "started.txt"
    _wait(lambda: started.exists() and len(started.read_text().splitlines()) == int(workers))
    kernels = [int(line.split()[1]) for line in started.read_text().splitlines()]
    os.kill(sweep.pid, signal.SIGINT)
    _, errors = sweep.communicate(timeout=45)
    assert (sweep.returncode, errors) == (
        130,
        "interrupted; the same command continues where this one stopped\n",
    )
    _wait(lambda: not any(psutil.pid_exists(kernel) for kernel in kernels), 45)
    assert len(started.read_text().splitlines()) == int(workers) and stored(folder) == []


def test_a_run_that_is_about_to_start_when_all_are_stopped_does_not(copy):
    sweep, folder = copy
    sweep.run.stop()
    start = time.monotonic()
    with pytest.raises(sweep.RunFailed):
        sweep.run_notebook(folder / "book/chapters/tiny.ipynb", folder / "out.ipynb", {})
    assert time.monotonic() - start < 30 and not (folder / "reached.txt").exists()


def test_two_sweeps_of_the_same_run_do_it_once(copy):
    parts, folder = copy
    path = write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [1]")
    notebook([(SETTINGS, "parameters", None), (LIGHT, "run", None)], folder / "book/chapters/tiny.ipynb")
    (folder / "stated.json").write_text(json.dumps(stated_by(parts, folder)))
    (folder / "block").touch()
    command = [sys.executable, "-m", "deepclust_nb.sweep", str(path)]
    logs = [open(folder / f"{name}.log", "w+") for name in ("first", "second")]
    first = subprocess.Popen(command, cwd=folder, stdout=logs[0], stderr=subprocess.STDOUT)
    _wait(lambda: (folder / "started.txt").exists())
    second = subprocess.Popen(command, cwd=folder, stdout=logs[1], stderr=subprocess.STDOUT)
    _wait(lambda: "another sweep is at this run; waiting" in (folder / "second.log").read_text())
    (folder / "block").unlink()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert "skipped" in (folder / "second.log").read_text() and stored(folder) == ["1"]
    assert len((folder / "started.txt").read_text().splitlines()) == 1
    for log in logs:
        log.close()


def test_a_killed_sweep_loses_nothing_and_repeats_nothing(copy):
    parts, folder = copy
    path = write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [0, 1, 2]")
    notebook([(SETTINGS, "parameters", None), (LIGHT, "run", None)], folder / "book/chapters/tiny.ipynb")
    started, ended = folder / "started.txt", folder / "ended.txt"
    (folder / "block").touch()
    (folder / "stated.json").write_text(json.dumps(stated_by(parts, folder)))
    command = [sys.executable, "-m", "deepclust_nb.sweep", str(path)]
    sweep = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    _wait(lambda: started.exists() and len(started.read_text().splitlines()) == 2)
    kernels = [int(line.split()[1]) for line in started.read_text().splitlines()]
    assert stored(folder) == ["0"]
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    # The run in progress ends with its sweep instead of going on unseen.
    _wait(lambda: not psutil.pid_exists(kernels[1]), 15)
    assert ended.read_text().split() == ["0"]
    first = {path: path.read_bytes() for path in (folder / "data/records").rglob("*.json")}

    (folder / "block").unlink()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in started.read_text().splitlines()] == ["0", "1", "1", "2"]
    assert ended.read_text().split() == ["0", "1", "2"] and stored(folder) == ["0", "1", "2"]
    assert all(path.read_bytes() == content for path, content in first.items())
    assert "[1/3, " in done.stdout and "seed 0: skipped" in done.stdout
    assert "seed 1: recorded" in done.stdout and "k-means 0.250" in done.stdout
    assert not list(folder.rglob("*.part*"))
