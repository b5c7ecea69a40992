"""The fewest rows and columns that hold all entries of a sparse matrix.

A delta whose entries lie on r rows or columns is exactly a rank-r LoRA, and by Koenig's theorem the
fewest lines are as many as a maximum matching of rows and columns has pairs. Choosing entries that
need few lines is `selection`'s work.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def line_cover(
    indices: NDArray[np.int64], shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The fewest rows and columns that together hold all entries.

    Args:
        indices: Flat indices (n,), row * n_cols + col.
        shape: (n_rows, n_cols).

    Returns:
        Sorted rows and sorted columns.
    """
    row_ids, rows = np.unique(indices // shape[1], return_inverse=True)
    col_ids, cols = np.unique(indices % shape[1], return_inverse=True)
    neighbours = _group(rows, cols, len(row_ids))
    row_mate, col_mate = _maximum_matching(neighbours, len(col_ids))
    # Koenig: walk alternating paths from the unmatched rows; the cover is the rows not reached
    # and the columns reached.
    reached_rows = row_mate < 0
    reached_cols = np.zeros(len(col_ids), dtype=bool)
    stack = np.flatnonzero(reached_rows).tolist()
    while stack:
        for col in neighbours[stack.pop()]:
            if not reached_cols[col]:
                reached_cols[col] = True
                mate = int(col_mate[col])
                if not reached_rows[mate]:
                    reached_rows[mate] = True
                    stack.append(mate)
    return row_ids[~reached_rows], col_ids[reached_cols]


def _group(keys: NDArray[np.int64], values: NDArray[np.int64], n: int) -> list[list[int]]:
    """For each key 0..n-1 the list of its values."""
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(np.bincount(keys, minlength=n))
    return [part.tolist() for part in np.split(values[order], ends[:-1])]


def _maximum_matching(
    neighbours: Sequence[Sequence[int]], n_cols: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hopcroft-Karp: each row's column and each column's row, -1 where unmatched."""
    row_mate = np.full(len(neighbours), -1, dtype=np.int64)
    col_mate = np.full(n_cols, -1, dtype=np.int64)
    for row, columns in enumerate(neighbours):  # a greedy start saves most phases
        for col in columns:
            if col_mate[col] < 0:
                row_mate[row], col_mate[col] = col, row
                break
    rows, cols = row_mate.tolist(), col_mate.tolist()
    while (level := _levels(neighbours, rows, cols)) is not None:
        position = [0] * len(neighbours)
        for root in [row for row, mate in enumerate(rows) if mate < 0]:
            _augment(root, neighbours, rows, cols, level, position)
    return np.array(rows, dtype=np.int64), np.array(cols, dtype=np.int64)


def _levels(
    neighbours: Sequence[Sequence[int]], row_mate: list[int], col_mate: list[int]
) -> list[int] | None:
    """Distance of each row from the unmatched rows; None when no augmenting path is left."""
    level = [0 if mate < 0 else -1 for mate in row_mate]
    front = [row for row, mate in enumerate(row_mate) if mate < 0]
    found = False
    while front and not found:
        following: list[int] = []
        for row in front:
            for col in neighbours[row]:
                mate = col_mate[col]
                if mate < 0:
                    found = True
                elif level[mate] < 0:
                    level[mate] = level[row] + 1
                    following.append(mate)
        front = following
    return level if found else None


def _augment(
    root: int,
    neighbours: Sequence[Sequence[int]],
    row_mate: list[int],
    col_mate: list[int],
    level: list[int],
    position: list[int],
) -> None:
    """Flip one shortest augmenting path from `root`, if there still is one; iterative."""
    path = [root]
    while path:
        row = path[-1]
        if position[row] == len(neighbours[row]):
            path.pop()
            if path:
                position[path[-1]] += 1
            continue
        mate = col_mate[neighbours[row][position[row]]]
        if mate < 0:
            for step in path:
                col = neighbours[step][position[step]]
                row_mate[step], col_mate[col] = col, step
            return
        if level[mate] == level[row] + 1:
            path.append(mate)
        else:
            position[row] += 1
