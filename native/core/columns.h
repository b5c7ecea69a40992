// Columns of a matrix in the engine's graph, and which branch each belongs to.

#pragma once

#include <cstddef>
#include <cstdint>

#include "core/vectorize.h"

namespace zo {

// A matrix of f32 columns (tokens): column t lies at data + t1 * nb1 + t2 * nb2 + t3 * nb3 bytes, where
// (t1, t2, t3) are the digits of t in the shape [ne1, ne2, ...].
struct columns {
    char *  data = nullptr;
    int64_t ne1 = 1, ne2 = 1;
    size_t  nb1 = 0, nb2 = 0, nb3 = 0;

    ZO_HD size_t offset(int64_t t) const {
        const int64_t t1 = t % ne1, rest = t / ne1;
        return (size_t) t1 * nb1 + (size_t) (rest % ne2) * nb2 + (size_t) (rest / ne2) * nb3;
    }
    ZO_HD float * at(int64_t t) const { return (float *) (data + offset(t)); }
};

// Consecutive columns of one branch.
struct column_range {
    int64_t first, end;
    int32_t branch;

    bool operator==(const column_range & other) const {
        return first == other.first && end == other.end && branch == other.branch;
    }
};

}  // namespace zo
