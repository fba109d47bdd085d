// Three products of one tile shape: the forward pass (pixels x outputs, over channels and taps), the columns' gradient
// (pixels x channels, over outputs) and the weight's gradient (channels x outputs, over pixels). Both factors of a step
// are put into shared memory; what is interpolated never goes further. bf16 and f16, and f32 where TF32 is allowed, are
// multiplied by tensor cores; f32 and f64 by plain threads.
//
// Written without a GPU, so not tuned on one. To try there, in this order: two buffers of shared memory, so that the
// corners of the next step are on their way during a product (cp.async for the weights); a second pixel tile for each
// weight tile (128 x 256); wgmma in place of wmma on Hopper; pixel tiles of 8 x 8 instead of 64 in a row, for the L1.
#include "cuda/deform_conv.h"

#include "cuda/launch.h"
#include "cuda/numbers.h"

#ifdef __CUDACC__
#include <mma.h>
#endif

namespace pyface::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 64;   // of a tile of results: pixels, or channels for the weight's gradient
constexpr int kDepth = 32;  // of a step of a product
constexpr int kVector = 8;  // channels that a thread interpolates together
constexpr int kFragment = 16;

constexpr std::int64_t kBlocks = 264;     // two to each multiprocessor of a Hopper GPU: fewer tiles than that are split
constexpr std::int64_t kLeastSteps = 8;  // of a split: below, the sum over splits costs more than it brings

#ifdef __CUDACC__
constexpr bool kTensorCores = true;
#else
constexpr bool kTensorCores = false;  // emulated (tests/cuda_emulation): the plain product stands in
#endif
template <typename T, bool Tf32>
constexpr bool kTensor = kTensorCores && (sizeof(T) == 2 || Tf32);

// Length of a row of a factor: padded against bank conflicts, in tensor cores' steps of 16 bytes.
template <typename T, bool Tensor>
constexpr int kPitch = !Tensor ? kDepth + 1 : sizeof(T) == 2 ? kDepth + 8 : kDepth + 4;

// ---- products -------------------------------------------------------------------------------------------------------
// result[i][j] += sum over k of a[i][k] b[j][k] for i < kRows, j < J, k < kDepth.

template <typename T, int J, bool Tensor>
struct Product {
  using R = Real<T>;
  static constexpr int kPitchHere = kPitch<T, Tensor>;
  static constexpr int kSide = 16;  // threads along either side of the tile
  R sums[kRows / kSide][J / kSide];

  __device__ void clear() {
#pragma unroll
    for (auto& row : sums) {
#pragma unroll
      for (R& sum : row) sum = 0;
    }
  }

  __device__ void add(const T* a, const T* b) {
    const int i = threadIdx.x / kSide, j = threadIdx.x % kSide;
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      R left[kRows / kSide];
#pragma unroll
      for (int s = 0; s < kRows / kSide; ++s) left[s] = widen(a[(i + s * kSide) * kPitchHere + k]);
#pragma unroll
      for (int t = 0; t < J / kSide; ++t) {
        const R right = widen(b[(j + t * kSide) * kPitchHere + k]);
#pragma unroll
        for (int s = 0; s < kRows / kSide; ++s) sums[s][t] += left[s] * right;
      }
    }
  }

  // Calls f(i, j, result) once for every element, each in some thread.
  template <typename F>
  __device__ void visit(float*, F f) const {
#pragma unroll
    for (int s = 0; s < kRows / kSide; ++s) {
#pragma unroll
      for (int t = 0; t < J / kSide; ++t)
        f(int(threadIdx.x) / kSide + s * kSide, int(threadIdx.x) % kSide + t * kSide, sums[s][t]);
    }
  }
};

#ifdef __CUDACC__
template <typename T>
struct Factor {
  using type = T;
};
template <>
struct Factor<float> {
  using type = nvcuda::wmma::precision::tf32;
};

// Warps stand 2 x 4 on the tile.
template <typename T, int J>
struct Product<T, J, true> {
  static constexpr int kPitchHere = kPitch<T, true>;
  static constexpr int kStep = sizeof(T) == 2 ? 16 : 8;
  static constexpr int kDown = kRows / 2 / kFragment, kAcross = J / 4 / kFragment;
  using Type = typename Factor<T>::type;
  template <typename Use, typename Layout>
  using Fragment = nvcuda::wmma::fragment<Use, kFragment, kFragment, kStep, Type, Layout>;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kFragment, kFragment, kStep, float> sums[kDown][kAcross];

  static __device__ int row() { return threadIdx.x / kWarp / 4 * (kRows / 2); }
  static __device__ int column() { return threadIdx.x / kWarp % 4 * (J / 4); }

  __device__ void clear() {
#pragma unroll
    for (auto& line : sums) {
#pragma unroll
      for (auto& sum : line) nvcuda::wmma::fill_fragment(sum, 0.0f);
    }
  }

  template <typename F>
  static __device__ void read(F& fragment, const T* from) {
    nvcuda::wmma::load_matrix_sync(fragment, from, kPitchHere);
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < fragment.num_elements; ++i) fragment.x[i] = nvcuda::wmma::__float_to_tf32(fragment.x[i]);
    }
  }

  __device__ void add(const T* a, const T* b) {
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      Fragment<nvcuda::wmma::matrix_a, nvcuda::wmma::row_major> left[kDown];
#pragma unroll
      for (int s = 0; s < kDown; ++s) read(left[s], a + (row() + s * kFragment) * kPitchHere + k);
#pragma unroll
      for (int t = 0; t < kAcross; ++t) {
        Fragment<nvcuda::wmma::matrix_b, nvcuda::wmma::col_major> right;
        read(right, b + (column() + t * kFragment) * kPitchHere + k);
#pragma unroll
        for (int s = 0; s < kDown; ++s) nvcuda::wmma::mma_sync(sums[s][t], left[s], right, sums[s][t]);
      }
    }
  }

  // `staging`: kFragment * kFragment floats for each warp. Neighbouring lanes get neighbouring rows.
  template <typename F>
  __device__ void visit(float* staging, F f) const {
    const int lane = threadIdx.x % kWarp;
    float* mine = staging + threadIdx.x / kWarp * (kFragment * kFragment);
#pragma unroll
    for (int s = 0; s < kDown; ++s) {
#pragma unroll
      for (int t = 0; t < kAcross; ++t) {
        nvcuda::wmma::store_matrix_sync(mine, sums[s][t], kFragment, nvcuda::wmma::mem_col_major);
        __syncwarp();
        for (int e = lane; e < kFragment * kFragment; e += kWarp) {
          f(row() + s * kFragment + e % kFragment, column() + t * kFragment + e / kFragment, mine[e]);
        }
        __syncwarp();
      }
    }
  }
};
#endif

// ---- where taps read ------------------------------------------------------------------------------------------------

template <typename R>
__device__ R read_as(const void* data, DType type, std::int64_t i) {
  switch (type) {
    case DType::f32: return static_cast<R>(static_cast<const float*>(data)[i]);
    case DType::f64: return static_cast<R>(static_cast<const double*>(data)[i]);
    case DType::bf16: return static_cast<R>(widen(static_cast<const __nv_bfloat16*>(data)[i]));
    case DType::f16: return static_cast<R>(widen(static_cast<const __half*>(data)[i]));
  }
  return R(0);
}

template <typename R>
__device__ void write_as(void* data, DType type, std::int64_t i, R value) {
  switch (type) {
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case DType::f64: static_cast<double*>(data)[i] = static_cast<double>(value); break;
    case DType::bf16: narrow(static_cast<float>(value), static_cast<__nv_bfloat16*>(data)[i]); break;
    case DType::f16: narrow(static_cast<float>(value), static_cast<__half*>(data)[i]); break;
  }
}

// Of one tap at a tile of pixels: the corners' pixels (-1: outside the image, counts as 0), the fractions of a pixel
// below and right of the first, the mask; and where the image begins, in channels_last elements.
template <typename R>
struct Plan {
  int corner[4][kRows];
  R down[kRows], right[kRows], mask[kRows];
  std::int64_t image[kRows];
};

__device__ std::int64_t pixels_of(const DeformConvShape& shape) { return shape.out_height * shape.out_width; }

// Entry `at` of a plan, for output pixel p of the batch (`exists`: or none).
template <typename R>
__device__ void place(const DeformConvCall& call, std::int64_t tap_group, std::int64_t tap, std::int64_t p, bool exists,
                      int at, Plan<R>& plan) {
  const DeformConvShape& shape = call.shape;
  R y = -2, x = -2, mask = 0;
  std::int64_t n = 0;
  if (exists) {
    const std::int64_t pixels = pixels_of(shape);
    n = p / pixels;
    const std::int64_t q = p - n * pixels, oy = q / shape.out_width, ox = q - oy * shape.out_width;
    const std::int64_t i = tap / shape.kernel[1], j = tap - i * shape.kernel[1];
    const std::int64_t entry = n * call.offset_stride + 2 * tap_group * pixels + q;
    y = static_cast<R>(oy * shape.stride[0] - shape.padding[0] + i * shape.dilation[0]);
    x = static_cast<R>(ox * shape.stride[1] - shape.padding[1] + j * shape.dilation[1]);
    y += read_as<R>(call.offset, call.offset_type, entry);
    x += read_as<R>(call.offset, call.offset_type, entry + pixels);
    mask = call.mask ? read_as<R>(call.mask, call.offset_type, n * call.mask_stride + tap_group * pixels + q) : R(1);
  }
  // Written so that a NaN fails it, and before any conversion to an integer.
  const bool reads = y >= R(-1) && y < static_cast<R>(shape.height) && x >= R(-1) && x < static_cast<R>(shape.width);
  const R row = reads ? std::floor(y) : R(0), column = reads ? std::floor(x) : R(0);
  const int top = static_cast<int>(row), left = static_cast<int>(column);
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int cy = top + c / 2, cx = left + c % 2;
    const bool inside = reads && cy >= 0 && cy < height && cx >= 0 && cx < width;
    plan.corner[c][at] = inside ? cy * width + cx : -1;
  }
  plan.down[at] = reads ? y - row : R(0);
  plan.right[at] = reads ? x - column : R(0);
  plan.mask[at] = mask;
  plan.image[at] = n * shape.channels * shape.height * shape.width;
}

template <typename R>
__device__ R corner_weight(const Plan<R>& plan, int at, int corner) {
  const R y = corner / 2 ? plan.down[at] : 1 - plan.down[at];
  return y * (corner % 2 ? plan.right[at] : 1 - plan.right[at]);
}

// The columns of `count` (at most kVector) channels from `channel` on; those that do not exist are 0.
template <typename T>
__device__ void interpolate(const DeformConvCall& call, const Plan<Real<T>>& plan, int at, std::int64_t channel,
                            std::int64_t count, Real<T> (&out)[kVector]) {
  using R = Real<T>;
#pragma unroll
  for (R& v : out) v = 0;
  if (count <= 0) return;
  const T* image = static_cast<const T*>(call.input) + plan.image[at] + channel;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int pixel = plan.corner[c][at];
    if (pixel < 0) continue;
    const T* from = image + pixel * call.shape.channels;
    R values[kVector];
    load<kVector>(from, count, aligned(from), values);
    const R weight = corner_weight(plan, at, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] += weight * values[i];
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) out[i] = i < count ? out[i] * plan.mask[at] : R(0);
}

// ---- how work is cut ------------------------------------------------------------------------------------------------

// Channels come in runs that straddle neither two weight groups nor two offset groups, runs in blocks.
struct Cut {
  std::int64_t inputs, outs;      // of a weight group
  std::int64_t offset_group;      // channels
  std::int64_t taps;              // of the kernel
  std::int64_t run;               // channels of a run
  std::int64_t block, blocks;     // channels of a block, blocks of a run
  std::int64_t pixels;            // of all images
};

Cut cut(const DeformConvShape& shape, std::int64_t block) {
  Cut c{};
  c.inputs = shape.channels / shape.groups;
  c.outs = shape.outs / shape.groups;
  c.offset_group = shape.channels / shape.offset_groups;
  c.taps = shape.kernel[0] * shape.kernel[1];
  std::int64_t rest = c.offset_group;
  for (c.run = c.inputs; rest;) {  // the greatest common divisor
    const std::int64_t next = c.run % rest;
    c.run = rest;
    rest = next;
  }
  c.block = block;
  c.blocks = ceil_div(c.run, block);
  c.pixels = shape.batch * shape.out_height * shape.out_width;
  return c;
}

// Steps of a weight group: run by run, tap by tap, block by block.
__host__ __device__ std::int64_t steps_of(const Cut& c) { return c.inputs / c.run * c.taps * c.blocks; }

// The widest tile of outputs whose factors fit into 48 KB and whose sums into registers.
int columns_of(DType type, std::int64_t outs) {
  if (type == DType::f64 || outs <= 64) return 64;
  return outs <= 128 || type == DType::f32 ? 128 : 256;
}

std::int64_t out_tiles(const DeformConvShape& shape, DType type) {
  const std::int64_t outs = shape.outs / shape.groups;
  return shape.groups * ceil_div(outs, columns_of(type, outs));
}

std::int64_t splits_for(std::int64_t tiles, std::int64_t steps) {
  const std::int64_t wanted = std::min(kBlocks / std::max(tiles, std::int64_t(1)), steps / kLeastSteps);
  return std::max(wanted, std::int64_t(1));
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename T, bool Tf32, int J>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(DeformConvCall call, const void* bias, DeformConvOut out, Cut cut, std::int64_t splits, void* partial) {
  using R = Real<T>;
  constexpr bool kCores = kTensor<T, Tf32>;
  constexpr int kPitchHere = kPitch<T, kCores>;
  alignas(32) __shared__ T a[kRows * kPitchHere];
  alignas(32) __shared__ T b[J * kPitchHere];
  alignas(32) __shared__ float staging[kCores ? kWarps * kFragment * kFragment : 1];
  __shared__ Plan<R> plan;
  const DeformConvShape& shape = call.shape;
  const T* weight = static_cast<const T*>(call.weight);
  const std::int64_t group_tiles = ceil_div(cut.outs, J), tiles = shape.groups * group_tiles;
  const std::int64_t pixel_tiles = ceil_div(cut.pixels, kRows), pixels = pixels_of(shape);
  const std::int64_t steps = steps_of(cut), each = ceil_div(steps, splits);
  for (std::int64_t item = blockIdx.x; item < pixel_tiles * tiles * splits; item += gridDim.x) {
    const std::int64_t tile = item % tiles, rest = item / tiles;  // neighbours read the same pixels
    const std::int64_t split = rest / pixel_tiles, first_pixel = (rest - split * pixel_tiles) * kRows;
    const std::int64_t group = tile / group_tiles, first_out = (tile - group * group_tiles) * J;
    const std::int64_t last = (split + 1) * each < steps ? (split + 1) * each : steps;
    Product<T, J, kCores> product;
    product.clear();
    for (std::int64_t step = split * each; step < last; ++step) {
      const std::int64_t line = step / cut.blocks, block = step - line * cut.blocks;
      const std::int64_t run = line / cut.taps, tap = line - run * cut.taps;
      const std::int64_t channel = run * cut.run + block * kDepth, count = cut.run - block * kDepth;
      if (threadIdx.x < kRows && (step == split * each || block == 0)) {
        const std::int64_t tap_group = (group * cut.inputs + channel) / cut.offset_group * cut.taps + tap;
        const std::int64_t p = first_pixel + threadIdx.x;
        place(call, tap_group, tap, p, p < cut.pixels, threadIdx.x, plan);
      }
      __syncthreads();  // the plan is there, and the factors of the step before have been read
      {
        const int pixel = threadIdx.x / (kDepth / kVector), at = threadIdx.x % (kDepth / kVector) * kVector;
        R values[kVector];
        interpolate<T>(call, plan, pixel, group * cut.inputs + channel + at, count - at, values);
#pragma unroll
        for (int i = 0; i < kVector; ++i) narrow(values[i], a[pixel * kPitchHere + at + i]);
      }
#pragma unroll
      for (int e = threadIdx.x; e < J * kDepth / kVector; e += kThreads) {
        const int j = e / (kDepth / kVector), at = e % (kDepth / kVector) * kVector;
        R values[kVector] = {};
        if (first_out + j < cut.outs && count > at) {
          const T* from = weight + ((group * cut.outs + first_out + j) * cut.taps + tap) * cut.inputs + channel + at;
          load<kVector>(from, count - at, aligned(from), values);
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) narrow(values[i], b[j * kPitchHere + at + i]);
      }
      __syncthreads();
      product.add(a, b);
    }
    product.visit(staging, [&](int i, int j, R value) {
      const std::int64_t p = first_pixel + i, o = group * cut.outs + first_out + j;
      if (p >= cut.pixels || first_out + j >= cut.outs) return;
      if (partial) {
        static_cast<R*>(partial)[(split * cut.pixels + p) * shape.outs + o] = value;
      } else {
        const std::int64_t n = p / pixels;
        if (bias) value += widen(static_cast<const T*>(bias)[o]);
        narrow(value, static_cast<T*>(out.data)[n * out.strides[0] + o * out.strides[1] +
                                                (p - n * pixels) * out.strides[2]]);
      }
    });
  }
}

// Adds up the splits of the forward pass in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(DeformConvShape shape, const void* partial, std::int64_t splits, const void* bias, DeformConvOut out) {
  using R = Real<T>;
  const std::int64_t pixels = pixels_of(shape), size = shape.batch * pixels * shape.outs;
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    R total = 0;
    for (std::int64_t split = 0; split < splits; ++split) total += static_cast<const R*>(partial)[split * size + i];
    const std::int64_t p = i / shape.outs, o = i - p * shape.outs, n = p / pixels;
    if (bias) total += widen(static_cast<const T*>(bias)[o]);
    narrow(total, static_cast<T*>(out.data)[n * out.strides[0] + o * out.strides[1] + (p - n * pixels) * out.strides[2]]);
  }
}

__device__ float shuffle_add(float v, int bits) { return v + __shfl_xor_sync(0xffffffffu, v, bits); }
__device__ double shuffle_add(double v, int bits) { return v + __shfl_xor_sync(0xffffffffu, v, bits); }

template <typename R>
__device__ R warp_sum(R v) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) v = shuffle_add(v, bits);
  return v;
}

// One tap of one offset group at a tile of pixels, all steps of channels: an item owns its gradients of offset and mask.
template <typename T, bool Tf32>
__global__ void __launch_bounds__(kThreads) columns_kernel(DeformConvCall call, DeformConvColumns wanted, Cut cut) {
  using R = Real<T>;
  constexpr bool kCores = kTensor<T, Tf32>;
  constexpr int kPitchHere = kPitch<T, kCores>, kWide = 64, kPitchWide = kWide + 1;
  constexpr int kFactors = (kRows + kWide) * kPitchHere * sizeof(T), kResults = kRows * kPitchWide * sizeof(R);
  alignas(32) __shared__ char memory[kFactors > kResults ? kFactors : kResults];  // factors, then the tile of results
  alignas(32) __shared__ float staging[kCores ? kWarps * kFragment * kFragment : 1];
  __shared__ Plan<R> plan;
  __shared__ std::int64_t grad_at[kRows];
  __shared__ R sums[3][kRows];  // over channels: along y, along x, of the sampled values
  T* a = reinterpret_cast<T*>(memory);
  T* b = a + kRows * kPitchHere;
  R* tile = reinterpret_cast<R*>(memory);
  const DeformConvShape& shape = call.shape;
  const T* grad = static_cast<const T*>(wanted.grad.data);
  const T* weight = static_cast<const T*>(call.weight);
  const std::int64_t pixels = pixels_of(shape), width = (wanted.last_step - wanted.first_step) * kWide;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (std::int64_t item = blockIdx.x; item < ceil_div(cut.pixels, kRows) * wanted.taps; item += gridDim.x) {
    const std::int64_t tap_group = wanted.first_tap + item % wanted.taps, first_pixel = item / wanted.taps * kRows;
    const std::int64_t offset_group = tap_group / cut.taps, tap = tap_group - offset_group * cut.taps;
    __syncthreads();  // the item before has read its plan
    if (threadIdx.x < kRows) {
      const std::int64_t p = first_pixel + threadIdx.x, n = p / pixels;
      place(call, tap_group, tap, p, p < cut.pixels, threadIdx.x, plan);
      grad_at[threadIdx.x] = p < cut.pixels ? n * wanted.grad.strides[0] + (p - n * pixels) * wanted.grad.strides[2] : -1;
      for (auto& line : sums) line[threadIdx.x] = 0;
    }
    for (std::int64_t step = wanted.first_step; step < wanted.last_step; ++step) {
      const std::int64_t run = step / cut.blocks, in_run = (step - run * cut.blocks) * kWide;
      const std::int64_t channel = offset_group * cut.offset_group + run * cut.run + in_run, count = cut.run - in_run;
      const std::int64_t group = channel / cut.inputs, in_group = channel - group * cut.inputs;
      Product<T, kWide, kCores> product;
      product.clear();
      for (std::int64_t first = 0; first < cut.outs; first += kDepth) {
        __syncthreads();  // the plan is there; factors or results of before have been read
        const std::int64_t o = group * cut.outs + first, outs = cut.outs - first;
#pragma unroll
        for (int e = threadIdx.x; e < kRows * kDepth; e += kThreads) {
          const int i = e % kRows, k = e / kRows;
          const std::int64_t at = grad_at[i];
          a[i * kPitchHere + k] = at >= 0 && k < outs ? grad[at + (o + k) * wanted.grad.strides[1]] : T{};
        }
#pragma unroll
        for (int e = threadIdx.x; e < kWide * kDepth; e += kThreads) {
          const int j = e % kWide, k = e / kWide;
          b[j * kPitchHere + k] =
              j < count && k < outs ? weight[((o + k) * cut.taps + tap) * cut.inputs + in_group + j] : T{};
        }
        __syncthreads();
        product.add(a, b);
      }
      __syncthreads();
      product.visit(staging, [&](int i, int j, R value) { tile[i * kPitchWide + j] = value; });
      __syncthreads();
      for (int i = warp; i < kRows; i += kWarps) {  // a warp takes a pixel, its lanes neighbouring channels
        if (grad_at[i] < 0) continue;
        const R y = plan.down[i], x = plan.right[i], mask = plan.mask[i];
        R down = 0, right = 0, sampled = 0;
        for (int j = lane; j < kWide && j < count; j += kWarp) {
          const R u = tile[i * kPitchWide + j];
          const std::int64_t place = plan.image[i] + channel + j;
          if (wanted.grad_offset || wanted.grad_mask) {
            R v[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int pixel = plan.corner[c][i];
              v[c] = pixel < 0 ? R(0) : widen(static_cast<const T*>(call.input)[place + pixel * shape.channels]);
            }
            const R along_y = (1 - x) * (v[2] - v[0]) + x * (v[3] - v[1]);
            down += u * along_y;
            right += u * ((1 - y) * (v[1] - v[0]) + y * (v[3] - v[2]));
            sampled += u * ((1 - x) * v[0] + x * v[1] + y * along_y);
          }
          if (wanted.grad_input) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int pixel = plan.corner[c][i];
              if (pixel < 0) continue;
              atomicAdd(static_cast<R*>(wanted.grad_input) + place + pixel * shape.channels,
                        u * mask * corner_weight(plan, i, c));
            }
          }
          if (wanted.columns) {
            static_cast<R*>(wanted.columns)[(tap * pixels + first_pixel + i) * width +
                                            (step - wanted.first_step) * kWide + j] = u * mask;
          }
        }
        if (wanted.grad_offset || wanted.grad_mask) {
          down = warp_sum(down), right = warp_sum(right), sampled = warp_sum(sampled);
          if (lane == 0) sums[0][i] += down, sums[1][i] += right, sums[2][i] += sampled;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < kRows && grad_at[threadIdx.x] >= 0) {
      const std::int64_t p = first_pixel + threadIdx.x, n = p / pixels, q = p - n * pixels;
      const std::int64_t at = (n * shape.offset_groups * cut.taps + tap_group) * pixels;
      const R mask = plan.mask[threadIdx.x];
      if (wanted.grad_offset) {
        write_as(wanted.grad_offset, call.offset_type, 2 * at + q, sums[0][threadIdx.x] * mask);
        write_as(wanted.grad_offset, call.offset_type, 2 * at + pixels + q, sums[1][threadIdx.x] * mask);
      }
      if (wanted.grad_mask) write_as(wanted.grad_mask, call.offset_type, at + q, sums[2][threadIdx.x]);
    }
  }
}

template <typename R>
__global__ void __launch_bounds__(kThreads) gather_kernel(DeformConvShape shape, DeformConvGather call, Cut cut) {
  const std::int64_t width = (call.last_step - call.first_step) * cut.block, size = shape.height * shape.width * width;
  const std::int64_t stride = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t e = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; e < size; e += stride) {
    const std::int64_t pixel = e / width, slot = e - pixel * width;
    const std::int64_t step = call.first_step + slot / cut.block, run = step / cut.blocks;
    const std::int64_t in_run = (step - run * cut.blocks) * cut.block + slot % cut.block;
    if (in_run >= cut.run) continue;
    R total = 0;
    for (std::int64_t i = call.first[pixel]; i < call.first[pixel + 1]; ++i) {
      total += static_cast<const R*>(call.columns)[call.rows[i] * width + slot] * static_cast<const R*>(call.weights)[i];
    }
    const std::int64_t channel = call.group * cut.offset_group + run * cut.run + in_run;
    static_cast<R*>(call.grad_input)[pixel * shape.channels + channel] = total;
  }
}

template <typename T, bool Tf32, int J>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(DeformConvCall call, DeformConvOut grad, Cut cut, std::int64_t splits, void* partial) {
  using R = Real<T>;
  constexpr bool kCores = kTensor<T, Tf32>;
  constexpr int kPitchHere = kPitch<T, kCores>;
  alignas(32) __shared__ T a[kRows * kPitchHere];
  alignas(32) __shared__ T b[J * kPitchHere];
  alignas(32) __shared__ float staging[kCores ? kWarps * kFragment * kFragment : 1];
  __shared__ Plan<R> plan;
  __shared__ std::int64_t grad_at[kDepth];
  const DeformConvShape& shape = call.shape;
  const std::int64_t group_tiles = ceil_div(cut.outs, J), tiles = shape.groups * group_tiles, steps = steps_of(cut);
  const std::int64_t pixels = pixels_of(shape), pieces = ceil_div(cut.pixels, kDepth), each = ceil_div(pieces, splits);
  for (std::int64_t item = blockIdx.x; item < tiles * steps * splits; item += gridDim.x) {
    const std::int64_t tile = item % tiles, rest = item / tiles, split = rest / steps, step = rest - split * steps;
    const std::int64_t group = tile / group_tiles, first_out = (tile - group * group_tiles) * J;
    const std::int64_t line = step / cut.blocks, block = step - line * cut.blocks;
    const std::int64_t run = line / cut.taps, tap = line - run * cut.taps;
    const std::int64_t channel = run * cut.run + block * kRows, count = cut.run - block * kRows;
    const std::int64_t tap_group = (group * cut.inputs + channel) / cut.offset_group * cut.taps + tap;
    const std::int64_t last = (split + 1) * each < pieces ? (split + 1) * each : pieces;
    Product<T, J, kCores> product;
    product.clear();
    for (std::int64_t piece = split * each; piece < last; ++piece) {
      if (threadIdx.x < kDepth) {
        const std::int64_t p = piece * kDepth + threadIdx.x, n = p / pixels;
        place(call, tap_group, tap, p, p < cut.pixels, threadIdx.x, plan);
        grad_at[threadIdx.x] = p < cut.pixels ? n * grad.strides[0] + (p - n * pixels) * grad.strides[2] : -1;
      }
      __syncthreads();  // the plan is there, and the factors of the step before have been read
      {
        const int pixel = threadIdx.x / (kRows / kVector), at = threadIdx.x % (kRows / kVector) * kVector;
        R values[kVector];
        interpolate<T>(call, plan, pixel, group * cut.inputs + channel + at, count - at, values);
#pragma unroll
        for (int i = 0; i < kVector; ++i) narrow(values[i], a[(at + i) * kPitchHere + pixel]);
      }
#pragma unroll
      for (int e = threadIdx.x; e < J * kDepth; e += kThreads) {
        const int k = e % kDepth, j = e / kDepth;
        const std::int64_t at = grad_at[k], o = group * cut.outs + first_out + j;
        b[j * kPitchHere + k] = at >= 0 && first_out + j < cut.outs
                                    ? static_cast<const T*>(grad.data)[at + o * grad.strides[1]]
                                    : T{};
      }
      __syncthreads();
      product.add(a, b);
    }
    product.visit(staging, [&](int i, int j, R value) {
      if (i >= count || first_out + j >= cut.outs) return;
      const std::int64_t o = split * shape.outs + group * cut.outs + first_out + j;
      static_cast<R*>(partial)[(o * cut.taps + tap) * cut.inputs + channel + i] = value;
    });
  }
}

// Adds up the splits in their order, into [outs, inputs, taps].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_weight_kernel(const void* partial, std::int64_t splits, std::int64_t outs, Cut cut, void* out) {
  using R = Real<T>;
  const std::int64_t size = outs * cut.taps * cut.inputs, step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    R total = 0;
    for (std::int64_t split = 0; split < splits; ++split) total += static_cast<const R*>(partial)[split * size + i];
    const std::int64_t line = i / cut.inputs, c = i - line * cut.inputs, o = line / cut.taps, tap = line - o * cut.taps;
    narrow(total, static_cast<T*>(out)[(o * cut.inputs + c) * cut.taps + tap]);
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <int N>
using Size = std::integral_constant<int, N>;

// Calls f(Type<T>, is TF32 allowed).
template <typename F>
cudaError_t with_product(DType type, bool tf32, F f) {
  return with_type(type, [&](auto t) {
    if constexpr (kTensorCores && std::is_same_v<typename decltype(t)::type, float>) {
      if (tf32) return f(t, std::true_type{});
    }
    return f(t, std::false_type{});
  });
}

// Calls f(Type<T>, is TF32 allowed, Size<J>) with the width of a tile of outputs.
template <typename F>
cudaError_t with_tile(DType type, bool tf32, std::int64_t outs, F f) {
  const int columns = columns_of(type, outs);
  return with_product(type, tf32, [&](auto t, auto allowed) {
    using T = typename decltype(t)::type;
    if constexpr (sizeof(T) == 2) {
      if (columns == 256) return f(t, allowed, Size<256>{});
    }
    if constexpr (sizeof(T) <= 4) {
      if (columns == 128) return f(t, allowed, Size<128>{});
    }
    return f(t, allowed, Size<64>{});
  });
}

}  // namespace

std::int64_t deform_conv_splits(const DeformConvShape& shape, DType type) {
  const Cut c = cut(shape, kDepth);
  return splits_for(ceil_div(c.pixels, kRows) * out_tiles(shape, type), steps_of(c));
}

std::int64_t deform_conv_weight_splits(const DeformConvShape& shape, DType type) {
  const Cut c = cut(shape, kRows);
  return splits_for(out_tiles(shape, type) * steps_of(c), ceil_div(c.pixels, kDepth));
}

std::int64_t deform_conv_steps(const DeformConvShape& shape) {
  const Cut c = cut(shape, kRows);
  return c.offset_group / c.run * c.blocks;
}

cudaError_t deform_conv_forward(const DeformConvCall& call, const void* bias, const DeformConvOut& out, void* scratch,
                                cudaStream_t stream) {
  const Cut c = cut(call.shape, kDepth);
  const std::int64_t splits = deform_conv_splits(call.shape, call.type);
  const std::int64_t items = ceil_div(c.pixels, kRows) * out_tiles(call.shape, call.type) * splits;
  void* partial = splits > 1 ? scratch : nullptr;
  const cudaError_t error = with_tile(call.type, call.tf32, c.outs, [&](auto t, auto tf32, auto columns) {
    return launch(forward_kernel<typename decltype(t)::type, decltype(tf32)::value, decltype(columns)::value>, items,
                  kThreads, stream, call, bias, out, c, splits, partial);
  });
  if (error != cudaSuccess || splits == 1) return error;
  return with_type(call.type, [&](auto t) {
    return launch(sum_kernel<typename decltype(t)::type>, ceil_div(c.pixels * call.shape.outs, kThreads), kThreads, stream,
                  call.shape, static_cast<const void*>(scratch), splits, bias, out);
  });
}

cudaError_t deform_conv_columns(const DeformConvCall& call, const DeformConvColumns& columns, cudaStream_t stream) {
  const Cut c = cut(call.shape, kRows);
  return with_product(call.type, call.tf32, [&](auto t, auto tf32) {
    return launch(columns_kernel<typename decltype(t)::type, decltype(tf32)::value>,
                  ceil_div(c.pixels, kRows) * columns.taps, kThreads, stream, call, columns, c);
  });
}

cudaError_t deform_conv_gather(const DeformConvShape& shape, DType type, const DeformConvGather& gather,
                               cudaStream_t stream) {
  const Cut c = cut(shape, kRows);
  const std::int64_t items = shape.height * shape.width * (gather.last_step - gather.first_step) * c.block;
  const auto kernel = type == DType::f64 ? gather_kernel<double> : gather_kernel<float>;
  return launch(kernel, ceil_div(items, kThreads), kThreads, stream, shape, gather, c);
}

cudaError_t deform_conv_weight(const DeformConvCall& call, const DeformConvOut& grad, void* grad_weight, void* scratch,
                               cudaStream_t stream) {
  const Cut c = cut(call.shape, kRows);
  const std::int64_t splits = deform_conv_weight_splits(call.shape, call.type);
  const std::int64_t items = out_tiles(call.shape, call.type) * steps_of(c) * splits;
  const cudaError_t error = with_tile(call.type, call.tf32, c.outs, [&](auto t, auto tf32, auto columns) {
    return launch(weight_kernel<typename decltype(t)::type, decltype(tf32)::value, decltype(columns)::value>, items,
                  kThreads, stream, call, grad, c, splits, scratch);
  });
  if (error != cudaSuccess) return error;
  return with_type(call.type, [&](auto t) {
    return launch(sum_weight_kernel<typename decltype(t)::type>,
                  ceil_div(call.shape.outs * c.taps * c.inputs, kThreads), kThreads, stream,
                  static_cast<const void*>(scratch), splits, call.shape.outs, c, grad_weight);
  });
}

}  // namespace pyface::cuda
