"""Probes, and what evaluating them gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zo_gguf.libzo import AT_THETA as AT_THETA
from zo_gguf.libzo import Probe as Probe

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


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
