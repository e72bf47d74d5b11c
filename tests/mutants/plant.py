"""Plants the bugs of tests/mutants/*.json one at a time, in copies, and tells which of them no test notices.

    python tests/mutants/plant.py [--jobs N] [LIST or ID ...]

An entry is {"id", "file", "why", "before", "after"}: in `file`, `before` is replaced by `after`. It stands
there exactly once, in a notebook in the source of exactly one code cell. Exit code 1: a bug lives.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepclust_nb.digest import COMPUTING

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"house", "sweep", "exercises", "mutants"}  # not asked about bugs in what computes
# Fall to any edit, so they prove nothing.
ANY_EDIT = "not stored_outputs_are_of_current_code and not readme_shows_the_records"


def read(folder=Path(__file__).parent, wanted=()):
    """The planted bugs of all lists, or of the wanted lists and ids. Raises ValueError for unknown ones."""
    lists = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    }
    found = [bug | {"list": name} for name, bugs in lists.items() for bug in bugs]
    unknown = set(wanted) - set(lists) - {bug["id"] for bug in found}
    twice = {bug["id"] for bug in found if sum(bug["id"] == other["id"] for other in found) > 1}
    if unknown or twice:
        raise ValueError(f"no list and no bug has the name {unknown}" if unknown else f"two bugs are {twice}")
    return [bug for bug in found if not wanted or {bug["list"], bug["id"]} & set(wanted)]


def changed(text, bug):
    """The text of a file with the bug in it. Raises ValueError where `before` does not stand exactly once, or
    where the result is no Python.
    """
    notebook = json.loads(text) if bug["file"].endswith(".ipynb") else None
    sources = [text]
    if notebook:
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in code]
    hits = [i for i, source in enumerate(sources) for _ in range(source.count(bug["before"]))]
    if len(hits) != 1:
        raise ValueError(f"{bug['id']}: what to replace stands {len(hits)} times in {bug['file']}, not once")
    source = sources[hits[0]].replace(bug["before"], bug["after"])
    try:
        plain = re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M) if notebook else source
        if not bug["file"].endswith(".js"):
            compile(plain, bug["file"], "exec")
    except SyntaxError as error:
        raise ValueError(f"{bug['id']}: with the bug {bug['file']} is no Python: {error}") from None
    if not notebook:
        return source
    code[hits[0]]["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def concerned(file, root=ROOT):
    """What pytest is asked about a file: its own tests first."""
    names = [path.stem.removeprefix("test_") for path in sorted((root / "tests").glob("test_*.py"))]
    own = Path(file).parts[-1 if file.startswith("book/") else 1].split(".")[0]
    if file.startswith("book/chapters/"):
        first, which = [own, "golden", "labels"], f"{own} and {ANY_EDIT}"
    elif file.startswith("deepclust_nb/") and own in COMPUTING:
        first, which = [own, "baselines", "training", "golden", *(set(names) - SLOW)], ANY_EDIT
    else:
        rest = ["digest", "records", "checks", "results", "make", "browser", "metrics", "sweep", "house"]
        first, which = [own, *rest], ANY_EDIT
    files = [f"tests/test_{name}.py" for name in dict.fromkeys(first) if name in names]
    return (*files, "-k", which)


def copy(folder, root=ROOT):
    """The tracked files of a checkout in a new folder, which is a repository of its own."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=root, text=True).split("\0"):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def failing(folder, tests):
    """The first test that fails in a copy, with its error; None when all pass.

    Raises: RuntimeError when pytest finds no test or breaks.
    """
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # bytecode of the bug before would pass for that of this one
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-m", "not long", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *tests], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
        )
    except subprocess.TimeoutExpired:
        return "no end within half an hour"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.M)
    if done.returncode > 2 or not found:
        raise RuntimeError(
            f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return found[1]


def fate(folder, bug, root=ROOT):
    """What notices a bug that is planted in a copy, None when it lives. The copy is as before afterwards."""
    path = folder / bug["file"]
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(changed(text, bug), encoding="utf-8")
        return failing(folder, concerned(bug["file"], root))
    finally:
        path.write_text(text, encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="LIST or ID")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args(arguments)
    bugs, base = read(wanted=given.wanted), ROOT / "_build" / "mutants" / str(os.getpid())
    for bug in bugs:
        changed((ROOT / bug["file"]).read_text(encoding="utf-8"), bug)
    copies = queue.Queue()

    def one(bug):
        folder, started = copies.get(), time.perf_counter()
        try:
            noticed = fate(folder, bug)
        finally:
            copies.put(folder)
        words = f"died in {noticed}" if noticed else f"LIVES: {bug['why']}"
        print(f"{bug['id']:6} {words[:150]} ({time.perf_counter() - started:.0f} s)", flush=True)
        return None if noticed else bug["id"]

    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        for number in range(given.jobs):
            copies.put(copy(base / str(number)))
        for tests in sorted({concerned(bug["file"]) for bug in bugs}):
            if broken := failing(base / "0", tests):
                raise SystemExit(f"without any bug this fails: {broken}")
        living = [
            found for found in stack.enter_context(ThreadPoolExecutor(given.jobs)).map(one, bugs) if found
        ]
    print(f"{len(bugs)} bugs, {len(living)} live{': ' * bool(living)}{', '.join(living)}")
    return int(bool(living))


if __name__ == "__main__":
    sys.exit(main())
