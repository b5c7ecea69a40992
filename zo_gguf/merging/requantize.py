"""Write tuned values into quantized weights, changing only the blocks that hold tuned entries.

A quantized group of 16 or 32 weights has one step (and offset) for all. Changing one entry means
choosing step and codes anew so that the tuned entry lands where it should while its neighbours stay
where they were; tuned entries weigh far more in the squared error that is minimized. Groups without
tuned entries keep their bytes. A group's value is `step * level - offset`; step and offset are
half-precision numbers, or multiples of a unit that the whole block shares (K-quants). All groups of
a call are searched at once, and the weighted error alone decides which result is kept.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.engine.quantize import SUPPORTED, quantize_blocks
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.blocks import Layout, layout_of, read_blocks
from zo_gguf.gguf_files.file import dequantize_rows

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

# Steps tried, as multiples of the step at which the group's extreme values are just in range, and
# of the step that the group has.
_REACH = np.linspace(0.6, 1.1, 16, dtype=np.float32)
_NEAR = np.linspace(0.9, 1.1, 8, dtype=np.float32)
_REACH_WITH_OFFSET = np.linspace(0.55, 1.1, 12, dtype=np.float32)
_HALF_MAX = np.float32(65504.0)


@dataclass(frozen=True)
class Groups:
    """What is searched, for n groups of m weights.

    Attributes:
        target: (n, m) the wanted values.
        weight: (n, m) how much each squared error counts.
        levels: (n_levels,) ascending.
        step, offset: (n,) as they are now; offset None for types without one.
        codes: (n, m) index of each weight's level as it is now.
        unit: (n,) the block's step unit, None where steps are half-precision numbers.
        scale_low, scale_high: Multiples of `unit` that can be stored.
        min_unit: (n,) likewise for the offset, None where offsets are half-precision numbers.
        min_high: Largest multiple of `min_unit`.
    """

    target: F32
    weight: F32
    levels: F32
    step: F32
    offset: F32 | None
    codes: I64
    unit: F32 | None = None
    scale_low: int = 0
    scale_high: int = 0
    min_unit: F32 | None = None
    min_high: int = 0


@dataclass
class Found:
    """The best so far; fields as in Groups."""

    codes: I64
    step: F32
    offset: F32
    error: F32  # (n,)


def search_steps(groups: Groups) -> Found:
    """The best step, offset and codes found per group; never worse than the step it has."""
    with np.errstate(all="ignore"):
        search = _Search(groups)
        if groups.offset is None:
            search.steps_alone()
        else:
            search.steps_and_offsets()
        if groups.unit is not None:
            search.neighbours(groups.unit)
    return search.best


class _Search:
    def __init__(self, groups: Groups) -> None:
        self.g = groups
        self.low, self.high = groups.levels[0], groups.levels[-1]
        self.uniform = bool((np.diff(groups.levels) == 1).all())
        self.middles = (groups.levels[1:] + groups.levels[:-1]) / 2
        offset = np.zeros_like(groups.step) if groups.offset is None else groups.offset
        # Codes stay where the step cannot tell levels apart; elsewhere this gives the old codes for
        # untouched entries and the nearest for tuned ones.
        codes = np.where(groups.step[:, None] == 0, groups.codes, self.nearest(groups.step, offset))
        self.best = Found(
            codes, groups.step.copy(), offset.copy(), self.error(groups.step, offset, codes)
        )

    def nearest(self, step: F32, offset: F32) -> I64:
        """Index of the nearest level, (n, m)."""
        scaled = (self.g.target + offset[:, None]) / np.where(step == 0, 1, step)[:, None]
        if self.uniform:
            ranks = np.clip(np.rint(scaled - self.low), 0, len(self.g.levels) - 1)
            return np.asarray(np.nan_to_num(ranks), dtype=np.int64)
        return np.asarray(np.searchsorted(self.middles, scaled), dtype=np.int64)

    def error(self, step: F32, offset: F32, codes: I64) -> F32:
        """Weighted squared error per group, (n,)."""
        values = step[:, None] * self.g.levels[codes] - offset[:, None]
        return np.asarray((self.g.weight * np.square(values - self.g.target)).sum(axis=1))

    def snap(self, step: F32, offset: F32) -> tuple[F32, F32]:
        """The nearest step and offset that can be stored."""
        g = self.g
        if g.unit is None:
            step = _to_half(step)
        else:
            multiple = np.rint(step / np.where(g.unit == 0, 1, g.unit))
            step = g.unit * np.clip(np.nan_to_num(multiple), g.scale_low, g.scale_high)
        if g.offset is None:
            return step, np.zeros_like(step)
        if g.min_unit is None:
            return step, _to_half(offset)
        multiple = np.rint(offset / np.where(g.min_unit == 0, 1, g.min_unit))
        return step, g.min_unit * np.clip(np.nan_to_num(multiple), 0, g.min_high)

    def attempt(self, step: F32, offset: F32) -> I64:
        """Try a step and offset per group and keep them where they beat the best; returns codes."""
        step, offset = self.snap(step.astype(np.float32), offset.astype(np.float32))
        codes = self.nearest(step, offset)
        error = self.error(step, offset, codes)
        better = error < self.best.error
        self.best.error[better] = error[better]
        self.best.step[better] = step[better]
        self.best.offset[better] = offset[better]
        self.best.codes[better] = codes[better]
        return codes

    def attempt_and_refine(self, step: F32, offset: F32) -> None:
        """Try, then try the least-squares step and offset of the codes that it gave."""
        levels = self.g.levels[self.attempt(step, offset)]
        self.attempt(*self.least_squares(levels))

    def least_squares(self, levels: F32) -> tuple[F32, F32]:
        w, x = self.g.weight, self.g.target
        weighted = w * levels
        ll, lx = (weighted * levels).sum(axis=1), (weighted * x).sum(axis=1)
        if self.g.offset is None:
            return lx / ll, np.zeros_like(ll)
        total, lw, xw = w.sum(axis=1), weighted.sum(axis=1), (w * x).sum(axis=1)
        step = (total * lx - lw * xw) / (total * ll - lw * lw)
        return step, (step * lw - xw) / total

    def steps_alone(self) -> None:
        """Types without offset: a step of either sign, as the levels are not symmetric."""
        top, bottom = self.g.target.max(axis=1), self.g.target.min(axis=1)
        zero = np.zeros_like(top)
        positive = np.maximum(top / self.high, bottom / self.low)
        negative = -np.maximum(-bottom / self.high, -top / self.low)
        for factor in _REACH:
            self.attempt_and_refine(factor * positive, zero)
            self.attempt_and_refine(factor * negative, zero)
        for factor in _NEAR:
            self.attempt_and_refine(factor * self.g.step, zero)

    def steps_and_offsets(self) -> None:
        """Types with offset: each step with the group's offset, and with either end in range."""
        assert self.g.offset is not None
        top, bottom = self.g.target.max(axis=1), self.g.target.min(axis=1)
        reach = (top - bottom) / (self.high - self.low)
        for factor in _REACH_WITH_OFFSET:
            step = factor * reach
            for offset in (self.g.offset, step * self.low - bottom, step * self.high - top):
                self.attempt_and_refine(step, offset)
        for factor in _NEAR:
            self.attempt_and_refine(factor * self.g.step, self.g.offset)

    def neighbours(self, unit: F32) -> None:
        """Walk from the best to better multiples of the units next to it."""
        min_unit = self.g.min_unit
        moves = [(1, 0), (-1, 0)]
        if min_unit is not None:
            moves += [(0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
        for _ in range(2):
            for ds, dm in moves:
                offset = self.best.offset if min_unit is None else self.best.offset + dm * min_unit
                self.attempt(self.best.step + ds * unit, offset)


def _to_half(values: F32) -> F32:
    clipped = np.clip(np.nan_to_num(values), -_HALF_MAX, _HALF_MAX)
    return clipped.astype(np.float16).astype(np.float32)


# ---- bytes ---------------------------------------------------------------------------------------

U8 = NDArray[np.uint8]

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
    column_weight: F32 | None = None,
    n_threads: int | None = None,
) -> Patch:
    """Add `theta` to entries of a quantized tensor, within its type.

    Args:
        raw: The tensor's bytes, (n_rows, bytes_per_row).
        kind: Its type.
        indices: Flat positions of the tuned entries, row * n_cols + col, ascending, unique.
        theta: What to add to them, (len(indices),).
        tuned_weight: Squared error of a tuned entry counts this much more than that of another.
        column_weight: Squared error in each column counts this much, (n_cols,), positive; None:
            all alike.
        n_threads: Worker threads; the result does not depend on it.

    Raises:
        ZoError: Neither the layout of `kind` is known here nor a quantizer of ggml.
    """
    layout = layout_of(kind)
    if layout is None and kind not in SUPPORTED and kind not in _FLOATS:
        raise ZoError(
            f"Weights of type {kind.name} cannot be re-quantized; use --type q8_0 or --type f16."
        )
    block, block_bytes = block_of(kind)
    n_cols = raw.shape[-1] // block_bytes * block
    ids, owner = np.unique(indices // block, return_inverse=True)
    pieces = _pieces(len(ids), max(1, _CHUNK // block))
    stored = raw.reshape(-1, block_bytes)
    # The tuned entries of blocks [first, last) are a run, as the indices ascend.
    edges = np.searchsorted(owner, [first for first, _ in pieces] + [len(ids)])

    def work(number: int) -> tuple[U8, float, float]:
        first, last = pieces[number]
        entries = slice(edges[number], edges[number + 1])
        position = (owner[entries] - first) * block + indices[entries] % block
        columns = np.ones((1, block), dtype=np.float32)
        if column_weight is not None:
            columns = column_weight.reshape(-1, block)[ids[first:last] % (n_cols // block)]
        piece = _Piece(stored[ids[first:last]], kind, position, theta[entries], columns)
        return _requantize_blocks(piece, tuned_weight)

    with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        results = list(pool.map(work, range(len(pieces))))
    blocks = np.concatenate([part for part, _, _ in results])
    tuned_error, other_error = (sum(result[k] for result in results) for k in (1, 2))
    return Patch(ids, blocks, float(tuned_error), float(other_error))


def _pieces(total: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, total)) for first in range(0, total, size)]


def row_parts(n_rows: int, n_cols: int, n_weights: int) -> list[tuple[int, int]]:
    """A matrix in parts of whole rows, (first, last + 1) each, of some `n_weights` weights."""
    return _pieces(n_rows, max(1, n_weights // n_cols))


@dataclass(frozen=True)
class _Piece:
    """Blocks to change: their bytes (n, block_bytes), and where theta is to be added in them."""

    old: U8
    kind: Type
    position: NDArray[np.int64]  # in the n * block weights
    theta: F32
    column_weight: F32  # (n or 1, block)

    def importance(self, tuned_weight: float) -> F32:
        """Weight of every squared error, (n, block)."""
        result = np.ones((len(self.old), block_of(self.kind)[0]), dtype=np.float32)
        result.reshape(-1)[self.position] = tuned_weight
        return result * self.column_weight


def _requantize_blocks(piece: _Piece, tuned_weight: float) -> tuple[U8, float, float]:
    """New bytes (n, block_bytes), and the squared errors of tuned and of other entries."""
    kind, layout = piece.kind, layout_of(piece.kind)
    target = dequantize_rows(piece.old, kind)  # (n, block)
    target.reshape(-1)[piece.position] += piece.theta
    if kind in _FLOATS:
        best = np.ascontiguousarray(gguf.quants.quantize(target, kind)).view(np.uint8)
    else:
        importance = piece.importance(tuned_weight)
        candidates = [piece.old]
        if layout is not None:
            candidates.append(_search(piece, layout, target, importance))
        if layout is None or layout.scale_bits is not None:
            candidates += [
                quantize_blocks(target, kind, piece.importance(weight)) for weight in _GGML_WEIGHTS
            ]
        best = _pick(candidates, kind, target, importance)
    square = np.square(dequantize_rows(best, kind) - target, dtype=np.float64)
    tuned_error = float(square.reshape(-1)[piece.position].sum())
    return best, tuned_error, float(square.sum()) - tuned_error


def _pick(candidates: Sequence[U8], kind: Type, target: F32, importance: F32) -> U8:
    """Per block, the candidate with the least weighted squared error; the earlier one on a tie."""
    errors = np.stack(
        [
            (importance * np.square(dequantize_rows(candidate, kind) - target)).sum(axis=1)
            for candidate in candidates
        ]
    )
    # A block whose scale overflowed has an error that is NaN; it must not win.
    choice = np.where(np.isfinite(errors), errors, np.inf).argmin(axis=0)
    return np.asarray(np.stack(candidates)[choice, np.arange(len(choice))])


def _search(piece: _Piece, layout: Layout, target: F32, importance: F32) -> U8:
    """New bytes by a search over steps, offsets and codes of the groups that hold tuned entries."""
    blocks = read_blocks(piece.old, layout)
    where = np.divmod(np.unique(piece.position // layout.group), layout.n_groups)
    block, _ = where
    has_scales, has_minima = layout.scale_bits is not None, layout.min_bits is not None
    groups = Groups(
        target=target.reshape(blocks.codes.shape)[where],
        weight=importance.reshape(blocks.codes.shape)[where],
        levels=layout.levels,
        codes=blocks.codes[where],
        step=blocks.step[where],
        offset=blocks.offset[where] if layout.min_byte is not None else None,
        unit=blocks.d[block] if has_scales else None,
        scale_low=layout.scale_low,
        scale_high=layout.scale_high,
        min_unit=blocks.minimum[block] if has_minima else None,
        min_high=layout.min_high,
    )
    found = search_steps(groups)
    blocks.codes[where] = found.codes
    if groups.unit is not None:
        blocks.scale[where] = _multiples(found.step, groups.unit)
    else:
        blocks.d[block] = found.step
    if groups.min_unit is not None:
        blocks.sub_min[where] = _multiples(found.offset, groups.min_unit)
    elif layout.min_byte is not None:
        blocks.minimum[block] = found.offset
    return blocks.pack()


def _multiples(values: F32, unit: F32) -> NDArray[np.int64]:
    return np.rint(values / np.where(unit == 0, 1, unit)).astype(np.int64)
