// The sparse overlay on a GPU.
//
// A block takes a tile of tokens. All of it adds up a huge row, a warp a long one; then the columns of x that
// short rows meet are copied into shared memory, four tokens side by side, and a thread adds up each row from
// there. Every sum has one order, whatever the grid, so two runs give the same bits.

#include <algorithm>

#include "core/noise.h"
#include "gpu/kernels.h"

namespace zo {

static constexpr int THREADS  = 256;
static constexpr int WARPS    = THREADS / LANES;
static constexpr int LONG     = 64;    // entries from which on a warp shares a row,
static constexpr int HUGE_ROW = 1024;  // and a block does

static constexpr size_t FREE_SHARED = 47 << 10;  // beside what the kernel declares; more must be asked for

std::vector<column_tile> tiles_of(const std::vector<column_range> & ranges, int64_t n_together) {
    std::vector<column_tile> tiles;
    for (const column_range & range : ranges) {
        for (int64_t first = range.first; first < range.end; first += n_together) {
            const int64_t n = std::min(n_together, range.end - first);
            tiles.push_back({ first, (int32_t) n, range.branch });
        }
    }
    return tiles;
}

// The row and the column of every entry.
static std::vector<int32_t> rows_of(const sparse_weight & weight) {
    std::vector<int32_t> rows((size_t) weight.nnz());
    for (size_t r = 0; r < weight.row_end.size(); ++r) {
        std::fill(rows.begin() + weight.row_first[r], rows.begin() + weight.row_end[r], weight.rows.index[r]);
    }
    return rows;
}

static std::vector<int32_t> columns_of(const sparse_weight & weight) {
    std::vector<int32_t> columns((size_t) weight.nnz());
    std::transform(weight.col.begin(), weight.col.end(), columns.begin(),
                   [&](int32_t place) { return weight.cols.index[(size_t) place]; });
    return columns;
}

sparse_layout::sparse_layout(const sparse_weight & weight, size_t shared_limit) {
    const std::vector<int32_t> row = rows_of(weight);
    place                          = columns_of(weight);
    const int32_t         nnz      = (int32_t) weight.nnz();
    std::vector<row_part> shorts;
    std::vector<int32_t>  place_of((size_t) weight.n_cols, -1);
    for (int32_t e = 0; e < nnz;) {
        const int32_t first = e;
        while (e < nnz && row[(size_t) e] == row[(size_t) first]) {
            ++e;
        }
        const row_part whole{ row[(size_t) first], first, e };
        if (e - first >= LONG) {
            parts.push_back(whole);
            continue;
        }
        shorts.push_back(whole);
        for (int32_t i = first; i < e; ++i) {
            place_of[(size_t) place[(size_t) i]] = 0;
        }
    }
    const auto huge = std::stable_partition(parts.begin(), parts.end(), [](const row_part & whole) {
        return whole.end - whole.first >= HUGE_ROW;
    });
    n_huge          = (int32_t) (huge - parts.begin());
    n_long          = (int32_t) parts.size();
    for (int32_t c = 0; c < (int32_t) weight.n_cols; ++c) {
        if (place_of[(size_t) c] == 0) {
            place_of[(size_t) c] = (int32_t) used.size();
            used.push_back(c);
        }
    }
    // As many tokens together as fit: every tile reads all entries once.
    const int32_t n_places = (int32_t) used.size();
    const auto    fits     = [&](size_t n) { return (size_t) n_places * n * sizeof(float) <= shared_limit; };
    n_together             = fits(16) ? 16 : fits(8) ? 8 : 4;
    const size_t  bytes    = (size_t) n_together * sizeof(float);
    const int32_t at_once  = std::max(1, std::min(n_places, (int32_t) (shared_limit / bytes)));
    shared                 = n_places > 0 ? (size_t) at_once * bytes : 0;

    std::vector<std::vector<row_part>> by_chunk((size_t) ((n_places + at_once - 1) / at_once));
    for (const row_part & whole : shorts) {
        for (int32_t e = whole.first; e < whole.end;) {
            const int32_t first = e, chunk = place_of[(size_t) place[(size_t) e]] / at_once;
            for (; e < whole.end; ++e) {
                const int32_t at = place_of[(size_t) place[(size_t) e]];
                if (at / at_once != chunk) {
                    break;
                }
                place[(size_t) e] = at % at_once;
            }
            by_chunk[(size_t) chunk].push_back({ whole.row, first, e });
        }
    }
    for (const std::vector<row_part> & chunk : by_chunk) {
        const int32_t first = (int32_t) chunks.size() * at_once;
        chunks.push_back(
            { first, std::min(at_once, n_places - first), (int32_t) parts.size(), (int32_t) chunk.size() });
        parts.insert(parts.end(), chunk.begin(), chunk.end());
    }
}

// Four entries per thread and a branch per row of the grid.
static __global__ void fill_kernel(const float * theta, int64_t nnz, uint32_t tensor, bool rademacher,
                                   const zo_branch * branches, float * values) {
    const int64_t index = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * index >= nnz) {
        return;
    }
    const zo_branch branch = branches[blockIdx.y];
    float           z[4]   = { 0, 0, 0, 0 };
    if (branch.scale != 0) {
        noise_block(rademacher, branch.seed, tensor, (uint64_t) index, z);
    }
    float * out = values + (int64_t) blockIdx.y * nnz;
    for (int64_t i = 4 * index; i < nnz && i < 4 * index + 4; ++i) {
        out[i] = branch.scale != 0 ? theta[i] + branch.scale * z[i % 4] : theta[i];
    }
}

struct alignas(16) tokens4 {
    float value[4];
};

struct sparse_view {
    const int32_t *      used;
    const int32_t *      place;
    const row_part *     parts;
    const column_chunk * chunks;
    int32_t              n_huge, n_long;
    int                  n_chunks;
    int64_t              nnz;
};

// A warp's sum over every `stride`-th entry of a row from `first` on, which differs by lane, for all tokens
// of the tile; lane t ends with that of token t.
template <int TOGETHER>
static __device__ float long_row(const sparse_view & w, const row_part & part, const float * value,
                                 const float * const * in, int lane, int first, int stride) {
    float sum[TOGETHER] = {};
    for (int32_t e = part.first + first; e < part.end; e += stride) {
        const float   factor = value[e];
        const int32_t column = w.place[e];
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
            sum[t] = fmaf(factor, in[t][column], sum[t]);
        }
    }
    float mine = 0;
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
        float total = sum[t];
        for (int mask = LANES / 2; mask > 0; mask /= 2) {
            total += lane_xor(total, mask);
        }
        mine = lane == t ? total : mine;
    }
    return mine;
}

// GROUPS times four tokens in a tile. Blocks with the same blockIdx.x share a tile's rows. Tokens beyond the
// tile's repeat its first one and are dropped. What is read is read before anything is written, so that many
// reads are under way at a time.
template <int GROUPS>
static __global__ void apply_kernel(sparse_view w, const float * values, int32_t first_branch,
                                    int32_t n_branches, const column_tile * tiles, columns x, columns y) {
    constexpr int TOGETHER = 4 * GROUPS;
    ZO_DYNAMIC_SHARED(tokens4, staged);  // [GROUPS][places of the chunk]
    __shared__ const float * in[TOGETHER];
    __shared__ float *       out[TOGETHER];
    __shared__ float         by_warp[WARPS][TOGETHER];

    const column_tile tile = tiles[blockIdx.x];
    const int32_t     line = tile.branch - first_branch;
    if (line < 0 || line >= n_branches) {
        return;
    }
    const int thread = (int) threadIdx.x, lane = thread % LANES;
    const int share = (int) blockIdx.y, n_shares = (int) gridDim.y;
    if (thread < TOGETHER) {
        const int64_t token = tile.first + (thread < tile.n ? thread : 0);
        in[thread]          = x.at(token);
        out[thread]         = y.at(token);
    }
    __syncthreads();
    const float * const value = values + (int64_t) line * w.nnz;
    for (int i = share; i < w.n_huge; i += n_shares) {
        const row_part part = w.parts[i];
        const float    sum  = long_row<TOGETHER>(w, part, value, in, lane, thread, THREADS);
        if (lane < TOGETHER) {
            by_warp[thread / LANES][lane] = sum;
        }
        __syncthreads();
        if (thread < tile.n) {
            float total = 0;
            for (int warp = 0; warp < WARPS; ++warp) {
                total += by_warp[warp][thread];
            }
            out[thread][part.row] += total;
        }
        __syncthreads();  // it is read
    }
    for (int i = w.n_huge + share * WARPS + thread / LANES; i < w.n_long; i += n_shares * WARPS) {
        const row_part part = w.parts[i];
        const float    sum  = long_row<TOGETHER>(w, part, value, in, lane, lane, LANES);
        if (lane < tile.n) {
            out[lane][part.row] += sum;
        }
    }
    for (int c = 0; c < w.n_chunks; ++c) {
        const column_chunk chunk = w.chunks[c];
        if (share * THREADS >= chunk.n_parts) {
            continue;
        }
        __syncthreads();  // nobody reads the last chunk any more
        for (int p = thread; p < chunk.n_places; p += THREADS) {
            const int32_t column = w.used[chunk.first_place + p];
            tokens4       copy[GROUPS];
#pragma unroll
            for (int t = 0; t < TOGETHER; ++t) {
                copy[t / 4].value[t % 4] = in[t][column];
            }
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                staged[g * chunk.n_places + p] = copy[g];
            }
        }
        __syncthreads();
        for (int i = share * THREADS + thread; i < chunk.n_parts; i += n_shares * THREADS) {
            const row_part part = w.parts[chunk.first + i];
            float          sum[TOGETHER];
#pragma unroll
            for (int t = 0; t < TOGETHER; ++t) {
                sum[t] = out[t][part.row];
            }
            tokens4 added[GROUPS] = {};
            for (int32_t e = part.first; e < part.end; ++e) {
                const float     factor = value[e];
                const tokens4 * from   = staged + w.place[e];
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    const tokens4 four = from[g * chunk.n_places];
#pragma unroll
                    for (int t = 0; t < 4; ++t) {
                        added[g].value[t] = fmaf(factor, four.value[t], added[g].value[t]);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < TOGETHER; ++t) {
                if (t < tile.n) {
                    out[t][part.row] = sum[t] + added[t / 4].value[t % 4];
                }
            }
        }
    }
}

template <int GROUPS>
static void allow_shared(const gpu_queue & queue) {
    check(cudaFuncSetAttribute((const void *) apply_kernel<GROUPS>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, (int) queue.shared_bytes),
          "asking for shared memory");
}

sparse_on_gpu::sparse_on_gpu(const sparse_weight & weight, const gpu_queue & queue)
    : nnz(weight.nnz()), tensor(weight.id) {
    const sparse_layout layout(weight, queue.shared_bytes);
    used.upload(layout.used.data(), layout.used.size(), queue.stream);
    place.upload(layout.place.data(), layout.place.size(), queue.stream);
    parts.upload(layout.parts.data(), layout.parts.size(), queue.stream);
    chunks.upload(layout.chunks.data(), layout.chunks.size(), queue.stream);
    n_huge     = layout.n_huge;
    n_long     = layout.n_long;
    n_chunks   = (int) layout.chunks.size();
    n_together = layout.n_together;
    shared     = layout.shared;
    if (shared > FREE_SHARED) {
        (n_together == 16 ? allow_shared<4> : n_together == 8 ? allow_shared<2> : allow_shared<1>) (queue);
    }
    check(cudaStreamSynchronize(queue.stream), "a copy");  // before `layout` goes
}

void sparse_on_gpu::fill(const gpu_queue & queue, zo_distribution distribution, const float * theta,
                         const zo_branch * branches, int32_t n, float * values) const {
    const dim3 grid((unsigned) ((nnz + 4 * THREADS - 1) / (4 * THREADS)), (unsigned) n);
    launch(fill_kernel, grid, THREADS, 0, queue.stream, theta, nnz, tensor, distribution == ZO_RADEMACHER,
           branches, values);
}

void sparse_on_gpu::apply(const gpu_queue & queue, const float * values, int32_t first, int32_t n,
                          const column_tile * tiles, int64_t n_tiles, const columns & x,
                          const columns & y) const {
    // Few tiles leave a GPU idle, so blocks share them; the parts of a row in several chunks must not be
    // added by different blocks.
    int64_t n_shares = 1;
    if (n_chunks <= 1) {
        const int64_t n_short = (int64_t) parts.size() - n_long;
        const int64_t most    = std::max<int64_t>(
            { n_huge, (n_long - n_huge + WARPS - 1) / WARPS, (n_short + THREADS - 1) / THREADS });
        n_shares = std::max<int64_t>(1, std::min(8 * queue.n_multiprocessors / n_tiles, most));
    }
    const sparse_view view{ used.data(), place.data(), parts.data(), chunks.data(),
                            n_huge,      n_long,       n_chunks,     nnz };
    const dim3        grid((unsigned) n_tiles, (unsigned) n_shares);
    const auto        kernel = n_together == 16  ? apply_kernel<4>
                               : n_together == 8 ? apply_kernel<2>
                                                 : apply_kernel<1>;
    launch(kernel, grid, THREADS, shared, queue.stream, view, values, first, n, tiles, x, y);
}

}  // namespace zo
