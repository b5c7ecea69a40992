"""Means over rows with their standard errors: the one way in which tune, eval and merge measure.

What the loss of a row is stands in `batch.py`.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError

_ROWS_PER_CALL = 64  # between two moves of the progress bar


@dataclass(frozen=True)
class EvalResult:
    """Means over rows with their standard errors (sample deviation / sqrt(n)).

    Attributes:
        loss: Mean loss in nats.
        loss_se: Its standard error; None for a single row, which says nothing about the spread.
        perplexity: exp of the mean negative log-likelihood per counted token; with choices, exp of
            the loss. inf where that overflows.
        accuracy: Share of right choices among the rows that have choices; None without such rows.
        accuracy_se: Its standard error, None likewise or for a single such row.
        n: Number of rows.
    """

    loss: float
    loss_se: float | None
    perplexity: float
    accuracy: float | None
    accuracy_se: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """The result for JSON, which has no infinity: an infinite perplexity becomes None."""
        values = dataclasses.asdict(self)
        return {**values, "perplexity": None if math.isinf(self.perplexity) else self.perplexity}

    def render(self, as_json: bool = False) -> str:
        """One JSON object, or a small table."""
        if as_json:
            return json.dumps(self.to_dict(), allow_nan=False)
        lines = [
            f"{'rows':<12}{self.n}",
            f"{'loss':<12}{_with_error(self.loss, self.loss_se)}",
            f"{'perplexity':<12}{self.perplexity:.4g}",
        ]
        if self.accuracy is not None:
            lines.append(f"{'accuracy':<12}{_with_error(self.accuracy, self.accuracy_se)}")
        return "\n".join(lines)


def measure(engine: Engine, examples: Sequence[Example], label: str = "eval") -> EvalResult:
    """Measure examples at the engine's present theta, with a progress bar on stderr.

    Raises:
        ZoError: There are no examples, or a loss is not finite.
    """
    losses = np.empty(len(examples))  # (n,)
    correct = np.empty(len(examples))  # (n,)
    with tqdm(total=len(examples), desc=label, unit="row", disable=None, leave=False) as bar:
        for first in range(0, len(examples), _ROWS_PER_CALL):
            part = slice(first, first + _ROWS_PER_CALL)
            scores = engine.score(examples[part])
            losses[part], correct[part] = scores.losses[0], scores.correct[0]
            bar.update(scores.losses.shape[1])
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise ZoError(
            f"The loss of {examples[bad[0]].source or 'an example'} is {losses[bad[0]]}; the model "
            "or the delta is broken."
        )
    return summarize(losses, correct, counted_tokens(examples))


def summarize(
    losses: NDArray[np.float64],
    correct: NDArray[np.float64],
    n_counted: NDArray[np.int64] | None = None,
) -> EvalResult:
    """Means and standard errors over rows.

    Args:
        losses: float64 (n,), loss of every row in nats.
        correct: float64 (n,), 1 or 0; NaN for rows without choices.
        n_counted: int64 (n,), counted tokens of every row, which weigh the perplexity of rows
            without choices; None weighs rows equally.

    Raises:
        ZoError: There are no rows.
    """
    if losses.size == 0:
        raise ZoError("There are no rows to evaluate; check --data and --rows.")
    judged = correct[~np.isnan(correct)]
    per_token = float(losses.mean())
    if n_counted is not None and judged.size == 0:
        per_token = float(np.average(losses, weights=n_counted))
    return EvalResult(
        loss=float(losses.mean()),
        loss_se=_standard_error(losses),
        perplexity=_exp(per_token),
        accuracy=float(judged.mean()) if judged.size else None,
        accuracy_se=_standard_error(judged),
        n=int(losses.size),
    )


def counted_tokens(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Tokens that count in each example's loss, (n,)."""
    return np.array([sum(example.target_mask) for example in examples], dtype=np.int64)


def _standard_error(values: NDArray[np.float64]) -> float | None:
    if values.size < 2:
        return None
    return float(values.std(ddof=1) / math.sqrt(values.size))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
