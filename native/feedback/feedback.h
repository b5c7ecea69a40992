// Everything behind a zo_feedback: what is tracked, the graph and the plan for it, what was gathered in the
// last decode.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"
#include "feedback/gather.h"
#include "feedback/graph.h"
#include "feedback/plan.h"
#include "graph/batch.h"
#include "reverse/head.h"
#include "reverse/pass.h"
#include "reverse/tracked.h"
#include "reverse/weights.h"
#include "zo.h"

struct zo_feedback {
    int                 n_threads    = 1;
    double              tail         = 0;
    bool                force_staged = false;
    zo::weight_table    weights;
    zo::tracked_weights tracked;
    zo::overlay_sources overlays;

    // Whether the plan has to be made anew before the next decode can be gathered.
    bool planned = false;

    // A batch of one branch, and the token column of each of its outputs.
    void begin(const zo::decode_batch & batch, const int32_t * output_token);
    // Of the eval callback. Failures are kept for `end`.
    bool wants(const ggml_tensor * node) noexcept;
    void on_node(const ggml_tensor * node) noexcept;
    // Whether the decode was gathered; where not, the graph is known now and the next one will be.
    bool end();
    // Adds the gradients of sum weights[i] * nll[i] over the targets of the last decode.
    void run(const float * target_weights);

    void                     make_plan();
    const zo::graph &        known_graph() const { return graph_; }
    const zo::reverse_plan & plan() const { return plan_; }
    int64_t                  n_counted() const { return gathered_.n_counted(); }
    int64_t                  n_targets() const { return (int64_t) target_token_.size(); }
    double                   left_out() const;  // the largest probability left out at an output

private:
    enum class state { idle, collecting, gathering, gathered };

    void                        fail(std::string text);
    void                        take(const ggml_tensor * node);
    void                        project(int32_t number, const zo::gathered_values & values);
    void                        keep_logits(const ggml_tensor * node);
    void                        check_rows(const ggml_tensor * node);
    bool                        staged(const ggml_tensor * node) const;
    std::vector<zo::logit_step> logit_steps() const;

    state            state_ = state::idle;
    zo::graph        graph_;
    int64_t          graph_tokens_ = 0, graph_outputs_ = 0;  // columns of the decode that showed the graph
    zo::reverse_plan plan_;
    zo::gatherer     gathered_;
    std::string      error_;

    int64_t              n_tokens_ = 0, n_outputs_ = 0;
    std::vector<int32_t> output_token_;                   // [n_outputs] token column of each output
    std::vector<int32_t> counted_;                        // output columns with targets, ascending
    std::vector<int32_t> target_counted_, target_token_;  // [n_targets] place in counted_, token

    size_t                       position_ = 0;  // in the graph's nodes, of the next one that is announced
    std::vector<zo::kept_logits> kept_;          // [n_counted]
};
