// Sharpness-aware gradient work over a list of tensors. See pyface/sharpness.h for what is computed.
//
// Every pass is bound by memory. Tensors are cut into chunks of a fixed size that never cross a tensor; a block takes one
// chunk after another. Sums are taken in double: of a thread's share, over the block, over a tensor's chunks and over the
// tensors, each in a fixed order. A double holds the square of every float: such a sum is finite if and only if its data
// are, so only double data need a flag of their own.

#include "cuda/sharpness.h"

#include <cmath>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace pyface::cuda {
namespace {

// Tensors in one launch: arguments may take 4 KB, from CUDA 12.1 on 32 KB.
#ifdef PYFACE_SMALL_LAUNCHES  // tests: short lists and small tensors already need several launches, blocks and chunks
constexpr int kTensors = 6, kThreads = 128, kChunk = 2048;
#elif CUDART_VERSION >= 12010
constexpr int kTensors = 256, kThreads = 512, kChunk = 32768;  // a chunk's size is in elements
#else
constexpr int kTensors = 50, kThreads = 512, kChunk = 32768;
#endif
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLane = 8;  // elements of a thread in a tile
constexpr int kTile = kThreads * kLane;
constexpr int kNumbers = 5;  // of a chunk: a, b, k, and two that are finite where x, y are

struct Entry {
  void *weight, *saved, *x, *y, *momentum;
  std::int64_t size, number;
  double rho;
  int first;  // of its chunks in this launch
  int chunk;  // of its chunks among those of all tensors
};

struct Table {
  int count = 0, chunks = 0;
  Entry entries[kTensors];
};

struct Chunk {
  const Entry& tensor;
  std::int64_t first;  // element
  int count;
  int number;  // among all
};

__device__ Chunk chunk_of(const Table& table, int c) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].first <= c ? low : high) = middle;
  }
  const Entry& tensor = table.entries[low];
  const std::int64_t first = std::int64_t(c - tensor.first) * kChunk, left = tensor.size - first;
  return {tensor, first, left < kChunk ? int(left) : kChunk, tensor.chunk + c - tensor.first};
}

template <typename T, int N>
struct alignas(16) Pack {
  T values[N];
};

// Packs in the storage type: what is only moved keeps its bits, a NaN its payload. Entries from `count` on do not exist.
template <bool Whole, typename T, int N>
__device__ void read(const T* in, int count, Pack<T, N>& pack) {
  if constexpr (Whole) {
#pragma unroll
    for (int i = 0; i < kWords<T, N>; ++i) {
      reinterpret_cast<uint4*>(pack.values)[i] = reinterpret_cast<const uint4*>(in)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count)
        pack.values[i] = in[i];
      else
        narrow(Real<T>(0), pack.values[i]);
    }
  }
}

template <bool Whole, typename T, int N>
__device__ void write(T* out, int count, const Pack<T, N>& pack) {
  if constexpr (Whole) {
#pragma unroll
    for (int i = 0; i < kWords<T, N>; ++i) {
      __stwb(reinterpret_cast<uint4*>(out) + i, reinterpret_cast<const uint4*>(pack.values)[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) out[i] = pack.values[i];
    }
  }
}

// Elements of a pack: 16 bytes of the smaller type.
template <typename W, typename G = W>
constexpr int kPack = 16 / (sizeof(W) < sizeof(G) ? sizeof(W) : sizeof(G));

// Calls body(whole, begin of a tile) for the tiles of a chunk, with `whole` a constant: nothing ends in that tile and all
// operands are aligned (`wide`). Element j of pack p of a thread is number place(begin, p) + j either way.
template <typename Body>
__device__ void for_tiles(int count, bool wide, Body body) {
  int begin = 0;
  if (wide) {
    for (; begin + kTile <= count; begin += kTile) body(std::true_type{}, begin);
  }
  for (; begin < count; begin += kTile) body(std::false_type{}, begin);
}

template <int N>
__device__ int place(int begin, int p) {
  return begin + (p * kThreads + int(threadIdx.x)) * N;
}

template <typename T>
__device__ void copy_chunk(const T* from, T* to, int count) {
  constexpr int N = kPack<T>;
  for_tiles(count, aligned(from) && aligned(to), [&](auto whole, int begin) {
    constexpr bool kWhole = decltype(whole)::value;
    Pack<T, N> packs[kLane / N];
#pragma unroll
    for (int p = 0; p < kLane / N; ++p) read<kWhole>(from + place<N>(begin, p), count - place<N>(begin, p), packs[p]);
#pragma unroll
    for (int p = 0; p < kLane / N; ++p) write<kWhole>(to + place<N>(begin, p), count - place<N>(begin, p), packs[p]);
  });
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Of y alone (a and k are then 0), of y times |w| + eta, or of x and y.
enum class Sums { norm, adaptive, dots };

__device__ double warp_sum(double v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
  return v;
}

// results[i] of thread i is the sum of values[i] over the block; of use only in the first Count threads.
template <int Count>
__device__ double block_sums(const double (&values)[Count]) {
  __shared__ double parts[Count][kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // the last result has been read
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const double sum = warp_sum(values[i]);
    if (lane == 0) parts[i][warp] = sum;
  }
  __syncthreads();
  double result = 0;
  if (threadIdx.x < Count) {
    for (int i = 0; i < kWarps; ++i) result += parts[threadIdx.x][i];
  }
  return result;
}

template <Sums Kind, typename W, typename G>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const __grid_constant__ Table table, double eta, double* partial, int* arrived) {
  constexpr int N = Kind == Sums::adaptive ? kPack<W, G> : kPack<G>, kPacks = kLane / N;
  constexpr bool kDoubles = std::is_same_v<G, double>;
  if (blockIdx.x == 0 && threadIdx.x == 0) *arrived = 0;  // before finish_kernel starts
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_of(table, c);
    const W* w = static_cast<const W*>(chunk.tensor.weight) + chunk.first;
    const G* x = static_cast<const G*>(chunk.tensor.x) + chunk.first;
    const G* y = static_cast<const G*>(chunk.tensor.y) + chunk.first;
    const bool wide = aligned(y) && (Kind != Sums::dots || aligned(x)) && (Kind != Sums::adaptive || aligned(w));
    double sums[kNumbers] = {};
    for_tiles(chunk.count, wide, [&](auto whole, int begin) {
      constexpr bool kWhole = decltype(whole)::value;
      [[maybe_unused]] Pack<W, N> ws[kPacks];
      [[maybe_unused]] Pack<G, N> xs[kPacks], ys[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = place<N>(begin, p), left = chunk.count - at;
        read<kWhole>(y + at, left, ys[p]);
        if constexpr (Kind == Sums::dots) read<kWhole>(x + at, left, xs[p]);
        if constexpr (Kind == Sums::adaptive) read<kWhole>(w + at, left, ws[p]);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          double yv = widen(ys[p].values[i]);
          if constexpr (kDoubles) sums[4] += yv - yv;
          if constexpr (Kind == Sums::adaptive) {
            const double t = std::abs(double(widen(ws[p].values[i]))) + eta;
            if constexpr (kDoubles) sums[4] += t - t;
            yv *= t;
          }
          sums[1] += yv * yv;
          if constexpr (Kind == Sums::dots) {
            const double xv = widen(xs[p].values[i]);
            if constexpr (kDoubles) sums[3] += xv - xv;
            sums[0] += xv * xv;
            sums[2] += xv * yv;
          }
        }
      }
    });
    if constexpr (!kDoubles) sums[3] = sums[0], sums[4] = sums[1];
    const double sum = block_sums(sums);
    if (threadIdx.x < kNumbers) partial[std::int64_t(chunk.number) * kNumbers + threadIdx.x] = sum;
  }
}

__device__ bool is_finite(double v) { return v - v == 0; }

// A warp adds the chunks of a tensor; the block that is the last of all `blocks` to arrive adds the tensors, in their
// order. bad[p]: bit 0 for x, bit 1 for y.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Table table, const double* partial, std::int64_t count, int* bad, int* arrived,
                  int blocks, double* sums, float* nonfinite) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int e = blockIdx.x * kWarps + warp; e < table.count; e += gridDim.x * kWarps) {
    const Entry& tensor = table.entries[e];
    const std::int64_t begin = tensor.chunk, end = begin + ceil_div(tensor.size, kChunk);
    double parts[3] = {};
    int flags = 0;
#pragma unroll 4
    for (std::int64_t c = begin + lane; c < end; c += kWarp) {
      const double* numbers = partial + c * kNumbers;
#pragma unroll
      for (int i = 0; i < 3; ++i) parts[i] += numbers[i];
      flags |= (is_finite(numbers[3]) ? 0 : 1) | (is_finite(numbers[4]) ? 0 : 2);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) parts[i] = warp_sum(parts[i]);
    const int bad_x = __ballot_sync(0xffffffffu, flags & 1) != 0, bad_y = __ballot_sync(0xffffffffu, flags & 2) != 0;
    if (lane == 0) {
      for (int i = 0; i < 3; ++i) sums[3 * tensor.number + i] = parts[i];
      bad[tensor.number] = bad_x + 2 * bad_y;
    }
  }
  __threadfence();
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == blocks - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const volatile double* rows = sums;  // other blocks wrote them
  const volatile int* their_bad = bad;
  double parts[3] = {};
  int flags = 0;
  for (std::int64_t p = threadIdx.x; p < count; p += kThreads) {
#pragma unroll
    for (int i = 0; i < 3; ++i) parts[i] += rows[3 * p + i];
    flags |= their_bad[p];
  }
  const double sum = block_sums(parts);
  if (threadIdx.x < 3) sums[3 * count + threadIdx.x] = sum;
  const int bad_x = __syncthreads_or(flags & 1), bad_y = __syncthreads_or(flags & 2);
  if (threadIdx.x == 0) nonfinite[0] = bad_x ? 1 : 0, nonfinite[1] = bad_y ? 1 : 0;
}

// ---- ascent and restoring ---------------------------------------------------------------------------------------------

template <typename W, typename G>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ Table table, Sharpness call) {
  using C = Real<W>;
  constexpr int N = kPack<W, G>, kPacks = kLane / N;
  const double b = call.sums[3 * call.count + 1];
  const bool moves = call.nonfinite[1] == 0 && b > 0;
  const double over_norm = moves ? 1 / (std::sqrt(b) + call.eps) : 0;
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_of(table, c);
    W* w = static_cast<W*>(chunk.tensor.weight) + chunk.first;
    W* saved = static_cast<W*>(chunk.tensor.saved) + chunk.first;
    const G* y = static_cast<const G*>(chunk.tensor.y) + chunk.first;
    const C factor = C(moves ? chunk.tensor.rho * over_norm - call.shrink : 0), eta = C(call.eta);
    if (factor == 0) {
      copy_chunk(w, saved, chunk.count);
      continue;
    }
    for_tiles(chunk.count, aligned(w) && aligned(saved) && aligned(y), [&](auto whole, int begin) {
      constexpr bool kWhole = decltype(whole)::value;
      Pack<W, N> ws[kPacks];
      Pack<G, N> ys[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = place<N>(begin, p), left = chunk.count - at;
        read<kWhole>(w + at, left, ws[p]);
        read<kWhole>(y + at, left, ys[p]);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = place<N>(begin, p), left = chunk.count - at;
        write<kWhole>(saved + at, left, ws[p]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C old = widen(ws[p].values[i]);
          C e = C(widen(ys[p].values[i])) * factor;
          if (call.adaptive) {
            const C stretch = std::abs(old) + eta;
            e *= stretch * stretch;
          }
          narrow(old + e, ws[p].values[i]);
        }
        write<kWhole>(w + at, left, ws[p]);
      }
    });
  }
}

template <typename W>
__global__ void __launch_bounds__(kThreads) restore_kernel(const __grid_constant__ Table table) {
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_of(table, c);
    copy_chunk(static_cast<const W*>(chunk.tensor.saved) + chunk.first, static_cast<W*>(chunk.tensor.weight) + chunk.first,
               chunk.count);
  }
}

// ---- rules and update -------------------------------------------------------------------------------------------------

// Of the tensor's rule, decided by one thread for its block.
__device__ SharpnessPair pair_of(const Sharpness& call, std::int64_t number) {
  __shared__ SharpnessPair pair;
  __syncthreads();  // the last one has been read
  if (threadIdx.x == 0) pair = sharpness_pair(call, number);
  __syncthreads();
  return pair;
}

template <typename G>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Table table, Sharpness call) {
  using C = Real<G>;
  constexpr int N = kPack<G>, kPacks = kLane / N;
  if (call.nonfinite[0] != 0 || call.nonfinite[1] != 0) return;
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_of(table, c);
    const SharpnessPair pair = pair_of(call, chunk.tensor.number);
    if (pair.u == 1 && pair.v == 0) continue;
    G* x = static_cast<G*>(chunk.tensor.x) + chunk.first;
    const G* y = static_cast<const G*>(chunk.tensor.y) + chunk.first;
    if (pair.u == 0 && pair.v == 1) {
      copy_chunk(y, x, chunk.count);
      continue;
    }
    const C u = C(pair.u), v = C(pair.v);
    for_tiles(chunk.count, aligned(x) && aligned(y), [&](auto whole, int begin) {
      constexpr bool kWhole = decltype(whole)::value;
      Pack<G, N> xs[kPacks], ys[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = place<N>(begin, p), left = chunk.count - at;
        read<kWhole>(x + at, left, xs[p]);
        read<kWhole>(y + at, left, ys[p]);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = place<N>(begin, p), left = chunk.count - at;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          narrow(C(widen(xs[p].values[i])) * u + C(widen(ys[p].values[i])) * v, xs[p].values[i]);
        }
        write<kWhole>(x + at, left, xs[p]);
      }
    });
  }
}

template <typename W, typename G>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Table table, Sharpness call) {
  using C = Real<W>;
  constexpr int N = kPack<W, G>, kPacks = kLane / N;
  const bool skip = call.nonfinite[0] != 0 || call.nonfinite[1] != 0;
  const C lr = C(call.lr), mu = C(call.momentum), fresh = C(call.first ? 1 : 1 - call.dampening);
  const C decay = C(call.weight_decay), sign = call.maximize ? C(-1) : C(1);
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_of(table, c);
    W* w = static_cast<W*>(chunk.tensor.weight) + chunk.first;
    const W* saved = static_cast<const W*>(chunk.tensor.saved) + chunk.first;
    if (skip) {
      copy_chunk(saved, w, chunk.count);
      continue;
    }
    const SharpnessPair pair = pair_of(call, chunk.tensor.number);
    const G* x = static_cast<const G*>(chunk.tensor.x) + chunk.first;
    const G* y = static_cast<const G*>(chunk.tensor.y) + chunk.first;
    W* m = chunk.tensor.momentum ? static_cast<W*>(chunk.tensor.momentum) + chunk.first : nullptr;
    const C u = sign * C(pair.u), v = sign * C(pair.v);
    const bool takes_x = pair.u != 0, takes_y = pair.v != 0, takes_m = m && !call.first;
    const bool wide = aligned(w) && aligned(saved) && aligned(m) && aligned(x) && aligned(y);
    for_tiles(chunk.count, wide, [&](auto whole, int begin) {
      constexpr bool kWhole = decltype(whole)::value;
      Pack<W, N> olds[kPacks], ms[kPacks];
      Pack<G, N> xs[kPacks] = {}, ys[kPacks] = {};
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = place<N>(begin, p), left = chunk.count - at;
        read<kWhole>(saved + at, left, olds[p]);
        if (takes_x) read<kWhole>(x + at, left, xs[p]);
        if (takes_y) read<kWhole>(y + at, left, ys[p]);
        if (takes_m) read<kWhole>(m + at, left, ms[p]);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = place<N>(begin, p), left = chunk.count - at;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C old = widen(olds[p].values[i]);
          C g = C(widen(xs[p].values[i])) * u + C(widen(ys[p].values[i])) * v + old * decay;
          if (m) {
            const C next = takes_m ? C(widen(ms[p].values[i])) * mu + g * fresh : g;
            narrow(next, ms[p].values[i]);
            g = call.nesterov ? g + next * mu : next;
          }
          narrow(old - g * lr, olds[p].values[i]);
        }
        if (m) write<kWhole>(m + at, left, ms[p]);
        write<kWhole>(w + at, left, olds[p]);
      }
    });
  }
}

// ---- launches -----------------------------------------------------------------------------------------------------------

// Calls pass(table, a tensor's types) for tables of at most kTensors tensors that have the same types, if `typed`.
template <typename Pass>
cudaError_t for_tables(const Sharpness& call, bool typed, Pass pass) {
  const auto kind = [&](std::int64_t p) {
    return typed ? 4 * int(call.tensors[p].weight_type) + int(call.tensors[p].grad_type) : 0;
  };
  unsigned kinds = 0;
  for (std::int64_t p = 0; p < call.count; ++p) kinds |= 1u << kind(p);
  Table table;
  for (int current = 0; current < 16; ++current) {
    if (!(kinds >> current & 1)) continue;
    std::int64_t chunk = 0;
    const SharpnessTensor* some = nullptr;
    const auto flush = [&] {
      const cudaError_t error = table.count ? pass(table, *some) : cudaSuccess;
      table.count = table.chunks = 0;
      return error;
    };
    for (std::int64_t p = 0; p < call.count; ++p) {
      const SharpnessTensor& t = call.tensors[p];
      const std::int64_t chunks = ceil_div(t.size, kChunk);
      if (kind(p) == current) {
        if (table.count == kTensors) {
          if (const cudaError_t error = flush()) return error;
        }
        some = &t;
        table.entries[table.count++] = {t.weight, t.saved, t.x, t.y, t.momentum, t.size, p, call.rho ? call.rho[p] : 0,
                                        table.chunks, int(chunk)};
        table.chunks += int(chunks);
      }
      chunk += chunks;
    }
    if (const cudaError_t error = flush()) return error;
  }
  return cudaSuccess;
}

// Calls f(Type<W>, Type<G>).
template <typename F>
cudaError_t with_types(const SharpnessTensor& t, F f) {
  return with_type(t.weight_type, [&](auto weight) {
    return with_type(t.grad_type, [&](auto gradient) {
      using W = typename decltype(weight)::type;
      using G = typename decltype(gradient)::type;
      if constexpr (std::is_same_v<W, G> || (!std::is_same_v<W, double> && !std::is_same_v<G, double> &&
                                             (std::is_same_v<W, float> || std::is_same_v<G, float>)))
        return f(weight, gradient);
      else
        return cudaErrorInvalidValue;
    });
  });
}

std::int64_t chunk_count(const Sharpness& call) {
  std::int64_t total = 0;
  for (std::int64_t p = 0; p < call.count; ++p) total += ceil_div(call.tensors[p].size, kChunk);
  return total;
}

}  // namespace

std::int64_t sharpness_scratch(const Sharpness& call) {
  return chunk_count(call) * kNumbers * std::int64_t(sizeof(double)) + (call.count + 1) * std::int64_t(sizeof(int));
}

cudaError_t sharpness_sums(const Sharpness& call, void* scratch, cudaStream_t stream) {
  double* partial = static_cast<double*>(scratch);
  int* bad = reinterpret_cast<int*>(partial + chunk_count(call) * kNumbers);
  int* arrived = bad + call.count;
  const cudaError_t error = for_tables(call, true, [&](const Table& table, const SharpnessTensor& t) {
    const std::int64_t blocks = std::max(table.chunks, 1);  // one must reset `arrived`
    return with_types(t, [&](auto weight, auto gradient) {
      using W = typename decltype(weight)::type;
      using G = typename decltype(gradient)::type;
      // which types the weights have is of interest to the adaptive norm alone
      const auto kernel = t.x             ? sums_kernel<Sums::dots, G, G>
                          : call.adaptive ? sums_kernel<Sums::adaptive, W, G>
                                          : sums_kernel<Sums::norm, G, G>;
      return launch(kernel, blocks, kThreads, stream, table, call.eta, partial, arrived);
    });
  });
  if (error) return error;
  const auto blocks_for = [](const Table& table) { return std::min(ceil_div(table.count, kWarps), kMaxBlocks); };
  int blocks = 0;
  for_tables(call, false, [&](const Table& table, const SharpnessTensor&) {
    blocks += int(blocks_for(table));
    return cudaSuccess;
  });
  return for_tables(call, false, [&](const Table& table, const SharpnessTensor&) {
    return launch(finish_kernel, blocks_for(table), kThreads, stream, table, partial, call.count, bad, arrived, blocks,
                  call.sums, call.nonfinite);
  });
}

cudaError_t sharpness_perturb(const Sharpness& call, cudaStream_t stream) {
  return for_tables(call, true, [&](const Table& table, const SharpnessTensor& t) {
    return with_types(t, [&](auto weight, auto gradient) {
      return launch(perturb_kernel<typename decltype(weight)::type, typename decltype(gradient)::type>, table.chunks,
                    kThreads, stream, table, call);
    });
  });
}

cudaError_t sharpness_restore(const Sharpness& call, cudaStream_t stream) {
  return for_tables(call, true, [&](const Table& table, const SharpnessTensor& t) {
    return with_type(t.weight_type, [&](auto weight) {
      return launch(restore_kernel<typename decltype(weight)::type>, table.chunks, kThreads, stream, table);
    });
  });
}

cudaError_t sharpness_combine(const Sharpness& call, cudaStream_t stream) {
  return for_tables(call, true, [&](const Table& table, const SharpnessTensor& t) {
    return with_type(t.grad_type, [&](auto gradient) {
      return launch(combine_kernel<typename decltype(gradient)::type>, table.chunks, kThreads, stream, table, call);
    });
  });
}

cudaError_t sharpness_step(const Sharpness& call, cudaStream_t stream) {
  return for_tables(call, true, [&](const Table& table, const SharpnessTensor& t) {
    return with_types(t, [&](auto weight, auto gradient) {
      return launch(step_kernel<typename decltype(weight)::type, typename decltype(gradient)::type>, table.chunks,
                    kThreads, stream, table, call);
    });
  });
}

}  // namespace pyface::cuda
