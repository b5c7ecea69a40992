"""Probes -> an estimate of the gradient along random directions. One function per estimator.

Each returns directions whose mean of projected_grad * z is the step's estimate:

- spsa (MeZO, arXiv 2305.17333): g = (L(theta + eps z) - L(theta - eps z)) / (2 eps), the
  directional derivative along z, and g z an unbiased estimate of the gradient as eps -> 0.
- natural: the same probes, or those on one side and one at theta, combined to the natural gradient
  in the span of the step's directions (see `natural`).
- fzoo (arXiv 2506.09034): one-sided Rademacher probes, (L_i - L0) divided by the standard deviation
  of the L_i, so that a step has about the same length whatever the loss.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw, Example
from zo_gguf.engine.engine import Engine, Probe, Scores
from zo_gguf.errors import ZoError
from zo_gguf.libzo import NORMAL, RADEMACHER
from zo_gguf.tuning.calibrate import NO_SLOPE
from zo_gguf.tuning.natural import natural_slopes, sides, slopes_and_fisher
from zo_gguf.tuning.trajectory import Direction

_MASK = (1 << 64) - 1
_SAMPLE = 8  # directions that tell how large an estimate is
_TINY = 1e-12  # up to here, losses that differ are the same ones, rounded
Estimate = tuple[tuple[Direction, ...], Scores]


def distribution_of(config: TuneConfig) -> int:
    """What z is drawn from, as the estimators' sources have it."""
    return RADEMACHER if config.estimator == "fzoo" else NORMAL


def direction_seeds(seed: int, step: int, n: int) -> list[int]:
    """Seeds of a step's n directions, a pure function of the run's seed and the step."""
    return [_mix(_mix(_mix(seed) + step) + k) for k in range(n)]


def _mix(x: int) -> int:
    """The splitmix64 output function, which spreads neighbouring integers over all 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def estimate(
    engine: Engine, examples: Sequence[Example], config: TuneConfig, step: int
) -> Estimate:
    """Measure the loss along a step's directions.

    Args:
        engine: The model, at theta.
        examples: The step's rows; the loss is the mean over them.
        config: The run's options, resolved.
        step: Steps done.

    Returns:
        The directions, and the scores behind them.
    """
    eps = float(config.eps)
    seeds = direction_seeds(config.seed, step, config.n_directions)
    if config.estimator == "fzoo":
        return fzoo(engine, examples, seeds, eps)
    if config.estimator == "natural":
        return natural(engine, examples, seeds, eps, config.damping, one_sided=config.sides == 1)
    return spsa(engine, examples, seeds, eps)


def spsa(engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float) -> Estimate:
    """Two-sided probes along every seed's z.

    Args:
        engine: The model, at theta.
        examples: The step's rows; the loss is the mean over them.
        seeds: One per direction.
        eps: Perturbation size, in units of a weight.
    """
    scores = engine.score(examples, [Probe(seed, sign * eps) for seed in seeds for sign in (1, -1)])
    plus, minus = sides(scores.losses.mean(axis=1), one_sided=False)
    slopes = (plus - minus) / (2 * eps)
    return tuple(map(_direction, seeds, plus, minus, slopes)), scores


def natural(
    engine: Engine,
    examples: Sequence[Example],
    seeds: Sequence[int],
    eps: float,
    damping: float,
    *,
    one_sided: bool = False,
) -> Estimate:
    """Probes along every seed's z, combined to the natural gradient in their span.

    Args:
        engine: The model, at theta.
        examples: The step's rows; the loss is the mean over them.
        seeds: One per direction.
        eps: Perturbation size, in units of a weight.
        damping: See `natural_slopes`.
        one_sided: Compare losses at theta + eps z with the one at theta, instead of both sides.
    """
    if one_sided:
        probes = [Probe(0, 0.0), *(Probe(seed, eps) for seed in seeds)]
    else:
        probes = [Probe(seed, sign * eps) for seed in seeds for sign in (1.0, -1.0)]
    scores = engine.score(examples, probes)
    plus, minus = sides(scores.losses.mean(axis=1), one_sided)
    slopes, information = slopes_and_fisher(scores, eps, one_sided)
    steps = natural_slopes(slopes, information, damping)
    return tuple(map(_direction, seeds, plus, minus, steps)), scores


def fzoo(engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float) -> Estimate:
    """One-sided probes along every seed's z, normalized; see the head of this file."""
    scores = engine.score(examples, [Probe(0, 0.0), *(Probe(seed, eps) for seed in seeds)])
    here, *there = scores.losses.mean(axis=1)
    losses = np.array(there)
    slopes = _normalized(losses - here)
    return tuple(map(_direction, seeds, losses, [here] * len(seeds), slopes)), scores


def _normalized(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divided by their standard deviation, (n,); 0 where that is, and so no unit, 0."""
    deviation = differences.std()
    return differences / deviation if deviation > _TINY else np.zeros_like(differences)


def _direction(seed: int, plus: float, minus: float, slope: float) -> Direction:
    return Direction(seed, float(plus), float(minus), float(slope))


def trouble(directions: Sequence[Direction], scores: Scores) -> str | None:
    """What is wrong with a step's losses, in words; None where nothing is.

    llama.cpp rounds activations that are NaN to codes of 0 in products with quantized weights, so
    a model that has diverged may have finite losses: the same ones whatever the weights.
    """
    numbers = [(d.loss_plus, d.loss_minus, d.projected_grad) for d in directions]
    if not np.isfinite(numbers).all():
        return "The loss is not finite"
    losses = scores.losses
    if len(losses) > 1 and losses.any() and (losses == losses[0]).all():
        return "No probe changes the loss of any row"
    return None


def unit_size(engine: Engine, draw: Draw, config: TuneConfig) -> float:
    """Root mean square of an entry of the gradient estimate, for a default learning rate.

    Args:
        engine: The model, at the first theta.
        draw: The rows of each step; those of the first ones are measured.
        config: The run's options, with a number for eps.

    Raises:
        ZoError: The loss does not react to perturbations, or is not finite.
    """
    squares: list[float] = []
    for step in range(-(-_SAMPLE // config.n_directions)):
        directions, _ = estimate(engine, draw(step), config, step)
        squares += [d.projected_grad**2 for d in directions]
    size = float(np.sqrt(np.mean(squares) / config.n_directions))
    if not size > 0:
        raise ZoError(NO_SLOPE)
    return size
