"""What pages show: the papers' numbers, bands and verdicts made from records, sentences and tables.

This module trains nothing and writes nothing.
"""

import csv
import html
import os
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from . import records
from .checks import suggestion
from .places import RECORDING, data_root

BAND_SEEDS, BAND_FLOOR, LEAST_RUNS = range(5), 0.02, 3


@dataclass(frozen=True)
class Verdict:
    """What runs say about a claim; `str` gives the text for a table.

    word: "holds", "partly", "does not hold", "no difference shown", "not decided", "seen in 1 run" (or 2: too
    few for a verdict) or "not run"; evidence: the numbers behind it, as text; mean, low, high: the gap and
    the ends of its 95% interval, None where there is none; n: runs, or pairs of runs; current: whether all
    are of today's code.
    """

    word: str
    evidence: str = ""
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    current: bool = True

    def __str__(self):
        text = f"{self.word}: {self.evidence}" if self.evidence else self.word
        return text if self.current else f"{text} (older code)"


def verdict(ours, other, key="acc", margin=0.0, lower=False):
    """Judge the claim that one setting's score lies above another's, or above a number: the book's only rule.

    The claim is that the mean gap, ours minus other, is over `margin`; with `lower`, below `-margin`. A
    negative margin claims "at most so much worse". Gaps are taken between runs of the same seed and get the
    95% interval of Student's t, which trusts that gaps are roughly normal and, against a number, that it has
    no spread of its own. "Holds" needs the whole interval on the claim's side of the margin, "does not hold"
    on the other; an interval over the margin is "no difference shown" where that is 0, else "not decided".
    Fewer than three pairs get no verdict.

    Parameters: ours: records of one method and setting, a seed each; other: such records, or a float; key: a
        key of both, or a function of a record; a run without the key (or with None for it) does not count.
    Returns: a Verdict.
    Raises: ValueError when a seed stands twice among the records of a side.
    """
    value = key if callable(key) else lambda record: record.get(key)
    ours, fixed = _by_seed(ours, value), not isinstance(other, list | tuple)
    others = {seed: (float(other), True) for seed in ours} if fixed else _by_seed(other, value)
    pairs = [(*ours[seed], *others[seed]) for seed in sorted(set(ours) & set(others))]
    if not pairs:
        return Verdict("not run")
    gaps = np.array([mine - theirs for mine, _, theirs, _ in pairs], dtype=np.float64)
    n, mean, current = len(gaps), float(gaps.mean()), all(a and b for _, a, _, b in pairs)
    if n < LEAST_RUNS:
        return Verdict(_seen(n), f"{mean:+.3f}, no verdict", mean, n=n, current=current)
    half = float(stdtrit(n - 1, 0.975) * gaps.std(ddof=1) / n**0.5)
    low, high = mean - half, mean + half
    least, most = (-high, -low) if lower else (low, high)
    undecided = "not decided" if margin else "no difference shown"
    word = "holds" if least > margin else "does not hold" if most < margin else undecided
    return Verdict(word, f"{mean:+.3f} ({low:+.3f} to {high:+.3f}), {n} seeds", mean, low, high, n, current)


def count(hits, current=True):
    """Judge a claim that each run by itself bears out or not: hits, a list of bools, one a run.

    Returns: a Verdict: "holds" in all, "does not hold" in none, "partly" anything between; no verdict on
        fewer than three runs.
    """
    n, borne = len(hits), sum(map(bool, hits))
    if not n:
        return Verdict("not run")
    if n < LEAST_RUNS:
        return Verdict(_seen(n), f"{borne} of {n}, no verdict", n=n, current=current)
    word = "holds" if borne == n else "partly" if borne else "does not hold"
    return Verdict(word, f"{borne} of {n} runs", n=n, current=current)


def _seen(n):
    return f"seen in {n} run{'s' if n > 1 else ''}"


def _by_seed(found, value):
    """From seed to (value, current) for the records that have the value."""
    kept = [record for record in found if value(record) is not None]
    by_seed = {record["seed"]: (value(record), record.get("current", True)) for record in kept}
    if len(by_seed) < len(kept):
        raise ValueError("a seed stands twice: these records are of more than one setting")
    return by_seed


def paper(chapter):
    """What papers reported for a chapter's methods: a list of dicts with table, method, dataset, metric,
    value (float), std (float or None) and protocol.

    Raises: FileNotFoundError for a chapter without such a file.
    """
    rows = _csv(chapter)
    return [
        row | {"value": float(row["value"]), "std": float(row["std"]) if row["std"] else None} for row in rows
    ]


def reported(chapter, **wanted):
    """The first row of `paper` with these columns, or None.

    Parameters: wanted: column -> its text; of the protocol the beginning is enough.
    """

    def fits(row):
        return all(
            row[name].startswith(text) if name == "protocol" else row[name] == text
            for name, text in wanted.items()
        )

    return next(filter(fits, paper(chapter)), None)


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


def verdicts(claims):
    """Display a table of claims: an iterable of (claim, rule, verdict), the last a Verdict or a text."""
    headings = {"claim": "claim", "rule": "rule", "verdict": "verdict, mean gap"}
    table([dict(zip(headings, map(str, claim), strict=True)) for claim in claims], headings)


def _cell(value, form):
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item, form) for item in value)
    return format(value, form if form is not None else ".3f" if isinstance(value, float) else "")


def _display(bundle, metadata=None):
    from IPython.display import display

    display(bundle, raw=True, metadata=metadata)
