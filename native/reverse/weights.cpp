#include "reverse/weights.h"

#include <stdexcept>
#include <utility>

#include "core/vectorize.h"
#include "cpu/dequantize.h"

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
    weight_bytes bytes;
    bytes.type        = weight.type;
    bytes.n_cols      = weight.ne[0];
    bytes.n_rows      = weight.ne[1];
    bytes.block       = ggml_blck_size(weight.type);
    bytes.block_bytes = ggml_type_size(weight.type);
    bytes.row_bytes   = ggml_row_size(weight.type, weight.ne[0]);
    if (!can_dequantize(weight.type)) {
        throw std::runtime_error(weight.name + " has a type that cannot be read back");
    }
    const auto    found  = lent_.find(weight.name);
    const int64_t n_rows = weight.n_elements() / weight.ne[0];
    if (weight.data != nullptr) {
        bytes.data = weight.data;
    } else if (found != lent_.end() && found->second.type == weight.type &&
               found->second.n_bytes == n_rows * (int64_t) bytes.row_bytes) {
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

// Which rows any column has, ascending.
static std::vector<int32_t> used_rows(const sparse_columns & dy, int64_t n_rows) {
    std::vector<char> is_used((size_t) n_rows);
    for (const std::vector<scaled_row> & column : dy) {
        for (const scaled_row & entry : column) {
            is_used[(size_t) entry.row] = 1;
        }
    }
    std::vector<int32_t> used;
    for (int32_t row = 0; row < (int32_t) n_rows; ++row) {
        if (is_used[(size_t) row] != 0) {
            used.push_back(row);
        }
    }
    return used;
}

void add_transposed_product(const weight_bytes & w, const sparse_columns & dy, float * dx, int n_threads) {
    constexpr int64_t          n_together = 128, most = 1024;  // rows and columns that are read before use
    const std::vector<int32_t> used   = used_rows(dy, w.n_rows);
    const int64_t              n_used = (int64_t) used.size();
    std::vector<int32_t>       place((size_t) w.n_rows);  // of a used row among those that are read with it
    for (int64_t i = 0; i < n_used; ++i) {
        place[(size_t) used[(size_t) i]] = (int32_t) (i % n_together);
    }
    const int64_t share = std::min(most, (w.n_cols + n_threads - 1) / n_threads), unit = w.width();
    const int64_t width = (share + unit - 1) / unit * unit;
    parallel_for((w.n_cols + width - 1) / width, n_threads, [&](int64_t chunk, int) {
        const int64_t       column = chunk * width, n = std::min(width, w.n_cols - column);
        std::vector<float>  rows((size_t) (n_together * width));
        std::vector<size_t> done(dy.size());
        for (int64_t first = 0; first < n_used; first += n_together) {
            const int64_t end = std::min(n_used, first + n_together);
            for (int64_t i = first; i < end; ++i) {
                w.row(used[(size_t) i], column, n, rows.data() + (i - first) * width);
            }
            const int32_t last = used[(size_t) end - 1];
            for (size_t c = 0; c < dy.size(); ++c) {
                const std::vector<scaled_row> & entries = dy[c];
                const size_t                    start   = done[c];
                while (done[c] < entries.size() && entries[done[c]].row <= last) {
                    done[c] += 1;
                }
                for (int64_t j = 0; j < n && done[c] > start; j += GEMM_COLUMNS) {
                    gemm_add_rows(entries.data() + start, (int64_t) (done[c] - start), place.data(),
                                  rows.data() + j, width, std::min(GEMM_COLUMNS, n - j),
                                  dx + (int64_t) c * w.n_cols + column + j);
                }
            }
        }
    });
}

}  // namespace zo
