// Sharpness-aware gradient work over a list of tensors. See pyface/sharpness.h for what is computed.
//
// Every pass is bound by memory. Tensors are cut into chunks of a fixed size that never cross a tensor; threads take
// contiguous shares of the chunks. A sum is taken over double lanes inside a chunk and over chunks in index order, so its
// bits do not depend on the number of threads. A double holds the square of every float: such a sum is finite if and only if
// its data are, which makes the flag for non-finite gradients exact and free.

#include "cpu/sharpness.h"

#include "cpu/blocks.h"
#include "cpu/parallel.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

constexpr std::int64_t kChunk = 32768;            // elements
constexpr std::int64_t kSerial = 65536;           // elements: below this a team costs more than it saves
constexpr std::int64_t kStreamed = 32LL << 20;    // elements: above this nothing written is found in a cache again
constexpr int kAhead = 4096;                      // bytes that reads are prefetched ahead
constexpr int kNumbers = 5;                       // of a chunk: a, b, k; for double data also sums of x - x and y - y

// As many elements as a vector has doubles. (GCC 12 makes two halves of the conversions with 64 bytes.)
PYFACE_INLINE f64v load_double(const double* p) { return load(p); }
#if defined(__AVX512F__)
PYFACE_INLINE f64v load_double(const float* p) { return (f64v)_mm512_cvtps_pd(_mm256_loadu_ps(p)); }
PYFACE_INLINE f64v load_double(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return (f64v)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
#else
typedef float f32h __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t u32h __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint16_t u16q __attribute__((vector_size(kVectorBytes / 4)));
PYFACE_INLINE f64v load_double(const float* p) {
  f32h h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, f64v);
}
PYFACE_INLINE f64v load_double(const bf16* p) {
  u16q q;
  std::memcpy(&q, p, sizeof q);
  return __builtin_convertvector((f32h)(__builtin_convertvector(q, u32h) << 16), f64v);
}
#endif

PYFACE_INLINE void narrow(double v, double* p) { *p = v; }
PYFACE_INLINE void narrow(float v, float* p) { *p = v; }
PYFACE_INLINE void narrow(float v, bf16* p) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  p->bits = (std::uint16_t)(v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

PYFACE_INLINE bool is_finite(double v) { return v - v == 0; }

template <class T>
PYFACE_INLINE void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
}

std::int64_t total_size(const Sharpness& a) {
  std::int64_t total = 0;
  for (std::int64_t p = 0; p < a.count; ++p) total += a.tensors[p].size;
  return total;
}

std::int64_t chunk_count(const Sharpness& a) {
  std::int64_t total = 0;
  for (std::int64_t p = 0; p < a.count; ++p) total += ceil_div(a.tensors[p].size, kChunk);
  return total;
}

// body(tensor, its number, first element, elements, chunk's number)
template <class Body>
void for_chunks(const Sharpness& a, int threads, Body body) {
  if (total_size(a) < kSerial) threads = 1;
  parallel_for(threads, chunk_count(a), [&](std::int64_t begin, std::int64_t end) {
    std::int64_t p = 0, before = 0;  // chunks of the tensors before p
    for (std::int64_t c = begin; c < end; ++c) {
      while (c >= before + ceil_div(a.tensors[p].size, kChunk)) before += ceil_div(a.tensors[p++].size, kChunk);
      const std::int64_t first = (c - before) * kChunk;
      body(a.tensors[p], p, first, smaller(a.tensors[p].size - first, kChunk), c);
    }
    streaming_fence();
  });
}

template <class W, class G>
struct Types {
  typedef W weight;
  typedef G grad;
};

// Calls body(Types<W, G>{}) for the types of a tensor.
template <class Body>
PYFACE_INLINE void with_types(const SharpnessTensor& t, Body body) {
  if (t.grad_type == DType::f64) return body(Types<double, double>{});
  if (t.weight_type == DType::bf16) return body(Types<bf16, bf16>{});
  if (t.grad_type == DType::bf16) return body(Types<float, bf16>{});
  return body(Types<float, float>{});
}

// ---- sums -------------------------------------------------------------------------------------------------------------------

// Of y alone (a and k are then 0), of y times |w| + eta, or of x and y.
enum class Sums { norm, adaptive, dots };

template <Sums kind, class W, class G>
void sum_chunk(const W* w, const G* x, const G* y, double eta, std::int64_t n, double* result) {
  constexpr int lanes = Lanes<f64v>::count, unroll = 4;
  f64v a[unroll] = {}, b[unroll] = {}, k[unroll] = {}, bad_x = {}, bad_y = {};
  constexpr bool doubles = sizeof(G) == sizeof(double);
  auto take = [&](int j, f64v xv, f64v yv) __attribute__((always_inline)) {
    if (kind == Sums::dots) a[j] += xv * xv, k[j] += xv * yv;
    b[j] += yv * yv;
  };
  // Two halves of the chunk at once: two places in memory are read faster than one.
  const std::int64_t half = n / (unroll * lanes) * (unroll / 2 * lanes);
  for (std::int64_t at = 0; at < half; at += unroll / 2 * lanes) {
    for (int j = 0; j < unroll; ++j) {
      const std::int64_t i = at + j / 2 * half + j % 2 * lanes;
      if (j % 2 == 0) prefetch(y + i);
      if (j % 2 == 0 && kind == Sums::dots) prefetch(x + i);
      f64v yv = load_double(y + i), xv = {};
      if (kind == Sums::dots) xv = load_double(x + i);
      if (doubles) bad_x += xv - xv, bad_y += yv - yv;
      if (kind == Sums::adaptive) {
        const f64v t = absolute(load_double(w + i)) + eta;
        if (doubles) bad_y += t - t;
        yv *= t;
      }
      take(j, xv, yv);
    }
  }
  std::int64_t i = 2 * half;
  for (; i < n; ++i) {  // one element in lane 0
    f64v xv = {}, yv = {};
    yv[0] = widen(y[i]);
    if (kind == Sums::dots) xv[0] = widen(x[i]);
    if (doubles) bad_x += xv - xv, bad_y += yv - yv;
    if (kind == Sums::adaptive) {
      const double wide = widen(w[i]), t = (wide < 0 ? -wide : wide) + eta;
      if (doubles) bad_y[0] += t - t;
      yv[0] *= t;
    }
    take(0, xv, yv);
  }
  result[0] = sum_lanes((a[0] + a[1]) + (a[2] + a[3]));
  result[1] = sum_lanes((b[0] + b[1]) + (b[2] + b[3]));
  result[2] = sum_lanes((k[0] + k[1]) + (k[2] + k[3]));
  result[3] = sum_lanes(bad_x);
  result[4] = sum_lanes(bad_y);
}

}  // namespace

// ---- entry points -----------------------------------------------------------------------------------------------------------

std::int64_t sharpness_scratch(const Sharpness& a) {
  return round_up((chunk_count(a) + 1) * kNumbers * (std::int64_t)sizeof(double), 64);
}

void sharpness_sums(const Sharpness& s, void* scratch, int threads) {
  double* partial = static_cast<double*>(scratch);
  for_chunks(s, threads, [&](const SharpnessTensor& t, std::int64_t, std::int64_t first, std::int64_t n, std::int64_t c) {
    with_types(t, [&](auto types) {
      typedef typename decltype(types)::weight W;
      typedef typename decltype(types)::grad G;
      const W* w = static_cast<const W*>(t.weight) + first;
      const G* y = static_cast<const G*>(t.y) + first;
      double* result = partial + c * kNumbers;
      if (t.x && t.x == t.y) {
        sum_chunk<Sums::norm>(w, y, y, 0, n, result);
        result[0] = result[2] = result[1], result[3] = result[4];
      } else if (t.x)
        sum_chunk<Sums::dots>(w, static_cast<const G*>(t.x) + first, y, 0, n, result);
      else if (s.adaptive)
        sum_chunk<Sums::adaptive>(w, y, y, s.eta, n, result);
      else
        sum_chunk<Sums::norm>(w, y, y, 0, n, result);
    });
  });
  double* all = s.sums + 3 * s.count;
  all[0] = all[1] = all[2] = 0;
  s.nonfinite[0] = s.nonfinite[1] = 0;
  std::int64_t c = 0;
  for (std::int64_t p = 0; p < s.count; ++p) {
    const SharpnessTensor& t = s.tensors[p];
    double* sums = s.sums + 3 * p;
    sums[0] = sums[1] = sums[2] = 0;
    for (std::int64_t last = c + ceil_div(t.size, kChunk); c < last; ++c) {
      const double* numbers = partial + c * kNumbers;
      for (int i = 0; i < 3; ++i) sums[i] += numbers[i];
      const int flags = t.grad_type == DType::f64 ? 3 : 0;  // the squares of doubles may overflow
      if (!is_finite(numbers[flags])) s.nonfinite[0] = 1;
      if (!is_finite(numbers[flags + 1])) s.nonfinite[1] = 1;
    }
    for (int i = 0; i < 3; ++i) all[i] += sums[i];
  }
}

void sharpness_perturb(const Sharpness& s, int threads) {
  const double b = s.sums[3 * s.count + 1];
  const bool moves = s.nonfinite[1] == 0 && b > 0;
  const double over_norm = moves ? 1 / (__builtin_sqrt(b) + s.eps) : 0;
  const bool streams = total_size(s) > kStreamed;
  for_chunks(s, threads, [&](const SharpnessTensor& t, std::int64_t p, std::int64_t first, std::int64_t n, std::int64_t) {
    with_types(t, [&](auto types) {
      typedef typename decltype(types)::weight W;
      typedef typename decltype(types)::grad G;
      typedef typename Storage<W>::compute C;
      typedef typename Storage<W>::vector V;
      W* w = static_cast<W*>(t.weight) + first;
      W* saved = static_cast<W*>(t.saved) + first;
      const G* y = static_cast<const G*>(t.y) + first;
      const C factor = (C)(moves ? s.rho[p] * over_norm - s.shrink : 0), eta = (C)s.eta;
      if (!moves || factor == 0) {
        std::memcpy(saved, w, n * sizeof(W));
        return;
      }
      constexpr int lanes = Lanes<V>::count;
      const bool streamed = streams && is_vector_aligned(saved);
      std::int64_t i = 0;
      for (; i + lanes <= n; i += lanes) {
        prefetch(w + i);
        prefetch(y + i);
        const V wv = load(w + i);
        V e = load(y + i) * factor;
        if (s.adaptive) {
          const V t2 = absolute(wv) + eta;
          e *= t2 * t2;
        }
        W kept[lanes];
        std::memcpy(kept, w + i, sizeof kept);  // bits, not numbers: a NaN keeps its payload
        if (streamed && sizeof(W) > 2)
          store_streaming(saved + i, wv);
        else
          std::memcpy(saved + i, kept, sizeof kept);
        store(w + i, wv + e);
      }
      for (; i < n; ++i) {
        const C wide = widen(w[i]);
        C e = (C)widen(y[i]) * factor;
        if (s.adaptive) {
          const C t2 = (wide < 0 ? -wide : wide) + eta;
          e *= t2 * t2;
        }
        saved[i] = w[i];
        narrow(wide + e, w + i);
      }
    });
  });
}

void sharpness_restore(const Sharpness& s, int threads) {
  const bool streams = total_size(s) > kStreamed;
  for_chunks(s, threads, [&](const SharpnessTensor& t, std::int64_t, std::int64_t first, std::int64_t n, std::int64_t) {
    const std::int64_t width = t.weight_type == DType::f64 ? 8 : t.weight_type == DType::f32 ? 4 : 2;
    char* w = static_cast<char*>(t.weight) + first * width;
    const char* saved = static_cast<const char*>(t.saved) + first * width;
    std::int64_t bytes = n * width, i = 0;
    if (streams && is_vector_aligned(w))
      for (; i + kVectorBytes <= bytes; i += kVectorBytes) {
        prefetch(saved + i);
        f32v bits;
        std::memcpy(&bits, saved + i, sizeof bits);
        store_streaming(reinterpret_cast<float*>(w + i), bits);
      }
    std::memcpy(w + i, saved + i, bytes - i);
  });
}

void sharpness_combine(const Sharpness& s, int threads) {
  if (s.nonfinite[0] != 0 || s.nonfinite[1] != 0) return;
  for_chunks(s, threads, [&](const SharpnessTensor& t, std::int64_t p, std::int64_t first, std::int64_t n, std::int64_t) {
    const SharpnessPair pair = sharpness_pair(s, p);
    if (pair.u == 1 && pair.v == 0) return;
    with_types(t, [&](auto types) {
      typedef typename decltype(types)::grad G;
      typedef typename Storage<G>::compute C;
      typedef typename Storage<G>::vector V;
      G* x = static_cast<G*>(t.x) + first;
      const G* y = static_cast<const G*>(t.y) + first;
      if (pair.u == 0 && pair.v == 1) {
        std::memcpy(x, y, n * sizeof(G));
        return;
      }
      const C u = (C)pair.u, v = (C)pair.v;
      std::int64_t i = 0;
      for (; i + Lanes<V>::count <= n; i += Lanes<V>::count) {
        prefetch(x + i);
        prefetch(y + i);
        store(x + i, load(x + i) * u + load(y + i) * v);
      }
      for (; i < n; ++i) narrow((C)widen(x[i]) * u + (C)widen(y[i]) * v, x + i);
    });
  });
}

void sharpness_step(const Sharpness& s, int threads) {
  if (s.nonfinite[0] != 0 || s.nonfinite[1] != 0) return sharpness_restore(s, threads);
  const bool streams = total_size(s) > kStreamed;
  for_chunks(s, threads, [&](const SharpnessTensor& t, std::int64_t p, std::int64_t first, std::int64_t n, std::int64_t) {
    const SharpnessPair pair = sharpness_pair(s, p);
    with_types(t, [&](auto types) {
      typedef typename decltype(types)::weight W;
      typedef typename decltype(types)::grad G;
      typedef typename Storage<W>::compute C;
      typedef typename Storage<W>::vector V;
      W* w = static_cast<W*>(t.weight) + first;
      W* m = t.momentum ? static_cast<W*>(t.momentum) + first : nullptr;
      const W* saved = static_cast<const W*>(t.saved) + first;
      // A gradient with the coefficient 0 is not read.
      const G* x = static_cast<const G*>(pair.u == 0 ? t.y : t.x) + first;
      const G* y = static_cast<const G*>(pair.v == 0 ? t.x : t.y) + first;
      const C sign = s.maximize ? -1 : 1, u = sign * (C)pair.u, v = sign * (C)pair.v;
      const C lr = (C)s.lr, mu = (C)s.momentum, fresh = (C)(s.first ? 1 : 1 - s.dampening), decay = (C)s.weight_decay;
      auto update = [&](auto old, auto xv, auto yv, auto mv, auto* next) __attribute__((always_inline)) {
        auto g = xv * u + yv * v + old * decay;
        if (m) {
          *next = s.first ? g : mv * mu + g * fresh;
          g = s.nesterov ? g + *next * mu : *next;
        }
        return old - g * lr;
      };
      const bool streamed = streams && is_vector_aligned(w);
      constexpr int lanes = Lanes<V>::count;
      std::int64_t i = 0;
      for (; i + lanes <= n; i += lanes) {
        prefetch(x + i);
        prefetch(y + i);
        prefetch(saved + i);
        V mv = {}, next = {};
        if (m && !s.first) mv = load(m + i);
        const V result = update(load(saved + i), load(x + i), load(y + i), mv, &next);
        if (m) store(m + i, next);
        if (streamed)
          store_streaming(w + i, result);
        else
          store(w + i, result);
      }
      for (; i < n; ++i) {
        C next = 0;
        const C mv = m && !s.first ? (C)widen(m[i]) : 0;
        const C result = update((C)widen(saved[i]), (C)widen(x[i]), (C)widen(y[i]), mv, &next);
        if (m) narrow(next, m + i);
        narrow(result, w + i);
      }
    });
  });
}

}  // namespace pyface::cpu::PYFACE_ISA
