"""Limits on projected gradients, so that one wild loss cannot throw theta far (QZO, 2505.13430)."""

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np

from zo_gguf.tuning.trajectory import Direction

_MEMORY = 100  # projected gradients
_MEDIANS = 3.0


class Clip:
    """Keeps projected gradients within +- a limit.

    Args:
        limit: A constant, "adaptive" for three times the median magnitude of the last 100, or None
            for no limit. A clipped value counts as what it became, which leaves the median alone.
    """

    def __init__(self, limit: float | str | None) -> None:
        self._limit = limit
        self._recent: deque[float] = deque(maxlen=_MEMORY)

    def remember(self, directions: Sequence[Direction]) -> None:
        """Take the directions of a step into account; they come from the trajectory."""
        self._recent.extend(abs(d.projected_grad) for d in directions)

    def __call__(self, directions: tuple[Direction, ...]) -> tuple[Direction, ...]:
        """The directions of the next step, clipped."""
        limit = self._limit
        if limit == "adaptive":
            # Where most slopes are 0 there is no scale; a limit of 0 would never be left again.
            limit = _MEDIANS * float(np.median(self._recent)) if self._recent else 0.0
            limit = limit or None
        if limit is None:
            return directions
        low, high = -float(limit), float(limit)
        return tuple(
            dataclasses.replace(d, projected_grad=min(max(d.projected_grad, low), high))
            for d in directions
        )
