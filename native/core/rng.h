// Counter-based standard normal noise: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller.
//
// Only integer operations and single IEEE f32 additions, multiplications, divisions and square roots
// are used, in a fixed order, so that the CPU, a GPU and numpy all give the same bits. No libm. Compile
// without contraction to fused multiply-add. The polynomials are Chebyshev fits made for this file,
// with absolute errors below 1e-8.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/vectorize.h"

namespace zo {

struct philox_block {
    uint32_t x[4];
};

// The four words of counter (index, tensor) under key `seed`.
ZO_HD philox_block philox(uint64_t seed, uint32_t tensor, uint64_t index) {
    uint32_t c0 = (uint32_t) index, c1 = (uint32_t) (index >> 32), c2 = tensor, c3 = 0;
    uint32_t k0 = (uint32_t) seed, k1 = (uint32_t) (seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = (uint64_t) 0xD2511F53u * c0;
        const uint64_t p1 = (uint64_t) 0xCD9E8D57u * c2;
        const uint32_t n0 = (uint32_t) (p1 >> 32) ^ c1 ^ k0;
        const uint32_t n2 = (uint32_t) (p0 >> 32) ^ c3 ^ k1;
        c1                = (uint32_t) p1;
        c3                = (uint32_t) p0;
        c0                = n0;
        c2                = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return { { c0, c1, c2, c3 } };
}

// Natural logarithm for u in [2^-33, 1].
ZO_HD float log_unit(float u) {
    uint32_t bits;
    memcpy(&bits, &u, sizeof bits);
    // Shift the exponent so that the mantissa lies in [sqrt(1/2), sqrt(2)).
    const uint32_t shifted = bits - 0x3F3504F3u;
    const int32_t  e       = (int32_t) shifted >> 23;
    const uint32_t m       = bits - ((uint32_t) e << 23);
    float          f;
    memcpy(&f, &m, sizeof f);
    f              = f - 1.0f;
    float p        = -0.08101558685302734f;
    p              = p * f + 0.12712307274341583f;
    p              = p * f + -0.12972238659858704f;
    p              = p * f + 0.14202173054218292f;
    p              = p * f + -0.16642247140407562f;
    p              = p * f + 0.20001468062400818f;
    p              = p * f + -0.25000298023223877f;
    p              = p * f + 0.333333283662796f;
    const float f2 = f * f;
    const float lo = f2 * f * p - 0.5f * f2;
    return (float) e * 0.6931471824645996f + (lo + f);
}

// cos and sin of 2 pi * w / 2^32.
ZO_HD void cos_sin_turn(uint32_t w, float & cosine, float & sine) {
    const uint32_t quadrant = (w + 0x20000000u) >> 30;
    const int32_t  rest     = (int32_t) (w - (quadrant << 30));        // [-2^29, 2^29)
    const float    t        = (float) rest * 1.4629180792671596e-09f;  // pi / 2^31
    const float    u        = t * t;
    const float    ps = (u * -0.00019587899441830814f + 0.008332747966051102f) * u + -0.166666641831398f;
    const float    pc = (u * 2.4548069632146508e-05f + -0.001388830365613103f) * u + 0.0416666641831398f;
    const float    s  = t + t * (u * ps);
    const float    c  = (1.0f - 0.5f * u) + u * (u * pc);
    // Quadrant q turns (c, s) by q * 90 degrees.
    const bool  swap = (quadrant & 1u) != 0;
    const float a    = swap ? s : c;
    const float b    = swap ? c : s;
    cosine           = (quadrant == 1u || quadrant == 2u) ? -a : a;
    sine             = (quadrant & 2u) != 0 ? -b : b;
}

// Two standard normal values from two words.
ZO_HD void normal_pair(uint32_t w0, uint32_t w1, float & z0, float & z1) {
    const float u = (float) w0 * 2.3283064365386963e-10f + 1.1641532182693481e-10f;  // (0, 1]
    const float r = sqrtf(-2.0f * log_unit(u));
    float       c, s;
    cos_sin_turn(w1, c, s);
    z0 = r * c;
    z1 = r * s;
}

// z[4 * index .. 4 * index + 3] of a tensor.
ZO_HD void normal_block(uint64_t seed, uint32_t tensor, uint64_t index, float z[4]) {
    const philox_block b = philox(seed, tensor, index);
    normal_pair(b.x[0], b.x[1], z[0], z[1]);
    normal_pair(b.x[2], b.x[3], z[2], z[3]);
}

}  // namespace zo
