// The engine's eval callback: overlays after matrix products, losses at the output node.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "core/columns.h"
#include "core/error.h"
#include "cpu/gain.h"
#include "cpu/loss.h"
#include "cpu/lowrank.h"
#include "cpu/sparse.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "gpu/gpu.h"
#include "graph/node.h"
#include "graph/recorder.h"
#include "params/gain.h"
#include "params/inplace.h"
#include "params/lowrank.h"
#include "params/store.h"
#include "zo.h"

namespace {

constexpr std::string_view OUTPUT_NODE = "result_output";

using zo::column_range;
using zo::columns_at;
using zo::host_view;
using zo::in_host_memory;
using zo::n_columns;
using zo::weight_name;

std::vector<column_range> ranges_of(const int32_t * branch, int64_t n) {
    std::vector<column_range> ranges;
    for (int64_t i = 0; i < n; ++i) {
        if (ranges.empty() || ranges.back().branch != branch[i]) {
            ranges.push_back({ i, i, branch[i] });
        }
        ranges.back().end = i + 1;
    }
    return ranges;
}

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
    int                n_threads    = 1;
    bool               force_staged = false;
    zo::sparse_scratch scratch;
    zo::gpus           devices;

    bool                      open = false;  // between begin and end with a batch
    std::vector<zo_branch>    branches;
    std::vector<column_range> tokens, outputs;
    int64_t                   n_tokens = 0, n_outputs = 0;
    zo::targets               wanted;
    std::vector<double>       nll;
    bool                      saw_output = false;
    std::vector<int32_t>      fired;          // [weights of store] matrix products seen
    std::vector<int32_t>      lowrank_fired;  // [weights of lowrank]
    std::vector<int32_t>      gain_fired;     // [weights of gain]
    std::string               error;          // first failure inside a callback

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
    // What n columns of a weight's product are: ranges of tokens or outputs. Refuses other numbers, and is
    // NULL then; `all` holds the one range of a batch that was not announced.
    const std::vector<column_range> * columns_of(const std::string & name, int64_t n,
                                                 std::vector<column_range> & all);
    bool                              refuse(std::string text);
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
        const float * values = store->branch_values(*added.sparse, branches[(size_t) branch]);
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
    std::vector<column_range>         all;
    const std::vector<column_range> * ranges = columns_of(added.name(), n_columns(node), all);
    if (ranges == nullptr) {
        return false;
    }
    if (added.sparse != nullptr) {
        count(fired, added.sparse->id);
    }
    if (added.lowrank != nullptr) {
        count(lowrank_fired, added.lowrank->id);
    }
    zo::gpu * gpu = device_of(node);
    if (gpu != nullptr && gpu == device_of(x)) {
        add_on(*gpu, added, columns_at((char *) x->data, x), columns_at((char *) node->data, node), *ranges);
        return true;
    }
    const bool  staged = force_staged || !in_host_memory(node) || !in_host_memory(x);
    host_view   in(x, staged), out(node, staged);
    zo::columns x_columns = columns_at(in.data, x), y_columns = columns_at(out.data, node);
    for (const column_range & range : *ranges) {
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
        gpu.add_sparse(*store, *added.sparse, branches, x, y, ranges);
    }
    if (added.lowrank != nullptr) {
        gpu.add_lowrank(*lowrank, *added.lowrank, x, y, ranges);
    }
    gpu.finish();
}

void zo_hook::prepare(const ggml_tensor * node, const overlays & added) {
    zo::gpu * gpu = added.sparse != nullptr ? device_of(node) : nullptr;
    if (gpu != nullptr) {
        gpu->prepare(*store, *added.sparse, branches);
    }
}

const std::vector<column_range> * zo_hook::columns_of(const std::string & name, int64_t n,
                                                      std::vector<column_range> & all) {
    if (!open) {
        all.assign(1, { 0, n, 0 });
        return &all;
    }
    if (n != n_tokens && n != n_outputs) {
        refuse("the engine split the batch: " + name + " got " + std::to_string(n) + " columns instead of " +
               std::to_string(n_tokens));
        return nullptr;
    }
    // The engine drops all but the output columns somewhere in the last layer.
    return n == n_tokens ? &tokens : &outputs;
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
    const bool                        of_heads = node->ne[2] > 1 || (open && n_tokens == 1);
    const int64_t                     n_heads  = of_heads ? node->ne[1] : 1;
    std::vector<column_range>         all;
    const std::vector<column_range> * ranges = columns_of(weight.name, n_columns(node) / n_heads, all);
    if (ranges == nullptr) {
        return false;
    }
    std::vector<column_range> rows;  // of n values: columns, or their heads
    for (const column_range & range : *ranges) {
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
    if (n_columns(node) != n_outputs || node->type != GGML_TYPE_F32) {
        return refuse("the output node has " + std::to_string(n_columns(node)) + " columns instead of " +
                      std::to_string(n_outputs));
    }
    for (const int32_t token : wanted.token) {
        if (token >= node->ne[0]) {
            return refuse("target token " + std::to_string(token) + " is outside the vocabulary of " +
                          std::to_string(node->ne[0]));
        }
    }
    saw_output = true;
    if (zo::gpu * gpu = device_of(node)) {
        gpu->losses((const char *) node->data, node->ne[0], node->nb[1], wanted, nll.data());
        return true;
    }
    const host_view logits(node, force_staged || !in_host_memory(node));
    zo::negative_log_likelihoods(logits.data, node->ne[0], node->nb[1], wanted, n_threads, nll.data());
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
    return !open || OUTPUT_NODE != node->name || losses(node);
}

bool zo_hook::wants(const ggml_tensor * node) {
    const bool output   = open && OUTPUT_NODE == node->name;
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
            return hook->on_node(node);
        }
        if (hook->inplace != nullptr) {
            hook->inplace->look(node);
        }
        return hook->wants(node);
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

static zo_status check_batch(const zo_batch & batch) {
    if (batch.n_tokens < 1 || batch.n_outputs < 1 || batch.n_outputs > batch.n_tokens ||
        batch.n_branches < 1 || batch.n_targets < 1) {
        return fail(ZO_ARGUMENT, "a batch needs tokens, outputs, branches and targets");
    }
    const auto in_range = [](const int32_t * a, int32_t n, int32_t limit) {
        return std::all_of(a, a + n, [&](int32_t v) { return v >= 0 && v < limit; });
    };
    if (!in_range(batch.token_branch, batch.n_tokens, batch.n_branches) ||
        !in_range(batch.output_branch, batch.n_outputs, batch.n_branches) ||
        !in_range(batch.target_output, batch.n_targets, batch.n_outputs) ||
        !std::is_sorted(batch.target_output, batch.target_output + batch.n_targets) ||
        std::any_of(batch.target_token, batch.target_token + batch.n_targets,
                    [](int32_t t) { return t < 0; })) {
        return fail(ZO_ARGUMENT, "a batch refers to a branch, output or token that does not exist");
    }
    return ZO_OK;
}

zo_status zo_hook_begin(zo_hook * hook, const zo_batch * batch) {
    return guarded([&] {
        if (hook == nullptr) {
            return fail(ZO_ARGUMENT, "zo_hook_begin got a null pointer");
        }
        hook->error.clear();
        hook->saw_output = false;
        reset_fired(hook->store, hook->fired);
        reset_fired(hook->lowrank, hook->lowrank_fired);
        reset_fired(hook->gain, hook->gain_fired);
        hook->open = false;
        hook->branches.assign(1, zo_branch{ 0, 0.0f });
        if (batch == nullptr) {
            return ZO_OK;
        }
        const zo_status status = check_batch(*batch);
        if (status != ZO_OK) {
            return status;
        }
        hook->open      = true;
        hook->n_tokens  = batch->n_tokens;
        hook->n_outputs = batch->n_outputs;
        hook->branches.assign(batch->branches, batch->branches + batch->n_branches);
        hook->tokens  = ranges_of(batch->token_branch, batch->n_tokens);
        hook->outputs = ranges_of(batch->output_branch, batch->n_outputs);
        hook->wanted.output.assign(batch->target_output, batch->target_output + batch->n_targets);
        hook->wanted.token.assign(batch->target_token, batch->target_token + batch->n_targets);
        hook->nll.assign((size_t) batch->n_targets, NAN);
        if (hook->store != nullptr) {
            std::vector<uint64_t> seeds;
            for (const zo_branch & branch : hook->branches) {
                if (branch.scale != 0) {
                    seeds.push_back(branch.seed);
                }
            }
            // A pass at theta itself needs no noise; what the next commit will want stays cached.
            if (!seeds.empty()) {
                hook->store->keep_noise(seeds);
            }
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

zo_status zo_hook_end(zo_hook * hook, double * nll) {
    return guarded([&] {
        if (hook == nullptr) {
            return fail(ZO_ARGUMENT, "zo_hook_end got a null pointer");
        }
        const bool had_batch = hook->open;
        hook->open           = false;
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
        if (had_batch && nll != nullptr) {
            std::memcpy(nll, hook->nll.data(), hook->nll.size() * sizeof(double));
        }
        return ZO_OK;
    });
}
