#include "quantize/steps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/vectorize.h"
#include "quantize/nearest.h"

namespace zo {

namespace {

constexpr int   LANES    = 16;  // groups that are searched side by side
constexpr float HALF_MAX = 65504;

// Steps tried, as multiples of the step at which the extreme values are just in range: first, last, number.
struct range {
    float first, last;
    int   n;

    float at(int i) const { return first + (last - first) * (float) i / (float) (n - 1); }
};

constexpr range REACH{ 0.6f, 1.1f, 16 }, REACH_WITH_OFFSET{ 0.55f, 1.1f, 12 };
constexpr range NEAR{ 0.9f, 1.1f, 8 };  // multiples of the step that the group has

// Groups side by side: one value for each.
struct lanes {
    float v[LANES];
};

struct tile {
    float target[MAX_GROUP][LANES], weight[MAX_GROUP][LANES];
    lanes first_step, first_offset, unit, min_unit;  // as the block has them
    lanes step, offset, error;                       // the best so far
    float sums[5][LANES];                            // scratch: see attempt
};

// What a search needs to know of a type.
struct search_rules {
    level_rule levels;
    int        group;
    bool       has_offset, has_scales, has_minima;
    float      scale_low, scale_high, min_high;
};

// To the nearest half-precision number, ties to even, at most HALF_MAX; NaN becomes 0.
ZO_INLINE float to_half(float x) {
    x                 = x == x ? std::min(std::max(x, -HALF_MAX), HALF_MAX) : 0.0f;
    const float small = std::fabs(x) < 6.103515625e-5f ? x : 0.0f;  // a multiple of 2^-24
    const float even  = (std::fabs(small) + 0.5f) - 0.5f;
    uint32_t    bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0xFFFu + (bits >> 13 & 1)) & ~0x1FFFu;
    float large;
    memcpy(&large, &bits, sizeof large);
    return small != 0 ? std::copysign(even, x) : large;
}

// unit * the nearest whole number in [low, high].
ZO_INLINE float to_multiple(float x, float unit, float low, float high) {
    const float ratio = x / (unit == 0 ? 1.0f : unit);
    return unit * round_in(ratio == ratio ? ratio : 0.0f, low, high);
}

ZO_INLINE void snap(const search_rules & rules, const tile & t, lanes & step, lanes & offset) {
    for (int l = 0; l < LANES; ++l) {
        step.v[l] = rules.has_scales ? to_multiple(step.v[l], t.unit.v[l], rules.scale_low, rules.scale_high)
                                     : to_half(step.v[l]);
        offset.v[l] = !rules.has_offset  ? 0.0f
                      : rules.has_minima ? to_multiple(offset.v[l], t.min_unit.v[l], 0, rules.min_high)
                                         : to_half(offset.v[l]);
    }
}

// Weighted squared errors of the nearest levels, and with `Sums` what their least-squares step and offset
// need: sums of w l l, w l x, w, w l, w x.
template <bool Sums, bool Uniform>
ZO_INLINE void measure(const search_rules & rules, tile & t, const lanes & step, const lanes & offset,
                       lanes & error) {
    float inverse[LANES], errors[LANES] = {}, sums[5][LANES] = {};
    for (int l = 0; l < LANES; ++l) {
        inverse[l] = 1 / (step.v[l] == 0 ? 1.0f : step.v[l]);
    }
    for (int i = 0; i < rules.group; ++i) {
        const float *x = t.target[i], *w = t.weight[i];
        for (int l = 0; l < LANES; ++l) {
            const float level = nearest<Uniform>(rules.levels, (x[l] + offset.v[l]) * inverse[l]);
            const float off   = step.v[l] * level - offset.v[l] - x[l];
            errors[l] += w[l] * off * off;
            if (Sums) {
                sums[0][l] += w[l] * level * level;
                sums[1][l] += w[l] * level * x[l];
                sums[2][l] += w[l];
                sums[3][l] += w[l] * level;
                sums[4][l] += w[l] * x[l];
            }
        }
    }
    memcpy(error.v, errors, sizeof errors);
    if (Sums) {
        memcpy(t.sums, sums, sizeof sums);
    }
}

// Tries a step and offset for each group, and keeps them where they beat the best.
template <bool Sums, bool Uniform>
ZO_INLINE void attempt(const search_rules & rules, tile & t, lanes step, lanes offset) {
    lanes error;
    snap(rules, t, step, offset);
    measure<Sums, Uniform>(rules, t, step, offset, error);
    for (int l = 0; l < LANES; ++l) {
        const bool better = error.v[l] < t.error.v[l];
        t.error.v[l]      = better ? error.v[l] : t.error.v[l];
        t.step.v[l]       = better ? step.v[l] : t.step.v[l];
        t.offset.v[l]     = better ? offset.v[l] : t.offset.v[l];
    }
}

// Tries them, and then the least-squares step and offset of the levels that they gave.
template <bool Uniform>
ZO_INLINE void attempt_and_refine(const search_rules & rules, tile & t, const lanes & step,
                                  const lanes & offset) {
    attempt<true, Uniform>(rules, t, step, offset);
    lanes best_step, best_offset;
    for (int l = 0; l < LANES; ++l) {
        const float ll = t.sums[0][l], lx = t.sums[1][l], total = t.sums[2][l], lw = t.sums[3][l],
                    xw   = t.sums[4][l];
        best_step.v[l]   = rules.has_offset ? (total * lx - lw * xw) / (total * ll - lw * lw) : lx / ll;
        best_offset.v[l] = (best_step.v[l] * lw - xw) / total;
    }
    attempt<false, Uniform>(rules, t, best_step, best_offset);
}

ZO_INLINE lanes scaled(const lanes & values, float factor) {
    lanes result;
    for (int l = 0; l < LANES; ++l) {
        result.v[l] = factor * values.v[l];
    }
    return result;
}

struct extremes {
    lanes top, bottom;
};

ZO_INLINE extremes extremes_of(const search_rules & rules, const tile & t) {
    extremes found;
    for (int l = 0; l < LANES; ++l) {
        found.top.v[l] = found.bottom.v[l] = t.target[0][l];
    }
    for (int i = 1; i < rules.group; ++i) {
        for (int l = 0; l < LANES; ++l) {
            found.top.v[l]    = std::max(found.top.v[l], t.target[i][l]);
            found.bottom.v[l] = std::min(found.bottom.v[l], t.target[i][l]);
        }
    }
    return found;
}

// Types without offset: a step of either sign, as the levels are not symmetric.
template <bool Uniform>
ZO_INLINE void steps_alone(const search_rules & rules, tile & t) {
    const extremes found = extremes_of(rules, t);
    const float    low = rules.levels.low, high = rules.levels.high;
    const lanes    zero = {};
    lanes          positive, negative;
    for (int l = 0; l < LANES; ++l) {
        const float top = found.top.v[l], bottom = found.bottom.v[l];
        positive.v[l] = std::max(top / high, bottom / low);
        negative.v[l] = -std::max(-bottom / high, -top / low);
    }
    for (int i = 0; i < REACH.n; ++i) {
        attempt_and_refine<Uniform>(rules, t, scaled(positive, REACH.at(i)), zero);
        attempt_and_refine<Uniform>(rules, t, scaled(negative, REACH.at(i)), zero);
    }
    for (int i = 0; i < NEAR.n; ++i) {
        attempt_and_refine<Uniform>(rules, t, scaled(t.first_step, NEAR.at(i)), zero);
    }
}

// Types with offset: each step with the group's offset, and with either end just in range.
template <bool Uniform>
ZO_INLINE void steps_and_offsets(const search_rules & rules, tile & t) {
    const extremes found = extremes_of(rules, t);
    const float    low = rules.levels.low, high = rules.levels.high;
    for (int i = 0; i < REACH_WITH_OFFSET.n; ++i) {
        lanes step, below, above;
        for (int l = 0; l < LANES; ++l) {
            const float top = found.top.v[l], bottom = found.bottom.v[l];
            step.v[l]  = REACH_WITH_OFFSET.at(i) * (top - bottom) / (high - low);
            below.v[l] = step.v[l] * low - bottom;
            above.v[l] = step.v[l] * high - top;
        }
        attempt_and_refine<Uniform>(rules, t, step, t.first_offset);
        attempt_and_refine<Uniform>(rules, t, step, below);
        attempt_and_refine<Uniform>(rules, t, step, above);
    }
    for (int i = 0; i < NEAR.n; ++i) {
        attempt_and_refine<Uniform>(rules, t, scaled(t.first_step, NEAR.at(i)), t.first_offset);
    }
}

// Walks from the best to better multiples of the units next to it.
template <bool Uniform>
ZO_INLINE void neighbours(const search_rules & rules, tile & t) {
    constexpr int moves[8][2] = { { 1, 0 }, { -1, 0 },  { 0, 1 },  { 0, -1 },
                                  { 1, 1 }, { -1, -1 }, { 1, -1 }, { -1, 1 } };
    for (int i = 0; i < 2 * 8; ++i) {
        const float ds = (float) moves[i % 8][0], dm = (float) moves[i % 8][1];
        if (dm != 0 && !rules.has_minima) {
            continue;
        }
        lanes step, offset;
        for (int l = 0; l < LANES; ++l) {
            step.v[l]   = t.step.v[l] + ds * t.unit.v[l];
            offset.v[l] = t.offset.v[l] + dm * t.min_unit.v[l];
        }
        attempt<false, Uniform>(rules, t, step, offset);
    }
}

template <bool Uniform>
ZO_INLINE void search_tile(const search_rules & rules, tile & t) {
    t.step   = t.first_step;
    t.offset = t.first_offset;
    measure<false, Uniform>(rules, t, t.step, t.offset, t.error);
    if (rules.has_offset) {
        steps_and_offsets<Uniform>(rules, t);
    } else {
        steps_alone<Uniform>(rules, t);
    }
    if (rules.has_scales) {
        neighbours<Uniform>(rules, t);
    }
}

void search_uniform(const search_rules & rules, tile & t) {
    vectorized<search_tile<true>>(rules, t);
}

void search_others(const search_rules & rules, tile & t) {
    vectorized<search_tile<false>>(rules, t);
}

// Blocks of a piece of work; a tile's groups may lie in several of them.
class piece {
public:
    piece(const block_layout & layout, const uint8_t * raw, const float * target, const float * weight,
          const uint8_t * touched, uint8_t * found)
        : layout_(layout), raw_(raw), target_(target), weight_(weight), touched_(touched), found_(found),
          rules_{ level_rule(layout.levels),   layout.group,
                  layout.has_offset(),         layout.has_scales(),
                  layout.has_minima(),         (float) layout.scale_low,
                  (float) layout.scale_high(), (float) layout.min_high() } {}

    void search(int64_t first, int64_t end) {
        for (int64_t block = first; block < end;) {
            const int64_t start = block;
            n_lanes_ = n_blocks_ = 0;
            // Whole blocks, as many as the lanes hold; at least one.
            while (block < end && n_blocks_ < LANES &&
                   (block == start || n_lanes_ + layout_.n_groups <= LANES)) {
                add(block++);
            }
            run();
            for (int i = 0; i < n_blocks_; ++i) {
                write_block(layout_, values_[i], found_ + (start + i) * layout_.block_bytes);
            }
        }
    }

private:
    // Reads a block, and puts its touched groups into lanes; a full tile is searched at once.
    void add(int64_t block) {
        block_values & values = values_[n_blocks_];
        memcpy(found_ + block * layout_.block_bytes, raw_ + block * layout_.block_bytes,
               (size_t) layout_.block_bytes);
        read_block(layout_, raw_ + block * layout_.block_bytes, values);
        for (int g = 0; g < layout_.n_groups; ++g) {
            if (touched_ != nullptr && touched_[block * layout_.n_groups + g] == 0) {
                continue;
            }
            if (n_lanes_ == LANES) {
                run();
            }
            fill(values, g, block * layout_.block + g * layout_.group);
        }
        n_blocks_ += 1;
    }

    void fill(block_values & values, int g, int64_t first) {
        const int l = n_lanes_++;
        for (int i = 0; i < layout_.group; ++i) {
            tile_.target[i][l] = target_[first + i];
            tile_.weight[i][l] = weight_ != nullptr ? weight_[first + i] : 1.0f;
        }
        tile_.first_step.v[l]   = values.step(g);
        tile_.first_offset.v[l] = layout_.has_offset() ? values.offset(g) : 0.0f;
        tile_.unit.v[l]         = values.d;
        tile_.min_unit.v[l]     = layout_.has_minima() ? values.minimum : 0.0f;
        places_[l]              = { &values, g };
    }

    void run() {
        for (int l = n_lanes_; l < LANES && n_lanes_ > 0; ++l) {  // the rest repeats the first
            for (int i = 0; i < layout_.group; ++i) {
                tile_.target[i][l] = tile_.target[i][0];
                tile_.weight[i][l] = tile_.weight[i][0];
            }
            for (lanes * part : { &tile_.first_step, &tile_.first_offset, &tile_.unit, &tile_.min_unit }) {
                part->v[l] = part->v[0];
            }
        }
        if (n_lanes_ > 0) {
            layout_.uniform ? search_uniform(rules_, tile_) : search_others(rules_, tile_);
        }
        for (int l = 0; l < n_lanes_; ++l) {
            take(l);
        }
        n_lanes_ = 0;
    }

    // Writes a lane's result into its block.
    void take(int l) {
        block_values & values = *places_[l].values;
        const int      g      = places_[l].group;
        const float    step = tile_.step.v[l], offset = tile_.offset.v[l];
        if (layout_.has_scales()) {
            values.scale[g] = multiple(step, values.d, layout_.scale_low, layout_.scale_high());
        } else {
            values.d = step;
        }
        if (layout_.has_minima()) {
            values.sub_min[g] = multiple(offset, values.minimum, 0, layout_.min_high());
        } else if (layout_.has_offset()) {
            values.minimum = offset;
        }
        if (step == 0) {
            return;  // levels cannot be told apart, so codes stay
        }
        const float inverse = 1 / step;
        for (int i = 0; i < layout_.group; ++i) {
            const float at = (tile_.target[i][l] + offset) * inverse;
            const float level =
                layout_.uniform ? nearest<true>(rules_.levels, at) : nearest<false>(rules_.levels, at);
            values.level[g * layout_.group + i] = (uint8_t) layout_.level_of(level);
        }
    }

    static int32_t multiple(float value, float unit, int32_t low, int32_t high) {
        return (int32_t) round_in(value / (unit == 0 ? 1.0f : unit), (float) low, (float) high);
    }

    struct place {
        block_values * values;
        int            group;
    };

    const block_layout & layout_;
    const uint8_t *      raw_;
    const float *        target_;
    const float *        weight_;
    const uint8_t *      touched_;
    uint8_t *            found_;
    search_rules         rules_;
    tile                 tile_;
    block_values         values_[LANES];
    place                places_[LANES];
    int                  n_lanes_ = 0, n_blocks_ = 0;
};

}  // namespace

void search_steps(const block_layout & layout, int64_t n_blocks, const uint8_t * raw, const float * target,
                  const float * weight, const uint8_t * touched, int n_threads, uint8_t * found) {
    constexpr int64_t PIECE = 512;  // blocks
    parallel_for((n_blocks + PIECE - 1) / PIECE, n_threads, [&](int64_t i, int) {
        std::vector<piece> work(1, piece(layout, raw, target, weight, touched, found));
        work[0].search(i * PIECE, std::min(n_blocks, (i + 1) * PIECE));
    });
}

}  // namespace zo
