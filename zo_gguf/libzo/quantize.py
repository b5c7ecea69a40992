"""Steps, offsets and codes of quantized weights chosen anew."""

import ctypes
from ctypes import c_double, c_int64, c_uint8

import numpy as np
from numpy.typing import NDArray

from zo_gguf.libzo.handles import NativeHandle, Vector
from zo_gguf.libzo.library import Library, floats, pointer
from zo_gguf.libzo.signatures import BlockLayout

U8 = NDArray[np.uint8]


def requantize_blocks(
    library: Library,
    layout: BlockLayout,
    raw: U8,
    target: Vector,
    weight: Vector | None,
    touched: NDArray[np.bool_] | None,
    n_threads: int,
) -> U8:
    """zo_requantize: the bytes of blocks with small weighted squared error.

    Args:
        library: libzo.
        layout: The blocks' type.
        raw: As they are, (n, block_bytes).
        target: Wanted values, (n, block).
        weight: Of their squared errors, likewise; None: all alike.
        touched: Groups that may change, (n, n_groups); None: all.
        n_threads: CPU threads; the bytes do not depend on it.
    """
    assert weight is None or weight.shape == target.shape
    raw = np.ascontiguousarray(raw)
    found = np.empty_like(raw)
    flags = None if touched is None else np.ascontiguousarray(touched).view(np.uint8)
    library.call(
        "zo_requantize",
        ctypes.byref(layout),
        len(raw),
        raw.size,
        pointer(raw, c_uint8),
        target.size,
        floats(target),
        None if weight is None else floats(weight),
        0 if flags is None else flags.size,
        None if flags is None else pointer(flags, c_uint8),
        n_threads,
        pointer(found, c_uint8),
    )
    return found


class Moments(NativeHandle):
    """zo_moments: second moments of a matrix's inputs, to choose its codes by.

    Args:
        library: libzo.
        inputs: (n_samples, n_cols), each sample scaled by the square root of its weight.
        n_threads: CPU threads; results do not depend on it.
    """

    kind = "moments"

    def __init__(self, library: Library, inputs: Vector, n_threads: int) -> None:
        super().__init__(library, *inputs.shape, inputs.size, floats(inputs), n_threads)
        self._n_threads = n_threads

    def choose(
        self,
        layout: BlockLayout,
        ids: NDArray[np.int64],
        starts: U8,
        target: Vector,
        *,
        ridge: float,
        sweeps: int,
    ) -> tuple[U8, float]:
        """Choose the codes of some of the matrix's blocks.

        Args:
            layout: The blocks' type.
            ids: Which blocks, counted from the start of the matrix, ascending, (n,).
            starts: Bytes to start from, (n_starts, n, block_bytes).
            target: Wanted values, (n, block).
            ridge: Share of the inputs' mean square that is added to the moments' diagonal.
            sweeps: Of coordinate descent, at most.

        Returns:
            The blocks' bytes, (n, block_bytes), and the sum over rows of E[(e . x)^2].
        """
        starts = np.ascontiguousarray(starts)
        best, error = np.empty_like(starts[0]), c_double()
        self._call(
            "choose",
            self.handle,
            ctypes.byref(layout),
            ridge,
            sweeps,
            len(ids),
            pointer(np.ascontiguousarray(ids, np.int64), c_int64),
            len(starts),
            starts.size,
            pointer(starts, c_uint8),
            target.size,
            floats(target),
            self._n_threads,
            pointer(best, c_uint8),
            ctypes.byref(error),
        )
        return best, error.value
