// Gains: factors of the element-wise product with a weight, such as a norm's.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/named.h"
#include "zo.h"

namespace zo {

struct gain_weight {
    std::string                     name;
    int64_t                         n  = 0;
    uint32_t                        id = 0;
    std::vector<std::vector<float>> branches;  // factors, [n] each
};

}  // namespace zo

struct zo_gain : zo::named_weights<zo::gain_weight> {};
