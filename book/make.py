"""Run, render, refresh and check the book: what `make book|html|serve|refresh|records|test` do.

Pages are never built where they are written: `book/` is copied to `_build/source`, chapters are executed
and generated text is filled in there, so that no command but `refresh` and `records` changes a tracked file.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from generated import fill
from refresh import records, refresh
from running import BOOK, BUILD, ROOT, chapters, default_parameters, progress, run_chapter

SOURCE, HTML = BUILD / "source", BUILD / "html"


def copy_source():
    """A fresh copy of book/ in _build/source."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(
        BOOK, SOURCE, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.part")
    )


# What a browser fetches by itself: sources of scripts, pictures and frames, stylesheets and fonts. Not links.
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?((?:https?:)?//[^"' >]+)
    |<link\b(?=[^>]*\brel=["']?(?:stylesheet|\w*preload|preconnect|icon))
        [^>]*\bhref=["']?((?:https?:)?//[^"' >]+)
    |@import\s+(?:url\()?["']?((?:https?:)?//[^"')]+)
    |\burl\(\s*["']?((?:https?:)?//[^"')]+)""",
    re.X | re.I,
)


def loads_from_outside(folder):
    """(file, address) for everything that a page or stylesheet under `folder` loads from elsewhere."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".html", ".css"))
    found = [
        (path, m)
        for path in files
        for m in LOADS.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    return [(path.relative_to(folder).as_posix(), next(filter(None, m.groups()))) for path, m in found]


def render():
    """Fill the generated text and build the pages, warnings as errors; return the first page's path."""
    for page in SOURCE.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if "<!-- generated:" in text:
            page.write_text(fill(text, "../" * (len(page.relative_to(SOURCE).parts) - 1)), encoding="utf-8")
    # a cached page would keep its warnings to itself
    for folder in (HTML, BUILD / ".doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(SOURCE)]
    command += ["--path-output", str(ROOT), "--config", str(ROOT / "_config.yml"), "-W", "--keep-going"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (BUILD / "html.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode or not (HTML / "index.html").exists():
        lines = [line for line in done.stdout.splitlines() if re.search("WARNING|ERROR|Error:", line)]
        raise SystemExit(
            "\n".join(lines[:20]) + "\nThe pages were not built; the whole log is _build/html.log."
        )
    outside = [
        f"{page} loads {address}: pages load nothing from outside."
        for page, address in loads_from_outside(HTML)
    ]
    if outside:
        raise SystemExit("\n".join(outside))
    return HTML / "index.html"


def html(_=None):
    copy_source()
    print(f"The book, from its committed outputs: {render()}")


def book(_):
    from deepclust_nb import results

    copy_source()
    print("Running the chapters at their quick profile:")
    runs = {}
    for name in chapters():
        path = SOURCE / "chapters" / f"{name}.ipynb"
        runs[name] = (*run_chapter(path, path, {}), path)
    with progress("Rendering the pages"):
        page = render()
    print(f"\n{'chapter':<14}{'data':<12}{'ACC':<24}seconds")
    for name, (seconds, failure, path) in runs.items():
        last = {} if failure else (results.recorded(path) or [{}])[-1]
        acc = f"{last['acc']:.3f} ({last['method']})" if "acc" in last else "failed" if failure else "–"
        print(f"{name:<14}{last.get('dataset', '–'):<12}{acc:<24}{'–' if failure else f'{seconds:.0f}'}")
    print(f"\nThe book: {page}")
    sys.exit(any(failure for _, failure, _ in runs.values()))


def serve(options):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    if not (HTML / "index.html").exists():
        html()
    handler = partial(SimpleHTTPRequestHandler, directory=HTML)
    with ThreadingHTTPServer(("127.0.0.1", options.port), handler) as server:
        print(f"The book is at http://127.0.0.1:{server.server_port}/ (stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _run(*command, **environment):
    print(f"\n$ {' '.join(command)}", flush=True)
    names = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment}
    return (
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, **names}).returncode
        == 0
    )


def _other_parameters():
    """Each chapter once with another seed and the other bundled data set, as papermill users do."""

    def one(name):
        known, other = default_parameters(name), {"seed": 101, "dataset": "fashion_5k"}
        path = BOOK / "chapters" / f"{name}.ipynb"
        asked = {key: value for key, value in other.items() if key in known}
        return run_chapter(path, BUILD / "check" / path.name, asked, threads=1)[1] is None

    with ThreadPoolExecutor(2) as pool:
        return all(list(pool.map(one, chapters())))


def _html_stage():
    try:
        html()
    except SystemExit as stop:
        print(stop)
        return False
    return True


def test(_):
    def tree():
        return subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True
        ).stdout

    before, outcome = tree(), []
    nbval = "-n 2 --dist loadscope --nbval-lax --nbval-cell-timeout 300 --nbval-sanitize-with tests/nbval.cfg"
    units = ["-n", "2", "--dist", "loadfile", "-m", "not long", "--ignore", "tests/benchmarks"]
    stages = {
        "format": lambda: _run("ruff", "format", "--check", "."),
        "lint": lambda: _run("ruff", "check", "."),
        "pages": _html_stage,
        "units": lambda: _run("pytest", "-q", *units, "tests"),
        "chapters": lambda: _run("pytest", "-q", *nbval.split(), "-o", "timeout=600", "book/chapters"),
        "other parameters": _other_parameters,
        "clean tree": lambda: tree() == before or print(f"The run changed the tree:\n{tree()}"),
    }
    for name, stage in stages.items():
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        outcome.append((name, bool(stage()), time.monotonic() - start))
    print()
    for name, passed, seconds in outcome:
        print(f"{name:<18}{'passed' if passed else 'FAILED':<8}{seconds:6.0f} s")
    print(f"{'in all':<26}{sum(seconds for *_, seconds in outcome):6.0f} s")
    sys.exit(not all(passed for _, passed, _ in outcome))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (book, html, serve, refresh, records, test):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(call=command)
        if command is serve:
            sub.add_argument("--port", type=int, default=8000)
        if command is refresh:
            sub.add_argument("--all", action="store_true")
            sub.add_argument("chapters", nargs="*", metavar="CHAPTER")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
