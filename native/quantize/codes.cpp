#include "quantize/codes.h"

#include <algorithm>
#include <cstring>

#include "core/vectorize.h"
#include "cpu/gemm.h"
#include "quantize/nearest.h"

namespace zo {

namespace {

constexpr int64_t WIDTH = GEMM_COLUMNS;  // columns whose errors reach all others in one product
constexpr float   TINY  = 1e-15f;        // changes of the loss below this are rounding

// Some columns of all rows, [column][row], so that rows go side by side.
struct column_block {
    float target[WIDTH][TILE_ROWS], step[WIDTH][TILE_ROWS], offset[WIDTH][TILE_ROWS];
    float carried[WIDTH][TILE_ROWS], level[WIDTH][TILE_ROWS], error[WIDTH][TILE_ROWS];
};

void take(const std::vector<float> & from, int64_t m, int64_t n_rows, int64_t first, int64_t n,
          float (*to)[TILE_ROWS]) {
    for (int64_t i = 0; i < n_rows; ++i) {
        for (int64_t k = 0; k < n; ++k) {
            to[k][i] = from[(size_t) (i * m + first + k)];
        }
    }
}

void put(const float (*from)[TILE_ROWS], int64_t m, int64_t n_rows, int64_t first, int64_t n,
         std::vector<float> & to) {
    for (int64_t i = 0; i < n_rows; ++i) {
        for (int64_t k = 0; k < n; ++k) {
            to[(size_t) (i * m + first + k)] = from[k][i];
        }
    }
}

// e (H + ridge) e is the sum over k of (sum over i <= k of e_i R_ik)^2: each column can make its own term as
// small as its levels allow.
template <bool Uniform>
ZO_INLINE void choose_block(const level_rule & rule, const float * factor, int64_t stride, int64_t n,
                            column_block & b) {
    for (int64_t j = 0; j < n; ++j) {
        const float * row  = factor + j * stride;
        const float   part = 1 / row[j];
        for (int64_t l = 0; l < TILE_ROWS; ++l) {
            const float wanted = b.target[j][l] - b.carried[j][l] * part + b.offset[j][l];
            const float step   = b.step[j][l];
            const float level  = nearest<Uniform>(rule, wanted / (step == 0 ? 1.0f : step));
            b.level[j][l]      = level;
            b.error[j][l]      = step * level - b.offset[j][l] - b.target[j][l];
        }
        for (int64_t k = j + 1; k < n; ++k) {
            for (int64_t l = 0; l < TILE_ROWS; ++l) {
                b.carried[k][l] += row[k] * b.error[j][l];
            }
        }
    }
}

// What a sweep over one row sees.
struct row_view {
    int64_t               m;
    const square_matrix * h;
    float                 ridge;
    const float *         step;
    const float *         scaled;     // 1 / (step * curvature)
    const float *         curvature;  // diagonal of H + ridge
    float *               level;
    float *               slope;  // half the gradient
};

// The first column in [first, end) whose best level helps, and that level; end if there is none.
template <bool Uniform>
ZO_INLINE int64_t find_better(const level_rule & rule, const row_view & row, int64_t first, int64_t end,
                              float & better) {
    constexpr int64_t SIDE = 32;
    for (int64_t start = first; start < end; start += SIDE) {
        float         levels[SIDE];
        int32_t       helps[SIDE];
        int32_t       any = 0;
        const int64_t n   = std::min(SIDE, end - start);
        if (n < SIDE) {
            std::memset(helps, 0, sizeof helps);
        }
        for (int64_t i = 0; i < n; ++i) {
            const int64_t j    = start + i;
            levels[i]          = nearest<Uniform>(rule, row.level[j] - row.slope[j] * row.scaled[j]);
            const float change = row.step[j] * (levels[i] - row.level[j]);
            helps[i]           = change * (2 * row.slope[j] + change * row.curvature[j]) < -TINY ? 1 : 0;
            any |= helps[i];
        }
        if (any != 0) {
            const int64_t i = std::find(helps, helps + n, 1) - helps;
            better          = levels[i];
            return start + i;
        }
    }
    return end;
}

template <bool Uniform>
ZO_INLINE bool sweep(const level_rule & rule, const row_view & row) {
    bool  changed = false;
    float better  = 0;
    for (int64_t j = 0; (j = find_better<Uniform>(rule, row, j, row.m, better)) < row.m; ++j) {
        const float   change  = row.step[j] * (better - row.level[j]);
        const float * moments = row.h->row(j);
        row.level[j]          = better;
        for (int64_t k = 0; k < row.m; ++k) {
            row.slope[k] += change * moments[k];
        }
        row.slope[j] += change * row.ridge;
        changed = true;
    }
    return changed;
}

void set_errors(row_tile & tile) {
    for (size_t i = 0; i < tile.error.size(); ++i) {
        tile.error[i] = tile.step[i] * tile.level[i] - tile.offset[i] - tile.target[i];
    }
}

// slope = (H + ridge) error
void set_slopes(row_tile & tile) {
    const int64_t     m      = tile.m;
    const gemm_panels errors = gemm_pack(tile.error.data(), tile.n_rows, m, m, 1);
    for (size_t i = 0; i < tile.error.size(); ++i) {
        tile.slope[i] = tile.ridge * tile.error[i];
    }
    for (int64_t column = 0; column < m; column += WIDTH) {
        for (int64_t first = 0; first < m; first += GEMM_DEPTH) {
            gemm_block(errors, first, std::min(GEMM_DEPTH, m - first), tile.h->row(first) + column,
                       tile.h->stride, std::min(WIDTH, m - column), tile.slope.data() + column, m);
        }
    }
}

}  // namespace

void row_tile::resize(int64_t rows, int64_t columns) {
    n_rows = rows;
    m      = columns;
    for (std::vector<float> * values : { &target, &step, &offset, &level, &error, &slope }) {
        values->resize((size_t) (rows * columns));
    }
}

void choose_in_order(const block_layout & layout, row_tile & tile) {
    const level_rule          rule(layout.levels);
    const int64_t             m      = tile.m;
    const square_matrix &     factor = *tile.factor;
    std::vector<column_block> scratch(1, column_block{});
    column_block &            block   = scratch[0];
    std::vector<float> &      carried = tile.slope;
    std::fill(carried.begin(), carried.end(), 0.0f);
    for (int64_t first = 0; first < m; first += WIDTH) {
        const int64_t n = std::min(WIDTH, m - first);
        take(tile.target, m, tile.n_rows, first, n, block.target);
        take(tile.step, m, tile.n_rows, first, n, block.step);
        take(tile.offset, m, tile.n_rows, first, n, block.offset);
        take(carried, m, tile.n_rows, first, n, block.carried);
        if (layout.uniform) {
            vectorized<choose_block<true>>(rule, factor.row(first) + first, factor.stride, n, block);
        } else {
            vectorized<choose_block<false>>(rule, factor.row(first) + first, factor.stride, n, block);
        }
        put(block.level, m, tile.n_rows, first, n, tile.level);
        put(block.error, m, tile.n_rows, first, n, tile.error);
        const gemm_panels errors = gemm_pack(tile.error.data() + first, tile.n_rows, n, m, 1);
        for (int64_t column = first + WIDTH; column < m; column += WIDTH) {
            gemm_block(errors, 0, n, factor.row(first) + column, factor.stride, std::min(WIDTH, m - column),
                       carried.data() + column, m);
        }
    }
}

void descend(const block_layout & layout, row_tile & tile, int sweeps, double * losses,
             double * plain_losses) {
    const level_rule   rule(layout.levels);
    const int64_t      m = tile.m;
    std::vector<float> curvature((size_t) m), scaled((size_t) m);
    set_errors(tile);
    set_slopes(tile);
    for (int64_t j = 0; j < m; ++j) {
        curvature[(size_t) j] = tile.h->row(j)[j] + tile.ridge;
    }
    for (int64_t i = 0; i < tile.n_rows; ++i) {
        const float * step = tile.step.data() + i * m;
        for (int64_t j = 0; j < m; ++j) {
            scaled[(size_t) j] = 1 / ((step[j] == 0 ? 1.0f : step[j]) * curvature[(size_t) j]);
        }
        const row_view row{ m,
                            tile.h,
                            tile.ridge,
                            step,
                            scaled.data(),
                            curvature.data(),
                            tile.level.data() + i * m,
                            tile.slope.data() + i * m };
        bool           changed = true;
        for (int k = 0; k < sweeps && changed; ++k) {
            changed =
                layout.uniform ? vectorized<sweep<true>>(rule, row) : vectorized<sweep<false>>(rule, row);
        }
    }
    set_errors(tile);
    for (int64_t i = 0; i < tile.n_rows; ++i) {
        double       loss = 0, square = 0;
        const float *error = tile.error.data() + i * m, *slope = tile.slope.data() + i * m;
        for (int64_t j = 0; j < m; ++j) {
            loss += (double) slope[j] * (double) error[j];
            square += (double) error[j] * (double) error[j];
        }
        losses[i]       = loss;
        plain_losses[i] = loss - (double) tile.ridge * square;
    }
}

}  // namespace zo
