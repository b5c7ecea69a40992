"""Choose codes so that a matrix's outputs stay, given a sample of its inputs.

After `requantize` the touched blocks hold weights that are all slightly wrong. What counts is not
each error but what they add up to in a row's output: e . x. Given inputs x, the codes of a row's
touched blocks are improved one by one (coordinate descent on E[(e . x)^2]), so that errors cancel
along the directions that inputs really take. Steps and offsets stay, and so do all other blocks.
Rounding against the inputs' second moments is GPTQ's idea (arXiv 2210.17323); here only some
hundred weights per row are free, so they can be revisited until nothing improves.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from zo_gguf.block_codes import BlockCodes, read_blocks
from zo_gguf.quant_layout import Layout

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

_NARROW = 16  # blocks; rows that touch more are searched apart, over all of their columns
_SWEEPS = 5
_WORKING_SET = 1 << 22  # errors held at once


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
    result = np.empty_like(starts[0])
    output_error = 0.0
    for members in _batches(row, column, layout.block * len(starts)):
        part = _Rows(row[members], column[members], layout, target[members], inputs, ridge)
        states = [_State(read_blocks(start[members], layout), part) for start in starts]
        for state in states:
            part.descend(state)
        loss = np.stack([part.loss(state) for state in states])  # (n_starts, n_rows)
        best = loss.argmin(axis=0)  # (n_rows,)
        packed = np.stack([state.blocks.pack() for state in states])
        result[members] = packed[best[part.row], np.arange(len(members))]
        output_error += part.output_error([states[k].error[i] for i, k in enumerate(best)])
    return result, output_error


def _batches(row: I64, column: I64, weights_per_block: int) -> Iterator[NDArray[np.intp]]:
    """Blocks of whole rows that are searched together: first narrow rows, then wide ones."""
    _, number, count = np.unique(row, return_inverse=True, return_counts=True)
    for rows in (np.flatnonzero(count <= _NARROW), np.flatnonzero(count > _NARROW)):
        chosen = np.isin(number, rows)
        width = len(np.unique(column[chosen])) * weights_per_block
        size = max(1, _WORKING_SET // max(width, 1))
        for first in range(0, len(rows), size):
            yield np.flatnonzero(np.isin(number, rows[first : first + size]))


class _State:
    """Codes on their way, and the errors they leave."""

    def __init__(self, blocks: BlockCodes, part: "_Rows") -> None:
        layout = blocks.layout
        n = len(blocks.raw)
        self.blocks = blocks
        self.codes = blocks.codes.reshape(n, layout.block)  # a view
        self.step = np.repeat(blocks.step, layout.group, axis=1)  # (n, block)
        self.offset = np.repeat(blocks.offset, layout.group, axis=1)
        self.error = np.zeros((part.n_rows, part.n_columns, layout.block), dtype=np.float32)
        self.error[part.row, part.column] = blocks.values().reshape(n, -1) - part.target


class _Rows:
    """Some rows of a tensor over the union of the blocks that they touch."""

    def __init__(
        self, row: I64, column: I64, layout: Layout, target: F32, inputs: F32, ridge: float
    ) -> None:
        self.layout = layout
        self.target = target
        rows, self.row = np.unique(row, return_inverse=True)
        columns, self.column = np.unique(column, return_inverse=True)
        self.n_rows, self.n_columns = len(rows), len(columns)
        blocks = inputs.reshape(len(inputs), -1, layout.block)[:, columns]
        self.inputs = blocks.reshape(len(inputs), -1)  # (n_samples, m)
        moment = self.inputs.T @ self.inputs  # (m, m)
        level = ridge * max(float(np.trace(moment)) / len(moment), 1e-30)
        self.moment = moment + level * np.eye(len(moment), dtype=np.float32)
        self.middles = (layout.levels[1:] + layout.levels[:-1]) / 2

    def loss(self, state: _State) -> F32:
        """What is minimized, per row."""
        error = state.error.reshape(self.n_rows, -1)
        return np.asarray((error * (error @ self.moment)).sum(axis=1))

    def output_error(self, errors: Sequence[F32]) -> float:
        """Sum over rows of E[(e . x)^2]."""
        flat = np.stack(errors).reshape(self.n_rows, -1)
        return float(np.square(flat @ self.inputs.T, dtype=np.float64).sum())

    def descend(self, state: _State) -> None:
        """Improve the codes until nothing changes, or often enough."""
        for _ in range(_SWEEPS):
            error = state.error.reshape(self.n_rows, -1)
            gradient = error @ self.moment  # (n_rows, m), half of the loss's
            changed = 0
            for column in range(self.n_columns):
                changed += self._improve(state, gradient, column)
            if not changed:
                return

    def _improve(self, state: _State, gradient: F32, column: int) -> int:
        """One pass over one block of all rows that touch it; returns how many codes changed."""
        size = self.layout.block
        span = slice(column * size, (column + 1) * size)
        members = np.flatnonzero(self.column == column)
        rows = self.row[members]
        local = self.moment[span, span]
        error, slope = state.error[rows, column], gradient[rows, span]
        before = error.copy()
        codes = state.codes[members]
        step, offset, target = state.step[members], state.offset[members], self.target[members]
        n_changed = 0
        for j in range(size):
            curvature = local[j, j]
            value = target[:, j] + error[:, j]
            wanted = value - slope[:, j] / curvature
            code = self._nearest(wanted, step[:, j], offset[:, j])
            change = step[:, j] * self.layout.levels[code] - offset[:, j] - value
            change[(change * (2 * slope[:, j] + change * curvature) >= 0)] = 0
            moved = change != 0
            if moved.any():
                n_changed += int(moved.sum())
                codes[moved, j] = code[moved]
                error[:, j] += change
                slope += change[:, None] * local[j]
        state.error[rows, column] = error
        state.codes[members] = codes
        gradient[rows] += (error - before) @ self.moment[span]
        return n_changed

    def _nearest(self, wanted: F32, step: F32, offset: F32) -> I64:
        scaled = (wanted + offset) / np.where(step == 0, 1, step)
        if self.layout.uniform:
            ranks = np.rint(scaled - self.layout.levels[0])
            return np.asarray(np.clip(ranks, 0, len(self.layout.levels) - 1), dtype=np.int64)
        return np.asarray(np.searchsorted(self.middles, scaled), dtype=np.int64)
