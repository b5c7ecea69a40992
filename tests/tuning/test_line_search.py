"""The learning rate that a line search finds."""

import numpy as np
import pytest

from zo_gguf.tuning.line_search import LineSearch


def test_the_lowest_point_of_a_parabola_in_log_rate() -> None:
    rates = [0.0, 1e-4, 3e-4, 9e-4, 2.7e-3]
    losses = [1.0, *(0.2 + 0.1 * np.log(np.array(rates[1:]) / 5e-4) ** 2)]
    found = LineSearch(rates, losses)
    assert found.lowest == pytest.approx(5e-4)
    assert found.rate == 2.5e-4
    assert "at rate 0.0005, by 0.77 from 1" in found.render()


def test_a_lowest_point_at_the_end_is_taken_as_it_is() -> None:
    assert LineSearch([0.0, 1e-4, 3e-4], [1.0, 0.9, 0.8]).lowest == 3e-4
    assert LineSearch([0.0, 1e-4, 3e-4], [1.0, 0.9, 1.3]).lowest == 1e-4
    assert LineSearch([0.0, 1e-4, 3e-4], [1.0, 1.1, 1.3]).lowest == 0


def test_values_that_are_not_finite_end_the_search() -> None:
    assert LineSearch([0.0, 1e-4, 3e-4, 9e-4], [1.0, 0.9, 0.8, np.inf]).lowest == 3e-4
