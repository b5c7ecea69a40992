// Which nodes of a graph lie token by token between the loss and the tracked weights, and which of their
// values the way back needs.
//
// A gradient goes from the logits to the inputs of a node if each token of them depends on the same token
// of the node alone and the operation is known. Attention, scans, convolutions and the choices of routers
// are not followed: what they give counts as constant, and the residual stream goes on past them.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "feedback/graph.h"

namespace zo {

// An input of a node that a gradient goes to, and the values that takes.
struct gradient_edge {
    int32_t slot     = 0;  // among the node's sources
    int32_t source   = -1;
    int32_t needs[2] = { -1, -1 };
};

struct plan_tensor {
    bool    of_outputs = false;  // has the output columns alone, as behind the last attention
    int64_t per_token  = 0;      // values of a token; 0: no gradient comes here
    bool    useful     = false;  // its gradient leads to something tracked
    bool    needed     = false;  // its values are to be gathered
    bool    projected  = false;  // or what tracked matrices make of them
    int32_t weight     = -1;     // of a matrix or norm on the way
    std::vector<gradient_edge> edges;
};

// An input of a tracked matrix, of which only the projection on the matrix's factor is kept.
struct projection {
    int32_t input;    // its values' number
    int32_t product;  // the node that multiplies by the matrix
};

struct reverse_plan {
    std::vector<plan_tensor> tensors;    // by number, as those of the graph
    std::vector<int32_t>     logits;     // element-wise nodes from the output node down to the head's product
    int32_t                  head = -1;  // the head's product
    int32_t                  rows = -1;  // the node that keeps the output columns only, -1 where none does
    std::vector<int32_t>     steps;      // useful nodes below the head, last first
    std::vector<int32_t>     matrices, norms;  // nodes that multiply by a weight that may be tracked
    std::vector<projection>  projections;      // by input
    std::vector<std::string> stops;            // where no gradient goes on, in words

    // Bytes for one counted token beside the logits: values gathered, and gradients alive at one time.
    int64_t token_bytes = 0;
};

// How many of the first dimensions hold one token's values, as many as can be; -1 if the shape does not say.
int token_dimensions(const graph_tensor & t, int64_t per_token);

// The rank of a tracked matrix; 0 for one whose inputs are kept whole, and for norms; -1 for other weights.
using rank_of_weight = std::function<int64_t(std::string_view)>;

// The plan for a graph of a decode with these numbers of columns. Throws std::runtime_error where the output
// itself is not understood.
reverse_plan make_plan(const graph & graph, int64_t n_tokens, int64_t n_outputs, const rank_of_weight & rank);

}  // namespace zo
