"""The process in which a sweep executes one notebook: `python -m deepclust_nb.sweep.child`, one line of JSON
on stdin.

Apart from the rest of the package so that it starts without torch: the kernel brings its own. It ends, and
its kernel with it, when stdin closes, which is how the death of the calling process shows.
"""

import json
import os
import sys
import threading
from pathlib import Path

from ..places import GRAPHS


def main():
    """Execute the notebook `source` with `parameters` and write it to `part`; an error's last line goes to
    stderr."""
    spec = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if spec["graphs"]:
        os.environ[GRAPHS] = "1"  # for the kernel: see the package's __init__
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            spec["source"],
            spec["part"],
            spec["parameters"],
            kernel_name="python3",
            cwd=str(Path(spec["source"]).parent),
            progress_bar=False,
            request_save_on_cell_execute=False,
        )
    except PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {' '.join(error.evalue.split())}")


def _end_with_parent():
    sys.stdin.read()
    import psutil

    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    main()
