"""The chapter `vae`: what it shows is what the helper runs, and DCN and VaDE are set going as it says."""

import ast
import functools
import inspect
import itertools
import json
import textwrap
import types

import golden
import numpy as np
import pytest
import torch
from loader import cell_with, chapter_file, definitions

from deepclust_nb import baselines, checks, data, metrics, mixtures, records, training

CHAPTER = "vae"
checked = functools.partial(golden.checked, CHAPTER)
# On 88 images of three classes. No setting has its default's value, so that each must be passed on to count;
# six clusters, so that mixtures differ between starts and the likeliest is not a matter of rounding.
TINY = dict(start="trained", widths=[32, 32, 32], n_clusters=6, batch_size=22, pretrain_epochs=2)
TINY |= dict(pretrain_lr=0.003, gmm_starts=4, dcn_weight=5.0, dcn_lr=0.002, dcn_epochs=3, vade_epochs=4)
TINY |= dict(reconstruction_weight=3.0, lr=0.004, mixture_lr=0.03, interval=5, max_share=1.0)
# VaDE's own schedule moves after ten passes
PUBLISHED = dict(likelihood="bernoulli", degrees=0.0, shift=0.0, schedule="steps", margin=0, side=0)
PUBLISHED |= dict(reconstruction_weight=1.0, mixture_lr=0.001, vade_epochs=11, batch_size=44, seed=3)


def case(**parameters):
    """A function to the numbers of one run, what each look told among them."""

    def summary():
        namespace, seen = golden.run(CHAPTER, **parameters)
        traces = {name: namespace[name] for name in ("dcn_trace", "trace") if name in namespace}
        told = {
            name: [{k: v for k, v in row.items() if k != "view"} for row in rows]
            for name, rows in traces.items()
        }
        return golden.summary(namespace, seen) | {"traces": golden.plain(told)}

    return summary


GOLDEN = {
    "defaults": lambda: golden.plain(checked()),
    "published: bernoulli, no moves, steps": case(**TINY | PUBLISHED),
    "gaussian, always moved, cosine": case(**TINY, degrees=25.0, shift=0.2, seed=1),
    "a moved start, constant rates": case(
        **TINY | dict(moved="start", schedule="constant", likelihood="bernoulli", interval=3, n_images=70)
    ),
    "no DCN": case(**TINY | dict(dcn_epochs=0, degrees=0.0, margin=3, side=9, reconstruction_weight=0.5)),
    "the stored start": case(
        n_clusters=6, batch_size=44, gmm_starts=4, dcn_epochs=3, vade_epochs=3, interval=2, max_share=1.0
    ),
}


@pytest.fixture(scope="module")
def vae():
    return definitions(CHAPTER)


@pytest.fixture(scope="module")
def whole():
    """A run whose starts, rates and loops are all told apart: what it left behind, and what was seen."""
    return golden.run(CHAPTER, **TINY, degrees=25.0, shift=0.2, seed=1)


# ---------------------------------------------------------------- what is shown


def tree(function):
    """A function's syntax tree without its docstring."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


@pytest.mark.parametrize("name", ["running_mean", "gaussian_kl", "vade_bound"])
def test_shown_functions_are_the_helpers(vae, name):
    shown, used = getattr(vae, name), getattr(mixtures, name)
    assert shown is not used and tree(shown) == tree(used)
    assert len(inspect.getsource(shown).splitlines()) <= 25
    assert vae.LOG_VARIANCES is mixtures.LOG_VARIANCES


def test_timed_gives_the_result_and_the_seconds_of_the_call(vae, monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(vae.time, "perf_counter", lambda: next(clock))
    assert vae.timed(sorted, [2, 1], reverse=True) == ([2, 1], 2.5)


def test_what_is_not_published_has_a_name_of_its_own(vae):
    assert vae.named("VaDE", lambda images: images) == "VaDE (augmented)"
    assert vae.named("VaDE", None) == "VaDE" and vae.named("AE+GMM", False) == "AE+GMM"


# ---------------------------------------------------------------- mixtures to start from


def test_each_mixture_has_a_seed_of_its_own_that_no_other_run_has(vae, monkeypatch):
    asked = []

    def spy(z, n_clusters, seed, n_init=5):
        asked.append((z, n_clusters, seed, n_init))
        return seed, None

    monkeypatch.setattr(baselines, "gmm", spy)
    codes = object()
    runs = [[seed for seed, _ in vae.fitted_mixtures(codes, 7, seed, 100)] for seed in range(4)]
    assert len(set(itertools.chain(*runs))) == 400 and runs[0] == list(range(100))
    assert all(given == (codes, 7, given[2], 1) for given in asked)
    # more starts are the same starts and others
    assert [seed for seed, _ in vae.fitted_mixtures(codes, 7, 2, 3)] == runs[2][:3]


def test_mixtures_are_fitted_to_the_codes_and_told_with_their_labels(vae):
    torch.manual_seed(0)
    z = torch.randn(60, 2) + 6 * torch.eye(3)[:, :2].repeat(20, 1)
    fits = vae.fitted_mixtures(z, 3, 5, 4)
    assert len(fits) == 4 and [fitted.random_state for _, fitted in fits] == [5000, 5001, 5002, 5003]
    for labels, fitted in fits:
        assert np.array_equal(labels, fitted.predict(z.double().numpy())) and fitted.means_.shape == (3, 2)


def test_the_likeliest_is_taken_and_not_the_one_closest_to_the_labels(vae):
    fits = [
        (name, types.SimpleNamespace(lower_bound_=value))
        for name, value in zip("abcd", (-3, 2, 1, 2.0), strict=True)
    ]
    assert vae.likeliest(fits) is fits[1]
    assert vae.likeliest(fits[2:3]) is fits[2]
    # by the likelihood of the codes at hand, recomputed here
    torch.manual_seed(0)
    z = torch.randn(80, 3).double()
    fits = vae.fitted_mixtures(z, 6, 0, 8)
    scores = [fitted.score(z.numpy()) for _, fitted in fits]
    assert vae.likeliest(fits) is fits[int(np.argmax(scores))]
    assert max(scores) > scores[0]


def test_the_record_tells_all_mixtures_in_order_and_holds_the_likeliest(monkeypatch):
    """The likeliest is neither first nor last nor best, and its labels and parameters are the ones used."""
    fits, gmm = [], baselines.gmm
    bounds, right = (-7.0, -2.25, -4.0, -9.0), (1.0, 0.25, 0.5, 0.75)

    def spy(z, n_clusters, seed, n_init=5):
        labels, fitted = gmm(z, n_clusters, seed, n_init)
        fitted.lower_bound_, fitted.means_ = bounds[len(fits)], fitted.means_ + len(fits)
        fits.append((labels + 10 * len(fits), fitted))
        return fits[-1]

    monkeypatch.setattr(baselines, "gmm", spy)
    monkeypatch.setattr(metrics, "accuracy", lambda y, labels: right[min(max(labels) // 10, 3)])
    namespace, seen = golden.run(CHAPTER, **TINY)
    record = namespace["by_gmm"]
    assert record["gmm_likelihood"] == [*bounds] and record["gmm_acc"] == [*right]
    assert np.array_equal(seen.predicted["AE+GMM (augmented)"], fits[1][0])
    _, mixture = namespace["before"]
    torch.testing.assert_close(mixture.means.detach(), torch.as_tensor(fits[1][1].means_))


# ---------------------------------------------------------------- what is kept of a run


def looks(n):
    """Hand-made looks at five images in three clusters."""
    torch.manual_seed(0)
    for i in range(n):
        labels = np.array([0, 1, 2, i % 3, 2])
        sizes = torch.bincount(torch.as_tensor(labels), minlength=3)
        losses = {"reconstruction": 100.0 - i, "prior": -1.0 * i} if i else {}
        yield types.SimpleNamespace(
            iteration=40 * i, embedding=torch.randn(5, 2), labels=labels, changed=1 / (i + 1), sizes=sizes,
            losses=losses,
        )  # fmt: skip


def test_a_run_is_followed_whole(vae):
    states, y = list(looks(4)), np.array([2, 0, 1, 2, 1])
    state, trace = vae.follow(iter(states), y, n_view=3)
    assert state is states[-1] and len(trace) == 4
    for row, at in zip(trace, states, strict=True):
        assert torch.equal(row.pop("view"), at.embedding[:3])
        share = max(np.bincount(at.labels)) / 5
        assert row.pop("largest") == pytest.approx(share)
        assert row.pop("acc") == metrics.accuracy(y, at.labels)
        assert row == {"iteration": at.iteration, "changed": at.changed} | at.losses
    assert [metrics.accuracy(y, at.labels) for at in states] == [1.0, 0.8, 0.8, 1.0]
    assert inspect.signature(vae.follow).parameters["n_view"].default == 800


@pytest.mark.parametrize(
    ("n", "kept"),
    [
        (1, [0]),
        (2, [0, 1]),
        (5, [0, 1, 2, 3, 4]),
        (12, [*range(12)]),
        (23, [*range(0, 23, 2)]),
        (31, [0, 3, 5, 8, 11, 14, 16, 19, 22, 25, 27, 30]),
    ],
)
def test_at_most_twelve_looks_are_told_from_first_to_last(vae, n, kept):
    state, trace = vae.follow(looks(n), np.array([2, 0, 1, 2, 1]), n_view=3)
    told = vae.told(state, trace)
    assert told["looks"]["iteration"] == [40 * i for i in kept]
    for name in ("acc", "changed", "largest"):
        assert told["looks"][name] == [round(trace[i][name], 4) for i in kept]
    assert sorted(told["looks"]) == ["acc", "changed", "iteration", "largest"]
    # the curve has all of them
    expected = [[row["iteration"] / 1000, row["acc"], row["changed"], row["largest"]] for row in trace]
    torch.testing.assert_close(told["arrays"]["curve"], torch.tensor(expected))


def test_a_record_is_told_the_last_losses_and_the_first_and_last_codes(vae):
    state, trace = vae.follow(looks(6), np.array([2, 0, 1, 2, 1]), n_view=3)
    told = vae.told(state, trace)
    assert told["steps"] == 200 and told["reconstruction"] == 95.0 and told["prior"] == -5.0
    assert set(told) == {"steps", "reconstruction", "prior", "looks", "arrays"}
    assert set(told["arrays"]) == {"curve", "code_first", "code", "labels"}
    assert torch.equal(told["arrays"]["code_first"], trace[0]["view"])
    assert torch.equal(told["arrays"]["code"], state.embedding[:3])
    assert told["arrays"]["labels"].tolist() == state.labels[:3].tolist()


def test_what_is_kept_fits_into_a_record(vae):
    """At 800 codes of ten numbers and 2,000 looks, the most that the check lets pass, 64 KiB hold it all."""
    state, trace = vae.follow(looks(1), np.array([2, 0, 1, 2, 1]))
    row = trace[0] | {"view": torch.randn(800, 10)}
    state.labels = np.arange(70_000) % 10
    arrays = vae.told(state, [row] * 2001)["arrays"]
    assert arrays["code"].shape == (800, 10) and arrays["labels"].shape == (800,)
    assert 2 * sum(values.numel() for values in arrays.values()) <= 64 * 1024


# ---------------------------------------------------------------- the run


def test_every_method_is_scored_on_the_labels_of_its_own_images():
    """Images are shuffled with their labels, by the same order for every seed."""
    namespace, seen = golden.run(CHAPTER, **TINY | dict(n_images=70, seed=5))
    load = golden.digits()("any", "all")
    order = torch.randperm(88, generator=torch.Generator().manual_seed(0))[:70]
    cut = data.cropped(load.x[order], 2, 16)
    assert (namespace["x"].int() - cut.int()).abs().max() <= 1  # rounded from float64 there
    assert namespace["x"].shape == (70, 1, 16, 16) and namespace["y"].tolist() == load.y[order].tolist()
    names = [f"{method} (augmented)" for method in ("AE+k-means", "AE+GMM", "DCN", "VaDE")]
    assert [record["method"] for record in seen.records] == names
    golden.assert_scored(seen, load.y[order])
    for record in seen.records:
        assert record["n_scored"] == 70 and record["chapter"] == CHAPTER and record["seed"] == 5
        assert record["parameters"] == namespace["parameters"]
    assert np.array_equal(namespace["dcn"].labels, seen.predicted["DCN (augmented)"])
    assert np.array_equal(namespace["vade"].labels, seen.predicted["VaDE (augmented)"])
    assert namespace["how"] == {"batch_size": 22, "seed": 5, "precision": "float32"}


def test_names_and_order_without_moves_and_without_dcn():
    few = dict(degrees=0.0, shift=0.0, dcn_epochs=0, vade_epochs=1, pretrain_epochs=1)
    namespace, seen = golden.run(CHAPTER, **TINY | few)
    assert [record["method"] for record in seen.records] == ["AE+k-means", "AE+GMM", "VaDE"]
    assert namespace["view"] is None and "dcn" not in namespace
    assert [loop["title"] for loop in seen.loops] == ["autoencoder", "VaDE"]


def test_each_record_counts_the_work_of_its_method(whole):
    """A step costs 1, k-means 100, a mixture 1000 and the k-means that it starts from 100."""
    _, seen = whole
    seconds = {record["method"].split(" ")[0]: record["seconds"] for record in seen.records}
    pretraining = 2 * 4
    mixtures_of_start = pretraining + 4 * (1000 + 100)
    assert seconds == {
        "AE+k-means": pretraining + 100,
        "AE+GMM": mixtures_of_start,
        "DCN": pretraining + 100 + 12,
        "VaDE": mixtures_of_start + 16,
    }
    own = {r["method"].split(" ")[0]: r["own_seconds"] for r in seen.records if "own_seconds" in r}
    assert own == {"DCN": 12, "VaDE": 16}


def test_start_acc_is_that_of_the_method_each_starts_from(whole):
    namespace, seen = whole
    acc = {record["method"].split(" ")[0]: record["acc"] for record in seen.records}
    start = {r["method"].split(" ")[0]: r["start_acc"] for r in seen.records if "start_acc" in r}
    assert start == {"DCN": acc["AE+k-means"], "VaDE": acc["AE+GMM"]}
    assert acc["AE+k-means"] != acc["AE+GMM"]
    # and the first look finds what the start is scored with: nearest centres, and nearly the mixture's labels
    assert namespace["dcn_trace"][0]["acc"] == pytest.approx(acc["AE+k-means"])


def test_both_start_from_the_pretrained_network_and_dcn_leaves_vades_alone(whole):
    namespace, _ = whole
    pretrained, bells = namespace["before"]
    z = namespace["z"]
    for trace in (namespace["dcn_trace"], namespace["trace"]):
        assert torch.equal(trace[0]["view"], z) and trace[0]["iteration"] == 0
        assert not torch.allclose(trace[-1]["view"], z)
    pixels = namespace["x"].flatten(1).double() / 255
    ends = (pretrained, z), (namespace["model"], namespace["vade"].embedding)
    for model, codes in (*ends, (namespace["dcn_model"], namespace["dcn"].embedding)):
        torch.testing.assert_close(model.encode(pixels).detach(), codes)
    likelihoods = namespace["by_gmm"]["gmm_likelihood"]
    _, fitted = baselines.gmm(z, 6, 1000 + likelihoods.index(max(likelihoods)), n_init=1)
    torch.testing.assert_close(bells.means.detach(), torch.as_tensor(fitted.means_))
    torch.testing.assert_close(
        bells.log_variances.detach(), torch.as_tensor(fitted.covariances_).log().clamp(-8, 8)
    )
    assert torch.equal(bells.logits, torch.zeros(6))  # equal weights, as in the public code
    assert not torch.allclose(bells.means, namespace["mixture"].means)
    gamma = namespace["mixture"].responsibilities(namespace["vade"].embedding)
    assert np.array_equal(gamma.argmax(dim=1), namespace["vade"].labels)


def test_codes_are_those_of_the_images_as_they_are(whole):
    namespace, seen = whole
    pixels = namespace["x"].flatten(1).double() / 255
    pretrained, _ = namespace["before"]
    torch.testing.assert_close(namespace["z"], pretrained.encode(pixels).detach())
    fits = [fit for fit in seen.fits if fit["kind"] == "GaussianMixture" or fit["settings"]["n_init"] != "1"]
    told = [("KMeans", "20", "1")] + [("GaussianMixture", "1", str(1000 + i)) for i in range(4)]
    for fit, (kind, n_init, state) in zip(fits, told, strict=True):
        assert (fit["kind"], fit["settings"]["n_init"]) == (kind, n_init)
        assert fit["settings"]["random_state"] == state and fit["shape"] == [88, 10]
        assert fit["x"] == pytest.approx(golden.checksum(namespace["z"]), abs=1e-6)
        assert fit["settings"].get("n_clusters", fit["settings"].get("n_components")) == "6"
    labels, means = baselines.kmeans(namespace["z"], 6, 1)
    assert np.array_equal(labels, seen.predicted["AE+k-means (augmented)"])
    torch.testing.assert_close(namespace["dcn_trace"][0]["view"], namespace["z"])
    assert np.allclose(namespace["means"], means)


def test_the_loops_are_set_by_the_parameters_cell(whole):
    namespace, seen = whole
    told = [
        [loop["title"], loop["optimizer"], loop["length"], [group["lr"] for group in loop["groups"]]]
        for loop in seen.loops
    ]
    assert told == [
        ["autoencoder", "Adam", 8, [0.003]],
        ["DCN", "Adam", 12, [0.002]],
        ["VaDE", "Adam", 16, [0.004, 0.03]],
    ]
    sizes = [sum(w.numel() for w in namespace[name].parameters()) for name in ("model", "mixture")]
    assert seen.loops[-1]["weights"] == sizes
    assert [loop["weights"] for loop in seen.loops[:2]] == [sizes[:1]] * 2  # encoder and decoder and all
    dcn, vade = seen.steps[8:20], seen.steps[20:]
    assert [step["batch"] for step in dcn] == [step["batch"] for step in vade[:12]]
    for step in dcn:
        assert step["loss"] == pytest.approx(step["reconstruction"] + 5.0 / 2 * step["clustering"])
    for step in vade:
        bound = step["prior"] + step["assignment"] + step["entropy"]
        assert step["loss"] == pytest.approx(3.0 * step["reconstruction"] - bound)
    assert [row["iteration"] for row in namespace["dcn_trace"]] == [0, 5, 10, 12]
    assert [row["iteration"] for row in namespace["trace"]] == [0, 5, 10, 15, 16]
    rates = [step["lr"] for step in vade]
    for start, column in zip((0.004, 0.03), zip(*rates, strict=True), strict=True):
        assert column == pytest.approx([start * (1 + np.cos(np.pi * i / 16)) / 2 for i in range(16)])


def test_each_record_tells_its_own_run():
    namespace, _ = golden.run(CHAPTER, **TINY)  # seed 0, which alone keeps arrays
    ends = ("dcn", ("reconstruction", "clustering")), ("vade", mixtures.VADE_TERMS)
    for (name, terms), trace in zip(ends, (namespace["dcn_trace"], namespace["trace"]), strict=True):
        record, state = namespace[f"by_{name}"], namespace[name]
        assert record["steps"] == state.iteration == trace[-1]["iteration"]
        for key in ("iteration", "acc", "changed", "largest"):
            assert record["looks"][key] == [round(row[key], 4) for row in trace]
        for key in terms:
            assert record[key] == pytest.approx(trace[-1][key], abs=1e-3) == state.losses[key]
        kept = records.arrays(record)
        np.testing.assert_allclose(kept["code"], state.embedding, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(kept["code_first"], namespace["z"], rtol=2e-3, atol=1e-3)
        assert kept["labels"].tolist() == state.labels.tolist() and len(kept["curve"]) == len(trace)


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda n: 1.0),
        ("cosine", lambda n: (1 + np.cos(np.pi * n / 22)) / 2),
        ("steps", lambda n: 0.9 if n >= 20 else 1.0),  # of two batches a pass, after ten passes
    ],
)
def test_the_schedule_moves_both_rates_of_vade_and_no_other(schedule, factor):
    few = dict(pretrain_epochs=1, dcn_epochs=1, vade_epochs=11, batch_size=44, gmm_starts=1)
    _, seen = golden.run(CHAPTER, **TINY | few | dict(schedule=schedule))
    rates = [step["lr"] for step in seen.steps]
    assert rates[:4] == [[0.003]] * 2 + [[0.002]] * 2 and len(rates) == 4 + 22
    for n, pair in enumerate(rates[4:]):
        assert pair == pytest.approx([0.004 * factor(n), 0.03 * factor(n)])


@pytest.mark.parametrize(
    ("moved", "degrees", "shift", "expected"),
    [
        ("always", 7.0, 0.25, {"autoencoder": 2, "DCN": 2, "VaDE": 2}),
        ("start", 7.0, 0.25, {"autoencoder": 2}),
        ("always", 0.0, 0.25, {"autoencoder": 2, "DCN": 2, "VaDE": 2}),
        ("always", 7.0, 0.0, {"autoencoder": 2, "DCN": 2, "VaDE": 2}),
        ("always", 0.0, 0.0, {}),
    ],
)
def test_images_are_moved_where_the_parameters_say(monkeypatch, moved, degrees, shift, expected):
    seen, loops = [], []
    turned, steps = data.turned_and_shifted, training.steps

    def spy(images, **how):
        assert how == {"degrees": degrees, "shift": shift} and images.shape == (44, 1, 16, 16)
        seen.append(loops[-1])
        return turned(images, **how)

    monkeypatch.setattr(data, "turned_and_shifted", spy)
    monkeypatch.setattr(
        training, "steps", lambda *given, **more: loops.append(more["title"]) or steps(*given, **more)
    )
    few = dict(pretrain_epochs=1, dcn_epochs=1, vade_epochs=1, batch_size=44, gmm_starts=1)
    few |= dict(moved=moved, degrees=degrees, shift=shift)
    _, run = golden.run(CHAPTER, **TINY | few)
    assert {title: seen.count(title) for title in seen} == expected
    named = ["(augmented)" in record["method"] for record in run.records]
    assert named == [bool(expected)] * 4


def test_the_stored_start_is_what_is_clustered():
    few = dict(n_clusters=6, batch_size=44, gmm_starts=1, dcn_epochs=1, vade_epochs=1, max_share=1.0)
    namespace, seen = golden.run(CHAPTER, **few)
    stored = data.trained_start("mnist_16")
    pretrained, _ = namespace["before"]
    for key, value in pretrained.state_dict().items():
        if not key.startswith("log_variance"):
            assert torch.equal(value, stored[key].double()), key
    assert [loop["title"] for loop in seen.loops] == ["DCN", "VaDE"]
    assert seen.records[0]["seconds"] == 100 and pretrained.likelihood == "gaussian"
    other, _ = golden.run(CHAPTER, **few | dict(seed=1))
    assert torch.equal(other["z"], namespace["z"])
    heads = [run["before"][0].log_variance.weight for run in (namespace, other)]
    assert not torch.allclose(*heads)


def test_weights_and_every_start_follow_the_seed():
    few = dict(dcn_epochs=0, vade_epochs=1, pretrain_epochs=1, gmm_starts=2)
    first, again, other = (golden.run(CHAPTER, **TINY | few | dict(seed=seed)) for seed in (0, 0, 1))
    assert golden.differences(golden.summary(*first), golden.summary(*again)) == []
    assert not torch.allclose(first[0]["z"], other[0]["z"])
    states = [[fit["settings"]["random_state"] for fit in seen.fits][0] for _, seen in (first, other)]
    assert states == ["0", "1"]


def test_the_likelihood_reaches_the_network():
    for likelihood in ("bernoulli", "gaussian"):
        few = dict(dcn_epochs=1, vade_epochs=1, pretrain_epochs=1, gmm_starts=1, likelihood=likelihood)
        namespace, _ = golden.run(CHAPTER, **TINY | few)
        for name in ("model", "dcn_model"):
            assert namespace[name].likelihood == likelihood
            drawn = namespace[name].decode(torch.randn(50, 10).double() * 9)
            assert (drawn.min() >= 0 and drawn.max() <= 1).item() == (likelihood == "bernoulli")


def test_the_largest_share_of_a_cluster_is_the_parameter():
    few = TINY | dict(pretrain_epochs=1, gmm_starts=1, max_share=0.05)
    for also in (dict(dcn_epochs=0), {}):
        with pytest.raises(training.CollapseError, match="more than max_share = 0.05"):
            golden.run(CHAPTER, **few | also)


def test_the_precision_reaches_every_pass(monkeypatch):
    asked, autocast = [], training.autocast
    monkeypatch.setattr(training, "autocast", lambda kind: asked.append(kind) or autocast(kind))
    few = TINY | dict(pretrain_epochs=1, dcn_epochs=1, vade_epochs=1, gmm_starts=1, precision="bfloat16")
    _, seen = golden.run(CHAPTER, double=False, **few)
    assert set(asked) == {"bfloat16"} and len(asked) > 20
    assert {record["precision"] for record in seen.records} == {"bfloat16"}


def loaded(n, **parameters):
    """What the cell that loads leaves behind, on n stand-in images that are told apart."""
    numbers = torch.arange(n)
    many = data.Dataset(numbers[:, None, None, None], numbers % 10, "any", "all")
    namespace = vars(definitions(CHAPTER)) | checked() | dict(dataset="any", parameters={}, n_images=0)
    namespace |= dict(margin=0, side=0, n_clusters=10, data=types.SimpleNamespace())
    namespace["data"].load, namespace["data"].cropped = lambda name: many, lambda x, margin, side: x
    namespace |= parameters
    exec(cell_with(CHAPTER, "data.load(dataset)"), namespace)
    return namespace


def test_all_images_are_taken_unless_a_number_is_given():
    for n_images, expected in ((0, 70_000), (300, 300)):
        namespace = loaded(70_000, n_images=n_images)
        x = namespace["x"].flatten().tolist()
        assert len(x) == len(set(x)) == expected and namespace["y"].tolist() == [i % 10 for i in x]
        assert namespace["common"]["n"] == 70_000


def test_fewer_images_than_clusters_are_refused():
    with pytest.raises(ValueError, match="n_clusters is 10, but there are only 9 images"):
        loaded(9)
    assert len(loaded(10)["x"]) == 10


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"n_images": 499}, "n_images must be 0 or at least 50 a cluster, got 499"),
        ({"n_images": 99, "n_clusters": 2}, "at least 50 a cluster, got 99"),
        ({"side": 7, "start": "trained"}, "side must be 0 or at least 8, got 7"),
        ({"side": 1, "start": "trained"}, "side must be 0 or at least 8, got 1"),
        ({"dataset": "fashion_5k"}, "choose start = trained"),
        ({"dataset": "usps"}, "choose start = trained"),
        ({"dataset": "fashion"}, "choose start = trained"),
        ({"margin": 1}, "the stored start is of MNIST, margin 2, side 16"),
        ({"side": 20}, "choose start = trained"),
        ({"widths": [500, 500, 2000]}, "choose start = trained"),
        ({"likelihood": "bernoulli"}, "likelihood gaussian: choose start = trained"),
        ({"vade_epochs": 2001, "interval": 40}, "interval must be larger: 2001 looks are too many"),
        ({"dcn_epochs": 1000, "interval": 10}, "interval must be larger: 4000 looks are too many"),
        ({"dataset": "mnist", "vade_epochs": 200}, "interval must be larger: 2735 looks"),
        ({"seed": 1.0}, "seed must be an int between 0 and"),
        ({"degrees": "10"}, "degrees must be a number between 0.0 and 180.0, got '10'"),
        ({"shift": 1.5}, "shift must be a number between 0.0 and 1.0, got 1.5"),
        ({"widths": [300, 300]}, "widths must be one of"),
        ({"moved": True}, "moved must be one of 'always', 'start', got True"),
        ({"schedule": "step"}, "schedule must be one of 'cosine', 'steps', 'constant'"),
        ({"mixture_lr": -1e-9}, "mixture_lr must be a number between 0.0 and 1.0"),
        ({"gmm_starts": 0}, "gmm_starts must be an int between 1 and 100, got 0"),
        ({"dcn_epochs": True}, "dcn_epochs must be an int between 0 and 1000, got True"),
        ({"interval": 0}, "interval must be an int between 1 and 10000"),
        ({"max_share": 0.0}, "max_share must be a number between 0.05 and 1.0"),
    ],
)
def test_wrong_parameters_are_refused_before_training(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dataset": "mnist"},
        {"n_images": 500},
        {"n_images": 100, "n_clusters": 2},
        {"side": 8, "start": "trained"},
        {"side": 0, "start": "trained"},
        {"dataset": "fashion_5k", "start": "trained", "likelihood": "bernoulli"},
        {"dcn_epochs": 0, "mixture_lr": 0.0, "reconstruction_weight": 0.0, "dcn_weight": 0.0},
        {"vade_epochs": 2000, "interval": 40},
        {"n_images": 1280, "vade_epochs": 2000, "interval": 10},
    ],
)
def test_what_may_be_asked_for_is_not_refused(changed):
    assert changed.items() <= checked(**changed).items()


def test_every_parameter_is_declared():
    cells = json.loads(chapter_file(CHAPTER).read_text(encoding="utf-8"))["cells"]
    (source,) = (c["source"] for c in cells if "parameters" in c["metadata"].get("tags", []))
    assert list(checked()) == [name for name, _ in checks.assigned("".join(source))]


def test_a_torch_that_forgets_gradients_is_refused_in_bfloat16(monkeypatch):
    monkeypatch.setattr(checks, "keeps_gradients", lambda precision: precision == "float32")
    for precision in ("auto", "bfloat16"):
        with pytest.raises(ValueError, match="forgets gradients in bfloat16: choose float32"):
            checked(precision=precision)
    checked(precision="float32")
