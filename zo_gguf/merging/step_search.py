"""Choose step, offset and codes for groups of weights that share a step, by weighted error.

All groups of a call are searched at once. A group's value is `step * level - offset`; step and
offset are half-precision numbers, or multiples of a unit that the whole block shares (K-quants).
How the result is packed into bytes is `requantize`'s matter.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

# Steps tried, as multiples of the step at which the group's extreme values are just in range, and
# of the step that the group has.
_REACH = np.linspace(0.6, 1.1, 16, dtype=np.float32)
_NEAR = np.linspace(0.9, 1.1, 8, dtype=np.float32)
_REACH_WITH_OFFSET = np.linspace(0.55, 1.1, 12, dtype=np.float32)
_HALF_MAX = np.float32(65504.0)


@dataclass(frozen=True)
class Groups:
    """What is searched, for n groups of m weights.

    Attributes:
        target: (n, m) the wanted values.
        weight: (n, m) how much each squared error counts.
        levels: (n_levels,) ascending.
        step, offset: (n,) as they are now; offset None for types without one.
        codes: (n, m) index of each weight's level as it is now.
        unit: (n,) the block's step unit, None where steps are half-precision numbers.
        scale_low, scale_high: Multiples of `unit` that can be stored.
        min_unit: (n,) likewise for the offset, None where offsets are half-precision numbers.
        min_high: Largest multiple of `min_unit`.
    """

    target: F32
    weight: F32
    levels: F32
    step: F32
    offset: F32 | None
    codes: I64
    unit: F32 | None = None
    scale_low: int = 0
    scale_high: int = 0
    min_unit: F32 | None = None
    min_high: int = 0


@dataclass
class Found:
    """The best so far; fields as in Groups."""

    codes: I64
    step: F32
    offset: F32
    error: F32  # (n,)


def search_steps(groups: Groups) -> Found:
    """The best step, offset and codes found per group; never worse than the step it has."""
    with np.errstate(all="ignore"):
        search = _Search(groups)
        if groups.offset is None:
            search.steps_alone()
        else:
            search.steps_and_offsets()
        if groups.unit is not None:
            search.neighbours(groups.unit)
    return search.best


class _Search:
    def __init__(self, groups: Groups) -> None:
        self.g = groups
        self.low, self.high = groups.levels[0], groups.levels[-1]
        self.uniform = bool((np.diff(groups.levels) == 1).all())
        self.middles = (groups.levels[1:] + groups.levels[:-1]) / 2
        offset = np.zeros_like(groups.step) if groups.offset is None else groups.offset
        # Codes stay where the step cannot tell levels apart; elsewhere this gives the old codes for
        # untouched entries and the nearest for tuned ones.
        codes = np.where(groups.step[:, None] == 0, groups.codes, self.nearest(groups.step, offset))
        self.best = Found(
            codes, groups.step.copy(), offset.copy(), self.error(groups.step, offset, codes)
        )

    def nearest(self, step: F32, offset: F32) -> I64:
        """Index of the nearest level, (n, m)."""
        scaled = (self.g.target + offset[:, None]) / np.where(step == 0, 1, step)[:, None]
        if self.uniform:
            ranks = np.clip(np.rint(scaled - self.low), 0, len(self.g.levels) - 1)
            return np.asarray(np.nan_to_num(ranks), dtype=np.int64)
        return np.asarray(np.searchsorted(self.middles, scaled), dtype=np.int64)

    def error(self, step: F32, offset: F32, codes: I64) -> F32:
        """Weighted squared error per group, (n,)."""
        values = step[:, None] * self.g.levels[codes] - offset[:, None]
        return np.asarray((self.g.weight * np.square(values - self.g.target)).sum(axis=1))

    def snap(self, step: F32, offset: F32) -> tuple[F32, F32]:
        """The nearest step and offset that can be stored."""
        g = self.g
        if g.unit is None:
            step = _to_half(step)
        else:
            multiple = np.rint(step / np.where(g.unit == 0, 1, g.unit))
            step = g.unit * np.clip(np.nan_to_num(multiple), g.scale_low, g.scale_high)
        if g.offset is None:
            return step, np.zeros_like(step)
        if g.min_unit is None:
            return step, _to_half(offset)
        multiple = np.rint(offset / np.where(g.min_unit == 0, 1, g.min_unit))
        return step, g.min_unit * np.clip(np.nan_to_num(multiple), 0, g.min_high)

    def attempt(self, step: F32, offset: F32) -> I64:
        """Try a step and offset per group and keep them where they beat the best; returns codes."""
        step, offset = self.snap(step.astype(np.float32), offset.astype(np.float32))
        codes = self.nearest(step, offset)
        error = self.error(step, offset, codes)
        better = error < self.best.error
        self.best.error[better] = error[better]
        self.best.step[better] = step[better]
        self.best.offset[better] = offset[better]
        self.best.codes[better] = codes[better]
        return codes

    def attempt_and_refine(self, step: F32, offset: F32) -> None:
        """Try, then try the least-squares step and offset of the codes that it gave."""
        levels = self.g.levels[self.attempt(step, offset)]
        self.attempt(*self.least_squares(levels))

    def least_squares(self, levels: F32) -> tuple[F32, F32]:
        w, x = self.g.weight, self.g.target
        weighted = w * levels
        ll, lx = (weighted * levels).sum(axis=1), (weighted * x).sum(axis=1)
        if self.g.offset is None:
            return lx / ll, np.zeros_like(ll)
        total, lw, xw = w.sum(axis=1), weighted.sum(axis=1), (w * x).sum(axis=1)
        step = (total * lx - lw * xw) / (total * ll - lw * lw)
        return step, (step * lw - xw) / total

    def steps_alone(self) -> None:
        """Types without offset: a step of either sign, as the levels are not symmetric."""
        top, bottom = self.g.target.max(axis=1), self.g.target.min(axis=1)
        zero = np.zeros_like(top)
        positive = np.maximum(top / self.high, bottom / self.low)
        negative = -np.maximum(-bottom / self.high, -top / self.low)
        for factor in _REACH:
            self.attempt_and_refine(factor * positive, zero)
            self.attempt_and_refine(factor * negative, zero)
        for factor in _NEAR:
            self.attempt_and_refine(factor * self.g.step, zero)

    def steps_and_offsets(self) -> None:
        """Types with offset: each step with the group's offset, and with either end in range."""
        assert self.g.offset is not None
        top, bottom = self.g.target.max(axis=1), self.g.target.min(axis=1)
        reach = (top - bottom) / (self.high - self.low)
        for factor in _REACH_WITH_OFFSET:
            step = factor * reach
            for offset in (self.g.offset, step * self.low - bottom, step * self.high - top):
                self.attempt_and_refine(step, offset)
        for factor in _NEAR:
            self.attempt_and_refine(factor * self.g.step, self.g.offset)

    def neighbours(self, unit: F32) -> None:
        """Walk from the best to better multiples of the units next to it."""
        min_unit = self.g.min_unit
        moves = [(1, 0), (-1, 0)]
        if min_unit is not None:
            moves += [(0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
        for _ in range(2):
            for ds, dm in moves:
                offset = self.best.offset if min_unit is None else self.best.offset + dm * min_unit
                self.attempt(self.best.step + ds * unit, offset)


def _to_half(values: F32) -> F32:
    clipped = np.clip(np.nan_to_num(values), -_HALF_MAX, _HALF_MAX)
    return clipped.astype(np.float16).astype(np.float32)
