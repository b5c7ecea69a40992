"""Regression adjustment: slopes freed of what the draw of rows alone explains.

A row's slope along z is largely its residuals (probability of each choice minus what is aimed at)
times how z moves the choices. So the mean slope of a batch depends on the residuals it happens
to hold. Regressing the rows' slopes on their residuals and moving the mean to the residuals of the
last steps' rows, a control variate, takes that part away; no forward pass is needed. On AG News it
halves the variance between rows late in a run; that runs end lower was not shown (tools/LOG.md).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example
from zo_gguf.errors import ZoError

_MEMORY = 0.1  # weight of the newest step in the running mean
_FIRST_STEPS = 4  # without enough steps behind the mean, nothing is adjusted
_RIDGE = 1e-3
_ROWS_PER_FEATURE = 4  # fewer would cost more variance than they take away

Matrix = NDArray[np.float64]


def n_features(examples: Sequence[Example], n_rows: int) -> int:
    """How many residuals of a row are used: all choices but the last, or 0 where that cannot be.

    Args:
        examples: The rows to train on.
        n_rows: Rows per step.
    """
    counts = {len(example.choices) for example in examples}
    n = counts.pop() - 1 if len(counts) == 1 else 0
    return n if 0 < n <= n_rows // _ROWS_PER_FEATURE else 0


def required_features(examples: Sequence[Example], n_rows: int) -> int:
    """As `n_features`.

    Raises:
        ZoError: There are none, so that --adjust would do nothing.
    """
    if n := n_features(examples, n_rows):
        return n
    raise ZoError(
        "--adjust goes by the choices of rows that all have equally many, with at least "
        f"{_ROWS_PER_FEATURE} rows a step for each but one; raise --examples-per-step, or leave it "
        "out."
    )


class Adjustment:
    """Adjusts the slopes of a step.

    Args:
        n: From `n_features`; 0 adjusts nothing.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._mean = np.zeros(n)
        self._steps = 0

    def remember(self, features: Sequence[float]) -> None:
        """Take a step's mean features into account; they come from the trajectory."""
        weight = max(_MEMORY, 1 / (self._steps + 1))
        self._mean = (1 - weight) * self._mean + weight * np.array(features)
        self._steps += 1

    def features(self, residuals: Matrix | None) -> Matrix:
        """What is regressed on, (n_rows, n), from residuals (n_probes, n_rows, n_choices)."""
        if self.n == 0 or residuals is None:
            return np.zeros((1, self.n))
        return np.asarray(residuals[:, :, : self.n].mean(axis=0))

    def __call__(self, slopes: Matrix, features: Matrix) -> Matrix:
        """Mean slope of each direction, (n_directions,).

        Args:
            slopes: (n_directions, n_rows).
            features: (n_rows, n).
        """
        means = slopes.mean(axis=1)
        if self.n == 0 or self._steps < _FIRST_STEPS:
            return np.asarray(means)
        centre = features.mean(axis=0)
        x = features - centre
        gram = x.T @ x + _RIDGE * len(x) * np.eye(self.n)
        effects = np.linalg.solve(gram, x.T @ (slopes - means[:, None]).T)  # (n, n_directions)
        return np.asarray(means - (centre - self._mean) @ effects)
