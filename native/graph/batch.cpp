#include "graph/batch.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "core/error.h"

namespace zo {

static std::vector<column_range> ranges_of(const int32_t * branch, int64_t n) {
    std::vector<column_range> ranges;
    for (int64_t i = 0; i < n; ++i) {
        if (ranges.empty() || ranges.back().branch != branch[i]) {
            ranges.push_back({ i, i, branch[i] });
        }
        ranges.back().end = i + 1;
    }
    return ranges;
}

static bool in_range(const int32_t * values, int32_t n, int32_t limit) {
    return std::all_of(values, values + n, [&](int32_t value) { return value >= 0 && value < limit; });
}

std::vector<column_range> decode_batch::ranges(const std::string & name, int64_t n) const {
    if (any) {
        return { { 0, n, 0 } };
    }
    if (n != n_tokens && n != n_outputs) {
        throw std::runtime_error("the engine split the batch: " + name + " got " + std::to_string(n) +
                                 " columns instead of " + std::to_string(n_tokens));
    }
    // The engine drops all but the output columns somewhere in the last layer.
    return n == n_tokens ? tokens : outputs;
}

zo_status read_batch(const zo_batch * batch, decode_batch & to) {
    decode_batch read;
    if (batch == nullptr) {
        to = std::move(read);
        return ZO_OK;
    }
    const zo_batch & b = *batch;
    if (b.n_tokens < 1 || b.n_outputs < 1 || b.n_outputs > b.n_tokens || b.n_branches < 1 ||
        b.n_branches > ZO_MAX_BRANCHES || b.n_targets < 1) {
        return fail(ZO_ARGUMENT, "a batch needs tokens, outputs, branches and targets");
    }
    if (b.token_branch == nullptr || b.output_branch == nullptr || b.branches == nullptr ||
        b.target_output == nullptr || b.target_token == nullptr) {
        return fail(ZO_ARGUMENT, "a batch has a null pointer");
    }
    read.wanted.output.assign(b.target_output, b.target_output + b.n_targets);
    read.wanted.token.assign(b.target_token, b.target_token + b.n_targets);
    if (!in_range(b.token_branch, b.n_tokens, b.n_branches) ||
        !in_range(b.output_branch, b.n_outputs, b.n_branches) ||
        !read.wanted.fit(b.n_outputs, std::numeric_limits<int32_t>::max())) {
        return fail(ZO_ARGUMENT, "a batch refers to a branch, output or token that does not exist");
    }
    read.any       = false;
    read.n_tokens  = b.n_tokens;
    read.n_outputs = b.n_outputs;
    read.branches.assign(b.branches, b.branches + b.n_branches);
    read.tokens  = ranges_of(b.token_branch, b.n_tokens);
    read.outputs = ranges_of(b.output_branch, b.n_outputs);
    to           = std::move(read);
    return ZO_OK;
}

}  // namespace zo
