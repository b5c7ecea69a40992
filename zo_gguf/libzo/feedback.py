"""Gradients by a reverse pass over single tokens, of decodes that a hook gathers."""

import ctypes
from ctypes import c_bool, c_float, c_int32, c_int64

import numpy as np

from zo_gguf.libzo.handles import NativeHandle, Vector
from zo_gguf.libzo.library import Library, floats, pointer
from zo_gguf.libzo.signatures import AT_THETA, Batch, Ints


class Feedback(NativeHandle):
    """zo_feedback: gradients of tracked weights by a reverse pass over single tokens.

    Args:
        library: libzo.
        n_threads: CPU threads.
        tail: Largest relative error of the gradient at the logits, in sums of magnitudes.
        force_staged: As for a `Hook`.
    """

    kind = "feedback"

    def __init__(
        self, library: Library, n_threads: int, tail: float = 0.0, force_staged: bool = False
    ) -> None:
        super().__init__(library, n_threads, tail, force_staged)
        self._shapes: list[tuple[int, int, int]] = []  # of tracked matrices: rows, columns, rank
        self._lengths: list[int] = []  # of tracked gains

    def lend(self, name: str, kind: int, data: int, n_bytes: int) -> None:
        """Offer a weight's bytes, as they are in the file, at an address that stays valid."""
        self._call("weight", self.handle, name.encode(), kind, data, n_bytes)

    def track(self, name: str, shape: tuple[int, int], right: Vector | None = None) -> None:
        """Want the gradient of left in W + left.T @ right, W of `shape` and `right` (rank, n_cols);
        without `right`, the pairs of inputs and gradients of the last pass."""
        rank, n_right = (0, 0) if right is None else (right.shape[0], right.size)
        values = None if right is None else floats(right)
        self._call("track", self.handle, name.encode(), *shape, rank, n_right, values)
        self._shapes.append((*shape, rank))

    def track_gain(self, name: str, n: int) -> None:
        """Want the gradient of g in a norm whose n factors are multiplied by 1 + g."""
        self._call("track_gain", self.handle, name.encode(), n)
        self._lengths.append(n)

    def begin(
        self, target_output: Ints, target_token: Ints, n_tokens: int, output_token: Ints
    ) -> None:
        """Announce a decode of one branch, as to the hook; `output_token` is the token column of
        each output."""
        zeros = np.zeros(n_tokens, np.int32)
        outputs = zeros[: output_token.size]
        batch = Batch.of([AT_THETA], zeros, outputs, target_output, target_token)
        sized = output_token.size, pointer(output_token, c_int32)
        self._call("begin", self.handle, ctypes.byref(batch), *sized)

    def end(self) -> bool:
        """Whether the decode was gathered; if not, its graph is known now: decode again.

        Raises:
            ZoError: The graph cannot be followed; the sentence says why.
        """
        gathered = c_bool()
        self._call("end", self.handle, ctypes.byref(gathered))
        return gathered.value

    def run(self, weights: Vector) -> None:
        """Add the gradients of sum(weights * nll) over the targets of the last decode."""
        self._call("run", self.handle, weights.size, floats(weights))

    def gradient(self, number: int) -> Vector:
        """Of the number-th matrix: the sum of the gradients of left, (rank, n_rows)."""
        n_rows, _, rank = self._shapes[number]
        gradient = np.empty((rank, n_rows), np.float32)
        self._call("gradient", self.handle, number, gradient.size, pointer(gradient, c_float))
        return gradient

    def pairs(self, number: int, n_counted: int) -> tuple[Vector, Vector]:
        """Of the number-th matrix: inputs (n_counted, n_cols), gradients (n_counted, n_rows)."""
        n_rows, n_cols, _ = self._shapes[number]
        x = np.empty((n_counted, n_cols), np.float32)
        dy = np.empty((n_counted, n_rows), np.float32)
        sized = x.size, pointer(x, c_float), dy.size, pointer(dy, c_float)
        self._call("pairs", self.handle, number, *sized)
        return x, dy

    def gain_gradient(self, number: int) -> Vector:
        """Of the number-th norm: the sum of the gradients of its gains, (n,)."""
        gradient = np.empty(self._lengths[number], np.float32)
        self._call("gain_gradient", self.handle, number, gradient.size, pointer(gradient, c_float))
        return gradient

    def clear(self) -> None:
        """Set all gradients to zero."""
        self._call("clear", self.handle)

    # ---- what the graph showed ----

    @property
    def token_bytes(self) -> int:
        """Memory for each output with targets."""
        return int(self._library.functions.zo_feedback_token_bytes(self.handle))

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Matrices that gradients reach, last first: name -> (n_rows, n_cols)."""
        get = self._library.functions.zo_feedback_matrix
        found: dict[str, tuple[int, int]] = {}
        n_rows, n_cols = c_int64(), c_int64()
        while name := get(self.handle, len(found), ctypes.byref(n_rows), ctypes.byref(n_cols)):
            found[name.decode()] = (n_rows.value, n_cols.value)
        return found

    def norms(self) -> dict[str, int]:
        """Norms that gradients reach, last first: name -> length."""
        get, n = self._library.functions.zo_feedback_norm, c_int64()
        found: dict[str, int] = {}
        while name := get(self.handle, len(found), ctypes.byref(n)):
            found[name.decode()] = n.value
        return found

    def stops(self) -> list[str]:
        """Where gradients do not go on, in words."""
        get = self._library.functions.zo_feedback_stop
        found: list[str] = []
        while text := get(self.handle, len(found)):
            found.append(text.decode(errors="replace"))
        return found
