// Gains on a GPU: a block takes a tile of columns and some of their values.

#include "gpu/kernels.h"

namespace zo {

static constexpr int THREADS = 256;
static constexpr int AT_ONCE = 8;  // columns read before any is written: reads that are under way together

static __global__ void gain_kernel(const float * factors, int64_t n, const column_tile * tiles, columns y) {
    __shared__ float * out[GAIN_TOGETHER];

    const column_tile tile   = tiles[blockIdx.x];
    const int         thread = (int) threadIdx.x;
    if (thread < tile.n) {
        out[thread] = y.at(tile.first + thread);
    }
    __syncthreads();
    const int64_t i = (int64_t) blockIdx.y * THREADS + thread;
    if (i >= n) {
        return;
    }
    const float factor = factors[tile.branch * n + i];
    for (int first = 0; first < tile.n; first += AT_ONCE) {
        float value[AT_ONCE];
#pragma unroll
        for (int c = 0; c < AT_ONCE; ++c) {
            value[c] = first + c < tile.n ? out[first + c][i] : 0.0f;
        }
#pragma unroll
        for (int c = 0; c < AT_ONCE; ++c) {
            if (first + c < tile.n) {
                out[first + c][i] = value[c] * factor;
            }
        }
    }
}

void gain_on_gpu(const gpu_queue & queue, const float * factors, int64_t n, const column_tile * tiles,
                 int64_t n_tiles, const columns & y) {
    const dim3 grid((unsigned) n_tiles, (unsigned) ((n + THREADS - 1) / THREADS));
    launch(gain_kernel, grid, THREADS, 0, queue.stream, factors, n, tiles, y);
}

}  // namespace zo
