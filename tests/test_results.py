"""What pages show: bands from hand-made records, the papers' numbers, sentences and tables."""

import csv
import re

import numpy as np
import pytest
from loader import PARAMETERS, checkout, store
from scipy import stats

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


def some(*values, key="acc", current=True):
    return [{"seed": seed, key: value, "current": current} for seed, value in enumerate(values)]


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    for n in (3, 5, 12):
        ours, others = rng.normal(0.7, 0.05, n), rng.normal(0.6, 0.2, n)
        judged = results.verdict(some(*ours), some(*others))
        tested = stats.ttest_rel(ours, others).confidence_interval(0.95)
        assert (judged.low, judged.high, judged.n) == pytest.approx((tested.low, tested.high, n))
        judged = results.verdict(some(*ours), 0.6)
        tested = stats.ttest_1samp(ours, 0.6).confidence_interval(0.95)
        assert (judged.low, judged.high) == pytest.approx((tested.low + -0.6, tested.high - 0.6))


def test_nineteen_of_twenty_intervals_hold_the_true_gap():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(2000):
        shared = rng.normal(0, 1, 4)  # what a seed does to both sides drops out of a paired gap
        judged = results.verdict(some(*(shared + rng.normal(0.3, 0.1, 4))), some(*shared))
        covered += judged.low <= 0.3 <= judged.high
    assert 0.935 < covered / 2000 < 0.965


@pytest.mark.parametrize(
    ("gaps", "settings", "word"),
    [
        ((0.30, 0.31, 0.32), {}, "holds"),
        ((-0.30, -0.31, -0.32), {}, "does not hold"),
        ((0.30, -0.31, 0.32), {}, "no difference shown"),
        ((-0.30, -0.31, -0.32), {"lower": True}, "holds"),
        ((0.30, 0.31, 0.32), {"lower": True}, "does not hold"),
        ((0.30, 0.31, 0.32), {"margin": 0.25}, "holds"),
        ((0.30, 0.31, 0.32), {"margin": 0.31}, "not decided"),
        ((0.30, 0.31, 0.32), {"margin": 0.5}, "does not hold"),
        ((-0.01, -0.011, -0.012), {"margin": -0.02}, "holds"),
        ((-0.01, -0.011, -0.012), {"margin": -0.005}, "does not hold"),
        ((0.01, 0.011, 0.012), {"margin": -0.02, "lower": True}, "holds"),
        ((0.03, 0.031, 0.032), {"margin": -0.02, "lower": True}, "does not hold"),
        ((0.0, 0.0, 0.0), {}, "no difference shown"),
        ((0.30, 0.31), {}, "seen in 2 runs"),
        ((0.30,), {}, "seen in 1 run"),
        ((), {}, "not run"),
    ],
)
def test_a_verdict_needs_its_whole_interval_and_three_seeds(gaps, settings, word):
    assert results.verdict(some(*(0.5 + gap for gap in gaps)), some(*[0.5] * 5), **settings).word == word
    assert results.verdict(some(*(0.5 + gap for gap in gaps)), 0.5, **settings).word == word


def test_gaps_are_taken_between_runs_of_the_same_seed():
    ours = [{"seed": seed, "acc": 0.1 * seed} for seed in (4, 2, 0, 9)]
    others = [{"seed": seed, "acc": 0.1 * seed - 0.05} for seed in (0, 1, 2, 4)]
    judged = results.verdict(ours, others)
    assert (judged.n, judged.mean, judged.low, judged.high) == pytest.approx((3, 0.05, 0.05, 0.05))
    assert str(judged) == "holds: +0.050 (+0.050 to +0.050), 3 seeds"
    with pytest.raises(ValueError, match="a seed stands twice"):
        results.verdict([*ours, ours[0]], others)
    with pytest.raises(ValueError, match="a seed stands twice"):
        results.verdict(ours, [*others, others[0]])


def test_a_value_that_a_run_lacks_is_no_gap_and_older_code_is_said():
    ours, others = some(0.4, 0.5, 0.6, key="error"), some(0.1, 0.2, None, key="error")
    judged = results.verdict(ours, others, "error")
    assert str(judged) == "seen in 2 runs: +0.300, no verdict"
    assert results.verdict(ours, some(0.1, 0.1)).word == "not run"
    assert results.verdict(ours, 0.0, lambda record: -record["error"]).mean == pytest.approx(-0.5)
    old = results.verdict(ours, some(0.1, 0.2, 0.31, key="error", current=False), "error")
    assert not old.current and str(old).endswith("3 seeds (older code)")
    assert not results.verdict(some(0.1, 0.2, 0.3, current=False), 0.0).current


def test_claims_that_each_run_bears_out_or_not_are_counted():
    hits = ([True] * 3, [True, False, True], [False] * 3, [True, False], [True], [])
    assert [str(results.count(list(map(np.bool_, some)))) for some in hits] == [
        "holds: 3 of 3 runs",
        "partly: 2 of 3 runs",
        "does not hold: 0 of 3 runs",
        "seen in 2 runs: 1 of 2, no verdict",
        "seen in 1 run: 1 of 1, no verdict",
        "not run",
    ]
    assert str(results.count([True] * 3, current=False)) == "holds: 3 of 3 runs (older code)"


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
            assert row["dataset"] in data.NAMES and row["protocol"], row
            counted = row["metric"] in ("seconds", "n", "dimensions", "classes")
            assert row["value"] > 0 if counted else -1 <= row["value"] <= 1, row


def test_a_table_that_two_chapters_quote_is_the_same_in_both():
    rows = results.paper("dynae")
    full = [r for r in rows if r["table"] == "Table 2" and "all images" in r["protocol"]]
    own = {(r["method"], r["dataset"], r["metric"]): r["value"] for r in full}
    quoted = [r for r in results.paper("foundations") if r["table"] == "DynAE Table 2"]
    assert len(quoted) > 20
    for r in quoted:
        assert own[r["method"], r["dataset"], r["metric"]] == r["value"], r


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


def test_claims_stand_beside_their_rule_and_verdict(shown):
    results.verdicts(
        [("it helps", "higher", results.count([True, True, False])), ("it hurts", "lower", "not run")]
    )
    ((bundle, _),) = shown
    assert bundle["text/plain"].splitlines() == [
        "| claim | rule | verdict, mean gap |",
        "| --- | --- | --- |",
        "| it helps | higher | partly: 2 of 3 runs |",
        "| it hurts | lower | not run |",
    ]


def test_the_row_that_a_page_asks_for_is_the_first_that_fits():
    row = results.reported("vae", method="VaDE", dataset="mnist", metric="acc", protocol="twenty seeds")
    assert (row["value"], row["std"]) == (0.7158, 0.0443)
    several = [r for r in results.paper("vae") if (r["method"], r["dataset"]) == ("VaDE", "mnist")]
    assert len(several) > 3 and results.reported("vae", method="VaDE", dataset="mnist") == several[0]
    assert results.reported("vae", method="VaDE", protocol="seeds") is None  # not how a protocol begins
    assert results.reported("vae", method="VaD") is None and results.reported("vae", method="IMSAT") is None
    with pytest.raises(KeyError):
        results.reported("vae", methods="VaDE")
