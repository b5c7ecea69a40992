"""What is measured before step 1: the noise floor, eps, units, the rate, probes in a decode.

llama.cpp rounds activations to 8 bits, so the loss is a staircase: perturbations far too small to
matter still change it. A finite difference at eps has an error of (floor / 2 eps) from this noise
and one of (curvature * eps^2) from the Taylor remainder. Both are measured on the model, the
quantization and the data at hand, and eps is put where their sum is smallest. Probes in one decode
read the base weights once, but their tokens sit in one attention matrix; which weighs more depends
on the model, the rows and the machine, so that too is measured.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from zo_gguf.config import TuneConfig
from zo_gguf.config.tune import parse_units
from zo_gguf.data.dataset import Draw, Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.libzo import Probe
from zo_gguf.tuning.estimators import estimate, estimator_of
from zo_gguf.tuning.line_search import NO_SLOPE, TRIES, search_rate
from zo_gguf.tuning.optimizer import default_learning_rate
from zo_gguf.tuning.trainable import Trainable

Array = NDArray[np.float64]
_MEASURED_ROWS = 16  # where those of one step are fewer, and too few to tell much
_TINY = 1e-6  # far below any weight: what it changes is rounding; finer than in-place storage
_FLOOR_SEEDS = 12
_SLOPE_SEEDS = 8
_FIRST, _LAST = 4e-3, 0.512
_MAX_FORWARDS = 2 * (_FLOOR_SEEDS + 12 * _SLOPE_SEEDS)  # of all rows, as a rule
_NONLINEAR = 0.2  # relative change of the slopes at which the ladder ends
_BENT = 1 / 40  # relative change of the rows' slopes up to which the loss counts as linear
_SAMPLE = 8  # directions that tell how large an estimate is
_CLEAR = 2.5  # times the noise from which on a change is one


def resolve(
    config: TuneConfig, trainable: Trainable, engine: Engine, draw: Draw
) -> tuple[TuneConfig, list[str]]:
    """Turn automatic options into numbers.

    Args:
        config: The run's options; what is given stays.
        trainable: What is trained, at its first theta; gets its units.
        engine: The model; gets its number of probes per decode.
        draw: The rows of each step.

    Returns:
        The options, so that a run with them does the same, and sentences that say what was found.

    Raises:
        ZoError: The loss does not react to perturbations, or is not finite.
    """
    estimator, said = estimator_of(config), list[str]()
    if not estimator.probes:
        return _resolve_gradients(config, trainable, engine, draw)
    n_rows = estimator.examples_per_step
    rows = [row for step in range(_measured_steps(n_rows)) for row in draw(step)]
    reach = None  # how far the loss is linear

    if measures_units(config, trainable):
        eps, reach, units = measure_units(engine, rows)
        config = replace(config, unit=[f"{kind}={unit:.3g}" for kind, unit in units.items()])
        trainable.set_units(parse_units(config.unit))
        said.append(f"units {', '.join(config.unit)}")
        if config.eps == "auto":
            config = replace(config, eps=eps)

    if config.probes_per_decode == "auto":
        seconds = choose_width(engine, rows[:n_rows], estimator.n_probes)
        config = replace(config, probes_per_decode=engine.probes_per_decode)
        if len(seconds) > 1:
            said.append(in_words(seconds))

    if config.eps == "auto" or (config.learning_rate is None and reach is None):
        report = measure_noise(engine, rows)
        reach = report.reach
        if config.eps == "auto":
            said.append(report.render())
            config = replace(config, eps=report.eps)

    if config.learning_rate is None:
        assert reach is not None  # measured with eps
        size = 1.0 if config.optimizer == "adam" else unit_size(engine, draw, config)
        n_slopes = n_rows * estimator.directions
        rate = default_learning_rate(
            config.optimizer, reach, size, config.n_steps, n_slopes, trainable.farthest
        )
        config = replace(config, learning_rate=rate)

    said.append(f"eps {config.eps:g}, learning rate {config.learning_rate:g}")
    return replace(config, threads=engine.n_threads, path=engine.path), said


def _resolve_gradients(
    config: TuneConfig, trainable: Trainable, engine: Engine, draw: Draw
) -> tuple[TuneConfig, list[str]]:
    """As `resolve`, for an estimator that needs a learning rate alone."""
    said = []
    if config.learning_rate is None:
        found = search_rate(config, trainable, engine, draw)
        config = replace(config, learning_rate=found.rate)
        said.append(found.render())
    said.append(f"learning rate {config.learning_rate:g}")
    return replace(config, threads=engine.n_threads, path=engine.path), said


def measures_units(config: TuneConfig, trainable: Trainable) -> bool:
    """Whether eps is measured for every kind of parameter on its own."""
    return len(trainable.kinds) > 1 and not config.unit


def max_forwards(config: TuneConfig, trainable: Trainable) -> int:
    """How often, at most as a rule, `resolve` sends the rows of a step through the model."""
    if not estimator_of(config).probes:
        return 0 if config.learning_rate else TRIES
    n_searches = int(config.eps == "auto" or config.learning_rate is None)
    if measures_units(config, trainable):
        n_searches = len(trainable.kinds)
    return n_searches * _MAX_FORWARDS * _measured_steps(estimator_of(config).examples_per_step)


def _measured_steps(n_rows: int) -> int:
    return max(1, _MEASURED_ROWS // n_rows)


# ---- noise floor and eps -------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseReport:
    """What was measured.

    Attributes:
        eps: The chosen perturbation size, in units of a weight.
        floor: Root mean square of L(+) - L(-) for perturbations that should change nothing.
        slope: Root mean square of the projected gradient.
        error: Expected relative error of a projected gradient at eps.
        reach: How far the loss is linear, in units of a weight: there, curvature has changed the
            slopes of single rows by a fortieth. Unlike eps it does not depend on the noise.
        difference: Expected |L(+) - L(-)| at eps (root mean square).
    """

    eps: float
    floor: float
    slope: float
    error: float
    reach: float

    @property
    def difference(self) -> float:
        """Expected root mean square of L(+) - L(-) at eps."""
        return 2 * self.eps * self.slope

    def render(self) -> str:
        """One sentence for people."""
        return (
            f"noise floor of L+ - L-: {self.floor:.1e}; eps {self.eps:.2g} gives "
            f"{self.difference:.1e}, {self.difference / max(self.floor, 1e-300):.0f} times as much "
            f"(expected error of a projected gradient: {100 * self.error:.1f} %)"
        )


def measure_noise(engine: Engine, examples: Sequence[Example]) -> NoiseReport:
    """Measure the noise floor and slopes at growing eps, and choose eps.

    Args:
        engine: The model, with trainable parameters.
        examples: Some rows; the floor falls with their number.

    Raises:
        ZoError: The loss does not react to perturbations at all, or is not finite.
    """
    tiny = max(_TINY, engine.parameters.resolution)
    still = _differences(engine, examples, tiny, range(1000, 1000 + _FLOOR_SEEDS))
    if not np.isfinite(still).all():
        raise ZoError(_not_finite(tiny))
    floor, floor_of_rows = _rms(still.mean(axis=1)), _rms(still)
    ladder: list[float] = []
    rungs: list[Array] = []  # projected gradients of every row, (n_seeds, n_rows)
    means: list[Array] = []  # of the mean loss, (n_seeds,)
    eps = first = _FIRST
    with tqdm(desc="choosing eps", unit="eps", disable=None, leave=False) as bar:
        while eps <= _LAST:
            moved = _differences(engine, examples, eps, range(_SLOPE_SEEDS))
            finite = bool(np.isfinite(moved).all())
            if not finite and len(means) >= 2:
                break
            if not finite and first <= 4 * tiny:
                raise ZoError(_not_finite(eps))
            if finite:
                rungs.append(moved / (2 * eps))
                means.append(rungs[-1].mean(axis=1))
                ladder.append(eps)
            bar.update(1)
            lower = not finite or (len(means) == 2 and _saturates(means, ladder, floor))
            if len(means) > 2 and _bends(means, ladder, floor):
                lower = _bends_at_once(means, ladder)
                if not lower or first <= 4 * tiny:
                    break
            if lower and first > 4 * tiny:
                # Not linear from the start: the parameters are large in number or in effect.
                ladder, rungs, means = [], [], []
                first = max(first / 8, 4 * tiny)
                eps = first / 2
            eps *= 2
    if tiny > _TINY:  # such a step changes the loss by more than noise
        floor = _less(floor, 2 * tiny * _rms(means[0]), floor / 10)
        floor_of_rows = _less(floor_of_rows, 2 * tiny * _rms(rungs[0]), floor_of_rows / 10)
    floor = max(floor, min(_unrest(means, ladder)))
    floor_of_rows = max(floor_of_rows, min(_unrest(rungs, ladder)))
    reach = _reach(np.array(ladder), np.stack(rungs), floor_of_rows)
    return _choose(np.array(ladder), np.stack(means), floor, reach)


def measure_units(
    engine: Engine, examples: Sequence[Example]
) -> tuple[float, float, dict[str, float]]:
    """How far each kind of trainable parameter may move.

    Kinds react on scales of their own: a norm's gain may change by a tenth where a weight may not.
    Each is measured alone; the engine's units are left as they were found best.

    Args:
        engine: The model, with several kinds of trainable parameters.
        examples: As for `measure_noise`.

    Returns:
        eps and reach for all kinds at once, smaller than those of one because their effects add up,
        and the unit of each kind.

    Raises:
        ZoError: As `measure_noise`.
    """
    kinds = engine.parameters.kinds
    found = {}
    for kind in kinds:
        engine.parameters.set_units({other: float(other == kind) for other in kinds})
        found[kind] = measure_noise(engine, examples)
    first = found[kinds[0]].eps
    units = {kind: found[kind].eps / first for kind in kinds}
    engine.parameters.set_units(units)
    reach = min(found[kind].reach / units[kind] for kind in kinds)
    together = np.sqrt(len(kinds))
    return float(f"{first / together:.2g}"), float(reach / together), units


def _differences(engine: Engine, examples: Sequence[Example], eps: float, seeds: range) -> Array:
    """L(theta + eps z) - L(theta - eps z) of every seed and row, (n_seeds, n_rows)."""
    probes = [Probe(seed, sign * eps) for seed in seeds for sign in (1.0, -1.0)]
    losses = engine.losses(examples, probes)
    with np.errstate(invalid="ignore"):  # inf - inf: the caller looks
        return np.asarray(losses[0::2] - losses[1::2], np.float64)


def _not_finite(eps: float) -> str:
    return (
        f"The loss is not finite at eps {eps:g}; check the model and the data with `zo-gguf eval`, "
        "or give a smaller --eps and a --learning-rate."
    )


def _unrest(rungs: list[Array], ladder: list[float]) -> list[float]:
    """Noise of a loss difference if noise alone moved the slopes, for every pair of rungs.

    Noise gives the same at every pair, curvature eight times as much at each as at the one before.
    So the smallest bounds the floor from above, and at the eps that matter: perturbations that
    should change nothing flip fewer of the activations' codes than real ones.
    """
    pairs = zip(rungs, rungs[1:], ladder, strict=False)
    return [2 * eps * _rms(after - before) / np.sqrt(1.25) for before, after, eps in pairs]


def _bends(rows: list[Array], ladder: list[float], floor: float) -> bool:
    """Whether the slopes moved from one rung to the next by more than noise explains."""
    unrest = _unrest(rows, ladder)
    return _moved(rows[-2], rows[-1]) > _NONLINEAR and unrest[-1] > _CLEAR * max(floor, min(unrest))


def _bends_at_once(rows: list[Array], ladder: list[float]) -> bool:
    """Whether curvature moved the slopes between the first two rungs already."""
    unrest = _unrest(rows, ladder)
    return _moved(rows[0], rows[1]) > _NONLINEAR and unrest[1] > _CLEAR * unrest[0]


def _saturates(rows: list[Array], ladder: list[float], floor: float) -> bool:
    """Whether the first two rungs move the loss equally far, and by much more than noise does."""
    near, far = (eps * _rms(slopes) for eps, slopes in zip(ladder, rows, strict=True))
    return far < 1.5 * near and 2 * near > 10 * floor


def _moved(before: Array, after: Array) -> float:
    """Relative change of the slopes from one rung to another."""
    return _rms(after - before) / max(_rms(after), 1e-300)


def _fit(ladder: Array, slopes: Array, floor: float) -> tuple[float, float, Array]:
    """Fit slope(eps) = g + k eps^2 for every column of slopes.

    Noise in the fit itself looks like slopes and curvature; it is known, so it can be taken out.

    Args:
        ladder: (n_rungs,) ascending eps.
        slopes: (n_rungs, n).
        floor: Noise of a loss difference; a slope's noise is floor / (2 eps), which sets weights.

    Returns:
        Root mean squares of g and k, and what of them is noise, (2,).
    """
    design = np.stack([np.ones_like(ladder), ladder**2], axis=1) * ladder[:, None]
    solution, *_ = np.linalg.lstsq(design, slopes * ladder[:, None], rcond=None)
    noise = np.sqrt(np.diag(np.linalg.inv(design.T @ design))) * (floor / 2)
    return _rms(solution[0]), _rms(solution[1]), noise


def _choose(ladder: Array, slopes: Array, floor: float, reach: float) -> NoiseReport:
    """Minimize the expected error over eps, from slopes of the mean loss, (n_rungs, n_seeds)."""
    g, k, noise = _fit(ladder, slopes, floor)
    if not g > 0:
        raise ZoError(NO_SLOPE)
    k = _less(k, noise[1], 1e-3 * k)
    grid = np.geomspace(ladder[0], ladder[-1], 200)
    error = np.sqrt((floor / (2 * grid)) ** 2 + (k * grid**2) ** 2) / g
    best = int(error.argmin())
    eps = float(f"{grid[best]:.2g}")
    return NoiseReport(eps=eps, floor=floor, slope=g, error=float(error[best]), reach=reach)


def _reach(ladder: Array, slopes: Array, floor: float) -> float:
    """See `NoiseReport`, from slopes of single rows, (n_rungs, n_seeds, n_rows).

    There are many more of those than of slopes of the mean loss, and they do not vanish where the
    mean does.
    """
    g, k, noise = _fit(ladder, slopes.reshape(len(ladder), -1), floor)
    g, k = _less(g, noise[0], 0.1 * g), _less(k, noise[1], 1e-3 * k)
    farthest = float(ladder[-1])  # that was looked at
    return farthest if k == 0 else min(float(np.sqrt(_BENT * g / k)), farthest)


def _less(value: float, noise: float, least: float) -> float:
    """A root mean square without the noise in it, but not below `least`."""
    return float(np.sqrt(max(value**2 - noise**2, least**2)))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def unit_size(engine: Engine, draw: Draw, config: TuneConfig) -> float:
    """Root mean square of an entry of the gradient estimate, for a default learning rate.

    Args:
        engine: The model, at the first theta.
        draw: The rows of each step; those of the first ones are measured.
        config: The run's options, with a number for eps.

    Raises:
        ZoError: The loss does not react to perturbations, or is not finite.
    """
    squares: list[float] = []
    n_directions = estimator_of(config).directions
    for step in range(-(-_SAMPLE // n_directions)):
        measured = estimate(engine, draw(step), config, step)
        squares += [d.projected_grad**2 for d in measured.directions]
    size = float(np.sqrt(np.mean(squares) / n_directions))
    if not size > 0:
        raise ZoError(NO_SLOPE)
    return size


# ---- probes per decode ---------------------------------------------------------------------------


_ROUNDS = 3
_WORTH = 0.03  # share of the time; less is noise
_EPS = 1e-2  # timing does not depend on it


def choose_width(engine: Engine, examples: Sequence[Example], n_probes: int) -> dict[int, float]:
    """Measure powers of two from one probe to all of a step, as far as the context holds them.

    Args:
        engine: The model, with trainable parameters; its `probes_per_decode` becomes the fastest.
        examples: The rows of a step.
        n_probes: Of a step.

    Returns:
        Seconds per probe for every number of probes tried, the one chosen first.
    """
    widths = [1]
    limit = min(n_probes, engine.widest(examples))
    while 2 * widths[-1] <= limit:
        widths.append(2 * widths[-1])
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for attempt in range(_ROUNDS + 1):  # the first one warms up
        for width in widths if len(widths) > 1 else []:
            engine.probes_per_decode = width
            probes = [Probe(seed, _EPS) for seed in range(widths[-1])]
            started = time.perf_counter()
            engine.score(examples, probes)
            if attempt > 0:
                seconds[width].append((time.perf_counter() - started) / len(probes))
    medians = {width: float(np.median(times or [0.0])) for width, times in seconds.items()}
    chosen = min(widths, key=lambda width: medians[width] * (1 + _WORTH * (width > 1)))
    engine.probes_per_decode = chosen
    return {width: medians[width] for width in sorted(widths, key=lambda w: (w != chosen, w))}


def in_words(seconds: dict[int, float]) -> str:
    """What `choose_width` found, for people."""
    chosen, *others = seconds
    tried = ", ".join(f"{seconds[w] / seconds[chosen]:.2f} times with {w}" for w in sorted(others))
    return f"{chosen} probe{'s' * (chosen > 1)} a decode (the time was {tried})"
