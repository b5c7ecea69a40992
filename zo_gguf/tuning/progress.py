"""What a person sees of a running tune, and the lines of metrics.jsonl."""

import sys
import time
from types import TracebackType

import numpy as np
from tqdm import tqdm

from zo_gguf.config import TuneConfig
from zo_gguf.engine.engine import Scores
from zo_gguf.tuning.run import Run
from zo_gguf.tuning.trajectory import Record
from zo_gguf.verbs.evaluate import EvalResult

_SMOOTHING = 0.95  # of the displayed loss and accuracy
_LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """A progress bar on a terminal, a line every 30 seconds elsewhere."""

    def __init__(self, config: TuneConfig, step: int) -> None:
        self._iters = config.iters
        self._bar = tqdm(
            total=config.iters,
            initial=step,
            desc="tune",
            unit="step",
            disable=None,
            file=sys.stderr,
        )
        self._smooth: dict[str, float] = {}
        self._last_step = self._last_line = time.monotonic()
        self._first, self._spent = step, 0.0  # seconds in steps, without validations

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def stepped(self, record: Record, scores: Scores, run: Run) -> None:
        """Show a step and append its metrics."""
        now = time.monotonic()
        seconds, self._last_step = now - self._last_step, now
        self._spent += seconds
        values = {"loss": record.loss, "tok/s": scores.n_tokens / max(seconds, 1e-9)}
        if not np.isnan(scores.correct).all():
            values["accuracy"] = float(np.nanmean(scores.correct))
        run.log(
            step=record.step,
            lr=record.lr,
            train_loss=record.loss,
            train_accuracy=values.get("accuracy"),
            projected_grad=record.directions[0].projected_grad,
            tokens_per_second=round(values["tok/s"], 1),
        )
        for name, value in values.items():
            self._smooth[name] = (
                _SMOOTHING * self._smooth.get(name, value) + (1 - _SMOOTHING) * value
            )
        text = {"loss": f"{self._smooth['loss']:.4f}", "tok/s": f"{self._smooth['tok/s']:.0f}"}
        if "accuracy" in self._smooth:
            text["accuracy"] = f"{self._smooth['accuracy']:.3f}"
        self._bar.set_postfix(text, refresh=False)
        self._bar.update(1)
        if self._bar.disable and now - self._last_line > _LINE_EVERY:
            self._last_line = now
            left = self._spent / (record.step - self._first) * (self._iters - record.step)
            shown = "  ".join(f"{name} {value}" for name, value in text.items())
            self._say(f"step {record.step}/{self._iters}  {shown}  {left / 60:.0f} min left")

    def validated(self, step: int, result: EvalResult) -> None:
        """Show a validation after `step` steps."""
        accuracy = "" if result.accuracy is None else f"  accuracy {result.accuracy:.3f}"
        self._say(f"step {step}: valid loss {result.loss:.4f}{accuracy}  ({result.n} rows)")
        self._last_step = time.monotonic()

    def _say(self, line: str) -> None:
        if self._bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)
