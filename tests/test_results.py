"""What pages show: bands from hand-made records, the papers' numbers, sentences and tables."""

import csv
import re

import numpy as np
import pytest
from loader import PARAMETERS, checkout, store

from deepclust_nb import data, places, results


@pytest.fixture
def copy(tmp_path):
    module, folder = checkout(tmp_path)
    return module("results"), folder


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: a list of (bundle, metadata)."""
    seen = []
    monkeypatch.setattr(results, "_display", lambda bundle, metadata=None: seen.append((bundle, metadata)))
    return seen


# bands


def five(module, folder, accs=(0.80, 0.81, 0.82, 0.83, 0.90), **changes):
    for seed, acc in enumerate(accs):
        store(module.records, folder, seed=seed, acc=acc, **changes)


def test_a_band_is_the_range_widened_by_itself_or_by_a_floor(copy):
    module, folder = copy
    five(module, folder)
    assert module.band("DEC", PARAMETERS) == pytest.approx((0.70, 1.00))
    five(module, folder, accs=[0.80, 0.80, 0.80, 0.80, 0.805])
    assert module.band("DEC", PARAMETERS) == pytest.approx((0.78, 0.825))


def test_there_is_no_band_without_five_quick_float32_seeds_of_the_same_parameters(copy):
    module, folder = copy
    five(module, folder)
    assert module.band("DEC", PARAMETERS | {"seed": 77}) is not None
    assert module.band("IDEC", PARAMETERS) is None
    assert module.band("DEC", PARAMETERS | {"lr": 0.2}) is None
    assert module.band("DEC", PARAMETERS, chapter="other") is None
    assert module.band("DEC", PARAMETERS, metric="nmi") is None
    store(module.records, folder, seed=4, acc=0.9, precision="bfloat16")
    assert module.band("DEC", PARAMETERS) is None
    store(module.records, folder, seed=4, acc=0.9).unlink()
    store(module.records, folder, seed=5, acc=0.9)
    assert module.band("DEC", PARAMETERS) is None


def test_check_band_prints_a_stable_line_and_stops_a_score_outside(copy, capsys, monkeypatch):
    module, folder = copy
    five(module, folder)
    monkeypatch.delenv("DEEPCLUST_RECORDING", raising=False)
    record = module.records.load()[0]
    inside, outside = record | {"acc": 0.71}, record | {"acc": 0.69}
    module.check_band(inside)
    assert capsys.readouterr().out == "DEC: ACC inside the band of its recorded seeds: yes\n"
    with pytest.raises(AssertionError, match=re.escape("0.690 lies outside [0.700, 1.000]")):
        module.check_band(outside)
    capsys.readouterr()
    monkeypatch.setenv("DEEPCLUST_RECORDING", "1")
    module.check_band(outside)
    assert capsys.readouterr().out == "DEC: ACC inside the band of its recorded seeds: no\n"
    monkeypatch.delenv("DEEPCLUST_RECORDING")
    for unlike in ({"seed": 5}, {"precision": "bfloat16"}, {"parameters": PARAMETERS | {"lr": 0.3}}):
        module.check_band(outside | unlike)
        assert capsys.readouterr().out == "DEC: ACC not checked: no band for these parameters\n"


# verdicts


def test_verdicts_over_runs_name_what_was_not_run():
    words = [results.verdict(hits, "here") for hits in ([True, True], [True, False], [False], [])]
    assert words == [
        "holds, 2 of 2 here",
        "partly, 1 of 2 here",
        "does not hold, 0 of 1 here",
        "not run here",
    ]


# the papers' numbers


def test_the_mean_of_the_public_trials_is_the_published_mean():
    rows = results.paper("foundations")
    means = [row for row in rows if row["table"] == "DEC-keras mean"]
    assert len(means) == 18
    for mean in means:
        key = ("method", "dataset", "metric")
        same = [r["value"] for r in rows if "trial" in r["table"] and all(r[k] == mean[k] for k in key)]
        assert len(same) == 10 and np.mean(same) == pytest.approx(mean["value"], abs=1e-5), mean


def test_paper_rows_are_scores_of_known_data_sets():
    for path in sorted((places.data_root() / "papers").glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        assert len({tuple(line) for line in lines}) == len(lines), f"{path.name} holds a line twice"
        if path.stem == "facts":
            assert lines[0] == ["key", "value", "source"] and all(line[2] for line in lines)
            continue
        assert lines[0] == ["table", "method", "dataset", "metric", "value", "std", "protocol"]
        for row in results.paper(path.stem):
            assert row["dataset"] in data.NAMES and row["protocol"] and -1 <= row["value"] <= 1, row


def test_an_unknown_fact_is_named_with_the_closest():
    assert results.fact("idec_gamma") == 0.1
    with pytest.raises(KeyError, match="idec_gama.*did you mean idec_gamma?"):
        results.fact("idec_gama")


# displays


def test_glue_displays_a_python_number_under_its_name(shown):
    results.glue("acc", np.float64(0.5))
    ((bundle, metadata),) = shown
    assert bundle["text/plain"] == "0.5"
    assert metadata["scrapbook"] == {"name": "acc", "mime_prefix": ""}
    with pytest.raises(ValueError, match="colon, got 'a:b'"):
        results.glue("a:b", 1)


def test_say_fills_in_numbers(shown):
    results.say("ACC **{acc:.2f}**", acc=0.876)
    assert shown[0][0] == {"text/markdown": "ACC **0.88**", "text/plain": "ACC **0.88**"}


def test_a_table_marks_older_code_scrolls_and_escapes(shown):
    rows = [{"method": "a|b<c", "acc": [0.5, 0.25], "std": None, "n": 7, "current": False}]
    rows.append({"method": "DEC", "acc": 1.0, "n": 8, "current": True})
    results.table(rows, {"method": "Method", "acc": "ACC", "std": "±", "n": "n"}, {"acc": ".2f"})
    bundle = shown[0][0]
    assert bundle["text/markdown"] == bundle["text/plain"]
    assert bundle["text/markdown"].splitlines() == [
        "| Method | ACC | ± | n |",
        "| --- | --- | --- | --- |",
        "| a\\|b<c (older code) | 0.50, 0.25 | – | 7 |",
        "| DEC | 1.00 | – | 8 |",
    ]
    assert bundle["text/html"].startswith('<div style="overflow-x:auto"><table>')
    assert "<td>a|b&lt;c (older code)</td><td>0.50, 0.25</td>" in bundle["text/html"]
    results.table(rows)
    assert shown[1][0]["text/plain"].startswith("| method | acc | std | n |")
