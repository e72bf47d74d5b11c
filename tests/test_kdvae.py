"""The chapter `kdvae`: runs that its check lets pass reach their end."""

import golden
import numpy as np
import pytest
import torch
from loader import definitions
from sklearn.neighbors import KNeighborsClassifier

from deepclust_nb import mixtures

CHAPTER = "kdvae"
TINY = dict(start="autoencoder", start_widths=[32, 32, 32], expert_widths=[16, 16], n_clusters=3)
TINY |= dict(batch_size=22, vade_epochs=1, warm_epochs=2, epochs=2, max_share=1.0)


@pytest.fixture(scope="module")
def kdvae():
    return definitions(CHAPTER)


@pytest.mark.parametrize("start", ["vade", "autoencoder", "augmented"])
def test_vade_starts_from_a_network_trained_here(start):
    _, seen = golden.run(CHAPTER, **TINY | dict(start=start))
    assert [loop["title"] for loop in seen.loops] == ["autoencoder", "VaDE", "k-DVAE", "k-DVAE"]
    assert len(seen.records) == 4 and seen.records[-1]["method"].startswith("k-DVAE")


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_each_image_is_rebuilt_by_its_own_expert(kdvae, likelihood):
    torch.manual_seed(0)
    model = kdvae.Experts(4, 6, [16, 16], likelihood)
    x, experts = torch.rand(9, 6), torch.tensor([2, 0, 2, 3, 3, 0, 2, 2, 0])  # none for expert 1
    with torch.no_grad():
        output = model.decoder(model.posterior(x)[0])
    output = output.sigmoid() if likelihood == "bernoulli" else output[..., :6]
    expected = torch.stack([output[expert, i] for i, expert in enumerate(experts)])
    torch.testing.assert_close(kdvae.rebuilt(model, x, experts), expected)


def test_a_cluster_without_images_has_no_class_to_be_read_as(kdvae):
    x, y = torch.eye(3).repeat(10, 1), np.arange(30) % 3
    judge, drawn = KNeighborsClassifier(5).fit(x.numpy(), y), torch.eye(3)[:, None].repeat(1, 4, 1)
    assert kdvae.agreement(judge, drawn, y, y) == 1.0
    few = np.where(y == 2, 0, y)  # nothing for expert 2
    assert 0 <= kdvae.agreement(judge, drawn, few, y) < 1.0


def test_ten_experts_have_more_weights_than_vade(kdvae):
    experts = kdvae.Experts(10, 784, [500, 100], "bernoulli")
    assert sum(w.numel() for w in experts.parameters()) == 8_890_040 == 10 * 889_004
    assert sum(w.numel() for w in mixtures.VAE(784).parameters()) == 3_350_804


def test_synthetic_lines_are_found_from_k_means(kdvae):
    """k affine lines in 20 dimensions, noise beside them: k-DVAE keeps what k-means finds."""
    generator = torch.Generator().manual_seed(100)
    centre, along = torch.randn(2, 5, 1, 20, generator=generator)
    along = along / along.norm(dim=-1, keepdim=True)
    x = centre + (torch.rand(5, 200, 1, generator=generator) * 8 - 4) * along
    x = (x + 0.05 * torch.randn(x.shape, generator=generator)).flatten(0, 1)
    y = np.arange(5).repeat(200)
    start = torch.as_tensor(kdvae.baselines.kmeans(x, 5, 100)[0])
    torch.manual_seed(100)
    settings = dict(warm_epochs=30, epochs=60, lr=0.005, batch_size=50, seed=100, precision="float32")
    states = kdvae.kdvae(
        kdvae.Experts(5, 20, [16, 16], "gaussian"), x, start, **settings, reseed_share=0.1, max_share=1.0
    )
    _, trace = kdvae.follow(states, y)
    assert trace[-1]["acc"] > 0.95
