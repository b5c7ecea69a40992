#include "quantize/layout.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/half.h"
#include "ggml.h"

namespace zo {

namespace {

void require(bool holds, const char * what) {
    if (!holds) {
        throw std::invalid_argument(std::string("a layout of blocks ") + what);
    }
}

// n numbers of n_bits bits each, whose places are given one by one.
block_layout::numbers runs_of(const int32_t * places, int32_t n, int32_t n_bits, int32_t block_bytes) {
    require(places != nullptr && n_bits >= 1 && n_bits <= 8, "needs one to eight places of bits per number");
    block_layout::numbers result;
    result.first.push_back(0);
    for (int32_t i = 0; i < n; ++i) {
        for (int32_t power = 0; power < n_bits; ++power) {
            const int32_t place = places[i * n_bits + power];
            require(place >= 0 && place < 8 * block_bytes, "has bits outside of the block");
            const bool goes_on = power > 0 && place == places[i * n_bits + power - 1] + 1 && place % 8 != 0;
            if (goes_on) {
                result.runs.back().mask = 2 * result.runs.back().mask + 1;
            } else {
                result.runs.push_back({ place / 8, place % 8, 1, power });
            }
        }
        result.first.push_back((int32_t) result.runs.size());
    }
    return result;
}

// to[codes[i]] = i for codes that are different and below 2^n_bits.
std::vector<int32_t> inverse(const std::vector<int32_t> & codes, int32_t n_bits) {
    std::vector<int32_t> result((size_t) 1 << n_bits, -1);
    require(codes.size() == result.size(), "needs a meaning for every code");
    for (size_t i = 0; i < codes.size(); ++i) {
        require(codes[i] >= 0 && codes[i] < (int32_t) result.size() && result[(size_t) codes[i]] < 0,
                "has a code twice or out of range");
        result[(size_t) codes[i]] = (int32_t) i;
    }
    return result;
}

float read_half(const uint8_t * raw) {
    ggml_fp16_t half;
    std::memcpy(&half, raw, sizeof half);
    return ggml_fp16_to_fp32(half);
}

void write_half(uint8_t * raw, float value) {
    const uint16_t half = to_f16(value);
    std::memcpy(raw, &half, sizeof half);
}

}  // namespace

int32_t block_layout::numbers::read(const uint8_t * block, size_t i) const {
    int32_t value = 0;
    for (int32_t k = first[i]; k < first[i + 1]; ++k) {
        const bits & run = runs[(size_t) k];
        value |= ((block[run.byte] >> run.shift) & run.mask) << run.to;
    }
    return value;
}

void block_layout::numbers::write(uint8_t * block, size_t i, int32_t value) const {
    for (int32_t k = first[i]; k < first[i + 1]; ++k) {
        const bits & run = runs[(size_t) k];
        block[run.byte]  = (uint8_t) ((block[run.byte] & ~(run.mask << run.shift)) |
                                      (((value >> run.to) & run.mask) << run.shift));
    }
}

block_layout::block_layout(const zo_layout & given)
    : block(given.block), group(given.group), n_groups(0), block_bytes(given.block_bytes),
      d_byte(given.d_byte), min_byte(given.min_byte), scale_low(given.scale_low), min_sign(given.min_sign) {
    require(block >= 1 && block <= MAX_BLOCK && group >= 1 && group <= MAX_GROUP && block % group == 0 &&
                block / group <= MAX_GROUPS && block_bytes >= 2,
            "has sizes out of range");
    n_groups = block / group;
    require(d_byte >= 0 && d_byte <= block_bytes - 2 && min_byte >= -1 && min_byte <= block_bytes - 2,
            "has its scale outside of the block");
    require(given.levels != nullptr && given.codes != nullptr && given.n_levels >= 2 &&
                given.n_levels <= MAX_LEVELS,
            "needs levels and their codes");
    levels.assign(given.levels, given.levels + given.n_levels);
    level_codes.assign(given.codes, given.codes + given.n_levels);
    codes       = runs_of(given.code_bits, block, given.n_code_bits, block_bytes);
    code_levels = inverse(level_codes, given.n_code_bits);
    uniform     = levels[0] == (float) (int32_t) levels[0];
    for (size_t i = 1; i < levels.size(); ++i) {
        require(levels[i] > levels[i - 1], "has levels that do not ascend");
        uniform = uniform && levels[i] - levels[i - 1] == 1;
    }
    require(uniform || given.n_levels <= MAX_TABLE, "has too many levels that are not consecutive integers");
    if (given.n_scale_bits > 0) {
        require(given.scale_codes != nullptr && given.n_scales >= 2 && given.n_scales <= MAX_LEVELS,
                "needs codes of its sub-scales");
        scale_codes.assign(given.scale_codes, given.scale_codes + given.n_scales);
        scales        = runs_of(given.scale_bits, n_groups, given.n_scale_bits, block_bytes);
        scale_numbers = inverse(scale_codes, given.n_scale_bits);
    }
    if (given.n_min_bits > 0) {
        require(has_offset(), "has sub-minima without a minimum");
        minima      = runs_of(given.min_bits, n_groups, given.n_min_bits, block_bytes);
        minima_high = (1 << given.n_min_bits) - 1;
    }
}

int32_t block_layout::level_of(float level) const {
    if (uniform) {
        return (int32_t) (level - levels[0]);
    }
    return (int32_t) (std::lower_bound(levels.begin(), levels.end(), level) - levels.begin());
}

void read_block(const block_layout & layout, const uint8_t * raw, block_values & values) {
    values.d       = read_half(raw + layout.d_byte);
    values.minimum = layout.has_offset() ? layout.min_sign * read_half(raw + layout.min_byte) : 0.0f;
    for (int i = 0; i < layout.n_groups; ++i) {
        values.scale[i] =
            layout.has_scales()
                ? layout.scale_low + layout.scale_numbers[(size_t) layout.scales.read(raw, (size_t) i)]
                : 1;
        values.sub_min[i] = layout.has_minima() ? layout.minima.read(raw, (size_t) i) : 1;
    }
    for (int i = 0; i < layout.block; ++i) {
        values.level[i] = (uint8_t) layout.code_levels[(size_t) layout.codes.read(raw, (size_t) i)];
    }
}

void write_block(const block_layout & layout, const block_values & values, uint8_t * raw) {
    write_half(raw + layout.d_byte, values.d);
    if (layout.has_offset()) {
        write_half(raw + layout.min_byte, layout.min_sign * values.minimum);
    }
    for (int i = 0; i < layout.n_groups; ++i) {
        if (layout.has_scales()) {
            layout.scales.write(raw, (size_t) i,
                                layout.scale_codes[(size_t) (values.scale[i] - layout.scale_low)]);
        }
        if (layout.has_minima()) {
            layout.minima.write(raw, (size_t) i, values.sub_min[i]);
        }
    }
    for (int i = 0; i < layout.block; ++i) {
        layout.codes.write(raw, (size_t) i, layout.level_codes[values.level[i]]);
    }
}

}  // namespace zo
