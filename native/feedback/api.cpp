// The C functions of feedback.

#include <algorithm>
#include <cmath>
#include <limits>

#include "feedback/feedback.h"

using zo::check_array;
using zo::fail;
using zo::guarded;

zo_status zo_feedback_init(zo_feedback ** feedback, int32_t n_threads, double tail, bool force_staged) {
    return guarded([&] {
        if (feedback == nullptr || n_threads < 1 || !(tail >= 0 && tail < 1)) {
            return fail(ZO_ARGUMENT, "feedback needs at least one thread, and leaves out a part below one");
        }
        *feedback                 = new zo_feedback;
        (*feedback)->n_threads    = n_threads;
        (*feedback)->tail         = tail;
        (*feedback)->force_staged = force_staged;
        return ZO_OK;
    });
}

void zo_feedback_free(zo_feedback * feedback) {
    delete feedback;
}

zo_status zo_feedback_weight(zo_feedback * feedback, const char * name, int32_t type, const void * data,
                             int64_t n_bytes) {
    return guarded([&] {
        if (feedback == nullptr || name == nullptr || data == nullptr || n_bytes < 1 || type < 0 ||
            type >= GGML_TYPE_COUNT) {
            return fail(ZO_ARGUMENT, "zo_feedback_weight needs a name, a type and bytes");
        }
        feedback->weights.lend(name, (ggml_type) type, data, n_bytes);
        return ZO_OK;
    });
}

zo_status zo_feedback_track(zo_feedback * feedback, const char * name, int64_t n_rows, int64_t n_cols,
                            int64_t rank, int64_t n_right, const float * right) {
    return guarded([&] {
        constexpr int64_t limit = std::numeric_limits<int32_t>::max();
        if (feedback == nullptr || name == nullptr || n_rows < 1 || n_rows > limit || n_cols < 1 ||
            n_cols > limit || rank < 0 || rank > 1 << 16) {
            return fail(ZO_ARGUMENT, "zo_feedback_track needs a name, a shape and a rank");
        }
        const float     nothing = 0;
        const zo_status status =
            check_array("zo_feedback_track", rank == 0 ? &nothing : right, n_right, rank * n_cols);
        if (status != ZO_OK) {
            return status;
        }
        if (feedback->tracked.contains(name)) {
            return fail(ZO_ARGUMENT, std::string(name) + " is tracked already");
        }
        zo::tracked_matrix matrix;
        matrix.name   = name;
        matrix.n_rows = n_rows;
        matrix.n_cols = n_cols;
        matrix.rank   = rank;
        matrix.right_transposed.resize((size_t) (rank * n_cols));
        for (int64_t r = 0; r < rank; ++r) {
            for (int64_t j = 0; j < n_cols; ++j) {
                matrix.right_transposed[(size_t) (j * rank + r)] = right[r * n_cols + j];
            }
        }
        matrix.gradient.assign((size_t) (rank * n_rows), 0.0f);
        feedback->tracked.matrices.append(std::move(matrix));
        feedback->planned = false;
        return ZO_OK;
    });
}

zo_status zo_feedback_track_gain(zo_feedback * feedback, const char * name, int64_t n) {
    return guarded([&] {
        if (feedback == nullptr || name == nullptr || n < 1) {
            return fail(ZO_ARGUMENT, "zo_feedback_track_gain needs a name and a length");
        }
        if (feedback->tracked.contains(name)) {
            return fail(ZO_ARGUMENT, std::string(name) + " is tracked already");
        }
        zo::tracked_gain gain;
        gain.name = name;
        gain.n    = n;
        gain.gradient.assign((size_t) n, 0.0f);
        feedback->tracked.gains.append(std::move(gain));
        feedback->planned = false;
        return ZO_OK;
    });
}

zo_status zo_feedback_begin(zo_feedback * feedback, const zo_batch * batch, int32_t n_outputs,
                            const int32_t * output_token) {
    return guarded([&] {
        if (feedback == nullptr || batch == nullptr) {
            return fail(ZO_ARGUMENT, "zo_feedback_begin got a null pointer");
        }
        zo::decode_batch decode;
        zo_status        status = zo::read_batch(batch, decode);
        if (status == ZO_OK) {
            status = check_array("zo_feedback_begin", output_token, n_outputs, decode.n_outputs);
        }
        if (status != ZO_OK) {
            return status;
        }
        if (decode.branches.size() != 1) {
            return fail(ZO_ARGUMENT, "a decode for feedback has one branch");
        }
        if (!std::all_of(output_token, output_token + n_outputs,
                         [&](int32_t token) { return token >= 0 && token < decode.n_tokens; })) {
            return fail(ZO_ARGUMENT, "an output is a token that does not exist");
        }
        feedback->begin(decode, output_token);
        return ZO_OK;
    });
}

zo_status zo_feedback_end(zo_feedback * feedback, bool * gathered) {
    return guarded([&] {
        if (feedback == nullptr || gathered == nullptr) {
            return fail(ZO_ARGUMENT, "zo_feedback_end got a null pointer");
        }
        *gathered = feedback->end();
        return ZO_OK;
    });
}

zo_status zo_feedback_run(zo_feedback * feedback, int32_t n_targets, const float * weights) {
    return guarded([&] {
        const zo_status status = check_array("zo_feedback_run", feedback == nullptr ? nullptr : weights,
                                             n_targets, feedback == nullptr ? 0 : feedback->n_targets());
        if (status != ZO_OK) {
            return status;
        }
        if (!std::all_of(weights, weights + n_targets, [](float w) { return std::isfinite(w); })) {
            return fail(ZO_ARGUMENT, "a target's weight is not finite");
        }
        feedback->run(weights);
        return ZO_OK;
    });
}

// Copies values out to an array of n; `function` is for the sentence.
static zo_status copy_out(const char * function, const std::vector<float> & values, int64_t n, float * to) {
    const zo_status status = check_array(function, to, n, (int64_t) values.size());
    if (status == ZO_OK) {
        std::copy(values.begin(), values.end(), to);
    }
    return status;
}

zo_status zo_feedback_gradient(const zo_feedback * feedback, int32_t number, int64_t n, float * gradient) {
    return guarded([&] {
        if (feedback == nullptr || !feedback->tracked.matrices.has(number)) {
            return fail(ZO_ARGUMENT, "zo_feedback_gradient got a matrix that is not tracked");
        }
        return copy_out("zo_feedback_gradient", feedback->tracked.matrices.weights[(size_t) number].gradient,
                        n, gradient);
    });
}

zo_status zo_feedback_pairs(const zo_feedback * feedback, int32_t number, int64_t n_x, float * x,
                            int64_t n_dy, float * dy) {
    return guarded([&] {
        if (feedback == nullptr || !feedback->tracked.matrices.has(number)) {
            return fail(ZO_ARGUMENT, "zo_feedback_pairs got a matrix that is not tracked");
        }
        const zo::tracked_matrix & matrix = feedback->tracked.matrices.weights[(size_t) number];
        const zo_status            status = copy_out("zo_feedback_pairs", matrix.x, n_x, x);
        return status == ZO_OK ? copy_out("zo_feedback_pairs", matrix.dy, n_dy, dy) : status;
    });
}

zo_status zo_feedback_gain_gradient(const zo_feedback * feedback, int32_t number, int64_t n,
                                    float * gradient) {
    return guarded([&] {
        if (feedback == nullptr || !feedback->tracked.gains.has(number)) {
            return fail(ZO_ARGUMENT, "zo_feedback_gain_gradient got a norm that is not tracked");
        }
        return copy_out("zo_feedback_gain_gradient",
                        feedback->tracked.gains.weights[(size_t) number].gradient, n, gradient);
    });
}

zo_status zo_feedback_clear(zo_feedback * feedback) {
    return guarded([&] {
        if (feedback == nullptr) {
            return fail(ZO_ARGUMENT, "zo_feedback_clear got a null pointer");
        }
        for (zo::tracked_matrix & matrix : feedback->tracked.matrices.weights) {
            std::fill(matrix.gradient.begin(), matrix.gradient.end(), 0.0f);
        }
        for (zo::tracked_gain & gain : feedback->tracked.gains.weights) {
            std::fill(gain.gradient.begin(), gain.gradient.end(), 0.0f);
        }
        return ZO_OK;
    });
}

// ---- what the plan says -----------------------------------------------------------------------------

int64_t zo_feedback_token_bytes(const zo_feedback * feedback) {
    return feedback != nullptr && feedback->planned ? feedback->plan().token_bytes : 0;
}

const char * zo_feedback_matrix(const zo_feedback * feedback, int32_t index, int64_t * n_rows,
                                int64_t * n_cols) {
    if (feedback == nullptr || n_rows == nullptr || n_cols == nullptr || !feedback->planned || index < 0 ||
        (size_t) index >= feedback->plan().matrices.size()) {
        return nullptr;
    }
    const std::vector<zo::graph_tensor> & tensors = feedback->known_graph().tensors;
    const zo::graph_tensor &              node = tensors[(size_t) feedback->plan().matrices[(size_t) index]];
    const zo::graph_tensor &              weight = tensors[(size_t) node.src[0]];
    *n_cols                                      = weight.ne[0];
    *n_rows                                      = weight.ne[1];
    return weight.name.c_str();
}

const char * zo_feedback_norm(const zo_feedback * feedback, int32_t index, int64_t * n) {
    if (feedback == nullptr || n == nullptr || !feedback->planned || index < 0 ||
        (size_t) index >= feedback->plan().norms.size()) {
        return nullptr;
    }
    const std::vector<zo::graph_tensor> & tensors = feedback->known_graph().tensors;
    const zo::graph_tensor &              node    = tensors[(size_t) feedback->plan().norms[(size_t) index]];
    *n                                            = node.ne[0];
    return tensors[(size_t) node.src[1]].name.c_str();
}

const char * zo_feedback_stop(const zo_feedback * feedback, int32_t index) {
    if (feedback == nullptr || !feedback->planned || index < 0 ||
        (size_t) index >= feedback->plan().stops.size()) {
        return nullptr;
    }
    return feedback->plan().stops[(size_t) index].c_str();
}
