// The reverse pass: from the gradient at the logits down the nodes of a plan, token by token, adding up
// the gradients of what is tracked.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "feedback/gather.h"
#include "feedback/plan.h"
#include "params/gain.h"
#include "params/lowrank.h"
#include "params/store.h"
#include "reverse/tracked.h"
#include "reverse/weights.h"

namespace zo {

// What the hook adds to products, which belongs to the matrices; each may be NULL.
struct overlay_sources {
    zo_store *   store   = nullptr;
    zo_lowrank * lowrank = nullptr;
    zo_gain *    gain    = nullptr;
};

class reverse_pass {
public:
    reverse_pass(const graph & graph, const reverse_plan & plan, const gatherer & gathered,
                 const weight_table & weights, const overlay_sources & overlays, tracked_weights & tracked,
                 int n_threads)
        : graph_(graph), plan_(plan), gathered_(gathered), weights_(weights), overlays_(overlays),
          tracked_(tracked), n_threads_(n_threads), n_(gathered.n_counted()) {}

    // `dy`: the gradient at the head's product, n_counted columns. Throws std::runtime_error where a weight
    // cannot be read.
    void run(const sparse_columns & dy);

private:
    using rows = std::vector<float>;  // [n_counted][values of a token]

    const graph_tensor & tensor(int32_t number) const { return graph_.tensors[(size_t) number]; }
    const plan_tensor &  planned(int32_t number) const { return plan_.tensors[(size_t) number]; }

    // The gradient that comes together at a node, zero at first; NULL where it leads to nothing.
    float *               gradient_of(int32_t number);
    const gradient_edge * edge_to(int32_t node, int slot) const;
    // The same of a node's source.
    float * gradient_at(int32_t node, int slot);

    void back_head(const sparse_columns & dy);
    void back_head_overlays(const graph_tensor & weight, const sparse_columns & dy, float * dx);
    void track_head(tracked_matrix & matrix, const sparse_columns & dy);
    // Passes a gradient on unchanged.
    void pass_on(int32_t node, int slot, rows && dy);

    void back(int32_t node, rows & dy);
    void back_product(int32_t node, const rows & dy);
    void back_overlays(const graph_tensor & weight, const rows & dy, const gemm_panels & packed, float * dx);
    void back_experts(int32_t node, const rows & dy);
    void back_norm(int32_t node, const rows & dy);
    void back_sum(int32_t node, rows & dy);
    void back_scaling(int32_t node, const rows & dy);
    void back_weight_scaling(int32_t node, const rows & dy);
    void track_gain(int32_t node, const rows & dy, const rows & weight);
    void back_gated(int32_t node, const rows & dy);
    void back_repeated(int32_t node, const rows & dy);
    void back_unary(int32_t node, const rows & dy);

    void track_matrix(int32_t node, tracked_matrix & matrix, const rows & dy, int64_t n_columns);

    const graph &           graph_;
    const reverse_plan &    plan_;
    const gatherer &        gathered_;
    const weight_table &    weights_;
    const overlay_sources & overlays_;
    tracked_weights &       tracked_;
    int                     n_threads_;
    int64_t                 n_;

    std::unordered_map<int32_t, rows> gradients_;
    std::vector<rows>                 spare_;  // memory of those that were passed on
};

}  // namespace zo
