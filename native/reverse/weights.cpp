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

// Which rows any column has, ascending; the columns' rows become places among them.
static std::vector<int32_t> number_rows(sparse_columns & dy, int64_t n_rows) {
    std::vector<int32_t> place((size_t) n_rows, -1), used;
    for (const std::vector<scaled_row> & column : dy) {
        for (const scaled_row & entry : column) {
            place[(size_t) entry.row] = 0;
        }
    }
    for (int32_t row = 0; row < (int32_t) n_rows; ++row) {
        if (place[(size_t) row] == 0) {
            place[(size_t) row] = (int32_t) used.size();
            used.push_back(row);
        }
    }
    for (std::vector<scaled_row> & column : dy) {
        for (scaled_row & entry : column) {
            entry.row = place[(size_t) entry.row];
        }
    }
    return used;
}

void add_transposed_product(const weight_bytes & w, const sparse_columns & dy, float * dx, int n_threads) {
    constexpr int64_t          n_together = 128, most = 1024;  // rows and columns that are read before use
    sparse_columns             numbered = dy;
    const std::vector<int32_t> used     = number_rows(numbered, w.n_rows);
    const int64_t              n_used   = (int64_t) used.size();
    const int64_t share = std::min(most, (w.n_cols + n_threads - 1) / n_threads), unit = w.width();
    const int64_t width = (share + unit - 1) / unit * unit;
    parallel_for((w.n_cols + width - 1) / width, n_threads, [&](int64_t chunk, int) {
        const int64_t       column = chunk * width, n = std::min(width, w.n_cols - column);
        std::vector<float>  rows((size_t) (n_together * width));
        std::vector<size_t> done(numbered.size());
        for (int64_t first = 0; first < n_used; first += n_together) {
            const int64_t end = std::min(n_used, first + n_together);
            for (int64_t i = first; i < end; ++i) {
                w.row(used[(size_t) i], column, n, rows.data() + (i - first) * width);
            }
            for (size_t c = 0; c < numbered.size(); ++c) {
                const std::vector<scaled_row> & entries = numbered[c];
                const size_t                    start   = done[c];
                while (done[c] < entries.size() && entries[done[c]].row < end) {
                    done[c] += 1;
                }
                for (int64_t j = 0; j < n && done[c] > start; j += GEMM_COLUMNS) {
                    gemm_add_rows(entries.data() + start, (int64_t) (done[c] - start), first, rows.data() + j,
                                  width, std::min(GEMM_COLUMNS, n - j),
                                  dx + (int64_t) c * w.n_cols + column + j);
                }
            }
        }
    });
}

}  // namespace zo
