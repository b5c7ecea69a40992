"""`lora-fa`: tune B of W + B A, with A fixed (LoRA-FA, arXiv 2308.03303).

A (r, n) are the leading directions of what a matrix W (m, n) is multiplied by at the positions that
count, in rows of the run; starting LoRA there is EVA's idea (arXiv 2410.07170). B (m, r) starts at
zero. Chosen are the matrices that gradients reach past attention, see `engine/feedback.py`, in the
upper half of the layers or in as many as --top says. Memory: 12 m r + 8 n r bytes per matrix, and
what the optimizer keeps. The result is a LoRA GGUF as it stands.
"""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.feedback import counted_inputs, reach
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.params.kinds import LowRank, Products
from zo_gguf.tuning.methods.method import Chosen, Method

F32 = NDArray[np.float32]
RANK = 32
_LAYER = re.compile(r"blk\.(\d+)\.")
_ROWS, _POSITIONS = 64, 512  # that A is made from, at most
_NONE = 1e-12  # of the largest singular value: a direction that no input has


def lora_fa(config: TuneConfig, engine: Engine, draw: Draw) -> Chosen:
    """A from the first rows of the run, B at 0.

    Raises:
        ZoError: No matrix is reached, or none whose name matches --train.
    """
    names = _matrices(config, engine)
    inputs = _inputs(engine, names, draw)
    rank = config.rank or RANK
    products: Products = {}
    made: dict[tuple[int, ...], tuple[F32, float]] = {}  # matrices that read the same share A
    kept = []
    for name in names:
        n_rows, n_cols = engine.gguf.info(name).shape
        key = tuple(map(id, inputs[name]))
        if key not in made:
            made[key] = leading_directions(np.concatenate(inputs[name]), rank)
        right, share = made[key]
        kept.append(share)
        none = np.zeros((0, len(right), n_rows), np.float32)
        products[name] = LowRank(
            "lora-fa", n_rows, n_cols, len(right), 1.0, 0, none, right[np.newaxis]
        )
    theta = np.zeros(sum(product.size for product in products.values()), np.float32)
    delta = Delta({}, {}, theta, DeltaHeader.of(engine.gguf, "lora-fa"), low_rank=products)
    layers = sorted({int(found[1]) for name in names if (found := _LAYER.match(name))})
    where = f" in layers {layers[0]} to {layers[-1]}" if layers else ""
    said = (
        f"lora-fa: {theta.size:,} values beside {len(names)} matrices{where}; rank {rank} "
        f"keeps {100 * min(kept):.0f} to {100 * max(kept):.0f} % of what they are multiplied by"
    )
    return Chosen(delta, said)


LORA_FA = Method(look=lora_fa, reads=("rank", "top", "train"), rank=RANK)


def leading_directions(x: F32, rank: int) -> tuple[F32, float]:
    """The leading right singular vectors of inputs, and their share of the inputs' energy.

    Args:
        x: Inputs, (n, width).
        rank: How many are wanted; there are fewer where the inputs span less.

    Returns:
        Orthonormal rows, (at most rank, width), the largest entry of each positive.

    Raises:
        ZoError: The inputs are all zero, or not finite.
    """
    gram = x.astype(np.float64) @ x.T.astype(np.float64)
    if not np.isfinite(gram).all():
        raise ZoError("The model's activations are not finite; its file or the data is broken.")
    energies, vectors = np.linalg.eigh(gram)
    energies, vectors = energies[::-1], vectors[:, ::-1]
    n = min(rank, x.shape[1], int((energies > _NONE * energies[0]).sum()))
    if n == 0:
        raise ZoError("A matrix is multiplied by zeros alone in this data; leave it out (--train).")
    directions = vectors[:, :n].T @ x / np.sqrt(energies[:n])[:, np.newaxis]
    largest = np.abs(directions).argmax(axis=1)[:, np.newaxis]
    directions *= np.sign(np.take_along_axis(directions, largest, axis=1))
    return directions.astype(np.float32), float(energies[:n].sum() / energies.sum())


def _matrices(config: TuneConfig, engine: Engine) -> list[str]:
    """Names of the chosen matrices, in file order."""
    reached = reach(engine).matrices
    layers = {name: int(found[1]) for name in reached if (found := _LAYER.match(name))}
    n_layers = 1 + max(int(found[1]) for found in map(_LAYER.match, engine.gguf.tensors) if found)
    top = config.top or -(-n_layers // 2)
    names = [name for name in engine.gguf.tensors if layers.get(name, -1) >= n_layers - top]
    names = [name for name in names if re.search(config.train or "", name)]
    if not names:
        raise ZoError(
            f"No gradient reaches a matrix whose name matches {config.train or '.*'!r} in the last "
            f"{top} layers of {engine.gguf.path.name!r}; --method lora --estimator natural trains "
            "any."
        )
    return names


def _inputs(engine: Engine, names: list[str], draw: Draw) -> Mapping[str, list[F32]]:
    """What the matrices are multiplied by at positions that count, a list of (n, width) each."""
    found: dict[str, list[F32]] = {name: [] for name in names}
    n_rows = n_positions = step = 0
    while n_rows < _ROWS and n_positions < _POSITIONS:
        rows = draw(step)
        for inputs in counted_inputs(engine, names, rows):
            for name, x in inputs.items():
                found[name].append(x)
            n_positions += len(x)
        n_rows, step = n_rows + len(rows), step + 1
    return found
