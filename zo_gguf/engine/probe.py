"""Probes, and what evaluating them gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """One evaluation of the loss, at theta + scale * z(seed); scale 0 is theta itself.

    With `signs` not 0, the signs of z change by row and column (GRZO, arXiv 2606.02857).
    """

    seed: int
    scale: float
    signs: int = 0


Probes = Sequence[Probe | Sequence[Probe]]  # each for all examples, or one for each example
AT_THETA = (Probe(0, 0.0),)


@dataclass(frozen=True)
class Scores:
    """What a forward pass over examples gives.

    Attributes:
        losses: float64 (n_probes, n_examples).
        correct: float64 (n_probes, n_examples), 1 or 0; NaN where an example has no choices.
        n_tokens: Tokens that went through the model, over all probes.
        outcomes: One float64 (n_probes, n) per example: the negative log-likelihood of each counted
            token or, where an example has choices, its residuals: the probability of each choice
            minus the one that is aimed at, 1 for the right choice unless the example says other.
        targets: For every example with choices what is aimed at, (n_choices,); else (0,).
    """

    losses: Matrix
    correct: Matrix
    n_tokens: int
    outcomes: Sequence[Matrix] = ()
    targets: Sequence[Vector] = ()

    @property
    def residuals(self) -> Matrix | None:
        """(n_probes, n_examples, n_choices); None unless all have equally many choices."""
        if not self.outcomes or np.isnan(self.correct).any():
            return None
        if len({outcome.shape for outcome in self.outcomes}) > 1:
            return None
        return np.stack(self.outcomes, axis=1)
