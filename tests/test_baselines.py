"""DEC and IDEC against double loops, closed forms and single steps taken by hand."""

import copy
import inspect
import math

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepclust_nb import baselines, metrics, networks, training


@pytest.fixture
def codes():
    torch.manual_seed(0)
    return torch.randn(9, 3).double(), torch.randn(4, 3).double()


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_student_t_is_its_definition(codes, alpha):
    z, centroids = codes
    by_hand = torch.zeros(9, 4).double()
    for i in range(9):
        for j in range(4):
            distance = math.dist(z[i], centroids[j]) ** 2
            by_hand[i, j] = (1 + distance / alpha) ** (-(alpha + 1) / 2)
    by_hand /= by_hand.sum(1, keepdim=True)
    torch.testing.assert_close(baselines.student_t(z, centroids, alpha), by_hand)


def test_a_point_at_a_far_centroid_is_certain(codes):
    z, centroids = codes
    centroids[2] = 1e4
    q = baselines.student_t(centroids[2:3], centroids)
    assert q[0, 2] > 1 - 1e-6 and q.sum() == pytest.approx(1)


def test_the_target_is_its_definition(codes):
    q = baselines.student_t(*codes)
    p = baselines.target_distribution(q)
    size = [sum(q[i, j].item() for i in range(9)) for j in range(4)]
    for i in range(9):
        weight = [q[i, j].item() ** 2 / size[j] for j in range(4)]
        assert p[i].tolist() == pytest.approx([w / sum(weight) for w in weight])


def test_the_target_sharpens_balanced_clusters(codes):
    q = baselines.student_t(*codes)
    balanced = torch.cat([q.roll(shift, dims=1) for shift in range(4)])
    p = baselines.target_distribution(balanced)
    assert (p.amax(1) >= balanced.amax(1)).all() and (p.argmax(1) == balanced.argmax(1)).all()


@pytest.mark.parametrize("q", [torch.full((8, 4), 0.25), torch.eye(4).repeat(2, 1)])
def test_nothing_is_left_to_learn_at_uniform_and_at_one_hot(q):
    p = baselines.target_distribution(q)
    torch.testing.assert_close(p, q)
    assert F.kl_div((q + 1e-30).log(), p, reduction="batchmean").item() == pytest.approx(0, abs=1e-6)


def test_the_gradients_are_those_of_the_paper(codes):
    """Equations 4 and 5, with finite differences as a third opinion."""
    z, centroids = (part.clone().requires_grad_() for part in codes)
    p = baselines.target_distribution(baselines.student_t(*codes))

    def loss(z, centroids):
        return F.kl_div(baselines.student_t(z, centroids).log(), p, reduction="sum")

    q = baselines.student_t(z, centroids).detach()
    gap = (z[:, None] - centroids[None]).detach()
    spring = 2 / (1 + gap.square().sum(2, keepdim=True)) * (p - q)[:, :, None] * gap
    to_codes, to_centroids = torch.autograd.grad(loss(z, centroids), [z, centroids])
    torch.testing.assert_close(to_codes, spring.sum(1))
    torch.testing.assert_close(to_centroids, -spring.sum(0))
    assert torch.autograd.gradcheck(loss, (z, centroids))


@pytest.fixture
def small():
    """Three blobs in twelve dimensions, a small autoencoder and the k-means start."""
    torch.manual_seed(1)
    y = torch.arange(90) % 3
    x = torch.rand(3, 12)[y] + 0.05 * torch.randn(90, 12)
    model = networks.Autoencoder(12, n_code=2, widths=(16,))
    baselines.pretrain(model, x, baselines.make_optimizer("adam", model.parameters(), 0.01), 20, 0, 30)
    _, centroids = baselines.kmeans(baselines.encode(model, x), 3, seed=0)
    return x, y.numpy(), model, centroids


def of_digits(train):
    """Numbers of `train(model, x, centroids)` on a small autoencoder of a few digits."""
    with golden.watched(golden.digits()) as seen:
        training.seed_everything(3)
        x = golden.digits()("any").x
        model = networks.Autoencoder(784, n_code=4, widths=(16,), init="glorot")
        optimizer = baselines.make_optimizer("adam", model.parameters(), 0.01)
        errors = baselines.pretrain(model, x, optimizer, 3, 1, 32)
        _, centroids = baselines.kmeans(baselines.encode(model, x), 3, 5, n_init=2)
        found = [errors] + train(model, x, centroids)
    kept = golden.plain(
        [[float(v) if np.size(v) == 1 else golden.checksum(v) for v in part] for part in found]
    )
    return golden.summary({"model": model}, seen) | {"states": kept}


def looped(run, **settings):
    def train(model, x, centroids):
        settings_here = dict(seed=2, iterations=7, update_interval=3, batch_size=24, tol=0.0) | settings
        states = list(run(model, x, centroids, **settings_here))
        return [[*state[:8], *state.losses.values(), state.converged] for state in states]

    return train


def again(name):
    def train(model, x, centroids):
        optimizer = baselines.make_optimizer(name, model.parameters(), 0.1, 0.7)
        return [baselines.pretrain(model, x, optimizer, 2, 4, 20)]

    return train


def grouped(model, x, centroids):
    z = baselines.encode(model, x, batch_size=30)
    labels, means = baselines.kmeans(z, 4, 7)
    of_mixture, mixture = baselines.gmm(z, 4, 7)
    return [[z, labels, means, of_mixture, mixture.means_, mixture.covariances_, mixture.weights_]]


TRAINED = {
    "pretrain, adam": again("adam"),
    "pretrain, sgd": again("sgd"),
    "dec": looped(baselines.dec),
    "dec, adam, batch": looped(baselines.dec, optimizer="adam", lr=0.002, target="batch", momentum=0.5),
    "dec stops": looped(baselines.dec, tol=1.0, iterations=20),
    "idec": looped(baselines.idec),
    "idec, sgd, batch": looped(
        baselines.idec, optimizer="sgd", lr=0.05, momentum=0.5, gamma=2, target="batch"
    ),
    "k-means and mixture": grouped,
}
GOLDEN = {name: lambda train=train: of_digits(train) for name, train in TRAINED.items()}


SHORT = {"seed": 0, "iterations": 6, "update_interval": 3, "batch_size": 30, "tol": 0.0}


def weights(module):
    return torch.cat([w.detach().flatten() for w in module.parameters()])


@pytest.mark.parametrize("gamma", [None, 0.1, 3.0])
@pytest.mark.parametrize("target", ["all", "batch"])
def test_one_step_is_the_one_taken_by_hand(small, gamma, target):
    """DEC: KL alone, decoder out. IDEC: mean squared error + gamma KL. P from all data or from the batch."""
    x, _, model, centroids = small
    by_hand, index = copy.deepcopy(model), next(iter(training.steps(90, 30, epochs=1, seed=0))).index
    means = torch.tensor(centroids, requires_grad=True)
    everything = baselines.student_t(by_hand.encode(x), means).detach()
    z = by_hand.encode(x[index])
    q = baselines.student_t(z, means)
    p = baselines.target_distribution(everything if target == "all" else q.detach())
    p = p[index] if target == "all" else p
    loss = sum((p[:, j] * (p[:, j] / q[:, j]).log()).sum() for j in range(3)) / 30
    if gamma is not None:
        loss = (by_hand.decode(z) - x[index]).square().sum() / (30 * 12) + gamma * loss
    trained = [means, *(by_hand.encoder if gamma is None else by_hand).parameters()]
    with torch.no_grad():
        for weight, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            weight -= 0.5 * gradient
    settings = SHORT | {"iterations": 1, "optimizer": "sgd", "lr": 0.5, "target": target}
    run = baselines.dec if gamma is None else baselines.idec
    *_, last = run(model, x, centroids, **settings, **({} if gamma is None else {"gamma": gamma}))
    torch.testing.assert_close(weights(model), weights(by_hand), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(last.centroids, means.detach(), rtol=1e-4, atol=1e-6)


def test_the_target_stands_still_between_refreshes(small):
    """Three steps on a target frozen at step 0 are not three steps on a target made anew each time."""
    x, _, model, centroids = small
    results = []
    for interval in (3, 1):
        twin = copy.deepcopy(model)
        settings = SHORT | {"iterations": 3, "update_interval": interval, "lr": 0.5}
        states = list(baselines.dec(twin, x, centroids, **settings))
        assert [s.iteration for s in states] == ([0, 3] if interval == 3 else [0, 1, 2, 3])
        assert states[-1].labels.tolist() == states[-1].q.argmax(dim=1).tolist()
        torch.testing.assert_close(states[-1].p, baselines.target_distribution(states[-1].q))
        torch.testing.assert_close(states[-1].q, baselines.student_t(twin.encode(x), states[-1].centroids))
        results.append(weights(twin))
    assert not torch.allclose(results[0], results[1])


def test_a_batch_of_one_teaches_nothing(small):
    """From one sample f equals q, so the target is the assignment and the gradient vanishes."""
    x, _, model, centroids = small
    before = weights(model)
    settings = SHORT | {"batch_size": 1, "lr": 0.1}
    *_, last = baselines.dec(model, x, centroids, target="batch", **settings)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=1e-5)
    *_, last = baselines.dec(model, x, centroids, target="all", **settings)
    assert (weights(model) - before).abs().max() > 1e-3


def test_dec_leaves_the_decoder_alone_and_idec_trains_it(small):
    x, _, model, centroids = small
    before = weights(model.decoder)
    for _ in baselines.dec(model, x, centroids, **SHORT):
        pass
    assert torch.equal(weights(model.decoder), before)
    for _ in baselines.idec(model, x, centroids, **SHORT):
        pass
    assert not torch.equal(weights(model.decoder), before)


def test_idec_without_clustering_is_the_autoencoder(small):
    x, _, model, centroids = small
    twin = copy.deepcopy(model)
    optimizer = baselines.make_optimizer("sgd", twin.parameters(), 0.1)
    baselines.pretrain(twin, x, optimizer, epochs=2, seed=0, batch_size=30)
    settings = SHORT | {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}
    *_, last = baselines.idec(model, x, centroids, gamma=0.0, **settings)
    torch.testing.assert_close(weights(model), weights(twin))
    assert torch.equal(last.centroids, torch.tensor(centroids))


def test_stopping(small):
    x, _, model, centroids = small
    settings = SHORT | {"iterations": 30}
    states = list(baselines.dec(copy.deepcopy(model), x, centroids, **settings | {"tol": 2.0}))
    assert [s.iteration for s in states] == [0, 3] and [s.converged for s in states] == [False, True]
    states = list(baselines.dec(copy.deepcopy(model), x, centroids, **settings))
    assert [s.iteration for s in states] == list(range(0, 31, 3)) and not states[-1].converged
    assert states[0].changed == 1 and states[0].losses == {}
    for before, after in zip(states, states[1:], strict=False):
        assert after.changed == (before.labels != after.labels).mean()
        assert after.sizes.sum() == 90 and after.losses["clustering"] >= -1e-6


def test_the_reported_losses_are_means_since_the_last_refresh(small):
    """With the target from the batch the refresh interval changes no step, only what is averaged."""
    x, _, model, centroids = small

    def losses(interval):
        settings = SHORT | {"update_interval": interval, "target": "batch"}
        return [s.losses for s in baselines.idec(copy.deepcopy(model), x, centroids, **settings)]

    each, three = losses(1)[1:], losses(3)
    assert len(each) == 6 and set(each[0]) == {"reconstruction", "clustering"}
    for name in each[0]:
        assert three[2][name] == pytest.approx(np.mean([row[name] for row in each[3:6]]), rel=1e-5)


def test_dec_finds_what_is_there_and_repeats(small):
    x, y, model, centroids = small
    runs = [list(baselines.dec(copy.deepcopy(model), x, centroids, **SHORT))[-1] for _ in range(2)]
    assert metrics.accuracy(y, runs[0].labels) == 1
    assert torch.equal(runs[0].embedding, runs[1].embedding)


def test_collapse_stops_dec_and_truly_unbalanced_data_may_be_let_through(small):
    _, _, model, centroids = small
    with pytest.raises(training.CollapseError, match="step 0.*more than max_share = 0.9"):
        next(baselines.dec(model, torch.zeros(90, 12), centroids, **SHORT))
    for run in (baselines.dec, baselines.idec):
        *_, last = run(copy.deepcopy(model), torch.zeros(90, 12), centroids, max_share=1.0, **SHORT)
        assert last.sizes.max() == 90 and last.iteration == 6


@pytest.mark.parametrize(
    "wrong", [{"target": "epoch"}, {"update_interval": 0}, {"optimizer": "lion"}, {"iterations": 0}]
)
def test_wrong_settings_stop_before_training(small, wrong):
    x, _, model, centroids = small
    before = weights(model)
    with pytest.raises(ValueError):
        next(baselines.dec(model, x, centroids, **SHORT | wrong))
    with pytest.raises(ValueError, match="gamma"):
        next(baselines.idec(model, x, centroids, gamma=-1.0, **SHORT))
    assert torch.equal(weights(model), before)


def test_kmeans_keeps_the_start_of_least_inertia():
    torch.manual_seed(0)
    z = torch.cat([torch.randn(20, 2) + 8 * torch.tensor([i // 5, i % 5]) for i in range(25)])

    def inertia(labels, centroids):
        return ((z.numpy() - centroids[labels]) ** 2).sum()

    single = [inertia(*baselines.kmeans(z, 25, seed, n_init=1)) for seed in range(8)]
    labels, centroids = baselines.kmeans(z, 25, int(np.argmax(single)), n_init=20)
    assert inertia(labels, centroids) < 1.0001 * min(single) < 0.9 * max(single)
    for j in range(25):
        np.testing.assert_allclose(centroids[j], z.numpy()[labels == j].mean(0), rtol=1e-4, atol=1e-4)
    assert labels.dtype == np.int64 and centroids.dtype == np.float32


def test_the_mixture_has_variances_of_its_own():
    """A wide and a narrow blob around nearby centres: k-means cuts the wide one, the mixture does not."""
    torch.manual_seed(0)
    y = np.repeat([0, 1], 300)
    z = torch.randn(600, 2) * torch.tensor([[8.0, 0.3]] * 300 + [[0.3, 8.0]] * 300)
    labels, mixture = baselines.gmm(z, 2, seed=0)
    assert mixture.covariances_.shape == (2, 2)
    assert metrics.accuracy(y, labels) > 0.9 > 0.7 > metrics.accuracy(y, baselines.kmeans(z, 2, 0)[0])


def test_codes_come_in_float32_whatever_the_batch():
    torch.manual_seed(0)
    model, x = networks.Autoencoder(12, n_code=2, widths=(16,)), torch.randint(0, 256, (50, 1, 3, 4)).byte()
    z = baselines.encode(model, x, batch_size=7)
    torch.testing.assert_close(z, model.encode(x.float() / 255))
    low = baselines.encode(model, x, "bfloat16")
    assert low.dtype == torch.float32 and not z.requires_grad
    torch.testing.assert_close(low, z, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "moved"),
    [("sgd", 0.1 * (1 + 1.5)), ("adam", 0.2)],  # SGD gathers speed; Adam's steps have the length of its rate
)
def test_the_optimisers_take_their_rate_and_momentum(name, moved):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = baselines.make_optimizer(name, [weight], lr=0.1, momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
    assert -weight.item() == pytest.approx(moved, rel=1e-5)


def test_defaults_are_those_of_the_named_codes():
    """DEC-keras: SGD 0.01 with momentum 0.9, batches of 256, a target every 140 steps, tolerance 0.001."""

    def defaults(function):
        given = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in given if p.default is not inspect.Parameter.empty}

    assert defaults(baselines.dec) == {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9}
    assert defaults(baselines.idec) == {"gamma": 0.1, "optimizer": "adam", "lr": 0.001, "momentum": 0.99}
    expected = {"iterations": 20_000, "update_interval": 140, "tol": 0.001, "batch_size": 256}
    assert defaults(baselines.self_train) == expected | {
        "target": "all",
        "max_share": 0.9,
        "precision": "float32",
        "view": None,
    }
    plain = {"schedule": "constant", "view": None}
    assert defaults(baselines.pretrain) == {"batch_size": 256, "precision": "float32"} | plain
    assert defaults(baselines.kmeans) == {"n_init": 20} and defaults(baselines.gmm) == {"n_init": 5}
    assert defaults(baselines.student_t) == {"alpha": 1.0}


@pytest.fixture
def optimisers(monkeypatch):
    """The optimiser of each step that is taken."""
    seen, update = [], training.Steps.update

    def spy(step, optimizer, loss, terms):
        seen.append(optimizer)
        return update(step, optimizer, loss, terms)

    monkeypatch.setattr(training.Steps, "update", spy)
    return seen


@pytest.mark.parametrize("run", [baselines.dec, baselines.idec])
def test_the_loops_train_with_the_rate_and_momentum_they_are_given(small, optimisers, run):
    x, _, model, centroids = small
    settings = SHORT | {"optimizer": "sgd", "lr": 0.003, "momentum": 0.7}
    for _ in run(model, x, centroids, **settings):
        pass
    assert len(optimisers) == 6 and len({id(optimizer) for optimizer in optimisers}) == 1
    (group,) = optimisers[0].param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.003, 0.7, 0)
    trained = [*(model.encoder if run is baselines.dec else model).parameters()]
    assert [id(w) for w in group["params"][:-1]] == [id(w) for w in trained]
    assert group["params"][-1].shape == (3, 2)


def test_two_steps_with_momentum_are_those_taken_by_hand(small):
    x, _, model, centroids = small
    by_hand, means = copy.deepcopy(model), torch.tensor(centroids, requires_grad=True)
    trained = [*by_hand.encoder.parameters(), means]
    p = baselines.target_distribution(baselines.student_t(by_hand.encode(x), means)).detach()
    speed = [torch.zeros_like(weight) for weight in trained]
    for step in training.steps(90, 30, iterations=2, seed=0):
        q = baselines.student_t(by_hand.encode(x[step.index]), means)
        loss = F.kl_div(q.log(), p[step.index], reduction="batchmean")
        for i, gradient in enumerate(torch.autograd.grad(loss, trained)):
            speed[i] = 0.7 * speed[i] + gradient
            trained[i].data -= 0.2 * speed[i]
    settings = SHORT | {"iterations": 2, "lr": 0.2, "momentum": 0.7}
    *_, last = baselines.dec(model, x, centroids, **settings)
    torch.testing.assert_close(last.centroids, means.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(model.encoder), weights(by_hand.encoder), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_reaches_every_pass(small, monkeypatch, precision):
    x, _, model, centroids = small
    asked, autocast = [], training.autocast
    monkeypatch.setattr(training, "autocast", lambda kind: asked.append(kind) or autocast(kind))
    for states in (
        baselines.dec(model, x, centroids, precision=precision, **SHORT),
        baselines.idec(model, x, centroids, precision=precision, **SHORT),
    ):
        del asked[:]
        assert len(list(states)) == 3 and asked == [precision] * (6 + 3)
    optimizer = baselines.make_optimizer("adam", model.parameters(), 0.01)
    del asked[:]
    baselines.pretrain(model, x, optimizer, 2, 0, 45, precision)
    assert asked == [precision] * 4


def test_the_order_of_batches_is_the_seeds(small):
    x, _, model, centroids = small
    ends = []
    for seed in (0, 1):
        twin = copy.deepcopy(model)
        *_, last = baselines.idec(twin, x, centroids, **SHORT | {"seed": seed})
        ends.append(last.embedding)
    assert not torch.equal(*ends)


def test_labels_are_of_the_assignment_and_not_of_its_target():
    """The target weighs large clusters down, so that its largest entry can be another one."""
    model = torch.nn.Linear(1, 1)
    model.encode, model.encoder = lambda x: x, model
    x = torch.tensor([[0.0]] * 20 + [[0.49]] + [[1.0]] * 5)
    state = next(baselines.dec(model, x, np.array([[0.0], [1.0]], np.float32), **SHORT))
    assert state.labels.tolist() == [0] * 21 + [1] * 5 and state.p[20].argmax() == 1


def test_states_do_not_change_after_they_were_yielded(small):
    x, _, model, centroids = small
    states = baselines.dec(model, x, centroids, **SHORT | {"lr": 0.5})
    kept = next(states)
    copies = copy.deepcopy(kept)
    assert next(states).iteration == 3
    for name in ("embedding", "q", "p", "centroids"):
        assert torch.equal(getattr(kept, name), getattr(copies, name))
        assert not getattr(kept, name).requires_grad
    assert torch.equal(copies.centroids, torch.tensor(centroids)) and kept.labels.dtype == np.int64


def test_a_seed_names_the_start_of_kmeans_and_of_the_mixture():
    torch.manual_seed(0)
    z = torch.rand(200, 3)
    for group in (baselines.kmeans, baselines.gmm):
        found = []
        for seed in (0, 0, 1):
            np.random.seed(len(found))
            found.append(group(z, 12, seed, n_init=1)[0])
        assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_images_are_grouped_by_all_their_pixels():
    x = torch.rand(60, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    labels, centroids = baselines.kmeans(x, 4, 0)
    assert centroids.shape == (4, 18) and np.array_equal(labels, baselines.kmeans(x.flatten(1), 4, 0)[0])


def test_the_mixture_is_the_most_likely_of_its_starts():
    z = torch.rand(300, 3, generator=torch.Generator().manual_seed(2))
    single = [baselines.gmm(z, 12, seed, n_init=1)[1].lower_bound_ for seed in range(5)]
    best = baselines.gmm(z, 12, int(np.argmin(single)), n_init=10)[1].lower_bound_
    assert best > min(single) + 0.01
    labels, mixture = baselines.gmm(z, 12, 0)
    assert mixture.means_.dtype == np.float64
    assert mixture.n_init == 5 and np.array_equal(labels, mixture.predict(z.double().numpy()))
