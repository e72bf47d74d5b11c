"""Every allowed value runs: chapters executed whole, on a few hundred digits, with random allowed parameters.

A draw must run to the last cell, or be refused by the check cell in a sentence, or be stopped by one of the
two guards of training (a loss that is not finite, a collapse), which say what happened. Anything else is an
allowed value that cannot run.
"""

import contextlib
import random

import golden
import pytest
import torch

from deepclust_nb import checks, data, plots, training
from deepclust_nb.places import chapter_file
from deepclust_nb.sweep import plan

CHAPTERS = sorted(path.stem for path in chapter_file("x").parent.glob("*.ipynb"))
# Upper ends that only cost time, never more than this here; and what makes a run short where it is not drawn.
COSTLY = {
    "epochs": 3,
    "pretrain_epochs": 3,
    "iterations": 60,
    "width": 6,
    "n_features": 64,
    "n_duplicates": 9,
}
COSTLY |= {"n_map": 120, "pretrain_iterations": 60}
COSTLY |= {"dcn_epochs": 3, "vade_epochs": 3, "vae_epochs": 3, "gmm_starts": 12}
COSTLY |= {"start_epochs": 3, "warm_epochs": 3}
COSTLY |= {"channels": 6, "n_latent": 24, "n_output": 24}
SHORT = {"epochs": 2, "pretrain_epochs": 1, "iterations": 12, "update_interval": 4, "width": 2}
SHORT |= {"n_features": 24, "n_map": 100, "batch_size": 64, "pretrain_iterations": 12, "interval": 4}
SHORT |= {"dcn_epochs": 2, "vade_epochs": 2, "vae_epochs": 1, "gmm_starts": 3}
SHORT |= {"start_epochs": 1, "warm_epochs": 2, "expert_widths": [16, 16]}
SHORT |= {"channels": 4, "n_latent": 8, "n_output": 8}
SIZES = dict.fromkeys(data.SIZES, (400, 200))
SHAPES = {"usps": (1, 16, 16), "svhn": (3, 32, 32), "cifar10_subset": (3, 32, 32)}


def few(n_train=400, n_test=200):
    """A stand-in for `data.load`: the first bundled digits, in the shape of the data set asked for."""
    whole = {part: data.load("mnist_5k", part) for part in ("train", "test")}

    def load(name, split="all"):
        parts = ("train", "test") if split == "all" else (split,)
        x = torch.cat([whole[part].x[: {"train": n_train, "test": n_test}[part]] for part in parts])
        y = torch.cat([whole[part].y[: len(x)][: {"train": n_train, "test": n_test}[part]] for part in parts])
        channels, height, width = SHAPES.get(name, (1, 28, 28))
        x = (
            x[:, :, :height, :width]
            if height < 28
            else torch.nn.functional.pad(x, (0, width - 28, 0, height - 28))
        )
        return data.Dataset(x.expand(-1, channels, -1, -1).contiguous(), y, name, split)

    return load


def allowed(chapter, monkeypatch):
    """The rules of a chapter's check cell: name -> list or pair."""
    rules = {}
    with monkeypatch.context() as patch:
        patch.setattr(checks, "parameters", lambda namespace, **found: rules.update(found))
        plan.refuse(chapter_file(chapter), plan.defaults(chapter_file(chapter)))
    return rules


NO_SETS = ("no range gives", "nobody has a neighbour")
# Values inside that leave a last batch of one, hardly an image a cluster, or hardly a label a class.
AWKWARD = {"n_images": [200, 201, 399, 500, 513], "n_labels": [10, 100, 101, 129], "batch_size": [3, 399]}


def values(name, rule):
    """Every option of a list; both ends of a range and values inside."""
    if isinstance(rule, list):
        return rule
    lo, hi = rule
    hi = min(hi, COSTLY.get(name, hi))
    inside = [(lo + hi) // 2 if isinstance(lo, int) else lo + 0.01 * (hi - lo)]
    return [lo, hi, *AWKWARD.get(name, inside)]


def runs_or_refuses(chapter, parameters, monkeypatch):
    """Execute a whole chapter; returns "ran", "refused" or "stopped"."""
    monkeypatch.setattr(data, "SIZES", SIZES)
    monkeypatch.setattr(
        training, "resolve_precision", lambda asked="auto": "float32"
    )  # bfloat16 is slow here
    try:
        plan.refuse(chapter_file(chapter), plan.defaults(chapter_file(chapter)) | parameters)
    except ValueError:
        return "refused"
    try:
        golden.run(chapter, few(), tags=None, double=False, tiny=False, **parameters)
    except (FloatingPointError, training.CollapseError):
        return "stopped"
    except ValueError as error:  # widths that no training kept in bounds: found out late, and told
        if str(error).startswith(NO_SETS):
            return "stopped"
        raise
    return "ran"


def draw(chapter, number, monkeypatch):
    """Random parameters that the check cell accepts: each its own (or a short) value, or an allowed one."""
    dice, rules = random.Random(f"{chapter} {number}"), allowed(chapter, monkeypatch)
    monkeypatch.setattr(data, "SIZES", SIZES)
    while True:
        own = {name: value for name, value in SHORT.items() if name in rules}
        for name, rule in rules.items():
            if dice.random() < 0.4:
                own[name] = dice.choice(values(name, rule))
        with contextlib.suppress(ValueError):
            plan.refuse(chapter_file(chapter), plan.defaults(chapter_file(chapter)) | own)
            return own


@pytest.mark.parametrize("number", range(10))
def test_random_allowed_parameters_run_or_are_refused(number, monkeypatch):
    chapter = CHAPTERS[number % len(CHAPTERS)]
    parameters = draw(chapter, number, monkeypatch)
    print(chapter, parameters)
    monkeypatch.setattr(plots, "_img", lambda *given: "<img>")  # drawing takes most of the time
    runs_or_refuses(chapter, parameters, monkeypatch)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(10, 200))
def test_many_random_allowed_parameters_run_or_are_refused(number, monkeypatch):
    chapter = CHAPTERS[number % len(CHAPTERS)]
    parameters = draw(chapter, number, monkeypatch)
    print(chapter, parameters)
    runs_or_refuses(chapter, parameters, monkeypatch)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_both_ends_and_the_inside_of_every_range_run_or_are_refused(chapter, monkeypatch):
    rules, ran = allowed(chapter, monkeypatch), {}
    for name, rule in rules.items():
        for value in values(name, rule):
            parameters = {key: short for key, short in SHORT.items() if key in rules} | {name: value}
            print(name, value)
            ran.setdefault(name, []).append(runs_or_refuses(chapter, parameters, monkeypatch))
    assert all("ran" in outcomes for outcomes in ran.values()), ran
