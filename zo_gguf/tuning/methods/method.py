"""What a method is."""

from collections.abc import Callable
from dataclasses import dataclass

from zo_gguf.config import TuneConfig
from zo_gguf.gguf_files.file import GgufFile
from zo_gguf.params.delta import Delta


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        start: From the options and the base to the parameters at their first theta.
        reads: Those of its options that other methods may not read.
    """

    start: Callable[[TuneConfig, GgufFile], Delta]
    reads: tuple[str, ...] = ()
