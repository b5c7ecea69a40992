// Codes of rows chosen so that the rows' outputs stay: one column after another (GPTQ, arXiv 2210.17323),
// then coordinate descent.

#pragma once

#include <cstdint>
#include <vector>

#include "quantize/layout.h"
#include "quantize/moments.h"

namespace zo {

constexpr int64_t TILE_ROWS = 48;  // that go through the factor together

// Rows whose free weights lie in the same m columns. All arrays are [n_rows][m] with columns in the order of
// `h`. For the errors e = step * level - offset - target of a row, e (H + ridge) e is to become small.
struct row_tile {
    int64_t               n_rows = 0, m = 0;
    const square_matrix * h      = nullptr;
    const square_matrix * factor = nullptr;  // of H + ridge
    float                 ridge  = 0;
    std::vector<float>    target, step, offset, level, error, slope;

    void resize(int64_t rows, int64_t columns);
};

// Levels chosen in the order of the columns, each error taken up by the columns to come.
void choose_in_order(const block_layout & layout, row_tile & tile);

// Changes single levels while that helps, `sweeps` times over all columns at most. Sets the errors, and for
// each row e (H + ridge) e and e H e.
void descend(const block_layout & layout, row_tile & tile, int sweeps, double * losses,
             double * plain_losses);

}  // namespace zo
