"""Estimators against formulas written out here, on losses that need no model.

Their options and clipping: test_estimator_options.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zo_gguf.config import TuneConfig
from zo_gguf.engine.engine import Probe, Scores
from zo_gguf.errors import ZoError
from zo_gguf.libzo import NORMAL, RADEMACHER
from zo_gguf.tuning.estimator import (
    distribution_of,
    estimate,
    fzoo,
    spsa,
    trouble,
    unit_size,
)
from zo_gguf.tuning.optimizer import gradient_estimate
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
SEEDS = [3, 2**64 - 1, 17, 40]


def config(**options: Any) -> TuneConfig:
    return TuneConfig(model="m.gguf", data="d", output="o", eps=EPS, **options)


# ---- the formulas --------------------------------------------------------------------------------


def test_spsa() -> None:
    engine = toy(quadratic)
    directions, scores = spsa(engine, ROWS, SEEDS, EPS)
    assert [d.seed for d in directions] == SEEDS
    for d in directions:
        plus, minus = (mean_loss(engine, Probe(d.seed, side * EPS), ROWS) for side in (1, -1))
        assert (d.loss_plus, d.loss_minus) == (pytest.approx(plus), pytest.approx(minus))
        assert d.projected_grad == pytest.approx((plus - minus) / (2 * EPS), rel=1e-6)
    assert scores.losses.shape == (2 * len(SEEDS), len(ROWS))
    assert engine.n_probes == len(scores.losses)


def test_fzoo() -> None:
    engine = toy(quadratic, RADEMACHER)
    directions, scores = fzoo(engine, ROWS, SEEDS, EPS)
    here = mean_loss(engine, Probe(0, 0.0), ROWS)
    losses = np.array([mean_loss(engine, Probe(seed, EPS), ROWS) for seed in SEEDS])
    spread = np.sqrt(np.mean((losses - losses.mean()) ** 2))  # the biased one, as in its code
    for d, seed, loss in zip(directions, SEEDS, losses, strict=True):
        assert d.seed == seed
        assert (d.loss_plus, d.loss_minus) == (pytest.approx(loss), pytest.approx(here))
        assert d.projected_grad == pytest.approx((loss - here) / spread, rel=1e-6)
    assert scores.losses.shape == (len(SEEDS) + 1, len(ROWS))


def test_normalized_slopes_do_not_depend_on_the_loss_scale() -> None:
    def larger(theta: np.ndarray, example: int) -> float:
        return 1000 * quadratic(theta, example)

    small, large = (
        [d.projected_grad for d in fzoo(toy(loss, RADEMACHER), ROWS, SEEDS, EPS)[0]]
        for loss in (quadratic, larger)
    )
    np.testing.assert_allclose(small, large, rtol=1e-6)


def test_equal_losses_give_no_step() -> None:
    for directions, scores in (
        spsa(toy(lambda theta, _: 2.0), ROWS, SEEDS, EPS),
        fzoo(toy(lambda theta, _: 2.0), ROWS, SEEDS, EPS),
    ):
        assert [d.projected_grad for d in directions] == [0.0] * len(directions)
        assert trouble(directions, scores) == "No probe changes the loss of any row"


def test_probes_that_all_move_the_loss_equally_give_no_step() -> None:
    def ditch(theta: np.ndarray, _: int) -> float:
        return 1.0 if (theta == engine.theta).all() else 1.5

    engine = toy(ditch)
    directions, _ = fzoo(engine, ROWS, SEEDS, EPS)
    assert [d.loss_plus - d.loss_minus for d in directions] == [0.5] * len(directions)
    assert [d.projected_grad for d in directions] == [0.0] * len(directions)


def test_losses_that_are_not_finite_are_noticed() -> None:
    directions, scores = spsa(toy(quadratic), ROWS, SEEDS, EPS)
    assert trouble(directions, scores) is None
    for value in (np.nan, np.inf):
        with np.errstate(invalid="ignore"):
            broken = spsa(toy(lambda theta, _, v=value: v), ROWS, SEEDS, EPS)
        assert "not finite" in trouble(*broken)
    for d in (Direction(1, np.nan, 0, 0), Direction(1, 0, np.inf, 0)):
        assert "not finite" in trouble([*directions, d], scores)
    assert "not finite" in trouble([Direction(1, 1, 1, -np.inf)], scores)


# ---- what the estimates are estimates of ---------------------------------------------------------


def test_spsa_is_an_unbiased_estimate_of_the_gradient() -> None:
    n = 4000
    engine = toy(linear)
    directions, _ = spsa(engine, [0], range(n), EPS)  # type: ignore[arg-type]
    total = gradient_estimate(directions, engine.noise)
    # An entry of g z has the variance |gradient|^2 (1 + its share of it).
    error = np.linalg.norm(total - GRADIENT) / np.linalg.norm(GRADIENT)
    assert error == pytest.approx(np.sqrt((N + 1) / n), rel=0.3)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_fzoo_goes_along_the_gradient_with_steps_of_length_one() -> None:
    n = 4000
    engine = toy(linear, RADEMACHER)
    directions, _ = fzoo(engine, [0], range(n), EPS)  # type: ignore[arg-type]
    total = gradient_estimate(directions, engine.noise)
    assert cosine(total, GRADIENT) == pytest.approx(1 / np.sqrt(1 + N / n), abs=0.005)
    assert np.linalg.norm(total) == pytest.approx(np.sqrt(1 + N / n), rel=0.05)


@pytest.mark.parametrize("estimator", ["spsa", "natural", "fzoo"])
def test_unit_size_is_that_of_an_entry_of_the_estimate(estimator: str) -> None:
    options = config(estimator=estimator, directions=16, examples_per_step=16)
    squares = []
    engine = toy(quadratic, distribution_of(options))
    engine.loss = lambda theta, example: quadratic(theta, example % len(_COEFFICIENTS))
    draw: Any = lambda step: range(16 * step, 16 * step + 16)  # noqa: E731
    for step in range(60):
        directions, _ = estimate(engine, draw(step), options, step)
        squares.append(gradient_estimate(directions, engine.noise) ** 2)
    measured = unit_size(engine, draw, options)
    assert np.sqrt(np.mean(squares)) == pytest.approx(measured, rel=0.35)


def test_no_unit_where_nothing_changes() -> None:
    draw: Any = lambda step: ROWS  # noqa: E731
    with pytest.raises(ZoError, match="does not change"):
        unit_size(toy(lambda theta, _: 2.0), draw, config())
