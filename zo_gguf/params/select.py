"""Choose a matrix's trainable entries: the best k by score, on few rows and columns if wanted.

Entries of high gradient cluster on few lines (rows or columns) of a matrix; keeping to R of them
costs little score and makes every delta exactly a rank-R LoRA. The fewest lines that hold given
entries are, by Koenig's theorem, as many as a maximum matching of rows and columns has pairs. Pure
numpy; what the scores mean is not known here.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

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


# ---- selection -----------------------------------------------------------------------------------


_NEVER = np.iinfo(np.int32).max


def top_k(
    scores: NDArray[np.float32], k: int, random: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """Sorted positions of the k largest scores.

    Args:
        scores: Flat, (n,).
        k: How many.
        random: Draws among equal scores; without it, the lower position wins.
    """
    if k >= scores.size:
        return np.arange(scores.size, dtype=np.int64)
    threshold = np.partition(scores, scores.size - k)[scores.size - k]
    above = np.flatnonzero(scores > threshold)
    ties = np.flatnonzero(scores == threshold)
    if random is not None:
        ties = random.choice(ties, k - above.size, replace=False, shuffle=False)
    ties = ties[: k - above.size]
    return np.sort(np.concatenate([above, ties]))


def greedy_lines(
    indices: NDArray[np.int64], scores: NDArray[np.float32], shape: tuple[int, int]
) -> list[tuple[int, int]]:
    """Lines that hold all entries, each time the one with the largest score still uncovered.

    Args:
        indices: Flat indices (n,).
        scores: Their scores (n,), not negative.
        shape: (n_rows, n_cols).

    Returns:
        (axis, line) pairs, axis 0 for a row and 1 for a column; ties go to rows, then lower lines.
    """
    rows, cols = np.divmod(indices, shape[1])
    coordinates = (rows, cols)
    # Entries of score zero still need a line, so each counts for a little.
    weights = scores.astype(np.float64) + np.finfo(np.float64).tiny  # (n,)
    alive = np.ones(indices.size, dtype=bool)
    sums = [np.bincount(c, weights, minlength=n) for c, n in zip(coordinates, shape, strict=True)]
    members = [_members(c, n) for c, n in zip(coordinates, shape, strict=True)]
    lines: list[tuple[int, int]] = []
    while alive.any():
        best = [int(np.argmax(total)) for total in sums]
        axis = 0 if sums[0][best[0]] >= sums[1][best[1]] else 1
        line = best[axis]
        covered = np.array(members[axis][line], dtype=np.int64)
        covered = covered[alive[covered]]
        alive[covered] = False
        sums[axis][line] = 0.0
        other = 1 - axis
        for crossing in np.unique(coordinates[other][covered]):
            rest = np.array(members[other][crossing], dtype=np.int64)
            # Summed afresh: subtracting would leave rounding residues that look like score.
            sums[other][crossing] = weights[rest[alive[rest]]].sum()
        lines.append((axis, line))
    return lines


def _members(keys: NDArray[np.int64], n: int) -> list[NDArray[np.int64]]:
    """For each key 0..n-1 the positions at which it stands."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.cumsum(np.bincount(keys, minlength=n))[:-1])


class _Best:
    """The k best entries offered so far, and for which ranks each was among them."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.total = 0.0
        self.spans: dict[int, list[int]] = {}  # index -> [enter, leave]
        self._heap: list[tuple[float, int]] = []  # (score, -index): the worst first

    def offer(self, rank: int, indices: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Offer entries that were never offered before."""
        if len(self._heap) == self.k:  # most are worse than all k; leave them out at once
            promising = scores >= self._heap[0][0]
            indices, scores = indices[promising], scores[promising]
        for index, score in zip(indices.tolist(), scores.tolist(), strict=True):
            if len(self._heap) < self.k:
                heapq.heappush(self._heap, (score, -index))
            elif (score, -index) > self._heap[0]:
                worst, negated = heapq.heapreplace(self._heap, (score, -index))
                self.total -= worst
                if self.spans[-negated][0] == rank:
                    del self.spans[-negated]
                else:
                    self.spans[-negated][1] = rank
            else:
                continue
            self.total += score
            self.spans[index] = [rank, _NEVER]


@dataclass(frozen=True)
class SelectionPath:
    """The best k entries of a matrix on its first R greedy lines, for every R at once.

    An entry that has fallen out of the best k of R lines never comes back for more lines, so each
    entry is selected for one range of R.

    Attributes:
        indices: Flat indices (m,), sorted, of all entries selected for some R.
        enter: First R that selects each, int32 (m,).
        leave: First R after it that does not, int32 (m,).
        kept: Score of the selection for R = 1, 2, ..., float64 (n_lines,).
        free: Score of the unlimited selection, the k best entries of the whole matrix.
    """

    indices: NDArray[np.int64]
    enter: NDArray[np.int32]
    leave: NDArray[np.int32]
    kept: NDArray[np.float64]
    free: float

    @classmethod
    def build(
        cls, scores: NDArray[np.float32], k: int, max_lines: int | None = None
    ) -> "SelectionPath":
        """Select on 1, 2, ... lines, up to all that the unlimited selection needs.

        Args:
            scores: (n_rows, n_cols), not negative.
            k: Entries to select.
            max_lines: Stop after this many lines.
        """
        flat = scores.reshape(-1)
        free = top_k(flat, k)
        n_rows, n_cols = scores.shape
        lines = greedy_lines(free, flat[free], (n_rows, n_cols))[:max_lines]
        seen = (np.zeros(n_rows, dtype=bool), np.zeros(n_cols, dtype=bool))
        best = _Best(k)
        kept: list[float] = []
        for rank, (axis, line) in enumerate(lines, start=1):
            crossing = np.flatnonzero(~seen[1 - axis])  # the rest lies on an earlier line
            on_line = line * n_cols + crossing if axis == 0 else crossing * n_cols + line
            seen[axis][line] = True
            best.offer(rank, on_line, flat[on_line])
            kept.append(best.total)
        indices = np.array(sorted(best.spans), dtype=np.int64)
        spans = np.array([best.spans[i] for i in indices.tolist()], dtype=np.int32).reshape(-1, 2)
        total = float(flat[free].sum(dtype=np.float64))
        return cls(indices, spans[:, 0], spans[:, 1], np.array(kept), total)

    def select(self, rank: int | None) -> NDArray[np.int64]:
        """Sorted flat indices of the selection on `rank` lines; None: on all lines."""
        n_lines = len(self.kept) if rank is None else min(rank, len(self.kept))
        return self.indices[(self.enter <= n_lines) & (n_lines < self.leave)]


def smallest_rank(paths: Sequence[SelectionPath], share: float) -> tuple[int, float]:
    """The smallest R for which all matrices together keep `share` of their unlimited score.

    Returns:
        R and the share that it keeps.
    """
    n_lines = max(len(path.kept) for path in paths)
    total = sum(path.free for path in paths)
    kept = np.zeros(n_lines)
    for path in paths:
        kept += np.pad(path.kept, (0, n_lines - len(path.kept)), mode="edge")
    enough = np.flatnonzero(kept >= share * total * (1 - 1e-12))
    rank = int(enough[0]) + 1 if enough.size else n_lines
    return rank, float(kept[rank - 1] / total) if total > 0 else 1.0
