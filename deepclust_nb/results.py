"""What pages show: the papers' numbers, bands and verdicts made from records, sentences and tables.

This module trains nothing and writes nothing.
"""

import csv
import html
import os

import numpy as np

from . import records
from .checks import suggestion
from .places import RECORDING, data_root

BAND_SEEDS, BAND_FLOOR = range(5), 0.02


def verdict(hits, where=""):
    """Words for a claim that was tested once per run: hits, a list of bools; where, the end of the sentence.
    All hits is "holds", none "does not hold", anything between "partly", and no run "not run".
    """
    if not hits:
        return f"not run {where}".strip()
    word = "holds" if all(hits) else "partly" if any(hits) else "does not hold"
    return f"{word}, {sum(hits)} of {len(hits)} {where}".strip()


def paper(chapter):
    """What papers reported for a chapter's methods: a list of dicts with table, method, dataset, metric,
    value (float), std (float or None) and protocol.

    Raises: FileNotFoundError for a chapter without such a file.
    """
    rows = _csv(chapter)
    return [
        row | {"value": float(row["value"]), "std": float(row["std"]) if row["std"] else None} for row in rows
    ]


def fact(key):
    """A single number from the literature (float); its source stands beside it in data/papers/facts.csv.

    Raises: KeyError for an unknown key, naming the closest.
    """
    facts = {row["key"]: float(row["value"]) for row in _csv("facts")}
    if key not in facts:
        raise KeyError(f"there is no fact {key!r}{suggestion(key, facts)}")
    return facts[key]


def _csv(name):
    with open(data_root() / "papers" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def band(method, parameters, metric="acc", chapter=None):
    """The range in which a fresh quick run is expected: that of the recorded seeds 0 to 4, widened at both
    ends by their range or by 0.02, whichever is larger.

    Parameters: parameters: those of the run, the seed aside equal to the records'; chapter: by default any.
    Returns: (lo, hi), or None when fewer than five seeds are recorded.
    """
    rest = parameters | {"seed": None}
    found = records.load(chapter, parameters["dataset"], "quick", method)
    found = [b for b in found if b["parameters"] | {"seed": None} == rest and b["precision"] == "float32"]
    values = {b["seed"]: b[metric] for b in found if b["seed"] in BAND_SEEDS and metric in b}
    if len(values) < len(BAND_SEEDS):
        return None
    lo, hi = min(values.values()), max(values.values())
    margin = max(hi - lo, BAND_FLOOR)
    return lo - margin, hi + margin


def check_band(record, metric="acc"):
    """Print whether a score lies inside its band, in words that are the same on every machine.

    Only float32 runs of a recorded seed (0 to 4) with the recorded parameters are checked; for others the
    line says so. While a sweep records (DEEPCLUST_RECORDING), a score outside is printed and does not stop
    the run.

    Raises: AssertionError for a score outside.
    """
    name = f"{record['method']}: {metric.upper()}"
    limits = band(record["method"], record["parameters"], metric, record["chapter"])
    if limits is None or record["seed"] not in BAND_SEEDS or record["precision"] != "float32":
        print(f"{name} not checked: no band for these parameters")
        return
    inside = limits[0] <= record[metric] <= limits[1]
    print(f"{name} inside the band of its recorded seeds: {'yes' if inside else 'no'}")
    if not inside and not os.environ.get(RECORDING):
        raise AssertionError(f"{name} {record[metric]:.3f} lies outside [{limits[0]:.3f}, {limits[1]:.3f}]")


def glue(name, value):
    """Display a value so that pages of the book can show it by name, as myst-nb's glue does, without
    importing it.

    Raises: ValueError for a name with a colon, which a page reads as the start of a number format.
    """
    if ":" in name:
        raise ValueError(f"a glued name must not hold a colon, got {name!r}")
    from IPython.core.formatters import format_display_data

    # The repr of a NumPy scalar is no number to a format.
    bundle, metadata = format_display_data(value.item() if isinstance(value, np.generic) else value)
    _display(bundle, metadata | {"scrapbook": {"name": name, "mime_prefix": ""}})


def say(template, **values):
    """Display a Markdown sentence whose numbers come from values: `say("ACC {acc:.3f}",
    acc=record["acc"])`."""
    text = template.format(**values)
    _display({"text/markdown": text, "text/plain": text})


def table(rows, columns=None, formats=None):
    """Display rows as a table that scrolls inside its own box on a narrow page; Markdown where there is no
    HTML.

    Parameters: rows: a list of dicts; one whose `current` is False gets the mark "older code"; columns: keys
        to show, or a dict from key to heading, by default the first row's keys; formats: key to format, ".3f"
        for floats.
    """
    if columns is None:
        columns = [key for key in (rows[0] if rows else {}) if key != "current"]
    columns = columns if isinstance(columns, dict) else {key: key for key in columns}
    cells = [[_cell(row.get(key), (formats or {}).get(key)) for key in columns] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        if row.get("current") is False:
            line[0] += " (older code)"
    lines = [[*map(str, columns.values())], *cells]
    body = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in line) + "</tr>" for line in cells)
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in lines[0])
    lines.insert(1, ["---"] * len(columns))
    text = "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    box = f'<div style="overflow-x:auto">{inside}</div>'
    _display({"text/html": box, "text/markdown": text, "text/plain": text})


def _cell(value, form):
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item, form) for item in value)
    return format(value, form if form is not None else ".3f" if isinstance(value, float) else "")


def _display(bundle, metadata=None):
    from IPython.display import display

    display(bundle, raw=True, metadata=metadata)
