"""Run chapters by the hundred: a list of runs in, one process per run, one file of records per run out.

    python -m deepclust_nb.sweep book/experiments/x.yaml [--workers N] [--threads T] [--dry-run] [--force]

The whole list is checked before anything runs. Each run executes the chapter with papermill in a process of
its own, into `_build/sweeps`; its records go to `data/records` in one atomic step. A run whose records exist
for the same code and parameters is skipped, and an executed notebook that a killed sweep left behind is read,
not run again. This is no scheduler: `execute` takes any `concurrent.futures.Executor`, so a cluster's can
stand in.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from . import data, results
from .digest import canonical, chapter_file, code_digest, root, sha256

KEYS = {"chapter": str, "dataset": str, "profile": str, "seeds": list, "parameters": dict}
FIXED = ("dataset", "profile", "seed")


class RunFailed(RuntimeError):
    """A chapter stopped with an error; the message is its last line."""


def chapter_path(chapter):
    """Where the notebook of a chapter lies.

    Returns: a pathlib.Path.
    Raises: ValueError when the checkout has no such chapter, naming the closest one.
    """
    path = chapter_file(str(chapter))
    known = sorted(other.stem for other in path.parent.glob("*.ipynb"))
    if str(chapter) not in known:
        raise ValueError(f"there is no chapter {chapter!r}{results.suggestion(str(chapter), known)}")
    return path


def profile_parameters(chapter, profile, dataset):
    """The parameters that a profile sets for a chapter on a data set.

    They stand in book/experiments/profiles/CHAPTER.PROFILE.DATASET.yaml, a flat file that papermill takes
    with `-f`; the profile "quick" is the chapter's own defaults and needs no file.

    Returns: a dict with dataset and profile among its keys.
    Raises: ValueError when the file is missing, is not a flat mapping, or names another data set or profile.
    """
    path = root() / "book" / "experiments" / "profiles" / f"{chapter}.{profile}.{dataset}.yaml"
    values = _yaml(path) if path.is_file() or profile != "quick" else {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path.name} must be a mapping from parameter to value, got {type(values).__name__}"
        )
    fixed = {"dataset": dataset, "profile": profile}
    for name in fixed:
        if values.get(name, fixed[name]) != fixed[name]:
            raise ValueError(f"{path.name} sets {name} to {values[name]!r}, its name says {fixed[name]!r}")
    return values | fixed


def resolve(notebook, parameters):
    """A notebook's parameters after some of them are overridden.

    Parameters: notebook: path of an .ipynb with a cell tagged `parameters`; parameters: name to value.
    Returns: a dict of all parameters; an int given for a float becomes a float.
    Raises: ValueError for an unknown name (with the closest known one), a value whose type is not the
        default's, or a default that is not a literal; RuntimeError without papermill, saying what to install.
    """
    defaults = {}
    for name, found in _need("papermill").inspect_notebook(str(notebook)).items():
        try:
            defaults[name] = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError):
            shown = f"{name} = {found['default']}"
            raise ValueError(
                f"{Path(notebook).name}: a parameter's default must be a literal, got {shown}"
            ) from None
    resolved = dict(defaults)
    for name, value in parameters.items():
        if name not in defaults:
            chapter = Path(notebook).stem
            raise ValueError(f"{chapter} has no parameter {name}{results.suggestion(name, defaults)}")
        resolved[name] = _like(name, value, defaults[name])
    return resolved


def _like(name, value, default):
    wanted = type(default)
    if default is None or type(value) is wanted:
        return value
    if wanted is float and type(value) is int:
        return float(value)
    hint = "; YAML reads 1e-3 as text, write 1.0e-3" if wanted is float and isinstance(value, str) else ""
    raise ValueError(f"{name} must be of type {wanted.__name__}, got {value!r}{hint}")


def _need(package):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise RuntimeError(f"sweeps need {package}: pip install 'deepclust-nb[sweep]'") from None


def _yaml(path):
    yaml = _need("yaml")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None


def plan(path):
    """Read a sweep file and check all of it.

    Parameters: path: a YAML file whose one key `runs` is a list of {chapter, dataset, profile, seeds,
        parameters}; profile is "quick" and parameters are empty where left out.
    Returns: a list of runs, one a seed: dicts of chapter, parameters (all of the chapter's) and study.
    Raises: ValueError with one sentence for the first mistake found.
    """
    path = Path(path)
    content = _yaml(path)
    if not isinstance(content, dict) or set(content) != {"runs"} or not isinstance(content["runs"], list):
        raise ValueError(f"{path.name} must hold one key, runs, with a list of runs")
    runs = []
    for number, entry in enumerate(content["runs"], 1):
        try:
            runs += _expanded(entry, path.stem)
        except ValueError as error:
            raise ValueError(f"{path.name}, run {number}: {error}") from None
    seen = set()
    for run in runs:
        key = canonical([run["chapter"], run["parameters"]])
        if key in seen:
            raise ValueError(f"{path.name} asks twice for the run {name_of(run)}")
        seen.add(key)
    return runs


def _expanded(entry, stem):
    if not isinstance(entry, dict):
        raise ValueError(f"a run must be a mapping with chapter, dataset and seeds, got {entry!r}")
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{key} is not a key of a run{results.suggestion(str(key), KEYS)}")
    entry = {"profile": "quick", "parameters": {}} | entry
    for key, kind in KEYS.items():
        if not isinstance(entry.get(key), kind):
            raise ValueError(f"{key} must be of type {kind.__name__}, got {entry.get(key)!r}")
    if not entry["seeds"] or any(type(seed) is not int for seed in entry["seeds"]):
        raise ValueError(f"seeds must be a list of ints with at least one, got {entry['seeds']!r}")
    chapter, dataset, overrides = entry["chapter"], entry["dataset"], entry["parameters"]
    notebook = chapter_path(chapter)
    if dataset not in data.NAMES:
        raise ValueError(f"there is no data set {dataset!r}{results.suggestion(dataset, data.NAMES)}")
    for name in set(FIXED) & set(overrides):
        raise ValueError(f"{name} is a key of the run (seeds for seed), not one of its parameters")
    profile = profile_parameters(chapter, entry["profile"], dataset)
    runs = []
    for seed in entry["seeds"]:
        plain = resolve(notebook, profile | {"seed": seed})
        parameters = resolve(notebook, profile | overrides | {"seed": seed})
        study = "headline" if parameters == plain else stem
        runs.append({"chapter": chapter, "parameters": parameters, "study": study})
    return runs


def name_of(run):
    """A run in a few words: chapter, data set, profile and seed."""
    p = run["parameters"]
    study = "" if run["study"] == "headline" else f" ({run['study']})"
    return f"{run['chapter']} {p['dataset']} {p['profile']} seed {p['seed']}{study}"


def places(run):
    """Where a run's records and its executed notebook belong, given the code as it is now.

    Returns: (records, notebook, digest): two paths, DATASET/PROFILE/SEED-ID under the chapter, ID being the
        first ten digits of the hash of code and parameters without the seed; and the code's digest.
    """
    digest, p = code_digest(run["chapter"]), run["parameters"]
    key = sha256([digest, {name: value for name, value in p.items() if name != "seed"}])[:10]
    stem = Path(run["chapter"], p["dataset"], p["profile"], f"{p['seed']}-{key}")
    notebook = root() / "_build" / "sweeps" / f"{stem}.ipynb"
    return data.data_root() / "records" / f"{stem}.json", notebook, digest


def run_notebook(source, target, parameters, threads=None, recording=False):
    """Execute a notebook with papermill in a process of its own, in the notebook's own folder.

    The kernel is this interpreter, and both end when the calling process dies. `target` appears only when the
    whole notebook ran; of a failed run, TARGET.failed.ipynb shows where it stopped.

    Parameters: source, target: paths of .ipynb files; parameters: name to value, all known to the notebook;
        threads: of OpenMP and MKL, None leaves them as they are; recording: let the notebook run to its end
        where a checked number lies outside its band.
    Returns: seconds, the start of the kernel included.
    Raises: ValueError for parameters that the notebook does not take; RunFailed with the chapter's error
    line.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    resolve(source, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    spec = {"source": str(source), "part": str(target.with_name(f".{target.stem}.{os.getpid()}.part.ipynb"))}
    spec |= {"parameters": parameters}
    start, command = time.perf_counter(), [sys.executable, "-m", "deepclust_nb.child"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        environment = _environment(threads, recording)
        pipes = {"stdin": subprocess.PIPE, "stdout": errors, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=environment, cwd=root(), **pipes) as child:
            # The pipe stays open: however this process dies, the child then reads its end.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(spec) + "\n")
                child.stdin.flush()
            code = child.wait()
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()]
    if code == 0:
        os.replace(spec["part"], target)
        return time.perf_counter() - start
    if os.path.exists(spec["part"]):
        os.replace(spec["part"], target.with_name(f"{target.stem}.failed.ipynb"))
    if code < 0:
        raise RunFailed(f"the process was ended by signal {-code}")
    raise RunFailed(lines[-1] if lines else f"the process ended with code {code} and no message")


def _environment(threads, recording):
    # The kernel starts in the notebook's folder, so relative paths must not travel.
    env = dict(os.environ)
    paths = {"PYTHONPATH": str(root()), "JUPYTER_PATH": os.path.join(sys.prefix, "share", "jupyter")}
    for name, path in paths.items():
        env[name] = os.pathsep.join(filter(None, [path, env.get(name)]))
    if env.get("DEEPCLUST_DATA"):
        env["DEEPCLUST_DATA"] = os.path.abspath(env["DEEPCLUST_DATA"])
    if threads is not None:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if recording:
        env["DEEPCLUST_RECORDING"] = "1"
    return env


def run_one(run, threads=None, force=False):
    """Do one run of a plan, unless its records are there already, and store its records.

    Returns: (what happened: "recorded", "harvested" or "skipped"; the records; seconds).
    Raises: RunFailed when the chapter stops with an error or displays no record or those of another run; the
        error is kept beside the notebook in `_build/sweeps` as SEED-ID.failed.json.
    """
    target, notebook, digest = places(run)
    if target.is_file() and not force:
        records = _named(target, run["study"])
        _remove_superseded(target, records[0])
        return "skipped", records, 0.0
    failure = notebook.with_suffix(".failed.json")
    failure.unlink(missing_ok=True)
    seconds, done = 0.0, "harvested"
    print(f"{name_of(run)}: start", flush=True)
    try:
        if force or not notebook.is_file():
            done = "recorded"
            seconds = run_notebook(
                chapter_path(run["chapter"]), notebook, run["parameters"], threads, recording=True
            )
        records = _harvest(run, notebook, digest)
    except (RunFailed, ValueError) as error:
        failed = {"status": "failed", "error": str(error), **run}
        results.write_atomic(failure, json.dumps(failed, indent=1) + "\n")
        raise RunFailed(str(error)) from None
    results.write_atomic(target, json.dumps({"records": records}, indent=1) + "\n")
    _remove_superseded(target, records[0])
    return done, records, seconds


def _named(target, study):
    # What is the headline changes with the defaults; a run that two sweeps share keeps its first name.
    records = json.loads(target.read_text(encoding="utf-8"))["records"]
    if study != records[0]["study"] and "headline" in (study, records[0]["study"]):
        for record in records:
            record["study"] = study
            record["sha256"] = results.body_hash(record)
        results.write_atomic(target, json.dumps({"records": records}, indent=1) + "\n")
    return records


def _harvest(run, notebook, digest):
    try:
        records = results.recorded(notebook, digest, run["study"])
        if not records:
            raise RunFailed("the notebook displayed no record")
        for record in records:
            if record["chapter"] != run["chapter"] or record["parameters"] != run["parameters"]:
                raise RunFailed(f"the record of {record['method']} is of another chapter or other parameters")
        return records
    except (RunFailed, ValueError):
        # Kept to be looked at, but never harvested again.
        os.replace(notebook, notebook.with_suffix(".failed.ipynb"))
        raise


def _remove_superseded(target, new):
    # The same run with older code, or the headline run of a profile that has changed since; the repository's
    # history keeps them.
    for path in target.parent.glob(f"{new['seed']}-*.json"):
        if path != target:
            old = json.loads(path.read_text(encoding="utf-8"))["records"][0]
            if old["parameters"] == new["parameters"] or old["study"] == new["study"] == "headline":
                path.unlink()


def execute(runs, executor, threads=None, force=False):
    """Do the runs of a plan on an executor, one line of progress each; a failed run does not stop the others.

    Parameters: runs: from `plan`; executor: a `concurrent.futures.Executor`; threads: of each run; force: run
        again what is recorded.
    Returns: a list of (run, error) for the failed ones.
    """
    start, failed = time.perf_counter(), []
    futures = {executor.submit(run_one, run, threads, force): run for run in runs}
    for number, future in enumerate(as_completed(futures), 1):
        run, error = futures[future], future.exception()
        if error is not None:
            failed.append((run, error))
            line = f"FAILED: {error}"
        else:
            done, records, seconds = future.result()
            scores = [f"{record['method']} {record['acc']:.3f}" for record in records if "acc" in record]
            line = f"{done} in {seconds:.0f} s: {', '.join(scores) or 'no ACC'}"
        clock = time.perf_counter() - start
        print(f"[{number}/{len(runs)}, {clock:.0f} s] {name_of(run)}: {line}", flush=True)
    return failed


def main(arguments=None):
    """The command line; returns 0, 1 when a run failed, or 2 when the sweep file is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m deepclust_nb.sweep", description="Run chapters by a list."
    )
    parser.add_argument("sweep", help="a YAML file with a list of runs")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--threads", type=int, help="threads of each run (default: the cores over the workers)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only check the file and list its runs")
    parser.add_argument("--force", action="store_true", help="run again what is recorded already")
    options = parser.parse_args(arguments)
    if options.workers < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--workers and --threads must be at least 1")
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.workers)
    try:
        runs = plan(options.sweep)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.dry_run:
        for run in runs:
            target, notebook, _ = places(run)
            state = "recorded" if target.is_file() else "to harvest" if notebook.is_file() else "to run"
            print(f"{name_of(run)}: {state}")
        return 0
    with ThreadPoolExecutor(options.workers) as executor:
        try:
            failed = execute(runs, executor, threads, options.force)
        except KeyboardInterrupt:
            executor.shutdown(wait=False, cancel_futures=True)
            print("interrupted; the same command continues where this one stopped", file=sys.stderr)
            return 130
    for run, error in failed:
        print(f"failed: {name_of(run)}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
