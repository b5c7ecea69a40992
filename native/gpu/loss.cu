// Negative log-likelihoods on a GPU: a block per column of logits. Only one number per target is copied to
// the host.

#include <cmath>

#include "gpu/kernels.h"

namespace zo {

static constexpr int THREADS = 512;
static constexpr int WARPS   = THREADS / LANES;

// The sum or the maximum over all threads of the block, in all of them.
template <typename T, typename Combine>
static __device__ T reduce(T value, T * shared, Combine combine) {
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        value = combine(value, lane_xor(value, mask));
    }
    __syncthreads();  // the last result is read
    if (threadIdx.x % LANES == 0) {
        shared[threadIdx.x / LANES] = value;
    }
    __syncthreads();
    T result = shared[0];
    for (int warp = 1; warp < WARPS; ++warp) {
        result = combine(result, shared[warp]);
    }
    return result;
}

static __global__ void loss_kernel(const char * logits, int64_t n_vocab, size_t stride,
                                   const int32_t * output, const int32_t * first, const int32_t * token,
                                   double * nll) {
    __shared__ float  highest[WARPS];
    __shared__ double sums[WARPS];

    const int     column = (int) blockIdx.x, thread = (int) threadIdx.x;
    const float * row = (const float *) (logits + (size_t) output[column] * stride);
    float         top = row[0];
    for (int64_t i = thread; i < n_vocab; i += THREADS) {
        top = row[i] > top ? row[i] : top;
    }
    top = reduce(top, highest, [](float a, float b) { return a > b ? a : b; });
    // A thread adds up few values, so f32 is exact enough for its part; the parts are added in f64.
    float part = 0;
    for (int64_t i = thread; i < n_vocab; i += THREADS) {
        part += expf(row[i] - top);
    }
    const double total  = reduce((double) part, sums, [](double a, double b) { return a + b; });
    const double logsum = (double) top + log(total);
    for (int32_t i = first[column] + thread; i < first[column + 1]; i += THREADS) {
        nll[i] = logsum - (double) row[token[i]];
    }
}

void losses_on_gpu(const gpu_queue & queue, const char * logits, int64_t n_vocab, size_t stride,
                   const int32_t * output, const int32_t * first, int64_t n_columns, const int32_t * token,
                   double * nll) {
    launch(loss_kernel, dim3((unsigned) n_columns), THREADS, 0, queue.stream, logits, n_vocab, stride, output,
           first, token, nll);
}

}  // namespace zo
