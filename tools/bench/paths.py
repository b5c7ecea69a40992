"""Losses and times of the paths that parameters can take: hook or adapter, on the CPU or a device.

All losses are compared with those of the hook on the CPU, which the tests compare with the merged
weights: the same rows, at theta and at probes of both signs. Then a pair of probes is timed on the
adapter and on the hook of one device by turns, and the ratios are taken pair by pair. What a path
refuses is printed as its sentence.

    .venv/bin/python -m tools.bench.paths --model M.gguf --mask M.mask.safetensors --data F.jsonl
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.hook import seconds
from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Example, load_examples
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.hardware.backends import list_devices
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.libzo import Probe
from zo_gguf.params.delta import Delta
from zo_gguf.tuning.methods import start

METHODS: dict[str, dict[str, Any]] = {
    "sensitive": {},
    "lora": {"rank": 4},
    "subspace": {"rank": 4},
    "sensitive+subspace": {"rank": 4},
    "norm": {},
    "block-scale": {},
    "dense": {"train": r"attn_q\.weight|norm"},
}
PATHS = ("hook", "adapter")


def parameters(method: str, given: argparse.Namespace) -> Delta:
    """What the method trains, away from its first theta so that nothing is 0."""
    config = TuneConfig(
        model=given.model, mask=given.mask, data=given.data, output="none", method=method,
        **METHODS[method],
    )  # fmt: skip
    delta = start(config, GgufFile(given.model))
    if set(edit.kind for edit in delta.live.values()) == {"weight"}:
        return delta  # its masters are the weights
    rng = np.random.default_rng(0)
    moved = delta.theta + given.moved * rng.standard_normal(delta.theta.size, dtype=np.float32)
    return delta.with_theta(moved, {})


def probes_of(given: argparse.Namespace) -> list[Probe]:
    """Theta itself, and both signs of some seeds."""
    both = [
        Probe(seed, sign * given.eps) for seed, sign in product(range(1, given.seeds + 1), (1, -1))
    ]
    return [Probe(0, 0.0), *both]


def compare(method: str, rows: list[Example], given: argparse.Namespace) -> None:
    """Print a line for each device and path, and one with the time ratio of each device."""
    delta = parameters(method, given)
    probes = probes_of(given)
    reference: np.ndarray | None = None
    for n_gpu_layers in given.layers:
        engines: dict[str, Engine] = {}
        for path in PATHS:
            label = f"{method:<20}{n_gpu_layers:>4} layers  {path:<8}"
            try:
                engine = Engine(
                    given.model, delta=delta, n_threads=given.threads, path=path,
                    n_gpu_layers=n_gpu_layers, ctx_tokens=given.ctx_size,
                )  # fmt: skip
                losses = engine.losses(rows, probes)
            except ZoError as error:
                print(f"{label}{error}", flush=True)
                continue
            engines[path] = engine
            reference = losses if reference is None else reference
            print(f"{label}{agreement(losses, reference)}", flush=True)
        if len(engines) == len(PATHS) and given.rounds:
            print(
                f"{method:<20}{n_gpu_layers:>4} layers  {ratio(engines, rows, given)}", flush=True
            )
        for engine in engines.values():
            engine.close()


def agreement(losses: np.ndarray, reference: np.ndarray) -> str:
    """In words how far losses (n_probes, n_rows) lie from the reference's."""
    off = np.abs(losses - reference)
    slopes, wanted = (a[1::2] - a[2::2] for a in (losses, reference))
    return (
        f"off by {np.median(off):.1e} median, {off.max():.1e} at most; slopes correlate "
        f"{np.corrcoef(slopes.ravel(), wanted.ravel())[0, 1]:.5f}; "
        f"a probe moves a loss by {np.median(np.abs(reference[1:] - reference[0])):.1e}"
    )


def ratio(engines: dict[str, Engine], rows: list[Example], given: argparse.Namespace) -> str:
    """Time of a pair of probes in the adapter over that beside the products, in quartiles."""
    ratios = []
    for seed in range(given.rounds + 1):
        pair = [Probe(seed, given.eps), Probe(seed, -given.eps)]
        times = {path: seconds(engines[path].losses, rows, pair) for path in PATHS}
        ratios.append(times["adapter"] / times["hook"])
    low, middle, high = np.percentile(ratios[1:], [25, 50, 75])  # the first one warms up
    return f"adapter / hook {middle:.2f} (quartiles {low:.2f} to {high:.2f}) of a pair of probes"


def main() -> None:
    """Print the devices, and the lines of every method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--mask", required=True)
    parser.add_argument("--data", required=True, help="a .jsonl file of rows")
    parser.add_argument("--rows", type=int, default=4, help="the shortest ones (%(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="pairs of probes (%(default)s)")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--layers", type=int, nargs="+", help="offloaded (default: 0, and all)")
    parser.add_argument("--eps", type=float, default=0.02)
    parser.add_argument(
        "--moved", type=float, default=0.01, help="deviation of theta from its first"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed pairs; 0 times nothing")
    parser.add_argument("--ctx-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    devices = list_devices()
    print(f"{Path(given.model).name} on", *(f"{d.name} ({d.description})" for d in devices))
    if given.layers is None:
        given.layers = [0, -1] if any(device.is_gpu for device in devices) else [0]
    with Engine(given.model, n_threads=given.threads) as engine:
        rows = sorted(load_examples(given.data, engine), key=lambda row: len(row.tokens))
    for method in given.method or METHODS:
        try:
            compare(method, rows[: given.rows], given)
        except ZoError as error:
            print(f"{method:<20}{error}", flush=True)


if __name__ == "__main__":
    main()
