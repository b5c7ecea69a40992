"""Choose codes so that a matrix's outputs stay, given a sample of its inputs.

After `requantize` the touched blocks hold weights that are all slightly wrong. What counts is not
each error but what they add up to in a row's output: e . x. For inputs with second moments H, libzo
finds codes of low E[(e . x)^2] = e H e for each row (native/quantize). Steps and offsets stay, and
so do all blocks that were not touched.
"""

from collections.abc import Sequence

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.engine.model import native_library
from zo_gguf.libzo import Moments
from zo_gguf.merging.native_layout import native_layout

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

_SWEEPS = 12  # later ones change next to nothing


def input_moments(inputs: F32, n_threads: int) -> Moments:
    """What `choose_codes` wants to know of a matrix's inputs; to be freed.

    Args:
        inputs: (n_samples, n_cols), each sample scaled by the square root of its weight.
        n_threads: CPU threads, of `choose_codes` as well.
    """
    return Moments(native_library(), inputs, n_threads)


def choose_codes(
    ids: I64,
    starts: Sequence[U8],
    kind: Type,
    target: F32,
    moments: Moments,
    *,
    ridge: float,
) -> tuple[U8, float]:
    """Improve the codes of some of a tensor's blocks against a sample of inputs.

    Args:
        ids: Which blocks, counted from the start of the tensor, ascending, (n,).
        starts: Bytes of these blocks to start from, (n, block_bytes) each; every row takes the one
            that ends best.
        kind: The tensor's type.
        target: Wanted values, (n, block).
        moments: Of the tensor's inputs.
        ridge: Weight of the plain squared error, as a share of the inputs' mean square.

    Returns:
        The blocks' bytes, and the sum over rows of E[(e . x)^2], without the ridge.
    """
    return moments.choose(
        native_layout(kind), ids, np.stack(starts), target, ridge=ridge, sweeps=_SWEEPS
    )
