"""Where a Hugging Face weight lies in a GGUF: its tensor's name and the order of its rows.

The order is found from the data, not from knowledge of architectures: the converter's output either
equals the weight, or holds the same rows in another order (llama's q and k). Everything else, fused
or transformed weights, is reported as such.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile


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
