"""The shared networks: sizes by hand, and the two initialisations against their definitions."""

import inspect

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


def test_relu_stands_between_layers_and_nowhere_else():
    """Kinds and sizes of all layers of the paper's network, in order, and their effect on a batch."""
    model = networks.Autoencoder(784)
    for part, sizes in (
        (model.encoder, [784, 500, 500, 2000, 10]),
        (model.decoder, [10, 2000, 500, 500, 784]),
    ):
        assert [type(layer) for layer in part] == [nn.Linear, nn.ReLU] * 3 + [nn.Linear]
        assert [(layer.in_features, layer.out_features) for layer in part[::2]] == list(
            zip(sizes, sizes[1:], strict=False)
        )
        x = torch.randn(5, sizes[0])
        by_hand = x
        for number, layer in enumerate(part[::2]):
            by_hand = by_hand @ layer.weight.T + layer.bias
            by_hand = by_hand if number == 3 else by_hand.clamp(min=0)
        torch.testing.assert_close(part(x), by_hand)
    modules = [type(module) for module in model.modules()]
    assert set(modules) == {networks.Autoencoder, nn.Sequential, nn.Linear, nn.ReLU}


@pytest.mark.parametrize("init", ["fan_in", "glorot"])
def test_every_layer_starts_with_the_variance_of_its_formula(init):
    """Uniform within b has variance b^2 / 3, which the normal distribution of the same bound would miss."""
    torch.manual_seed(0)
    model = networks.Autoencoder(300, n_code=80, widths=(200, 120), init=init)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 6
    for layer in layers:
        n_in, n_out = layer.in_features, layer.out_features
        variance = 1 / (3 * n_in) if init == "fan_in" else 2 / (n_in + n_out)
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
        kurtosis = (layer.weight**4).mean() / layer.weight.var() ** 2
        assert kurtosis.item() == pytest.approx(1.8, abs=0.1) and not layer.bias.any()


def test_the_start_is_named_by_the_seed_and_layers_differ():
    torch.manual_seed(0)
    models = [networks.Autoencoder(6, n_code=6, widths=(6,)) for _ in range(2)]
    torch.manual_seed(0)
    models.append(networks.Autoencoder(6, n_code=6, widths=(6,)))
    first, second, third = ([w for w in m.parameters() if w.dim() == 2] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert len({w.sum().item() for w in [*first, *second]}) == 8


def test_defaults_are_those_of_the_paper():
    """ "fan_in" is the start of DEC-keras, and a code has ten numbers."""
    signature = inspect.signature(networks.Autoencoder).parameters
    assert {name: p.default for name, p in signature.items() if name != "n_features"} == {
        "n_code": 10,
        "widths": (500, 500, 2000),
        "init": "fan_in",
    }
    assert inspect.signature(networks.mlp).parameters["init"].default == "fan_in"


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
