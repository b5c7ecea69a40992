"""Quantized blocks taken apart into codes and scales, and put together again.

Works for every type that has a `Layout`; which codes and scales to take is decided elsewhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zo_gguf.gguf_files.blocks import Layout, read_numbers, write_numbers

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@dataclass
class BlockCodes:
    """n blocks of one type.

    Attributes:
        layout: The type.
        raw: (n, block_bytes) as they were read.
        codes: (n, n_groups, group), rank of each weight's level among the layout's levels.
        d: (n,) step unit; the step itself where the type has no sub-scales.
        minimum: (n,) offset unit, 0 where the type has no offsets.
        scale: (n, n_groups), multiples of d; 1 where the type has no sub-scales.
        sub_min: (n, n_groups), multiples of minimum; 1 where the type has no sub-minima.
    """

    layout: Layout
    raw: U8
    codes: I64
    d: F32
    minimum: F32
    scale: I64
    sub_min: I64

    @property
    def step(self) -> F32:
        """Distance of neighbouring levels, (n, n_groups)."""
        return np.asarray(self.d[:, None] * self.scale.astype(np.float32))

    @property
    def offset(self) -> F32:
        """What is subtracted from step * level, (n, n_groups)."""
        return np.asarray(self.minimum[:, None] * self.sub_min.astype(np.float32))

    def values(self) -> F32:
        """The weights, (n, n_groups, group), in the arithmetic of ggml."""
        return self.step[..., None] * self.layout.levels[self.codes] - self.offset[..., None]

    def pack(self) -> U8:
        """The blocks' bytes, (n, block_bytes)."""
        layout = self.layout
        bits = np.unpackbits(self.raw, axis=1, bitorder="little")
        flat = self.codes.reshape(len(self.raw), layout.block)
        write_numbers(bits, layout.code_bits, layout.codes[flat])
        if layout.scale_bits is not None and layout.scale_codes is not None:
            stored = layout.scale_codes[self.scale - layout.scale_low]
            write_numbers(bits, layout.scale_bits, stored)
        if layout.min_bits is not None:
            write_numbers(bits, layout.min_bits, self.sub_min)
        raw = np.packbits(bits, axis=1, bitorder="little")
        raw[:, layout.d_byte : layout.d_byte + 2] = _half_bytes(self.d)
        if layout.min_byte is not None:
            minimum = layout.min_sign * self.minimum
            raw[:, layout.min_byte : layout.min_byte + 2] = _half_bytes(minimum)
        return raw


def read_blocks(raw: U8, layout: Layout) -> BlockCodes:
    """Take blocks, (n, block_bytes), apart."""
    n = len(raw)
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    codes = _ranks(layout.codes)[read_numbers(bits, layout.code_bits)]
    ones = np.ones((n, layout.n_groups), dtype=np.int64)
    scale, sub_min = ones, ones
    if layout.scale_bits is not None and layout.scale_codes is not None:
        stored = read_numbers(bits, layout.scale_bits)
        scale = _ranks(layout.scale_codes)[stored] + layout.scale_low
    if layout.min_bits is not None:
        sub_min = read_numbers(bits, layout.min_bits)
    minimum = np.zeros(n, dtype=np.float32)
    if layout.min_byte is not None:
        minimum = layout.min_sign * _half(raw, layout.min_byte)
    shape = (n, layout.n_groups, layout.group)
    d = _half(raw, layout.d_byte)
    return BlockCodes(layout, raw, codes.reshape(shape), d, minimum, scale, sub_min)


def _ranks(codes: I64) -> I64:
    """For each stored code, its rank."""
    ranks = np.empty(len(codes), dtype=np.int64)
    ranks[codes] = np.arange(len(codes))
    return ranks


def _half(raw: U8, byte: int) -> F32:
    return raw[:, byte : byte + 2].copy().view("<f2")[:, 0].astype(np.float32)


def _half_bytes(values: F32) -> U8:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)
