// The engine's eval callback: overlays after matrix products, losses at the output node.

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "core/columns.h"
#include "core/error.h"
#include "cpu/gain.h"
#include "cpu/loss.h"
#include "cpu/lowrank.h"
#include "cpu/sparse.h"
#include "feedback/feedback.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "gpu/gpu.h"
#include "graph/batch.h"
#include "graph/node.h"
#include "graph/recorder.h"
#include "params/gain.h"
#include "params/inplace.h"
#include "params/lowrank.h"
#include "params/store.h"
#include "zo.h"

namespace {

using zo::column_range;
using zo::columns_at;
using zo::host_view;
using zo::in_host_memory;
using zo::n_columns;
using zo::OUTPUT_NODE;
using zo::weight_name;

// What is added to the product with one weight; either may be NULL.
struct overlays {
    const zo::sparse_weight *  sparse  = nullptr;
    const zo::lowrank_weight * lowrank = nullptr;

    bool                any() const { return sparse != nullptr || lowrank != nullptr; }
    int64_t             n_rows() const { return sparse != nullptr ? sparse->n_rows : lowrank->n_rows; }
    int64_t             n_cols() const { return sparse != nullptr ? sparse->n_cols : lowrank->n_cols; }
    const std::string & name() const { return sparse != nullptr ? sparse->name : lowrank->name; }
};

// Appends the names of the weights that no node multiplied by.
template <typename Table>
void list_silent(const Table * table, const std::vector<int32_t> & fired, std::string & names) {
    for (size_t i = 0; i < fired.size(); ++i) {
        if (fired[i] == 0) {
            names += (names.empty() ? "" : ", ") + table->weights[i].name;
        }
    }
}

void count(std::vector<int32_t> & fired, uint32_t id) {
    if (fired.size() <= id) {  // added after the decode was announced
        fired.resize(id + 1);
    }
    fired[id] += 1;
}

template <typename Table>
void reset_fired(const Table * table, std::vector<int32_t> & fired) {
    fired.assign(table != nullptr ? table->weights.size() : 0, 0);
}

}  // namespace

struct zo_hook {
    zo_store *         store        = nullptr;
    zo_inplace *       inplace      = nullptr;
    zo_lowrank *       lowrank      = nullptr;
    zo_gain *          gain         = nullptr;
    zo_recorder *      recorder     = nullptr;
    zo_feedback *      feedback     = nullptr;
    int                n_threads    = 1;
    bool               force_staged = false;
    zo::sparse_scratch scratch;
    zo::gpus           devices;

    zo::decode_batch     batch;
    std::vector<double>  nll;
    bool                 saw_output = false;
    std::vector<int32_t> fired;          // [weights of store] matrix products seen
    std::vector<int32_t> lowrank_fired;  // [weights of lowrank]
    std::vector<int32_t> gain_fired;     // [weights of gain]
    std::string          error;          // first failure inside a callback

    // Whether the node's result is to be seen once it is computed.
    bool     wants(const ggml_tensor * node);
    bool     on_node(ggml_tensor * node);
    overlays find(const ggml_tensor * node) const;
    bool     overlay(ggml_tensor * node, const overlays & added);
    void     add(const overlays & added, int32_t branch, const zo::columns & x, const zo::columns & y,
                 int64_t first, int64_t end);
    bool     apply_gain(ggml_tensor * node, const zo::gain_weight & weight);
    bool     losses(const ggml_tensor * node);

    // The device with kernels that holds a tensor, NULL if there is none.
    zo::gpu * device_of(const ggml_tensor * t);
    void      prepare(const ggml_tensor * node, const overlays & added);
    void      add_on(zo::gpu & gpu, const overlays & added, const zo::columns & x, const zo::columns & y,
                     const std::vector<column_range> & ranges);

    // The gain of an element-wise product, NULL where there is none.
    const zo::gain_weight * find_gain(const ggml_tensor * node) const;
    bool                    refuse(std::string text);
};

bool zo_hook::refuse(std::string text) {
    if (error.empty()) {
        error = std::move(text);
    }
    return false;
}

overlays zo_hook::find(const ggml_tensor * node) const {
    if (node->src[0] == nullptr || (store == nullptr && lowrank == nullptr)) {
        return {};
    }
    const std::string_view name = weight_name(node->src[0]);
    return { store != nullptr ? store->find(name) : nullptr,
             lowrank != nullptr ? lowrank->find(name) : nullptr };
}

void zo_hook::add(const overlays & added, int32_t branch, const zo::columns & x, const zo::columns & y,
                  int64_t first, int64_t end) {
    if (added.sparse != nullptr) {
        const float * values = store->branch_values(*added.sparse, batch.branches[(size_t) branch]);
        zo::sparse_apply(*added.sparse, values, x, y, first, end, n_threads, scratch);
    }
    if (added.lowrank != nullptr) {
        const zo::lowrank_factors & factors = lowrank->factors(*added.lowrank, branch);
        zo::lowrank_apply(*added.lowrank, factors, x, y, first, end, n_threads);
    }
}

bool zo_hook::overlay(ggml_tensor * node, const overlays & added) {
    const ggml_tensor * x = node->src[1];
    if (node->op != GGML_OP_MUL_MAT || node->src[0]->ne[2] != 1 || node->src[0]->ne[3] != 1) {
        return refuse("the weight " + added.name() + " is not used as a plain matrix product (" +
                      ggml_op_name(node->op) + "), so its entries cannot be tuned; leave it out of the mask");
    }
    if (x->type != GGML_TYPE_F32 || node->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) ||
        x->ne[0] != added.n_cols() || node->ne[0] != added.n_rows()) {
        return refuse("the matrix product with " + added.name() + " has an unexpected shape or type");
    }
    const std::vector<column_range> ranges = batch.ranges(added.name(), n_columns(node));
    if (added.sparse != nullptr) {
        count(fired, added.sparse->id);
    }
    if (added.lowrank != nullptr) {
        count(lowrank_fired, added.lowrank->id);
    }
    zo::gpu * gpu = device_of(node);
    if (gpu != nullptr && gpu == device_of(x)) {
        add_on(*gpu, added, columns_at((char *) x->data, x), columns_at((char *) node->data, node), ranges);
        return true;
    }
    const bool  staged = force_staged || !in_host_memory(node) || !in_host_memory(x);
    host_view   in(x, staged), out(node, staged);
    zo::columns x_columns = columns_at(in.data, x), y_columns = columns_at(out.data, node);
    for (const column_range & range : ranges) {
        add(added, range.branch, x_columns, y_columns, range.first, range.end);
    }
    if (staged) {
        ggml_backend_tensor_set(node, out.data, 0, out.copy.size());
    }
    return true;
}

zo::gpu * zo_hook::device_of(const ggml_tensor * t) {
    return force_staged ? nullptr : devices.of(t);
}

void zo_hook::add_on(zo::gpu & gpu, const overlays & added, const zo::columns & x, const zo::columns & y,
                     const std::vector<column_range> & ranges) {
    if (added.sparse != nullptr) {
        gpu.add_sparse(*store, *added.sparse, batch.branches, x, y, ranges);
    }
    if (added.lowrank != nullptr) {
        gpu.add_lowrank(*lowrank, *added.lowrank, x, y, ranges);
    }
    gpu.finish();
}

void zo_hook::prepare(const ggml_tensor * node, const overlays & added) {
    zo::gpu * gpu = added.sparse != nullptr ? device_of(node) : nullptr;
    if (gpu != nullptr) {
        gpu->prepare(*store, *added.sparse, batch.branches);
    }
}

const zo::gain_weight * zo_hook::find_gain(const ggml_tensor * node) const {
    if (gain == nullptr || node->op != GGML_OP_MUL || node->src[1] == nullptr) {
        return nullptr;
    }
    return gain->find(weight_name(node->src[1]));
}

bool zo_hook::apply_gain(ggml_tensor * node, const zo::gain_weight & weight) {
    if (node->type != GGML_TYPE_F32 || node->nb[0] != sizeof(float) || node->ne[0] != weight.n ||
        node->ne[3] != 1) {
        return refuse("the product with " + weight.name + " has an unexpected shape or type");
    }
    // The norms of heads have [n, heads, tokens] values, others [n, tokens].
    const bool                of_heads = node->ne[2] > 1 || (!batch.any && batch.n_tokens == 1);
    const int64_t             n_heads  = of_heads ? node->ne[1] : 1;
    std::vector<column_range> rows;  // of n values: columns, or their heads
    for (const column_range & range : batch.ranges(weight.name, n_columns(node) / n_heads)) {
        rows.push_back({ range.first * n_heads, range.end * n_heads, range.branch });
    }
    count(gain_fired, weight.id);
    if (zo::gpu * gpu = device_of(node)) {
        gpu->multiply(weight, columns_at((char *) node->data, node), rows);
        gpu->finish();
        return true;
    }
    const bool staged = force_staged || !in_host_memory(node);
    host_view  out(node, staged);
    for (const column_range & row : rows) {
        zo::gain_apply(weight, weight.branches.at((size_t) row.branch), columns_at(out.data, node), row.first,
                       row.end, n_threads);
    }
    if (staged) {
        ggml_backend_tensor_set(node, out.data, 0, out.copy.size());
    }
    return true;
}

bool zo_hook::losses(const ggml_tensor * node) {
    if (n_columns(node) != batch.n_outputs || node->type != GGML_TYPE_F32) {
        return refuse("the output node has " + std::to_string(n_columns(node)) + " columns instead of " +
                      std::to_string(batch.n_outputs));
    }
    for (const int32_t token : batch.wanted.token) {
        if (token >= node->ne[0]) {
            return refuse("target token " + std::to_string(token) + " is outside the vocabulary of " +
                          std::to_string(node->ne[0]));
        }
    }
    saw_output = true;
    if (zo::gpu * gpu = device_of(node)) {
        gpu->losses((const char *) node->data, node->ne[0], node->nb[1], batch.wanted, nll.data());
        return true;
    }
    const host_view logits(node, force_staged || !in_host_memory(node));
    zo::negative_log_likelihoods(logits.data, node->ne[0], node->nb[1], batch.wanted, n_threads, nll.data());
    return true;
}

bool zo_hook::on_node(ggml_tensor * node) {
    if (recorder != nullptr && recorder->wants(node)) {
        recorder->record(node, force_staged);
    }
    if (const zo::gain_weight * weight = find_gain(node)) {
        return apply_gain(node, *weight);
    }
    const overlays added = find(node);
    // The head may itself be tuned: its overlay comes before the losses.
    if (added.any() && node->op != GGML_OP_GET_ROWS && !overlay(node, added)) {
        return false;
    }
    return batch.any || OUTPUT_NODE != node->name || losses(node);
}

bool zo_hook::wants(const ggml_tensor * node) {
    const bool output   = !batch.any && OUTPUT_NODE == node->name;
    const bool recorded = recorder != nullptr && recorder->wants(node);
    if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) {
        return output || recorded || find_gain(node) != nullptr;
    }
    const overlays added = find(node);
    prepare(node, added);
    return output || recorded || added.any();
}

bool zo_hook_eval(ggml_tensor * node, bool ask, void * user_data) {
    zo_hook * hook = (zo_hook *) user_data;
    if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return !ask;
    }
    try {
        if (!ask) {
            const bool done = hook->on_node(node);
            if (hook->feedback != nullptr) {
                hook->feedback->on_node(node);
            }
            return done;
        }
        if (hook->inplace != nullptr) {
            hook->inplace->look(node);
        }
        const bool gathers = hook->feedback != nullptr && hook->feedback->wants(node);
        return hook->wants(node) || gathers;
    } catch (const std::exception & e) {
        return hook->refuse(e.what());
    }
}

using zo::fail;
using zo::guarded;

zo_status zo_hook_init(zo_hook ** hook, zo_store * store, zo_inplace * inplace, zo_lowrank * lowrank,
                       zo_gain * gain, int32_t n_threads, bool force_staged) {
    return guarded([&] {
        if (hook == nullptr || n_threads < 1) {
            return fail(ZO_ARGUMENT, "a hook needs at least one thread");
        }
        if (inplace != nullptr && inplace->devices != nullptr) {
            return fail(ZO_ARGUMENT, "the values in place have a hook already; free it first");
        }
        *hook                 = new zo_hook;
        (*hook)->store        = store;
        (*hook)->inplace      = inplace;
        (*hook)->lowrank      = lowrank;
        (*hook)->gain         = gain;
        (*hook)->n_threads    = n_threads;
        (*hook)->force_staged = force_staged;
        if (inplace != nullptr) {
            inplace->force_staged = force_staged;
            inplace->devices      = &(*hook)->devices;
        }
        return ZO_OK;
    });
}

void zo_hook_free(zo_hook * hook) {
    if (hook != nullptr && hook->inplace != nullptr) {
        hook->inplace->leave_hook();
    }
    delete hook;
}

zo_status zo_hook_set_recorder(zo_hook * hook, zo_recorder * recorder) {
    return guarded([&] {
        if (hook == nullptr) {
            return fail(ZO_ARGUMENT, "zo_hook_set_recorder got a null pointer");
        }
        hook->recorder = recorder;
        return ZO_OK;
    });
}

zo_status zo_hook_set_feedback(zo_hook * hook, zo_feedback * feedback) {
    return guarded([&] {
        if (hook == nullptr) {
            return fail(ZO_ARGUMENT, "zo_hook_set_feedback got a null pointer");
        }
        hook->feedback = feedback;
        if (feedback != nullptr) {
            feedback->overlays = { hook->store, hook->lowrank, hook->gain };
        }
        return ZO_OK;
    });
}

zo_status zo_hook_begin(zo_hook * hook, const zo_batch * batch) {
    return guarded([&] {
        if (hook == nullptr) {
            return fail(ZO_ARGUMENT, "zo_hook_begin got a null pointer");
        }
        const zo_status status = zo::read_batch(batch, hook->batch);
        if (status != ZO_OK) {
            return status;
        }
        hook->error.clear();
        hook->saw_output = false;
        hook->nll.assign(hook->batch.wanted.output.size(), NAN);
        reset_fired(hook->store, hook->fired);
        reset_fired(hook->lowrank, hook->lowrank_fired);
        reset_fired(hook->gain, hook->gain_fired);
        std::vector<uint64_t> seeds;
        for (const zo_branch & branch : hook->batch.branches) {
            if (branch.scale != 0) {
                seeds.push_back(branch.seed);
            }
        }
        // A pass at theta itself needs no noise; what the next commit will want stays cached.
        if (hook->store != nullptr && !seeds.empty()) {
            hook->store->keep_noise(seeds);
        }
        return ZO_OK;
    });
}

zo_status zo_hook_check(const zo_hook * hook) {
    return guarded([&] {
        if (hook == nullptr) {
            return fail(ZO_ARGUMENT, "zo_hook_check got a null pointer");
        }
        return hook->error.empty() ? ZO_OK : fail(ZO_GRAPH, hook->error);
    });
}

zo_status zo_hook_end(zo_hook * hook, int32_t n_targets, double * nll) {
    return guarded([&] {
        if (hook == nullptr) {
            return fail(ZO_ARGUMENT, "zo_hook_end got a null pointer");
        }
        const bool had_batch = !hook->batch.any;
        hook->batch          = {};
        if (!hook->error.empty()) {
            return fail(ZO_GRAPH, hook->error);
        }
        std::string silent;
        list_silent(hook->store, hook->fired, silent);
        list_silent(hook->lowrank, hook->lowrank_fired, silent);
        list_silent(hook->gain, hook->gain_fired, silent);
        if (!silent.empty()) {
            return fail(ZO_GRAPH, "the engine never multiplied by: " + silent +
                                      "; leave it out (--train, or --exclude for a mask)");
        }
        if (had_batch && !hook->saw_output) {
            return fail(ZO_GRAPH, "the engine's graph has no node named result_output");
        }
        const zo_status status = zo::check_array("zo_hook_end", nll, n_targets, (int64_t) hook->nll.size());
        if (status == ZO_OK) {
            std::copy(hook->nll.begin(), hook->nll.end(), nll);
        }
        return status;
    });
}
