"""The shared networks: sizes by hand, and the two initialisations against their definitions."""

import pytest
import torch
from torch import nn

from deepclust_nb import networks


def test_the_autoencoder_has_the_papers_size():
    sizes = [784, 500, 500, 2000, 10, 2000, 500, 500, 784]
    by_hand = sum(a * b + b for a, b in zip(sizes, sizes[1:], strict=False))
    assert sum(w.numel() for w in networks.Autoencoder(784).parameters()) == by_hand == 3_330_794


def test_images_and_vectors_go_through():
    model = networks.Autoencoder(12, n_code=3, widths=(5,))
    x = torch.rand(4, 1, 3, 4)
    z, x_hat = model(x)
    assert z.shape == (4, 3) and x_hat.shape == (4, 12)
    torch.testing.assert_close(model(x.flatten(1))[1], x_hat)
    torch.testing.assert_close(model.decode(model.encode(x)), x_hat)


def test_code_and_output_are_linear():
    """An activation on either would cut off one sign."""
    torch.manual_seed(0)
    z, x_hat = networks.Autoencoder(12, n_code=3, widths=(5,))(torch.randn(200, 12))
    assert all(part.min() < 0 < part.max() and part.abs().max() != 1 for part in (z, x_hat))
    kinds = [type(layer) for layer in networks.mlp([4, 3, 2])]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(("init", "bound"), [("fan_in", 400**-0.5), ("glorot", (6 / 700) ** 0.5)])
def test_initial_weights_are_uniform_within_their_bound(init, bound):
    torch.manual_seed(0)
    layer = networks.initialise(nn.Linear(400, 300), init)
    weights = layer.weight.detach()
    assert 0.999 * bound < weights.abs().max() <= bound
    assert abs(weights.std().item() / (bound / 3**0.5) - 1) < 0.01
    assert not layer.bias.any()


def test_the_initialisation_reaches_every_layer():
    torch.manual_seed(0)
    for layer in networks.Autoencoder(64, widths=(50, 40), init="glorot").modules():
        if isinstance(layer, nn.Linear):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="'he'"):
        networks.Autoencoder(4, init="he")
    with pytest.raises(ValueError, match="at least 1"):
        networks.Autoencoder(4, widths=(0,))
