#include "cpu/lowrank.h"

#include "core/parallel.h"
#include "core/vectorize.h"

namespace zo {

// Enough sums side by side to fill the vector units whatever their width.
static constexpr int64_t LANES = 32;

ZO_INLINE static float dot(const float * a, const float * b, int64_t n) {
    float   sums[LANES] = {};
    int64_t i           = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int64_t k = 0; k < LANES; ++k) {
            sums[k] += a[i + k] * b[i + k];
        }
    }
    float total = 0;
    for (; i < n; ++i) {
        total += a[i] * b[i];
    }
    for (int64_t k = 0; k < LANES; ++k) {
        total += sums[k];
    }
    return total;
}

ZO_INLINE static void add_scaled(float * y, const float * a, float scale, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] += scale * a[i];
    }
}

void lowrank_apply(const lowrank_weight & weight, const lowrank_factors & factors, const columns & x,
                   const columns & y, int64_t first, int64_t end, int n_threads) {
    parallel_for(end - first, n_threads, [&](int64_t token, int) {
        const float * in  = x.at(first + token);
        float *       out = y.at(first + token);
        for (int64_t r = 0; r < factors.rank; ++r) {
            const float inner = vectorized<dot>(factors.right.data() + r * weight.n_cols, in, weight.n_cols);
            vectorized<add_scaled>(out, factors.left.data() + r * weight.n_rows, inner, weight.n_rows);
        }
    });
}

}  // namespace zo
