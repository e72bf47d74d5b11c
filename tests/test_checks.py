"""A chapter's parameters: what is refused, what is nobody's typo, and both ends of every range."""

import json
import re

import pytest
import torch

from deepclust_nb import checks

ALLOWED = {
    "dataset": ["mnist_5k", "fashion_5k"],
    "seed": (0, 100),
    "lr": (0.0, 1.0),
    "log": [True, False],
    "layers": [[500, 20]],
    "k": [1, None],
}
GOOD = {"dataset": "mnist_5k", "seed": 3, "lr": 1, "log": True, "layers": [500, 20], "k": None}


def test_good_parameters_come_back_in_the_declared_order():
    namespace = {"_hidden": 1, "In": [], "Out": {}, "module": json, "function": len} | GOOD
    assert checks.parameters(namespace, **ALLOWED) == GOOD
    assert list(checks.parameters(namespace, **ALLOWED)) == list(ALLOWED)


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
        checks.parameters(GOOD | {name: value}, **ALLOWED)


def test_a_declared_parameter_that_the_cell_does_not_set_is_named():
    namespace = {name: value for name, value in GOOD.items() if name != "log"}
    with pytest.raises(ValueError, match="log is declared here"):
        checks.parameters(namespace, **ALLOWED)


PAPERMILLS, OWN = "# Parameters\nsede = {value!r}", "sede: int = {value!r}\nlr = 1"


@pytest.mark.parametrize("cell", [PAPERMILLS, OWN], ids=["papermill's cell", "parameters cell"])
@pytest.mark.parametrize("value", [1, 1.0, "a", None, True, [1], (1,), {"a": 1}])
def test_an_undeclared_name_among_the_parameters_is_refused_with_the_closest(cell, value):
    namespace = GOOD | {"sede": value, "In": ["", "%time\n!ls", cell.format(value=value)]}
    with pytest.raises(ValueError, match="sede is not a parameter of this chapter: did you mean seed?"):
        checks.parameters(namespace, **ALLOWED)


def test_a_global_from_elsewhere_is_nobodys_typo():
    """As of a startup file, of which IPython keeps no cell, or of a cell that sets no parameter."""
    cells = ["", "lr = 1\nseed = 3\ndataset = 'mnist_5k'", "editor = 'vi'\nlevels = [1]"]
    namespace = GOOD | {"editor": "vi", "levels": [1], "sede": 1, "In": cells}
    assert checks.parameters(namespace, **ALLOWED) == GOOD


def test_a_name_that_the_cell_sets_to_no_plain_value_or_with_an_underscore_passes():
    cells = ["", "lr = 1\nmodule = json\n_kept = 1"]
    assert checks.parameters(GOOD | {"module": json, "_kept": 1, "In": cells}, **ALLOWED) == GOOD


def test_a_second_call_still_checks_values_but_no_longer_other_globals():
    namespace = GOOD | {"In": [""]}
    checks.parameters(namespace, **ALLOWED)
    namespace |= {"loss": 0.5, "In": ["", "lr = 1\nloss = 0.5"]}
    assert checks.parameters(namespace, **ALLOWED) == GOOD
    namespace["seed"] = -1
    with pytest.raises(ValueError, match="seed must be"):
        checks.parameters(namespace, **ALLOWED)


def test_a_failed_call_does_not_count_as_the_first():
    namespace = GOOD | {"sede": 1, "In": ["# Parameters\nsede = 1"]}
    for _ in range(2):
        with pytest.raises(ValueError, match="sede"):
            checks.parameters(namespace, **ALLOWED)


@pytest.mark.parametrize(("name", "ends"), [("seed", (0, 100)), ("lr", (0.0, 1.0)), ("lr", (0, 1))])
def test_both_ends_of_a_range_are_allowed(name, ends):
    for value in ends:
        assert checks.parameters(GOOD | {name: value}, **ALLOWED)[name] == value


def test_every_mistake_has_a_line():
    namespace = GOOD | {"seed": -1, "lr": 2.0, "sede": 1, "In": ["# Parameters\nsede = 1"]}
    with pytest.raises(ValueError) as error:
        checks.parameters(namespace, **ALLOWED)
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["seed", "lr", "sede"]


def test_parameters_that_do_not_fit_together_are_refused_in_the_given_words():
    checks.require(True, "a must be b")
    with pytest.raises(ValueError, match="^a must be b$"):
        checks.require(False, "a must be b")


def test_assignments_are_found_annotated_or_not():
    found = checks.assigned("a = b = 1\nc: int = 2  # why\nif a:\n    d = 3\ne, f = 4, 5")
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert checks.assigned("%time x = 1") == []


def test_a_precision_that_loses_gradients_is_told(monkeypatch):
    assert checks.keeps_gradients("float32") and checks.keeps_gradients("bfloat16")

    def forgetful(n, m):
        layer, seen = linear(n, m), []

        def call(x):
            seen.append(layer(x))
            return seen[0]  # as it was in the first use

        return call

    linear = torch.nn.Linear
    monkeypatch.setattr(torch.nn, "Linear", forgetful)
    assert checks.keeps_gradients("float32") and not checks.keeps_gradients("bfloat16")
    assert not checks.keeps_gradients("auto")
