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

import numpy as np
from numpy.typing import NDArray

import zo_gguf
from zo_gguf.errors import ZoError

Handle = ctypes.c_void_p
FLOATS = POINTER(c_float)
INTS = POINTER(c_int32)


class Branch(ctypes.Structure):
    """zo_branch."""

    _fields_ = (("seed", c_uint64), ("scale", c_float))


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
    "zo_check_engine": (c_int32, ()),
    "zo_last_error": (c_char_p, ()),
    "zo_noise": (c_int32, (c_uint64, c_uint32, c_int64, c_int64, FLOATS)),
    "zo_store_init": (c_int32, (POINTER(Handle), c_int32)),
    "zo_store_free": (None, (Handle,)),
    "zo_store_add": (
        c_int32,
        (Handle, c_char_p, c_int64, c_int64, c_int64, POINTER(c_int64), FLOATS),
    ),
    "zo_store_size": (c_int64, (Handle,)),
    "zo_store_read": (c_int32, (Handle, FLOATS)),
    "zo_store_write": (c_int32, (Handle, FLOATS)),
    "zo_store_noise": (c_int32, (Handle, c_uint64, FLOATS)),
    "zo_store_commit": (c_int32, (Handle, c_uint64, c_float)),
    "zo_store_apply": (
        c_int32,
        (Handle, c_char_p, Branch, c_int64, FLOATS, c_int64, FLOATS, c_int64),
    ),
    "zo_losses": (
        c_int32,
        (FLOATS, c_int64, c_int64, c_int32, INTS, INTS, c_int32, POINTER(c_double)),
    ),
    "zo_hook_init": (c_int32, (POINTER(Handle), Handle, c_int32, c_bool)),
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
    library = ctypes.CDLL(str(_find_library()))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
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


def _find_library() -> Path:
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


class Store:
    """zo_store: f32 masters of all trainable entries."""

    def __init__(self, library: Library, n_threads: int) -> None:
        self._library = library
        self.handle = Handle()
        library.call("zo_store_init", ctypes.byref(self.handle), n_threads)

    def add(
        self,
        name: str,
        shape: tuple[int, int],
        indices: NDArray[np.int64],
        theta: NDArray[np.float32],
    ) -> None:
        """Append one weight's entries: sorted flat `indices` and masters, both (nnz,)."""
        self._library.call(
            "zo_store_add",
            self.handle,
            name.encode(),
            *shape,
            indices.size,
            pointer(np.ascontiguousarray(indices, dtype=np.int64), c_int64),
            pointer(np.ascontiguousarray(theta, dtype=np.float32), c_float),
        )

    @property
    def size(self) -> int:
        """Number of entries of all weights."""
        return int(self._library.functions.zo_store_size(self.handle))

    def read(self) -> NDArray[np.float32]:
        """A copy of theta, (nnz,)."""
        theta = np.empty(self.size, np.float32)
        self._library.call("zo_store_read", self.handle, pointer(theta, c_float))
        return theta

    def write(self, theta: NDArray[np.float32]) -> None:
        """Replace theta, (nnz,)."""
        assert theta.shape == (self.size,)
        theta = np.ascontiguousarray(theta, dtype=np.float32)
        self._library.call("zo_store_write", self.handle, pointer(theta, c_float))

    def noise(self, seed: int) -> NDArray[np.float32]:
        """z(seed), (nnz,)."""
        z = np.empty(self.size, np.float32)
        self._library.call("zo_store_noise", self.handle, seed, pointer(z, c_float))
        return z

    def commit(self, seed: int, coefficient: float) -> None:
        """theta += coefficient * z(seed)."""
        self._library.call("zo_store_commit", self.handle, seed, coefficient)

    def free(self) -> None:
        """Release the native object; further calls are bugs."""
        self._library.functions.zo_store_free(self.handle)
        self.handle = Handle()


class Hook:
    """zo_hook: the engine's callback and what it needs to know of a batch."""

    def __init__(
        self, library: Library, store: Store | None, n_threads: int, force_staged: bool
    ) -> None:
        self._library = library
        self.handle = Handle()
        store_handle = store.handle if store is not None else None
        library.call(
            "zo_hook_init", ctypes.byref(self.handle), store_handle, n_threads, force_staged
        )

    @property
    def callback(self) -> int:
        """Address of zo_hook_eval."""
        address = ctypes.cast(self._library.functions.zo_hook_eval, ctypes.c_void_p).value
        assert address is not None
        return address

    def begin(
        self,
        branches: list[tuple[int, float]],
        token_branch: NDArray[np.int32],
        output_branch: NDArray[np.int32],
        target_output: NDArray[np.int32],
        target_token: NDArray[np.int32],
    ) -> None:
        """Announce a decode: (seed, scale) of each branch, the branch of every token and output
        column, and the output column and token id of every target (ascending by column)."""
        array = (Branch * len(branches))(*(Branch(seed, scale) for seed, scale in branches))
        batch = Batch(
            token_branch.size,
            output_branch.size,
            len(branches),
            target_output.size,
            pointer(token_branch, c_int32),
            pointer(output_branch, c_int32),
            array,
            pointer(target_output, c_int32),
            pointer(target_token, c_int32),
        )
        self._library.call("zo_hook_begin", self.handle, ctypes.byref(batch))

    def begin_any(self) -> None:
        """Let any decode pass, theta applied to all of its columns, without losses."""
        self._library.call("zo_hook_begin", self.handle, None)

    def end(self, n_targets: int) -> NDArray[np.float64]:
        """Negative log-likelihood of each target of the decode, (n_targets,).

        Raises:
            ZoError: The graph was not the expected one; the sentence says how.
        """
        nll = np.empty(n_targets, np.float64)
        self._library.call("zo_hook_end", self.handle, pointer(nll, c_double))
        return nll

    def free(self) -> None:
        """Release the native object; the engine's context must be gone."""
        self._library.functions.zo_hook_free(self.handle)
        self.handle = Handle()
