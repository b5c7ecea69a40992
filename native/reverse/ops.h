// The way back through operations on single tokens. Values and gradients are rows of n floats, one after the
// other; dx is added to.

#pragma once

#include <cstdint>
#include <vector>

#include "feedback/graph.h"

namespace zo {

// y = x / sqrt(mean(x^2) + eps), over each of the rows.
void rms_norm_back(const float * x, const float * dy, float * dx, int64_t n, int64_t n_rows, float eps);
// y = (x - mean(x)) / sqrt(var(x) + eps)
void norm_back(const float * x, const float * dy, float * dx, int64_t n, int64_t n_rows, float eps);
// y = x / max(|x|, eps)
void l2_norm_back(const float * x, const float * dy, float * dx, int64_t n, int64_t n_rows, float eps);

// For each value of a token in `out`, in logical order, the place among the values of a token of `b`, which
// is repeated to that shape; `k` dimensions of `out` hold a token. Empty where the two are the same.
std::vector<int32_t> repeat_map(const graph_tensor & b, const graph_tensor & out, int k);

// For each value of a token in the view `out` the place in the token of `from` that it shows.
std::vector<int32_t> view_map(const graph_tensor & out, const graph_tensor & from, int k);

}  // namespace zo
