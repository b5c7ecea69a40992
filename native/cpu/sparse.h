// Sparse overlay: y += S * x for columns of a matrix product, on the CPU.

#pragma once

#include <cstdint>
#include <vector>

#include "core/rng.h"
#include "params/store.h"

namespace zo {

// A matrix of f32 columns (tokens): column t lies at data + t1 * nb1 + t2 * nb2 + t3 * nb3 bytes, where
// (t1, t2, t3) are the digits of t in the shape [ne1, ne2, ...].
struct columns {
    char *  data = nullptr;
    int64_t ne1 = 1, ne2 = 1;
    size_t  nb1 = 0, nb2 = 0, nb3 = 0;

    ZO_HD float * at(int64_t t) const {
        const int64_t t1 = t % ne1, rest = t / ne1;
        return (float *) (data + t1 * (int64_t) nb1 + (rest % ne2) * (int64_t) nb2 +
                          (rest / ne2) * (int64_t) nb3);
    }
};

// Scratch that a hook keeps between calls: one tile of inputs and outputs per thread.
using sparse_scratch = std::vector<std::vector<float>>;

// y[:, first .. end) += S * x[:, first .. end), S being `weight` with the given entry values. Each
// output is summed by one thread in the order of its entries: the bits do not depend on n_threads.
void sparse_apply(const sparse_weight & weight, const float * values, const columns & x, const columns & y,
                  int64_t first, int64_t end, int n_threads, sparse_scratch & scratch);

}  // namespace zo
