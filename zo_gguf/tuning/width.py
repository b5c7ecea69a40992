"""How many probes share a decode: what is fastest here, by measurement.

Probes in one decode read the base weights once, but their tokens sit in one attention matrix. Which
weighs more depends on the model, the rows and the machine.
"""

import time
from collections.abc import Sequence

import numpy as np

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.engine import Engine, Probe

_ROUNDS = 3
_WORTH = 0.03  # share of the time; less is noise
_EPS = 1e-2  # timing does not depend on it


def choose_width(
    engine: Engine, examples: Sequence[Example], config: TuneConfig
) -> dict[int, float]:
    """Measure powers of two from one probe to all of a step, as far as the context holds them.

    Args:
        engine: The model, with trainable parameters; its `probes_per_decode` becomes the fastest.
        examples: The rows of a step.
        config: The run's options.

    Returns:
        Seconds per probe for every number of probes tried, the one chosen first.
    """
    widths = [1]
    limit = min(config.forwards_per_step, engine.widest(examples))
    if config.estimator != "grzo":  # whose rows have probes of their own
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
