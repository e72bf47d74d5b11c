"""The chapter `kdvae`: experts that compete for images, and the runs, records and refusals of the chapter."""

import functools
import inspect
import itertools
import json
import math
import types

import golden
import numpy as np
import pytest
import torch
from loader import cell_with, chapter_file, definitions
from sklearn.neighbors import KNeighborsClassifier
from torch.distributions import Bernoulli, Normal, kl_divergence

from deepclust_nb import baselines, checks, data, metrics, mixtures, training

CHAPTER = "kdvae"
checked = functools.partial(golden.checked, CHAPTER)
TINY = dict(start="autoencoder", start_widths=[32, 32, 32], expert_widths=[16, 16], n_clusters=3)
TINY |= dict(batch_size=22, vade_epochs=1, warm_epochs=2, epochs=2, max_share=1.0)
# Six clusters of 88 images: mixtures differ between starts, so the likeliest is not a matter of rounding.
SIX = TINY | dict(n_clusters=6, batch_size=44, lr=0.004)
SHIPPED = SIX | dict(start="shipped", start_widths=[300, 300, 300])
BOUND = dict(vade_weight=1.0, mixture_lr=0.002)
LOOKS = dict(vade_epochs=2, mixture_lr=0.003, warm_epochs=2, epochs=3)
COLD = dict(warm_epochs=0, epochs=3, expert_widths=[250, 50])


def case(**parameters):
    """A function to the numbers of one run, what each look told among them."""

    def summary():
        namespace, seen = golden.run(CHAPTER, **parameters)
        traces = {name: namespace[name] for name in ("kdae_trace", "trace") if name in namespace}
        return golden.summary(namespace, seen) | {"traces": golden.plain(traces)}

    return summary


GOLDEN = {
    "defaults": lambda: golden.plain(checked()),
    "shipped start": case(**SHIPPED, seed=2),
    "start vade, bernoulli": case(**SIX | BOUND | dict(start="vade", vade_epochs=2, seed=3, ablation=False)),
    "autoencoder, cut and whole size": case(
        **SIX | BOUND | dict(margin=3, side=0, start_epochs=2, n_images=70)
    ),
    "augmented": case(**SIX | dict(start="augmented", start_epochs=2, vade_epochs=0)),
    "gaussian": case(**SIX | dict(likelihood="gaussian", batch_size=60, vade_epochs=0)),
    "no ablation": case(**SIX | COLD | dict(ablation=False, vade_epochs=0)),
    "a reseeding": case(**SIX | dict(reseed_share=0.9, epochs=3, ablation=False, vade_epochs=0)),
    "no VaDE": case(**SIX | dict(vade_epochs=0, ablation=False, warm_epochs=3, epochs=1)),
}


@pytest.fixture(scope="module")
def kdvae():
    return definitions(CHAPTER)


@pytest.fixture(params=["bernoulli", "gaussian"])
def likelihood(request):
    return request.param


@pytest.fixture(scope="module")
def whole():
    """A run of every method: what it left behind, and what was seen."""
    return golden.run(CHAPTER, **SIX | dict(seed=1, start_epochs=3, vade_weight=2.5, **LOOKS))


def some(kdvae, k=4, d=6, n=9, likelihood="bernoulli", seed=0):
    """Experts with every bias set, images in [0, 1] and noise."""
    torch.manual_seed(seed)
    model = kdvae.Experts(k, d, [16, 16], likelihood)
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            for bias in stack.biases:
                bias += 0.5 * torch.randn_like(bias)
    return model, torch.rand(n, d), torch.randn(k, n, 10)


def trained(kdvae, model, x, labels, **changed):
    """All looks of a run."""
    how = dict(warm_epochs=2, epochs=2, lr=0.01, batch_size=8, seed=0, precision="float32")
    how |= dict(reseed_share=0.0, max_share=1.0)
    torch.manual_seed(5)
    return list(kdvae.kdvae(model, x, torch.as_tensor(labels), **how | changed))


def copied(model):
    return [weight.detach().clone() for weight in model.parameters()]


# ---------------------------------------------------------------- one expert's bound


def by_loop(stack, x, i):
    """Expert i's output, layer by layer."""
    for n, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        x = x @ weight[i] + bias[i]
        x = torch.where(x > 0, x, 0) if n < len(stack.weights) - 1 else x
    return x


def test_a_stack_is_a_loop_over_its_networks(kdvae):
    torch.manual_seed(0)
    stack = kdvae.Stack(3, [4, 5, 7, 2]).double()
    assert [tuple(weight.shape) for weight in stack.weights] == [(3, 4, 5), (3, 5, 7), (3, 7, 2)]
    assert [tuple(bias.shape) for bias in stack.biases] == [(3, 1, 5), (3, 1, 7), (3, 1, 2)]
    assert all((bias == 0).all() for bias in stack.biases)
    with torch.no_grad():
        for bias in stack.biases:
            bias.normal_()
    shared, own = torch.randn(6, 4).double(), torch.randn(3, 6, 4).double()
    for i in range(3):
        torch.testing.assert_close(stack(shared)[i], by_loop(stack, shared, i))
        torch.testing.assert_close(stack(own)[i], by_loop(stack, own[i], i))
    assert (stack(shared) < 0).any()  # nothing cuts the last layer


def test_weights_start_as_glorot_says(kdvae):
    torch.manual_seed(0)
    for weight in kdvae.Stack(3, [300, 200, 50]).weights:
        bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
        assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not torch.allclose(weight[0], weight[1])


def test_an_expert_starts_with_a_narrow_cloud(kdvae, likelihood):
    model = kdvae.Experts(3, 8, [16, 12], likelihood, n_code=4)
    last = model.encoder.biases[-1]
    assert (last[..., :4] == 0).all() and (last[..., 4:] == -3).all()
    sizes = [list(w.shape[1:]) for stack in (model.encoder, model.decoder) for w in stack.weights]
    outputs = 8 if likelihood == "bernoulli" else 16
    assert sizes == [[8, 16], [16, 12], [12, 8], [4, 12], [12, 16], [16, outputs]]
    mean, log_variance = model.posterior(torch.rand(5, 8))
    assert mean.shape == log_variance.shape == (3, 5, 4)


def test_the_posterior_is_mean_then_log_variance_within_bounds(kdvae):
    model, x, _ = some(kdvae)
    mean, log_variance = model.posterior(30 * x)
    output = model.encoder(30 * x)
    torch.testing.assert_close(mean, output[..., :10])
    torch.testing.assert_close(log_variance, output[..., 10:].clamp(-8, 8))
    with torch.no_grad():
        model.encoder.biases[-1][:, :, 10:15], model.encoder.biases[-1][:, :, 15:] = -1e3, 1e3
    log_variance = model.posterior(x)[1]
    assert (log_variance[..., :5] == -8).all() and (log_variance[..., 5:] == 8).all()


def expected_fit(output, x, likelihood):
    """log p(x | z) by torch.distributions."""
    if likelihood == "bernoulli":
        return Bernoulli(logits=output, validate_args=False).log_prob(x.expand_as(output)).sum(dim=2)
    d = output.shape[2] // 2
    return Normal(output[..., :d], (output[..., d:] / 2).exp()).log_prob(x).sum(dim=2)


def test_likelihoods_are_those_of_torch_distributions(kdvae, likelihood):
    torch.manual_seed(0)
    output = torch.randn(3, 5, 6 if likelihood == "bernoulli" else 12)
    for x in (torch.rand(5, 6), torch.rand(3, 5, 6)):
        expected = expected_fit(output, x, likelihood)
        torch.testing.assert_close(kdvae.log_likelihood(output, x, likelihood), expected)


def test_a_constant_feature_earns_no_more_than_the_floor_allows(kdvae):
    def earned(spread, x):
        return kdvae.log_likelihood(torch.tensor([[[0.0, spread]]]), torch.tensor([[x]]), "gaussian").item()

    most = 3 - 0.5 * math.log(2 * math.pi)
    assert [earned(spread, 0.0) for spread in (-6.0, -7.0, -1e6)] == pytest.approx([most] * 3)
    assert earned(-5.0, 0.0) == pytest.approx(most - 0.5)
    far = -3 - 0.5 * math.log(2 * math.pi) - 0.5 * 100 / math.exp(6)
    assert [earned(spread, 10.0) for spread in (6.0, 1e6)] == pytest.approx([far] * 2)
    # a hundred constant features do not decide against one that fits
    constant = torch.cat([torch.zeros(1, 1, 101), torch.full((1, 1, 101), -1e9)], dim=2)
    assert kdvae.log_likelihood(constant, torch.zeros(1, 101), "gaussian").item() == pytest.approx(101 * most)


def test_the_divergence_is_that_of_torch_distributions_and_zero_only_at_the_bell(kdvae):
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 3, 5, 10)
    cloud = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(cloud, Normal(0.0, 1.0)).sum(dim=2)
    torch.testing.assert_close(kdvae.divergence(mean, log_variance), expected)
    flat = kdvae.divergence(mean.flatten(0, 1), log_variance.flatten(0, 1))
    torch.testing.assert_close(flat, mixtures.gaussian_kl(mean.flatten(0, 1), log_variance.flatten(0, 1)))
    zero = torch.zeros(2, 4)
    assert (kdvae.divergence(zero, zero) == 0).all()
    for value in (-0.1, 0.1):
        assert (kdvae.divergence(zero + value, zero) > 0).all()
        assert (kdvae.divergence(zero, zero + value) > 0).all()


def test_equation_6_is_the_bound_at_the_draw(kdvae, likelihood):
    model, x, noise = some(kdvae, likelihood=likelihood)
    mean, log_variance = model.posterior(x)
    cloud = Normal(mean, (log_variance / 2).exp())
    fit = expected_fit(model.decoder(mean + cloud.stddev * noise), x, likelihood)
    kl = kl_divergence(cloud, Normal(0.0, 1.0)).sum(dim=2)
    torch.testing.assert_close(kdvae.score(model, x, noise), fit - kl)
    torch.testing.assert_close(kdvae.score(model, x, noise, kl=False), fit)
    # images of its own for each expert
    own = torch.rand(4, 9, 6)
    for i in range(4):
        torch.testing.assert_close(kdvae.score(model, own, noise)[i], kdvae.score(model, own[i], noise)[i])


def test_equation_8_is_brute_force(kdvae, likelihood):
    """log p(x | z) + log N(z; 0, I) - log N(z; z, Sigma) at the mean of the code."""
    model, x, _ = some(kdvae, likelihood=likelihood)
    mean, log_variance = model.posterior(x)
    fit = expected_fit(model.decoder(mean), x, likelihood)
    cloud = Normal(mean, (log_variance / 2).exp())
    by_hand = fit + (Normal(0.0, 1.0).log_prob(mean) - cloud.log_prob(mean)).sum(dim=2)
    torch.testing.assert_close(kdvae.rule(model, x), by_hand, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(kdvae.rule(model, x, kl=False), fit)


def test_the_gap_between_equations_6_and_8_at_the_mean(kdvae, likelihood):
    model, x, noise = some(kdvae, likelihood=likelihood)
    gap = kdvae.score(model, x, torch.zeros_like(noise)) - kdvae.rule(model, x)
    variance = model.posterior(x)[1].exp()
    torch.testing.assert_close(gap, 0.5 * (1 - variance).sum(dim=2), atol=1e-4, rtol=1e-5)
    assert gap.std() > 0.01  # not the same for all experts: the two rules differ


# ---------------------------------------------------------------- the best takes it


@pytest.mark.parametrize("seed", range(4))
def test_images_are_dealt_as_by_a_loop(kdvae, seed):
    generator = torch.Generator().manual_seed(seed)
    winner = torch.randint(0, 4, (13,), generator=generator) * (1 if seed else 2)
    k, hands = 8, [[] for _ in range(8)]
    for i, expert in enumerate(winner.tolist()):
        hands[expert].append(i)
    m = max(map(len, hands))
    assert kdvae.dealt(winner, k).tolist() == [hand + [-1] * (m - len(hand)) for hand in hands]


def test_one_expert_may_get_everything(kdvae):
    assert kdvae.dealt(torch.tensor([1, 1, 1]), 3).tolist() == [[-1] * 3, [0, 1, 2], [-1] * 3]
    assert kdvae.dealt(torch.tensor([2]), 3).tolist() == [[-1], [-1], [0]]


@pytest.mark.parametrize("kl", [True, False])
def test_the_winners_loss_is_the_full_tables(kdvae, likelihood, kl):
    """And so is its gradient; a loser's is zero in every bit."""
    model, x, noise = some(kdvae, likelihood=likelihood)
    winner = torch.tensor([0, 2, 2, 0, 0, 2, 0, 2, 0])  # nothing for experts 1 and 3
    loss = kdvae.winners_loss(model, x, noise, winner, kl)
    found = torch.autograd.grad(loss, [*model.parameters()])
    table = kdvae.score(model, x, noise, kl)
    every = -table.gather(0, winner[None]).sum() / 9
    torch.testing.assert_close(loss, every)
    expected = torch.autograd.grad(every, [*model.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert (one[[1, 3]] == 0).all() and one[0].abs().max() > 0 and one[2].abs().max() > 0


def test_the_maximum_moves_its_winners_alone(kdvae):
    model, x, noise = some(kdvae)
    table = kdvae.score(model, x, noise)
    winner = table.argmax(dim=0)
    assert 1 < len(winner.unique()) <= 4
    expected = torch.autograd.grad(-table.max(dim=0).values.mean(), [*model.parameters()])
    found = torch.autograd.grad(kdvae.winners_loss(model, x, noise, winner), [*model.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    losers = [i for i in range(4) if i not in winner]
    assert all((grad[losers] == 0).all() for grad in found)


def test_the_winners_loss_does_not_see_the_order_nor_what_fills_the_table(kdvae):
    model, x, noise = some(kdvae)
    winner = torch.tensor([3, 1, 1, 1, 1, 1, 0, 1, 1])
    loss = kdvae.winners_loss(model, x, noise, winner)
    found = torch.autograd.grad(loss, [*model.parameters()])
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])  # another image stands in the filled-up places
    again = kdvae.winners_loss(model, x[order], noise[:, order], winner[order])
    torch.testing.assert_close(loss, again)
    for one, other in zip(found, torch.autograd.grad(again, [*model.parameters()]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    # adding images of expert 3 leaves the sum over the others
    more = torch.cat([torch.tensor([3]), winner])
    longer = kdvae.winners_loss(model, torch.cat([x[:1], x]), torch.cat([noise[:, :1], noise], dim=1), more)
    one_more = -kdvae.score(model, x, noise)[3, 0]
    torch.testing.assert_close(10 * longer, 9 * loss + one_more)


def test_equal_experts_have_equal_scores_those_of_one_autoencoder(kdvae):
    model, x, noise = some(kdvae, d=6)
    with torch.no_grad():
        for weight in model.parameters():
            weight[:] = weight[1]
    noise = noise[:1].expand(4, -1, -1)
    table, rules = kdvae.score(model, x, noise), kdvae.rule(model, x)
    for i in range(4):
        torch.testing.assert_close(table[i], table[0])
        torch.testing.assert_close(rules[i], rules[0])
    single = mixtures.VAE(6, widths=(16, 16))
    with torch.no_grad():
        layers = [layer for layer in single.encoder if hasattr(layer, "weight")]
        for layer, weight, bias in zip(layers, model.encoder.weights, model.encoder.biases, strict=True):
            layer.weight.copy_(weight[0].T[: len(layer.weight)])
            layer.bias.copy_(bias[0, 0][: len(layer.bias)])
        single.log_variance.weight.copy_(model.encoder.weights[-1][0].T[10:])
        single.log_variance.bias.copy_(model.encoder.biases[-1][0, 0, 10:])
        layers = [layer for layer in single.decoder if hasattr(layer, "weight")]
        for layer, weight, bias in zip(layers, model.decoder.weights, model.decoder.biases, strict=True):
            layer.weight.copy_(weight[0].T)
            layer.bias.copy_(bias[0, 0])
    mean, log_variance = single.posterior(x)
    output = single.logits(mean + (log_variance / 2).exp() * noise[0])
    bound = -mixtures.reconstruction_nll(output, x, "bernoulli") - mixtures.gaussian_kl(mean, log_variance)
    torch.testing.assert_close(table.max(dim=0).values, bound)


def test_the_maximum_is_at_least_every_average(kdvae):
    model, x, noise = some(kdvae)
    table = kdvae.score(model, x, noise).double()
    for q in torch.distributions.Dirichlet(torch.full((4,), 0.3).double()).sample((200, 9)):
        assert (table.max(dim=0).values >= (q.T * table).sum(dim=0) - 1e-9).all()
    one_hot = torch.nn.functional.one_hot(table.argmax(dim=0), 4).T
    torch.testing.assert_close((one_hot * table).sum(dim=0), table.max(dim=0).values)


def test_ten_experts_have_more_weights_than_vade(kdvae):
    def count(model):
        return sum(weight.numel() for weight in model.parameters())

    experts = kdvae.Experts(10, 784, [500, 100], "bernoulli")
    assert count(experts) == 8_890_040 == 10 * 889_004
    assert count(mixtures.VAE(784)) == 3_350_804
    sizes = ((10, 2048, 31.8), (4, 2000, 12.4), (6, 561, 5.7))  # STL-10, Reuters, HHAR: with variances
    for k, d, millions in sizes:
        found = count(kdvae.Experts(k, d, [500, 100], "gaussian"))
        assert round(found / 1e6, 1) == millions


# ---------------------------------------------------------------- assigned and started anew


@pytest.mark.parametrize("kl", [True, False])
def test_assigned_is_the_best_by_equation_8_in_parts_of_any_size(kdvae, kl):
    model, _, _ = some(kdvae, d=16)
    images = torch.randint(0, 256, (23, 1, 4, 4), dtype=torch.uint8)
    table = kdvae.rule(model, images.flatten(1).float() / 255, kl)
    for batch_size in (1, 4, 23, 1000):
        experts, best = kdvae.assigned(model, images, kl, batch_size)
        assert torch.equal(experts, table.argmax(dim=0)) and not best.requires_grad
        torch.testing.assert_close(best, table.max(dim=0).values.detach())
    vectors = torch.randn(7, 16)
    assert torch.equal(kdvae.assigned(model, vectors, kl)[0], kdvae.rule(model, vectors, kl).argmax(dim=0))
    assert inspect.signature(kdvae.assigned).parameters["kl"].default is True


def test_equation_8_and_the_mere_fit_assign_differently(kdvae):
    model, x, _ = some(kdvae, n=200)
    assert not torch.equal(kdvae.assigned(model, x)[0], kdvae.assigned(model, x, kl=False)[0])


def test_dead_experts_start_anew_from_the_largest(kdvae):
    model, x, noise = some(kdvae, k=5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    kdvae.winners_loss(model, x, noise, torch.arange(9) % 5).backward()
    optimizer.step()
    before = copied(model)
    memory = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in model.parameters()]
    dead, sizes = torch.tensor([True, False, False, True, False]), torch.tensor([0, 3, 9, 1, 5])
    torch.manual_seed(1)
    kdvae.reseed(model, optimizer, dead, sizes)
    shakes = []
    for weight, old, kept in zip(model.parameters(), before, memory, strict=True):
        assert torch.equal(weight[[1, 2, 4]], old[[1, 2, 4]])
        shakes.append((weight.detach()[[0, 3]] / old[[2, 2]] - 1).flatten(1))
        for name in ("exp_avg", "exp_avg_sq"):
            now = optimizer.state[weight][name]
            assert (now[[0, 3]] == 0).all() and torch.equal(now[[1, 2, 4]], kept[name][[1, 2, 4]])
        assert kept["exp_avg"][[0, 3]].abs().max() > 0
        assert torch.equal(optimizer.state[weight]["step"], kept["step"]) and weight.requires_grad
    shakes = torch.cat(shakes, dim=1)
    assert shakes.std().item() == pytest.approx(0.01, rel=0.1) and abs(shakes.mean().item()) < 0.001
    assert not torch.allclose(shakes[0], shakes[1])


# ---------------------------------------------------------------- the run


def test_the_warm_up_trains_each_expert_on_its_starting_cluster_alone(kdvae):
    """Other images in another cluster leave an expert as it is; one without images learns nothing."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(24, 6, generator=generator), torch.arange(24) % 2 * 2  # none for experts 1 and 3
    other = torch.where((labels == 2)[:, None], torch.rand(24, 6, generator=generator), x)
    ends = []
    for images in (x, other):
        model, _, _ = some(kdvae)
        before = copied(model)
        # to the first look and no further
        torch.manual_seed(5)
        how = dict(warm_epochs=3, epochs=1, lr=0.01, batch_size=8, seed=0, precision="float32")
        state = next(kdvae.kdvae(model, images, labels, **how, reseed_share=0.0, max_share=1.0))
        assert state.iteration == 9
        ends.append(copied(model))
        for old, new in zip(before, ends[-1], strict=True):
            assert torch.equal(old[[1, 3]], new[[1, 3]])
            assert not torch.allclose(old[0], new[0]) and not torch.allclose(old[2], new[2])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(one[2], two[2], atol=1e-3)


def test_after_the_warm_up_the_starting_labels_count_no_more(kdvae):
    ends = []
    for labels in (torch.zeros(24).long(), torch.arange(24) % 4):
        model, _, _ = some(kdvae)
        trained(kdvae, model, some(kdvae, n=24)[1], labels, warm_epochs=0)
        ends.append(copied(model))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("kl", [True, False])
def test_winners_are_the_best_by_equation_6_at_the_draw_that_trains(kdvae, monkeypatch, kl):
    """k-DAE has no noise and no divergence."""
    model, x, _ = some(kdvae, n=24)
    given, loss = [], kdvae.winners_loss

    def spy(model, batch, noise, winner, *rest):
        best = kdvae.score(model, batch, noise, kl).argmax(dim=0)
        given.append((noise.clone(), torch.equal(winner, best), rest))
        return loss(model, batch, noise, winner, *rest)

    monkeypatch.setattr(kdvae, "winners_loss", spy)
    trained(kdvae, model, x, torch.arange(24) % 4, kl=kl)
    assert len(given) == 12 and all(rest == (kl,) for *_, rest in given)
    assert all(best for _, best, _ in given[6:]) and not all(best for _, best, _ in given[:6])
    if not kl:
        assert all((noise == 0).all() for noise, *_ in given)
        return
    noises = torch.stack([noise for noise, *_ in given])
    assert noises.shape == (12, 4, 8, 10) and noises.std().item() == pytest.approx(1, abs=0.05)
    assert len(noises[:, :, 0, 0].unique()) == 48  # each expert and step has draws of its own


def test_looks_come_after_the_warm_up_and_each_epoch(kdvae):
    def iterations(**how):
        model, x, _ = some(kdvae, n=20)  # 3 steps an epoch
        return [state.iteration for state in trained(kdvae, model, x, torch.arange(20) % 4, **how)]

    assert iterations(warm_epochs=2, epochs=3) == [6, 9, 12, 15]
    assert iterations(warm_epochs=1, epochs=1) == [3, 6]
    assert iterations(warm_epochs=0, epochs=3) == [3, 6, 9]  # an untrained model is not looked at
    assert iterations(warm_epochs=0, epochs=1) == [3]


def test_a_look_tells_labels_sizes_changes_and_the_losses_since_the_last(kdvae, monkeypatch):
    model, x, _ = some(kdvae, n=20)
    bounds, update = [], training.Steps.update

    def spy(loop, optimizer, loss, terms):
        assert terms.keys() == {"bound"} and terms["bound"] == -loss
        bounds.append(terms["bound"].item())
        return update(loop, optimizer, loss, terms)

    monkeypatch.setattr(training.Steps, "update", spy)
    states = trained(kdvae, model, x, torch.arange(20) % 4, epochs=4, lr=0.05)
    for last, state in itertools.pairwise([None, *states]):
        assert state.sizes.tolist() == np.bincount(state.labels, minlength=4).tolist()
        expected = 1.0 if last is None else np.mean(state.labels != last.labels)
        assert state.changed == expected and state.reseeded == 0
        since = 0 if last is None else last.iteration
        assert state.losses == {"bound": pytest.approx(np.mean(bounds[since : state.iteration]), rel=1e-5)}
    assert 0 < max(state.changed for state in states[1:]) < 1
    assert np.array_equal(states[-1].labels, kdvae.assigned(model, x)[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_look_scores_in_the_precision_of_the_run(kdvae, monkeypatch, precision):
    model, x, _ = some(kdvae, n=20)
    seen, rule = [], kdvae.rule

    def spy(*given):
        seen.append(torch.is_autocast_enabled("cpu"))
        return rule(*given)

    monkeypatch.setattr(kdvae, "rule", spy)
    states = trained(kdvae, model, x, torch.arange(20) % 4, precision=precision)
    assert seen == [precision == "bfloat16"] * len(states)


def test_k_dae_is_assigned_without_the_divergence(kdvae):
    model, x, _ = some(kdvae, n=200)
    states = trained(kdvae, model, x, torch.arange(200) % 4, kl=False, batch_size=50)
    assert np.array_equal(states[-1].labels, kdvae.assigned(model, x, kl=False)[0])
    assert not np.array_equal(states[-1].labels, kdvae.assigned(model, x)[0])


def test_an_expert_that_starves_starts_anew_after_the_look(kdvae, monkeypatch):
    """Those below the share of n / k; counted from the next look on."""
    model, x, _ = some(kdvae, n=24)
    calls = []
    monkeypatch.setattr(kdvae, "reseed", lambda *given: calls.append(given[2:]))
    states = trained(kdvae, model, x, torch.arange(24) % 4, epochs=4, reseed_share=0.9)
    so_far, expected = 0, []
    for state in states:
        assert state.reseeded == so_far
        dead = [size < 0.9 * 24 / 4 for size in state.sizes.tolist()]
        if state is not states[-1] and any(dead):
            expected.append((dead, state.sizes.tolist()))
            so_far += sum(dead)
    assert [(dead.tolist(), sizes.tolist()) for dead, sizes in calls] == expected and so_far > 1


def test_no_expert_starts_anew_at_share_zero(kdvae, monkeypatch):
    model, x, _ = some(kdvae, n=24)
    monkeypatch.setattr(kdvae, "reseed", lambda *given: pytest.fail("started anew"))
    states = trained(kdvae, model, x, torch.zeros(24).long(), reseed_share=0.0)
    assert states[-1].reseeded == 0 and (states[0].sizes == 0).any()


def test_an_empty_starting_cluster_is_no_crash(kdvae):
    model, x, _ = some(kdvae, n=24)
    states = trained(kdvae, model, x, torch.arange(24) % 3, reseed_share=0.1)  # expert 3 has none
    assert len(states) == 3 and all(state.sizes.sum() == 24 and len(state.sizes) == 4 for state in states)


def test_a_collapse_is_told(kdvae):
    model, x, _ = some(kdvae, n=24)
    with pytest.raises(training.CollapseError, match="more than max_share = 0.05"):
        trained(kdvae, model, x, torch.arange(24) % 4, max_share=0.05)


def test_the_rate_falls_over_warm_up_and_competition_together(whole):
    _, seen = whole
    for loop in range(2):
        rates = [step["lr"][0] for step in seen.steps[10 + 10 * loop : 20 + 10 * loop]]
        assert rates == pytest.approx([0.004 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])


# ---------------------------------------------------------------- what is measured


def test_agreement_by_hand(kdvae):
    judge = types.SimpleNamespace(predict=lambda x: x[:, 0].astype(int))
    y = np.array([1, 1, 0, 2, 2, 2, 1])
    labels = np.array([1, 1, 1, 0, 0, 2, 2])  # majority: 2 for cluster 0, 1 for 1, 1 (the first) for 2
    drawn = torch.tensor([[2, 2, 0, 2], [0, 1, 0, 2], [1, 1, 1, 2.0]])[:, :, None]
    assert kdvae.agreement(judge, drawn, labels, y) == (3 + 1 + 3) / 12


def test_a_cluster_without_images_has_no_class_to_be_read_as(kdvae):
    x, y = torch.eye(3).repeat(10, 1), np.arange(30) % 3
    judge, drawn = KNeighborsClassifier(5).fit(x.numpy(), y), torch.eye(3)[:, None].repeat(1, 4, 1)
    assert kdvae.agreement(judge, drawn, y, y) == 1.0
    few = np.where(y == 2, 0, y)  # nothing for expert 2
    assert kdvae.agreement(judge, drawn, few, y) == pytest.approx(2 / 3)
    assert kdvae.agreement(judge, drawn[[0, 1, 0]], few, y) == pytest.approx(2 / 3)  # as class 0 neither


def test_drawn_images_are_means_of_codes_from_the_bell(kdvae, likelihood):
    model, _, _ = some(kdvae, likelihood=likelihood)
    torch.manual_seed(3)
    drawn = kdvae.drawn_by(model, 7)
    torch.manual_seed(3)
    z = torch.randn(4, 7, 10)
    for i in range(4):
        output = by_loop(model.decoder, z[i], i)
        expected = output.sigmoid() if likelihood == "bernoulli" else output[:, :6]
        torch.testing.assert_close(drawn[i], expected.detach())
    assert drawn.shape == (4, 7, 6) and not drawn.requires_grad


def test_each_image_is_rebuilt_by_its_own_expert(kdvae, likelihood):
    torch.manual_seed(0)
    model = kdvae.Experts(4, 6, [16, 16], likelihood)
    x, experts = torch.rand(9, 6), torch.tensor([2, 0, 2, 3, 3, 0, 2, 2, 0])  # none for expert 1
    with torch.no_grad():
        output = model.decoder(model.posterior(x)[0])
    output = output.sigmoid() if likelihood == "bernoulli" else output[..., :6]
    expected = torch.stack([output[expert, i] for i, expert in enumerate(experts)])
    torch.testing.assert_close(kdvae.rebuilt(model, x, experts), expected)


def test_steadiness_by_hand(kdvae, monkeypatch):
    model, x, _ = some(kdvae)
    tables = [torch.eye(4)[columns].T for columns in ([0, 1, 2, 3, 0], [0, 1, 3, 2, 0], [0, 2, 1, 3, 1])]
    draws = iter(tables[:2])
    monkeypatch.setattr(kdvae, "score", lambda *given: next(draws))
    monkeypatch.setattr(kdvae, "rule", lambda *given: tables[2])
    found = kdvae.steadiness(model, x[:5])
    assert found == {"flips": pytest.approx(2 / 5), "differs": pytest.approx(3 / 5)}


def test_steadiness_draws_twice_for_each_expert_and_image(kdvae):
    model, x, _ = some(kdvae, n=300)
    torch.manual_seed(2)
    found = kdvae.steadiness(model, x)
    torch.manual_seed(2)
    one, two = (kdvae.score(model, x, torch.randn(4, 300, 10)).argmax(dim=0) for _ in range(2))
    by_rule = kdvae.rule(model, x).argmax(dim=0)
    assert found["flips"] == pytest.approx((one != two).float().mean().item()) and found["flips"] > 0
    assert found["differs"] == pytest.approx((one != by_rule).float().mean().item())


def looks(n):
    """Hand-made looks at five images and three experts."""
    for i in range(n):
        labels = np.array([0, 1, 2, i % 3, 2])
        sizes = torch.bincount(torch.as_tensor(labels), minlength=3)
        yield types.SimpleNamespace(
            iteration=40 * i, labels=labels, changed=1 / (i + 1), sizes=sizes, reseeded=i,
            losses={"bound": -1.0 * i},
        )  # fmt: skip


def test_a_run_is_followed_whole(kdvae):
    states, y = list(looks(4)), np.array([2, 0, 1, 2, 1])
    state, trace = kdvae.follow(iter(states), y)
    assert state is states[-1] and len(trace) == 4
    for row, at in zip(trace, states, strict=True):
        assert row["least"] == pytest.approx(np.bincount(at.labels, minlength=3).min() / 5)
        expected = {"iteration": at.iteration, "changed": at.changed, "bound": at.losses["bound"]}
        assert row == expected | {"acc": metrics.accuracy(y, at.labels), "least": row["least"]}


@pytest.mark.parametrize(("n", "kept"), [(1, [0]), (2, [0, 1]), (12, [*range(12)]), (23, [*range(0, 23, 2)])])
def test_at_most_twelve_looks_are_told_from_first_to_last(kdvae, n, kept):
    state, trace = kdvae.follow(looks(n), np.array([2, 0, 1, 2, 1]))
    told = kdvae.told(state, trace)
    names = ("iteration", "acc", "changed", "least")
    assert told["looks"] == {name: [round(trace[i][name], 4) for i in kept] for name in names}
    assert (told["steps"], told["reseeded"]) == (40 * (n - 1), n - 1)
    assert told["sizes"] == state.sizes.tolist() and set(told) == {"looks", "steps", "reseeded", "sizes"}


def test_timed_gives_the_result_and_the_seconds_of_the_call(kdvae, monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(kdvae.time, "perf_counter", lambda: next(clock))
    assert kdvae.timed(sorted, [2, 1], reverse=True) == ([2, 1], 2.5)


def test_only_the_papers_start_has_the_papers_name(kdvae):
    assert kdvae.named("k-DVAE", "vade") == "k-DVAE"
    for start in ("shipped", "autoencoder", "augmented"):
        assert kdvae.named("k-DVAE", start) == f"k-DVAE ({start} start)"


# ---------------------------------------------------------------- the whole chapter


@pytest.mark.parametrize("start", ["vade", "autoencoder", "augmented"])
def test_vade_starts_from_a_network_trained_here(start):
    _, seen = golden.run(CHAPTER, **TINY | dict(start=start))
    assert [loop["title"] for loop in seen.loops] == ["autoencoder", "VaDE", "k-DVAE", "k-DVAE"]
    assert len(seen.records) == 5 and seen.records[-1]["method"].startswith("k-DVAE")


def test_every_method_is_recorded_k_dvae_last(whole):
    namespace, seen = whole
    names = ["AE+k-means", "AE+GMM", "VaDE", "k-DAE", "k-DVAE"]
    assert [record["method"] for record in seen.records] == [f"{n} (autoencoder start)" for n in names]
    golden.assert_scored(seen, namespace["y"])
    for record in seen.records:
        assert record["chapter"] == CHAPTER and record["seed"] == 1
        assert record["parameters"] == namespace["parameters"]
    ends = {"VaDE": "vade", "k-DAE": "kdae", "k-DVAE": "kdvae_end"}
    for name, state in ends.items():
        assert np.array_equal(seen.predicted[f"{name} (autoencoder start)"], namespace[state].labels)


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        (dict(start="vade"), ["VaDE+k-means", "AE+GMM", "VaDE", "k-DAE", "k-DVAE"]),
        (dict(vade_epochs=0), ["AE+k-means", "k-DAE", "k-DVAE"]),
        (dict(ablation=False), ["AE+k-means", "AE+GMM", "VaDE", "k-DVAE"]),
        (dict(vade_epochs=0, ablation=False), ["AE+k-means", "k-DVAE"]),
    ],
)
def test_methods_that_are_left_out_have_no_record(parameters, names):
    _, seen = golden.run(CHAPTER, **TINY | parameters)
    end = "" if parameters.get("start") == "vade" else " (autoencoder start)"
    found = [record["method"] for record in seen.records]
    assert found == [f"{name}{end}" for name in names]


def test_each_record_counts_the_work_of_its_method(whole):
    """A step costs 1, k-means 100, a mixture 1000 and the k-means that it starts from 100."""
    _, seen = whole
    seconds = {record["method"].split(" ")[0]: record["seconds"] for record in seen.records}
    assert seconds == {
        "AE+k-means": 6 + 100,
        "AE+GMM": 6 + 10 * 1100,
        "VaDE": 6 + 10 * 1100 + 4,
        "k-DAE": 6 + 100 + 10,
        "k-DVAE": 6 + 100 + 10,
    }
    own = {r["method"].split(" ")[0]: r["own_seconds"] for r in seen.records if "own_seconds" in r}
    assert own == {"k-DAE": 10, "k-DVAE": 10}


def test_a_start_from_vade_costs_vade_and_its_k_means():
    namespace, seen = golden.run(CHAPTER, **SIX | dict(start="vade", epochs=1))
    seconds = {record["method"]: record["seconds"] for record in seen.records}
    start = 2 + 10 * 1100 + 2 + 100
    assert seconds["VaDE+k-means"] == start and seconds["k-DVAE"] == seconds["k-DAE"] == start + 6
    pixels = namespace["x"].flatten(1).double() / 255
    codes = namespace["vade_model"].encode(pixels).detach()
    assert np.array_equal(namespace["labels"], baselines.kmeans(codes, 6, 0)[0])
    assert not torch.allclose(codes, namespace["network"].encode(pixels))


def test_the_stored_start_costs_nothing_and_is_what_is_clustered():
    namespace, seen = golden.run(CHAPTER, **SHIPPED | dict(seed=3, epochs=1, ablation=False))
    stored = data.trained_start("mnist_16")
    for key, value in namespace["network"].state_dict().items():
        assert torch.equal(value, stored[key].double()), key
    assert seen.records[0]["seconds"] == 100 and [loop["title"] for loop in seen.loops] == ["VaDE", "k-DVAE"]
    codes = namespace["network"].encode(namespace["x"].flatten(1).double() / 255).detach()
    assert np.array_equal(seen.predicted["AE+k-means (shipped start)"], baselines.kmeans(codes, 6, 3)[0])
    assert namespace["vade_model"].likelihood == "gaussian" and namespace["model"].likelihood == "bernoulli"
    assert [group["lr"] for group in seen.loops[0]["groups"]] == [0.002, 0.0002]
    assert reconstruction_weights(seen.steps[:2]) == pytest.approx([10.0] * 2)
    assert namespace["drawn_vade"].min() >= 0 and namespace["drawn_vade"].max() <= 1


def reconstruction_weights(steps):
    """What VaDE's steps weigh reconstruction with."""
    terms = [sum(step[name] for name in mixtures.VADE_TERMS) for step in steps]
    return [(step["loss"] + sum_) / step["reconstruction"] for step, sum_ in zip(steps, terms, strict=True)]


def test_vade_has_the_settings_of_the_parameters(whole):
    namespace, seen = whole
    told = [
        [loop["title"], loop["optimizer"], loop["length"], [group["lr"] for group in loop["groups"]]]
        for loop in seen.loops
    ]
    assert told == [
        ["autoencoder", "Adam", 6, [0.001]],
        ["VaDE", "Adam", 4, [0.002, 0.003]],
        ["k-DVAE", "Adam", 10, [0.004]],
        ["k-DVAE", "Adam", 10, [0.004]],
    ]
    assert reconstruction_weights(seen.steps[6:10]) == pytest.approx([2.5] * 4)
    assert namespace["vade_model"].likelihood == "bernoulli"
    mixtures_ = [fit["settings"] for fit in seen.fits if fit["kind"] == "GaussianMixture"]
    assert [fit["random_state"] for fit in mixtures_] == [str(1000 + i) for i in range(10)]
    assert all(fit["n_init"] == "1" and fit["n_components"] == "6" for fit in mixtures_)


def test_the_likeliest_of_ten_mixtures_starts_vade(whole):
    namespace, seen = whole
    bounds = sorted(fitted.lower_bound_ for _, fitted in namespace["fits"])
    assert namespace["fitted"].lower_bound_ == bounds[-1] > bounds[-2] + 1e-6
    (own,) = (labels for labels, fitted in namespace["fits"] if fitted is namespace["fitted"])
    assert np.array_equal(seen.predicted["AE+GMM (autoencoder start)"], own)


def test_start_acc_is_that_of_the_k_means_that_experts_start_from(whole):
    namespace, seen = whole
    acc = {record["method"].split(" ")[0]: record["acc"] for record in seen.records}
    start = {r["method"].split(" ")[0]: r["start_acc"] for r in seen.records if "start_acc" in r}
    assert start == dict.fromkeys(["k-DAE", "k-DVAE"], acc["AE+k-means"])
    assert np.array_equal(namespace["labels"], seen.predicted["AE+k-means (autoencoder start)"])


def test_each_record_tells_its_own_run(whole):
    namespace, seen = whole
    for record, state, trace in (
        (seen.records[-2], namespace["kdae"], namespace["kdae_trace"]),
        (seen.records[-1], namespace["kdvae_end"], namespace["trace"]),
    ):
        assert [row["iteration"] for row in trace] == [4, 6, 8, 10] == record["looks"]["iteration"]
        assert record["steps"] == state.iteration == 10 and record["sizes"] == state.sizes.tolist()
        assert record["looks"]["acc"] == [round(row["acc"], 4) for row in trace]
    assert "drawn" in seen.records[2] and "drawn" in seen.records[4] and "drawn" not in seen.records[3]


def test_drawn_and_rebuilt_are_measured_on_each_methods_own(whole, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    namespace, seen = whole
    x = namespace["x"].flatten(1).double() / 255
    own = torch.as_tensor(namespace["kdvae_end"].labels)
    back = namespace["rebuilt"](namespace["model"], x, own)
    assert seen.records[-1]["rebuilt"] == pytest.approx((back - x).square().mean().item(), rel=1e-4)
    back = namespace["vade_model"].decode(namespace["vade_model"].encode(x))
    assert seen.records[2]["rebuilt"] == pytest.approx((back - x).square().mean().item(), rel=1e-4)
    judge = KNeighborsClassifier(5).fit(x.numpy(), namespace["y"])
    for record, drawn in ((seen.records[-1], "drawn"), (seen.records[2], "drawn_vade")):
        images = namespace[drawn]
        assert images.shape == (6, 50, 256)
        read = judge.predict(images.flatten(0, 1).detach().numpy()).reshape(6, 50)
        labels = seen.predicted[record["method"]]
        majority = [np.bincount(namespace["y"][labels == c], minlength=3).argmax() for c in range(6)]
        filled = np.bincount(labels, minlength=6) > 0
        right = (read == np.array(majority)[:, None]) & filled[:, None]
        assert record["drawn"] == pytest.approx(right.mean(), abs=1e-4)


def test_both_kinds_of_experts_start_from_the_same_weights(whole):
    namespace, _ = whole
    first, second = namespace["new_experts"](), namespace["new_experts"]()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.encoder.weights[0].shape == (6, 256, 16)
    assert [namespace["settings"][name] for name in ("seed", "batch_size", "lr")] == [1, 44, 0.004]


def test_k_dae_has_neither_divergence_nor_noise_in_the_run(whole, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    namespace, seen = whole
    plain, experts = seen.steps[10], seen.steps[20]  # from the same weights, on the same images
    assert plain["batch"] == experts["batch"] and plain["bound"] > experts["bound"] + 5
    for model, state, kl in (("plain", "kdae", False), ("model", "kdvae_end", True)):
        labels, _ = namespace["assigned"](namespace[model], namespace["x"], kl=kl)
        assert np.array_equal(labels, namespace[state].labels)


def test_weights_and_every_start_follow_the_seed():
    few = dict(vade_epochs=0, epochs=1, ablation=False)
    first, again, other = (golden.run(CHAPTER, **TINY | few | dict(seed=seed)) for seed in (0, 0, 1))
    assert golden.differences(golden.summary(*first), golden.summary(*again)) == []
    names = ("network", "model")
    for name in names:
        one, two = (next(run[0][name].parameters()) for run in (first, other))
        assert not torch.allclose(one, two)
    assert [run[1].fits[0]["settings"]["random_state"] for run in (first, other)] == ["0", "1"]
    assert torch.equal(first[0]["x"], other[0]["x"])


def test_only_the_augmented_start_moves_images_and_lets_its_rate_fall(monkeypatch):
    asked, turned = [], data.turned_and_shifted

    def spy(images, **how):
        asked.append(how)
        return turned(images, **how)

    monkeypatch.setattr(data, "turned_and_shifted", spy)
    few = dict(vade_epochs=0, epochs=1, ablation=False)
    _, seen = golden.run(CHAPTER, **TINY | few)
    assert asked == [] and [step["lr"] for step in seen.steps[:4]] == [[0.001]] * 4
    _, seen = golden.run(CHAPTER, **TINY | few | dict(start="augmented"))
    assert asked == [dict(degrees=10.0, shift=0.1)] * 4
    rates = [step["lr"][0] for step in seen.steps[:4]]
    assert rates == pytest.approx([0.001 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


def test_the_precision_reaches_every_pass(monkeypatch):
    asked, autocast = [], training.autocast
    monkeypatch.setattr(training, "autocast", lambda kind: asked.append(kind) or autocast(kind))
    _, seen = golden.run(CHAPTER, double=False, **TINY | dict(epochs=1, precision="bfloat16"))
    assert set(asked) == {"bfloat16"} and len(asked) > 20
    assert {record["precision"] for record in seen.records} == {"bfloat16"}


def test_images_keep_their_range_and_vectors_have_none(whole):
    assert whole[0]["in_range"](torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 0.5, 1]
    load = golden.digits()

    def vectors(name, split="all"):
        found = load(name, split)
        return found._replace(x=found.x[:, 0, ::2, ::2].flatten(1).float() / 255)

    few = TINY | dict(likelihood="gaussian", dataset="har_standin", epochs=1)
    namespace, seen = golden.run(CHAPTER, vectors, **few)
    assert namespace["in_range"](torch.tensor([-1.0, 0.5, 2.0])).tolist() == [-1, 0.5, 2]
    assert namespace["x"].shape == (88, 196) and len(seen.records) == 5
    assert namespace["vade_model"].likelihood == namespace["model"].likelihood == "gaussian"


def loaded(n, **parameters):
    """What the cell that loads leaves behind, on n stand-in images that are told apart."""
    numbers = torch.arange(n)
    many = data.Dataset(numbers[:, None, None, None], numbers % 10, "any", "all")
    namespace = vars(definitions(CHAPTER)) | checked() | dict(dataset="any", parameters={}, n_images=0)
    namespace |= dict(margin=3, side=9, n_clusters=10, data=types.SimpleNamespace())
    namespace["data"].load = lambda name: many
    namespace["data"].cropped = lambda x, margin, side: x if (margin, side) == (3, 9) else None
    namespace |= parameters
    exec(cell_with(CHAPTER, "data.load(dataset)"), namespace)
    return namespace


def test_all_images_are_taken_unless_a_number_is_given():
    order = torch.randperm(70_000, generator=torch.Generator().manual_seed(0)).tolist()
    for n_images, expected in ((0, 70_000), (300, 300)):
        namespace = loaded(70_000, n_images=n_images, seed=4)
        x = namespace["x"].flatten().tolist()
        assert x == order[:expected] and namespace["y"].tolist() == [i % 10 for i in x]
        assert namespace["common"]["n"] == 70_000
        assert namespace["how"] == dict(batch_size=250, seed=4, precision="float32")


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
        ({"side": 7, "start": "vade"}, "side must be 0 or at least 8, got 7"),
        ({"side": 1, "start": "vade"}, "side must be 0 or at least 8, got 1"),
        ({"dataset": "fashion_5k"}, "choose another start for anything else"),
        ({"dataset": "usps"}, "the stored start is of MNIST"),
        ({"margin": 1}, "the stored start is of MNIST, margin 2, side 16"),
        ({"side": 20}, "choose another start"),
        ({"start_widths": [500, 500, 2000]}, "widths 300, 300, 300"),
        ({"start": "vade", "vade_epochs": 0}, "start vade needs vade_epochs of at least 1"),
        (
            {"start": "augmented", "dataset": "har_standin", "likelihood": "gaussian"},
            "vectors cannot be moved and are no coins: choose start vade",
        ),
        (
            {"start": "augmented", "dataset": "reuters_r8", "likelihood": "gaussian"},
            "vectors cannot be moved",
        ),
        ({"start": "vade", "dataset": "har_standin"}, "vectors cannot be moved and are no coins"),
        ({"start": "vade", "dataset": "reuters_r8"}, "vectors cannot be moved and are no coins"),
        ({"profile": "fast"}, "profile must be one of 'quick', 'laptop', 'paper'"),
        ({"dataset": "mnist_6k"}, "dataset must be one of"),
        ({"seed": 1.0}, "seed must be an int between 0 and"),
        ({"n_clusters": 1}, "n_clusters must be an int between 2 and 100, got 1"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"margin": 7}, "margin must be an int between 0 and 6, got 7"),
        ({"start": "trained"}, "start must be one of 'shipped', 'vade', 'autoencoder', 'augmented'"),
        ({"start_epochs": 0}, "start_epochs must be an int between 1 and 1000, got 0"),
        ({"vade_epochs": -1}, "vade_epochs must be an int between 0 and 10000"),
        ({"expert_widths": [250]}, "expert_widths must be one of"),
        ({"likelihood": "normal"}, "likelihood must be one of 'bernoulli', 'gaussian'"),
        ({"batch_size": 1}, "batch_size must be an int between 2 and 10000, got 1"),
        ({"lr": 0.0}, "lr must be a number between 1e-06 and 1.0, got 0.0"),
        ({"warm_epochs": -1}, "warm_epochs must be an int between 0 and 1000"),
        ({"epochs": 0}, "epochs must be an int between 1 and 10000, got 0"),
        ({"reseed_share": 1.5}, "reseed_share must be a number between 0.0 and 1.0, got 1.5"),
        ({"ablation": "yes"}, "ablation must be one of False, True, got 'yes'"),
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
        {"side": 8, "start": "vade"},
        {"side": 0, "start": "autoencoder", "vade_epochs": 0},
        {"vade_epochs": 0},
        {"dataset": "fashion_5k", "start": "augmented"},
        {"dataset": "usps", "start": "autoencoder", "start_widths": [500, 500, 2000]},
        {"dataset": "har_standin", "start": "vade", "likelihood": "gaussian"},
        {"dataset": "reuters_r8", "start": "autoencoder", "likelihood": "gaussian"},
        {"likelihood": "gaussian", "warm_epochs": 0, "reseed_share": 0.0, "max_share": 1.0},
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


# ---------------------------------------------------------------- a case where it should work


def test_lines_that_run_close_are_told_apart_where_k_means_fails(kdvae):
    """Five lines in 20 dimensions, long beside their distance: k-means cuts across them, k-DVAE does not."""
    generator = torch.Generator().manual_seed(100)
    centre, along = torch.randn(2, 5, 1, 20, generator=generator)
    along = along / along.norm(dim=-1, keepdim=True)
    x = 0.65 * centre + (torch.rand(5, 200, 1, generator=generator) * 8 - 4) * along
    x = (x + 0.05 * torch.randn(x.shape, generator=generator)).flatten(0, 1)
    y = np.arange(5).repeat(200)
    start = torch.as_tensor(kdvae.baselines.kmeans(x, 5, 100)[0])
    assert metrics.accuracy(y, start.numpy()) < 0.9
    torch.manual_seed(100)
    settings = dict(warm_epochs=30, epochs=90, lr=0.005, batch_size=50, seed=100, precision="float32")
    states = kdvae.kdvae(
        kdvae.Experts(5, 20, [16, 16], "gaussian"), x, start, **settings, reseed_share=0.1, max_share=1.0
    )
    _, trace = kdvae.follow(states, y)
    assert trace[-1]["acc"] > 0.95
