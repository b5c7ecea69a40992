#include "cpu/dequantize.h"

#include <cstring>

#include "core/vectorize.h"

namespace zo {

namespace {

// Exact for all finite values: the exponent is moved by a multiplication, which subnormals survive.
ZO_INLINE float from_f16(uint16_t half) {
    const uint32_t magnitude = (uint32_t) (half & 0x7FFFu) << 13, sign = (uint32_t) (half & 0x8000u) << 16;
    float          value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 5.192296858534828e33f;  // 2^112
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ZO_INLINE float f16_at(const uint8_t * from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return from_f16(half);
}

ZO_INLINE void read_f16(const uint8_t * from, int64_t n, float * to) {
    for (int64_t i = 0; i < n; ++i) {
        to[i] = f16_at(from + 2 * i);
    }
}

constexpr int BLOCK = 32;  // values, of the types below; 16 bytes hold two half blocks of 4 bits

// { f16 d; 16 bytes }: d * (q - 8)
ZO_INLINE void read_q4_0(const uint8_t * __restrict from, int64_t n, float * __restrict to) {
    for (; n > 0; n -= BLOCK, from += 18, to += BLOCK) {
        const float d = f16_at(from);
        for (int i = 0; i < 16; ++i) {
            to[i] = d * (float) ((int) (from[2 + i] & 15) - 8);
        }
        for (int i = 0; i < 16; ++i) {
            to[16 + i] = d * (float) ((int) (from[2 + i] >> 4) - 8);
        }
    }
}

// { f16 d; f16 m; 16 bytes }: d * q + m
ZO_INLINE void read_q4_1(const uint8_t * __restrict from, int64_t n, float * __restrict to) {
    for (; n > 0; n -= BLOCK, from += 20, to += BLOCK) {
        const float d = f16_at(from), m = f16_at(from + 2);
        for (int i = 0; i < 16; ++i) {
            to[i] = d * (float) (int) (from[4 + i] & 15) + m;
        }
        for (int i = 0; i < 16; ++i) {
            to[16 + i] = d * (float) (int) (from[4 + i] >> 4) + m;
        }
    }
}

// Half a block of Q6_K: the low four bits of a value in `low`, the high two in `high`, a scale for 16 values.
ZO_INLINE void read_half_q6_k(const uint8_t * low, const uint8_t * high, const uint8_t * scales, float d,
                              float * to) {
    for (int quarter = 0; quarter < 4; ++quarter) {
        const uint8_t * bits  = low + 32 * (quarter & 1);
        const int       shift = 4 * (quarter >> 1), at = 2 * quarter;
        const float     scale[2] = { d * (float) (int8_t) scales[at], d * (float) (int8_t) scales[at + 1] };
        for (int part = 0; part < 2; ++part) {
            for (int i = 16 * part; i < 16 * part + 16; ++i) {
                const int q          = (bits[i] >> shift & 15) | (high[i] >> at & 3) << 4;
                to[32 * quarter + i] = scale[part] * (float) (q - 32);
            }
        }
    }
}

// { 128 bytes low; 64 bytes high; 16 signed scales; f16 d }: d * scale * (q - 32)
ZO_INLINE void read_q6_k(const uint8_t * __restrict from, int64_t n, float * __restrict to) {
    for (; n > 0; n -= 256, from += 210, to += 256) {
        const float d = f16_at(from + 208);
        for (int half = 0; half < 2; ++half) {
            read_half_q6_k(from + 64 * half, from + 128 + 32 * half, from + 192 + 8 * half, d,
                           to + 128 * half);
        }
    }
}

}  // namespace

bool can_dequantize(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}

void dequantize(ggml_type type, const char * from, int64_t n, float * to) {
    const uint8_t * bytes = (const uint8_t *) from;
    switch (type) {
    case GGML_TYPE_F32:
        memcpy(to, from, (size_t) n * sizeof(float));
        return;
    case GGML_TYPE_F16:
        return vectorized<read_f16>(bytes, n, to);
    case GGML_TYPE_Q4_0:
        return vectorized<read_q4_0>(bytes, n, to);
    case GGML_TYPE_Q4_1:
        return vectorized<read_q4_1>(bytes, n, to);
    case GGML_TYPE_Q6_K:
        return vectorized<read_q6_k>(bytes, n, to);
    default:
        return ggml_get_type_traits(type)->to_float(from, to, n);
    }
}

}  // namespace zo
