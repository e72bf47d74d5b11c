"""The look at the pages in a browser: each fault that a reader would stumble over is planted, and found."""

import base64
import re
import sys
from pathlib import Path

import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
sys.path.insert(0, str(BOOK))

import browser  # noqa: E402
import make  # noqa: E402

from deepclust_nb import plots  # noqa: E402

DOT = "<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'><rect width='8' height='8'/></svg>"
PIXEL = "data:image/svg+xml;base64," + base64.b64encode(DOT.encode()).decode()
# As the theme does: the page's attribute follows the system's scheme.
THEME = """<script>const media = matchMedia("(prefers-color-scheme: dark)");
const set = () => { document.documentElement.dataset.theme = media.matches ? "dark" : "light"; };
media.addEventListener("change", set); set();</script>
<style>html { background: #fff; } [data-theme="dark"] { background: #111; color: #eee; }</style>"""
MATHJAX = "<script>window.MathJax = { startup: { promise: Promise.resolve() } };</script>"
FIGURE = f'<figure><img alt="dots" src="{PIXEL}"><figcaption>Dots.</figcaption></figure>'


def stepper():
    frames = [lambda ax, i=i: ax.plot([0, i]) for i in range(3)]
    return plots.stepper(frames, "lines", ["flat", "up", "higher"], width=3, height=2).data


# a body, and what is said of it
FAULTS = {
    "console": ("<script>console.error('no such thing')</script>", "console: no such thing"),
    "script": ("<script>undefined.x</script>", "script: Cannot read"),
    "outside": (
        '<link rel="stylesheet" href="https://example.invalid/a.css">',
        "asks for https://example.inv",
    ),
    "lost": ('<img alt="lost" src="lost.png">', "a picture does not load: lost"),
    "wide": ('<div style="width: 1400px">x</div>', r"the page scrolls sideways: 14\d\d px in 1280"),
    "narrow": ('<div style="width: 500px">x</div>', r"\(phone\): dark: the page scrolls sideways"),
    "code": (f'<pre style="overflow: auto">{"x" * 300}</pre>', "code scrolls sideways"),
    "tex": ('<span class="math">\\(a\\)</span>' + MATHJAX, r"mathematics is not typeset: \\\(a\\\)"),
    "merror": (
        '<span class="math"><mjx-container><g data-mjx-error="Undefined \\b"></g></mjx-container></span>'
        + MATHJAX,
        "mathematics has an error: Undefined",
    ),
    "alt": (FIGURE.replace('alt="dots"', 'alt=" "'), "a picture has no alt text"),
    "caption": (FIGURE.replace("Dots.", ""), "a picture has no caption: dots"),
    "hidden": (FIGURE.replace("<figcaption>", "<figcaption hidden>"), "a picture has no caption"),
    "cut": (
        FIGURE.replace("<img ", '<img style="margin-left: 380px; width: 40px" ').join(
            ('<div style="overflow: hidden">', "</div>")
        ),
        r"\(phone\): dark: a picture is cut: dots",
    ),
    "dark": (
        '<p style="color: #222">words</p>',
        r"dark: text cannot be read on its ground \(contrast 1\.\d\)",
    ),
    "pale": ('<p style="color: #ddd">words</p>', r"light: text cannot be read on its ground"),
    "button": (lambda: stepper().replace("at - 1", "at + 1"), "a stepper's back shows 2, not frame 0: lines"),
    "key": (
        lambda: stepper().replace("Number(slider.value)", "0"),
        "a stepper's key ArrowRight shows 0, not",
    ),
    "label": (
        lambda: stepper().replace("images[at].dataset", "images[0].dataset"),
        r"frames \[2\] under '1 of 3",
    ),
    "twins": (
        lambda: stepper().replace("i === at", "i >= at"),
        r"first shows frames \[0, 1, 2\] under '1 of 3",
    ),
    "search": ('<ul id="search-results"><li><a href="other.html">x</a></li></ul>', "search does not find"),
}
SOUND = {
    "good": FIGURE + "<pre>x = 1</pre><p>words</p>",
    "steps": stepper,
    "folded": f"<details>{FIGURE}<figure><img alt='a' src='{PIXEL}'></figure></details>",
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    chromium = browser.find()
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    folder = tmp_path_factory.mktemp("pages")
    for name, (body, *_) in {**FAULTS, **{key: (body,) for key, body in SOUND.items()}}.items():
        body = body() if callable(body) else body
        size = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        size += f'<link rel="icon" href="{PIXEL}">'
        page = f"<!doctype html><html><head>{size}{THEME}</head><body>{body}</body></html>"
        (folder / f"{name}.html").write_text(page)
    (folder / "index.html").write_text('<meta http-equiv="Refresh" content="0; url=good.html">')
    (folder / "_static").mkdir()
    (folder / "_static" / "part.html").write_text("<script>undefined.x</script>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "PATIENCE", 1)
        return browser.look(folder, chromium)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(complaints, name):
    found = [text for text in complaints if text.startswith(f"{name}.html")]
    assert any(re.search(FAULTS[name][1], text) for text in found), found


def test_nothing_is_said_of_pages_without_a_fault(complaints):
    named = {text.split(".html")[0] for text in complaints}
    assert named == set(FAULTS)


def test_pages_that_cannot_be_looked_at_are_said_aloud_and_pass(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(browser, "find", lambda: None)
    assert make._looked_at(tmp_path) and "NOT LOOKED AT: no Chromium" in capsys.readouterr().out


def test_a_complaint_fails_the_stage(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(browser, "find", lambda: "chromium")
    monkeypatch.setattr(browser, "look", lambda pages, chromium: ["a.html (desk): light: something"])
    assert not make._looked_at(tmp_path) and "a.html (desk)" in capsys.readouterr().out
    monkeypatch.setattr(browser, "look", lambda pages, chromium: [])
    assert make._looked_at(tmp_path) and "Every page was opened" in capsys.readouterr().out


def test_the_browser_is_the_named_one_or_the_first_on_the_path(monkeypatch, tmp_path):
    for name in ("google-chrome", "chromium"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert browser.find() == str(tmp_path / "chromium")
    monkeypatch.setenv("CHROMIUM", "/opt/mine")
    assert browser.find() == "/opt/mine"
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert browser.find() is None
