"""What the hook costs: hooked against plain forward passes, and a tune step against two of them.

A random-weight Llama (8 layers, 2048 wide, Q4_0) runs 512 tokens through stock llama.cpp without
any callback and through the hooked engine, by turns, in one process; ratios are taken pair by pair.
Peak memory is read in processes of their own.

    python3 tools/dev.py bench [--rounds 15] [--threads 2]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np

from tools.gpu.model import DENSITY, Shape, write_model
from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import build_request, lay_out
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.model import default_threads, engine_batch, load_model, quiet_engine
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.params.mask import Mask, MaskHeader
from zo_gguf.tuning.estimators.spsa import Spsa
from zo_gguf.tuning.optimizer import Adam

SHAPE = Shape(layers=8, width=2048, heads=16, ffn=5632)


def make_mask(path: Path, kind: str) -> Mask:
    """A mask of density 0.1 %: uniform, clustered on heavy rows and columns, or on 8 lines."""
    rng = np.random.default_rng(1)
    file = GgufFile(path)
    tensors = {}
    for name, info in file.tensors.items():
        if not name.startswith("blk.") or len(info.shape) != 2:
            continue
        n_rows, n_cols = info.shape
        n = int(n_rows * n_cols * DENSITY)
        if kind == "uniform":
            flat = rng.choice(n_rows * n_cols, n, replace=False)
        elif kind == "lines":
            rows, cols = rng.choice(n_rows, 4, False), rng.choice(n_cols, 4, False)
            candidates = np.concatenate(
                [
                    (rows[:, None] * n_cols + np.arange(n_cols)).ravel(),
                    (np.arange(n_rows)[:, None] * n_cols + cols).ravel(),
                ]
            )
            candidates = np.unique(candidates)
            flat = rng.choice(candidates, min(n, candidates.size), replace=False)
        else:  # every row and column has a weight with a heavy tail, as gradients have
            flat = np.unique(
                rng.permutation(n_rows)[
                    np.minimum(rng.pareto(0.6, 4 * n) * 8, n_rows - 1).astype(int)
                ]
                * n_cols
                + rng.permutation(n_cols)[
                    np.minimum(rng.pareto(0.6, 4 * n) * 8, n_cols - 1).astype(int)
                ]
            )
            flat = rng.choice(flat, min(n, flat.size), replace=False)
        tensors[name] = np.sort(flat).astype(np.int64)
    zeros = {name: np.zeros(indices.size, np.float32) for name, indices in tensors.items()}
    shapes = {name: file.tensors[name].shape for name in tensors}
    return Mask(tensors, zeros, shapes, MaskHeader(path.name, file.sha256(), kind, DENSITY))


def make_examples(n: int, length: int, vocab: int = SHAPE.vocab) -> list[Example]:
    """Random token ids; the last 8 tokens of each example count."""
    rng = np.random.default_rng(2)
    mask = [False] * (length - 8) + [True] * 8
    return [Example(rng.integers(3, vocab, length).tolist(), mask) for _ in range(n)]


class Plain:
    """Stock llama.cpp without a callback, decoding the same batch as the engine.

    With `model`, llama.cpp's handle, in a context beside others of the same weights.
    """

    def __init__(
        self,
        path: Path,
        examples: list[Example],
        n_threads: int,
        n_gpu_layers: int = 0,
        model: object = None,
    ) -> None:
        self.model = model or load_model(path, n_gpu_layers)
        self.batch = lay_out(build_request(examples).sequences, 1, padded=False)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.batch.tokens.size
        params.n_seq_max = self.batch.n_sequences
        params.n_outputs_max = max(self.batch.output_branch.size, self.batch.n_sequences)
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = True
        with quiet_engine():
            self.context = llama_cpp.llama_init_from_model(self.model, params)

    def forward(self) -> None:
        """One llama_decode."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        with engine_batch(self.batch) as batch:
            assert llama_cpp.llama_decode(self.context, batch) == 0
        llama_cpp.llama_get_logits(self.context)


def seconds(function: object, *arguments: object) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def bench(path: Path, kind: str, rounds: int, n_threads: int) -> None:
    """Print the ratios for one kind of mask."""
    examples = make_examples(8, 65)  # 64 tokens each go through the model
    engine = Engine(path, delta=make_mask(path, kind), n_threads=n_threads, ctx_tokens=512)
    plain = Plain(path, examples, n_threads)
    optimizer, theta = Adam(engine.nnz), engine.theta()

    def step(number: int) -> None:
        measured = Spsa().estimate(engine, examples, [number], 1e-3)
        optimizer.update(theta, measured.gradient(engine.parameters.noise), 1e-4)
        engine.set_theta(theta)

    step(0)
    plain.forward()
    forwards, steps = [], []
    for number in range(1, rounds + 1):
        one = seconds(plain.forward)
        hooked = seconds(engine.losses, examples, [Probe(0, 1e-3)])
        tuned = seconds(step, number)
        two = seconds(plain.forward)
        forwards.append(hooked / ((one + two) / 2))
        steps.append(tuned / (one + two))
    rows = [len(np.unique(i // engine.delta.shapes[n][1])) for n, i in engine.delta.tensors.items()]
    for name, ratios in (
        ("hooked / plain forward", forwards),
        ("step / two plain forwards", steps),
    ):
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(
            f"{kind:<10}{name:<28}{middle:6.3f}   (quartiles {low:.3f} to {high:.3f})", flush=True
        )
    print(
        f"{kind:<10}{engine.nnz} entries, {np.mean(rows):.0f} rows of a matrix touched on average"
    )
    engine.close()


def peak_memory(path: Path, kind: str, n_threads: int) -> float:
    """Peak resident MiB of a process that does the same passes; kind "plain" has no hook."""
    job = f"memory_job(pathlib.Path({str(path)!r}), {kind!r}, {n_threads})"
    code = f"import pathlib; from tools.bench import hook; hook.{job}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout))


def memory_job(path: Path, kind: str, n_threads: int) -> None:
    """Print the peak resident MiB of two forward passes."""
    examples = make_examples(8, 65)
    if kind == "plain":
        plain = Plain(path, examples, n_threads)
        plain.forward()
        plain.forward()
    else:
        engine = Engine(path, delta=make_mask(path, kind), n_threads=n_threads, ctx_tokens=512)
        engine.losses(examples, [Probe(1, 1e-3), Probe(1, -1e-3)])
    # Not getrusage: a child starts with the peak of the process that forked it.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def main() -> None:
    """Run all kinds of masks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs per kind of mask")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--kind", action="append", choices=["lines", "clustered", "uniform"])
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    print(f"{platform.machine()}, {options.threads} threads, commit {commit.stdout.strip()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random-llama-Q4_0.gguf"
        write_model(path, SHAPE, "Q4_0", 2048)
        for kind in options.kind or ["lines", "clustered", "uniform"]:
            bench(path, kind, options.rounds, options.threads)
        plain = peak_memory(path, "plain", options.threads)
        hooked = peak_memory(path, "uniform", options.threads)
        print(
            f"peak memory: plain {plain:.0f} MiB, hooked {hooked:.0f} MiB, "
            f"ratio {hooked / plain:.3f}"
        )


if __name__ == "__main__":
    main()
