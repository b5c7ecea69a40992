"""Line covers and selections on few lines, against exhaustive search."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from zo_gguf.params.select import SelectionPath, greedy_lines, line_cover, smallest_rank, top_k

Shape = tuple[int, int]


def smallest_cover(indices: NDArray[np.int64], shape: Shape) -> int:
    """Try every set of rows; the columns then needed are plain."""
    rows, cols = np.divmod(indices, shape[1])
    touched = np.unique(rows)
    return min(
        n + np.unique(cols[~np.isin(rows, chosen)]).size
        for n in range(touched.size + 1)
        for chosen in combinations(touched, n)
    )


def on_lines(shape: Shape, lines: list[tuple[int, int]]) -> NDArray[np.int64]:
    covered = np.zeros(shape, dtype=bool)
    for axis, line in lines:
        covered[(line, slice(None)) if axis == 0 else (slice(None), line)] = True
    return np.flatnonzero(covered)


def best(scores: NDArray[np.float32], pool: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The k best of some positions by a full sort, lower positions first among equals."""
    return np.sort(pool[np.lexsort((pool, -scores[pool]))[:k]])


def random_shape(rng: np.random.Generator) -> Shape:
    return (int(rng.integers(1, 8)), int(rng.integers(1, 8)))


@pytest.mark.parametrize("seed", range(150))
def test_line_cover_is_a_cover_and_minimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    size = shape[0] * shape[1]
    indices = np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False))
    rows, cols = line_cover(indices, shape)
    assert (np.isin(indices // shape[1], rows) | np.isin(indices % shape[1], cols)).all()
    assert rows.size + cols.size == smallest_cover(indices, shape)


def test_line_cover_of_a_long_chain_needs_no_recursion() -> None:
    n = 20_000  # a staircase, whose alternating paths are as long as they can be
    steps = np.arange(n)
    indices = np.sort(np.concatenate([steps * (n + 1) + steps, steps * (n + 1) + steps + 1]))
    rows, cols = line_cover(indices, (n, n + 1))
    assert rows.size + cols.size == n


@pytest.mark.parametrize("seed", range(60))
def test_top_k_prefers_lower_positions_among_equals(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, 30).astype(np.float32)
    k = int(rng.integers(1, 33))
    np.testing.assert_array_equal(top_k(scores, k), best(scores, np.arange(30), k))


@pytest.mark.parametrize("seed", range(60))
def test_selection_on_every_number_of_lines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    size = shape[0] * shape[1]
    scores = rng.integers(0, 5, shape) if seed % 2 else rng.random(shape) ** 8
    scores = scores.astype(np.float32)
    flat = scores.reshape(-1)
    k = int(rng.integers(1, size + 1))
    free = best(flat, np.arange(size), k)
    path = SelectionPath.build(scores, k)
    lines = greedy_lines(free, flat[free], shape)
    assert np.isin(free, on_lines(shape, lines)).all()
    assert len(path.kept) == len(lines)
    for rank in range(1, len(lines) + 1):
        wanted = best(flat, on_lines(shape, lines[:rank]), k)
        np.testing.assert_array_equal(path.select(rank), wanted)
        assert path.kept[rank - 1] == pytest.approx(flat[wanted].sum())
    np.testing.assert_array_equal(path.select(None), free)
    np.testing.assert_array_equal(path.select(10**6), free)
    short = SelectionPath.build(scores, k, max_lines=1)
    np.testing.assert_array_equal(short.select(1), path.select(1))


def test_greedy_takes_the_line_with_the_largest_remaining_score() -> None:
    scores = np.float32([[9, 1, 0], [8, 0, 2], [0, 7, 6]])
    entries = np.flatnonzero(scores)
    # column 0 holds 17; then row 2 holds 13; then the 2 and the 1 are left, each on a line
    lines = greedy_lines(entries, scores.reshape(-1)[entries], (3, 3))
    assert lines == [(1, 0), (0, 2), (0, 1), (0, 0)]


def test_smallest_rank_counts_all_matrices_together() -> None:
    diagonal = SelectionPath.build(np.diag(np.float32([4, 3, 2, 1])), 4)  # 4, 7, 9, 10
    row = SelectionPath.build(np.pad(np.full((1, 5), 18, np.float32), ((0, 4), (0, 0))), 5)  # 90
    assert smallest_rank([diagonal, row], 0.99) == (3, pytest.approx(0.99))
    assert smallest_rank([diagonal, row], 0.94) == (1, pytest.approx(0.94))
    assert smallest_rank([diagonal, row], 1.0) == (4, pytest.approx(1.0))
