"""What merging whole matrices costs: CPU microseconds per weight, here and in another checkout.

A random product of rank 32 is added to the matrices that --match names; then they are re-quantized,
and their codes are chosen by recorded inputs. With --against the same is done by another checkout's
Python, by turns, and ratios are taken pair by pair; output errors (mean square over the inputs,
summed over rows) are compared too.

    .venv/bin/python -m tools.bench.merging --model M.gguf --data F.jsonl --match 'blk\\.2.\\.ffn'
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from zo_gguf.data.dataset import load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.merging import patches
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import LowRank, Products

RANK = 32


def random_product(base: GgufFile, match: str, share: float) -> Delta:
    """Products whose entries have `share` times the standard deviation of the matrix's weights."""
    rng = np.random.default_rng(0)
    none = np.zeros((0, 0, 0), np.float32)
    products: Products = {}
    theta = []
    for name, info in base.tensors.items():
        if len(info.shape) == 2 and re.search(match, name):
            n_rows, n_cols = info.shape
            products[name] = LowRank("lora", n_rows, n_cols, RANK, 1.0, 0, none, none)
            size = share * float(base.dequantize(name, np.arange(8)).std()) / np.sqrt(RANK)
            theta += [rng.standard_normal(RANK * n_cols), size * rng.standard_normal(RANK * n_rows)]
    masters = np.concatenate(theta).astype(np.float32)
    return Delta({}, {}, masters, DeltaHeader.of(base, "lora"), low_rank=products)


def cpu_seconds() -> float:
    """Of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Microseconds per weight of each part, and each matrix's output error."""
    base = GgufFile(given.model)
    delta = random_product(base, given.match, given.share)
    with Engine(base.path, n_threads=given.threads, ctx_tokens=2048) as engine:
        rows = load_examples(given.data, engine)
    names, seconds = list(delta.changed), {"inputs": 0.0}
    sample = vars(patches)["sample_inputs"]

    def sample_inputs(*arguments: Any, **options: Any) -> Any:
        before = cpu_seconds()
        result = sample(*arguments, **options)
        seconds["inputs"] += cpu_seconds() - before
        return result

    vars(patches)["sample_inputs"] = sample_inputs
    n = sum(int(np.prod(shape)) for shape in delta.changed.values())
    with tempfile.TemporaryDirectory() as folder:
        start = cpu_seconds()
        plain = patches.plain_patches(base, delta, names, Path(folder), given.threads)
        seconds["re-quantizing"] = cpu_seconds() - start
        start = cpu_seconds()
        found = patches.rounded_patches(
            base, delta, plain, rows, patches.ROUNDINGS[0], Path(folder), given.threads
        )
        seconds["choosing codes"] = cpu_seconds() - start - seconds["inputs"]
        errors = {name: found[name].output_error for name in names}
    return {"n": n, "us": {k: 1e6 * v / n for k, v in seconds.items()}, "errors": errors}


def measured_by(python: str) -> dict[str, Any]:
    """The same by an interpreter and its zo_gguf."""
    command = [python, str(Path(__file__).absolute()), *sys.argv[1:], "--alone"]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(answer.splitlines()[-1]))


def report(given: argparse.Namespace) -> None:
    """One line per round: here, and against the other."""
    for number in range(1, given.rounds + 1):
        here = measured_by(sys.executable)
        parts = [f"{part} {us:.2f}" for part, us in here["us"].items()]
        if given.against:
            other = measured_by(given.against)
            parts = [
                f"{part} {us:.2f} ({other['us'][part]:.2f}, {other['us'][part] / us:.1f} times)"
                for part, us in here["us"].items()
            ]
            ratios = [
                error / other["errors"][name] for name, error in here["errors"].items() if error
            ]
            if ratios:
                parts.append(f"output errors {min(ratios):.3f} to {max(ratios):.3f} of the other's")
        print(f"{number}: {here['n']} weights; us per weight: {'; '.join(parts)}", flush=True)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="rows to record inputs from")
    parser.add_argument("--match", default=r"ffn_down", help="names of matrices, a pattern")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against", metavar="PYTHON", help="of another checkout's environment")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measure(given)))
    else:
        report(given)


if __name__ == "__main__":
    main()
