// The nearest of a type's levels, in code that compilers turn into vector code.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include "core/vectorize.h"
#include "quantize/layout.h"

namespace zo {

// To the nearest whole number, ties to even, between low and high (both whole, at most 2^22 in size).
ZO_INLINE float round_in(float x, float low, float high) {
    constexpr float magic = 12582912;  // 1.5 * 2^23: what is added to it keeps no fraction
    return (std::min(std::max(x, low), high) + magic) - magic;
}

// A type's levels: whole numbers side by side, or a short table.
struct level_rule {
    static constexpr int MIDDLES = MAX_TABLE - 1;

    float low, high;
    float middles[MIDDLES], gaps[MIDDLES];  // of the table; past its end nothing is above a middle

    explicit level_rule(const std::vector<float> & levels) : low(levels.front()), high(levels.back()) {
        for (size_t i = 0; i < MIDDLES; ++i) {
            const bool has = levels.size() <= MAX_TABLE && i + 1 < levels.size();
            middles[i]     = has ? (levels[i + 1] + levels[i]) / 2 : INFINITY;
            gaps[i]        = has ? levels[i + 1] - levels[i] : 0.0f;
        }
    }
};

// The level nearest to x among those of a table, without a loop, so that callers' loops become vector code.
template <size_t... I>
ZO_INLINE float nearest_in_table(const level_rule & rule, float x, std::index_sequence<I...>) {
    float level = rule.low;
    ((level += x > rule.middles[I] ? rule.gaps[I] : 0.0f), ...);
    return level;
}

// In the middle between two levels, the even one of whole numbers, and the lower one of a table.
template <bool Uniform>
ZO_INLINE float nearest(const level_rule & rule, float x) {
    if (Uniform) {
        return round_in(x, rule.low, rule.high);
    }
    return nearest_in_table(rule, x, std::make_index_sequence<level_rule::MIDDLES>());
}

}  // namespace zo
