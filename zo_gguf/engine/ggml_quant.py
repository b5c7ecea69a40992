"""ggml's own quantizers, called in the library that llama_cpp has loaded.

They serve types whose blocks have no simple layout, and as further candidates for K-quants. Which
result is kept is decided in `requantize`.
"""

import ctypes
from functools import cache
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.errors import ZoError

# What ggml_quantize_chunk of the pinned llama.cpp knows; anything else would abort the process.
SUPPORTED = frozenset({
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K,
    Type.Q5_K, Type.Q6_K, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ3_XXS, Type.IQ3_S, Type.IQ2_S,
    Type.IQ1_S, Type.IQ1_M, Type.IQ4_NL, Type.IQ4_XS, Type.TQ1_0, Type.TQ2_0, Type.MXFP4,
})  # fmt: skip


@cache
def _quantize_chunk() -> Any:
    # A symbol lookup through libllama's handle also searches its dependencies; opening libggml-base
    # by path would load a second copy.
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    return prototype(("ggml_quantize_chunk", llama_cpp.llama_cpp._lib))


def quantize_blocks(
    values: NDArray[np.float32], kind: Type, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize blocks of weights.

    Args:
        values: (n_blocks, block).
        kind: The type to make; `block` is its block size.
        importance: Weight of each value's squared error, same shape; positive.

    Returns:
        (n_blocks, block_bytes).

    Raises:
        ZoError: ggml cannot make `kind`.
    """
    if kind not in SUPPORTED:
        raise ZoError(f"llama.cpp cannot quantize to {kind.name}; promote the tensor to Q8_0.")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    assert values.ndim == 2
    assert values.shape[1] == block
    values = np.ascontiguousarray(values, dtype=np.float32)
    result = np.zeros((len(values), block_bytes), dtype=np.uint8)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, dtype=np.float32)
        assert weights.shape == values.shape
    # One row of all blocks: importances are per column, so this gives every value its own.
    _quantize_chunk()(
        int(kind), values.ctypes.data, result.ctypes.data, 0, 1, values.size,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    return result
