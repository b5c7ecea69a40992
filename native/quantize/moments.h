// Second moments of a matrix's inputs, and what a sequential choice of codes needs of them.

#pragma once

#include <cstdint>
#include <vector>

namespace zo {

// A square f32 matrix whose rows begin `stride` floats apart, a multiple of GEMM_COLUMNS; what is behind a
// row's end is zero.
struct square_matrix {
    int64_t            n = 0, stride = 0;
    std::vector<float> values;

    square_matrix() = default;
    explicit square_matrix(int64_t size);
    float *       row(int64_t i) { return values.data() + i * stride; }
    const float * row(int64_t i) const { return values.data() + i * stride; }
};

// Inputs x[n_samples][n_cols] have the moments H = x^T x, by falling mean square of the columns.
struct input_moments {
    std::vector<int32_t> order;  // sorted -> column
    std::vector<int32_t> rank;   // column -> sorted
    square_matrix        h;      // both sides sorted

    input_moments(const float * x, int64_t n_samples, int64_t n_cols, int n_threads);
};

// What is added to the diagonal: `ridge` times its mean.
float ridge_level(const square_matrix & h, double ridge);

// Upper triangular R with R R^T = H + level * 1; H is positive semi-definite. Below the diagonal lies what is
// not zero, which nobody reads.
square_matrix upper_factor(const square_matrix & h, float level, int n_threads);

}  // namespace zo
