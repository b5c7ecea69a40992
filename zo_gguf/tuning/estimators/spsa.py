"""`spsa`: probes on both sides of theta (MeZO, arXiv 2305.17333).

g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) is the directional derivative along z, and g z
an unbiased estimate of the gradient as eps -> 0. Several directions are averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.tuning.estimators.base import Estimate, Estimator, along, on_both_sides


@dataclass(frozen=True, kw_only=True)
class Spsa(Estimator):
    """See the head of this file."""

    directions: int = 1

    @property
    def n_probes(self) -> int:
        """Two for each direction."""
        return 2 * self.directions

    def estimate(
        self, engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float
    ) -> Estimate:
        """See `Estimator.estimate`."""
        scores = engine.score(examples, on_both_sides(seeds, eps))
        plus, minus = scores.losses.mean(axis=1).reshape(-1, 2).T
        return Estimate(along(seeds, plus, minus, (plus - minus) / (2 * eps)), scores)
