"""What surrounds an estimator: its options, and clipping."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuning.test_estimators import PROBING, ROWS, Toy, config, quadratic, toy
from zo_gguf.errors import ZoError
from zo_gguf.libzo import NORMAL, RADEMACHER
from zo_gguf.tuning.estimators import ESTIMATORS, estimate, estimator_of
from zo_gguf.tuning.estimators.base import direction_seeds
from zo_gguf.tuning.optimizer import Clip
from zo_gguf.tuning.options import settle
from zo_gguf.tuning.trajectory import Direction, Record, Trajectory

# ---- losses that say nothing ---------------------------------------------------------------------


def test_losses_that_no_probe_changes_are_noticed() -> None:
    def rows(theta: np.ndarray, row: int) -> float:
        return 1.0 + row

    def one_moves(theta: np.ndarray, row: int) -> float:
        return quadratic(theta, row) if row == 2 else rows(theta, row)

    for name in PROBING:
        found = [
            estimate(toy(loss), ROWS, config(estimator=name), 0).trouble()
            for loss in (rows, one_moves, lambda theta, _: 0.0)  # the last: all learned
        ]
        assert "No probe" in str(found[0])
        assert found[1:] == [None, None]


# ---- options -------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], int, int]] = [  # options, directions, forwards
    ({}, 16, 17),
    ({"iters": 750}, 16, 17),
    ({"iters": 751}, 16, 32),
    ({"iters": 751, "sides": 1}, 16, 17),
    ({"sides": 2}, 16, 32),
    ({"directions": 5, "sides": 2}, 5, 10),
    ({"directions": 5, "sides": 1}, 5, 6),
    ({"estimator": "spsa"}, 1, 2),
    ({"estimator": "spsa", "directions": 4}, 4, 8),
    ({"estimator": "natural", "directions": 1}, 1, 2),
    ({"estimator": "fzoo"}, 8, 9),
    ({"estimator": "fzoo", "directions": 3}, 3, 4),
]


@pytest.mark.parametrize(("options", "directions", "forwards"), OPTIONS)
def test_forwards_per_step(options: dict[str, Any], directions: int, forwards: int) -> None:
    given = config(**options)
    assert settle(given).directions == directions
    assert estimator_of(given).n_probes == forwards
    engine: Any = Toy(quadratic)
    found = estimate(engine, ROWS, given, 7)
    assert [d.seed for d in found.directions] == direction_seeds(given.seed, 7, directions)
    assert engine.n_probes == len(found.scores.losses) == forwards
    assert found.directions == estimate(engine, ROWS, given, 7).directions
    assert found.directions != estimate(engine, ROWS, given, 8).directions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "fzoo", "directions": 1}, "fzoo divides by the deviation"),
        ({"estimator": "fzoo", "damping": 2.0}, "--damping is for --estimator natural, not fzoo"),
        ({"estimator": "spsa", "damping": 2.0}, "--damping is for --estimator natural, not spsa"),
        ({"estimator": "natrual"}, "no estimator 'natrual'; did you mean 'natural'"),
        ({"estimator": "adam"}, "Known: feedback, natural, spsa, fzoo"),
        ({"estimator": "spsa", "sides": 1}, "--sides is for --estimator natural, not spsa"),
        ({"estimator": "fzoo", "sides": 2}, "--sides is for --estimator natural, not fzoo"),
        ({"sides": 3}, "sides must be less than 3"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"clip": 0}, "clip must be greater than 0"),
        ({"clip": "sometimes"}, "clip must be a number or 'adaptive'"),
    ],
)
def test_bad_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZoError, match=message):
        settle(config(**options))


def test_what_z_is_drawn_from() -> None:
    kinds = {name: estimator.distribution for name, estimator in ESTIMATORS.items()}
    assert {kinds[name] for name in PROBING if name != "fzoo"} == {NORMAL}
    assert kinds["fzoo"] == RADEMACHER


# ---- clipping ------------------------------------------------------------------------------------


def of(*slopes: float) -> tuple[Direction, ...]:
    return tuple(Direction(k, 2.5, 1.5, slope) for k, slope in enumerate(slopes))


def slopes(directions: tuple[Direction, ...]) -> list[float]:
    return [d.projected_grad for d in directions]


def test_without_a_limit_nothing_changes() -> None:
    clip = Clip(None)
    clip.remember(of(1, 1, 1))
    assert clip(of(1e30, -1e30)) == of(1e30, -1e30)


def test_a_constant_limit() -> None:
    clip = Clip(2.5)
    for _ in range(3):  # whatever came before
        assert clip(of(0, 2.5, -2.4, 3, -1e30)) == of(0, 2.5, -2.4, 2.5, -2.5)
        clip.remember(of(100, 100))


@pytest.mark.parametrize(
    ("history", "limit"),
    [
        ([2], 6),
        ([-2], 6),
        ([1, -5, 2], 6),
        ([1, -5, 2, 4], 9),
        ([1] * 51 + [100] * 49, 3),
        ([1] * 49 + [100] * 51, 300),
        ([100] * 60 + [1] * 100, 3),  # only the last 100 count
        ([1] * 60 + [100] * 51 + [1] * 49, 300),
        ([100] * 51 + [1] * 50, 151.5),
    ],
)
def test_adaptive_is_three_times_the_median_of_the_last_100(
    history: list[float], limit: float
) -> None:
    at_once, one_by_one = Clip("adaptive"), Clip("adaptive")
    at_once.remember(of(*history))
    for slope in history:
        one_by_one.remember(of(slope))
    for clip in (at_once, one_by_one):
        assert slopes(clip(of(1e9, -1e9))) == pytest.approx([limit, -limit])
        inside = of(0.99 * limit, -0.99 * limit, 0)
        assert clip(inside) == inside


def test_adaptive_without_a_history_has_no_limit() -> None:
    clip = Clip("adaptive")
    assert clip(of(1e30)) == of(1e30)
    assert clip(of(1e30)) == of(1e30)  # clipping alone is not remembering


def test_the_limit_does_not_depend_on_the_order_of_a_step() -> None:
    clip = Clip("adaptive")
    clip.remember(of(1))
    assert slopes(clip(of(50, 2, -50))) == [3, 2, -3]


def test_a_resumed_run_clips_as_an_uninterrupted_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    measured = [of(*(rng.standard_t(1.5, 2) * 1.1**step)) for step in range(150)]
    trajectory = Trajectory.create(tmp_path / "t.bin", {"directions": 2})
    clip, limits = Clip("adaptive"), []
    for step, directions in enumerate(measured):
        limits.append(clip(of(1e30))[0].projected_grad)
        directions = clip(directions)
        clip.remember(directions)
        trajectory.append(Record(step + 1, 0.1, directions))
    trajectory.close()
    records = list(Trajectory.load(tmp_path / "t.bin").records())
    assert (
        sum(slopes(r.directions) != slopes(m) for r, m in zip(records, measured, strict=True)) > 9
    )
    for step in (1, 2, 30, 99, 149):
        resumed = Clip("adaptive")
        for record in records[:step]:
            resumed.remember(record.directions)
        assert resumed(of(1e30))[0].projected_grad == limits[step]
        assert resumed(measured[step]) == records[step].directions


def test_slopes_of_zero_do_not_stop_a_run_for_good() -> None:
    clip = Clip("adaptive")
    clip.remember(of(0))
    assert slopes(clip(of(5))) == [5]
