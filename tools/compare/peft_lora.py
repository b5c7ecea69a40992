"""`zo-gguf tune` beside LoRA by backpropagation: same weights, rows, threads, machine.

LoRA is PEFT's, on the GGUF's dequantized weights in F32, with AdamW at a rate that falls linearly
to zero; it may try several rates, and the best counts. Every run is a process of its own, so that
peak memory is its own too; times are those of the training steps alone. Needs `pip install peft`,
and a model of llama's architecture.

    .venv/bin/python -m tools.compare.peft_lora -m MODEL.gguf --data DIR --steps 20 40 80
        --rate 1e-3 3e-3 --seeds 0 1 2 --threads 1 --plot curves.png
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tools.bench.cosines import torch_llama
from tools.compare.first_order import MaskedModel
from zo_gguf.data.dataset import Draw, load_examples, load_train_valid
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.evaluation import measure
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import NORMAL
from zo_gguf.tuning.calibrate import resolve
from zo_gguf.tuning.estimators import estimates
from zo_gguf.tuning.optimizer import learning_rate
from zo_gguf.tuning.options import settle
from zo_gguf.tuning.run import first_state
from zo_gguf.tuning.trainable import Trainable
from zo_gguf.tuning.trajectory import Record

Point = dict[str, Any]  # of a run: steps, seconds, loss, accuracy, peak_mib
NOTHING = np.zeros(0, np.float32)
TARGETS = {
    "q, v": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


class LoraModel(MaskedModel):
    """A torch model with PEFT's LoRA on it, whose losses are those of the engine."""

    def __init__(self, gguf: GgufFile, rank: int, targets: Sequence[str], seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        model = torch_llama(gguf)
        super().__init__(model, {}, {}, NOTHING)
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
        get_peft_model(model, config)  # puts its layers into the model itself
        self.trained = [value for value in model.parameters() if value.requires_grad]


def train_lora(job: dict[str, Any]) -> list[Point]:
    """Train and measure as often as the job says."""
    torch.set_num_threads(job["threads"])
    rows, held_out = _rows(job)
    model = LoraModel(GgufFile(job["model"]), job["rank"], TARGETS[job["targets"]], job["seed"])
    optimizer = torch.optim.AdamW(model.trained, lr=job["rate"])
    draw, seconds, points = Draw(rows, job["rows"], job["seed"]), 0.0, []
    last = max(job["steps"])
    for step in range(last):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = job["rate"] * (1 - step / last)
        optimizer.zero_grad()
        model.losses(draw(step))[0].mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds += time.perf_counter() - started
        if step + 1 in job["steps"]:
            points.append(_point(step + 1, seconds, model.measure(held_out)))
    return points


def train_feedback(job: dict[str, Any]) -> list[Point]:
    """As `train_lora`, by the steps of `zo-gguf tune`; its look at rows and its search count."""
    from zo_gguf.config import TuneConfig

    files = {"model": job["model"], "data": job["data"], "output": "none"}
    options = {"threads": job["threads"], "seed": job["seed"], "iters": max(job["steps"])}
    config = settle(TuneConfig(**files, **options, examples_per_step=job["rows"]))
    rows, held_out = _rows(job)
    draw, trainable, points = Draw(rows, job["rows"], job["seed"]), Trainable(config), []
    with trainable.open_engine() as engine:
        started = time.perf_counter()
        trainable.look(engine, draw)
        config, _ = resolve(config, trainable, engine, draw)
        state = first_state(trainable, config.optimizer)
        seconds = time.perf_counter() - started
        with estimates(engine, config) as estimate:
            for step in range(config.n_steps):
                started = time.perf_counter()
                measured = estimate(draw(step), step)
                record = Record(step + 1, learning_rate(config, step), measured.directions)
                state.apply(record, measured.gradient(engine.noise), trainable)
                seconds += time.perf_counter() - started
                if step + 1 in job["steps"]:
                    points.append(_point(step + 1, seconds, measure(engine, held_out)))
    return points


def _rows(job: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Rows to train on, and those of the test file that are measured."""
    with Engine(job["model"], n_threads=1, distribution=NORMAL) as engine:
        train, _ = load_train_valid(job["data"], engine, val_split=0.05)
        return train, load_examples(job["data"], engine, split="test")[: job["test_rows"]]


def _point(step: int, seconds: float, result: Any) -> Point:
    values = {"loss": result.loss, "accuracy": result.accuracy}
    return {"steps": step, "seconds": seconds} | values


# ---- processes, table and picture ----------------------------------------------------------------


def run(job: dict[str, Any]) -> list[Point]:
    """One run in a process of its own, with its peak memory."""
    command = [sys.executable, "-m", "tools.compare.peft_lora", "--job", json.dumps(job)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the run {job} failed")
    points: list[Point] = json.loads(text.splitlines()[-1])
    return [point | {"peak_mib": usage.ru_maxrss / 1024} for point in points]


def best_rate(jobs: Sequence[dict[str, Any]]) -> list[Point]:
    """The run with the lowest loss at its end."""
    return min((run(job) for job in jobs), key=lambda points: points[-1]["loss"])


def mean_over_seeds(runs: Sequence[list[Point]]) -> list[Point]:
    """Means, and the spread of the loss."""
    result = []
    for points in zip(*runs, strict=True):
        keys = [key for key in points[0] if points[0][key] is not None]
        mean = {key: float(np.mean([point[key] for point in points])) for key in keys}
        losses: NDArray[np.float64] = np.array([point["loss"] for point in points])
        result.append(mean | {"spread": float(np.ptp(losses))})
    return result


def table(curves: dict[str, list[Point]]) -> str:
    """One line per method and number of steps."""
    lines = ["| | steps | seconds | test loss (spread) | accuracy | peak MiB |", "|---" * 6 + "|"]
    for label, points in curves.items():
        for point in points:
            accuracy = f"{point['accuracy']:.3f}" if "accuracy" in point else "-"
            lines.append(
                f"| {label} | {point['steps']:.0f} | {point['seconds']:.0f} | {point['loss']:.4f} "
                f"({point['spread']:.4f}) | {accuracy} | {point['peak_mib']:.0f} |"
            )
    return "\n".join(lines)


def plot(curves: dict[str, list[Point]], path: Path) -> None:
    """Loss against seconds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, points in curves.items():
        axes.plot([p["seconds"] for p in points], [p["loss"] for p in points], "o-", label=label)
    axes.set(xlabel="seconds of training", ylabel="loss on test rows", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def compare(options: argparse.Namespace) -> dict[str, list[Point]]:
    """All runs: method -> points, means over seeds."""
    shared = {
        "model": str(options.model), "data": str(options.data), "steps": options.steps,
        "rows": options.rows, "threads": options.threads, "test_rows": options.test_rows,
    }  # fmt: skip
    found: dict[str, list[list[Point]]] = {}
    for seed in options.seeds:
        job = shared | {"seed": seed}
        found.setdefault("zo-gguf tune", []).append(run(job | {"method": "feedback"}))
        for rank, targets in ((int(rank), name) for rank in options.rank for name in options.on):
            label = f"LoRA r {rank}, {targets}"
            lora = job | {"method": "lora", "rank": rank, "targets": targets}
            jobs = [lora | {"rate": rate} for rate in options.rate]
            found.setdefault(label, []).append(best_rate(jobs))
        print(table({label: mean_over_seeds(runs) for label, runs in found.items()}), flush=True)
    return {label: mean_over_seeds(runs) for label, runs in found.items()}


def main() -> int:
    """Print the table; write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("-m", "--model", type=Path, help="GGUF")
    parser.add_argument("--data", type=Path, help="folder: train and test.jsonl")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 40, 80], help="to measure at")
    parser.add_argument("--rows", type=int, default=8, help="rows per step (%(default)s)")
    parser.add_argument("--rank", nargs="+", default=["8"], help="of LoRA (8)")
    parser.add_argument(
        "--on", nargs="+", default=["q, v"], choices=TARGETS, help="LoRA's matrices"
    )
    parser.add_argument(
        "--rate", type=float, nargs="+", default=[1e-3], help="of LoRA; best counts"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-rows", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        train = {"lora": train_lora, "feedback": train_feedback}[job["method"]]
        print(json.dumps(train(job)))
        return 0
    if options.model is None or options.data is None:
        parser.error("-m and --data are needed")
    curves = compare(options)
    if options.plot:
        plot(curves, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
