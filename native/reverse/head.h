// The loss's gradient at the logits, in a form that is small: of every counted output the tokens that are
// likely at all.
//
// With weights w_k on the targets y_k of an output, loss = sum w_k * nll_k has the gradient
//   e = (sum w_k) * p - sum w_k * onehot(y_k).
// Tokens are left out, the least likely ones first, while their share of what is not on targets,
// 1 - sum p(y), stays below `tail`. As |e|_1 >= |sum w_k| * (1 - sum p(y)), what is left out is at most
// `tail` times |e|_1, whatever the weights.

#pragma once

#include <cstdint>
#include <vector>

#include "reverse/weights.h"

namespace zo {

// What is kept of one output.
struct kept_logits {
    std::vector<int32_t> tokens;  // ascending; targets are always among them
    std::vector<float>   values;
    double               log_sum  = 0;  // of exp over the whole vocabulary
    double               left_out = 0;  // probability of all other tokens
};

// `targets`: ascending, each once.
kept_logits keep_likely(const float * logits, int64_t n_vocab, const std::vector<int32_t> & targets,
                        double tail);

// A target of an output and its weight in the loss.
struct weighted_target {
    int32_t token;
    float   weight;
};

// The gradient at the logits of one output, an entry for each kept token. Where all tokens but the targets
// are together below `tail` times the targets' sum of magnitudes, as if the weights add up to zero, they are
// zero.
std::vector<scaled_row> logits_gradient(const kept_logits &                  kept,
                                        const std::vector<weighted_target> & targets, double tail);

// An element-wise operation between the head's product and the logits: y = factor * x + offset, y = tanh(x),
// or y = x + bias.
struct logit_step {
    bool               is_tanh = false;
    float              factor = 1, offset = 0;
    std::vector<float> bias;  // [n_vocab], or empty
};

// The gradient before such steps, given in the order of the way back. `logits`: those of the entries.
void back_through_logits(const std::vector<logit_step> & steps, std::vector<float> logits,
                         std::vector<scaled_row> & entries);

}  // namespace zo
