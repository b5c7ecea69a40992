#include "feedback/gather.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/gemm.h"
#include "ggml-backend.h"

namespace zo {

namespace {

// Where value `i` of a tensor in logical order lies, in bytes from its start.
size_t offset_of(const ggml_tensor * t, int64_t i) {
    size_t offset = 0;
    for (int d = 0; d < 4; ++d) {
        offset += (size_t) (i % t->ne[d]) * t->nb[d];
        i /= t->ne[d];
    }
    return offset;
}

// Whether `n` values in logical order lie side by side.
bool lie_together(const ggml_tensor * t, int64_t n) {
    size_t  stride = ggml_type_size(t->type);
    int64_t done   = 1;
    for (int d = 0; d < 4 && done < n; ++d) {
        if (t->ne[d] != 1 && t->nb[d] != stride) {
            return false;
        }
        stride *= (size_t) t->ne[d];
        done *= t->ne[d];
    }
    return true;
}

// to[column] = the n values of each column, through ggml's backend where `staged`.
template <typename Value>
void copy_columns(const ggml_tensor * from, bool staged, const std::vector<int32_t> & columns, int64_t n,
                  std::vector<Value> & to) {
    to.resize(columns.size() * (size_t) n);
    const char *      data = (const char *) from->data;
    std::vector<char> copy;
    if (lie_together(from, n)) {
        for (size_t i = 0; i < columns.size(); ++i) {
            const size_t offset = offset_of(from, columns[i] * n), n_bytes = (size_t) n * sizeof(Value);
            if (staged) {
                ggml_backend_tensor_get(from, to.data() + i * (size_t) n, offset, n_bytes);
            } else {
                std::memcpy(to.data() + i * (size_t) n, data + offset, n_bytes);
            }
        }
        return;
    }
    if (staged) {
        copy.resize(ggml_nbytes(from));
        ggml_backend_tensor_get(from, copy.data(), 0, copy.size());
        data = copy.data();
    }
    Value * out = to.data();
    for (const int32_t column : columns) {
        for (int64_t i = 0; i < n; ++i) {
            std::memcpy(out++, data + offset_of(from, column * n + i), sizeof(Value));
        }
    }
}

}  // namespace

void gatherer::begin(std::vector<int32_t> token_columns, std::vector<int32_t> output_columns,
                     int64_t n_tokens, int64_t n_outputs) {
    token_columns_  = std::move(token_columns);
    output_columns_ = std::move(output_columns);
    n_tokens_       = n_tokens;
    n_outputs_      = n_outputs;
}

const gathered_values & gatherer::take(int32_t number, const ggml_tensor * node, bool of_outputs, bool staged,
                                       bool keep) {
    const int64_t n_columns = of_outputs ? n_outputs_ : n_tokens_, n = ggml_nelements(node) / n_columns;
    if (n * n_columns != ggml_nelements(node)) {
        throw std::runtime_error(std::string(node->name) + " has other columns than the batch");
    }
    if (node->type != GGML_TYPE_F32 && node->type != GGML_TYPE_I32) {
        throw std::runtime_error(std::string(node->name) + " has values of another type than f32");
    }
    const std::vector<int32_t> & columns = of_outputs ? output_columns_ : token_columns_;
    gathered_values &            to      = keep ? values_[number] : passing_;
    if (node->type == GGML_TYPE_I32) {
        copy_columns(node, staged, columns, n, to.ints);
    } else {
        copy_columns(node, staged, columns, n, to.floats);
    }
    return to;
}

void gatherer::project(int32_t product, const tracked_matrix & matrix, const gathered_values & x,
                       int n_threads) {
    const int64_t        n  = (int64_t) x.floats.size() / matrix.n_cols;
    std::vector<float> & to = projected_[product];
    to.assign((size_t) (n * matrix.rank), 0.0f);
    gemm_add(gemm_pack(x.floats.data(), n, matrix.n_cols, matrix.n_cols, 1), matrix.right_transposed.data(),
             matrix.rank, matrix.rank, to.data(), matrix.rank, n_threads);
}

}  // namespace zo
