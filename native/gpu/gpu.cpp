#include "gpu/gpu.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ggml-backend.h"

// What the names of a backend's buffers begin with.
#ifndef ZO_GPU_BUFFERS
#define ZO_GPU_BUFFERS "CUDA"
#endif

namespace zo {

gpu * gpus::of(const ggml_tensor * t) {
    ggml_backend_buffer * buffer = t->view_src != nullptr ? t->view_src->buffer : t->buffer;
    if (buffer == nullptr) {
        return nullptr;
    }
    const char * name = ggml_backend_buffer_name(buffer);
    if (std::strstr(name, "Split") != nullptr || std::strstr(name, "Meta") != nullptr) {
        throw std::runtime_error(std::string("the tensor ") + t->name +
                                 " lies in pieces on several devices; load the model with split_mode layer");
    }
#ifdef ZO_GPU
    if (std::strncmp(name, ZO_GPU_BUFFERS, std::strlen(ZO_GPU_BUFFERS)) != 0) {
        return nullptr;
    }
    const int device = gpu_holding(t->data);
    if (device < 0) {
        return nullptr;
    }
    if (devices_.size() <= (size_t) device) {
        devices_.resize((size_t) device + 1);
    }
    if (devices_[(size_t) device] == nullptr) {
        const char * reorder = std::getenv("GGML_CUDA_GRAPH_OPT");
        if (reorder != nullptr && std::strcmp(reorder, "1") == 0) {
            throw std::runtime_error("GGML_CUDA_GRAPH_OPT=1 runs products side by side; unset it to tune");
        }
        devices_[(size_t) device] = make_gpu(device);
    }
    return devices_[(size_t) device].get();
#else
    return nullptr;
#endif
}

std::unique_ptr<gpu> open_gpu(int device) {
#ifdef ZO_GPU
    if (device >= 0 && device < count_gpus()) {
        return make_gpu(device);
    }
#endif
    throw std::runtime_error("there is no GPU number " + std::to_string(device) +
                             " that libzo has kernels for");
}

}  // namespace zo

int32_t zo_gpu_count(void) {
#ifdef ZO_GPU
    return zo::count_gpus();
#else
    return 0;
#endif
}

int64_t zo_gpu_launches(void) {
#ifdef ZO_GPU
    return zo::count_launches();
#else
    return 0;
#endif
}

const char * zo_gpu_kernels(void) {
#ifdef ZO_GPU
    return ZO_GPU_BUFFERS;
#else
    return "";
#endif
}
