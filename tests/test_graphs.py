"""Replayed steps: the loop keeps the contract of `training.steps`, records and replays when it should, and on
a GPU gives the numbers that plain steps give.

Without a GPU a stand-in records: its `replay` runs the body again, once less after each recording, which the
body itself ran. So what is tested is when steps are recorded and with which batch they are replayed.
"""

import copy

import numpy as np
import pytest
import torch
from loader import definitions

from deepclust_nb import baselines, data, graphs, records, training

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(50, 6, device=training.device())


def trained(loop, x, body=None):
    """A layer trained by a loop: its weights, and the batches and losses of each step."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(6, 2).to(x.device)
    optimizer = baselines.make_optimizer("sgd", layer.parameters(), 0.1)
    batches = []

    def step_of(step):
        batches.append(step.index.tolist())
        loss = layer(x[step.index]).square().mean()
        step.update(optimizer, loss, {"loss": loss, "half": loss / 2})

    if body is not None:
        body.append(lambda: step_of(loop))
    for step in loop:
        step_of(step)
    return layer.weight.detach().clone(), batches, loop.history


@pytest.fixture
def recorded(monkeypatch):
    """Stands in for CUDA's recorder; (list that takes the body, list of what was asked of it)."""
    body, asked = [], []

    class Recorder:
        def capture_begin(self, pool, capture_error_mode):
            asked.append("record")
            self.fresh = True

        def capture_end(self):
            pass

        def pool(self):
            return (0, 1)

        def replay(self):
            asked.append("replay")
            if not self.fresh:
                with torch.enable_grad():
                    body[0]()
            self.fresh = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    return body, asked


def replaying(n, size, epochs=None, iterations=None, every=None):
    loop = graphs.Replayed(n, size, epochs, 3, iterations, "float32", None, every=every)
    loop._replays = True
    return loop


@pytest.mark.parametrize("size, n_short", [(10, 0), (16, 4)])
def test_a_replayed_loop_trains_as_a_plain_one(x, recorded, size, n_short):
    plain = trained(training.steps(50, size, 4, 3), x)
    body, asked = recorded
    found = trained(replaying(50, size, epochs=4), x, body)
    assert torch.equal(plain[0], found[0]) and plain[1] == found[1]
    for name, values in plain[2].items():
        assert np.array_equal(values, found[2][name])
    # Three steps and every short batch run as they stand; one is recorded, and replayed like all others.
    assert asked.count("record") == 1 and asked.count("replay") == len(plain[1]) - 3 - n_short


def test_every_check_is_run_as_it_stands_and_recorded_anew(x, recorded):
    body, asked = recorded
    trained(replaying(50, 10, every=4, iterations=12), x, body)
    # Steps 0, 4 and 8 are checks; of the others 1 and 2 still warm up.
    assert asked == ["record", "replay"] + 2 * ["record", "replay", "replay", "replay"]


def test_the_steps_between_checks_are_read_off_the_function_that_loops():
    def of_a_method(interval):
        return graphs.steps(9, 3, 1)

    def of_another(update_interval):
        return graphs.steps(9, 3, 1)

    def without(every):
        return graphs.steps(9, 3, 1)

    assert [f(7).every for f in (of_a_method, of_another)] == [7, 7] and without(7).every > 1e9


def test_gradients_from_before_are_dropped_when_a_step_is_recorded(x, recorded, monkeypatch):
    # A kernel that added to them would go on writing into memory that is another's by then.
    body, seen = recorded[0], []
    monkeypatch.setattr(graphs, "_optimizers", set())
    make = graphs._capturable(baselines.make_optimizer)
    weight = torch.nn.Parameter(torch.ones(2, device=x.device))
    other = make("adam", [weight], 0.1)
    assert all(group["capturable"] for group in other.param_groups)
    weight.grad = torch.ones_like(weight)
    begin = torch.cuda.CUDAGraph.capture_begin
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "capture_begin", lambda *a, **k: (seen.append(weight.grad), begin(*a, **k))
    )
    trained(replaying(50, 10, iterations=5), x, body)
    assert seen == [None]


def test_a_loss_that_is_not_finite_is_named_within_a_hundred_steps(x):
    loop = graphs.steps(50, 10, iterations=300)
    weight = torch.nn.Parameter(torch.ones(1, device=x.device))
    optimizer = baselines.make_optimizer("sgd", [weight], 0.1)
    with pytest.raises(FloatingPointError, match="loss is nan at step 200"):
        for step in loop:
            loss = (weight * (torch.nan if step.number >= 130 else 1.0)).sum()
            step.update(optimizer, loss, {"loss": loss})
    assert loop.number == 200


def test_a_rate_that_falls_is_refused():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = baselines.make_optimizer("sgd", [weight], 0.1)
    falling = graphs._constant(training.falling)
    with pytest.raises(ValueError, match="replayed steps keep their learning rate"):
        falling(optimizer, "cosine", 10)
    optimizer.step()
    falling(optimizer, "constant", 10).step()
    assert optimizer.param_groups[0]["lr"] == 0.1


@without_gpu
def test_without_a_gpu_graphs_are_refused():
    with pytest.raises(RuntimeError, match="graphs need a CUDA device"):
        graphs.install()
    assert training.steps is not graphs.steps


def dynae_run(x):
    """DynAE's pretraining, its own phase and IDEC on unmoved images: histories, states, weights."""
    chapter, widths = definitions("dynae"), [32, 32, 32]
    how = dict(batch_size=64, seed=0, precision="float32", view=lambda images: images)
    training.seed_everything(0)
    model = chapter.networks.Autoencoder(x[0].numel(), widths=widths).to(x.device)
    history = chapter.pretrain(
        model, x, iterations=60, lr=1e-3, schedule="constant", adversary="none", critic_weight=0.5,
        widths=widths, **how,
    )  # fmt: skip
    twin, how = copy.deepcopy(model), how | {"iterations": 40, "max_share": 1.0}
    means = baselines.kmeans(baselines.encode(model, x), 10, 0)[1]
    states = chapter.dynae(
        model, x, n_clusters=10, kappa=3.0, drops="code", gamma=1.0, consistency=True, optimizer="sgd",
        lr=0.01, interval=7, tol=0.0, **how,
    )  # fmt: skip
    seen = [(state.iteration, state.labels.tolist()) for state in states]
    seen += [state.labels.tolist() for state in baselines.idec(twin, x, means, update_interval=9, **how)]
    return history, seen, [p.detach() for net in (model, twin) for p in net.parameters()]


@pytest.fixture
def images():
    chapter = definitions("dynae")
    return chapter.prepared(data.load("mnist_5k").x[:700], 2, 16).to(training.device())


def agree(first, second):
    assert first[1] == second[1]
    assert all(np.array_equal(first[0][name], second[0][name]) for name in first[0])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@without_gpu
def test_a_chapter_runs_on_this_loop_unchanged(images, monkeypatch):
    plain = dynae_run(images)
    monkeypatch.setattr(training, "steps", graphs.steps)
    agree(plain, dynae_run(images))


@needs_gpu
def test_on_a_gpu_replayed_steps_give_the_numbers_of_plain_ones(images, monkeypatch):
    plain = dynae_run(images)
    for module, name in ((training, "steps"), (training, "falling"), (baselines, "make_optimizer")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(records, "record", records.record)
    with torch.cuda.stream(torch.cuda.Stream()):
        graphs.install()
        agree(plain, dynae_run(images))
