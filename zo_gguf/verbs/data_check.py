"""`data check`: every row of a data set, before a run spends hours on it.

Reports all unusable rows at once, the lengths and cuts by file and kind, and one row with its
counted tokens marked. Changes nothing.
"""

import json
import logging
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_gguf.config import DataCheckConfig, takes
from zo_gguf.data.dataset import Example, find_split, iter_examples
from zo_gguf.data.encode import Tokenizer
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError

_log = logging.getLogger(__name__)
_SPLITS = ("train", "valid", "test")
_MAX_REPORTED = 20  # bad rows written out
_GREEN, _RESET = "\x1b[1;32m", "\x1b[0m"


@dataclass(frozen=True)
class Summary:
    """Rows of one kind in one file; lengths in tokens, after cutting."""

    file: str
    kind: str
    rows: int
    min_length: int
    median_length: float
    max_length: int
    counted: int
    cut: int
    unended: int  # chats and completions whose last counted token is no end token


@dataclass(frozen=True)
class ShownRow:
    """One row as text: (text, counts) runs in order, and its choices.

    Attributes:
        source: File and line.
        n_tokens: Length.
        n_bos: How many BOS tokens it has; anything but one is suspicious in a model that wants one.
        runs: Text of neighbouring tokens that count, or that do not.
        choices: Texts of the choices.
        answer: Index of the right one, -1 without choices.
    """

    source: str
    n_tokens: int
    n_bos: int
    runs: list[tuple[str, bool]]
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class DataCheck:
    """Result of `data check`."""

    summaries: list[Summary]
    row: ShownRow

    def render(self, as_json: bool = False) -> str:
        """The JSON object, or a table and the row."""
        if as_json:
            return json.dumps(asdict(self), ensure_ascii=False)
        return "\n".join([*_table(self.summaries), "", *_row_lines(self.row, _use_color())])


@takes(DataCheckConfig)
def data_check(config: DataCheckConfig) -> DataCheck:
    """Validate every row of a file or folder with a model's tokenizer.

    Raises:
        ZoError: A file or row cannot be used; all such rows are listed on stderr first.
    """
    files = _files(Path(config.data))
    with Engine(config.model, ctx_tokens=config.ctx_tokens) as engine:
        summaries: list[Summary] = []
        shown: ShownRow | None = None
        n_rows, errors = 0, []
        for file in files:
            examples = []
            for example in iter_examples(
                file,
                engine,
                max_tokens=config.max_seq_length,
                train_on=config.train_on,
                fields=config.field,
            ):
                n_rows += 1
                if isinstance(example, ZoError):
                    errors.append(example)
                    continue
                examples.append(example)
                if n_rows == config.row:
                    shown = show_row(example, engine.vocabulary)
            summaries += summarize_rows(file.name, examples, engine.vocabulary)
    _report_errors(errors, n_rows)
    if shown is None:
        raise ZoError(f"row {config.row} does not exist; the data has {n_rows} rows.")
    return DataCheck(summaries, shown)


def summarize_rows(file: str, examples: Iterable[Example], tokenizer: Tokenizer) -> list[Summary]:
    """One summary for every kind of row, in order of appearance."""
    kinds: dict[str, list[Example]] = {}
    for example in examples:
        kinds.setdefault(example.kind, []).append(example)
    ends = {tokenizer.eos_id, tokenizer.eot_id}
    summaries = []
    for kind, rows in kinds.items():
        lengths = [len(row.tokens) for row in rows]
        ended = kind in ("completion", "messages")
        summaries.append(
            Summary(
                file,
                kind,
                len(rows),
                min(lengths),
                statistics.median(lengths),
                max(lengths),
                sum(sum(row.target_mask) for row in rows),
                sum(row.n_cut > 0 for row in rows),
                sum(ended and row.tokens[-1] not in ends for row in rows),
            )
        )
    return summaries


def show_row(example: Example, tokenizer: Tokenizer) -> ShownRow:
    """An example as text, cut where counting starts and stops."""
    runs: list[tuple[str, bool]] = []
    for token, counts in zip(example.tokens, example.target_mask, strict=True):
        text = tokenizer.token_text(token)
        if runs and runs[-1][1] == counts:
            runs[-1] = (runs[-1][0] + text, counts)
        else:
            runs.append((text, counts))
    return ShownRow(
        example.source,
        len(example.tokens),
        example.tokens.count(tokenizer.bos_id),
        runs,
        ["".join(map(tokenizer.token_text, choice)) for choice in example.choices],
        example.answer,
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [file for split in _SPLITS if (file := find_split(path, split)) is not None]
    if not files:
        raise ZoError(f"The folder {str(path)!r} has no train.jsonl, valid.jsonl or test.jsonl.")
    return files


def _report_errors(errors: list[ZoError], n_rows: int) -> None:
    if n_rows == 0:
        raise ZoError("The data has no rows; check the path.")
    if not errors:
        return
    for error in errors[:_MAX_REPORTED]:
        _log.error("%s", error)
    if len(errors) > _MAX_REPORTED:
        _log.error("... and %d more.", len(errors) - _MAX_REPORTED)
    raise ZoError(f"{len(errors)} of {n_rows} rows cannot be used; correct or remove them.")


def _table(summaries: list[Summary]) -> list[str]:
    header = ("file", "kind", "rows", "tokens min/median/max", "counted", "cut", "no end token")
    cells: list[tuple[Any, ...]] = [header]
    for s in summaries:
        lengths = f"{s.min_length} / {s.median_length:g} / {s.max_length}"
        cells.append((s.file, s.kind, s.rows, lengths, s.counted, s.cut, s.unended))
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(header))]
    return [
        "  ".join(
            f"{cell!s:<{width}}" if i < 2 else f"{cell!s:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _row_lines(row: ShownRow, color: bool) -> list[str]:
    mark = (_GREEN, _RESET) if color else ("«", "»")
    text = "".join(
        f"{mark[0]}{_visible(run)}{mark[1]}" if counts else _visible(run)
        for run, counts in row.runs
    )
    lines = [f"{row.source}: {row.n_tokens} tokens, {row.n_bos} BOS; counted tokens marked:", text]
    if row.choices:
        listed = (
            f"{_visible(choice)!r}{' (right)' if i == row.answer else ''}"
            for i, choice in enumerate(row.choices)
        )
        lines.append("choices: " + ", ".join(listed))
    return lines


def _visible(text: str) -> str:
    """Control characters written out: data must not steer the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _use_color() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
