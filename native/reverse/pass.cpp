#include "reverse/pass.h"

#include <algorithm>
#include <utility>

#include "core/parallel.h"
#include "reverse/activation.h"
#include "reverse/ops.h"

namespace zo {

// visit(column, row, value) for the entries of all columns.
template <typename Visit>
static void for_each_entry(const sparse_columns & columns, Visit visit) {
    for (size_t column = 0; column < columns.size(); ++column) {
        for (const scaled_row & entry : columns[column]) {
            visit((int64_t) column, (int64_t) entry.row, entry.value);
        }
    }
}

void reverse_pass::run(const sparse_columns & dy) {
    back_head(dy);
    for (const int32_t node : plan_.steps) {
        const auto found = gradients_.find(node);
        if (found == gradients_.end()) {
            continue;  // nothing that it leads to was reached
        }
        rows taken = std::move(found->second);
        gradients_.erase(found);
        back(node, taken);
        if (taken.capacity() > 0) {
            spare_.push_back(std::move(taken));
        }
    }
}

float * reverse_pass::gradient_of(int32_t number) {
    if (number < 0 || !planned(number).useful) {
        return nullptr;
    }
    rows & values = gradients_[number];
    if (values.empty()) {
        if (!spare_.empty()) {
            values = std::move(spare_.back());
            spare_.pop_back();
        }
        values.assign((size_t) (n_ * planned(number).per_token), 0.0f);
    }
    return values.data();
}

const gradient_edge * reverse_pass::edge_to(int32_t node, int slot) const {
    for (const gradient_edge & edge : planned(node).edges) {
        if (edge.slot == slot) {
            return &edge;
        }
    }
    return nullptr;
}

float * reverse_pass::gradient_at(int32_t node, int slot) {
    const gradient_edge * edge = edge_to(node, slot);
    return edge == nullptr ? nullptr : gradient_of(edge->source);
}

void reverse_pass::pass_on(int32_t node, int slot, rows && dy) {
    const gradient_edge * edge = edge_to(node, slot);
    if (edge == nullptr || !planned(edge->source).useful) {
        return;
    }
    const auto [at, is_new] = gradients_.try_emplace(edge->source);
    if (is_new) {
        at->second = std::move(dy);
        return;
    }
    float * dx = at->second.data();
    for (size_t i = 0; i < dy.size(); ++i) {
        dx[i] += dy[i];
    }
}

void reverse_pass::back(int32_t node, rows & dy) {
    switch (tensor(node).kind) {
    case op_kind::mul_mat:
        return back_product(node, dy);
    case op_kind::mul_mat_id:
        return back_experts(node, dy);
    case op_kind::rms_norm:
    case op_kind::norm:
    case op_kind::l2_norm:
        return back_norm(node, dy);
    case op_kind::add:
    case op_kind::sub:
        return back_sum(node, dy);
    case op_kind::mul:
    case op_kind::div:
        return back_scaling(node, dy);
    case op_kind::glu:
        return back_gated(node, dy);
    case op_kind::view:
    case op_kind::repeat:
        return back_repeated(node, dy);
    case op_kind::scale:
    case op_kind::clamp:
    case op_kind::sqr:
    case op_kind::unary:
        return back_unary(node, dy);
    default:
        return pass_on(node, 0, std::move(dy));
    }
}

// ---- products ---------------------------------------------------------------------------------------

void reverse_pass::back_head(const sparse_columns & dy) {
    const graph_tensor & head   = tensor(plan_.head);
    const graph_tensor & weight = tensor(head.src[0]);
    if (float * dx = gradient_at(plan_.head, 1)) {
        add_transposed_product(weights_.find(weight), dy, dx, n_threads_);
        back_head_overlays(weight, dy, dx);
    }
    if (const tracked_matrix * matrix = tracked_.matrices.find(weight.name)) {
        track_head(tracked_.matrices.weights[matrix->id], dy);
    }
}

void reverse_pass::back_head_overlays(const graph_tensor & weight, const sparse_columns & dy, float * dx) {
    const int64_t n_rows = weight.ne[1], n_cols = weight.ne[0];
    if (const lowrank_weight * added = overlays_.lowrank ? overlays_.lowrank->find(weight.name) : nullptr) {
        const lowrank_factors & factors = overlays_.lowrank->factors(*added, 0);
        std::vector<float>      inner((size_t) (n_ * factors.rank));
        for_each_entry(dy, [&](int64_t column, int64_t row, float value) {
            for (int64_t r = 0; r < factors.rank; ++r) {
                inner[(size_t) (column * factors.rank + r)] +=
                    value * factors.left[(size_t) (r * n_rows + row)];
            }
        });
        gemm_add(gemm_pack(inner.data(), n_, factors.rank, factors.rank, 1), factors.right.data(), n_cols,
                 n_cols, dx, n_cols, n_threads_);
    }
    const sparse_weight * added = overlays_.store ? overlays_.store->find(weight.name) : nullptr;
    if (added == nullptr) {
        return;
    }
    const float *        values = overlays_.store->branch_values(*added, {});
    std::vector<int32_t> place((size_t) n_rows, -1);
    for (int64_t i = 0; i < added->rows.size(); ++i) {
        place[(size_t) added->rows.index[(size_t) i]] = (int32_t) i;
    }
    for_each_entry(dy, [&](int64_t column, int64_t row, float value) {
        const int32_t i = place[(size_t) row];
        for (int32_t e = i < 0 ? 0 : added->row_first[(size_t) i]; i >= 0 && e < added->row_end[(size_t) i];
             ++e) {
            dx[column * n_cols + added->cols.index[(size_t) added->col[(size_t) e]]] += values[e] * value;
        }
    });
}

void reverse_pass::track_head(tracked_matrix & matrix, const sparse_columns & dy) {
    if (matrix.rank == 0) {
        const float * x = gathered_.floats(tensor(plan_.head).src[1]);
        matrix.x.assign(x, x + n_ * matrix.n_cols);
        matrix.dy.assign((size_t) (n_ * matrix.n_rows), 0.0f);
        for_each_entry(dy, [&](int64_t column, int64_t row, float value) {
            matrix.dy[(size_t) (column * matrix.n_rows + row)] = value;
        });
        return;
    }
    const float * inner = gathered_.projected(plan_.head);
    for_each_entry(dy, [&](int64_t column, int64_t row, float value) {
        for (int64_t r = 0; r < matrix.rank; ++r) {
            matrix.gradient[(size_t) (r * matrix.n_rows + row)] += value * inner[column * matrix.rank + r];
        }
    });
}

void reverse_pass::back_product(int32_t node, const rows & dy) {
    const graph_tensor & t      = tensor(node);
    const graph_tensor & weight = tensor(t.src[0]);
    const int64_t        n_rows = t.ne[0], n_columns = (int64_t) dy.size() / n_rows;
    if (float * dx = gradient_at(node, 1)) {
        const gemm_panels packed = gemm_pack(dy.data(), n_columns, n_rows, n_rows, 1);
        add_transposed_product(weights_.find(weight), packed, dx, n_threads_);
        back_overlays(weight, dy, packed, dx);
    }
    if (const tracked_matrix * matrix = tracked_.matrices.find(weight.name)) {
        track_matrix(node, tracked_.matrices.weights[matrix->id], dy, n_columns);
    }
}

void reverse_pass::back_overlays(const graph_tensor & weight, const rows & dy, const gemm_panels & packed,
                                 float * dx) {
    const int64_t n_rows = packed.k, n_cols = weight.ne[0], n_columns = packed.m;
    if (const lowrank_weight * added = overlays_.lowrank ? overlays_.lowrank->find(weight.name) : nullptr) {
        const lowrank_factors & factors = overlays_.lowrank->factors(*added, 0);
        std::vector<float>      left((size_t) (n_rows * factors.rank));  // [n_rows][rank]
        for (int64_t r = 0; r < factors.rank; ++r) {
            for (int64_t i = 0; i < n_rows; ++i) {
                left[(size_t) (i * factors.rank + r)] = factors.left[(size_t) (r * n_rows + i)];
            }
        }
        std::vector<float> inner((size_t) (n_columns * factors.rank));
        gemm_add(packed, left.data(), factors.rank, factors.rank, inner.data(), factors.rank, n_threads_);
        gemm_add(gemm_pack(inner.data(), n_columns, factors.rank, factors.rank, 1), factors.right.data(),
                 n_cols, n_cols, dx, n_cols, n_threads_);
    }
    if (const sparse_weight * added = overlays_.store ? overlays_.store->find(weight.name) : nullptr) {
        const float * values = overlays_.store->branch_values(*added, {});
        parallel_for(n_columns, n_threads_, [&](int64_t column, int) {
            const float * from = dy.data() + column * n_rows;
            float *       to   = dx + column * n_cols;
            for (int64_t place = 0; place < added->rows.size(); ++place) {
                const float row = from[added->rows.index[(size_t) place]];
                for (int32_t e = added->row_first[(size_t) place]; e < added->row_end[(size_t) place]; ++e) {
                    to[added->cols.index[(size_t) added->col[(size_t) e]]] += values[e] * row;
                }
            }
        });
    }
}

void reverse_pass::track_matrix(int32_t node, tracked_matrix & matrix, const rows & dy, int64_t n_columns) {
    if (matrix.rank == 0) {
        const float * x = gathered_.floats(tensor(node).src[1]);
        matrix.x.assign(x, x + n_columns * matrix.n_cols);
        matrix.dy = dy;
        return;
    }
    gemm_add(gemm_pack(gathered_.projected(node), matrix.rank, n_columns, 1, matrix.rank), dy.data(),
             matrix.n_rows, matrix.n_rows, matrix.gradient.data(), matrix.n_rows, n_threads_);
}

void reverse_pass::back_experts(int32_t node, const rows & dy) {
    const graph_tensor & t  = tensor(node);
    float *              dx = gradient_at(node, 1);
    if (dx == nullptr) {
        return;
    }
    const int64_t   n_rows = t.ne[0], n_used = t.ne[1], n_cols = tensor(t.src[0]).ne[0];
    const bool      shared = planned(t.src[1]).per_token == n_cols;  // all experts of a token read the same
    const int32_t * ids    = gathered_.ints(t.src[2]);
    std::vector<std::pair<int32_t, int64_t>> uses;  // (expert, use of it)
    for (int64_t i = 0; i < n_ * n_used; ++i) {
        uses.emplace_back(ids[i], i);
    }
    std::sort(uses.begin(), uses.end());
    const weight_bytes weight = weights_.find(tensor(t.src[0]));
    for (size_t first = 0, end; first < uses.size(); first = end) {
        for (end = first; end < uses.size() && uses[end].first == uses[first].first; ++end) {
        }
        const int64_t n = (int64_t) (end - first);
        rows          in((size_t) (n * n_rows)), out((size_t) (n * n_cols));
        for (int64_t i = 0; i < n; ++i) {
            const float * from = dy.data() + uses[first + (size_t) i].second * n_rows;
            std::copy(from, from + n_rows, in.data() + i * n_rows);
        }
        add_transposed_product(weight.matrix(uses[first].first), gemm_pack(in.data(), n, n_rows, n_rows, 1),
                               out.data(), n_threads_);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t use = uses[first + (size_t) i].second;
            float *       to  = dx + (shared ? use / n_used : use) * n_cols;
            for (int64_t j = 0; j < n_cols; ++j) {
                to[j] += out[(size_t) (i * n_cols + j)];
            }
        }
    }
}

// ---- element by element -----------------------------------------------------------------------------

void reverse_pass::back_norm(int32_t node, const rows & dy) {
    const graph_tensor & t  = tensor(node);
    float *              dx = gradient_at(node, 0);
    if (dx == nullptr) {
        return;
    }
    const auto    back  = t.kind == op_kind::rms_norm ? rms_norm_back
                          : t.kind == op_kind::norm   ? norm_back
                                                      : l2_norm_back;
    const int64_t width = planned(node).per_token;
    const float * x     = gathered_.floats(t.src[0]);
    parallel_for(n_, n_threads_, [&](int64_t i, int) {
        back(x + i * width, dy.data() + i * width, dx + i * width, t.ne[0], width / t.ne[0], t.param(0));
    });
}

void reverse_pass::back_sum(int32_t node, rows & dy) {
    const graph_tensor & t = tensor(node);
    if (float * db = gradient_at(node, 1)) {
        const int64_t              width = planned(node).per_token, width_b = planned(t.src[1]).per_token;
        const std::vector<int32_t> map  = repeat_map(tensor(t.src[1]), t, token_dimensions(t, width));
        const float                sign = t.kind == op_kind::sub ? -1.0f : 1.0f;
        parallel_for(n_, n_threads_, [&](int64_t i, int) {
            for (int64_t j = 0; j < width; ++j) {
                db[i * width_b + (map.empty() ? j : map[(size_t) j])] += sign * dy[(size_t) (i * width + j)];
            }
        });
    }
    pass_on(node, 0, std::move(dy));
}

void reverse_pass::back_scaling(int32_t node, const rows & dy) {
    const graph_tensor & t = tensor(node);
    if (tensor(t.src[1]).is_weight) {
        return back_weight_scaling(node, dy);
    }
    const int64_t width   = planned(node).per_token;
    const int     k       = token_dimensions(t, width);
    const auto    map     = repeat_map(tensor(t.src[1]), t, k);
    const int64_t width_b = map.empty() ? width : 1 + *std::max_element(map.begin(), map.end());
    const bool    divides = t.kind == op_kind::div;
    float *       da = gradient_at(node, 0), *db = gradient_at(node, 1);
    const float * a = db != nullptr ? gathered_.floats(t.src[0]) : nullptr;
    const float * b = da != nullptr || divides ? gathered_.floats(t.src[1]) : nullptr;
    parallel_for(n_, n_threads_, [&](int64_t i, int) {
        for (int64_t j = 0; j < width; ++j) {
            const int64_t at = i * width + j, at_b = i * width_b + (map.empty() ? j : map[(size_t) j]);
            if (da != nullptr) {
                da[at] += divides ? dy[(size_t) at] / b[at_b] : dy[(size_t) at] * b[at_b];
            }
            if (db != nullptr) {
                db[at_b] +=
                    divides ? -dy[(size_t) at] * a[at] / (b[at_b] * b[at_b]) : dy[(size_t) at] * a[at];
            }
        }
    });
}

void reverse_pass::back_weight_scaling(int32_t node, const rows & dy) {
    const graph_tensor & t      = tensor(node);
    const graph_tensor & weight = tensor(t.src[1]);
    const int64_t        width  = planned(node).per_token;
    const auto           map    = repeat_map(weight, t, token_dimensions(t, width));
    const rows           values = weights_.values(weight);
    rows                 all((size_t) width);  // for every value of a token
    for (int64_t j = 0; j < width; ++j) {
        const float value = values[(size_t) (map.empty() ? j : map[(size_t) j])];
        all[(size_t) j]   = t.kind == op_kind::div ? 1 / value : value;
    }
    track_gain(node, dy, all);
    const gain_weight * gain =
        t.kind == op_kind::mul && overlays_.gain ? overlays_.gain->find(weight.name) : nullptr;
    for (int64_t j = 0; gain != nullptr && j < width; ++j) {
        all[(size_t) j] *= gain->branches.at(0)[(size_t) (j % t.ne[0])];
    }
    if (float * dx = gradient_at(node, 0)) {
        parallel_for(n_, n_threads_, [&](int64_t i, int) {
            for (int64_t j = 0; j < width; ++j) {
                dx[i * width + j] += dy[(size_t) (i * width + j)] * all[(size_t) j];
            }
        });
    }
}

void reverse_pass::track_gain(int32_t node, const rows & dy, const rows & weight) {
    const graph_tensor & t = tensor(node);
    const tracked_gain * found =
        planned(node).weight < 0 ? nullptr : tracked_.gains.find(tensor(t.src[1]).name);
    if (found == nullptr) {
        return;
    }
    std::vector<float> & gradient = tracked_.gains.weights[found->id].gradient;
    const float *        x        = gathered_.floats(t.src[0]);
    const int64_t        width    = planned(node).per_token;
    for (int64_t i = 0; i < n_; ++i) {
        for (int64_t j = 0; j < width; ++j) {
            gradient[(size_t) (j % t.ne[0])] +=
                dy[(size_t) (i * width + j)] * x[i * width + j] * weight[(size_t) j];
        }
    }
}

void reverse_pass::back_gated(int32_t node, const rows & dy) {
    const graph_tensor & t     = tensor(node);
    const bool           split = t.src[1] >= 0;
    float *              dgate = gradient_at(node, 0);
    float *              dup   = split ? gradient_at(node, 1) : dgate;
    const float *        gate  = gathered_.floats(t.src[0]);
    const float *        up    = split ? gathered_.floats(t.src[1]) : gate;
    const gated_unit     unit{ t.function, t.param(2), t.param(3) };
    const int64_t        n = t.ne[0], n_rows = n_ * planned(node).per_token / n;
    const int64_t        stride = split ? n : 2 * n;
    // Both halves of one tensor: the gate is the first, unless they are swapped.
    const bool    swapped = t.params[1] != 0;
    const int64_t at_gate = !split && swapped ? n : 0, at_up = !split && !swapped ? n : 0;
    parallel_for(n_rows, n_threads_, [&](int64_t i, int) {
        const int64_t row = i * stride;
        gated_back(unit, gate + row + at_gate, up + row + at_up, dy.data() + i * n,
                   dgate == nullptr ? nullptr : dgate + row + at_gate,
                   dup == nullptr ? nullptr : dup + row + at_up, n);
    });
}

void reverse_pass::back_repeated(int32_t node, const rows & dy) {
    const graph_tensor & t  = tensor(node);
    float *              dx = gradient_at(node, 0);
    if (dx == nullptr) {
        return;
    }
    const graph_tensor & from  = tensor(t.src[0]);
    const int64_t        width = planned(node).per_token, width_x = planned(t.src[0]).per_token;
    const int            k   = token_dimensions(t, width);
    const auto           map = t.kind == op_kind::view ? view_map(t, from, k) : repeat_map(from, t, k);
    parallel_for(n_, n_threads_, [&](int64_t i, int) {
        for (int64_t j = 0; j < width; ++j) {
            dx[i * width_x + (map.empty() ? j : map[(size_t) j])] += dy[(size_t) (i * width + j)];
        }
    });
}

void reverse_pass::back_unary(int32_t node, const rows & dy) {
    const graph_tensor & t  = tensor(node);
    float *              dx = gradient_at(node, 0);
    if (dx == nullptr) {
        return;
    }
    const int64_t width = planned(node).per_token;
    const float * x     = t.kind == op_kind::scale ? nullptr : gathered_.floats(t.src[0]);
    parallel_for(n_, n_threads_, [&](int64_t i, int) {
        for (int64_t j = i * width; j < (i + 1) * width; ++j) {
            const float d = dy[(size_t) j];
            switch (t.kind) {
            case op_kind::scale:
                dx[j] += d * t.param(0);
                break;
            case op_kind::clamp:
                dx[j] += x[j] < t.param(0) || x[j] > t.param(1) ? 0 : d;
                break;
            case op_kind::sqr:
                dx[j] += 2 * d * x[j];
                break;
            default:
                break;
            }
        }
        if (t.kind == op_kind::unary) {
            activation_back(t.function, x + i * width, dy.data() + i * width, dx + i * width, width);
        }
    });
}

}  // namespace zo
