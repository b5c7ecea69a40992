// What a reverse pass is asked for: gradients of low-rank factors beside matrices, pairs of inputs and
// gradients, gradients of norms' gains.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/named.h"

namespace zo {

// A matrix W that computes W x + left^T right x, right [rank][n_cols] given; the sum over all passes of the
// loss's gradient with respect to left [rank][n_rows]. With rank 0 the last pass's pairs instead.
struct tracked_matrix {
    std::string        name;
    uint32_t           id     = 0;
    int64_t            n_rows = 0, n_cols = 0, rank = 0;
    std::vector<float> right_transposed;  // [n_cols][rank]
    std::vector<float> gradient;          // [rank][n_rows]
    std::vector<float> x, dy;             // [n_counted][n_cols], [n_counted][n_rows], of rank 0
};

// A norm whose product with x is multiplied by 1 + gain; the gradient with respect to gain, at the values
// that gains have in the pass.
struct tracked_gain {
    std::string        name;
    uint32_t           id = 0;
    int64_t            n  = 0;
    std::vector<float> gradient;  // [n]
};

struct tracked_weights {
    named_weights<tracked_matrix> matrices;
    named_weights<tracked_gain>   gains;

    bool contains(std::string_view name) const { return rank_of(name) >= 0; }
    // Of a matrix; 0 for a gain, -1 for what is not tracked.
    int64_t rank_of(std::string_view name) const {
        const tracked_matrix * matrix = matrices.find(name);
        return matrix != nullptr ? matrix->rank : gains.find(name) != nullptr ? 0 : -1;
    }
};

}  // namespace zo
