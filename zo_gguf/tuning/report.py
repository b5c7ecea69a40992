"""What people see of a run: its lines and metrics.jsonl while it goes, its summary at the end."""

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import find_split
from zo_gguf.engine.batch import Scores
from zo_gguf.engine.evaluation import EvalResult
from zo_gguf.engine.model import default_threads
from zo_gguf.params.delta import Delta
from zo_gguf.system import Neighbours, atomic_write, sha256_file
from zo_gguf.tuning.run import Run, State
from zo_gguf.tuning.trainable import Trainable
from zo_gguf.tuning.trajectory import Record

_SMOOTHING = 0.95  # of the displayed loss and accuracy
_LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """A progress bar on a terminal, a line every 30 seconds elsewhere."""

    def __init__(self, config: TuneConfig, step: int) -> None:
        self._iters = config.n_steps
        self._bar = tqdm(
            total=config.n_steps,
            initial=step,
            desc="tune",
            unit="step",
            disable=None,
            file=sys.stderr,
        )
        self._smooth: dict[str, float] = {}
        self._last_step = self._last_line = time.monotonic()
        self._first, self._spent = step, 0.0  # seconds in steps, without validations
        self._neighbours = Neighbours(config.threads or default_threads())

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

        if sentence := self._neighbours.look():
            self._say(sentence)

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


# ---- report --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuneResult:
    """What a run achieved.

    Attributes:
        run: The run folder.
        steps: Steps done.
        best_step: Step of RUN/delta.safetensors: the lowest validation loss, or the last step
            where nothing was validated.
        base_loss, base_accuracy: Validation at step 0; None without validation rows or choices.
        best_loss, best_accuracy: Validation at `best_step`.
    """

    run: str
    steps: int
    best_step: int
    base_loss: float | None
    base_accuracy: float | None
    best_loss: float | None
    best_accuracy: float | None

    def render(self, as_json: bool = False) -> str:
        """The table and what to do next."""
        if as_json:
            return json.dumps(asdict(self))
        lines = [f"{'':<16}{'valid loss':>12}{'accuracy':>12}"]
        for name, loss, accuracy in (
            ("before", self.base_loss, self.base_accuracy),
            (f"step {self.best_step}", self.best_loss, self.best_accuracy),
        ):
            cells = [
                f"{value:>12.4f}" if value is not None else f"{'-':>12}"
                for value in (loss, accuracy)
            ]
            lines.append(f"{name:<16}{''.join(cells)}")
        if self.best_step == 0 and self.steps > 0:
            lines += [
                "",
                "Nothing was learned: no validation was better than the one before the first step.",
                "More --iters, more rows, or another --learning-rate or --method may help.",
            ]
        lines += [
            "",
            f"Delta: {self.run}/delta.safetensors   loss curve: {self.run}/loss.png",
            f"For LM Studio, Ollama, llama.cpp: zo-gguf merge {self.run} -o tuned.gguf",
        ]
        return "\n".join(lines)


def finish(run: Run, trainable: Trainable, state: State) -> TuneResult:
    """Write delta.safetensors, summary.json, env.json and loss.png; see `TuneResult`."""
    best = run.best_step()
    if best is None:
        best = state.step
        delta = trainable.to_delta({"step": best, "seed": run.config.seed})
    else:
        delta = Delta.load(run.checkpoint("best"))
    delta.save(run.path / "delta.safetensors")
    first, last = run.validations.get(0, {}), run.validations.get(best, {})
    result = TuneResult(
        run=str(run.path),
        steps=state.step,
        best_step=best,
        base_loss=first.get("valid_loss"),
        base_accuracy=first.get("valid_accuracy"),
        best_loss=last.get("valid_loss"),
        best_accuracy=last.get("valid_accuracy"),
    )
    _write_json(run.path / "summary.json", asdict(result))
    _write_json(run.path / "env.json", environment(run))
    plot_losses(run, run.path / "loss.png")
    return result


def environment(run: Run) -> dict[str, Any]:
    """Versions, machine, and hashes of the files that made the run."""
    versions = {}
    for package in ("zo-gguf", "llama-cpp-python", "gguf", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    model, mask, data = (Path(getattr(run.config, name)) for name in ("model", "mask", "data"))
    masks = [mask] if mask.is_file() else []
    splits = [find_split(data, split) for split in ("train", "valid")] if data.is_dir() else [data]
    files = {str(file): sha256_file(file) for file in [model, *masks, *splits] if file}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "versions": versions,
        "sha256": files,
    }


def plot_losses(run: Run, path: Path) -> None:
    """Draw training and validation loss against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(run.metrics())
    steps = [line["step"] for line in lines if "train_loss" in line]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training, each step")
    window = max(1, len(losses) // 40)
    if len(losses) > window:
        means = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
        axes.plot(steps[window - 1 :], means, color="C0", label=f"training, mean of {window} steps")
    if run.validations:
        valid = sorted(run.validations)
        axes.plot(
            valid,
            [run.validations[step]["valid_loss"] for step in valid],
            color="C3",
            marker="o",
            label="validation",
        )
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
