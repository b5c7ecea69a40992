// Kernels of the overlays and losses: what gpu.cu queues on a device's stream.

#pragma once

#include <cstdint>
#include <vector>

#include "gpu/gpu.h"
#include "gpu/gpu_runtime.h"

namespace zo {

// Where work is queued, and what the device can do.
struct gpu_queue {
    cudaStream_t stream            = nullptr;
    int          n_multiprocessors = 1;
    size_t       shared_bytes      = 0;  // that a block may ask for
};

// Up to as many columns as a kernel handles together, all of one branch.
struct column_tile {
    int64_t first;
    int32_t n;
    int32_t branch;
};

std::vector<column_tile> tiles_of(const std::vector<column_range> & ranges, int64_t n_together);

// ---- sparse -----------------------------------------------------------------------------------------

// Consecutive entries of one row.
struct row_part {
    int32_t row, first, end;
};

// What is copied to shared memory at a time: the used columns [first_place, first_place + n_places), which
// the parts [first, first + n_parts) read.
struct column_chunk {
    int32_t first_place, n_places;
    int32_t first, n_parts;
};

// The entries of a weight as the kernel visits them. Rows of many entries (long ones, and among these the
// huge) read their columns of x where they lie, one after the other; the others share a copy of the columns
// that any of them uses.
struct sparse_layout {
    std::vector<int32_t>      used;   // columns of short rows
    std::vector<int32_t>      place;  // [nnz]: the column in a long row, else its place in the chunk
    std::vector<row_part>     parts;  // whole huge rows, whole long ones, then short ones by chunks
    std::vector<column_chunk> chunks;
    int32_t                   n_huge     = 0;
    int32_t                   n_long     = 0;  // with the huge ones
    int                       n_together = 4;  // tokens of a tile: 4, 8 or 16
    size_t                    shared     = 0;  // bytes that a tile's inputs take

    sparse_layout(const sparse_weight & weight, size_t shared_limit);
};

// The same in a device's memory.
struct sparse_on_gpu {
    device_array<int32_t>      used, place;
    device_array<row_part>     parts;
    device_array<column_chunk> chunks;
    int64_t                    nnz;
    int32_t                    n_huge, n_long;
    int                        n_chunks, n_together;
    size_t                     shared;
    uint32_t                   tensor;  // the noise's number

    sparse_on_gpu(const sparse_weight & weight, const gpu_queue & queue);

    // values[branch][nnz] = theta + scale * z for n branches.
    void fill(const gpu_queue & queue, zo_distribution distribution, const float * theta,
              const zo_branch * branches, int32_t n, float * values) const;
    // y += S * x for the tiles of branches [first, first + n), whose values these are.
    void apply(const gpu_queue & queue, const float * values, int32_t first, int32_t n,
               const column_tile * tiles, int64_t n_tiles, const columns & x, const columns & y) const;
};

// ---- low rank ---------------------------------------------------------------------------------------

struct factors_on_gpu {
    const float *left, *right;  // [rank][n_rows], [rank][n_cols]
    int64_t      rank;
};

constexpr int LOWRANK_TOGETHER = 8;  // tokens of a tile

// y += left * (right * x); `factors` has one line per branch.
void lowrank_on_gpu(const gpu_queue & queue, const factors_on_gpu * factors, int64_t n_rows, int64_t n_cols,
                    const column_tile * tiles, int64_t n_tiles, const columns & x, const columns & y);

// Trained factors of one weight: [rank][n_cols], then [rank][n_rows], which count `factor` times.
struct masters_on_gpu {
    const float * values;
    int64_t       rank, n_right, n;
    float         factor;
    uint32_t      tensor;
};

// moved[branch][n] = the masters + scale * z, for n_branches.
void move_on_gpu(const gpu_queue & queue, zo_distribution distribution, const masters_on_gpu & masters,
                 const zo_branch * branches, int32_t n_branches, float * moved);

// ---- gains ------------------------------------------------------------------------------------------

constexpr int GAIN_TOGETHER = 32;  // columns of a tile

// y *= factors[branch].
void gain_on_gpu(const gpu_queue & queue, const float * factors, int64_t n, const column_tile * tiles,
                 int64_t n_tiles, const columns & y);

// ---- losses -----------------------------------------------------------------------------------------

// Column output[c] has the targets [first[c], first[c + 1]).
void losses_on_gpu(const gpu_queue & queue, const char * logits, int64_t n_vocab, size_t stride,
                   const int32_t * output, const int32_t * first, int64_t n_columns, const int32_t * token,
                   double * nll);

// ---- in place ---------------------------------------------------------------------------------------

// Where live values lie in a tensor's bytes, and what they are made of; `base` may be NULL.
struct live_values {
    zo_field      field;
    const float * theta;
    const float * base;
    uint32_t      tensor;
};

void write_on_gpu(const gpu_queue & queue, zo_distribution distribution, const live_values & values,
                  const zo_branch & branch, char * bytes);

}  // namespace zo
