"""The networks that several chapters share. A network that belongs to one paper lives in that paper's
chapter.
"""

import itertools

from torch import nn


class Autoencoder(nn.Module):
    """The fully connected autoencoder of the DEC family: d-500-500-2000-10 and its mirror image.

    ReLU between the layers, a linear code and a linear reconstruction; no normalisation and no dropout.

    Parameters:
        n_features: d, the length of a flattened input.
        n_code: length of the code.
        widths: hidden widths of the encoder, mirrored in the decoder.
        init: "fan_in" draws weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), "glorot" from Glorot's uniform
            distribution; biases start at zero in both.
    Raises: ValueError for an unknown init or a width below 1.
    Source: Xie, Girshick and Farhadi 2016 (DEC), section 4.2; the initialisations are those of DEC-keras.
    """

    def __init__(self, n_features, n_code=10, widths=(500, 500, 2000), init="fan_in"):
        super().__init__()
        sizes = [n_features, *widths, n_code]
        if min(sizes) < 1:
            raise ValueError(f"every width must be at least 1, got {sizes}")
        self.encoder = mlp(sizes, init)
        self.decoder = mlp(sizes[::-1], init)

    def encode(self, x):
        """x: (n, d) or (n, c, h, w) floats. Returns codes (n, n_code)."""
        return self.encoder(x.flatten(1))

    def decode(self, z):
        """z: (n, n_code). Returns reconstructions (n, d)."""
        return self.decoder(z)

    def forward(self, x):
        """x: (n, d) or (n, c, h, w). Returns (codes (n, n_code), reconstructions (n, d))."""
        z = self.encode(x)
        return z, self.decode(z)


def mlp(sizes, init="fan_in"):
    """A multilayer perceptron with ReLU between its layers and a linear output.

    Parameters: sizes: widths from input to output; init: "fan_in" or "glorot", see `Autoencoder`.
    Returns: nn.Sequential mapping (n, sizes[0]) to (n, sizes[-1]).
    Raises: ValueError for an unknown init.
    """
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [initialise(nn.Linear(n_in, n_out), init), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def initialise(layer, init):
    """Draws the weights of a linear layer in place ("fan_in" or "glorot", see `Autoencoder`), bias zero;
    returns it.
    """
    if init == "fan_in":
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound)
    elif init == "glorot":
        nn.init.xavier_uniform_(layer.weight)
    else:
        raise ValueError(f'init must be "fan_in" or "glorot", got {init!r}')
    nn.init.zeros_(layer.bias)
    return layer
