// The engine's graph as one decode shows it to the eval callback: what every node computes from which
// tensors, copied, so that it may be read when the engine has dropped the graph.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ggml.h"

namespace zo {

// Operations by what they do to one token, as far as the reverse pass knows them.
enum class op_kind {
    other,  // any that is not listed; the reverse pass stops there
    leaf,   // nothing is computed: a weight, or an input of the graph
    mul_mat,
    mul_mat_id,
    add_id,
    rms_norm,
    norm,
    l2_norm,
    add,
    sub,
    mul,
    div,
    scale,
    clamp,
    sqr,
    unary,
    glu,
    get_rows,
    same,  // the same values in the same order: RESHAPE, CONT
    view,
    repeat,
};

// Element-wise functions, alone or inside gated units.
enum class activation {
    none,
    relu,
    gelu,
    gelu_quick,
    gelu_erf,
    silu,
    sigmoid,
    tanh,
    neg,
    swiglu_oai,
    swiglu_clamp
};

struct graph_tensor {
    std::string  name;  // of a weight: its name in the file
    std::string  desc;  // ggml's name of the operation
    op_kind      kind        = op_kind::other;
    activation   function    = activation::none;
    bool         is_weight   = false;
    ggml_type    type        = GGML_TYPE_F32;
    int64_t      ne[4]       = { 1, 1, 1, 1 };
    size_t       nb[4]       = { 0, 0, 0, 0 };
    size_t       view_offset = 0;
    int32_t      params[4]   = { 0, 0, 0, 0 };
    int32_t      src[3]      = { -1, -1, -1 };  // numbers of tensors, -1: none
    const char * data        = nullptr;         // of a weight, where it lies in memory as in the file

    int64_t n_elements() const { return ne[0] * ne[1] * ne[2] * ne[3]; }
    float   param(int i) const;
};

struct graph {
    std::vector<graph_tensor> tensors;
    std::vector<int32_t>      nodes;  // numbers of those that are computed, in their order

    // Appends a node, with the leaves it reads. Valid until `clear_pointers`, after a decode.
    void add(const ggml_tensor * node);
    // Whether the node at a position of `nodes` computes the same from a batch of whatever size.
    bool matches(size_t position, const ggml_tensor * node) const;
    void clear_pointers() { numbers_.clear(); }
    void clear();

private:
    int32_t number_of(const ggml_tensor * source);

    std::unordered_map<const ggml_tensor *, int32_t> numbers_;
    std::map<std::string, int32_t, std::less<>>      by_name_;
};

}  // namespace zo
