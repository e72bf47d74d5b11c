"""Text made from the records: the tables of README.md and of the pages that hold a mark for one.

A line `<!-- generated: NAME -->` in a page is followed, in the built copy, by what NAME makes. In README.md
the text stands between that line and its end mark; `make refresh` renews it and a test compares it.
"""

import re

from running import BOOK, chapters, read_notebook

PROFILES = ("paper", "laptop", "quick")


def _spread(values):
    """'0.912 (0.830 to 0.964, 5 seeds)' for the given list of shares."""
    values = sorted(float(value) for value in values)
    if len(values) == 1:
        return f"{values[0]:.3f} (1 seed)"
    return f"{sum(values) / len(values):.3f} ({values[0]:.3f} to {values[-1]:.3f}, {len(values)} seeds)"


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(item) for item in line) + " |" for line in lines) + "\n"


def _reported(chapter, method, dataset, metric="acc"):
    """What the papers reported for this method on this data set, or a dash."""
    from deepclust_nb import results

    wanted = (method, dataset, metric)
    values = [
        r["value"] for r in results.paper(chapter) if (r["method"], r["dataset"], r["metric"]) == wanted
    ]
    return f"{values[0]:.3f}" if values else "–"


def chapter_table(prefix="book/"):
    """Markdown table of the chapters: data, minutes of a quick run, our ACC beside the paper's."""
    from deepclust_nb import records as stored

    rows = []
    for name in chapters():
        notebook = read_notebook(BOOK / "chapters" / f"{name}.ipynb")
        title = re.search(r"^# (.+)$", notebook.cells[0].source, re.M).group(1).strip()
        seconds = notebook.metadata.get("deepclust", {}).get("seconds")
        records, ours, paper, data = stored.load(chapter=name), "not measured yet", "–", "–"
        for profile in PROFILES:
            # a run's own method comes last in its file, and so in the list of all
            here = [record for record in records if record["profile"] == profile and "acc" in record]
            if here:
                here = [record for record in here if record["method"] == here[-1]["method"]]
                data = max(dict.fromkeys(r["dataset"] for r in here), key=[r["dataset"] for r in here].count)
                here = [record for record in here if record["dataset"] == data]
                ours = f"{here[0]['method']} {_spread([record['acc'] for record in here])}"
                ours += "" if all(record["current"] for record in here) else ", older code"
                paper = _reported(name, here[0]["method"], data)
                break
        minutes = f"{max(1, round(seconds / 60))}" if seconds else "–"
        rows.append([f"[{title}]({prefix}chapters/{name}.ipynb)", data, minutes, ours, paper])
    return _table(["Chapter", "Data", "Minutes (quick)", "ACC, ours", "ACC, paper"], rows)


def status_table(prefix=""):
    """Markdown table of every headline record: method, data, profile, seeds, ours beside the paper's."""
    from deepclust_nb import records

    groups = {}
    for record in (r for name in chapters() for r in records.load(chapter=name)):
        key = (record["chapter"], record["dataset"], record["profile"], record["method"])
        groups.setdefault(key, []).append(record)
    rows = []
    for (chapter, dataset, profile, method), group in groups.items():
        shown = {m: _spread([r[m] for r in group]) if m in group[0] else "–" for m in ("acc", "nmi")}
        age = "" if all(record["current"] for record in group) else "older code"
        paper = _reported(chapter, method, dataset)
        rows.append([chapter, method, dataset, profile, shown["acc"], shown["nmi"], paper, age])
    if not rows:
        return "Nothing is recorded yet.\n"
    return _table(["Chapter", "Method", "Data", "Profile", "ACC", "NMI", "ACC, paper", "Code"], rows)


GENERATED = {"chapters": chapter_table, "status": status_table}
MARK, END = r"<!-- generated: (\w+) -->\n", "<!-- end generated -->\n"


def fill(text, prefix):
    """Replace what follows each `<!-- generated: NAME -->` line, up to its end mark if it has one."""

    def made(match):
        return f"<!-- generated: {match[1]} -->\n\n{GENERATED[match[1]](prefix)}\n{END}"

    return re.sub(f"{MARK}(?:(?:(?!<!-- generated).)*?{END})?", made, text, flags=re.S)
