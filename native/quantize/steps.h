// Steps and offsets of groups of weights by weighted squared error.

#pragma once

#include <cstdint>

#include "quantize/layout.h"

namespace zo {

// The block with the steps, offsets and codes found for the groups that `touched` names: never worse than
// those it has. `target` and `weight` are [n_blocks][block], `touched` [n_blocks][n_groups]; no weight: all
// alike; no flags: all groups. A group's result hangs on nothing but itself and its block's units.
void search_steps(const block_layout & layout, int64_t n_blocks, const uint8_t * raw, const float * target,
                  const float * weight, const uint8_t * touched, int n_threads, uint8_t * found);

}  // namespace zo
