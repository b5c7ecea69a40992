"""z of gains and low-rank products, which libzo is told of branch by branch."""

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from zo_gguf.handles import RADEMACHER
from zo_gguf.native import FLOATS, Library
from zo_gguf.params.kinds import Gain, LowRank

Vector = NDArray[np.float32]
# The noise's tensor numbers; those below are the native parts'.
FIRST_LOW_RANK, FIRST_GAIN = 1 << 31, 3 << 30


class EditNoise:
    """z(seed) of one edit; with signs, that of one example (GRZO, arXiv 2606.02857).

    Args:
        library: libzo.
        distribution: NORMAL or RADEMACHER: what z is drawn from.
    """

    def __init__(self, library: Library, distribution: int) -> None:
        self._library, self._distribution = library, distribution

    def of_gain(self, number: int, edit: Gain, seed: int, signs: int = 0) -> Vector:
        """z of the number-th gain, (edit.size,)."""
        return self._signed(FIRST_GAIN + number, edit, slice(0, edit.size), seed, signs)

    def of_low_rank(
        self, number: int, edit: LowRank, step: int, seed: int, signs: int = 0
    ) -> Vector:
        """z of the masters of the number-th product that the step after `step` steps trains."""
        return self._signed(FIRST_LOW_RANK + number, edit, edit.trained(step), seed, signs)

    def _signed(
        self, tensor: int, edit: Gain | LowRank, part: slice, seed: int, signs: int
    ) -> Vector:
        z = self._draw(self._distribution, seed, tensor, part)
        if signs == 0:
            return z
        height, widths = edit.matrices
        flips = self._draw(RADEMACHER, signs, tensor, slice(0, height + sum(widths)))
        rows, *columns = np.split(flips, list(accumulate(widths[:-1], initial=height)))
        first = 0
        for column in columns:
            end = first + height * column.size
            matrix = z[first:end].reshape(height, -1)
            matrix *= rows[:, None]
            matrix *= column
            first = end
        return z

    def _draw(self, distribution: int, seed: int, tensor: int, part: slice) -> Vector:
        z = np.empty(part.stop - part.start, np.float32)
        self._library.call(
            "zo_noise", distribution, seed, tensor, part.start, z.size, z.ctypes.data_as(FLOATS)
        )
        return z
