// The low-rank overlay on a GPU: a block takes a tile of tokens, computes right * x for some ranks at a
// time, and adds left times that to all rows.

#include "core/noise.h"
#include "gpu/kernels.h"

namespace zo {

static constexpr int THREADS = 256;
static constexpr int WARPS   = THREADS / LANES;
static constexpr int RANKS   = 8;  // at a time: the sums of a thread stay in registers
static constexpr int TOKENS  = LOWRANK_TOGETHER;

static constexpr int MOST_RANKS = 32;  // between two looks at y

// Adds up N sums of every lane over all lanes: they swap halves, so that each ends with the totals from
// `line` on. That takes a fifth of the exchanges of adding up one sum after the other.
template <int N>
static __device__ inline void fold(float * sum, int lane, int & line) {
    constexpr int HALF = N / 2, MASK = HALF * LANES / (RANKS * TOKENS);
    if constexpr (MASK > 0) {
        const bool upper = (lane & MASK) != 0;
        line += upper ? HALF : 0;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float given = lane_xor(upper ? sum[i] : sum[i + HALF], MASK);
            sum[i]            = (upper ? sum[i + HALF] : sum[i]) + given;
        }
        fold<HALF>(sum, lane, line);
    }
}

// inner[rank][token] for up to RANKS lines of `right`, in shared memory.
static __device__ void multiply_right(const float * right, int n_ranks, int64_t n_cols,
                                      const float * const * in, float (*partial)[RANKS * TOKENS],
                                      float *               inner) {
    const int thread              = (int) threadIdx.x;
    float     sum[RANKS * TOKENS] = {};
    for (int64_t c = thread; c < n_cols; c += THREADS) {
        float x[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            x[t] = in[t][c];
        }
#pragma unroll
        for (int r = 0; r < RANKS; ++r) {
            const float factor = r < n_ranks ? right[r * n_cols + c] : 0.0f;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                sum[r * TOKENS + t] = fmaf(factor, x[t], sum[r * TOKENS + t]);
            }
        }
    }
    int line = 0;
    fold<RANKS * TOKENS>(sum, thread, line);
#pragma unroll
    for (int i = 0; i < RANKS * TOKENS / LANES; ++i) {
        partial[thread / LANES][line + i] = sum[i];
    }
    __syncthreads();
    if (thread < RANKS * TOKENS) {
        float total = 0;
        for (int warp = 0; warp < WARPS; ++warp) {
            total += partial[warp][thread];
        }
        inner[thread] = total;
    }
    __syncthreads();
}

static __global__ void lowrank_kernel(const factors_on_gpu * factors, int64_t n_rows, int64_t n_cols,
                                      const column_tile * tiles, columns x, columns y) {
    __shared__ const float * in[TOKENS];
    __shared__ float *       out[TOKENS];
    __shared__ float         partial[WARPS][RANKS * TOKENS];
    __shared__ float         inner[MOST_RANKS * TOKENS];

    const column_tile    tile   = tiles[blockIdx.x];
    const factors_on_gpu factor = factors[tile.branch];
    const int            thread = (int) threadIdx.x;
    if (thread < TOKENS) {
        const int64_t token = tile.first + (thread < tile.n ? thread : 0);  // the rest is dropped
        in[thread]          = x.at(token);
        out[thread]         = y.at(token);
    }
    for (int64_t first = 0; first < factor.rank; first += MOST_RANKS) {
        const int n_ranks = factor.rank - first < MOST_RANKS ? (int) (factor.rank - first) : MOST_RANKS;
        __syncthreads();  // pointers are there, and all have read `inner`
        for (int r = 0; r < n_ranks; r += RANKS) {
            multiply_right(factor.right + (first + r) * n_cols, n_ranks - r, n_cols, in, partial,
                           inner + r * TOKENS);
        }
        const float * left = factor.left + first * n_rows;
        for (int64_t row = thread; row < n_rows; row += THREADS) {
            float sum[TOKENS];
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                sum[t] = out[t][row];
            }
            for (int r = 0; r < n_ranks; ++r) {
                const float value = left[r * n_rows + row];
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    sum[t] = fmaf(value, inner[r * TOKENS + t], sum[t]);
                }
            }
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                if (t < tile.n) {
                    out[t][row] = sum[t];
                }
            }
        }
    }
}

// Four values per thread and a branch per row of the grid, as zo_lowrank::factors makes them.
static __global__ void move_kernel(masters_on_gpu masters, bool rademacher, const zo_branch * branches,
                                   float * moved) {
    const int64_t   index  = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    const zo_branch branch = branches[blockIdx.y];
    float           z[4]   = { 0, 0, 0, 0 };
    if (4 * index < masters.n && branch.scale != 0) {
        noise_block(rademacher, branch.seed, masters.tensor, (uint64_t) index, z);
    }
    float * out = moved + (int64_t) blockIdx.y * masters.n;
    for (int64_t i = 4 * index; i < masters.n && i < 4 * index + 4; ++i) {
        const float value = masters.values[i] + branch.scale * z[i % 4];
        out[i]            = i < masters.n_right ? value : masters.factor * value;
    }
}

void move_on_gpu(const gpu_queue & queue, zo_distribution distribution, const masters_on_gpu & masters,
                 const zo_branch * branches, int32_t n_branches, float * moved) {
    const unsigned n_blocks = (unsigned) ((masters.n + 4 * THREADS - 1) / (4 * THREADS));
    launch(move_kernel, dim3(n_blocks, (unsigned) n_branches), THREADS, 0, queue.stream, masters,
           distribution == ZO_RADEMACHER, branches, moved);
}

void lowrank_on_gpu(const gpu_queue & queue, const factors_on_gpu * factors, int64_t n_rows, int64_t n_cols,
                    const column_tile * tiles, int64_t n_tiles, const columns & x, const columns & y) {
    launch(lowrank_kernel, dim3((unsigned) n_tiles), THREADS, 0, queue.stream, factors, n_rows, n_cols, tiles,
           x, y);
}

}  // namespace zo
