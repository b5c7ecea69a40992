"""Probes, and what evaluating them gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


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
        residuals: float64 (n_probes, n_examples, n_choices), probability of each choice, minus 1
            for the right one; None unless all examples have equally many choices.
    """

    losses: Matrix
    correct: Matrix
    n_tokens: int
    residuals: Matrix | None = None
