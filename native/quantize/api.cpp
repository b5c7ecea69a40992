// What zo.h declares of quantized weights that are chosen anew.

#include <memory>

#include "core/error.h"
#include "quantize/search.h"
#include "quantize/steps.h"

using zo::check_array;
using zo::fail;
using zo::guarded;

static bool fits(const zo_layout * layout, int64_t n_blocks, int32_t n_threads) {
    return layout != nullptr && n_blocks >= 0 && n_blocks <= INT64_MAX / zo::MAX_BLOCK && n_threads >= 1;
}

zo_status zo_requantize(const zo_layout * layout, int64_t n_blocks, int64_t n_raw, const uint8_t * raw,
                        int64_t n_target, const float * target, const float * weight, int64_t n_touched,
                        const uint8_t * touched, int32_t n_threads, uint8_t * found) {
    return guarded([&] {
        if (!fits(layout, n_blocks, n_threads) || found == nullptr) {
            return fail(ZO_ARGUMENT, "zo_requantize got a null pointer or a number out of range");
        }
        const zo::block_layout blocks(*layout);
        zo_status status = check_array("zo_requantize", raw, n_raw, n_blocks * blocks.block_bytes);
        if (status == ZO_OK) {
            status = check_array("zo_requantize", target, n_target, n_blocks * blocks.block);
        }
        if (status == ZO_OK && touched != nullptr) {
            status = check_array("zo_requantize", touched, n_touched, n_blocks * blocks.n_groups);
        }
        if (status == ZO_OK) {
            zo::search_steps(blocks, n_blocks, raw, target, weight, touched, n_threads, found);
        }
        return status;
    });
}

zo_status zo_moments_init(zo_moments ** moments, int64_t n_samples, int64_t n_cols, int64_t n_x,
                          const float * x, int32_t n_threads) {
    return guarded([&] {
        if (moments == nullptr || n_samples < 1 || n_cols < 1 || n_cols > INT32_MAX ||
            n_samples > INT64_MAX / n_cols || n_threads < 1) {
            return fail(ZO_ARGUMENT, "zo_moments_init got a null pointer or a number out of range");
        }
        const zo_status status = check_array("zo_moments_init", x, n_x, n_samples * n_cols);
        if (status == ZO_OK) {
            *moments = new zo_moments{ zo::input_moments(x, n_samples, n_cols, n_threads), {}, -1 };
        }
        return status;
    });
}

void zo_moments_free(zo_moments * moments) {
    delete moments;
}

zo_status zo_moments_choose(zo_moments * moments, const zo_layout * layout, double ridge, int32_t sweeps,
                            int64_t n_blocks, const int64_t * ids, int32_t n_starts, int64_t n_raw,
                            const uint8_t * starts, int64_t n_target, const float * target, int32_t n_threads,
                            uint8_t * best, double * output_error) {
    return guarded([&] {
        if (moments == nullptr || !fits(layout, n_blocks, n_threads) || ids == nullptr || best == nullptr ||
            output_error == nullptr || !(ridge > 0) || sweeps < 0 || n_starts < 1) {
            return fail(ZO_ARGUMENT, "zo_moments_choose got a null pointer or a number out of range");
        }
        const zo::block_layout blocks(*layout);
        if (moments->inputs.h.n % blocks.block != 0) {
            return fail(ZO_ARGUMENT, "rows of the inputs' width are no whole number of blocks");
        }
        for (int64_t i = 0; i < n_blocks; ++i) {
            if (ids[i] < (i == 0 ? 0 : ids[i - 1] + 1)) {
                return fail(ZO_ARGUMENT, "numbers of blocks must ascend");
            }
        }
        zo_status status =
            check_array("zo_moments_choose", starts, n_raw, n_starts * n_blocks * blocks.block_bytes);
        if (status == ZO_OK) {
            status = check_array("zo_moments_choose", target, n_target, n_blocks * blocks.block);
        }
        if (status == ZO_OK) {
            const zo::code_problem problem{ n_blocks, ids, n_starts, starts, target, ridge, sweeps };
            *output_error = zo::choose_codes(blocks, *moments, problem, n_threads, best);
        }
        return status;
    });
}
