"""Data files and folders -> examples, the split for validation, and which rows a step sees.

Most of the variance of a zeroth-order step comes from the rows it happens to draw, and in
classification most of that from the mix of answers (tools/LOG.md). So equal answers are spread
evenly over a shuffled epoch (stratified sampling), which costs nothing. Nothing here runs a model.
"""

import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config.option import parse_fields
from zo_gguf.data.encode import Encoder, Reader
from zo_gguf.data.encode import Example as Example
from zo_gguf.data.rows import read_rows
from zo_gguf.errors import ZoError

_log = logging.getLogger(__name__)
_SUFFIXES = (".jsonl", ".json", ".csv")
Fields = Mapping[str, str] | Sequence[str] | None


def load_examples(
    path: str | os.PathLike[str],
    engine: Reader,
    *,
    max_tokens: int | None = None,
    train_on: str = "last-assistant",
    fields: Fields = None,
    split: str | None = None,
) -> list[Example]:
    """Read a data file.

    Args:
        path: A .jsonl, .json or .csv file, or with `split` a folder of them.
        engine: Whose tokenizer and chat template are used.
        max_tokens: Longest example; default: what the engine's context and the model hold.
        train_on: Which turns of `messages` rows count: "last-assistant" or "all-assistant".
        fields: Keys to read from other columns: {"prompt": "question"} or ["prompt=question"].
        split: "train", "valid" or "test", for a folder.

    Returns:
        The examples in file order. Rows that are too long lost the beginning of their prompt
        (`text` rows their end); a warning says how many.

    Raises:
        ZoError: The file or a row cannot be used; the message names file and line.
    """
    file = resolve_split(path, split)
    examples = []
    for example in iter_examples(
        file, engine, max_tokens=max_tokens, train_on=train_on, fields=fields
    ):
        if isinstance(example, ZoError):
            raise example
        examples.append(example)
    if not examples:
        raise ZoError(f"The data file {str(file)!r} has no rows; check the path.")
    n_cut = sum(example.n_cut > 0 for example in examples)
    if n_cut:
        _log.warning("%s: %d of %d rows were too long and were cut.", file, n_cut, len(examples))
    return examples


def load_train_valid(
    path: str | os.PathLike[str],
    engine: Reader,
    *,
    val_split: float,
    max_tokens: int | None = None,
    train_on: str = "last-assistant",
    fields: Fields = None,
) -> tuple[list[Example], list[Example]]:
    """Read the rows to train on and the rows to validate with.

    Args:
        path: A folder with train and valid files, or one file.
        engine: As for `load_examples`.
        val_split: Share of the rows kept for validation when there is no valid file. The same
            rows are chosen every time.
        max_tokens: As for `load_examples`.
        train_on: As for `load_examples`.
        fields: As for `load_examples`.

    Raises:
        ZoError: A file or a row cannot be used, or too few rows are left to train on.
    """

    def load(file: Path) -> list[Example]:
        return load_examples(file, engine, max_tokens=max_tokens, train_on=train_on, fields=fields)

    train = load(resolve_split(path, "train"))
    valid_file = find_split(Path(path), "valid") if Path(path).is_dir() else None
    if valid_file is not None:
        return train, load(valid_file)
    if val_split and len(train) < 2:
        raise ZoError(f"{str(path)!r} has one row, which cannot be split; set --val-split 0.")
    chosen = _validation_rows(len(train), val_split)
    valid = [example for i, example in enumerate(train) if i in chosen]
    return [example for i, example in enumerate(train) if i not in chosen], valid


def resolve_split(path: str | os.PathLike[str], split: str | None) -> Path:
    """The file of a split: `path` itself, or in a folder its train, valid or test file.

    Raises:
        ZoError: There is no such file.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if split is None:
        raise ZoError(f"{str(path)!r} is a folder; name one of its files, or a split.")
    file = find_split(path, split)
    if file is None:
        have = ", ".join(sorted(f.name for f in path.iterdir() if f.suffix in _SUFFIXES)) or "none"
        raise ZoError(f"The folder {str(path)!r} has no {split}.jsonl; its data files: {have}.")
    return file


def find_split(folder: Path, split: str) -> Path | None:
    """The train, valid or test file of a folder, None if it has none."""
    candidates = (folder / (split + suffix) for suffix in _SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def iter_examples(
    file: Path,
    engine: Reader,
    *,
    max_tokens: int | None = None,
    train_on: str = "last-assistant",
    fields: Fields = None,
) -> Iterator[Example | ZoError]:
    """Yield each row of a file as an example, or the error that makes it unusable.

    Raises:
        ZoError: The file as a whole cannot be read, or `max_tokens` exceeds the context.
    """
    encoder = Encoder(engine, max_tokens, train_on)
    renamed = fields if isinstance(fields, Mapping) else parse_fields(list(fields or ()))
    converted: Counter[str] = Counter()
    for row in read_rows(file, renamed, chat=engine.vocabulary.chat_template is not None):
        if isinstance(row, ZoError):
            yield row
            continue
        converted[row.converted] += 1
        try:
            yield encoder.encode(row)
        except ZoError as error:
            yield error
    for shape, count in converted.items():
        if shape:
            _log.warning("%s: converted %d rows from `%s`.", file, count, shape)


def digest_examples(examples: Sequence[Example]) -> str:
    """SHA-256 of what the model sees of the examples, as hex."""
    sha = hashlib.sha256()
    for example in examples:
        for numbers in (example.tokens, example.target_mask, (example.answer,), *example.choices):
            sha.update(np.asarray(numbers, np.int64).tobytes())
            sha.update(b";")
    return sha.hexdigest()


def _validation_rows(n_rows: int, share: float) -> set[int]:
    """Indices of the rows kept for validation: always the same, in no pattern, at least one.

    Every k-th row would be a trap: data that cycles through its classes gives one class.
    """
    if not share:
        return set()
    n_valid = min(max(1, round(n_rows * share)), n_rows - 1)
    return set(sorted(range(n_rows), key=lambda i: hashlib.sha256(b"%d" % i).digest())[:n_valid])


# ---- what a step sees ----------------------------------------------------------------------------


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
