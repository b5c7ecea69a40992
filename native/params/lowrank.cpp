#include "params/lowrank.h"

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "core/noise.h"
#include "core/parallel.h"

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

zo_status zo_lowrank_init(zo_lowrank ** lowrank, zo_distribution distribution, int32_t n_threads) {
    return guarded([&] {
        if (lowrank == nullptr || n_threads < 1 || !zo::is_known(distribution)) {
            return fail(ZO_ARGUMENT, "zo_lowrank_init needs a distribution and at least one thread");
        }
        *lowrank                 = new zo_lowrank;
        (*lowrank)->distribution = distribution;
        (*lowrank)->n_threads    = n_threads;
        return ZO_OK;
    });
}

void zo_lowrank_free(zo_lowrank * lowrank) {
    delete lowrank;
}

zo_status zo_lowrank_add(zo_lowrank * lowrank, const char * name, int64_t n_rows, int64_t n_cols) {
    return guarded([&] {
        constexpr int64_t limit = std::numeric_limits<int32_t>::max();
        if (lowrank == nullptr || name == nullptr || n_rows < 1 || n_cols < 1 || n_rows > limit ||
            n_cols > limit) {
            return fail(ZO_ARGUMENT, "zo_lowrank_add needs a name and a shape");
        }
        if (lowrank->find(name) != nullptr) {
            return fail(ZO_ARGUMENT, std::string(name) + " was added before");
        }
        zo::lowrank_weight weight;
        weight.name   = name;
        weight.n_rows = n_rows;
        weight.n_cols = n_cols;
        lowrank->append(std::move(weight));
        return ZO_OK;
    });
}

static bool fits(int64_t rank) {
    return rank >= 1 && rank <= 1 << 16;
}

zo_status zo_lowrank_set(zo_lowrank * lowrank, int32_t branch, int32_t number, int64_t rank, int64_t n_left,
                         const float * left, int64_t n_right, const float * right) {
    return guarded([&] {
        if (lowrank == nullptr || branch < 0 || branch >= ZO_MAX_BRANCHES || !lowrank->has(number) ||
            !fits(rank)) {
            return fail(ZO_ARGUMENT, "zo_lowrank_set got a weight, branch or rank out of range");
        }
        zo::lowrank_weight & weight = lowrank->weights[(size_t) number];
        if (weight.masters.rank > 0) {
            return fail(ZO_ARGUMENT, "the factors of " + weight.name + " are trained, and cannot be set");
        }
        zo_status status = zo::check_array("zo_lowrank_set", left, n_left, rank * weight.n_rows);
        if (status == ZO_OK) {
            status = zo::check_array("zo_lowrank_set", right, n_right, rank * weight.n_cols);
        }
        if (status != ZO_OK) {
            return status;
        }
        if (weight.branches.size() <= (size_t) branch) {
            weight.branches.resize((size_t) branch + 1);
        }
        zo::lowrank_factors & factors = weight.branches[(size_t) branch];
        factors.rank                  = rank;
        factors.version += 1;
        factors.left.assign(left, left + n_left);
        factors.right.assign(right, right + n_right);
        return ZO_OK;
    });
}

zo_status zo_lowrank_train(zo_lowrank * lowrank, int32_t number, int64_t rank, float factor, uint32_t tensor,
                           int64_t n, const float * masters) {
    return guarded([&] {
        if (lowrank == nullptr || !lowrank->has(number) || !fits(rank)) {
            return fail(ZO_ARGUMENT, "zo_lowrank_train got a weight or rank out of range");
        }
        zo::lowrank_weight & weight = lowrank->weights[(size_t) number];
        const int64_t        size   = rank * (weight.n_rows + weight.n_cols);
        const zo_status      status = zo::check_array("zo_lowrank_train", masters, n, size);
        if (status != ZO_OK) {
            return status;
        }
        zo::lowrank_masters & kept = weight.masters;
        kept.rank                  = rank;
        kept.factor                = factor;
        kept.tensor                = tensor;
        kept.version += 1;
        kept.values.assign(masters, masters + n);
        return ZO_OK;
    });
}

zo_status zo_lowrank_probe(zo_lowrank * lowrank, int32_t branch, zo_branch probe) {
    return guarded([&] {
        if (lowrank == nullptr || branch < 0 || branch >= ZO_MAX_BRANCHES) {
            return fail(ZO_ARGUMENT, "zo_lowrank_probe got a branch out of range");
        }
        if (lowrank->probes.size() <= (size_t) branch) {
            lowrank->probes.resize((size_t) branch + 1);
        }
        lowrank->probes[(size_t) branch] = probe;
        return ZO_OK;
    });
}
