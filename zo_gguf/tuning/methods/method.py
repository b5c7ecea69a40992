"""What a method is."""

from collections.abc import Callable
from dataclasses import dataclass

from zo_gguf.config import TuneConfig
from zo_gguf.data.dataset import Draw
from zo_gguf.engine.engine import Engine
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta


@dataclass(frozen=True)
class Chosen:
    """What was chosen by looking at rows, and a sentence about it."""

    delta: Delta
    said: str


@dataclass(frozen=True)
class Method:
    """What is trained: one of `start` and `look`.

    Attributes:
        start: From the options and the base to the parameters at their first theta.
        look: The same for a method that must see rows in the model first, which is opened without
            parameters.
        reads: Those of its options that other methods may not read.
        rank: Its default rank; 0 where it has none.
    """

    start: Callable[[TuneConfig, GgufFile], Delta] | None = None
    look: Callable[[TuneConfig, Engine, Draw], Chosen] | None = None
    reads: tuple[str, ...] = ()
    rank: int = 0
