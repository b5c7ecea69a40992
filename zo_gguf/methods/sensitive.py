"""`sensitive`: tune a fixed, sparse set of weights beside the quantized ones (SensZOQ, 2406.02913).

z ~ N(0, I) over the mask's entries of all matrices at once; the model is evaluated at
W + S(theta + eps z), with W as stored in the GGUF and S the scatter to the mask's positions, added
to each matrix product's output. Stored: one f32 master per entry, starting at the quantization
residual, so that the tuned entries start at full precision. Memory: 16 bytes per entry, and what
the optimizer keeps. Limits: 2-D weights of plain matrix products; the embedding is not tuned.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.delta import Delta
from zo_gguf.engine import Engine
from zo_gguf.entries import make_store
from zo_gguf.llama import default_threads, native_library
from zo_gguf.mask import Mask
from zo_gguf.native import Store


class Sensitive:
    """Entries of a mask, as `Method` describes.

    Raises:
        ZoError: The mask is missing or damaged.
    """

    def __init__(self, config: TuneConfig) -> None:
        self._config = config
        self.mask = Mask.load(config.mask)
        self._engine: Engine | None = None
        self._store: Store | None = None

    @property
    def base_sha256(self) -> str:
        """Hash of the tensors of the base GGUF."""
        return self.mask.header.base_sha256

    def theta0(self) -> NDArray[np.float32]:
        """The mask's residuals, (nnz,)."""
        return self.mask.theta0()

    def noise(self, seed: int) -> NDArray[np.float32]:
        """z(seed), (nnz,), from the engine if it is open, so that it is made once per step."""
        if self._engine is not None:
            return self._engine.noise(seed)
        if self._store is None:
            self._store = make_store(native_library(), self.mask, default_threads())
        return self._store.noise(seed)

    def open_engine(self) -> Engine:
        """Load the model with the mask."""
        config = self._config
        self._engine = Engine(
            config.model,
            mask=self.mask,
            n_threads=config.threads,
            ctx_tokens=config.ctx_tokens,
            n_gpu_layers=config.n_gpu_layers,
        )
        return self._engine

    def to_delta(self, theta: NDArray[np.float32], provenance: dict[str, Any]) -> Delta:
        """The learned masters at the mask's positions."""
        return Delta.from_mask(self.mask, theta, provenance)
