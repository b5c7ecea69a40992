#include "reverse/head.h"

#include <algorithm>
#include <cmath>

#include "core/vectorize.h"
#include "cpu/exponential.h"

namespace zo {

namespace {

constexpr int LANES = 16, BLOCK = 1024;  // short sums in f32, added up in f64

ZO_INLINE float largest(const float * values, int64_t n) {
    float   top[LANES];
    int64_t i = 0;
    std::fill(top, top + LANES, -INFINITY);
    for (; i + LANES <= n; i += LANES) {
        for (int k = 0; k < LANES; ++k) {
            top[k] = values[i + k] > top[k] ? values[i + k] : top[k];
        }
    }
    float max = *std::max_element(top, top + LANES);
    for (; i < n; ++i) {
        max = std::max(max, values[i]);
    }
    return max;
}

ZO_INLINE void relative_shares(const float * logits, int64_t n, float top, float * shares) {
    for (int64_t i = 0; i < n; ++i) {
        shares[i] = exp_negative(logits[i] - top);
    }
}

bool any_above(const float * shares, int64_t n, float limit) {
    if (n < LANES) {
        return true;
    }
    int found = 0;
    for (int k = 0; k < LANES; ++k) {
        found |= shares[k] >= limit;
    }
    return found != 0;
}

ZO_INLINE double sum_below(const float * shares, int64_t n, float limit) {
    double total = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t end        = std::min<int64_t>(n, first + BLOCK);
        float         sum[LANES] = {};
        int64_t       i          = first;
        for (; i + LANES <= end; i += LANES) {
            for (int k = 0; k < LANES; ++k) {
                sum[k] += shares[i + k] < limit ? shares[i + k] : 0.0f;
            }
        }
        for (; i < end; ++i) {
            sum[0] += shares[i] < limit ? shares[i] : 0.0f;
        }
        for (int k = 0; k < LANES; ++k) {
            total += sum[k];
        }
    }
    return total;
}

// The largest power of two, of 64, below which all shares add up to at most `most`; 0 if none is.
float find_limit(const std::vector<float> & shares, double most) {
    int fits = 65, exceeds = 0;  // exponents of 1/2
    while (fits - exceeds > 1) {
        const int    middle = (fits + exceeds) / 2;
        const double below =
            vectorized<sum_below>(shares.data(), (int64_t) shares.size(), std::ldexp(1.0f, -middle));
        (below <= most ? fits : exceeds) = middle;
    }
    return fits > 64 ? 0.0f : std::ldexp(1.0f, -fits);
}

}  // namespace

kept_logits keep_likely(const float * logits, int64_t n_vocab, const std::vector<int32_t> & targets,
                        double tail) {
    std::vector<float> shares((size_t) n_vocab);  // of exp, relative to the largest
    const float        top = vectorized<largest>(logits, n_vocab);
    vectorized<relative_shares>(logits, n_vocab, top, shares.data());
    const double sum  = vectorized<sum_below>(shares.data(), n_vocab, INFINITY);
    double       rest = sum;
    for (const int32_t token : targets) {
        rest -= shares[(size_t) token];
    }
    // Targets stay, and only make what is left out less than the limit says.
    const float limit = find_limit(shares, tail * rest);
    double      out   = vectorized<sum_below>(shares.data(), n_vocab, limit);
    kept_logits kept;
    kept.log_sum = top + std::log(sum);
    auto next    = targets.begin();
    for (int64_t first = 0; first < n_vocab; first += LANES) {
        const int64_t end        = std::min<int64_t>(n_vocab, first + LANES);
        const bool    has_likely = any_above(shares.data() + first, end - first, limit);
        if (!has_likely && (next == targets.end() || *next >= end)) {
            continue;
        }
        for (int64_t i = first; i < end; ++i) {
            const bool is_target = next != targets.end() && *next == i;
            const bool is_likely = shares[(size_t) i] >= limit;
            next += is_target;
            if (is_target || is_likely) {
                kept.tokens.push_back((int32_t) i);
                kept.values.push_back(logits[i]);
                out -= is_likely ? 0.0f : shares[(size_t) i];
            }
        }
    }
    kept.left_out = std::max(0.0, out / sum);
    return kept;
}

std::vector<scaled_row> logits_gradient(const kept_logits &                  kept,
                                        const std::vector<weighted_target> & targets, double tail) {
    double total = 0, on_targets = 0, others = kept.left_out;  // weights; magnitudes; probability
    for (const weighted_target & target : targets) {
        total += target.weight;
    }
    std::vector<scaled_row> entries;
    std::vector<size_t>     at_targets;
    entries.reserve(kept.tokens.size());
    for (size_t i = 0; i < kept.tokens.size(); ++i) {
        const double p      = std::exp(kept.values[i] - kept.log_sum);
        double       weight = 0;
        bool         found  = false;
        for (const weighted_target & target : targets) {
            found |= target.token == kept.tokens[i];
            weight += target.token == kept.tokens[i] ? target.weight : 0.0;
        }
        entries.push_back({ kept.tokens[i], (float) (total * p - weight) });
        if (found) {
            at_targets.push_back(i);
            on_targets += std::fabs(total * p - weight);
        } else {
            others += p;
        }
    }
    if (std::fabs(total) * others > tail * on_targets) {
        return entries;
    }
    std::vector<scaled_row> only_targets = entries;
    for (scaled_row & entry : only_targets) {
        entry.value = 0;
    }
    for (const size_t i : at_targets) {
        only_targets[i] = entries[i];
    }
    return only_targets;
}

void back_through_logits(const std::vector<logit_step> & steps, std::vector<float> logits,
                         std::vector<scaled_row> & entries) {
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
