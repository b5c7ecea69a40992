// The f32 masters of all trainable entries, and where in the weights they lie.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/named.h"
#include "zo.h"

namespace zo {

// Rows or columns of a weight in the order in which a kernel visits them: first whole blocks of
// consecutive ones, wherever most of a block holds entries, then single ones.
struct lanes {
    static constexpr int32_t block = 8;

    std::vector<int32_t> index;          // row or column of each place
    int64_t              n_blocked = 0;  // places that belong to blocks, a multiple of `block`

    int64_t size() const { return (int64_t) index.size(); }
};

// The entries of one weight. Each belongs to one place of `rows`, and names one of `cols`.
struct sparse_weight {
    std::string          name;
    int64_t              n_rows = 0;
    int64_t              n_cols = 0;
    int64_t              offset = 0;  // of the first entry in theta
    uint32_t             id     = 0;  // the noise's tensor number
    lanes                rows, cols;
    std::vector<int32_t> row_first, row_end;  // [rows] its entries; none in the gaps of blocks
    std::vector<int32_t> col;                 // [nnz] place in cols

    int64_t nnz() const { return (int64_t) col.size(); }
};

}  // namespace zo

struct zo_store : zo::named_weights<zo::sparse_weight> {
    zo_distribution    distribution = ZO_NORMAL;
    int                n_threads    = 1;
    std::vector<float> theta;
    uint64_t           version = 1;  // of theta

    // z(seed) of all entries. Kept until other seeds are wanted, because the two branches of a
    // symmetric probe and the commit that follows ask for the same one.
    const float * noise(uint64_t seed);
    // The same, if it is kept.
    bool copy_noise(uint64_t seed, float * z) const;
    // Drops cached noise beyond the given seeds, so that at most those are held.
    void keep_noise(const std::vector<uint64_t> & seeds);
    void fill_noise(uint64_t seed, float * z) const;
    // theta + scale * z(seed) of one weight, valid until the next call.
    const float * branch_values(const zo::sparse_weight & weight, const zo_branch & branch);

private:
    std::map<uint64_t, std::vector<float>> noise_;
    std::vector<float>                     values_;
};
