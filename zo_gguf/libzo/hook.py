"""The engine's callback, and what records in it."""

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32

import numpy as np
from numpy.typing import NDArray

from zo_gguf.errors import ZoError
from zo_gguf.libzo.feedback import Feedback
from zo_gguf.libzo.handles import Gain, InPlace, LowRank, NativeHandle, Store, Vector
from zo_gguf.libzo.library import Library, address, pointer
from zo_gguf.libzo.signatures import Batch, Probe

Ints = NDArray[np.int32]


class Recorder(NativeHandle):
    """zo_recorder: what some weights are multiplied by, at chosen tokens of a decode."""

    kind = "recorder"

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self._widths: list[int] = []

    def add(self, name: str, n_cols: int) -> None:
        """Append a weight."""
        self._call("add", self.handle, name.encode(), n_cols)
        self._widths.append(n_cols)

    def begin(self, n_tokens: int, kept: Ints, outputs: Ints) -> None:
        """Announce a decode of `n_tokens`, ascending: those to record, and its outputs."""
        kept, outputs = (np.ascontiguousarray(tokens, np.int32) for tokens in (kept, outputs))
        sized = kept.size, pointer(kept, c_int32), outputs.size, pointer(outputs, c_int32)
        self._call("begin", self.handle, n_tokens, *sized)

    def input_of(self, number: int) -> int:
        """What the number-th weight was multiplied by: equal for weights that read the same.

        -1 where it was not used in a plain matrix product; `read` says more.
        """
        return self._find(number)[0]

    def read(self, number: int) -> tuple[Ints, Vector]:
        """The input of the number-th weight: tokens of the decode (n,), and values (n, n_cols).

        Raises:
            ZoError: There is none; the sentence says why.
        """
        n = self._find(number)[1]
        tokens, x = np.empty(n, np.int32), np.empty((n, self._widths[number]), np.float32)
        arrays = pointer(tokens, c_int32), pointer(x, c_float)
        self._call("read", self.handle, number, n, self._widths[number], *arrays)
        return tokens, x

    def _find(self, number: int) -> tuple[int, int]:
        found, n_rows = c_int32(), c_int32()
        self._call("find", self.handle, number, ctypes.byref(found), ctypes.byref(n_rows))
        return found.value, n_rows.value


class Hook(NativeHandle):
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
        batch = Batch.of(branches, token_branch, output_branch, target_output, target_token)
        self._call("begin", self.handle, ctypes.byref(batch))

    def set_recorder(self, recorder: Recorder | None) -> None:
        """Have decodes that are announced to `recorder` recorded; it must outlive this."""
        self._call("set_recorder", self.handle, recorder.handle if recorder else None)

    def set_feedback(self, feedback: Feedback | None) -> None:
        """Have decodes that are announced to `feedback` gathered for it; it must outlive this."""
        self._call("set_feedback", self.handle, feedback.handle if feedback else None)

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
        self._call("end", self.handle, n_targets, pointer(nll, c_double))
        return nll
