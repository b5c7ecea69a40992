#include "reverse/ops.h"

#include <algorithm>
#include <cmath>

namespace zo {

namespace {

struct value_and_slope {
    float value, slope;
};

float sigmoid(float x) {
    return 1 / (1 + std::exp(-x));
}

// x * sigmoid(a * x)
value_and_slope silu(float x, float a) {
    const float s = sigmoid(a * x);
    return { x * s, s + a * x * s * (1 - s) };
}

value_and_slope gelu(float x) {
    constexpr float a = 0.044715f, b = 0.79788456f;  // sqrt(2 / pi)
    const float     t = std::tanh(b * x * (1 + a * x * x));
    return { 0.5f * x * (1 + t), 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * b * (1 + 3 * a * x * x) };
}

value_and_slope gelu_erf(float x) {
    const float below = 0.5f * (1 + std::erf(x * 0.70710678f));
    return { x * below, below + x * 0.39894228f * std::exp(-0.5f * x * x) };  // 1 / sqrt(2 pi)
}

value_and_slope evaluate(activation f, float x) {
    switch (f) {
    case activation::relu:
        return { std::max(x, 0.0f), x > 0 ? 1.0f : 0.0f };
    case activation::gelu:
        return gelu(x);
    case activation::gelu_quick:
        return silu(x, 1.702f);
    case activation::gelu_erf:
        return gelu_erf(x);
    case activation::silu:
        return silu(x, 1);
    case activation::neg:
        return { -x, -1 };
    case activation::sigmoid: {
        const float s = sigmoid(x);
        return { s, s * (1 - s) };
    }
    case activation::tanh: {
        const float t = std::tanh(x);
        return { t, 1 - t * t };
    }
    default:
        return { 0, 0 };
    }
}

// Both factors of a gated unit at one place.
struct gated_factors {
    value_and_slope gate, up;
};

gated_factors evaluate(const gated_unit & unit, float gate, float up) {
    if (unit.function == activation::swiglu_oai || unit.function == activation::swiglu_clamp) {
        const bool      oai   = unit.function == activation::swiglu_oai;
        const bool      above = gate > unit.limit, beyond = std::fabs(up) > unit.limit;
        value_and_slope first = silu(std::min(gate, unit.limit), oai ? unit.alpha : 1);
        first.slope           = above ? 0 : first.slope;
        const float second    = std::clamp(up, -unit.limit, unit.limit) + (oai ? 1.0f : 0.0f);
        return { first, { second, beyond ? 0.0f : 1.0f } };
    }
    return { evaluate(unit.function, gate), { up, 1 } };
}

// The coordinates of value i within the first k dimensions.
struct place_in_token {
    int64_t at[4] = { 0, 0, 0, 0 };

    place_in_token(const graph_tensor & t, int k, int64_t i) {
        for (int d = 0; d < k; ++d) {
            at[d] = i % t.ne[d];
            i /= t.ne[d];
        }
    }
};

int64_t values_of_token(const graph_tensor & t, int k) {
    int64_t n = 1;
    for (int d = 0; d < k; ++d) {
        n *= t.ne[d];
    }
    return n;
}

}  // namespace

void rms_norm_back(const float * x, const float * dy, float * dx, int64_t n, int64_t n_rows, float eps) {
    for (int64_t row = 0; row < n_rows; ++row, x += n, dy += n, dx += n) {
        double squares = 0, products = 0;
        for (int64_t i = 0; i < n; ++i) {
            squares += (double) x[i] * x[i];
            products += (double) x[i] * dy[i];
        }
        const double inverse = 1 / std::sqrt(squares / (double) n + eps);
        const float  scale   = (float) inverse,
                     along   = (float) (products / (double) n * inverse * inverse * inverse);
        for (int64_t i = 0; i < n; ++i) {
            dx[i] += scale * dy[i] - along * x[i];
        }
    }
}

void norm_back(const float * x, const float * dy, float * dx, int64_t n, int64_t n_rows, float eps) {
    for (int64_t row = 0; row < n_rows; ++row, x += n, dy += n, dx += n) {
        double sum = 0, sum_dy = 0;
        for (int64_t i = 0; i < n; ++i) {
            sum += x[i];
            sum_dy += dy[i];
        }
        const double mean = sum / (double) n, mean_dy = sum_dy / (double) n;
        double       squares = 0, products = 0;
        for (int64_t i = 0; i < n; ++i) {
            squares += (x[i] - mean) * (x[i] - mean);
            products += (x[i] - mean) * dy[i];
        }
        const double inverse = 1 / std::sqrt(squares / (double) n + eps);
        const double along   = products / (double) n * inverse * inverse;
        for (int64_t i = 0; i < n; ++i) {
            dx[i] += (float) (inverse * (dy[i] - mean_dy - along * (x[i] - mean)));
        }
    }
}

void l2_norm_back(const float * x, const float * dy, float * dx, int64_t n, int64_t n_rows, float eps) {
    for (int64_t row = 0; row < n_rows; ++row, x += n, dy += n, dx += n) {
        double squares = 0, products = 0;
        for (int64_t i = 0; i < n; ++i) {
            squares += (double) x[i] * x[i];
            products += (double) x[i] * dy[i];
        }
        const double length = std::sqrt(squares);
        const float  scale  = (float) (1 / std::max(length, (double) eps));
        const float  along  = length > eps ? (float) (products / (squares * length)) : 0.0f;
        for (int64_t i = 0; i < n; ++i) {
            dx[i] += scale * dy[i] - along * x[i];
        }
    }
}

void activation_back(activation f, const float * x, const float * dy, float * dx, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        dx[i] += dy[i] * evaluate(f, x[i]).slope;
    }
}

void gated_back(const gated_unit & unit, const float * gate, const float * up, const float * dy,
                float * dgate, float * dup, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const gated_factors factors = evaluate(unit, gate[i], up[i]);
        if (dgate != nullptr) {
            dgate[i] += dy[i] * factors.gate.slope * factors.up.value;
        }
        if (dup != nullptr) {
            dup[i] += dy[i] * factors.gate.value * factors.up.slope;
        }
    }
}

std::vector<int32_t> repeat_map(const graph_tensor & b, const graph_tensor & out, int k) {
    const int64_t n = values_of_token(out, k);
    if (n == values_of_token(b, k)) {
        return {};
    }
    std::vector<int32_t> map((size_t) n);
    for (int64_t i = 0; i < n; ++i) {
        const place_in_token place(out, k, i);
        int64_t              at = 0, stride = 1;
        for (int d = 0; d < k; ++d) {
            at += place.at[d] % b.ne[d] * stride;
            stride *= b.ne[d];
        }
        map[(size_t) i] = (int32_t) at;
    }
    return map;
}

std::vector<int32_t> view_map(const graph_tensor & out, const graph_tensor & from, int k) {
    std::vector<int32_t> map((size_t) values_of_token(out, k));
    for (size_t i = 0; i < map.size(); ++i) {
        const place_in_token place(out, k, (int64_t) i);
        size_t               offset = out.view_offset - from.view_offset;
        for (int d = 0; d < k; ++d) {
            offset += (size_t) place.at[d] * out.nb[d];
        }
        map[i] = (int32_t) (offset / sizeof(float));
    }
    return map;
}

}  // namespace zo
