// Products of f32 matrices, c += a * b, with b made piece by piece. Every sum runs in the order of its
// terms, so that the bits depend neither on the number of threads nor on the pieces.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/parallel.h"

namespace zo {

constexpr int64_t GEMM_ROWS = 6, GEMM_COLUMNS = 64, GEMM_DEPTH = 64;  // of a block of c; of a piece of b

// A matrix a[m][k] in panels of GEMM_ROWS rows, [panel][k][row], the last one filled up with zeros.
struct gemm_panels {
    std::vector<float> values;
    int64_t            m = 0, k = 0;

    const float * at(int64_t panel, int64_t depth) const {
        return values.data() + (panel * k + depth) * GEMM_ROWS;
    }
    int64_t n_panels() const { return (m + GEMM_ROWS - 1) / GEMM_ROWS; }
};

// Element (i, j) of a lies at a[i * row_stride + j * column_stride].
gemm_panels gemm_pack(const float * a, int64_t m, int64_t k, int64_t row_stride, int64_t column_stride);

// c[i][0 .. n) += a[i][first .. first + depth) * b for the rows i < n_rows; n <= GEMM_COLUMNS.
// b[depth][b_stride] is read up to column GEMM_COLUMNS.
void gemm_block(const gemm_panels & a, int64_t first, int64_t depth, const float * b, int64_t b_stride,
                int64_t n, float * c, int64_t c_stride, int64_t n_rows);

// For all rows.
inline void gemm_block(const gemm_panels & a, int64_t first, int64_t depth, const float * b, int64_t b_stride,
                       int64_t n, float * c, int64_t c_stride) {
    gemm_block(a, first, depth, b, b_stride, n, c, c_stride, a.m);
}

// c[m][n] += a * b, where piece(first, depth, column, n_columns, to) writes b[first .. first + depth) at
// n_columns columns to to[depth][width]. `width` columns are made at once, a multiple of GEMM_COLUMNS.
template <typename Piece>
void gemm_add(const gemm_panels & a, int64_t n, int64_t width, float * c, int64_t c_stride, int n_threads,
              Piece piece) {
    std::vector<std::vector<float>> scratch((size_t) std::max(1, n_threads));
    parallel_for((n + width - 1) / width, n_threads, [&](int64_t chunk, int thread) {
        std::vector<float> & b = scratch[(size_t) thread];
        b.resize((size_t) (GEMM_DEPTH * width));
        const int64_t column = chunk * width, n_columns = std::min(width, n - column);
        for (int64_t first = 0; first < a.k; first += GEMM_DEPTH) {
            const int64_t depth = std::min(GEMM_DEPTH, a.k - first);
            piece(first, depth, column, n_columns, b.data());
            for (int64_t j = 0; j < n_columns; j += GEMM_COLUMNS) {
                gemm_block(a, first, depth, b.data() + j, width, std::min(GEMM_COLUMNS, n_columns - j),
                           c + column + j, c_stride);
            }
        }
    });
}

// A row of a matrix, and how often it counts.
struct scaled_row {
    int32_t row;
    float   value;
};

// c[0 .. n) += the sum of value * b[place[row]] over some rows; n <= GEMM_COLUMNS. b[...][b_stride] is read
// up to column GEMM_COLUMNS.
void gemm_add_rows(const scaled_row * rows, int64_t n_rows, const int32_t * place, const float * b,
                   int64_t b_stride, int64_t n, float * c);

// c[m][n] += a * b with b[k][n] in memory.
void gemm_add(const gemm_panels & a, const float * b, int64_t b_stride, int64_t n, float * c,
              int64_t c_stride, int n_threads);

}  // namespace zo
