"""A learning rate from the loss itself: how far the first step's direction leads downhill.

Which rate suits depends on the model and far more on the task: rows that differ in one word of the
answer bear a tenth of what chats do. So the loss is measured along the first update of the
optimizer, on other rows than those that gave it, and the rate is half the way to the lowest point.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw, Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.tuning.estimators import estimates
from zo_gguf.tuning.optimizer import make_optimizer
from zo_gguf.tuning.trainable import Trainable

_ROWS = 32  # that give the direction, and as many that it is measured on
_FIRST = 0.1  # of the loss, that the first try is to take off
_FACTOR = 3.0  # from one try to the next
_MOST = 12  # tries
TRIES = 6  # as a rule, and a step
_SHARE = 0.5  # of the way to the lowest point
NO_SLOPE = (
    "The loss does not change with the trainable weights; check that the data's counted tokens are "
    "what you want to teach (`zo-gguf data check`)."
)


@dataclass(frozen=True)
class LineSearch:
    """What was measured.

    Attributes:
        rates: Rates of a single step from theta, ascending, 0 first.
        losses: Mean loss there.
    """

    rates: Sequence[float]
    losses: Sequence[float]

    @property
    def lowest(self) -> float:
        """The rate at the lowest point: of a parabola in log rate through the three tries there."""
        k = int(np.argmin(self.losses))
        if not 1 < k < len(self.rates) - 1 or not np.isfinite(self.losses[k + 1]):
            return self.rates[k]
        x, y = np.log(self.rates[k - 1 : k + 2]), self.losses[k - 1 : k + 2]
        slope, bend = np.diff(y) / np.diff(x), np.diff(np.diff(y) / np.diff(x))[0]
        middle = (x[0] + x[1]) / 2 - slope[0] * (x[2] - x[0]) / 2 / bend
        return float(np.exp(np.clip(middle, x[0], x[2])))

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(f"{_SHARE * self.lowest:.2g}")

    def render(self) -> str:
        """One sentence for people."""
        gain = self.losses[0] - min(self.losses)
        return (
            f"a single step lowers the loss of other rows most at rate {self.lowest:.2g}, by "
            f"{gain:.2g} from {self.losses[0]:.2g}"
        )


def search_rate(config: TuneConfig, trainable: Trainable, engine: Engine, draw: Draw) -> LineSearch:
    """Measure the loss along the first step.

    Args:
        config: The run's options.
        trainable: At the first theta, where it is again afterwards.
        engine: The model.
        draw: The rows of each step.

    Raises:
        ZoError: The loss has no slope, is not finite, or only grows.
    """
    rows = _rows(draw)
    half = max(1, len(rows) // 2)
    given, others = rows[:half], rows[half:] or rows
    with estimates(engine, config) as estimate:
        measured = estimate(given, 0)
    if problem := measured.trouble():
        raise ZoError(f"{problem} before the first step; the model or the data is broken.")
    gradient = measured.gradient(engine.noise)
    if not gradient.any():
        raise ZoError(NO_SLOPE)
    theta = engine.theta()
    change = np.zeros_like(theta)
    make_optimizer(config.optimizer, theta.size, trainable.n_lasting).update(change, gradient, 1.0)
    slope = -float(np.dot(change.astype(np.float64), gradient))
    rates, losses = [0.0], [_loss(engine, others)]
    rate = _FIRST * losses[0] / slope
    try:
        while len(rates) <= _MOST and (len(rates) < 3 or losses[-1] <= min(losses)):
            engine.set_theta(theta + np.float32(rate) * change)
            rates.append(rate)
            losses.append(_loss(engine, others))
            rate *= _FACTOR
    finally:
        trainable.place(0)
    found = LineSearch(rates, losses)
    if found.lowest == 0:
        raise ZoError(
            "No step along the gradient lowers the loss of other rows: the rows have too little in "
            "common. Give more rows, or set --learning-rate yourself."
        )
    return found


def _rows(draw: Draw) -> list[Example]:
    """The first rows of the run, of two steps or 64, whichever is less."""
    rows = [row for step in range(2) for row in draw(step)]
    return rows[: 2 * _ROWS]


def _loss(engine: Engine, rows: Sequence[Example]) -> float:
    loss = float(engine.losses(rows).mean())
    return loss if np.isfinite(loss) else np.inf
