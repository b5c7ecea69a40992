"""ctypes over native/zo.h: signatures, status codes turned into errors, one class per handle.

The library binds to the libggml-base that llama_cpp has loaded already, so `load` must be called
after `import llama_cpp`. What the calls mean is documented in zo.h.
"""

import ctypes
import functools
import sys
from collections.abc import Sequence
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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import zo_gguf
from zo_gguf.errors import ZoError

ON_CPU = -1  # the device of a kernel called by itself
Handle = ctypes.c_void_p
FLOATS = POINTER(c_float)
INTS = POINTER(c_int32)


class Probe(NamedTuple):
    """A place near theta: theta + scale * z(seed); scale 0 is theta itself."""

    seed: int
    scale: float


AT_THETA = Probe(0, 0.0)


class Branch(ctypes.Structure):
    """zo_branch."""

    _fields_ = (("seed", c_uint64), ("scale", c_float))


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
    "zo_store_noise": (c_int32, (Handle, c_uint64, FLOATS)),
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
    "zo_hook_check": (c_int32, (Handle,)),
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


# ---- handles -------------------------------------------------------------------------------------


Vector = NDArray[np.float32]
NORMAL, RADEMACHER = 0, 1  # zo_distribution


class _Handle:
    """An object of libzo, made by zo_<kind>_init and released by `free`."""

    kind: str

    def __init__(self, library: Library, *arguments: Any) -> None:
        self._library = library
        self.handle = Handle()
        self._call("init", ctypes.byref(self.handle), *arguments)

    def _call(self, verb: str, *arguments: Any) -> None:
        self._library.call(f"zo_{self.kind}_{verb}", *arguments)

    def free(self) -> None:
        """Release the native object; further calls are bugs."""
        getattr(self._library.functions, f"zo_{self.kind}_free")(self.handle)
        self.handle = Handle()


class _Masters(_Handle):
    """f32 masters kept by libzo, and their noise."""

    def __init__(self, library: Library, n_threads: int, distribution: int = NORMAL) -> None:
        super().__init__(library, distribution, n_threads)

    @property
    def size(self) -> int:
        """Number of masters of all weights."""
        return int(getattr(self._library.functions, f"zo_{self.kind}_size")(self.handle))

    def read(self) -> Vector:
        """A copy of the masters, (size,)."""
        return self._filled("read")

    def write(self, theta: Vector) -> None:
        """Replace the masters, (size,)."""
        assert theta.shape == (self.size,)
        self._call("write", self.handle, _floats(theta))

    def _filled(self, verb: str, *arguments: Any) -> Vector:
        result = np.empty(self.size, np.float32)
        self._call(verb, self.handle, *arguments, pointer(result, c_float))
        return result


def address(function: Any) -> int:
    """Where a native function lies."""
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value is not None
    return value


def _floats(values: Vector) -> Any:
    return pointer(np.ascontiguousarray(values, dtype=np.float32), c_float)


class Store(_Masters):
    """zo_store: f32 masters of all sparse entries."""

    kind = "store"

    def add(
        self,
        name: str,
        shape: tuple[int, int],
        indices: NDArray[np.int64],
        theta: Vector,
    ) -> None:
        """Append one weight's entries: sorted flat `indices` and masters, both (nnz,)."""
        sorted_indices = pointer(np.ascontiguousarray(indices, dtype=np.int64), c_int64)
        self._call(
            "add", self.handle, name.encode(), *shape, indices.size, sorted_indices, _floats(theta)
        )

    def noise(self, seed: int) -> Vector:
        """z(seed), (nnz,)."""
        return self._filled("noise", seed)


class InPlace(_Masters):
    """zo_inplace: masters of values inside loaded weights, and the live bytes that follow.

    Live bytes follow new masters at the next `apply`.
    """

    kind = "inplace"

    def add(self, name: str, field: Field, n_bytes: int, theta: Vector) -> None:
        """Append the values of a tensor of `n_bytes`, with their masters, (field.n_values,)."""
        self._call("add", self.handle, name.encode(), ctypes.byref(field), n_bytes, _floats(theta))

    def noise(self, seed: int) -> Vector:
        """z(seed), (size,); 0 where a master's magnitude is above its tensor's limit."""
        return self._filled("noise", seed)

    def values(self, probe: Probe = AT_THETA) -> Vector:
        """Live values at a probe, (size,), before they are rounded to the tensors' types."""
        return self._filled("values", Branch(*probe))

    def check(self) -> None:
        """Raise ZoError as `apply` would."""
        self._call("check", self.handle)

    def apply(self, probe: Probe) -> None:
        """Write the live values at a probe into the loaded weights.

        Raises:
            ZoError: No decode has used a tensor yet, or its memory must not be written.
        """
        self._call("apply", self.handle, Branch(*probe))


class LowRank(_Handle):
    """zo_lowrank: a low-rank product beside some weights, per branch."""

    kind = "lowrank"

    def __init__(self, library: Library, n_threads: int = 1, distribution: int = NORMAL) -> None:
        super().__init__(library, distribution, n_threads)

    def add(self, name: str, shape: tuple[int, int]) -> None:
        """Append a weight of `shape` (n_rows, n_cols)."""
        self._call("add", self.handle, name.encode(), *shape)

    def set(self, branch: int, number: int, left: Vector, right: Vector) -> None:
        """In a branch, the number-th weight gets left.T @ right more: left (rank, n_rows), right
        (rank, n_cols)."""
        rank = left.shape[0]
        assert rank == right.shape[0]
        self._call("set", self.handle, branch, number, rank, _floats(left), _floats(right))

    def train(self, number: int, rank: int, factor: float, tensor: int, masters: Vector) -> None:
        """The number-th weight's factors are masters: right (rank, n_cols) and then, counting
        `factor` times, left (rank, n_rows); `tensor` is their noise's number."""
        self._call("train", self.handle, number, rank, factor, tensor, _floats(masters))

    def probe(self, branch: int, probe: Probe) -> None:
        """Move all masters of `train` to a probe in a branch."""
        self._call("probe", self.handle, branch, Branch(*probe))


class Gain(_Handle):
    """zo_gain: factors of the product with some weights, per branch."""

    kind = "gain"

    def add(self, name: str, n: int) -> None:
        """Append a weight of n values."""
        self._call("add", self.handle, name.encode(), n)

    def set(self, branch: int, number: int, factors: Vector) -> None:
        """In a branch, the product with the number-th weight is multiplied by factors, (n,)."""
        self._call("set", self.handle, branch, number, _floats(factors))


class Tensors(_Handle):
    """zo_tensors: tensors found by name in the graph, rewritten whole between decodes."""

    kind = "tensors"

    def add(self, name: str, n_bytes: int) -> None:
        """Append a tensor of `n_bytes`."""
        self._call("add", self.handle, name.encode(), n_bytes)

    @property
    def callback(self) -> int:
        """Address of the callback that finds the tensors; `handle` is its user data."""
        return address(self._library.functions.zo_tensors_eval)

    @property
    def missing(self) -> int:
        """How many of them no decode has used yet, or only as copies on a device."""
        return int(self._library.functions.zo_tensors_missing(self.handle))

    def set(self, number: int, values: Vector) -> None:
        """Rewrite the number-th tensor.

        Raises:
            ZoError: It is missing, or has another size.
        """
        data = np.ascontiguousarray(values, dtype=np.float32)
        self._call("set", self.handle, number, data.ctypes.data, data.nbytes)


class Hook(_Handle):
    """zo_hook: the engine's callback and what it needs to know of a batch.

    The engine's context must be gone before `free`.
    """

    kind = "hook"

    def __init__(
        self,
        library: Library,
        store: Store | None = None,
        in_place: InPlace | None = None,
        low_rank: LowRank | None = None,
        gain: Gain | None = None,
        *,
        n_threads: int,
        force_staged: bool = False,
    ) -> None:
        parts = [part.handle if part else None for part in (store, in_place, low_rank, gain)]
        super().__init__(library, *parts, n_threads, force_staged)

    @property
    def callback(self) -> int:
        """Address of zo_hook_eval."""
        return address(self._library.functions.zo_hook_eval)

    def begin(
        self,
        branches: Sequence[Probe],
        token_branch: NDArray[np.int32],
        output_branch: NDArray[np.int32],
        target_output: NDArray[np.int32],
        target_token: NDArray[np.int32],
    ) -> None:
        """Announce a decode: the probe of each branch, the branch of every token and output
        column, and the output column and token id of every target (ascending by column)."""
        array = (Branch * len(branches))(*(Branch(*branch) for branch in branches))
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
        self._call("begin", self.handle, ctypes.byref(batch))

    def begin_any(self) -> None:
        """Let any decode pass, theta applied to all of its columns, without losses."""
        self._call("begin", self.handle, None)

    def check(self) -> None:
        """Raise ZoError if a node was refused since `begin` or `begin_any`, or the last `check`.

        llama_decode then returns success, but nothing that it gives may be used.
        """
        try:
            self._call("check", self.handle)
        except ZoError:
            self.begin_any()
            raise

    def end(self, n_targets: int) -> NDArray[np.float64]:
        """Negative log-likelihood of each target of the decode, (n_targets,).

        Raises:
            ZoError: The graph was not the expected one; the sentence says how.
        """
        nll = np.empty(n_targets, np.float64)
        self._call("end", self.handle, pointer(nll, c_double))
        return nll
