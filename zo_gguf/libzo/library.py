"""Loads libzo, and turns its status codes into errors.

The library binds to the libggml-base that llama_cpp has loaded already, so `load` must be called
after `import llama_cpp`.
"""

import ctypes
import functools
import sys
from ctypes import POINTER, c_float
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import zo_gguf
from zo_gguf.errors import ZoError
from zo_gguf.libzo.signatures import PROTOTYPES


@functools.cache
def load(engine_version: str) -> ctypes.CDLL:
    """Load libzo and check that it fits the engine.

    Args:
        engine_version: Version of the llama_cpp package that is loaded.

    Raises:
        ZoError: libzo is missing, or was built for another engine.
    """
    library = ctypes.CDLL(str(library_path()))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name, None)
        if function is None:
            raise ZoError(
                "libzo is older than the rest of zo-gguf; build it anew with: pip install . "
                "(in a checkout: python3 tools/dev.py setup)"
            )
        function.restype = result
        function.argtypes = arguments
    built_for = library.zo_engine_version().decode()
    if built_for != engine_version:
        raise ZoError(
            f"libzo was built for llama-cpp-python {built_for}, but {engine_version} is installed; "
            f"run: pip install llama-cpp-python=={built_for}"
        )
    if library.zo_check_engine() != 0:
        raise ZoError(
            f"The installed llama-cpp-python {engine_version} was compiled differently from what "
            "libzo expects; reinstall zo-gguf with: pip install --force-reinstall --no-deps zo-gguf"
        )
    return library


def library_path() -> Path:
    """Where libzo lies.

    Raises:
        ZoError: It was not built.
    """
    suffix = {"darwin": "libzo.dylib", "win32": "zo.dll"}.get(sys.platform, "libzo.so")
    candidates = [Path(folder) / "lib" / suffix for folder in zo_gguf.__path__]
    for path in candidates:
        if path.is_file():
            return path
    raise ZoError(
        f"{suffix} is not in {candidates[0].parent}; build it with: pip install . "
        "(in a checkout: python3 tools/dev.py setup)"
    )


def pointer(array: NDArray[Any], kind: Any) -> Any:
    """Pointer to a contiguous array's data, typed for ctypes."""
    assert array.flags.c_contiguous
    return array.ctypes.data_as(POINTER(kind))


class Library:
    """libzo with every failing status raised as an error."""

    def __init__(self, engine_version: str) -> None:
        self.functions = load(engine_version)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status.

        Raises:
            ZoError: The status is not ZO_OK; the text is zo_last_error's.
        """
        if getattr(self.functions, name)(*arguments) != 0:
            raise ZoError(f"{self.functions.zo_last_error().decode()}.")


def floats(values: NDArray[np.float32]) -> Any:
    """Pointer to an array's values as f32, which it keeps alive."""
    return pointer(np.ascontiguousarray(values, dtype=np.float32), c_float)


def address(function: Any) -> int:
    """Where a native function lies."""
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value is not None
    return value
