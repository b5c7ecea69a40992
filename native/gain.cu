// Gains on a GPU: a block per tile of columns.

#include "kernels.h"

namespace zo {

static constexpr int THREADS = 256;

static __global__ void gain_kernel(const float * factors, int64_t n, const column_tile * tiles, columns y) {
    const column_tile tile = tiles[blockIdx.x];
    for (int column = 0; column < tile.n; ++column) {
        float * out = y.at(tile.first + column);
        for (int64_t i = threadIdx.x; i < n; i += THREADS) {
            out[i] *= factors[tile.branch * n + i];
        }
    }
}

void gain_on_gpu(const gpu_queue & queue, const float * factors, int64_t n, const column_tile * tiles,
                 int64_t n_tiles, const columns & y) {
    launch(gain_kernel, dim3((unsigned) n_tiles), THREADS, 0, queue.stream, factors, n, tiles, y);
}

}  // namespace zo
