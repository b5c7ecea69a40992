// Values of nodes at the counted columns of a batch, copied while the engine computes them: their memory is
// reused soon after.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "feedback/graph.h"
#include "ggml.h"
#include "reverse/tracked.h"

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
    // Copies a node's values; they last until the next call unless they are to be kept. Throws
    // std::runtime_error where it has other columns than the batch.
    const gathered_values & take(int32_t number, const ggml_tensor * node, bool of_outputs, bool staged,
                                 bool keep);
    // Keeps right * x of the columns x that a product with a matrix takes.
    void project(int32_t product, const tracked_matrix & matrix, const gathered_values & x, int n_threads);

    int64_t         n_counted() const { return (int64_t) token_columns_.size(); }
    const float *   floats(int32_t number) const { return values_.at(number).floats.data(); }
    const float *   projected(int32_t product) const { return projected_.at(product).data(); }
    const int32_t * ints(int32_t number) const { return values_.at(number).ints.data(); }
    // Gives memory back, which the next decode would use again.
    void clear() {
        values_.clear();
        projected_.clear();
    }

private:
    std::vector<int32_t>                         token_columns_, output_columns_;
    int64_t                                      n_tokens_ = 0, n_outputs_ = 0;
    std::unordered_map<int32_t, gathered_values> values_;
    gathered_values                              passing_;  // that are not kept

    std::unordered_map<int32_t, std::vector<float>> projected_;  // by product, [columns][rank]
};

}  // namespace zo
