#include "reverse/activation.h"

#include <algorithm>
#include <cmath>

#include "core/vectorize.h"
#include "cpu/exponential.h"

namespace zo {

namespace {

constexpr int64_t BLOCK = 256;  // values at a time, which stay in the first cache

// value[i] = f(x[i]), slope[i] = f'(x[i]), of n values.
struct both {
    float value[BLOCK], slope[BLOCK];
};

// x * sigmoid(a * x)
ZO_INLINE void silu(const float * x, int64_t n, float a, both & out) {
    for (int64_t i = 0; i < n; ++i) {
        const float s = logistic(a * x[i]);
        out.value[i]  = x[i] * s;
        out.slope[i]  = s + a * x[i] * s * (1 - s);
    }
}

// 0.5 x (1 + tanh(z)) = x sigmoid(2 z) with z = b x (1 + a x^2)
ZO_INLINE void gelu(const float * x, int64_t n, both & out) {
    constexpr float a = 0.044715f, b = 0.79788456f;  // sqrt(2 / pi)
    for (int64_t i = 0; i < n; ++i) {
        const float square = x[i] * x[i], s = logistic(2 * b * x[i] * (1 + a * square));
        out.value[i] = x[i] * s;
        out.slope[i] = s + x[i] * s * (1 - s) * 2 * b * (1 + 3 * a * square);
    }
}

ZO_INLINE void gelu_erf(const float * x, int64_t n, both & out) {
    for (int64_t i = 0; i < n; ++i) {
        const float below = 0.5f * (1 + std::erf(x[i] * 0.70710678f));
        out.value[i]      = x[i] * below;
        out.slope[i]      = below + x[i] * 0.39894228f * std::exp(-0.5f * x[i] * x[i]);  // 1 / sqrt(2 pi)
    }
}

ZO_INLINE void sigmoid(const float * x, int64_t n, both & out) {
    for (int64_t i = 0; i < n; ++i) {
        out.value[i] = logistic(x[i]);
        out.slope[i] = out.value[i] * (1 - out.value[i]);
    }
}

ZO_INLINE void tanh(const float * x, int64_t n, both & out) {
    for (int64_t i = 0; i < n; ++i) {
        out.value[i] = 2 * logistic(2 * x[i]) - 1;
        out.slope[i] = 1 - out.value[i] * out.value[i];
    }
}

ZO_INLINE void relu(const float * x, int64_t n, both & out) {
    for (int64_t i = 0; i < n; ++i) {
        out.slope[i] = x[i] > 0 ? 1.0f : 0.0f;
        out.value[i] = x[i] * out.slope[i];
    }
}

void evaluate(activation f, const float * x, int64_t n, both & out) {
    switch (f) {
    case activation::relu:
        return vectorized<relu>(x, n, out);
    case activation::gelu:
        return vectorized<gelu>(x, n, out);
    case activation::gelu_quick:
        return vectorized<silu>(x, n, 1.702f, out);
    case activation::gelu_erf:
        return vectorized<gelu_erf>(x, n, out);
    case activation::silu:
        return vectorized<silu>(x, n, 1.0f, out);
    case activation::sigmoid:
        return vectorized<sigmoid>(x, n, out);
    case activation::tanh:
        return vectorized<tanh>(x, n, out);
    default:
        break;  // neg
    }
    for (int64_t i = 0; i < n; ++i) {
        out.value[i] = -x[i];
        out.slope[i] = -1;
    }
}

// Both factors of a gated unit.
void evaluate(const gated_unit & unit, const float * gate, const float * up, int64_t n, both & first,
              both & second) {
    const bool oai = unit.function == activation::swiglu_oai;
    if (!oai && unit.function != activation::swiglu_clamp) {
        evaluate(unit.function, gate, n, first);
        std::copy(up, up + n, second.value);
        std::fill(second.slope, second.slope + n, 1.0f);
        return;
    }
    float clamped[BLOCK];
    for (int64_t i = 0; i < n; ++i) {
        clamped[i]      = std::min(gate[i], unit.limit);
        second.value[i] = std::clamp(up[i], -unit.limit, unit.limit) + (oai ? 1.0f : 0.0f);
        second.slope[i] = std::fabs(up[i]) > unit.limit ? 0.0f : 1.0f;
    }
    vectorized<silu>(clamped, n, oai ? unit.alpha : 1.0f, first);
    for (int64_t i = 0; i < n; ++i) {
        first.slope[i] = gate[i] > unit.limit ? 0.0f : first.slope[i];
    }
}

}  // namespace

void activation_back(activation f, const float * x, const float * dy, float * dx, int64_t n) {
    both at;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t size = std::min(BLOCK, n - first);
        evaluate(f, x + first, size, at);
        for (int64_t i = 0; i < size; ++i) {
            dx[first + i] += dy[first + i] * at.slope[i];
        }
    }
}

void gated_back(const gated_unit & unit, const float * gate, const float * up, const float * dy,
                float * dgate, float * dup, int64_t n) {
    both of_gate, of_up;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t size = std::min(BLOCK, n - first);
        evaluate(unit, gate + first, up + first, size, of_gate, of_up);
        for (int64_t i = 0; dgate != nullptr && i < size; ++i) {
            dgate[first + i] += dy[first + i] * of_gate.slope[i] * of_up.value[i];
        }
        for (int64_t i = 0; dup != nullptr && i < size; ++i) {
            dup[first + i] += dy[first + i] * of_gate.value[i] * of_up.slope[i];
        }
    }
}

}  // namespace zo
