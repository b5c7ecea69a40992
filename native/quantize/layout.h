// Blocks of a quantized type taken apart into codes, steps and offsets, and put together again.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "zo.h"

namespace zo {

constexpr int MAX_BLOCK = 256, MAX_GROUPS = 16, MAX_GROUP = 32, MAX_LEVELS = 256;
constexpr int MAX_TABLE = 16;  // levels that are not consecutive integers

// A weight is step * level - offset, with one step and offset per group.
struct block_layout {
    // A run of a number's bits inside one byte of the block.
    struct bits {
        int32_t byte;
        int32_t shift;  // in the byte
        int32_t mask;   // of the run, at the low end
        int32_t to;     // place in the number
    };
    // Numbers side by side; those of number i are runs [first[i], first[i + 1]).
    struct numbers {
        std::vector<bits>    runs;
        std::vector<int32_t> first;

        size_t  size() const { return first.empty() ? 0 : first.size() - 1; }
        int32_t read(const uint8_t * block, size_t i) const;
        void    write(uint8_t * block, size_t i, int32_t value) const;
    };

    int32_t              block, group, n_groups, block_bytes;
    numbers              codes, scales, minima;
    std::vector<float>   levels;
    std::vector<int32_t> level_codes, code_levels;     // stored code of a level, and back
    std::vector<int32_t> scale_codes, scale_numbers;   // stored code of scale - scale_low, and back
    int32_t              d_byte, min_byte, scale_low;  // min_byte: -1 without offsets
    float                min_sign;
    bool                 uniform;  // levels are consecutive integers

    // Fails with std::invalid_argument if the description contradicts itself.
    explicit block_layout(const zo_layout & description);

    bool    has_scales() const { return scales.size() > 0; }
    bool    has_minima() const { return minima.size() > 0; }
    bool    has_offset() const { return min_byte >= 0; }
    int32_t scale_high() const { return scale_low + (int32_t) scale_codes.size() - 1; }
    int32_t min_high() const { return minima_high; }

    int32_t level_of(float level) const;  // index of a level

private:
    int32_t minima_high = 0;
};

// What a block's bytes say.
struct block_values {
    float   d, minimum;           // units; the step and offset themselves where there are no multiples
    int32_t scale[MAX_GROUPS];    // multiples of d, 1 where there are none
    int32_t sub_min[MAX_GROUPS];  // multiples of minimum, likewise
    uint8_t level[MAX_BLOCK];     // index of each weight's level

    float step(int group) const { return d * (float) scale[group]; }
    float offset(int group) const { return minimum * (float) sub_min[group]; }
};

void read_block(const block_layout & layout, const uint8_t * raw, block_values & values);

// Bits that are no number of the layout stay.
void write_block(const block_layout & layout, const block_values & values, uint8_t * raw);

}  // namespace zo
