#include "cpu/gemm.h"

#include <cstring>

#include "core/vectorize.h"

namespace zo {

namespace {

#if defined(__GNUC__)
// W floats in a register, as far as the processor has such.
template <int W>
struct lanes_of {
    typedef float type __attribute__((vector_size(W * sizeof(float))));
};
#else
template <int W>
struct lanes_of {
    struct type {
        float  value[W];
        type & operator+=(const type & other) {
            for (int i = 0; i < W; ++i) {
                value[i] += other.value[i];
            }
            return *this;
        }
        friend type operator*(float factor, const type & lanes) {
            type product;
            for (int i = 0; i < W; ++i) {
                product.value[i] = factor * lanes.value[i];
            }
            return product;
        }
    };
};
#endif

// c[row][0 .. N * W) += panel * b: N registers for each of the panel's rows. Values are moved one register
// at a time: compilers keep arrays that are copied whole in memory.
template <int W, int N>
ZO_INLINE void multiply(const float * panel, int64_t depth, const float * b, int64_t b_stride, float * c,
                        int64_t c_stride) {
    typedef typename lanes_of<W>::type lanes;
    lanes                              sum[GEMM_ROWS][N];
    for (int i = 0; i < GEMM_ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            std::memcpy(&sum[i][j], c + i * c_stride + j * W, sizeof(lanes));
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        lanes row[N];
        for (int j = 0; j < N; ++j) {
            std::memcpy(&row[j], b + k * b_stride + j * W, sizeof(lanes));
        }
        for (int i = 0; i < GEMM_ROWS; ++i) {
            for (int j = 0; j < N; ++j) {
                sum[i][j] += panel[k * GEMM_ROWS + i] * row[j];
            }
        }
    }
    for (int i = 0; i < GEMM_ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            std::memcpy(c + i * c_stride + j * W, &sum[i][j], sizeof(lanes));
        }
    }
}

// c[0 .. N * W) += value * b[place[row]] for all rows.
template <int W, int N>
ZO_INLINE void add_rows(const scaled_row * rows, int64_t n_rows, const int32_t * place, const float * b,
                        int64_t b_stride, float * c) {
    typedef typename lanes_of<W>::type lanes;
    lanes                              sum[N];
    for (int j = 0; j < N; ++j) {
        std::memcpy(&sum[j], c + j * W, sizeof(lanes));
    }
    for (int64_t i = 0; i < n_rows; ++i) {
        const float * from = b + place[rows[i].row] * b_stride;
        for (int j = 0; j < N; ++j) {
            lanes row;
            std::memcpy(&row, from + j * W, sizeof(lanes));
            sum[j] += rows[i].value * row;
        }
    }
    for (int j = 0; j < N; ++j) {
        std::memcpy(c + j * W, &sum[j], sizeof(lanes));
    }
}

// Both for GEMM_COLUMNS columns, in registers of W floats, N of them for a row.
template <int W, int N>
struct kernels {
    ZO_INLINE static void multiply_all(const float * panel, int64_t depth, const float * b, int64_t b_stride,
                                       float * c, int64_t c_stride) {
        for (int64_t j = 0; j < GEMM_COLUMNS; j += W * N) {
            multiply<W, N>(panel, depth, b + j, b_stride, c + j, c_stride);
        }
    }
    ZO_INLINE static void add_all(const scaled_row * rows, int64_t n_rows, const int32_t * place,
                                  const float * b, int64_t b_stride, float * c) {
        constexpr int n = N < 4 ? 2 * N : N;  // there are no other sums
        for (int64_t j = 0; j < GEMM_COLUMNS; j += W * n) {
            add_rows<W, n>(rows, n_rows, place, b + j, b_stride, c + j);
        }
    }
};

// As many sums at a time as the registers of each level hold.
#if defined(__aarch64__)
using plain = kernels<4, 4>;
#else
using plain = kernels<4, 2>;
#endif

#if defined(ZO_X86_LEVELS)
ZO_X86_V4 void multiply_v4(const float * panel, int64_t depth, const float * b, int64_t b_stride, float * c,
                           int64_t c_stride) {
    kernels<16, 4>::multiply_all(panel, depth, b, b_stride, c, c_stride);
}

ZO_X86_V3 void multiply_v3(const float * panel, int64_t depth, const float * b, int64_t b_stride, float * c,
                           int64_t c_stride) {
    kernels<8, 2>::multiply_all(panel, depth, b, b_stride, c, c_stride);
}

ZO_X86_V4 void add_v4(const scaled_row * rows, int64_t n_rows, const int32_t * place, const float * b,
                      int64_t b_stride, float * c) {
    kernels<16, 4>::add_all(rows, n_rows, place, b, b_stride, c);
}

ZO_X86_V3 void add_v3(const scaled_row * rows, int64_t n_rows, const int32_t * place, const float * b,
                      int64_t b_stride, float * c) {
    kernels<8, 2>::add_all(rows, n_rows, place, b, b_stride, c);
}
#endif

void multiply_best(const float * panel, int64_t depth, const float * b, int64_t b_stride, float * c,
                   int64_t c_stride) {
#if defined(ZO_X86_LEVELS)
    if (x86_level >= 3) {
        return x86_level == 4 ? multiply_v4(panel, depth, b, b_stride, c, c_stride)
                              : multiply_v3(panel, depth, b, b_stride, c, c_stride);
    }
#endif
    plain::multiply_all(panel, depth, b, b_stride, c, c_stride);
}

void add_best(const scaled_row * rows, int64_t n_rows, const int32_t * place, const float * b,
              int64_t b_stride, float * c) {
#if defined(ZO_X86_LEVELS)
    if (x86_level >= 3) {
        return x86_level == 4 ? add_v4(rows, n_rows, place, b, b_stride, c)
                              : add_v3(rows, n_rows, place, b, b_stride, c);
    }
#endif
    plain::add_all(rows, n_rows, place, b, b_stride, c);
}

}  // namespace

gemm_panels gemm_pack(const float * a, int64_t m, int64_t k, int64_t row_stride, int64_t column_stride) {
    gemm_panels packed;
    packed.m = m;
    packed.k = k;
    packed.values.assign((size_t) (packed.n_panels() * k * GEMM_ROWS), 0.0f);
    for (int64_t first = 0; first < m; first += GEMM_ROWS) {
        const int64_t n_rows = std::min(GEMM_ROWS, m - first);
        const float * from   = a + first * row_stride;
        float *       to     = packed.values.data() + first * k;
        for (int64_t j = 0; j < k; ++j) {
            for (int64_t i = 0; i < n_rows; ++i) {
                to[j * GEMM_ROWS + i] = from[i * row_stride + j * column_stride];
            }
        }
    }
    return packed;
}

void gemm_block(const gemm_panels & a, int64_t first, int64_t depth, const float * b, int64_t b_stride,
                int64_t n, float * c, int64_t c_stride, int64_t n_wanted) {
    for (int64_t row = 0; row < n_wanted; row += GEMM_ROWS) {
        const int64_t panel = row / GEMM_ROWS, n_rows = std::min(GEMM_ROWS, n_wanted - row);
        float *       out = c + row * c_stride;
        if (n == GEMM_COLUMNS && n_rows == GEMM_ROWS) {
            multiply_best(a.at(panel, first), depth, b, b_stride, out, c_stride);
            continue;
        }
        float whole[GEMM_ROWS * GEMM_COLUMNS] = {};
        for (int64_t i = 0; i < n_rows; ++i) {
            std::memcpy(whole + i * GEMM_COLUMNS, out + i * c_stride, (size_t) n * sizeof(float));
        }
        multiply_best(a.at(panel, first), depth, b, b_stride, whole, GEMM_COLUMNS);
        for (int64_t i = 0; i < n_rows; ++i) {
            std::memcpy(out + i * c_stride, whole + i * GEMM_COLUMNS, (size_t) n * sizeof(float));
        }
    }
}

void gemm_add_rows(const scaled_row * rows, int64_t n_rows, const int32_t * place, const float * b,
                   int64_t b_stride, int64_t n, float * c) {
    if (n == GEMM_COLUMNS) {
        return add_best(rows, n_rows, place, b, b_stride, c);
    }
    float whole[GEMM_COLUMNS] = {};
    std::memcpy(whole, c, (size_t) n * sizeof(float));
    add_best(rows, n_rows, place, b, b_stride, whole);
    std::memcpy(c, whole, (size_t) n * sizeof(float));
}

void gemm_add(const gemm_panels & a, const float * b, int64_t b_stride, int64_t n, float * c,
              int64_t c_stride, int n_threads) {
    gemm_add(a, n, GEMM_COLUMNS, c, c_stride, n_threads,
             [&](int64_t first, int64_t depth, int64_t column, int64_t n_columns, float * to) {
                 for (int64_t k = 0; k < depth; ++k) {
                     std::memcpy(to + k * GEMM_COLUMNS, b + (first + k) * b_stride + column,
                                 (size_t) n_columns * sizeof(float));
                 }
             });
}

}  // namespace zo
