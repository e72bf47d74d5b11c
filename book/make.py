"""Run, render, refresh and check the book: what `make book|html|serve|refresh|records|test|test-pages` do.

Pages are never built where they are written: `book/` is copied to a folder of the command's own under
`_build`, chapters are executed and generated text is filled in there. So no command but `refresh` and
`records` changes a tracked file, and two commands can run side by side; those two and `test` wait for one
another.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import browser
from generated import fill, thumbnail
from refresh import records, refresh
from running import (
    BOOK,
    BUILD,
    ROOT,
    alone,
    chapters,
    default_parameters,
    notebooks,
    progress,
    run_chapter,
    tree_state,
    work_folder,
)

HTML = BUILD / "html"
BUSY = "another make is at work on the notebooks (refresh, records or test)"


def copy_source(folder):
    """A fresh copy of book/ in a work folder; returns where."""
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.part")
    return shutil.copytree(BOOK, folder / "source", ignore=ignored)


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


def render(source, work):
    """Fill the generated text of the pages in `source` and build them in `work`, warnings as errors; return
    the folder of pages."""
    for name in chapters():
        if (picture := thumbnail(name)) is not None:
            (source / "assets" / f"card-{name}.png").write_bytes(picture[0])
    for page in source.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if "<!-- generated:" in text:
            page.write_text(fill(text, "../" * (len(page.relative_to(source).parts) - 1)), encoding="utf-8")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source)]
    command += ["--path-output", str(work), "--config", str(ROOT / "_config.yml"), "-W", "--keep-going"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pages = work / "_build" / "html"
    if done.returncode or not (pages / "index.html").exists():
        (BUILD / "html.log").write_text(done.stdout, encoding="utf-8")
        lines = [line for line in done.stdout.splitlines() if re.search("WARNING|ERROR|Error:", line)]
        raise SystemExit(
            "\n".join(lines[:20]) + "\nThe pages were not built; the whole log is _build/html.log."
        )
    outside = [
        f"{page} loads {address}: pages load nothing from outside."
        for page, address in loads_from_outside(pages)
    ]
    if outside:
        raise SystemExit("\n".join(outside))
    return pages


def publish(pages):
    """Put built pages in the place of those in _build/html; return the first page's path."""
    with alone("html", "another make is putting its pages into _build/html"):
        before = pages.with_name("before")
        if HTML.exists():
            os.replace(HTML, before)
        os.replace(pages, HTML)
    return HTML / "index.html"


def html(_=None):
    with work_folder("html") as work:
        print(f"The book, from its committed outputs: {publish(render(copy_source(work), work))}")


def book(_):
    from deepclust_nb import records

    with work_folder("book") as work:
        source, runs = copy_source(work), {}
        print("Running the chapters at their quick profile, then their evidence pages:")
        for path in notebooks(source):
            runs[path.relative_to(source).with_suffix("")] = (*run_chapter(path, path, {}), path)
        with progress("Rendering the pages"):
            page = publish(render(source, work))
        print(f"\n{'page':<24}{'data':<12}{'ACC':<36}seconds")
        for name, (seconds, failure, path) in runs.items():
            last = {} if failure else (records.displayed(path)[0] or [{}])[-1]
            acc = f"{last['acc']:.3f} ({last['method']})" if "acc" in last else "failed" if failure else "–"
            took = "–" if failure else f"{seconds:.0f}"
            print(f"{name.as_posix():<24}{last.get('dataset', '–'):<12}{acc:<36}{took}")
    print(f"\nThe book: {page}")
    sys.exit(any(failure for _, failure, _ in runs.values()))


def serve(options):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    if not (HTML / "index.html").exists():
        html()
    handler = partial(SimpleHTTPRequestHandler, directory=HTML)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", options.port), handler)
    except OverflowError:
        raise SystemExit(f"A port is a number from 0 to 65535, got {options.port}.") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise SystemExit(f"Port {options.port} is not to be had ({why}): make serve PORT=8001") from None
    with server:
        print(f"The book is at http://127.0.0.1:{server.server_port}/ (stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _run(*command):
    print(f"\n$ {' '.join(command)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode == 0


def _other_parameters(work):
    """Each chapter once with another seed and the other bundled data set, as papermill users do."""

    # A stored start is of one data set, k-DVAE's others have names; clothes are what AC-VAE starts with.
    other = {"seed": 101, "dataset": "fashion_5k", "start": "trained"}
    own = {"kdvae": {"start": "autoencoder"}, "acvae": {"dataset": "mnist_5k"}}

    def one(name):
        known = default_parameters(name)
        path = BOOK / "chapters" / f"{name}.ipynb"
        asked = {key: value for key, value in (other | own.get(name, {})).items() if key in known}
        return run_chapter(path, work / "check" / path.name, asked, threads=1)[1] is None

    from deepclust_nb.sweep import run

    with ThreadPoolExecutor(2) as pool:
        try:
            return all(list(pool.map(one, chapters())))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            run.stop()
            raise


def _pages(work):
    try:
        pages = render(copy_source(work), work)
    except SystemExit as stop:
        print(stop)
        return False
    return _looked_at(pages)


def _looked_at(pages):
    """Open the pages in a browser; where there is none, say so and let them pass."""
    if (chromium := browser.find()) is None:
        print("NOT LOOKED AT: no Chromium was found, so the pages were rendered and not opened in a browser.")
        return True
    found = browser.look(pages, chromium)
    print("\n".join(found) or f"Every page was opened in {chromium}, wide and narrow, light and dark.")
    return not found


def test_pages(_):
    with work_folder("pages") as work:
        sys.exit(not _pages(work))


def _same_tree(before):
    after = tree_state()
    if after is None:
        print("This is no git checkout, or git is not at hand: whether files changed was not looked at.")
    elif after != before:
        print(f"The run changed the tree:\n{after}")
    return after == before


def test(_):
    outcome = []
    nbval = "--nbval-cell-timeout 300 --nbval-sanitize-with tests/nbval.cfg -o timeout=600".split()
    units = ["-n", "2", "--dist", "loadfile", "-m", "not long", "--ignore", "tests/benchmarks"]
    with alone("tree", BUSY), work_folder("test") as work:
        before = tree_state()
        stages = {
            "format": lambda: _run("ruff", "format", "--check", "."),
            "lint": lambda: _run("ruff", "check", "."),
            "pages": lambda: _pages(work),
            "units": lambda: _run("pytest", "-q", *units, "tests"),
            # the whole output of an evidence page is made of records, so all of it is compared
            "evidence": lambda: _run("pytest", "-q", *nbval, "--nbval", "book/evidence"),
            "chapters": lambda: _run(
                "pytest", "-q", *nbval, "--nbval-lax", "-n", "2", "--dist", "loadscope", "book/chapters"
            ),
            "other parameters": lambda: _other_parameters(work),
            "clean tree": lambda: _same_tree(before),
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
    for command in (book, html, serve, refresh, records, test, test_pages):
        sub = commands.add_parser(command.__name__.replace("_", "-"))
        sub.set_defaults(call=command)
        if command is serve:
            sub.add_argument("--port", type=int, default=8000)
        if command is refresh:
            sub.add_argument("--all", action="store_true")
            sub.add_argument("chapters", nargs="*", metavar="CHAPTER")
    options = parser.parse_args()
    try:
        if options.call in (refresh, records):
            with alone("tree", BUSY):
                options.call(options)
        else:
            options.call(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:  # a damaged record, named
        raise SystemExit(str(error)) from None
    except OSError as error:
        if not str(error.filename).startswith(str(BUILD)):
            raise
        why = (error.strerror or str(error)).lower()
        raise SystemExit(f"{error.filename} cannot be written: {why}.") from None


if __name__ == "__main__":
    main()
