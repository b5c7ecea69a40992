"""The methods: what is trained. One file and one line each.

A method leads from the options and the base to a `Delta`: which parameters are trained, and
the theta they start at. Everything else (perturbing, committing, saving, merging) follows from it.
"""

from collections import Counter

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.config.option import nearest
from zo_gguf.data.dataset import Draw
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta, DeltaHeader
from zo_gguf.tuning.methods.block_scale import BLOCK_SCALE
from zo_gguf.tuning.methods.dense import DENSE
from zo_gguf.tuning.methods.lora import LORA
from zo_gguf.tuning.methods.lora_fa import LORA_FA
from zo_gguf.tuning.methods.magnitude import MAGNITUDE
from zo_gguf.tuning.methods.method import Chosen, Method
from zo_gguf.tuning.methods.norm import NORM
from zo_gguf.tuning.methods.sensitive import SENSITIVE
from zo_gguf.tuning.methods.subspace import SUBSPACE

METHODS: dict[str, Method] = {
    "lora-fa": LORA_FA,
    "sensitive": SENSITIVE,
    "magnitude": MAGNITUDE,
    "norm": NORM,
    "block-scale": BLOCK_SCALE,
    "subspace": SUBSPACE,
    "lora": LORA,
    "dense": DENSE,
}


def check_method(name: str) -> None:
    """Raise ZoError unless `name` is a method, or several joined by "+"."""
    for part in name.split("+"):
        if part not in METHODS:
            known = ", ".join(METHODS)
            raise ZoError(f"There is no method {part!r}{nearest(part, METHODS)} Known: {known}.")


def looks_at_rows(config: TuneConfig) -> bool:
    """Whether what is trained is chosen by looking at rows in the model."""
    return any(METHODS[part].look for part in config.method.split("+"))


def start(config: TuneConfig, gguf: GgufFile) -> Delta:
    """What a run trains, at its first theta; "a+b" trains the parameters of both.

    Raises:
        ZoError: There is no such method, an option or the base does not fit, or two methods train
            the same tensor in ways that exclude each other.
    """
    check_method(config.method)
    methods = [METHODS[part] for part in config.method.split("+")]
    deltas = [method.start(config, gguf) for method in methods if method.start]
    assert len(deltas) == len(methods)
    return _joined(config, gguf, deltas)


def look(config: TuneConfig, engine: Engine, draw: Draw) -> Chosen:
    """As `start`, for methods that look at rows.

    Args:
        config: The run's options.
        engine: The model, opened without parameters.
        draw: The rows of each step.
    """
    check_method(config.method)
    deltas, said = [], []
    for part in config.method.split("+"):
        method = METHODS[part]
        if method.look:
            chosen = method.look(config, engine, draw)
            deltas.append(chosen.delta)
            said.append(chosen.said)
        elif method.start:
            deltas.append(method.start(config, engine.gguf))
    return Chosen(_joined(config, engine.gguf, deltas), "\n".join(said))


def _joined(config: TuneConfig, gguf: GgufFile, deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    sparse = [delta for delta in deltas if delta.tensors]
    edited = Counter(name for delta in deltas for name in delta.edits)
    multiplied = Counter(name for delta in deltas for name in delta.low_rank)
    whole = {n for delta in deltas for n, edit in delta.live.items() if edit.kind == "weight"}
    twice = len(sparse) > 1 or any(n > 1 for count in (edited, multiplied) for n in count.values())
    if twice or any(whole & set(delta.changed) for delta in deltas):
        raise ZoError(
            f"The methods of {config.method!r} would train the same weights twice; "
            "combine sparse entries, scales and low-rank products, such as sensitive+block-scale "
            "or block-scale+lora, or take methods of different tensors, such as norm+lora."
        )
    parts = [delta.theta[: delta.n_sparse] for delta in sparse]
    parts += [delta.theta[part] for delta in deltas for part in delta.edit_slices().values()]
    parts += [delta.theta[part] for delta in deltas for part in delta.low_rank_slices().values()]
    return Delta(
        sparse[0].tensors if sparse else {},
        sparse[0].shapes if sparse else {},
        np.concatenate(parts),
        DeltaHeader(gguf.path.name, deltas[0].header.base_sha256, config.method),
        {name: edit for delta in deltas for name, edit in delta.edits.items()},
        {name: product for delta in deltas for name, product in delta.low_rank.items()},
    )
