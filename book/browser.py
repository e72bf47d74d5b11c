"""Look at built pages in a real browser, as a reader at a desk and one on a phone would: `make test-pages`.

Every page is opened in Chromium at two widths, light and dark. What a reader would stumble over
becomes a sentence; `look` returns them. Needs playwright (extra `test`) and a Chromium of the system's.
"""

import os
import shutil
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PATIENCE = 20  # seconds for a search to find something
WINDOWS = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

CHECK = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def find():
    """The Chromium to use: $CHROMIUM, or the first known name on the path; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def look(pages, chromium):
    """Open every page below `pages`; return a sentence for each thing that a reader would stumble over."""
    from playwright.sync_api import sync_playwright

    pages, found = Path(pages).resolve(), []
    paths = [path for path in sorted(pages.rglob("*.html")) if _is_page(path)]
    with served(pages) as site, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for window, scheme, other in (("desk", "light", "dark"), ("phone", "dark", "light")):
            context = browser.new_context(viewport=WINDOWS[window], color_scheme=scheme)
            for path in paths:
                name = path.relative_to(pages).as_posix()
                looked = _page(context, site, name, scheme, other)
                found += [f"{name} ({window}): {text}" for text in looked]
            context.close()
        browser.close()
    return found


def _is_page(path):
    """Not a part of a page, nor one that only leads to another."""
    inner = {"_static", "_sources"} & set(path.parts)
    return not inner and 'http-equiv="Refresh"' not in path.read_text(encoding="utf-8")[:500]


@contextmanager
def served(folder):
    """The pages at an address of this machine, as a browser gets them from a site; gives the address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def _page(context, site, name, *schemes):
    """What is wrong with one page in one window, in each colour scheme."""
    page, found = context.new_page(), []
    local = (site, "data:", "blob:", "about:")
    page.on("console", lambda m: m.type == "error" and found.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("request", lambda r: r.url.startswith(local) or found.append(f"asks for {r.url}"))
    try:
        query = "?q=centroids" if name == "search.html" else ""
        page.goto(site + name + query, wait_until="load", timeout=60_000)
        _typeset(page)
        for scheme in schemes:
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
            found += [f"{scheme}: {text}" for text in page.evaluate(CHECK)]
        for box in page.query_selector_all("[data-stepper]"):
            found += _stepper(page, box)
        if query:
            found += _search(page)
    except Exception as error:
        found.append(f"could not be looked at: {str(error).splitlines()[0]}")
    finally:
        page.close()
    return found


def _typeset(page):
    """Wait until MathJax, where the page uses it, has done all of the page."""
    if page.query_selector(".math"):
        page.wait_for_function("window.MathJax?.startup?.promise !== undefined", timeout=60_000)
        page.evaluate("MathJax.startup.promise.then(() => undefined)")


def _stepper(page, box):
    """The stepper shows one frame at a time, and each of its controls leads where it says."""
    if not box.is_visible():  # folded away
        return []
    last = len(box.query_selector_all("img")) - 1

    def shown():
        frames = [i for i, img in enumerate(box.query_selector_all("img")) if img.is_visible()]
        label = box.query_selector(".label").inner_text()
        right = len(frames) == 1 and label.startswith(f"{frames[0] + 1} of {last + 1}")
        return frames[0] if right else f"frames {frames} under {label[:20]!r}"

    def press(what):
        if what.startswith("key "):
            box.query_selector("input").press(what.removeprefix("key "))
        else:
            box.query_selector(f'[data-go="{what}"]').click()
        return shown()

    way = {"first": 0, "next": min(1, last), "back": 0, "last": last}
    way |= {"key Home": 0, "key ArrowRight": min(1, last), "key ArrowLeft": 0, "key End": last}
    wrong = [f"{what} shows {at}, not frame {to}" for what, to in way.items() if (at := press(what)) != to]
    return [f"a stepper's {text}: {box.get_attribute('aria-label')[:40]}" for text in wrong]


def _search(page):
    """The search page finds a word of the book and says where."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        links = [a.get_attribute("href") for a in page.query_selector_all("#search-results li a")]
        if any("foundations" in link for link in links):
            return []
        page.wait_for_timeout(200)
    return ["search does not find the word centroids in foundations"]
