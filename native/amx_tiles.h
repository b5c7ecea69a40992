// For llama.cpp's sources, by -include, where GCC compiles them for AMX: what GCC's own definitions of these
// two do not say is that they read memory, so that stores to it are dropped (zo_gguf/amx.py). Others are
// right.

#pragma once

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char (*)[64])(config)))

#undef _tile_loadd
#define _tile_loadd(tile, base, stride) ZO_TILE_LOADD(tile, base, stride)
#define ZO_TILE_LOADD(tile, base, stride)                                                                    \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(base), "r"((long long) (stride)) : "memory")

#endif
