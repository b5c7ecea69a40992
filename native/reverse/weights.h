// Values of the model's weights for the way back: from the engine's memory where they lie there as in the
// file, else from bytes that the caller lends.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/gemm.h"
#include "feedback/graph.h"

namespace zo {

// A weight's bytes in the layout of GGUF files: matrices of n_rows rows, one after the other.
struct weight_bytes {
    ggml_type    type   = GGML_TYPE_F32;
    const char * data   = nullptr;
    int64_t      n_cols = 0, n_rows = 0;
    int64_t      block     = 1;  // values that are decoded together
    size_t       row_bytes = 0, block_bytes = 0;

    // out[0 .. n) = the values of a row from `column` on, a multiple of the block; so is n.
    void row(int64_t row, int64_t column, int64_t n, float * out) const;
    // How many columns to decode at a time.
    int64_t width() const { return (block + GEMM_COLUMNS - 1) / GEMM_COLUMNS * GEMM_COLUMNS; }
    // The number-th matrix alone.
    weight_bytes matrix(int64_t number) const;
};

class weight_table {
public:
    // Lends the bytes of a weight; they must outlive the table.
    void lend(std::string name, ggml_type type, const void * data, int64_t n_bytes);
    // Throws std::runtime_error where a weight cannot be read.
    weight_bytes find(const graph_tensor & weight) const;
    // All values of a small weight, such as a norm's.
    std::vector<float> values(const graph_tensor & weight) const;

private:
    struct lent_bytes {
        ggml_type    type;
        const char * data;
        int64_t      n_bytes;
    };
    std::map<std::string, lent_bytes, std::less<>> lent_;
};

// dx[i][n_cols] += dy[i][n_rows] * W for all rows i of dy.
void add_transposed_product(const weight_bytes & w, const gemm_panels & dy, float * dx, int n_threads);

// Columns of a matrix that are nearly empty: the rows of each that are not zero, ascending.
using sparse_columns = std::vector<std::vector<scaled_row>>;

// dx[column][n_cols] += the sum of value * W[row] over the entries of each column.
void add_transposed_product(const weight_bytes & w, const sparse_columns & dy, float * dx, int n_threads);

}  // namespace zo
