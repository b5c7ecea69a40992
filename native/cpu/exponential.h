// Exponentials that compilers turn into vector code, which they do not do with libm's.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/vectorize.h"

namespace zo {

// e^x for x <= 0, relative error below 2e-7: 2^n times a polynomial in the remainder.
ZO_INLINE float exp_negative(float x) {
    x                  = std::max(x, -87.0f);
    const float n      = (float) (int32_t) (x * 1.44269504f - 0.5f);
    const float r      = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    float       p      = 1.0f / 720;
    p                  = p * r + 1.0f / 120;
    p                  = p * r + 1.0f / 24;
    p                  = p * r + 1.0f / 6;
    p                  = p * r + 0.5f;
    p                  = p * r + 1.0f;
    p                  = p * r + 1.0f;
    const int32_t bits = ((int32_t) n + 127) << 23;
    float         scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// 1 / (1 + e^-x)
ZO_INLINE float logistic(float x) {
    const float e = exp_negative(-std::fabs(x));
    return (x < 0 ? e : 1.0f) / (1 + e);
}

}  // namespace zo
