"""`feedback`: the gradient itself, from one forward pass and a reverse pass past attention.

See `engine/feedback.py` for what it is and how close it comes to backpropagation. It takes no
random directions and no perturbation; it reaches the parameters of `lora-fa`, and of `norm` where
norms stand on the way. A step's gradient is as long as theta and is not recorded, so a run that was
killed makes the steps since its last checkpoint again, which gives the same bits.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Example
from zo_gguf.engine.batch import Scores
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.feedback import FeedbackPass, Gradients
from zo_gguf.errors import ZoError
from zo_gguf.params.delta import Delta
from zo_gguf.params.kinds import LowRank
from zo_gguf.tuning.estimators.base import Estimate, Estimator, Measure
from zo_gguf.tuning.trajectory import Direction

F32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Feedback(Estimator):
    """See the head of this file."""

    probes: ClassVar[bool] = False

    examples_per_step: int = 8
    directions: int = 1
    iters: int = 80

    @classmethod
    def of(cls, config: TuneConfig) -> Self:
        """As `Estimator.of`.

        Raises:
            ZoError: An option is given that belongs to random directions.
        """
        given = {"directions": config.directions not in (None, 1), "clip": config.clip is not None}
        for name in filter(given.get, given):
            raise ZoError(f"--{name} is for estimators of random directions; leave it out.")
        return super().of(config)

    @property
    def n_probes(self) -> int:
        """One: the reverse pass costs little beside it."""
        return 1

    def estimate(
        self, engine: Engine, examples: Sequence[Example], seeds: Sequence[int], eps: float
    ) -> Estimate:
        """See `Estimator.estimate`; `seeds` and `eps` are not used."""
        with self.on(engine) as measure:
            return measure(examples, seeds, eps)

    @contextmanager
    def on(self, engine: Engine) -> Iterator[Measure]:
        """See `Estimator.on`."""
        delta = _reachable(engine)
        factors = {name: edit.right[0] for name, edit in delta.low_rank.items()}
        with FeedbackPass(engine, factors, list(delta.gains)) as feedback:

            def measure(examples: Sequence[Example], seeds: Sequence[int], eps: float) -> Estimate:
                return _estimate(feedback.gradients(examples), delta)

            yield measure


def _reachable(engine: Engine) -> Delta:
    """What the engine trains.

    Raises:
        ZoError: Some of it has no gradient.
    """
    delta = engine.parameters.delta
    products = all(edit.kind == "lora-fa" for edit in delta.low_rank.values())
    if delta.tensors or delta.live or not products:
        raise ZoError(
            f"--estimator feedback trains --method lora-fa or norm, not {delta.header.method}; "
            "take --estimator natural."
        )
    return delta


def _estimate(found: Gradients, delta: Delta) -> Estimate:
    gradient = np.empty(delta.nnz, np.float32)
    for name, edit, part in delta.parts():
        if isinstance(edit, LowRank):
            gradient[part] = np.float32(edit.scale) * found.factors[name].reshape(-1)
        else:
            gradient[part] = found.gains[name]
    loss = float(found.losses.mean())
    # What the record has of the gradient: its length, and a checksum in place of a seed.
    length = float(np.sqrt(np.square(gradient, dtype=np.float64).sum()))
    along = Direction(zlib.crc32(gradient.data), loss, loss, length)
    scores = Scores(found.losses[np.newaxis], found.correct[np.newaxis], found.n_tokens)
    return Estimate((along,), scores, gradient)
