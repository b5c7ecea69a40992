"""Which rows a step sees: epochs of shuffled rows, in which equal answers are spread evenly.

Most of the variance of a zeroth-order step comes from the rows it happens to draw, and in
classification most of that from the mix of answers (tools/LOG.md). Spreading each answer evenly
over the epoch (stratified sampling) removes that part and costs nothing.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zo_gguf.data.dataset import Example


class Draw:
    """Rows of each step, a pure function of the seed and the step.

    Attributes:
        examples: The rows; others with the same answers may take their place.

    Args:
        examples: The rows to train on, one or more.
        n: Rows per step.
        seed: The run's seed.
        balance: Spread equal answers; without it, every row counts as an answer of its own.
    """

    def __init__(
        self, examples: Sequence[Example], n: int, seed: int, *, balance: bool = True
    ) -> None:
        self.examples, self._n, self._seed = examples, n, seed
        answers = [_answer(example) for example in examples] if balance else range(len(examples))
        strata = {answer: label for label, answer in enumerate(dict.fromkeys(answers))}
        self._labels = np.array([strata[answer] for answer in answers])
        self._counts = np.bincount(self._labels)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def __call__(self, step: int) -> list[Example]:
        """The rows of the step after `step` steps."""
        size = len(self.examples)
        rows = []
        for position in range(step * self._n, (step + 1) * self._n):
            epoch, place = divmod(position, size)
            rows.append(self.examples[self._order(epoch)[place]])
        return rows

    def seen(self, n_steps: int) -> list[int]:
        """Which rows, ascending, some number of steps see."""
        return sorted(self._order(0)[: n_steps * self._n].tolist())

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """A permutation in which the k-th of an answer's c rows stands at about (k + u) / c."""
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        shuffled = random.permutation(self._labels.size)
        labels = self._labels[shuffled]
        by_label = np.argsort(labels, kind="stable")
        starts = np.cumsum(self._counts) - self._counts
        rank = np.empty_like(labels)
        rank[by_label] = np.arange(labels.size) - np.repeat(starts, self._counts)
        place = (rank + random.random(self._counts.size)[labels]) / self._counts[labels]
        return shuffled[np.argsort(place, kind="stable")]


def _answer(example: Example) -> tuple[int, ...]:
    """What the row teaches; rows of free text hardly share one and are merely shuffled."""
    if example.choices:
        return tuple(example.choices[example.answer])
    return tuple(
        token for token, counts in zip(example.tokens, example.target_mask, strict=True) if counts
    )
