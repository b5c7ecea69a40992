// Low-rank overlay: y += left * (right * x) for columns of a matrix product, on the CPU.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "named.h"
#include "sparse.h"
#include "zo.h"

namespace zo {

struct lowrank_factors {
    int64_t            rank    = 0;
    uint64_t           version = 0;  // one more whenever they are set
    std::vector<float> left, right;  // [rank][n_rows], [rank][n_cols]
};

struct lowrank_weight {
    std::string                  name;
    int64_t                      n_rows = 0;
    int64_t                      n_cols = 0;
    uint32_t                     id     = 0;
    std::vector<lowrank_factors> branches;
};

// y[:, first .. end) += left * (right * x[:, first .. end)). A token is summed by one thread in a fixed
// order: the bits do not depend on n_threads.
void lowrank_apply(const lowrank_weight & weight, const lowrank_factors & factors, const columns & x,
                   const columns & y, int64_t first, int64_t end, int n_threads);

}  // namespace zo

struct zo_lowrank : zo::named_weights<zo::lowrank_weight> {};
