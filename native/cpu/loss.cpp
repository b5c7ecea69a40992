#include "cpu/loss.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "core/vectorize.h"
#include "cpu/exponential.h"

namespace zo {

ZO_INLINE static double logsumexp(const float * logits, int64_t n) {
    constexpr int lanes = 16, block = 1024;
    float         top[lanes];
    std::fill(top, top + lanes, -INFINITY);
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int k = 0; k < lanes; ++k) {
            top[k] = logits[i + k] > top[k] ? logits[i + k] : top[k];
        }
    }
    float max = *std::max_element(top, top + lanes);
    for (; i < n; ++i) {
        max = std::max(max, logits[i]);
    }
    double total = 0;  // short f32 sums, added up in f64, keep the error below 1e-6 for any vocabulary
    for (int64_t first = 0; first < n; first += block) {
        const int64_t end        = std::min(n, first + block);
        float         sum[lanes] = { 0 };
        int64_t       j          = first;
        for (; j + lanes <= end; j += lanes) {
            for (int k = 0; k < lanes; ++k) {
                sum[k] += exp_negative(logits[j + k] - max);
            }
        }
        for (; j < end; ++j) {
            sum[0] += exp_negative(logits[j] - max);
        }
        for (int k = 0; k < lanes; ++k) {
            total += sum[k];
        }
    }
    return (double) max + std::log(total);
}

bool targets::fit(int64_t n_outputs, int64_t n_vocab) const {
    const auto in_vocabulary = [&](int32_t t) { return t >= 0 && t < n_vocab; };
    return !output.empty() && output.size() == token.size() && output.front() >= 0 &&
           output.back() < n_outputs && std::is_sorted(output.begin(), output.end()) &&
           std::all_of(token.begin(), token.end(), in_vocabulary);
}

std::vector<int32_t> first_targets(const targets & wanted) {
    std::vector<int32_t> first;
    const int32_t        n = (int32_t) wanted.output.size();
    for (int32_t i = 0; i < n; ++i) {
        if (i == 0 || wanted.output[(size_t) i] != wanted.output[(size_t) i - 1]) {
            first.push_back(i);
        }
    }
    first.push_back(n);
    return first;
}

void negative_log_likelihoods(const char * logits, int64_t n_vocab, size_t stride, const targets & wanted,
                              int n_threads, double * nll) {
    const std::vector<int32_t> first = first_targets(wanted);
    parallel_for((int64_t) first.size() - 1, n_threads,
                 [&](int64_t c, int) {  // its targets share a column's sum
                     const float * row = (const float *) (logits + (size_t) wanted.output[first[c]] * stride);
                     const double  sum = vectorized<logsumexp>(row, n_vocab);
                     for (int64_t i = first[c]; i < first[c + 1]; ++i) {
                         nll[i] = sum - (double) row[wanted.token[i]];
                     }
                 });
}

}  // namespace zo
