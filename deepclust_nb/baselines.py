"""Prior art that several chapters start from or compare with: k-means, autoencoder + k-means or GMM, DEC,
IDEC.

Each recipe is the one of a named public code. Introduced in the chapter `foundations`, which shows
`student_t`, `target_distribution` and `pretrain` as they stand here.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from . import training
from .data import to_float


def kmeans(z, n_clusters, seed, n_init=20):
    """k-means, the best of `n_init` k-means++ starts by inertia.

    Parameters: z: (n, d) floats, array or tensor; n_clusters: k; seed: integer; n_init: starts.
    Returns: (labels (n,) int64 array, centroids (k, d) float32 array).
    Source: scikit-learn; the DEC family takes 20 starts.
    """
    z = np.asarray(torch.as_tensor(z).flatten(1).cpu(), dtype=np.float32)
    fitted = KMeans(n_clusters, n_init=n_init, random_state=seed).fit(z)
    return fitted.labels_.astype(np.int64), fitted.cluster_centers_


def gmm(z, n_clusters, seed, n_init=5):
    """Gaussian mixture with diagonal covariances, the best of `n_init` k-means starts by likelihood.

    Parameters: z: (n, d) floats; n_clusters: k; seed: integer; n_init: starts.
    Returns: (labels (n,) int64 array, the fitted scikit-learn GaussianMixture).
    """
    z = np.asarray(torch.as_tensor(z).cpu(), dtype=np.float64)
    mixture = GaussianMixture(n_clusters, covariance_type="diag", n_init=n_init, random_state=seed).fit(z)
    return mixture.predict(z).astype(np.int64), mixture


def make_optimizer(name, parameters, lr, momentum=0.9):
    """The optimiser of a recipe over `parameters`: name "sgd" (with `momentum`) or "adam", learning rate lr.

    Raises: ValueError for another name.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, fused=True)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    raise ValueError(f'optimizer must be "sgd" or "adam", got {name!r}')


def pretrain(
    model, x, optimizer, epochs, seed,
    batch_size=256, precision="float32", schedule="constant", view=None
):  # fmt: skip
    """Trains an autoencoder on its reconstruction error, the mean over samples and pixels.

    Parameters: model: an Autoencoder; x: (n, ...) uint8 images or float vectors, whole on the device;
        optimizer: over model.parameters(); epochs: passes over x; seed: of the order; precision: see
        `training.steps`; schedule: see `training.falling`; view: a function of a batch of images or vectors,
        float, that gives what is learned from, of the same shape; None for the batch itself.
    Returns: (steps,) array, the reconstruction error at each step.
    Source: DEC-keras (SGD with learning rate 1 works only because the error is a mean over pixels).
    """
    loop = training.steps(len(x), batch_size, epochs, seed, precision=precision, title="autoencoder")
    rate = training.falling(optimizer, schedule, len(loop))
    for step in loop:
        batch = to_float(x[step.index])
        batch = (batch if view is None else view(batch)).flatten(1)
        with step.autocast():
            _, x_hat = model(batch)
            loss = F.mse_loss(x_hat, batch)
        step.update(optimizer, loss, {"reconstruction": loss})
        rate.step()
    return loop.history["reconstruction"]


@torch.no_grad()
def encode(model, x, precision="float32", batch_size=8192):
    """Codes of all samples. x: (n, ...) uint8 or float. Returns: (n, n_code) float32, on the device of x."""
    with training.autocast(training.resolve_precision(precision)):
        return torch.cat([model.encode(to_float(batch)).float() for batch in x.split(batch_size)])


def student_t(z, centroids, alpha=1.0):
    """Soft assignment q of codes to centroids by a Student-t kernel.

    Parameters: z: (n, d); centroids: (k, d); alpha: degrees of freedom, above 0.
    Returns: q: (n, k), each row a distribution.
    Source: Xie, Girshick and Farhadi 2016 (DEC), equation 1.
    """
    squared = (z[:, None, :] - centroids[None, :, :]).square().sum(dim=2)
    kernel = (1 + squared / alpha) ** (-(alpha + 1) / 2)
    return kernel / kernel.sum(dim=1, keepdim=True)


def target_distribution(q):
    """The sharpened target p that DEC pulls q towards: q squared, divided by the soft cluster sizes,
    normalised.

    Parameters: q: (n, k), rows sum to 1. The sizes f_j = sum_i q_ij are meant over the whole data set.
    Returns: p: (n, k), rows sum to 1.
    Source: Xie, Girshick and Farhadi 2016 (DEC), equation 3.
    """
    weight = q.square() / q.sum(dim=0)
    return weight / weight.sum(dim=1, keepdim=True)


class State(NamedTuple):
    """DEC or IDEC at one refresh of the target.

    Attributes: iteration: steps taken; embedding: (n, d) codes; q, p: (n, k) assignment and target;
        labels: (n,) int64 array, argmax of q; changed: share of labels that differ from the last refresh
        (1 at the first); centroids: (k, d); sizes: (k,) cluster sizes; losses: dict, mean of each term
        since the last refresh (empty at the first); converged: True when `changed` fell below the tolerance.
    """

    iteration: int
    embedding: torch.Tensor
    q: torch.Tensor
    p: torch.Tensor
    labels: np.ndarray
    changed: float
    centroids: torch.Tensor
    sizes: torch.Tensor
    losses: dict
    converged: bool


def dec(model, x, centroids, *, optimizer="sgd", lr=0.01, momentum=0.9, **settings):
    """Deep embedded clustering: the encoder and the centroids follow KL(P || Q); the decoder is left behind.

    Used as `for state in dec(...)`: one State at each refresh of the target, the last one being the result.

    Parameters: model: a pretrained Autoencoder, changed in place; x: (n, ...) whole data; centroids: (k,
        d) start, from k-means on the codes; optimizer, lr, momentum: the recipe of DEC-keras; settings:
        see `self_train`.
    Source: Xie, Girshick and Farhadi 2016 (DEC), section 3; DEC-keras.
    """
    yield from self_train(
        model, x, centroids, optimizer=optimizer, lr=lr, momentum=momentum, gamma=None, **settings
    )


def idec(model, x, centroids, *, gamma=0.1, optimizer="adam", lr=0.001, momentum=0.99, **settings):
    """Improved DEC: reconstruction (mean over pixels) + gamma * KL(P || Q), so that the decoder keeps the
    code honest.

    Parameters: as `dec`; gamma: weight of the clustering term, at least 0.
    Source: Guo, Gao, Liu and Yin 2017 (IDEC), equation 3; the IDEC repository.
    """
    yield from self_train(
        model, x, centroids, optimizer=optimizer, lr=lr, momentum=momentum, gamma=gamma, **settings
    )


def self_train(
    model,
    x,
    centroids,
    *,
    optimizer,
    lr,
    momentum,
    gamma,
    seed,
    iterations=20_000,
    update_interval=140,
    tol=0.001,
    batch_size=256,
    target="all",
    max_share=0.9,
    precision="float32",
    view=None,
):
    """The loop of DEC (gamma None) and IDEC (gamma a number).

    Parameters:
        seed: of the batch order.
        iterations: at most so many steps.
        update_interval: steps between two refreshes of P from all of Q.
        tol: stop when a smaller share of labels changed between two refreshes.
        target: "all" takes P from all data every update_interval steps, as the paper has it; "batch" takes
            it from the current batch at every step, as several public packages do.
        max_share: highest share of the points that one cluster may hold before the run stops as collapsed.
        precision: see `training.steps`.
        view: as in `pretrain`; the target is that of the samples themselves.
    Yields: State at step 0, every update_interval steps, and at the end.
    Raises: ValueError before training for a bad setting; training.CollapseError; FloatingPointError.
    """
    if target not in ("all", "batch"):
        raise ValueError(f'target must be "all" or "batch", got {target!r}')
    if update_interval < 1 or (gamma is not None and gamma < 0):
        raise ValueError(
            f"update_interval must be at least 1 and gamma at least 0, got {update_interval}, {gamma}"
        )
    centroids = torch.nn.Parameter(torch.as_tensor(centroids, device=x.device).clone())
    trained = [*(model.encoder if gamma is None else model).parameters(), centroids]
    update = make_optimizer(optimizer, trained, lr, momentum)
    loop = training.steps(
        len(x), batch_size, None, seed, iterations=iterations, precision=precision, title="DEC/IDEC"
    )
    state = None
    for step in loop:
        if step.number % update_interval == 0:
            state = _refresh(model, x, centroids, loop, state, tol, max_share)
            yield state
            if state.converged:
                return
        batch = to_float(x[step.index])
        batch = (batch if view is None else view(batch)).flatten(1)
        with step.autocast():
            z = model.encode(batch)
            x_hat = None if gamma is None else model.decode(z)
        q = student_t(z.float(), centroids)
        p = state.p[step.index] if target == "all" else target_distribution(q.detach())
        clustering = F.kl_div(q.log(), p, reduction="batchmean")
        if gamma is None:
            step.update(update, clustering, {"clustering": clustering})
        else:
            reconstruction = F.mse_loss(x_hat.float(), batch)
            terms = {"reconstruction": reconstruction, "clustering": clustering}
            step.update(update, reconstruction + gamma * clustering, terms)
    yield _refresh(model, x, centroids, loop, state, tol, max_share)


@torch.no_grad()
def _refresh(model, x, centroids, loop, previous, tol, max_share):
    z = encode(model, x, loop.precision)
    q = student_t(z, centroids)
    labels = q.argmax(dim=1).cpu().numpy()
    changed = 1.0 if previous is None else float((labels != previous.labels).mean())
    since = 0 if previous is None else previous.iteration
    return State(
        iteration=loop.number,
        embedding=z,
        q=q,
        p=target_distribution(q),
        labels=labels,
        changed=changed,
        centroids=centroids.detach().clone(),
        sizes=loop.watch_clusters(labels, len(centroids), max_share),
        losses=loop.means(since),
        converged=previous is not None and changed < tol,
    )
