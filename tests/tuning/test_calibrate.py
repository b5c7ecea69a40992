"""The search for eps, and what follows from it, on losses whose course is known."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zo_gguf.config import TuneConfig
from zo_gguf.config.tune import parse_units
from zo_gguf.errors import ZoError
from zo_gguf.libzo import Probe
from zo_gguf.tuning.calibrate import measure_noise, measure_units, resolve
from zo_gguf.tuning.optimizer import default_learning_rate

BEND = 20.0
BENT = 1 / 40  # by how much slopes have changed at the reach, by its definition


class Cubic:
    """L(eps z) = x + bend x^3 and rounding, where x = eps a(z) and a has a standard deviation of 1.

    Kinds of parameters, where there are several, bend in ways of their own and move alone.
    """

    def __init__(self, noise: float, bends: dict[str, float]) -> None:
        self.noise, self.bends = noise, bends
        self.units = dict.fromkeys(bends, 1.0)
        self.parameters: Any = SimpleNamespace(
            resolution=0.0, kinds=list(bends), set_units=self._set_units
        )

    def _set_units(self, units: dict[str, float]) -> None:
        self.units = units

    def losses(self, examples: Sequence[int], probes: Sequence[Probe]) -> np.ndarray:
        losses = []
        for probe in probes:
            rng = np.random.default_rng([probe.seed, int(abs(probe.scale) * 1e9), probe.scale > 0])
            loss = self.noise / np.sqrt(2) * rng.standard_normal()
            for kind, bend in self.bends.items():
                slope = np.random.default_rng([probe.seed, len(kind)]).standard_normal()
                x = probe.scale * self.units[kind] * slope
                loss += x + bend * x**3
            losses.append([loss] * len(examples))
        return np.array(losses)


class Saturating(Cubic):
    """Linear up to some 1e-4, flat from 1e-3 on."""

    def losses(self, examples: Sequence[int], probes: Sequence[Probe]) -> np.ndarray:
        near = [Probe(p.seed, float(np.tanh(1e3 * p.scale)) / 1e3) for p in probes]
        return super().losses(examples, near)


class Overflowing(Cubic):
    """No numbers beyond `limit`."""

    limit = math.inf

    def losses(self, examples: Sequence[int], probes: Sequence[Probe]) -> np.ndarray:
        found = super().losses(examples, probes)
        found[[abs(probe.scale) > self.limit for probe in probes]] = math.inf
        return found


@pytest.mark.parametrize("limit", [0.02, 0.1])  # below it is linear, all over
def test_the_search_ends_where_losses_do(limit: int) -> None:
    engine: Any = Overflowing(1e-6, {"weight": 0.0})
    engine.limit = limit
    assert 1e-3 < measure_noise(engine, [0] * 4).eps <= limit
    engine.limit = 1e-9
    with pytest.raises(ZoError, match="not finite at eps"):
        measure_noise(engine, [0] * 4)


def analytic_reach(bend: float, name: str = "weight") -> float:
    """Slopes along the search's eight directions are a + bend a^3 eps^2."""
    a = np.array([np.random.default_rng([k, len(name)]).standard_normal() for k in range(8)])
    rms = np.sqrt(np.mean(a**2) / np.mean((bend * a**3) ** 2))
    return float(np.sqrt(BENT * rms))


@pytest.mark.parametrize("noise", [1e-7, 1e-4, 3e-3])
def test_reach_is_where_slopes_bend_whatever_the_noise(noise: float) -> None:
    report = measure_noise(Cubic(noise, {"weight": BEND}), [0])
    assert report.reach == pytest.approx(analytic_reach(BEND), rel=0.2)


def test_eps_grows_with_the_noise() -> None:
    quiet, loud = (measure_noise(Cubic(noise, {"weight": BEND}), [0]) for noise in (1e-5, 1e-3))
    # The error (floor / 2 eps)^2 + (k eps^2)^2 is least where eps^3 is in proportion to the floor.
    assert loud.eps / quiet.eps == pytest.approx(100 ** (1 / 3), rel=0.3)


def test_reach_ends_where_nothing_was_looked_at() -> None:
    report = measure_noise(Cubic(1e-3, {"weight": 0.0}), [0])
    assert 0.25 <= report.reach <= 0.512


def test_a_loss_that_is_all_bent_at_the_first_eps() -> None:
    """Its differences hardly depend on eps there, as those of noise."""
    wide = measure_noise(Cubic(1e-6, {"weight": BEND}), [0])
    narrow = measure_noise(Saturating(1e-6, {"weight": BEND}), [0])
    assert wide.reach > 0.01
    assert 1e-6 < narrow.eps < 3e-4
    # tanh x bends by x^2 / 3 of its slope.
    assert narrow.reach == pytest.approx(1e-3 * np.sqrt(3 * BENT), rel=0.3)


def test_kinds_share_their_reach() -> None:
    engine = Cubic(1e-3, {"weight": BEND, "gain": BEND / 100})
    eps, reach, units = measure_units(engine, [0])
    alone = measure_noise(Cubic(1e-3, {"weight": BEND}), [0])
    assert reach == pytest.approx(alone.reach / np.sqrt(2))
    assert eps == pytest.approx(alone.eps / np.sqrt(2), rel=0.05)  # to two digits
    assert units["weight"] == 1
    assert units["gain"] > 2  # where noise is the same, the cube root of 100, up to the directions
    assert engine.units == units


# ---- all automatic options -----------------------------------------------------------------------


def resolved(engine: Any, **options: Any) -> tuple[TuneConfig, list[str]]:
    """`resolve` for 4 rows a step, which are drawn for 4 steps where they are measured."""
    draw: Any = lambda step: range(4 * step, 4 * step + 4)  # noqa: E731
    kinds = getattr(engine, "bends", {"gain": 0.0})
    trainable: Any = SimpleNamespace(
        kinds=list(kinds), farthest=math.inf, set_units=engine.parameters.set_units
    )
    given = TuneConfig(model="m", data="d", output="o", **options)
    return resolve(given, trainable, engine, draw)


def test_what_is_given_stays_and_nothing_is_measured() -> None:
    engine: Any = SimpleNamespace(n_threads=3, path="hook", parameters=SimpleNamespace(set_units=1))
    options = {"eps": 0.25, "learning_rate": 2.0, "threads": 1}
    config, said = resolved(engine, **options)
    assert config == TuneConfig(
        model="m", data="d", output="o", **options | {"threads": 3, "path": "hook"}
    )
    assert said == ["eps 0.25, learning rate 2"]


def test_eps_and_rate_come_from_one_search() -> None:
    engine: Any = Cubic(1e-4, {"gain": BEND})
    engine.n_threads, engine.path = 2, "hook"
    report = measure_noise(engine, range(16))  # type: ignore[arg-type]
    config, said = resolved(engine, iters=50)
    rate = default_learning_rate("adam", report.reach, 1.0, 50, 4 * 16)
    assert (config.eps, config.learning_rate) == (report.eps, rate)
    assert said == [report.render(), f"eps {report.eps:g}, learning rate {rate:g}"]
    config, said = resolved(engine, iters=50, eps=0.5)
    assert (config.eps, config.learning_rate, len(said)) == (0.5, rate, 1)
    config, _ = resolved(engine, iters=50, learning_rate=7.0)
    assert (config.eps, config.learning_rate) == (report.eps, 7.0)


def test_several_kinds_get_units_before_eps_and_rate() -> None:
    engine: Any = Cubic(1e-4, {"sparse": BEND, "gain": 25 * BEND})
    engine.n_threads, engine.path = 2, "hook"
    eps, reach, units = measure_units(engine, range(16))  # type: ignore[arg-type]
    config, said = resolved(engine, iters=500)
    assert config.unit == [f"{kind}={unit:.3g}" for kind, unit in units.items()]
    assert engine.units == parse_units(config.unit)
    assert config.eps == eps
    assert config.learning_rate == default_learning_rate("adam", reach, 1.0, 500, 64)
    assert said[0] == f"units {', '.join(config.unit)}"
    config, _ = resolved(engine, unit=["gain=2"], eps=0.1, learning_rate=1.0)
    assert config.unit == ["gain=2"]
