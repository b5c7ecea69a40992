"""The run behind a delta, and the rows that its merge is measured on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from zo_gguf.config import MergeConfig, TuneConfig
from zo_gguf.data.dataset import Example, find_split, load_examples, load_train_valid
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.evaluation import counted_tokens, summarize
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.merging.stock import Measured, measure_stock
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.run import load_options, run_files
from zo_gguf.tuning.trajectory import older_version

_CTX_TOKENS = 2048
_ROWS_PER_CALL = 64


@dataclass(frozen=True)
class Rows:
    """Rows that written files are compared on.

    Attributes:
        split: Which rows of the data they are, "valid" or "test".
        examples: The rows.
        base: Their losses with the base, in stock llama-cpp-python.
        tuned: Their losses with the tuned weights, by the engine's hooks.
    """

    split: str
    examples: Sequence[Example]
    base: Measured
    tuned: Measured


@dataclass(frozen=True)
class Baseline:
    """What written files are compared with.

    Attributes:
        choosing: The rows by which a file is chosen.
        reporting: Rows that had no part in the choice, None where the data has none.
        calibration: Rows whose inputs guide rounding: of the training data where there are some.
    """

    choosing: Rows
    reporting: Rows | None
    calibration: Sequence[Example]

    @property
    def reported(self) -> Rows:
        """The rows whose numbers people are told."""
        return self.reporting or self.choosing


@dataclass(frozen=True)
class Source:
    """Where a delta lies.

    Attributes:
        name: Of the run folder, or of a lone file.
        run: The run's resolved settings; None for a lone file, or a run of an older zo-gguf.
        files: What must not be written over: the delta, and the other files of its run.
    """

    name: str
    run: TuneConfig | None
    files: Sequence[Path]


def find_source(path: Path) -> Source:
    """The run that `path` is or lies in."""
    path = path.resolve()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            # An older run has other options, but a delta like any other.
            older = older_version(folder / "trajectory.bin")
            run = None if older else load_options(folder)
            return Source(folder.name, run, [path, *run_files(folder, run)])
    return Source(path.stem, None, [path])


def open_base(config: MergeConfig, run: TuneConfig | None, delta: Delta) -> GgufFile:
    """The GGUF that was tuned.

    Raises:
        ZoError: It is not recorded or not there any more, or is another file than the tuned one.
    """
    path = config.model or (run.model if run else None)
    if config.model is None and (path is None or not Path(path).is_file()):
        where = f"is not at {path!r}" if path else "is not recorded"
        raise ZoError(
            f"The base {delta.header.base_name!r} of {config.run!r} {where}; give it with -m."
        )
    assert path is not None
    base = GgufFile(path)
    delta.check_base(base)
    return base


def measure_baseline(
    config: MergeConfig, run: TuneConfig | None, base: GgufFile, delta: Delta
) -> Baseline | str:
    """Losses before and after tuning, or a sentence that says why nothing can be measured.

    Raises:
        ZoError: The rows cannot be used.
    """
    if config.data is None and (run is None or not os.path.exists(run.data)):
        why = f"the run's data {run.data!r} is gone" if run else "there is no run with data"
        return f"Nothing was measured, as {why}; give --data to see what survived."
    ctx_tokens = run.ctx_tokens if run else _CTX_TOKENS
    with Engine(base.path, delta=delta, n_threads=config.threads, ctx_tokens=ctx_tokens) as engine:
        examples, calibration = _load(config, run, engine)
        if not examples["valid"]:
            return "Nothing was measured, as the run kept no rows for it; give --data to do so."
        tuned = {split: _measure_hooked(engine, rows) for split, rows in examples.items() if rows}
    choosing, *reporting = (
        Rows(split, rows, measure_stock(base.path, rows, n_threads=config.threads), tuned[split])
        for split, rows in examples.items()
        if rows
    )
    return Baseline(choosing, reporting[0] if reporting else None, calibration)


def _load(
    config: MergeConfig, run: TuneConfig | None, engine: Engine
) -> tuple[dict[str, Sequence[Example]], Sequence[Example]]:
    """Rows to choose with ("valid") and to report on ("test", perhaps none); to calibrate with."""
    train: Sequence[Example] = []
    valid: Sequence[Example] = []
    if run is not None and os.path.exists(run.data):
        train, valid = load_train_valid(run.data, engine, val_split=run.val_split, **_reading(run))
        valid = valid[: run.valid_rows or None]
    data = config.data
    if data is not None:
        valid = load_examples(data, engine, split="valid", **_reading(run))
        train = train or _rows_of(data, "train", run, engine) or valid
    elif run is not None:
        data = run.data
    test = _rows_of(data, "test", run, engine) if data is not None else []
    return {"valid": valid, "test": test[: (run.valid_rows if run else 0) or None]}, train


def _rows_of(data: str, split: str, run: TuneConfig | None, engine: Engine) -> list[Example]:
    """The rows of a split, none where `data` is a file or a folder without it."""
    if not os.path.isdir(data) or find_split(Path(data), split) is None:
        return []
    return load_examples(data, engine, split=split, **_reading(run))


def _reading(run: TuneConfig | None) -> dict[str, Any]:
    """How the run read its rows."""
    if run is None:
        return {}
    return {
        "max_tokens": run.max_seq_length,
        "train_on": run.train_on,
        "fields": run.field,
    }


def _measure_hooked(engine: Engine, examples: Sequence[Example]) -> Measured:
    losses, correct = np.empty(len(examples)), np.empty(len(examples))  # (n,)
    with tqdm(total=len(examples), desc="tuned", unit="row", disable=None, leave=False) as bar:
        for first in range(0, len(examples), _ROWS_PER_CALL):
            part = slice(first, first + _ROWS_PER_CALL)
            scores = engine.score(examples[part])
            losses[part], correct[part] = scores.losses[0], scores.correct[0]
            bar.update(scores.losses.shape[1])
    return Measured(losses, summarize(losses, correct, counted_tokens(examples)))
