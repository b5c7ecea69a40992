"""Choose codes so that a matrix's outputs stay, given a sample of its inputs.

After `requantize` the touched blocks hold weights that are all slightly wrong. What counts is not
each error but what they add up to in a row's output: e . x. For inputs with second moments H, this
finds codes of low E[(e . x)^2] = e H e for each row: first one column after another, each error
taken up by the columns to come (GPTQ, arXiv 2210.17323), then coordinate descent until nothing
improves. Steps and offsets stay, and so do all blocks that were not touched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.gguf_files.blocks import BlockCodes, Layout, read_blocks

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

LARGEST_FACTOR = 4096  # columns; beyond, only coordinate descent, unless whole rows are free
_LITTLE_WORK = 1 << 27  # of m^3 multiplications; up to here matrices are factored together


class InputMoments:
    """Second moments of the inputs of rows' free weights, by falling mean square.

    Args:
        columns: Of the m free weights of each row, (n_rows, m), or of all rows, (1, m).
        moments: Of all inputs, (n_cols, n_cols).
        ridge: See `choose_codes`.
    """

    def __init__(self, columns: I64, moments: F32, ridge: float) -> None:
        self.columns = columns
        self.order = np.argsort(-moments[columns, columns], axis=1, kind="stable")
        used = np.take_along_axis(columns, self.order, axis=1)
        self.values = moments[used[:, :, None], used[:, None, :]].astype(np.float64)
        diagonal = np.einsum("rii->ri", self.values)  # a view
        self.level = ridge * np.maximum(diagonal.mean(axis=1), 1e-30)
        diagonal += self.level[:, None]
        self.are_all = columns.shape == (1, len(moments))  # weights of whole rows are free

    @cached_property
    def factor(self) -> F64:
        """Upper triangular R with R R^T = H."""
        return upper_factor(self.values)


def columns_of(column: I64, block: int) -> I64:
    """Columns of the weights in the rows' blocks, (n_rows, m); (1, m) if all have the same."""
    shared = column[:1] if (column == column[:1]).all() else column
    return (shared[..., None] * block + np.arange(block)).reshape(len(shared), -1)


def columns_among(matrices: F64, part: slice) -> F64:
    """The part of every matrix among these columns, (columns, columns, n_rows or 1)."""
    return np.ascontiguousarray(matrices[:, part, part].transpose(1, 2, 0))


def product(matrices: F64, values: F64) -> F64:
    """Every row's column of `values`, (k, n_rows), times its matrix, (n_rows or 1, k, m)."""
    if len(matrices) == 1:
        return np.asarray(matrices[0].T @ values)
    return np.ascontiguousarray(np.matmul(values.T[:, None], matrices)[:, 0].T)


def upper_factor(moments: F64) -> F64:
    """Upper triangular R with R R^T = H, for each of the matrices (k, m, m)."""
    reverse = moments[:, ::-1, ::-1]
    if moments.shape[1] > LARGEST_FACTOR:  # half the memory, and the ridge keeps it well apart
        return np.linalg.cholesky(reverse.astype(np.float32))[:, ::-1, ::-1]
    if moments.size * moments.shape[1] > _LITTLE_WORK:
        return np.asarray(np.linalg.cholesky(reverse)[:, ::-1, ::-1])
    # All matrices at once: LAPACK takes them one by one, and waits for its threads each time.
    rest = reverse.copy()
    lower = np.zeros_like(rest)
    for j in range(rest.shape[1]):
        column = rest[:, j:, j] / np.sqrt(rest[:, j, j])[:, None]
        lower[:, j:, j] = column
        rest[:, j:, j:] -= column[:, :, None] * column[:, None, :]
    return lower[:, ::-1, ::-1]


# ---- codes ---------------------------------------------------------------------------------------

U8 = NDArray[np.uint8]

_SWEEPS = 6
_TOGETHER = 64  # columns whose changes reach all others in one product
_WIDE = 512  # columns; rows with more share their moments, if they touch the same blocks
_ALIKE = 8  # rows with the same blocks, on average, from which on narrow ones share them too
_WORKING_SET = 1 << 22  # numbers held at once
_TINY = 1e-15  # changes of the loss below this are rounding


def choose_codes(
    ids: I64,
    starts: Sequence[U8],
    layout: Layout,
    target: F32,
    inputs: F32,
    *,
    ridge: float,
) -> tuple[U8, float]:
    """Improve the codes of some of a tensor's blocks against a sample of inputs.

    Args:
        ids: Which blocks, counted from the start of the tensor, ascending, (n,).
        starts: Bytes of these blocks to start from, (n, block_bytes) each; every row takes the one
            that ends best.
        layout: The tensor's type.
        target: Wanted values, (n, block).
        inputs: (n_samples, n_cols), each sample scaled by the square root of its weight.
        ridge: Weight of the plain squared error, as a share of the inputs' mean square.

    Returns:
        The blocks' bytes, and the sum over rows of E[(e . x)^2], without the ridge.
    """
    row, column = np.divmod(ids, inputs.shape[1] // layout.block)
    moments = inputs.T @ inputs  # (n_cols, n_cols)
    result = np.empty_like(starts[0])
    output_error = 0.0
    known: InputMoments | None = None
    for members in _batches(row, column, layout.block):
        # (n_rows, n_blocks): the members of each row
        columns = columns_of(column[members], layout.block)
        if known is None or not np.array_equal(known.columns, columns):
            known = None  # never two in memory
            known = InputMoments(columns, moments, ridge)
        rows = _Rows(layout, known, target[members])
        best: _Codes | None = None
        for start in starts:
            blocks = read_blocks(start[members.reshape(-1)], layout)
            for codes in rows.candidates(blocks):
                best = codes if best is None else best.or_better(codes)
        assert best is not None
        result[members.reshape(-1)] = best.raw
        output_error += float(rows.plain_loss(best.error).sum())
    return result, output_error


def _batches(row: I64, column: I64, block: int) -> Iterator[NDArray[np.intp]]:
    """Rows that are searched together: as many blocks each, and the same ones where they are many.

    Yields:
        Indices of the rows' blocks, (n_rows, n_blocks).
    """
    first = np.flatnonzero(np.diff(row, prepend=-1))
    count = np.diff(np.append(first, len(row)))
    for n_blocks in np.unique(count):
        members = first[count == n_blocks][:, None] + np.arange(n_blocks)
        width = int(n_blocks) * block
        kinds, group = np.unique(column[members], axis=0, return_inverse=True)
        if width <= _WIDE and len(members) < _ALIKE * len(kinds):
            yield from _chunks(members, _WORKING_SET // width**2)
        else:
            for number in range(len(kinds)):
                yield from _chunks(members[group.reshape(-1) == number], _WORKING_SET // width)


def _chunks(members: NDArray[np.intp], size: int) -> Iterator[NDArray[np.intp]]:
    return (members[at : at + max(1, size)] for at in range(0, len(members), max(1, size)))


@dataclass
class _Codes:
    """A candidate for some rows.

    Attributes:
        raw: Bytes of the rows' blocks, (n_rows * n_blocks, block_bytes).
        error: (m, n_rows) in the rows' column order.
        loss: (n_rows,).
    """

    raw: U8
    error: F64
    loss: F64

    def or_better(self, other: "_Codes") -> "_Codes":
        """Per row, the candidate with the lower loss."""
        better = other.loss < self.loss
        blocks = np.repeat(better, len(self.raw) // len(better))
        return _Codes(
            np.where(blocks[:, None], other.raw, self.raw),
            np.where(better, other.error, self.error),
            np.where(better, other.loss, self.loss),
        )


@dataclass(frozen=True)
class _Scale:
    """Step, its inverse and offset of every free weight, (m, n_rows)."""

    step: F64
    inverse: F64
    offset: F64


class _Rows:
    """Some rows with m free weights each, in the order of `moments`.

    Values of the free weights are (m, n_rows), so that one column of all rows lies together.
    """

    def __init__(self, layout: Layout, moments: InputMoments, target: F32) -> None:
        self.layout = layout
        self._shared = moments
        self.moments, self.level = moments.values, moments.level
        self.order = np.broadcast_to(moments.order, (len(target), moments.order.shape[1]))
        self.target = self._ordered(target)
        self.uniform = layout.uniform
        self.levels = layout.levels.astype(np.float64)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def _ordered(self, values: NDArray[Any]) -> F64:
        """One value per weight of the blocks, (m, n_rows), in the rows' column order."""
        flat = values.reshape(self.order.shape).astype(np.float64)
        return np.ascontiguousarray(np.take_along_axis(flat, self.order, axis=1).T)

    def loss(self, error: F64) -> F64:
        """e H e with the ridge, (n_rows,)."""
        return np.asarray((product(self.moments, error) * error).sum(axis=0))

    def plain_loss(self, error: F64) -> F64:
        """e H e without it."""
        return np.asarray(self.loss(error) - self.level * np.square(error).sum(axis=0))

    def candidates(self, blocks: BlockCodes) -> Iterator[_Codes]:
        """The blocks' own codes and those of the sequential pass, both improved."""
        group = self.layout.group
        step = self._ordered(np.repeat(blocks.step, group, axis=1))
        offset = self._ordered(np.repeat(blocks.offset, group, axis=1))
        scale = _Scale(step, 1 / np.where(step == 0, 1, step), offset)
        starts = []
        if not self._shared.are_all or len(step) <= _WIDE:  # in others it is hardly ever better
            starts.append(self._ordered(self.layout.levels[blocks.codes]))
        if self._shared.are_all or len(step) <= LARGEST_FACTOR:
            starts.append(self._sequential(scale))
        for levels in starts:
            error = self._descend(scale, levels)
            unordered = np.empty(self.order.shape)
            np.put_along_axis(unordered, self.order, levels.T, axis=1)
            codes = np.searchsorted(self.levels, unordered)
            blocks.codes = codes.reshape(blocks.codes.shape).astype(np.int64)
            yield _Codes(blocks.pack(), error, self.loss(error))

    def _sequential(self, scale: _Scale) -> F64:
        """GPTQ: quantize a column, let the columns to come make up for its error."""
        factor = self._shared.factor
        # e H e is the sum over k of (sum over i <= k of e_i R_ik)^2: each column can make its own
        # term as small as its levels allow.
        levels, error = np.empty_like(self.target), np.empty_like(self.target)
        carried = np.zeros_like(self.target)
        for part, rest in _parts(len(levels)):
            near = columns_among(factor, part)
            for i, j in enumerate(range(part.start, part.stop)):
                wanted = self.target[j] - carried[j] / near[i, i]
                levels[j] = self._nearest(wanted, scale, j)
                error[j] = scale.step[j] * levels[j] - scale.offset[j] - self.target[j]
                carried[j + 1 : part.stop] += near[i, i + 1 :] * error[j]
            carried[rest] += product(factor[:, part, rest], error[part])
        return levels

    def _descend(self, scale: _Scale, levels: F64) -> F64:
        """Change single levels of each row, in place, while that helps; returns the errors."""
        error = scale.step * levels - scale.offset - self.target
        slope = product(self.moments, error)  # half the gradient
        near = [(part, columns_among(self.moments, part)) for part, _ in _parts(len(levels))]
        for _ in range(_SWEEPS):
            any_changed = False
            for part, moments in near:
                slopes, before = slope[part].copy(), error[part].copy()
                for i, j in enumerate(range(part.start, part.stop)):
                    curvature = moments[i, i]
                    value = self.target[j] + error[j]
                    level = self._nearest(value - slopes[i] / curvature, scale, j)
                    change = scale.step[j] * (level - levels[j])
                    helps = change * (2 * slopes[i] + change * curvature) < -_TINY
                    if helps.any():
                        change = np.where(helps, change, 0)
                        np.copyto(levels[j], level, where=helps)
                        error[j] += change
                        slopes[i + 1 :] += moments[i, i + 1 :] * change
                changed = error[part] - before
                if changed.any():
                    any_changed = True
                    slope += product(self.moments[:, part], changed)
            if not any_changed:
                break
        return error

    def _nearest(self, wanted: F64, scale: _Scale, j: int) -> F64:
        """The level whose value is nearest to what is wanted in column j, (n_rows,)."""
        scaled = (wanted + scale.offset[j]) * scale.inverse[j]
        if self.uniform:
            rounded = np.rint(scaled)
            return np.asarray(np.minimum(np.maximum(rounded, self.levels[0]), self.levels[-1]))
        return np.asarray(self.levels[np.searchsorted(self.middles, scaled)])


def _parts(m: int) -> list[tuple[slice, slice]]:
    """Runs of columns, and what comes after each."""
    edges = [*range(0, m, _TOGETHER), m]
    return [(slice(a, b), slice(b, m)) for a, b in pairwise(edges)]
