// For llama.cpp's sources, by -include, where GCC compiles them for AMX (zo_gguf/amx.py). What GCC's own
// definitions of these two do not say is that they read memory, so that stores to it are dropped. Others are
// right.

#pragma once

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

// llama.cpp loads its configuration once per thread, with a flag set behind this. Other libraries that use
// tiles there, as PyTorch does for bfloat16, leave none: so it returns before the flag, and loads it for
// every product.
#define _tile_loadconfig(config)                                                                             \
    do {                                                                                                     \
        __asm__ volatile("ldtilecfg %0" : : "m"(*(const char (*)[64])(config)));                             \
        return;                                                                                              \
    } while (0)

#undef _tile_loadd
#define _tile_loadd(tile, base, stride) ZO_TILE_LOADD(tile, base, stride)
#define ZO_TILE_LOADD(tile, base, stride)                                                                    \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(base), "r"((long long) (stride)) : "memory")

#endif
