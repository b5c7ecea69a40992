#include "feedback/graph.h"

#include <cstring>
#include <utility>

#include "core/named.h"
#include "graph/node.h"

namespace zo {

namespace {

struct known_op {
    const char * name;
    op_kind      kind;
    activation   function;
};

// By name: numbers of operations change between releases of ggml.
constexpr known_op KNOWN[] = {
    { "NONE", op_kind::leaf, activation::none },
    { "MUL_MAT", op_kind::mul_mat, activation::none },
    { "MUL_MAT_ID", op_kind::mul_mat_id, activation::none },
    { "ADD_ID", op_kind::add_id, activation::none },
    { "RMS_NORM", op_kind::rms_norm, activation::none },
    { "NORM", op_kind::norm, activation::none },
    { "L2_NORM", op_kind::l2_norm, activation::none },
    { "ADD", op_kind::add, activation::none },
    { "SUB", op_kind::sub, activation::none },
    { "MUL", op_kind::mul, activation::none },
    { "DIV", op_kind::div, activation::none },
    { "SCALE", op_kind::scale, activation::none },
    { "CLAMP", op_kind::clamp, activation::none },
    { "SQR", op_kind::sqr, activation::none },
    { "GET_ROWS", op_kind::get_rows, activation::none },
    { "RESHAPE", op_kind::same, activation::none },
    { "CONT", op_kind::same, activation::none },
    { "VIEW", op_kind::view, activation::none },
    { "REPEAT", op_kind::repeat, activation::none },
    { "RELU", op_kind::unary, activation::relu },
    { "GELU", op_kind::unary, activation::gelu },
    { "GELU_QUICK", op_kind::unary, activation::gelu_quick },
    { "GELU_ERF", op_kind::unary, activation::gelu_erf },
    { "SILU", op_kind::unary, activation::silu },
    { "SIGMOID", op_kind::unary, activation::sigmoid },
    { "TANH", op_kind::unary, activation::tanh },
    { "NEG", op_kind::unary, activation::neg },
    { "REGLU", op_kind::glu, activation::relu },
    { "GEGLU", op_kind::glu, activation::gelu },
    { "GEGLU_QUICK", op_kind::glu, activation::gelu_quick },
    { "GEGLU_ERF", op_kind::glu, activation::gelu_erf },
    { "SWIGLU", op_kind::glu, activation::silu },
    { "SWIGLU_OAI", op_kind::glu, activation::swiglu_oai },
    { "SWIGLU_CLAMP", op_kind::glu, activation::swiglu_clamp },
};

const known_op * find_op(const char * name) {
    for (const known_op & known : KNOWN) {
        if (std::strcmp(known.name, name) == 0) {
            return &known;
        }
    }
    return nullptr;
}

}  // namespace

float graph_tensor::param(int i) const {
    float value;
    std::memcpy(&value, &params[i], sizeof value);
    return value;
}

static graph_tensor record(const ggml_tensor * t) {
    graph_tensor made;
    made.name = std::string(weight_name(t));
    made.desc = ggml_op_desc(t);
    if (const known_op * known = find_op(made.desc.c_str())) {
        made.kind     = known->kind;
        made.function = known->function;
    }
    made.type        = t->type;
    made.view_offset = t->view_offs;
    std::memcpy(made.ne, t->ne, sizeof made.ne);
    std::memcpy(made.nb, t->nb, sizeof made.nb);
    std::memcpy(made.params, t->op_params, sizeof made.params);
    made.is_weight = made.kind == op_kind::leaf && (t->flags & GGML_TENSOR_FLAG_INPUT) == 0;
    // Repacked weights are in memory that is not said to be the host's.
    if (made.is_weight && in_host_memory(t) && ggml_is_contiguous(t)) {
        made.data = (const char *) t->data;
    }
    return made;
}

int32_t graph::number_of(const ggml_tensor * source) {
    const auto found = numbers_.find(source);
    if (found != numbers_.end()) {
        return found->second;
    }
    // Tensors that cross backends are copies, leaves with the original's name inside.
    const std::string_view name = weight_name(source);
    if (name != source->name) {
        const auto original = by_name_.find(name);
        if (original != by_name_.end()) {
            return original->second;
        }
    }
    const int32_t number = (int32_t) tensors.size();
    tensors.push_back(record(source));
    numbers_.emplace(source, number);
    by_name_[tensors.back().name] = number;
    return number;
}

void graph::add(const ggml_tensor * node) {
    graph_tensor made = record(node);
    for (int i = 0; i < 3; ++i) {
        made.src[i] = node->src[i] != nullptr ? number_of(node->src[i]) : -1;
    }
    const int32_t number = (int32_t) tensors.size();
    numbers_[node]       = number;
    by_name_[made.name]  = number;
    nodes.push_back(number);
    tensors.push_back(std::move(made));
}

bool graph::matches(size_t position, const ggml_tensor * node) const {
    if (position >= nodes.size()) {
        return false;
    }
    const graph_tensor & known = tensors[(size_t) nodes[position]];
    return known.name == weight_name(node) && known.desc == ggml_op_desc(node) && known.type == node->type;
}

void graph::clear() {
    tensors.clear();
    nodes.clear();
    clear_pointers();
    by_name_.clear();
}

}  // namespace zo
