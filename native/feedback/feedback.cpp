#include "feedback/feedback.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/parallel.h"
#include "ggml-backend.h"
#include "graph/node.h"

using zo::op_kind;
using zo::OUTPUT_NODE;

void zo_feedback::begin(const zo::decode_batch & batch, const int32_t * output_token) {
    n_tokens_  = batch.n_tokens;
    n_outputs_ = batch.n_outputs;
    output_token_.assign(output_token, output_token + batch.n_outputs);
    counted_.clear();
    target_counted_.clear();
    target_token_ = batch.wanted.token;
    for (const int32_t output : batch.wanted.output) {
        if (counted_.empty() || counted_.back() != output) {
            counted_.push_back(output);
        }
        target_counted_.push_back((int32_t) counted_.size() - 1);
    }
    error_.clear();
    position_ = 0;
    if (graph_.nodes.empty()) {
        graph_tokens_  = n_tokens_;
        graph_outputs_ = n_outputs_;
        state_         = state::collecting;
        return;
    }
    if (!planned) {
        make_plan();
    }
    std::vector<int32_t> tokens;
    for (const int32_t output : counted_) {
        tokens.push_back(output_token_[(size_t) output]);
    }
    gathered_.begin(std::move(tokens), counted_, n_tokens_, n_outputs_);
    kept_.assign(counted_.size(), {});
    state_ = state::gathering;
}

void zo_feedback::make_plan() {
    planned = false;
    gathered_.clear();
    plan_   = zo::make_plan(graph_, graph_tokens_, graph_outputs_,
                            [&](std::string_view name) { return tracked.rank_of(name); });
    planned = true;
}

void zo_feedback::fail(std::string text) {
    if (error_.empty()) {
        error_ = std::move(text);
    }
}

bool zo_feedback::wants(const ggml_tensor * node) noexcept {
    try {
        if (state_ == state::collecting) {
            graph_.add(node);
            return false;
        }
        if (state_ != state::gathering) {
            return false;
        }
        if (!graph_.matches(position_, node)) {  // another graph than the one that is known
            graph_.clear();
            planned = false;
            state_  = state::idle;
            return false;
        }
        const int32_t           number       = graph_.nodes[position_++];
        const zo::plan_tensor & planned_node = plan_.tensors[(size_t) number];
        return planned_node.needed || planned_node.projected || number == plan_.rows ||
               OUTPUT_NODE == node->name;
    } catch (const std::exception & e) {
        fail(e.what());
        return false;
    }
}

void zo_feedback::on_node(const ggml_tensor * node) noexcept {
    try {
        if (state_ == state::gathering && error_.empty() && position_ > 0) {
            take(node);
        }
    } catch (const std::exception & e) {
        fail(e.what());
    }
}

bool zo_feedback::staged(const ggml_tensor * node) const {
    return force_staged || !zo::in_host_memory(node);
}

void zo_feedback::take(const ggml_tensor * node) {
    const int32_t number = graph_.nodes[position_ - 1];
    if (!graph_.matches(position_ - 1, node)) {
        return;  // the hook wanted it, as a part of a graph that is not known
    }
    const zo::plan_tensor & planned_node = plan_.tensors[(size_t) number];
    if (number == plan_.rows) {
        check_rows(node);
    }
    if (planned_node.needed || planned_node.projected) {
        const zo::gathered_values & values =
            gathered_.take(number, node, planned_node.of_outputs, staged(node), planned_node.needed);
        project(number, values);
    }
    if (OUTPUT_NODE == node->name) {
        keep_logits(node);
    }
}

void zo_feedback::project(int32_t number, const zo::gathered_values & values) {
    const auto & all = plan_.projections;
    auto         p   = std::lower_bound(all.begin(), all.end(), number,
                                        [](const zo::projection & a, int32_t n) { return a.input < n; });
    for (; p != all.end() && p->input == number; ++p) {
        const zo::graph_tensor & product = graph_.tensors[(size_t) p->product];
        const std::string &      name    = graph_.tensors[(size_t) product.src[0]].name;
        gathered_.project(p->product, *tracked.matrices.find(name), values, n_threads);
    }
}

void zo_feedback::check_rows(const ggml_tensor * node) {
    std::vector<int32_t> ids((size_t) ggml_nelements(node->src[1]));
    if ((int64_t) ids.size() == n_outputs_) {
        ggml_backend_buffer * buffer = node->src[1]->buffer;
        if (buffer == nullptr) {
            std::copy_n((const int32_t *) node->src[1]->data, ids.size(), ids.begin());
        } else {
            ggml_backend_tensor_get(node->src[1], ids.data(), 0, ids.size() * sizeof(int32_t));
        }
    }
    if (ids != output_token_) {
        throw std::runtime_error("the engine's outputs stand in another order than the batch's");
    }
}

void zo_feedback::keep_logits(const ggml_tensor * node) {
    const int64_t n_vocab = node->ne[0];
    if (ggml_nelements(node) != n_vocab * n_outputs_ || node->type != GGML_TYPE_F32 ||
        node->nb[0] != sizeof(float)) {
        throw std::runtime_error("the output node has other columns than the batch");
    }
    std::vector<std::vector<int32_t>> targets(counted_.size());
    for (size_t i = 0; i < target_token_.size(); ++i) {
        if (target_token_[i] >= n_vocab) {
            throw std::runtime_error("a target lies outside the vocabulary");
        }
        targets[(size_t) target_counted_[i]].push_back(target_token_[i]);
    }
    const bool         copies = staged(node);
    std::vector<float> copy(copies ? (size_t) ggml_nelements(node) : 0);
    if (copies) {
        ggml_backend_tensor_get(node, copy.data(), 0, ggml_nbytes(node));
    }
    zo::parallel_for((int64_t) counted_.size(), n_threads, [&](int64_t i, int) {
        std::vector<int32_t> & wanted = targets[(size_t) i];
        std::sort(wanted.begin(), wanted.end());
        wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
        const size_t  column = (size_t) counted_[(size_t) i];
        const float * row    = copies ? copy.data() + column * (size_t) n_vocab
                                      : (const float *) ((const char *) node->data + column * node->nb[1]);
        kept_[(size_t) i]    = zo::keep_likely(row, n_vocab, wanted, tail);
    });
}

bool zo_feedback::end() {
    const state was = std::exchange(state_, state::idle);
    graph_.clear_pointers();
    if (!error_.empty()) {
        graph_.clear();
        planned = false;
        throw std::runtime_error(error_);
    }
    if (was == state::collecting) {
        if (graph_.nodes.empty()) {
            throw std::runtime_error("no decode went through the hook of this feedback");
        }
        make_plan();
    }
    if (was != state::gathering) {
        return false;
    }
    if (position_ != graph_.nodes.size()) {
        graph_.clear();
        planned = false;
        return false;
    }
    state_ = state::gathered;
    return true;
}

double zo_feedback::left_out() const {
    double most = 0;
    for (const zo::kept_logits & kept : kept_) {
        most = std::max(most, kept.left_out);
    }
    return most;
}

std::vector<zo::logit_step> zo_feedback::logit_steps() const {
    std::vector<zo::logit_step> steps;
    for (const int32_t node : plan_.logits) {
        const zo::graph_tensor & t = graph_.tensors[(size_t) node];
        zo::logit_step           step;
        step.is_tanh = t.kind == op_kind::unary;
        if (t.kind == op_kind::scale) {
            step.factor = t.param(0);
            step.offset = t.param(1);
        } else if (t.kind == op_kind::mul) {
            step.factor = weights.values(graph_.tensors[(size_t) t.src[1]])[0];
        } else if (t.kind == op_kind::add) {
            step.bias = weights.values(graph_.tensors[(size_t) t.src[1]]);
        }
        steps.push_back(std::move(step));
    }
    return steps;
}

void zo_feedback::run(const float * target_weights) {
    if (state_ != state::gathered) {
        throw std::runtime_error("there is no gathered decode to go back through");
    }
    std::vector<std::vector<zo::weighted_target>> targets(counted_.size());
    for (size_t i = 0; i < target_token_.size(); ++i) {
        targets[(size_t) target_counted_[i]].push_back({ target_token_[i], target_weights[i] });
    }
    const std::vector<zo::logit_step> steps = logit_steps();
    zo::sparse_columns                entries(kept_.size());
    zo::parallel_for((int64_t) kept_.size(), n_threads, [&](int64_t i, int) {
        std::vector<zo::scaled_row> & column = entries[(size_t) i];
        column = zo::logits_gradient(kept_[(size_t) i], targets[(size_t) i], tail);
        zo::back_through_logits(steps, kept_[(size_t) i].values, column);
        column.erase(std::remove_if(column.begin(), column.end(),
                                    [](const zo::scaled_row & entry) { return entry.value == 0; }),
                     column.end());
    });
    zo::reverse_pass(graph_, plan_, gathered_, weights, overlays, tracked, n_threads).run(entries);
}
