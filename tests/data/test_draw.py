"""Rows of a step: epochs, purity, and answers spread evenly."""

from collections import Counter

import numpy as np
import pytest

from zo_gguf.data.dataset import Draw, Example


def choice_rows(counts: list[int]) -> list[Example]:
    """Rows with counts[k] of answer k, in order; the first token numbers the row."""
    choices = tuple((100 + k,) for k in range(len(counts)))
    answers = np.repeat(np.arange(len(counts)), counts)
    return [
        Example([1, i, 100 + k], [False, False, True], choices, int(k), 2)
        for i, k in enumerate(answers)
    ]


def completion_rows(completions: list[int]) -> list[Example]:
    """Rows whose only counted token is the completion."""
    return [Example([1, i, c], [False, False, True]) for i, c in enumerate(completions)]


@pytest.mark.parametrize(("n_rows", "per_step"), [(12, 4), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_every_row_once_per_epoch(n_rows: int, per_step: int) -> None:
    draw = Draw(completion_rows([5] * n_rows), per_step, seed=3)
    n_steps = n_rows * per_step  # whole epochs
    drawn = [row.tokens[1] for step in range(n_steps) for row in draw(step)]
    for epoch in range(per_step * per_step):
        part = drawn[epoch * n_rows : (epoch + 1) * n_rows]
        assert sorted(part) == list(range(n_rows))


def test_is_a_pure_function_of_seed_and_step() -> None:
    rows = choice_rows([20, 30, 10])
    first, second = Draw(rows, 16, seed=1), Draw(rows, 16, seed=1)
    steps = [9, 0, 25, 3]
    forward = {step: first(step) for step in sorted(steps)}
    assert all(second(step) == forward[step] for step in steps)
    assert Draw(rows, 16, seed=2)(0) != forward[0]
    assert forward[0] != forward[9]


@pytest.mark.parametrize("counts", [[1000] * 4, [990, 1010, 1020, 980], [3000, 700, 300]])
def test_answers_come_in_proportion(counts: list[int]) -> None:
    rows = choice_rows(counts)
    draw = Draw(rows, 16, seed=0)
    share = np.array(counts) / sum(counts)
    for step in range(sum(counts) // 16):
        seen = Counter(row.answer for row in draw(step))
        for answer, expected in enumerate(16 * share):
            assert abs(seen[answer] - expected) <= 2  # chance alone: up to 8 in 250 steps


def test_equal_completions_are_spread_like_choices() -> None:
    draw = Draw(completion_rows([7] * 80 + [8] * 80), 8, seed=0)
    for step in range(20):
        seen = Counter(row.tokens[2] for row in draw(step))
        assert abs(seen[7] - 4) <= 1


def test_free_text_is_shuffled() -> None:
    draw = Draw(completion_rows(list(range(1000, 2000))), 10, seed=5)
    drawn = np.array([row.tokens[1] for step in range(100) for row in draw(step)])
    assert abs(np.corrcoef(drawn, np.arange(1000))[0, 1]) < 0.1  # standard deviation 0.032
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.1


def test_epochs_differ() -> None:
    draw = Draw(choice_rows([8, 8]), 16, seed=0)
    orders = [[row.tokens[1] for row in draw(epoch)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
