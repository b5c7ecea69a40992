// Gains: y *= factors for columns of an element-wise product, on the CPU.

#pragma once

#include <cstdint>
#include <vector>

#include "core/columns.h"
#include "params/gain.h"

namespace zo {

// y[:, first .. end) *= factors.
void gain_apply(const gain_weight & weight, const std::vector<float> & factors, const columns & y,
                int64_t first, int64_t end, int n_threads);

}  // namespace zo
