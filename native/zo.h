// libzo: weight perturbations inside a stock llama.cpp forward pass.
//
// The engine calls `zo_hook_eval` for every graph node (llama_context_params.cb_eval). At a matrix
// product with a weight that has trainable entries, the hook adds S*x to the product, where S holds
// theta + scale * z(seed) at the entries of the store, or a product of low rank: the quantized weight
// itself is never touched. The product with a norm's weight may get gains. Block scales and float weights are
// edited in place, between decodes. At the output node the hook reduces the logits to one negative
// log-likelihood per target.
//
// Plain C, opaque handles, status codes; `zo_last_error` says what went wrong in words. Matrices are
// row-major with the input dimension contiguous, as in ggml. A handle must not be used by two threads
// at once.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#if defined(_WIN32)
#define ZO_API __declspec(dllexport)
#else
#define ZO_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_backend_buffer_type;
struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
struct llama_sampler;
struct llama_sampler_data;

typedef struct zo_recorder zo_recorder;
typedef struct zo_store    zo_store;
typedef struct zo_inplace  zo_inplace;
typedef struct zo_lowrank  zo_lowrank;
typedef struct zo_gain     zo_gain;
typedef struct zo_tensors  zo_tensors;
typedef struct zo_feedback zo_feedback;
typedef struct zo_moments  zo_moments;
typedef struct zo_hook     zo_hook;

typedef enum zo_status {
    ZO_OK       = 0,
    ZO_ARGUMENT = 1,  // an argument is out of range or contradicts another
    ZO_MEMORY   = 2,  // allocation failed
    ZO_GRAPH    = 3,  // the engine's graph is not what the hook was told to expect
} zo_status;

// What z is drawn from.
typedef enum zo_distribution {
    ZO_NORMAL     = 0,  // N(0, 1)
    ZO_RADEMACHER = 1,  // -1 or 1
} zo_distribution;

// A probe as one forward pass sees it: every trainable value is theta + scale * z(seed).
typedef struct zo_branch {
    uint64_t seed;
    float    scale;
} zo_branch;

// What one llama_decode holds. Token columns stand in batch order; output columns are the tokens with
// a logits flag, in the same order. Arrays are copied by zo_hook_begin.
typedef struct zo_batch {
    int32_t           n_tokens;
    int32_t           n_outputs;
    int32_t           n_branches;
    int32_t           n_targets;
    const int32_t *   token_branch;   // [n_tokens]  index into branches
    const int32_t *   output_branch;  // [n_outputs] index into branches
    const zo_branch * branches;       // [n_branches]
    const int32_t *   target_output;  // [n_targets] output column, ascending
    const int32_t *   target_token;   // [n_targets] token id whose likelihood is wanted
} zo_batch;

// Version of llama-cpp-python whose headers this library was compiled with.
ZO_API const char * zo_engine_version(void);

// Whose device memory the kernels here work in: "CUDA", "ROCm", or "" if they run on the CPU alone; and on
// how many devices of this machine.
ZO_API const char * zo_gpu_kernels(void);
ZO_API int32_t      zo_gpu_count(void);

// Kernels that libzo has queued so far, on all devices.
ZO_API int64_t zo_gpu_launches(void);

// Builds a small graph with the loaded engine and reads it back through the structs this library was
// compiled with. Anything but ZO_OK means that installing a hook would read garbage.
ZO_API zo_status zo_check_engine(void);

// Branches of a decode, at most.
#define ZO_MAX_BRANCHES 4096

// Text of the last failure on this thread, never NULL.
ZO_API const char * zo_last_error(void);

// Which parameters a tensor of the noise belongs to.
typedef enum zo_part {
    ZO_SPARSE  = 0,
    ZO_INPLACE = 1,
    ZO_LOWRANK = 2,
    ZO_GAIN    = 3,
} zo_part;

// The noise's number of the index-th tensor of a part, so that several parts may be trained together.
#define ZO_TENSOR(part, index) (((uint32_t) (part) << 30) + (uint32_t) (index))

// n values z[first .. first+n) of tensor number `tensor` under `seed`. The same bits on every machine and
// for any split of the range.
ZO_API zo_status zo_noise(zo_distribution distribution, uint64_t seed, uint32_t tensor, int64_t first,
                          int64_t n, float * z);

// ---- store: the f32 masters of all trainable entries ------------------------------------------------

ZO_API zo_status zo_store_init(zo_store ** store, zo_distribution distribution, int32_t n_threads);
ZO_API void      zo_store_free(zo_store * store);

// Appends a weight's entries: sorted, unique flat indices (row * n_cols + col) and their masters.
ZO_API zo_status zo_store_add(zo_store * store, const char * name, int64_t n_rows, int64_t n_cols,
                              int64_t nnz, const int64_t * indices, const float * theta);

ZO_API int64_t zo_store_size(const zo_store * store);  // entries of all weights

// The masters of all weights; n must be the size.
ZO_API zo_status zo_store_read(const zo_store * store, int64_t n, float * theta);
ZO_API zo_status zo_store_write(zo_store * store, int64_t n, const float * theta);

// z of all of them, as a branch with this seed has it.
ZO_API zo_status zo_store_noise(zo_store * store, uint64_t seed, int64_t n, float * z);

// ---- in place: values inside the bytes of loaded weights --------------------------------------------

typedef enum zo_storage { ZO_F32 = 0, ZO_F16 = 1, ZO_BF16 = 2 } zo_storage;

// Values at fixed places in the blocks of a tensor: the f16 scales of a quantized one, or all weights of
// a float one (blocks of one value). The live value of the master t is
//   t, or with `base` and `relative`  base * max(1 + t, 2^-10),
//      or with `base` alone           t, but at least 1e-7 on the side of zero where base lies.
// z is 0 where |t| > limit (Sparse-MeZO, arXiv 2402.15751; no limit: INFINITY).
typedef struct zo_field {
    int64_t       n_values;
    int64_t       block_bytes;
    int32_t       n_per_block;  // 1 or 2
    int32_t       offset[2];    // in a block
    zo_storage    storage;
    bool          relative;
    float         limit;
    const float * base;  // [n_values] or NULL
} zo_field;

ZO_API zo_status zo_inplace_init(zo_inplace ** inplace, zo_distribution distribution, int32_t n_threads);
ZO_API void      zo_inplace_free(zo_inplace * inplace);

// `n_bytes` is the size of the whole tensor. Its place in memory is learned from the first decode.
ZO_API zo_status zo_inplace_add(zo_inplace * inplace, const char * name, const zo_field * field,
                                int64_t n_bytes, const float * theta);

ZO_API int64_t zo_inplace_size(const zo_inplace * inplace);

// Of all tensors, with n the size: the masters, z, and the live values of a branch.
ZO_API zo_status zo_inplace_read(const zo_inplace * inplace, int64_t n, float * theta);
ZO_API zo_status zo_inplace_write(zo_inplace * inplace, int64_t n, const float * theta);
ZO_API zo_status zo_inplace_noise(const zo_inplace * inplace, uint64_t seed, int64_t n, float * z);
ZO_API zo_status zo_inplace_values(const zo_inplace * inplace, zo_branch branch, int64_t n, float * live);

// Fails if a tensor was not seen in a decode or lies where it must not be written. Rows that llama.cpp
// interleaved for the CPU are written as they lie, if the layout is one that the base's scales show.
ZO_API zo_status zo_inplace_check(const zo_inplace * inplace);

// Writes the live values of a branch into the loaded weights; between decodes only. Fails as
// zo_inplace_check does, with nothing written.
ZO_API zo_status zo_inplace_apply(zo_inplace * inplace, zo_branch branch);

// ---- low rank: y += left * (right * x) ---------------------------------------------------------------

ZO_API zo_status zo_lowrank_init(zo_lowrank ** lowrank, zo_distribution distribution, int32_t n_threads);
ZO_API void      zo_lowrank_free(zo_lowrank * lowrank);
ZO_API zo_status zo_lowrank_add(zo_lowrank * lowrank, const char * name, int64_t n_rows, int64_t n_cols);

// Sets the factors of the number-th weight added, in one branch: left [rank][n_rows], transposed for speed,
// with n_left values, and right [rank][n_cols] with n_right. They are copied, and stay until they are set
// again.
ZO_API zo_status zo_lowrank_set(zo_lowrank * lowrank, int32_t branch, int32_t number, int64_t rank,
                                int64_t n_left, const float * left, int64_t n_right, const float * right);

// Trains the factors of the number-th weight themselves, as those of a LoRA are. The n `masters` are right
// [rank][n_cols] and then left [rank][n_rows], which counts `factor` times. They are copied. Such a weight
// must not be given to zo_lowrank_set.
ZO_API zo_status zo_lowrank_train(zo_lowrank * lowrank, int32_t number, int64_t rank, float factor,
                                  uint32_t tensor, int64_t n, const float * masters);

// Moves the masters of all trained factors in a branch to masters + scale * z(seed), where each weight's z
// is that of its `tensor` in zo_noise.
ZO_API zo_status zo_lowrank_probe(zo_lowrank * lowrank, int32_t branch, zo_branch probe);

// ---- gains: y *= factors, after an element-wise product with a weight (a norm's) ---------------------

ZO_API zo_status zo_gain_init(zo_gain ** gain);
ZO_API void      zo_gain_free(zo_gain * gain);
ZO_API zo_status zo_gain_add(zo_gain * gain, const char * name, int64_t n);

// Sets the factors of the number-th weight added, in one branch; n must be the weight's. They are copied, and
// stay until they are set again.
ZO_API zo_status zo_gain_set(zo_gain * gain, int32_t branch, int32_t number, int64_t n,
                             const float * factors);

// ---- tensors: found by name in the graph, rewritten whole -------------------------------------------

ZO_API zo_status zo_tensors_init(zo_tensors ** tensors);
ZO_API void      zo_tensors_free(zo_tensors * tensors);
ZO_API zo_status zo_tensors_add(zo_tensors * tensors, const char * name, int64_t n_bytes);

// A callback that only looks where the tensors lie, in one decode; `tensors` is its user data.
ZO_API bool zo_tensors_eval(struct ggml_tensor * node, bool ask, void * tensors);

// How many tensors cannot be rewritten yet, -1 without `tensors`: no decode has used them, or only as copies
// on a device. The next new context may use the others themselves, once one tensor in the same memory was
// found.
ZO_API int32_t zo_tensors_missing(const zo_tensors * tensors);

// Rewrites the number-th tensor added, wherever it lies; between decodes only. Fails if it is missing, or
// if its size is not n_bytes.
ZO_API zo_status zo_tensors_set(const zo_tensors * tensors, int32_t number, const void * data,
                                int64_t n_bytes);

// ---- recorder: what weights are multiplied by --------------------------------------------------------

ZO_API zo_status zo_recorder_init(zo_recorder ** recorder);
ZO_API void      zo_recorder_free(zo_recorder * recorder);

// Appends a weight whose products take inputs of n_cols values.
ZO_API zo_status zo_recorder_add(zo_recorder * recorder, const char * name, int64_t n_cols);

// Before llama_decode, beside zo_hook_begin: how many tokens it has, those of them to record, and those that
// are outputs, both ascending. What was recorded before is dropped.
ZO_API zo_status zo_recorder_begin(zo_recorder * recorder, int32_t n_tokens, int32_t n_kept,
                                   const int32_t * kept, int32_t n_outputs, const int32_t * outputs);

// After it: the number of the input that the number-th weight was multiplied by, -1 if that was no plain
// matrix product, and how many of its rows were recorded. Weights that read the same have the same input.
// Where the engine drops all tokens but the outputs before the product, the others have no rows.
ZO_API zo_status zo_recorder_find(const zo_recorder * recorder, int32_t number, int32_t * input,
                                  int32_t * n_rows);

// That input, x [n_rows][n_cols], and the tokens [n_rows] that its rows belong to. Fails where there is none,
// with the reason.
ZO_API zo_status zo_recorder_read(const zo_recorder * recorder, int32_t number, int32_t n_rows,
                                  int64_t n_cols, int32_t * tokens, float * x);

// ---- feedback: gradients by a reverse pass over single tokens ----------------------------------------
//
// One decode goes through a hook with a feedback; then the loss sum w_i * nll_i over its targets is led back
// from the logits, token by token, through all operations on single tokens: norms, feed-forward parts, the
// residual stream. What attention, scans and routers give counts as constant, as if it were detached; only
// tokens with targets are looked at. The first decode of a graph only shows it.

// `tail`: of the probability that is not on targets, which part may be left out of the gradient at the
// logits; its error is at most `tail` times its sum of magnitudes. With `force_staged` as in zo_hook_init.
ZO_API zo_status zo_feedback_init(zo_feedback ** feedback, int32_t n_threads, double tail, bool force_staged);
ZO_API void      zo_feedback_free(zo_feedback * feedback);

// Lends the bytes of a weight (of a ggml_type) as they are in the file, used where the engine has them
// elsewhere or otherwise. They must outlive `feedback`.
ZO_API zo_status zo_feedback_weight(zo_feedback * feedback, const char * name, int32_t type,
                                    const void * data, int64_t n_bytes);

// Matrices are numbered in the order of these calls. For W x + left^T right x with right [rank][n_cols]
// given, of n_right values: the gradient with respect to left [rank][n_rows], added up over all runs. With
// rank 0, and NULL, the pairs of the last run instead.
ZO_API zo_status zo_feedback_track(zo_feedback * feedback, const char * name, int64_t n_rows, int64_t n_cols,
                                   int64_t rank, int64_t n_right, const float * right);

// Norms have numbers of their own: the gradient with respect to the gain g of a norm's product times 1 + g.
ZO_API zo_status zo_feedback_track_gain(zo_feedback * feedback, const char * name, int64_t n);

// Before a decode, in addition to zo_hook_begin: the same batch, of one branch, and the token column of each
// output. After it: whether the decode was gathered. If not, its graph is known now: decode again.
ZO_API zo_status zo_feedback_begin(zo_feedback * feedback, const zo_batch * batch, int32_t n_outputs,
                                   const int32_t * output_token);
ZO_API zo_status zo_feedback_end(zo_feedback * feedback, bool * gathered);

// Adds the gradients of sum weights[i] * nll[i] over the targets of the decode; weights may be negative.
ZO_API zo_status zo_feedback_run(zo_feedback * feedback, int32_t n_targets, const float * weights);

// Results, with their numbers of values: gradient [rank][n_rows]; x [n_counted][n_cols] and
// dy [n_counted][n_rows], where n_counted is the number of outputs with targets; gradient [n] of a gain.
// zo_feedback_clear sets all gradients to zero.
ZO_API zo_status zo_feedback_gradient(const zo_feedback * feedback, int32_t number, int64_t n,
                                      float * gradient);
ZO_API zo_status zo_feedback_pairs(const zo_feedback * feedback, int32_t number, int64_t n_x, float * x,
                                   int64_t n_dy, float * dy);
ZO_API zo_status zo_feedback_gain_gradient(const zo_feedback * feedback, int32_t number, int64_t n,
                                           float * gradient);
ZO_API zo_status zo_feedback_clear(zo_feedback * feedback);

// Of the plan, once a decode has shown the graph: bytes of memory for each output with targets; the matrices
// and norms that gradients reach, and where gradients stop, in words: names by index, NULL past the last one.
ZO_API int64_t      zo_feedback_token_bytes(const zo_feedback * feedback);
ZO_API const char * zo_feedback_matrix(const zo_feedback * feedback, int32_t index, int64_t * n_rows,
                                       int64_t * n_cols);
ZO_API const char * zo_feedback_norm(const zo_feedback * feedback, int32_t index, int64_t * n);
ZO_API const char * zo_feedback_stop(const zo_feedback * feedback, int32_t index);

// ---- quantized weights chosen anew ------------------------------------------------------------------

// A quantized type whose weights are coded one by one: d * scale * level - offset, where the offset is
// min_sign * minimum, times a sub-minimum where there are such. Places of bits count from the block's first
// byte, least significant first; of a number's bits, the least significant comes first.
typedef struct zo_layout {
    int32_t         block;  // weights
    int32_t         group;  // weights that share a scale
    int32_t         block_bytes;
    int32_t         n_code_bits;
    const int32_t * code_bits;  // [block][n_code_bits]
    int32_t         n_levels;   // 2^n_code_bits
    const int32_t * codes;      // [n_levels]
    const float *   levels;     // [n_levels] ascending; consecutive integers, or 16 at most
    int32_t         d_byte;     // of the f16 step
    int32_t         min_byte;   // of the f16 minimum, -1 without
    float           min_sign;
    int32_t         n_scale_bits;  // 0 without sub-scales
    const int32_t * scale_bits;    // [block / group][n_scale_bits]
    int32_t         n_scales;      // 2^n_scale_bits
    const int32_t * scale_codes;   // [n_scales], of scale_low, scale_low + 1, ...
    int32_t         scale_low;
    int32_t         n_min_bits;  // 0 without sub-minima
    const int32_t * min_bits;    // [block / group][n_min_bits]
} zo_layout;

// Steps, offsets and codes of blocks, so that the weighted squared error of their weights becomes small: from
// raw [n_blocks][block_bytes] to as many bytes at `found`. target and weight: [n_blocks][block]; a weight of
// NULL counts all alike. Only the groups that touched [n_blocks][block / group] names change; NULL: all.
ZO_API zo_status zo_requantize(const zo_layout * layout, int64_t n_blocks, int64_t n_raw, const uint8_t * raw,
                               int64_t n_target, const float * target, const float * weight,
                               int64_t n_touched, const uint8_t * touched, int32_t n_threads,
                               uint8_t * found);

// Second moments of a matrix's inputs, H = x^T x of x [n_samples][n_cols] with n_x values.
ZO_API zo_status zo_moments_init(zo_moments ** moments, int64_t n_samples, int64_t n_cols, int64_t n_x,
                                 const float * x, int32_t n_threads);
ZO_API void      zo_moments_free(zo_moments * moments);

// Codes of some blocks of the matrix, so that e H e becomes small for the rows' errors e: GPTQ (arXiv
// 2210.17323), then coordinate descent of at most `sweeps` sweeps. Steps and offsets stay. `ridge` times the
// inputs' mean square is added to H's diagonal. ids [n_blocks]: which blocks, ascending; starts
// [n_starts][n_blocks][block_bytes] of n_raw bytes: of which each row takes the one that ends best; target
// [n_blocks][block]. Writes best [n_blocks][block_bytes] and the sum over rows of e H e, without the ridge.
ZO_API zo_status zo_moments_choose(zo_moments * moments, const zo_layout * layout, double ridge,
                                   int32_t sweeps, int64_t n_blocks, const int64_t * ids, int32_t n_starts,
                                   int64_t n_raw, const uint8_t * starts, int64_t n_target,
                                   const float * target, int32_t n_threads, uint8_t * best,
                                   double * output_error);

// ---- logits that stay where they are ----------------------------------------------------------------

// backend_init and backend_apply of a llama_sampler_i (llama.h) that has nothing copied to the host.
ZO_API bool zo_discard_init(struct llama_sampler * sampler, struct ggml_backend_buffer_type * buffer_type,
                            uint32_t n_outputs);
ZO_API void zo_discard_apply(struct llama_sampler * sampler, struct ggml_context * context,
                             struct ggml_cgraph * graph, struct llama_sampler_data * data);

// ---- kernels by themselves, on host arrays ----------------------------------------------------------
//
// `device` is -1 for the CPU or a GPU's number; a GPU works on copies.

// y += S * x with S the entries of one weight under a branch. x: [n_tokens][n_cols] with x_stride floats
// between tokens, y: [n_tokens][n_rows] with y_stride.
ZO_API zo_status zo_store_apply(zo_store * store, const char * name, zo_branch branch, int64_t n_tokens,
                                const float * x, int64_t x_stride, float * y, int64_t y_stride,
                                int32_t device);

// y += left * (right * x) of the number-th weight in a branch.
ZO_API zo_status zo_lowrank_apply(zo_lowrank * lowrank, int32_t branch, int32_t number, int64_t n_tokens,
                                  const float * x, int64_t x_stride, float * y, int64_t y_stride,
                                  int32_t n_threads, int32_t device);

// nll[n_targets] from logits [n_outputs][n_vocab] with `stride` floats between outputs. Targets as in a
// zo_batch.
ZO_API zo_status zo_losses(const float * logits, int64_t n_vocab, int64_t stride, int32_t n_outputs,
                           int32_t n_targets, const int32_t * target_output, const int32_t * target_token,
                           int32_t n_threads, int32_t device, double * nll);

// ---- hook -------------------------------------------------------------------------------------------

// Each of `store`, `inplace`, `lowrank` and `gain` may be NULL and must outlive the hook. With
// `force_staged`, tensors go through ggml_backend_tensor_get/set as they do for device buffers.
ZO_API zo_status zo_hook_init(zo_hook ** hook, zo_store * store, zo_inplace * inplace, zo_lowrank * lowrank,
                              zo_gain * gain, int32_t n_threads, bool force_staged);
ZO_API void      zo_hook_free(zo_hook * hook);

// Decodes that are announced to `recorder` too are recorded; NULL: none. It must outlive the hook.
ZO_API zo_status zo_hook_set_recorder(zo_hook * hook, zo_recorder * recorder);

// Decodes that are announced to `feedback` too are gathered for it; NULL: none. It must outlive the hook.
ZO_API zo_status zo_hook_set_feedback(zo_hook * hook, zo_feedback * feedback);

// The engine's callback; `hook` is its user data.
ZO_API bool zo_hook_eval(struct ggml_tensor * node, bool ask, void * hook);

// Before llama_decode: what the batch holds. NULL lets any batch pass with theta applied to all of its
// columns and no losses, which is how a tuned model generates text.
ZO_API zo_status zo_hook_begin(zo_hook * hook, const zo_batch * batch);

// After any llama_decode, which returns success even where the hook refused a node and the rest was not
// computed: fails with the first refusal since zo_hook_begin.
ZO_API zo_status zo_hook_check(const zo_hook * hook);

// After llama_decode: nll[n_targets] = logsumexp(logits) - logits[token], with the batch's n_targets, or 0 if
// zo_hook_begin got none. Fails if the graph was not the expected one, if a weight with parameters was never
// multiplied by, or if no output node was seen.
ZO_API zo_status zo_hook_end(zo_hook * hook, int32_t n_targets, double * nll);

#ifdef __cplusplus
}
#endif
