"""Store a chapter's outputs anew (`make refresh`) and record its quick profile again (`make records`)."""

import copy
import difflib
import json
import subprocess
import sys

from generated import fill
from running import (
    ROOT,
    chapters,
    default_parameters,
    notebooks,
    read_notebook,
    run_chapter,
    work_folder,
)

RECORD = "application/vnd.deepclust.record+json"
# What differs between two runs that computed the same: it does not make an output a changed one.
VOLATILE = ("seconds", "versions", "threads", "device", "sha256")


def clean_outputs(cell):
    """The cell's outputs as they are stored: no progress lines (stderr), texts joined."""
    kept = []
    for output in copy.deepcopy(cell.get("outputs", [])):
        output.pop("transient", None)
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
            continue
        kept.append(output)
    return kept


def _comparable(outputs):
    """`outputs` without what may differ between two runs that computed the same."""
    outputs = json.loads(json.dumps(outputs))
    for output in outputs:
        output.pop("execution_count", None)
        for key in VOLATILE:
            output.get("data", {}).get(RECORD, {}).pop(key, None)
    return outputs


def _text(outputs):
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return "".join("".join(text) if isinstance(text, list) else text for text in texts).splitlines()


def merge(stored, fresh):
    """Put the outputs of `fresh` into `stored`, keeping what did not change; return the report."""
    by_id, report, count = {cell.id: cell for cell in fresh.cells}, [], 0
    for cell in (cell for cell in stored.cells if cell.cell_type == "code"):
        count += 1
        old, new = cell.get("outputs", []), clean_outputs(by_id[cell.id])
        if _comparable(old) != _comparable(new):
            cell.outputs = new
            if "nbval-check-output" in cell.metadata.get("tags", []):
                report.append(f"  checked output of cell {cell.id} changed:")
                report += [
                    f"    {s}" for s in difflib.unified_diff(_text(old), _text(new), lineterm="", n=0)
                ][2:]
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
        for key in ("papermill", "execution", "ExecuteTime", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    kept = {key: stored.metadata[key] for key in ("deepclust",) if key in stored.metadata}
    stored.metadata = type(stored.metadata)({"kernelspec": kernel, **kept})
    return report


def refresh(options):
    from deepclust_nb.places import write_atomic

    with work_folder("refresh") as work:
        wanted = [path for path in notebooks() if not options.chapters or path.stem in options.chapters]
        failed = [path for path in wanted if not _refreshed(path, work, options.all)]
    readme = ROOT / "README.md"
    write_atomic(readme, fill(readme.read_text(encoding="utf-8"), "book/"))
    sys.exit(bool(failed))


def _refreshed(path, work, always):
    """Store a notebook's outputs anew unless they are of today's code; returns whether they are now."""
    import nbformat

    from deepclust_nb import digest
    from deepclust_nb.places import write_atomic

    folder, name = path.parent.name, path.stem
    stored = read_notebook(path)
    digest.write_digest(name)
    shown, known = digest.shown_digest(name, folder), stored.metadata.get("deepclust", {})
    if known.get("shown") == shown and not always:
        print(f"  {folder}/{name}  is up to date")
        return True
    target = work / folder / f"{name}.ipynb"
    # one thread, as the chapter's test runs it: the order of sums, and so the last digits, depend on it
    seconds, failure = run_chapter(path, target, {}, threads=1)
    if failure:
        return False
    report = merge(stored, read_notebook(target))
    # rounded and sticky, so that two refreshes of the same code write the same bytes
    about = known.get("seconds") if known.get("shown") == shown else None
    stored.metadata["deepclust"] = {"seconds": about or 10 * round(seconds / 10 + 0.5), "shown": shown}
    write_atomic(path, nbformat.writes(stored) + "\n")
    print("\n".join(report) or "  no checked output changed")
    return True


def records(_):
    """Record the quick profile again, then drop those of older code: a band mixes no two."""
    from deepclust_nb import digest
    from deepclust_nb import records as stored

    quick = {"profile": "quick", "seeds": [0, 1, 2, 3, 4]}
    runs = [{"chapter": name, "dataset": default_parameters(name)["dataset"], **quick} for name in chapters()]
    with work_folder("records") as work:
        as_yaml = json.dumps({"threads": 1, "runs": runs}, indent=1)  # JSON is YAML
        (work / "quick.yaml").write_text(as_yaml, encoding="utf-8")
        command = [sys.executable, "-m", "deepclust_nb.sweep", str(work / "quick.yaml"), "--force"]
        if subprocess.run([*command, "--workers", "2"], cwd=ROOT).returncode:
            sys.exit(1)
    for name in chapters():
        digest.write_digest(name)
        for path in (ROOT / "data" / "records" / name).glob("*/quick/*.json"):
            found = stored.read(path)
            headline = all(record["study"] == "headline" for record in found)
            if headline and any(record["digest"] != digest.code_digest(name) for record in found):
                path.unlink()
                print(f"  removed {path.relative_to(ROOT)}, which was of older code")
