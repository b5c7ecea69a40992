// Kernels compiled for several x86 levels. The best one that the CPU has is chosen at run time.
//
// The attribute target_clones would do the same with fewer lines, but GCC 11 takes no levels in it, and clang
// and MSVC differ again. Here a body is inlined into one caller per level, which GCC and clang both accept.

#pragma once

// A body that is compiled for several levels must be inlined, and so must everything that it calls.
#if defined(__GNUC__)
#define ZO_INLINE __attribute__((always_inline)) inline
#elif defined(_MSC_VER)
#define ZO_INLINE __forceinline
#else
#define ZO_INLINE inline
#endif

// What kernels on a GPU call as well.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define ZO_HD __host__ __device__ inline
#else
#define ZO_HD ZO_INLINE
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define ZO_X86_LEVELS
#define ZO_X86_V3 __attribute__((target("avx2,fma,bmi,bmi2")))
#define ZO_X86_V4 __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#endif

namespace zo {

#if defined(ZO_X86_LEVELS)
// 4, 3 or 1: the x86-64 level whose vector instructions this CPU has.
inline int find_x86_level() {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? 4 : v3 ? 3 : 1;
}

inline const int x86_level = find_x86_level();
#endif

// The versions of a body; it and they have the same parameters.
template <auto Body>
struct versions;

template <typename Result, typename... Parameters, Result (*Body)(Parameters...)>
struct versions<Body> {
#if defined(ZO_X86_LEVELS)
    ZO_X86_V3 static Result v3(Parameters... parameters) { return Body(parameters...); }
    ZO_X86_V4 static Result v4(Parameters... parameters) { return Body(parameters...); }
#endif
    static Result best(Parameters... parameters) {
#if defined(ZO_X86_LEVELS)
        if (x86_level >= 3) {
            return x86_level == 4 ? v4(parameters...) : v3(parameters...);
        }
#endif
        return Body(parameters...);
    }
};

// vectorized<body>(...) calls the version of an inline function that this CPU runs best.
template <auto Body>
inline constexpr auto vectorized = versions<Body>::best;

}  // namespace zo
