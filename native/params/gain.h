// Gains: y *= factors for columns of an element-wise product with a weight, such as a norm's.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/named.h"
#include "cpu/sparse.h"
#include "zo.h"

namespace zo {

struct gain_weight {
    std::string                     name;
    int64_t                         n  = 0;
    uint32_t                        id = 0;
    std::vector<std::vector<float>> branches;  // factors, [n] each
};

// y[:, first .. end) *= factors.
void gain_apply(const gain_weight & weight, const std::vector<float> & factors, const columns & y,
                int64_t first, int64_t end, int n_threads);

}  // namespace zo

struct zo_gain : zo::named_weights<zo::gain_weight> {};
