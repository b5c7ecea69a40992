// The noise in order, many values at a time.

#include "core/noise.h"

#include <algorithm>

#include "core/error.h"
#include "core/vectorize.h"

namespace zo {

// z[0 .. 4 * n_blocks) from block `first` on. Sixteen blocks at a time, lane by lane, is the shape
// that compilers turn into vector code.
ZO_INLINE static void noise_blocks(uint64_t seed, uint32_t tensor, uint64_t first, int64_t n_blocks,
                                   float * z) {
    constexpr int lanes = 16;
    int64_t       b     = 0;
    for (; b + lanes <= n_blocks; b += lanes) {
        uint32_t word[4][lanes];
        float    lane[4][lanes];
        for (int i = 0; i < lanes; ++i) {
            const philox_block words = philox(seed, tensor, first + (uint64_t) (b + i));
            word[0][i]               = words.x[0];
            word[1][i]               = words.x[1];
            word[2][i]               = words.x[2];
            word[3][i]               = words.x[3];
        }
        for (int k = 0; k < 4; k += 2) {
            for (int i = 0; i < lanes; ++i) {
                normal_pair(word[k][i], word[k + 1][i], lane[k][i], lane[k + 1][i]);
            }
        }
        for (int i = 0; i < lanes; ++i) {
            for (int k = 0; k < 4; ++k) {
                z[4 * (b + i) + k] = lane[k][i];
            }
        }
    }
    for (; b < n_blocks; ++b) {
        normal_block(seed, tensor, first + (uint64_t) b, z + 4 * b);
    }
}

// Each counter gives the signs of 32 values.
static void rademacher_range(uint64_t seed, uint32_t tensor, int64_t first, int64_t n, float * z) {
    for (int64_t i = first; i < first + n;) {
        const uint32_t bits = philox(seed, tensor, (uint64_t) (i / 32)).x[0];
        const int64_t  end  = std::min(first + n, (i / 32 + 1) * 32);
        for (; i < end; ++i) {
            z[i - first] = sign_of_bit(bits, (uint64_t) (i % 32));
        }
    }
}

void noise_range(zo_distribution distribution, uint64_t seed, uint32_t tensor, int64_t first, int64_t n,
                 float * z) {
    if (distribution == ZO_RADEMACHER) {
        rademacher_range(seed, tensor, first, n, z);
        return;
    }
    const int64_t end = first + n;
    int64_t       i   = first;
    float         part[4];
    const auto    copy = [&](int64_t until) {  // the part of one block that the range covers
        normal_block(seed, tensor, (uint64_t) (i / 4), part);
        for (; i < until; ++i) {
            z[i - first] = part[i % 4];
        }
    };
    if (i % 4 != 0) {
        copy(std::min(end, (i / 4 + 1) * 4));
    }
    const int64_t n_blocks = (end - i) / 4;
    vectorized<noise_blocks>(seed, tensor, (uint64_t) (i / 4), n_blocks, z + (i - first));
    i += 4 * n_blocks;
    if (i < end) {
        copy(end);
    }
}

}  // namespace zo

zo_status zo_noise(zo_distribution distribution, uint64_t seed, uint32_t tensor, int64_t first, int64_t n,
                   float * z) {
    if (z == nullptr || first < 0 || n < 0 || !zo::is_known(distribution)) {
        return zo::fail(ZO_ARGUMENT, "zo_noise needs a distribution, a non-negative range and an array");
    }
    zo::noise_range(distribution, seed, tensor, first, n, z);
    return ZO_OK;
}
