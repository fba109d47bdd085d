// What the cores with register tiles share: the arithmetic of one multiplied type, transposition, loads and stores that end
// early, and the cutting of a scratch buffer into arrays. Compiled once per instruction set, like simd.h.
#pragma once

#include "cpu/simd.h"

namespace pyface::cpu::PYFACE_ISA {

PYFACE_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
PYFACE_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
PYFACE_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
PYFACE_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

// Arrays one after the other, each aligned to 64 bytes.
struct Carver {
  char* base;  // null: only count
  std::int64_t used = 0;
  template <class U>
  U* take(std::int64_t count) {
    U* p = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += round_up(count * (std::int64_t)sizeof(U), 64);
    return p;
  }
};

PYFACE_INLINE float widen(float v) { return v; }
PYFACE_INLINE double widen(double v) { return v; }
PYFACE_INLINE float widen(bf16 v) {
  const std::uint32_t bits = (std::uint32_t)v.bits << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

PYFACE_INLINE f32v rounded(f32v v) { return (f32v)(round_to_bf16(v) << 16); }
PYFACE_INLINE f64v rounded(f64v v) { return v; }

// ---- multiplication in one type -------------------------------------------------------------------------------------------
// `sum` is the vector of running sums; one step takes `pair` neighbouring numbers of either factor. Without a bf16 dot product,
// bf16 numbers are kept in float: the same roundings at float's speed.

template <class T>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  static constexpr int pair = 1;
  typedef f32v sum;
  typedef f32v operand;
  PYFACE_INLINE operand broadcast(const float* p) { return *p - operand{}; }
  PYFACE_INLINE sum multiply_add(operand x, operand w, sum s) { return s + x * w; }
  PYFACE_INLINE operand join(const sum v[pair]) { return v[0]; }
  PYFACE_INLINE void store_factors(float* p, sum v) { store(p, v); }
};

template <>
struct Arithmetic<double> {
  static constexpr int pair = 1;
  typedef f64v sum;
  typedef f64v operand;
  PYFACE_INLINE operand broadcast(const double* p) { return *p - operand{}; }
  PYFACE_INLINE sum multiply_add(operand x, operand w, sum s) { return s + x * w; }
  PYFACE_INLINE operand join(const sum v[pair]) { return v[0]; }
  PYFACE_INLINE void store_factors(double* p, sum v) { store(p, v); }
};

#if defined(__AVX512BF16__)
template <>
struct Arithmetic<bf16> {
  static constexpr int pair = 2;
  typedef f32v sum;
  typedef u32v operand;
  PYFACE_INLINE operand broadcast(const bf16* p) {
    std::uint32_t both;
    std::memcpy(&both, p, sizeof both);
    return both - operand{};
  }
  PYFACE_INLINE sum multiply_add(operand x, operand w, sum s) {
    return (f32v)_mm512_dpbf16_ps((__m512)s, (__m512bh)x, (__m512bh)w);
  }
  PYFACE_INLINE operand join(const sum v[pair]) { return round_to_bf16(v[0]) | (round_to_bf16(v[1]) << 16); }
  PYFACE_INLINE void store_factors(bf16* p, sum v) {
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
  }
};
#endif

// ---- small blocks of numbers ----------------------------------------------------------------------------------------------

// As many rows as a vector has lanes become columns.
template <class V>
PYFACE_INLINE void transpose(V v[Lanes<V>::count]) {
  constexpr int W = Lanes<V>::count;
  for (int n = 1; n < W; n *= 2) {
    V w[W];
    for (int i = 0; i < W / 2; ++i) interleave(v[i], v[i + W / 2], w[2 * i], w[2 * i + 1]);
    for (int i = 0; i < W; ++i) v[i] = w[i];
  }
}

// The sum of each of as many vectors as they have lanes, the i-th in lane i.
template <class V>
PYFACE_INLINE V reduce(V v[Lanes<V>::count]) {
  for (int n = Lanes<V>::count / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) {
      V low, high;
      interleave(v[i], v[i + n], low, high);
      v[i] = low + high;
    }
  return v[0];
}

// The first `count` elements from p on, `stride` apart; zero beyond.
template <class X>
PYFACE_INLINE typename Storage<X>::vector load_some(const X* p, std::int64_t stride, std::int64_t count) {
  typedef typename Storage<X>::vector V;
  if (stride == 1 && count >= Lanes<V>::count) return load(p);
  typename Storage<X>::compute row[Lanes<V>::count] = {};
  for (std::int64_t i = 0; i < count && i < Lanes<V>::count; ++i) row[i] = widen(p[i * stride]);
  return load(row);
}
template <class X>
PYFACE_INLINE void store_some(X* p, std::int64_t stride, std::int64_t count, typename Storage<X>::vector v) {
  constexpr int W = Lanes<typename Storage<X>::vector>::count;
  if (stride == 1 && count >= W) return store(p, v);
  X row[W];
  store(row, v);
  for (std::int64_t i = 0; i < count && i < W; ++i) p[i * stride] = row[i];
}

}  // namespace pyface::cpu::PYFACE_ISA
