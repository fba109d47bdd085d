// A dense block of 3x3 convolutions by direct convolution. See pyface/dense_block.h for what is computed.
//
// x and all features of an image live in one zero-bordered work buffer, into which every layer writes its own channels: nothing is
// ever concatenated. A register tile holds some neighbouring pixels times two vectors of outputs; one step of its inner loop takes
// one channel (a pair of channels in bf16) of every pixel, broadcast, times the weights of all those outputs.
//
// Every output is summed in the same order wherever its pixel lies in a tile, a row or a batch and however many threads there are:
// the same input gives the same bits, which invertible networks rely on.

#include "cpu/dense_block.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

constexpr int kLanes = Lanes<f32v>::count;
constexpr int kVectors = 2;  // vectors of outputs in a register tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 14;  // pixels of a tile: 28 sums, 2 weights and a broadcast input fill 32 registers
#else
constexpr int kTile = 6;  // 16 registers
#endif

// Channels that lie together in the work buffer, [row][block][pixel][kBlock]: the distance between pixels is then a constant, and
// the pixels of a tile need one address register. x and each feature begin a block of their own; a step count per block, not
// padding, says how many channels are really there.
constexpr std::int64_t kBlock = 16;

constexpr std::int64_t kImageRows = 128;          // images are taken together until they have this many rows
constexpr std::int64_t kSerialProducts = 200000;  // below this a team costs more than it saves

// ---- arithmetic of one element type -----------------------------------------------------------------------------------------

template <class T>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  static constexpr int pair = 1;  // channels that one step takes
  typedef f32v operand;
  PYFACE_INLINE operand broadcast(const float* p) { return *p - operand{}; }
  PYFACE_INLINE f32v multiply_add(operand x, operand w, f32v sum) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
template <>
struct Arithmetic<bf16> {
  static constexpr int pair = 2;
  typedef i32v operand;
  PYFACE_INLINE operand broadcast(const bf16* p) {
    std::int32_t both;
    std::memcpy(&both, p, sizeof both);
    return both - operand{};
  }
  PYFACE_INLINE f32v multiply_add(operand x, operand w, f32v sum) {
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#endif

PYFACE_INLINE float widen(float v) { return v; }
PYFACE_INLINE float widen(bf16 v) {
  const std::uint32_t bits = (std::uint32_t)v.bits << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
PYFACE_INLINE float nearest_bf16(float v) {  // as round_to_bf16
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits = v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
  bits &= 0xffff0000u;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
PYFACE_INLINE void narrow(float v, float* p) { *p = v; }
PYFACE_INLINE void narrow(float v, bf16* p) {
  v = nearest_bf16(v);
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  p->bits = (std::uint16_t)(bits >> 16);
}

// ---- the plan: sizes, and where in the scratch buffer everything lies -------------------------------------------------------

struct Block {
  std::int64_t first, count;  // channels
};

template <class T>
struct Layer {
  std::int64_t outs, ins;
  std::int64_t blocks, steps;  // of its inputs
  std::int64_t vectors;        // of its outputs, which are `9 outs` columns when the taps are spread
  // Few outputs leave lanes idle (12 of 16). Then the nine taps go onto the lanes too: one product per input pixel with 9 outs
  // columns [kx][ky][out], whose shifted sum is the convolution.
  bool spread;
  T* weights;   // [group of kVectors vectors][ky][step][kx][vector][lane][pair]; spread: no ky, kx
  float* bias;  // [vectors][lane]
};

template <class T>
struct Plan {
  Block* blocks;
  Layer<T>* layers;
  T* features;             // [image][row][block][pixel][kBlock], one border pixel on every side
  float* sums;             // spread: [image][row][pixel][ky][out], sums over kx; a row of zeros before the first
  float* rows;             // one per share: what a row of the last layer is made of
  std::int64_t block_count;
  std::int64_t pitch;      // of a block of a row
  std::int64_t row;        // of a row of the features
  std::int64_t sums_row, rows_row;
  std::int64_t images;     // taken together
  std::int64_t shares;     // of the rows, for the threads
  std::int64_t bytes;
};

PYFACE_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
PYFACE_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

struct Carver {
  char* base;  // null: only count
  std::int64_t used = 0;
  template <class U>
  U* take(std::int64_t count) {
    U* p = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += round_up(count * (std::int64_t)sizeof(U), 64);
    return p;
  }
};

template <class T>
Plan<T> make_plan(const DenseBlock& a, void* scratch, int threads) {
  constexpr std::int64_t pair = Arithmetic<T>::pair;
  Carver carver{(char*)scratch};
  Plan<T> plan;
  std::int64_t channels = 0;
  for (std::int64_t i = 0; i < a.part_count; ++i) channels += a.parts[i].channels;
  plan.block_count = ceil_div(channels, kBlock);
  for (std::int64_t k = 0; k + 1 < a.layer_count; ++k) plan.block_count += ceil_div(a.layers[k].outs, kBlock);
  plan.blocks = carver.take<Block>(plan.block_count);
  plan.layers = carver.take<Layer<T>>(a.layer_count);

  std::int64_t first = 0, blocks = 0, steps = 0;
  auto append = [&](std::int64_t count) {
    for (std::int64_t c = 0; c < count; c += kBlock) {
      const std::int64_t here = count - c < kBlock ? count - c : kBlock;
      if (scratch) plan.blocks[blocks] = {first + c, here};
      ++blocks;
      steps += ceil_div(here, pair);
    }
    first += count;
  };
  append(channels);
  for (std::int64_t k = 0; k < a.layer_count; ++k) {
    Layer<T> layer;
    layer.outs = a.layers[k].outs, layer.ins = first, layer.blocks = blocks, layer.steps = steps;
    const std::int64_t direct = ceil_div(layer.outs, kLanes), spread = ceil_div(9 * layer.outs, kLanes);
    layer.spread = k + 1 == a.layer_count && 10 * spread <= 9 * (9 * direct);
    layer.vectors = layer.spread ? spread : direct;
    layer.weights = carver.take<T>((layer.spread ? 1 : 9) * steps * layer.vectors * kLanes * pair);
    layer.bias = carver.take<float>(layer.vectors * kLanes);
    if (scratch) plan.layers[k] = layer;
    if (k + 1 < a.layer_count) {
      append(layer.outs);
      continue;
    }
    const std::int64_t images = kImageRows / a.height;
    plan.images = images < 1 ? 1 : images < a.batch ? images : a.batch;
    plan.shares = threads < plan.images * a.height ? threads : plan.images * a.height;
    plan.pitch = (a.width + 2) * kBlock;
    plan.row = plan.block_count * plan.pitch;
    plan.features = carver.take<T>(plan.images * (a.height + 2) * plan.row);
    plan.sums_row = a.width * 3 * layer.outs + kLanes;  // vectors are stored whole: room behind the last
    plan.sums = layer.spread ? carver.take<float>((plan.images * a.height + 1) * plan.sums_row) : nullptr;
    plan.rows_row = round_up((a.width + 2) * layer.vectors * kLanes + kLanes, 16);
    plan.rows = carver.take<float>(plan.shares * plan.rows_row);
  }
  plan.bytes = carver.used;
  return plan;
}

// ---- weights ----------------------------------------------------------------------------------------------------------------

// Packs the weights for one step (`channel` and, in a pair, the next one) of a layer: all taps, all outputs.
template <class T, class W>
void pack_step(const Layer<T>& layer, const W* weight, std::int64_t channel, std::int64_t count, std::int64_t step) {
  constexpr std::int64_t pair = Arithmetic<T>::pair;
  for (std::int64_t v0 = 0; v0 < layer.vectors; v0 += kVectors) {
    const std::int64_t group = layer.vectors - v0 < kVectors ? layer.vectors - v0 : kVectors, lanes = group * kLanes;
    T* const to = layer.weights + v0 * kLanes * pair * layer.steps * (layer.spread ? 1 : 9);
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const std::int64_t column = v0 * kLanes + lane;
      if (layer.spread) {
        const std::int64_t tap = column / layer.outs, kx = tap / 3, ky = tap % 3, out = column % layer.outs;
        for (std::int64_t j = 0; j < pair; ++j)
          narrow(tap < 9 && j < count ? widen(weight[(out * layer.ins + channel + j) * 9 + ky * 3 + kx]) : 0.0f,
                 to + (step * lanes + lane) * pair + j);
      } else {
        for (std::int64_t j = 0; j < pair; ++j) {
          const bool real = column < layer.outs && j < count;
          const W* const from = weight + (column * layer.ins + channel + j) * 9;
          for (std::int64_t ky = 0; ky < 3; ++ky)
            for (std::int64_t kx = 0; kx < 3; ++kx)
              narrow(real ? widen(from[ky * 3 + kx]) : 0.0f,
                     to + (((ky * layer.steps + step) * 3 + kx) * lanes + lane) * pair + j);
        }
      }
    }
  }
}

template <class W, class T>
void pack(const DenseBlock& a, const Plan<T>& plan, int threads) {
  constexpr std::int64_t pair = Arithmetic<T>::pair;
  std::int64_t tasks = 0;
  for (std::int64_t k = 0; k < a.layer_count; ++k) {
    const Layer<T>& layer = plan.layers[k];
    tasks += layer.blocks;
    for (std::int64_t i = 0; i < layer.vectors * kLanes; ++i)
      layer.bias[i] = i < layer.outs ? widen(((const W*)a.layers[k].bias)[i]) : 0.0f;
  }
  parallel_for(threads, tasks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = 0, start = 0; k < a.layer_count; start += plan.layers[k++].blocks) {
      const Layer<T>& layer = plan.layers[k];
      for (std::int64_t b = 0, step = 0; b < layer.blocks; ++b) {
        const Block block = plan.blocks[b];
        const bool mine = begin <= start + b && start + b < end;
        for (std::int64_t c = 0; c < block.count; c += pair, ++step)
          if (mine) pack_step(layer, (const W*)a.layers[k].weight, block.first + c, block.count - c, step);
      }
    }
  });
}

// ---- the register tile ------------------------------------------------------------------------------------------------------

// Where the sums of a tile go: features (activated, of type T) or plain floats.
struct Sink {
  void* at[kVectors];  // first pixel, for each vector
  std::int64_t stride;  // between pixels
  bool feature, round;  // round: features are bf16 numbers held as float
  float slope;
};

// `count` pixels from `in` (for Taps = 3: from the pixel above and left of the first one) and all their input channels.
template <class T, int Taps, int V, int P>
__attribute__((noinline)) void tile(const Plan<T>& plan, const Layer<T>& layer, const T* in, const T* w, const float* bias,
                                    const Sink& sink) {
  typedef Arithmetic<T> A;
  f32v sums[P][V];
#pragma GCC unroll 14
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[p][v] = Taps == 3 ? load(bias + v * kLanes) : f32v{};
  for (int ky = 0; ky < Taps; ++ky, in += plan.row) {
    const T* block = in;
    for (std::int64_t b = 0; b < layer.blocks; ++b, block += plan.pitch) {
      const T* x = block;
      for (std::int64_t c = 0; c < plan.blocks[b].count; c += A::pair, x += A::pair) {
#pragma GCC unroll 3
        for (int kx = 0; kx < Taps; ++kx) {
          typename A::operand weights[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v, w += kLanes * A::pair) std::memcpy(&weights[v], w, sizeof weights[v]);
#pragma GCC unroll 14
          for (int p = 0; p < P; ++p) {
            const typename A::operand pixel = A::broadcast(x + (p + kx) * kBlock);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[p][v] = A::multiply_add(pixel, weights[v], sums[p][v]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 14
    for (int p = 0; p < P; ++p) {
      f32v sum = sums[p][v];
      if (!sink.feature) {
        store((float*)sink.at[v] + p * sink.stride, sum);
        continue;
      }
      sum = sum > 0.0f ? sum : sum * sink.slope;
      if (sink.round) sum = (f32v)(round_to_bf16(sum) << 16);
      store((T*)sink.at[v] + p * sink.stride, sum);
    }
  }
}

template <class T, int Taps, int V, int P, class... Args>
PYFACE_INLINE void tile_of(int pixels, Args&... args) {
  if (pixels == P)
    tile<T, Taps, V, P>(args...);
  else if constexpr (P > 1)
    tile_of<T, Taps, V, P - 1>(pixels, args...);
}

// One row of one layer. `in` is its first input pixel as for `tile`; `sink(vector, pixel)` tells where a tile goes.
template <class T, int Taps, class MakeSink>
void convolve_row(const Plan<T>& plan, const Layer<T>& layer, std::int64_t width, const T* in, MakeSink make_sink) {
  const std::int64_t tiles = ceil_div(width, kTile);  // of nearly equal size: a width costs what it holds
  for (std::int64_t v = 0; v < layer.vectors; v += kVectors) {
    const T* const w = layer.weights + v * kLanes * Arithmetic<T>::pair * layer.steps * Taps * Taps;
    const float* const bias = layer.bias + v * kLanes;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const std::int64_t x = width * i / tiles, pixels = width * (i + 1) / tiles - x;
      const T* const from = in + x * kBlock;
      const Sink sink = make_sink(v, x);
      if (layer.vectors - v >= kVectors)
        tile_of<T, Taps, kVectors, kTile>((int)pixels, plan, layer, from, w, bias, sink);
      else
        tile_of<T, Taps, 1, kTile>((int)pixels, plan, layer, from, w, bias, sink);
    }
  }
}

// ---- rows -------------------------------------------------------------------------------------------------------------------

// A row of x into the buffer, and zeros beside the row and in what is left of the last pair.
template <class X, class T>
void take_row(const DenseBlock& a, const Plan<T>& plan, std::int64_t image, std::int64_t y, T* row) {
  for (std::int64_t b = 0; b < plan.block_count; ++b) {
    std::memset((void*)(row + b * plan.pitch), 0, kBlock * sizeof(T));
    std::memset((void*)(row + (b + 1) * plan.pitch - kBlock), 0, kBlock * sizeof(T));
  }
  std::int64_t channel = 0;
  auto place = [&](std::int64_t c) { return row + c / kBlock * plan.pitch + kBlock + c % kBlock; };
  for (std::int64_t i = 0; i < a.part_count; ++i) {
    const DenseBlockPart& part = a.parts[i];
    const X* const from = (const X*)part.data + image * part.strides[0] + y * part.strides[2];
    for (std::int64_t c = 0; c < part.channels; ++c, ++channel) {
      T* const to = place(channel);
      const X* const plane = from + c * part.strides[1];
      for (std::int64_t x = 0; x < a.width; ++x) {
        const float value = widen(plane[x * part.strides[3]]);
        narrow(a.compute == DType::bf16 ? nearest_bf16(value) : value, to + x * kBlock);
      }
    }
  }
  for (; channel % Arithmetic<T>::pair; ++channel)
    for (std::int64_t x = 0; x < a.width; ++x) narrow(0.0f, place(channel) + x * kBlock);
}

// A finished row, [pixel][stride] floats, into the result.
template <class X>
void give(const DenseBlock& a, const float* row, std::int64_t stride, std::int64_t outs, std::int64_t image, std::int64_t y) {
  X* const to = (X*)a.out + image * a.out_strides[0] + y * a.out_strides[2];
  if (a.out_strides[1] == 1) {
    for (std::int64_t x = 0; x < a.width; ++x)
      for (std::int64_t c = 0; c < outs; ++c) narrow(row[x * stride + c], to + x * a.out_strides[3] + c);
  } else {
    for (std::int64_t c = 0; c < outs; ++c)
      for (std::int64_t x = 0; x < a.width; ++x) narrow(row[x * stride + c], to + c * a.out_strides[1] + x * a.out_strides[3]);
  }
}

// The sums over kx of one row: products [pixel][kx][ky][out], with a pixel of zeros on either side, to sums [pixel][ky][out].
template <class T>
PYFACE_INLINE void sum_columns(const Layer<T>& layer, std::int64_t width, const float* products, float* sums) {
  const std::int64_t stride = layer.vectors * kLanes, n = 3 * layer.outs;
  for (std::int64_t x = 0; x < width; ++x, products += stride)
    for (std::int64_t j = 0; j < n; j += kLanes)
      store(sums + x * n + j, load(products + j) + load(products + stride + n + j) + load(products + 2 * stride + 2 * n + j));
}

// The sums over ky, with the bias: [pixel][stride].
template <class T>
PYFACE_INLINE void sum_rows(const Layer<T>& layer, std::int64_t width, const float* const sums[3], float* row) {
  const std::int64_t stride = layer.vectors * kLanes, outs = layer.outs;
  for (std::int64_t x = 0; x < width; ++x)
    for (std::int64_t j = 0; j < outs; j += kLanes) {
      const std::int64_t at = x * 3 * outs + j;
      store(row + x * stride + j,
            load(layer.bias + j) + load(sums[0] + at) + load(sums[1] + at + outs) + load(sums[2] + at + 2 * outs));
    }
}

// ---- the whole block --------------------------------------------------------------------------------------------------------

template <class T>
void run(const DenseBlock& a, void* scratch, int threads) {
  const Plan<T> plan = make_plan<T>(a, scratch, threads);
  const Layer<T>& last = plan.layers[a.layer_count - 1];
  std::int64_t products = 0;
  for (std::int64_t k = 0; k < a.layer_count; ++k) products += 9 * plan.layers[k].ins * plan.layers[k].outs;
  if (products * plan.images * a.height * a.width < kSerialProducts) threads = 1;

  const bool bf16_x = a.x_type == DType::bf16;
  a.weight_type == DType::bf16 ? pack<bf16>(a, plan, threads) : pack<float>(a, plan, threads);
  const std::int64_t image_size = (a.height + 2) * plan.row;
  for (std::int64_t i = 0; i < plan.images; ++i) {
    std::memset((void*)(plan.features + i * image_size), 0, plan.row * sizeof(T));
    std::memset((void*)(plan.features + (i + 1) * image_size - plan.row), 0, plan.row * sizeof(T));
  }
  if (last.spread) std::memset(plan.sums, 0, plan.sums_row * sizeof(float));

  for (std::int64_t start = 0; start < a.batch; start += plan.images) {
    const std::int64_t images = a.batch - start < plan.images ? a.batch - start : plan.images, rows = images * a.height;
    // body(image of these, row of the image, row of all, its row in the buffer, scratch row of the share)
    auto for_each_row = [&](auto body) {
      parallel_for(threads, plan.shares, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t share = begin; share < end; ++share)
          for (std::int64_t r = rows * share / plan.shares; r < rows * (share + 1) / plan.shares; ++r) {
            const std::int64_t image = r / a.height, y = r % a.height;
            body(image, y, r, plan.features + image * image_size + (y + 1) * plan.row, plan.rows + share * plan.rows_row);
          }
      });
    };
    for_each_row([&](std::int64_t image, std::int64_t y, std::int64_t, T* row, float*) {
      bf16_x ? take_row<bf16>(a, plan, start + image, y, row) : take_row<float>(a, plan, start + image, y, row);
    });
    for (std::int64_t k = 0; k + 1 < a.layer_count; ++k) {
      const Layer<T>& layer = plan.layers[k];
      for_each_row([&](std::int64_t, std::int64_t, std::int64_t, T* row, float*) {
        convolve_row<T, 3>(plan, layer, a.width, row - plan.row, [&](std::int64_t v, std::int64_t x) {
          Sink sink{{}, kBlock, true, a.compute == DType::bf16, a.slope};
          for (int i = 0; i < kVectors; ++i) {
            const std::int64_t out = (v + i) * kLanes;
            sink.at[i] = row + (layer.blocks + out / kBlock) * plan.pitch + (x + 1) * kBlock + out % kBlock;
          }
          return sink;
        });
      });
    }
    const std::int64_t stride = last.vectors * kLanes;
    auto plain = [stride](float* to) {
      return [to, stride](std::int64_t v, std::int64_t x) {
        float* const at = to + x * stride + v * kLanes;
        return Sink{{at, at + kLanes}, stride, false, false, 0.0f};
      };
    };
    auto give_row = [&](std::int64_t image, std::int64_t y, const float* row) {
      bf16_x ? give<bf16>(a, row, stride, last.outs, start + image, y) : give<float>(a, row, stride, last.outs, start + image, y);
    };
    if (!last.spread) {
      for_each_row([&](std::int64_t image, std::int64_t y, std::int64_t, T* row, float* outs) {
        convolve_row<T, 3>(plan, last, a.width, row - plan.row, plain(outs));
        give_row(image, y, outs);
      });
      continue;
    }
    for_each_row([&](std::int64_t, std::int64_t, std::int64_t r, T* row, float* outs) {
      std::memset(outs, 0, stride * sizeof(float));
      std::memset(outs + (a.width + 1) * stride, 0, stride * sizeof(float));
      convolve_row<T, 1>(plan, last, a.width, row + kBlock, plain(outs + stride));
      sum_columns(last, a.width, outs, plan.sums + (r + 1) * plan.sums_row);
    });
    for_each_row([&](std::int64_t image, std::int64_t y, std::int64_t r, T*, float* outs) {
      const float* const here = plan.sums + (r + 1) * plan.sums_row;
      const float* const sums[3] = {y > 0 ? here - plan.sums_row : plan.sums, here,
                                    y + 1 < a.height ? here + plan.sums_row : plan.sums};
      sum_rows(last, a.width, sums, outs);
      give_row(image, y, outs);
    });
  }
}

}  // namespace

// Without a bf16 dot product the features are kept as bf16 numbers in float: the same roundings, float's speed.
std::int64_t dense_block_scratch(const DenseBlock& args, int threads) {
#if defined(__AVX512BF16__)
  if (args.compute == DType::bf16) return make_plan<bf16>(args, nullptr, threads).bytes;
#endif
  return make_plan<float>(args, nullptr, threads).bytes;
}

void dense_block(const DenseBlock& args, void* scratch, int threads) {
#if defined(__AVX512BF16__)
  if (args.compute == DType::bf16) return run<bf16>(args, scratch, threads);
#endif
  run<float>(args, scratch, threads);
}

}  // namespace pyface::cpu::PYFACE_ISA
