"""Records, on hand-made ones in throw-away checkouts: what is kept, what is trusted, what counts once."""

import base64
import json
import re

import numpy as np
import pytest
from loader import PARAMETERS, checkout, notebook, store

from deepclust_nb import metrics, records

# Four scores, four values.
Y_TRUE, Y_PRED = [0, 0, 0, 0, 1, 1, 2], [5, 5, 3, 3, 1, 1, 1]


@pytest.fixture
def copy(tmp_path):
    module, folder = checkout(tmp_path)
    return module("records"), folder


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: a list of bundles."""
    seen = []
    monkeypatch.setattr(records, "_display", seen.append)
    return seen


def a_record(module, **changes):
    given = {"chapter": "tiny", "method": "DEC", "y_true": Y_TRUE, "y_pred": Y_PRED}
    given |= {"parameters": PARAMETERS, "trained_on": "all", "scored_on": "test", "seconds": 1.234}
    return module.record(**(given | changes))


# records


def test_a_record_holds_the_scores_of_the_metrics_and_is_displayed(shown):
    record = a_record(records, n=70000, gamma=np.float32(0.5), iterations=np.int64(7))
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
    (bundle,) = shown
    assert bundle[records.MIME] == record == json.loads(json.dumps(record))
    assert bundle["text/plain"] == "DEC on mnist_5k, seed 0: ACC 0.571, NMI 0.671, ARI 0.308"


def test_a_method_without_clusters_records_its_own_scores(shown):
    record = a_record(records, method="AC-VAE", y_pred=None, neighbour_accuracy_10=0.75)
    assert "acc" not in record and "acc_kind" not in record
    assert shown[0]["text/plain"] == "AC-VAE on mnist_5k, seed 0: neighbour_accuracy_10 0.750"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"acc": 1.0}, "acc is a key of every record"),
        ({"losses": [0.5, float("nan")]}, "finite"),
        ({"loss": object()}, "finite"),
        ({"curve": list(range(2000))}, "at most 4096 bytes"),
        ({"parameters": {"dataset": "mnist_5k", "profile": "quick"}}, "seed is missing"),
    ],
)
def test_what_a_record_cannot_hold_is_refused_and_not_displayed(shown, changes, says):
    with pytest.raises(ValueError, match=says):
        a_record(records, **changes)
    assert shown == []


def test_arrays_are_kept_for_seed_0_alone_and_come_back_as_float16_holds_them(shown):
    table = np.linspace(-3, 3, 12).reshape(3, 4)
    record = a_record(records, arrays={"embedding": table})
    np.testing.assert_array_equal(
        records.arrays(record)["embedding"], table.astype(np.float16).astype(np.float32)
    )
    assert len(base64.b64decode(record["arrays"]["embedding"]["float16"])) == 24
    other = a_record(records, arrays={"embedding": table}, parameters=PARAMETERS | {"seed": 1})
    assert "arrays" not in other and records.arrays(other) == {}


def test_what_training_could_not_foresee_is_left_out_and_named_and_costs_no_run(shown, capsys):
    arrays = {"curve": [1.0], "far": [70000.0], "large": np.zeros(33000), "small": [2.0], "hole": [np.nan]}
    record = a_record(records, arrays=arrays, loss=float("nan"), drift=np.float32("inf"), fine=0.5)
    assert record["left_out"] == ["loss", "drift", "far", "large", "hole"]
    assert list(records.arrays(record)) == ["curve", "small"] and record["fine"] == 0.5
    assert "loss" not in record and "left out of the record of DEC" in capsys.readouterr().out
    assert "left_out" not in a_record(records) and len(shown) == 2


def test_arrays_may_fill_their_room_to_the_byte(shown):
    def size(n):
        return len(records.canonical({"a": {"shape": [n], "float16": 4 * -(-2 * n // 3) * "A"}}))

    n = next(n for n in range(24500, 24600) if size(n) <= 65536 < size(n + 1))
    assert "arrays" in a_record(records, arrays={"a": np.zeros(n)})
    kept = a_record(records, arrays={"a": np.zeros(n)})["arrays"]
    assert len(records.canonical(kept)) == size(n)
    assert a_record(records, arrays={"a": np.zeros(n + 1)})["left_out"] == ["a"]


@pytest.fixture
def executed(shown, tmp_path, monkeypatch):
    """A notebook with two records and what its kernel stated: a function from the statement to its path."""

    def make(stated):
        monkeypatch.setattr(records.code, "state", lambda: stated)
        for method in ("DEC", "IDEC"):
            a_record(records, method=method)
        outputs = [{"output_type": "display_data", "metadata": {}, "data": bundle} for bundle in shown]
        stream = {"output_type": "stream", "name": "stdout", "text": "no record"}
        cells = [("a", None, [outputs[0], stream]), ("b", None, None), ("c", None, [outputs[1]])]
        notebook(cells, tmp_path / "x.ipynb")
        return tmp_path / "x.ipynb"

    return make


STATED = {"package": str(records.root()), "digest": "abc", "commit": "c0ffee"}


def test_recorded_reads_the_displayed_records_in_order_and_seals_them(executed):
    path = executed(STATED)
    kept, stated = records.displayed(path)
    assert stated == [STATED, STATED]
    found = records.recorded(path, "abc", study="gamma")
    assert [body["method"] for body in found] == ["DEC", "IDEC"]
    for body, first in zip(found, kept, strict=True):
        added = {"commit", "digest", "study", "sha256"}
        assert {key: value for key, value in body.items() if key not in added} == first
        assert (body["digest"], body["commit"], body["study"]) == ("abc", "c0ffee", "gamma")
        assert body["sha256"] == records.body_hash(body)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        (None, "did not state which code it ran"),
        (STATED | {"package": "/elsewhere"}, "imported deepclust_nb from /elsewhere, not from"),
        (STATED | {"digest": "abd"}, "the code changed while the run was starting"),
        (STATED | {"digest": None}, "the code changed while the run was starting"),
    ],
)
def test_a_run_of_other_code_is_not_sealed(executed, stated, says):
    with pytest.raises(ValueError, match=says):
        records.recorded(executed(stated), "abc")


# reading


def place(path):
    return "/".join(path.parts[-4:])


def test_a_stored_record_comes_back(copy):
    module, folder = copy
    (record,) = module.read(store(module, folder))
    assert record["acc"] == 0.8
    record["acc"] = 0.1
    assert module.load()[0]["acc"] == 0.8  # what a reader does to its copy stays its own


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace("0.8", "0.9"), "record DEC does not match its hash"),
        (lambda text: text[:-9], "it is no file of records"),
        (lambda text: "", "it is no file of records"),
        (lambda text: "[]", "it is no file of records"),
        (lambda text: '{"schema": 2, "records": []}', "it is no file of records"),
        (lambda text: "\x00", "it is no file of records"),
        (lambda text: text.replace('"schema": 2', '"schema": 3'), "their schema 3 is not known"),
    ],
    ids=["changed", "cut", "empty", "list", "none", "binary", "schema"],
)
def test_a_damaged_file_is_named_by_every_reader(copy, damage, says):
    module, folder = copy
    path = store(module, folder)
    path.write_text(damage(path.read_text()))
    readers = (
        lambda: module.read(path),
        module.load,
        lambda: module.variant("tiny", "mnist_5k", "quick", "DEC"),
    )
    for reader in readers:
        with pytest.raises(ValueError, match=re.escape(f"the records {place(path)} are damaged: ") + says):
            reader()


@pytest.mark.parametrize("name", ["5-{key}", "0-copy", "0-{key}-2"])
def test_a_copy_under_another_name_is_no_further_seed(copy, name):
    module, folder = copy
    path = store(module, folder)
    other = path.with_name(name.format(key=path.stem.split("-")[1]) + ".json")
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f"{place(other)} are damaged: by its content it is {place(path)}"):
        module.load()


@pytest.mark.parametrize("folders", ["tiny/usps/quick", "tiny/mnist_5k/laptop", "other/mnist_5k/quick"])
def test_a_copy_in_another_folder_is_refused(copy, folders):
    module, folder = copy
    path = store(module, folder)
    other = folder / "data/records" / folders / path.name
    other.parent.mkdir(parents=True)
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="which is another run"):
        module.load()


def test_records_of_different_runs_in_one_file_are_refused(copy):
    module, folder = copy
    first, second = store(module, folder), store(module, folder, parameters={"lr": 0.3}, method="IDEC")
    module.write(first, module.read(first) + module.read(second))
    with pytest.raises(ValueError, match="its records are of different runs"):
        module.read(first)


def test_a_file_of_the_first_schema_is_read_under_its_own_key(copy):
    module, folder = copy
    old, new = store(module, folder, schema=1, digest="1"), store(module, folder)
    assert old.stem != new.stem and module.read(old)[0]["digest"] == "1"
    text = old.read_text()
    old.write_text(text.replace('"schema": 1, ', ""))  # as the oldest files are
    assert module.read(old)[0]["digest"] == "1"
    old.write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="another run"):
        module.read(old)


def test_a_key_tells_runs_apart_by_code_parameters_and_threads_but_not_by_seed():
    keys = [records.run_key("a", {"seed": 0, "lr": 1.0}, 1), records.run_key("a", {"seed": 1, "lr": 1.0}, 1)]
    assert keys[0] == keys[1] and len(keys[0]) == 10
    others = [("b", {"lr": 1.0}, 1), ("a", {"lr": 2.0}, 1), ("a", {"lr": 1.0}, 2), ("a", {"lr": 1.0}, None)]
    assert len({keys[0], *(records.run_key(*other) for other in others)}) == 5


def test_what_is_written_is_read_back(copy):
    module, folder = copy
    path = store(module, folder, schema=1)
    found = module.read(path)
    path.unlink()
    path = path.with_name(f"0-{module.run_key('0', found[0]['parameters'], 1)}.json")
    module.write(path, found)
    assert module.read(path) == found and not list(path.parent.glob("*.part"))


def test_a_record_that_a_sweep_beside_us_removes_is_passed_over(copy):
    module, folder = copy
    path = store(module, folder)
    path.with_name("1-gone.json").symlink_to("nowhere.json")  # listed, and gone when it is read
    assert [record["seed"] for record in module.load()] == [0]


def test_load_filters_and_sorts(copy):
    module, folder = copy
    for seed in (10, 2):
        store(module, folder, seed=seed)
    store(module, folder, seed=2, study="gamma", parameters={"gamma": 1.0})
    store(module, folder, "IDEC", chapter="other", profile="laptop", dataset="usps")
    assert [(r["chapter"], r["seed"]) for r in module.load()] == [("other", 0), ("tiny", 2), ("tiny", 10)]
    assert [r["seed"] for r in module.load("tiny", study=None)] == [2, 2, 10]
    assert [r["study"] for r in module.load(study="gamma")] == ["gamma"]
    for key, value in [("dataset", "usps"), ("profile", "laptop"), ("method", "IDEC"), ("chapter", "other")]:
        assert [r["method"] for r in module.load(**{key: value})] == ["IDEC"], key
    assert module.load(method="VaDE") == []


def test_a_run_of_several_codes_counts_once_with_todays(copy):
    module, folder = copy
    notebook([("def f():\n    return 1", "definition", None)], folder / "book/chapters/tiny.ipynb")
    today = module.code.code_digest("tiny")
    for digest in (today, "older", "0ld"):
        store(module, folder, digest=digest, acc=0.8 if digest == today else 0.1, study=digest[:3])
    store(module, folder, digest="older", threads=2, acc=0.2)
    (record,) = module.load(study=None)
    assert record["acc"] == 0.8 and record["current"]
    assert [r["acc"] for r in module.load(study="0ld")] == [0.1]


def test_current_follows_the_chapter_and_in_its_absence_the_stored_digest(copy):
    module, folder = copy
    code, path = module.code, folder / "book/chapters/tiny.ipynb"
    notebook([("def f():\n    return 1", "definition", None)], path)
    store(module, folder, digest=code.code_digest("tiny"))
    assert module.load()[0]["current"]
    code.write_digest("tiny")
    notebook([("def f():\n    return 2", "definition", None)], path)
    assert not module.load()[0]["current"]
    path.unlink()
    assert module.load()[0]["current"]
    (folder / "data/records/tiny/digest.txt").unlink()
    assert not module.load()[0]["current"]
    assert module.body_hash(module.load()[0]) == module.load()[0]["sha256"]


def test_a_variant_is_the_headline_with_these_parameters_changed_and_no_others(copy):
    module, folder = copy
    both = {"study": "both", "parameters": {"lr": 0.2, "k": 3}}
    for seed in (0, 1):
        store(module, folder, seed=seed)
    store(module, folder, study="rates", parameters={"lr": 0.2})
    store(module, folder, **both)
    store(module, folder, "IDEC", seed=1, **both)
    store(module, folder, study="again", seed=2)  # the headline's parameters under another name
    store(module, folder, study="again", seed=1, digest="1")  # and a seed that the headline has
    asked = ("tiny", "mnist_5k", "quick", "DEC")
    assert [r["seed"] for r in module.variant(*asked)] == [0, 1, 2]
    assert [r["study"] for r in module.variant(*asked, lr=0.2)] == ["rates"]
    assert [r["seed"] for r in module.variant(*asked, lr=0.2, k=3)] == [0]
    assert [r["seed"] for r in module.variant(*asked[:3], "IDEC", lr=0.2, k=3)] == [1]
    assert module.variant(*asked, lr=0.3) == [] == module.variant("tiny", "mnist_5k", "quick", "VaDE")


def test_the_mean_over_records_is_none_where_there_are_none():
    assert records.mean([{"acc": 0.5}, {"acc": 1.0}], "acc") == 0.75 and records.mean([], "acc") is None


def test_scores_are_grouped_by_method_in_seed_order():
    found = [{"method": m, "seed": s, "acc": a} for m, s, a in [("b", 1, 0.1), ("a", 0, 0.2), ("b", 0, 0.3)]]
    grouped = records.by_method([*found, {"method": "c", "seed": 0, "nmi": 1.0}])
    assert grouped == {"b": [0.3, 0.1], "a": [0.2]} and list(grouped) == ["b", "a"]
