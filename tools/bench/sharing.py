"""What other programs leave of a run: tokens a second alone, and beside busy ones.

A random-weight Llama as small as tiny-llama, whose threads meet at barriers most often, computes
the losses of the same rows again and again, with one thread and with all cores, with OpenMP's own
way of waiting (spinning) and with the command line's (sleeping). Beside each figure stands its part
of what is fair: an equal share of the cores for every program that can use it.

    .venv/bin/python -m tools.bench.sharing [--seconds 4] [--rounds 3] [--width 256]
    .venv/bin/python -m tools.bench.sharing --spins 0,300,1000,3000,10000   # which count is best?
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from zo_gguf.system import sleep_at_barriers, usable_cores

LAYERS, FFN_FACTOR, VOCABULARY = 8, 3, 4096
N_ROWS, ROW_TOKENS = 12, 40
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LOOP = "while True: pass"
_WARM_UP = 0.5  # seconds in which neighbours get going


class Way(NamedTuple):
    """How a run computes: its threads, and how they wait.

    Attributes:
        n_threads: Threads.
        waiting: "spinning", "sleeping", or a number of spins.
    """

    n_threads: int
    waiting: str


class Beside(NamedTuple):
    """A situation.

    Attributes:
        name: For the table.
        n_loops: Processes that keep a core busy each.
        engine: Whether another llama.cpp computes on all cores.
    """

    name: str
    n_loops: int
    engine: bool


def fair_share(n_cores: int, n_loops: int, engine: bool) -> float:
    """Cores that a run may expect: an equal part for each program; a loop needs but one."""
    left, programs = float(n_cores), 1 + n_loops + engine
    for _ in range(n_loops):
        part = min(1.0, left / programs)
        left, programs = left - part, programs - 1
    return left / programs


def compute(model: Path, n_threads: int, seconds: float) -> float:
    """Tokens a second of an engine that computes losses for some seconds."""
    import numpy as np  # here: a library with OpenMP reads once how it is to wait

    from zo_gguf.data.dataset import Example
    from zo_gguf.engine.engine import Engine
    from zo_gguf.gguf_files.file import GgufFile
    from zo_gguf.libzo import Probe
    from zo_gguf.params.mask import Mask, MaskHeader

    file = GgufFile(model)
    names = [name for name in file.tensors if ".ffn_" in name and "norm" not in name]
    lines = {name: np.arange(file.tensors[name].shape[1], dtype=np.int64) for name in names}
    shapes = {name: file.tensors[name].shape for name in names}
    zeros = {name: np.zeros(indices.size, np.float32) for name, indices in lines.items()}
    mask = Mask(lines, zeros, shapes, MaskHeader(model.name, file.sha256(), "lines", 1e-3))
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, (N_ROWS, ROW_TOKENS)).tolist()
    counted = [False] * (ROW_TOKENS - 4) + [True] * 4
    rows = [Example(row, counted) for row in tokens]
    with Engine(file, delta=mask, n_threads=n_threads, ctx_tokens=512) as engine:
        engine.losses(rows)
        n_tokens, started = 0, time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            n_tokens += engine.score(rows, [Probe(1, 1e-3)]).n_tokens
    return n_tokens / took


def wait_as(waiting: str) -> None:
    """Tell OpenMP how its threads are to wait, before it is loaded."""
    for name in WAITING:
        os.environ.pop(name, None)
    if waiting == "sleeping":
        sleep_at_barriers()
    elif waiting != "spinning":
        os.environ["GOMP_SPINCOUNT"] = waiting


def job(model: Path, way: Way, seconds: float) -> list[str]:
    """The command of a process that computes so and prints its tokens a second."""
    command = [sys.executable, "-m", "tools.bench.sharing", "--job", str(model)]
    return [*command, "--threads", str(way.n_threads), "--waiting", way.waiting,
            "--seconds", str(seconds)]  # fmt: skip


@contextmanager
def neighbours(beside: Beside, model: Path, n_cores: int) -> Iterator[None]:
    """Have the other programs compute meanwhile."""
    commands = [[sys.executable, "-c", LOOP]] * beside.n_loops
    if beside.engine:
        commands.append(job(model, Way(n_cores, "spinning"), 1e6))
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    try:
        time.sleep(_WARM_UP + 2 * beside.engine)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(
    model: Path, situations: Sequence[Beside], ways: Sequence[Way], seconds: float, rounds: int
) -> dict[tuple[str, Way], float]:
    """Median tokens a second of every way in every situation, the ways by turns."""
    found: dict[tuple[str, Way], list[float]] = {}
    for beside in situations:
        with neighbours(beside, model, usable_cores()):
            for _ in range(rounds):
                for way in ways:
                    command = job(model, way, seconds)
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    rate = float(json.loads(done.stdout.splitlines()[-1]))
                    found.setdefault((beside.name, way), []).append(rate)
    return {key: median(rates) for key, rates in found.items()}


def table(
    rates: dict[tuple[str, Way], float],
    situations: Sequence[Beside],
    ways: Sequence[Way],
    n_cores: int,
) -> str:
    """A row for every situation: tokens a second, and their part of the fair share."""
    titles = [f"{way.n_threads} thr, {way.waiting}" for way in ways]
    lines = ["| beside | fair share | " + " | ".join(titles) + " |", "|---" * (2 + len(ways)) + "|"]
    alone = max(rates[situations[0].name, way] for way in ways)
    for beside in situations:
        share = fair_share(n_cores, beside.n_loops, beside.engine) / n_cores
        cells = [f"{rate:,.0f} ({rate / alone / share:.2f})"
                 for rate in (rates[beside.name, way] for way in ways)]  # fmt: skip
        lines.append(f"| {beside.name} | {share:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def situations_for(n_cores: int) -> list[Beside]:
    """Alone, beside loops on half of the cores and on all of them, beside llama.cpp."""
    counts = sorted({max(1, n_cores // 2), n_cores})
    loops = [Beside(f"{n} busy process{'es' * (n > 1)}", n, False) for n in counts]
    return [Beside("nothing", 0, False), *loops, Beside("llama.cpp, spinning", 0, True)]


def main() -> None:
    """Print the table, or do one job of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per figure (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--width", type=int, default=256, help="of the model (%(default)s)")
    parser.add_argument("--spins", default="", help="counts to compare, with commas")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--waiting", default="sleeping", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        wait_as(options.waiting)
        print(json.dumps(compute(options.job, options.threads, options.seconds)))
        return
    n_cores = usable_cores()
    counts = [n for n in dict.fromkeys((1, n_cores))]
    ways = [Way(n, waiting) for waiting in ("spinning", "sleeping") for n in counts]
    if options.spins:
        ways = [Way(n_cores, count) for count in options.spins.split(",")]
    situations = situations_for(n_cores)
    with tempfile.TemporaryDirectory() as folder:
        from tools.gpu.model import Shape, write_model

        model = Path(folder, "random.gguf")
        shape = Shape(LAYERS, options.width, 4, FFN_FACTOR * options.width, VOCABULARY)
        write_model(model, shape, "Q4_0", 512)
        rates = measure(model, situations, ways, options.seconds, options.rounds)
    print(f"{n_cores} cores, {LAYERS} layers of width {options.width}, Q4_0, tokens a second")
    print(table(rates, situations, ways, n_cores))


if __name__ == "__main__":
    main()
