"""ctypes over native/zo.h, nothing else: signatures, status codes turned into errors, lifetimes.

The library binds to the libggml-base that llama_cpp has loaded already, so `load` must be called
after `import llama_cpp`. What the calls mean is documented in zo.h.
"""

import ctypes
import functools
import sys
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
)
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import zo_gguf
from zo_gguf.errors import ZoError

ON_CPU = -1  # the device of a kernel called by itself
Handle = ctypes.c_void_p
FLOATS = POINTER(c_float)
INTS = POINTER(c_int32)


class Branch(ctypes.Structure):
    """zo_branch."""

    _fields_ = (("seed", c_uint64), ("signs", c_uint64), ("scale", c_float))


class Field(ctypes.Structure):
    """zo_field; `base` must outlive the call of zo_inplace_add only."""

    _fields_ = (
        ("n_values", c_int64),
        ("block_bytes", c_int64),
        ("n_per_block", c_int32),
        ("offset", c_int32 * 2),
        ("storage", c_int32),
        ("relative", c_bool),
        ("limit", c_float),
        ("base", FLOATS),
    )


class Batch(ctypes.Structure):
    """zo_batch; the arrays must outlive the call of zo_hook_begin only."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("n_outputs", c_int32),
        ("n_branches", c_int32),
        ("n_targets", c_int32),
        ("token_branch", POINTER(c_int32)),
        ("output_branch", POINTER(c_int32)),
        ("branches", POINTER(Branch)),
        ("target_output", POINTER(c_int32)),
        ("target_token", POINTER(c_int32)),
    )


# name -> (result type, argument types); a test compares this table with the prototypes in zo.h.
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "zo_engine_version": (c_char_p, ()),
    "zo_gpu_kernels": (c_char_p, ()),
    "zo_gpu_count": (c_int32, ()),
    "zo_gpu_launches": (c_int64, ()),
    "zo_check_engine": (c_int32, ()),
    "zo_last_error": (c_char_p, ()),
    "zo_noise": (c_int32, (c_int32, c_uint64, c_uint32, c_int64, c_int64, FLOATS)),
    "zo_store_init": (c_int32, (POINTER(Handle), c_int32, c_int32)),
    "zo_store_free": (None, (Handle,)),
    "zo_store_add": (
        c_int32,
        (Handle, c_char_p, c_int64, c_int64, c_int64, POINTER(c_int64), FLOATS),
    ),
    "zo_store_size": (c_int64, (Handle,)),
    "zo_store_read": (c_int32, (Handle, FLOATS)),
    "zo_store_write": (c_int32, (Handle, FLOATS)),
    "zo_store_noise": (c_int32, (Handle, c_uint64, c_uint64, FLOATS)),
    "zo_store_apply": (
        c_int32,
        (Handle, c_char_p, Branch, c_int64, FLOATS, c_int64, FLOATS, c_int64, c_int32),
    ),
    "zo_inplace_init": (c_int32, (POINTER(Handle), c_int32, c_int32)),
    "zo_inplace_free": (None, (Handle,)),
    "zo_inplace_add": (c_int32, (Handle, c_char_p, POINTER(Field), c_int64, FLOATS)),
    "zo_inplace_size": (c_int64, (Handle,)),
    "zo_inplace_read": (c_int32, (Handle, FLOATS)),
    "zo_inplace_write": (c_int32, (Handle, FLOATS)),
    "zo_inplace_noise": (c_int32, (Handle, c_uint64, FLOATS)),
    "zo_inplace_values": (c_int32, (Handle, Branch, FLOATS)),
    "zo_inplace_check": (c_int32, (Handle,)),
    "zo_inplace_apply": (c_int32, (Handle, Branch)),
    "zo_lowrank_init": (c_int32, (POINTER(Handle), c_int32, c_int32)),
    "zo_lowrank_free": (None, (Handle,)),
    "zo_lowrank_add": (c_int32, (Handle, c_char_p, c_int64, c_int64)),
    "zo_lowrank_set": (c_int32, (Handle, c_int32, c_int32, c_int64, FLOATS, FLOATS)),
    "zo_lowrank_train": (c_int32, (Handle, c_int32, c_int64, c_float, c_uint32, FLOATS)),
    "zo_lowrank_probe": (c_int32, (Handle, c_int32, Branch)),
    "zo_lowrank_apply": (
        c_int32,
        (Handle, c_int32, c_int32, c_int64, FLOATS, c_int64, FLOATS, c_int64, c_int32, c_int32),
    ),
    "zo_gain_init": (c_int32, (POINTER(Handle),)),
    "zo_gain_free": (None, (Handle,)),
    "zo_gain_add": (c_int32, (Handle, c_char_p, c_int64)),
    "zo_gain_set": (c_int32, (Handle, c_int32, c_int32, FLOATS)),
    "zo_tensors_init": (c_int32, (POINTER(Handle),)),
    "zo_tensors_free": (None, (Handle,)),
    "zo_tensors_add": (c_int32, (Handle, c_char_p, c_int64)),
    "zo_tensors_eval": (c_bool, (ctypes.c_void_p, c_bool, ctypes.c_void_p)),
    "zo_tensors_missing": (c_int32, (Handle,)),
    "zo_tensors_set": (c_int32, (Handle, c_int32, ctypes.c_void_p, c_int64)),
    "zo_discard_init": (c_bool, (ctypes.c_void_p, ctypes.c_void_p, c_uint32)),
    "zo_discard_apply": (None, (ctypes.c_void_p,) * 4),
    "zo_losses": (
        c_int32,
        (FLOATS, c_int64, c_int64, c_int32, INTS, INTS, c_int32, c_int32, POINTER(c_double)),
    ),
    "zo_hook_init": (c_int32, (POINTER(Handle), Handle, Handle, Handle, Handle, c_int32, c_bool)),
    "zo_hook_free": (None, (Handle,)),
    "zo_hook_eval": (c_bool, (ctypes.c_void_p, c_bool, ctypes.c_void_p)),
    "zo_hook_begin": (c_int32, (Handle, POINTER(Batch))),
    "zo_hook_end": (c_int32, (Handle, POINTER(c_double))),
}


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
