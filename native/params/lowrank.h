// Factors of low rank beside a weight, given or trained themselves.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/named.h"
#include "core/vectorize.h"
#include "zo.h"

namespace zo {

struct lowrank_factors {
    int64_t            rank    = 0;
    uint64_t           version = 0;  // one more whenever they are set
    std::vector<float> left, right;  // [rank][n_rows], [rank][n_cols]
    zo_branch          probe{};      // of masters: where they are evaluated, at which version
    uint64_t           of_masters = 0;
};

// Factors that are trained: right [rank][n_cols], then left [rank][n_rows], which counts `factor` times.
struct lowrank_masters {
    int64_t            rank    = 0;  // 0: there are none
    float              factor  = 1;
    uint32_t           tensor  = 0;  // the noise's number
    uint64_t           version = 0;  // one more whenever they are set
    std::vector<float> values;
};

struct lowrank_weight {
    std::string                  name;
    int64_t                      n_rows = 0;
    int64_t                      n_cols = 0;
    uint32_t                     id     = 0;
    std::vector<lowrank_factors> branches;
    lowrank_masters              masters;
};

}  // namespace zo

struct zo_lowrank : zo::named_weights<zo::lowrank_weight> {
    zo_distribution        distribution = ZO_NORMAL;
    int                    n_threads    = 1;
    std::vector<zo_branch> probes;  // of the masters, by branch

    // A weight's factors in a branch, made from its masters where it has some; valid until the next call.
    // Throws std::out_of_range for a branch that was never set.
    const zo::lowrank_factors & factors(const zo::lowrank_weight & weight, int32_t branch);

    size_t n_branches(const zo::lowrank_weight & weight) const {
        return weight.masters.rank > 0 ? probes.size() : weight.branches.size();
    }

private:
    void make(const zo::lowrank_weight & weight, const zo_branch & probe, zo::lowrank_factors & made) const;
};
