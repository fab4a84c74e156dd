// For building the peer with GCC 12.2, perhaps with others, on a processor with AMX (README.md, "The peer").
//
// That compiler's _tile_loadconfig says that it reads 8 bytes of the 64 of a tile configuration, so the stores to the
// others are optimised away and the first AMX product is a general protection fault (GCC bug 114098). This one names
// all 64. Pass it with -include; llama.cpp's sources stay as they are.
#pragma once
#ifdef __AMX_TILE__
#include <immintrin.h>

static inline void load_tile_config(const void *config) {
    __asm__ volatile("ldtilecfg %0" ::"m"(*static_cast<const char(*)[64]>(config)));
}
#define _tile_loadconfig load_tile_config
#endif
