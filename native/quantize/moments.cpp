#include "quantize/moments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/parallel.h"
#include "core/vectorize.h"
#include "cpu/gemm.h"

namespace zo {

namespace {

constexpr int64_t WIDTH = GEMM_COLUMNS;  // of blocks of columns
constexpr int64_t DEPTH = 256;           // samples at once: what is read of them stays in the cache

int64_t padded(int64_t n) {
    return (n + WIDTH - 1) / WIDTH * WIDTH;
}

// The i-th of n pieces that grow with their number, so that threads with equal runs of i have equal work.
int64_t folded(int64_t i, int64_t n) {
    return i % 2 == 0 ? i / 2 : n - 1 - i / 2;
}

// c's upper triangle += a * b, in blocks of columns; c and b have the same stride.
void add_upper(const gemm_panels & a, const float * b, int64_t stride, int64_t n, float * c, int n_threads) {
    const int64_t n_chunks = (n + WIDTH - 1) / WIDTH;
    parallel_for(n_chunks, n_threads, [&](int64_t i, int) {
        const int64_t column = folded(i, n_chunks) * WIDTH, width = std::min(WIDTH, n - column);
        float         part[DEPTH * WIDTH];
        for (int64_t first = 0; first < a.k; first += DEPTH) {
            const int64_t depth = std::min(DEPTH, a.k - first);
            for (int64_t k = 0; k < depth; ++k) {
                std::memcpy(part + k * WIDTH, b + (first + k) * stride + column, WIDTH * sizeof(float));
            }
            gemm_block(a, first, depth, part, WIDTH, width, c + column, stride, column + width);
        }
    });
}

// R R^T = the diagonal block at `first` of width n, in place, and transposed[k][i] = R[i][k]. No pivot can be
// below the level that was added to the diagonal, except by rounding.
void factor_block(square_matrix & r, int64_t first, int64_t n, float level, float * transposed) {
    double block[WIDTH][WIDTH];
    for (int64_t i = 0; i < n; ++i) {
        std::copy_n(r.row(first + i) + first, n, block[i]);
    }
    for (int64_t k = n - 1; k >= 0; --k) {
        const double root = std::sqrt(std::max(block[k][k], (double) level));
        block[k][k]       = root;
        for (int64_t i = 0; i < k; ++i) {
            block[i][k] /= root;
        }
        for (int64_t i = 0; i < k; ++i) {
            for (int64_t j = i; j < k; ++j) {
                block[i][j] -= block[i][k] * block[j][k];
            }
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = i; k < n; ++k) {
            r.row(first + i)[first + k] = transposed[k * WIDTH + i] = (float) block[i][k];
        }
    }
}

// x R^T = b for one row, in place, with R's columns in `transposed`.
ZO_INLINE void solve_row(float * x, const float * transposed, int64_t n) {
    for (int64_t k = n - 1; k >= 0; --k) {
        const float * column = transposed + k * WIDTH;
        const float   value  = x[k] / column[k];
        for (int64_t i = 0; i < k; ++i) {
            x[i] -= value * column[i];
        }
        x[k] = value;
    }
}

}  // namespace

square_matrix::square_matrix(int64_t size)
    : n(size), stride(padded(size)), values((size_t) (size * padded(size)), 0.0f) {}

input_moments::input_moments(const float * x, int64_t n_samples, int64_t n_cols, int n_threads)
    : order((size_t) n_cols), rank((size_t) n_cols), h(n_cols) {
    std::vector<double> square((size_t) n_cols, 0.0);
    for (int64_t i = 0; i < n_samples; ++i) {
        for (int64_t j = 0; j < n_cols; ++j) {
            square[(size_t) j] += (double) x[i * n_cols + j] * (double) x[i * n_cols + j];
        }
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return square[(size_t) a] > square[(size_t) b]; });
    for (int64_t j = 0; j < n_cols; ++j) {
        rank[(size_t) order[(size_t) j]] = (int32_t) j;
    }
    std::vector<float> sorted((size_t) (std::min(DEPTH, n_samples) * h.stride), 0.0f);
    for (int64_t first = 0; first < n_samples; first += DEPTH) {
        const int64_t n = std::min(DEPTH, n_samples - first);
        parallel_for(n, n_threads, [&](int64_t i, int) {
            for (int64_t j = 0; j < n_cols; ++j) {
                sorted[(size_t) (i * h.stride + j)] = x[(first + i) * n_cols + order[(size_t) j]];
            }
        });
        add_upper(gemm_pack(sorted.data(), n_cols, n, 1, h.stride), sorted.data(), h.stride, n_cols,
                  h.values.data(), n_threads);
    }
    parallel_for(n_cols, n_threads, [&](int64_t i, int) {
        for (int64_t j = 0; j < i; ++j) {
            h.row(i)[j] = h.row(j)[i];
        }
    });
}

float ridge_level(const square_matrix & h, double ridge) {
    double total = 0;
    for (int64_t i = 0; i < h.n; ++i) {
        total += (double) h.row(i)[i];
    }
    return (float) (ridge * std::max(total / (double) h.n, 1e-30));
}

square_matrix upper_factor(const square_matrix & h, float level, int n_threads) {
    square_matrix r = h;
    for (int64_t i = 0; i < r.n; ++i) {
        r.row(i)[i] += level;
    }
    std::vector<float> transposed((size_t) (WIDTH * WIDTH), 0.0f), columns((size_t) (WIDTH * r.stride), 0.0f);
    for (int64_t first = (r.n - 1) / WIDTH * WIDTH; first >= 0; first -= WIDTH) {
        const int64_t n = std::min(WIDTH, r.n - first);
        factor_block(r, first, n, level, transposed.data());
        parallel_for(first, n_threads, [&](int64_t i, int) {
            float * x = r.row(i) + first;
            vectorized<solve_row>(x, transposed.data(), n);
            for (int64_t k = 0; k < n; ++k) {
                columns[(size_t) (k * r.stride + i)] = -x[k];
            }
        });
        add_upper(gemm_pack(r.values.data() + first, first, n, r.stride, 1), columns.data(), r.stride, first,
                  r.values.data(), n_threads);
    }
    return r;
}

}  // namespace zo
