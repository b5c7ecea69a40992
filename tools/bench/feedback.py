"""What feedback's gradients are worth against backpropagation, and cost against forward passes.

The engine's gradients of the matrices that feedback reaches are compared with torch's on the same
dequantized weights and rows: with the whole gradient, and with attention detached. A pass with the
gradients of the top layers' factors of rank 32 is timed against forward passes of the same rows, by
turns: of the same decodes, which share what rows begin with, and of stock llama.cpp, without.
Models of llama's architecture only.

    .venv/bin/python -m tools.bench.feedback MODEL.gguf --data ROWS.jsonl [--rows 8] [--rounds 9]
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.bench.hook import Plain, seconds
from tools.bench.layers import layer_of, n_layers, tops
from zo_gguf.data.dataset import Example, load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.feedback import FeedbackPass, reach
from zo_gguf.engine.model import default_threads
from zo_gguf.errors import ZoError

RANK = 32
CTX_TOKENS = 2048


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--rows", type=int, default=8, help="in one pass")
    parser.add_argument("--rounds", type=int, default=9, help="pairs that are timed")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--no-cosines", action="store_true")
    parser.add_argument("--memory-job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.memory_job:
            memory_job(options)
            return 0
        print(
            f"{options.model.name}, {options.data}, {options.rows} rows, {options.threads} threads"
        )
        with Engine(options.model, n_threads=options.threads, ctx_tokens=CTX_TOKENS) as engine:
            rows = load_examples(options.data, engine)[: options.rows]
            if not options.no_cosines:
                from tools.bench.cosines import print_cosines  # torch would count as memory

                print_cosines(engine, rows)
            print_costs(engine, rows, options)
    except ZoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


# ---- costs ---------------------------------------------------------------------------------------


def print_costs(engine: Engine, rows: Sequence[Example], options: argparse.Namespace) -> None:
    """Of passes with gradients, in forward passes, and peak memory."""
    plain = Plain(options.model, list(rows), options.threads)
    print("| layers | tokens | counted | bytes each | same decodes | stock llama.cpp | memory |")
    print("|---|---|---|---|---|---|---|")
    for n_top, label in tops(engine).items():
        with FeedbackPass(engine, factors(engine, n_top)) as feedback:
            n_tokens = feedback.gradients(rows).n_tokens  # and a warm-up
            same, stock = [], []
            for _ in range(options.rounds):
                forward = seconds(engine.losses, rows)
                passed = seconds(feedback.gradients, rows)
                same.append(passed / forward)
                stock.append(passed / seconds(plain.forward))
            own = feedback.token_bytes
        print(
            f"| {label} | {n_tokens} | {plain.batch.output_branch.size} | {own} "
            f"| {quartiles(same)} | {quartiles(stock)} | {memory_ratio(options, n_top):.3f} |",
            flush=True,
        )


def factors(engine: Engine, n_top: int) -> dict[str, NDArray[np.float32] | None]:
    """Random factors for all matrices of the top layers that gradients reach."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal((RANK, n_cols), np.float32)
        for name, (_, n_cols) in reach(engine).matrices.items()
        if name.startswith("blk.") and layer_of(name) >= n_layers(engine) - n_top
    }


def quartiles(ratios: Sequence[float]) -> str:
    """Their median, and where the middle half lies."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def memory_ratio(options: argparse.Namespace, n_top: int) -> float:
    """Peak memory of a process that has gradients, in that of one with plain forward passes."""
    peaks = []
    for job in ("plain", str(n_top)):
        command = [sys.executable, "-m", "tools.bench.feedback", str(options.model)]
        command += ["--data", str(options.data), "--rows", str(options.rows)]
        command += ["--threads", str(options.threads), "--memory-job", job]
        folder = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ZoError(f"A process to measure memory failed: {done.stderr.strip()}")
        peaks.append(json.loads(done.stdout))
    return float(peaks[1] / peaks[0])


def memory_job(options: argparse.Namespace) -> None:
    """Print the peak resident bytes of two passes."""
    with Engine(options.model, n_threads=options.threads, ctx_tokens=CTX_TOKENS) as engine:
        rows = load_examples(options.data, engine)[: options.rows]
        run: Callable[[Sequence[Example]], Any] = engine.losses
        if options.memory_job != "plain":
            run = FeedbackPass(engine, factors(engine, int(options.memory_job))).gradients
        run(rows)
        run(rows)
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


if __name__ == "__main__":
    sys.exit(main())
