// The noise z: single values and blocks of four, as GPUs make them too, and whole ranges.

#pragma once

#include "core/rng.h"
#include "zo.h"

namespace zo {

// The value of a Rademacher sequence that bit i stands for.
ZO_HD float sign_of_bit(uint32_t bits, uint64_t i) {
    return (bits >> i & 1) != 0 ? 1.0f : -1.0f;
}

// z[4 * index .. 4 * index + 3] of a tensor under either distribution.
ZO_HD void noise_block(bool rademacher, uint64_t seed, uint32_t tensor, uint64_t index, float z[4]) {
    if (!rademacher) {
        normal_block(seed, tensor, index, z);
        return;
    }
    const uint32_t bits = philox(seed, tensor, index / 8).x[0];
    for (int k = 0; k < 4; ++k) {
        z[k] = sign_of_bit(bits, 4 * (index % 8) + (uint64_t) k);
    }
}

inline bool is_known(zo_distribution distribution) {
    return distribution == ZO_NORMAL || distribution == ZO_RADEMACHER;
}

// zo_noise without its checks.
void noise_range(zo_distribution distribution, uint64_t seed, uint32_t tensor, int64_t first, int64_t n,
                 float * z);

}  // namespace zo
