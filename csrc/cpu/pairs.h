// Products of bf16 matrices with float sums, on AMX tiles or by dot products of pairs: c = a x with the numbers of the summed
// dimension side by side in the left factor and in pairs in the right one. Compiled once per instruction set, like simd.h.
#pragma once

#include "cpu/blocks.h"
#include "cpu/tiles.h"

#if defined(__AVX512BF16__)
namespace pyface::cpu::PYFACE_ISA {

typedef std::uint32_t bf16_pair;  // the earlier number in the low half

constexpr int kPairLanes = 16;     // columns of a vector of sums
constexpr std::int64_t kTurn = 32; // numbers of the summed dimension that are taken at once

// The numbers of the two halves of a vector as pairs.
PYFACE_INLINE u32v pairs_of_halves(__m512i halves) {
  typedef std::uint16_t u16w __attribute__((vector_size(kVectorBytes)));
  u16w turns;
  for (int i = 0; i < 2 * kPairLanes; ++i) turns[i] = i / 2 + i % 2 * kPairLanes;
  return (u32v)_mm512_permutexvar_epi16((__m512i)turns, halves);
}
PYFACE_INLINE u32v pairs_of(f32v first, f32v second) {
  return pairs_of_halves((__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
PYFACE_INLINE u32v pairs_of(const bf16* first, const bf16* second) {
  const __m256i low = _mm256_loadu_si256((const __m256i*)first), high = _mm256_loadu_si256((const __m256i*)second);
  return pairs_of_halves(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// A block of 16 x 16 pairs on its other side.
PYFACE_INLINE void transpose_pairs(u32v v[kPairLanes]) {
  f32v block[kPairLanes];
  for (int i = 0; i < kPairLanes; ++i) block[i] = (f32v)v[i];
  transpose<f32v>(block);
  for (int i = 0; i < kPairLanes; ++i) v[i] = (u32v)block[i];
}

#if defined(__AMX_BF16__)

// Sums in tiles 0-3; M x N of them are used. Left factors in 4-5, right ones in 6-7: see `shape_tiles`.
template <int M, int N>
PYFACE_INLINE void multiply_tiles(const bf16* a, std::int64_t a_row, const bf16_pair* x, std::int64_t x_row, std::int64_t turns,
                                  float* c, std::int64_t c_row, bool add) {
  const std::int64_t a_bytes = a_row * 2, x_bytes = x_row * 4, c_bytes = c_row * 4;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (N > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (M > 1) _tile_loadd(2, c + 16 * c_row, c_bytes);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; turns > 0; --turns, a += kTurn, x += kTurn / 2 * x_row) {
    _tile_loadd(6, x, x_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, x + 16, x_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, a + 16 * a_row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (N > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (M > 1) _tile_stored(2, c + 16 * c_row, c_bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * c_row + 16, c_bytes);
}

constexpr int kPairRows = 32;
template <int N, class... Args>
PYFACE_INLINE void multiply_rows(std::int64_t rows, Args... args) {
  if (rows > 16)
    multiply_tiles<2, N>(args...);
  else
    multiply_tiles<1, N>(args...);
}

#else

constexpr int kPairRows = 8;
template <int N>
PYFACE_INLINE void multiply_rows(std::int64_t, const bf16* a, std::int64_t a_row, const bf16_pair* x, std::int64_t x_row,
                                 std::int64_t turns, float* c, std::int64_t c_row, bool add) {
  f32v sums[kPairRows][N];
  for (int r = 0; r < kPairRows; ++r)
    for (int n = 0; n < N; ++n) sums[r][n] = add ? load(c + r * c_row + n * kPairLanes) : f32v{};
  for (std::int64_t k = 0; k < turns * (kTurn / 2); ++k) {
    u32v right[N];
    for (int n = 0; n < N; ++n) std::memcpy(&right[n], x + k * x_row + n * kPairLanes, sizeof right[n]);
    for (int r = 0; r < kPairRows; ++r) {
      const u32v left = Arithmetic<bf16>::broadcast(a + r * a_row + 2 * k);
      for (int n = 0; n < N; ++n) sums[r][n] = Arithmetic<bf16>::multiply_add(right[n], left, sums[r][n]);
    }
  }
  for (int r = 0; r < kPairRows; ++r)
    for (int n = 0; n < N; ++n) store(c + r * c_row + n * kPairLanes, sums[r][n]);
}

#endif

// c[row][column] (+)= sum over 32 `turns` numbers k of a[row][k] * x[k / 2][column][k % 2], for one or two vectors of columns.
// Rows up to the next multiple of 16 are computed too, from whatever lies there. On AMX inside `Tiles`, and never inlined:
// GCC does not know that loading a tile reads memory.
__attribute__((noinline)) inline void multiply_pairs(const bf16* a, std::int64_t a_row, std::int64_t rows, const bf16_pair* x, std::int64_t x_row,
                           int vectors, std::int64_t turns, float* c, std::int64_t c_row, bool add) {
  for (std::int64_t r = 0; r < rows; r += kPairRows) {
    if (vectors > 1)
      multiply_rows<2>(rows - r, a + r * a_row, a_row, x, x_row, turns, c + r * c_row, c_row, add);
    else
      multiply_rows<1>(rows - r, a + r * a_row, a_row, x, x_row, turns, c + r * c_row, c_row, add);
  }
}

// The tiles' shapes, for as long as this lives.
struct Tiles {
#if defined(__AMX_BF16__)
  Tiles() { shape_tiles(kTurn); }
  ~Tiles() { _tile_release(); }
#endif
};

}  // namespace pyface::cpu::PYFACE_ISA
#endif
