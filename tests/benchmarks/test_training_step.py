"""How fast the autoencoder trains, as ratios within one run: `make bench`, on an idle machine."""

import statistics
import time

import pytest
import torch

from deepclust_nb import baselines, networks, training

N, BATCH = 5120, 256


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.randint(0, 256, (N, 1, 28, 28), dtype=torch.uint8)


def matmul_rate(size=2048, repeats=4):
    """float32 operations a second in a square matrix product."""
    a, b = torch.randn(2, size, size)
    started = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def train(images, precision, epochs=1, seed=0):
    """(seconds, errors by step) of a fresh autoencoder."""
    training.seed_everything(seed)
    model = networks.Autoencoder(784)
    update = baselines.make_optimizer("adam", model.parameters(), 1e-3)
    started = time.perf_counter()
    errors = baselines.pretrain(model, images, update, epochs, seed, BATCH, precision)
    return time.perf_counter() - started, errors


def test_the_step_reaches_the_matrix_products_rate(images):
    """Forward, backward by input and backward by weight: three products of the network's size a sample."""
    weights = sum(w.numel() for w in networks.Autoencoder(784).parameters() if w.ndim == 2)
    operations = 3 * 2 * weights * N
    train(images, "float32")
    shares = []
    for _ in range(5):  # in turn, so that a drift of the machine meets both
        rate = matmul_rate()
        seconds, _ = train(images, "float32")
        shares.append(operations / seconds / rate)
    print(f"\ntraining step at {statistics.median(shares):.2f} of the matrix product's rate {shares}")
    assert statistics.median(shares) >= 0.6


@pytest.mark.skipif(training.resolve_precision("auto") != "bfloat16", reason="no bfloat16 in this hardware")
def test_bfloat16_is_faster(images):
    for precision in ("float32", "bfloat16"):
        train(images, precision)
    ratios = []
    for _ in range(5):
        ratios.append(train(images, "float32")[0] / train(images, "bfloat16")[0])
    print(f"\nbfloat16 is {statistics.median(ratios):.2f} times faster {ratios}")
    assert statistics.median(ratios) >= 1.5


@pytest.mark.skipif(training.resolve_precision("auto") != "bfloat16", reason="no bfloat16 in this hardware")
def test_bfloat16_ends_at_the_same_loss():
    """On average over seeds: two float32 runs of different seeds differ more than the two precisions may."""
    from deepclust_nb import data

    x, mean = data.load("mnist_5k").x, {}
    for precision in ("float32", "bfloat16"):
        ends = [train(x, precision, epochs=10, seed=seed)[1][-100:].mean() for seed in range(5)]
        mean[precision] = statistics.mean(map(float, ends))
        print(f"\nfinal errors in {precision}: {[f'{end:.5f}' for end in ends]}")
    assert abs(mean["bfloat16"] / mean["float32"] - 1) <= 0.02
