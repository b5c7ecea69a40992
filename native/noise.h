// One value of the noise at a time, where values are not made in order.

#pragma once

#include "rng.h"

namespace zo {

// Value i of a tensor's Rademacher sequence: a counter gives the signs of 32 values.
ZO_HD float rademacher_value(uint64_t seed, uint32_t tensor, uint64_t i) {
    return (philox(seed, tensor, i / 32).x[0] >> (i % 32) & 1) != 0 ? 1.0f : -1.0f;
}

// z[4 * index .. 4 * index + 3] of a tensor under either distribution.
ZO_HD void noise_block(bool rademacher, uint64_t seed, uint32_t tensor, uint64_t index, float z[4]) {
    if (!rademacher) {
        normal_block(seed, tensor, index, z);
        return;
    }
    const uint32_t bits = philox(seed, tensor, index / 8).x[0];
    for (int k = 0; k < 4; ++k) {
        z[k] = (bits >> (4 * (index % 8) + (uint64_t) k) & 1) != 0 ? 1.0f : -1.0f;
    }
}

}  // namespace zo
