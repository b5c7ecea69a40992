"""Probes -> an estimate of the gradient along random directions.

Two-point SPSA (MeZO, arXiv 2305.17333): g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) is the
directional derivative along z, and g z an unbiased estimate of the gradient as eps -> 0.
"""

from collections.abc import Sequence

import numpy as np

from zo_gguf.dataset import Example
from zo_gguf.engine import Engine, Probe, Scores
from zo_gguf.trajectory import Direction

_MASK = (1 << 64) - 1


def direction_seeds(seed: int, step: int, n: int) -> list[int]:
    """Seeds of a step's n directions, a pure function of the run's seed and the step."""
    return [_mix(_mix(_mix(seed) + step) + k) for k in range(n)]


def _mix(x: int) -> int:
    """The splitmix64 output function, which spreads neighbouring integers over all 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def spsa(
    engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float
) -> tuple[tuple[Direction, ...], Scores]:
    """Measure the loss on both sides of theta along every direction.

    Args:
        engine: The model, at theta.
        examples: The step's rows; the loss is the mean over them.
        seeds: One per direction.
        eps: Perturbation size, in units of a weight.

    Returns:
        The directions, and the scores behind them with rows +, -, +, -, ...
    """
    probes = [Probe(seed, sign * eps) for seed in seeds for sign in (1.0, -1.0)]
    scores = engine.score(examples, probes)
    pairs = scores.losses.mean(axis=1).reshape(-1, 2)  # (n_directions, 2)
    directions = tuple(
        Direction(seed, float(plus), float(minus), float((plus - minus) / (2 * eps)))
        for seed, (plus, minus) in zip(seeds, pairs, strict=True)
    )
    return directions, scores


def is_finite(directions: Sequence[Direction]) -> bool:
    """Whether every loss of a step is a number."""
    return all(np.isfinite(d.projected_grad) for d in directions)
