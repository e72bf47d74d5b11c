"""Run chapters by the hundred: a list of runs in, one process per run, one file of records per run out.

    python -m deepclust_nb.sweep book/experiments/x.yaml [--workers N] [--threads T] [--dry-run] [--force]

`plan` reads a list and checks all of it before anything runs; `run` does the runs; `child` is the process in
which one notebook is executed. No chapter imports any of it.
"""
