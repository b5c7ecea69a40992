// What the hook does on a CUDA or HIP device: the overlays and losses of the CPU, on tensors in its memory.
//
// Where no CUDA or HIP compiler was found, there is no device, and tensors outside host memory are copied
// to the host and back.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/columns.h"
#include "cpu/loss.h"
#include "ggml.h"
#include "params/gain.h"
#include "params/inplace.h"
#include "params/lowrank.h"
#include "params/store.h"
#include "zo.h"

namespace zo {

// One device. Everything is queued on a stream of its own; what the caller reads or the engine goes on to
// read is there after `finish`, or after a call that says so. Failures are thrown as std::runtime_error.
struct gpu {
    virtual ~gpu() = default;

    // Starts computing a weight's values in all branches, while the engine still multiplies by it.
    virtual void prepare(const zo_store & store, const sparse_weight & weight,
                         const std::vector<zo_branch> & branches) = 0;

    // As sparse_apply, lowrank_apply and gain_apply, on columns in the device's memory.
    virtual void add_sparse(const zo_store & store, const sparse_weight & weight,
                            const std::vector<zo_branch> & branches, const columns & x, const columns & y,
                            const std::vector<column_range> & ranges)                     = 0;
    virtual void add_lowrank(const zo_lowrank & lowrank, const lowrank_weight & weight, const columns & x,
                             const columns & y, const std::vector<column_range> & ranges) = 0;
    virtual void multiply(const gain_weight & weight, const columns & y,
                          const std::vector<column_range> & ranges)                       = 0;

    // As negative_log_likelihoods; waits for the result.
    virtual void losses(const char * logits, int64_t n_vocab, size_t stride, const targets & wanted,
                        double * nll) = 0;

    // Writes the live values of a branch into the tensor's bytes.
    virtual void write(const zo_inplace & inplace, const inplace_tensor & tensor,
                       const zo_branch & branch) = 0;

    virtual void finish() = 0;

    // A copy of host memory on the device, kept as long as this; and the way back, which waits.
    virtual char * lend(const void * host, size_t n_bytes)               = 0;
    virtual void   fetch(void * host, const char * lent, size_t n_bytes) = 0;
};

// A device by its number. Throws std::runtime_error if there is none.
std::unique_ptr<gpu> open_gpu(int device);

// Runs body(gpu, x, y) on copies of n_x and n_y floats per column, and copies y back.
template <typename Body>
zo_status apply_on(int device, columns x, int64_t n_x, columns y, int64_t n_y, Body body) {
    const std::unique_ptr<gpu> on      = open_gpu(device);
    const auto                 n_bytes = [](const columns & c, int64_t n) {
        return (size_t) (c.ne1 - 1) * c.nb1 + (size_t) n * sizeof(float);
    };
    char * const host = y.data;
    x.data            = on->lend(x.data, n_bytes(x, n_x));
    y.data            = on->lend(y.data, n_bytes(y, n_y));
    body(*on, x, y);
    on->fetch(host, y.data, n_bytes(y, n_y));
    return ZO_OK;
}

// The devices that tensors were found on.
class gpus {
public:
    // The device that holds a tensor, NULL if it lies in host memory or where we have no kernels. Throws
    // std::runtime_error where it lies in pieces on several devices.
    gpu * of(const ggml_tensor * t);

private:
    std::vector<std::unique_ptr<gpu>> devices_;  // by number, NULL where no tensor was found yet
};

#ifdef ZO_GPU
// Number of the device whose memory this is, -1 if none's.
int                  gpu_holding(const void * data);
std::unique_ptr<gpu> make_gpu(int device);
int                  count_gpus();
int64_t              count_launches();
#endif

}  // namespace zo
