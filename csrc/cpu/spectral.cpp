// High-pass filters as thin real matrix products, one read and one write of memory. See pyface/spectral.h for what is computed.
//
// Per plane:   1. T = U_y^T x       reads x row by row, rows t and H - t together (they share cosines, and sines but for a sign)
//              2. C = T U_x, the fix-up of its last harmonic, M = C U_x^T      small
//              3. low = U_y M       reads x again, from the cache, and writes y
// While step 3 of a plane runs, the next plane is fetched into the second-level cache, and during step 1 the lines of y.

#include "cpu/spectral.h"

#include "cpu/blocks.h"
#include "cpu/parallel.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 2;  // of neighbouring columns that share a coefficient, as far as registers go
#else
constexpr int kVectors = 1;
#endif
constexpr int kHarmonics = 5;                     // of step 1 at a time: their sums and the mean fill the registers
constexpr int kPairs = 4;                         // of rows in step 3
constexpr std::int64_t kBand = 32;                // pairs of rows of step 1 at a time: their columns stay in the first-level cache
constexpr std::int64_t kSerialElements = 16384;   // below this a team costs more than it saves

#define PYFACE_UNROLL _Pragma("GCC unroll 16")

template <class V>
constexpr int lanes = Lanes<V>::count;

// ---- loads and stores of whole and of short vectors -----------------------------------------------------------------------

#if defined(__AVX512F__)
PYFACE_INLINE f32v load_first(const float* p, int n) { return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
PYFACE_INLINE f64v load_first(const double* p, int n) { return (f64v)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
PYFACE_INLINE f32v load_first(const bf16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
PYFACE_INLINE f32v load_first(const f16* p, int n) {
  return (f32v)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
PYFACE_INLINE void store_first(float* p, f32v v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
PYFACE_INLINE void store_first(double* p, f64v v, int n) { _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v); }
template <class X>
PYFACE_INLINE void store_first(X* p, f32v v, int n) {
  __m256i h;
  store((X*)&h, v);
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), h);
}
#else
template <class X>
PYFACE_INLINE typename Storage<X>::vector load_first(const X* p, int n) {
  X padded[lanes<typename Storage<X>::vector>] = {};
  std::memcpy(padded, p, n * sizeof(X));
  return load(padded);
}
template <class X>
PYFACE_INLINE void store_first(X* p, typename Storage<X>::vector v, int n) {
  X padded[lanes<typename Storage<X>::vector>];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(X));
}
#endif

template <bool kFull, class X>
PYFACE_INLINE typename Storage<X>::vector load_up_to(const X* p, int n) {
  if constexpr (kFull) return load(p);
  return load_first(p, n);
}

// Bytes as wide integers, and back.
template <class V>
struct Bytes {
  typedef std::int8_t vector __attribute__((vector_size(Lanes<V>::count)));
  typedef typename Lanes<V>::mask wide;
};
template <class V, bool kFull>
PYFACE_INLINE typename Bytes<V>::vector load_bytes(const void* p, int n) {
  typename Bytes<V>::vector v = {};
#if defined(__AVX512F__)
  const __m128i all = kFull ? _mm_setzero_si128() : _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
  std::memcpy(&v, kFull ? p : &all, sizeof v);
#else
  std::memcpy(&v, p, kFull ? sizeof v : n);
#endif
  return v;
}

template <class T>
PYFACE_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
template <class T>
PYFACE_INLINE void prefetch_to_write(T* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*(const char*)p));  // does nothing where it is not known
#else
  __builtin_prefetch(p, 1, 2);
#endif
}

// ---- what differs between the tasks ---------------------------------------------------------------------------------------

enum class Result { high, masked, masked_and_sign, gradient };

// K is std::uint8_t for masks of bytes 0 and 1, else the arithmetic type.
template <class X, class K>
struct Image {
  const X* x;
  X* y;
  const K* keep;
  std::int8_t* sign;
  std::int64_t x_row, keep_row, row;  // row: of y and sign
};

// One row of it from a column on.
template <class X, class K>
struct Row {
  const X* x;
  X* y;
  const K* keep;
  std::int8_t* sign;
  std::int64_t x_row, keep_row, row;
  inline __attribute__((always_inline)) Row(const Image<X, K>& i, std::int64_t t, std::int64_t at)
      : x(i.x + t * i.x_row + at), y(i.y + t * i.row + at), keep(i.keep + t * i.keep_row + at), sign(i.sign + t * i.row + at),
        x_row(i.x_row), keep_row(i.keep_row), row(i.row) {}
  inline __attribute__((always_inline)) void move(std::int64_t rows) { x += rows * x_row, y += rows * row, keep += rows * keep_row, sign += rows * row; }
};

// (1 - keep) sign, as numbers.
template <class V, bool kFull, class K>
PYFACE_INLINE V signed_drop(const K* keep, const std::int8_t* sign, int n) {
  const auto s = load_bytes<V, kFull>(sign, n);
  if constexpr (sizeof(K) == 1) {
    const auto drop = load_bytes<V, kFull>(keep, n) - 1;  // 0 is kept, all bits are dropped
    return __builtin_convertvector(__builtin_convertvector(s & drop, typename Bytes<V>::wide), V);
  } else {
    return (1 - load_up_to<kFull>(keep, n)) * __builtin_convertvector(__builtin_convertvector(s, typename Bytes<V>::wide), V);
  }
}

// What is filtered, at a row and n columns from `at` on: x, or m x.
template <bool kSigned, bool kFull, class X, class K>
PYFACE_INLINE typename Storage<X>::vector source(const Row<X, K>& row, int at, int n) {
  typedef typename Storage<X>::vector V;
  const V v = load_up_to<kFull>(row.x + at, n);
  if constexpr (!kSigned) return v;
  return v * signed_drop<V, kFull>(row.keep + at, row.sign + at, n);
}

// x where keep is 1, else x - |high|.
template <bool kFull, class V>
PYFACE_INLINE V masked(V x, V high, const std::uint8_t* keep, int n) {
#if defined(__AVX512F__)
  const auto loaded = load_bytes<V, kFull>(keep, n);
  __m128i bytes = _mm_setzero_si128();
  std::memcpy(&bytes, &loaded, sizeof loaded);
  const __mmask16 drop = _mm_testn_epi8_mask(bytes, bytes);
  if constexpr (sizeof(x[0]) == 4)
    return (V)_mm512_mask_sub_ps((__m512)x, drop, (__m512)x, (__m512)absolute(high));
  else
    return (V)_mm512_mask_sub_pd((__m512d)x, (__mmask8)drop, (__m512d)x, (__m512d)absolute(high));
#else
  typedef typename Bytes<V>::wide I;
  const I drop = __builtin_convertvector(load_bytes<V, kFull>(keep, n), I) - 1;
  return x - (V)((I)absolute(high) & drop);
#endif
}
template <bool kFull, class V, class K>
PYFACE_INLINE V masked(V x, V high, const K* keep, int n) {
  return x - (1 - load_up_to<kFull>(keep, n)) * absolute(high);
}

template <class V>
PYFACE_INLINE typename Bytes<V>::vector signs(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) {
    const __m512 wide = (__m512)v, zero = _mm512_setzero_ps();
    return (typename Bytes<V>::vector)_mm_sub_epi8(_mm_movm_epi8(_mm512_cmp_ps_mask(wide, zero, _CMP_LT_OQ)),
                                                   _mm_movm_epi8(_mm512_cmp_ps_mask(wide, zero, _CMP_GT_OQ)));
  }
#endif
  return __builtin_convertvector((v < 0) - (v > 0), typename Bytes<V>::vector);
}

// The result there, given the low frequencies of what is filtered.
template <Result result, bool kFull, class X, class K, class V>
PYFACE_INLINE void finish(const Row<X, K>& row, int at, int n, V low) {
  const V v = load_up_to<kFull>(row.x + at, n);
  V y;
  if constexpr (result == Result::high) {
    y = v - low;
  } else if constexpr (result == Result::gradient) {
    const V m = signed_drop<V, kFull>(row.keep + at, row.sign + at, n);
    y = (v - m * v) + low;
  } else {
    const V high = v - low;
    y = masked<kFull>(v, high, row.keep + at, n);
    if constexpr (result == Result::masked_and_sign) {
      const auto sign = signs(high);
      std::memcpy(row.sign + at, &sign, kFull ? sizeof sign : n);
    }
  }
  X* p = row.y + at;
  if constexpr (kFull)
    store(p, y);
  else
    store_first(p, y, n);
}

// ---- step 1 ---------------------------------------------------------------------------------------------------------------

// Adds the share of the rows t and H - t, `begin` <= t < `end`, to harmonics [first, first + kCount) of n columns from `at` on;
// to the mean too when `first` is 0. The row after a half has no partner: then `zeros`, and its sine is 0.
template <bool kSigned, int kCount, bool kMean, bool kFull, class X, class K, class C>
void gather_block(const Image<X, K>& image, const Spectral& a, const C* table, int first, std::int64_t begin, std::int64_t end,
                  std::int64_t at, const int n[kVectors], C* sums, std::int64_t stride, bool fetch) {
  typedef typename Storage<X>::vector V;
  constexpr int L = lanes<V>;
  V mean[kVectors], cosine[kCount][kVectors], sine[kCount][kVectors];
  C* to = sums + at;
  C* harmonic = to + (1 + 2 * first) * stride;
  PYFACE_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (kMean) mean[v] = load(to + v * L);
    PYFACE_UNROLL
    for (int k = 0; k < kCount; ++k) {
      cosine[k][v] = load(harmonic + 2 * k * stride + v * L);
      sine[k][v] = load(harmonic + (2 * k + 1) * stride + v * L);
    }
  }
  Row<X, K> top(image, begin, at), bottom(image, begin ? a.height - begin : 0, at);
  const std::int64_t rank = a.rows.rank, middle = a.height % 2 ? a.height : a.height / 2;
  const C* factor = table + begin * rank + 1 + 2 * first;
  for (std::int64_t t = begin; t < end; ++t, factor += rank) {
    V even[kVectors], odd[kVectors];
    PYFACE_UNROLL
    for (int v = 0; v < kVectors; ++v) even[v] = source<kSigned, kFull>(top, v * L, n[v]), odd[v] = V{};
    if (t != 0 && t != middle) {
      PYFACE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V other = source<kSigned, kFull>(bottom, v * L, n[v]);
        odd[v] = even[v] - other, even[v] += other;
      }
    }
    if (fetch) {
      for (int byte = 0; byte < (int)sizeof(X) * kVectors * L; byte += 64) {
        prefetch_to_write((char*)top.y + byte);
        prefetch_to_write((char*)bottom.y + byte);
      }
    }
    top.move(1);
    bottom.move(t ? -1 : a.height - 1);
    PYFACE_UNROLL
    for (int k = 0; k < kCount; ++k) {
      PYFACE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        cosine[k][v] += factor[2 * k] * even[v];
        sine[k][v] += factor[2 * k + 1] * odd[v];
      }
    }
    if (kMean) {
      PYFACE_UNROLL
      for (int v = 0; v < kVectors; ++v) mean[v] += even[v];
    }
  }
  PYFACE_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (kMean) store(to + v * L, mean[v]);
    PYFACE_UNROLL
    for (int k = 0; k < kCount; ++k) {
      store(harmonic + 2 * k * stride + v * L, cosine[k][v]);
      store(harmonic + (2 * k + 1) * stride + v * L, sine[k][v]);
    }
  }
}

// `count` harmonics from `first` on. At the edge of an image five (ACMF's) or one at a time: less code.
template <bool kSigned, class X, class K, class C, class... Rest>
void gather_some(bool full, int count, const Image<X, K>& image, const Spectral& a, const C* table, int first, Rest... rest) {
  if (!full) {
    if (first == 0 && count == 5) return gather_block<kSigned, 5, true, false>(image, a, table, 0, rest...);
    if (first == 0) gather_block<kSigned, 0, true, false>(image, a, table, 0, rest...);
    for (; count; --count) gather_block<kSigned, 1, false, false>(image, a, table, first++, rest...);
  } else if (first == 0) {
    switch (count) {
      case 0: return gather_block<kSigned, 0, true, true>(image, a, table, 0, rest...);
      case 1: return gather_block<kSigned, 1, true, true>(image, a, table, 0, rest...);
      case 2: return gather_block<kSigned, 2, true, true>(image, a, table, 0, rest...);
      case 3: return gather_block<kSigned, 3, true, true>(image, a, table, 0, rest...);
      case 4: return gather_block<kSigned, 4, true, true>(image, a, table, 0, rest...);
      default: return gather_block<kSigned, 5, true, true>(image, a, table, 0, rest...);
    }
  } else {
    switch (count) {  // six harmonics or more in even shares of at most five
      case 3: return gather_block<kSigned, 3, false, true>(image, a, table, first, rest...);
      case 4: return gather_block<kSigned, 4, false, true>(image, a, table, first, rest...);
      default: return gather_block<kSigned, 5, false, true>(image, a, table, first, rest...);
    }
  }
}

// T of the columns [from, to): `sums` is [rank][stride].
template <bool kSigned, class X, class K, class C>
void gather(const Image<X, K>& image, const Spectral& a, std::int64_t from, std::int64_t to, C* sums, std::int64_t stride,
            bool fetch) {
  typedef typename Storage<X>::vector V;
  constexpr int L = lanes<V>;
  const C* table = (const C*)a.rows.table;
  const int harmonics = (int)(a.rows.rank / 2);
  const int chunks = (int)larger(1, ceil_div(harmonics, kHarmonics));
  const std::int64_t padded = smaller(round_up(to, kVectors * L), stride);
  for (std::int64_t r = 0; r < a.rows.rank; ++r) std::memset(sums + r * stride + from, 0, (padded - from) * sizeof(C));
  const std::int64_t units = a.height / 2 + 1;
  for (std::int64_t begin = 0; begin < units; begin += kBand) {
    const std::int64_t end = smaller(begin + kBand, units);
    for (std::int64_t at = from; at < to; at += kVectors * L) {
      int n[kVectors];
      for (int v = 0; v < kVectors; ++v) n[v] = (int)larger(0, smaller(L, to - at - v * L));
      const bool full = n[kVectors - 1] == L;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int first = harmonics * chunk / chunks, count = harmonics * (chunk + 1) / chunks - first;
        gather_some<kSigned>(full, count, image, a, table, first, begin, end, at, n, sums, stride, fetch && full && chunk == 0);
      }
    }
  }
  for (std::int64_t c = from; c < padded; c += L) store(sums + c, load(sums + c) * table[0]);
}

// ---- step 2 ---------------------------------------------------------------------------------------------------------------

// kRows rows of C: their sums over w of T[r][w * channels] U_x[w][j], lanes of j from `j` on.
template <int kRows, class C, class V>
void project_rows(const C* sums, std::int64_t stride, const Spectral& a, std::int64_t j, C* small, V) {
  const C* table = (const C*)a.columns.table + j;
  V sum[kRows] = {};
  for (std::int64_t w = 0; w < a.width; ++w, table += a.columns.padded, sums += a.channels) {
    const V u = load(table);
    PYFACE_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] += sums[r * stride] * u;
  }
  PYFACE_UNROLL
  for (int r = 0; r < kRows; ++r) store(small + r * a.columns.padded + j, sum[r]);
}

// kRows rows of M = C U_x^T, written over T.
template <int kRows, class C, class V>
void expand_rows(C* sums, std::int64_t stride, const Spectral& a, const C* small, V) {
  constexpr int L = lanes<V>;
  const std::int64_t turned = round_up(a.width, 16);
  for (std::int64_t w = 0; w < a.width; w += L) {
    const C* table = (const C*)a.columns_turned + w;
    V sum[kRows] = {};
    for (std::int64_t j = 0; j < a.columns.rank; ++j, table += turned) {
      const V u = load(table);
      PYFACE_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] += small[r * a.columns.padded + j] * u;
    }
    PYFACE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      C* to = sums + r * stride + w * a.channels;
      if (a.channels == 1) {
        store(to, sum[r]);
      } else {
        for (int i = 0; i < L && w + i < a.width; ++i) to[i * a.channels] = sum[r][i];
      }
    }
  }
}

// T becomes M, both [rank][stride].
template <class C, class V>
void transform(C* sums, std::int64_t stride, const Spectral& a, C* small, V v) {
  constexpr int L = lanes<V>;
  const std::int64_t rank = a.rows.rank, padded = a.columns.padded, columns = a.columns.rank;
  for (std::int64_t channel = 0; channel < a.channels; ++channel, ++sums) {
    std::int64_t r = 0;
    for (; r + 8 <= rank; r += 8)
      for (std::int64_t j = 0; j < columns; j += L) project_rows<8>(sums + r * stride, stride, a, j, small + r * padded, v);
    for (; r + 3 <= rank; r += 3)
      for (std::int64_t j = 0; j < columns; j += L) project_rows<3>(sums + r * stride, stride, a, j, small + r * padded, v);
    for (; r < rank; ++r)
      for (std::int64_t j = 0; j < columns; j += L) project_rows<1>(sums + r * stride, stride, a, j, small + r * padded, v);
    if (a.edge) {
      C* c = small + (rank - 2) * padded + columns - 2;  // cosine and sine of the last harmonic of either axis
      C* s = c + padded;
      const C cc = c[0], cs = c[1], sc = s[0], ss = s[1];
      c[0] = cc - ss, c[1] = s[0] = cs + sc, s[1] = ss - cc;
    }
    for (r = 0; r + 8 <= rank; r += 8) expand_rows<8>(sums + r * stride, stride, a, small + r * padded, v);
    for (; r + 3 <= rank; r += 3) expand_rows<3>(sums + r * stride, stride, a, small + r * padded, v);
    for (; r < rank; ++r) expand_rows<1>(sums + r * stride, stride, a, small + r * padded, v);
  }
}

// ---- step 3 ---------------------------------------------------------------------------------------------------------------

// Rows t..t + kCount - 1 and their partners, n columns from `at` on.
template <Result result, int kCount, bool kFull, class X, class K, class C>
PYFACE_INLINE void spread_block(const Image<X, K>& image, const Spectral& a, std::int64_t t, std::int64_t at,
                                const int n[kVectors], const C* sums, std::int64_t stride, const X* next) {
  typedef typename Storage<X>::vector V;
  constexpr int L = lanes<V>;
  const C* factor = (const C*)a.rows.table + t * a.rows.rank;
  V even[kCount][kVectors] = {}, odd[kCount][kVectors] = {};
  PYFACE_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const V m = load(sums + at + v * L);
    PYFACE_UNROLL
    for (int p = 0; p < kCount; ++p) even[p][v] += factor[p * a.rows.rank] * m;
  }
  const C* m = sums + at + stride;
  for (std::int64_t r = 1; r < a.rows.rank; r += 2, m += 2 * stride) {
    PYFACE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const V cosine = load(m + v * L), sine = load(m + stride + v * L);
      PYFACE_UNROLL
      for (int p = 0; p < kCount; ++p) {
        even[p][v] += factor[p * a.rows.rank + r] * cosine;
        odd[p][v] += factor[p * a.rows.rank + r + 1] * sine;
      }
    }
  }
  Row<X, K> top(image, t, at), bottom(image, t ? a.height - t : 0, at);
  const std::int64_t middle = a.height % 2 ? a.height : a.height / 2, ahead = next ? next - image.x : 0;
  PYFACE_UNROLL
  for (int p = 0; p < kCount; ++p) {
    PYFACE_UNROLL
    for (int v = 0; v < kVectors; ++v) finish<result, kFull>(top, v * L, n[v], even[p][v] + odd[p][v]);
    if (t + p != 0 && t + p != middle) {
      PYFACE_UNROLL
      for (int v = 0; v < kVectors; ++v) finish<result, kFull>(bottom, v * L, n[v], even[p][v] - odd[p][v]);
    }
    if (kFull && ahead) {
      PYFACE_UNROLL
      for (int byte = 0; byte < (int)sizeof(X) * kVectors * L; byte += 64) {
        prefetch((const char*)(top.x + ahead) + byte);
        prefetch((const char*)(bottom.x + ahead) + byte);
      }
    }
    top.move(1);
    bottom.move(t + p ? -1 : a.height - 1);
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// y of the pairs of rows [begin, end).
template <Result result, class X, class K, class C>
void spread(const Image<X, K>& image, const Spectral& a, std::int64_t begin, std::int64_t end, const C* sums,
            std::int64_t stride, const X* next) {
  constexpr int L = lanes<typename Storage<X>::vector>;
  const std::int64_t columns = a.width * a.channels;
  auto walk = [&](auto pairs, std::int64_t t) {
    constexpr int kCount = decltype(pairs)::value;
    std::int64_t at = 0;
    int n[kVectors];
    for (int v = 0; v < kVectors; ++v) n[v] = L;
    for (; at + kVectors * L <= columns; at += kVectors * L)
      spread_block<result, kCount, true>(image, a, t, at, n, sums, stride, next);
    if (at < columns) {
      for (int v = 0; v < kVectors; ++v) n[v] = (int)larger(0, smaller(L, columns - at - v * L));
      spread_block<result, kCount, false>(image, a, t, at, n, sums, stride, next);
    }
  };
  std::int64_t t = begin;
  for (; t + kPairs <= end; t += kPairs) walk(Count<kPairs>{}, t);
  for (; t < end; ++t) walk(Count<1>{}, t);
}

// ---- all planes -----------------------------------------------------------------------------------------------------------

template <class X, class K>
Image<X, K> image_of(const Spectral& a, std::int64_t plane) {
  const std::int64_t outer = plane / a.inner, inner = plane % a.inner, row = a.width * a.channels, dense = plane * a.height * row;
  return {(const X*)a.x + outer * a.x_stride[0] + inner * a.x_stride[1],
          (X*)a.y + dense,
          (const K*)a.keep + outer * a.keep_stride[0] + inner * a.keep_stride[1],
          a.sign ? a.sign + dense : nullptr,
          a.x_stride[2],
          a.keep_stride[2],
          row};
}

// How the work is cut: whole planes for each thread, or, for few large ones, steps over columns and rows of all planes.
template <class C>
struct Plan {
  std::int64_t planes, columns, stride, sums, small, slots;
  bool whole;
  Plan(const Spectral& a, int threads) {
    planes = a.outer * a.inner, columns = a.width * a.channels;
    // vectors of the last block are whole, and rows of sums do not lie a power of two apart
    stride = round_up(columns, 64) + 16;
    sums = round_up(a.rows.rank * stride, 16), small = round_up(a.rows.rank * a.columns.padded, 16);
    whole = threads == 1 || planes >= 4 * threads || a.height * columns < kSerialElements;
    slots = whole ? smaller(threads, planes) : planes;
  }
  std::int64_t bytes() const { return round_up(slots * (sums + small) * (std::int64_t)sizeof(C), 64); }
};

int team(const Spectral& a, int threads) {
  return a.outer * a.inner * a.height * a.width * a.channels < kSerialElements ? 1 : threads;
}

template <Result result, class X, class K>
void run(const Spectral& a, void* scratch, int threads) {
  typedef typename Storage<X>::compute C;
  typedef typename Storage<X>::vector V;
  const Plan<C> plan(a, threads);
  C* base = (C*)scratch;
  // without signs, keep makes no difference to step 1: one piece of code for all
  auto gathered = [](const Image<X, K>& i) {
    if constexpr (result == Result::gradient) return i;
    else return Image<X, std::uint8_t>{i.x, i.y, nullptr, nullptr, i.x_row, 0, i.row};
  };
  auto sums_of = [&](std::int64_t slot) { return base + slot * (plan.sums + plan.small); };
  const std::int64_t units = a.height / 2 + 1;
  if (plan.whole) {
    parallel_for(threads, plan.slots, [&](std::int64_t slot, std::int64_t last) {
      const std::int64_t begin = plan.planes * slot / plan.slots, end = plan.planes * last / plan.slots;
      C* sums = sums_of(slot);
      for (std::int64_t plane = begin; plane < end; ++plane) {
        const auto image = image_of<X, K>(a, plane);
        gather<result == Result::gradient>(gathered(image), a, 0, plan.columns, sums, plan.stride, true);
        transform(sums, plan.stride, a, sums + plan.sums, V{});
        spread<result>(image, a, 0, units, sums, plan.stride,
                       plane + 1 < end ? image_of<X, K>(a, plane + 1).x : nullptr);
      }
    });
    return;
  }
  const std::int64_t width = kVectors * lanes<V>;
  const std::int64_t across = ceil_div(plan.columns, 2 * width), down = ceil_div(units, 2 * kPairs);
  parallel_for(threads, plan.planes * across, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task_number = begin; task_number < end; ++task_number) {
      const std::int64_t plane = task_number / across, from = task_number % across * 2 * width;
      gather<result == Result::gradient>(gathered(image_of<X, K>(a, plane)), a, from, smaller(from + 2 * width, plan.columns), sums_of(plane), plan.stride,
                   false);
    }
  });
  parallel_for(threads, plan.planes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t plane = begin; plane < end; ++plane)
      transform(sums_of(plane), plan.stride, a, sums_of(plane) + plan.sums, V{});
  });
  parallel_for(threads, plan.planes * down, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task_number = begin; task_number < end; ++task_number) {
      const std::int64_t plane = task_number / down, from = task_number % down * 2 * kPairs;
      spread<result>(image_of<X, K>(a, plane), a, from, smaller(from + 2 * kPairs, units), sums_of(plane), plan.stride,
                     (const X*)nullptr);
    }
  });
}

template <class X, class K>
void pick_result(const Spectral& a, void* scratch, int threads) {
  switch (a.task) {
    case SpectralTask::high_pass: return run<Result::high, X, std::uint8_t>(a, scratch, threads);
    case SpectralTask::mask:
      return a.sign ? run<Result::masked_and_sign, X, K>(a, scratch, threads) : run<Result::masked, X, K>(a, scratch, threads);
    case SpectralTask::mask_backward: return run<Result::gradient, X, K>(a, scratch, threads);
  }
}

template <class X>
void pick_keep(const Spectral& a, void* scratch, int threads) {
  a.keep_is_bool || a.task == SpectralTask::high_pass ? pick_result<X, std::uint8_t>(a, scratch, threads)
                                                      : pick_result<X, typename Storage<X>::compute>(a, scratch, threads);
}

}  // namespace

std::int64_t spectral_scratch(const Spectral& args, int threads) {
  threads = team(args, threads);
  return args.type == DType::f64 ? Plan<double>(args, threads).bytes() : Plan<float>(args, threads).bytes();
}

void spectral(const Spectral& args, void* scratch, int threads) {
  threads = team(args, threads);
  switch (args.type) {
    case DType::f64: return pick_keep<double>(args, scratch, threads);
    case DType::bf16: return pick_keep<bf16>(args, scratch, threads);
    case DType::f16: return pick_keep<f16>(args, scratch, threads);
    default: return pick_keep<float>(args, scratch, threads);
  }
}

}  // namespace pyface::cpu::PYFACE_ISA
