"""The estimators: how losses become an estimate of the gradient. One file and one line each."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from zo_gguf.config import TuneConfig
from zo_gguf.config.option import nearest
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.tuning.estimators.base import Estimate, Estimator, direction_seeds
from zo_gguf.tuning.estimators.feedback import Feedback
from zo_gguf.tuning.estimators.fzoo import Fzoo
from zo_gguf.tuning.estimators.natural import Natural
from zo_gguf.tuning.estimators.spsa import Spsa

ESTIMATORS: dict[str, type[Estimator]] = {
    "feedback": Feedback,
    "natural": Natural,
    "spsa": Spsa,
    "fzoo": Fzoo,
}


def estimator_of(config: TuneConfig) -> Estimator:
    """The estimator of a run, with its options.

    Raises:
        ZoError: There is no such estimator, or it cannot work with these options.
    """
    name = config.estimator or "natural"  # which trains whatever a method has
    if name not in ESTIMATORS:
        known = ", ".join(ESTIMATORS)
        raise ZoError(f"There is no estimator {name!r}{nearest(name, ESTIMATORS)} Known: {known}.")
    return ESTIMATORS[name].of(config)


Steps = Callable[[Sequence[Example], int], Estimate]  # rows of a step, steps done before


@contextmanager
def estimates(engine: Engine, config: TuneConfig) -> Iterator[Steps]:
    """Measure steps on an engine, which stands at theta whenever it is asked.

    Args:
        engine: The model.
        config: The run's options, with a number for eps where the estimator probes.
    """
    estimator = estimator_of(config)
    eps = math.nan if config.eps == "auto" else config.eps
    with estimator.on(engine) as measure:

        def step(examples: Sequence[Example], step: int) -> Estimate:
            seeds = direction_seeds(config.seed, step, estimator.directions)
            return measure(examples, seeds, eps)

        yield step


def estimate(
    engine: Engine, examples: Sequence[Example], config: TuneConfig, step: int
) -> Estimate:
    """Measure what the step after `step` steps needs; see `estimates`."""
    with estimates(engine, config) as measure:
        return measure(examples, step)
