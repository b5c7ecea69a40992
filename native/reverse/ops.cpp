#include "reverse/ops.h"

#include <algorithm>
#include <cmath>

namespace zo {

namespace {

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

struct row_sums {
    double squares = 0, products = 0;
};

// Sums of x * x and of x * dy.
row_sums sums_of(const float * x, const float * dy, int64_t n) {
    row_sums sums;
    for (int64_t i = 0; i < n; ++i) {
        sums.squares += (double) x[i] * x[i];
        sums.products += (double) x[i] * dy[i];
    }
    return sums;
}

}  // namespace

void rms_norm_back(const float * x, const float * dy, float * dx, int64_t n, int64_t n_rows, float eps) {
    for (int64_t row = 0; row < n_rows; ++row, x += n, dy += n, dx += n) {
        const auto [squares, products] = sums_of(x, dy, n);
        const double inverse           = 1 / std::sqrt(squares / (double) n + eps);
        const float  scale             = (float) inverse,
                     along             = (float) (products / (double) n * inverse * inverse * inverse);
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
        const auto [squares, products] = sums_of(x, dy, n);
        const double length            = std::sqrt(squares);
        const float  scale             = (float) (1 / std::max(length, (double) eps));
        const float  along             = length > eps ? (float) (products / (squares * length)) : 0.0f;
        for (int64_t i = 0; i < n; ++i) {
            dx[i] += scale * dy[i] - along * x[i];
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
