"""What a step of every method costs: against as many plain forward passes of stock llama.cpp.

The random-weight Llama of `hook.py` (512 tokens); a step is spsa's with adam, its two
forward passes in turn with two plain ones, and ratios are taken pair by pair. Methods that fit are
measured on both paths, beside the products and in a LoRA adapter. The last lines are a step of the
estimator `natural`.

    .venv/bin/python -m tools.bench.methods [--rounds 7] [--threads 2] [--type Q4_K] [--only REGEX]
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.hook import SHAPE, Plain, make_examples, make_mask, seconds
from tools.gpu.model import write_model
from zo_gguf.config import TuneConfig
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.model import default_threads
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.tuning.estimators import estimate, estimator_of
from zo_gguf.tuning.methods import METHODS, start
from zo_gguf.tuning.optimizer import Adam

LINES = [
    *((method, "hook", "spsa") for method in METHODS),
    ("sensitive+norm", "hook", "spsa"),
    *((method, "adapter", "spsa") for method in ("sensitive", "lora", "subspace")),
    ("sensitive", "hook", "natural"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"train": "norm"},
    "sensitive+norm": {"unit": ["gain=2"]},
}


def bench(model: Path, mask: Path, line: tuple[str, str, str], rounds: int, n_threads: int) -> str:
    """Median ratio of a step to its number of plain forward passes, with quartiles."""
    method, path, estimator = line
    examples = make_examples(8, 65)
    config = TuneConfig(
        model=str(model), mask=str(mask), data="none", output="none", eps=1e-3, method=method,
        estimator=estimator, examples_per_step=len(examples), path=path,
        **OPTIONS.get(method, {}),
    )  # fmt: skip
    gguf = GgufFile(model)
    plain = Plain(model, examples, n_threads)
    with Engine(
        gguf, delta=start(config, gguf), n_threads=n_threads, ctx_tokens=512, path=path
    ) as engine:
        theta, optimizer = engine.theta(), Adam(engine.nnz)

        def step(number: int) -> None:
            measured = estimate(engine, examples, config, number)
            optimizer.update(theta, measured.gradient(engine.parameters.noise), 1e-6)
            engine.set_theta(theta)

        def forwards() -> None:
            for _ in range(estimator_of(config).n_probes):
                plain.forward()

        step(0)
        forwards()
        ratios = [seconds(step, number) / seconds(forwards) for number in range(1, rounds + 1)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        return f"{middle:6.3f}   (quartiles {low:.3f} to {high:.3f})   {engine.nnz:,} parameters"


def main() -> None:
    """Print a line for each method, path and estimator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7, help="steps per line (%(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--type", default="Q4_0", choices=["Q4_0", "Q4_K"], help="%(default)s")
    parser.add_argument("--only", default="", metavar="REGEX", help="lines that match")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, mask = Path(folder) / "random.gguf", Path(folder) / "lines.mask.safetensors"
        write_model(model, SHAPE, options.type, 2048)
        make_mask(model, "lines").save(mask)
        for line in LINES:
            name = " ".join(line)
            if not re.search(options.only, name):
                continue
            try:
                result = bench(model, mask, line, options.rounds, options.threads)
            except ZoError as error:
                result = str(error)
            print(f"{name:<32}{result}", flush=True)


if __name__ == "__main__":
    main()
