#include "cpu/gain.h"

#include "core/parallel.h"

namespace zo {

void gain_apply(const gain_weight & weight, const std::vector<float> & factors, const columns & y,
                int64_t first, int64_t end, int n_threads) {
    parallel_for(end - first, n_threads, [&](int64_t column, int) {
        float * out = y.at(first + column);
        for (int64_t i = 0; i < weight.n; ++i) {
            out[i] *= factors[(size_t) i];
        }
    });
}

}  // namespace zo
