// Four kernels: T = U_y^T x; C = T U_x; M = fix(C) U_x^T; y from U_y M. Rows t and H - t are taken together: they share
// cosines, and sines but for a sign. x is read twice. Written without a GPU: tested under emulation, not tuned.

#include "cuda/spectral.h"

#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace pyface::cuda {
namespace {

constexpr int kLanes = 32;      // neighbouring columns of a block
constexpr int kGroups = 8;      // of rows that share the work of a block
constexpr int kThreads = kLanes * kGroups;
constexpr int kHarmonics = 4;   // of the first kernel at a time
constexpr int kPairs = 4;       // of rows of the last kernel at a time

struct Scratch {
  void *sums, *spread, *small;  // T and M [planes][rank][columns], C [planes][channels][rank][padded]
};

__device__ std::int64_t plane_offset(const Spectral& call, std::int64_t plane, const std::int64_t (&stride)[3]) {
  return plane / call.inner * stride[0] + plane % call.inner * stride[1];
}

// 1 - keep at a pixel; `keep` is that of the plane.
template <typename R>
__device__ R drop_at(const Spectral& call, std::int64_t keep, std::int64_t t, std::int64_t c) {
  const std::int64_t at = keep + t * call.keep_stride[2] + c;
  return 1 - (call.keep_is_bool ? R(static_cast<const std::uint8_t*>(call.keep)[at]) : static_cast<const R*>(call.keep)[at]);
}

// What is filtered: x, or m x.
template <typename X>
__device__ Real<X> source(const Spectral& call, std::int64_t x, std::int64_t keep, std::int64_t dense, std::int64_t t,
                          std::int64_t c) {
  using R = Real<X>;
  const R v = widen(static_cast<const X*>(call.x)[x + t * call.x_stride[2] + c]);
  if (call.task != SpectralTask::mask_backward) return v;
  return v * (drop_at<R>(call, keep, t, c) * R(call.sign[dense + t * call.width * call.channels + c]));
}

// A block takes 32 columns of a plane; each group of rows sums its pairs, and the sums are added in the order of groups.
template <typename X>
__global__ void __launch_bounds__(kThreads) gather_kernel(Spectral call, Scratch scratch) {
  using R = Real<X>;
  __shared__ R partial[kGroups][2 * kHarmonics + 1][kLanes];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const std::int64_t columns = call.width * call.channels, blocks = ceil_div(columns, kLanes), rank = call.rows.rank;
  const std::int64_t units = call.height / 2 + 1;
  const R* table = static_cast<const R*>(call.rows.table);
  for (std::int64_t item = blockIdx.x; item < call.outer * call.inner * blocks; item += gridDim.x) {
    const std::int64_t plane = item / blocks, c = item % blocks * kLanes + lane;
    const std::int64_t x = plane_offset(call, plane, call.x_stride), keep = plane_offset(call, plane, call.keep_stride);
    const std::int64_t dense = plane * call.height * columns;
    for (std::int64_t first = 0; first == 0 || first < rank / 2; first += kHarmonics) {
      R sum[2 * kHarmonics + 1] = {};
      if (c < columns) {
        for (std::int64_t t = group; t < units; t += kGroups) {
          const std::int64_t mirror = t ? call.height - t : 0;
          const R top = source<X>(call, x, keep, dense, t, c);
          const R bottom = mirror == t ? R(0) : source<X>(call, x, keep, dense, mirror, c);
          const R even = top + bottom, odd = mirror == t ? R(0) : top - bottom;
          const R* factor = table + t * rank;
          sum[2 * kHarmonics] += factor[0] * even;
#pragma unroll
          for (int k = 0; k < kHarmonics; ++k) {
            const std::int64_t r = 1 + 2 * (first + k);
            if (r < rank) {
              sum[2 * k] += factor[r] * even;
              sum[2 * k + 1] += factor[r + 1] * odd;
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k <= 2 * kHarmonics; ++k) partial[group][k][lane] = sum[k];
      __syncthreads();
      for (int k = group; k <= 2 * kHarmonics; k += kGroups) {
        const std::int64_t r = k == 2 * kHarmonics ? 0 : 1 + 2 * first + k;
        if (c < columns && r < rank && (r > 0 || first == 0)) {
          R total = 0;
#pragma unroll
          for (int g = 0; g < kGroups; ++g) total += partial[g][k][lane];
          static_cast<R*>(scratch.sums)[(plane * rank + r) * columns + c] = total;
        }
      }
      __syncthreads();
    }
  }
}

// An element of C to a thread.
template <typename R>
__global__ void __launch_bounds__(kThreads) project_kernel(Spectral call, Scratch scratch) {
  const std::int64_t columns = call.width * call.channels, rank = call.rows.rank, padded = call.columns.padded;
  const std::int64_t count = call.outer * call.inner * call.channels * rank * padded;
  const R* table = static_cast<const R*>(call.columns.table);
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += std::int64_t(gridDim.x) * kThreads) {
    const std::int64_t j = i % padded, r = i / padded % rank, channel = i / padded / rank % call.channels;
    const std::int64_t plane = i / padded / rank / call.channels;
    const R* sums = static_cast<const R*>(scratch.sums) + (plane * rank + r) * columns + channel;
    R total = 0;
    for (std::int64_t w = 0; w < call.width; ++w) total += sums[w * call.channels] * table[w * padded + j];
    static_cast<R*>(scratch.small)[i] = total;
  }
}

// C, with the last harmonic of a block -d..d-1 mended: it has no mirror image.
template <typename R>
__device__ R mended(const Spectral& call, const R* small, std::int64_t r, std::int64_t j) {
  const std::int64_t padded = call.columns.padded, row = r - (call.rows.rank - 2), column = j - (call.columns.rank - 2);
  if (!call.edge || row < 0 || column < 0) return small[r * padded + j];
  // across the diagonal: cc - ss, cs + sc; cs + sc, ss - cc
  const R other = small[(call.rows.rank - 1 - row) * padded + call.columns.rank - 1 - column];
  return row == column ? small[r * padded + j] - other : small[r * padded + j] + other;
}

// An element of M to a thread.
template <typename R>
__global__ void __launch_bounds__(kThreads) expand_kernel(Spectral call, Scratch scratch) {
  const std::int64_t columns = call.width * call.channels, rank = call.rows.rank, padded = call.columns.padded;
  const std::int64_t count = call.outer * call.inner * rank * columns;
  const R* table = static_cast<const R*>(call.columns.table);
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += std::int64_t(gridDim.x) * kThreads) {
    const std::int64_t c = i % columns, r = i / columns % rank, plane = i / columns / rank;
    const std::int64_t w = c / call.channels, channel = c % call.channels;
    const R* small = static_cast<const R*>(scratch.small) + (plane * call.channels + channel) * rank * padded;
    R total = 0;
    for (std::int64_t j = 0; j < call.columns.rank; ++j) total += mended(call, small, r, j) * table[w * padded + j];
    static_cast<R*>(scratch.spread)[i] = total;
  }
}

template <typename X>
__device__ void finish(const Spectral& call, std::int64_t x, std::int64_t keep, std::int64_t dense, std::int64_t t,
                       std::int64_t c, Real<X> low) {
  using R = Real<X>;
  const R v = widen(static_cast<const X*>(call.x)[x + t * call.x_stride[2] + c]);
  const std::int64_t at = dense + t * call.width * call.channels + c;
  R y;
  if (call.task == SpectralTask::high_pass) {
    y = v - low;
  } else if (call.task == SpectralTask::mask) {
    const R high = v - low, drop = drop_at<R>(call, keep, t, c);
    y = drop == 0 ? v : v - drop * (high < 0 ? -high : high);
    if (call.sign) call.sign[at] = static_cast<std::int8_t>((high > 0) - (high < 0));
  } else {
    y = (v - drop_at<R>(call, keep, t, c) * R(call.sign[at]) * v) + low;
  }
  narrow(y, static_cast<X*>(call.y)[at]);
}

// A block takes 32 columns of a plane and kGroups x kPairs pairs of rows.
template <typename X>
__global__ void __launch_bounds__(kThreads) spread_kernel(Spectral call, Scratch scratch) {
  using R = Real<X>;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const std::int64_t columns = call.width * call.channels, blocks = ceil_div(columns, kLanes), rank = call.rows.rank;
  const std::int64_t units = call.height / 2 + 1, down = ceil_div(units, kGroups * kPairs);
  for (std::int64_t item = blockIdx.x; item < call.outer * call.inner * blocks * down; item += gridDim.x) {
    const std::int64_t plane = item / down / blocks, c = item / down % blocks * kLanes + lane;
    const std::int64_t begin = (item % down * kGroups + group) * kPairs;
    if (c >= columns || begin >= units) continue;
    const std::int64_t x = plane_offset(call, plane, call.x_stride), keep = plane_offset(call, plane, call.keep_stride);
    const R* m = static_cast<const R*>(scratch.spread) + plane * rank * columns + c;
    const R* table = static_cast<const R*>(call.rows.table) + begin * rank;
    R even[kPairs], odd[kPairs] = {};
#pragma unroll
    for (int p = 0; p < kPairs; ++p) even[p] = begin + p < units ? table[p * rank] * m[0] : R(0);
    for (std::int64_t r = 1; r < rank; r += 2) {
      const R cosine = m[r * columns], sine = m[(r + 1) * columns];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        if (begin + p < units) {
          even[p] += table[p * rank + r] * cosine;
          odd[p] += table[p * rank + r + 1] * sine;
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const std::int64_t t = begin + p, mirror = t ? call.height - t : 0, dense = plane * call.height * columns;
      if (t >= units) break;
      finish<X>(call, x, keep, dense, t, c, even[p] + odd[p]);
      if (mirror != t) finish<X>(call, x, keep, dense, mirror, c, even[p] - odd[p]);
    }
  }
}

}  // namespace

cudaError_t spectral(const Spectral& call, void* scratch, cudaStream_t stream) {
  return with_type(call.type, [&](auto type) {
    using X = typename decltype(type)::type;
    using R = Real<X>;
    const std::int64_t planes = call.outer * call.inner, columns = call.width * call.channels, rank = call.rows.rank;
    R* base = static_cast<R*>(scratch);
    const Scratch parts{base, base + planes * rank * columns, base + 2 * planes * rank * columns};
    const std::int64_t blocks = planes * ceil_div(columns, kLanes);
    cudaError_t error = launch(gather_kernel<X>, blocks, kThreads, stream, call, parts);
    if (error != cudaSuccess) return error;
    error = launch(project_kernel<R>, ceil_div(planes * call.channels * rank * call.columns.padded, kThreads), kThreads,
                   stream, call, parts);
    if (error != cudaSuccess) return error;
    error = launch(expand_kernel<R>, ceil_div(planes * rank * columns, kThreads), kThreads, stream, call, parts);
    if (error != cudaSuccess) return error;
    return launch(spread_kernel<X>, blocks * ceil_div(call.height / 2 + 1, kGroups * kPairs), kThreads, stream, call, parts);
  });
}

}  // namespace pyface::cuda
