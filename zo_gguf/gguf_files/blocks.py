"""Where codes and scales lie inside the blocks of ggml's quantization types, as bit positions.

A weight of such a type is `d * scale * level[code] - offset`, per group of 16 or 32 weights, where
`offset` is `dmin * min` in K-quants and `-m` in Q4_1 and Q5_1. Blocks are taken apart into codes
and scales here, and put together again; which to take is decided elsewhere. The lattice types (IQ1
to IQ3) code several weights together and have no layout here.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Bits = NDArray[np.int64]  # bit positions in a block's bytes, least significant first

# The 16 levels of IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl).
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Layout:
    """One quantization type.

    Attributes:
        block: Weights per block.
        group: Weights that share a scale; the whole block where there are no sub-scales.
        code_bits: (block, n_bits).
        codes: Stored code of each level, levels ascending.
        levels: f32, ascending.
        d_byte: Where the f16 step lies.
        min_byte: Where the f16 minimum lies, None without one.
        min_sign: Offset = min_sign * minimum (* sub-minimum).
        scale_bits: (n_groups, n_bits) of the sub-scales, None without.
        scale_codes: Stored code of each sub-scale, values ascending from `scale_low`.
        scale_low: The smallest sub-scale.
        min_bits: (n_groups, n_bits) of the sub-minima, None without.
    """

    block: int
    group: int
    code_bits: Bits
    codes: NDArray[np.int64]
    levels: NDArray[np.float32]
    d_byte: int
    min_byte: int | None = None
    min_sign: float = 1.0
    scale_bits: Bits | None = None
    scale_codes: NDArray[np.int64] | None = None
    scale_low: int = 0
    min_bits: Bits | None = None

    @property
    def n_groups(self) -> int:
        """Groups per block."""
        return self.block // self.group

    @property
    def scale_high(self) -> int:
        """The largest sub-scale; 0 without sub-scales."""
        return self.scale_low + len(self.scale_codes) - 1 if self.scale_codes is not None else 0

    @property
    def min_high(self) -> int:
        """The largest sub-minimum; 0 without sub-minima."""
        return (1 << self.min_bits.shape[1]) - 1 if self.min_bits is not None else 0

    @property
    def uniform(self) -> bool:
        """Whether neighbouring levels differ by one everywhere."""
        return bool((np.diff(self.levels) == 1).all())


def _bits(byte: NDArray[np.int64], shift: NDArray[np.int64], n_bits: int) -> Bits:
    start = np.asarray(byte * 8 + shift)
    return np.asarray(start[:, None] + np.arange(n_bits))


def _counting(low: int, n_bits: int, *, twos_complement: bool = False) -> NDArray[np.int64]:
    values = np.arange(low, low + (1 << n_bits))
    return values & ((1 << n_bits) - 1) if twos_complement else values - low


def _simple(kind: Type, n_bits: int, *, has_min: bool) -> Layout:
    """Q4_0, Q4_1, Q5_0, Q5_1: 32 weights, the fifth bits apart from the low four."""
    i = np.arange(32)
    header = 4 if has_min else 2
    low_start = header + (4 if n_bits == 5 else 0)
    code_bits = _bits(low_start + i % 16, 4 * (i // 16), 4)
    if n_bits == 5:
        code_bits = np.concatenate([code_bits, (header * 8 + i)[:, None]], axis=1)
    low = 0 if has_min else -(1 << (n_bits - 1))
    levels = np.arange(low, low + (1 << n_bits), dtype=np.float32)
    min_byte = 2 if has_min else None
    codes = _counting(low, n_bits)
    return Layout(32, 32, code_bits, codes, levels, 0, min_byte=min_byte, min_sign=-1.0)


def _q8_0() -> Layout:
    code_bits = _bits(2 + np.arange(32), np.zeros(32, np.int64), 8)
    levels = np.arange(-128, 128, dtype=np.float32)
    return Layout(32, 32, code_bits, _counting(-128, 8, twos_complement=True), levels, 0)


def _iq4_nl() -> Layout:
    i = np.arange(32)
    levels = np.array(_IQ4_LEVELS, dtype=np.float32)
    return Layout(32, 32, _bits(2 + i % 16, 4 * (i // 16), 4), np.arange(16), levels, 0)


def _iq4_xs() -> Layout:
    i, g = np.arange(256), np.arange(8)
    code_bits = _bits(8 + i // 32 * 16 + i % 16, i % 32 // 16 * 4, 4)
    low = _bits(4 + g // 2, g % 2 * 4, 4)
    high = _bits(np.full(8, 2), 2 * g, 2)
    levels = np.array(_IQ4_LEVELS, dtype=np.float32)
    scale_bits = np.concatenate([low, high], axis=1)
    return Layout(
        256, 32, code_bits, np.arange(16), levels, 0, scale_bits=scale_bits,
        scale_codes=_counting(-32, 6), scale_low=-32,
    )  # fmt: skip


def _q2_k() -> Layout:
    i, g = np.arange(256), np.arange(16)
    code_bits = _bits(16 + i // 128 * 32 + i % 32, i % 128 // 32 * 2, 2)
    levels = np.arange(4, dtype=np.float32)
    return Layout(
        256, 16, code_bits, np.arange(4), levels, 80, min_byte=82,
        scale_bits=_bits(g, 0 * g, 4), scale_codes=np.arange(16), min_bits=_bits(g, 4 + 0 * g, 4),
    )  # fmt: skip


def _q3_k() -> Layout:
    i, g = np.arange(256), np.arange(16)
    low = _bits(32 + i // 128 * 32 + i % 32, i % 128 // 32 * 2, 2)
    high = _bits(i % 32, i // 32, 1)
    scale_low = _bits(96 + g % 8, g // 8 * 4, 4)
    scale_high = _bits(104 + g % 4, g // 4 * 2, 2)
    return Layout(
        256, 16, np.concatenate([low, high], axis=1), np.arange(8),
        np.arange(-4, 4, dtype=np.float32), 108,
        scale_bits=np.concatenate([scale_low, scale_high], axis=1),
        scale_codes=_counting(-32, 6), scale_low=-32,
    )  # fmt: skip


def _packed_6_bit(byte: int) -> tuple[Bits, Bits]:
    """Sub-scales and sub-minima of Q4_K and Q5_K: 16 six-bit numbers in 12 bytes."""
    g = np.arange(4)
    first = _bits(byte + g, 0 * g, 6)
    first_min = _bits(byte + 4 + g, 0 * g, 6)
    last = np.concatenate([_bits(byte + 8 + g, 0 * g, 4), _bits(byte + g, 6 + 0 * g, 2)], axis=1)
    last_min = np.concatenate(
        [_bits(byte + 8 + g, 4 + 0 * g, 4), _bits(byte + 4 + g, 6 + 0 * g, 2)], axis=1
    )
    return np.concatenate([first, last]), np.concatenate([first_min, last_min])


def _q45_k(n_bits: int) -> Layout:
    i = np.arange(256)
    low_start = 16 if n_bits == 4 else 48
    code_bits = _bits(low_start + i // 64 * 32 + i % 32, i % 64 // 32 * 4, 4)
    if n_bits == 5:
        code_bits = np.concatenate([code_bits, _bits(16 + i % 32, i // 32, 1)], axis=1)
    scale_bits, min_bits = _packed_6_bit(4)
    n_levels = 1 << n_bits
    return Layout(
        256, 32, code_bits, np.arange(n_levels), np.arange(n_levels, dtype=np.float32), 0,
        min_byte=2, scale_bits=scale_bits, scale_codes=np.arange(64), min_bits=min_bits,
    )  # fmt: skip


def _q6_k() -> Layout:
    i, g = np.arange(256), np.arange(16)
    half, quarter, lane = i // 128, i % 128 // 32, i % 32
    low = _bits(64 * half + lane + 32 * (quarter % 2), quarter // 2 * 4, 4)
    high = _bits(128 + 32 * half + lane, 2 * quarter, 2)
    return Layout(
        256, 16, np.concatenate([low, high], axis=1), np.arange(64),
        np.arange(-32, 32, dtype=np.float32), 208, scale_bits=_bits(192 + g, 0 * g, 8),
        scale_codes=_counting(-128, 8, twos_complement=True), scale_low=-128,
    )  # fmt: skip


@cache
def layout_of(kind: Type) -> Layout | None:
    """The layout of `kind`, or None where weights are not coded one by one."""
    match kind:
        case Type.Q4_0 | Type.Q4_1:
            layout = _simple(kind, 4, has_min=kind == Type.Q4_1)
        case Type.Q5_0 | Type.Q5_1:
            layout = _simple(kind, 5, has_min=kind == Type.Q5_1)
        case Type.Q8_0:
            layout = _q8_0()
        case Type.IQ4_NL:
            layout = _iq4_nl()
        case Type.IQ4_XS:
            layout = _iq4_xs()
        case Type.Q2_K:
            layout = _q2_k()
        case Type.Q3_K:
            layout = _q3_k()
        case Type.Q4_K:
            layout = _q45_k(4)
        case Type.Q5_K:
            layout = _q45_k(5)
        case Type.Q6_K:
            layout = _q6_k()
        case _:
            return None
    assert GGML_QUANT_SIZES[kind][0] == layout.block
    return layout


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


# ---- codes ---------------------------------------------------------------------------------------


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
