// Rounding of f32 to 16-bit floats, to nearest and ties to even, by integers alone: the same bits on the CPU
// and on a GPU, and the bits of ggml's conversions.

#pragma once

#include <cstdint>
#include <cstring>

#include "core/rng.h"

namespace zo {

ZO_HD uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ZO_HD uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        return (uint16_t) ((bits >> 16) | 64);  // a quiet NaN
    }
    return (uint16_t) ((bits + (0x7FFFu + ((bits >> 16) & 1))) >> 16);
}

ZO_HD uint16_t to_f16(float value) {
    const uint32_t bits = bits_of(value);
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000u);
    const uint32_t size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) {
        return (uint16_t) (sign | 0x7E00u | (size >> 13 & 0x1FFu));
    }
    if (size >= 0x477FF000u) {  // rounds to 65536 or more
        return (uint16_t) (sign | 0x7C00u);
    }
    if (size >= 0x38800000u) {  // a normal number: drop 13 bits of the mantissa
        const uint32_t rounded = size + 0xFFFu + (size >> 13 & 1);
        return (uint16_t) (sign | (uint16_t) ((rounded - 0x38000000u) >> 13));
    }
    if (size < 0x33000000u) {  // at most half of the smallest
        return sign;
    }
    // A multiple of 2^-24: shift the mantissa, its leading one included, to that place.
    const uint32_t shift    = 126 - (size >> 23);
    const uint32_t mantissa = (size & 0x7FFFFFu) | 0x800000u;
    const uint32_t kept     = mantissa >> shift;
    const uint32_t rest     = mantissa & ((1u << shift) - 1);
    const uint32_t half     = 1u << (shift - 1);
    return (uint16_t) (sign | (uint16_t) (kept + (rest > half || (rest == half && (kept & 1) != 0))));
}

}  // namespace zo
