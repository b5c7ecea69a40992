"""Estimator `natural` against softmax regression in numpy, where the Fisher matrix is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tuning.test_estimators import EPS as EPS_OF_TOYS
from tests.tuning.test_estimators import config, linear, quadratic, toy
from zo_gguf.engine.batch import Scores
from zo_gguf.libzo import Probe
from zo_gguf.tuning.estimators import estimate
from zo_gguf.tuning.estimators.natural import Natural, natural_slopes, slopes_and_fisher
from zo_gguf.tuning.estimators.spsa import Spsa

N_WEIGHTS, N_CHOICES = 40, 3
EPS = 1e-4


class Softmax:
    """An engine over rows with choices: logits = features @ theta, cross-entropy.

    All rows share a stiff part: a few combinations of weights move all answers alike.
    """

    def __init__(self, stiffness: float, n_rows: int = 400, *, soft: bool = False) -> None:
        rng = np.random.default_rng(3)
        shared = stiffness * rng.standard_normal((1, N_CHOICES, N_WEIGHTS))
        own = rng.standard_normal((n_rows, N_CHOICES, N_WEIGHTS))
        self.features = (shared + own) / np.sqrt(N_WEIGHTS)
        self.theta = np.zeros(N_WEIGHTS)
        basis = np.linalg.qr(shared[0].T)[0]
        truth = 3 * rng.standard_normal(N_WEIGHTS)
        truth -= basis @ (basis.T @ truth)  # nothing is to be learned in the stiff part
        chance = self.probabilities(truth, range(n_rows))
        self.targets = np.eye(N_CHOICES)[[rng.choice(N_CHOICES, p=p) for p in chance]]
        if soft:
            self.targets = rng.dirichlet(np.ones(N_CHOICES), n_rows)
        self.parameters = SimpleNamespace(delta=SimpleNamespace(edits={}))

    def noise(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(N_WEIGHTS).astype(np.float32)

    def probabilities(self, theta: np.ndarray, rows: Any) -> np.ndarray:
        logits = self.features[list(rows)] @ theta
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def residuals(self, theta: np.ndarray, rows: Any) -> np.ndarray:
        return np.asarray(self.probabilities(theta, rows) - self.targets[list(rows)])

    def losses(self, theta: np.ndarray, rows: Any) -> np.ndarray:
        cross = self.targets[list(rows)] * np.log(self.probabilities(theta, rows))
        return np.asarray(-cross.sum(axis=1))

    def score(self, rows: Any, probes: list[Probe]) -> Scores:
        points = [self.theta + probe.scale * self.noise(probe.seed) for probe in probes]
        losses = np.array([self.losses(point, rows) for point in points])
        residuals = np.array([self.residuals(point, rows) for point in points])
        targets = list(self.targets[list(rows)])
        return Scores(losses, np.zeros_like(losses), 1, list(residuals.swapaxes(0, 1)), targets)

    def fisher(self, theta: np.ndarray, rows: Any) -> np.ndarray:
        """Mean over rows of the covariance of the gradient, answers drawn from the model."""
        p, x = self.probabilities(theta, rows), self.features[list(rows)]
        centred = x - np.einsum("rc,rcw->rw", p, x)[:, None]
        return np.einsum("rc,rcv,rcw->vw", p, centred, centred) / len(p)

    def gradients(self, theta: np.ndarray, rows: Any) -> np.ndarray:
        return np.einsum("rc,rcw->rw", self.residuals(theta, rows), self.features[list(rows)])


def engine(stiffness: float = 1.0, **options: Any) -> Any:
    return Softmax(stiffness, **options)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("one_sided", "eps"), [(False, EPS), (True, EPS), (True, 0.5)])
def test_slopes_and_fisher_in_the_span_of_the_directions(
    one_sided: bool, eps: float, soft: bool
) -> None:
    """On one side exact for any eps, as these logits are linear."""
    model, rows, seeds = engine(soft=soft), range(9), [1, 2, 3, 4, 5]
    model.theta = np.random.default_rng(0).standard_normal(N_WEIGHTS)
    z = np.array([model.noise(seed) for seed in seeds], np.float64)
    probes = [Probe(seed, side * eps) for seed in seeds for side in (1.0, -1.0)]
    if one_sided:
        probes = [Probe(0, 0.0), *probes[::2]]
    slopes, information = slopes_and_fisher(model.score(rows, probes), eps, one_sided)
    exact = z @ model.fisher(model.theta, rows) @ z.T
    np.testing.assert_allclose(information, exact, rtol=1e-4, atol=1e-6 * np.abs(exact).max())
    gradient = model.gradients(model.theta, rows).mean(axis=0)
    np.testing.assert_allclose(slopes, z @ gradient, rtol=1e-4)


def test_fisher_of_rows_with_few_and_many_tokens() -> None:
    rng = np.random.default_rng(0)
    slopes = [rng.standard_normal((3, n)) for n in (1, 5, 2)]  # (n_directions, n_tokens)
    sides = np.array([EPS, -EPS])[None, :, None]
    outcomes = [(1.5 + sides * s[:, None]).reshape(6, -1) for s in slopes]
    losses = np.stack([outcome.mean(axis=1) for outcome in outcomes], axis=1)
    scores = Scores(losses, np.full_like(losses, np.nan), 8, outcomes)
    expected = sum(np.outer(token, token) / s.shape[1] for s in slopes for token in s.T) / 3
    found, information = slopes_and_fisher(scores, EPS)
    np.testing.assert_allclose(information, expected, rtol=1e-6)
    np.testing.assert_allclose(found, np.mean([s.mean(axis=1) for s in slopes], axis=0), rtol=1e-6)


def test_tokens_that_the_model_itself_draws_have_no_slope() -> None:
    """Not on one side either, however far it is, where their mean loss rises by a divergence."""
    before, after = np.array([0.5, 0.25, 0.25]), np.array([[0.2, 0.5, 0.3], [0.1, 0.25, 0.65]])
    drawn = [0, 0, 1, 2]  # as often as `before` says
    outcome = -np.log(np.vstack([before, after]))[:, drawn]
    losses = outcome.mean(axis=1, keepdims=True)
    scores = Scores(losses, np.full_like(losses, np.nan), 4, [outcome])
    slopes, _ = slopes_and_fisher(scores, 0.5, one_sided=True)
    assert (losses[1:] > losses[0] + 0.1).all()
    np.testing.assert_allclose(slopes, 0.0, atol=1e-12)


def test_one_token_that_becomes_likely_does_not_outweigh_the_others() -> None:
    outcome = np.array([[12.0, 3.0], [0.0, 3.2]])
    scores = Scores(outcome.mean(axis=1, keepdims=True), np.full((2, 1), np.nan), 2, [outcome])
    (slope,), _ = slopes_and_fisher(scores, 1.0, one_sided=True)
    assert slope == pytest.approx((1 - 12 * np.e + 1 - np.exp(-0.2)) / 2)


def test_certain_answers_have_no_response() -> None:
    right = np.array([0.0, 1.0, 0.0])
    scores = Scores(np.zeros((2, 1)), np.ones((2, 1)), 1, [np.zeros((2, 3))], [right])
    assert np.array_equal(slopes_and_fisher(scores, EPS)[1], [[0.0]])
    assert np.array_equal(natural_slopes(np.zeros(1), np.zeros((1, 1)), 0.1), [0.0])


@pytest.mark.parametrize("one_sided", [False, True])
def test_an_answer_that_is_rounded_to_certainty_has_no_response(one_sided: bool) -> None:
    right = np.array([0.0, 0.0, 1.0])
    near, sure = [[2e-16, -2e-16, 0.0]], [[0.0, 0.0, 0.0]]
    probes = np.array(sure + near + sure) if one_sided else np.array(near + sure + sure + near)
    scores = Scores(np.zeros((len(probes), 1)), np.ones((len(probes), 1)), 1, [probes], [right])
    slopes, information = slopes_and_fisher(scores, 0.05, one_sided)
    np.testing.assert_allclose(slopes, 0.0, atol=1e-9)
    np.testing.assert_allclose(information, 0.0, atol=1e-9)


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_step_is_that_of_the_whole_space_where_the_directions_span_it(one_sided: bool) -> None:
    model, rows = engine(), range(300)
    estimator = Natural(damping=1e-9, sides=1 if one_sided else 2)
    measured = estimator.estimate(model, rows, range(N_WEIGHTS), EPS)
    step = N_WEIGHTS * measured.gradient(model.noise)
    gradient = model.gradients(model.theta, rows).mean(axis=0)
    expected = np.linalg.solve(model.fisher(model.theta, rows), gradient)
    np.testing.assert_allclose(step, expected, atol=2e-3 * np.abs(expected).max())


def test_much_damping_leaves_the_plain_slopes() -> None:
    model, rows, seeds = engine(), range(8), [7, 8, 9]
    damped = Natural(damping=1e6).estimate(model, rows, seeds, EPS).directions
    plain = Spsa().estimate(model, rows, seeds, EPS).directions
    ratios = [a.projected_grad / b.projected_grad for a, b in zip(damped, plain, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-4)
    assert [(d.seed, d.loss_plus, d.loss_minus) for d in damped] == [
        (d.seed, d.loss_plus, d.loss_minus) for d in plain
    ]


def test_the_size_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    slopes, root = rng.standard_normal(4), rng.standard_normal((4, 9))
    small = natural_slopes(slopes, root @ root.T, 0.1)
    large = natural_slopes(100 * slopes, 100**2 * root @ root.T, 0.1)
    np.testing.assert_allclose(small, 100 * large, rtol=1e-9)
    assert natural_slopes(np.array([0.5]), np.array([[16.5]]), 0.1)[0] == pytest.approx(0.5 / 18.15)


def test_slopes_of_zero_give_no_step() -> None:
    rows: Any = range(4)
    measured = Natural().estimate(toy(lambda theta, _: 2.0), rows, [1, 2], 1e-2)
    assert [d.projected_grad for d in measured.directions] == [0.0, 0.0]


def test_losses_that_are_not_finite_are_passed_on() -> None:
    rows: Any = range(4)
    for value in (np.nan, np.inf):
        with np.errstate(invalid="ignore"):
            broken = Natural().estimate(toy(lambda theta, _, v=value: v), rows, [1, 2], 1e-2)
        assert "not finite" in (broken.trouble() or "")


def test_rows_without_choices_are_enough() -> None:
    rows: Any = range(5)
    given = config(estimator="natural", directions=4, sides=2)
    directions = estimate(toy(quadratic), rows, given, 0).directions
    seeds = [d.seed for d in directions]
    of_rows = [Spsa().estimate(toy(quadratic), [row], seeds, EPS_OF_TOYS) for row in rows]
    by_row = np.array([[d.projected_grad for d in row.directions] for row in of_rows]).T
    information = by_row @ by_row.T / 5
    damped = information + np.trace(information) / 4 * np.eye(4)
    expected = np.linalg.solve(damped, by_row.mean(axis=1))
    np.testing.assert_allclose([d.projected_grad for d in directions], expected, rtol=1e-6)


def test_the_step_goes_down() -> None:
    rows: Any = range(4)
    for step in range(20):
        given = config(estimator="natural", directions=8, damping=0.3)
        directions = estimate(toy(linear), rows, given, step).directions
        slopes = [d.loss_plus - d.loss_minus for d in directions]
        assert np.dot(slopes, [d.projected_grad for d in directions]) > 0


def learn(estimator: str, rate: float, n_forwards: int = 4000) -> float:
    """Excess loss over all rows after sgd with as many forwards of a row, from 0."""
    model = engine(12.0)
    options = {"damping": 0.1} if estimator == "natural" else {}
    given = config(estimator=estimator, directions=8, examples_per_step=4, **options)
    rng = np.random.default_rng(0)
    for step in range(n_forwards // (8 * 4)):
        rows = rng.choice(len(model.targets), 4, replace=False)
        gradient = estimate(model, rows, given, step).gradient(model.noise)
        model.theta = model.theta - rate * gradient
    return float(model.losses(model.theta, range(len(model.targets))).mean())


def test_a_stiff_combination_of_weights_does_not_hold_up_the_others() -> None:
    plain = min(learn("spsa", rate) for rate in (1e-4, 1e-3, 1e-2, 1e-1))
    better = min(learn("natural", rate) for rate in (0.3, 1.0, 3.0))
    start = float(engine(12.0).losses(np.zeros(N_WEIGHTS), range(400)).mean())
    assert start - better > 10 * (start - plain)
