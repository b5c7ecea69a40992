// Masters of values inside loaded weights, and the live bytes that follow from them.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/vectorize.h"
#include "ggml.h"
#include "zo.h"

namespace zo {

// The live value of a master that has a base; `value` is the master, moved by a probe.
ZO_HD float live_value(bool relative, float base, float value) {
    constexpr float least      = 1.0f / 1024;  // a scale may shrink to this share of its base
    constexpr float least_step = 1e-7f;        // QZO, arXiv 2505.13430
    if (relative) {
        const float share = 1.0f + value;
        return base * (share < least ? least : share);
    }
    if (base == 0) {
        return base;
    }
    return base > 0 ? (value < least_step ? least_step : value) : (value > -least_step ? -least_step : value);
}

struct gpu;
class gpus;

struct inplace_tensor {
    std::string        name;
    zo_field           field{};
    std::vector<float> base;
    int64_t            n_bytes = 0;
    int64_t            offset  = 0;  // of the first value in theta
    uint32_t           id      = 0;  // the noise's tensor number
    ggml_tensor *      live    = nullptr;
    gpu *              device  = nullptr;  // that holds it and has kernels
    std::vector<char>  copy;               // of the live bytes, where those are out of reach
    int64_t            interleave = 1;     // rows side by side in a block, where llama.cpp repacked them
    int64_t            steps_at   = 0;     // bytes before their steps
    int64_t            padding    = 0;     // bytes of such a block that the file has not
    std::string        problem;

    // Runs body(i, place in the live bytes) for n values from `first` on.
    template <typename Body>
    void for_places(int64_t first, int64_t n, Body body) const;
    // Whether it has f16 scales, and those at these places are the base's.
    bool holds_base() const;
    // Find these, or note a problem.
    void find_interleave();
    void find_tiles();
};

}  // namespace zo

struct zo_inplace {
    zo_distribution                 distribution = ZO_NORMAL;
    int                             n_threads    = 1;
    bool                            force_staged = false;
    std::vector<zo::inplace_tensor> tensors;
    uint32_t                        n_added = 0;
    std::vector<float>              theta;
    uint64_t                        version = 1;        // of theta
    zo::gpus *                      devices = nullptr;  // the hook's
    bool                            written = false;

    // Notes where tensors lie, until something is written to them. One that llama.cpp holds twice, in two
    // places, is then in `tensors` twice, with the same values of theta.
    void look(const ggml_tensor * node);
    void find(ggml_tensor * tensor);
    void place(zo::inplace_tensor & t, ggml_tensor * tensor);
    // The hook goes, and its devices with it: tensors there have to be found again by another hook.
    void leave_hook();
    // Live values [first, first + n) of a tensor in a branch, not yet rounded to its storage.
    void values(const zo::inplace_tensor & t, const zo_branch & branch, int64_t first, int64_t n,
                float * live) const;
    void noise(const zo::inplace_tensor & t, uint64_t seed, int64_t first, int64_t n, float * z) const;
};
