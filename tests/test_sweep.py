"""Sweeps on tiny notebooks in throw-away checkouts: what is refused, what is kept, what is run again."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from loader import checkout, notebook

from deepclust_nb import results

SETTINGS = (
    'dataset = "mnist_5k"\nprofile = "quick"\nseed: int = 0\nlr = 0.1  # step size\nlayers = [500,\n    20]'
)
PROFILE = "chapter: tiny, dataset: mnist_5k, seeds: [0]"

CHECK = """from deepclust_nb import results
parameters = results.check_parameters(
    globals(), dataset=["mnist_5k"], profile=["quick"], seed=(0, 9), lr=(0.0, 1.0), layers=[[500, 20]]
)"""
RUN = """_ = results.record(
    chapter="tiny", method="k-means", y_true=[0, 0, 1, 1], y_pred=[1, 1, 0, seed % 2],
    parameters=parameters, trained_on="all", scored_on="all", seconds=0.0,
)
open("../../reached.txt", "w").close()"""
# Without the package, so that its kernel starts fast: says that it started, waits while a file is there,
# displays a record and says that it ended.
LIGHT = f"""import os, pathlib, time
from IPython.display import display
folder = pathlib.Path("../..")
with open(folder / "started.txt", "a") as file:
    _ = file.write(f"{{seed}} {{os.getpid()}}\\n")
while seed == 1 and (folder / "block").exists():
    time.sleep(0.05)
parameters = dict(dataset=dataset, profile=profile, seed=seed, lr=lr, layers=layers)
record = dict(chapter="tiny", method="k-means", acc=seed / 4, parameters=parameters)
display({{"{results.MIME}": record | parameters, "text/plain": ""}}, raw=True)
with open(folder / "ended.txt", "a") as file:
    _ = file.write(f"{{seed}}\\n")"""


@pytest.fixture
def copy(tmp_path):
    """A checkout with the chapter `tiny` and a laptop profile of it on USPS: (sweep module, folder)."""
    module, folder = checkout(tmp_path)
    cells = [(SETTINGS, "parameters", None), (CHECK, None, None), (RUN, "run", None)]
    notebook(cells, folder / "book/chapters/tiny.ipynb")
    profile = folder / "book/experiments/profiles/tiny.laptop.usps.yaml"
    profile.write_text("dataset: usps\nprofile: laptop\nlr: 0.5\n")
    return module("sweep"), folder


def write(folder, *runs):
    path = folder / "book/experiments/study.yaml"
    path.write_text("runs:\n" + "".join(f"  - {{{run}}}\n" for run in runs))
    return path


def executed(folder, parameters, path, chapter="tiny"):
    """Put a notebook where a run leaves it, with the record that such a run displays."""
    record = {"chapter": chapter, "method": "k-means", "acc": 0.5, "parameters": parameters}
    record |= {key: parameters[key] for key in ("dataset", "profile", "seed")}
    output = {"output_type": "display_data", "metadata": {}, "data": {results.MIME: record, "text/plain": ""}}
    notebook([("x", None, [output])], path)


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
        ("chapter: tiny, dataset: mnist5k, seeds: [0]", "no data set 'mnist5k': did you mean mnist_5k"),
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
    ],
)
def test_a_mistake_anywhere_in_the_list_is_named_before_anything_runs(copy, capsys, run, says):
    sweep, folder = copy
    path = folder / "book/experiments/study.yaml"
    run = run if run.startswith("[") else f"{{{run}}}"
    path.write_text(f"runs:\n  - {{{PROFILE}, parameters: {{lr: 0.2}}}}\n  - {run}\n")
    with pytest.raises(ValueError, match=says):
        sweep.plan(path)
    assert sweep.main([str(path)]) == 2
    assert "study.yaml" in capsys.readouterr().err
    assert not (folder / "_build").exists() and not (folder / "reached.txt").exists()


@pytest.mark.parametrize(
    "text",
    ["", "runs: 3", "runs: []\nmore: 1", "- 1", "run: []"],
    ids=["empty", "number", "more", "list", "typo"],
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
    (folder / "x.yaml").write_text("runs: [")
    with pytest.raises(ValueError, match="x.yaml is not valid YAML"):
        sweep.plan(folder / "x.yaml")


def test_a_missing_package_is_named_with_what_to_install(copy, capsys, monkeypatch):
    sweep, folder = copy
    path = write(folder, PROFILE)
    for package in ("yaml", "papermill"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert sweep.main([str(path)]) == 2
        assert capsys.readouterr().err == f"sweeps need {package}: pip install 'deepclust-nb[sweep]'\n"


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
    target, executed_to, _ = sweep.places(run)
    assert target.parent == folder / "data/records/tiny/mnist_5k/quick"
    assert executed_to.parent == folder / "_build/sweeps/tiny/mnist_5k/quick"
    key = target.stem.removeprefix("0-")
    assert len(key) == 10 and sweep.places(other)[0].stem == f"12-{key}"
    changed = {**run, "parameters": run["parameters"] | {"lr": 0.2}}
    assert sweep.places(changed)[0] != target
    notebook([(SETTINGS, "parameters", None), ("1", "run", None)], folder / "book/chapters/tiny.ipynb")
    assert sweep.places(run)[0] != target


# what is stored


@pytest.fixture
def planned(copy, monkeypatch):
    """Three planned runs whose execution is replaced by writing its result; seed 1 fails."""
    sweep, folder = copy
    calls = []

    def run_notebook(source, target, parameters, threads=None, recording=False):
        calls.append(parameters["seed"])
        assert recording
        if parameters["seed"] == 1:
            raise sweep.RunFailed("ValueError: lr is too large")
        executed(folder, parameters, target)
        return 1.0

    monkeypatch.setattr(sweep, "run_notebook", run_notebook)
    path = write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [0, 1, 2]")
    return sweep, folder, path, calls


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
    assert record["sha256"] == results.body_hash(record)
    assert not list(folder.rglob("*.part*"))


def test_the_same_run_with_other_code_replaces_its_records(planned):
    sweep, folder, path, calls = planned
    sweep.main([str(path)])
    (before,) = (folder / "data/records").rglob("0-*.json")
    notebook([(SETTINGS, "parameters", None), ("1", "run", None)], folder / "book/chapters/tiny.ipynb")
    sweep.main([str(path)])
    assert calls == [0, 1, 2] * 2 and stored(folder) == ["0", "2"] and not before.exists()


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
    cells = [(SETTINGS.replace("0.1", "0.2"), "parameters", None), (CHECK, None, None), (RUN, "run", None)]
    notebook(cells, folder / "book/chapters/tiny.ipynb")
    sweep.main([str(path)])
    (file,) = (folder / "data/records").rglob("0-*.json")  # the old default's run is superseded
    (record,) = json.loads(file.read_text())["records"]
    assert (record["parameters"]["lr"], record["study"]) == (0.2, "headline") and calls == [0, 0]
    assert record["sha256"] == results.body_hash(record)
    other = write(folder, study).rename(folder / "book/experiments/other.yaml")
    cells[0] = (SETTINGS, "parameters", None)
    notebook(cells, folder / "book/chapters/tiny.ipynb")
    for file_of_runs, name in ((other, "other"), (write(folder, study), "other")):
        sweep.main([str(file_of_runs)])
        assert json.loads(file.read_text())["records"][0]["study"] == name
    assert calls == [0, 0]


@pytest.mark.parametrize("fault", ["none", "chapter", "parameters"])
def test_a_notebook_without_the_records_of_its_run_fails_once_and_is_not_harvested_again(
    planned, monkeypatch, fault
):
    sweep, folder, path, calls = planned
    good = sweep.run_notebook

    def run_notebook(source, target, parameters, *rest, **more):
        seconds = good(source, target, parameters, *rest, **more)
        if fault == "none":
            notebook([("x", None, None)], target)
        elif fault == "chapter":
            executed(folder, parameters, target, "other")
        else:
            executed(folder, parameters | {"lr": 0.7}, target)
        return seconds

    monkeypatch.setattr(sweep, "run_notebook", run_notebook)
    assert sweep.main([str(path)]) == 1 and stored(folder) == []
    monkeypatch.setattr(sweep, "run_notebook", good)
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
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "DEEPCLUST_RECORDING", "DEEPCLUST_DATA"]
    notebook([(f'who = ""\nnames = {names}', "parameters", None), (probe, None, None)], source)
    assert 0 < sweep.run_notebook(source, target, {"who": "me"}, threads=3) < 60
    (line,) = json.loads(target.read_text())["cells"][-1]["outputs"][0]["text"]
    there = [sys.executable, str(source.parent), "me", "3", "3", "None", os.path.abspath("relative")]
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
    done, (record,), seconds = sweep.run_one(run, threads=1)
    assert done == "recorded" and seconds > 0 and (folder / "reached.txt").exists()
    assert (record["acc"], record["threads"], record["commit"]) == (1.0, 1, None)
    assert record["parameters"] == run["parameters"] and record["versions"]["python"] in sys.version
    assert sweep.results.load("tiny") == [record | {"current": True}]


def _wait(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_killed_sweep_loses_nothing_and_repeats_nothing(copy):
    _, folder = copy
    path = write(folder, "chapter: tiny, dataset: mnist_5k, seeds: [0, 1, 2]")
    notebook([(SETTINGS, "parameters", None), (LIGHT, "run", None)], folder / "book/chapters/tiny.ipynb")
    started, ended = folder / "started.txt", folder / "ended.txt"
    (folder / "block").touch()
    command = [sys.executable, "-m", "deepclust_nb.sweep", str(path), "--threads", "1"]
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
