// Vectors for one instruction set: native-width float and double vectors, loads and stores of every storage type, and the few
// transcendental functions the cores need.
//
// This header is compiled once per instruction set (the build passes -DPYFACE_ISA=baseline|avx2|avx512 and the matching
// -m flags). Everything sits in the namespace of that set and no standard-library template is used, so that the linker can
// never hand AVX-512 code of an inline function to a machine without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pyface/types.h"

namespace pyface::cpu::PYFACE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define PYFACE_INLINE static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(kVectorBytes)));
typedef double f64v __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t i32v __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t u32v __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t i64v __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t u16v __attribute__((vector_size(kVectorBytes / 2)));

// Storage types. Arithmetic on bf16 and f16 happens in float.
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

template <class T>
struct Storage;
template <>
struct Storage<float> {
  typedef float compute;
  typedef f32v vector;
};
template <>
struct Storage<bf16> {
  typedef float compute;
  typedef f32v vector;
};
template <>
struct Storage<f16> {
  typedef float compute;
  typedef f32v vector;
};
template <>
struct Storage<double> {
  typedef double compute;
  typedef f64v vector;
};

template <class V>
struct Lanes;
template <>
struct Lanes<f32v> {
  static constexpr int count = kVectorBytes / 4;
  typedef i32v mask;
  typedef float scalar;
};
template <>
struct Lanes<f64v> {
  static constexpr int count = kVectorBytes / 8;
  typedef i64v mask;
  typedef double scalar;
};

// ---- loads and stores -------------------------------------------------------------------------------------------------------

PYFACE_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PYFACE_INLINE f64v load(const double* p) {
  f64v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PYFACE_INLINE f32v load(const bf16* p) {
  u16v h;
  std::memcpy(&h, p, sizeof h);
  return (f32v)(__builtin_convertvector(h, u32v) << 16);
}

PYFACE_INLINE f32v load(const f16* p) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  u16v h;
  std::memcpy(&h, p, sizeof h);
  const u32v bits = __builtin_convertvector(h, u32v), sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  // the exponent moves by 112 = 127 - 15; subnormal numbers are whole multiples of 2^-24
  const u32v normal = (rest << 13) + (112u << 23);
  const f32v tiny = __builtin_convertvector((i32v)rest, f32v) * 5.9604644775390625e-8f;
  const u32v wide = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : rest < 0x400u ? (u32v)tiny : normal;
  return (f32v)(wide | sign);
#endif
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
PYFACE_INLINE u32v round_to_bf16(f32v v) {
  u32v bits = (u32v)v;
  u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  u32v quiet = (bits >> 16) | 0x40u;
  return v == v ? rounded : quiet;
}

PYFACE_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }
PYFACE_INLINE void store(double* p, f64v v) { std::memcpy(p, &v, sizeof v); }
PYFACE_INLINE void store(bf16* p, f32v v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // the same, but for numbers below 2^-126, which become 0
#else
  u16v h = __builtin_convertvector(round_to_bf16(v), u16v);
#endif
  std::memcpy(p, &h, sizeof h);
}
PYFACE_INLINE void store(f16* p, f32v v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const u32v bits = (u32v)v, sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  // normal: round the mantissa to 10 bits in place (a carry moves the exponent, up to infinity), then move the exponent
  const u32v normal = (rest + 0xfffu + ((rest >> 13) & 1u) - (112u << 23)) >> 13;
  // below 2^-14 the sum with 1/2 has its last bit at 2^-24: the addition rounds
  const u32v tiny = (u32v)((f32v)rest + 0.5f) - 0x3f000000u;
  u32v half = rest < 0x38800000u ? tiny : rest >= 0x477ff000u ? 0x7c00u + u32v{} : normal;
  half = rest > 0x7f800000u ? ((rest >> 13) & 0x3ffu) | 0x7e00u : half;
  const u16v h = __builtin_convertvector(half | sign, u16v);
  std::memcpy(p, &h, sizeof h);
#endif
}

// Stores that bypass the caches, for results too large to be found there again. The address must be aligned to the vector.
PYFACE_INLINE void store_streaming(float* p, f32v v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
PYFACE_INLINE void store_streaming(double* p, f64v v) { store_streaming((float*)p, (f32v)v); }
PYFACE_INLINE void store_streaming(bf16* p, f32v v) { store(p, v); }  // half a vector: not worth a path of its own
PYFACE_INLINE void store_streaming(f16* p, f32v v) { store(p, v); }

PYFACE_INLINE void streaming_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
PYFACE_INLINE bool is_vector_aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % kVectorBytes == 0;
}

// ---- small helpers ----------------------------------------------------------------------------------------------------------

template <class V>
PYFACE_INLINE V splat(typename Lanes<V>::scalar value) {
  return value - V{};  // a broadcast, where adding to zero would have to turn -0 into 0
}

PYFACE_INLINE f32v absolute(f32v v) { return (f32v)((i32v)v & 0x7fffffff); }
PYFACE_INLINE f64v absolute(f64v v) { return (f64v)((i64v)v & 0x7fffffffffffffffLL); }
PYFACE_INLINE f32v copy_sign(f32v magnitude, f32v sign) {
  return (f32v)(((i32v)magnitude & 0x7fffffff) | ((i32v)sign & (std::int32_t)0x80000000));
}
PYFACE_INLINE f64v copy_sign(f64v magnitude, f64v sign) {
  return (f64v)(((i64v)magnitude & 0x7fffffffffffffffLL) | ((i64v)sign & (std::int64_t)0x8000000000000000ULL));
}

// Even and odd ones of 2W neighbouring elements, and back.
template <class V>
PYFACE_INLINE void deinterleave(V low, V high, V& even, V& odd) {
  typename Lanes<V>::mask e, o;
  for (int i = 0; i < Lanes<V>::count; ++i) e[i] = 2 * i, o[i] = 2 * i + 1;
  even = __builtin_shuffle(low, high, e);
  odd = __builtin_shuffle(low, high, o);
}
template <class V>
PYFACE_INLINE void interleave(V even, V odd, V& low, V& high) {
  constexpr int W = Lanes<V>::count;
  typename Lanes<V>::mask l, h;
  for (int i = 0; i < W; ++i) l[i] = i / 2 + (i % 2) * W, h[i] = W / 2 + i / 2 + (i % 2) * W;
  low = __builtin_shuffle(even, odd, l);
  high = __builtin_shuffle(even, odd, h);
}

// Sum of all lanes, in double and in lane order.
template <class V>
PYFACE_INLINE double sum_lanes(V v) {
  double total = 0;
  for (int i = 0; i < Lanes<V>::count; ++i) total += v[i];
  return total;
}

// 1 / d for 1 <= d <= 2 (or NaN), error about one unit in the last place: an estimate and a Newton step where that beats a division.
PYFACE_INLINE f32v reciprocal(f32v d) {
#if defined(__AVX512F__)
  f32v r = (f32v)_mm512_rcp14_ps((__m512)d);
  return r * (2.0f - d * r);
#else
  return 1.0f / d;
#endif
}
PYFACE_INLINE f64v reciprocal(f64v d) { return 1.0 / d; }

// ---- exponentials -----------------------------------------------------------------------------------------------------------

// e^x = scale * (1 + p): x = k ln2 + r, scale = 2^k, p = e^r - 1 (relative error 1.3e-8). NaN passes through p.
struct ExpParts {
  f32v p;
  i32v k;
};
PYFACE_INLINE ExpParts exp_parts(f32v x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  f32v z = x * 1.44269504f + magic;
  i32v k = (i32v)z - (i32v)splat<f32v>(magic);
  z -= magic;
  f32v r = x - z * 0.693359375f;
  r = r - z * -2.12194440e-4f;
  f32v q = 1.394645092e-03f * r + 8.366584204e-03f;
  q = q * r + 4.166628201e-02f;
  q = q * r + 1.666654299e-01f;
  q = q * r + 5.000000062e-01f;
  return {r * r * q + r, k};
}
PYFACE_INLINE f32v power_of_two(i32v k) { return (f32v)((k + 127) << 23); }  // -126 <= k <= 127

// e^x - 1 for x <= 0 with full relative accuracy near 0, and e^x with full relative accuracy far from it.
struct Exp32 {
  f32v minus_one, value;
};
struct Exp64 {
  f64v minus_one, value;
};
PYFACE_INLINE Exp32 exp_nonpositive(f32v x) {
  auto underflows = x < -87.0f;
  ExpParts e = exp_parts(underflows ? splat<f32v>(-87.0f) : x);
  f32v scale = power_of_two(e.k);
  f32v value = scale * e.p + scale;
  return {scale * e.p + (scale - 1.0f), underflows ? splat<f32v>(0.0f) : value};
}
PYFACE_INLINE Exp64 exp_nonpositive(f64v x) {
  Exp64 e;
  for (int i = 0; i < Lanes<f64v>::count; ++i) e.minus_one[i] = ::expm1(x[i]), e.value[i] = ::exp(x[i]);
  return e;
}

// e^x for |x| <= 87 (or NaN).
PYFACE_INLINE f32v exp_small(f32v x) {
  ExpParts e = exp_parts(x);
  f32v scale = power_of_two(e.k);
  return scale * e.p + scale;
}
PYFACE_INLINE f64v exp_small(f64v x) {
  f64v y;
  for (int i = 0; i < Lanes<f64v>::count; ++i) y[i] = ::exp(x[i]);
  return y;
}

// e^x for any x: infinity above the range, gradual underflow to 0 below it (2^k applied in two halves).
PYFACE_INLINE f32v exp_any(f32v x) {
  x = x < -104.0f ? splat<f32v>(-104.0f) : x;
  x = x > 89.0f ? splat<f32v>(89.0f) : x;
  ExpParts e = exp_parts(x);
  i32v half = e.k >> 1;
  f32v low = power_of_two(half);
  return (low * e.p + low) * power_of_two(e.k - half);
}
PYFACE_INLINE f64v exp_any(f64v x) { return exp_small(x); }

// atan of any x (relative error 2e-8 before rounding).
PYFACE_INLINE f32v arc_tangent(f32v x) {
  f32v a = absolute(x);
  auto large = a > 1.0f;
  f32v z = large ? 1.0f / a : a;
  f32v w = z * z;
  f32v q = 2.920680851e-03f * w - 1.636788581e-02f;
  q = q * w + 4.321179779e-02f;
  q = q * w - 7.552209436e-02f;
  q = q * w + 1.066600260e-01f;
  q = q * w - 1.421105485e-01f;
  q = q * w + 1.999377279e-01f;
  q = q * w - 3.333315273e-01f;
  f32v y = q * w * z + z;
  y = large ? 1.57079632679f - y : y;
  return copy_sign(y, x);
}
PYFACE_INLINE f64v arc_tangent(f64v x) {
  f64v y;
  for (int i = 0; i < Lanes<f64v>::count; ++i) y[i] = ::atan(x[i]);
  return y;
}

}  // namespace pyface::cpu::PYFACE_ISA
