"""Parameters, records, bands and digests, on hand-made records in throw-away checkouts."""

import base64
import csv
import json
import re

import numpy as np
import pytest
from loader import checkout, definitions, notebook

from deepclust_nb import metrics, results

# Four scores, four values.
Y_TRUE, Y_PRED = [0, 0, 0, 0, 1, 1, 2], [5, 5, 3, 3, 1, 1, 1]
PARAMETERS = {"dataset": "mnist_5k", "profile": "quick", "seed": 0, "lr": 0.1}
ALLOWED = {
    "dataset": ["mnist_5k", "fashion_5k"],
    "seed": (0, 100),
    "lr": (0.0, 1.0),
    "log": [True, False],
    "layers": [[500, 20]],
    "k": [1, None],
}
GOOD = {"dataset": "mnist_5k", "seed": 3, "lr": 1, "log": True, "layers": [500, 20], "k": None}


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


def a_record(module, **changes):
    given = {"chapter": "tiny", "method": "DEC", "y_true": Y_TRUE, "y_pred": Y_PRED}
    given |= {"parameters": PARAMETERS, "trained_on": "all", "scored_on": "test", "seconds": 1.234}
    return module.record(**(given | changes))


def store(module, folder, name="0-x", **changes):
    """Put one record into the checkout by hand, with a valid hash."""
    body = {"chapter": "tiny", "method": "DEC", "dataset": "mnist_5k", "profile": "quick", "seed": 0}
    body |= {"acc": 0.8, "precision": "float32", "study": "headline", "digest": "0"} | changes
    body["parameters"] = PARAMETERS | {"seed": body["seed"]} | changes.get("parameters", {})
    body["sha256"] = module.body_hash(body)
    path = folder / f"data/records/{body['chapter']}/{body['dataset']}/{body['profile']}/{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"records": [body]}))
    return path


# parameters


def test_good_parameters_come_back_in_the_declared_order():
    namespace = {"_hidden": 1, "In": [], "Out": {}, "module": json, "function": len} | GOOD
    assert results.check_parameters(namespace, **ALLOWED) == GOOD
    assert list(results.check_parameters(namespace, **ALLOWED)) == list(ALLOWED)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("dataset", "mnist", "dataset must be one of 'mnist_5k', 'fashion_5k', got 'mnist'"),
        ("seed", 101, "seed must be an int between 0 and 100, got 101"),
        ("seed", 1.0, "seed must be an int"),
        ("seed", True, "seed must be an int"),
        ("lr", 1.5, "lr must be a number between 0.0 and 1.0, got 1.5"),
        ("lr", float("nan"), "lr must be a number"),
        ("lr", "0.1", "lr must be a number"),
        ("lr", False, "lr must be a number"),
        ("log", 1, "log must be one of True, False, got 1"),
        ("k", True, "k must be one of 1, None, got True"),
        ("layers", "[500, 20]", "layers must be one of"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        results.check_parameters(GOOD | {name: value}, **ALLOWED)


def test_a_declared_parameter_that_the_cell_does_not_set_is_named():
    namespace = {name: value for name, value in GOOD.items() if name != "log"}
    with pytest.raises(ValueError, match="log is declared here"):
        results.check_parameters(namespace, **ALLOWED)


@pytest.mark.parametrize("value", [1, 1.0, "a", None, True, [1], (1,), {"a": 1}])
def test_an_undeclared_plain_global_is_refused_with_the_closest_name(value):
    with pytest.raises(ValueError, match="sede is not a parameter of this chapter: did you mean seed?"):
        results.check_parameters(GOOD | {"sede": value}, **ALLOWED)


def test_a_second_call_still_checks_values_but_no_longer_other_globals():
    namespace = dict(GOOD)
    results.check_parameters(namespace, **ALLOWED)
    namespace["loss"] = 0.5
    assert results.check_parameters(namespace, **ALLOWED) == GOOD
    namespace["seed"] = -1
    with pytest.raises(ValueError, match="seed must be"):
        results.check_parameters(namespace, **ALLOWED)


def test_a_failed_call_does_not_count_as_the_first():
    namespace = GOOD | {"sede": 1}
    for _ in range(2):
        with pytest.raises(ValueError, match="sede"):
            results.check_parameters(namespace, **ALLOWED)


# records


def test_a_record_holds_the_scores_of_the_metrics_and_is_displayed(shown):
    record = a_record(results, n=70000, gamma=np.float32(0.5), iterations=np.int64(7))
    for key, score in [("acc", "accuracy"), ("purity", "purity"), ("nmi", "nmi"), ("ari", "ari")]:
        assert record[key] == pytest.approx(getattr(metrics, score)(Y_TRUE, Y_PRED), abs=1e-6), key
    assert len({record[key] for key in ("acc", "purity", "nmi", "ari")}) == 4
    expected = {
        "chapter": "tiny",
        "method": "DEC",
        "dataset": "mnist_5k",
        "n": 70000,
        "n_scored": 7,
        "seed": 0,
    }
    expected |= {"profile": "quick", "trained_on": "all", "scored_on": "test", "acc_kind": "one_to_one"}
    expected |= {"parameters": PARAMETERS, "seconds": 1.23, "device": "cpu", "precision": "float32"}
    expected |= {"gamma": 0.5, "iterations": 7}
    assert {key: record[key] for key in expected} == expected
    assert set(record["versions"]) == {"python", "torch", "numpy", "scikit-learn", "deepclust_nb"}
    assert record["threads"] >= 1
    ((bundle, _),) = shown
    assert bundle[results.MIME] == record == json.loads(json.dumps(record))
    assert bundle["text/plain"] == "DEC on mnist_5k, seed 0: ACC 0.571, NMI 0.671, ARI 0.308"


def test_a_method_without_clusters_records_its_own_scores(shown):
    record = a_record(results, method="AC-VAE", y_pred=None, neighbour_accuracy_10=0.75)
    assert "acc" not in record and "acc_kind" not in record
    assert shown[0][0]["text/plain"] == "AC-VAE on mnist_5k, seed 0: neighbour_accuracy_10 0.750"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"acc": 1.0}, "acc is a key of every record"),
        ({"loss": float("nan")}, "finite"),
        ({"loss": object()}, "finite"),
        ({"curve": list(range(2000))}, "at most 4096 bytes"),
        ({"parameters": {"dataset": "mnist_5k", "profile": "quick"}}, "seed is missing"),
        ({"arrays": {"curve": [70000.0]}}, "array curve does not fit float16"),
        ({"arrays": {"curve": np.zeros(33000)}}, "65536 bytes"),
    ],
)
def test_what_a_record_cannot_hold_is_refused_and_not_displayed(shown, changes, says):
    with pytest.raises(ValueError, match=says):
        a_record(results, **changes)
    assert shown == []


def test_arrays_are_kept_for_seed_0_alone_and_come_back_as_float16_holds_them(shown):
    table = np.linspace(-3, 3, 12).reshape(3, 4)
    record = a_record(results, arrays={"embedding": table})
    np.testing.assert_array_equal(
        results.arrays(record)["embedding"], table.astype(np.float16).astype(np.float32)
    )
    assert len(base64.b64decode(record["arrays"]["embedding"]["float16"])) == 24
    other = a_record(results, arrays={"embedding": table}, parameters=PARAMETERS | {"seed": 1})
    assert "arrays" not in other and results.arrays(other) == {}


def test_recorded_reads_the_displayed_records_in_order_and_completes_them(shown, tmp_path):
    kept = [a_record(results), a_record(results, method="IDEC")]
    outputs = [{"output_type": "display_data", "metadata": {}, "data": bundle} for bundle, _ in shown]
    stream = {"output_type": "stream", "name": "stdout", "text": "no record"}
    notebook(
        [("a", None, [outputs[0], stream]), ("b", None, None), ("c", None, [outputs[1]])],
        tmp_path / "x.ipynb",
    )
    found = results.recorded(tmp_path / "x.ipynb", digest="abc", study="gamma")
    assert [body["method"] for body in found] == ["DEC", "IDEC"]
    for body, first in zip(found, kept, strict=True):
        added = {"commit", "digest", "study", "sha256"}
        assert {key: value for key, value in body.items() if key not in added} == first
        assert (body["digest"], body["study"]) == ("abc", "gamma")
        assert body["sha256"] == results.body_hash(body)


# reading


def test_a_tampered_record_is_detected(copy):
    module, folder = copy
    path = store(module, folder)
    assert module.load()[0]["acc"] == 0.8
    path.write_text(path.read_text().replace("0.8", "0.9"))
    with pytest.raises(ValueError, match="0-x.json: record DEC does not match its hash"):
        module.load()


def test_a_record_that_a_sweep_beside_us_removes_is_passed_over(copy):
    module, folder = copy
    path = store(module, folder)
    path.with_name("1-gone.json").symlink_to("nowhere.json")  # listed, and gone when it is read
    assert [record["seed"] for record in module.load()] == [0]


def test_load_filters_and_sorts(copy):
    module, folder = copy
    store(module, folder, "10-x", seed=10)
    store(module, folder, "2-x", seed=2)
    store(module, folder, "2-y", seed=2, study="gamma")
    store(module, folder, "0-x", chapter="other", method="IDEC", profile="laptop", dataset="usps", seed=0)
    assert [(r["chapter"], r["seed"]) for r in module.load()] == [("other", 0), ("tiny", 2), ("tiny", 10)]
    assert [r["seed"] for r in module.load("tiny", study=None)] == [2, 2, 10]
    assert [r["study"] for r in module.load(study="gamma")] == ["gamma"]
    for key, value in [("dataset", "usps"), ("profile", "laptop"), ("method", "IDEC"), ("chapter", "other")]:
        assert [r["method"] for r in module.load(**{key: value})] == ["IDEC"], key
    assert module.load(method="VaDE") == []


def test_current_follows_the_chapter_and_in_its_absence_the_stored_digest(copy):
    module, folder = copy
    path = folder / "book/chapters/tiny.ipynb"
    notebook([("def f():\n    return 1", "definition", None)], path)
    store(module, folder, digest=module.code_digest("tiny"))
    assert module.load()[0]["current"]
    module.write_digest("tiny")
    notebook([("def f():\n    return 2", "definition", None)], path)
    assert not module.load()[0]["current"]
    path.unlink()
    assert module.load()[0]["current"]
    (folder / "data/records/tiny/digest.txt").unlink()
    assert not module.load()[0]["current"]
    assert module.body_hash(module.load()[0]) == module.load()[0]["sha256"]


def test_a_variant_is_the_headline_with_these_parameters_changed_and_no_others(copy):
    module, folder = copy
    store(module, folder, "0-x")
    store(module, folder, "1-x", seed=1)
    store(module, folder, "0-a", study="rates", parameters={"lr": 0.2})
    store(module, folder, "0-b", study="both", parameters={"lr": 0.2, "k": 3})
    store(module, folder, "1-b", study="both", parameters={"lr": 0.2, "k": 3}, seed=1, method="IDEC")
    store(module, folder, "2-x", study="again", seed=2)  # the headline's parameters under another name
    asked = ("tiny", "mnist_5k", "quick", "DEC")
    assert [r["seed"] for r in module.variant(*asked)] == [0, 1, 2]
    assert [r["study"] for r in module.variant(*asked, lr=0.2)] == ["rates"]
    assert [r["seed"] for r in module.variant(*asked, lr=0.2, k=3)] == [0]
    assert [r["seed"] for r in module.variant(*asked[:3], "IDEC", lr=0.2, k=3)] == [1]
    assert module.variant(*asked, lr=0.3) == [] == module.variant("tiny", "mnist_5k", "quick", "VaDE")


def test_means_and_verdicts_over_runs_name_what_was_not_run():
    assert results.mean([{"acc": 0.5}, {"acc": 1.0}], "acc") == 0.75 and results.mean([], "acc") is None
    words = [results.verdict(hits, "here") for hits in ([True, True], [True, False], [False], [])]
    assert words == [
        "holds, 2 of 2 here",
        "partly, 1 of 2 here",
        "does not hold, 0 of 1 here",
        "not run here",
    ]


def test_scores_are_grouped_by_method_in_seed_order(copy):
    records = [
        {"method": m, "seed": s, "acc": a} for m, s, a in [("b", 1, 0.1), ("a", 0, 0.2), ("b", 0, 0.3)]
    ]
    grouped = results.by_method([*records, {"method": "c", "seed": 0, "nmi": 1.0}])
    assert grouped == {"b": [0.3, 0.1], "a": [0.2]} and list(grouped) == ["b", "a"]


# bands


def five(module, folder, accs=(0.80, 0.81, 0.82, 0.83, 0.90), **changes):
    for seed, acc in enumerate(accs):
        store(module, folder, f"{seed}-x", seed=seed, acc=acc, **changes)


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
    store(module, folder, "4-x", seed=4, acc=0.9, precision="bfloat16")
    assert module.band("DEC", PARAMETERS) is None
    store(module, folder, "4-x", seed=5, acc=0.9)
    assert module.band("DEC", PARAMETERS) is None


def test_check_band_prints_a_stable_line_and_stops_a_score_outside(copy, capsys, monkeypatch):
    module, folder = copy
    five(module, folder)
    monkeypatch.delenv("DEEPCLUST_RECORDING", raising=False)
    record = module.load()[0]
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


# digests

CELLS = [
    ("import torch\nfrom deepclust_nb import baselines", "definition", None),
    (
        "def f(x):\n    '''Doc.'''\n    print(f'{x:.2f}, {x!r}')\n    return baselines.used(x)",
        "definition",
        None,
    ),
    ("f(1)", "run", None),
    ("print(f(2))", None, None),
]
BASELINES = '''"""Module."""
SCALE = 2


def used(x):
    """Doc."""
    return indirect(x)  # comment


def indirect(x):
    return SCALE * x


def unused(x):
    return x
'''


@pytest.fixture
def code(copy):
    """A checkout of a chapter and a tiny `baselines`: a function from changes to (code, shown) digests."""
    module, folder = copy
    for name in ("data", "metrics", "networks", "training", "plots", "results"):
        (folder / f"deepclust_nb/{name}.py").write_text("")

    def digests(cells=CELLS, **changed):
        text = BASELINES
        for old, new in changed.get("helper", []):
            assert old in text
            text = text.replace(old, new)
        (folder / "deepclust_nb/baselines.py").write_text(text)
        notebook(cells, folder / "book/chapters/tiny.ipynb")
        return module.code_digest("tiny"), module.shown_digest("tiny")

    return digests, folder, module


@pytest.mark.parametrize(
    "helper",
    [
        [("  # comment", ""), ('"""Doc."""', '"""Other."""'), ('"""Module."""\n', "# nothing\n\n")],
        [("    return x\n", "    return x + 1\n")],
        [("def unused", "def unused_too")],
        [
            ("def unused(x):\n    return x\n", ""),
            ("SCALE = 2", "def unused(x):\n    return x\n\n\nSCALE = 2"),
        ],
    ],
    ids=["comments and docstrings", "unreached body", "unreached name", "order"],
)
def test_the_digest_ignores_what_decides_no_number(code, helper):
    digests, _, _ = code
    assert digests() == digests(helper=helper)


@pytest.mark.parametrize(
    "helper",
    [[("indirect(x)  #", "indirect(x + 1)  #")], [("SCALE * x", "SCALE + x")], [("SCALE = 2", "SCALE = 3")]],
    ids=["reached", "reached through another", "constant"],
)
def test_the_digest_follows_what_the_cells_reach(code, helper):
    digests, _, _ = code
    before, after = digests(), digests(helper=helper)
    assert before[0] != after[0] and before[1] != after[1]


def test_the_digest_follows_definition_and_run_cells_but_not_their_layout(code):
    digests, _, _ = code
    before = digests()
    laid_out = [
        ("%matplotlib inline\n" + CELLS[0][0] + "\n# text\n" + CELLS[1][0], "definition", None),
        *CELLS[2:],
    ]
    assert digests(laid_out) == before
    assert digests([*CELLS[:2], ("f(3)", "run", None), CELLS[3]])[0] != before[0]
    other_print = digests([*CELLS[:3], ("print(f(4))", None, None)])
    assert other_print[0] == before[0] and other_print[1] != before[1]


def test_the_shown_digest_follows_records_and_papers(code):
    digests, folder, module = code
    before = digests()
    (folder / "data/papers/facts.csv").write_text("key,value,source\na,1,b\n")
    with_paper = digests()
    assert with_paper[0] == before[0] and with_paper[1] != before[1]
    store(module, folder)
    with_record = digests()
    assert with_record[0] == before[0] and with_record[1] != with_paper[1]
    store(module, folder, chapter="other")
    assert digests() == with_record
    named = [*CELLS[:3], ("print(f('other'))", None, None)]
    shown = digests(named)[1]
    store(module, folder, chapter="other", acc=0.7)
    assert digests(named)[1] != shown


def test_the_digest_of_an_unknown_chapter_is_an_error(code):
    with pytest.raises(FileNotFoundError, match="no chapter 'nowhere'"):
        code[2].code_digest("nowhere")


def test_the_digest_is_the_same_on_every_python(code):
    # Computed once and written down: a new interpreter or platform that changes it would age every record.
    digests, _, _ = code
    assert digests()[0][:16] == "94276ced4a7be0cd"


def test_the_loader_runs_definition_cells_alone(monkeypatch, tmp_path):
    import inspect

    import loader

    cells = [("%time\nimport math\nN = 2", "definition", None), ("N = 3", "run", None)]
    cells.append(("def area(r):\n    return N * math.pi * r", "definition", None))
    notebook(cells, tmp_path / "tiny.ipynb")
    monkeypatch.setattr(loader, "chapter_file", lambda chapter: tmp_path / f"{chapter}.ipynb")
    module = definitions("tiny")
    assert module.N == 2 and module.area(1) == pytest.approx(6.283185)
    assert inspect.getsource(module.area) == "def area(r):\n    return N * math.pi * r"
    assert definitions("tiny") is module


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
    from deepclust_nb import data

    for path in sorted((data.data_root() / "papers").glob("*.csv")):
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
