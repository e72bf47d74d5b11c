"""The step generator: what it visits, keeps and refuses, and that a run repeats bit by bit."""

import pytest
import torch

from deepclust_nb import networks, training


def visited(n, batch_size, **length):
    return [step.index.clone() for step in training.steps(n, batch_size, seed=3, **length)]


def test_an_epoch_visits_every_sample_once():
    batches = visited(103, 20, epochs=2)
    assert [len(batch) for batch in batches] == [20, 20, 20, 20, 20, 3] * 2
    first, second = torch.cat(batches[:6]), torch.cat(batches[6:])
    for epoch in (first, second):
        assert sorted(epoch.tolist()) == list(range(103))
    assert not torch.equal(first, second) and not torch.equal(first, torch.arange(103))


def test_a_number_of_steps_is_kept_exactly():
    batches = visited(100, 30, iterations=6)
    assert [len(batch) for batch in batches] == [30, 30, 30, 10, 30, 30]
    assert all(torch.equal(a, b) for a, b in zip(batches, visited(100, 30, epochs=2), strict=False))


def test_the_order_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = visited(50, 50, epochs=1)
    torch.manual_seed(2)
    assert torch.equal(first[0], visited(50, 50, epochs=1)[0])
    other = [step.index for step in training.steps(50, 50, epochs=1, seed=4)]
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"epochs": 1, "iterations": 1},
        {"epochs": 0},
        {"iterations": 0},
        {"epochs": 1, "precision": "half"},
    ],
)
def test_wrong_lengths_and_precisions_are_refused(wrong):
    with pytest.raises(ValueError):
        training.steps(10, 5, **wrong)
    with pytest.raises(ValueError, match="at least 1"):
        training.steps(0, 5, epochs=1)


def parabola(steps, scale=lambda number: 1.0):
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    for step in steps:
        first, second = weight.square().sum(), scale(step.number) * weight.sum()
        step.update(optimizer, first + second, {"square": first, "line": second})
    return weight


def test_update_descends_and_keeps_every_term():
    loop = training.steps(1, 1, iterations=3)
    weight = parabola(loop)
    # w -> w - (2 w + 1) / 4 from 2: 0.75, 0.125, -0.1875
    assert weight.item() == -0.1875 and loop.number == 3 == len(loop)
    assert loop.history["line"].tolist() == [2, 0.75, 0.125]
    assert loop.history["square"].tolist() == [4, 0.5625, 0.015625]
    assert loop.means(1)["line"] == pytest.approx((0.75 + 0.125) / 2)


def test_a_loss_that_is_not_finite_stops_with_term_and_step():
    loop = training.steps(1, 1, iterations=9)
    with pytest.raises(FloatingPointError, match="line is nan at step 2"):
        parabola(loop, lambda number: float("nan") if number == 2 else 1.0)
    assert loop.number == 2


def test_the_weights_survive_a_loss_that_is_not_finite():
    weight = torch.nn.Parameter(torch.ones(1))
    step = next(iter(training.steps(1, 1, iterations=1)))
    with pytest.raises(FloatingPointError, match="loss is inf"):
        step.update(torch.optim.SGD([weight], lr=1.0), (weight * float("inf")).sum(), {"fine": weight.sum()})
    assert weight.item() == 1


def test_collapse_is_noticed_at_its_share():
    loop = training.steps(10, 5, epochs=1)
    labels = torch.tensor([0] * 9 + [2])
    assert loop.watch_clusters(labels, 4).tolist() == [9, 0, 1, 0]
    with pytest.raises(training.CollapseError, match="step 0: cluster 0 holds 100%"):
        loop.watch_clusters(torch.zeros(10, dtype=torch.int64), 4)
    with pytest.raises(training.CollapseError, match="cluster 1 holds 95%"):
        loop.watch_clusters(torch.tensor([0] + [1] * 19), 4)
    with pytest.raises(training.CollapseError):
        loop.watch_clusters(labels.numpy(), 4, largest=0.8)


def trained(seed):
    training.seed_everything(seed)
    model = networks.Autoencoder(30, n_code=4, widths=(20,))
    x = torch.rand(200, 30)
    optimizer = torch.optim.Adam(model.parameters())
    for step in training.steps(200, 32, epochs=3, seed=seed):
        with step.autocast():
            loss = (model(x[step.index])[1] - x[step.index]).square().mean()
        step.update(optimizer, loss, {"loss": loss})
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def test_float32_runs_repeat_bit_by_bit():
    assert torch.equal(trained(5), trained(5))
    assert not torch.equal(trained(5), trained(6))


def test_precision_is_resolved_and_used():
    assert training.resolve_precision("auto") in ("float32", "bfloat16")
    a = torch.rand(4, 4, device=training.device())
    for precision, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert training.resolve_precision(precision) == precision
        step = next(iter(training.steps(4, 2, epochs=1, precision=precision)))
        with step.autocast():
            assert (a @ a).dtype == kind
