// Low-rank overlay: y += left * (right * x) for columns of a matrix product, on the CPU.

#pragma once

#include <cstdint>

#include "core/columns.h"
#include "params/lowrank.h"

namespace zo {

// y[:, first .. end) += left * (right * x[:, first .. end)). A token is summed by one thread in a fixed
// order: the bits do not depend on n_threads.
void lowrank_apply(const lowrank_weight & weight, const lowrank_factors & factors, const columns & x,
                   const columns & y, int64_t first, int64_t end, int n_threads);

}  // namespace zo
