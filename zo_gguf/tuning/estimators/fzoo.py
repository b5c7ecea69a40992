"""`fzoo`: one-sided Rademacher probes, normalized (FZOO, arXiv 2506.09034).

The coefficient of direction i is (L(theta + eps z_i) - L(theta)) divided by the standard deviation
of the losses at the probes, so that a step has about the same length whatever the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.libzo import RADEMACHER
from zo_gguf.tuning.estimators.base import Estimate, Estimator, along, on_one_side

_TINY = 1e-12  # up to here, losses that differ are the same ones, rounded


@dataclass(frozen=True, kw_only=True)
class Fzoo(Estimator):
    """See the head of this file."""

    distribution: ClassVar[int] = RADEMACHER

    directions: int = 8

    def __post_init__(self) -> None:
        if self.directions == 1:
            raise ZoError("fzoo divides by the deviation of several losses; raise --directions.")

    @property
    def n_probes(self) -> int:
        """One for each direction, and one at theta."""
        return self.directions + 1

    def estimate(
        self, engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float
    ) -> Estimate:
        """See `Estimator.estimate`."""
        scores = engine.score(examples, on_one_side(seeds, eps))
        here, *there = scores.losses.mean(axis=1)
        losses, base = np.array(there), np.full(len(there), here)
        deviation = (losses - base).std()
        # Where nothing differs there is no unit, and nothing to learn.
        slopes = (losses - base) / deviation if deviation > _TINY else np.zeros_like(losses)
        return Estimate(along(seeds, losses, base, slopes), scores)
