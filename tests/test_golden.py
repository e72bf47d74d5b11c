"""Golden runs of every module that has some, and that the harness sees how something was trained."""

import json
from pathlib import Path

import golden
import pytest
import torch
from torch import nn

from deepclust_nb import training

CHAPTERS = sorted(
    path.stem.removeprefix("test_")
    for path in Path(__file__).parent.glob("test_*.py")
    if "\nGOLDEN = " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize(
    ("chapter", "case"), [(chapter, case) for chapter in CHAPTERS for case in golden.cases(chapter)]
)
def test_todays_code_gives_the_stored_numbers(chapter, case):
    if others := golden.other_versions():
        pytest.skip(f"the stored numbers are of the versions in constraints.txt, not of {', '.join(others)}")
    golden.check(chapter, case)


def test_stored_numbers_belong_to_a_case_and_are_small():
    for path in golden.FOLDER.glob("*.json"):
        assert set(json.loads(path.read_text(encoding="utf-8"))) == set(golden.cases(path.stem)), path.name
        assert path.stat().st_size <= 300 * 1024, path.name


def little(**changed):
    """Numbers of three steps on a network with all that can be set; `changed` says what is different."""
    how = dict(dropout=nn.Dropout(0.5), start=nn.init.xavier_uniform_, seed=0, first=0, kind="SGD", epochs=1)
    how |= dict(mode=True, settings=dict(lr=0.1, momentum=0.9), reduction="mean") | changed
    with golden.watched(golden.digits()) as seen:
        training.seed_everything(how["seed"])
        model = nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), how["dropout"])
        model.append(nn.Flatten()).append(nn.Linear(144, 3)).train(how["mode"])
        how["start"](model[0].weight)
        x = golden.digits()("any", "train").x[how["first"] :].double() / 255
        optimizer = getattr(torch.optim, how["kind"])(model.parameters(), **how["settings"])
        for step in training.steps(len(x), 16, epochs=how["epochs"], seed=0):
            target = torch.zeros(len(step.index), dtype=torch.int64)
            loss = nn.functional.cross_entropy(model(x[step.index]), target, reduction=how["reduction"])
            step.update(optimizer, loss, {"loss of all": loss})
    return golden.summary({"model": model}, seen)


@pytest.mark.parametrize(
    "changed",
    [
        {"dropout": nn.Dropout2d(0.5)},
        {"dropout": nn.Dropout(0.4)},
        {"start": nn.init.xavier_normal_},
        {"start": nn.init.kaiming_uniform_},
        {"start": lambda weight: weight},
        {"seed": 1},
        {"first": 1},
        {"mode": False},
        {"epochs": 2},
        {"reduction": "sum"},
        {"settings": dict(lr=0.1, momentum=0.99)},
        {"settings": dict(lr=0.1, momentum=0.9, nesterov=True)},
        {"settings": dict(lr=0.1, momentum=0.9, weight_decay=1e-5)},
        {"kind": "Adam", "settings": dict(lr=0.1)},
    ],
    ids=lambda changed: " ".join(changed),
)
def test_another_way_of_training_is_seen(changed):
    assert golden.differences(little(**changed), little())


def test_the_same_training_gives_the_same_numbers():
    assert golden.differences(little(), little()) == []


def test_differences_name_the_place():
    stored = {"steps": [{"loss": 1.0}, {"loss": 2.0}], "kind": "SGD", "~arrays": {"curve": [0.5]}}
    found = json.loads(json.dumps(stored))
    found["steps"][1]["loss"] *= 1 + 1e-7
    found["~arrays"]["curve"][0] += 1e-4
    assert golden.differences(found, stored) == []
    found["steps"][1]["loss"] = 2.00001
    assert golden.differences(found, stored) == ["/steps[1]/loss: 2.00001, stored is 2.0"]
    found = stored | {"kind": "Adam", "steps": stored["steps"][:1]}
    problems = golden.differences(found, stored)
    assert problems == ["/steps: 1 entries, stored are 2", "/kind: Adam, stored is SGD"]
    assert golden.differences({}, {"fits": []}) == ["/fits: only in one"]


@pytest.mark.parametrize(("found", "stored"), [("nan", 1.0), (1.0, "nan"), ([1.0], 1.0), (True, 1.0)])
def test_another_kind_of_value_is_a_difference(found, stored):
    assert golden.differences(golden.plain(found), stored)


def test_a_checksum_sees_an_exchange_of_two_entries():
    values = torch.arange(6.0)
    assert golden.checksum(values) == golden.checksum(values.numpy())
    other = golden.checksum(values[[0, 2, 1, 3, 4, 5]])
    assert other[0] == golden.checksum(values)[0] and other[1] != golden.checksum(values)[1]


def test_an_unknown_parameter_is_refused():
    with pytest.raises(KeyError, match="foundations has no parameter epoch"):
        golden.run("foundations", epoch=1)
