"""Labels cannot choose: with shuffled labels a chapter trains, clusters and tells the same, bit by bit.

What may differ stands in the table below, for each chapter: the fields of a record that are scores, and the
columns of its arrays. Everything else that a run does is compared. Labels that a method is given stay.
"""

import functools
import hashlib

import golden
import numpy as np
import pytest
import torch
from loader import chapter_file
from torch import nn

from deepclust_nb import metrics, networks, records

SCORES = {"acc", "purity", "nmi", "ari"}
SHARES = {"macro", "micro", "cosine", "euclid", "output", "pixels", "radius"}  # of neighbours, by code
# So little data and training that starts, steps and answers differ: a choice by score shows.
TABLE = {
    "foundations": {
        "classes": 10,
        "parameters": dict(pretrain_epochs=2, batch_size=16, iterations=8, update_interval=2, tol=0.0)
        | dict(side=0, narrow=1, augment=False, dec_optimizer="sgd", dec_lr=0.1, pretrain_lr=0.001),
        "scores": SCORES | {"randomness"},
        "columns": {"curve": [0]},
    },
    "dynae": {
        "classes": 10,
        "parameters": dict(widths=[32, 32, 32], start="trained", pretrain_iterations=6, batch_size=16)
        | dict(
            iterations=8, interval=2, lr=0.05, kappa=3.0, max_share=1.0, tol=0.0, rivals="all", classical=True
        ),
        "scores": SCORES | {"start_acc", "looks", "randomness", "randomness_first", "randomness_last"},
        "columns": {"curve": [1, 2, 3, 6, 7, 8, 9]},
    },
    "acol_gar": {
        "classes": 10,
        "parameters": dict(side=8, width=2, n_features=16, epochs=3, batch_size=16, lr=0.01, n_looks=6)
        | dict(n_duplicates=4, averaging=0.5),
        "scores": SCORES
        | {"acc_z", "acc_softmax", "looks"}
        | {
            f"{score}_k{k}{place}"
            for score in ("purity", "kept_whole", "groups")
            for k in (7, 20)
            for place in ("", "_pixels")
        },
        "columns": {"curve": [1], "labels": [0]},
    },
    "semicatvae": {
        "classes": 3,
        "parameters": dict(width=2, n_features=8, n_labels=9, epochs=4, batch_size=8, lr=0.01, n_looks=4)
        | dict(with_self_training=True),
        "scores": SCORES
        | {f"{name}_error" for name in ("fresh", "nearest", "pixel", "linear", "probe")}
        | {"error", "borrowed_wrong"},
        "columns": {"curve": [1, 2], "labels": [0]},
    },
    "vae": {
        "classes": 10,
        "parameters": dict(widths=[32, 32, 32], start="trained", likelihood="bernoulli", batch_size=16)
        | dict(pretrain_epochs=1, gmm_starts=6, dcn_epochs=2, dcn_lr=0.01, vade_epochs=2, lr=0.01)
        | dict(mixture_lr=0.01, interval=3, max_share=1.0),
        "scores": SCORES | {"start_acc", "gmm_acc"},
        "inside": {"looks": {"acc"}},  # of a record's dict: one of its entries
        "columns": {"curve": [1]},
    },
    "kdvae": {
        "classes": 10,
        "parameters": dict(start="vade", start_widths=[32, 32, 32], expert_widths=[16, 16], batch_size=16)
        | dict(n_clusters=6, vade_epochs=2, warm_epochs=2, epochs=3, lr=0.01, max_share=1.0),
        # a judge of real images reads the drawn ones: fitted with labels, it serves this score alone
        "scores": SCORES | {"start_acc", "drawn"},
        "inside": {"looks": {"acc"}},
    },
    "acvae": {
        "classes": 10,
        "images": dict(n_train=130, n_test=110),  # a hundred neighbours
        "parameters": dict(
            dataset="mnist_5k", channels=4, n_latent=6, n_output=5, iterations=4, batch_size=22
        )
        | dict(flip=False, lr=0.01, kl_weight=0.05),
        "scores": SCORES | {"neighbour_accuracy_10", "neighbour_accuracy_100", "nearest"},
        # sizes, widths and the ranges that were chosen must not follow the labels; shares of a class do
        "inside": {f"at_{name}": SHARES for name in ("10", "100", "alpha")}
        | {"insight": {"class", "class_in"}, "alphas": {"macro", "micro"}, "thetas": {"macro", "micro"}},
    },
}
CHAPTERS = sorted(path.stem for path in chapter_file("foundations").parent.glob("*.ipynb"))


def relabelled(load, kept, seed=0, said=None):
    """`load` with other labels, those of the training images `kept` aside.

    Shuffled, or of the scored images (all, or the test images) what a method said of them: then its answers
    are the best that there can be.
    """
    generator, labels = torch.Generator().manual_seed(seed), {}
    for part in ("train", "test"):
        y = load("any", part).y.clone()
        hidden = torch.tensor([i for i in range(len(y)) if part == "test" or i not in kept])
        y[hidden] = y[hidden[torch.randperm(len(hidden), generator=generator)]]
        labels[part] = y
    labels["all"] = torch.cat([labels["train"], labels["test"]])
    if said is not None:
        labels["all" if len(said) == len(labels["all"]) else "test"] = torch.as_tensor(said)
    return lambda name, split="all": load(name, split)._replace(y=labels[split])


def is_label(values, namespace):
    """Are these the first labels of the data?"""
    truths = [torch.as_tensor(namespace[name]).cpu() for name in ("y", "y_test") if name in namespace]
    return any(np.array_equal(values, truth[: len(values)]) for truth in truths)


def digest(values):
    array = np.ascontiguousarray(torch.as_tensor(values).detach().cpu().numpy())
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def flat(value, place=""):
    """(place, leaf) pairs of nested dicts and lists."""
    if not isinstance(value, dict | list):
        return [(place, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(place, f"{len(value)} entries")] + [x for k, v in items for x in flat(v, f"{place}/{k}")]


def spy_of(score, scored):
    """The score, which also notes what it is given."""

    def spy(first, second, *rest, **options):
        scored.append([score.__name__, np.array(first), np.array(second)])
        return score(first, second, *rest, **options)

    return spy


def done(chapter, load, picked=None, **more):
    """All that a run does and tells beside its scores; places there that hold labels; its namespace."""
    scored = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("accuracy", "purity", "nmi", "ari", "match", "confusion", "neighbour_accuracy"):
            patch.setattr(metrics, name, spy_of(getattr(metrics, name), scored))
        table = TABLE[chapter]
        if not {"widths", "start_widths", "n_latent"} & set(table["parameters"]):
            patch.setattr(networks, "Autoencoder", functools.partial(networks.Autoencoder, widths=(40,)))
        namespace, seen = golden.run(chapter, load, double=False, picked=picked, **table["parameters"] | more)
    namespace["predicted"] = seen.predicted
    found = {"steps": seen.steps, "loops": seen.loops, "clock": seen.clock, "records": [], "arrays": []}
    found["scored"] = [[name, *map(digest, both)] for name, *both in scored]
    labels = {
        f"/scored/{i}/{j}"
        for i, (_, *both) in enumerate(scored)
        for j, values in enumerate(both, 1)
        if is_label(values, namespace)
    }
    found["predicted"] = {method: digest(answers) for method, answers in seen.predicted.items()}
    found["weights"] = {
        name: {key: digest(value) for key, value in model.state_dict().items()}
        for name, model in namespace.items()
        if isinstance(model, nn.Module)
    }
    supervised = "LogisticRegression"
    found["fits"] = [fit if fit["kind"] != supervised else fit | {"y": None} for fit in seen.fits]
    for record in seen.records:
        left_out = table["scores"] | {"arrays"}
        kept = {key: value for key, value in record.items() if key not in left_out}
        for name in table.get("inside", {}).keys() & kept.keys():
            kept[name] = {k: v for k, v in kept[name].items() if k not in table["inside"][name]}
        found["records"].append(kept)
        arrays = {}
        for name, values in records.arrays(record).items():
            columns = values.reshape(len(values), -1).copy()
            columns[:, [c for c in table["columns"].get(name, []) if c < columns.shape[1]]] = 0
            arrays[name] = digest(columns)
        found["arrays"].append(arrays)
    return dict(flat(found)), labels, namespace


def what_labels_choose(chapter, seeds=(0, 1), said=True, **more):
    """Places where runs with other labels differ from the run with the true ones."""
    table = TABLE[chapter]
    load = golden.digits(n_classes=table["classes"], **table.get("images", {}))
    true, labels, namespace = done(chapter, load, **more)
    picked = namespace.get("picked")
    kept = [] if picked is None else namespace["order"][picked.cpu()].tolist()
    others = [relabelled(load, kept, seed) for seed in seeds]
    others += [relabelled(load, kept, said=answers) for answers in namespace["predicted"].values() if said]
    places = set()
    for other in others:
        found, labels_then, _ = done(chapter, other, picked, **more)
        differ = {place for place in true | found if true.get(place, "") != found.get(place, "")}
        places |= differ - (labels & labels_then)
    return sorted(places)


def test_every_chapter_says_what_its_labels_may_change():
    assert sorted(TABLE) == CHAPTERS


@pytest.mark.parametrize("chapter", TABLE)
def test_labels_choose_nothing(chapter):
    assert what_labels_choose(chapter) == []


def test_labels_choose_nothing_in_acol_gars_rival():
    assert what_labels_choose("acol_gar", seeds=[0], said=False, with_imsat=True, epochs=1, n_looks=1) == []
