"""What estimators have in common: options, seeds, and what a step's estimate is.

An estimator asks the engine for losses near theta along random directions z, which come back from
their seeds, and turns the answers into one coefficient per direction: the step's gradient estimate
is the mean over directions of coefficient * z.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import Matrix, Scores
from zo_gguf.engine.engine import Engine
from zo_gguf.libzo import AT_THETA, NORMAL, Probe
from zo_gguf.system import in_blocks
from zo_gguf.tuning.trajectory import Direction

Vector = NDArray[np.float32]
Noise = Callable[[int], Vector]  # seed -> z, (nnz,)
Measure = Callable[[Sequence[Example], Sequence[int], float], "Estimate"]  # rows, seeds, eps
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Estimate:
    """What a step measured.

    Attributes:
        directions: Losses along each, and its coefficient.
        scores: Of all probes.
        dense: The gradient, (nnz,), where it was not estimated from directions.
    """

    directions: tuple[Direction, ...]
    scores: Scores
    dense: Vector | None = None

    def gradient(self, noise: Noise) -> Vector:
        """The gradient estimate, float32 (nnz,)."""
        if self.dense is not None:
            return self.dense
        return mean_of_directions(self.directions, noise)

    def trouble(self) -> str | None:
        """What is wrong with the losses, in words; None where nothing is.

        llama.cpp rounds activations that are NaN to codes of 0 in products with quantized weights,
        so a model that has diverged may have finite losses: the same ones whatever the weights.
        """
        numbers = [(d.loss_plus, d.loss_minus, d.projected_grad) for d in self.directions]
        if not np.isfinite(numbers).all():
            return "The loss is not finite"
        losses = self.scores.losses
        if len(losses) > 1 and losses.any() and (losses == losses[0]).all():
            return "No probe changes the loss of any row"
        return None


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """How a step asks the engine, and what it makes of the answers.

    The fields are the options that the estimator reads, under their names in `TuneConfig`, with the
    estimator's own defaults.

    Attributes:
        distribution: What z is drawn from, as the estimator's source has it.
        probes: Whether it probes along random directions. Then a record of the trajectory holds all
            of a step; otherwise steps can only be made again.
    """

    distribution: ClassVar[int] = NORMAL
    probes: ClassVar[bool] = True

    examples_per_step: int = 16
    directions: int
    iters: int = 500

    @classmethod
    def of(cls, config: TuneConfig) -> Self:
        """The estimator of a run.

        Raises:
            ZoError: It cannot work with these options.
        """
        given = {item.name: getattr(config, item.name) for item in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @contextmanager
    def on(self, engine: Engine) -> Iterator["Measure"]:
        """Have the engine ready for steps; gives `estimate` on it."""
        yield functools.partial(self.estimate, engine)

    @property
    @abstractmethod
    def n_probes(self) -> int:
        """How often a step sends its rows through the model."""

    @abstractmethod
    def estimate(
        self, engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float
    ) -> Estimate:
        """Measure the loss near theta.

        Args:
            engine: The model, at theta.
            examples: The step's rows; the loss is the mean over them.
            seeds: One per direction.
            eps: Perturbation size, in units of a weight.
        """


def on_both_sides(seeds: Sequence[int], eps: float) -> list[Probe]:
    """Two probes per seed, at theta + eps z and then at theta - eps z."""
    return [Probe(seed, sign * eps) for seed in seeds for sign in (1.0, -1.0)]


def on_one_side(seeds: Sequence[int], eps: float) -> list[Probe]:
    """A probe at theta, and one per seed at theta + eps z."""
    return [AT_THETA, *(Probe(seed, eps) for seed in seeds)]


def along(
    seeds: Sequence[int], plus: Matrix, minus: Matrix, coefficients: Matrix
) -> tuple[Direction, ...]:
    """What a record has of each direction, from mean losses and coefficients, (n_directions,)."""
    rows = zip(seeds, plus.tolist(), minus.tolist(), coefficients.tolist(), strict=True)
    return tuple(Direction(*row) for row in rows)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused as theta
def mean_of_directions(directions: Sequence[Direction], noise: Noise) -> Vector:
    """Mean over directions of projected_grad * z(seed), float32 (nnz,)."""
    shares = [np.float32(d.projected_grad * (1.0 / len(directions))) for d in directions]
    total = _times(shares[0], noise(directions[0].seed))  # which is gone before the next is made
    for direction, share in zip(directions[1:], shares[1:], strict=True):
        _add(total, share, noise(direction.seed))
    return total


def _times(share: np.float32, z: Vector) -> Vector:
    product = np.empty_like(z)

    def work(part: slice) -> None:
        np.multiply(share, z[part], out=product[part])

    in_blocks(z.size, work)
    return product


def _add(total: Vector, share: np.float32, z: Vector) -> None:
    def work(part: slice) -> None:
        total[part] += share * z[part]

    in_blocks(total.size, work)


def direction_seeds(seed: int, step: int, n: int) -> list[int]:
    """Seeds of a step's n directions, a pure function of the run's seed and the step."""
    return [_mix(_mix(_mix(seed) + step) + k) for k in range(n)]


def _mix(x: int) -> int:
    """The splitmix64 output function, which spreads neighbouring integers over all 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
