// Attention block by block with a running softmax: a warp owns 16 rows of the result, the warps of a block share tiles of
// the other side in shared memory, and scores live in registers only. Extra rows and keys are one list, walked in place.
//
// One kernel goes forward and one back. Going back there are three kinds of work, each owning the rows it writes: blocks of
// queries (over the list), of keys (over queries) and of extra rows (over queries, a partial sum for every sample), so that
// nothing is added by atomics. bf16 and f16, and f32 where TF32 is allowed, are multiplied by tensor cores; f32 and f64 by
// plain threads in the same register layout.
//
// Written without a GPU, so not tuned on one. To try there, in this order: two buffers of shared memory filled by cp.async;
// own rows kept as fragments in registers; wgmma with 128 queries for long sequences on Hopper.
#include "cuda/attention.h"

#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/numbers.h"

#include <cmath>

namespace pyface::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRows = 16;  // that a warp owns
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
constexpr bool kHalf = sizeof(T) == 2;

// Columns of a tile that are multiplied or summed at a time; more columns are walked in pieces, and scores are then computed
// once for every piece of the result.
template <typename T>
constexpr int kBackwardDepth = sizeof(T) == 8 ? 32 : 64;

// Warps of a block and rows of the other side's tiles: what fits into 48 KB. 5 warps own 80 rows: CLIP's 77 in one block.
template <typename T, int D>
constexpr int kForwardWarps = kHalf<T> && D == 64 ? 8 : 5;
template <typename T, int D>
constexpr int kForwardOthers = !kHalf<T> ? 16 : D == 64 ? 64 : 32;
template <typename T>
constexpr int kBackwardWarps = kHalf<T> ? 8 : sizeof(T) == 4 ? 4 : 3;
template <typename T>
constexpr int kBackwardOthers = kHalf<T> ? 32 : 16;

// Length of a row in shared memory: 16 bytes more than its columns, against bank conflicts.
template <typename T, int D>
constexpr int kPitch = D + 16 / int(sizeof(T));

template <typename R>
__device__ R infinity() {
  return static_cast<R>(INFINITY);
}

inline __device__ float exponential(float v) { return exp2f(v * 1.4426950408889634f); }
inline __device__ double exponential(double v) { return exp(v); }
inline __device__ float logarithm(float v) { return logf(v); }
inline __device__ double logarithm(double v) { return log(v); }

// Over the 4 lanes that share rows.
template <typename R>
__device__ R row_sum(R v) {
  v += __shfl_xor_sync(kAll, v, 1);
  return v + __shfl_xor_sync(kAll, v, 2);
}
template <typename R>
__device__ R row_max(R v) {
  const R other = __shfl_xor_sync(kAll, v, 1);
  v = v > other ? v : other;
  const R third = __shfl_xor_sync(kAll, v, 2);
  return v > third ? v : third;
}

template <typename T>
__device__ bool is_finite(T v) {
  const Real<T> wide = widen(v);
  return wide - wide == Real<T>(0);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Rows of one head; `single`: f32 beside a shorter T.
struct Source {
  const char* data;
  std::int64_t stride, count;
  bool single;
};

// Rows of one or two sources, one after the other.
struct List {
  Source first, second;
};

template <typename T>
__device__ Source source(const AttentionTensor& t, std::int64_t b, std::int64_t h, std::int64_t count, bool single = false) {
  const std::int64_t offset = b * t.strides[0] + h * t.strides[1];
  const std::int64_t size = single ? sizeof(float) : sizeof(T);
  return {static_cast<const char*>(t.data) + offset * size, t.strides[2], count, single};
}

// Rows [first, first + rows) of the list, columns [column, column + D): what does not exist reads as 0. With Tf32 rounded to
// that. Whether something in this thread's part is not finite.
template <typename T, bool Tf32Allowed, int D>
__device__ bool load_rows(const List& list, std::int64_t first, int rows, std::int64_t column, std::int64_t columns, T* tile) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = D / kPiece;
  bool strange = false;
  for (int e = threadIdx.x; e < rows * kPieces; e += blockDim.x) {
    const int row = e / kPieces, at = e % kPieces * kPiece;
    const std::int64_t place = first + row, count = columns - column - at;
    const bool extra = place < list.first.count;
    const Source& from = extra ? list.first : list.second;
    const std::int64_t in_source = extra ? place : place - list.first.count;
    alignas(16) T values[kPiece];
#pragma unroll
    for (T& v : values) v = T{};
    if (in_source < from.count && count > 0) {
      const std::int64_t offset = in_source * from.stride + column + at;
      if (kHalf<T> && from.single) {
        const float* data = reinterpret_cast<const float*>(from.data) + offset;
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          if (i < count) narrow(Real<T>(data[i]), values[i]);
        }
      } else {
        const T* data = reinterpret_cast<const T*>(from.data) + offset;
        if (count >= kPiece && aligned(data)) {
          // Said to be global memory, which the pointer itself no longer tells the compiler.
          *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(data));
        } else {
#pragma unroll
          for (int i = 0; i < kPiece; ++i) {
            if (i < count) values[i] = data[i];
          }
        }
      }
    }
#pragma unroll
    for (T& v : values) {
      strange = strange || !is_finite(v);
      if constexpr (Tf32Allowed) v = to_tf32(v);
    }
    *reinterpret_cast<uint4*>(tile + row * kPitch<T, D> + at) = *reinterpret_cast<const uint4*>(values);
  }
  return strange;
}

// What a lane's two rows see of the other side: [begin, end).
struct Sight {
  std::int64_t begin[2], end[2];
  __device__ bool sees(int row, std::int64_t other) const { return begin[row] <= other && other < end[row]; }
};

// ---- products -------------------------------------------------------------------------------------------------------
// A lane holds of a tile of 16 x 8 results what mma.h says: sums[tile][2 row + column].

inline __device__ int group() { return threadIdx.x % kWarp / 4; }
inline __device__ int in_group() { return threadIdx.x % 4; }

template <typename T>
__device__ unsigned pair(Real<T> low, Real<T> high) {
  T both[2];
  narrow(low, both[0]);
  narrow(high, both[1]);
  unsigned bits;
  static_assert(sizeof both == sizeof bits, "two elements of 2 bytes");
  memcpy(&bits, both, sizeof bits);
  return bits;
}

template <typename T>
__device__ unsigned word(const T* at) {
  return *reinterpret_cast<const unsigned*>(at);
}

// sums[i][j] += sum over k < depth of own[i][k] other[j][k], for the warp's 16 rows and N others.
template <typename T, bool Tf32Allowed, int D, int N>
__device__ void product_of_rows(const T* own, const T* other, int depth, Real<T> (&sums)[N / 8][4]) {
  constexpr int kP = kPitch<T, D>;
  const int g = group(), t = in_group();
  if constexpr (kHalf<T>) {
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      if (k >= depth) break;
      const T* left = own + g * kP + k + 2 * t;
      const unsigned a[4] = {word(left), word(left + 8 * kP), word(left + 8), word(left + 8 * kP + 8)};
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const T* right = other + (8 * n + g) * kP + k + 2 * t;
        const unsigned b[2] = {word(right), word(right + 8)};
        mma(T{}, sums[n], a, b);
      }
    }
  } else if constexpr (Tf32Allowed) {
#pragma unroll
    for (int k = 0; k < D; k += 8) {
      if (k >= depth) break;
      const T* left = own + g * kP + k + t;
      const unsigned a[4] = {word(left), word(left + 8 * kP), word(left + 4), word(left + 8 * kP + 4)};
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const T* right = other + (8 * n + g) * kP + k + t;
        const unsigned b[2] = {word(right), word(right + 4)};
        mma(Tf32{}, sums[n], a, b);
      }
    }
  } else {
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      const T upper = own[g * kP + k], lower = own[(g + 8) * kP + k];
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const T left = other[(8 * n + 2 * t) * kP + k], right = other[(8 * n + 2 * t + 1) * kP + k];
        sums[n][0] += upper * left;
        sums[n][1] += upper * right;
        sums[n][2] += lower * left;
        sums[n][3] += lower * right;
      }
    }
  }
}

// sums[i][d] += sum over j < N of factors[i][j] other[j][d], term by term and only where row i sees first + j: 0 times what
// is not a number is not 0. With StrangeOnly only of what is not finite.
template <typename T, bool StrangeOnly, int D, int N>
__device__ void add_seen(const Real<T> (&factors)[N / 8][4], const T* other, const Sight& sight, std::int64_t first,
                         Real<T> (&sums)[D / 8][4]) {
  using R = Real<T>;
  const int t = in_group();
#pragma unroll 1
  for (int n = 0; n < N / 8; ++n) {
    R mine[4];
#pragma unroll
    for (int m = 0; m < N / 8; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[i] = m == n || m == 0 ? factors[m][i] : mine[i];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int owner = int(threadIdx.x) % kWarp / 4 * 4 + j / 2;
      const R upper = __shfl_sync(kAll, mine[j % 2], owner), lower = __shfl_sync(kAll, mine[2 + j % 2], owner);
      const std::int64_t place = first + 8 * n + j;
      const bool upper_sees = sight.sees(0, place), lower_sees = sight.sees(1, place);
      const T* right = other + (8 * n + j) * kPitch<T, D> + 2 * t;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (StrangeOnly && is_finite(right[8 * d + i])) continue;
          const R v = widen(right[8 * d + i]);
          if (upper_sees) sums[d][i] += upper * v;
          if (lower_sees) sums[d][2 + i] += lower * v;
        }
      }
    }
  }
}

// The part of a word of one or two elements that is finite.
template <typename T>
__device__ unsigned finite_part(unsigned bits) {
  if constexpr (kHalf<T>) {
    constexpr unsigned kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
    if ((bits & kExponent) == kExponent) bits &= 0xffff0000u;
    if ((bits >> 16 & kExponent) == kExponent) bits &= 0x0000ffffu;
  } else if ((bits & 0x7f800000u) == 0x7f800000u) {
    bits = 0;
  }
  return bits;
}

// The same sum on tensor cores, of what is finite: without Checked that must be everything.
template <typename T, bool Checked, int D, int N>
__device__ void add_tensor(const Real<T> (&factors)[N / 8][4], const T* other, int columns, Real<T> (&sums)[D / 8][4]) {
  constexpr int kP = kPitch<T, D>;
  const int g = group(), t = in_group(), lane = threadIdx.x % kWarp;
  if constexpr (kHalf<T>) {
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      const unsigned a[4] = {pair<T>(factors[n][0], factors[n][1]), pair<T>(factors[n][2], factors[n][3]),
                             pair<T>(factors[n + 1][0], factors[n + 1][1]), pair<T>(factors[n + 1][2], factors[n + 1][3])};
      const T* row = other + (8 * n + lane % 16) * kP + lane / 16 * 8;
#pragma unroll
      for (int d = 0; d < D / 8; d += 2) {
        if (8 * d >= columns) break;
        unsigned b[4];
        load_transposed(b, row + 8 * d);
        if constexpr (Checked) {
#pragma unroll
          for (unsigned& bits : b) bits = finite_part<T>(bits);
        }
        const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        mma(T{}, sums[d], a, left);
        mma(T{}, sums[d + 1], a, right);
      }
    }
  } else {
    // A lane has columns 2 t and 2 t + 1 of the factors where the layout wants t and t + 4: rows of `other` are taken in that
    // order as well.
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const float rounded[4] = {to_tf32(factors[n][0]), to_tf32(factors[n][2]), to_tf32(factors[n][1]), to_tf32(factors[n][3])};
      unsigned a[4];
      memcpy(a, rounded, sizeof a);
      const T* row = other + (8 * n + 2 * t) * kP + g;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= columns) break;
        unsigned b[2] = {word(row + 8 * d), word(row + kP + 8 * d)};
        if constexpr (Checked) b[0] = finite_part<T>(b[0]), b[1] = finite_part<T>(b[1]);
        mma(Tf32{}, sums[d], a, b);
      }
    }
  }
}

// The sum by the fastest way that is right; `strange`: hidden rows of `other` may hold what is not finite. What is finite is
// added in one order in either case, so that rows that see nothing strange keep their bits.
template <typename T, bool Tf32Allowed, int D, int N>
__device__ void add_product(const Real<T> (&factors)[N / 8][4], const T* other, const Sight& sight, std::int64_t first,
                            bool strange, int columns, Real<T> (&sums)[D / 8][4]) {
  if constexpr (kHalf<T> || Tf32Allowed) {
    if (strange) {
      add_tensor<T, true, D, N>(factors, other, columns, sums);
      add_seen<T, true, D, N>(factors, other, sight, first, sums);
    } else {
      add_tensor<T, false, D, N>(factors, other, columns, sums);
    }
  } else {
    add_seen<T, false, D, N>(factors, other, sight, first, sums);
  }
}

// Writes a lane's two rows, times `factors`.
template <typename T, int D>
__device__ void store_rows(T* data, std::int64_t stride, std::int64_t row, std::int64_t rows, std::int64_t column,
                           std::int64_t columns, const Real<T> (&sums)[D / 8][4], Real<T> upper, Real<T> lower) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t r = row + 8 * half;
    if (r >= rows) continue;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::int64_t c = column + 8 * d + 2 * in_group() + i;
        if (c < columns) narrow(sums[d][2 * half + i] * (half ? lower : upper), data[r * stride + c]);
      }
    }
  }
}

// ---- the list of extra rows and keys --------------------------------------------------------------------------------

// Entries of the list that query i sees: the first so many.
__device__ std::int64_t seen_by(const AttentionCall& call, std::int64_t query) {
  if (!call.causal) return call.extras + call.keys;
  const std::int64_t keys = query + call.keys - call.queries + 1;
  return call.extras + (keys < 0 ? 0 : keys < call.keys ? keys : call.keys);
}

// The first query that sees entry `place` of the list.
__device__ std::int64_t first_to_see(const AttentionCall& call, std::int64_t place) {
  if (!call.causal || place < call.extras) return 0;
  const std::int64_t query = place - call.extras - (call.keys - call.queries);
  return query < 0 ? 0 : query;
}

// What is added to a score beside scale times the product: the bias of an extra row, or where a key stands on the grid.
template <typename R>
struct Entry {
  R bias, x, y;
};

template <typename R>
__device__ Entry<R> entry(const AttentionCall& call, std::int64_t h, std::int64_t place) {
  Entry<R> e{0, 0, 0};
  if (place < call.extras) {
    if (call.bias) e.bias = static_cast<const R*>(call.bias)[h * call.bias_strides[0] + place * call.bias_strides[1]];
  } else if (call.prior) {
    const std::int64_t key = place - call.extras, row = key / call.grid_width;
    e.x = static_cast<R>(key - row * call.grid_width);
    e.y = static_cast<R>(row);
  }
  return e;
}

template <typename R>
struct Prior {
  R centre[2], sharpness[2];
};

template <typename R>
__device__ Prior<R> prior(const AttentionCall& call, std::int64_t query_of_all, bool exists) {
  const R* at = static_cast<const R*>(call.prior) + 4 * query_of_all;
  if (!exists) return {{0, 0}, {0, 0}};
  return {{at[0], at[1]}, {at[2], at[3]}};
}

template <typename R>
__device__ R score(const AttentionCall& call, R product, bool is_extra, const Entry<R>& e, const Prior<R>& p) {
  const R scaled = static_cast<R>(call.scale) * product;
  if (is_extra) return scaled + e.bias;
  if (!call.prior) return scaled;
  const R x = p.centre[0] - e.x, y = p.centre[1] - e.y;
  return scaled - (p.sharpness[0] * x * x + p.sharpness[1] * y * y) / static_cast<R>(call.smooth);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename T, bool Tf32Allowed, int D>
__global__ void __launch_bounds__(kForwardWarps<T, D> * kWarp) forward_kernel(AttentionCall call) {
  using R = Real<T>;
  constexpr int N = kForwardOthers<T, D>, kP = kPitch<T, D>;
  alignas(16) __shared__ T own[kForwardWarps<T, D> * kRows * kP];
  alignas(16) __shared__ T keys[N * kP];
  alignas(16) __shared__ T values[N * kP];
  __shared__ Entry<R> entries[N];
  const int rows = blockDim.x / kWarp * kRows, warp_row = threadIdx.x / kWarp * kRows;
  const std::int64_t blocks = ceil_div(call.queries, rows), pieces = ceil_div(call.width, D);
  const std::int64_t depths = ceil_div(call.depth, D);
  const std::int64_t items = call.batch * call.heads * blocks * pieces;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t piece = item % pieces, rest = item / pieces, head = rest / blocks;
    const std::int64_t block = blocks - 1 - (rest - head * blocks);  // causal: the longest first
    const std::int64_t b = head / call.heads, h = head - b * call.heads;
    const List query{source<T>(call.query, b, h, 0), source<T>(call.query, b, h, call.queries)};
    const bool single = call.extra_type != call.type;
    const List key{source<T>(call.extra_key, b, h, call.extras, single), source<T>(call.key, b, h, call.keys)};
    const List value{source<T>(call.extra_value, b, h, call.extras, single), source<T>(call.value, b, h, call.keys)};
    const std::int64_t first = block * rows, row = first + warp_row + group();
    const std::int64_t last = first + rows < call.queries ? first + rows : call.queries;
    const std::int64_t warp_last = first + warp_row + kRows < last ? first + warp_row + kRows : last;
    Sight sight{{0, 0}, {0, 0}};
    Prior<R> priors[2]{};
    R top[2], total[2] = {0, 0}, sums[D / 8][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = row + 8 * i < call.queries;
      if (exists) sight.end[i] = seen_by(call, row + 8 * i);
      if (call.prior) priors[i] = prior<R>(call, head * call.queries + row + 8 * i, exists);
      top[i] = -infinity<R>();
    }
#pragma unroll
    for (auto& line : sums) {
#pragma unroll
      for (R& sum : line) sum = 0;
    }
    const std::int64_t seen = seen_by(call, last - 1), seen_first = seen_by(call, first);
    const std::int64_t warp_seen = first + warp_row < last ? seen_by(call, warp_last - 1) : 0;
    for (std::int64_t at = 0; at < seen; at += N) {
      R scores[N / 8][4];
#pragma unroll
      for (auto& line : scores) {
#pragma unroll
        for (R& s : line) s = 0;
      }
      bool strange = false;
      for (std::int64_t c = 0; c < depths; ++c) {
        __syncthreads();  // tiles of before have been read
        if (depths > 1 || at == 0) load_rows<T, Tf32Allowed, D>(query, first, rows, c * D, call.depth, own);
        load_rows<T, Tf32Allowed, D>(key, at, N, c * D, call.depth, keys);
        if (c == 0) {
          strange = load_rows<T, Tf32Allowed, D>(value, at, N, piece * D, call.width, values);
          if (call.prior || at < call.extras) {
            for (int j = threadIdx.x; j < N; j += blockDim.x) entries[j] = entry<R>(call, h, at + j);
          }
          strange = __syncthreads_or(strange) && at + N > seen_first;
        } else {
          __syncthreads();
        }
        const std::int64_t left = call.depth - c * D;
        if (at < warp_seen) {
          product_of_rows<T, Tf32Allowed, D, N>(own + warp_row * kP, keys, left < D ? int(left) : D, scores);
        }
      }
      if (at >= warp_seen) continue;
      R highest[2] = {-infinity<R>(), -infinity<R>()};
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 8 * n + 2 * in_group() + i % 2;
          const bool extra = at + j < call.extras;
          const Entry<R> e = extra || call.prior ? entries[j] : Entry<R>{0, 0, 0};
          const R s = score(call, scores[n][i], extra, e, priors[i / 2]);
          scores[n][i] = sight.sees(i / 2, at + j) ? s : -infinity<R>();
          highest[i / 2] = scores[n][i] > highest[i / 2] ? scores[n][i] : highest[i / 2];
        }
      }
      R before[2], shift[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        highest[i] = row_max(highest[i]);
        const R now = highest[i] > top[i] ? highest[i] : top[i];
        shift[i] = now == -infinity<R>() ? R(0) : now;
        before[i] = exponential(top[i] - shift[i]);
        total[i] *= before[i];
        top[i] = now;
      }
#pragma unroll
      for (auto& line : sums) {
#pragma unroll
        for (int i = 0; i < 4; ++i) line[i] *= before[i / 2];
      }
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[n][i] = exponential(scores[n][i] - shift[i / 2]);
          total[i / 2] += scores[n][i];
        }
      }
      const std::int64_t columns = call.width - piece * D;
      add_product<T, Tf32Allowed, D, N>(scores, values, sight, at, strange, columns < D ? int(columns) : D, sums);
    }
    R factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] = row_sum(total[i]);
      factor[i] = total[i] == R(0) ? R(0) : 1 / total[i];
      if (call.lse && piece == 0 && in_group() == 0 && row + 8 * i < call.queries) {
        const R lse = top[i] == -infinity<R>() ? total[i] : top[i] + logarithm(total[i]);
        static_cast<R*>(call.lse)[head * call.queries + row + 8 * i] = total[i] == R(0) ? -infinity<R>() : lse;
      }
    }
    T* out = static_cast<T*>(call.out.data) + b * call.out.strides[0] + h * call.out.strides[1];
    store_rows<T, D>(out, call.out.strides[2], row, call.queries, piece * D, call.width, sums, factor[0], factor[1]);
    __syncthreads();  // `own` has been read
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// delta = sum of grad_out times out - grad_lse: one warp to a query.
template <typename T>
__global__ void __launch_bounds__(256) delta_kernel(AttentionCall call, AttentionBackward wanted) {
  using R = Real<T>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const std::int64_t items = call.batch * call.heads * call.queries;
  for (std::int64_t item = std::int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; item < items;
       item += std::int64_t(gridDim.x) * warps) {
    const std::int64_t head = item / call.queries, i = item - head * call.queries;
    const std::int64_t b = head / call.heads, h = head - b * call.heads;
    const auto row = [&](const AttentionTensor& t) {
      return static_cast<const T*>(t.data) + b * t.strides[0] + h * t.strides[1] + i * t.strides[2];
    };
    const T *grad = row(wanted.grad_out), *out = row(call.out);
    R sum = 0;
    for (std::int64_t c = lane; c < call.width; c += kWarp) sum += widen(grad[c]) * widen(out[c]);
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (lane == 0) {
      static_cast<R*>(wanted.delta)[item] = sum - (wanted.grad_lse ? static_cast<const R*>(wanted.grad_lse)[item] : R(0));
    }
  }
}

// What is added up for queries: the statistics of the softmax and the prior.
template <typename R>
struct Query {
  R lse, delta;
  Prior<R> prior;
};

template <typename R>
__device__ Query<R> query_of(const AttentionCall& call, const AttentionBackward& wanted, std::int64_t head, std::int64_t i) {
  if (i >= call.queries) return {-infinity<R>(), 0, {{0, 0}, {0, 0}}};
  const std::int64_t at = head * call.queries + i;
  Query<R> q{static_cast<const R*>(call.lse)[at], static_cast<const R*>(wanted.delta)[at], {{0, 0}, {0, 0}}};
  if (call.prior) q.prior = prior<R>(call, at, true);
  return q;
}

// How the grid is cut: for every head first its blocks of queries, then of keys, then of extra rows.
struct Cut {
  std::int64_t query_blocks, key_blocks, extra_blocks, pieces;
};

template <typename T, bool Tf32Allowed>
__global__ void __launch_bounds__(kBackwardWarps<T> * kWarp)
    backward_kernel(AttentionCall call, AttentionBackward wanted, Cut cut) {
  using R = Real<T>;
  constexpr int D = kBackwardDepth<T>, N = kBackwardOthers<T>, kP = kPitch<T, D>, kOwn = kBackwardWarps<T> * kRows;
  alignas(16) __shared__ T own_factor[kOwn * kP];  // of scores: queries or keys
  alignas(16) __shared__ T own_value[kOwn * kP];   // of their gradients: grad_out or values
  alignas(16) __shared__ T factor[N * kP];
  alignas(16) __shared__ T value[N * kP];
  __shared__ Entry<R> entries[N];
  __shared__ Query<R> queries[N];
  const int rows = blockDim.x / kWarp * kRows, warp_row = threadIdx.x / kWarp * kRows;
  const std::int64_t blocks = cut.query_blocks + cut.key_blocks + cut.extra_blocks;
  const std::int64_t depths = ceil_div(call.depth, D), widths = ceil_div(call.width, D);
  const std::int64_t chunks = depths > widths ? depths : widths;
  for (std::int64_t item = blockIdx.x; item < call.batch * call.heads * blocks * cut.pieces; item += gridDim.x) {
    const std::int64_t piece = item % cut.pieces, rest = item / cut.pieces, head = rest / blocks;
    std::int64_t block = rest - head * blocks;
    const std::int64_t b = head / call.heads, h = head - b * call.heads;
    const bool of_queries = block < cut.query_blocks, of_extras = block >= cut.query_blocks + cut.key_blocks;
    block -= of_queries ? 0 : of_extras ? cut.query_blocks + cut.key_blocks : cut.query_blocks;
    const bool sums_factor = of_queries ? wanted.grad_query.data != nullptr
                             : of_extras ? wanted.grad_extra_key != nullptr
                                         : wanted.grad_key.data != nullptr;
    const bool sums_value = !of_queries && (of_extras ? wanted.grad_extra_value != nullptr : wanted.grad_value.data != nullptr);
    const bool sums_entries = piece == 0 && (of_queries ? wanted.grad_prior != nullptr : of_extras && wanted.grad_bias != nullptr);
    if (!(sums_factor && piece < depths) && !(sums_value && piece < widths) && !sums_entries) continue;
    const bool needs_value = sums_factor || sums_entries;  // the gradient of scores

    const bool single = call.extra_type != call.type;
    const List of_query{source<T>(call.query, b, h, 0), source<T>(call.query, b, h, call.queries)};
    const List of_grad{source<T>(wanted.grad_out, b, h, 0), source<T>(wanted.grad_out, b, h, call.queries)};
    const List of_key{source<T>(call.extra_key, b, h, call.extras, single), source<T>(call.key, b, h, call.keys)};
    const List of_value{source<T>(call.extra_value, b, h, call.extras, single), source<T>(call.value, b, h, call.keys)};
    const List& own_factors = of_queries ? of_query : of_key;
    const List& own_values = of_queries ? of_grad : of_value;
    const List& factors = of_queries ? of_key : of_query;
    const List& values = of_queries ? of_value : of_grad;
    // Own rows [first, last) of their list, and of the other list [begin, end) is seen by some of them, [all_begin, all_end)
    // by all.
    const std::int64_t own_begin = of_queries || of_extras ? 0 : call.extras;
    const std::int64_t own_end = of_queries ? call.queries : of_extras ? call.extras : call.extras + call.keys;
    const std::int64_t first = own_begin + block * rows, last = first + rows < own_end ? first + rows : own_end;
    const std::int64_t begin = of_queries ? 0 : first_to_see(call, first) / N * N;
    const std::int64_t end = of_queries ? seen_by(call, last - 1) : call.queries;
    const std::int64_t all_begin = of_queries ? 0 : first_to_see(call, last - 1);
    const std::int64_t all_end = of_queries ? seen_by(call, first) : call.queries;
    const std::int64_t row = first + warp_row + group();
    Sight sight{{0, 0}, {0, 0}};
    Entry<R> own_entries[2];
    Query<R> own_queries[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t r = row + 8 * i;
      if (r < last) {
        sight.begin[i] = of_queries ? 0 : first_to_see(call, r);
        sight.end[i] = of_queries ? seen_by(call, r) : call.queries;
      }
      if (of_queries) {
        own_queries[i] = query_of<R>(call, wanted, head, r);
      } else {
        own_entries[i] = entry<R>(call, h, r);
      }
    }
    R factor_sums[D / 8][4], value_sums[D / 8][4], entry_sums[2][4];
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) factor_sums[d][i] = value_sums[d][i] = 0;
    }
#pragma unroll
    for (auto& line : entry_sums) {
#pragma unroll
      for (R& sum : line) sum = 0;
    }
    for (std::int64_t at = begin; at < end; at += N) {
      R scores[N / 8][4], grads[N / 8][4];
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = grads[n][i] = 0;
      }
      const bool hides = at < all_begin || at + N > all_end;
      bool strange = false;
      for (std::int64_t c = 0; c < chunks; ++c) {
        __syncthreads();  // tiles of before have been read
        const bool whole = chunks == 1, loads_own = !whole || at == begin;
        bool odd = false;
        if (c < depths) {
          if (loads_own) load_rows<T, Tf32Allowed, D>(own_factors, first, rows, c * D, call.depth, own_factor);
          odd = load_rows<T, Tf32Allowed, D>(factors, at, N, c * D, call.depth, factor);
        }
        if (c < widths) {
          if (loads_own && needs_value) load_rows<T, Tf32Allowed, D>(own_values, first, rows, c * D, call.width, own_value);
          odd = load_rows<T, Tf32Allowed, D>(values, at, N, c * D, call.width, value) || odd;
        }
        if (c == 0) {
          for (int j = threadIdx.x; j < N; j += blockDim.x) {
            if (of_queries) {
              entries[j] = entry<R>(call, h, at + j);
            } else {
              queries[j] = query_of<R>(call, wanted, head, at + j);
            }
          }
        }
        strange = (__syncthreads_or(odd) && hides) || strange;
        const std::int64_t deep = call.depth - c * D, wide = call.width - c * D;
        if (c < depths) {
          product_of_rows<T, Tf32Allowed, D, N>(own_factor + warp_row * kP, factor, deep < D ? int(deep) : D, scores);
        }
        if (c < widths && needs_value) {
          product_of_rows<T, Tf32Allowed, D, N>(own_value + warp_row * kP, value, wide < D ? int(wide) : D, grads);
        }
      }
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 8 * n + 2 * in_group() + i % 2;
          const Query<R> q = of_queries ? own_queries[i / 2] : queries[j];
          const Entry<R> e = of_queries ? entries[j] : own_entries[i / 2];
          const bool extra = of_queries ? at + j < call.extras : of_extras;
          const R s = score(call, scores[n][i], extra, e, q.prior);
          const bool seen = sight.sees(i / 2, at + j) && q.lse != -infinity<R>();
          const R p = seen ? exponential(s - q.lse) : R(0);
          const R ds = seen ? p * (grads[n][i] - q.delta) : R(0);
          scores[n][i] = p;
          grads[n][i] = ds;
          if (!sums_entries) continue;
          if (of_extras) {
            entry_sums[i / 2][0] += ds;
          } else if (!extra && seen) {
            const R x = q.prior.centre[0] - e.x, y = q.prior.centre[1] - e.y;
            entry_sums[i / 2][0] += ds * x;
            entry_sums[i / 2][1] += ds * y;
            entry_sums[i / 2][2] += ds * x * x;
            entry_sums[i / 2][3] += ds * y * y;
          }
        }
      }
      if (chunks > 1) {  // the tiles hold the last chunk, the sums are of this piece
        __syncthreads();
        load_rows<T, Tf32Allowed, D>(factors, at, N, piece * D, call.depth, factor);
        load_rows<T, Tf32Allowed, D>(values, at, N, piece * D, call.width, value);
        __syncthreads();
      }
      const std::int64_t deep = call.depth - piece * D, wide = call.width - piece * D;
      if (sums_factor && deep > 0) {
        add_product<T, Tf32Allowed, D, N>(grads, factor, sight, at, strange, deep < D ? int(deep) : D, factor_sums);
      }
      if (sums_value && wide > 0) {
        add_product<T, Tf32Allowed, D, N>(scores, value, sight, at, strange, wide < D ? int(wide) : D, value_sums);
      }
    }
    __syncthreads();  // own tiles have been read
    const R scale = static_cast<R>(call.scale);
    const std::int64_t own_row = row - own_begin, own_rows = own_end - own_begin;
    if (of_extras) {
      const std::int64_t at = head * call.extras;
      if (sums_factor) {
        store_rows<R, D>(static_cast<R*>(wanted.grad_extra_key) + at * call.depth, call.depth, own_row, own_rows, piece * D,
                         call.depth, factor_sums, scale, scale);
      }
      if (sums_value) {
        store_rows<R, D>(static_cast<R*>(wanted.grad_extra_value) + at * call.width, call.width, own_row, own_rows, piece * D,
                         call.width, value_sums, R(1), R(1));
      }
    } else {
      const AttentionTensor& to = of_queries ? wanted.grad_query : wanted.grad_key;
      if (sums_factor) {
        store_rows<T, D>(static_cast<T*>(to.data) + b * to.strides[0] + h * to.strides[1], to.strides[2], own_row, own_rows,
                         piece * D, call.depth, factor_sums, scale, scale);
      }
      if (sums_value) {
        const AttentionTensor& v = wanted.grad_value;
        store_rows<T, D>(static_cast<T*>(v.data) + b * v.strides[0] + h * v.strides[1], v.strides[2], own_row, own_rows,
                         piece * D, call.width, value_sums, R(1), R(1));
      }
    }
    if (!sums_entries) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (R& sum : entry_sums[i]) sum = row_sum(sum);
      if (own_row + 8 * i >= own_rows || in_group() != 0) continue;
      if (of_extras) {
        static_cast<R*>(wanted.grad_bias)[head * call.extras + own_row + 8 * i] = entry_sums[i][0];
      } else {
        R* to = static_cast<R*>(wanted.grad_prior) + 4 * (head * call.queries + own_row + 8 * i);
        const R smooth = static_cast<R>(call.smooth);
        for (int axis = 0; axis < 2; ++axis) {
          to[axis] = -2 * own_queries[i].prior.sharpness[axis] * entry_sums[i][axis] / smooth;
          to[2 + axis] = -entry_sums[i][2 + axis] / smooth;
        }
      }
    }
  }
}

template <typename R, typename Out>
__global__ void __launch_bounds__(256) sum_kernel(const void* parts, std::int64_t batch, std::int64_t size, void* out) {
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    R total = 0;
    for (std::int64_t b = 0; b < batch; ++b) total += static_cast<const R*>(parts)[b * size + i];
    narrow(total, static_cast<Out*>(out)[i]);
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Calls f(Type<T>, is TF32 allowed).
template <typename F>
cudaError_t with_product(DType type, bool tf32, F f) {
  return with_type(type, [&](auto t) {
    if constexpr (std::is_same_v<typename decltype(t)::type, float>) {
      if (tf32) return f(t, std::true_type{});
    }
    return f(t, std::false_type{});
  });
}

// Warps of a block for so many rows: the number, of at most `most`, that leaves the fewest rows idle.
int warps_for(std::int64_t rows, int most) {
  const std::int64_t tiles = std::max<std::int64_t>(ceil_div(rows, kRows), 1);
  if (tiles <= most) return static_cast<int>(tiles);
  int best = most;
  for (int warps = most; warps > most / 2; --warps) {
    if (ceil_div(tiles, warps) * warps < ceil_div(tiles, best) * best) best = warps;
  }
  return best;
}

template <typename T, bool Tf32Allowed, int D>
cudaError_t forward(const AttentionCall& call, cudaStream_t stream) {
  const int warps = warps_for(call.queries, kForwardWarps<T, D>);
  const std::int64_t blocks = ceil_div(call.queries, warps * kRows) * ceil_div(call.width, D);
  return launch(forward_kernel<T, Tf32Allowed, D>, call.batch * call.heads * blocks, warps * kWarp, stream, call);
}

}  // namespace

cudaError_t attention_forward(const AttentionCall& call, cudaStream_t stream) {
  return with_product(call.type, call.tf32, [&](auto t, auto tf32) {
    using T = typename decltype(t)::type;
    constexpr bool kTf32 = decltype(tf32)::value;
    if constexpr (kHalf<T>) {
      if (std::max(call.depth, call.width) > 64) return forward<T, kTf32, 128>(call, stream);
    }
    return forward<T, kTf32, kBackwardDepth<T>>(call, stream);
  });
}

cudaError_t attention_backward(const AttentionCall& call, const AttentionBackward& wanted, cudaStream_t stream) {
  const cudaError_t error = with_type(call.type, [&](auto t) {
    return launch(delta_kernel<typename decltype(t)::type>, ceil_div(call.batch * call.heads * call.queries, 256 / kWarp),
                  256, stream, call, wanted);
  });
  if (error != cudaSuccess) return error;
  return with_product(call.type, call.tf32, [&](auto t, auto tf32) {
    using T = typename decltype(t)::type;
    const bool of_queries = wanted.grad_query.data || wanted.grad_prior;
    const bool of_keys = wanted.grad_key.data || wanted.grad_value.data;
    const bool of_extras = wanted.grad_extra_key || wanted.grad_extra_value || wanted.grad_bias;
    const std::int64_t longest = std::max({of_queries ? call.queries : 0, of_keys ? call.keys : 0, of_extras ? call.extras : 0});
    const int warps = warps_for(longest, kBackwardWarps<T>), rows = warps * kRows;
    const Cut cut{of_queries ? ceil_div(call.queries, rows) : 0, of_keys ? ceil_div(call.keys, rows) : 0,
                  of_extras ? ceil_div(call.extras, rows) : 0, ceil_div(std::max(call.depth, call.width), kBackwardDepth<T>)};
    const std::int64_t blocks = cut.query_blocks + cut.key_blocks + cut.extra_blocks;
    return launch(backward_kernel<T, decltype(tf32)::value>, call.batch * call.heads * blocks * cut.pieces, warps * kWarp,
                  stream, call, wanted, cut);
  });
}

cudaError_t attention_sum(const void* parts, std::int64_t batch, std::int64_t size, DType type, void* out, DType out_type,
                          cudaStream_t stream) {
  return with_type(out_type, [&](auto t) {
    using Out = typename decltype(t)::type;
    using R = Real<Out>;
    if ((type == DType::f64) != std::is_same_v<R, double>) return cudaErrorInvalidValue;
    return launch(sum_kernel<R, Out>, ceil_div(size, 256), 256, stream, parts, batch, size, out);
  });
}

}  // namespace pyface::cuda
