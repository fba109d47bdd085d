#include "cuda/coupling.h"

#include <cmath>

#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace pyface::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// A warp takes one range of one sample, tile by tile, kLane elements to a lane and tile.
constexpr int kLane = 8;
constexpr std::int64_t kTile = kWarp * kLane;
constexpr std::int64_t kMaxRanges = 1024;

// Where a sample is cut into ranges: a function of `inner` alone, because it fixes the order of the log-det's sum.
struct Ranges {
  std::int64_t count, length;
};

Ranges ranges_of(std::int64_t inner) {
  const std::int64_t tiles = ceil_div(inner, kTile);
  const std::int64_t each = ceil_div(tiles, kMaxRanges);
  return tiles == 0 ? Ranges{0, 0} : Ranges{ceil_div(tiles, each), each * kTile};
}

// tanh(s/2) and tanh(s) are (1 - q) / (1 + q) with q = exp(-rate |s|). expm1 keeps small s exact to the last bits.
template <Activation A>
constexpr int kRate = A == Activation::sigmoid ? 1 : 2;

template <Activation A, typename R>
__device__ R log_scale(R s, R clamp) {
  if constexpr (A == Activation::none) {
    return s;
  } else if constexpr (A == Activation::atan) {
    return R(0.636) * clamp * std::atan(s);
  } else {
    const R m = std::expm1(-kRate<A> * std::abs(s));
    return std::copysign(clamp * (-m / (2 + m)), s);
  }
}

// dl/ds, from q itself: c^2 - l^2 would cancel where the clamp saturates.
template <Activation A, typename R>
__device__ R slope(R s, R clamp) {
  if constexpr (A == Activation::none) {
    return R(1);
  } else if constexpr (A == Activation::atan) {
    return R(0.636) * clamp / (1 + s * s);
  } else {
    constexpr int rate = kRate<A>;
    const R q = std::exp(-rate * std::abs(s));
    return 2 * rate * clamp * (q / ((1 + q) * (1 + q)));
  }
}

// Whole warps call this together; lane 0 receives the sum.
__device__ double warp_sum(double v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
  return v;
}

// Where this warp and lane stand in the walk over all (sample, range) pairs.
struct Walk {
  int lane = threadIdx.x % kWarp;
  std::int64_t first = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  std::int64_t step = std::int64_t(gridDim.x) * kWarps;
};

// One lane's share of a tile: kLane / Group groups of Group neighbours, so that a warp reads whole lines. The wide and
// the narrow way give a lane the same elements in the same order.
template <int Group, typename T>
__device__ void load_tile(const T* sample, std::int64_t begin, std::int64_t end, int lane, bool wide,
                          Real<T> (&out)[kLane]) {
#pragma unroll
  for (int k = 0; k < kLane / Group; ++k) {
    const std::int64_t at = begin + (k * kWarp + lane) * Group;
    load<Group>(sample + at, end - at, wide, out + k * Group);
  }
}

template <int Group, typename T>
__device__ void store_tile(T* sample, std::int64_t begin, std::int64_t end, int lane, bool wide,
                           const Real<T> (&in)[kLane]) {
#pragma unroll
  for (int k = 0; k < kLane / Group; ++k) {
    const std::int64_t at = begin + (k * kWarp + lane) * Group;
    store<Group>(sample + at, end - at, wide, in + k * Group);
  }
}

// `inverse` stays a run-time flag in both kernels: the two directions share the very instructions that make l.
template <typename X, typename S, Activation A>
__global__ void __launch_bounds__(kThreads) forward_kernel(CouplingForward call, Ranges ranges, double* partial) {
  using R = Real<X>;
  constexpr int kGroup = 16 / sizeof(S);
  const R clamp = static_cast<R>(call.clamp);
  const Walk walk;
  for (std::int64_t item = walk.first; item < call.batch * ranges.count; item += walk.step) {
    const std::int64_t b = item / ranges.count;
    const std::int64_t begin = (item - b * ranges.count) * ranges.length;
    const std::int64_t end = begin + ranges.length < call.inner ? begin + ranges.length : call.inner;
    const X* x = static_cast<const X*>(call.x) + b * call.x_stride;
    const S* s = static_cast<const S*>(call.s) + b * call.s_stride;
    const S* t = static_cast<const S*>(call.t) + b * call.t_stride;
    X* y = static_cast<X*>(call.y) + b * call.y_stride;
    const bool wide = aligned(x) && aligned(s) && aligned(t) && aligned(y);
    double sum = 0;
    for (std::int64_t i = begin; i < end; i += kTile) {
      R xs[kLane], ss[kLane], ts[kLane];
      load_tile<kGroup>(x, i, end, walk.lane, wide, xs);
      load_tile<kGroup>(s, i, end, walk.lane, wide, ss);
      load_tile<kGroup>(t, i, end, walk.lane, wide, ts);
#pragma unroll
      for (int k = 0; k < kLane; ++k) {
        const R l = log_scale<A>(ss[k], clamp);
        if (partial) sum += l;
        const R e = std::exp(call.inverse ? -l : l);
        xs[k] = call.inverse ? (xs[k] - ts[k]) * e : std::fma(xs[k], e, ts[k]);
      }
      store_tile<kGroup>(y, i, end, walk.lane, wide, xs);
    }
    if (partial) {
      sum = warp_sum(sum);
      if (walk.lane == 0) partial[item] = sum;
    }
  }
}

// A warp per sample adds the ranges' sums.
template <typename R>
__global__ void __launch_bounds__(kThreads)
    log_det_kernel(const double* partial, std::int64_t count, std::int64_t batch, bool inverse, R* log_det) {
  const Walk walk;
  for (std::int64_t b = walk.first; b < batch; b += walk.step) {
    double sum = 0;
    for (std::int64_t i = walk.lane; i < count; i += kWarp) sum += partial[b * count + i];
    sum = warp_sum(sum);
    if (walk.lane == 0) log_det[b] = static_cast<R>(inverse ? -sum : sum);
  }
}

template <typename X, typename S, Activation A>
__global__ void __launch_bounds__(kThreads) backward_kernel(CouplingBackward call, Ranges ranges) {
  using R = Real<X>;
  constexpr int kGroup = 16 / sizeof(S);
  const R clamp = static_cast<R>(call.clamp);
  const Walk walk;
  for (std::int64_t item = walk.first; item < call.batch * ranges.count; item += walk.step) {
    const std::int64_t b = item / ranges.count;
    const std::int64_t begin = (item - b * ranges.count) * ranges.length;
    const std::int64_t end = begin + ranges.length < call.inner ? begin + ranges.length : call.inner;
    const X* grad_out = static_cast<const X*>(call.grad_out) + b * call.grad_out_stride;
    const X* value = static_cast<const X*>(call.value) + b * call.value_stride;
    const S* s = static_cast<const S*>(call.s) + b * call.s_stride;
    const S* t = call.from_output ? static_cast<const S*>(call.t) + b * call.t_stride : nullptr;
    X* grad_x = call.grad_x ? static_cast<X*>(call.grad_x) + b * call.inner : nullptr;
    S* grad_s = call.grad_s ? static_cast<S*>(call.grad_s) + b * call.inner : nullptr;
    const bool wide =
        aligned(grad_out) && aligned(value) && aligned(s) && aligned(t) && aligned(grad_x) && aligned(grad_s);
    const R lam = call.grad_log_det ? static_cast<const R*>(call.grad_log_det)[b] : R(0);
    for (std::int64_t i = begin; i < end; i += kTile) {
      R gs[kLane], vs[kLane], ss[kLane], ts[kLane];
      load_tile<kGroup>(grad_out, i, end, walk.lane, wide, gs);
      load_tile<kGroup>(s, i, end, walk.lane, wide, ss);
      if (grad_s) load_tile<kGroup>(value, i, end, walk.lane, wide, vs);
      if (grad_s && t) load_tile<kGroup>(t, i, end, walk.lane, wide, ts);
      R gx[kLane];
#pragma unroll
      for (int k = 0; k < kLane; ++k) {
        const R l = log_scale<A>(ss[k], clamp);
        gx[k] = gs[k] * std::exp(call.inverse ? -l : l);
      }
      if (grad_x) store_tile<kGroup>(grad_x, i, end, walk.lane, wide, gx);
      if (grad_s) {
#pragma unroll
        for (int k = 0; k < kLane; ++k) {
          const R slant = slope<A>(ss[k], clamp);
          if (call.inverse) {
            gs[k] = -std::fma(gs[k], vs[k], lam) * slant;
          } else if (t) {
            gs[k] = std::fma(gs[k], vs[k] - ts[k], lam) * slant;
          } else {
            gs[k] = std::fma(gx[k], vs[k], lam) * slant;
          }
        }
        store_tile<kGroup>(grad_s, i, end, walk.lane, wide, gs);
      }
    }
  }
}

// A thread takes kPack neighbours of one sub-band row, that is 2 kPack pixels of two image rows. With all planes
// stacked, sub-band row `line` comes from the image rows 2 line and 2 line + 1.
template <typename T>
__global__ void __launch_bounds__(kThreads) haar_kernel(Haar call) {
  using R = Real<T>;
  constexpr int kPack = 16 / sizeof(T);
  const std::int64_t packs = ceil_div(call.cols, kPack);
  const std::int64_t band = call.channels * call.rows * call.cols;  // one sub-band of one sample
  const std::int64_t lines = call.batch * call.channels * call.rows;
  const T* in = static_cast<const T*>(call.in);
  T* out = static_cast<T*>(call.out);
  const bool wide = call.cols % kPack == 0 && aligned(in) && aligned(out);
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t item = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; item < lines * packs; item += step) {
    const std::int64_t line = item / packs;
    const std::int64_t col = (item - line * packs) * kPack;
    const std::int64_t count = call.cols - col;
    const std::int64_t pixel = 4 * line * call.cols + 2 * col;
    const std::int64_t sample = line / (call.channels * call.rows);
    const std::int64_t coefficient = line * call.cols + 3 * sample * band + col;
    R pixels[2][2 * kPack], bands[4][kPack];
    if (call.inverse) {
#pragma unroll
      for (int q = 0; q < 4; ++q) load<kPack>(in + coefficient + q * band, count, wide, bands[q]);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const R top = bands[0][k] - bands[2][k], bottom = bands[0][k] + bands[2][k];
        const R top_step = bands[1][k] - bands[3][k], bottom_step = bands[1][k] + bands[3][k];
        pixels[0][2 * k] = (top - top_step) * R(0.5);
        pixels[0][2 * k + 1] = (top + top_step) * R(0.5);
        pixels[1][2 * k] = (bottom - bottom_step) * R(0.5);
        pixels[1][2 * k + 1] = (bottom + bottom_step) * R(0.5);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) store<2 * kPack>(out + pixel + 2 * r * call.cols, 2 * count, wide, pixels[r]);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) load<2 * kPack>(in + pixel + 2 * r * call.cols, 2 * count, wide, pixels[r]);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const R top = pixels[0][2 * k] + pixels[0][2 * k + 1], bottom = pixels[1][2 * k] + pixels[1][2 * k + 1];
        const R top_step = pixels[0][2 * k + 1] - pixels[0][2 * k];
        const R bottom_step = pixels[1][2 * k + 1] - pixels[1][2 * k];
        bands[0][k] = (top + bottom) * R(0.5);
        bands[1][k] = (top_step + bottom_step) * R(0.5);
        bands[2][k] = (bottom - top) * R(0.5);
        bands[3][k] = (bottom_step - top_step) * R(0.5);
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) store<kPack>(out + coefficient + q * band, count, wide, bands[q]);
    }
  }
}

template <Activation A>
using ActivationOf = std::integral_constant<Activation, A>;

// Calls f(Type<X>, Type<S>, ActivationOf<A>) for one of the served combinations.
template <typename F>
cudaError_t with_variant(DType x_type, DType st_type, Activation activation, F f) {
  return with_type(x_type, [&](auto x) {
    return with_type(st_type, [&](auto s) {
      using X = typename decltype(x)::type;
      using S = typename decltype(s)::type;
      if constexpr (std::is_same_v<X, S> || (std::is_same_v<X, float> && sizeof(S) == 2)) {
        switch (activation) {
          case Activation::none: return f(x, s, ActivationOf<Activation::none>{});
          case Activation::sigmoid: return f(x, s, ActivationOf<Activation::sigmoid>{});
          case Activation::tanh: return f(x, s, ActivationOf<Activation::tanh>{});
          case Activation::atan: return f(x, s, ActivationOf<Activation::atan>{});
        }
      }
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace

std::int64_t coupling_scratch(std::int64_t batch, std::int64_t inner) { return batch * ranges_of(inner).count; }

cudaError_t coupling_forward(const CouplingForward& call, double* scratch, cudaStream_t stream) {
  const Ranges ranges = ranges_of(call.inner);
  const cudaError_t error = with_variant(call.x_type, call.st_type, call.activation, [&](auto x, auto s, auto a) {
    return launch(forward_kernel<typename decltype(x)::type, typename decltype(s)::type, decltype(a)::value>,
                  ceil_div(call.batch * ranges.count, kWarps), kThreads, stream, call, ranges,
                  call.log_det ? scratch : nullptr);
  });
  if (error != cudaSuccess || !call.log_det) return error;
  const auto finish = [&](auto* log_det) {
    return launch(log_det_kernel<std::remove_pointer_t<decltype(log_det)>>, ceil_div(call.batch, kWarps), kThreads,
                  stream, static_cast<const double*>(scratch), ranges.count, call.batch, call.inverse, log_det);
  };
  return call.x_type == DType::f64 ? finish(static_cast<double*>(call.log_det))
                                   : finish(static_cast<float*>(call.log_det));
}

cudaError_t coupling_backward(const CouplingBackward& call, cudaStream_t stream) {
  const Ranges ranges = ranges_of(call.inner);
  return with_variant(call.x_type, call.st_type, call.activation, [&](auto x, auto s, auto a) {
    return launch(backward_kernel<typename decltype(x)::type, typename decltype(s)::type, decltype(a)::value>,
                  ceil_div(call.batch * ranges.count, kWarps), kThreads, stream, call, ranges);
  });
}

cudaError_t haar(const Haar& call, cudaStream_t stream) {
  return with_type(call.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const std::int64_t packs = ceil_div(call.cols, 16 / sizeof(T));
    return launch(haar_kernel<T>, ceil_div(call.batch * call.channels * call.rows * packs, kThreads), kThreads, stream,
                  call);
  });
}

}  // namespace pyface::cuda
