"""Projected gradients of the hooked engine against autograd, at the automatic eps.

For every quantization: 24 random z on 16 rows, each row its prompt and right choice as completion;
the reference is torch's gradient on the same dequantized weights, projected on the same z.

    .venv/bin/python -m tools.bench.fidelity --hf DIR --exports DIR --name tiny-llama --data DIR
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.helpers import reference  # the tests' torch model
from tools.gpu.model import TINY_QUANTS as QUANTS
from zo_gguf.data.dataset import Example, load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.libzo import Probe
from zo_gguf.tuning.calibrate import measure_noise

N_PROBES, N_ROWS = 24, 16


@dataclass(frozen=True)
class Fidelity:
    """What was measured for one file.

    Attributes:
        eps, floor, slope: As in `NoiseReport`.
        correlation: Of the projected gradients with autograd's, over the probes.
        ratio: Of their sizes: the slope of one over the other through the origin.
    """

    eps: float
    floor: float
    slope: float
    correlation: float
    ratio: float


def measure(engine: Engine, rows: Sequence[Example], hf: Path) -> Fidelity:
    """Compare an engine's projected gradients with autograd's.

    Args:
        engine: A model with a mask.
        rows: Examples without choices.
        hf: The Hugging Face folder that the model was made from.
    """
    report = measure_noise(engine, rows)
    eps = report.eps
    model = reference.torch_model(hf, engine.gguf.path)
    tensors, shapes = engine.delta.tensors, engine.delta.shapes
    reference.add_delta(model, tensors, shapes, engine.theta())
    noises = [engine.noise(seed) for seed in range(N_PROBES)]
    exact = reference.directional_derivatives(model, rows, tensors, shapes, noises)
    probes = [Probe(seed, sign * eps) for seed in range(N_PROBES) for sign in (1, -1)]
    losses = engine.losses(rows, probes).mean(axis=1).reshape(-1, 2)
    slopes = (losses[:, 0] - losses[:, 1]) / (2 * eps)
    correlation = float(np.corrcoef(slopes, exact)[0, 1])
    ratio = float((slopes @ exact) / (exact @ exact))
    return Fidelity(eps, report.floor, report.slope, correlation, ratio)


def load_rows(data: Path, engine: Engine) -> list[Example]:
    """The first rows of a data folder, each its prompt and right choice as completion."""
    rows = load_examples(data / "train.jsonl", engine)[:N_ROWS]
    return [replace(row, choices=(), answer=-1) for row in rows]


def main() -> None:
    """Print one line per quantization."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--exports", type=Path, required=True, help="folder of GGUFs and masks")
    parser.add_argument("--name", required=True, help="file name before -QUANT.gguf")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--quant", action="append")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=0)
    options = parser.parse_args()
    print(f"{'quant':<8}{'eps':>8}{'floor':>10}{'slope':>8}{'correlation':>13}{'ratio':>8}")
    for quant in options.quant or QUANTS:
        path = options.exports / f"{options.name}-{quant}.gguf"
        mask = str(path).removesuffix(".gguf") + ".mask.safetensors"
        with Engine(path, delta=mask, n_gpu_layers=options.n_gpu_layers) as engine:
            found = measure(engine, load_rows(options.data, engine), options.hf)
        print(
            f"{quant:<8}{found.eps:>8.2g}{found.floor:>10.1e}{found.slope:>8.2f}"
            f"{found.correlation:>13.5f}{found.ratio:>8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
