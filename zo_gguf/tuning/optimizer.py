"""Gradient estimate -> commit: sgd, momentum and adam on theta, their rate's course, and clipping.

Every operation is a single IEEE float32 operation per entry in a fixed order, so that replaying a
trajectory gives the same bits on any machine. The state costs 0, 4 and 8 bytes per entry.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.config.option import nearest
from zo_gguf.errors import ZoError
from zo_gguf.system import in_blocks
from zo_gguf.tuning.trajectory import Direction

Vector = NDArray[np.float32]
_STEP_FRACTION = 0.3  # of the reach; the best of several, see tools/LOG.md
_SLOPES = 16  # of rows that a step measures, for which it holds
_SHORT = 16_000  # slopes of a run up to which it holds


class Optimizer(Protocol):
    """What the step loop needs; `state` holds everything that must survive a restart."""

    state: dict[str, NDArray[np.floating]]

    def update(self, theta: Vector, gradient: Vector, lr: float) -> None:
        """Change theta, (nnz,), in place."""

    def reset(self) -> None:
        """Forget all gradients."""


class _Moments:
    """State that begins at 0, but for powers of beta, which begin at 1."""

    state: dict[str, NDArray[np.floating]]

    def reset(self) -> None:
        """Forget all gradients."""
        for name, value in self.state.items():
            value[...] = 1 if name == "decay" else 0


class Sgd(_Moments):
    """theta -= lr * g."""

    def __init__(self, nnz: int) -> None:
        self.state: dict[str, NDArray[np.floating]] = {}

    def update(self, theta: Vector, gradient: Vector, lr: float) -> None:
        """Change theta, (nnz,), in place."""

        def update(part: slice) -> None:
            theta[part] -= np.float32(lr) * gradient[part]

        in_blocks(theta.size, update)


class Momentum(_Moments):
    """m = 0.9 m + 0.1 g, theta -= lr * m (an average of past gradients, so that lr is sgd's)."""

    beta = 0.9

    def __init__(self, nnz: int) -> None:
        self.state: dict[str, NDArray[np.floating]] = {"m": np.zeros(nnz, np.float32)}

    def update(self, theta: Vector, gradient: Vector, lr: float) -> None:
        """Change theta, (nnz,), in place."""

        def update(part: slice) -> None:
            m = self.state["m"][part]
            m *= np.float32(self.beta)
            m += np.float32(1 - self.beta) * gradient[part]
            theta[part] -= np.float32(lr) * m

        in_blocks(theta.size, update)


class Adam(_Moments):
    """Adam (arXiv 1412.6980), beta 0.9 and 0.99, with bias correction and no weight decay."""

    beta1 = 0.9
    beta2 = 0.99
    floor = 1e-8

    def __init__(self, nnz: int) -> None:
        self.state: dict[str, NDArray[np.floating]] = {
            "m": np.zeros(nnz, np.float32),
            "v": np.zeros(nnz, np.float32),
            "decay": np.ones(2, np.float64),  # beta1^t and beta2^t
        }

    def update(self, theta: Vector, gradient: Vector, lr: float) -> None:
        """Change theta, (nnz,), in place."""
        decay = self.state["decay"]
        decay *= (self.beta1, self.beta2)

        def update(part: slice) -> None:
            m, v, g = self.state["m"][part], self.state["v"][part], gradient[part]
            m *= np.float32(self.beta1)
            m += np.float32(1 - self.beta1) * g
            v *= np.float32(self.beta2)
            v += np.float32(1 - self.beta2) * g * g
            step = np.sqrt(v * np.float32(1 / (1 - decay[1])))
            step += np.float32(self.floor)
            np.divide(m, step, out=step)
            step *= np.float32(lr / (1 - decay[0]))
            theta[part] -= step

        in_blocks(theta.size, update)


class Apart:
    """Two optimizers of one kind for two parts of theta, of which the second can be reset alone."""

    def __init__(self, kind: Callable[[int], Optimizer], n_first: int, nnz: int) -> None:
        self._parts = slice(0, n_first), slice(n_first, nnz)
        self._optimizers = kind(n_first), kind(nnz - n_first)
        named = zip(("first", "second"), self._optimizers, strict=True)
        self.state: dict[str, NDArray[np.floating]] = {
            f"{name}.{key}": value for name, own in named for key, value in own.state.items()
        }

    def update(self, theta: Vector, gradient: Vector, lr: float) -> None:
        """Change theta, (nnz,), in place."""
        for part, own in zip(self._parts, self._optimizers, strict=True):
            own.update(theta[part], gradient[part], lr)

    def reset(self) -> None:
        """Forget all gradients of the second part."""
        self._optimizers[1].reset()


OPTIMIZERS: dict[str, Callable[[int], Optimizer]] = {
    "adam": Adam,
    "momentum": Momentum,
    "sgd": Sgd,
}


def check_optimizer(name: str) -> None:
    """Raise ZoError unless there is an optimizer called `name`."""
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ZoError(f"There is no optimizer {name!r}{nearest(name, OPTIMIZERS)} Known: {known}.")


def make_optimizer(name: str, nnz: int, n_lasting: int) -> Optimizer:
    """A new optimizer for theta, (nnz,); a reset spares the first `n_lasting` unless that is all.

    Raises:
        ZoError: There is no optimizer called `name`.
    """
    check_optimizer(name)
    kind = OPTIMIZERS[name]
    return Apart(kind, n_lasting, nnz) if 0 < n_lasting < nnz else kind(nnz)


def default_learning_rate(
    optimizer: str,
    reach: float,
    size: float,
    iters: int,
    n_slopes: int,
    farthest: float = math.inf,
) -> float:
    """A learning rate that moves a weight by a certain fraction of the reach per step.

    The distance over which the loss was found to be linear is the natural unit of a step. Adam
    moves a weight by about lr whatever the loss; sgd by lr times the estimate. Most of a step is
    noise, so theta diffuses as lr * sqrt(steps): the fraction grows with the square root of what a
    step measures, and falls with that of what a long run does in all.

    Args:
        optimizer: A key of OPTIMIZERS.
        reach: How far the loss is linear, see `NoiseReport`.
        size: Root mean square of an entry of the gradient estimate.
        iters: Steps of the run.
        n_slopes: Slopes of single rows that a step measures.
        farthest: How far a weight may diffuse in the whole run.
    """
    share = _STEP_FRACTION * (n_slopes / _SLOPES * _SHORT / max(_SHORT, n_slopes * iters)) ** 0.5
    distance = min(reach * min(1.0, share), farthest / iters**0.5)
    return float(f"{distance if optimizer == 'adam' else distance / size:.2g}")


# ---- schedule ------------------------------------------------------------------------------------


_LAST = 0.1  # share of the learning rate left at the end of linear and cosine schedules


def learning_rate(config: TuneConfig, step: int) -> float:
    """Learning rate of the step after `step` steps, a pure function of both.

    Args:
        config: With a resolved `learning_rate`; linear and cosine fall to a tenth of it.
        step: Steps done, 0 <= step < iters.
    """
    assert config.learning_rate is not None
    done = step / max(1, config.n_steps - 1)
    share = {
        "constant": 1.0,
        "linear": 1 - (1 - _LAST) * done,
        "cosine": _LAST + (1 - _LAST) * (1 + math.cos(math.pi * done)) / 2,
    }[config.schedule]
    return config.learning_rate * share


# ---- clip ----------------------------------------------------------------------------------------


_MEMORY = 100  # projected gradients
_MEDIANS = 3.0


class Clip:
    """Keeps projected gradients within +- a limit.

    Args:
        limit: A constant, "adaptive" for three times the median magnitude of the last 100, or None
            for no limit. A clipped value counts as what it became, which leaves the median alone.
    """

    def __init__(self, limit: float | str | None) -> None:
        self._limit = limit
        self._recent: deque[float] = deque(maxlen=_MEMORY)

    def remember(self, directions: Sequence[Direction]) -> None:
        """Take the directions of a step into account; they come from the trajectory."""
        self._recent.extend(abs(d.projected_grad) for d in directions)

    def __call__(self, directions: tuple[Direction, ...]) -> tuple[Direction, ...]:
        """The directions of the next step, clipped."""
        limit = self._limit
        if limit == "adaptive":
            # Where most slopes are 0 there is no scale; a limit of 0 would never be left again.
            limit = _MEDIANS * float(np.median(self._recent)) if self._recent else 0.0
            limit = limit or None
        if limit is None:
            return directions
        low, high = -float(limit), float(limit)
        return tuple(
            dataclasses.replace(d, projected_grad=min(max(d.projected_grad, low), high))
            for d in directions
        )
