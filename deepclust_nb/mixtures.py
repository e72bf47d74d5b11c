"""Prior art that several chapters start from or compare with: the variational autoencoder, VaDE, DCN.

The public code of VaDE has defects that are repaired here: log pi_c counts once and not once a dimension, pi
and the variances are trained through logits and logarithms, and gamma comes from a log-softmax. Introduced in
the chapter `vae`, which shows `gaussian_kl`, `vade_bound` and `running_mean` as they stand here.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import baselines, data, networks, training

# Of every log-variance: beyond, a network or a component that was thrown off takes the loss to infinity.
LOG_VARIANCES = (-8.0, 8.0)
VADE_TERMS = ("prior", "assignment", "entropy")


class VAE(networks.Autoencoder):
    """A variational autoencoder on the layers of `networks.Autoencoder`, whose code is the posterior's mean.

    q(z | x) = N(mean(x), diag variance(x)): both are linear in the last hidden layer of the encoder.
    p(x | z): "bernoulli" for pixels in [0, 1], "gaussian" with variance 1 for any real features.

    Parameters: n_features, n_code, widths, init: as for `networks.Autoencoder`; likelihood: of p(x | z).
    Raises: ValueError for an unknown likelihood or init, or a width below 1.
    Source: Kingma and Welling 2014; sizes and "glorot" as in the public code of VaDE. The posterior starts at
        a variance of exp(-3), so that the noise does not drown a pretrained code.
    """

    def __init__(self, n_features, n_code=10, widths=(500, 500, 2000), init="glorot", likelihood="bernoulli"):
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f'likelihood must be "bernoulli" or "gaussian", got {likelihood!r}')
        super().__init__(n_features, n_code, widths, init)
        self.likelihood = likelihood
        self.log_variance = networks.initialise(nn.Linear([n_features, *widths][-1], n_code), init)
        nn.init.constant_(self.log_variance.bias, -3.0)

    def posterior(self, x):
        """x: (n, d) or (n, c, h, w) floats. Returns (mean, log-variance in [-8, 8]) of q(z | x), (n, n_code)
        each; the mean is what `encode` gives.
        """
        hidden = self.encoder[:-1](x.flatten(1))
        return self.encoder[-1](hidden), self.log_variance(hidden).clamp(*LOG_VARIANCES)

    def sample(self, mean, log_variance):
        """A draw from N(mean, diag exp(log_variance)) along which gradients flow to both, (n, n_code)."""
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    def logits(self, z):
        """z: (n, n_code). Returns what `reconstruction_nll` takes, (n, d): logits, or the Gaussian's mean."""
        return self.decoder(z)

    def decode(self, z):
        """z: (n, n_code). Returns the mean of p(x | z), (n, d): probabilities in [0, 1] for "bernoulli"."""
        return self.logits(z).sigmoid() if self.likelihood == "bernoulli" else self.logits(z)

    def start_from(self, autoencoder):
        """Copies the weights of an Autoencoder; the head for the log-variance stays as it is. Returns self.

        Its decoder should have been trained through the sigmoid where the likelihood is "bernoulli".
        Raises: ValueError for other widths.
        """
        theirs, ours = ([w.shape[::-1] for w in m.parameters() if w.dim() == 2] for m in (autoencoder, self))
        if theirs != ours[:-1]:  # the last one is the head's
            theirs, ours = ([shape[0] for shape in shapes] for shapes in (theirs, ours[:-1]))
            raise ValueError(f"the autoencoder's layers must take {ours} features, got {theirs}")
        self.encoder.load_state_dict(autoencoder.encoder.state_dict())
        self.decoder.load_state_dict(autoencoder.decoder.state_dict())
        return self


def gaussian_kl(mean, log_variance):
    """KL(N(mean, diag exp(log_variance)) || N(0, I)) of each sample.

    Parameters: mean, log_variance: (n, d).
    Returns: (n,), nats, at least 0.
    Source: Kingma and Welling 2014, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def reconstruction_nll(output, x, likelihood):
    """-log p(x | z) of each sample, summed over its features.

    Parameters: output: (n, d) from `VAE.logits`; x: (n, d), in [0, 1] for "bernoulli"; likelihood: of a VAE.
    Returns: (n,), nats. "gaussian" has variance 1: half the squared error plus d/2 log(2 pi). The public code
        of VaDE takes the whole squared error, which is a variance of one half.
    """
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(output, x, reduction="none").sum(dim=1)
    return 0.5 * ((output - x).square() + math.log(2 * math.pi)).sum(dim=1)


class Mixture(nn.Module):
    """VaDE's prior on codes, p(z) = sum over c of pi_c N(z; mu_c, diag sigma_c^2), to be trained.

    Attributes: logits: (k,), pi is their softmax; means: (k, d); log_variances: (k, d), used within [-8, 8].
        All start at zero: k equal components N(0, I).
    """

    def __init__(self, n_clusters, n_code):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_clusters))
        self.means = nn.Parameter(torch.zeros(n_clusters, n_code))
        self.log_variances = nn.Parameter(torch.zeros(n_clusters, n_code))

    @classmethod
    def from_gmm(cls, fitted, uniform=True):
        """The mixture of a fitted scikit-learn GaussianMixture with diagonal covariances, on the CPU.

        uniform: pi_c = 1 / k, as in the public code of VaDE; False takes the fitted weights.
        Raises: ValueError for another covariance type.
        """
        if fitted.covariance_type != "diag":
            raise ValueError(f'covariance_type must be "diag", got {fitted.covariance_type!r}')
        mixture = cls(*fitted.means_.shape)
        with torch.no_grad():
            mixture.means.copy_(torch.as_tensor(fitted.means_))
            mixture.log_variances.copy_(torch.as_tensor(fitted.covariances_).log().clamp(*LOG_VARIANCES))
            if not uniform:
                mixture.logits.copy_(torch.as_tensor(fitted.weights_).log())
        return mixture

    def log_joint(self, z):
        """z: (n, d). Returns log pi_c + log N(z; mu_c, diag sigma_c^2), (n, k)."""
        spread = self.log_variances.clamp(*LOG_VARIANCES)
        scaled = (z[:, None, :] - self.means).square() / spread.exp()
        log_density = -0.5 * (scaled + spread + math.log(2 * math.pi)).sum(dim=2)
        return self.logits.log_softmax(dim=0) + log_density

    def responsibilities(self, z):
        """z: (n, d). Returns gamma = p(c | z), (n, k), rows sum to 1."""
        return self.log_joint(z).softmax(dim=1)

    @torch.no_grad()
    def draw(self, n):
        """n codes from each component, (k, n, d)."""
        spread = (0.5 * self.log_variances.clamp(*LOG_VARIANCES)).exp()
        shape = (len(self.means), n, self.means.shape[1])
        return self.means[:, None] + spread[:, None] * torch.randn(shape).to(spread)


def vade_bound(mean, log_variance, z, mixture):
    """What VaDE's evidence lower bound has beside log p(x | z): three terms, whose sum is
    -KL(q(z | x) gamma_c || p(z, c)) of each sample. log(2 pi) cancels between first and last.

      -1/2 sum_c gamma_c sum_j [log s_cj + v_j / s_cj + (m_j - mu_cj)^2 / s_cj]
      sum_c gamma_c log(pi_c / gamma_c)
      1/2 sum_j (1 + log v_j)

    Parameters: mean, log_variance: m and log v of q(z | x), (n, d); z: (n, d), the draw at which gamma =
        p(c | z) is taken; mixture: a Mixture, of pi, mu and s = sigma^2.
    Returns: (prior, assignment, entropy), (n,) each.
    Source: Jiang, Zheng, Tan, Tang and Zhou 2017 (VaDE).
    """
    log_gamma = mixture.log_joint(z).log_softmax(dim=1)
    gamma, spread = log_gamma.exp(), mixture.log_variances.clamp(*LOG_VARIANCES)
    squared = log_variance.exp()[:, None] + (mean[:, None] - mixture.means).square()
    prior = -0.5 * (gamma * (spread + squared / spread.exp()).sum(dim=2)).sum(dim=1)
    assignment = (gamma * (mixture.logits.log_softmax(dim=0) - log_gamma)).sum(dim=1)
    return prior, assignment, 0.5 * (1 + log_variance).sum(dim=1)


def running_mean(centroids, counts, z, labels):
    """Centroids after a batch, each the mean of all samples that it ever took: DCN's update in closed form.

    Sample after sample: c_k <- c_k + 1, then m_k <- m_k - (m_k - z_i) / c_k. From the count c_k before the
    batch and n_k samples in it this ends at (c_k m_k + sum of its z_i) / (c_k + n_k), in any order.

    Parameters: centroids: (k, d); counts: (k,), above 0, samples taken before; z: (n, d); labels: (n,) int64.
    Returns: (centroids (k, d), counts (k,)) after; those that get no sample stay.
    Source: Yang, Fu, Sidiropoulos and Hong 2017 (DCN); DCN-New counts the sample before it moves, as here.
    """
    taken = F.one_hot(labels, len(centroids)).to(z.dtype)
    after = counts + taken.sum(dim=0)
    step = (taken.T @ z - taken.sum(dim=0)[:, None] * centroids) / after[:, None]
    return centroids + step, after


def train_vae(
    model, x, optimizer, epochs, seed,
    batch_size=256, precision="float32", schedule="constant", view=None, beta=1.0
):  # fmt: skip
    """Trains a VAE with the prior N(0, I) on -log p(x | z) + beta KL(q(z | x) || N(0, I)), mean over samples.

    Parameters: as `baselines.pretrain`; beta: weight of the KL term, at least 0; 1 gives the bound.
    Returns: dict of (steps,) arrays, "reconstruction" and "kl" (unweighted) at each step, nats a sample.
    Raises: ValueError before training for a bad setting; FloatingPointError.
    Source: Kingma and Welling 2014; beta: Higgins et al. 2017.
    """
    _check(model, x, beta=beta)
    loop = training.steps(len(x), batch_size, epochs, seed, precision=precision, title="VAE")
    rate = training.falling(optimizer, schedule, len(loop))
    for step in loop:
        mean, log_variance, _, reconstruction = _pass(model, _batch(x, step.index, view), step)
        kl = gaussian_kl(mean, log_variance).mean()
        step.update(optimizer, reconstruction + beta * kl, {"reconstruction": reconstruction, "kl": kl})
        rate.step()
    return loop.history


class VaDEState(NamedTuple):
    """VaDE at one look at all data.

    Attributes: iteration: steps taken; embedding: (n, d) means of q(z | x); labels: (n,) int64 array, argmax
        of responsibilities; changed: share of labels that differ from the last look (1 at the first); sizes:
        (k,) cluster sizes; losses: dict, mean of each term since the last look (empty at the first);
        responsibilities: (n, k), p(c | z) at the means.
    """

    iteration: int
    embedding: torch.Tensor
    labels: np.ndarray
    changed: float
    sizes: torch.Tensor
    losses: dict
    responsibilities: torch.Tensor


def vade(
    model, mixture, x, *, seed, epochs=None, iterations=None, lr=0.002, mixture_lr=2e-4, eps=1e-4,
    schedule="steps", decay=0.9, decay_epochs=10, floor=2e-4, batch_size=100, update_interval=140,
    reconstruction_weight=1.0, max_share=0.9, precision="float32", view=None
):  # fmt: skip
    """Variational deep embedding: a VAE whose prior is a mixture, both trained on the evidence lower bound.

    Used as `for state in vade(...)`: a look at all data each time, the last one being the result.

    Parameters:
        model: a VAE, best pretrained; mixture: a Mixture, best fitted to its codes; both changed in place.
        x: (n, ...) uint8 images or float vectors, whole on the device.
        seed: of the batch order; epochs, iterations: passes over x or steps: exactly one of them.
        lr, mixture_lr, eps: of Adam, for the network and for the mixture. The public code has 0.002 for both
            (0.00002 for the mixture on HHAR); a lower one keeps components from running after single batches.
        schedule: "steps" multiplies both rates by `decay` every `decay_epochs` passes until `floor`, which
            raises none; "cosine" and "constant" as in `training.falling`.
        update_interval: steps between two looks.
        reconstruction_weight: of -log p(x | z), the sum over features; 1 gives the bound.
        max_share: highest share of the points that one cluster may hold before the run stops as collapsed.
        precision: of the network, see `training.steps`; the mixture computes in float32.
        view: as in `baselines.pretrain`; looks are at the samples themselves.
    Yields: VaDEState at step 0, every update_interval steps, and at the end. Its losses are "reconstruction",
        -log p(x | z), and the three terms of `vade_bound`, "prior", "assignment" and "entropy".
    Raises: ValueError before training for a bad setting; training.CollapseError; FloatingPointError.
    Source: Jiang et al. 2017 (VaDE); settings of its public code for MNIST, which has 3,000 epochs.
    """
    _check(
        model, x, update_interval=update_interval, decay_epochs=decay_epochs, decay=decay, floor=floor, lr=lr,
        mixture_lr=mixture_lr, eps=eps, reconstruction_weight=reconstruction_weight
    )  # fmt: skip
    loop = training.steps(
        len(x), batch_size, epochs, seed, iterations=iterations, precision=precision, title="VaDE"
    )
    groups = [
        {"params": [*model.parameters()], "lr": lr},
        {"params": [*mixture.parameters()], "lr": mixture_lr},
    ]
    optimizer = torch.optim.Adam(groups, eps=eps, fused=True)
    rate = _falling(optimizer, schedule, loop, decay, decay_epochs, floor)
    state = None
    for step in loop:
        if step.number % update_interval == 0:
            state = _vade_state(model, mixture, x, loop, state, max_share)
            yield state
        mean, log_variance, z, reconstruction = _pass(model, _batch(x, step.index, view), step)
        bound = [term.mean() for term in vade_bound(mean, log_variance, z, mixture)]
        terms = {"reconstruction": reconstruction} | dict(zip(VADE_TERMS, bound, strict=True))
        step.update(optimizer, reconstruction_weight * reconstruction - sum(bound), terms)
        rate.step()
        with torch.no_grad():  # beyond its bounds a parameter would get no gradient and stay there
            mixture.log_variances.clamp_(*LOG_VARIANCES)
    yield _vade_state(model, mixture, x, loop, state, max_share)


class DCNState(NamedTuple):
    """DCN at one look at all data.

    Attributes: iteration, embedding, labels, changed, sizes, losses: as in `VaDEState`, labels being the
        nearest centroid's; centroids: (k, d); counts: (k,), samples that each centroid is the mean of.
    """

    iteration: int
    embedding: torch.Tensor
    labels: np.ndarray
    changed: float
    sizes: torch.Tensor
    losses: dict
    centroids: torch.Tensor
    counts: torch.Tensor


def dcn(
    model, x, centroids, *, seed, epochs=None, iterations=None, lam=2.0, optimizer="adam", lr=1e-4,
    momentum=0.9, count_start=100, batch_size=256, update_interval=140, max_share=0.9, precision="float32",
    view=None
):  # fmt: skip
    """Deep clustering network: an autoencoder whose codes are drawn to the centroids of k-means.

    For each batch: a step of the network down |x - g(f(x))|^2 + lam / 2 |f(x) - m_s|^2, where s is the
    cluster that the sample had; then its new cluster, the nearest centroid to its new code; then
    `running_mean`. Both norms are sums, over features and over code, and the loss is a mean over samples.

    Parameters:
        model: a pretrained Autoencoder, changed in place; x: (n, ...) whole data.
        centroids: (k, d) start, from k-means on the codes.
        seed: of the batch order; epochs, iterations: passes over x or steps: exactly one of them.
        lam: weight of the clustering term, at least 0; 2 is DCN-New's weight of 1, which has no half. There
            images are 5.1 times those in [0, 1], so reconstruction weighs 26 times as much against a code of
            the same size.
        optimizer, lr, momentum: see `baselines.make_optimizer`. DCN-New: SGD with Nesterov's momentum 0.9,
            rate 1e-4, twice that for biases; 50 epochs.
        count_start: samples that each centroid counts at the start, at least 1.
        update_interval, max_share, precision: as in `vade`.
        view: as in `baselines.pretrain`; clusters and centroids are of the samples themselves.
    Yields: DCNState at step 0, every update_interval steps, and at the end. Its losses are "reconstruction"
        and "clustering", the squared norms.
    Raises: ValueError before training for a bad setting; training.CollapseError; FloatingPointError.
    Source: Yang, Fu, Sidiropoulos and Hong 2017 (DCN); DCN-New, which besides runs k-means on all codes every
        ten epochs and at the end: left out here.
    """
    _check(model, x, update_interval=update_interval, lam=lam, lr=lr, count_start=count_start)
    loop = training.steps(
        len(x), batch_size, epochs, seed, iterations=iterations, precision=precision, title="DCN"
    )
    update = baselines.make_optimizer(optimizer, [*model.parameters()], lr, momentum)
    centroids = torch.as_tensor(centroids, device=x.device).clone()
    counts = torch.full_like(centroids[:, 0], count_start)
    clusters, state = _nearest(baselines.encode(model, x, loop.precision), centroids), None
    for step in loop:
        if step.number % update_interval == 0:
            state = _dcn_state(model, x, centroids, counts, loop, state, max_share)
            yield state
        batch = _batch(x, step.index, view)
        with step.autocast():
            z, x_hat = model(batch)
        reconstruction = (x_hat.float() - batch).square().sum(dim=1).mean()
        clustering = (z.float() - centroids[clusters[step.index]]).square().sum(dim=1).mean()
        terms = {"reconstruction": reconstruction, "clustering": clustering}
        step.update(update, reconstruction + lam / 2 * clustering, terms)
        z = baselines.encode(model, x[step.index], loop.precision)
        clusters[step.index] = _nearest(z, centroids)
        centroids, counts = running_mean(centroids, counts, z, clusters[step.index])
    yield _dcn_state(model, x, centroids, counts, loop, state, max_share)


def _check(model, x, **settings):
    for name, value in settings.items():
        least = 1 if name in ("update_interval", "decay_epochs", "count_start") else 0
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    bounded = getattr(model, "likelihood", None) != "bernoulli" or not x.is_floating_point()
    if not (bounded or 0 <= x.min() <= x.max() <= 1):
        found = f"{x.min():g} to {x.max():g}"
        raise ValueError(f'x must lie in [0, 1] for the likelihood "bernoulli", got {found}')


def _falling(optimizer, schedule, loop, decay, decay_epochs, floor):
    if schedule not in ("steps", "cosine", "constant"):
        raise ValueError(f'schedule must be "steps", "cosine" or "constant", got {schedule!r}')
    if schedule != "steps":
        return training.falling(optimizer, schedule, len(loop))

    def factor(rate):
        least = min(1.0, floor / rate) if rate else 1.0
        return lambda n: max(decay ** (n // len(loop.sizes) // decay_epochs), least)

    factors = [factor(group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _batch(x, index, view):
    batch = data.to_float(x[index])
    return (batch if view is None else view(batch)).flatten(1)


def _pass(model, batch, step):
    with step.autocast():
        mean, log_variance = (part.float() for part in model.posterior(batch))
    z = model.sample(mean, log_variance)
    with step.autocast():
        output = model.logits(z)
    return mean, log_variance, z, reconstruction_nll(output.float(), batch, model.likelihood).mean()


def _look(z, labels, n_clusters, loop, previous, max_share):
    labels = labels.cpu().numpy()
    changed = 1.0 if previous is None else float((labels != previous.labels).mean())
    losses = loop.means(0 if previous is None else previous.iteration)
    sizes = loop.watch_clusters(labels, n_clusters, max_share)
    return dict(
        iteration=loop.number, embedding=z, labels=labels, changed=changed, sizes=sizes, losses=losses
    )


def _nearest(z, centroids):
    return (z[:, None] - centroids).square().sum(dim=2).argmin(dim=1)


@torch.no_grad()
def _vade_state(model, mixture, x, loop, previous, max_share):
    z = baselines.encode(model, x, loop.precision)
    gamma = mixture.responsibilities(z)
    return VaDEState(
        **_look(z, gamma.argmax(dim=1), gamma.shape[1], loop, previous, max_share), responsibilities=gamma
    )


@torch.no_grad()
def _dcn_state(model, x, centroids, counts, loop, previous, max_share):
    z = baselines.encode(model, x, loop.precision)
    found = _look(z, _nearest(z, centroids), len(centroids), loop, previous, max_share)
    return DCNState(**found, centroids=centroids, counts=counts)
