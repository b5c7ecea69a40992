#include "params/store.h"

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "core/noise.h"
#include "core/parallel.h"

namespace zo {

// Places for all i with used[i]; on return used[i] is the place of i, or -1.
static lanes arrange(std::vector<int32_t> & used) {
    constexpr int32_t    block  = lanes::block;
    constexpr int        enough = 3;  // a block costs about as much as this many single places
    lanes                result;
    std::vector<int32_t> singles;
    const int32_t        n = (int32_t) used.size();
    for (int32_t first = 0; first < n; first += block) {
        const int32_t end   = std::min(n, first + block);
        const int     count = (int) std::count(used.begin() + first, used.begin() + end, 1);
        const bool    whole = end - first == block && count >= enough;
        for (int32_t i = first; i < end; ++i) {
            if (whole) {
                result.index.push_back(i);
            } else if (used[(size_t) i] != 0) {
                singles.push_back(i);
            }
        }
    }
    result.n_blocked = result.size();
    result.index.insert(result.index.end(), singles.begin(), singles.end());
    result.index.shrink_to_fit();
    std::fill(used.begin(), used.end(), -1);
    for (int64_t place = 0; place < result.size(); ++place) {
        used[(size_t) result.index[(size_t) place]] = (int32_t) place;
    }
    return result;
}

static zo_status build_weight(sparse_weight & w, int64_t nnz, const int64_t * indices) {
    std::vector<int32_t> row_place((size_t) w.n_rows), col_place((size_t) w.n_cols);
    int64_t              previous = -1;
    for (int64_t i = 0; i < nnz; ++i) {
        if (indices[i] <= previous || indices[i] >= w.n_rows * w.n_cols) {
            return fail(ZO_ARGUMENT, "indices of " + w.name + " are not sorted, unique and in range");
        }
        previous                                    = indices[i];
        row_place[(size_t) (indices[i] / w.n_cols)] = 1;
        col_place[(size_t) (indices[i] % w.n_cols)] = 1;
    }
    w.rows = arrange(row_place);
    w.cols = arrange(col_place);
    w.row_first.assign((size_t) w.rows.size(), 0);
    w.row_end.assign((size_t) w.rows.size(), 0);
    w.col.resize((size_t) nnz);
    for (int64_t i = 0; i < nnz; ++i) {
        const size_t row = (size_t) row_place[(size_t) (indices[i] / w.n_cols)];
        if (w.row_end[row] == 0) {
            w.row_first[row] = (int32_t) i;
        }
        w.row_end[row]    = (int32_t) i + 1;
        w.col[(size_t) i] = col_place[(size_t) (indices[i] % w.n_cols)];
    }
    return ZO_OK;
}

}  // namespace zo

using zo::fail;
using zo::guarded;

void zo_store::fill_noise(uint64_t seed, float * z) const {
    struct chunk {
        const zo::sparse_weight * weight;
        int64_t                   first, n;
    };
    // Of all weights together: one has too few entries for many threads.
    constexpr int64_t  most = 1 << 14;
    std::vector<chunk> chunks;
    for (const zo::sparse_weight & w : weights) {
        for (int64_t first = 0; first < w.nnz(); first += most) {
            chunks.push_back({ &w, first, std::min(most, w.nnz() - first) });
        }
    }
    zo::parallel_for((int64_t) chunks.size(), n_threads, [&](int64_t i, int) {
        const chunk & c = chunks[(size_t) i];
        zo::noise_range(distribution, seed, c.weight->id, c.first, c.n, z + c.weight->offset + c.first);
    });
}

const float * zo_store::noise(uint64_t seed) {
    auto it = noise_.find(seed);
    if (it == noise_.end()) {
        std::vector<float> z(theta.size());
        fill_noise(seed, z.data());
        it = noise_.emplace(seed, std::move(z)).first;
    }
    return it->second.data();
}

bool zo_store::copy_noise(uint64_t seed, float * z) const {
    const auto it = noise_.find(seed);
    if (it != noise_.end()) {
        std::copy(it->second.begin(), it->second.end(), z);
    }
    return it != noise_.end();
}

const float * zo_store::branch_values(const zo::sparse_weight & weight, const zo_branch & branch) {
    const float * masters = theta.data() + weight.offset;
    if (branch.scale == 0) {
        return masters;
    }
    const float * z = noise(branch.seed) + weight.offset;
    values_.resize(std::max(values_.size(), (size_t) weight.nnz()));
    for (int64_t i = 0; i < weight.nnz(); ++i) {
        values_[(size_t) i] = masters[i] + branch.scale * z[i];
    }
    return values_.data();
}

void zo_store::keep_noise(const std::vector<uint64_t> & seeds) {
    for (auto it = noise_.begin(); it != noise_.end();) {
        const bool wanted = std::find(seeds.begin(), seeds.end(), it->first) != seeds.end();
        it                = wanted ? std::next(it) : noise_.erase(it);
    }
}

zo_status zo_store_init(zo_store ** store, zo_distribution distribution, int32_t n_threads) {
    return guarded([&] {
        if (store == nullptr || n_threads < 1 || !zo::is_known(distribution)) {
            return fail(ZO_ARGUMENT, "a store needs a distribution and at least one thread");
        }
        *store                 = new zo_store;
        (*store)->distribution = distribution;
        (*store)->n_threads    = n_threads;
        return ZO_OK;
    });
}

void zo_store_free(zo_store * store) {
    delete store;
}

zo_status zo_store_add(zo_store * store, const char * name, int64_t n_rows, int64_t n_cols, int64_t nnz,
                       const int64_t * indices, const float * theta) {
    return guarded([&] {
        constexpr int64_t limit = std::numeric_limits<int32_t>::max();
        if (store == nullptr || name == nullptr || indices == nullptr || theta == nullptr) {
            return fail(ZO_ARGUMENT, "zo_store_add got a null pointer");
        }
        if (n_rows < 1 || n_cols < 1 || nnz < 1 || n_rows > limit || n_cols > limit || nnz > limit) {
            return fail(ZO_ARGUMENT, std::string("sizes of ") + name + " are out of range");
        }
        if (store->find(name) != nullptr) {
            return fail(ZO_ARGUMENT, std::string(name) + " was added before");
        }
        zo::sparse_weight w;
        w.name                 = name;
        w.n_rows               = n_rows;
        w.n_cols               = n_cols;
        w.offset               = (int64_t) store->theta.size();
        const zo_status status = zo::build_weight(w, nnz, indices);
        if (status != ZO_OK) {
            return status;
        }
        store->keep_noise({});
        store->theta.insert(store->theta.end(), theta, theta + nnz);
        store->version += 1;
        store->append(std::move(w));
        return ZO_OK;
    });
}

int64_t zo_store_size(const zo_store * store) {
    return store == nullptr ? 0 : (int64_t) store->theta.size();
}

static zo_status check(const char * function, const zo_store * store, const float * array, int64_t n) {
    return zo::check_array(function, store == nullptr ? nullptr : array, n, zo_store_size(store));
}

zo_status zo_store_read(const zo_store * store, int64_t n, float * theta) {
    const zo_status status = check("zo_store_read", store, theta, n);
    if (status == ZO_OK) {
        std::copy(store->theta.begin(), store->theta.end(), theta);
    }
    return status;
}

zo_status zo_store_write(zo_store * store, int64_t n, const float * theta) {
    const zo_status status = check("zo_store_write", store, theta, n);
    if (status == ZO_OK) {
        std::copy(theta, theta + n, store->theta.begin());
        store->version += 1;
    }
    return status;
}

zo_status zo_store_noise(zo_store * store, uint64_t seed, int64_t n, float * z) {
    return guarded([&] {
        const zo_status status = check("zo_store_noise", store, z, n);
        if (status != ZO_OK) {
            return status;
        }
        store->keep_noise({ seed });
        if (!store->copy_noise(seed, z)) {
            store->fill_noise(seed, z);
        }
        return ZO_OK;
    });
}
