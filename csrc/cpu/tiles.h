// The shapes of AMX tiles. Compiled for that instruction set alone.
#pragma once

#include "cpu/simd.h"

#if defined(__AMX_BF16__)
namespace pyface::cpu::PYFACE_ISA {

// Gives AMX tiles their shapes, until `_tile_release`: 16 x 16 sums in 0-3, left factors of 16 rows in 4-5, right factors of
// 16 columns in 6-7, both of `step` numbers in the summed dimension.
PYFACE_INLINE void shape_tiles(int step) {
  struct alignas(64) {  // what LDTILECFG reads
    std::uint8_t palette, start, unused[14];
    std::uint16_t bytes[16];
    std::uint8_t rows[16];
  } shapes{};
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = i < 6 ? 16 : step / 2;
    shapes.bytes[i] = i == 4 || i == 5 ? step * sizeof(bf16) : 64;
  }
  asm volatile("" : : "r"(&shapes) : "memory");  // the intrinsic admits to reading 8 bytes only
  _tile_loadconfig(&shapes);
}

}  // namespace pyface::cpu::PYFACE_ISA
#endif
