"""Text made from the records: the tables of README.md and of the pages that hold a mark for one.

A line `<!-- generated: NAME -->` in a page is followed, in the built copy, by what NAME makes. In README.md
the text stands between that line and its end mark; `make refresh` renews it and a test compares it.
"""

import base64
import html
import re

from running import BOOK, chapters, read_notebook

PROFILES = ("paper", "laptop", "quick")
# Studies whose runs stand on the front page: as the paper prints a method whose headline is a variant, or,
# under a name that says so, with one thing changed: study -> (end of the name, parameters of those runs).
FRONT = {
    "headline": ("", {}),
    "semicatvae_as_printed": ("", {}),
    "kdvae_mnist": ("", {}),
    "dynae_paper_starts": (" (no adversary)", {"adversary": "none"}),
}


def _spread(values):
    """'0.912 (0.830 to 0.964, 5 seeds)' for the given list of shares."""
    values = sorted(float(value) for value in values)
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f} (1 seed)"
    return f"{sum(values) / len(values):.3f} ({values[0]:.3f} to {values[-1]:.3f}, {len(values)} seeds)"


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(item) for item in line) + " |" for line in lines) + "\n"


def _reported(chapter, method, dataset, metric="acc"):
    """What the papers reported for this method, under exactly this name, on this data set, or a dash."""
    from deepclust_nb import results

    row = results.reported(chapter, method=method, dataset=dataset, metric=metric)
    return f"{row['value']:.3f}" if row else "–"


def _title(name):
    notebook = read_notebook(BOOK / "chapters" / f"{name}.ipynb")
    title = re.search(r"^# (.+)$", notebook.cells[0].source, re.M).group(1).strip()
    return title, notebook


def _plain(method):
    return re.sub(r" \(.*\)$", "", method)


def _own(name):
    """A chapter's own method in the runs that count most: {(data set, profile, method): records}.

    Of each name of the method (a variant of ours has a name of its own) the records as its headline, or as
    printed, of the profile nearest to the paper; among equals on the data set with most seeds.
    """
    from deepclust_nb import records as stored

    found = [r for r in stored.load(chapter=name, study=None) if "acc" in r]
    method = next((_plain(r["method"]) for r in reversed(found) if r["study"] == "headline"), "")
    groups = {}
    for record in found:
        if _plain(record["method"]) != method or record["study"] not in FRONT:
            continue
        ending, parameters = FRONT[record["study"]]
        if parameters.items() <= record["parameters"].items():
            place = (record["dataset"], record["profile"], record["method"] + ending)
            groups.setdefault(place, []).append(record)
    best = {}
    for (dataset, profile, method), group in groups.items():
        rank = (PROFILES.index(profile), dataset != "mnist", -len(group))  # of equals the one with most seeds
        if method not in best or rank < best[method][0]:
            best[method] = (rank, (dataset, profile, method), group)
    return {key: group for _, key, group in best.values()}


def chapter_table(prefix="book/"):
    """Markdown table of the chapters, a row for each name of a method: data, our ACC, the paper's."""
    rows = []
    for name in chapters():
        title, notebook = _title(name)
        seconds = notebook.metadata.get("deepclust", {}).get("seconds")
        minutes = f"{max(1, round(seconds / 60))}" if seconds else "–"
        link = f"[{title}]({prefix}chapters/{name}.ipynb)"
        for (dataset, profile, method), group in sorted(_own(name).items(), key=lambda item: item[0][2]):
            ours = _spread([record["acc"] for record in group])
            ours += "" if all(record["current"] for record in group) else ", older code"
            rows.append(
                [link, minutes, method, f"{dataset}, {profile}", ours, _reported(name, method, dataset)]
            )
            link = minutes = ""
        if link:
            rows.append([link, minutes, "not measured yet", "–", "–", "–"])
    return _table(["Chapter", "Minutes", "Method", "Data, profile", "ACC, ours", "ACC, paper"], rows)


def cards(prefix=""):
    """A card for each chapter: its first picture of a run, its idea, our number beside the paper's."""
    made = []
    for name in chapters():
        title, notebook = _title(name)
        picture = thumbnail(name)
        idea = re.search(r"^- \*Idea in a sentence\.\* (.+)$", notebook.cells[0].source, re.M)
        lines = [
            f":::{{grid-item-card}} {title}",
            f":link: {prefix}chapters/{name}.ipynb",
            ":link-alt: " + title,
        ]
        if picture is not None:
            lines += [f":img-top: {prefix}assets/card-{name}.png", f":img-alt: {picture[1]}"]
        lines += ["", idea.group(1) if idea else "", ""]
        for (dataset, profile, method), group in sorted(_own(name).items(), key=lambda item: item[0][2]):
            paper = _reported(name, method, dataset)
            beside = f"; the paper {paper}" if paper != "–" else ", a variant of ours" * ("(" in method)
            ours = f"ACC {_spread([record['acc'] for record in group])}"
            lines.append(f"- {method} on {dataset}, {profile} profile: {ours}{beside}")
        seconds = notebook.metadata.get("deepclust", {}).get("seconds")
        lines += [
            "",
            f"About {max(1, round(seconds / 60))} min to run, 45 min to read." if seconds else "",
            ":::",
        ]
        made.append("\n".join(lines))
    inner = "\n\n".join(made)
    return f"::::{{grid}} 1 1 2 2\n:gutter: 3\n\n{inner}\n::::\n"


def thumbnail(name):
    """A card's picture, the last frame of the chapter's last stepper: its PNG bytes and alt text; or None."""
    _, notebook = _title(name)
    pages = [o.get("data", {}).get("text/html", "") for c in notebook.cells for o in c.get("outputs", [])]
    steppers = [page for page in pages if "data-stepper" in page]
    found = re.findall(r'alt="([^"]+)"[^>]*src="data:image/png;base64,([^"]+)"', (steppers or [""])[-1])
    return (base64.b64decode(found[-1][1]), html.unescape(found[-1][0])) if found else None


def _rows(studies):
    """A row for each group of records: chapter, study, method, data, profile and changed parameters."""
    from deepclust_nb import records

    groups = {}
    for record in (r for name in chapters() for r in records.load(chapter=name, study=None)):
        if (record["study"] != "headline") == studies:
            own = {key: value for key, value in record["parameters"].items() if key != "seed"}
            place = [record[key] for key in ("chapter", "study", "dataset", "profile", "method")]
            groups.setdefault((*place, repr(sorted(own.items()))), []).append(record)
    return groups


def _sections(header, sections, nothing):
    """A heading and a narrow table for each of {heading: rows}: a phone shows them without scrolling."""
    made = [
        f"### {title}\n\n:::{{div}} narrow\n{_table(header, rows)}:::\n" for title, rows in sections.items()
    ]
    return "\n".join(made) or f"{nothing}\n"


def _name(method, group):
    """A method's name as a row shows it, with the mark of age."""
    return method if all(record["current"] for record in group) else f"{method} (older code)"


def status_table(prefix=""):
    """Markdown tables of every headline record, one a data set and profile: ours beside the paper's."""
    sections = {}
    for (chapter, _, dataset, profile, method, _), group in _rows(studies=False).items():
        shown = {m: _spread([r[m] for r in group]) if m in group[0] else "–" for m in ("acc", "nmi")}
        row = [_name(method, group), shown["acc"], _reported(chapter, method, dataset), shown["nmi"]]
        sections.setdefault(f"{chapter}: {dataset}, {profile} profile", []).append(row)
    return _sections(["Method", "ACC", "ACC, paper", "NMI"], sections, "Nothing is recorded yet.")


def studies_table(prefix=""):
    """Markdown tables of every record of a study: what differs from the headline of its profile."""
    from deepclust_nb.sweep import plan

    sections, usual = {}, {}
    for (chapter, study, dataset, profile, method, _), group in _rows(studies=True).items():
        place = (chapter, profile, dataset)
        if place not in usual:
            quick = plan.defaults(BOOK / "chapters" / f"{chapter}.ipynb")
            usual[place] = quick | plan.profile_parameters(chapter, profile, dataset)
        parameters = group[0]["parameters"]
        changed = {
            key: value
            for key, value in parameters.items()
            if key != "seed" and usual[place].get(key, value) != value
        }
        words = ", ".join(f"`{key} = {value}`" for key, value in changed.items()) or "–"
        row = [_name(method, group), words, _spread([r["acc"] for r in group if "acc" in r])]
        sections.setdefault(f"{study}: {chapter} on {dataset}, {profile} profile", []).append(row)
    # values of one parameter side by side
    sections = {title: sorted(rows) for title, rows in sections.items()}
    return _sections(["Method", "Changed", "ACC"], sections, "No study is recorded yet.")


GENERATED = {
    "cards": cards,
    "chapters": chapter_table,
    "status": status_table,
    "studies": studies_table,
}
MARK, END = r"<!-- generated: (\w+) -->\n", "<!-- end generated -->\n"


def fill(text, prefix):
    """Replace what follows each `<!-- generated: NAME -->` line, up to its end mark if it has one."""

    def made(match):
        return f"<!-- generated: {match[1]} -->\n\n{GENERATED[match[1]](prefix)}\n{END}"

    return re.sub(f"{MARK}(?:(?:(?!<!-- generated).)*?{END})?", made, text, flags=re.S)
