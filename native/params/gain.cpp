#include "params/gain.h"

#include <limits>

#include "core/error.h"
#include "core/parallel.h"

using zo::fail;
using zo::guarded;

zo_status zo_gain_init(zo_gain ** gain) {
    return guarded([&] {
        if (gain == nullptr) {
            return fail(ZO_ARGUMENT, "zo_gain_init got a null pointer");
        }
        *gain = new zo_gain;
        return ZO_OK;
    });
}

void zo_gain_free(zo_gain * gain) {
    delete gain;
}

zo_status zo_gain_add(zo_gain * gain, const char * name, int64_t n) {
    return guarded([&] {
        if (gain == nullptr || name == nullptr || n < 1 || n > std::numeric_limits<int32_t>::max()) {
            return fail(ZO_ARGUMENT, "zo_gain_add needs a name and a length");
        }
        if (gain->find(name) != nullptr) {
            return fail(ZO_ARGUMENT, std::string(name) + " was added before");
        }
        zo::gain_weight weight;
        weight.name = name;
        weight.n    = n;
        gain->append(std::move(weight));
        return ZO_OK;
    });
}

zo_status zo_gain_set(zo_gain * gain, int32_t branch, int32_t number, int64_t n, const float * factors) {
    return guarded([&] {
        if (gain == nullptr || branch < 0 || branch >= ZO_MAX_BRANCHES || !gain->has(number)) {
            return fail(ZO_ARGUMENT, "zo_gain_set got a weight or branch out of range");
        }
        zo::gain_weight & weight = gain->weights[(size_t) number];
        const zo_status   status = zo::check_array("zo_gain_set", factors, n, weight.n);
        if (status != ZO_OK) {
            return status;
        }
        if (weight.branches.size() <= (size_t) branch) {
            weight.branches.resize((size_t) branch + 1);
        }
        weight.branches[(size_t) branch].assign(factors, factors + n);
        return ZO_OK;
    });
}
