// What libzo says of itself, and its kernels called by themselves on host arrays.

#include <cstring>
#include <memory>

#include "core/columns.h"
#include "core/error.h"
#include "cpu/loss.h"
#include "cpu/lowrank.h"
#include "cpu/sparse.h"
#include "ggml.h"
#include "gpu/gpu.h"
#include "zo.h"

using zo::fail;
using zo::guarded;

std::string & zo::last_error() {
    thread_local std::string text;
    return text;
}

const char * zo_engine_version(void) {
    return ZO_ENGINE_VERSION;
}

zo_status zo_check_engine(void) {
    return guarded([&] {
        ggml_init_params params{ 1 << 16, nullptr, true };
        ggml_context *   ctx = ggml_init(params);
        if (ctx == nullptr) {
            return fail(ZO_MEMORY, "ggml_init failed");
        }
        ggml_tensor * w = ggml_new_tensor_2d(ctx, GGML_TYPE_Q4_0, 64, 3);
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 64, 5);
        ggml_tensor * y = ggml_mul_mat(ctx, w, x);
        ggml_set_name(y, "probe");
        const bool agrees = y->src[0] == w && y->src[1] == x && y->ne[0] == 3 && y->ne[1] == 5 &&
                            y->ne[3] == 1 && y->nb[0] == sizeof(float) && y->nb[1] == 3 * sizeof(float) &&
                            y->type == GGML_TYPE_F32 && w->type == GGML_TYPE_Q4_0 && w->view_src == nullptr &&
                            y->data == nullptr && y->buffer == nullptr &&
                            std::strcmp(y->name, "probe") == 0 &&
                            std::strcmp(ggml_op_name(y->op), "MUL_MAT") == 0 &&
                            std::strcmp(ggml_op_name(GGML_OP_MUL_MAT_ID), "MUL_MAT_ID") == 0 &&
                            std::strcmp(ggml_op_name(GGML_OP_GET_ROWS), "GET_ROWS") == 0;
        ggml_free(ctx);
        return agrees ? ZO_OK : fail(ZO_GRAPH, "the layout of ggml_tensor differs");
    });
}

const char * zo_last_error(void) {
    return zo::last_error().c_str();
}

zo_status zo_store_apply(zo_store * store, const char * name, zo_branch branch, int64_t n_tokens,
                         const float * x, int64_t x_stride, float * y, int64_t y_stride, int32_t device) {
    return guarded([&] {
        const zo::sparse_weight * weight = store != nullptr && name != nullptr ? store->find(name) : nullptr;
        if (weight == nullptr || x == nullptr || y == nullptr || n_tokens < 1 || x_stride < weight->n_cols ||
            y_stride < weight->n_rows) {
            return fail(ZO_ARGUMENT, "zo_store_apply got an unknown weight or a wrong size");
        }
        const size_t x_bytes = (size_t) x_stride * sizeof(float), y_bytes = (size_t) y_stride * sizeof(float);
        const zo::columns in{ (char *) x, n_tokens, 1, x_bytes, 0, 0 },
            out{ (char *) y, n_tokens, 1, y_bytes, 0, 0 };
        if (device >= 0) {
            return zo::apply_on(
                device, in, weight->n_cols, out, weight->n_rows, [&](zo::gpu & gpu, auto... xy) {
                    gpu.add_sparse(*store, *weight, { branch }, xy..., { { 0, n_tokens, 0 } });
                });
        }
        zo::sparse_scratch scratch;
        zo::sparse_apply(*weight, store->branch_values(*weight, branch), in, out, 0, n_tokens,
                         store->n_threads, scratch);
        return ZO_OK;
    });
}

zo_status zo_lowrank_apply(zo_lowrank * lowrank, int32_t branch, int32_t number, int64_t n_tokens,
                           const float * x, int64_t x_stride, float * y, int64_t y_stride, int32_t n_threads,
                           int32_t device) {
    return guarded([&] {
        if (lowrank == nullptr || x == nullptr || y == nullptr || !lowrank->has(number) || branch < 0 ||
            (size_t) branch >= lowrank->n_branches(lowrank->weights[(size_t) number]) || n_tokens < 0 ||
            n_threads < 1) {
            return fail(ZO_ARGUMENT, "zo_lowrank_apply got a weight, branch or number out of range");
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

zo_status zo_losses(const float * logits, int64_t n_vocab, int64_t stride, int32_t n_outputs,
                    int32_t n_targets, const int32_t * target_output, const int32_t * target_token,
                    int32_t n_threads, int32_t device, double * nll) {
    return guarded([&] {
        if (logits == nullptr || target_output == nullptr || target_token == nullptr || nll == nullptr) {
            return fail(ZO_ARGUMENT, "zo_losses got a null pointer");
        }
        if (n_vocab < 1 || stride < n_vocab || n_outputs < 1 || n_targets < 1 || n_threads < 1) {
            return fail(ZO_ARGUMENT, "zo_losses got a size or a number of threads out of range");
        }
        const zo::targets wanted{ { target_output, target_output + n_targets },
                                  { target_token, target_token + n_targets } };
        if (!wanted.fit(n_outputs, n_vocab)) {
            return fail(ZO_ARGUMENT, "targets must be tokens of the vocabulary at ascending outputs");
        }
        const size_t bytes = (size_t) stride * sizeof(float);
        if (device >= 0) {
            const size_t size = (size_t) (n_outputs - 1) * bytes + (size_t) n_vocab * sizeof(float);
            const std::unique_ptr<zo::gpu> gpu = zo::open_gpu(device);
            gpu->losses(gpu->lend(logits, size), n_vocab, bytes, wanted, nll);
            return ZO_OK;
        }
        zo::negative_log_likelihoods((const char *) logits, n_vocab, bytes, wanted, n_threads, nll);
        return ZO_OK;
    });
}
