#include "params/lowrank.h"

#include <limits>

#include "core/error.h"
#include "core/parallel.h"
#include "core/vectorize.h"
#include "gpu/gpu.h"

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

using zo::fail;
using zo::guarded;

zo_status zo_lowrank_init(zo_lowrank ** lowrank, zo_distribution distribution, int32_t n_threads) {
    return guarded([&] {
        if (lowrank == nullptr || n_threads < 1) {
            return fail(ZO_ARGUMENT, "zo_lowrank_init needs at least one thread");
        }
        *lowrank                 = new zo_lowrank;
        (*lowrank)->distribution = distribution;
        (*lowrank)->n_threads    = n_threads;
        return ZO_OK;
    });
}

void zo_lowrank_free(zo_lowrank * lowrank) {
    delete lowrank;
}

zo_status zo_lowrank_add(zo_lowrank * lowrank, const char * name, int64_t n_rows, int64_t n_cols) {
    return guarded([&] {
        constexpr int64_t limit = std::numeric_limits<int32_t>::max();
        if (lowrank == nullptr || name == nullptr || n_rows < 1 || n_cols < 1 || n_rows > limit ||
            n_cols > limit) {
            return fail(ZO_ARGUMENT, "zo_lowrank_add needs a name and a shape");
        }
        if (lowrank->find(name) != nullptr) {
            return fail(ZO_ARGUMENT, std::string(name) + " was added before");
        }
        zo::lowrank_weight weight;
        weight.name   = name;
        weight.n_rows = n_rows;
        weight.n_cols = n_cols;
        lowrank->append(std::move(weight));
        return ZO_OK;
    });
}

zo_status zo_lowrank_set(zo_lowrank * lowrank, int32_t branch, int32_t number, int64_t rank,
                         const float * left, const float * right) {
    return guarded([&] {
        if (lowrank == nullptr || left == nullptr || right == nullptr || branch < 0 || branch > 4096 ||
            number < 0 || (size_t) number >= lowrank->weights.size() || rank < 1 || rank > 1 << 16) {
            return fail(ZO_ARGUMENT, "zo_lowrank_set got a weight, branch or rank out of range");
        }
        zo::lowrank_weight & weight = lowrank->weights[(size_t) number];
        if (weight.branches.size() <= (size_t) branch) {
            weight.branches.resize((size_t) branch + 1);
        }
        zo::lowrank_factors & factors = weight.branches[(size_t) branch];
        factors.rank                  = rank;
        factors.version += 1;
        factors.left.assign(left, left + rank * weight.n_rows);
        factors.right.assign(right, right + rank * weight.n_cols);
        return ZO_OK;
    });
}

zo_status zo_lowrank_apply(zo_lowrank * lowrank, int32_t branch, int32_t number, int64_t n_tokens,
                           const float * x, int64_t x_stride, float * y, int64_t y_stride, int32_t n_threads,
                           int32_t device) {
    return guarded([&] {
        if (lowrank == nullptr || x == nullptr || y == nullptr || number < 0 ||
            (size_t) number >= lowrank->weights.size() || branch < 0 ||
            (size_t) branch >= lowrank->n_branches(lowrank->weights[(size_t) number]) || n_tokens < 0) {
            return fail(ZO_ARGUMENT, "zo_lowrank_apply got a weight or branch out of range");
        }
        const zo::lowrank_weight & weight = lowrank->weights[(size_t) number];
        if (x_stride < weight.n_cols || y_stride < weight.n_rows) {
            return fail(ZO_ARGUMENT, "strides are shorter than the rows of " + weight.name);
        }
        const auto as_columns = [&](const float * data, int64_t stride) {
            const size_t nb = (size_t) stride * sizeof(float);
            return zo::columns{ (char *) data, std::max<int64_t>(n_tokens, 1), 1, nb, 0, 0 };
        };
        const zo::columns in = as_columns(x, x_stride), out = as_columns(y, y_stride);
        if (device >= 0) {
            return zo::apply_on(device, in, weight.n_cols, out, weight.n_rows,
                                [&](zo::gpu & gpu, auto... xy) {
                                    gpu.add_lowrank(*lowrank, weight, xy..., { { 0, n_tokens, branch } });
                                });
        }
        zo::lowrank_apply(weight, lowrank->factors(weight, branch), in, out, 0, n_tokens, n_threads);
        return ZO_OK;
    });
}
