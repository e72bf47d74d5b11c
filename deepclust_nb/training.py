"""What every training loop of the book shares: batches, device, precision, history, progress and two guards.

The loop itself stays where it can be read. It looks like this:

    loop = training.steps(len(x), batch_size=256, epochs=30, seed=0)
    for step in loop:
        with step.autocast():
            z, x_hat = model(x[step.index])
            loss = mse(x_hat, x[step.index])
        step.update(optimizer, loss, {"reconstruction": loss})
    loop.history["reconstruction"]       # one value a step

Introduced in the chapter `foundations`.
"""

import os
import random
import sys

import numpy as np
import torch
from tqdm import tqdm


class CollapseError(RuntimeError):
    """Nearly all points ended in one cluster: more than the share `max_share`."""


def seed_everything(seed):
    """Seeds Python, NumPy and torch (all devices) with the integer `seed` and asks torch for repeatable
    kernels.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def device():
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision="auto"):
    """Turns "auto" into "bfloat16" where the hardware multiplies in it, else "float32".

    Parameters: precision: "auto", "float32" or "bfloat16".
    Returns: "float32" or "bfloat16".
    Raises: ValueError for anything else.
    """
    if precision == "auto":
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
        return "bfloat16" if fast else "float32"
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f'precision must be "auto", "float32" or "bfloat16", got {precision!r}')
    return precision


def autocast(precision):
    """Context in which matrix products and convolutions run in bfloat16, or a context that changes nothing.

    Weights, losses and optimiser states stay float32 in both. Parameters: precision: "float32" or "bfloat16".
    """
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16")


def falling(optimizer, schedule, n_steps):
    """The learning rate of a run: "constant", or "cosine", along which it falls to zero in n_steps.

    Returns: a scheduler, whose `step()` is called after each update.
    Raises: ValueError for another schedule.
    """
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    if schedule == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    raise ValueError(f'schedule must be "constant" or "cosine", got {schedule!r}')


def steps(
    n, batch_size, epochs=None, seed=0, *, iterations=None, precision="float32", title=None, smallest=1
):
    """Iterates over shuffled mini-batches of n samples that lie whole in memory.

    Each pass is a new permutation drawn from its own generator, so that the order depends on `seed` alone;
    the last batch of a pass is shorter when batch_size does not divide n. One of fewer than `smallest`
    samples joins the batch before it: batch normalisation in training needs two.

    Parameters:
        n: number of samples.
        batch_size: samples a step.
        epochs, iterations: passes over the data or number of steps: exactly one of them.
        seed: seed of the order.
        precision: "auto", "float32" or "bfloat16", see `resolve_precision`.
        title: what the progress line is called; shown in a terminal or an interactive notebook only.
        smallest: samples that every batch has at least.
    Returns: an iterable `Steps`.
    Raises: ValueError before the first step for sizes below 1, when not exactly one length is given, and
        when n or batch_size is below `smallest`.
    """
    return Steps(n, batch_size, epochs, seed, iterations, precision, title, smallest)


class Steps:
    """The iterable behind `steps`; it yields itself, moved on by one step.

    Attributes:
        index: (batch,) int64 indices of the current batch, on the device.
        number: steps finished so far.
        precision: "float32" or "bfloat16".
        history: dict from the name of a loss term to an array with one value for each finished step.
    """

    def __init__(self, n, batch_size, epochs, seed, iterations, precision, title, smallest=1):
        if (epochs is None) == (iterations is None):
            raise ValueError("give either epochs or iterations")
        length = epochs if iterations is None else iterations
        if min(n, batch_size, length) < 1:
            raise ValueError(
                f"n, batch_size and the length must be at least 1, got {n}, {batch_size} and {length}"
            )
        if min(n, batch_size) < smallest:
            raise ValueError(f"a batch needs at least {smallest} samples, got n {n}, batch_size {batch_size}")
        self.n, self.batch_size, self.seed, self.title = n, batch_size, seed, title
        self.sizes = [len(part) for part in torch.arange(n).split(batch_size)]
        if len(self.sizes) > 1 and self.sizes[-1] < smallest:
            self.sizes[-2:] = [sum(self.sizes[-2:])]
        self.total = iterations or epochs * len(self.sizes)
        self.precision = resolve_precision(precision)
        self.device = device()
        self.index, self.number, self._terms = None, 0, {}

    def __len__(self):
        return self.total

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        with tqdm(total=self.total, desc=self.title, disable=not _interactive(), leave=False) as bar:
            while self.number < self.total:
                order = torch.randperm(self.n, generator=generator).to(self.device)
                for index in order.split(self.sizes)[: self.total - self.number]:
                    self.index = index
                    yield self
                    self.number += 1
                    bar.update()

    @property
    def history(self):
        return {name: values[: self.number].cpu().numpy() for name, values in self._terms.items()}

    def means(self, since=0):
        """Mean of each term over the steps from `since` on, as a dict of floats."""
        return {name: values[since : self.number].mean().item() for name, values in self._terms.items()}

    def autocast(self):
        """The context for this loop's forward pass, see `training.autocast`."""
        return autocast(self.precision)

    def update(self, optimizer, loss, terms):
        """One optimiser step down the scalar `loss`; `terms` maps the names of its parts to scalars for
        the history.

        Raises: FloatingPointError, naming term and step, when a part or the loss is not finite; the
        weights are then as they were before the step (on a GPU this is looked at every 100 steps, to keep
        the queue full).
        """
        for name, value in terms.items():
            # Into a vector made once: small tensors that outlive their step leave the heap in pieces, and the
            # process was seen to grow by half a megabyte a step.
            if name not in self._terms:
                self._terms[name] = torch.full((self.total,), torch.nan, device=self.device)
            self._terms[name][self.number] = value.detach()
        if self.device.type == "cpu" or self.number % 100 == 0:
            self._require_finite({**terms, "loss": loss})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def watch_clusters(self, labels, n_clusters, max_share=0.9):
        """Stops a run whose clusters have collapsed; needs no true labels.

        Parameters: labels: (n,) cluster indices in [0, n_clusters); max_share: highest share that one
            cluster may hold; 1 for data in which one group is nearly everything.
        Returns: cluster sizes (n_clusters,) int64.
        Raises: CollapseError, naming step, share and limit, when one cluster holds more than `max_share`.
        """
        sizes = torch.bincount(torch.as_tensor(labels), minlength=n_clusters)
        share = sizes.max().item() / sizes.sum().item()
        if share > max_share:
            found = f"cluster {sizes.argmax()} holds {share:.0%} of the points"
            limit = f"more than max_share = {max_share:g} allows"
            raise CollapseError(f"collapse at step {self.number}: {found}, {limit}")
        return sizes

    def _require_finite(self, terms):
        for name, value in terms.items():
            if not torch.isfinite(value):
                raise FloatingPointError(f"{name} is {value.item()} at step {self.number}")


def _interactive():
    """True where somebody watches: a terminal, Colab, or a kernel started by a Jupyter server rather than
    by a tool.
    """
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules
