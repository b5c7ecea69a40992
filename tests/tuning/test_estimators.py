"""Estimators against formulas written out here, on losses that need no model.

Their options and clipping: test_estimator_options.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zo_gguf.config import TuneConfig
from zo_gguf.engine.batch import Scores
from zo_gguf.errors import ZoError
from zo_gguf.libzo import NORMAL, RADEMACHER, Probe
from zo_gguf.tuning.calibrate import unit_size
from zo_gguf.tuning.estimators import ESTIMATORS, estimate, estimator_of
from zo_gguf.tuning.estimators.base import Estimate
from zo_gguf.tuning.estimators.fzoo import Fzoo
from zo_gguf.tuning.estimators.spsa import Spsa
from zo_gguf.tuning.trajectory import Direction

N = 192
EPS = 1e-2
Loss = Callable[[np.ndarray, int], float]  # of theta, (N,), and an example's number


class Toy:
    """An engine whose loss is a known function of theta, and whose z is numpy's."""

    def __init__(self, loss: Loss, distribution: int = NORMAL) -> None:
        self.loss, self.distribution = loss, distribution
        self.theta = np.random.default_rng(5).standard_normal(N)
        self.parameters: Any = SimpleNamespace(delta=SimpleNamespace(edits={}))
        self.n_probes = 0
        self._noise: dict[int, np.ndarray] = {}

    def noise(self, seed: int) -> np.ndarray:
        if seed not in self._noise:
            z = np.random.default_rng(seed).standard_normal(N)
            self._noise[seed] = np.sign(z) if self.distribution == RADEMACHER else z
        return self._noise[seed]

    def at(self, probe: Probe, example: int) -> float:
        """One loss; scale 0 must not need a direction."""
        moved = probe.scale * self.noise(probe.seed) if probe.scale else 0.0
        return self.loss(self.theta + moved, example)

    def score(self, examples: Sequence[int], probes: Sequence[Probe]) -> Scores:
        self.n_probes += len(probes)
        losses = [[self.at(probe, example) for example in examples] for probe in probes]
        outcomes = list(np.array(losses).T[:, :, None])  # rows of one counted token
        return Scores(np.array(losses), np.full((len(probes), len(examples)), np.nan), 1, outcomes)


def quadratic(theta: np.ndarray, example: int) -> float:
    """Half a positive quadratic form around a point, both different for every example."""
    curvature, centre = _COEFFICIENTS[example]
    return float(0.5 * curvature @ (theta - centre) ** 2)


_RNG = np.random.default_rng(1)
_COEFFICIENTS = [(3 * _RNG.random(N), _RNG.standard_normal(N)) for _ in range(6)]
GRADIENT = np.random.default_rng(2).standard_normal(N)


def linear(theta: np.ndarray, example: int) -> float:
    """The same gradient for every example, another constant."""
    return float(GRADIENT @ theta) + 3 * example


def mean_loss(toy: Toy, probe: Probe, examples: Sequence[int]) -> float:
    return float(np.mean([toy.at(probe, example) for example in examples]))


def toy(loss: Loss, distribution: int = NORMAL) -> Any:
    return Toy(loss, distribution)


ROWS: Any = range(5)
FIRST: Any = [0]
SEEDS = [3, 2**64 - 1, 17, 40]

PROBING = [name for name, kind in ESTIMATORS.items() if kind.probes]


def config(**options: Any) -> TuneConfig:
    given = {"model": "m.gguf", "data": "d", "output": "o", "method": "norm", "eps": EPS}
    return TuneConfig(**given | options)


# ---- the formulas --------------------------------------------------------------------------------


def test_spsa() -> None:
    engine = toy(quadratic)
    measured = Spsa().estimate(engine, ROWS, SEEDS, EPS)
    assert [d.seed for d in measured.directions] == SEEDS
    for d in measured.directions:
        plus, minus = (mean_loss(engine, Probe(d.seed, side * EPS), ROWS) for side in (1, -1))
        assert (d.loss_plus, d.loss_minus) == (pytest.approx(plus), pytest.approx(minus))
        assert d.projected_grad == pytest.approx((plus - minus) / (2 * EPS), rel=1e-6)
    assert measured.scores.losses.shape == (2 * len(SEEDS), len(ROWS))
    assert engine.n_probes == len(measured.scores.losses)


def test_fzoo() -> None:
    engine = toy(quadratic, RADEMACHER)
    measured = Fzoo().estimate(engine, ROWS, SEEDS, EPS)
    here = mean_loss(engine, Probe(0, 0.0), ROWS)
    losses = np.array([mean_loss(engine, Probe(seed, EPS), ROWS) for seed in SEEDS])
    spread = np.sqrt(np.mean((losses - losses.mean()) ** 2))  # the biased one, as in its code
    for d, seed, loss in zip(measured.directions, SEEDS, losses, strict=True):
        assert d.seed == seed
        assert (d.loss_plus, d.loss_minus) == (pytest.approx(loss), pytest.approx(here))
        assert d.projected_grad == pytest.approx((loss - here) / spread, rel=1e-6)
    assert measured.scores.losses.shape == (len(SEEDS) + 1, len(ROWS))


def test_normalized_slopes_do_not_depend_on_the_loss_scale() -> None:
    def larger(theta: np.ndarray, example: int) -> float:
        return 1000 * quadratic(theta, example)

    runs = [Fzoo().estimate(toy(loss), ROWS, SEEDS, EPS) for loss in (quadratic, larger)]
    small, large = ([d.projected_grad for d in run.directions] for run in runs)
    np.testing.assert_allclose(small, large, rtol=1e-6)


def test_equal_losses_give_no_step() -> None:
    for name in PROBING:
        measured = estimate(toy(lambda theta, _: 2.0), ROWS, config(estimator=name), 0)
        assert [d.projected_grad for d in measured.directions] == [0.0] * len(measured.directions)
        assert measured.trouble() == "No probe changes the loss of any row"


def test_probes_that_all_move_the_loss_equally_give_no_step() -> None:
    def ditch(theta: np.ndarray, _: int) -> float:
        return 1.0 if (theta == engine.theta).all() else 1.5

    engine = toy(ditch)
    directions = Fzoo().estimate(engine, ROWS, SEEDS, EPS).directions
    assert [d.loss_plus - d.loss_minus for d in directions] == [0.5] * len(directions)
    assert [d.projected_grad for d in directions] == [0.0] * len(directions)


def test_losses_that_are_not_finite_are_noticed() -> None:
    measured = Spsa().estimate(toy(quadratic), ROWS, SEEDS, EPS)
    assert measured.trouble() is None
    for value in (np.nan, np.inf):
        with np.errstate(invalid="ignore"):
            broken = Spsa().estimate(toy(lambda theta, _, v=value: v), ROWS, SEEDS, EPS)
        assert "not finite" in str(broken.trouble())
    for d in (Direction(1, np.nan, 0, 0), Direction(1, 0, np.inf, 0)):
        broken = Estimate((*measured.directions, d), measured.scores)
        assert "not finite" in str(broken.trouble())
    broken = Estimate((Direction(1, 1, 1, -np.inf),), measured.scores)
    assert "not finite" in str(broken.trouble())


# ---- what the estimates are estimates of ---------------------------------------------------------


def test_spsa_is_an_unbiased_estimate_of_the_gradient() -> None:
    n = 4000
    engine = toy(linear)
    total = Spsa().estimate(engine, FIRST, range(n), EPS).gradient(engine.noise)
    # An entry of g z has the variance |gradient|^2 (1 + its share of it).
    error = np.linalg.norm(total - GRADIENT) / np.linalg.norm(GRADIENT)
    assert error == pytest.approx(np.sqrt((N + 1) / n), rel=0.3)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_fzoo_goes_along_the_gradient_with_steps_of_length_one() -> None:
    n = 4000
    engine = toy(linear, RADEMACHER)
    total = Fzoo().estimate(engine, FIRST, range(n), EPS).gradient(engine.noise)
    assert cosine(total, GRADIENT) == pytest.approx(1 / np.sqrt(1 + N / n), abs=0.005)
    assert np.linalg.norm(total) == pytest.approx(np.sqrt(1 + N / n), rel=0.05)


@pytest.mark.parametrize("estimator", PROBING)
def test_unit_size_is_that_of_an_entry_of_the_estimate(estimator: str) -> None:
    options = config(estimator=estimator, directions=16, examples_per_step=16)
    squares = []
    engine = toy(quadratic, estimator_of(options).distribution)
    engine.loss = lambda theta, example: quadratic(theta, example % len(_COEFFICIENTS))
    draw: Any = lambda step: range(16 * step, 16 * step + 16)  # noqa: E731
    for step in range(60):
        squares.append(estimate(engine, draw(step), options, step).gradient(engine.noise) ** 2)
    measured = unit_size(engine, draw, options)
    assert np.sqrt(np.mean(squares)) == pytest.approx(measured, rel=0.35)


def test_no_unit_where_nothing_changes() -> None:
    draw: Any = lambda step: ROWS  # noqa: E731
    with pytest.raises(ZoError, match="does not change"):
        unit_size(toy(lambda theta, _: 2.0), draw, config())
