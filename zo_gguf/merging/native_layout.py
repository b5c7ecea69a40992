"""The layout of a type's blocks as libzo wants it."""

from functools import cache
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from zo_gguf.gguf_files.blocks import layout_of
from zo_gguf.libzo import FLOATS, INTS, BlockLayout


@cache
def native_layout(kind: Type) -> BlockLayout:
    """The struct of a type that has a layout; it lives as long as the program."""
    layout = layout_of(kind)
    assert layout is not None
    arrays: list[NDArray[Any]] = []

    def numbers(values: NDArray[Any] | None, pointer: Any = INTS, dtype: type = np.int32) -> Any:
        if values is None:
            return None
        arrays.append(np.ascontiguousarray(values, dtype))
        return arrays[-1].ctypes.data_as(pointer)

    def n_bits(places: NDArray[Any] | None) -> int:
        return 0 if places is None else places.shape[1]

    result = BlockLayout(
        block=layout.block,
        group=layout.group,
        block_bytes=GGML_QUANT_SIZES[kind][1],
        n_code_bits=n_bits(layout.code_bits),
        code_bits=numbers(layout.code_bits),
        n_levels=len(layout.levels),
        codes=numbers(layout.codes),
        levels=numbers(layout.levels, FLOATS, np.float32),
        d_byte=layout.d_byte,
        min_byte=-1 if layout.min_byte is None else layout.min_byte,
        min_sign=layout.min_sign,
        n_scale_bits=n_bits(layout.scale_bits),
        scale_bits=numbers(layout.scale_bits),
        n_scales=0 if layout.scale_codes is None else len(layout.scale_codes),
        scale_codes=numbers(layout.scale_codes),
        scale_low=layout.scale_low,
        n_min_bits=n_bits(layout.min_bits),
        min_bits=numbers(layout.min_bits),
    )
    result.arrays = arrays
    return result
