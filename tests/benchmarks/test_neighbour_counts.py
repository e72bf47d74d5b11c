"""How many pairs a second are counted, beside plain NumPy within one run: `make bench`, on an idle machine.

50,000 codes of 512 dimensions against one another are 2.5 billion pairs. A chunk of 64 anchors holds counts,
64 x 50,000 of int16, and tiles of 64 x 2,000 floats: below 10 MB beside the codes, whatever the dimensions.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loader import definitions  # noqa: E402

N, P, ANCHORS = 50_000, 512, 64


@pytest.fixture(scope="module")
def acvae():
    return definitions("acvae")


def plain(mean, width, anchors, alpha, chunk=1000):
    """As the formula reads: all dimensions of a pair at once, points in parts so that memory lasts."""
    counts = np.empty((len(anchors), len(mean)), dtype=np.int16)
    for row, i in enumerate(anchors):
        for j in range(0, len(mean), chunk):
            z = np.abs(mean[j : j + chunk] - mean[i]) / width[i]
            counts[row, j : j + chunk] = (z <= alpha).sum(axis=1)
        counts[row, i] = -1
    return counts


def test_counting_is_faster_than_plain_numpy_and_the_same(acvae):
    torch.manual_seed(0)
    mean, width, anchors = torch.randn(N, P), torch.rand(N, P) * 0.5 + 0.2, torch.arange(ANCHORS)
    few = anchors[:8]
    expected = plain(mean.numpy(), width.numpy(), few.numpy(), 2.0)
    found = acvae.in_range(mean, width, few, 2.0).numpy()
    # z is divided here and multiplied there: a point on the very edge may fall on either side
    assert (found != expected).mean() < 1e-4 and np.abs(found - expected).max() <= 1
    ratios, rates = [], []
    for _ in range(3):
        started = time.perf_counter()
        plain(mean.numpy(), width.numpy(), few.numpy(), 2.0)
        slow = (time.perf_counter() - started) / len(few)
        started = time.perf_counter()
        acvae.in_range(mean, width, anchors, 2.0)
        fast = (time.perf_counter() - started) / ANCHORS
        ratios.append(slow / fast)
        rates.append(N / fast)
    print(
        f"\n{statistics.median(rates) / 1e6:.1f} million pairs of {P} dimensions a second, "
        f"{statistics.median(ratios):.2f} times as many as plain NumPy {ratios}"
    )
    assert statistics.median(ratios) >= 1.0
