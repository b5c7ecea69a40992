"""What a run trains: the method's parameters, in the engine or, for a replay, without one."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw
from zo_gguf.engine.engine import Engine
from zo_gguf.engine.model import default_threads, native_library
from zo_gguf.engine.parameters import Parameters
from zo_gguf.errors import ZoError
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta
from zo_gguf.params.sparse_file import digest
from zo_gguf.tuning.estimators import estimator_of
from zo_gguf.tuning.methods import look, looks_at_rows, start

Vector = NDArray[np.float32]


class Trainable:
    """The parameters of a run.

    Making one reads and checks the files that define them, but loads no model. Methods that choose
    by looking at rows have no parameters before `look`, unless a first `delta` is given.

    Args:
        config: The run's options, settled.
        first: What an earlier `look` chose, at its first theta.

    Attributes:
        theta0_sha256: Hash of the first theta.

    Raises:
        ZoError: A file or option cannot be used.
    """

    def __init__(self, config: TuneConfig, first: Delta | None = None) -> None:
        self._config = config
        self._gguf = GgufFile(config.model)
        self._engine: Engine | None = None
        self._own: Parameters | None = None
        self._delta: Delta | None = None
        if not looks_at_rows(config):
            first = start(config, self._gguf)
        if first is not None:
            first.check_base(self._gguf)
            self._take(first)

    @property
    def delta(self) -> Delta:
        """What is trained.

        Its theta is the run's only one: steps change it in place, and the engine, checkpoints and
        the optimizer's state share it.
        """
        assert self._delta is not None  # since `look`
        return self._delta

    def _take(self, first: Delta) -> None:
        self._delta = first
        self.theta0_sha256 = digest(self.delta.theta)
        slices = self.delta.edit_slices()
        self._signs = {  # of scales that are trained as they are
            name: np.sign(self.delta.theta[slices[name]]).astype(np.int8)
            for name, edit in self.delta.live.items()
            if edit.kind == "scale" and not edit.relative
        }

    def look(self, engine: Engine, draw: Draw) -> str:
        """Choose what is trained, where that takes rows and was not done; says what was chosen.

        Raises:
            ZoError: Nothing can be chosen.
        """
        if self._delta is not None:
            return ""
        chosen = look(self._config, engine, draw)
        self._take(chosen.delta)
        engine.set_delta(self.delta)
        return chosen.said

    @property
    def base_sha256(self) -> str:
        """Hash of the tensors of the base GGUF."""
        return self.delta.header.base_sha256

    def place(self, step: int) -> None:
        """Put the parameters at theta, which `step` steps led to."""
        self._parameters.write(self.delta.theta, step)

    def units(self) -> Vector | None:
        """The unit of every parameter, (nnz,); None where all are 1."""
        return self._parameters.units()

    def set_units(self, units: Mapping[str, float]) -> None:
        """See `Parameters.set_units`.

        Raises:
            ZoError: A kind is none of those that are trained.
        """
        for kind in units:
            if kind not in self.kinds:
                trained = ", ".join(self.kinds)
                raise ZoError(f"unit {kind!r} is no kind that this run trains; those: {trained}.")
        self._parameters.set_units(units)

    @property
    def kinds(self) -> list[str]:
        """Kinds of parameters."""
        return self._parameters.kinds

    @property
    def farthest(self) -> float:
        """How far weights may move before most outgrow a method's threshold of magnitude."""
        limits = [edit.limit for edit in self.delta.live.values()]
        return min(limits, default=math.inf) / 2 / self._parameters.live_unit

    @property
    def n_lasting(self) -> int:
        """Masters, from the first one on, that mean the same in the whole run: no subspace's."""
        renewed = [edit.size for edit in self.delta.low_rank.values() if edit.refresh > 0]
        return int(self.delta.theta.size) - sum(renewed)

    def begins_anew(self, step: int) -> bool:
        """Whether the step after `step` steps trains other subspaces than the one before."""
        edits = self.delta.low_rank.values()
        return step > 0 and any(edit.window(step) != edit.window(step - 1) for edit in edits)

    def confine(self) -> None:
        """Keep the masters of scales, in place, where their scales keep their signs."""
        slices = self.delta.edit_slices()
        for name, edit in self.delta.live.items():
            if edit.kind == "scale":
                edit.confine(self.delta.theta[slices[name]], self._signs.get(name))

    def noise(self, seed: int) -> Vector:
        """z(seed), (nnz,), where the parameters stand; needs no model."""
        return self._parameters.noise(seed)

    @property
    def _parameters(self) -> Parameters:
        if self._engine is not None:
            return self._engine.parameters
        if self._own is None:
            self._own = Parameters(
                native_library(),
                self.delta,
                self._gguf,
                self._config.threads or default_threads(),
                estimator_of(self._config).distribution,
            )
        return self._own

    def open_engine(self) -> Engine:
        """Load the model with these parameters."""
        config = self._config
        width = config.probes_per_decode
        self._engine = Engine(
            self._gguf,
            delta=self._delta,
            n_threads=config.threads,
            ctx_tokens=config.ctx_tokens,
            n_gpu_layers=config.n_gpu_layers,
            probes_per_decode=width if isinstance(width, int) else 1,
            distribution=estimator_of(config).distribution,
            path=config.path,
        )
        return self._engine

    def to_delta(self, provenance: dict[str, Any]) -> Delta:
        """The learned masters as a file can hold them; theta is shared."""
        return self.delta.with_theta(self.delta.theta, provenance)
