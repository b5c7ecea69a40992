"""`zo-gguf plan` (= `tune --dry-run`): what a run will take, measured, without training."""

import dataclasses
import json
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import psutil

from zo_gguf.config import TuneConfig, takes
from zo_gguf.data.dataset import Draw
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.hardware.backends import supports_offload
from zo_gguf.errors import DoesNotFitError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.calibrate import choose_width, max_forwards
from zo_gguf.tuning.estimators import estimates, estimator_of
from zo_gguf.tuning.estimators.base import Estimator
from zo_gguf.tuning.options import settle
from zo_gguf.tuning.rows import load_rows
from zo_gguf.tuning.run import first_state
from zo_gguf.tuning.targets import wants_soft
from zo_gguf.tuning.trainable import Trainable
from zo_gguf.tuning.trajectory import record_size

_TIMED_STEPS = 3
_WORTH_SAYING = 0.05  # of a step's time; less is noise
_METRICS_LINE = 250  # bytes of metrics.jsonl per step
_TRIAL_EPS = 1e-2  # timing does not depend on it
_BYTES_OF_STEP = 8  # of a master: gradient estimate and z
_MIB = 1 << 20


@dataclass(frozen=True)
class PlanResult:
    """What a run will take; sizes in bytes, times in seconds.

    Attributes:
        weights: The model's tensors.
        engine: KV cache, compute buffers and logits (what the process grew by, less the rest).
        trainable: Masters of the tuned weights, here and in libzo, positions, bases.
        optimizer: The optimizer's memory.
        passing: What a step, or a checkpoint, takes on top while it lasts.
        total: Sum of the parts.
        available: Free RAM before the model was loaded.
        on_gpu: In words, whether a GPU holds any of it.
        seconds_per_step: Median of three timed steps.
        seconds: The whole run, choosing eps and validating included.
        disk: The run folder at the end.
        tokens_per_step: Forward tokens.
        probes_per_decode: As asked for, or what was fastest.
        fastest: What was fastest.
        saved: Share of the time that this saves over what was asked for.
        chosen: What the method chose by looking at rows, in words.
    """

    weights: int
    engine: int
    trainable: int
    optimizer: int
    passing: int
    total: int
    available: int
    on_gpu: str
    seconds_per_step: float
    seconds: float
    disk: int
    tokens_per_step: int
    probes_per_decode: int
    fastest: int
    saved: float
    chosen: str = ""

    def render(self, as_json: bool = False) -> str:
        """A table, or JSON."""
        if as_json:
            return json.dumps(asdict(self))
        rows = [("weights", self.weights), ("KV cache and compute", self.engine)]
        rows += [("trainable weights", self.trainable), ("optimizer", self.optimizer)]
        rows += [("steps and checkpoints", self.passing)]
        rows += [("RAM in all", self.total), ("RAM available", self.available)]
        rows += [("disk for the run", self.disk)]
        advice = ""
        if self.saved >= _WORTH_SAYING:
            less = f"{100 * self.saved:.0f} % less time"
            advice = f" (--probes-per-decode {self.fastest} takes {less})"
        lines = [self.chosen] if self.chosen else []
        lines += [f"{name:<24}{size / _MIB:>12,.1f} MiB" for name, size in rows]
        lines += [
            f"{'GPU':<24}{self.on_gpu}",
            f"{'forward tokens a step':<24}{self.tokens_per_step:>12,}",
            f"{'seconds a step':<24}{self.seconds_per_step:>12.3g}",
            f"{'probes in a decode':<24}{self.probes_per_decode:>12}{advice}",
            f"{'the whole run':<24}{_duration(self.seconds):>12}",
        ]
        return "\n".join(lines)


@takes(TuneConfig)
def plan(config: TuneConfig) -> PlanResult:
    """Load the model, time three steps, and say what the run will take. Writes nothing.

    Raises:
        DoesNotFitError: The weights alone exceed the free memory, or the run's files the disk.
        ZoError: As `tune`.
    """
    config = settle(config)
    estimator = estimator_of(config)
    method = Trainable(config)
    weights = sum(info.n_bytes for info in GgufFile(config.model).tensors.values())
    available = int(psutil.virtual_memory().available)
    if weights > available and config.n_gpu_layers == 0:
        raise DoesNotFitError(
            f"The weights take {weights / _MIB:,.0f} MiB, but {available / _MIB:,.0f} MiB of RAM "
            "are free; take a smaller quantization or close other programs."
        )
    before = psutil.Process().memory_info().rss  # with the bases of subspaces
    with method.open_engine() as engine:
        draw, valid = load_rows(config, engine)
        said = method.look(engine, draw)
        trial = dataclasses.replace(config, eps=_TRIAL_EPS)
        fastest, asked, saved = _fastest(engine, draw, config, estimator)
        engine.probes_per_decode = asked
        per_step, tokens = _time_steps(engine, draw, trial)
        grown = psutil.Process().memory_info().rss - before
        n_choosing = max_forwards(config, method)
        seen = draw.seen(config.n_steps)
        n_read = len(seen) if wants_soft(config, draw.examples, seen) else 0
        on_gpu = _gpu_in_words(engine, config.n_gpu_layers)
    state = first_state(method, config.optimizer)
    bases = sum(edit.left.nbytes + edit.right.nbytes for edit in method.delta.low_rank.values())
    inside = _bytes_inside(method.delta, last=True)
    beside = state.theta.nbytes + 8 * method.delta.n_sparse
    trainable = inside + beside + bases
    optimizer = sum(array.nbytes for array in state.optimizer.state.values())
    saved_bytes = state.theta.nbytes + optimizer
    passing = max(_BYTES_OF_STEP * state.theta.size, 2 * saved_bytes)  # which safetensors copies
    disk = _disk(config, state.theta.nbytes, optimizer) + 3 * bases
    _check_disk(config, disk)
    working = max(0, grown - weights - _bytes_inside(method.delta, last=False))
    return PlanResult(
        weights=weights,
        engine=working,
        trainable=trainable,
        optimizer=optimizer,
        passing=passing,
        total=weights + working + trainable + optimizer + passing,
        available=available,
        on_gpu=on_gpu,
        seconds_per_step=per_step,
        seconds=_total_seconds(config, estimator, per_step, len(valid), n_choosing, n_read),
        disk=disk,
        tokens_per_step=tokens,
        probes_per_decode=asked,
        fastest=fastest,
        saved=saved,
        chosen=said,
    )


def _bytes_inside(delta: Delta, *, last: bool) -> int:
    """What libzo holds of the parameters: theta, and what it makes of it for each kind.

    With subspaces that follow one another, that is more at the last step than at the first.
    """
    per_sparse = 24  # place, column, noise of two seeds, value
    scales = sum(edit.size for edit in delta.live.values() if edit.kind == "scale")
    factors = sum(
        (edit.n_windows if last else 1) * edit.rank * (edit.n_rows + edit.n_cols)
        for edit in delta.low_rank.values()
    )
    return 4 * delta.nnz + per_sparse * delta.n_sparse + 4 * scales + 4 * factors


def _fastest(
    engine: Engine, draw: Draw, config: TuneConfig, estimator: Estimator
) -> tuple[int, int, float]:
    """The fastest number of probes in a decode, the one asked for, and what share it would save."""
    if not estimator.probes:
        return 1, 1, 0.0
    seconds = choose_width(engine, draw(0), estimator.n_probes)
    fastest = engine.probes_per_decode
    if config.probes_per_decode == "auto":
        return fastest, fastest, 0.0
    asked = config.probes_per_decode
    assert isinstance(asked, int)  # since `check`
    if len(seconds) == 1:  # which was not measured
        return fastest, asked, 0.0
    known = max(width for width in seconds if width <= asked)  # more than fits has no effect
    return fastest, asked, max(0.0, 1 - seconds[fastest] / max(seconds[known], 1e-12))


def _time_steps(engine: Engine, draw: Draw, config: TuneConfig) -> tuple[float, int]:
    """Median seconds and tokens of three steps."""
    seconds, tokens = [], []
    with estimates(engine, config) as estimate:
        for step in range(-1, _TIMED_STEPS):  # the first one warms up
            rows = draw(max(step, 0))
            started = time.perf_counter()
            scores = estimate(rows, step + 1).scores
            if step >= 0:
                seconds.append(time.perf_counter() - started)
                tokens.append(scores.n_tokens)
    return float(np.median(seconds)), int(np.median(tokens))


def _total_seconds(
    config: TuneConfig,
    estimator: Estimator,
    per_step: float,
    n_valid: int,
    n_choosing: int,
    n_read: int,
) -> float:
    """Steps, validations, passes that choose eps and a rate, and rows read for soft targets."""
    forward, n_rows = per_step / estimator.n_probes, estimator.examples_per_step
    every = config.valid_every or config.n_steps
    validations = 1 + -(-config.n_steps // every)
    per_validation = forward * n_valid / n_rows
    before = forward * (n_choosing + n_read / n_rows)
    return config.n_steps * per_step + validations * per_validation + before


def _disk(config: TuneConfig, theta: int, optimizer: int) -> int:
    """Three deltas with their positions, the state, the trajectory and the metrics."""
    record = record_size({"directions": config.directions}) + _METRICS_LINE
    return 3 * 2 * theta + theta + optimizer + config.n_steps * record


def _check_disk(config: TuneConfig, needed: int) -> None:
    folder = os.path.abspath(config.output)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = psutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFitError(
            f"The run takes {needed / _MIB:,.0f} MiB of disk, but {free / _MIB:,.0f} MiB are free "
            f"at {folder!r}; give another -o or free some."
        )


def _gpu_in_words(engine: Engine, n_gpu_layers: int) -> str:
    if n_gpu_layers == 0:
        return "not used (-ngl 0)"
    if not supports_offload():
        return "not used: this llama-cpp-python finds no GPU, or was built without a backend for it"
    layers = "all" if n_gpu_layers < 0 else n_gpu_layers
    return f"{layers} layers offloaded; their weights are not in RAM"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
