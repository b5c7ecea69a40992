"""`natural`: the natural gradient within the span of a step's directions.

Probes lie on both sides of theta, as those of `spsa`, or on one side, with one at theta.

A few combinations of weights move the answers of all rows alike. They carry nearly all of the
loss's curvature and most of the noise of projected gradients and, soon, nothing of what is left to
learn. The Fisher information tells them apart: how the model's own predictions respond along D
directions, which the probes show anyway, gives the D x D Fisher matrix of their span, and solving
with it leaves those combinations out.

Natural gradient: Amari, Neural Computation 10 (1998). The Fisher matrix of the model's predictions
is used where they are known, because with the empirical one, made from the drawn answers alone, a
batch without a mistake takes longer steps, which makes the model overconfident (arXiv 1905.12558
names further flaws; tools/LOG.md has what was measured).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import Matrix, Scores, Vector
from zo_gguf.engine.engine import Engine
from zo_gguf.tuning.estimators.base import (
    Estimate,
    Estimator,
    along,
    on_both_sides,
    on_one_side,
)

SHORT_RUN = 750  # steps up to which half the forward passes outweigh less noise
_LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Natural(Estimator):
    """See the head of this file.

    Attributes:
        sides: Of theta, that are probed.
        damping: See `natural_slopes`.
    """

    examples_per_step: int = 4
    directions: int = 16
    sides: int = 2
    damping: float = 1.0

    @classmethod
    def of(cls, config: TuneConfig) -> Self:
        """As `Estimator.of`; short runs probe one side, unless --sides says other."""
        sides = config.sides or (1 if (config.iters or cls.iters) <= SHORT_RUN else 2)
        return super().of(dataclasses.replace(config, sides=sides))

    @property
    def n_probes(self) -> int:
        """One for each direction and side; on one side, one at theta too."""
        return 2 * self.directions if self.sides == 2 else self.directions + 1

    def estimate(
        self, engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float
    ) -> Estimate:
        """See `Estimator.estimate`."""
        one_sided = self.sides == 1
        probes = on_one_side(seeds, eps) if one_sided else on_both_sides(seeds, eps)
        scores = engine.score(examples, probes)
        plus, minus = sides(scores.losses.mean(axis=1), one_sided)
        slopes, information = slopes_and_fisher(scores, eps, one_sided)
        steps = natural_slopes(slopes, information, self.damping)
        return Estimate(along(seeds, plus, minus, steps), scores)


def sides(values: Matrix, one_sided: bool) -> tuple[Matrix, Matrix]:
    """What was measured at +eps and, of the same shape, at -eps or at theta; (n_directions, ...).

    Args:
        values: Of the probes along one direction after the other: at +eps and -eps or, one-sided,
            at +eps of all, after one at theta.
        one_sided: Which of the two.
    """
    if one_sided:
        return values[1:], np.broadcast_to(values[:1], values[1:].shape)
    return values[0::2], values[1::2]


def slopes_and_fisher(scores: Scores, eps: float, one_sided: bool = False) -> tuple[Matrix, Matrix]:
    """Mean slopes of the rows, (n_directions,), and the Fisher information in the directions' span.

    The information, (n_directions, n_directions), of rows with choices is exact, the mean over rows
    of sum_c dp_c dp_c' / p_c. That of other rows is empirical, the mean over rows of the mean over
    counted tokens of the products of their slopes.

    Probes on one side see, beside the slope, eps / 2 times the curvature, most of which comes from
    the softmax: the mean over the model's own predictions of what the loss rises by, a
    Kullback-Leibler divergence. It is taken off, as is what it does to the information.

    Args:
        scores: Of the probes, as `sides` has them.
        eps: Perturbation size.
        one_sided: See `sides`.
    """
    slopes, responses = [], []
    targets = scores.targets or [np.empty(0)] * len(scores.outcomes)  # no row has choices
    for k, (outcome, target) in enumerate(zip(scores.outcomes, targets, strict=True)):
        plus, minus = sides(outcome, one_sided)  # (n_directions, n)
        is_choice = target.size > 0
        if one_sided and is_choice:
            slope, response = _from_choices(plus, minus, target, eps)
        elif one_sided:
            slope, response = _from_tokens(plus, minus, eps)
        else:
            middle = 0.5 * (plus + minus)
            weight = _probability(middle, target) if is_choice else outcome.shape[1]
            response = (plus - minus) / (2 * eps) / np.sqrt(weight)
            slope = np.subtract(*sides(scores.losses[:, k], one_sided)) / (2 * eps)
        slopes.append(slope)
        responses.append(response)
    flat = np.concatenate(responses, axis=1)
    return np.mean(slopes, axis=0), np.asarray(flat @ flat.T / len(responses))


def _from_choices(there: Matrix, here: Matrix, target: Vector, eps: float) -> tuple[Matrix, Matrix]:
    """Slopes, (n_directions,), and responses, (n_directions, n), as of logits linear in eps."""
    p = _probability(here, target)
    change = np.log(_probability(there, target) / p) / eps
    change -= (p * change).sum(axis=1, keepdims=True)  # which leaves out the divergence
    return -change @ target, change * np.sqrt(p)


def _from_tokens(there: Matrix, here: Matrix, eps: float) -> tuple[Matrix, Matrix]:
    """As `_from_choices`; the mean over the predictions of 1 - q / p is 0 for every q."""
    gain = here - there  # log q / p, (n_directions, n_tokens)
    # q / p, but beyond e its tangent there: or a single token could outweigh all others.
    change = (1 - np.exp(np.minimum(gain, 1)) * np.maximum(gain, 1)) / eps
    return change.mean(axis=1), change / np.sqrt(change.shape[1])


def _probability(residual: Matrix, target: Vector) -> Matrix:
    return np.maximum(residual + target, _LEAST_PROBABILITY)


def natural_slopes(slopes: Matrix, information: Matrix, damping: float) -> Matrix:
    """Coefficients of the directions in the natural gradient, (n_directions,).

    Args:
        slopes: Mean over rows along each direction, (n_directions,).
        information: From `slopes_and_fisher`.
        damping: Added to the diagonal, as a share of its mean.
    """
    n = len(information)
    scale = float(np.trace(information)) / n
    if scale == 0:  # nothing is known of the answers; of equal losses nothing is left anyway
        return slopes
    if not np.isfinite(information).all():
        return np.full(n, np.nan)  # for the caller to notice
    damped = information / scale + damping * np.eye(n)
    return np.asarray(np.linalg.solve(damped, slopes) / scale)
