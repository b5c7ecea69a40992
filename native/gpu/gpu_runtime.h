// The device runtime under CUDA's names, and memory on a device that frees itself.
//
// HIP has the same calls under other names. A test includes a stand-in that runs kernels on the CPU.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace zo {
inline std::atomic<int64_t> n_launches{ 0 };  // of kernels, on all devices: tests ask whether any ran
}

#if defined(ZO_GPU_STAND_IN)
#include "gpu_stand_in.h"
#elif defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define cudaDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define cudaDevAttrMaxSharedMemoryPerBlockOptin hipDeviceAttributeMaxSharedMemoryPerBlock
#define cudaDeviceGetAttribute hipDeviceGetAttribute
#define cudaDeviceAttr hipDeviceAttribute_t
#define cudaError_t hipError_t
#define cudaFree hipFree
#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncSetAttribute hipFuncSetAttribute
#define cudaFuncAttributes hipFuncAttributes
#define cudaFuncGetAttributes hipFuncGetAttributes
#define cudaGetDevice hipGetDevice
#define cudaGetDeviceCount hipGetDeviceCount
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaMalloc hipMalloc
#define cudaMemcpyAsync hipMemcpyAsync
#define cudaMemcpyDeviceToHost hipMemcpyDeviceToHost
#define cudaMemcpyHostToDevice hipMemcpyHostToDevice
#define cudaMemoryTypeDevice hipMemoryTypeDevice
#define cudaMemoryTypeManaged hipMemoryTypeManaged
#define cudaPointerAttributes hipPointerAttribute_t
#define cudaPointerGetAttributes hipPointerGetAttributes
#define cudaSetDevice hipSetDevice
#define cudaStreamCreateWithFlags hipStreamCreateWithFlags
#define cudaStreamDestroy hipStreamDestroy
#define cudaStreamNonBlocking hipStreamNonBlocking
#define cudaStreamSynchronize hipStreamSynchronize
#define cudaStream_t hipStream_t
#define cudaSuccess hipSuccess
#else
#include <cuda_runtime.h>
#endif

#if !defined(ZO_GPU_STAND_IN)
#define ZO_DYNAMIC_SHARED(type, name)                                                                        \
    extern __shared__ __align__(16) char name##_[];                                                          \
    type * const                         name = reinterpret_cast<type *>(name##_)
#endif

namespace zo {

// Lanes that exchange values; on hardware with wider warps, a part of one.
constexpr int LANES = 32;

inline void check(cudaError_t status, const char * what) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // said here, and not of what comes next
        throw std::runtime_error(std::string(what) + " on the GPU failed: " + cudaGetErrorString(status));
    }
}

#if !defined(ZO_GPU_STAND_IN)
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int n_threads, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
    n_launches += 1;
    kernel<<<grid, (unsigned) n_threads, shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError(), "a kernel");
}

// The value of the lane whose number differs by `mask`.
template <typename T>
__device__ inline T lane_xor(T value, int mask) {
#if defined(__HIPCC__)
    return __shfl_xor(value, mask, LANES);
#else
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask, LANES);
#endif
}
#endif

// Makes a device the current one, for as long as this lives: the engine may count on its own.
class on_device {
public:
    explicit on_device(int device) {
        check(cudaGetDevice(&before_), "asking which is in use");
        if (device != before_) {
            check(cudaSetDevice(device), "choosing it");
            changed_ = true;
        }
    }
    on_device(const on_device &)             = delete;
    on_device & operator=(const on_device &) = delete;
    ~on_device() {
        if (changed_) {
            cudaSetDevice(before_);
        }
    }

private:
    int  before_  = 0;
    bool changed_ = false;
};

// n values of T in a device's memory; the device must be the current one.
template <typename T>
class device_array {
public:
    device_array() = default;
    device_array(device_array && other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    device_array & operator=(device_array &&) = delete;
    ~device_array() { cudaFree(data_); }

    T *    data() const { return data_; }
    size_t size() const { return size_; }

    // Room for n values; what was there may be lost.
    void reserve(size_t n) {
        if (n > size_) {
            cudaFree(data_);
            data_ = nullptr;
            size_ = 0;
            check(cudaMalloc(reinterpret_cast<void **>(&data_), n * sizeof(T)), "reserving memory");
            size_ = n;
        }
    }
    void upload(const T * host, size_t n, cudaStream_t stream) {
        reserve(n);
        if (n > 0) {
            check(cudaMemcpyAsync(data_, host, n * sizeof(T), cudaMemcpyHostToDevice, stream), "a copy");
        }
    }

private:
    T *    data_ = nullptr;
    size_t size_ = 0;
};

// A small array that is copied to the device whenever it changed; not before the last copy is finished.
template <typename T>
class mirror {
public:
    const T * follow(const std::vector<T> & now, cudaStream_t stream) {
        const size_t n_bytes = now.size() * sizeof(T);
        if (!there_ || now.size() != host_.size() || std::memcmp(now.data(), host_.data(), n_bytes) != 0) {
            there_ = false;
            host_  = now;  // the copy may still be under way when `now` is gone
            device_.upload(host_.data(), host_.size(), stream);
            there_ = true;
        }
        return device_.data();
    }

private:
    bool            there_ = false;
    std::vector<T>  host_;
    device_array<T> device_;
};

}  // namespace zo
