"""The handles of libzo that hold parameters: one class for each."""

import ctypes
from ctypes import c_float, c_int64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zo_gguf.libzo.library import Library, address, floats, pointer
from zo_gguf.libzo.signatures import AT_THETA, NORMAL, Branch, Field, Handle, Probe

Vector = NDArray[np.float32]


class NativeHandle:
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


class _Masters(NativeHandle):
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
        self._call("write", self.handle, theta.size, floats(theta))

    def _filled(self, verb: str, *arguments: Any) -> Vector:
        result = np.empty(self.size, np.float32)
        self._call(verb, self.handle, *arguments, result.size, pointer(result, c_float))
        return result


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
        assert indices.size == theta.size
        sorted_indices = pointer(np.ascontiguousarray(indices, dtype=np.int64), c_int64)
        self._call(
            "add", self.handle, name.encode(), *shape, indices.size, sorted_indices, floats(theta)
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
        assert theta.size == field.n_values
        self._call("add", self.handle, name.encode(), ctypes.byref(field), n_bytes, floats(theta))

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


class LowRank(NativeHandle):
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
        sized = left.size, floats(left), right.size, floats(right)
        self._call("set", self.handle, branch, number, rank, *sized)

    def train(self, number: int, rank: int, factor: float, tensor: int, masters: Vector) -> None:
        """The number-th weight's factors are masters: right (rank, n_cols) and then, counting
        `factor` times, left (rank, n_rows); `tensor` is their noise's number."""
        sized = masters.size, floats(masters)
        self._call("train", self.handle, number, rank, factor, tensor, *sized)

    def probe(self, branch: int, probe: Probe) -> None:
        """Move all masters of `train` to a probe in a branch."""
        self._call("probe", self.handle, branch, Branch(*probe))


class Gain(NativeHandle):
    """zo_gain: factors of the product with some weights, per branch."""

    kind = "gain"

    def add(self, name: str, n: int) -> None:
        """Append a weight of n values."""
        self._call("add", self.handle, name.encode(), n)

    def set(self, branch: int, number: int, factors: Vector) -> None:
        """In a branch, the product with the number-th weight is multiplied by factors, (n,)."""
        self._call("set", self.handle, branch, number, factors.size, floats(factors))


class Tensors(NativeHandle):
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
