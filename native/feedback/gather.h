// Values of nodes at the counted columns of a batch, copied while the engine computes them: their memory is
// reused soon after.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "feedback/graph.h"
#include "ggml.h"

namespace zo {

struct gathered_values {
    std::vector<float>   floats;  // [n_counted][per_token]
    std::vector<int32_t> ints;    // the same, where a node has whole numbers
};

class gatherer {
public:
    // The columns that count: among all tokens of the batch, and among its outputs.
    void begin(std::vector<int32_t> token_columns, std::vector<int32_t> output_columns, int64_t n_tokens,
               int64_t n_outputs);
    // Copies a node's values. Throws std::runtime_error where it has other columns than the batch.
    void take(int32_t number, const ggml_tensor * node, bool of_outputs, bool staged);

    int64_t         n_counted() const { return (int64_t) token_columns_.size(); }
    const float *   floats(int32_t number) const { return values_.at(number).floats.data(); }
    const int32_t * ints(int32_t number) const { return values_.at(number).ints.data(); }
    void            clear() { values_.clear(); }  // else the next decode uses the same memory

private:
    std::vector<int32_t>                         token_columns_, output_columns_;
    int64_t                                      n_tokens_ = 0, n_outputs_ = 0;
    std::unordered_map<int32_t, gathered_values> values_;
};

}  // namespace zo
