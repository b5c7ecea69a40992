"""Where a Hugging Face weight lies in a GGUF: its tensor's name and the order of its rows.

The order is found from the data, not from knowledge of architectures: the converter's output either
equals the weight, or holds the same rows in another order (llama's q and k). Everything else, fused
or transformed weights, is reported as such.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

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


def gguf_names(base: GgufFile, parameters: Iterable[str]) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face parameter name, for those that have one.

    Raises:
        ZoError: The gguf package does not know the architecture.
    """
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if base.architecture not in architectures:
        raise ZoError(
            f"The package gguf does not know the architecture {base.architecture!r}; update it."
        )
    n_layers = int(base.metadata(f"{base.architecture}.block_count", 0))
    table = gguf.get_tensor_name_map(architectures[base.architecture], n_layers)
    found: dict[str, str] = {}
    for parameter in parameters:
        # Text models inside multimodal ones carry an extra part in their names.
        for candidate in (parameter, parameter.replace("language_model.", "")):
            name = table.get_name(candidate, try_suffixes=(".weight", ".bias"))
            if name is not None and name in base.tensors:
                found.setdefault(name, parameter)
                break
    return found


@dataclass(frozen=True)
class Placement:
    """How a Hugging Face matrix lies in a GGUF tensor.

    Attributes:
        transposed: It is stored with inputs first there, as GPT-2 does.
        order: Which of its (transposed) rows each GGUF row is, int64; None for the same order.
    """

    transposed: bool
    order: NDArray[np.int64] | None

    def apply(self, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
        """A matrix in the Hugging Face layout, brought into the GGUF's."""
        turned = matrix.T if self.transposed else matrix
        return np.ascontiguousarray(turned if self.order is None else turned[self.order])


def place(weight: NDArray[np.float32], base: GgufFile, name: str) -> Placement:
    """Find how a Hugging Face weight lies in a GGUF tensor.

    Args:
        weight: (n_rows, n_cols), the parameter's exact values.
        base: Float GGUF converted from the same model.
        name: Its tensor.

    Raises:
        ZoError: The tensor does not hold the weight's rows: it is fused or transformed, or the
            GGUF was made from another model.
    """
    there = base.dequantize(name)  # (n_rows, n_cols)
    kind = base.tensors[name].type
    for transposed, turned in ((False, weight), (True, weight.T)):
        if turned.shape != there.shape:
            continue
        # The weight may also be a BF16 copy of what was converted.
        for here, other in (
            (_rounded(turned, kind), there),
            (np.ascontiguousarray(turned), _rounded(there, GGMLQuantizationType.BF16)),
        ):
            if np.array_equal(here, other):
                return Placement(transposed, None)
            order = _match_rows(here, other)
            order = _rope_order(here, other, base) if order is None else order
            if order is not None:
                return Placement(transposed, order)
    raise ZoError(
        f"{name!r} of {base.path.name!r} does not hold the rows of the Hugging Face weight: it is "
        "fused or transformed there, or the GGUF is of another model; leave it out with --exclude."
    )


def _rounded(weight: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """The values as a float type rounds them."""
    if kind == GGMLQuantizationType.F32:
        return np.ascontiguousarray(weight)
    with np.errstate(all="ignore"):
        raw = gguf.quants.quantize(np.ascontiguousarray(weight), kind)
    return np.asarray(gguf.quants.dequantize(raw, kind), dtype=np.float32)


def _match_rows(here: NDArray[np.float32], there: NDArray[np.float32]) -> NDArray[np.int64] | None:
    """Find each row of `there` in `here`; None if one is missing or two rows are equal."""
    place = {row.tobytes(): i for i, row in enumerate(here)}
    if len(place) != len(here):
        return None
    order = np.array([place.get(row.tobytes(), -1) for row in there], dtype=np.int64)
    return order if (order >= 0).all() and np.unique(order).size == order.size else None


def _rope_order(
    here: NDArray[np.float32], there: NDArray[np.float32], base: GgufFile
) -> NDArray[np.int64] | None:
    """Try the one reordering in use, interleaved halves of heads, where equal rows hide it."""
    prefix = f"{base.architecture}.attention.head_count"
    for key in (prefix, f"{prefix}_kv"):
        n_heads = base.metadata(key)
        if isinstance(n_heads, int) and n_heads > 0 and len(here) % (2 * n_heads) == 0:
            rows = np.arange(len(here)).reshape(n_heads, 2, -1)
            order = rows.swapaxes(1, 2).reshape(-1)
            if np.array_equal(here[order], there):
                return order
    return None


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
