"""Optimizers against float64 formulas, the gradient estimate, schedules, seeds."""

import dataclasses
import functools

import numpy as np
import pytest

from zo_gguf.config import TuneConfig
from zo_gguf.system import in_blocks
from zo_gguf.tuning.estimators.base import direction_seeds, mean_of_directions
from zo_gguf.tuning.optimizer import (
    OPTIMIZERS,
    default_learning_rate,
    learning_rate,
)
from zo_gguf.tuning.trajectory import Direction

N = 50


def gradients(n_steps: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n_steps, N)).astype(np.float32)


def reference(name: str, steps: np.ndarray, lr: float) -> np.ndarray:
    """theta after all steps from 1, in float64, written from the papers' formulas."""
    theta, m, v = np.ones(N), np.zeros(N), np.zeros(N)
    for t, g in enumerate(steps.astype(np.float64), start=1):
        if name == "sgd":
            theta -= lr * g
        elif name == "momentum":
            m = 0.9 * m + 0.1 * g
            theta -= lr * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            theta -= lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    return theta


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_against_float64(name: str) -> None:
    steps = gradients(40)
    optimizer, theta = OPTIMIZERS[name](N), np.ones(N, np.float32)
    for g in steps:
        optimizer.update(theta, g, 0.05)
    assert theta.dtype == np.float32
    np.testing.assert_allclose(theta, reference(name, steps, 0.05), atol=2e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("block", [1, 7, N - 1, N])
def test_blocks_do_not_change_the_bits(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for size in (1 << 17, block):
        monkeypatch.setattr("zo_gguf.system._BLOCK", size)
        optimizer, theta = OPTIMIZERS[name](N), np.ones(N, np.float32)
        for g in gradients(5):
            optimizer.update(theta, g, 0.05)
        results.append(theta.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("block", [1, 7, N - 1, N])
def test_estimates_are_means_in_any_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z = dict(enumerate(gradients(3)))
    directions = [Direction(seed, 1.0, 0.5, 0.3 - seed) for seed in z]
    monkeypatch.setattr("zo_gguf.system._BLOCK", block)
    found = mean_of_directions(directions, z.__getitem__)
    mean = sum(d.projected_grad * z[d.seed].astype(np.float64) for d in directions) / len(z)
    np.testing.assert_allclose(found, mean, atol=1e-6)
    monkeypatch.undo()
    assert found.tobytes() == mean_of_directions(directions, z.__getitem__).tobytes()


def test_threads_have_the_callers_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_gguf.system._BLOCK", 7)
    large, product = np.full(N, 3e38, np.float32), np.empty(N, np.float32)

    def square(part: slice) -> None:
        np.multiply(large[part], large[part], out=product[part])

    with np.errstate(over="ignore"):
        in_blocks(N, square)
    assert np.isinf(product).all()
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        in_blocks(N, square)


def test_estimates_that_are_not_finite_warn_nobody() -> None:  # their theta is refused
    directions = [Direction(seed, 1.0, 0.5, 3e38) for seed in (1, 2)]
    large = np.full(N, 3e38, np.float32)
    assert np.isinf(mean_of_directions(directions, lambda _: large)).all()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_is_all_that_a_restart_needs(name: str) -> None:
    steps = gradients(20)
    whole, theta = OPTIMIZERS[name](N), np.ones(N, np.float32)
    for g in steps[:10]:
        whole.update(theta, g, 0.05)
    restarted, copy = OPTIMIZERS[name](N), theta.copy()
    for key, value in whole.state.items():
        restarted.state[key][...] = value
    for g in steps[10:]:
        whole.update(theta, g, 0.05)
        restarted.update(copy, g, 0.05)
    assert np.array_equal(theta.view(np.uint32), copy.view(np.uint32))


def test_gradient_estimate_is_the_mean_over_directions() -> None:
    noise = {1: np.arange(4, dtype=np.float32), 2: np.ones(4, np.float32)}
    directions = [Direction(1, 0, 0, 3.0), Direction(2, 0, 0, -1.0)]
    estimate = mean_of_directions(directions, noise.__getitem__)
    np.testing.assert_allclose(estimate, (3 * noise[1] - noise[2]) / 2)


def test_seeds_are_distinct_and_reproducible() -> None:
    seeds = [s for step in range(500) for s in direction_seeds(0, step, 3)]
    assert len(set(seeds)) == 1500
    assert seeds[:3] == direction_seeds(0, 0, 3)
    assert not set(seeds) & {s for step in range(500) for s in direction_seeds(1, step, 3)}


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1, 1), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)],
)
def test_schedules(schedule: str, middle: float, last: float) -> None:
    config = TuneConfig(
        model="m.gguf", data="d", output="o", iters=101, schedule=schedule, learning_rate=2.0
    )
    assert learning_rate(config, 0) == 2.0
    assert learning_rate(config, 50) == pytest.approx(2 * middle)
    assert learning_rate(config, 100) == pytest.approx(2 * last)
    single = dataclasses.replace(config, iters=1)
    assert learning_rate(single, 0) == 2.0


def test_default_rates_move_weights_equally_far() -> None:
    reach, slope = 0.05, 4.0
    adam, sgd = (default_learning_rate(name, reach, slope, 500, 16) for name in ("adam", "sgd"))
    assert sgd * slope == pytest.approx(adam, rel=0.05)
    rate = functools.partial(default_learning_rate, "adam")
    assert rate(2 * reach, slope, 500, 16) == pytest.approx(2 * adam, rel=0.05)
    assert rate(reach, slope, 1000, 16) == adam
    assert rate(reach, slope, 4000, 16) == pytest.approx(adam / 2, rel=0.05)
    # Four times as much measured in a step, in as many steps or a quarter of them.
    assert rate(reach, slope, 1000, 64) == adam
    assert rate(reach, slope, 250, 64) == pytest.approx(2 * adam, rel=0.05)
    assert rate(reach, slope, 10, 10**6) == reach  # and never more
