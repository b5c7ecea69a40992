#include "sparse.h"

#include <algorithm>

#include "error.h"
#include "parallel.h"
#include "zo.h"

namespace zo {

// Tokens per tile: one 512-bit register of f32, two 256-bit ones, four NEON ones.
static constexpr int TILE = 16;

// Up to TILE tokens at once: gather the touched inputs so that an entry meets all tokens in one vector
// multiply-add. Unused lanes repeat the first token and are dropped at the end.
ZO_MULTIVERSION
static void sparse_tile(const sparse_weight & w, const float * values, const float * const * x,
                        float * const * y, int n_tokens, float * packed) {
    const int32_t * cols   = w.cols.data();
    const int64_t   n_cols = (int64_t) w.cols.size();
    for (int64_t j = 0; j < n_cols; ++j) {
        const int32_t c = cols[j];
        for (int t = 0; t < TILE; ++t) {
            packed[j * TILE + t] = x[t][c];
        }
    }
    const int32_t * col    = w.col.data();
    const int64_t   n_rows = (int64_t) w.rows.size();
    for (int64_t r = 0; r < n_rows; ++r) {
        float sum[TILE] = { 0 };
        for (int32_t e = w.row_ptr[r]; e < w.row_ptr[r + 1]; ++e) {
            const float   value = values[e];
            const float * in    = packed + (int64_t) col[e] * TILE;
            for (int t = 0; t < TILE; ++t) {
                sum[t] += value * in[t];
            }
        }
        const int32_t row = w.rows[r];
        if (n_tokens == TILE) {
            for (int t = 0; t < TILE; ++t) {
                y[t][row] += sum[t];
            }
        } else {
            for (int t = 0; t < n_tokens; ++t) {
                y[t][row] += sum[t];
            }
        }
    }
}

// A single token, as when text is generated: no tile to fill.
static void sparse_column(const sparse_weight & w, const float * values, const float * x, float * y) {
    const int64_t n_rows = (int64_t) w.rows.size();
    for (int64_t r = 0; r < n_rows; ++r) {
        float sum = 0;
        for (int32_t e = w.row_ptr[r]; e < w.row_ptr[r + 1]; ++e) {
            sum += values[e] * x[w.cols[w.col[e]]];
        }
        y[w.rows[r]] += sum;
    }
}

void sparse_apply(const sparse_weight & weight, const float * values, const columns & x, const columns & y,
                  int64_t first, int64_t end, int n_threads, sparse_scratch & scratch) {
    if (end - first == 1) {
        sparse_column(weight, values, x.at(first), y.at(first));
        return;
    }
    const int64_t n_tiles = (end - first + TILE - 1) / TILE;
    const size_t  size    = weight.cols.size() * TILE;
    scratch.resize((size_t) n_threads);
    for (std::vector<float> & tile : scratch) {
        if (tile.size() < size) {
            tile.resize(size);
        }
    }
    parallel_for(n_tiles, n_threads, [&](int64_t i, int thread) {
        const int64_t begin    = first + i * TILE;
        const int     n_tokens = (int) std::min<int64_t>(TILE, end - begin);
        const float * in[TILE];
        float *       out[TILE];
        for (int t = 0; t < TILE; ++t) {
            const int64_t token = begin + (t < n_tokens ? t : 0);
            in[t]               = x.at(token);
            out[t]              = y.at(token);
        }
        sparse_tile(weight, values, in, out, n_tokens, scratch[(size_t) thread].data());
    });
}

}  // namespace zo

zo_status zo_store_apply(zo_store * store, const char * name, zo_branch branch, int64_t n_tokens,
                         const float * x, int64_t x_stride, float * y, int64_t y_stride) {
    return zo::guarded([&] {
        const zo::sparse_weight * weight = store != nullptr && name != nullptr ? store->find(name) : nullptr;
        if (weight == nullptr || x == nullptr || y == nullptr || n_tokens < 1 || x_stride < weight->n_cols ||
            y_stride < weight->n_rows) {
            return zo::fail(ZO_ARGUMENT, "zo_store_apply got an unknown weight or a wrong size");
        }
        const size_t x_bytes = (size_t) x_stride * sizeof(float), y_bytes = (size_t) y_stride * sizeof(float);
        const zo::columns in{ (char *) x, n_tokens, 1, x_bytes, 0, 0 },
            out{ (char *) y, n_tokens, 1, y_bytes, 0, 0 };
        zo::sparse_scratch scratch;
        zo::sparse_apply(*weight, store->branch_values(*weight, branch), in, out, 0, n_tokens,
                         store->n_threads, scratch);
        return ZO_OK;
    });
}
