"""The estimators: how losses become an estimate of the gradient. One file and one line each."""

from collections.abc import Sequence

from zo_gguf.config import TuneConfig
from zo_gguf.config.option import nearest
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine
from zo_gguf.errors import ZoError
from zo_gguf.tuning.estimators.base import Estimate, Estimator, direction_seeds
from zo_gguf.tuning.estimators.fzoo import Fzoo
from zo_gguf.tuning.estimators.natural import Natural
from zo_gguf.tuning.estimators.spsa import Spsa

ESTIMATORS: dict[str, type[Estimator]] = {
    "natural": Natural,
    "spsa": Spsa,
    "fzoo": Fzoo,
}


def estimator_of(config: TuneConfig) -> Estimator:
    """The estimator of a run, with its options.

    Raises:
        ZoError: There is no such estimator, or it cannot work with these options.
    """
    name = config.estimator
    if name not in ESTIMATORS:
        known = ", ".join(ESTIMATORS)
        raise ZoError(f"There is no estimator {name!r}{nearest(name, ESTIMATORS)} Known: {known}.")
    return ESTIMATORS[name].of(config)


def estimate(
    engine: Engine, examples: Sequence[Example], config: TuneConfig, step: int
) -> Estimate:
    """Measure what the step after `step` steps needs.

    Args:
        engine: The model, at theta.
        examples: The step's rows; the loss is the mean over them.
        config: The run's options, with a number for eps.
        step: Steps done.
    """
    estimator = estimator_of(config)
    seeds = direction_seeds(config.seed, step, estimator.directions)
    return estimator.estimate(engine, examples, seeds, float(config.eps))
