#include "graph/recorder.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/error.h"
#include "graph/node.h"

namespace {

// Copies columns of x, [columns][ne0]; neighbours in one go, as each copy from a device takes its time.
void copy_columns(const ggml_tensor * x, const std::vector<int32_t> & wanted, bool staged, float * to) {
    const size_t      width = (size_t) x->ne[0] * sizeof(float);
    const zo::columns from  = zo::columns_at((char *) x->data, x);
    for (size_t first = 0, end = 0; first < wanted.size(); first = end) {
        const size_t start = from.offset(wanted[first]);
        do {
            ++end;
        } while (end < wanted.size() && from.offset(wanted[end]) == start + (end - first) * width);
        const size_t n_bytes = (end - first) * width;
        if (staged) {
            ggml_backend_tensor_get(x, to, start, n_bytes);
        } else {
            std::memcpy(to, from.data + start, n_bytes);
        }
        to += (end - first) * (size_t) x->ne[0];
    }
}

bool is_ascending(const int32_t * values, int32_t n, int32_t limit) {
    int32_t previous = -1;
    return std::all_of(values, values + n, [&](int32_t value) {
        const bool fits = value > previous && value < limit;
        previous        = value;
        return fits;
    });
}

}  // namespace

bool zo_recorder::wants(const ggml_tensor * node) {
    if (n_tokens == 0 || node->src[0] == nullptr || node->op == GGML_OP_GET_ROWS) {
        return false;
    }
    const zo::recorded_weight * found = find(zo::weight_name(node->src[0]));
    if (found == nullptr || found->input >= 0) {
        return false;
    }
    const ggml_tensor *   w = node->src[0], *x = node->src[1];
    zo::recorded_weight & weight = weights[found->id];
    if (node->op != GGML_OP_MUL_MAT || w->ne[2] != 1 || w->ne[3] != 1) {
        weight.problem =
            std::string("is not used as a plain matrix product (") + ggml_op_name(node->op) + ")";
    } else if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->ne[0] != weight.n_cols) {
        weight.problem = "is multiplied by something of an unexpected shape or type";
    } else {
        return true;
    }
    return false;
}

void zo_recorder::record(const ggml_tensor * node, bool staged) {
    zo::recorded_weight & weight = weights[find(zo::weight_name(node->src[0]))->id];
    const ggml_tensor *   x      = node->src[1];
    const int64_t         n      = zo::n_columns(x);
    if (n != n_tokens && n != n_outputs) {
        throw std::runtime_error("the engine split the batch: " + weight.name + " got " + std::to_string(n) +
                                 " columns instead of " + std::to_string(n_tokens));
    }
    const auto known = std::find_if(inputs.begin(), inputs.end(),
                                    [&](const zo::recorded_input & input) { return input.source == x; });
    weight.input     = (int32_t) (known - inputs.begin());
    if (known != inputs.end()) {
        return;
    }
    zo::recorded_input input;
    input.source     = x;
    input.of_outputs = n != n_tokens;  // the engine drops other columns somewhere in the last layer
    input.values.resize(kept(input).column.size() * (size_t) weight.n_cols);
    copy_columns(x, kept(input).column, staged || !zo::in_host_memory(x), input.values.data());
    inputs.push_back(std::move(input));
}

using zo::fail;
using zo::guarded;

zo_status zo_recorder_init(zo_recorder ** recorder) {
    return guarded([&] {
        if (recorder == nullptr) {
            return fail(ZO_ARGUMENT, "zo_recorder_init got a null pointer");
        }
        *recorder = new zo_recorder;
        return ZO_OK;
    });
}

void zo_recorder_free(zo_recorder * recorder) {
    delete recorder;
}

zo_status zo_recorder_add(zo_recorder * recorder, const char * name, int64_t n_cols) {
    return guarded([&] {
        if (recorder == nullptr || name == nullptr || n_cols < 1 ||
            n_cols > std::numeric_limits<int32_t>::max()) {
            return fail(ZO_ARGUMENT, "zo_recorder_add needs a name and a number of columns");
        }
        if (recorder->find(name) != nullptr) {
            return fail(ZO_ARGUMENT, std::string(name) + " was added before");
        }
        recorder->append({ name, n_cols, 0, -1, "" });
        return ZO_OK;
    });
}

zo_status zo_recorder_begin(zo_recorder * recorder, int32_t n_tokens, int32_t n_kept, const int32_t * kept,
                            int32_t n_outputs, const int32_t * outputs) {
    return guarded([&] {
        if (recorder == nullptr || kept == nullptr || outputs == nullptr) {
            return fail(ZO_ARGUMENT, "zo_recorder_begin got a null pointer");
        }
        if (n_tokens < 1 || n_kept < 1 || n_outputs < 1 || !is_ascending(kept, n_kept, n_tokens) ||
            !is_ascending(outputs, n_outputs, n_tokens)) {
            return fail(ZO_ARGUMENT,
                        "tokens to be recorded, and outputs, must be ascending tokens of a decode");
        }
        for (zo::recorded_weight & weight : recorder->weights) {
            weight.input   = -1;
            weight.problem = "was never multiplied by";
        }
        recorder->inputs.clear();
        recorder->n_tokens         = n_tokens;
        recorder->n_outputs        = n_outputs;
        recorder->of_tokens.column = recorder->of_tokens.token = { kept, kept + n_kept };
        recorder->of_outputs                                   = {};
        for (int32_t i = 0; i < n_outputs; ++i) {
            if (std::binary_search(kept, kept + n_kept, outputs[i])) {
                recorder->of_outputs.column.push_back(i);
                recorder->of_outputs.token.push_back(outputs[i]);
            }
        }
        return ZO_OK;
    });
}

zo_status zo_recorder_find(const zo_recorder * recorder, int32_t number, int32_t * input, int32_t * n_rows) {
    return guarded([&] {
        if (recorder == nullptr || input == nullptr || n_rows == nullptr || !recorder->has(number)) {
            return fail(ZO_ARGUMENT, "zo_recorder_find got a null pointer or a number it does not know");
        }
        *input  = recorder->weights[(size_t) number].input;
        *n_rows = *input < 0 ? 0 : (int32_t) recorder->kept(recorder->inputs[(size_t) *input]).token.size();
        return ZO_OK;
    });
}

zo_status zo_recorder_read(const zo_recorder * recorder, int32_t number, int32_t n_rows, int64_t n_cols,
                           int32_t * tokens, float * x) {
    return guarded([&] {
        if (recorder == nullptr || tokens == nullptr || x == nullptr || !recorder->has(number)) {
            return fail(ZO_ARGUMENT, "zo_recorder_read got a null pointer or a number it does not know");
        }
        const zo::recorded_weight & weight = recorder->weights[(size_t) number];
        if (weight.input < 0) {
            return fail(ZO_GRAPH, weight.name + " " + weight.problem);
        }
        const zo::recorded_input &   input = recorder->inputs[(size_t) weight.input];
        const std::vector<int32_t> & kept  = recorder->kept(input).token;
        if (n_rows != (int32_t) kept.size() || n_cols != weight.n_cols) {
            return fail(ZO_ARGUMENT, "what was recorded of " + weight.name + " has another size");
        }
        std::copy(kept.begin(), kept.end(), tokens);
        std::copy(input.values.begin(), input.values.end(), x);
        return ZO_OK;
    });
}
