"""Course of the learning rate over a run."""

import math

from zo_gguf.config import TuneConfig

_LAST = 0.1  # share of the learning rate left at the end of linear and cosine schedules


def learning_rate(config: TuneConfig, step: int) -> float:
    """Learning rate of the step after `step` steps, a pure function of both.

    Args:
        config: With a resolved `learning_rate`; linear and cosine fall to a tenth of it.
        step: Steps done, 0 <= step < iters.
    """
    assert config.learning_rate is not None
    done = step / max(1, config.iters - 1)
    share = {
        "constant": 1.0,
        "linear": 1 - (1 - _LAST) * done,
        "cosine": _LAST + (1 - _LAST) * (1 + math.cos(math.pi * done)) / 2,
    }[config.schedule]
    return config.learning_rate * share
