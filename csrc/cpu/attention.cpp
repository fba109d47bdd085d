// Attention block by block with queries in the lanes: the block's queries are transposed once, rows of keys and values are
// read where they lie and broadcast, so the extra rows are nothing but the first rows of the list, and maxima, sums and
// rescaling are vertical. Nothing of the size of the scores leaves the cache.
//
// Going back, a task is a head: it owns every gradient it writes, except that of shared extra rows, which it leaves as a part
// of its own for `attention_sum`.
#include "cpu/attention.h"

#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/parallel.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

constexpr int kVectors = kVectorBytes == 64 ? 5 : 2;  // of queries in a block

// Sums held at a time beside N vectors: enough to hide the latency of a multiplication, as many as registers allow, and a
// divisor of the 16 keys between two steps of a causal block.
template <int N>
constexpr int kTile = kVectorBytes == 64 ? (N == 1 ? 16 : N <= 3 ? 8 : 4) : (N == 1 ? 8 : 4);
constexpr std::int64_t kBlock = 128;                       // rows of the list whose scores are held
constexpr std::int64_t kSerial = 1 << 19;                  // products below which a team costs more than it saves

template <int N>
struct Number {
  static constexpr int value = N;
};

template <class C>
using Vector = typename Storage<C>::vector;

PYFACE_INLINE f32v exponential(f32v x) { return exp_nonpositive(x).value; }
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
void pack(const C* const* rows, std::int64_t count, std::int64_t columns, C factor, std::int64_t pitch, C* out) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  for (std::int64_t i = 0; i < pitch; i += W) {
    std::int64_t e = 0;
    if (i + W <= count)
      for (; e + W <= columns; e += W) {
        V block[W];
        for (int k = 0; k < W; ++k) block[k] = load(rows[i + k] + e) * factor;
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
void dots_of(const C* xt, std::int64_t pitch, std::int64_t depth, const C* const* rows, std::int64_t count, C* st) {
  std::int64_t k = 0;
  for (; k + K <= count; k += K) dots<C, N, K>(xt, pitch, depth, rows + k, st + k * pitch);
  if constexpr (K > 1)
    if (k < count) dots_of<C, N, K / 2>(xt, pitch, depth, rows + k, count - k, st + k * pitch);
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
                 std::int64_t e = 0) {
  for (; e + E <= width; e += E) sum_rows<C, N, E>(st, pitch, rows, count, e, ot);
  if constexpr (E > 1)
    if (e < width) sum_rows_of<C, N, E / 2>(st, pitch, rows, count, width, ot, e);
}

template <class C>
void any_dots(int vectors, const C* xt, std::int64_t pitch, std::int64_t depth, const C* const* rows, std::int64_t count,
              C* st) {
  switch (vectors) {
    case 1: return dots_of<C, 1>(xt, pitch, depth, rows, count, st);
    case 2: return dots_of<C, 2>(xt, pitch, depth, rows, count, st);
#if defined(__AVX512F__)
    case 3: return dots_of<C, 3>(xt, pitch, depth, rows, count, st);
    case 4: return dots_of<C, 4>(xt, pitch, depth, rows, count, st);
    case 5: return dots_of<C, 5>(xt, pitch, depth, rows, count, st);
#endif
  }
}

template <class C>
void any_sum_rows(int vectors, const C* st, std::int64_t pitch, const C* const* rows, std::int64_t count, std::int64_t width,
                  C* ot) {
  switch (vectors) {
    case 1: return sum_rows_of<C, 1>(st, pitch, rows, count, width, ot);
    case 2: return sum_rows_of<C, 2>(st, pitch, rows, count, width, ot);
#if defined(__AVX512F__)
    case 3: return sum_rows_of<C, 3>(st, pitch, rows, count, width, ot);
    case 4: return sum_rows_of<C, 4>(st, pitch, rows, count, width, ot);
    case 5: return sum_rows_of<C, 5>(st, pitch, rows, count, width, ot);
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

// Scores of rows [n0, n1) of the list for the vector `v` of a block, finished: with bias, prior, and minus infinity where a
// query does not see. Returns the largest.
template <class C>
Vector<C> finish_scores(const AttentionCall& a, std::int64_t b, std::int64_t h, const Block& q, int v, std::int64_t n0,
                        std::int64_t n1, C* st) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
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
                std::int64_t width, C* ot) {
  constexpr int W = Lanes<Vector<C>>::count;
  if (a.causal && !finite(rows, n1 - n0, width)) return sum_seen_rows(a, q, n0, n1, st, rows, width, ot);
  ranges<C>(a, q, n0, n1, [&](int v, std::int64_t begin, std::int64_t end) {
    any_sum_rows<C>(q.vectors - v, st + (begin - n0) * q.pitch + v * W, q.pitch, rows + (begin - n0), end - begin, width,
                    ot + v * W);
  });
}

// ---- forward ------------------------------------------------------------------------------------------------------------

// Rows of a task that comes next, on their way to the second cache while this one is computed. More rows than `kAhead` are
// left to the hardware, which follows them well once they have begun.
constexpr std::int64_t kAhead = 256;
template <class T>
PYFACE_INLINE void bring(const AttentionTensor& t, std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t count,
                         std::int64_t columns) {
  for (std::int64_t i = first; i < first + smaller(count, kAhead); ++i) {
    const char* row = (const char*)row_of<T>(t, b, h, i);
    for (std::int64_t at = 0; at < columns * (std::int64_t)sizeof(T); at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

template <class C>
struct ForwardScratch {
  C *query, *result, *scores, *most, *sum, *factor, *wide;
  const C** rows;

  ForwardScratch(Carver& c, const AttentionCall& a) {
    const std::int64_t pitch = plan<C>(a).vectors * Lanes<Vector<C>>::count, width = larger(a.depth, a.width);
    query = c.take<C>(a.depth * pitch);
    result = c.take<C>(a.width * pitch);
    scores = c.take<C>(kBlock * pitch);
    most = c.take<C>(pitch), sum = c.take<C>(pitch), factor = c.take<C>(pitch);
    wide = c.take<C>(a.type == DType::bf16 ? larger(kBlock, pitch) * width : 0);
    rows = c.take<const C*>(larger(kBlock, pitch));
  }
};

template <class C, class T>
void forward_block(const AttentionCall& a, const Block& q, std::int64_t b, std::int64_t h, const ForwardScratch<C>& s) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  const C infinite = std::numeric_limits<C>::infinity();
  point(a.query, a.type, b, h, q.first, q.first + q.count, a.depth, s.wide, s.rows);
  pack(s.rows, q.count, a.depth, (C)a.scale, q.pitch, s.query);
  for (int v = 0; v < q.vectors; ++v) store(s.most + v * W, splat<V>(-infinite)), store(s.sum + v * W, V{});
  for (std::int64_t i = 0; i < a.width * q.pitch; i += W) store(s.result + i, V{});
  const std::int64_t end = q.some(a, q.vectors - 1, W);
  for (std::int64_t n0 = 0; n0 < end; n0 += kBlock) {
    const std::int64_t n1 = smaller(n0 + kBlock, end);
    point_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, s.wide, s.rows);
    ranges<C>(a, q, n0, n1, [&](int v, std::int64_t begin, std::int64_t stop) {
      any_dots<C>(q.vectors - v, s.query + v * W, q.pitch, a.depth, s.rows + (begin - n0), stop - begin,
                  s.scores + (begin - n0) * q.pitch + v * W);
    });
    for (int v = 0; v < q.vectors; ++v) {
      const std::int64_t stop = smaller(n1, q.some(a, v, W));
      if (stop <= n0) continue;
      const V before = load(s.most + v * W), block = finish_scores<C>(a, b, h, q, v, n0, stop, s.scores);
      const V most = block > before ? block : before;
      const V base = most == -infinite ? V{} : most;  // nothing seen yet: every score is -inf, and so every weight 0
      const V shrink = exponential(before - base);
      V sum = load(s.sum + v * W) * shrink;
      for (std::int64_t n = n0; n < stop; ++n) {
        C* at = s.scores + (n - n0) * q.pitch + v * W;
        const V p = exponential(load(at) - base);
        store(at, p);
        sum += p;
      }
      store(s.most + v * W, most), store(s.sum + v * W, sum);
      if (n0)
        for (std::int64_t e = 0; e < a.width; ++e) {
          C* at = s.result + e * q.pitch + v * W;
          store(at, load(at) * shrink);
        }
    }
    point_list(a, a.extra_value, a.value, b, h, n0, n1, a.width, s.wide, s.rows);
    weigh_rows(a, q, n0, n1, s.scores, s.rows, a.width, s.result);
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

template <class C>
std::int64_t forward_bytes(const AttentionCall& a) {
  Carver c{nullptr};
  ForwardScratch<C> counted(c, a);
  return round_up(c.used, 4096);
}

template <class C, class T>
void run_forward(const AttentionCall& a, void* scratch, int threads) {
  if (products(a) < kSerial) threads = 1;
  const Plan p = plan<C>(a);
  const std::int64_t heads = a.batch * a.heads;
  share(threads, heads * p.blocks, (char*)scratch, forward_bytes<C>(a), [&](char* mine, std::int64_t task, std::int64_t next) {
    Carver c{mine};
    const ForwardScratch<C> s(c, a);
    const std::int64_t head = task % heads, index = p.blocks - 1 - task / heads;  // the longest first
    if (next < heads * p.blocks) {
      const std::int64_t b = next % heads / a.heads, h = next % heads % a.heads;
      const Block q = block_of<C>(a, p, p.blocks - 1 - next / heads);
      bring<T>(a.query, b, h, q.first, q.count, a.depth);
      bring<T>(a.key, b, h, 0, a.keys, a.depth);
      bring<T>(a.value, b, h, 0, a.keys, a.width);
    }
    forward_block<C, T>(a, block_of<C>(a, p, index), head / a.heads, head % a.heads, s);
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------

template <class C>
struct BackwardScratch {
  C *query, *grad, *scores, *steps, *delta, *lse, *one, *grad_query, *grad_prior;
  C *grad_keys, *grad_values;        // of the rows whose gradients do not go straight to where they belong
  C **key_grads, **value_grads;      // of every row of the list
  C *wide_query, *wide_grad, *wide_list;
  const C **query_rows, **grad_rows, **rows;

  BackwardScratch(Carver& c, const AttentionCall& a) {
    const std::int64_t pitch = plan<C>(a).vectors * Lanes<Vector<C>>::count, list = a.extras + a.keys;
    query = c.take<C>(a.depth * pitch), grad = c.take<C>(a.width * pitch);
    scores = c.take<C>(kBlock * pitch), steps = c.take<C>(kBlock * pitch);
    delta = c.take<C>(pitch), lse = c.take<C>(pitch), one = c.take<C>(pitch);
    grad_query = c.take<C>(a.depth * pitch), grad_prior = c.take<C>(4 * pitch);
    const bool wide = a.type == DType::bf16;
    grad_keys = c.take<C>(list * a.depth), grad_values = c.take<C>(list * a.width);
    key_grads = c.take<C*>(list), value_grads = c.take<C*>(list);
    wide_query = c.take<C>(wide ? pitch * a.depth : 0), wide_grad = c.take<C>(wide ? pitch * a.width : 0);
    wide_list = c.take<C>(wide ? kBlock * larger(a.depth, a.width) : 0);
    query_rows = c.take<const C*>(pitch), grad_rows = c.take<const C*>(pitch), rows = c.take<const C*>(kBlock);
  }
};

template <class C>
std::int64_t backward_bytes(const AttentionCall& a) {
  Carver c{nullptr};
  BackwardScratch<C> counted(c, a);
  return round_up(c.used, 4096);
}

// grads[n][:] (+)= factor * sum over the block's queries that see row n of weights[n][query] * rows[query][:], for [n0, n1).
// `weights` are those of row n0.
template <class C>
void collect(const AttentionCall& a, const Block& q, std::int64_t n0, std::int64_t n1, const C* weights, const C* const* rows,
             std::int64_t columns, C factor, bool add, C* const* grads) {
  const auto first = [&](std::int64_t n) -> std::int64_t {
    return !a.causal || n < a.extras ? 0 : larger(0, n - a.extras - (a.keys - a.queries) - q.first);
  };
  std::int64_t n = n0;
  const auto some = [&](auto keys) {
    constexpr int K = decltype(keys)::value;
    for (; n + K <= n1; n += K)
      scatter_keys<C, K>(weights + (n - n0) * q.pitch, q.pitch, rows, first(n), q.count, columns, factor, add, grads + n);
  };
  if (!a.causal || finite(rows, q.count, columns)) some(Number<kVectorBytes == 64 ? 6 : 4>{}), some(Number<2>{});
  some(Number<1>{});
}

template <class C, class T>
void backward_block(const AttentionCall& a, const AttentionBackward& w, const Block& q, std::int64_t b, std::int64_t h,
                    const BackwardScratch<C>& s, std::int64_t list_end, std::int64_t& written) {
  typedef Vector<C> V;
  constexpr int W = Lanes<V>::count;
  const std::int64_t head = b * a.heads + h;
  const bool keys = w.grad_key.data || w.grad_extra_key, values = w.grad_value.data || w.grad_extra_value;
  const bool steps = keys || w.grad_query.data || w.grad_bias || w.grad_prior;
  point(a.query, a.type, b, h, q.first, q.first + q.count, a.depth, s.wide_query, s.query_rows);
  pack(s.query_rows, q.count, a.depth, (C)a.scale, q.pitch, s.query);
  point(w.grad_out, a.type, b, h, q.first, q.first + q.count, a.width, s.wide_grad, s.grad_rows);
  pack(s.grad_rows, q.count, a.width, (C)1, q.pitch, s.grad);
  for (std::int64_t i = 0; i < q.pitch; ++i) {
    C sum = 0;
    s.lse[i] = 0;
    if (i < q.count) {
      const T* out = row_of<T>(a.out, b, h, q.first + i);
      V sums{};
      std::int64_t e = 0;
      for (; e + W <= a.width; e += W) sums += load(out + e) * load(s.grad_rows[i] + e);
      sum = sum_lanes(sums);
      for (; e < a.width; ++e) sum += (C)widen(out[e]) * s.grad_rows[i][e];
      const std::int64_t at = head * a.queries + q.first + i;
      if (w.grad_lse) sum -= ((const C*)w.grad_lse)[at];
      s.lse[i] = ((const C*)a.lse)[at];
    }
    s.delta[i] = sum;
  }
  if (w.grad_query.data)
    for (std::int64_t i = 0; i < a.depth * q.pitch; i += W) store(s.grad_query + i, V{});
  if (w.grad_prior)
    for (std::int64_t i = 0; i < 4 * q.pitch; i += W) store(s.grad_prior + i, V{});
  const std::int64_t end = smaller(list_end, q.some(a, q.vectors - 1, W));
  for (std::int64_t n0 = 0; n0 < end; n0 += kBlock) {
    const std::int64_t n1 = smaller(n0 + kBlock, end);
    point_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, s.wide_list, s.rows);
    const auto over = [&](const C* xt, std::int64_t columns, C* st) {
      ranges<C>(a, q, n0, n1, [&](int v, std::int64_t begin, std::int64_t stop) {
        any_dots<C>(q.vectors - v, xt + v * W, q.pitch, columns, s.rows + (begin - n0), stop - begin,
                    st + (begin - n0) * q.pitch + v * W);
      });
    };
    over(s.query, a.depth, s.scores);
    if (steps) {
      point_list(a, a.extra_value, a.value, b, h, n0, n1, a.width, s.wide_list, s.rows);
      over(s.grad, a.width, s.steps);
    }
    for (int v = 0; v < q.vectors; ++v) {
      const std::int64_t stop = smaller(n1, q.some(a, v, W)), all = q.all(a, v, W);
      const V delta = load(s.delta + v * W), lse = load(s.lse + v * W);
      const V base = lse == -std::numeric_limits<C>::infinity() ? V{} : lse;
      if (stop > n0) finish_scores<C>(a, b, h, q, v, n0, stop, s.scores);
      for (std::int64_t n = n0; n < stop; ++n) {
        C* at = s.scores + (n - n0) * q.pitch + v * W;
        C* step = s.steps + (n - n0) * q.pitch + v * W;
        V p = exponential(load(at) - base);
        if (n < all) {
          store(at, p);
          if (steps) store(step, p * (load(step) - delta));
        } else {
          const auto mask = sees<V>(a, q.first + v * W, n);
          store(at, mask ? p : V{});
          if (steps) store(step, mask ? p * (load(step) - delta) : V{});
        }
      }
      for (std::int64_t n = larger(stop, n0); n < n1; ++n) {  // seen by later vectors only
        store(s.scores + (n - n0) * q.pitch + v * W, V{});
        if (steps) store(s.steps + (n - n0) * q.pitch + v * W, V{});
      }
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
    const std::int64_t fresh = smaller(n1, larger(n0, written));  // from here on nothing has been written yet
    for (const bool add : {true, false}) {
      const std::int64_t low = add ? n0 : fresh, high = add ? fresh : n1, at = (low - n0) * q.pitch;
      if (values) collect(a, q, low, high, s.scores + at, s.grad_rows, a.width, (C)1, add, s.value_grads);
      if (keys) collect(a, q, low, high, s.steps + at, s.query_rows, a.depth, (C)a.scale, add, s.key_grads);
    }
    written = larger(written, n1);
    if (w.grad_bias)
      for (std::int64_t n = n0; n < smaller(n1, a.extras); ++n) {
        C sum = 0;
        for (std::int64_t i = 0; i < q.count; ++i) sum += s.steps[(n - n0) * q.pitch + i];
        ((C*)w.grad_bias)[head * a.extras + n] += sum;
      }
    if (w.grad_query.data) {
      point_list(a, a.extra_key, a.key, b, h, n0, n1, a.depth, s.wide_list, s.rows);
      weigh_rows(a, q, n0, n1, s.steps, s.rows, a.depth, s.grad_query);
    }
  }
  if (w.grad_query.data)
    unpack(s.grad_query, q.pitch, q.count, a.depth, s.one, const_cast<T*>(row_of<T>(w.grad_query, b, h, q.first)),
           w.grad_query.strides[2]);
  if (w.grad_prior)
    for (std::int64_t i = 0; i < q.count; ++i)
      for (int k = 0; k < 4; ++k)
        ((C*)w.grad_prior)[(head * a.queries + q.first + i) * 4 + k] = s.grad_prior[k * q.pitch + i];
}

template <class C, class T>
void put_rows(const C* rows, std::int64_t count, std::int64_t columns, const AttentionTensor& to, std::int64_t b,
              std::int64_t h) {
  constexpr int W = Lanes<Vector<C>>::count;
  for (std::int64_t i = 0; i < count; ++i) {
    T* row = const_cast<T*>(row_of<T>(to, b, h, i));
    for (std::int64_t e = 0; e < columns; e += W)
      store_some(row + e, 1, columns - e, load_some(rows + i * columns + e, 1, columns - e));
  }
}

template <class C, class T>
void run_backward(const AttentionCall& a, const AttentionBackward& w, void* scratch, int threads) {
  if (products(a) < kSerial) threads = 1;
  const Plan p = plan<C>(a);
  // Where nobody asks for gradients of keys, values or queries, the extra rows are all there is to look at.
  const bool whole = w.grad_query.data || w.grad_key.data || w.grad_value.data || w.grad_prior;
  const std::int64_t list_end = whole ? a.extras + a.keys : a.extras;
  share(threads, a.batch * a.heads, (char*)scratch, backward_bytes<C>(a), [&](char* mine, std::int64_t head, std::int64_t next) {
    Carver c{mine};
    const BackwardScratch<C> s(c, a);
    const std::int64_t b = head / a.heads, h = head % a.heads;
    if (whole && next < a.batch * a.heads) {
      const std::int64_t nb = next / a.heads, nh = next % a.heads;
      for (const AttentionTensor* t : {&a.query, &w.grad_out, &a.out})
        bring<T>(*t, nb, nh, 0, a.queries, t == &a.query ? a.depth : a.width);
      bring<T>(a.key, nb, nh, 0, a.keys, a.depth);
      bring<T>(a.value, nb, nh, 0, a.keys, a.width);
    }
    const bool wide = !std::is_same_v<C, T>;
    for (std::int64_t n = 0; n < list_end; ++n) {  // straight to where they belong, if they are stored as they are computed
      C *key = s.grad_keys + n * a.depth, *value = s.grad_values + n * a.width;
      const bool extra = n < a.extras;
      if (extra && w.grad_extra_key) key = (C*)w.grad_extra_key + (head * a.extras + n) * a.depth;
      if (extra && w.grad_extra_value) value = (C*)w.grad_extra_value + (head * a.extras + n) * a.width;
      if (!extra && !wide && w.grad_key.data) key = const_cast<C*>(row_of<C>(w.grad_key, b, h, n - a.extras));
      if (!extra && !wide && w.grad_value.data) value = const_cast<C*>(row_of<C>(w.grad_value, b, h, n - a.extras));
      s.key_grads[n] = key, s.value_grads[n] = value;
    }
    for (std::int64_t i = 0; i < p.vectors * Lanes<Vector<C>>::count; ++i) s.one[i] = (C)a.scale;
    if (w.grad_bias)
      for (std::int64_t n = 0; n < a.extras; ++n) ((C*)w.grad_bias)[head * a.extras + n] = 0;
    std::int64_t written = 0;  // rows of the list that have gradients
    for (std::int64_t index = 0; index < p.blocks; ++index) {
      const Block q = block_of<C>(a, p, index);
      if (q.count) backward_block<C, T>(a, w, q, b, h, s, list_end, written);
    }
    for (std::int64_t n = written; n < list_end; ++n) {  // which no query sees
      std::memset((void*)s.key_grads[n], 0, a.depth * sizeof(C));
      std::memset((void*)s.value_grads[n], 0, a.width * sizeof(C));
    }
    if (!wide) return;
    if (w.grad_key.data) put_rows<C, T>(s.grad_keys + a.extras * a.depth, a.keys, a.depth, w.grad_key, b, h);
    if (w.grad_value.data) put_rows<C, T>(s.grad_values + a.extras * a.width, a.keys, a.width, w.grad_value, b, h);
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

}  // namespace

std::int64_t attention_scratch(const AttentionCall& a, int threads) {
  return (a.type == DType::f64 ? forward_bytes<double>(a) : forward_bytes<float>(a)) * larger(threads, 1);
}

void attention(const AttentionCall& a, void* scratch, int threads) {
  switch (a.type) {
    case DType::f64: return run_forward<double, double>(a, scratch, threads);
    case DType::bf16: return run_forward<float, bf16>(a, scratch, threads);
    default: return run_forward<float, float>(a, scratch, threads);
  }
}

std::int64_t attention_backward_scratch(const AttentionCall& a, int threads) {
  return (a.type == DType::f64 ? backward_bytes<double>(a) : backward_bytes<float>(a)) * larger(threads, 1);
}

void attention_backward(const AttentionCall& a, const AttentionBackward& w, void* scratch, int threads) {
  switch (a.type) {
    case DType::f64: return run_backward<double, double>(a, w, scratch, threads);
    case DType::bf16: return run_backward<float, bf16>(a, w, scratch, threads);
    default: return run_backward<float, float>(a, w, scratch, threads);
  }
}

void attention_sum(const void* parts, std::int64_t batch, std::int64_t size, DType type, void* out, DType out_type,
                   int threads) {
  if (type == DType::f64) return run_sum((const double*)parts, batch, size, (double*)out, threads);
  if (out_type == DType::bf16) return run_sum((const float*)parts, batch, size, (bf16*)out, threads);
  return run_sum((const float*)parts, batch, size, (float*)out, threads);
}

}  // namespace pyface::cpu::PYFACE_ISA
