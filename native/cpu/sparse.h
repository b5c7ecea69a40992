// Sparse overlay: y += S * x for columns of a matrix product, on the CPU.

#pragma once

#include <cstdint>
#include <vector>

#include "core/columns.h"
#include "params/store.h"

namespace zo {

// Scratch that a hook keeps between calls: one tile of inputs and outputs per thread.
using sparse_scratch = std::vector<std::vector<float>>;

// y[:, first .. end) += S * x[:, first .. end), S being `weight` with the given entry values. Each
// output is summed by one thread in the order of its entries: the bits do not depend on n_threads.
void sparse_apply(const sparse_weight & weight, const float * values, const columns & x, const columns & y,
                  int64_t first, int64_t end, int n_threads, sparse_scratch & scratch);

}  // namespace zo
