"""The chapter `foundations`: what it shows is what the helper runs."""

import ast
import functools
import inspect
import json
import types

import golden
import numpy as np
import pytest
import torch
from loader import chapter_file, definitions

from deepclust_nb import baselines, data, metrics, networks, records, training

CHAPTER = "foundations"
QUICK = dict(n_clusters=3, pretrain_epochs=2, batch_size=20, iterations=6, update_interval=3, tol=0.0) | {
    "idec_lr": 0.0003
}
# the published kind of run: no moved copies, images as they are; the narrow layers are for speed
PUBLISHED = dict(side=0, narrow=25, augment=False, dec_optimizer="sgd", dec_lr=0.01, pretrain_lr=0.001)
QUICK |= PUBLISHED | dict(pretrain_schedule="constant")
OTHER = dict(n_clusters=4, pretrain_epochs=1, batch_size=16, iterations=5, update_interval=2, tol=0.9, seed=3)
OTHER |= PUBLISHED | dict(augment=True, dec_optimizer="adam")
OTHER |= dict(init="fan_in", pretrain_optimizer="sgd", pretrain_lr=0.1, dec_lr=0.05, idec_optimizer="sgd")
OTHER |= dict(idec_lr=0.001, gamma=500.0, target="batch", n_images=60)
GOLDEN = {
    "as it stands": lambda: golden.summary(*golden.run(CHAPTER, **QUICK)),
    "every switch": lambda: golden.summary(*golden.run(CHAPTER, **OTHER)),
}


def tree(function):
    """A function's syntax tree without its docstring."""
    node = ast.parse(inspect.getsource(function)).body[0]
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


@pytest.mark.parametrize("name", ["student_t", "target_distribution", "pretrain"])
def test_shown_functions_are_the_helpers(name):
    shown, used = getattr(definitions(CHAPTER), name), getattr(baselines, name)
    assert tree(shown) == tree(used)
    assert len(inspect.getsource(shown).splitlines()) <= 25


@pytest.fixture
def stage():
    """A small model, its images and a state whose target is one-hot at the classes."""
    torch.manual_seed(0)
    model = networks.Autoencoder(12, n_code=2, widths=(16,))
    x, y = torch.rand(30, 1, 3, 4), torch.arange(30) % 3
    centroids = torch.randn(3, 2)
    q = baselines.student_t(model.encode(x), centroids).detach()
    perfect = torch.eye(3)[y]
    return model, x, y.numpy(), types.SimpleNamespace(centroids=centroids, p=perfect, q=q, labels=y.numpy())


def test_moved_copies_are_moved_as_little_as_they_say():
    moved = definitions(CHAPTER).slightly_moved
    images = torch.zeros(400, 1, 16, 16)
    images[:, :, 7:9, 7:9] = 1  # a square about the middle stays there but for the shift
    torch.manual_seed(0)
    light = moved(images, degrees=0.0)[:, 0]
    middle = torch.arange(16.0) - 7.5
    away = torch.stack([(light.sum(axis) * middle).sum(1) / light.sum((1, 2)) for axis in (1, 2)])
    assert away.abs().max() <= 0.08 * 16 + 0.05 and away.abs().max() > 0.07 * 16
    assert away.mean(dim=1).abs().max() < 0.12 and (away.std(dim=1) - 0.08 * 16 / 3**0.5).abs().max() < 0.08
    assert torch.allclose(moved(images, degrees=0.0, shift=0.0), images, atol=1e-5)
    images = torch.zeros(400, 1, 33, 33)
    images[:, :, 16, 26:28] = 1  # far from the middle turning shows: by up to ten degrees, both ways
    rows = torch.arange(33.0) - 16
    up = (moved(images, shift=0.0)[:, 0].sum(2) * rows).sum(1) / moved(images, shift=0.0)[:, 0].sum((1, 2))
    assert 1.2 < up.abs().max() < 2.4 and up.min() < -1 < 1 < up.max()


def test_views_move_what_is_learned_from_and_not_the_target():
    seen, x = [], torch.rand(40, 1, 4, 4)

    def view(batch):
        seen.append(batch.shape)
        return batch.flip(3)

    torch.manual_seed(0)
    model = networks.Autoencoder(16, n_code=2, widths=(8,))
    start = baselines.kmeans(baselines.encode(model, x), 3, seed=0)[1]
    settings = dict(seed=0, iterations=4, update_interval=4, tol=0.0, batch_size=10, max_share=1.0)
    first, last = baselines.dec(model, x, start, view=view, **settings)
    assert seen == [(10, 1, 4, 4)] * 4 and torch.allclose(first.q.sum(1), torch.ones(40))
    assert torch.equal(last.embedding, baselines.encode(model, x))  # of the images as they are
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    errors = baselines.pretrain(model, x, optimizer, 1, 0, batch_size=40, view=view)
    flat = x.flip(3).flatten(1)
    assert errors == pytest.approx([torch.nn.functional.mse_loss(model(flat)[1], flat).item()])


def test_what_is_not_published_has_a_name_of_its_own():
    name = definitions(CHAPTER).method_name
    assert name("DEC", True) == "DEC (augmented)" and name("DEC", False) == "DEC"


def test_images_are_resized_only_when_asked():
    resized, x = definitions(CHAPTER).resized, torch.full((2, 1, 28, 28), 200, dtype=torch.uint8)
    assert resized(x, 0) is x
    small = resized(x, 16)
    assert small.shape == (2, 1, 16, 16) and small.dtype == torch.uint8 and (small == 200).all()


def test_pseudo_labels_that_are_true_teach_what_labels_teach(stage):
    model, x, y, state = stage
    assert definitions(CHAPTER).conflict(model, state, x, y)["randomness"] == pytest.approx(1, abs=1e-5)


def test_renamed_clusters_teach_the_same_and_a_wrong_target_does_not(stage):
    """The match of clusters to classes is the best one, whatever the clusters are called."""
    model, x, y, state = stage
    conflict = definitions(CHAPTER).conflict
    turn = torch.tensor([2, 0, 1])
    renamed = types.SimpleNamespace(
        centroids=state.centroids[turn.argsort()],
        p=torch.eye(3)[turn[torch.as_tensor(y)]],
        labels=turn[y].numpy(),
    )
    q = baselines.student_t(model.encode(x), renamed.centroids)
    torch.testing.assert_close(q[:, turn], state.q)
    renamed_result, result = conflict(model, renamed, x, y), conflict(model, state, x, y)
    assert renamed_result["randomness"] == pytest.approx(1, abs=1e-5)
    assert renamed_result["drift"] == pytest.approx(result["drift"], abs=1e-5)
    state.p = torch.eye(3)[(torch.as_tensor(y) + 1) % 3]
    assert conflict(model, state, x, y)["randomness"] < 0.9


def test_drift_is_the_cosine_of_finite_differences(stage):
    """For a target unlike the truth, so that the two clustering gradients cannot be taken for each other."""
    model, x, y, state = stage
    state.p = torch.eye(3)[(torch.as_tensor(y) + 1) % 3]
    drift = definitions(CHAPTER).conflict(model, state, x, y)["drift"]
    model, x, p, centroids = model.double(), x.double(), state.p.double(), state.centroids.double()
    weights = list(model.encoder.parameters())
    flat = torch.nn.utils.parameters_to_vector(weights).detach()

    @torch.no_grad()
    def losses(vector):
        torch.nn.utils.vector_to_parameters(vector, weights)
        z, x_hat = model(x)
        q = baselines.student_t(z, centroids)
        return (x_hat - x.flatten(1)).square().mean(), -(p * q.log()).sum(1).mean()

    steps = 1e-6 * torch.eye(len(flat)).double()
    slopes = [
        [(a - b).item() for a, b in zip(losses(flat + h), losses(flat - h), strict=True)] for h in steps
    ]
    expected = torch.nn.functional.cosine_similarity(*torch.tensor(slopes).T, dim=0).item()
    assert drift == pytest.approx(expected, abs=1e-4)


def test_the_cosine_does_not_depend_on_order_or_length():
    weights = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]

    def pair():
        return 5 * weights[0].sum() + 5 * weights[1].sum(), weights[0].sum() - weights[1].sum()

    cosine = definitions(CHAPTER).gradient_cosine
    assert cosine(*pair(), weights) == pytest.approx(1 / 3) == cosine(*pair()[::-1], weights)


def test_a_run_is_followed_whole(stage):
    chapter, (model, x, y, _) = definitions(CHAPTER), stage
    training.seed_everything(0)
    _, centroids = baselines.kmeans(baselines.encode(model, x), 3, 0)
    states = baselines.dec(
        model, x, centroids, seed=0, iterations=8, update_interval=2, tol=0.0, batch_size=10
    )
    last, trace = chapter.follow(states, model, x, y, every=2)
    assert [row["iteration"] for row in trace] == [0, 2, 4, 6, 8] and last.iteration == 8
    assert ["drift" in row for row in trace] == [True, False, True, False, True]
    kept = chapter.told(last, trace)
    assert kept["drift"] == pytest.approx(sum(row["drift"] for row in trace[::2]) / 3)
    assert kept["arrays"]["curve"].shape == (5, 3) and kept["steps"] == 8 and kept["converged"] is False


def test_a_record_is_told_what_the_trace_holds(stage):
    """Confidence is the mean over images of the largest share, recomputed here row by row."""
    chapter, (model, x, y, _) = definitions(CHAPTER), stage
    _, centroids = baselines.kmeans(baselines.encode(model, x), 3, 0)
    settings = dict(seed=0, iterations=4, update_interval=2, tol=0.0, batch_size=10)
    states = list(baselines.dec(model, x, centroids, **settings))
    last, trace = chapter.follow(iter(states), model, x, y, every=3, n_view=7)
    assert (
        last is states[-1] and len(trace) == 3 and ["drift" in row for row in trace] == [True, False, False]
    )
    for state, row in zip(states, trace, strict=True):
        largest = [max(shares) for shares in state.q.tolist()]
        assert row["confidence"] == pytest.approx(sum(largest) / 30)
        assert row["acc"] == metrics.accuracy(y, state.labels) and row["changed"] == state.changed
        assert torch.equal(row["view"], state.embedding[:7]) and torch.equal(row["sizes"], state.sizes)
        assert {name: row[name] for name in state.losses} == state.losses
    kept = chapter.told(last, trace)
    assert kept["randomness"] == trace[0]["randomness"]
    expected = [[row["acc"], row["changed"], row["confidence"]] for row in trace]
    torch.testing.assert_close(kept["arrays"]["curve"], torch.tensor(expected))
    assert torch.equal(kept["arrays"]["code"], states[-1].embedding[:7])
    assert kept["arrays"]["labels"].tolist() == last.labels.tolist()


def test_conflict_looks_at_the_first_images_and_changes_nothing(stage):
    model, x, y, state = stage
    chapter, before = definitions(CHAPTER), [w.clone() for w in model.parameters()]
    _, trace = chapter.follow(iter([full_state(state)]), model, x, y, n_probe=13)
    few = types.SimpleNamespace(centroids=state.centroids, p=state.p[:13], labels=state.labels[:13])
    expected = chapter.conflict(model, few, x[:13], y[:13])
    assert {name: trace[0][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(chapter.conflict(model, state, x, y), abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())


def full_state(state):
    z, sizes = torch.zeros(30, 2), torch.bincount(torch.as_tensor(state.labels))
    return baselines.State(0, z, state.q, state.p, state.labels, 1.0, state.centroids, sizes, {}, False)


def test_a_class_without_a_cluster_is_left_out_of_the_truth(stage):
    """Only images whose class has a cluster can be told the right one."""
    model, x, y, state = stage
    labels = np.where(y == 2, 0, y)
    two = types.SimpleNamespace(centroids=state.centroids, p=torch.eye(3)[torch.as_tensor(y)], labels=labels)
    found = definitions(CHAPTER).conflict(model, two, x, y)["randomness"]
    q = baselines.student_t(model.encode(x), state.centroids)
    known = torch.as_tensor(y) != 2
    true = -(q[known].gather(1, torch.as_tensor(y)[known][:, None])).log().mean()
    pseudo = -(q.gather(1, torch.as_tensor(y)[:, None])).log().mean()
    slopes = [
        torch.autograd.grad(loss, list(model.encoder.parameters()), retain_graph=True)
        for loss in (true, pseudo)
    ]
    flat = [torch.cat([part.flatten() for part in parts]) for parts in slopes]
    assert found == pytest.approx(torch.nn.functional.cosine_similarity(*flat, dim=0).item(), abs=1e-5)


def test_timed_gives_the_result_and_the_seconds_of_the_call(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(definitions(CHAPTER).time, "perf_counter", lambda: next(clock))
    assert definitions(CHAPTER).timed(divmod, 7, 3) == ((2, 1), 2.5)


@pytest.fixture(scope="module")
def whole():
    """The chapter's deciding cells on few digits: what they left behind, and what was seen."""
    yield golden.run(CHAPTER, **QUICK | dict(n_images=70, seed=0, dec_lr=0.05))


def test_every_method_is_scored_on_the_labels_of_its_own_images(whole):
    """Images are shuffled with their labels, by the same order for every seed."""
    namespace, seen = whole
    load = golden.digits()("any", "all")
    order = torch.randperm(88, generator=torch.Generator().manual_seed(0))[:70]
    assert torch.equal(namespace["x"], load.x[order]) and namespace["y"].tolist() == load.y[order].tolist()
    assert [record["method"] for record in seen.records] == ["k-means", "AE+k-means", "AE+GMM", "DEC", "IDEC"]
    golden.assert_scored(seen, load.y[order])
    for record in seen.records:
        assert record["n_scored"] == 70 and record["chapter"] == CHAPTER
    for name, method in (("dec", "DEC"), ("idec", "IDEC")):
        assert np.array_equal(namespace[name].labels, seen.predicted[method])


def test_each_record_counts_the_work_of_its_method(whole):
    """A step costs 1, k-means 100, a mixture 1000 and the k-means of each of its 5 starts 100."""
    _, seen = whole
    seconds = {record["method"]: record["seconds"] for record in seen.records}
    pretraining, start = 8, 8 + 100  # the mixture needs the code, not the k-means on it
    assert seconds == {
        "k-means": 100,
        "AE+k-means": start,
        "AE+GMM": pretraining + 1000 + 500,
        "DEC": start + 6,
        "IDEC": start + 6,
    }


def test_kmeans_gets_pixels_and_then_codes_and_the_mixture_codes(whole):
    namespace, seen = whole
    pixels, codes = namespace["x"].flatten(1).double() / 255, namespace["z"]
    assert torch.allclose(codes, namespace["model"].encode(pixels))
    fits = [fit for fit in seen.fits if fit["settings"]["n_init"] != "1"]  # those are of the mixture's starts
    told = [("KMeans", pixels, "5"), ("KMeans", codes, "20"), ("GaussianMixture", codes, "5")]
    for fit, (kind, points, n_init) in zip(fits, told, strict=True):
        assert fit["kind"] == kind and fit["shape"] == list(points.shape)
        assert fit["x"] == pytest.approx(golden.checksum(points), abs=1e-6)
        assert (fit["settings"]["n_init"], fit["settings"]["random_state"]) == (n_init, "0")
        assert fit["settings"].get("n_clusters", fit["settings"].get("n_components")) == "3"


def test_dec_and_idec_start_from_the_same_pretrained_network(whole):
    namespace, seen = whole
    for trace in (namespace["dec_trace"], namespace["idec_trace"]):
        assert torch.allclose(trace[0]["view"], namespace["z"]) and trace[0]["iteration"] == 0
        start = baselines.student_t(namespace["z"], torch.as_tensor(namespace["centroids"]))
        assert trace[0]["confidence"] == pytest.approx(start.amax(dim=1).mean().item())
    assert not torch.allclose(namespace["dec_trace"][-1]["view"], namespace["idec_trace"][-1]["view"])
    error = namespace["on_code"]["reconstruction"]
    assert error == pytest.approx(np.mean([step["reconstruction"] for step in seen.steps[:8]]))
    assert [row["iteration"] for row in namespace["dec_trace"]] == [0, 3, 6]
    assert all("drift" in row for row in namespace["dec_trace"] + namespace["idec_trace"])
    for method in ("dec", "idec"):
        kept = records.arrays(namespace[f"by_{method}"])
        codes = namespace[f"{method}_model"].encode(namespace["x"].double() / 255).detach()
        np.testing.assert_allclose(kept["code"], codes, rtol=2e-3, atol=1e-3)


def test_the_loops_are_set_by_the_parameters_cell(whole):
    _, seen = whole
    told = [
        {key: value for key, value in loop["groups"][0].items() if key in ("lr", "momentum", "betas")}
        | {"length": loop["length"], "optimizer": loop["optimizer"]}
        for loop in seen.loops
    ]
    assert told == [
        {"lr": 0.001, "betas": (0.9, 0.999), "length": 8, "optimizer": "Adam"},
        {"lr": 0.05, "momentum": 0.9, "length": 6, "optimizer": "SGD"},
        {"lr": 0.0003, "betas": (0.9, 0.999), "length": 6, "optimizer": "Adam"},
    ]
    first, second = seen.steps[8:14], seen.steps[14:20]
    assert [step["batch"] for step in first] == [step["batch"] for step in second]
    assert all(step["loss"] == step["clustering"] for step in first)
    for step in second:
        assert step["loss"] == pytest.approx(step["reconstruction"] + 0.1 * step["clustering"])


def test_the_largest_share_of_a_cluster_is_the_parameter():
    short = dict(n_images=40, batch_size=20, pretrain_epochs=1, iterations=2, update_interval=1)
    with pytest.raises(training.CollapseError, match="more than max_share = 0.05"):
        golden.run(CHAPTER, **QUICK | short | {"max_share": 0.05})


def test_narrow_layers_are_rounded_up():
    short = dict(n_images=40, batch_size=20, pretrain_epochs=1, iterations=1, update_interval=1)
    namespace, _ = golden.run(CHAPTER, **QUICK | short | {"narrow": 30, "max_share": 1.0})
    widths = [layer.out_features for layer in namespace["model"].encoder if hasattr(layer, "out_features")]
    assert widths == [17, 17, 67, 10]


def test_the_conflict_is_measured_about_twenty_times_and_the_error_is_of_the_last_hundred_steps(monkeypatch):
    monkeypatch.setattr(networks, "Autoencoder", functools.partial(networks.Autoencoder, widths=(20,)))
    long = dict(n_images=24, batch_size=2, pretrain_epochs=10, iterations=42, update_interval=1)
    namespace, seen = golden.run(CHAPTER, **QUICK | long)
    for trace in (namespace["dec_trace"], namespace["idec_trace"]):
        assert ["drift" in row for row in trace] == [i % 2 == 0 for i in range(43)]
    errors = [step["reconstruction"] for step in seen.steps[20:120]]
    assert namespace["on_code"]["reconstruction"] == pytest.approx(np.mean(errors))


def test_a_record_keeps_two_thousand_labels_and_codes():
    chapter = definitions(CHAPTER)
    signature = inspect.signature(chapter.follow).parameters
    assert [signature[name].default for name in ("every", "n_probe", "n_view")] == [1, 500, 2000]
    state = types.SimpleNamespace(labels=np.arange(2500), iteration=3, converged=True)
    view = torch.zeros(2000, 2)
    row = dict(acc=0.5, changed=0.25, confidence=0.75, drift=0.0, randomness=1.0, view=view)
    arrays = chapter.told(state, [row])["arrays"]
    assert arrays["labels"].tolist() == list(range(2000)) and arrays["code"] is view


def test_all_images_are_taken_unless_a_number_is_given():
    """The cell that loads, on more images than any data set that comes with the package."""
    cells = json.loads(chapter_file(CHAPTER).read_text(encoding="utf-8"))["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "data.load(dataset)" in "".join(c["source"]))
    many = data.Dataset(torch.arange(70_000)[:, None, None, None], torch.arange(70_000) % 10, "any", "all")
    for n_images, expected in ((0, 70_000), (300, 300)):
        namespace = vars(definitions(CHAPTER)) | dict(n_images=n_images, dataset="any", parameters={})
        namespace |= dict(precision="float32", side=0, data=types.SimpleNamespace(load=lambda name: many))
        exec(source, namespace)
        x = namespace["x"].flatten().tolist()
        assert len(x) == len(set(x)) == expected and namespace["y"].tolist() == [i % 10 for i in x]


def test_the_precision_reaches_every_pass(monkeypatch):
    asked, autocast = [], training.autocast
    monkeypatch.setattr(training, "autocast", lambda kind: asked.append(kind) or autocast(kind))
    monkeypatch.setattr(networks, "Autoencoder", functools.partial(networks.Autoencoder, widths=(20,)))
    few = QUICK | dict(pretrain_epochs=1, iterations=2, update_interval=2, precision="bfloat16")
    _, seen = golden.run(CHAPTER, double=False, **few)
    # five steps and the codes; then two steps and two refreshes each of DEC and of IDEC
    assert asked == ["bfloat16"] * (5 + 1 + 2 * (2 + 2))
    assert {record["precision"] for record in seen.records} == {"bfloat16"}
