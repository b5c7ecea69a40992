#include "reverse/weights.h"

#include <stdexcept>
#include <utility>

#include "core/vectorize.h"
#include "cpu/dequantize.h"
#include "ggml-backend.h"

namespace zo {

void weight_bytes::row(int64_t row, int64_t column, int64_t n, float * out) const {
    const char * from = data + (size_t) row * row_bytes + (size_t) (column / block) * block_bytes;
    dequantize(type, from, n, out);
}

weight_bytes weight_bytes::matrix(int64_t number) const {
    weight_bytes one = *this;
    one.data += (size_t) (number * n_rows) * row_bytes;
    return one;
}

void weight_table::lend(std::string name, ggml_type type, const void * data, int64_t n_bytes) {
    lent_[std::move(name)] = { type, (const char *) data, n_bytes };
}

weight_bytes weight_table::find(const graph_tensor & weight) const {
    const ggml_tensor * t = weight.tensor;
    weight_bytes        bytes;
    bytes.type        = t->type;
    bytes.n_cols      = t->ne[0];
    bytes.n_rows      = t->ne[1];
    bytes.block       = ggml_blck_size(t->type);
    bytes.block_bytes = ggml_type_size(t->type);
    bytes.row_bytes   = ggml_row_size(t->type, t->ne[0]);
    if (!can_dequantize(t->type)) {
        throw std::runtime_error(weight.name + " has a type that cannot be read back");
    }
    const auto found = lent_.find(weight.name);
    // Repacked weights are in memory that is not said to be the host's.
    if ((t->buffer == nullptr || ggml_backend_buffer_is_host(t->buffer)) && ggml_is_contiguous(t)) {
        bytes.data = (const char *) t->data;
    } else if (found != lent_.end() && found->second.type == t->type &&
               found->second.n_bytes == (int64_t) ggml_nbytes(t)) {
        bytes.data = found->second.data;
    } else {
        throw std::runtime_error("the values of " + weight.name + " are not at hand");
    }
    return bytes;
}

std::vector<float> weight_table::values(const graph_tensor & weight) const {
    const weight_bytes bytes = find(weight);
    std::vector<float> values((size_t) weight.n_elements());
    for (int64_t row = 0; row < weight.n_elements() / bytes.n_cols; ++row) {
        bytes.row(row, 0, bytes.n_cols, values.data() + row * bytes.n_cols);
    }
    return values;
}

void add_transposed_product(const weight_bytes & w, const gemm_panels & dy, float * dx, int n_threads) {
    const int64_t width = w.width();
    gemm_add(dy, w.n_cols, width, dx, w.n_cols, n_threads,
             [&](int64_t first, int64_t depth, int64_t column, int64_t n_columns, float * to) {
                 for (int64_t row = 0; row < depth; ++row) {
                     w.row(first + row, column, n_columns, to + row * width);
                 }
             });
}

// dx[column] += value * row for the entries of one row, of which n values are at hand.
ZO_INLINE static void add_row(const float * row, int64_t n, const sparse_entry * entries, int64_t n_entries,
                              float * dx, int64_t stride) {
    for (int64_t e = 0; e < n_entries; ++e) {
        float *     to    = dx + entries[e].column * stride;
        const float value = entries[e].value;
        for (int64_t j = 0; j < n; ++j) {
            to[j] += value * row[j];
        }
    }
}

void add_transposed_product(const weight_bytes & w, const std::vector<sparse_entry> & dy, float * dx,
                            int n_threads) {
    const int64_t width = w.width(), n_entries = (int64_t) dy.size();
    parallel_for((w.n_cols + width - 1) / width, n_threads, [&](int64_t chunk, int) {
        const int64_t      column = chunk * width, n = std::min(width, w.n_cols - column);
        std::vector<float> values((size_t) n);
        for (int64_t first = 0, end; first < n_entries; first = end) {
            const sparse_entry * entries = dy.data() + first;
            for (end = first + 1; end < n_entries && dy[(size_t) end].row == entries->row; ++end) {
            }
            w.row(entries->row, column, n, values.data());
            vectorized<add_row>(values.data(), n, entries, end - first, dx + column, w.n_cols);
        }
    });
}

}  // namespace zo
