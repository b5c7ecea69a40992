#include "reverse/head.h"

#include <algorithm>
#include <cmath>

namespace zo {

namespace {

// Logits by their distance from the largest, in steps; all that are further away share the last one.
constexpr int   STEPS    = 256;
constexpr float PER_UNIT = 8;

int step_of(float distance) {
    return (int) std::min(distance * PER_UNIT, (float) (STEPS - 1));
}

}  // namespace

kept_logits keep_likely(const float * logits, int64_t n_vocab, const std::vector<int32_t> & targets,
                        double tail) {
    const float         top = *std::max_element(logits, logits + n_vocab);
    std::vector<double> mass(STEPS);  // of all tokens in a step
    double              sum = 0;
    for (int64_t i = 0; i < n_vocab; ++i) {
        const float distance = top - logits[i];
        const float share    = std::exp(-distance);
        mass[(size_t) step_of(distance)] += share;
        sum += share;
    }
    double rest = sum;
    for (const int32_t token : targets) {
        rest -= std::exp(logits[token] - top);
    }
    // Whole steps are left out: the mass of targets in them, which stay, only makes that fewer.
    int    first_out = STEPS;
    double out       = 0;
    while (first_out > 0 && out + mass[(size_t) first_out - 1] <= tail * rest) {
        out += mass[(size_t) --first_out];
    }
    kept_logits kept;
    kept.log_sum = top + std::log(sum);
    double in    = 0;
    auto   next  = targets.begin();
    for (int64_t i = 0; i < n_vocab; ++i) {
        const bool is_target = next != targets.end() && *next == i;
        next += is_target;
        if (is_target || step_of(top - logits[i]) < first_out) {
            kept.tokens.push_back((int32_t) i);
            kept.values.push_back(logits[i]);
            in += std::exp(logits[i] - top);
        }
    }
    kept.left_out = std::max(0.0, 1 - in / sum);
    return kept;
}

std::vector<sparse_entry> logits_gradient(const kept_logits &                  kept,
                                          const std::vector<weighted_target> & targets, int32_t column) {
    double total = 0;
    for (const weighted_target & target : targets) {
        total += target.weight;
    }
    std::vector<sparse_entry> entries;
    entries.reserve(kept.tokens.size());
    for (size_t i = 0; i < kept.tokens.size(); ++i) {
        double value = total * std::exp(kept.values[i] - kept.log_sum);
        for (const weighted_target & target : targets) {
            value -= target.token == kept.tokens[i] ? target.weight : 0.0;
        }
        entries.push_back({ kept.tokens[i], column, (float) value });
    }
    return entries;
}

void back_through_logits(const std::vector<logit_step> & steps, std::vector<float> logits,
                         std::vector<sparse_entry> & entries) {
    for (const logit_step & step : steps) {
        for (size_t i = 0; i < entries.size(); ++i) {
            if (step.is_tanh) {
                entries[i].value *= 1 - logits[i] * logits[i];
                logits[i] = std::atanh(logits[i]);
                continue;
            }
            const float bias = step.bias.empty() ? 0.0f : step.bias[(size_t) entries[i].row];
            entries[i].value *= step.factor;
            logits[i] = (logits[i] - step.offset - bias) / step.factor;
        }
    }
}

}  // namespace zo
