#include "params/inplace.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/noise.h"
#include "core/parallel.h"
#include "ggml-backend.h"
#include "gpu/gpu.h"

namespace {

constexpr int64_t CHUNK            = 1 << 12;
constexpr char    UNKNOWN_LAYOUT[] = "was repacked for this CPU and cannot be edited in place";

size_t bytes_of(zo_storage storage) {
    return storage == ZO_F32 ? 4 : 2;
}

// Writes n values as `storage`, one after another.
void round_to(zo_storage storage, const float * values, int64_t n, char * bytes) {
    if (storage == ZO_F16) {
        ggml_fp32_to_fp16_row(values, (ggml_fp16_t *) bytes, n);
    } else if (storage == ZO_BF16) {
        ggml_fp32_to_bf16_row_ref(values, (ggml_bf16_t *) bytes, n);
    } else {
        std::memcpy(bytes, values, (size_t) n * sizeof(float));
    }
}

// Runs body(tensor, first, n) over pieces of every tensor.
template <typename Body>
void for_pieces(const zo_inplace & inplace, Body body) {
    for (const zo::inplace_tensor & t : inplace.tensors) {
        const int64_t n = t.field.n_values;
        zo::parallel_for((n + CHUNK - 1) / CHUNK, inplace.n_threads, [&](int64_t piece, int) {
            body(t, piece * CHUNK, std::min(CHUNK, n - piece * CHUNK));
        });
    }
}

}  // namespace

// llama.cpp repacks quantized matrices in groups of 4, 8 or 16 rows (ggml-cpu/repack.h): a block of a group
// has the steps of its rows side by side, then their minima where the type has those, then the codes. Tiles
// for AMX (ggml-cpu/amx/mmq.cpp, pack_B) have the codes first.
template <typename Body>
void zo::inplace_tensor::for_places(int64_t first, int64_t n, Body body) const {
    // No division per value: these loops run over all scales of a model for every probe.
    const int64_t per_row = ggml_row_size(live->type, live->ne[0]) / field.block_bytes;
    const int64_t stride  = interleave * field.block_bytes + padding;
    int64_t       block   = first / field.n_per_block % per_row;
    int64_t       row     = first / field.n_per_block / per_row;
    int64_t       lane    = row % interleave;
    int64_t       k       = first % field.n_per_block;
    int64_t       group   = (row / interleave * per_row + block) * stride;
    for (int64_t i = 0; i < n; ++i) {
        body(i, group + (interleave == 1 ? field.offset[k] : steps_at + (k * interleave + lane) * 2));
        if (++k == field.n_per_block) {
            k = 0;
            group += stride;
            if (++block == per_row) {
                block = 0;
                row += 1;
                lane  = row % interleave;
                group = row / interleave * per_row * stride;
            }
        }
    }
}

bool zo::inplace_tensor::holds_base() const {
    bool holds = !base.empty() && field.storage == ZO_F16 && live->ne[1] % interleave == 0;
    // In pieces: the wrong layouts show in the first one, and a large model has many scales.
    for (int64_t first = 0; holds && first < field.n_values; first += CHUNK) {
        for_places(first, std::min(CHUNK, field.n_values - first), [&](int64_t i, int64_t place) {
            const ggml_fp16_t scale = ggml_fp32_to_fp16(base[(size_t) (first + i)]);
            holds = holds && std::memcmp((const char *) live->data + place, &scale, sizeof scale) == 0;
        });
    }
    return holds;
}

void zo::inplace_tensor::find_interleave() {
    // Which layout this CPU gets is decided inside llama.cpp; where the base's scales lie tells it.
    std::vector<int64_t> fitting;
    for (const int64_t rows : { 4, 8, 16 }) {
        interleave = rows;
        if (holds_base()) {
            fitting.push_back(rows);
        }
    }
    if (fitting.size() == 1) {
        interleave = fitting[0];
    } else {
        problem = UNKNOWN_LAYOUT;
    }
}

void zo::inplace_tensor::find_tiles() {
    if (!ggml_is_quantized(live->type)) {
        return;  // as in the file
    }
    const bool sums = live->type == GGML_TYPE_Q8_0;  // of the codes, behind the steps
    const bool wide = live->type == GGML_TYPE_Q4_K || live->type == GGML_TYPE_Q5_K;  // scales and minima
    interleave      = 16;
    padding         = sums || wide ? 64 : live->type == GGML_TYPE_IQ4_XS ? 32 : 0;
    steps_at        = interleave * field.block_bytes + padding - field.n_per_block * 32 - (sums ? 64 : 0);
    if (!holds_base()) {
        problem = UNKNOWN_LAYOUT;
    }
}

void zo_inplace::noise(const zo::inplace_tensor & t, uint64_t seed, int64_t first, int64_t n,
                       float * z) const {
    zo::noise_range(distribution, seed, t.id, first, n, z);
    if (std::isfinite(t.field.limit)) {
        const float * masters = theta.data() + t.offset + first;
        for (int64_t i = 0; i < n; ++i) {
            z[i] = std::fabs(masters[i]) <= t.field.limit ? z[i] : 0.0f;
        }
    }
}

void zo_inplace::values(const zo::inplace_tensor & t, const zo_branch & branch, int64_t first, int64_t n,
                        float * live) const {
    const float * masters = theta.data() + t.offset + first;
    std::copy(masters, masters + n, live);
    if (branch.scale != 0) {
        float z[CHUNK];
        noise(t, branch.seed, first, n, z);
        for (int64_t i = 0; i < n; ++i) {
            live[i] = masters[i] + branch.scale * z[i];
        }
    }
    if (t.base.empty()) {
        return;
    }
    const float * base = t.base.data() + first;
    for (int64_t i = 0; i < n; ++i) {
        live[i] = zo::live_value(t.field.relative, base[i], live[i]);
    }
}

void zo_inplace::look(const ggml_tensor * node) {
    for (int i = 0; i < GGML_MAX_SRC && !written; ++i) {
        ggml_tensor * source = node->src[i];
        if (source != nullptr) {
            find(source->view_src != nullptr ? source->view_src : source);
        }
    }
}

void zo_inplace::find(ggml_tensor * tensor) {
    const zo::inplace_tensor * twin = nullptr;
    for (zo::inplace_tensor & t : tensors) {
        if (t.name != tensor->name) {
            continue;
        }
        if (t.live == nullptr) {
            place(t, tensor);
        }
        if (t.live->data == tensor->data) {
            return;
        }
        twin = &t;
    }
    // With layers on a GPU, llama.cpp has the embedding twice where the head is tied to it.
    if (twin != nullptr) {
        zo::inplace_tensor other = *twin;
        other.device             = nullptr;
        other.copy.clear();
        other.problem.clear();
        place(other, tensor);
        tensors.push_back(std::move(other));
    }
}

void zo_inplace::place(zo::inplace_tensor & t, ggml_tensor * tensor) {
    ggml_backend_buffer * buffer = tensor->buffer;
    const bool            host   = buffer == nullptr || ggml_backend_buffer_is_host(buffer);
    const std::string     where  = buffer == nullptr ? "" : ggml_backend_buffer_name(buffer);
    t.live                       = tensor;
    if ((int64_t) ggml_nbytes(tensor) != t.n_bytes) {
        t.problem = "has an unexpected size in memory";
    } else if (where.find("Mapped") != std::string::npos) {
        t.problem = "is mapped from the file and must not be written";
    } else if (where.find("REPACK") != std::string::npos) {
        t.find_interleave();
    } else if (where.find("AMX") != std::string::npos) {
        t.find_tiles();
    } else if (!force_staged && devices != nullptr && (t.device = devices->of(tensor)) != nullptr) {
        // Written where it lies.
    } else if (!host || force_staged) {
        t.copy.resize((size_t) t.n_bytes);
        ggml_backend_tensor_get(tensor, t.copy.data(), 0, t.copy.size());
    }
}

void zo_inplace::leave_hook() {
    devices = nullptr;
    for (zo::inplace_tensor & t : tensors) {
        if (t.device != nullptr) {
            t.device = nullptr;
            t.live   = nullptr;
            written  = false;
        }
    }
}

using zo::fail;
using zo::guarded;

zo_status zo_inplace_init(zo_inplace ** inplace, zo_distribution distribution, int32_t n_threads) {
    return guarded([&] {
        if (inplace == nullptr || n_threads < 1 || !zo::is_known(distribution)) {
            return fail(ZO_ARGUMENT, "in-place parameters need a distribution and at least one thread");
        }
        *inplace                 = new zo_inplace;
        (*inplace)->distribution = distribution;
        (*inplace)->n_threads    = n_threads;
        return ZO_OK;
    });
}

void zo_inplace_free(zo_inplace * inplace) {
    delete inplace;
}

zo_status zo_inplace_add(zo_inplace * inplace, const char * name, const zo_field * field, int64_t n_bytes,
                         const float * theta) {
    return guarded([&] {
        if (inplace == nullptr || name == nullptr || field == nullptr || theta == nullptr) {
            return fail(ZO_ARGUMENT, "zo_inplace_add got a null pointer");
        }
        const zo_field & f     = *field;
        const int64_t    width = (int64_t) bytes_of(f.storage);
        bool fits = f.n_values > 0 && f.block_bytes > 0 && f.n_per_block >= 1 && f.n_per_block <= 2 &&
                    f.n_values % f.n_per_block == 0 &&
                    f.n_values / f.n_per_block == n_bytes / f.block_bytes && n_bytes % f.block_bytes == 0 &&
                    f.storage >= ZO_F32 && f.storage <= ZO_BF16 && (f.base != nullptr || !f.relative);
        for (int32_t k = 0; fits && k < f.n_per_block; ++k) {
            fits = f.offset[k] >= 0 && f.offset[k] + width <= f.block_bytes;
        }
        if (!fits) {
            return fail(ZO_ARGUMENT, std::string("the values of ") + name + " do not fit into its bytes");
        }
        const auto same = [&](const zo::inplace_tensor & t) { return t.name == name; };
        if (std::any_of(inplace->tensors.begin(), inplace->tensors.end(), same)) {
            return fail(ZO_ARGUMENT, std::string(name) + " was added before");
        }
        zo::inplace_tensor t;
        t.name    = name;
        t.field   = f;
        t.n_bytes = n_bytes;
        t.offset  = (int64_t) inplace->theta.size();
        t.id      = ZO_TENSOR(ZO_INPLACE, inplace->n_added++);
        if (f.base != nullptr) {
            t.base.assign(f.base, f.base + f.n_values);
        }
        t.field.base = nullptr;
        inplace->theta.insert(inplace->theta.end(), theta, theta + f.n_values);
        inplace->version += 1;
        inplace->tensors.push_back(std::move(t));
        return ZO_OK;
    });
}

int64_t zo_inplace_size(const zo_inplace * inplace) {
    return inplace == nullptr ? 0 : (int64_t) inplace->theta.size();
}

static zo_status check(const char * function, const zo_inplace * inplace, const float * array, int64_t n) {
    return zo::check_array(function, inplace == nullptr ? nullptr : array, n, zo_inplace_size(inplace));
}

zo_status zo_inplace_read(const zo_inplace * inplace, int64_t n, float * theta) {
    const zo_status status = check("zo_inplace_read", inplace, theta, n);
    if (status == ZO_OK) {
        std::copy(inplace->theta.begin(), inplace->theta.end(), theta);
    }
    return status;
}

zo_status zo_inplace_write(zo_inplace * inplace, int64_t n, const float * theta) {
    const zo_status status = check("zo_inplace_write", inplace, theta, n);
    if (status == ZO_OK) {
        std::copy(theta, theta + n, inplace->theta.begin());
        inplace->version += 1;
    }
    return status;
}

zo_status zo_inplace_noise(const zo_inplace * inplace, uint64_t seed, int64_t n, float * z) {
    return guarded([&] {
        const zo_status status = check("zo_inplace_noise", inplace, z, n);
        if (status == ZO_OK) {
            for_pieces(*inplace, [&](const zo::inplace_tensor & t, int64_t first, int64_t n_piece) {
                inplace->noise(t, seed, first, n_piece, z + t.offset + first);
            });
        }
        return status;
    });
}

zo_status zo_inplace_values(const zo_inplace * inplace, zo_branch branch, int64_t n, float * live) {
    return guarded([&] {
        const zo_status status = check("zo_inplace_values", inplace, live, n);
        if (status == ZO_OK) {
            for_pieces(*inplace, [&](const zo::inplace_tensor & t, int64_t first, int64_t n_piece) {
                inplace->values(t, branch, first, n_piece, live + t.offset + first);
            });
        }
        return status;
    });
}

zo_status zo_inplace_check(const zo_inplace * inplace) {
    return guarded([&] {
        if (inplace == nullptr) {
            return fail(ZO_ARGUMENT, "zo_inplace_check got a null pointer");
        }
        for (const zo::inplace_tensor & t : inplace->tensors) {
            if (t.live == nullptr || !t.problem.empty()) {
                return fail(ZO_GRAPH, "the tensor " + t.name + " " +
                                          (t.live == nullptr ? "is not used by the model" : t.problem));
            }
        }
        return ZO_OK;
    });
}

zo_status zo_inplace_apply(zo_inplace * inplace, zo_branch branch) {
    return guarded([&] {
        if (inplace == nullptr) {
            return fail(ZO_ARGUMENT, "zo_inplace_apply got a null pointer");
        }
        const zo_status status = zo_inplace_check(inplace);
        if (status != ZO_OK) {
            return status;
        }
        inplace->written = true;
        for_pieces(*inplace, [&](const zo::inplace_tensor & t, int64_t first, int64_t n) {
            if (t.device != nullptr) {
                return;
            }
            float values[CHUNK];
            char  bytes[CHUNK * sizeof(float)];
            inplace->values(t, branch, first, n, values);
            round_to(t.field.storage, values, n, bytes);
            char * const live  = t.copy.empty() ? (char *) t.live->data : (char *) t.copy.data();
            const size_t width = bytes_of(t.field.storage);
            t.for_places(first, n, [&](int64_t i, int64_t place) {
                std::memcpy(live + place, bytes + (size_t) i * width, width);
            });
        });
        for (const zo::inplace_tensor & t : inplace->tensors) {
            if (t.device != nullptr) {
                t.device->write(*inplace, t, branch);
            } else if (!t.copy.empty()) {
                ggml_backend_tensor_set(t.live, t.copy.data(), 0, t.copy.size());
            }
        }
        for (const zo::inplace_tensor & t : inplace->tensors) {
            if (t.device != nullptr) {
                t.device->finish();
            }
        }
        return ZO_OK;
    });
}
