#include "feedback/plan.h"

#include <algorithm>
#include <stdexcept>

#include "graph/node.h"

namespace zo {

namespace {

std::string where(const graph_tensor & t) {
    return t.desc + " at " + t.name;
}

// Whether `b` is repeated to the shape of `out` within tokens: `k` dimensions of `out` hold a token.
bool repeats_within(const graph_tensor & b, const graph_tensor & out, int k) {
    for (int d = 0; d < 4; ++d) {
        const bool fits = b.is_weight && d >= k ? b.ne[d] == 1
                          : d >= k              ? b.ne[d] == out.ne[d]
                                                : out.ne[d] % b.ne[d] == 0;
        if (!fits) {
            return false;
        }
    }
    return true;
}

class planner {
public:
    planner(const graph & graph, int64_t n_tokens, int64_t n_outputs, const rank_of_weight & rank)
        : graph_(graph), rank_(rank), n_tokens_(n_tokens), n_outputs_(n_outputs) {
        plan_.tensors.resize(graph.tensors.size());
    }

    reverse_plan make() {
        start_at_output();
        for (auto it = graph_.nodes.rbegin(); it != graph_.nodes.rend(); ++it) {
            if (plan_.tensors[(size_t) *it].per_token > 0 && *it != plan_.head) {
                visit(*it);
            }
        }
        mark_useful();
        mark_needed();
        count_bytes();
        return std::move(plan_);
    }

private:
    const graph_tensor & tensor(int32_t number) const { return graph_.tensors[(size_t) number]; }
    plan_tensor &        planned(int32_t number) { return plan_.tensors[(size_t) number]; }
    int64_t n_columns(int32_t number) { return planned(number).of_outputs ? n_outputs_ : n_tokens_; }
    bool    is_node(int32_t number) const { return number >= 0 && tensor(number).kind != op_kind::leaf; }
    bool    has_weight(int32_t node, int slot) const {
        const int32_t source = tensor(node).src[slot];
        return source >= 0 && tensor(source).is_weight;
    }

    void start_at_output();
    void visit(int32_t node);
    void stop(int32_t node, const char * why) { plan_.stops.push_back(where(tensor(node)) + why); }

    // Adds an edge to source `slot`, whose gradients take the values of other tensors. False, if the source
    // is not made of this node's tokens.
    bool lead(int32_t node, int slot, std::vector<int32_t> needs = {});
    // The weight in `slot` may be tracked.
    void take(int32_t node, int slot, std::vector<int32_t> & list) {
        planned(node).weight = tensor(node).src[slot];
        list.push_back(node);
    }
    void visit_product(int32_t node);
    void visit_experts(int32_t node);
    void visit_rows(int32_t node);
    void visit_view(int32_t node);
    void visit_sum(int32_t node);
    void visit_scaling(int32_t node);
    void visit_gated(int32_t node);

    void mark_useful();
    void mark_needed();
    void count_bytes();

    // What a tracked node needs beside what its edges do.
    int32_t own_need(int32_t node) const;
    bool    is_tracked(int32_t node) const { return rank_of(node) >= 0; }
    int64_t rank_of(int32_t node) const;

    const graph &          graph_;
    const rank_of_weight & rank_;
    int64_t                n_tokens_, n_outputs_;
    reverse_plan           plan_;
};

void planner::start_at_output() {
    int32_t node = -1;
    for (const int32_t number : graph_.nodes) {
        if (tensor(number).name == OUTPUT_NODE) {
            node = number;
        }
    }
    while (node >= 0 && !(tensor(node).kind == op_kind::mul_mat && has_weight(node, 0))) {
        const graph_tensor & t = tensor(node);
        const bool           scalar =
            t.kind == op_kind::mul && has_weight(node, 1) && tensor(t.src[1]).n_elements() == 1;
        const bool bias =
            t.kind == op_kind::add && has_weight(node, 1) && tensor(t.src[1]).n_elements() == t.ne[0];
        const bool tanh = t.kind == op_kind::unary && t.function == activation::tanh;
        if (t.kind != op_kind::scale && t.kind != op_kind::same && !scalar && !bias && !tanh) {
            throw std::runtime_error("no gradient can be had from this model's logits: " + where(t) +
                                     " stands between them and the output head");
        }
        plan_.logits.push_back(node);
        node = t.src[0];
    }
    if (node < 0 || tensor(node).n_elements() != tensor(node).ne[0] * n_outputs_ ||
        !is_node(tensor(node).src[1])) {
        throw std::runtime_error("no gradient can be had from this model's logits: there is no output head");
    }
    plan_.head               = node;
    planned(node).of_outputs = true;
    planned(node).per_token  = tensor(node).ne[0];
    take(node, 0, plan_.matrices);
    lead(node, 1);
}

bool planner::lead(int32_t node, int slot, std::vector<int32_t> needs) {
    const int32_t source = tensor(node).src[slot];
    if (!is_node(source)) {
        return true;  // nothing before a leaf
    }
    plan_tensor & to         = planned(source);
    const bool    after_rows = planned(node).of_outputs && tensor(node).kind != op_kind::get_rows;
    const int64_t n          = after_rows ? n_outputs_ : n_tokens_;
    const int64_t n_elements = tensor(source).n_elements();
    if (tensor(source).type != GGML_TYPE_F32 || n_elements % n != 0 ||
        token_dimensions(tensor(source), n_elements / n) < 0 ||
        (to.per_token > 0 && to.of_outputs != after_rows)) {
        return false;
    }
    to.of_outputs = after_rows;
    to.per_token  = n_elements / n;
    gradient_edge edge;
    edge.slot   = slot;
    edge.source = source;
    std::copy(needs.begin(), needs.end(), edge.needs);
    planned(node).edges.push_back(edge);
    return true;
}

void planner::visit(int32_t node) {
    const graph_tensor & t = tensor(node);
    switch (t.kind) {
    case op_kind::mul_mat:
        return visit_product(node);
    case op_kind::mul_mat_id:
        return visit_experts(node);
    case op_kind::get_rows:
        return visit_rows(node);
    case op_kind::view:
        return visit_view(node);
    case op_kind::add:
    case op_kind::sub:
        return visit_sum(node);
    case op_kind::mul:
    case op_kind::div:
        return visit_scaling(node);
    case op_kind::glu:
        return visit_gated(node);
    case op_kind::rms_norm:
    case op_kind::norm:
    case op_kind::l2_norm:
    case op_kind::clamp:
    case op_kind::sqr:
    case op_kind::unary:
        if (!lead(node, 0, { t.src[0] })) {
            stop(node, "");
        }
        return;
    case op_kind::scale:
    case op_kind::same:
    case op_kind::repeat:
    case op_kind::add_id:
        if (!lead(node, 0)) {
            stop(node, "");
        }
        return;
    default:
        return stop(node, "");
    }
}

void planner::visit_product(int32_t node) {
    const graph_tensor & t = tensor(node);
    if (!has_weight(node, 0)) {
        return stop(node, " (of activations)");
    }
    const graph_tensor & weight = tensor(t.src[0]);
    if (weight.ne[2] * weight.ne[3] != 1) {
        return stop(node, " (a stack of matrices)");
    }
    if (!is_node(t.src[1]) || !lead(node, 1)) {
        return stop(node, "");
    }
    take(node, 0, plan_.matrices);
}

void planner::visit_experts(int32_t node) {
    const graph_tensor & t = tensor(node);
    if (!has_weight(node, 0) || !is_node(t.src[1]) || !is_node(t.src[2]) ||
        tensor(t.src[2]).type != GGML_TYPE_I32 || !lead(node, 1, { t.src[2] })) {
        return stop(node, "");
    }
    plan_tensor & ids = planned(t.src[2]);
    ids.of_outputs    = planned(node).of_outputs;
}

void planner::visit_rows(int32_t node) {
    const graph_tensor & t   = tensor(node);
    const int32_t        ids = t.src[1];
    // The rows of the outputs, picked by an input of the graph.
    const bool picks = planned(node).of_outputs && ids >= 0 && tensor(ids).kind == op_kind::leaf &&
                       tensor(ids).type == GGML_TYPE_I32 && tensor(ids).n_elements() == n_outputs_ &&
                       is_node(t.src[0]) && tensor(t.src[0]).n_elements() == t.ne[0] * n_tokens_;
    if (!picks) {
        if (is_node(t.src[0])) {
            stop(node, "");
        }
        return;  // the embedding of a token
    }
    if (!lead(node, 0)) {
        return stop(node, "");
    }
    plan_.rows = node;
}

void planner::visit_view(int32_t node) {
    const graph_tensor & t = tensor(node);
    if (!is_node(t.src[0])) {
        return stop(node, "");
    }
    const graph_tensor & from      = tensor(t.src[0]);
    const int64_t        n         = n_columns(node);
    const int64_t        per_token = from.n_elements() / n;
    const int k_out = token_dimensions(t, planned(node).per_token), k_in = token_dimensions(from, per_token);
    // A part of each token's values: tokens lie as far apart as they did, and the part is inside one of them.
    bool   fits = from.n_elements() % n == 0 && k_out >= 0 && k_in >= 0 &&
                  (n == 1 || (k_out < 4 && k_in < 4 && t.nb[k_out] == from.nb[k_in]));
    size_t last = t.view_offset - from.view_offset;
    for (int d = 0; fits && d < k_out; ++d) {
        last += (size_t) (t.ne[d] - 1) * t.nb[d];
    }
    for (int d = 0; fits && d < k_in; ++d) {
        fits = from.nb[d] == (d == 0 ? sizeof(float) : from.nb[d - 1] * (size_t) from.ne[d - 1]);
    }
    if (!fits || last >= (size_t) per_token * sizeof(float) || !lead(node, 0)) {
        stop(node, "");
    }
}

void planner::visit_sum(int32_t node) {
    const graph_tensor & t = tensor(node);
    const int            k = token_dimensions(t, planned(node).per_token);
    if (k < 0 || !repeats_within(tensor(t.src[1]), t, k) || !lead(node, 0) || !lead(node, 1)) {
        stop(node, "");
    }
}

void planner::visit_scaling(int32_t node) {
    const graph_tensor & t = tensor(node);
    const int32_t        a = t.src[0], b = t.src[1];
    const int            k = token_dimensions(t, planned(node).per_token);
    if (k < 0 || !repeats_within(tensor(b), t, k)) {
        return stop(node, "");
    }
    if (tensor(b).is_weight) {
        if (!lead(node, 0)) {
            return stop(node, "");
        }
        if (t.kind == op_kind::mul && tensor(b).n_elements() == t.ne[0]) {
            take(node, 1, plan_.norms);
        }
        return;
    }
    if (!is_node(b)) {
        return stop(node, " (by an input)");
    }
    const bool fits = t.kind == op_kind::mul ? lead(node, 0, { b }) && lead(node, 1, { a })
                                             : lead(node, 0, { b }) && lead(node, 1, { a, b });
    if (!fits) {
        stop(node, "");
    }
}

void planner::visit_gated(int32_t node) {
    const graph_tensor & t    = tensor(node);
    const int32_t        gate = t.src[0], up = t.src[1];
    const bool           fits =
        up < 0 ? lead(node, 0, { gate }) : lead(node, 0, { gate, up }) && lead(node, 1, { gate, up });
    if (!fits) {
        stop(node, "");
    }
}

int64_t planner::rank_of(int32_t node) const {
    const int32_t weight = plan_.tensors[(size_t) node].weight;
    return weight >= 0 ? rank_(tensor(weight).name) : -1;
}

int32_t planner::own_need(int32_t node) const {
    return tensor(node).src[tensor(node).kind == op_kind::mul_mat ? 1 : 0];
}

void planner::mark_useful() {
    for (const int32_t node : graph_.nodes) {
        plan_tensor & at = planned(node);
        at.useful        = is_tracked(node);
        for (const gradient_edge & edge : at.edges) {
            at.useful = at.useful || planned(edge.source).useful;
        }
    }
    for (auto it = graph_.nodes.rbegin(); it != graph_.nodes.rend(); ++it) {
        if (planned(*it).useful && *it != plan_.head) {
            plan_.steps.push_back(*it);
        }
    }
}

void planner::mark_needed() {
    const auto place = [&](int32_t number, bool of_outputs) -> plan_tensor & {
        plan_tensor & value = planned(number);
        if (value.per_token == 0) {  // constant, as far as gradients go
            value.of_outputs = of_outputs;
        }
        return value;
    };
    const auto need = [&](int32_t number, bool of_outputs) {
        if (number >= 0 && !tensor(number).is_weight) {
            place(number, of_outputs).needed = true;
        }
    };
    for (const int32_t node : graph_.nodes) {
        const plan_tensor at = planned(node);
        if (!at.useful) {
            continue;
        }
        for (const gradient_edge & edge : at.edges) {
            for (const int32_t number : edge.needs) {
                if (planned(edge.source).useful) {
                    need(number, at.of_outputs);
                }
            }
        }
        if (rank_of(node) > 0) {
            const int32_t input                   = tensor(node).src[1];
            place(input, at.of_outputs).projected = true;
            plan_.projections.push_back({ input, node });
        } else if (is_tracked(node)) {
            need(own_need(node), at.of_outputs);
        }
    }
    std::sort(plan_.projections.begin(), plan_.projections.end(),
              [](const projection & a, const projection & b) {
                  return a.input != b.input ? a.input < b.input : a.product < b.product;
              });
}

void planner::count_bytes() {
    int64_t values = 0;
    for (const projection & p : plan_.projections) {
        const int64_t columns = tensor(p.input).n_elements() / tensor(p.input).ne[0];
        values += columns / n_columns(p.input) * rank_of(p.product);
    }
    for (size_t i = 0; i < plan_.tensors.size(); ++i) {
        if (plan_.tensors[i].needed) {
            values += graph_.tensors[i].n_elements() / n_columns((int32_t) i);
        }
    }
    // Gradients come to life at the last node that gives some, and end where they are passed on.
    std::vector<bool> alive(plan_.tensors.size());
    int64_t           now = 0, most = 0;
    const auto        pass = [&](int32_t node) {
        for (const gradient_edge & edge : planned(node).edges) {
            if (planned(edge.source).useful && !alive[(size_t) edge.source]) {
                alive[(size_t) edge.source] = true;
                now += planned(edge.source).per_token;
            }
        }
        most = std::max(most, now);
        if (alive[(size_t) node]) {
            now -= planned(node).per_token;
        }
    };
    pass(plan_.head);
    std::for_each(plan_.steps.begin(), plan_.steps.end(), pass);
    plan_.token_bytes = (values + most) * (int64_t) sizeof(float);
}

}  // namespace

int token_dimensions(const graph_tensor & t, int64_t per_token) {
    int     found = -1;
    int64_t n     = 1;
    for (int k = 0; k <= 4; ++k) {
        found = n == per_token ? k : found;
        n *= k < 4 ? t.ne[k] : 1;
    }
    return found;
}

reverse_plan make_plan(const graph & graph, int64_t n_tokens, int64_t n_outputs,
                       const rank_of_weight & rank) {
    return planner(graph, n_tokens, n_outputs, rank).make();
}

}  // namespace zo
