// The way back through element-wise functions, alone and in gated units; gradients are added to.

#pragma once

#include <cstdint>

#include "feedback/graph.h"

namespace zo {

// dx += dy * f'(x) for n values.
void activation_back(activation f, const float * x, const float * dy, float * dx, int64_t n);

// y = f(gate) * up; the two variants with a limit clamp both, and swiglu_oai has up + 1.
struct gated_unit {
    activation function;
    float      alpha, limit;
};

// Of n values; dgate and dup may be NULL.
void gated_back(const gated_unit & unit, const float * gate, const float * up, const float * dy,
                float * dgate, float * dup, int64_t n);

}  // namespace zo
