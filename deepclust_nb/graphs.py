"""Training on a GPU at the GPU's own speed: a step is recorded once as a CUDA graph, then replayed.

The networks of this book are small. A step of theirs is some two hundred kernels of a few microseconds each,
and Python needs several times as long to launch them. `python -m deepclust_nb.sweep LIST --graphs` therefore
replaces `training.steps` in its kernels (`install`) by a loop that keeps the same contract: it lets the
chapter's own loop run a step as it stands, records the kernels of the next one, and from then on gives these
the following batches. The chapter does not change and does not know.

What the body of such a loop may not do between two checks: read a value back from the GPU, add gradients of
several steps, or change anything in Python from step to step, a learning rate for instance. Random numbers of
recorded steps are drawn on the GPU, so that a seed gives other numbers than without graphs.
"""

import functools
import sys
import weakref

import torch

from . import baselines, records, training

CHECKS = ("interval", "update_interval")  # what the book's loops call the steps between two checks
_optimizers = weakref.WeakSet()


class Replayed(training.Steps):
    """The iterable behind `steps`: as `training.Steps`, whose attributes it has.

    every: steps between two checks, None for a loop without. At a check the body runs as it stands, and the
    next step is recorded anew, because a check may put new tensors in the place of old ones. A batch of
    another size runs as it stands too, and so does everything where there is no GPU.
    """

    def __init__(self, *given, every=None):
        super().__init__(*given)
        self.every, self._plain, self._graph, self._stale = every or sys.maxsize, 0, None, True
        self._buffer = torch.zeros(self.sizes[0], dtype=torch.int64, device=self.device)
        self._now = self._log = None
        self._replays = self.device.type == "cuda"

    def __iter__(self):
        for _ in super().__iter__():
            self._look()
            yield from self._step(self.index)
            self._log[self.number].copy_(self._now)
        self._look()

    def _look(self):
        if self.number and self.number % 100 == 0:
            last = {name: values[self.number - 1] for name, values in self._terms.items()}
            self._require_finite(last)

    def _step(self, index):
        check = self.number % self.every == 0
        self._stale |= check
        if check or self._plain < 3 or len(index) != len(self._buffer) or not self._replays:
            self._plain += 1
            if check:  # its body hands over to the caller, for whom nothing may be different
                yield self
            else:
                with self.device:
                    yield self
            return
        self.index = self._buffer.copy_(index)
        if self._stale:
            for optimizer in _optimizers:  # or kernels would add to gradients whose memory is soon another's
                optimizer.zero_grad(set_to_none=True)
            graph, pool = torch.cuda.CUDAGraph(), self._graph and self._graph.pool()
            graph.capture_begin(pool, capture_error_mode="thread_local")
            with self.device:
                yield self
            graph.capture_end()
            self._graph, self._stale = graph, False
        self._graph.replay()

    def update(self, optimizer, loss, terms):
        """As `training.Steps.update`; values that are not finite are looked for every 100 steps."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        if self._log is None:
            self._now = torch.empty_like(values)
            self._log = values.new_full((self.total, len(values)), torch.nan)
            self._terms = dict(zip(terms, self._log.unbind(dim=1), strict=True))
        self._now.copy_(values)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def steps(
    n, batch_size, epochs=None, seed=0, *, iterations=None, precision="float32", title=None, smallest=1
):
    """Stands in for `training.steps`, which see. The steps between two checks are the variable `interval` or
    `update_interval` of the function that calls."""
    caller = sys._getframe(1).f_locals
    every = next((caller[name] for name in CHECKS if name in caller), None)
    return Replayed(n, batch_size, epochs, seed, iterations, precision, title, smallest, every=every)


def install():
    """Makes every training loop of this process a replayed one; its records say so (`replayed`).

    Raises: RuntimeError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("graphs need a CUDA device, and there is none")
    torch.cuda.set_stream(torch.cuda.Stream())  # kernels of the default stream cannot be recorded
    torch.utils.deterministic.fill_uninitialized_memory = False  # it doubles the kernels of a step
    training.steps, training.falling = steps, _constant(training.falling)
    baselines.make_optimizer = _capturable(baselines.make_optimizer)
    records.record = functools.partial(records.record, replayed=True)


def _constant(falling):
    def constant(optimizer, schedule, n_steps):
        if schedule != "constant":
            raise ValueError(f"replayed steps keep their learning rate, but the schedule is {schedule}")
        return falling(optimizer, schedule, n_steps)

    return constant


def _capturable(make_optimizer):
    def capturable(*given, **more):
        optimizer = make_optimizer(*given, **more)
        for group in optimizer.param_groups:
            group["capturable"] = True
        _optimizers.add(optimizer)
        return optimizer

    return capturable
