"""Blocks of quantized weights taken apart in numpy, as a reference for what libzo does to them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zo_gguf.gguf_files.blocks import Bits, Layout

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


def read_numbers(bits: NDArray[np.uint8], positions: Bits) -> NDArray[np.int64]:
    """Numbers stored at bit positions.

    Args:
        bits: (n_blocks, 8 * block_bytes), one bit per element.
        positions: (n_numbers, n_bits).

    Returns:
        (n_blocks, n_numbers).
    """
    result = np.zeros((len(bits), len(positions)), dtype=np.int64)
    for power in range(positions.shape[1]):
        result |= bits[:, positions[:, power]].astype(np.int64) << power
    return result


def write_numbers(bits: NDArray[np.uint8], positions: Bits, numbers: NDArray[np.int64]) -> None:
    """Store numbers, (n_blocks, n_numbers), in place; the inverse of read_numbers."""
    for power in range(positions.shape[1]):
        bits[:, positions[:, power]] = (numbers >> power) & 1


@dataclass
class BlockCodes:
    """n blocks of one type.

    Attributes:
        layout: The type.
        codes: (n, n_groups, group), rank of each weight's level among the layout's levels.
        d: (n,) step unit; the step itself where the type has no sub-scales.
        minimum: (n,) offset unit, 0 where the type has no offsets.
        scale: (n, n_groups), multiples of d; 1 where the type has no sub-scales.
        sub_min: (n, n_groups), multiples of minimum; 1 where the type has no sub-minima.
    """

    layout: Layout
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
    return BlockCodes(layout, codes.reshape(shape), d, minimum, scale, sub_min)


def _ranks(codes: I64) -> I64:
    """For each stored code, its rank."""
    ranks = np.empty(len(codes), dtype=np.int64)
    ranks[codes] = np.arange(len(codes))
    return ranks


def _half(raw: U8, byte: int) -> F32:
    return raw[:, byte : byte + 2].copy().view("<f2")[:, 0].astype(np.float32)
