// What one decode holds, as the caller announced it.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/columns.h"
#include "cpu/loss.h"
#include "zo.h"

namespace zo {

struct decode_batch {
    bool                      any      = true;  // no batch was announced: every decode passes, at theta
    int64_t                   n_tokens = 0, n_outputs = 0;
    std::vector<zo_branch>    branches = { zo_branch{ 0, 0.0f } };
    std::vector<column_range> tokens, outputs;
    targets                   wanted;

    // Which branch the n columns belong to that `name` is multiplied by. Throws std::runtime_error if the
    // batch has neither n tokens nor n outputs.
    std::vector<column_range> ranges(const std::string & name, int64_t n) const;
};

// Copies a batch, NULL for any. Fails, with `to` unchanged, if it contradicts itself.
zo_status read_batch(const zo_batch * batch, decode_batch & to);

}  // namespace zo
