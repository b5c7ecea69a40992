"""Where codes and scales lie inside the blocks of ggml's quantization types, as bit positions.

A weight of such a type is `d * scale * level[code] - offset`, per group of 16 or 32 weights, where
`offset` is `dmin * min` in K-quants and `-m` in Q4_1 and Q5_1. libzo takes blocks apart by these
positions and puts them together again. The lattice types (IQ1 to IQ3) code several weights together
and have no layout here.
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
