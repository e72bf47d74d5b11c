"""The runs of a plan: executed in processes of their own, their records sealed and stored.

Each run executes the chapter with papermill, into `_build/sweeps`; its records go to `data/records` in one
atomic step. A run whose records exist for the same code, parameters and threads is skipped, and an executed
notebook that a killed sweep left behind is read, not run again. Two sweeps share a run: the second waits for
the first. This is no scheduler: `execute` takes any `concurrent.futures.Executor`, so a cluster's will do.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import as_completed
from pathlib import Path

from .. import records
from ..digest import cells_digest, digest_of_today
from ..places import RECORDING, absolute_folders, data_root, root, write_atomic
from .plan import chapter_path, name_of, need, resolve

_children, _stopped = set(), threading.Event()


class RunFailed(RuntimeError):
    """A chapter stopped with an error; the message is its last line."""


def default_threads(workers=1):
    """Threads of each run where nothing says otherwise: OMP_NUM_THREADS where it is set, else the cores that
    this process may use (affinity and container limits respected), shared among the workers.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if told.isdigit() and int(told) > 0:
        return int(told)
    from joblib import cpu_count

    return max(1, cpu_count() // workers)


def places(run):
    """Where a run's records and its executed notebook belong, given the code as it is now.

    Returns: (records, notebook, digest): two paths, DATASET/PROFILE/SEED-KEY under the chapter, KEY as made
        by `records.run_key`; and the code's digest.
    """
    digest, p = digest_of_today(run["chapter"]), run["parameters"]
    key = records.run_key(digest, p, run["threads"])
    stem = Path(run["chapter"], p["dataset"], p["profile"], f"{p['seed']}-{key}")
    notebook = root() / "_build" / "sweeps" / f"{stem}.ipynb"
    return data_root() / "records" / f"{stem}.json", notebook, digest


def run_notebook(source, target, parameters, threads=None, recording=None, graphs=False):
    """Execute a notebook with papermill in a process of its own, in the notebook's own folder.

    The kernel is this interpreter, and both end when the calling process dies. `target` appears only when the
    whole notebook ran; of a failed run, TARGET.failed.ipynb shows where it stopped.

    Parameters: source, target: paths of .ipynb files; parameters: name to value, all known to the notebook;
        threads: of OpenMP and MKL, None leaves them as they are; recording: the chapter whose run a sweep
        records: the kernel states its code, and a number outside its band does not stop it; graphs: whether
        the kernel replays its training steps, see `deepclust_nb.graphs`.
    Returns: seconds, the start of the kernel included.
    Raises: ValueError for parameters that the notebook does not take; RunFailed with the chapter's error
    line.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    resolve(source, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    spec = {"source": str(source), "part": str(target.with_name(f".{target.stem}.{os.getpid()}.part.ipynb"))}
    spec |= {"parameters": parameters, "graphs": graphs}
    start, command = time.perf_counter(), [sys.executable, "-m", "deepclust_nb.sweep.child"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": errors, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=_environment(threads, recording), cwd=root(), **pipes) as child:
            _children.add(child)
            if _stopped.is_set():  # while this one was starting
                stop()
            try:
                # The pipe stays open: however this process dies, the child then reads its end.
                with contextlib.suppress(BrokenPipeError, ValueError):
                    child.stdin.write(json.dumps(spec) + "\n")
                    child.stdin.flush()
                code = child.wait()
            finally:
                _children.discard(child)
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


def stop():
    """End the processes of all runs under way, and of those about to start: a child ends, and its kernel with
    it, when its pipe closes.
    """
    _stopped.set()
    for child in list(_children):
        with contextlib.suppress(OSError, ValueError):
            child.stdin.close()


def _environment(threads, recording):
    if os.pathsep in str(root()):
        raise RunFailed(f"{root()} holds {os.pathsep!r}, which separates paths: move the checkout")
    # The kernel starts in the notebook's folder, so relative paths must not travel.
    env = dict(os.environ) | absolute_folders()
    paths = {"PYTHONPATH": str(root()), "JUPYTER_PATH": os.path.join(sys.prefix, "share", "jupyter")}
    for name, path in paths.items():
        env[name] = os.pathsep.join(filter(None, [path, env.get(name)]))
    if threads is not None:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env.pop(RECORDING, None)
    return env | ({RECORDING: recording} if recording else {})


@contextlib.contextmanager
def alone(lock, waiting):
    """Hold the file `lock`, a path; where another process holds it, print the sentence `waiting` and wait."""
    filelock = need("filelock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(lock)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        print(waiting, flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def run_one(run, force=False):
    """Do one run of a plan, unless its records are there already, and store its records.

    Returns: (what happened: "recorded", "harvested" or "skipped"; the records; seconds).
    Raises: RunFailed when the chapter stops with an error or displays no record, those of another run, or of
        other code; the error is kept beside the notebook in `_build/sweeps` as SEED-KEY.failed.json.
    """
    run = run | {"threads": run["threads"] or default_threads()}
    target, notebook, digest = places(run)
    waiting = f"{name_of(run)}: another sweep is at this run; waiting for it"
    with alone(notebook.with_suffix(".lock"), waiting):
        found = None if force else _stored(target, run["study"])
        if found:
            _remove_superseded(target, found[0])
            return "skipped", found, 0.0
        failure = notebook.with_suffix(".failed.json")
        failure.unlink(missing_ok=True)
        seconds, done, chapter = 0.0, "harvested", run["chapter"]
        print(f"{name_of(run)}: start", flush=True)
        try:
            if force or not notebook.is_file():
                done, source = "recorded", chapter_path(chapter)
                how = {"threads": run["threads"], "recording": chapter, "graphs": run.get("graphs", False)}
                seconds = run_notebook(source, notebook, run["parameters"], **how)
            found = _harvest(run, notebook, digest)
        except (RunFailed, ValueError) as error:
            failed = {"status": "failed", "error": str(error), **run}
            write_atomic(failure, json.dumps(failed, indent=1) + "\n")
            raise RunFailed(str(error)) from None
        records.write(target, found)
        _remove_superseded(target, found[0])
        return done, found, seconds


def _stored(target, study):
    """The records of a run, or None where there are none or they are damaged, which is told."""
    try:
        found = records.read(target)
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f"{error}: running it again", flush=True)
        return None
    # What is the headline changes with the defaults; a run that two sweeps share keeps its first name.
    if study != found[0]["study"] and "headline" in (study, found[0]["study"]):
        for record in found:
            record["study"] = study
            record["sha256"] = records.body_hash(record)
        records.write(target, found)
    return found


def _harvest(run, notebook, digest):
    try:
        found = records.recorded(notebook, digest, run["study"])
        if not found:
            raise RunFailed("the notebook displayed no record")
        if cells_digest(notebook) != cells_digest(chapter_path(run["chapter"])):
            raise RunFailed("the chapter changed while the run was starting: run it again")
        for record in found:
            if record["chapter"] != run["chapter"] or record["parameters"] != run["parameters"]:
                raise RunFailed(f"the record of {record['method']} is of another chapter or other parameters")
            if record["threads"] != run["threads"]:
                asked, used = run["threads"], record["threads"]
                raise RunFailed(f"the record of {record['method']} was made with {used} threads, not {asked}")
        return found
    except (RunFailed, ValueError):
        # Kept to be looked at, but never harvested again.
        os.replace(notebook, notebook.with_suffix(".failed.ipynb"))
        raise


def _remove_superseded(target, new):
    # The same run of the same study with older code or other threads, or the headline run of a profile that
    # has changed since; the repository's history keeps them. Another study's record is not ours to remove.
    for path in target.parent.glob(f"{new['seed']}-*.json"):
        with contextlib.suppress(ValueError, FileNotFoundError):  # a damaged one stays, to be looked at
            old = records.read(path)[0]
            same = old["parameters"] == new["parameters"] or new["study"] == "headline"
            if path != target and old["study"] == new["study"] and same:
                path.unlink()


def execute(runs, executor, force=False):
    """Do the runs of a plan on an executor, one line of progress each; a failed run does not stop the others.

    Parameters: runs: from `plan`; executor: a `concurrent.futures.Executor`; force: run again what is
        recorded.
    Returns: a list of (run, error) for the failed ones.
    """
    start, failed = time.perf_counter(), []
    futures = {executor.submit(run_one, run, force): run for run in runs}
    for number, future in enumerate(as_completed(futures), 1):
        run, error = futures[future], future.exception()
        if error is not None:
            failed.append((run, error))
            line = f"FAILED: {error}"
        else:
            done, found, seconds = future.result()
            scores = [f"{record['method']} {record['acc']:.3f}" for record in found if "acc" in record]
            line = f"{done} in {seconds:.0f} s: {', '.join(scores) or 'no ACC'}"
        clock = time.perf_counter() - start
        print(f"[{number}/{len(runs)}, {clock:.0f} s] {name_of(run)}: {line}", flush=True)
    return failed
