"""The step generator: what it visits, keeps and refuses, and that a run repeats bit by bit."""

import inspect
import os
import random
import sys
import types

import numpy as np
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
    with pytest.raises(
        training.CollapseError, match="step 0: cluster 0 holds 100% of the points, more than max_share = 0.9"
    ):
        loop.watch_clusters(torch.zeros(10, dtype=torch.int64), 4)
    with pytest.raises(training.CollapseError, match="cluster 1 holds 95%"):
        loop.watch_clusters(torch.tensor([0] + [1] * 19), 4)
    with pytest.raises(training.CollapseError):
        loop.watch_clusters(labels.numpy(), 4, max_share=0.8)


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


def test_the_order_is_that_of_a_generator_of_its_own():
    """Each pass takes the next permutation of a generator with the seed; torch's own stands still."""
    torch.manual_seed(9)
    before = torch.get_rng_state()
    batches = visited(7, 4, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    expected = [part for _ in range(2) for part in torch.randperm(7, generator=generator).split(4)]
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
    assert batches[0].dtype == torch.int64 and batches[0].device.type == training.device().type


def test_defaults_are_an_order_of_seed_0_and_float32():
    signature = inspect.signature(training.steps).parameters
    defaults = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    expected = {"epochs": None, "seed": 0, "iterations": None, "precision": "float32", "smallest": 1}
    assert {name: defaults[name] for name in expected} == expected
    assert inspect.signature(training.Steps.watch_clusters).parameters["max_share"].default == 0.9


def test_a_seed_names_what_all_three_libraries_draw():
    def drawn(seed):
        training.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.backends.cudnn.benchmark = True
    try:
        first = drawn(4)
        random.random(), np.random.rand(), torch.rand(1)
        assert first == drawn(4) and not set(first) & set(drawn(5))
        assert first == (random.Random(4).random(), np.random.RandomState(4).rand(), first[2])
        assert first[2] == torch.rand(1, generator=torch.Generator().manual_seed(4)).item()
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.backends.cudnn.benchmark = False


def test_history_and_means_hold_finished_steps_alone():
    loop = training.steps(1, 1, iterations=5)
    weight = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in loop:
        step.update(optimizer, 0 * weight, {"number": weight.detach() * (step.number + 1) ** 2})
        assert len(loop.history["number"]) == step.number
        if step.number == 3:
            break
    assert loop.history["number"].tolist() == [1, 4, 9] and loop.history["number"].dtype == np.float32
    assert loop.means() == {"number": pytest.approx(14 / 3)} and loop.means(2) == {"number": 9}
    assert loop.number == 3 and len(loop) == 5


def test_a_step_does_not_add_to_the_gradient_before():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for step in training.steps(1, 1, iterations=3):
        step.update(optimizer, weight.sum(), {"loss": weight.sum()})
    assert weight.item() == -3


def test_a_term_that_needs_a_gradient_is_kept_as_a_number_alone():
    loop, weight = training.steps(1, 1, iterations=1), torch.nn.Parameter(torch.ones(1))
    for step in loop:
        step.update(torch.optim.SGD([weight], lr=1.0), weight.sum(), {"loss": weight.sum()})
    assert loop._terms["loss"].grad_fn is None and loop.history["loss"].tolist() == [1]


def test_a_finite_part_does_not_hide_a_loss_that_is_not():
    weight = torch.nn.Parameter(torch.ones(1))
    step = next(iter(training.steps(1, 1, iterations=1)))
    with pytest.raises(FloatingPointError, match="part is -inf at step 0"):
        step.update(torch.optim.SGD([weight], lr=1.0), weight.sum(), {"part": -weight.sum() * float("inf")})


def test_sizes_are_refused_before_the_first_step():
    for wrong in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(ValueError, match="n, batch_size and the length must be at least 1"):
            training.steps(*wrong, epochs=1)
    with pytest.raises(ValueError, match="give either epochs or iterations"):
        training.steps(1, 1)


@pytest.mark.parametrize(
    ("share", "limit", "stops"), [(9, 0.9, False), (10, 0.9, True), (8, 0.8, False), (9, 0.8, True)]
)
def test_a_share_equal_to_the_largest_is_no_collapse(share, limit, stops):
    labels = torch.tensor([1] * share + [0] * (10 - share))
    loop = training.steps(10, 5, epochs=1)
    if stops:
        with pytest.raises(training.CollapseError, match=f"cluster 1 holds {share}0% of the points"):
            loop.watch_clusters(labels, 3, limit)
    else:
        assert loop.watch_clusters(labels, 3, limit).tolist() == [10 - share, share, 0]


@pytest.mark.parametrize(
    ("cuda", "native", "expected"),
    [
        (True, True, "bfloat16"),
        (True, False, "float32"),
        (False, True, "bfloat16"),
        (False, False, "float32"),
    ],
)
def test_auto_is_bfloat16_only_where_the_hardware_has_it(monkeypatch, cuda, native, expected):
    """A GPU that emulates it says yes unless asked for itself; what the other device has does not count."""
    on_gpu, on_cpu = (native, not native) if cuda else (not native, native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: on_gpu or including_emulation
    )
    there = {"avx512_bf16": on_cpu, "avx512_vnni": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)
    assert training.resolve_precision("auto") == training.resolve_precision() == expected
    assert training.device().type == ("cuda" if cuda else "cpu")


def test_progress_is_shown_where_somebody_watches(monkeypatch):
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert not training._interactive()
    monkeypatch.setitem(os.environ, "JPY_SESSION_NAME", "chapter")
    assert training._interactive()
    monkeypatch.delenv("JPY_SESSION_NAME")
    monkeypatch.setitem(sys.modules, "google.colab", types)
    assert training._interactive()
    monkeypatch.delitem(sys.modules, "google.colab")
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    assert training._interactive()


def test_weights_and_losses_stay_in_float32_under_bfloat16():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    loop = training.steps(4, 2, epochs=1, precision="bfloat16")
    for step in loop:
        with step.autocast():
            out = model(torch.ones(2, 3))
        assert out.dtype == torch.bfloat16 and step.precision == "bfloat16"
        step.update(optimizer, out.float().square().mean(), {"loss": out.float().square().mean()})
    assert all(w.dtype == torch.float32 for w in model.parameters())
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("n", "batch_size", "smallest", "sizes"),
    [
        (21, 10, 2, [10, 11]),
        (21, 10, 1, [10, 10, 1]),
        (22, 10, 2, [10, 10, 2]),
        (5, 5, 2, [5]),
        (5, 9, 5, [5]),
    ]
    + [(11, 10, 2, [11]), (23, 10, 4, [10, 13]), (3, 2, 2, [3])],
)
def test_a_last_batch_that_is_too_small_joins_the_one_before(n, batch_size, smallest, sizes):
    """Batch normalisation in training cannot take one sample."""
    loop = training.steps(n, batch_size, epochs=2, seed=3, smallest=smallest)
    batches = [step.index.clone() for step in loop]
    assert [len(batch) for batch in batches] == 2 * sizes and len(loop) == 2 * len(sizes)
    order = torch.cat([step.index.clone() for step in training.steps(n, batch_size, epochs=2, seed=3)])
    assert torch.equal(torch.cat(batches), order)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 5), (5, 1)])
def test_batches_that_cannot_hold_the_smallest_number_are_refused(n, batch_size):
    with pytest.raises(ValueError, match=f"at least 2 samples, got n {n}, batch_size {batch_size}"):
        training.steps(n, batch_size, epochs=1, smallest=2)


def test_a_rate_is_constant_or_falls_to_zero_along_a_cosine():
    for schedule, expected in (("constant", [0.4] * 5), ("cosine", [0.4, 0.3414, 0.2, 0.0586, 0.0])):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        rate, seen = training.falling(optimizer, schedule, 4), []
        for _ in range(5):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            rate.step()
        assert seen == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match='schedule must be "constant" or "cosine", got \'linear\''):
        training.falling(optimizer, "linear", 4)
