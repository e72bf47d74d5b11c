"""What training the winners alone saves, as a ratio within one run: `make bench`, on an idle machine."""

import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loader import definitions  # noqa: E402

K, D, BATCH = 10, 784, 250


@pytest.fixture(scope="module")
def kdvae():
    return definitions("kdvae")


def winners_alone(kdvae, model, x, noise):
    """The chapter's step: all scored without gradient, each image then trained through its winner."""
    with torch.no_grad():
        winner = kdvae.score(model, x, noise).argmax(dim=0)
    kdvae.winners_loss(model, x, noise, winner).backward()


def plain(kdvae, model, x, noise):
    """As equation 6 reads: one expert after the other, all with gradients, then the maximum."""

    def network(stack, x, i):
        last = len(stack.weights) - 1
        for n, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
            x = torch.addmm(bias[i], x, weight[i])
            x = x.relu() if n < last else x
        return x

    scores = []
    for i in range(K):
        mean, log_variance = network(model.encoder, x, i).chunk(2, dim=-1)
        log_variance = log_variance.clamp(-8.0, 8.0)
        output = network(model.decoder, mean + (log_variance / 2).exp() * noise[i], i)
        fit = kdvae.log_likelihood(output[None], x, model.likelihood)[0]
        scores.append(fit - kdvae.divergence(mean, log_variance))
    (-torch.stack(scores).max(dim=0).values.mean()).backward()


def seconds(step, kdvae, model, x, noise, repeats=5):
    started = time.perf_counter()
    for _ in range(repeats):
        model.zero_grad()
        step(kdvae, model, x, noise)
    return (time.perf_counter() - started) / repeats


def test_training_the_winners_alone_is_faster_and_the_same(kdvae):
    torch.manual_seed(0)
    model = kdvae.Experts(K, D, [500, 100], "bernoulli")
    x, noise = torch.rand(BATCH, D), torch.randn(K, BATCH, model.n_code)
    found = []
    for step in (plain, winners_alone):
        model.zero_grad()
        step(kdvae, model, x, noise)
        found.append([weight.grad.clone() for weight in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    ratios = []
    for _ in range(5):  # in turn, so that a drift of the machine meets both
        slow, fast = (seconds(step, kdvae, model, x, noise) for step in (plain, winners_alone))
        ratios.append(slow / fast)
    print(f"\nwinners alone are {statistics.median(ratios):.2f} times faster than the plain step {ratios}")
    assert statistics.median(ratios) >= 1.0
