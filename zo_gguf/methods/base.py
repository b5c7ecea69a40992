"""What the step loop asks of a method."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zo_gguf.config import TuneConfig
from zo_gguf.delta import Delta
from zo_gguf.engine import Engine


class Method(Protocol):
    """The trainable parameters of a run.

    Constructing one reads and checks the files that define them, but loads no model, so that a
    trajectory can be replayed without it.
    """

    def __init__(self, config: TuneConfig) -> None: ...

    @property
    def base_sha256(self) -> str:
        """Hash of the tensors of the base GGUF."""

    def theta0(self) -> NDArray[np.float32]:
        """The masters before the first step, (nnz,)."""

    def noise(self, seed: int) -> NDArray[np.float32]:
        """z(seed), (nnz,); needs no model."""

    def open_engine(self) -> Engine:
        """Load the model with these parameters."""

    def to_delta(self, theta: NDArray[np.float32], provenance: dict[str, Any]) -> Delta:
        """The learned masters as a file can hold them."""
