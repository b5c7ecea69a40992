// The search for a matrix's codes: rows with the same free columns share their moments and go in tiles.

#pragma once

#include <cstdint>
#include <vector>

#include "quantize/layout.h"
#include "quantize/moments.h"

// Moments of a matrix's inputs, and the last factor of all of them.
struct zo_moments {
    zo::input_moments inputs;
    zo::square_matrix factor;
    double            factor_ridge = -1;  // that it was made with
};

namespace zo {

// Blocks of a matrix whose codes are chosen.
struct code_problem {
    int64_t         n_blocks;
    const int64_t * ids;       // [n_blocks] ascending, counted from the start of the matrix
    int32_t         n_starts;  // each row takes the one that ends best
    const uint8_t * starts;    // [n_starts][n_blocks][block_bytes]
    const float *   target;    // [n_blocks][block]
    double          ridge;     // share of the inputs' mean square that is added to the moments' diagonal
    int             sweeps;
};

// Writes the chosen blocks to best[n_blocks][block_bytes]; returns the sum over rows of e H e. Steps and
// offsets stay those of the starts.
double choose_codes(const block_layout & layout, zo_moments & moments, const code_problem & problem,
                    int n_threads, uint8_t * best);

}  // namespace zo
