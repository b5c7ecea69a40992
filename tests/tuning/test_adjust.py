"""Regression adjustment of the rows' slopes."""

import numpy as np
import pytest

from zo_gguf.data.dataset import Example
from zo_gguf.errors import ZoError
from zo_gguf.tuning.adjust import Adjustment, n_features, required_features


def rows(n_choices: list[int]) -> list[Example]:
    """Rows with so many choices each."""
    return [
        Example([1, 2], [False, True], tuple((10 + k,) for k in range(n)) if n else (), 0, 1)
        for n in n_choices
    ]


@pytest.mark.parametrize(
    ("counts", "per_step", "expected"),
    [([4] * 5, 16, 3), ([4] * 5, 11, 0), ([2] * 5, 4, 1), ([4, 3], 16, 0), ([0, 0], 16, 0)],
)
def test_how_many_features(counts: list[int], per_step: int, expected: int) -> None:
    assert n_features(rows(counts), per_step) == expected


def test_no_features_are_refused() -> None:
    assert required_features(rows([2] * 5), 4) == 1
    for counts in ([4, 3], [0, 0], [4] * 5):
        with pytest.raises(ZoError, match="raise --examples-per-step, or leave it"):
            required_features(rows(counts), 8)


def simulate(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw and adjusted mean slopes of 3000 batches whose rows' slopes depend on their features.

    The true mean slope is 0.7: the features' mean is 0.2 in the population.
    """
    random = np.random.default_rng(seed)
    effects = np.array([3.0, -2.0, 1.0])
    adjustment = Adjustment(n)
    raw, adjusted = [], []
    for _ in range(3000):
        features = random.normal(0.2, 1.0, (16, 3))
        slopes = 0.7 + (features - 0.2) @ effects + random.normal(0, 0.5, 16)
        raw.append(slopes.mean())
        adjusted.append(adjustment(slopes[None], features[:, :n])[0])
        adjustment.remember(features[:, :n].mean(axis=0).tolist())
    return np.array(raw[100:]), np.array(adjusted[100:])


def test_the_variance_falls_and_the_mean_stays() -> None:
    raw, adjusted = simulate(3, seed=0)
    assert abs(adjusted.mean() - 0.7) < 0.06  # standard error of the raw mean: 0.018
    assert adjusted.var() < 0.25 * raw.var()  # what is left is the running mean's own noise


def test_without_features_nothing_changes() -> None:
    raw, adjusted = simulate(0, seed=1)
    assert np.array_equal(raw, adjusted)


def test_the_first_steps_are_left_alone() -> None:
    random = np.random.default_rng(2)
    adjustment = Adjustment(1)
    for step in range(8):
        features = random.normal(size=(16, 1))
        slopes = 5 * features.T + 1
        plain = bool(np.allclose(adjustment(slopes, features), slopes.mean(axis=1)))
        assert plain == (step < 4)
        adjustment.remember(features.mean(axis=0).tolist())


def test_remembering_records_gives_the_same_adjustment() -> None:
    random = np.random.default_rng(3)
    means = random.normal(size=(30, 2))
    first, second = Adjustment(2), Adjustment(2)
    for mean in means:
        first.remember(mean)
    for mean in means.tolist():  # as they come back from a file
        second.remember(tuple(mean))
    features, slopes = random.normal(size=(16, 2)), random.normal(size=(3, 16))
    assert np.array_equal(first(slopes, features), second(slopes, features))


def test_several_directions_are_adjusted_one_by_one() -> None:
    random = np.random.default_rng(4)
    adjustment = Adjustment(2)
    for _ in range(10):
        adjustment.remember([0.1, 0.2])
    features, slopes = random.normal(size=(16, 2)), random.normal(size=(3, 16))
    together = adjustment(slopes, features)
    apart = [adjustment(row[None], features)[0] for row in slopes]
    np.testing.assert_allclose(together, apart, rtol=1e-12)


def test_features_are_residuals_of_all_choices_but_the_last() -> None:
    residuals = np.arange(24.0).reshape(2, 3, 4)  # probes, rows, choices
    expected = residuals.mean(axis=0)[:, :3]
    assert np.array_equal(Adjustment(3).features(residuals), expected)
    assert Adjustment(0).features(residuals).shape == (1, 0)
