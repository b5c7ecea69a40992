"""What the tensors of a GGUF are for: matrices that can be tuned, experts, layers, idle ones."""

import re
from collections.abc import Iterable, Sequence

from gguf import GGMLQuantizationType

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile

_LINEAR = re.compile(r"blk\.(\d+)\.(?:attn|ffn)_[a-z0-9_]+\.weight")
_KEYS_AND_VALUES = re.compile(r"blk\.(\d+)\.attn_[kv](_norm)?\.")
_NOT_LINEAR = re.compile(r"norm|_inp\b|_inp_|sinks|rel_b|_exps|_chexps")
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_EXPERTS = re.compile(r"blk\.\d+\.ffn_[a-z_]*_(?:exps|chexps)\.weight")


def linear_tensors(base: GgufFile) -> list[str]:
    """Names of the attention and MLP matrices of a GGUF in file order.

    Norms, biases, embeddings, the head, MoE routers and MoE experts are not among them.
    """
    return [
        name
        for name, info in base.tensors.items()
        if _LINEAR.fullmatch(name) and not _NOT_LINEAR.search(name) and len(info.shape) == 2
    ]


def is_idle(base: GgufFile, name: str) -> bool:
    """Whether a tensor is in the file but in no forward pass.

    The last layers of Gemma 3n and its like share the keys and values of earlier ones.
    """
    shared = base.metadata(f"{base.architecture}.attention.shared_kv_layers", 0)
    layer = _KEYS_AND_VALUES.match(name)
    if layer is None or not shared:
        return False
    n_layers = int(base.metadata(f"{base.architecture}.block_count", 0))
    return int(layer[1]) >= n_layers - int(shared)


def check_rank(base: GgufFile, names: Sequence[str], rank: int) -> None:
    """Raise ZoError if `rank` is more than one of these matrices can have."""
    least = min(min(base.tensors[name].shape) for name in names)
    if rank > least:
        raise ZoError(
            f"--rank {rank} is more than the smallest matrix has, {least}; lower it, or leave that "
            "matrix out with --train."
        )


def matching_matrices(base: GgufFile, pattern: str | None) -> list[str]:
    """The attention and MLP matrices whose name contains a regular expression, in file order.

    Raises:
        ZoError: There is none.
    """
    names = [name for name in linear_tensors(base) if re.search(pattern or "", name)]
    names = [name for name in names if not is_idle(base, name)]
    if not names:
        raise ZoError(
            f"{base.path.name!r} has no attention or MLP matrices whose name matches "
            f"{pattern or '.*'!r}; `zo-gguf info` lists what it has."
        )
    return names


def expert_tensors(base: GgufFile) -> list[str]:
    """Names of a GGUF's MoE expert weights, which cannot be tuned."""
    return [name for name in base.tensors if _EXPERTS.fullmatch(name)]


def choose_tensors(
    base: GgufFile, include: str | None, exclude: str | None, layers: str | None
) -> list[str]:
    """The matrices that a mask covers, in file order.

    Args:
        base: A GGUF of the model.
        include: Regular expression that names must contain, or None.
        exclude: Regular expression that names must not contain, or None.
        layers: Layer ranges such as "4-11" or "0,2,8-11", or None for all.

    Raises:
        ZoError: Nothing is left, or a layer does not exist.
    """
    linear = linear_tensors(base)
    if not linear:
        raise ZoError(f"{base.path.name!r} has no attention or MLP matrices that can be tuned.")
    wanted = None if layers is None else _layer_set(layers, linear)
    chosen = [
        name
        for name in linear
        if (include is None or re.search(include, name))
        and (exclude is None or not re.search(exclude, name))
        and (wanted is None or layer_of(name) in wanted)
    ]
    if not chosen:
        if include and any(re.search(include, name) for name in expert_tensors(base)):
            raise ZoError(f"include {include!r} matches MoE experts only, which cannot be tuned.")
        raise ZoError(
            "include, exclude and layers leave no matrix; names look like "
            f"{linear[0]!r} and {linear[-1]!r}."
        )
    return chosen


def require_float(base: GgufFile, names: Iterable[str]) -> None:
    """Raise ZoError if one of the tensors is quantized."""
    for name in names:
        kind = base.tensors[name].type
        if kind not in _FLOATS:
            raise ZoError(
                f"{base.path.name!r} holds {name!r} as {kind.name}; give a float GGUF (F16, BF16 "
                "or F32) of the model with --gguf, or none."
            )


def layer_of(name: str) -> int:
    """The layer number in a GGUF tensor name such as "blk.3.attn_q.weight"."""
    return int(name.split(".")[1])


def _layer_set(layers: str, linear: list[str]) -> set[int]:
    wanted: set[int] = set()
    for part in layers.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or part.endswith("-"):
            raise ZoError(f"layers must look like 4-11 or 0,2,8-11, not {layers!r}.")
        low, high = int(first), int(last or first)
        n_layers = max(layer_of(name) for name in linear) + 1
        if low > high or high >= n_layers:
            raise ZoError(f"layers {layers!r}: the model has layers 0 to {n_layers - 1}.")
        wanted.update(range(low, high + 1))
    return wanted
