// Negative log-likelihoods from logits.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace zo {

// Which tokens' likelihoods are wanted: target i is `token[i]` at output column `output[i]`, ascending.
struct targets {
    std::vector<int32_t> output;
    std::vector<int32_t> token;

    // Whether they are tokens of a vocabulary at outputs that there are, in order.
    bool fit(int64_t n_outputs, int64_t n_vocab) const;
};

// The targets of one output column lie side by side: where each column's begin, and the end of the last.
std::vector<int32_t> first_targets(const targets & wanted);

// nll[i] = logsumexp(logits of column output[i]) - logit of token[i]. `logits` is [n_vocab] per column,
// columns `stride` bytes apart. The bits do not depend on n_threads.
void negative_log_likelihoods(const char * logits, int64_t n_vocab, size_t stride, const targets & wanted,
                              int n_threads, double * nll);

}  // namespace zo
