// Factors of low rank that are trained themselves. Here and not in lowrank.cpp, whose sums may be fused:
// a probe must be the same bits on every machine.

#include <algorithm>

#include "core/error.h"
#include "core/parallel.h"
#include "params/lowrank.h"
#include "params/store.h"

using zo::fail;
using zo::guarded;

const zo::lowrank_factors & zo_lowrank::factors(const zo::lowrank_weight & weight, int32_t branch) {
    const zo::lowrank_masters & masters = weight.masters;
    if (masters.rank == 0) {
        return weight.branches.at((size_t) branch);
    }
    const zo_branch &                  probe    = probes.at((size_t) branch);
    std::vector<zo::lowrank_factors> & branches = weights[weight.id].branches;
    branches.resize(std::max(branches.size(), probes.size()));
    zo::lowrank_factors & made = branches[(size_t) branch];
    if (made.of_masters != masters.version || made.probe.seed != probe.seed ||
        made.probe.scale != probe.scale) {
        make(weight, probe, made);
    }
    return made;
}

void zo_lowrank::make(const zo::lowrank_weight & weight, const zo_branch & probe,
                      zo::lowrank_factors & made) const {
    const zo::lowrank_masters & masters = weight.masters;
    const int64_t               n_right = masters.rank * weight.n_cols, n = (int64_t) masters.values.size();
    made.rank = masters.rank;
    made.right.resize((size_t) n_right);
    made.left.resize((size_t) (n - n_right));
    constexpr int64_t chunk = 1 << 12;
    zo::parallel_for((n + chunk - 1) / chunk, n_threads, [&](int64_t c, int) {
        float         z[chunk] = {};
        const int64_t first = c * chunk, end = std::min(n, first + chunk);
        if (probe.scale != 0) {
            zo::noise_range(distribution, probe.seed, masters.tensor, first, end - first, z);
        }
        for (int64_t i = first; i < end; ++i) {
            const float value = masters.values[(size_t) i] + probe.scale * z[i - first];
            if (i < n_right) {
                made.right[(size_t) i] = value;
            } else {
                made.left[(size_t) (i - n_right)] = masters.factor * value;
            }
        }
    });
    made.probe      = probe;
    made.of_masters = masters.version;
}

zo_status zo_lowrank_train(zo_lowrank * lowrank, int32_t number, int64_t rank, float factor, uint32_t tensor,
                           const float * masters) {
    return guarded([&] {
        if (lowrank == nullptr || masters == nullptr || number < 0 ||
            (size_t) number >= lowrank->weights.size() || rank < 1 || rank > 1 << 16) {
            return fail(ZO_ARGUMENT, "zo_lowrank_train got a weight or rank out of range");
        }
        zo::lowrank_weight &  weight = lowrank->weights[(size_t) number];
        zo::lowrank_masters & kept   = weight.masters;
        kept.rank                    = rank;
        kept.factor                  = factor;
        kept.tensor                  = tensor;
        kept.version += 1;
        kept.values.assign(masters, masters + rank * (weight.n_rows + weight.n_cols));
        return ZO_OK;
    });
}

zo_status zo_lowrank_probe(zo_lowrank * lowrank, int32_t branch, zo_branch probe) {
    return guarded([&] {
        if (lowrank == nullptr || branch < 0 || branch > 4096) {
            return fail(ZO_ARGUMENT, "zo_lowrank_probe got a branch out of range");
        }
        if (lowrank->probes.size() <= (size_t) branch) {
            lowrank->probes.resize((size_t) branch + 1);
        }
        lowrank->probes[(size_t) branch] = probe;
        return ZO_OK;
    });
}
