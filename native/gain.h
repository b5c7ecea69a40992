// Gains: y *= factors for columns of an element-wise product with a weight, such as a norm's.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "sparse.h"
#include "zo.h"

namespace zo {

struct gain_weight {
    std::string                     name;
    int64_t                         n  = 0;
    size_t                          id = 0;
    std::vector<std::vector<float>> branches;  // factors, [n] each
};

// y[:, first .. end) *= factors.
void gain_apply(const gain_weight & weight, const std::vector<float> & factors, const columns & y,
                int64_t first, int64_t end, int n_threads);

}  // namespace zo

struct zo_gain {
    std::vector<zo::gain_weight>               weights;
    std::map<std::string, size_t, std::less<>> by_name;

    const zo::gain_weight * find(std::string_view name) const;
};
