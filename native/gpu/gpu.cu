// One CUDA or HIP device: its stream, and what the kernels need in its memory.

#include "gpu/gpu.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>

#include "gpu/kernels.h"

namespace zo {

// What kernels declare beside what they ask for, at most; the two share one limit.
static constexpr size_t DECLARED_SHARED = 1 << 10;
// A block's inputs, 4096 columns of four tokens; more leaves too few blocks side by side.
static constexpr size_t MOST_SHARED = (64 << 10) + DECLARED_SHARED;
// Values of one weight in all branches; beyond, branches are done in turns.
#ifndef ZO_GPU_MOST_VALUES
#define ZO_GPU_MOST_VALUES (8 << 20)
#endif

static int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "asking for its properties");
    return value;
}

namespace {

// Ranges that were cut into tiles before; a batch uses the same few for all its weights.
class tile_tables {
public:
    struct table {
        const column_tile * tiles;
        int64_t             n;
    };

    table of(const std::vector<column_range> & ranges, int64_t n_together, cudaStream_t stream) {
        if (tables_.size() > 16) {  // batches of many sizes came by
            tables_.clear();
        }
        kept_table & kept = tables_[{ n_together, ranges.empty() ? 0 : ranges.back().end }];
        if (kept.ranges != ranges) {
            const std::vector<column_tile> tiles = tiles_of(ranges, n_together);
            kept.ranges.clear();  // should the copy fail
            kept.n      = (int64_t) tiles.size();
            kept.data   = kept.tiles.follow(tiles, stream);
            kept.ranges = ranges;
        }
        return { kept.data, kept.n };
    }

private:
    struct kept_table {
        std::vector<column_range> ranges;
        mirror<column_tile>       tiles;
        const column_tile *       data = nullptr;
        int64_t                   n    = 0;
    };
    std::map<std::pair<int64_t, int64_t>, kept_table> tables_;
};

struct branch_factors {
    device_array<float> left, right;
    int64_t             rank    = 0;
    uint64_t            version = 0;
};

struct lowrank_copy {
    std::vector<branch_factors> branches;
    mirror<factors_on_gpu>      table;
    device_array<float>         masters;
    uint64_t                    version = 0;  // of the masters
};

struct inplace_copy {
    device_array<float> theta, base;
    uint64_t            version = 0;
};

class cuda_gpu final : public gpu {
public:
    explicit cuda_gpu(int device) : device_(device) {
        const on_device here(device_);
        check(cudaStreamCreateWithFlags(&queue_.stream, cudaStreamNonBlocking), "making a stream");
        queue_.n_multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
        const int shared         = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        queue_.shared_bytes      = std::min((size_t) shared, MOST_SHARED) - DECLARED_SHARED;
    }
    ~cuda_gpu() override {
        cudaSetDevice(device_);  // the arrays are freed after this
        cudaStreamDestroy(queue_.stream);
    }

    void prepare(const zo_store & store, const sparse_weight & weight,
                 const std::vector<zo_branch> & branches) override {
        const on_device here(device_);
        fill(store, weight, branches, 0);
    }

    void add_sparse(const zo_store & store, const sparse_weight & weight,
                    const std::vector<zo_branch> & branches, const columns & x, const columns & y,
                    const std::vector<column_range> & ranges) override {
        const on_device          here(device_);
        const sparse_on_gpu &    entries = sparse(weight);
        const tile_tables::table tiles   = tiles_.of(ranges, entries.n_together, queue_.stream);
        if (tiles.n == 0) {
            return;
        }
        for (size_t first = 0; first < branches.size(); first += at_once(weight, branches)) {
            if (filled_.weight != &weight || filled_.first != first) {
                fill(store, weight, branches, first);
            }
            entries.apply(queue_, values_.data(), (int32_t) first, (int32_t) filled_.n, tiles.tiles, tiles.n,
                          x, y);
        }
        filled_ = {};
    }

    void add_lowrank(const zo_lowrank & lowrank, const lowrank_weight & weight, const columns & x,
                     const columns & y, const std::vector<column_range> & ranges) override {
        const on_device here(device_);
        check_branches(ranges, lowrank.n_branches(weight));
        lowrank_copy &                    copy    = lowrank_[weight.id];
        const std::vector<factors_on_gpu> factors = weight.masters.rank > 0
                                                        ? moved_factors(lowrank, weight, copy, ranges)
                                                        : copied_factors(weight, copy);
        const tile_tables::table          tiles   = tiles_.of(ranges, LOWRANK_TOGETHER, queue_.stream);
        if (tiles.n == 0) {
            return;
        }
        lowrank_on_gpu(queue_, copy.table.follow(factors, queue_.stream), weight.n_rows, weight.n_cols,
                       tiles.tiles, tiles.n, x, y);
    }

    void multiply(const gain_weight & weight, const columns & y,
                  const std::vector<column_range> & ranges) override {
        const on_device here(device_);
        check_branches(ranges, weight.branches.size());
        std::vector<float> factors(weight.branches.size() * (size_t) weight.n, 1.0f);
        for (size_t b = 0; b < weight.branches.size(); ++b) {
            std::copy(weight.branches[b].begin(), weight.branches[b].end(),
                      factors.begin() + (std::ptrdiff_t) (b * (size_t) weight.n));
        }
        const tile_tables::table tiles = tiles_.of(ranges, GAIN_TOGETHER, queue_.stream);
        if (tiles.n == 0) {
            return;
        }
        gain_on_gpu(queue_, gains_[weight.id].follow(factors, queue_.stream), weight.n, tiles.tiles, tiles.n,
                    y);
    }

    void losses(const char * logits, int64_t n_vocab, size_t stride, const targets & wanted,
                double * nll) override {
        const on_device            here(device_);
        const std::vector<int32_t> first = first_targets(wanted);
        std::vector<int32_t>       output;
        std::transform(first.begin(), first.end() - 1, std::back_inserter(output),
                       [&](int32_t target) { return wanted.output[(size_t) target]; });
        nll_.reserve(wanted.output.size());
        losses_on_gpu(queue_, logits, n_vocab, stride, output_.follow(output, queue_.stream),
                      first_.follow(first, queue_.stream), (int64_t) output.size(),
                      token_.follow(wanted.token, queue_.stream), nll_.data());
        check(cudaMemcpyAsync(nll, nll_.data(), wanted.output.size() * sizeof(double), cudaMemcpyDeviceToHost,
                              queue_.stream),
              "reading losses");
        finish();
    }

    void write(const zo_inplace & inplace, const inplace_tensor & tensor, const zo_branch & branch) override {
        const on_device here(device_);
        inplace_copy &  copy = inplace_[tensor.id];
        const size_t    n    = (size_t) tensor.field.n_values;
        if (copy.version != inplace.version) {
            copy.theta.upload(inplace.theta.data() + tensor.offset, n, queue_.stream);
            copy.version = inplace.version;
        }
        if (copy.base.size() < tensor.base.size()) {
            copy.base.upload(tensor.base.data(), n, queue_.stream);
        }
        const live_values values{ tensor.field, copy.theta.data(), copy.base.data(), tensor.id };
        write_on_gpu(queue_, inplace.distribution, values, branch, (char *) tensor.live->data);
    }

    char * lend(const void * host, size_t n_bytes) override {
        const on_device here(device_);
        lent_.emplace_back();
        lent_.back().upload((const char *) host, n_bytes, queue_.stream);
        return lent_.back().data();
    }

    void fetch(void * host, const char * lent, size_t n_bytes) override {
        const on_device here(device_);
        check(cudaMemcpyAsync(host, lent, n_bytes, cudaMemcpyDeviceToHost, queue_.stream), "a copy");
        finish();
    }

    void finish() override { check(cudaStreamSynchronize(queue_.stream), "a kernel"); }

private:
    sparse_on_gpu & sparse(const sparse_weight & weight) {
        std::unique_ptr<sparse_on_gpu> & copy = sparse_[weight.id];
        if (copy == nullptr) {
            copy = std::make_unique<sparse_on_gpu>(weight, queue_);
        }
        return *copy;
    }

    std::vector<factors_on_gpu> copied_factors(const lowrank_weight & weight, lowrank_copy & copy) {
        copy.branches.resize(std::max(copy.branches.size(), weight.branches.size()));
        std::vector<factors_on_gpu> factors(weight.branches.size());
        for (size_t b = 0; b < factors.size(); ++b) {
            const lowrank_factors & now  = weight.branches[b];
            branch_factors &        kept = copy.branches[b];
            if (kept.version != now.version) {
                kept.left.upload(now.left.data(), now.left.size(), queue_.stream);
                kept.right.upload(now.right.data(), now.right.size(), queue_.stream);
                kept.rank    = now.rank;
                kept.version = now.version;
            }
            factors[b] = { kept.left.data(), kept.right.data(), kept.rank };
        }
        return factors;
    }

    // Made anew for every product, in memory that all weights share: only the masters are kept.
    std::vector<factors_on_gpu> moved_factors(const zo_lowrank & lowrank, const lowrank_weight & weight,
                                              lowrank_copy & copy, const std::vector<column_range> & ranges) {
        const lowrank_masters & now  = weight.masters;
        const size_t            size = now.values.size();
        if (copy.version != now.version) {
            copy.masters.upload(now.values.data(), size, queue_.stream);
            copy.version = now.version;
        }
        size_t n = 0;
        for (const column_range & range : ranges) {
            n = std::max(n, (size_t) range.branch + 1);
        }
        moved_.reserve(n * size);
        const masters_on_gpu masters{ copy.masters.data(), now.rank,   now.rank * weight.n_cols,
                                      (int64_t) size,      now.factor, now.tensor };
        move_on_gpu(queue_, lowrank.distribution, masters, probes_.follow(lowrank.probes, queue_.stream),
                    (int32_t) n, moved_.data());
        std::vector<factors_on_gpu> factors;
        for (size_t b = 0; b < n; ++b) {
            const float * right = moved_.data() + b * size;
            factors.push_back({ right + masters.n_right, right, now.rank });
        }
        return factors;
    }

    // Kernels index without looking.
    static void check_branches(const std::vector<column_range> & ranges, size_t n) {
        for (const column_range & range : ranges) {
            if ((size_t) range.branch >= n) {
                throw std::runtime_error("branch " + std::to_string(range.branch) + " has no factors");
            }
        }
    }

    static size_t at_once(const sparse_weight & weight, const std::vector<zo_branch> & branches) {
        const size_t most = ZO_GPU_MOST_VALUES / (size_t) weight.nnz();
        return std::max<size_t>(1, std::min(most, branches.size()));
    }

    // Values of the branches from `first` on.
    void fill(const zo_store & store, const sparse_weight & weight, const std::vector<zo_branch> & branches,
              size_t first) {
        if (theta_version_ != store.version) {
            theta_.upload(store.theta.data(), store.theta.size(), queue_.stream);
            theta_version_ = store.version;
        }
        sparse_on_gpu & entries = sparse(weight);
        const size_t    n       = std::min(at_once(weight, branches), branches.size() - first);
        values_.reserve(n * (size_t) weight.nnz());
        entries.fill(queue_, store.distribution, theta_.data() + weight.offset,
                     branches_.follow(branches, queue_.stream) + first, (int32_t) n, values_.data());
        filled_ = { &weight, first, n };
    }

    const int   device_;
    gpu_queue   queue_;
    tile_tables tiles_;

    // Which values lie in values_.
    struct {
        const sparse_weight * weight = nullptr;
        size_t                first = 0, n = 0;
    } filled_;

    device_array<float> theta_, values_, moved_;
    uint64_t            theta_version_ = 0;
    mirror<zo_branch>   branches_, probes_;

    // By the weights' ids.
    std::map<uint32_t, std::unique_ptr<sparse_on_gpu>> sparse_;
    std::map<uint32_t, lowrank_copy>                   lowrank_;
    std::map<uint32_t, mirror<float>>                  gains_;
    std::map<uint32_t, inplace_copy>                   inplace_;

    std::vector<device_array<char>> lent_;

    mirror<int32_t>      output_, first_, token_;
    device_array<double> nll_;
};

}  // namespace

static __global__ void any_kernel() {}

// Whether there is code for a device in this library; the driver may also compile some for a newer one.
static bool has_kernels(int device) {
    static std::map<int, bool> known;
    const auto                 it = known.find(device);
    if (it != known.end()) {
        return it->second;
    }
    const on_device    here(device);
    cudaFuncAttributes attributes{};
    const bool         has = cudaFuncGetAttributes(&attributes, (const void *) any_kernel) == cudaSuccess;
    cudaGetLastError();
    known[device] = has;
    return has;
}

int gpu_holding(const void * data) {
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, data) != cudaSuccess) {
        cudaGetLastError();  // not ours to report
        return -1;
    }
    const bool there = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
    return there && has_kernels(attributes.device) ? attributes.device : -1;
}

int count_gpus() {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {  // no driver, or none that fits
        cudaGetLastError();
        return 0;
    }
    int usable = 0;
    while (usable < n && has_kernels(usable)) {
        ++usable;
    }
    return usable;
}

int64_t count_launches() {
    return n_launches;
}

std::unique_ptr<gpu> make_gpu(int device) {
    return std::make_unique<cuda_gpu>(device);
}

}  // namespace zo
