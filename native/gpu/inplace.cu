// Live values on a GPU: a thread makes four of them, as zo_inplace::values does, and writes their bytes.

#include <cmath>

#include "core/half.h"
#include "core/noise.h"
#include "gpu/kernels.h"

namespace zo {

static constexpr int THREADS = 256;

static __global__ void write_kernel(live_values values, bool rademacher, zo_branch branch, char * bytes) {
    const zo_field & field = values.field;
    const int64_t    index = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * index >= field.n_values) {
        return;
    }
    float z[4] = { 0, 0, 0, 0 };
    if (branch.scale != 0) {
        noise_block(rademacher, branch.seed, values.tensor, (uint64_t) index, z);
    }
    for (int64_t i = 4 * index; i < field.n_values && i < 4 * index + 4; ++i) {
        const float master = values.theta[i];
        float       live   = master;
        if (branch.scale != 0) {
            live = master + branch.scale * (fabsf(master) <= field.limit ? z[i % 4] : 0.0f);
        }
        if (values.base != nullptr) {
            live = live_value(field.relative, values.base[i], live);
        }
        const int     shift = field.n_per_block - 1;  // of one or two
        const int64_t block = i >> shift;
        char *        place =
            bytes + block * field.block_bytes + ((i & shift) != 0 ? field.offset[1] : field.offset[0]);
        if (field.storage == ZO_F32) {
            memcpy(place, &live, sizeof live);
        } else {
            const uint16_t half = field.storage == ZO_F16 ? to_f16(live) : to_bf16(live);
            memcpy(place, &half, sizeof half);
        }
    }
}

void write_on_gpu(const gpu_queue & queue, zo_distribution distribution, const live_values & values,
                  const zo_branch & branch, char * bytes) {
    const unsigned n_blocks = (unsigned) ((values.field.n_values + 4 * THREADS - 1) / (4 * THREADS));
    launch(write_kernel, dim3(n_blocks), THREADS, 0, queue.stream, values, distribution == ZO_RADEMACHER,
           branch, bytes);
}

}  // namespace zo
