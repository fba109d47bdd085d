// Affine coupling and Haar wavelet, one pass over memory each. See pyface/coupling.h for what is computed.

#include "cpu/coupling.h"

#include <cstdlib>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

// A chunk is the unit of work and of the log-determinant's sum. Its bounds depend on the sample size alone, and chunk sums are
// added in double in their order: the result is the same for any number of threads and any batch.
constexpr std::int64_t kChunk = 2048;
constexpr std::int64_t kSerialElements = 16384;             // below this a team costs more than it saves
constexpr std::int64_t kStreamingBytes = 8 * 1024 * 1024;  // results larger than this leave the caches anyway

// ---- the clamp --------------------------------------------------------------------------------------------------------------

// l(s) and, where `slope` is given, its derivative. sigmoid and tanh are c tanh(k s / 2) with k = 1, 2, through expm1 so that small
// s keeps its relative accuracy; the derivative comes from 4q / (1 + q)^2 with q = exp(-k |s|), which does not cancel when saturated.
template <Activation A, class V>
PYFACE_INLINE V clamped(V s, typename Lanes<V>::scalar c, V* slope = nullptr) {
  typedef typename Lanes<V>::scalar T;
  if constexpr (A == Activation::none) {
    if (slope) *slope = 1 + 0 * s;  // 1, but NaN where s is
    return s;
  } else if constexpr (A == Activation::atan) {
    if (slope) *slope = ((T)0.636 * c) / (1 + s * s);
    return arc_tangent(s) * ((T)0.636 * c);
  } else {
    constexpr T k = A == Activation::tanh ? 2 : 1;
    const auto e = exp_nonpositive(-k * absolute(s));
    const V r = reciprocal(2 + e.minus_one);
    if (slope) *slope = 2 * k * c * e.value * r * r;
    return copy_sign(c * (-e.minus_one * r), s);
  }
}

// exp(l): the bounded activations with a moderate clamp need no guard against overflow.
template <bool kBounded, class V>
PYFACE_INLINE V exp_log_scale(V l) {
  if constexpr (kBounded) return exp_small(l);
  return exp_any(l);
}

// ---- forward ----------------------------------------------------------------------------------------------------------------

// One vector: y and the term of the log-determinant (without the inverse's sign).
template <Activation A, bool kBounded, bool kInverse, class V>
PYFACE_INLINE V couple(V x, V s, V t, typename Lanes<V>::scalar c, V& log_scale) {
  log_scale = clamped<A>(s, c);
  if constexpr (kInverse) return (x - t) * exp_log_scale<kBounded>(-log_scale);
  return x * exp_log_scale<kBounded>(log_scale) + t;
}

template <class X, class S, Activation A, bool kBounded, bool kInverse>
double forward_chunk(const X* x, const S* s, const S* t, X* y, std::int64_t n, double clamp, bool streaming) {
  typedef typename Storage<X>::vector V;
  constexpr int W = Lanes<V>::count;
  const auto c = (typename Lanes<V>::scalar)clamp;
  const bool stream = streaming && is_vector_aligned(y);
  // A float sum takes in 32 terms before it moves on into double: else it would be less exact than torch.sum's cascade.
  double sum = 0;
  V l;
  std::int64_t i = 0;
  while (i + 2 * W <= n) {
    const std::int64_t end = i + 64 * W < n ? i + 64 * W : n;
    V sum0{}, sum1{};
    for (; i + 2 * W <= end; i += 2 * W) {
      const V y0 = couple<A, kBounded, kInverse>(load(x + i), load(s + i), load(t + i), c, l);
      sum0 += l;
      const V y1 = couple<A, kBounded, kInverse>(load(x + i + W), load(s + i + W), load(t + i + W), c, l);
      sum1 += l;
      if (stream) {
        store_streaming(y + i, y0);
        store_streaming(y + i + W, y1);
      } else {
        store(y + i, y0);
        store(y + i + W, y1);
      }
    }
    sum += sum_lanes(sum0) + sum_lanes(sum1);
  }
  for (; i < n; i += W) {  // the tail through padded copies: the same vector code, so the same bits for every element
    const std::int64_t left = n - i < W ? n - i : W;
    X xs[W] = {}, ys[W];
    S ss[W] = {}, ts[W] = {};
    std::memcpy(xs, x + i, left * sizeof(X));
    std::memcpy(ss, s + i, left * sizeof(S));
    std::memcpy(ts, t + i, left * sizeof(S));
    store(ys, couple<A, kBounded, kInverse>(load(xs), load(ss), load(ts), c, l));
    std::memcpy(y + i, ys, left * sizeof(X));
    sum += sum_lanes(l);
  }
  return sum;
}

// ---- backward ---------------------------------------------------------------------------------------------------------------

enum class Mode { forward, from_output, inverse };

template <class X, class S, Activation A, bool kBounded, Mode M>
void backward_chunk(const X* g, const X* value, const S* s, const S* t, X* grad_x, S* grad_s, std::int64_t n, double lam,
                    double clamp, bool streaming) {
  typedef typename Storage<X>::vector V;
  typedef typename Lanes<V>::scalar T;
  constexpr int W = Lanes<V>::count;
  const T c = (T)clamp, la = (T)lam;
  auto one = [&](V gv, V vv, V sv, V tv, V& gx, V& gs) __attribute__((always_inline)) {
    V slope;
    const V l = clamped<A>(sv, c, &slope);
    gx = gv * exp_log_scale<kBounded>(M == Mode::inverse ? -l : l);
    if constexpr (M == Mode::forward) gs = (gx * vv + la) * slope;
    if constexpr (M == Mode::from_output) gs = (gv * (vv - tv) + la) * slope;
    if constexpr (M == Mode::inverse) gs = -(gv * vv + la) * slope;
  };
  const bool stream_x = streaming && grad_x && is_vector_aligned(grad_x);
  const bool stream_s = streaming && grad_s && is_vector_aligned(grad_s);
  std::int64_t i = 0;
  V gx, gs;
  for (; i + W <= n; i += W) {
    one(load(g + i), load(value + i), load(s + i), M == Mode::from_output ? load(t + i) : V{}, gx, gs);
    if (grad_x) stream_x ? store_streaming(grad_x + i, gx) : store(grad_x + i, gx);
    if (grad_s) stream_s ? store_streaming(grad_s + i, gs) : store(grad_s + i, gs);
  }
  if (i < n) {
    const std::int64_t left = n - i;
    X gb[W] = {}, vb[W] = {}, xo[W];
    S sb[W] = {}, tb[W] = {}, so[W];
    std::memcpy(gb, g + i, left * sizeof(X));
    std::memcpy(vb, value + i, left * sizeof(X));
    std::memcpy(sb, s + i, left * sizeof(S));
    if constexpr (M == Mode::from_output) std::memcpy(tb, t + i, left * sizeof(S));
    one(load(gb), load(vb), load(sb), load(tb), gx, gs);
    store(xo, gx);
    store(so, gs);
    if (grad_x) std::memcpy(grad_x + i, xo, left * sizeof(X));
    if (grad_s) std::memcpy(grad_s + i, so, left * sizeof(S));
  }
}

// ---- walking the samples ----------------------------------------------------------------------------------------------------

// Calls `chunk(sample, offset, length, index)` for every chunk of every sample.
template <class Chunk>
void for_each_chunk(std::int64_t batch, std::int64_t inner, int threads, Chunk chunk) {
  const std::int64_t chunks = (inner + kChunk - 1) / kChunk;
  if (batch * inner < kSerialElements) threads = 1;
  parallel_for(threads, batch * chunks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t sample = task / chunks, offset = task % chunks * kChunk;
      chunk(sample, offset, inner - offset < kChunk ? inner - offset : kChunk, task);
    }
    streaming_fence();
  });
}

template <class X, class S, Activation A, bool kBounded, bool kInverse>
void run_forward(const CouplingForward& a, int threads) {
  const std::int64_t chunks = (a.inner + kChunk - 1) / kChunk;
  const bool streaming = a.batch * a.inner * (std::int64_t)sizeof(X) > kStreamingBytes;
  double* sums = a.log_det ? (double*)std::malloc((a.batch * chunks + 1) * sizeof(double)) : nullptr;
  for_each_chunk(a.batch, a.inner, threads, [&](std::int64_t b, std::int64_t at, std::int64_t n, std::int64_t task) {
    const double sum = forward_chunk<X, S, A, kBounded, kInverse>(
        (const X*)a.x + b * a.x_stride + at, (const S*)a.s + b * a.s_stride + at, (const S*)a.t + b * a.t_stride + at,
        (X*)a.y + b * a.y_stride + at, n, a.clamp, streaming);
    if (sums) sums[task] = sum;
  });
  if (!a.log_det) return;
  for (std::int64_t b = 0; b < a.batch; ++b) {
    double total = 0;
    for (std::int64_t k = 0; k < chunks; ++k) total += sums[b * chunks + k];
    if (kInverse) total = -total;
    if (sizeof(typename Storage<X>::compute) == 8)
      ((double*)a.log_det)[b] = total;
    else
      ((float*)a.log_det)[b] = (float)total;
  }
  std::free(sums);
}

template <class X, class S, Activation A, bool kBounded, Mode M>
void run_backward(const CouplingBackward& a, int threads) {
  const bool streaming = a.batch * a.inner * (std::int64_t)sizeof(X) > kStreamingBytes;
  for_each_chunk(a.batch, a.inner, threads, [&](std::int64_t b, std::int64_t at, std::int64_t n, std::int64_t) {
    double lam = 0;
    if (a.grad_log_det)
      lam = sizeof(typename Storage<X>::compute) == 8 ? ((const double*)a.grad_log_det)[b] : ((const float*)a.grad_log_det)[b];
    const std::int64_t dense = b * a.inner + at;
    backward_chunk<X, S, A, kBounded, M>(
        (const X*)a.grad_out + b * a.grad_out_stride + at, (const X*)a.value + b * a.value_stride + at,
        (const S*)a.s + b * a.s_stride + at, M == Mode::from_output ? (const S*)a.t + b * a.t_stride + at : nullptr,
        a.grad_x ? (X*)a.grad_x + dense : nullptr, a.grad_s ? (S*)a.grad_s + dense : nullptr, n, lam, a.clamp, streaming);
  });
}

// ---- from run-time codes to template arguments ------------------------------------------------------------------------------

template <class X, class S, Activation A, bool kBounded>
void pick_direction(const CouplingForward& a, int threads) {
  a.inverse ? run_forward<X, S, A, kBounded, true>(a, threads) : run_forward<X, S, A, kBounded, false>(a, threads);
}
template <class X, class S, Activation A, bool kBounded>
void pick_direction(const CouplingBackward& a, int threads) {
  if (a.inverse)
    run_backward<X, S, A, kBounded, Mode::inverse>(a, threads);
  else if (a.from_output)
    run_backward<X, S, A, kBounded, Mode::from_output>(a, threads);
  else
    run_backward<X, S, A, kBounded, Mode::forward>(a, threads);
}

template <class X, class S, class Args>
void pick_activation(const Args& a, int threads) {
  const bool small = a.clamp <= 80;  // e^80 is a finite float
  switch (a.activation) {
    case Activation::none: return pick_direction<X, S, Activation::none, false>(a, threads);
    case Activation::sigmoid:
      return small ? pick_direction<X, S, Activation::sigmoid, true>(a, threads)
                   : pick_direction<X, S, Activation::sigmoid, false>(a, threads);
    case Activation::tanh:
      return small ? pick_direction<X, S, Activation::tanh, true>(a, threads)
                   : pick_direction<X, S, Activation::tanh, false>(a, threads);
    case Activation::atan:
      return small ? pick_direction<X, S, Activation::atan, true>(a, threads)
                   : pick_direction<X, S, Activation::atan, false>(a, threads);
  }
}

template <class Args>
void pick_types(const Args& a, int threads) {
  if (a.x_type == DType::f64) return pick_activation<double, double>(a, threads);
  if (a.x_type == DType::bf16) return pick_activation<bf16, bf16>(a, threads);
  if (a.st_type == DType::bf16) return pick_activation<float, bf16>(a, threads);
  return pick_activation<float, float>(a, threads);
}

// ---- Haar -------------------------------------------------------------------------------------------------------------------

template <class V>
struct Quad {
  V a, b, c, d;  // of the image: (even,even), (even,odd), (odd,even), (odd,odd); of the bands: LL, HL, LH, HH
};

template <class V>
PYFACE_INLINE Quad<V> to_bands(Quad<V> q) {
  const V s0 = q.a + q.b, s1 = q.c + q.d, d0 = q.b - q.a, d1 = q.d - q.c;
  return {(s0 + s1) / 2, (d0 + d1) / 2, (s1 - s0) / 2, (d1 - d0) / 2};
}
template <class V>
PYFACE_INLINE Quad<V> to_image(Quad<V> q) {
  const V s0 = q.a - q.c, s1 = q.a + q.c, d0 = q.b - q.d, d1 = q.b + q.d;
  return {(s0 - d0) / 2, (s0 + d0) / 2, (s1 - d1) / 2, (s1 + d1) / 2};
}

template <class T>
PYFACE_INLINE void load_pairs(const T* p, typename Storage<T>::vector& even, typename Storage<T>::vector& odd) {
  deinterleave(load(p), load(p + Lanes<typename Storage<T>::vector>::count), even, odd);
}
PYFACE_INLINE void load_pairs(const bf16* p, f32v& even, f32v& odd) {  // a pair of bf16 is one 32-bit lane
  u32v both;
  std::memcpy(&both, p, sizeof both);
  even = (f32v)(both << 16);
  odd = (f32v)(both & 0xffff0000u);
}
template <class T>
PYFACE_INLINE void store_pairs(T* p, typename Storage<T>::vector even, typename Storage<T>::vector odd, bool streaming) {
  typedef typename Storage<T>::vector V;
  V low, high;
  interleave(even, odd, low, high);
  if (streaming) {
    store_streaming(p, low);
    store_streaming(p + Lanes<V>::count, high);
  } else {
    store(p, low);
    store(p + Lanes<V>::count, high);
  }
}
PYFACE_INLINE void store_pairs(bf16* p, f32v even, f32v odd, bool) {
  const u32v both = round_to_bf16(even) | (round_to_bf16(odd) << 16);
  std::memcpy(p, &both, sizeof both);
}

// One row of one channel's four sub-bands <-> two image rows. `n` columns of a sub-band.
template <class T>
PYFACE_INLINE void haar_row_forward(const T* top, const T* bottom, T* const out[4], std::int64_t n, bool streaming) {
  typedef typename Storage<T>::vector V;
  constexpr int W = Lanes<V>::count;
  streaming = streaming && is_vector_aligned(out[0]) && is_vector_aligned(out[1]) && is_vector_aligned(out[2]) &&
              is_vector_aligned(out[3]);
  std::int64_t i = 0;
  Quad<V> q;
  for (; i + W <= n; i += W) {
    load_pairs(top + 2 * i, q.a, q.b);
    load_pairs(bottom + 2 * i, q.c, q.d);
    q = to_bands(q);
    if (streaming) {
      store_streaming(out[0] + i, q.a), store_streaming(out[1] + i, q.b);
      store_streaming(out[2] + i, q.c), store_streaming(out[3] + i, q.d);
    } else {
      store(out[0] + i, q.a), store(out[1] + i, q.b), store(out[2] + i, q.c), store(out[3] + i, q.d);
    }
  }
  if (i < n) {
    const std::int64_t left = n - i;
    T rows[2][2 * W] = {}, bands[4][W];
    std::memcpy(rows[0], top + 2 * i, 2 * left * sizeof(T));
    std::memcpy(rows[1], bottom + 2 * i, 2 * left * sizeof(T));
    load_pairs(rows[0], q.a, q.b);
    load_pairs(rows[1], q.c, q.d);
    q = to_bands(q);
    store(bands[0], q.a), store(bands[1], q.b), store(bands[2], q.c), store(bands[3], q.d);
    for (int k = 0; k < 4; ++k) std::memcpy(out[k] + i, bands[k], left * sizeof(T));
  }
}

template <class T>
PYFACE_INLINE void haar_row_inverse(const T* const in[4], T* top, T* bottom, std::int64_t n, bool streaming) {
  typedef typename Storage<T>::vector V;
  constexpr int W = Lanes<V>::count;
  streaming = streaming && is_vector_aligned(top) && is_vector_aligned(bottom);
  std::int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Quad<V> q = to_image(Quad<V>{load(in[0] + i), load(in[1] + i), load(in[2] + i), load(in[3] + i)});
    store_pairs(top + 2 * i, q.a, q.b, streaming);
    store_pairs(bottom + 2 * i, q.c, q.d, streaming);
  }
  if (i < n) {
    const std::int64_t left = n - i;
    T bands[4][W] = {}, rows[2][2 * W];
    for (int k = 0; k < 4; ++k) std::memcpy(bands[k], in[k] + i, left * sizeof(T));
    const Quad<V> q = to_image(Quad<V>{load(bands[0]), load(bands[1]), load(bands[2]), load(bands[3])});
    store_pairs(rows[0], q.a, q.b, false);
    store_pairs(rows[1], q.c, q.d, false);
    std::memcpy(top + 2 * i, rows[0], 2 * left * sizeof(T));
    std::memcpy(bottom + 2 * i, rows[1], 2 * left * sizeof(T));
  }
}

template <class T>
void run_haar(const Haar& a, int threads) {
  const std::int64_t elements = a.batch * a.channels * a.rows * a.cols * 4;
  const bool streaming = elements * (std::int64_t)sizeof(T) > kStreamingBytes;
  if (elements < kSerialElements) threads = 1;
  const std::int64_t band = a.channels * a.rows * a.cols;  // from one sub-band to the next
  parallel_for(threads, a.batch * a.channels * a.rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t plane = task / a.rows, row = task % a.rows, sample = plane / a.channels, channel = plane % a.channels;
      const std::int64_t image = (plane * a.rows + row) * a.cols * 4;  // two rows of 2 cols each
      const std::int64_t bands = sample * band * 4 + (channel * a.rows + row) * a.cols;
      if (a.inverse) {
        const T* in = (const T*)a.in + bands;
        const T* const from[4] = {in, in + band, in + 2 * band, in + 3 * band};
        T* out = (T*)a.out + image;
        haar_row_inverse(from, out, out + 2 * a.cols, a.cols, streaming);
      } else {
        const T* in = (const T*)a.in + image;
        T* out = (T*)a.out + bands;
        T* const to[4] = {out, out + band, out + 2 * band, out + 3 * band};
        haar_row_forward(in, in + 2 * a.cols, to, a.cols, streaming);
      }
    }
    streaming_fence();
  });
}

}  // namespace

void coupling_forward(const CouplingForward& args, int threads) { pick_types(args, threads); }
void coupling_backward(const CouplingBackward& args, int threads) { pick_types(args, threads); }
void haar(const Haar& args, int threads) {
  switch (args.type) {
    case DType::f64: return run_haar<double>(args, threads);
    case DType::bf16: return run_haar<bf16>(args, threads);
    default: return run_haar<float>(args, threads);
  }
}

}  // namespace pyface::cpu::PYFACE_ISA
