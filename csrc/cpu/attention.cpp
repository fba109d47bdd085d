// Attention block by block with queries in the lanes: the block's queries are transposed once, rows of keys and values are
// read where they lie and broadcast, so the extra rows are nothing but the first rows of the list, and maxima, sums and
// rescaling are vertical. Nothing of the size of the scores leaves the cache.
//
// Where there are dot products or tiles for bf16, its products are taken on them, from copies that lie as those need it.
//
// Going back, a task is a head: it owns every gradient it writes, except that of shared extra rows, which it leaves as a part
// of its own for `attention_sum`.
#include "cpu/attention.h"

#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/pairs.h"
#include "cpu/parallel.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

constexpr int kVectors = kVectorBytes == 64 ? 5 : 2;  // of queries in a block

// Sums held at a time beside N vectors: enough to hide the latency of a multiplication, as many as registers allow, and with
// 32 registers a divisor of the 16 keys between two steps of a causal block.
template <int N>
constexpr int kTile = kVectorBytes == 64 ? (N == 1 ? 16 : N <= 3 ? 8 : 4) : (N == 1 ? 8 : 6);
constexpr std::int64_t kBlock = 128;                       // rows of the list whose scores are held
constexpr std::int64_t kSerial = 1 << 19;                  // products below which a team costs more than it saves

template <int N>
struct Number {
  static constexpr int value = N;
};

template <class C>
using Vector = typename Storage<C>::vector;

#if defined(__AVX512F__)
// 2^whole * p; 0 where x is below `least`, without the slow way that the processor takes through numbers below 2^-126.
PYFACE_INLINE f32v power(f32v x, float least, f32v whole, f32v p) {
  const __mmask16 most = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return (f32v)_mm512_maskz_scalef_ps(most, (__m512)p, (__m512)whole);
}
PYFACE_INLINE f32v nearest(f32v x) {
  return (f32v)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// e^x for x <= 0, of minus infinity too: the steps of `exp_parts`, but for the scaling.
PYFACE_INLINE f32v exponential(f32v x) {
  const f32v z = nearest(x * 1.44269504f);
  f32v r = x - z * 0.693359375f;
  r = r - z * -2.12194440e-4f;
  f32v q = 1.394645092e-03f * r + 8.366584204e-03f;
  q = q * r + 4.166628201e-02f;
  q = q * r + 1.666654299e-01f;
  q = q * r + 5.000000062e-01f;
  q = q * r + 1.0f;
  return power(x, -87.0f, z, q * r + 1.0f);
}

// 2^x for x <= 0, of minus infinity too, with a relative error of 3e-6: enough before it is rounded to bf16.
PYFACE_INLINE f32v power_roughly(f32v x) {
  const f32v z = nearest(x), r = x - z;
  f32v q = 9.60099e-03f * r + 5.591617e-02f;
  q = q * r + 2.4023707e-01f;
  q = q * r + 6.9312215e-01f;
  return power(x, -125.0f, z, q * r + 1.0f);
}
#else
PYFACE_INLINE f32v exponential(f32v x) { return exp_nonpositive(x).value; }
#endif
PYFACE_INLINE f64v exponential(f64v x) { return exp_small(x); }  // of minus infinity too: it is ::exp

// The natural logarithm of a sum of exponentials: at least 1 wherever it is not 0 (-inf) or NaN. Error below 1e-7 relative to
// max(1, |log|): a mantissa in [sqrt(1/2), sqrt(2)) and the series of atanh.
PYFACE_INLINE f32v logarithm(f32v x) {
  const i32v bits = (i32v)x;
  i32v exponent = ((bits - 0x3f3504f3) >> 23);
  const f32v mantissa = (f32v)(bits - (exponent << 23));
  const f32v t = (mantissa - 1.0f) / (mantissa + 1.0f), w = t * t;
  f32v q = 0.2220008f * w + 0.2857143f;
  q = q * w + 0.4f;
  q = q * w + 0.66666667f;
  const f32v e = __builtin_convertvector(exponent, f32v);
  f32v y = e * 0.693147182f + (t * 2.0f + t * w * q);
  y = x == 0.0f ? splat<f32v>(-INFINITY) : y;
  return x == x && x < INFINITY ? y : x;
}
PYFACE_INLINE f64v logarithm(f64v x) {
  f64v y;
  for (int i = 0; i < Lanes<f64v>::count; ++i) y[i] = ::log(x[i]);
  return y;
}

template <class T>
PYFACE_INLINE const T* row_of(const AttentionTensor& t, std::int64_t b, std::int64_t h, std::int64_t row) {
  return (const T*)t.data + b * t.strides[0] + h * t.strides[1] + row * t.strides[2];
}

// Rows of the task that comes next, on their way to the second cache while this one is computed: a few lines at a time, for
// no more can be on their way at once. More rows than `kAhead` are left to the hardware, which follows them well once they
// have begun.
constexpr std::int64_t kAhead = 256;
constexpr int kLines = 20;  // for every tile of a product

class Ahead {
 public:
  template <class T>
  void add(const AttentionTensor& t, std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t count,
           std::int64_t columns, bool written = false) {
    Part p{(const char*)row_of<T>(t, b, h, first), t.strides[2] * (std::int64_t)sizeof(T), smaller(count, kAhead), 0, written};
    const std::int64_t bytes = columns * (std::int64_t)sizeof(T);
    if (p.stride == bytes && p.rows > 0) p.lines = ceil_div(p.rows * bytes, 64), p.rows = 1;
    if (!p.lines) p.lines = ceil_div(bytes, 64);
    if (p.rows > 0) parts_[count_++] = p;
  }

  void some(int lines) {
    for (; lines > 0 && part_ < count_; --lines) {
      Part& p = parts_[part_];
      if (p.written)
        __builtin_prefetch(p.at + 64 * line_, 1);
      else
        __builtin_prefetch(p.at + 64 * line_, 0, 2);
      if (++line_ < p.lines) continue;
      line_ = 0, p.at += p.stride;
      if (--p.rows == 0) ++part_;
    }
  }

 private:
  struct Part {
    const char* at;
    std::int64_t stride, rows, lines;
    bool written;
  };
  Part parts_[8];
  int part_ = 0, count_ = 0;
  std::int64_t line_ = 0;
};

// Rows [first, last) of a tensor as rows of C, in `wide` if they are stored in another type.
template <class C>
void point(const AttentionTensor& t, DType type, std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t last,
           std::int64_t columns, C* wide, const C** rows) {
  if (type == DType::bf16) {
    for (std::int64_t i = first; i < last; ++i) {
      const bf16* from = row_of<bf16>(t, b, h, i);
      C* to = wide + (i - first) * columns;
      for (std::int64_t e = 0; e < columns; ++e) to[e] = (C)widen(from[e]);
      rows[i - first] = to;
    }
  } else {  // C itself: float beside bf16 and float, double beside double
    for (std::int64_t i = first; i < last; ++i) rows[i - first] = row_of<C>(t, b, h, i);
  }
}

// Rows [first, last) of the list: the extra rows, then the keys (or values).
template <class C>
void point_list(const AttentionCall& a, const AttentionTensor& extra, const AttentionTensor& own, std::int64_t b,
                std::int64_t h, std::int64_t first, std::int64_t last, std::int64_t columns, C* wide, const C** rows) {
  const std::int64_t end = smaller(last, a.extras);
  if (first < end) point(extra, a.extra_type, b, h, first, end, columns, wide, rows);
  const std::int64_t begin = larger(first, a.extras);
  if (begin < last)
    point(own, a.type, b, h, begin - a.extras, last - a.extras, columns, wide + (begin - first) * columns,
          rows + (begin - first));
}

// out[column][lane] = factor * rows[lane][column], zero for lanes from `count` on.
template <class C>
void pack(const C* const* rows, std::int64_t count, std::int64_t columns, C factor, std::int64_t pitch, C* out, Ahead& next) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  for (std::int64_t i = 0; i < pitch; i += W) {
    std::int64_t e = 0;
    for (; e + W <= columns; e += W) {
      next.some(4);
      V block[W] = {};
      for (int k = 0; k < W && i + k < count; ++k) block[k] = load(rows[i + k] + e) * factor;
      transpose<V>(block);
      for (int k = 0; k < W; ++k) store(out + (e + k) * pitch + i, block[k]);
    }
    for (; e < columns; ++e)
      for (int k = 0; k < W; ++k) out[e * pitch + i + k] = i + k < count ? rows[i + k][e] * factor : (C)0;
  }
}

// The other way: row `lane` of a tensor gets in[column][lane] * factor[lane].
template <class C, class T>
void unpack(const C* in, std::int64_t pitch, std::int64_t count, std::int64_t columns, const C* factor, T* out,
            std::int64_t stride) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  for (std::int64_t i = 0; i < count; i += W) {
    const V scale = load(factor + i);
    for (std::int64_t e = 0; e < columns; e += W) {
      V block[W];
      for (int k = 0; k < W; ++k) block[k] = e + k < columns ? load(in + (e + k) * pitch + i) * scale : V{};
      transpose<V>(block);
      for (int k = 0; k < W && i + k < count; ++k) store_some(out + (i + k) * stride + e, 1, columns - e, block[k]);
    }
  }
}

// ---- products -----------------------------------------------------------------------------------------------------------
// A block of lanes lies in arrays [row or column][pitch]. `at` is the first vector that takes part.

// st[key][lane] = sum over e of xt[e][lane] * rows[key][e]
template <class C, int N, int K>
PYFACE_INLINE void dots(const C* xt, std::int64_t pitch, std::int64_t depth, const C* const* rows, C* st) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  V sums[K][N] = {};
  for (std::int64_t e = 0; e < depth; ++e) {
    V x[N];
    for (int v = 0; v < N; ++v) x[v] = load(xt + e * pitch + v * W);
    for (int k = 0; k < K; ++k) {
      const V y = splat<V>(rows[k][e]);
      for (int v = 0; v < N; ++v) sums[k][v] += x[v] * y;
    }
  }
  for (int k = 0; k < K; ++k)
    for (int v = 0; v < N; ++v) store(st + k * pitch + v * W, sums[k][v]);
}

template <class C, int N, int K = kTile<N>>
void dots_of(const C* xt, std::int64_t pitch, std::int64_t depth, const C* const* rows, std::int64_t count, C* st, Ahead& next) {
  std::int64_t k = 0;
  for (; k + K <= count; k += K) {
    next.some(kLines);
    dots<C, N, K>(xt, pitch, depth, rows + k, st + k * pitch);
  }
  if constexpr (K > 1)
    if (k < count) dots_of<C, N, K / 2>(xt, pitch, depth, rows + k, count - k, st + k * pitch, next);
}

// ot[e][lane] += sum over keys of st[key][lane] * rows[key][e]
template <class C, int N, int E>
PYFACE_INLINE void sum_rows(const C* st, std::int64_t pitch, const C* const* rows, std::int64_t count, std::int64_t e, C* ot) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  V sums[E][N];
  for (int c = 0; c < E; ++c)
    for (int v = 0; v < N; ++v) sums[c][v] = load(ot + (e + c) * pitch + v * W);
  for (std::int64_t k = 0; k < count; ++k) {
    V p[N];
    for (int v = 0; v < N; ++v) p[v] = load(st + k * pitch + v * W);
    for (int c = 0; c < E; ++c) {
      const V y = splat<V>(rows[k][e + c]);
      for (int v = 0; v < N; ++v) sums[c][v] += p[v] * y;
    }
  }
  for (int c = 0; c < E; ++c)
    for (int v = 0; v < N; ++v) store(ot + (e + c) * pitch + v * W, sums[c][v]);
}

template <class C, int N, int E = kTile<N>>
void sum_rows_of(const C* st, std::int64_t pitch, const C* const* rows, std::int64_t count, std::int64_t width, C* ot,
                 Ahead& next, std::int64_t e = 0) {
  for (; e + E <= width; e += E) {
    next.some(kLines);
    sum_rows<C, N, E>(st, pitch, rows, count, e, ot);
  }
  if constexpr (E > 1)
    if (e < width) sum_rows_of<C, N, E / 2>(st, pitch, rows, count, width, ot, next, e);
}

template <class C>
void any_dots(int vectors, const C* xt, std::int64_t pitch, std::int64_t depth, const C* const* rows, std::int64_t count,
              C* st, Ahead& next) {
  switch (vectors) {
    case 1: return dots_of<C, 1>(xt, pitch, depth, rows, count, st, next);
    case 2: return dots_of<C, 2>(xt, pitch, depth, rows, count, st, next);
#if defined(__AVX512F__)
    case 3: return dots_of<C, 3>(xt, pitch, depth, rows, count, st, next);
    case 4: return dots_of<C, 4>(xt, pitch, depth, rows, count, st, next);
    case 5: return dots_of<C, 5>(xt, pitch, depth, rows, count, st, next);
#endif
  }
}

template <class C>
void any_sum_rows(int vectors, const C* st, std::int64_t pitch, const C* const* rows, std::int64_t count, std::int64_t width,
                  C* ot, Ahead& next) {
  switch (vectors) {
    case 1: return sum_rows_of<C, 1>(st, pitch, rows, count, width, ot, next);
    case 2: return sum_rows_of<C, 2>(st, pitch, rows, count, width, ot, next);
#if defined(__AVX512F__)
    case 3: return sum_rows_of<C, 3>(st, pitch, rows, count, width, ot, next);
    case 4: return sum_rows_of<C, 4>(st, pitch, rows, count, width, ot, next);
    case 5: return sum_rows_of<C, 5>(st, pitch, rows, count, width, ot, next);
#endif
  }
}

// out[key][:] (+)= factor * sum over lanes [first, last) of st[key][lane] * rows[lane][:]
template <class C, int K, int N>
PYFACE_INLINE void scatter_tile(const C* st, std::int64_t pitch, const C* const* rows, std::int64_t first, std::int64_t last,
                                std::int64_t e, C factor, bool add, C* const* out) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  V sums[K][N] = {};
  for (std::int64_t i = first; i < last; ++i) {
    V x[N];
    for (int v = 0; v < N; ++v) x[v] = load(rows[i] + e + v * W);
    for (int k = 0; k < K; ++k) {
      const V y = splat<V>(st[k * pitch + i]);
      for (int v = 0; v < N; ++v) sums[k][v] += x[v] * y;
    }
  }
  for (int k = 0; k < K; ++k)
    for (int v = 0; v < N; ++v) {
      C* to = out[k] + e + v * W;
      store(to, add ? load(to) + sums[k][v] * factor : sums[k][v] * factor);
    }
}

template <class C, int K>
void scatter_keys(const C* st, std::int64_t pitch, const C* const* rows, std::int64_t first, std::int64_t last,
                  std::int64_t columns, C factor, bool add, C* const* out) {
  constexpr int W = Lanes<Vector<C>>::count;
  constexpr int N = kVectorBytes == 64 ? 4 : 2;
  std::int64_t e = 0;
  for (; e + N * W <= columns; e += N * W) scatter_tile<C, K, N>(st, pitch, rows, first, last, e, factor, add, out);
  for (; e + W <= columns; e += W) scatter_tile<C, K, 1>(st, pitch, rows, first, last, e, factor, add, out);
  for (; e < columns; ++e)
    for (int k = 0; k < K; ++k) {
      C sum = 0;
      for (std::int64_t i = first; i < last; ++i) sum += st[k * pitch + i] * rows[i][e];
      out[k][e] = (add ? out[k][e] : 0) + sum * factor;
    }
}

// ---- what a block of queries sees ---------------------------------------------------------------------------------------

struct Block {
  std::int64_t first, count;  // queries
  int vectors;
  std::int64_t pitch;

  // Rows of the list that query i sees (i may be a lane beyond the last query).
  static std::int64_t seen(const AttentionCall& a, std::int64_t i) {
    const std::int64_t keys = a.causal ? i + a.keys - a.queries + 1 : a.keys;
    return a.extras + (keys < 0 ? 0 : smaller(keys, a.keys));
  }
  std::int64_t last_query(int vector, int lanes) const { return smaller(first + (vector + 1) * lanes, first + count) - 1; }
  // Rows that some, and that all, of a vector's queries see.
  std::int64_t some(const AttentionCall& a, int vector, int lanes) const { return seen(a, last_query(vector, lanes)); }
  std::int64_t all(const AttentionCall& a, int vector, int lanes) const { return seen(a, first + vector * lanes); }
};

struct Plan {
  std::int64_t blocks;
  int vectors;  // of every block but the last, which may have fewer
};

template <class C>
Plan plan(const AttentionCall& a) {
  constexpr int W = Lanes<Vector<C>>::count;
  const std::int64_t vectors = larger(ceil_div(a.queries, W), 1), blocks = ceil_div(vectors, kVectors);
  return {blocks, (int)ceil_div(vectors, blocks)};
}

template <class C>
Block block_of(const AttentionCall& a, const Plan& p, std::int64_t index) {
  constexpr int W = Lanes<Vector<C>>::count;
  const std::int64_t first = index * p.vectors * W, count = larger(smaller(p.vectors * W, a.queries - first), 0);
  const int vectors = (int)ceil_div(count, W);
  return {first, count, vectors, (std::int64_t)vectors * W};
}

// Calls work(first vector, begin, end) for ranges of rows [begin, end) of [first, last) that the same vectors see.
template <class C, class Work>
void ranges(const AttentionCall& a, const Block& q, std::int64_t first, std::int64_t last, Work work) {
  constexpr int W = Lanes<Vector<C>>::count;
  for (int v = 0; v < q.vectors && first < last; ++v) {
    const std::int64_t end = smaller(last, q.some(a, v, W));
    if (first < end) work(v, first, end), first = end;
  }
}

template <class V>
PYFACE_INLINE typename Lanes<V>::mask lane_numbers() {
  typename Lanes<V>::mask lanes;
  for (int i = 0; i < Lanes<V>::count; ++i) lanes[i] = i;
  return lanes;
}

// All ones in the lanes of a vector whose queries see row n of the list; n is not an extra row.
template <class V>
PYFACE_INLINE typename Lanes<V>::mask sees(const AttentionCall& a, std::int64_t vector_first, std::int64_t n) {
  typedef typename Lanes<V>::mask M;
  const std::int64_t least = n - a.extras - (a.keys - a.queries) - vector_first;  // lanes from this one on
  const std::int64_t held = least < 0 ? 0 : smaller(least, Lanes<V>::count);
  M bound;
  for (int i = 0; i < Lanes<V>::count; ++i) bound[i] = held;
  return (M)(lane_numbers<V>() >= bound);
}

// The spatial prior of a vector's queries.
template <class C>
struct Prior {
  typedef Vector<C> V;
  V centre[2], sharpness[2];

  Prior(const AttentionCall& a, std::int64_t head, const Block& q, int vector) {
    constexpr int W = Lanes<V>::count;
    C values[4][W] = {};
    const C* all = (const C*)a.prior + head * a.queries * 4;
    for (int i = 0; i < W && vector * W + i < q.count; ++i)
      for (int k = 0; k < 4; ++k) values[k][i] = all[(q.first + vector * W + i) * 4 + k];
    for (int k = 0; k < 2; ++k) centre[k] = load(values[k]), sharpness[k] = load(values[2 + k]) / (C)a.smooth;
  }
  V away(int axis, C at) const { return centre[axis] - at; }
};

template <class C>
PYFACE_INLINE C place(const AttentionCall& a, std::int64_t key, int axis) {
  return (C)(axis ? key / a.grid_width : key % a.grid_width);
}

// Scores of rows [n0, n1) of the list for the vector `v` of a block, finished: with bias, prior, minus infinity where a query
// does not see, and the scale if the products are without it. Returns the largest.
template <bool Scaled, class C>
Vector<C> finish_scores(const AttentionCall& a, std::int64_t b, std::int64_t h, const Block& q, int v, std::int64_t n0,
                        std::int64_t n1, C* st) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  if (!Scaled)
    for (std::int64_t n = n0; n < n1; ++n) {
      C* at = st + (n - n0) * q.pitch + v * W;
      store(at, load(at) * (C)a.scale);
    }
  const std::int64_t all = q.all(a, v, W);
  V most = splat<V>(-std::numeric_limits<C>::infinity());
  std::int64_t n = n0;
  const C* bias = (const C*)a.bias;
  for (; n < smaller(n1, a.extras); ++n) {
    C* at = st + (n - n0) * q.pitch + v * W;
    V s = load(at);
    if (bias) s += bias[h * a.bias_strides[0] + n * a.bias_strides[1]], store(at, s);
    most = s > most ? s : most;
  }
  if (a.prior && n < n1) {
    const Prior<C> prior(a, b * a.heads + h, q, v);
    for (std::int64_t m = n; m < n1; ++m) {
      C* at = st + (m - n0) * q.pitch + v * W;
      const V x = prior.away(0, place<C>(a, m - a.extras, 0)), y = prior.away(1, place<C>(a, m - a.extras, 1));
      store(at, load(at) - (prior.sharpness[0] * x * x + prior.sharpness[1] * y * y));
    }
  }
  for (; n < smaller(n1, all); ++n) {
    const V s = load(st + (n - n0) * q.pitch + v * W);
    most = s > most ? s : most;
  }
  for (; n < n1; ++n) {
    C* at = st + (n - n0) * q.pitch + v * W;
    const V s = sees<V>(a, q.first + v * W, n) ? load(at) : splat<V>(-std::numeric_limits<C>::infinity());
    store(at, s);
    most = s > most ? s : most;
  }
  return most;
}

// Whether every number of rows [0, count) is finite: then a weight of 0 makes any of them vanish.
template <class C>
bool finite(const C* const* rows, std::int64_t count, std::int64_t columns) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  V sums[4] = {};  // NaN if a number is not finite
  C rest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t e = 0;
    for (; e + 4 * W <= columns; e += 4 * W)
      for (int k = 0; k < 4; ++k) sums[k] += load(rows[i] + e + k * W) * (C)0;
    for (; e + W <= columns; e += W) sums[0] += load(rows[i] + e) * (C)0;
    for (; e < columns; ++e) rest += rows[i][e] * (C)0;
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest == 0;
}

// As any_sum_rows for rows [n0, n1) of the list, but a row reaches only the queries that see it, whatever it holds.
template <class C>
void sum_seen_rows(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, const C* st, const C* const* rows,
                   std::int64_t width, C* ot) {
  for (std::int64_t i = 0; i < q.count; ++i) {
    const std::int64_t end = smaller(n1, Block::seen(a, q.first + i));
    for (std::int64_t e = 0; e < width; ++e) {
      C sum = ot[e * q.pitch + i];
      for (std::int64_t n = n0; n < end; ++n) sum += st[(n - n0) * q.pitch + i] * rows[n - n0][e];
      ot[e * q.pitch + i] = sum;
    }
  }
}

template <class C>
void weigh_rows(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, const C* st, const C* const* rows,
                std::int64_t width, C* ot, Ahead& next) {
  constexpr int W = Lanes<Vector<C>>::count;
  if (a.causal && !finite(rows, n1 - n0, width)) return sum_seen_rows(a, q, n0, n1, st, rows, width, ot);
  ranges<C>(a, q, n0, n1, [&](int v, std::int64_t begin, std::int64_t end) {
    any_sum_rows<C>(q.vectors - v, st + (begin - n0) * q.pitch + v * W, q.pitch, rows + (begin - n0), end - begin, width,
                    ot + v * W, next);
  });
}

#if defined(__AVX512BF16__)
// ---- products by pairs of bf16 ------------------------------------------------------------------------------------------
// Where a query does not see a row its weight is 0, and 0 times a number that is not finite is not 0. So under a causal mask
// such numbers, here called strays, are taken out of the products and their terms added one by one.

// Calls work(row, column, number) for every stray of [0, rows) x [0, columns).
template <class Work>
void each_stray(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, Work work) {
  const auto stray = [](bf16 number) { return (number.bits & 0x7f80) == 0x7f80; };
  for (std::int64_t n = 0; n < rows; ++n, from += stride) {
    std::int64_t e = 0;
    for (; e + 32 <= columns; e += 32) {
      const __m512i exponents = _mm512_and_si512(_mm512_loadu_si512(from + e), _mm512_set1_epi16(0x7f80));
      if (_mm512_cmpeq_epi16_mask(exponents, _mm512_set1_epi16(0x7f80)) == 0) continue;
      for (std::int64_t k = e; k < e + 32; ++k)
        if (stray(from[k])) work(n, k, widen(from[k]));
    }
    for (; e < columns; ++e)
      if (stray(from[e])) work(n, e, widen(from[e]));
  }
}

constexpr float kLog2E = 1.44269504f;

// Whether scores can do without their scale until they are exponentiated: the largest is then the largest.
inline bool is_plain(const AttentionCall& a) { return a.scale > 0 && !a.bias && !a.prior; }

// Rows [n0, n1) of the list, and zeros up to a multiple of kTurn: out[row][pitch], zero from `columns` on.
inline void copy_list(const AttentionCall& a, const AttentionTensor& extra, const AttentionTensor& own, std::int64_t b,
                      std::int64_t h, std::int64_t n0, std::int64_t n1, std::int64_t columns, std::int64_t pitch, bf16* out) {
  for (std::int64_t n = n0; n < n1; ++n, out += pitch) {
    if (columns < pitch) std::memset(out + columns, 0, (pitch - columns) * sizeof(bf16));
    if (n < a.extras && a.extra_type == DType::f32) {
      const float* row = row_of<float>(extra, b, h, n);
      for (std::int64_t e = 0; e < columns; e += kPairLanes)
        store_some(out + e, 1, columns - e, load_some(row + e, 1, columns - e));
    } else {
      const bf16* row = n < a.extras ? row_of<bf16>(extra, b, h, n) : row_of<bf16>(own, b, h, n - a.extras);
      std::int64_t e = 0;
      for (; e + 32 <= columns; e += 32) std::memcpy(out + e, row + e, 32 * sizeof(bf16));
      if (e < columns) std::memcpy(out + e, row + e, (columns - e) * sizeof(bf16));
    }
  }
  const std::int64_t rest = round_up(n1 - n0, kTurn) - (n1 - n0);
  std::memset((void*)out, 0, rest * pitch * sizeof(bf16));
}

// out[pair of columns][lane] of the rows of a block's queries; zero from `columns` and from the last query on.
inline void pack_pairs(const AttentionTensor& t, std::int64_t b, std::int64_t h, const Block& q, std::int64_t columns,
                       std::int64_t depth, bf16_pair* out) {
  for (std::int64_t i = 0; i < q.pitch; i += kPairLanes)
    for (std::int64_t e = 0; e < depth; e += kTurn) {
      u32v block[kPairLanes] = {};
      const std::int64_t bytes = smaller(kTurn, columns - e) * (std::int64_t)sizeof(bf16);
      for (int k = 0; k < kPairLanes && i + k < q.count; ++k) {
        const bf16* row = row_of<bf16>(t, b, h, q.first + i + k) + e;
        if (bytes == sizeof block[k])
          std::memcpy(&block[k], row, sizeof block[k]);
        else
          std::memcpy(&block[k], row, bytes);
      }
      transpose_pairs(block);
      for (int k = 0; k < kPairLanes; ++k) std::memcpy(out + (e / 2 + k) * q.pitch + i, &block[k], sizeof block[k]);
    }
}

// out[pair of queries][column] of the same rows, up to a multiple of kTurn queries.
inline void pair_rows(const AttentionTensor& t, std::int64_t b, std::int64_t h, const Block& q, std::int64_t columns,
                      std::int64_t pitch, bf16_pair* out) {
  for (std::int64_t i = 0; i < round_up(q.pitch, kTurn); i += 2, out += pitch)
    for (std::int64_t e = 0; e < pitch; e += kPairLanes) {
      const std::int64_t count = smaller(kPairLanes, columns - e);
      bf16 numbers[2][kPairLanes] = {};
      const bf16* rows[2] = {numbers[0], numbers[1]};
      for (int k = 0; k < 2 && i + k < q.count && count > 0; ++k) {
        rows[k] = row_of<bf16>(t, b, h, q.first + i + k) + e;
        if (count < kPairLanes) std::memcpy(numbers[k], rows[k], count * sizeof(bf16)), rows[k] = numbers[k];
      }
      const u32v pairs = pairs_of(rows[0], rows[1]);
      std::memcpy(out + e, &pairs, sizeof pairs);
    }
}

// out[column][kBlock], of `count` rows and the zeros behind them.
inline void turn_rows(const bf16* rows, std::int64_t pitch, std::int64_t count, std::int64_t columns, bf16* out) {
  for (std::int64_t i = 0; i < count; i += kTurn)
    for (std::int64_t e = 0; e < columns; e += kPairLanes) {
      u32v block[kPairLanes];
      for (int k = 0; k < kPairLanes; ++k) {
        const bf16* row = rows + (i + 2 * k) * pitch + e;
        block[k] = pairs_of(row, row + pitch);
      }
      transpose_pairs(block);
      for (int k = 0; k < kPairLanes; ++k) std::memcpy(out + (e + k) * kBlock + i, &block[k], sizeof block[k]);
    }
}

// Calls work(vector, vectors, rows) for every two vectors of a block with the rows of [n0, n1) that some of their queries see.
template <class Work>
void by_twos(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, Work work) {
  for (int v = 0; v < q.vectors; v += 2) {
    const int count = (int)smaller(2, q.vectors - v);
    const std::int64_t rows = smaller(n1, q.some(a, v + count - 1, kPairLanes)) - n0;
    if (rows > 0) work(v, count, rows);
  }
}

// st[row][lane] of the rows that two vectors see: their products with x.
inline void multiply_seen(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, const bf16* rows,
                          std::int64_t depth, const bf16_pair* x, float* st) {
  by_twos(a, q, n0, n1, [&](int v, int count, std::int64_t seen) {
    multiply_pairs(rows, depth, seen, x + v * kPairLanes, q.pitch, count, depth / kTurn, st + v * kPairLanes, q.pitch, false);
  });
}

// Zeros behind the pairs of rows that a vector sees, as far as the products reach.
inline void fill_pairs(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, bf16_pair* pairs) {
  by_twos(a, q, n0, n1, [&](int first, int count, std::int64_t most) {
    for (int v = first; v < first + count; ++v) {
      const std::int64_t seen = larger(0, smaller(n1, q.some(a, v, kPairLanes)) - n0);
      for (std::int64_t n = ceil_div(seen, 2); n < round_up(most, kTurn) / 2; ++n)
        std::memset(pairs + n * q.pitch + v * kPairLanes, 0, kPairLanes * sizeof(bf16_pair));
    }
  });
}

// ot[column][lane] += sum over rows [n0, n1) of rows[row][column] * weights[row][lane]; `turned` is room for the rows as columns.
inline void multiply_weights(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, const bf16* rows,
                             std::int64_t width, bf16* turned, bf16_pair* weights, float* ot) {
  turn_rows(rows, width, n1 - n0, width, turned);
  bool strays = false;
  if (a.causal)
    each_stray(rows, width, n1 - n0, width, [&](std::int64_t n, std::int64_t e, float) {
      turned[e * kBlock + n].bits = 0;
      strays = true;
    });
  fill_pairs(a, q, n0, n1, weights);
  by_twos(a, q, n0, n1, [&](int v, int count, std::int64_t seen) {
    multiply_pairs(turned, kBlock, width, weights + v * kPairLanes, q.pitch, count, ceil_div(seen, kTurn), ot + v * kPairLanes,
                   q.pitch, true);
  });
  if (strays)
    each_stray(rows, width, n1 - n0, width, [&](std::int64_t n, std::int64_t e, float number) {
      for (std::int64_t i = 0; i < q.count; ++i)
        if (n0 + n < Block::seen(a, q.first + i))
          ot[e * q.pitch + i] += number * widen(((const bf16*)(weights + n / 2 * q.pitch + i))[n % 2]);
    });
}
#endif

// ---- forward ------------------------------------------------------------------------------------------------------------

// The products of a forward block, row by row.
template <class C, class T>
struct ForwardRows {
  typedef C real;
  C *query, *wide;
  const C** rows;

  ForwardRows(Carver& c, const AttentionCall& a) {
    const std::int64_t pitch = plan<C>(a).vectors * Lanes<Vector<C>>::count;
    query = c.take<C>(a.depth * pitch);
    wide = c.take<C>(a.type == DType::bf16 ? larger(kBlock, pitch) * larger(a.depth, a.width) : 0);
    rows = c.take<const C*>(larger(kBlock, pitch));
  }

  void take_queries(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, Ahead& next) const {
    point(a.query, a.type, b, h, q.first, q.first + q.count, a.depth, wide, rows);
    pack(rows, q.count, a.depth, (C)a.scale, q.pitch, query, next);
  }

  void score(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, std::int64_t n0, std::int64_t n1, C* st,
             Ahead& next) const {
    constexpr int W = Lanes<Vector<C>>::count;
    point_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, wide, rows);
    ranges<C>(a, q, n0, n1, [&](int v, std::int64_t begin, std::int64_t end) {
      any_dots<C>(q.vectors - v, query + v * W, q.pitch, a.depth, rows + (begin - n0), end - begin,
                  st + (begin - n0) * q.pitch + v * W, next);
    });
  }

  // Of a vector's scores of rows [n0, n1), which are finished by it.
  Vector<C> largest(const AttentionCall& a, std::int64_t b, std::int64_t h, const Block& q, int v, std::int64_t n0,
                    std::int64_t n1, C* st) const {
    return finish_scores<true>(a, b, h, q, v, n0, n1, st);
  }

  // The sum of a vector's weights, which take the scores' place.
  Vector<C> make_weights(const AttentionCall&, const Block& q, int v, std::int64_t count, C* st, Vector<C> base,
                         Ahead&) const {
    typedef Vector<C> V;
    V sum{};
    for (C* at = st + v * Lanes<V>::count; count > 0; --count, at += q.pitch) {
      const V p = exponential(load(at) - base);
      store(at, p);
      sum += p;
    }
    return sum;
  }

  void weigh(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, std::int64_t n0, std::int64_t n1,
             const C* st, C* ot, Ahead& next) const {
    point_list(a, a.extra_value, a.value, b, h, n0, n1, a.width, wide, rows);
    weigh_rows(a, q, n0, n1, st, rows, a.width, ot, next);
  }
};

#if defined(__AVX512BF16__)
// The same by pairs of bf16.
struct ForwardPairs {
  typedef float real;
  Tiles tiles;
  std::int64_t depth, width;  // as multiples of what a product takes at once
  bf16_pair *query, *weights;
  bf16 *rows, *columns;

  ForwardPairs(Carver& c, const AttentionCall& a) : depth(round_up(a.depth, kTurn)), width(round_up(a.width, kPairLanes)) {
    const std::int64_t pitch = plan<float>(a).vectors * kPairLanes;
    query = c.take<bf16_pair>(depth / 2 * pitch), weights = c.take<bf16_pair>(kBlock / 2 * pitch);
    rows = c.take<bf16>(kBlock * larger(depth, width)), columns = c.take<bf16>(width * kBlock);
  }

  void take_queries(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, Ahead&) const {
    pack_pairs(a.query, b, h, q, a.depth, depth, query);
  }

  void score(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, std::int64_t n0, std::int64_t n1,
             float* st, Ahead&) const {
    copy_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, depth, rows);
    multiply_seen(a, q, n0, n1, rows, depth, query, st);
  }

  f32v largest(const AttentionCall& a, std::int64_t b, std::int64_t h, const Block& q, int v, std::int64_t n0,
               std::int64_t n1, float* st) const {
    if (!is_plain(a)) return finish_scores<false>(a, b, h, q, v, n0, n1, st);
    return finish_scores<true>(a, b, h, q, v, n0, n1, st) * (float)a.scale;
  }

  f32v make_weights(const AttentionCall& a, const Block& q, int v, std::int64_t count, const float* st, f32v base,
                    Ahead& next) const {
    const float factor = (is_plain(a) ? (float)a.scale : 1.0f) * kLog2E;
    const f32v offset = base * kLog2E;
    const float* at = st + v * kPairLanes;
    bf16_pair* to = weights + v * kPairLanes;
    f32v sums[2] = {};
    for (; count > 0; count -= 2, at += 2 * q.pitch, to += q.pitch) {
      next.some(2);
      const f32v first = power_roughly(load(at) * factor - offset);
      const f32v second = count > 1 ? power_roughly(load(at + q.pitch) * factor - offset) : f32v{};
      const u32v pair = pairs_of(first, second);
      std::memcpy(to, &pair, sizeof pair);
      sums[0] += first, sums[1] += second;
    }
    return sums[0] + sums[1];
  }

  void weigh(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, std::int64_t n0, std::int64_t n1,
             const float*, float* ot, Ahead&) const {
    copy_list(a, a.extra_value, a.value, b, h, n0, n1, a.width, width, rows);
    multiply_weights(a, q, n0, n1, rows, width, columns, weights, ot);
  }
};
#endif

template <class Products>
struct ForwardScratch {
  typedef typename Products::real C;
  Products products;
  C *result, *scores, *most, *sum, *factor;

  ForwardScratch(Carver& c, const AttentionCall& a) : products(c, a) {
    const std::int64_t pitch = plan<C>(a).vectors * Lanes<Vector<C>>::count;
    result = c.take<C>(round_up(a.width, 16) * pitch);
    scores = c.take<C>(kBlock * pitch);
    most = c.take<C>(pitch), sum = c.take<C>(pitch), factor = c.take<C>(pitch);
  }
};

template <class Products, class T>
void forward_block(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, const ForwardScratch<Products>& s,
                   Ahead& next) {
  typedef typename Products::real C;
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  const C infinite = std::numeric_limits<C>::infinity();
  s.products.take_queries(a, q, b, h, next);
  for (int v = 0; v < q.vectors; ++v) store(s.most + v * W, splat<V>(-infinite)), store(s.sum + v * W, V{});
  for (std::int64_t i = 0; i < a.width * q.pitch; i += W) store(s.result + i, V{});
  const std::int64_t end = q.some(a, q.vectors - 1, W);
  for (std::int64_t n0 = 0; n0 < end; n0 += kBlock) {
    const std::int64_t n1 = smaller(n0 + kBlock, end);
    s.products.score(a, q, b, h, n0, n1, s.scores, next);
    for (int v = 0; v < q.vectors; ++v) {
      const std::int64_t stop = smaller(n1, q.some(a, v, W));
      if (stop <= n0) continue;
      const V before = load(s.most + v * W), block = s.products.largest(a, b, h, q, v, n0, stop, s.scores);
      const V most = block > before ? block : before;
      const V base = most == -infinite ? V{} : most;  // nothing seen yet: every score is -inf, and so every weight 0
      const V shrink = exponential(before - base);
      const V sum = s.products.make_weights(a, q, v, stop - n0, s.scores, base, next);
      store(s.most + v * W, most), store(s.sum + v * W, load(s.sum + v * W) * shrink + sum);
      if (n0)
        for (std::int64_t e = 0; e < a.width; ++e) {
          C* at = s.result + e * q.pitch + v * W;
          store(at, load(at) * shrink);
        }
    }
    s.products.weigh(a, q, b, h, n0, n1, s.scores, s.result, next);
  }
  for (int v = 0; v < q.vectors; ++v) {
    const V sum = load(s.sum + v * W);
    store(s.factor + v * W, sum == 0 ? V{} : 1 / sum);
    if (a.lse) {
      const V lse = sum == 0 ? splat<V>(-infinite) : load(s.most + v * W) + logarithm(sum);
      C* to = (C*)a.lse + (b * a.heads + h) * a.queries + q.first + v * W;
      store_some(to, 1, q.count - v * W, lse);
    }
  }
  unpack(s.result, q.pitch, q.count, a.width, s.factor, const_cast<T*>(row_of<T>(a.out, b, h, q.first)), a.out.strides[2]);
}

std::int64_t products(const AttentionCall& a) {
  return a.batch * a.heads * a.queries * (a.keys + a.extras) * (a.depth + a.width);
}

// Tasks 0, threads, 2 threads... go to the first thread: long and short ones (causal) mix. work(scratch, task, the next task
// of the same thread or the number of tasks).
template <class Work>
void share(int threads, std::int64_t tasks, char* scratch, std::int64_t bytes, Work work) {
  threads = (int)larger(1, smaller(threads, tasks));
  parallel_for(threads, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t me = begin; me < end; ++me)
      for (std::int64_t task = me; task < tasks; task += threads)
        work(scratch + me * bytes, task, smaller(task + threads, tasks));
  });
}

template <class Scratch>
std::int64_t bytes_of(const AttentionCall& a) {
  Carver c{nullptr};
  Scratch counted(c, a);
  return round_up(c.used, 4096);
}

template <class Products, class T>
void run_forward(const AttentionCall& a, void* scratch, int threads) {
  typedef typename Products::real C;
  typedef ForwardScratch<Products> Scratch;
  if (products(a) < kSerial) threads = 1;
  const Plan p = plan<C>(a);
  const std::int64_t heads = a.batch * a.heads;
  share(threads, heads * p.blocks, (char*)scratch, bytes_of<Scratch>(a), [&](char* mine, std::int64_t task, std::int64_t next) {
    Carver c{mine};
    const Scratch s(c, a);
    const std::int64_t head = task % heads, index = p.blocks - 1 - task / heads;  // the longest first
    Ahead ahead;
    if (next < heads * p.blocks) {
      const std::int64_t b = next % heads / a.heads, h = next % heads % a.heads;
      const Block q = block_of<C>(a, p, p.blocks - 1 - next / heads);
      ahead.add<T>(a.query, b, h, q.first, q.count, a.depth);
      ahead.add<T>(a.key, b, h, 0, a.keys, a.depth);
      ahead.add<T>(a.value, b, h, 0, a.keys, a.width);
    }
    const Block q = block_of<C>(a, p, index);
    forward_block<Products, T>(a, q, head / a.heads, head % a.heads, s, ahead);
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------

// grads[n][:] (+)= factor * sum over the block's queries that see row n of weights[n][query] * rows[query][:], for [n0, n1).
// `weights` are those of row n0.
template <class C>
void collect(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, const C* weights, const C* const* rows,
             std::int64_t columns, C factor, bool add, C* const* grads, Ahead& next) {
  const auto first = [&](std::int64_t n) -> std::int64_t {
    return !a.causal || n < a.extras ? 0 : larger(0, n - a.extras - (a.keys - a.queries) - q.first);
  };
  if (n0 >= n1) return;
  std::int64_t n = n0;
  const auto some = [&](auto keys) {
    constexpr int K = decltype(keys)::value;
    for (; n + K <= n1; n += K) {
      next.some(2 * kLines);
      scatter_keys<C, K>(weights + (n - n0) * q.pitch, q.pitch, rows, first(n), q.count, columns, factor, add, grads + n);
    }
  };
  if (!a.causal || finite(rows, q.count, columns)) some(Number<kVectorBytes == 64 ? 6 : 4>{}), some(Number<2>{});
  some(Number<1>{});
}

// What a head's gradients are written to: rows as they are stored.
template <class C, class T>
void put_rows(const C* rows, std::int64_t count, std::int64_t columns, std::int64_t pitch, C factor, T* to,
              std::int64_t stride) {
  constexpr int W = Lanes<Vector<C>>::count;
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t e = 0; e < columns; e += W)
      store_some(to + i * stride + e, 1, columns - e, load_some(rows + i * pitch + e, 1, columns - e) * factor);
}

// What of a head's gradients is wanted.
struct Wanted {
  bool keys, values, steps;
  explicit Wanted(const AttentionBackward& w)
      : keys(w.grad_key.data || w.grad_extra_key),
        values(w.grad_value.data || w.grad_extra_value),
        steps(keys || w.grad_query.data || w.grad_bias || w.grad_prior) {}
};

// The products of a head going back, row by row.
template <class C, class T>
struct BackwardRows {
  typedef C real;
  static constexpr bool wide = !std::is_same_v<C, T>;
  C *query, *grad;
  C *grad_keys, *grad_values;    // of the rows whose gradients do not go straight to where they belong
  C **key_grads, **value_grads;  // of every row of the list
  C *wide_query, *wide_grad, *wide_list;
  const C **query_rows, **grad_rows, **rows;

  BackwardRows(Carver& c, const AttentionCall& a) {
    const std::int64_t pitch = plan<C>(a).vectors * Lanes<Vector<C>>::count, list = a.extras + a.keys;
    query = c.take<C>(a.depth * pitch), grad = c.take<C>(a.width * pitch);
    grad_keys = c.take<C>(list * a.depth), grad_values = c.take<C>(list * a.width);
    key_grads = c.take<C*>(list), value_grads = c.take<C*>(list);
    wide_query = c.take<C>(wide ? pitch * a.depth : 0), wide_grad = c.take<C>(wide ? pitch * a.width : 0);
    wide_list = c.take<C>(wide ? kBlock * larger(a.depth, a.width) : 0);
    query_rows = c.take<const C*>(pitch), grad_rows = c.take<const C*>(pitch), rows = c.take<const C*>(kBlock);
  }

  void begin(const AttentionCall& a, const AttentionBackward& w, std::int64_t b, std::int64_t h, std::int64_t list_end,
             bool) const {
    const std::int64_t head = b * a.heads + h;
    for (std::int64_t n = 0; n < list_end; ++n) {  // straight to where they belong, if they are stored as they are computed
      C *key = grad_keys + n * a.depth, *value = grad_values + n * a.width;
      const bool extra = n < a.extras;
      if (extra && w.grad_extra_key) key = (C*)w.grad_extra_key + (head * a.extras + n) * a.depth;
      if (extra && w.grad_extra_value) value = (C*)w.grad_extra_value + (head * a.extras + n) * a.width;
      if (!extra && !wide && w.grad_key.data) key = const_cast<C*>(row_of<C>(w.grad_key, b, h, n - a.extras));
      if (!extra && !wide && w.grad_value.data) value = const_cast<C*>(row_of<C>(w.grad_value, b, h, n - a.extras));
      key_grads[n] = key, value_grads[n] = value;
    }
  }

  void take_queries(const AttentionCall& a, const AttentionBackward& w, const Block& q, std::int64_t b, std::int64_t h,
                    Ahead& next) const {
    point(a.query, a.type, b, h, q.first, q.first + q.count, a.depth, wide_query, query_rows);
    pack(query_rows, q.count, a.depth, (C)a.scale, q.pitch, query, next);
    point(w.grad_out, a.type, b, h, q.first, q.first + q.count, a.width, wide_grad, grad_rows);
    pack(grad_rows, q.count, a.width, (C)1, q.pitch, grad, next);
  }

  void score(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, std::int64_t n0, std::int64_t n1, C* st,
             C* steps, Ahead& next) const {
    constexpr int W = Lanes<Vector<C>>::count;
    const auto over = [&](const C* xt, std::int64_t columns, C* to) {
      ranges<C>(a, q, n0, n1, [&](int v, std::int64_t begin, std::int64_t end) {
        any_dots<C>(q.vectors - v, xt + v * W, q.pitch, columns, rows + (begin - n0), end - begin,
                    to + (begin - n0) * q.pitch + v * W, next);
      });
    };
    point_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, wide_list, rows);
    over(query, a.depth, st);
    if (!steps) return;
    point_list(a, a.extra_value, a.value, b, h, n0, n1, a.width, wide_list, rows);
    over(grad, a.width, steps);
  }

  // The weights p of a vector's queries in the scores' place, and p (step - delta) in the steps'; zeros behind `stop`, from
  // where on only later vectors see.
  void make_steps(const AttentionCall& a, const AttentionBackward&, const Wanted& wanted, const Block& q, std::int64_t b,
                  std::int64_t h, int v, std::int64_t n0, std::int64_t n1, std::int64_t stop, C* st, C* steps, Vector<C> base,
                  Vector<C> delta, Ahead&) const {
    typedef Vector<C> V;
    constexpr int W = Lanes<V>::count;
    const std::int64_t all = q.all(a, v, W);
    if (stop > n0) finish_scores<true>(a, b, h, q, v, n0, stop, st);
    for (std::int64_t n = n0; n < n1; ++n) {
      C *at = st + (n - n0) * q.pitch + v * W, *step = steps + (n - n0) * q.pitch + v * W;
      V p{}, d{};
      if (n < stop) {
        p = exponential(load(at) - base);
        if (wanted.steps) d = p * (load(step) - delta);
        if (n >= all) {
          const auto mask = sees<V>(a, q.first + v * W, n);
          p = mask ? p : V{}, d = mask ? d : V{};
        }
      }
      store(at, p);
      if (wanted.steps) store(step, d);
    }
  }

  void add_rows(const AttentionCall& a, const AttentionBackward&, const Wanted& wanted, const Block& q, std::int64_t,
                std::int64_t, std::int64_t n0, std::int64_t n1, const C* st, const C* steps, std::int64_t written,
                Ahead& next) const {
    const std::int64_t fresh = smaller(n1, larger(n0, written));  // from here on nothing has been written yet
    for (const bool add : {true, false}) {
      const std::int64_t low = add ? n0 : fresh, high = add ? fresh : n1, at = (low - n0) * q.pitch;
      if (wanted.values) collect(a, q, low, high, st + at, grad_rows, a.width, (C)1, add, value_grads, next);
      if (wanted.keys) collect(a, q, low, high, steps + at, query_rows, a.depth, (C)a.scale, add, key_grads, next);
    }
  }

  void add_queries(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, std::int64_t n0, std::int64_t n1,
                   const C* steps, C* to, Ahead& next) const {
    point_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, wide_list, rows);
    weigh_rows(a, q, n0, n1, steps, rows, a.depth, to, next);
  }

  void finish(const AttentionCall& a, const AttentionBackward& w, std::int64_t b, std::int64_t h, std::int64_t list_end,
              std::int64_t written) const {
    for (std::int64_t n = written; n < list_end; ++n) {  // which no query sees
      std::memset((void*)key_grads[n], 0, a.depth * sizeof(C));
      std::memset((void*)value_grads[n], 0, a.width * sizeof(C));
    }
    if (!wide) return;
    const auto put = [&](const C* from, std::int64_t columns, const AttentionTensor& to) {
      if (to.data)
        put_rows(from + a.extras * columns, a.keys, columns, columns, (C)1, const_cast<T*>(row_of<T>(to, b, h, 0)),
                 to.strides[2]);
    };
    put(grad_keys, a.depth, w.grad_key), put(grad_values, a.width, w.grad_value);
  }
};

#if defined(__AVX512BF16__)
// The same by pairs of bf16.
struct BackwardPairs {
  typedef float real;
  Tiles tiles;
  std::int64_t depth, width;            // as multiples of what a product takes at once
  std::int64_t turned;                  // queries, likewise
  bf16_pair *query, *grad;              // [pair of columns][query]
  bf16_pair *query_pairs, *grad_pairs;  // [pair of queries][column]
  bf16_pair* step_pairs;                // [pair of rows][query]
  bf16 *keys, *values, *columns;        // of the list
  bf16 *weights, *step_rows;            // [row][query]
  float *grad_keys, *grad_values;
  bool strays;  // among the block's queries or their gradients

  BackwardPairs(Carver& c, const AttentionCall& a) : depth(round_up(a.depth, kTurn)), width(round_up(a.width, kTurn)) {
    const std::int64_t pitch = plan<float>(a).vectors * kPairLanes, list = round_up(a.extras + a.keys, kBlock);
    turned = round_up(pitch, kTurn);
    query = c.take<bf16_pair>(depth / 2 * pitch), grad = c.take<bf16_pair>(width / 2 * pitch);
    query_pairs = c.take<bf16_pair>(turned / 2 * depth), grad_pairs = c.take<bf16_pair>(turned / 2 * width);
    step_pairs = c.take<bf16_pair>(kBlock / 2 * pitch);
    keys = c.take<bf16>(kBlock * depth), values = c.take<bf16>(kBlock * width), columns = c.take<bf16>(depth * kBlock);
    weights = c.take<bf16>(kBlock * turned), step_rows = c.take<bf16>(kBlock * turned);
    grad_keys = c.take<float>(list * depth), grad_values = c.take<float>(list * width);
  }

  void begin(const AttentionCall&, const AttentionBackward&, std::int64_t, std::int64_t, std::int64_t list_end,
             bool several) const {
    if (!several) return;
    std::memset(grad_keys, 0, list_end * depth * sizeof(float));
    std::memset(grad_values, 0, list_end * width * sizeof(float));
  }

  void take_queries(const AttentionCall& a, const AttentionBackward& w, const Block& q, std::int64_t b, std::int64_t h,
                    Ahead&) {
    pack_pairs(a.query, b, h, q, a.depth, depth, query), pair_rows(a.query, b, h, q, a.depth, depth, query_pairs);
    pack_pairs(w.grad_out, b, h, q, a.width, width, grad), pair_rows(w.grad_out, b, h, q, a.width, width, grad_pairs);
    strays = false;
    const auto take_out = [&](const AttentionTensor& t, std::int64_t columns, std::int64_t pitch, bf16_pair* pairs) {
      each_stray(row_of<bf16>(t, b, h, q.first), t.strides[2], q.count, columns, [&](std::int64_t i, std::int64_t e, float) {
        ((bf16*)(pairs + i / 2 * pitch + e))[i % 2].bits = 0;
        strays = true;
      });
    };
    if (a.causal) take_out(a.query, a.depth, depth, query_pairs), take_out(w.grad_out, a.width, width, grad_pairs);
  }

  void score(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, std::int64_t n0, std::int64_t n1,
             float* st, float* steps, Ahead&) const {
    copy_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, depth, keys);
    multiply_seen(a, q, n0, n1, keys, depth, query, st);
    if (!steps) return;
    copy_list(a, a.extra_value, a.value, b, h, n0, n1, a.width, width, values);
    multiply_seen(a, q, n0, n1, values, width, grad, steps);
  }

  void make_steps(const AttentionCall& a, const AttentionBackward& w, const Wanted& wanted, const Block& q, std::int64_t b,
                  std::int64_t h, int v, std::int64_t n0, std::int64_t n1, std::int64_t stop, float* st, float* steps, f32v base,
                  f32v delta, Ahead& next) const {
    const std::int64_t all = q.all(a, v, kPairLanes), queries = round_up(q.pitch, kTurn);
    const bool plain = is_plain(a), keep = w.grad_bias || w.grad_prior;
    const float factor = (plain ? (float)a.scale : 1.0f) * kLog2E;
    const f32v offset = base * kLog2E;
    if (stop > n0) {  // with minus infinity where a query does not see
      if (plain)
        finish_scores<true>(a, b, h, q, v, n0, stop, st);
      else
        finish_scores<false>(a, b, h, q, v, n0, stop, st);
    }
    for (std::int64_t n = n0; n < n1; n += 2) {
      next.some(6);
      f32v d[2] = {};
      for (int k = 0; k < 2 && n + k < n1; ++k) {
        const std::int64_t at = (n + k - n0) * q.pitch + v * kPairLanes, row = (n + k - n0) * queries + v * kPairLanes;
        f32v p{};
        if (n + k < stop) {
          p = power_roughly(load(st + at) * factor - offset);
          if (wanted.steps) d[k] = p * (load(steps + at) - delta);
          if (n + k >= all) d[k] = sees<f32v>(a, q.first + v * kPairLanes, n + k) ? d[k] : f32v{};
        }
        if (wanted.values) store(weights + row, p);
        if (wanted.keys) store(step_rows + row, d[k]);
        if (keep) store(steps + at, d[k]);
      }
      const u32v pair = pairs_of(d[0], d[1]);
      if (w.grad_query.data) std::memcpy(step_pairs + (n - n0) / 2 * q.pitch + v * kPairLanes, &pair, sizeof pair);
    }
  }

  void add_rows(const AttentionCall& a, const AttentionBackward& w, const Wanted& wanted, const Block& q, std::int64_t b,
                std::int64_t h, std::int64_t n0, std::int64_t n1, const float*, const float*, std::int64_t, Ahead&) const {
    const auto add = [&](bf16* from, const bf16_pair* x, const AttentionTensor& rows, std::int64_t columns, std::int64_t pitch,
                         float* to) {
      const std::int64_t queries = round_up(q.pitch, kTurn);
      if (q.pitch < queries)
        for (std::int64_t n = 0; n < n1 - n0; ++n)
          std::memset((void*)(from + n * queries + q.pitch), 0, kPairLanes * sizeof(bf16));
      const std::int64_t rest = round_up(n1 - n0, 16) - (n1 - n0);  // which may be rows that come later
      std::memset((void*)(from + (n1 - n0) * queries), 0, rest * queries * sizeof(bf16));
      for (std::int64_t e = 0; e < pitch; e += 2 * kPairLanes)
        multiply_pairs(from, queries, n1 - n0, x + e, pitch, 2, queries / kTurn, to + n0 * pitch + e, pitch,
                       plan<float>(a).blocks > 1);
      if (strays)
        each_stray(row_of<bf16>(rows, b, h, q.first), rows.strides[2], q.count, columns,
                   [&](std::int64_t i, std::int64_t e, float number) {
                     for (std::int64_t n = n0; n < smaller(n1, Block::seen(a, q.first + i)); ++n)
                       to[n * pitch + e] += number * widen(from[(n - n0) * queries + i]);
                   });
    };
    if (wanted.values) add(weights, grad_pairs, w.grad_out, a.width, width, grad_values);
    if (wanted.keys) add(step_rows, query_pairs, a.query, a.depth, depth, grad_keys);
  }

  void add_queries(const AttentionCall& a, const Block& q, std::int64_t, std::int64_t, std::int64_t n0, std::int64_t n1,
                   const float*, float* to, Ahead&) const {
    multiply_weights(a, q, n0, n1, keys, depth, columns, step_pairs, to);
  }

  void finish(const AttentionCall& a, const AttentionBackward& w, std::int64_t b, std::int64_t h, std::int64_t list_end,
              std::int64_t written) const {
    if (written < list_end) {  // which no query sees
      std::memset(grad_keys + written * depth, 0, (list_end - written) * depth * sizeof(float));
      std::memset(grad_values + written * width, 0, (list_end - written) * width * sizeof(float));
    }
    const auto put = [&](const float* from, std::int64_t columns, std::int64_t pitch, float factor, void* extra,
                         const AttentionTensor& own) {
      if (extra)
        put_rows(from, a.extras, columns, pitch, factor, (float*)extra + (b * a.heads + h) * a.extras * columns, columns);
      if (own.data)
        put_rows(from + a.extras * pitch, a.keys, columns, pitch, factor, const_cast<bf16*>(row_of<bf16>(own, b, h, 0)),
                 own.strides[2]);
    };
    put(grad_keys, a.depth, depth, (float)a.scale, w.grad_extra_key, w.grad_key);
    put(grad_values, a.width, width, 1.0f, w.grad_extra_value, w.grad_value);
  }
};
#endif

template <class Products>
struct BackwardScratch {
  typedef typename Products::real C;
  Products products;
  C *scores, *steps, *delta, *lse, *one, *grad_query, *grad_prior;

  BackwardScratch(Carver& c, const AttentionCall& a) : products(c, a) {
    const std::int64_t pitch = plan<C>(a).vectors * Lanes<Vector<C>>::count;
    scores = c.take<C>(kBlock * pitch), steps = c.take<C>(kBlock * pitch);
    delta = c.take<C>(pitch), lse = c.take<C>(pitch), one = c.take<C>(pitch);
    grad_query = c.take<C>(round_up(a.depth, 32) * pitch), grad_prior = c.take<C>(4 * pitch);
  }
};

template <class Products, class T>
void backward_block(const AttentionCall& a, const AttentionBackward& w, const Wanted& wanted, const Block& q, std::int64_t b,
                    std::int64_t h, BackwardScratch<Products>& s, std::int64_t list_end, std::int64_t& written, Ahead& next) {
  typedef typename Products::real C;
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  const std::int64_t head = b * a.heads + h;
  const bool steps = wanted.steps;
  s.products.take_queries(a, w, q, b, h, next);
  for (std::int64_t i = 0; i < q.pitch; i += W) {
    const std::int64_t at = head * a.queries + q.first + i, count = q.count - i;
    V sums[W] = {};
    for (int k = 0; k < W && k < count; ++k) {
      next.some(2);
      const T *out = row_of<T>(a.out, b, h, q.first + i + k), *grad = row_of<T>(w.grad_out, b, h, q.first + i + k);
      std::int64_t e = 0;
      for (; e + W <= a.width; e += W) sums[k] += load(out + e) * load(grad + e);
      if (e < a.width) sums[k] += load_some(out + e, 1, a.width - e) * load_some(grad + e, 1, a.width - e);
    }
    V delta = reduce(sums);
    if (w.grad_lse) delta -= load_some((const C*)w.grad_lse + at, 1, count);
    store(s.delta + i, delta);
    store(s.lse + i, load_some((const C*)a.lse + at, 1, count));
  }
  if (w.grad_query.data)
    for (std::int64_t i = 0; i < a.depth * q.pitch; i += W) store(s.grad_query + i, V{});
  if (w.grad_prior)
    for (std::int64_t i = 0; i < 4 * q.pitch; i += W) store(s.grad_prior + i, V{});
  const std::int64_t end = smaller(list_end, q.some(a, q.vectors - 1, W));
  for (std::int64_t n0 = 0; n0 < end; n0 += kBlock) {
    const std::int64_t n1 = smaller(n0 + kBlock, end);
    s.products.score(a, q, b, h, n0, n1, s.scores, steps ? s.steps : nullptr, next);
    for (int v = 0; v < q.vectors; ++v) {
      const std::int64_t stop = larger(n0, smaller(n1, q.some(a, v, W)));
      const V delta = load(s.delta + v * W), lse = load(s.lse + v * W);
      const V base = lse == -std::numeric_limits<C>::infinity() ? V{} : lse;
      s.products.make_steps(a, w, wanted, q, b, h, v, n0, n1, stop, s.scores, s.steps, base, delta, next);
      if (w.grad_prior) {
        const Prior<C> prior(a, head, q, v);
        V sums[4];
        for (int k = 0; k < 4; ++k) sums[k] = load(s.grad_prior + k * q.pitch + v * W);
        for (std::int64_t n = larger(n0, a.extras); n < stop; ++n) {
          const V step = load(s.steps + (n - n0) * q.pitch + v * W);
          for (int axis = 0; axis < 2; ++axis) {
            const V away = prior.away(axis, place<C>(a, n - a.extras, axis));
            sums[axis] -= step * away * prior.sharpness[axis] * (C)2;
            sums[2 + axis] -= step * away * away / (C)a.smooth;
          }
        }
        for (int k = 0; k < 4; ++k) store(s.grad_prior + k * q.pitch + v * W, sums[k]);
      }
    }
    s.products.add_rows(a, w, wanted, q, b, h, n0, n1, s.scores, s.steps, written, next);
    written = larger(written, n1);
    if (w.grad_bias)
      for (std::int64_t n = n0; n < smaller(n1, a.extras); ++n) {
        C sum = 0;
        for (std::int64_t i = 0; i < q.count; ++i) sum += s.steps[(n - n0) * q.pitch + i];
        ((C*)w.grad_bias)[head * a.extras + n] += sum;
      }
    if (w.grad_query.data) s.products.add_queries(a, q, b, h, n0, n1, s.steps, s.grad_query, next);
  }
  if (w.grad_prior)
    for (std::int64_t i = 0; i < q.count; ++i)
      for (int k = 0; k < 4; ++k)
        ((C*)w.grad_prior)[(head * a.queries + q.first + i) * 4 + k] = s.grad_prior[k * q.pitch + i];
  if (w.grad_query.data)
    unpack(s.grad_query, q.pitch, q.count, a.depth, s.one, const_cast<T*>(row_of<T>(w.grad_query, b, h, q.first)),
           w.grad_query.strides[2]);
}

template <class Products, class T>
void backward_head(const AttentionCall& a, const AttentionBackward& w, const Plan& p, std::int64_t b, std::int64_t h,
                   std::int64_t list_end, char* scratch, Ahead& next) {
  typedef typename Products::real C;
  Carver c{scratch};
  BackwardScratch<Products> s(c, a);
  const Wanted wanted(w);
  s.products.begin(a, w, b, h, list_end, p.blocks > 1);
  for (std::int64_t i = 0; i < p.vectors * Lanes<Vector<C>>::count; ++i) s.one[i] = (C)a.scale;
  if (w.grad_bias)
    for (std::int64_t n = 0; n < a.extras; ++n) ((C*)w.grad_bias)[(b * a.heads + h) * a.extras + n] = 0;
  std::int64_t written = 0;  // rows of the list that have gradients
  for (std::int64_t index = 0; index < p.blocks; ++index) {
    const Block q = block_of<C>(a, p, index);
    if (q.count) backward_block<Products, T>(a, w, wanted, q, b, h, s, list_end, written, next);
  }
  s.products.finish(a, w, b, h, list_end, written);
}

template <class Products, class T>
void run_backward(const AttentionCall& a, const AttentionBackward& w, void* scratch, int threads) {
  typedef typename Products::real C;
  if (products(a) < kSerial) threads = 1;
  const Plan p = plan<C>(a);
  // Where nobody asks for gradients of keys, values or queries, the extra rows are all there is to look at.
  const bool whole = w.grad_query.data || w.grad_key.data || w.grad_value.data || w.grad_prior;
  const std::int64_t list_end = whole ? a.extras + a.keys : a.extras;
  share(threads, a.batch * a.heads, (char*)scratch, bytes_of<BackwardScratch<Products>>(a),
        [&](char* mine, std::int64_t head, std::int64_t next) {
          const std::int64_t b = head / a.heads, h = head % a.heads;
          Ahead ahead;
          if (next < a.batch * a.heads) {
            const std::int64_t nb = next / a.heads, nh = next % a.heads;
            for (const AttentionTensor* t : {&a.query, &w.grad_out, &a.out})
              ahead.add<T>(*t, nb, nh, 0, a.queries, t == &a.query ? a.depth : a.width);
            if (whole) ahead.add<T>(a.key, nb, nh, 0, a.keys, a.depth), ahead.add<T>(a.value, nb, nh, 0, a.keys, a.width);
            if (w.grad_query.data) ahead.add<T>(w.grad_query, nb, nh, 0, a.queries, a.depth, true);
            if (w.grad_key.data) ahead.add<T>(w.grad_key, nb, nh, 0, a.keys, a.depth, true);
            if (w.grad_value.data) ahead.add<T>(w.grad_value, nb, nh, 0, a.keys, a.width, true);
          }
          backward_head<Products, T>(a, w, p, b, h, list_end, mine, ahead);
        });
}

template <class C, class T>
void run_sum(const C* parts, std::int64_t batch, std::int64_t size, T* out, int threads) {
  constexpr int W = Lanes<Vector<C>>::count;
  if (batch * size < kSerial) threads = 1;
  parallel_for(threads, ceil_div(size, W), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin * W; i < smaller(end * W, size); i += W) {
      Vector<C> sum{};
      for (std::int64_t b = 0; b < batch; ++b) sum += load_some(parts + b * size + i, 1, size - i);
      store_some(out + i, 1, size - i, sum);
    }
  });
}

#if defined(__AVX512BF16__)
typedef ForwardPairs ForwardBf16;
typedef BackwardPairs BackwardBf16;
#else
typedef ForwardRows<float, bf16> ForwardBf16;
typedef BackwardRows<float, bf16> BackwardBf16;
#endif

// Calls work(products going forward, products going back, type) for the types of a call.
template <class Work>
auto by_type(DType type, Work work) {
  switch (type) {
    case DType::f64: return work((ForwardRows<double, double>*)0, (BackwardRows<double, double>*)0, double());
    case DType::bf16: return work((ForwardBf16*)0, (BackwardBf16*)0, bf16());
    default: return work((ForwardRows<float, float>*)0, (BackwardRows<float, float>*)0, float());
  }
}

}  // namespace

std::int64_t attention_scratch(const AttentionCall& a, int threads) {
  return larger(threads, 1) * by_type(a.type, [&](auto* forward, auto*, auto) {
           return bytes_of<ForwardScratch<std::remove_pointer_t<decltype(forward)>>>(a);
         });
}

void attention(const AttentionCall& a, void* scratch, int threads) {
  by_type(a.type, [&](auto* forward, auto*, auto number) {
    run_forward<std::remove_pointer_t<decltype(forward)>, decltype(number)>(a, scratch, threads);
  });
}

std::int64_t attention_backward_scratch(const AttentionCall& a, int threads) {
  return larger(threads, 1) * by_type(a.type, [&](auto*, auto* backward, auto) {
           return bytes_of<BackwardScratch<std::remove_pointer_t<decltype(backward)>>>(a);
         });
}

void attention_backward(const AttentionCall& a, const AttentionBackward& w, void* scratch, int threads) {
  by_type(a.type, [&](auto*, auto* backward, auto number) {
    run_backward<std::remove_pointer_t<decltype(backward)>, decltype(number)>(a, w, scratch, threads);
  });
}

void attention_sum(const void* parts, std::int64_t batch, std::int64_t size, DType type, void* out, DType out_type,
                   int threads) {
  if (type == DType::f64) return run_sum((const double*)parts, batch, size, (double*)out, threads);
  if (out_type == DType::bf16) return run_sum((const float*)parts, batch, size, (bf16*)out, threads);
  return run_sum((const float*)parts, batch, size, (float*)out, threads);
}

}  // namespace pyface::cpu::PYFACE_ISA
