"""The command line of sweeps: `python -m deepclust_nb.sweep FILE`."""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from ..places import root
from .plan import name_of, plan


def main(arguments=None):
    """Run a sweep; returns 0, 1 when a run failed, 2 when the file is wrong, or 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m deepclust_nb.sweep", description="Run chapters by a list."
    )
    parser.add_argument("sweep", help="a YAML file with a list of runs")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--threads",
        type=int,
        help="threads of runs that name none (default: OMP_NUM_THREADS, or the cores over the workers)",
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="on a GPU: replay training steps as CUDA graphs",
    )
    parser.add_argument("--dry-run", action="store_true", help="only check the file and list its runs")
    parser.add_argument("--force", action="store_true", help="run again what is recorded already")
    options = parser.parse_args(arguments)
    if options.workers < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--workers and --threads must be at least 1")
    try:
        runs = plan(options.sweep)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    from . import run as doing

    threads = options.threads or doing.default_threads(options.workers)
    runs = [run | {"threads": run["threads"] or threads, "graphs": options.graphs} for run in runs]
    if options.dry_run:
        for run in runs:
            target, notebook, _ = doing.places(run)
            state = "recorded" if target.is_file() else "to harvest" if notebook.is_file() else "to run"
            print(f"{name_of(run)}: {state}")
        return 0
    build = root() / "_build" / "sweeps"
    try:
        build.mkdir(parents=True, exist_ok=True)
        if not os.access(build, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        print(f"{build} cannot be written: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(options.workers) as executor:
        try:
            failed = doing.execute(runs, executor, options.force)
        except KeyboardInterrupt:
            executor.shutdown(wait=False, cancel_futures=True)
            doing.stop()
            print("interrupted; the same command continues where this one stopped", file=sys.stderr)
            return 130
    for run, error in failed:
        print(f"failed: {name_of(run)}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
