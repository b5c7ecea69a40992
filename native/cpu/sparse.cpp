#include "cpu/sparse.h"

#include <algorithm>
#include <cstring>

#include "core/parallel.h"
#include "core/vectorize.h"

namespace zo {

// Tokens per tile: one 512-bit register of f32, two 256-bit ones, four NEON ones.
static constexpr int TILE  = 16;
static constexpr int BLOCK = lanes::block;

#if defined(__GNUC__)
typedef float block_row __attribute__((vector_size(BLOCK * sizeof(float))));

// The numbers pick values of a (0 to 7) and b (8 to 15).
#if defined(__clang__)
#define ZO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t block_index __attribute__((vector_size(BLOCK * sizeof(int32_t))));
#define ZO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, block_index{ __VA_ARGS__ })
#endif

// to[c][r] = from[r][c] for BLOCK x BLOCK values.
ZO_INLINE static void transpose(const block_row (&from)[BLOCK], block_row (&to)[BLOCK]) {
    block_row a[BLOCK], b[BLOCK];
    for (int i = 0; i < BLOCK; i += 2) {
        a[i]     = ZO_SHUFFLE(from[i], from[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = ZO_SHUFFLE(from[i], from[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < BLOCK; i += 4) {
        for (int k = 0; k < 2; ++k) {
            b[i + 2 * k]     = ZO_SHUFFLE(a[i + k], a[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * k + 1] = ZO_SHUFFLE(a[i + k], a[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; ++i) {
        to[i]     = ZO_SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        to[i + 4] = ZO_SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#else
struct block_row {
    float       value[BLOCK];
    float &     operator[](int i) { return value[i]; }
    block_row & operator+=(const block_row & other) {
        for (int i = 0; i < BLOCK; ++i) {
            value[i] += other.value[i];
        }
        return *this;
    }
};

ZO_INLINE static void transpose(const block_row (&from)[BLOCK], block_row (&to)[BLOCK]) {
    for (int r = 0; r < BLOCK; ++r) {
        for (int c = 0; c < BLOCK; ++c) {
            to[c].value[r] = from[r].value[c];
        }
    }
}
#endif

// packed[place][token] = x[token][column of place]. Eight tokens at a time: their rows often lie a power
// of two apart, and sixteen such lines do not fit into one set of a first-level cache.
ZO_INLINE static void gather(const lanes & cols, const float * const * x, float * packed) {
    const int32_t * index = cols.index.data();
    for (int t0 = 0; t0 < TILE; t0 += BLOCK) {
        for (int64_t place = 0; place < cols.n_blocked; place += BLOCK) {
            block_row in[BLOCK], out[BLOCK];
            for (int t = 0; t < BLOCK; ++t) {
                memcpy(&in[t], x[t0 + t] + index[place], sizeof in[t]);
            }
            transpose(in, out);
            for (int c = 0; c < BLOCK; ++c) {
                memcpy(packed + (place + c) * TILE + t0, &out[c], sizeof out[c]);
            }
        }
        for (int64_t place = cols.n_blocked; place < cols.size(); ++place) {
            for (int t = 0; t < BLOCK; ++t) {
                packed[place * TILE + t0 + t] = x[t0 + t][index[place]];
            }
        }
    }
}

// y[token][row of place] += sums[place][token] for the first n_tokens.
ZO_INLINE static void scatter(const lanes & rows, const float * sums, float * const * y, int n_tokens) {
    const int32_t * index = rows.index.data();
    for (int t0 = 0; t0 < n_tokens; t0 += BLOCK) {
        const int n = n_tokens - t0 < BLOCK ? n_tokens - t0 : BLOCK;
        for (int64_t place = 0; place < rows.n_blocked; place += BLOCK) {
            block_row in[BLOCK], out[BLOCK];
            for (int r = 0; r < BLOCK; ++r) {
                memcpy(&in[r], sums + (place + r) * TILE + t0, sizeof in[r]);
            }
            transpose(in, out);
            for (int t = 0; t < n; ++t) {
                float *   target = y[t0 + t] + index[place];
                block_row value;
                memcpy(&value, target, sizeof value);
                value += out[t];
                memcpy(target, &value, sizeof value);
            }
        }
        for (int64_t place = rows.n_blocked; place < rows.size(); ++place) {
            for (int t = 0; t < n; ++t) {
                y[t0 + t][index[place]] += sums[place * TILE + t0 + t];
            }
        }
    }
}

// Up to TILE tokens at once, so that an entry meets all of them in one vector multiply-add. Lanes beyond
// n_tokens repeat a token and are dropped. `scratch` holds a tile of inputs, then one of outputs.
ZO_INLINE static void sparse_tile(const sparse_weight & w, const float * values, const float * const * x,
                                  float * const * y, int n_tokens, float * scratch) {
    float * packed = scratch;
    float * sums   = scratch + w.cols.size() * TILE;
    gather(w.cols, x, packed);
    const int32_t * col = w.col.data();
    for (int64_t r = 0; r < w.rows.size(); ++r) {
        float         sum[TILE] = { 0 };
        const int32_t end       = w.row_end[(size_t) r];
        for (int32_t e = w.row_first[(size_t) r]; e < end; ++e) {
            const float   value = values[e];
            const float * in    = packed + (int64_t) col[e] * TILE;
            for (int t = 0; t < TILE; ++t) {
                sum[t] += value * in[t];
            }
        }
        memcpy(sums + r * TILE, sum, sizeof sum);
    }
    scatter(w.rows, sums, y, n_tokens);
}

// A single token, as when text is generated: no tile to fill.
static void sparse_column(const sparse_weight & w, const float * values, const float * x, float * y) {
    const int32_t * column = w.cols.index.data();
    for (size_t r = 0; r < w.row_end.size(); ++r) {
        float sum = 0;
        for (int32_t e = w.row_first[r]; e < w.row_end[r]; ++e) {
            sum += values[e] * x[column[w.col[(size_t) e]]];
        }
        y[w.rows.index[r]] += sum;
    }
}

void sparse_apply(const sparse_weight & weight, const float * values, const columns & x, const columns & y,
                  int64_t first, int64_t end, int n_threads, sparse_scratch & scratch) {
    if (end - first == 1) {
        sparse_column(weight, values, x.at(first), y.at(first));
        return;
    }
    const int64_t n_tiles = (end - first + TILE - 1) / TILE;
    const size_t  size    = (size_t) (weight.cols.size() + weight.rows.size()) * TILE;
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
        vectorized<sparse_tile>(weight, values, in, out, n_tokens, scratch[(size_t) thread].data());
    });
}

}  // namespace zo
