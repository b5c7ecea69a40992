// CUDA's runtime as far as libzo uses it, on the CPU: every thread of a block is a fiber.
//
// Fibers run one after another, up to the next barrier or exchange of values between lanes; then all that
// wait for the same thing go on. A barrier that some threads never reach, or an exchange that some lanes
// miss, ends the process with a message: on a GPU it would hang, or give garbage. Device memory is host
// memory, and all of it counts as device 0.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace stand_in {

enum class state { ready, at_barrier, at_exchange, done };

struct fiber {
    ucontext_t              first{};  // its start
    jmp_buf                 here;     // where it waits; unlike swapcontext, without system calls
    bool                    started = false;
    std::unique_ptr<char[]> stack;
    state                   is = state::ready;
    double                  given;  // to the other lanes
};

constexpr size_t STACK = 64 << 10;
constexpr int    WARP  = 32;

struct machine {
    dim3                  thread, block, block_size, grid_size;
    std::vector<char>     shared;
    std::deque<fiber>     fibers;  // that stay where they are
    jmp_buf               scheduler;
    int                   running = 0;
    std::function<void()> kernel;

    static machine & get() {
        static machine one;
        return one;
    }

    static void enter() {
        machine & m = get();
        for (;;) {  // a fiber is used again for the next block
            m.kernel();
            m.wait(state::done);
        }
    }

    void wait(state until) {
        fiber & self = fibers[(size_t) running];
        self.is      = until;
        if (_setjmp(self.here) == 0) {
            _longjmp(scheduler, 1);
        }
    }

    void resume(fiber & f) {
        if (_setjmp(scheduler) != 0) {
            return;
        }
        if (f.started) {
            _longjmp(f.here, 1);
        }
        f.started = true;
        setcontext(&f.first);
    }

    void run_block(int n_threads) {
        for (int i = (int) fibers.size(); i < n_threads; ++i) {
            fibers.emplace_back();
            fiber & f = fibers.back();
            f.stack   = std::make_unique<char[]>(STACK);
            getcontext(&f.first);
            f.first.uc_stack.ss_sp   = f.stack.get();
            f.first.uc_stack.ss_size = STACK;
            makecontext(&f.first, enter, 0);
        }
        for (int i = 0; i < n_threads; ++i) {
            fibers[(size_t) i].is = state::ready;
        }
        for (;;) {
            for (int i = 0; i < n_threads; ++i) {
                if (fibers[(size_t) i].is == state::ready) {
                    running = i;
                    thread  = dim3((unsigned) i, 0, 0);
                    resume(fibers[(size_t) i]);
                }
            }
            if (all(0, n_threads, state::done)) {
                return;
            }
            bool moved = release(0, n_threads, state::at_barrier);
            for (int first = 0; first < n_threads; first += WARP) {
                moved = release(first, std::min(n_threads, first + WARP), state::at_exchange) || moved;
            }
            if (!moved) {
                std::fprintf(stderr, "a barrier or an exchange was not reached by all threads\n");
                std::abort();
            }
        }
    }

    bool all(int first, int end, state wanted) const {
        for (int i = first; i < end; ++i) {
            if (fibers[(size_t) i].is != wanted) {
                return false;
            }
        }
        return true;
    }

    bool release(int first, int end, state wanted) {
        if (!all(first, end, wanted)) {
            return false;
        }
        for (int i = first; i < end; ++i) {
            fibers[(size_t) i].is = state::ready;
        }
        return true;
    }
};

}  // namespace stand_in

#define threadIdx (stand_in::machine::get().thread)
#define blockIdx (stand_in::machine::get().block)
#define blockDim (stand_in::machine::get().block_size)
#define gridDim (stand_in::machine::get().grid_size)

#define ZO_DYNAMIC_SHARED(type, name)                                                                        \
    type * const name = reinterpret_cast<type *>(stand_in::machine::get().shared.data())

inline void __syncthreads() {
    stand_in::machine::get().wait(stand_in::state::at_barrier);
}

// ---- the runtime ------------------------------------------------------------------------------------

using cudaError_t  = int;
using cudaStream_t = void *;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum { cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
struct cudaFuncAttributes {};
enum { cudaStreamNonBlocking = 1, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaPointerAttributes {
    int type, device;
};

inline const char * cudaGetErrorString(int) {
    return "out of memory";
}
inline int cudaGetLastError() {
    return cudaSuccess;
}
inline int cudaGetDeviceCount(int * n) {
    *n = 1;
    return cudaSuccess;
}
inline int cudaGetDevice(int * device) {
    *device = 0;
    return cudaSuccess;
}
inline int cudaFuncGetAttributes(cudaFuncAttributes *, const void *) {
    return cudaSuccess;
}
inline int cudaSetDevice(int) {
    return cudaSuccess;
}
inline int cudaDeviceGetAttribute(int * value, cudaDeviceAttr which, int) {
    // Small on purpose, so that small models take the ways of large ones.
    const char * shared = std::getenv("ZO_STAND_IN_SHARED");
    *value =
        which == cudaDevAttrMultiProcessorCount ? 2 : (shared != nullptr ? std::atoi(shared) : 4096) + 1024;
    return cudaSuccess;
}
inline int cudaMalloc(void ** data, size_t n_bytes) {
    *data = std::malloc(n_bytes);
    if (*data != nullptr) {
        std::memset(*data, 0x7F, n_bytes);  // what is read before it is written shows
    }
    return *data != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline int cudaFree(void * data) {
    std::free(data);
    return cudaSuccess;
}
inline int cudaMemcpyAsync(void * to, const void * from, size_t n_bytes, int, cudaStream_t) {
    std::memcpy(to, from, n_bytes);
    return cudaSuccess;
}
inline int cudaStreamCreateWithFlags(cudaStream_t * stream, int) {
    *stream = nullptr;
    return cudaSuccess;
}
inline int cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
inline int cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}
inline int cudaFuncSetAttribute(const void *, int, int) {
    return cudaSuccess;
}
inline int cudaPointerGetAttributes(cudaPointerAttributes * attributes, const void *) {
    *attributes = { cudaMemoryTypeDevice, 0 };
    return cudaSuccess;
}

namespace zo {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int n_threads, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
    stand_in::machine & m = stand_in::machine::get();
    if (shared_bytes > (64 << 10)) {
        std::fprintf(stderr, "a block asks for more shared memory than there is beside what it declares\n");
        std::abort();
    }
    m.shared.assign(shared_bytes, 0x7F);
    m.block_size = dim3((unsigned) n_threads);
    m.grid_size  = grid;
    m.kernel     = [&] { kernel(arguments...); };
    n_launches += 1;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            m.block = dim3(x, y, 0);
            m.run_block(n_threads);
        }
    }
}

template <typename T>
T lane_xor(T value, int mask) {
    stand_in::machine & m         = stand_in::machine::get();
    const int           self      = m.running;
    m.fibers[(size_t) self].given = (double) value;
    m.wait(stand_in::state::at_exchange);
    const T other = (T) m.fibers[(size_t) (self ^ mask)].given;
    m.wait(stand_in::state::at_exchange);  // all have read before anyone gives the next
    return other;
}

}  // namespace zo
