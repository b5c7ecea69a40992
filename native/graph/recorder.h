// What some weights are multiplied by, at chosen tokens of a decode.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/named.h"
#include "ggml.h"
#include "zo.h"

namespace zo {

struct recorded_weight {
    std::string name;
    int64_t     n_cols = 0;
    uint32_t    id     = 0;
    int32_t     input  = -1;  // what it was multiplied by, -1: nothing that could be recorded
    std::string problem;      // why not
};

struct recorded_input {
    const ggml_tensor * source     = nullptr;  // in the graph of this decode
    bool                of_outputs = false;    // its columns are the outputs, not all tokens
    std::vector<float>  values;                // [n_rows][n_cols]
};

// Columns that are kept, ascending, and the tokens that they are.
struct kept_columns {
    std::vector<int32_t> column, token;
};

}  // namespace zo

struct zo_recorder : zo::named_weights<zo::recorded_weight> {
    int64_t                         n_tokens = 0, n_outputs = 0;  // of the decode; 0: record nothing
    zo::kept_columns                of_tokens, of_outputs;
    std::vector<zo::recorded_input> inputs;

    // Whether the node multiplies by a weight whose input is not known yet; a product that is no plain one
    // is noted as a problem.
    bool wants(const ggml_tensor * node);
    // Copies the input of such a node, through ggml's backend where `staged`. Throws std::runtime_error where
    // it has other columns than the decode that was announced.
    void record(const ggml_tensor * node, bool staged);

    const zo::kept_columns & kept(const zo::recorded_input & input) const {
        return input.of_outputs ? of_outputs : of_tokens;
    }
};
