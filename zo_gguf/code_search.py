"""Choose codes so that a matrix's outputs stay, given a sample of its inputs.

After `requantize` the touched blocks hold weights that are all slightly wrong. What counts is not
each error but what they add up to in a row's output: e . x. For inputs with second moments H, this
finds codes of low E[(e . x)^2] = e H e for each row: first one column after another, each error
taken up by the columns to come (GPTQ, arXiv 2210.17323), then coordinate descent until nothing
improves. Steps and offsets stay, and so do all blocks that were not touched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.block_codes import BlockCodes, read_blocks
from zo_gguf.quant_layout import Layout

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

_SWEEPS = 6
_WIDE = 512  # columns; rows with more share their moments, if they touch the same blocks
_LARGEST_FACTOR = 4096  # columns; beyond, only coordinate descent
_LITTLE_WORK = 1 << 27  # of m^3 multiplications; up to here matrices are factored together
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
    for members in _batches(row, column, layout.block):
        # (n_rows, n_blocks): the members of each row
        rows = _Rows(layout, column[members], target[members], moments, ridge)
        best: _Codes | None = None
        for start in starts:
            blocks = read_blocks(start[members.reshape(-1)], layout)
            for codes in rows.candidates(blocks):
                best = codes if best is None else best.or_better(codes)
        assert best is not None
        result[members.reshape(-1)] = best.raw
        output_error += float(rows.loss(best.error, rows.plain_moments).sum())
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
        if width <= _WIDE:
            size = max(1, _WORKING_SET // width**2)
            yield from (members[i : i + size] for i in range(0, len(members), size))
        else:
            _, group = np.unique(column[members], axis=0, return_inverse=True)
            yield from (members[group.reshape(-1) == g] for g in range(group.max() + 1))


@dataclass
class _Codes:
    """A candidate for some rows.

    Attributes:
        raw: Bytes of the rows' blocks, (n_rows * n_blocks, block_bytes).
        error: (n_rows, m) in the rows' column order.
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
            np.where(better[:, None], other.error, self.error),
            np.where(better, other.loss, self.loss),
        )


@dataclass(frozen=True)
class _Scale:
    """Step, its inverse and offset of every free weight, (n_rows, m)."""

    step: F64
    inverse: F64
    offset: F64


class _Rows:
    """Some rows with m free weights each, ordered by falling mean square of their inputs."""

    def __init__(
        self, layout: Layout, column: I64, target: F32, moments: F32, ridge: float
    ) -> None:
        self.layout = layout
        n_rows = len(column)
        columns = (column[..., None] * layout.block + np.arange(layout.block)).reshape(n_rows, -1)
        shared = columns.shape[1] > _WIDE  # then the columns are the same in all rows
        used = columns[:1] if shared else columns
        order = np.argsort(-moments[used, used], axis=1, kind="stable")
        used = np.take_along_axis(used, order, axis=1)
        self.order = np.broadcast_to(order, columns.shape)  # (n_rows, m)
        chosen = moments[used[:, :, None], used[:, None, :]]  # (n_rows or 1, m, m)
        self.plain_moments = chosen.astype(np.float64)
        level = ridge * np.maximum(
            np.einsum("rii->r", self.plain_moments) / columns.shape[1], 1e-30
        )
        self.moments = self.plain_moments + level[:, None, None] * np.eye(columns.shape[1])
        self.target = self._ordered(target)
        self.uniform = layout.uniform
        self.levels = layout.levels.astype(np.float64)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def _ordered(self, values: NDArray[Any]) -> F64:
        """One value per weight of the blocks, (n_rows, m), in the rows' column order."""
        flat = values.reshape(self.order.shape).astype(np.float64)
        return np.asarray(np.take_along_axis(flat, self.order, axis=1))

    def loss(self, error: F64, moments: F64) -> F64:
        """e H e, (n_rows,)."""
        return np.asarray((_times(error, moments) * error).sum(axis=1))

    def candidates(self, blocks: BlockCodes) -> Iterator[_Codes]:
        """The blocks' own codes and those of the sequential pass, both improved."""
        group = self.layout.group
        step = self._ordered(np.repeat(blocks.step, group, axis=1))
        offset = self._ordered(np.repeat(blocks.offset, group, axis=1))
        scale = _Scale(step, 1 / np.where(step == 0, 1, step), offset)
        starts = [self._ordered(self.layout.levels[blocks.codes])]
        if step.shape[1] <= _LARGEST_FACTOR:
            starts.append(self._sequential(scale))
        for levels in starts:
            error = self._descend(scale, levels)
            unordered = np.empty_like(levels)
            np.put_along_axis(unordered, self.order, levels, axis=1)
            codes = np.searchsorted(self.levels, unordered)
            blocks.codes = codes.reshape(blocks.codes.shape).astype(np.int64)
            yield _Codes(blocks.pack(), error, self.loss(error, self.moments))

    def _sequential(self, scale: _Scale) -> F64:
        """GPTQ: quantize a column, let the columns to come make up for its error."""
        factor = _upper_factor(self.moments)
        # e H e is the sum over k of (sum over i <= k of e_i R_ik)^2: each column can make its own
        # term as small as its levels allow.
        levels = np.empty_like(self.target)
        carried = np.zeros_like(self.target)
        for j in range(levels.shape[1]):
            wanted = self.target[:, j] - carried[:, j] / factor[:, j, j]
            levels[:, j] = self._nearest(wanted, scale, j)
            error = scale.step[:, j] * levels[:, j] - scale.offset[:, j] - self.target[:, j]
            carried[:, j + 1 :] += error[:, None] * factor[:, j, j + 1 :]
        return levels

    def _descend(self, scale: _Scale, levels: F64) -> F64:
        """Change single levels of each row, in place, while that helps; returns the errors."""
        error = scale.step * levels - scale.offset - self.target
        for _ in range(_SWEEPS):
            slope = _times(error, self.moments)  # half the gradient
            any_changed = False
            for j in range(levels.shape[1]):
                curvature = self.moments[:, j, j]
                value = self.target[:, j] + error[:, j]
                level = self._nearest(value - slope[:, j] / curvature, scale, j)
                change = scale.step[:, j] * (level - levels[:, j])
                helps = change * (2 * slope[:, j] + change * curvature) < -_TINY
                if helps.any():
                    any_changed = True
                    change = np.where(helps, change, 0)
                    levels[helps, j] = level[helps]
                    error[:, j] += change
                    slope += change[:, None] * self.moments[:, j]
            if not any_changed:
                break
        return error

    def _nearest(self, wanted: F64, scale: _Scale, j: int) -> F64:
        """The level whose value is nearest to what is wanted in column j, (n_rows,)."""
        scaled = (wanted + scale.offset[:, j]) * scale.inverse[:, j]
        if self.uniform:
            rounded = np.rint(scaled)
            return np.asarray(np.minimum(np.maximum(rounded, self.levels[0]), self.levels[-1]))
        return np.asarray(self.levels[np.searchsorted(self.middles, scaled)])


def _times(error: F64, moments: F64) -> F64:
    """Every row times its matrix, (n_rows, m)."""
    if len(moments) == 1:
        return np.asarray(error @ moments[0])
    return np.asarray(np.einsum("rj,rjk->rk", error, moments))


def _upper_factor(moments: F64) -> F64:
    """Upper triangular R with R R^T = H, for each of the matrices (k, m, m)."""
    reverse = moments[:, ::-1, ::-1]
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
