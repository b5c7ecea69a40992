"""Write tuned values into quantized weights, changing only the blocks that hold tuned entries.

A quantized group of 16 or 32 weights has one step (and offset) for all. Changing one entry means
choosing step and codes anew so that the tuned entry lands where it should while its neighbours stay
where they were; tuned entries weigh far more in the squared error that is minimized. Groups without
tuned entries keep their bytes. libzo searches steps and codes (native/quantize); types whose blocks
share a unit of steps may do better with ggml's own quantizer, and the weighted error decides.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.engine.model import native_library
from zo_gguf.engine.quantize import SUPPORTED, quantize_blocks
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.blocks import layout_of
from zo_gguf.gguf_files.file import dequantize_rows
from zo_gguf.libzo import requantize_blocks
from zo_gguf.merging.native_layout import native_layout

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Flags = NDArray[np.bool_]

TUNED_WEIGHT = 100.0  # squared error of a tuned entry against that of any other
_GGML_WEIGHTS = (30.0, 300.0)
_CHUNK = 1 << 17  # weights per piece of work: its arrays stay in the cache
_FLOATS = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class Patch:
    """New bytes for some blocks of a tensor.

    Attributes:
        ids: int64 (n,), which blocks, counted from the start of the tensor.
        blocks: uint8 (n, block_bytes).
        tuned_error: Sum of squared errors of the tuned entries against dequantized + theta.
        other_error: Sum of squared changes of all other entries.
        output_error: Sum over rows of the mean squared change of the output that the errors make,
            None where no inputs are known. Where it is known, the other two are from before codes
            were chosen by it.
    """

    ids: NDArray[np.int64]
    blocks: U8
    tuned_error: float
    other_error: float
    output_error: float | None = None

    def apply(self, raw: U8) -> U8:
        """A copy of the tensor's bytes `raw` with the new blocks in place."""
        result = raw.copy()
        result.reshape(-1, self.blocks.shape[1])[self.ids] = self.blocks
        return result


def block_of(kind: Type) -> tuple[int, int]:
    """Weights and bytes per block; a float is a block of one."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(block), int(block_bytes)


def requantize(
    raw: U8,
    kind: Type,
    indices: NDArray[np.int64],
    theta: F32,
    *,
    tuned_weight: float = TUNED_WEIGHT,
    n_threads: int | None = None,
) -> Patch:
    """Add `theta` to entries of a quantized tensor, within its type.

    Args:
        raw: The tensor's bytes, (n_rows, bytes_per_row).
        kind: Its type.
        indices: Flat positions of the tuned entries, row * n_cols + col, ascending, unique.
        theta: What to add to them, (len(indices),).
        tuned_weight: Squared error of a tuned entry counts this much more than that of another.
        n_threads: Worker threads; the result does not depend on it.

    Raises:
        ZoError: Neither the layout of `kind` is known here nor a quantizer of ggml.
    """
    require_quantizer(kind)
    block, block_bytes = block_of(kind)
    ids, owner = np.unique(indices // block, return_inverse=True)
    stored = raw.reshape(-1, block_bytes)
    pieces = _pieces(len(ids), max(1, _CHUNK // block))
    # The tuned entries of blocks [first, last) are a run, as the indices ascend.
    edges = np.searchsorted(owner, [first for first, _ in pieces] + [len(ids)])

    def work(number: int) -> tuple[U8, float, float]:
        first, last = pieces[number]
        entries = slice(edges[number], edges[number + 1])
        position = (owner[entries] - first) * block + indices[entries] % block
        old = stored[ids[first:last]]
        target = dequantize_rows(old, kind)  # (n, block)
        target.reshape(-1)[position] += theta[entries]
        tuned = np.zeros(target.shape, np.bool_)
        tuned.reshape(-1)[position] = True
        return _requantize_blocks(_Piece(old, kind, target, tuned), tuned_weight)

    return Patch(ids, *_together(work, len(pieces), n_threads))


def requantize_whole(raw: U8, kind: Type, target: F32, *, n_threads: int | None = None) -> Patch:
    """Write `target`, (n_rows, n_cols), into all blocks of rows of a tensor, within its type.

    Args, errors: As for `requantize`; every entry is a tuned one.
    """
    require_quantizer(kind)
    block, block_bytes = block_of(kind)
    stored, values = raw.reshape(-1, block_bytes), target.reshape(-1, block)
    pieces = _pieces(len(stored), max(1, _CHUNK // block))

    def work(number: int) -> tuple[U8, float, float]:
        part = slice(*pieces[number])
        return _requantize_blocks(_Piece(stored[part], kind, values[part], None), 1.0)

    return Patch(np.arange(len(stored)), *_together(work, len(pieces), n_threads))


def require_quantizer(kind: Type) -> None:
    """Raise ZoError where a type can neither be searched nor quantized to."""
    if layout_of(kind) is None and kind not in SUPPORTED and kind not in _FLOATS:
        raise ZoError(
            f"Weights of type {kind.name} cannot be re-quantized; use --type q8_0 or --type f16."
        )


def _together(
    work: Callable[[int], tuple[U8, float, float]], n: int, n_threads: int | None
) -> tuple[U8, float, float]:
    """The blocks of n pieces of work, and their errors added up."""
    with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        results = list(pool.map(work, range(n)))
    blocks = np.concatenate([part for part, _, _ in results])
    tuned_error, other_error = (sum(result[k] for result in results) for k in (1, 2))
    return blocks, float(tuned_error), float(other_error)


def _pieces(total: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, total)) for first in range(0, total, size)]


def row_parts(n_rows: int, n_cols: int, n_weights: int) -> list[tuple[int, int]]:
    """A matrix in parts of whole rows, (first, last + 1) each, of some `n_weights` weights."""
    return _pieces(n_rows, max(1, n_weights // n_cols))


@dataclass(frozen=True)
class _Piece:
    """Blocks to change.

    Attributes:
        old: Their bytes, (n, block_bytes).
        target: Wanted values, (n, block).
        tuned: Which of them are tuned, likewise; None: all.
    """

    old: U8
    kind: Type
    target: F32
    tuned: Flags | None

    def importance(self, tuned_weight: float) -> F32 | None:
        """Weight of every squared error, (n, block); None where all are alike."""
        if self.tuned is None:
            return None
        return np.where(self.tuned, np.float32(tuned_weight), np.float32(1))

    def by_ggml(self) -> list[U8]:
        """What ggml's quantizer makes of it, by several weights of the tuned entries."""
        if self.tuned is None:
            return [quantize_blocks(self.target, self.kind, np.ones_like(self.target))]
        weights = map(self.importance, _GGML_WEIGHTS)
        return [quantize_blocks(self.target, self.kind, weight) for weight in weights]

    def by_search(self, tuned_weight: float) -> U8:
        """What libzo finds, never worse than the old bytes."""
        layout = layout_of(self.kind)
        assert layout is not None
        touched: Flags | None = None
        if self.tuned is not None:
            touched = np.any(self.tuned.reshape(len(self.old), layout.n_groups, -1), axis=2)
        library, native = native_library(), native_layout(self.kind)
        weight = self.importance(tuned_weight)
        return requantize_blocks(library, native, self.old, self.target, weight, touched, 1)


def _requantize_blocks(piece: _Piece, tuned_weight: float) -> tuple[U8, float, float]:
    """New bytes (n, block_bytes), and the squared errors of tuned and of other entries."""
    kind, layout, target = piece.kind, layout_of(piece.kind), piece.target
    if kind in _FLOATS:
        best = np.ascontiguousarray(gguf.quants.quantize(target, kind)).view(np.uint8)
    else:
        candidates = [piece.old if layout is None else piece.by_search(tuned_weight)]
        if layout is None or layout.scale_bits is not None:
            candidates += piece.by_ggml()
        best = _pick(candidates, kind, target, piece.importance(tuned_weight))
    square = np.square(dequantize_rows(best, kind) - target, dtype=np.float64)
    total = float(square.sum())
    if piece.tuned is None:
        return best, total, 0.0
    tuned_error = float(square[piece.tuned].sum())
    return best, tuned_error, total - tuned_error


def _pick(candidates: Sequence[U8], kind: Type, target: F32, importance: F32 | None) -> U8:
    """Per block, the candidate with the least weighted squared error; the earlier one on a tie."""
    if len(candidates) == 1:
        return candidates[0]
    errors = []
    for candidate in candidates:
        square = np.square(dequantize_rows(candidate, kind) - target)
        errors.append((square if importance is None else importance * square).sum(axis=1))
    # A block whose scale overflowed has an error that is NaN; it must not win.
    choice = np.where(np.isfinite(errors), errors, np.inf).argmin(axis=0)
    return np.asarray(np.stack(candidates)[choice, np.arange(len(choice))])
