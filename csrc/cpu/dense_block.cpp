// A dense block of 3x3 convolutions by direct convolution. See pyface/dense_block.h for what is computed.
//
// x and all features of an image live in one zero-bordered work buffer, into which every layer writes its own channels:
// nothing is ever concatenated. A register tile holds some neighbouring pixels times two vectors of outputs; one step
// of its inner loop takes one channel (in bf16 a pair) of every pixel, broadcast, times the weights of those outputs.
//
// Every output is summed in the same order wherever its pixel lies in a tile, a row or a batch and however many threads
// there are: the same input gives the same bits, which invertible networks rely on.

#include "cpu/dense_block.h"

#include "cpu/blocks.h"
#include "cpu/parallel.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

constexpr int kLanes = Lanes<f32v>::count;
constexpr int kVectors = 2;  // vectors of outputs in a register tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 14;  // pixels of a tile: 28 sums, 2 weights and a broadcast input fill 32 registers
#else
constexpr int kTile = 6;  // 16 registers
#endif

// Channels that lie together in the work buffer, [row][block][pixel][kBlock]: the distance between pixels is then a
// constant, and the pixels of a tile need one address register. x and each feature begin a block of their own; a count
// per block says how many channels are really there, so that padding costs memory and no time.
constexpr std::int64_t kBlock = 16;

constexpr std::int64_t kImageRows = 128;          // images are taken together until they have this many rows
constexpr std::int64_t kSerialProducts = 200000;  // below this a team costs more than it saves

// Without a bf16 dot product, bf16 numbers are kept in float: the same roundings at float's speed.
template <class T>
bool emulates_bf16(const DenseBlock& a) {
  return a.compute == DType::bf16 && sizeof(T) == sizeof(float);
}

// ---- the plan: sizes, and where in the scratch buffer everything lies -----------------------------------------------

struct Block {
  std::int64_t first, count;  // channels
};

template <class T>
struct Layer {
  std::int64_t outs, ins;
  std::int64_t blocks, steps;  // of its inputs
  std::int64_t vectors;        // of its outputs, which are `9 outs` columns when the taps are spread
  // Few outputs leave lanes idle (12 of 16 fill three quarters). Then the nine taps go onto the lanes too: one product
  // per input pixel with 9 outs columns [kx][ky][out], whose shifted sum is the convolution.
  bool spread;
  T* weights;   // [group of kVectors vectors][ky][block][kx][step][vector][lane][pair]; spread: no ky, kx
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
  Layer<T> layer;
  for (std::int64_t k = 0; k < a.layer_count; ++k) {
    layer.outs = a.layers[k].outs, layer.ins = first, layer.blocks = blocks, layer.steps = steps;
    const std::int64_t direct = ceil_div(layer.outs, kLanes), spread = ceil_div(9 * layer.outs, kLanes);
    layer.spread = k + 1 == a.layer_count && 10 * spread <= 9 * (9 * direct);
    layer.vectors = layer.spread ? spread : direct;
    layer.weights = carver.take<T>((layer.spread ? 1 : 9) * steps * layer.vectors * kLanes * pair);
    layer.bias = carver.take<float>(layer.vectors * kLanes);
    if (scratch) plan.layers[k] = layer;
    if (k + 1 < a.layer_count) append(layer.outs);
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
  plan.bytes = carver.used;
  return plan;
}

// ---- weights --------------------------------------------------------------------------------------------------------

// Packs the weights for one block of a layer's inputs, from step `first_step` on: all taps, all outputs.
template <class T, class W>
void pack_block(const Layer<T>& layer, const W* weight, Block block, std::int64_t first_step, bool round) {
  typedef Arithmetic<T> A;
  const std::int64_t taps = layer.spread ? 1 : 3, steps = ceil_div(block.count, A::pair);
  for (std::int64_t v = 0; v < layer.vectors; ++v) {
    const W* from[kLanes];  // the weights of one lane, [channel][9]
    int lanes = 0;
    for (; lanes < kLanes; ++lanes) {
      const std::int64_t column = v * kLanes + lanes, out = column % layer.outs, tap = column / layer.outs;
      if (tap >= (layer.spread ? 9 : 1)) break;
      from[lanes] = weight + (out * layer.ins + block.first) * 9 + tap % 3 * 3 + tap / 3;
    }
    const std::int64_t group = v / kVectors * kVectors;
    const std::int64_t vectors = layer.vectors - group < kVectors ? layer.vectors - group : kVectors;
    T* const to = layer.weights + group * kLanes * A::pair * layer.steps * taps * taps;
    for (std::int64_t c = 0; c < block.count; c += A::pair)
      for (std::int64_t ky = 0; ky < taps; ++ky)
        for (std::int64_t kx = 0; kx < taps; ++kx) {
          f32v values[A::pair];
          for (std::int64_t j = 0; j < A::pair; ++j) {
            float row[kLanes] = {};
            if (c + j < block.count)
              for (int lane = 0; lane < lanes; ++lane) row[lane] = widen(from[lane][(c + j) * 9 + ky * 3 + kx]);
            values[j] = round ? rounded(load(row)) : load(row);
          }
          const typename A::operand joined = A::join(values);
          const std::int64_t step = (ky * layer.steps + first_step) * taps + kx * steps + c / A::pair;
          std::memcpy(to + (step * vectors + v - group) * kLanes * A::pair, &joined, sizeof joined);
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
        if (begin <= start + b && start + b < end)
          pack_block(layer, (const W*)a.layers[k].weight, block, step, emulates_bf16<T>(a));
        step += ceil_div(block.count, pair);
      }
    }
  });
}

// ---- the register tile ----------------------------------------------------------------------------------------------

// The sums of P pixels and V vectors of outputs, over all input channels, to `to`, [pixel][stride]. `in` is the first
// pixel, for Taps = 3 the one above and left of it.
template <class T, int Taps, int V, int P>
__attribute__((noinline)) void tile(const Plan<T>* plan, const Layer<T>* layer, const T* in, const T* w,
                                    const float* bias, float* to, std::int64_t stride) {
  typedef Arithmetic<T> A;
  // One running sum over all of a thousand products would gather half as much error again as oneDNN's in float.
  constexpr int kParts = A::pair == 1 ? Taps : 1;
  for (int part = 0; part < kParts; ++part) {
    f32v sums[P][V];
#pragma GCC unroll 14
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[p][v] = f32v{};
    for (int ky = 0; ky < Taps / kParts; ++ky, in += plan->row) {
      const T* block = in;
      for (std::int64_t b = 0; b < layer->blocks; ++b, block += plan->pitch) {
        for (int kx = 0; kx < Taps; ++kx) {
          const T* x = block + kx * kBlock;
          for (const T* const end = x + plan->blocks[b].count; x < end; x += A::pair) {
            typename A::operand weights[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v, w += kLanes * A::pair) std::memcpy(&weights[v], w, sizeof weights[v]);
#pragma GCC unroll 14
            for (int p = 0; p < P; ++p) {
              const typename A::operand pixel = A::broadcast(x + p * kBlock);
#pragma GCC unroll 2
              for (int v = 0; v < V; ++v) sums[p][v] = A::multiply_add(pixel, weights[v], sums[p][v]);
            }
          }
        }
      }
    }
#pragma GCC unroll 14
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* const at = to + p * stride + v * kLanes;
        store(at, sums[p][v] + (part > 0 ? load(at) : Taps == 3 ? load(bias + v * kLanes) : f32v{}));
      }
  }
}

template <class T, int Taps, int V, int P, class... Args>
PYFACE_INLINE void tile_of(int pixels, Args... args) {
  if (pixels == P)
    tile<T, Taps, V, P>(args...);
  else if constexpr (P > 1)
    tile_of<T, Taps, V, P - 1>(pixels, args...);
}

// One vector of the sums of some pixels, [pixel][kVectors][lane], activated and rounded to features.
template <class T>
__attribute__((noinline)) void activate(const float* sums, int pixels, float slope, bool round, T* to) {
  for (int p = 0; p < pixels; ++p, sums += kVectors * kLanes, to += kBlock) {
    f32v sum = load(sums);
    sum = sum > 0.0f ? sum : sum * slope;
    Arithmetic<T>::store_factors(to, round ? rounded(sum) : sum);
  }
}

// Calls `each(vector, pixel, pixels)` for the tiles of a row, of nearly equal sizes: a width costs what it holds.
template <class T, class Each>
PYFACE_INLINE void for_each_tile(const Layer<T>& layer, std::int64_t width, Each each) {
  const std::int64_t tiles = ceil_div(width, kTile);
  for (std::int64_t v = 0; v < layer.vectors; v += kVectors)  // outermost: the weights stay in the cache
    for (std::int64_t i = 0; i < tiles; ++i) {
      const std::int64_t x = width * i / tiles;
      each(v, x, (int)(width * (i + 1) / tiles - x));
    }
}

// The tile of vectors v .. v + kVectors, or of the last one alone.
template <class T, int Taps>
void run_tile(const Plan<T>& plan, const Layer<T>& layer, const T* in, std::int64_t v, int pixels, float* to,
              std::int64_t stride) {
  const T* const w = layer.weights + v * kLanes * Arithmetic<T>::pair * layer.steps * Taps * Taps;
  const float* const bias = layer.bias + v * kLanes;
  if (layer.vectors - v >= kVectors)
    tile_of<T, Taps, kVectors, kTile>(pixels, &plan, &layer, in, w, bias, to, stride);
  else
    tile_of<T, Taps, 1, kTile>(pixels, &plan, &layer, in, w, bias, to, stride);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// A row of x into the buffer, and zeros beside it. Pad channels become zero: the last pair may read one.
template <class X, class T>
void take_row(const DenseBlock& a, const Plan<T>& plan, std::int64_t image, std::int64_t y, T* row) {
  for (std::int64_t b = 0; b < plan.block_count; ++b) {
    std::memset((void*)(row + b * plan.pitch), 0, kBlock * sizeof(T));
    std::memset((void*)(row + (b + 1) * plan.pitch - kBlock), 0, kBlock * sizeof(T));
  }
  std::int64_t part = 0, channel = 0;  // of the part
  for (std::int64_t c = 0; part < a.part_count; c += kLanes) {
    const X* planes[kLanes] = {};
    std::int64_t strides[kLanes] = {};
    for (int i = 0; i < kLanes && part < a.part_count; ++i) {
      const DenseBlockPart& from = a.parts[part];
      planes[i] = (const X*)from.data + image * from.strides[0] + channel * from.strides[1] + y * from.strides[2];
      strides[i] = from.strides[3];
      if (++channel == from.channels) ++part, channel = 0;
    }
    T* const to = row + c / kBlock * plan.pitch + kBlock + c % kBlock;
    for (std::int64_t x = 0; x < a.width; x += kLanes) {
      const std::int64_t pixels = a.width - x < kLanes ? a.width - x : kLanes;
      f32v v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        v[i] = planes[i] ? load_some(planes[i] + x * strides[i], strides[i], pixels) : f32v{};
        if (emulates_bf16<T>(a)) v[i] = rounded(v[i]);
      }
      transpose(v);
      for (std::int64_t i = 0; i < pixels; ++i) Arithmetic<T>::store_factors(to + (x + i) * kBlock, v[i]);
    }
  }
}

// A finished row, [pixel][stride] floats, into the result.
template <class X>
void give_row(const DenseBlock& a, const float* row, std::int64_t stride, std::int64_t outs, std::int64_t image,
              std::int64_t y) {
  X* const to = (X*)a.out + image * a.out_strides[0] + y * a.out_strides[2];
  const std::int64_t next_out = a.out_strides[1], next_pixel = a.out_strides[3];
  for (std::int64_t x = 0; x < a.width; x += kLanes) {
    const std::int64_t pixels = a.width - x < kLanes ? a.width - x : kLanes;
    if (next_out == 1) {
      for (std::int64_t i = x; i < x + pixels; ++i)
        for (std::int64_t out = 0; out < outs; out += kLanes) {
          // A whole vector may reach into the pixels behind, which are written after it, but not behind the row.
          const bool whole = outs - out >= kLanes || (next_pixel == outs && i * outs + out + kLanes <= a.width * outs);
          store_some(to + i * next_pixel + out, 1, whole ? kLanes : outs - out, load(row + i * stride + out));
        }
      continue;
    }
    for (std::int64_t out = 0; out < outs; out += kLanes) {
      f32v v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = i < pixels ? load(row + (x + i) * stride + out) : f32v{};
      transpose(v);
      for (std::int64_t i = 0; i < kLanes && i < outs - out; ++i)
        store_some(to + (out + i) * next_out + x * next_pixel, next_pixel, pixels, v[i]);
    }
  }
}

// The sums over kx of one row: products [pixel][kx][ky][out], with a pixel of zeros on either side, to sums
// [pixel][ky][out].
template <class T>
PYFACE_INLINE void sum_columns(const Layer<T>& layer, std::int64_t width, const float* products, float* sums) {
  const std::int64_t stride = layer.vectors * kLanes, n = 3 * layer.outs;
  for (std::int64_t x = 0; x < width; ++x, products += stride)
    for (std::int64_t j = 0; j < n; j += kLanes)
      store(sums + x * n + j,
            load(products + j) + load(products + stride + n + j) + load(products + 2 * (stride + n) + j));
}

// The sums over ky, with the bias: [pixel][stride].
template <class T>
PYFACE_INLINE void sum_rows(const Layer<T>& layer, std::int64_t width, const float* const sums[3], float* row,
                            std::int64_t stride) {
  const std::int64_t outs = layer.outs;
  for (std::int64_t x = 0; x < width; ++x)
    for (std::int64_t j = 0; j < outs; j += kLanes) {
      const std::int64_t at = x * 3 * outs + j;
      store(row + x * stride + j,
            load(layer.bias + j) + load(sums[0] + at) + load(sums[1] + at + outs) + load(sums[2] + at + 2 * outs));
    }
}

// ---- the whole block ------------------------------------------------------------------------------------------------

template <class T>
void run(const DenseBlock& a, void* scratch, int threads) {
  const Plan<T> plan = make_plan<T>(a, scratch, threads);
  const Layer<T>& last = plan.layers[a.layer_count - 1];
  std::int64_t products = 0;
  for (std::int64_t k = 0; k < a.layer_count; ++k) products += 9 * plan.layers[k].ins * plan.layers[k].outs;
  if (products * plan.images * a.height * a.width < kSerialProducts) threads = 1;

  const bool bf16_x = a.x_type == DType::bf16;
  (a.weight_type == DType::bf16 ? pack<bf16, T> : pack<float, T>)(a, plan, threads);
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
            T* const row = plan.features + image * image_size + (y + 1) * plan.row;
            body(image, y, r, row, plan.rows + share * plan.rows_row);
          }
      });
    };
    for_each_row([&](std::int64_t image, std::int64_t y, std::int64_t, T* row, float*) {
      (bf16_x ? take_row<bf16, T> : take_row<float, T>)(a, plan, start + image, y, row);
    });
    for (std::int64_t k = 0; k + 1 < a.layer_count; ++k) {
      const Layer<T>& layer = plan.layers[k];
      for_each_row([&](std::int64_t, std::int64_t, std::int64_t, T* row, float*) {
        for_each_tile(layer, a.width, [&](std::int64_t v, std::int64_t x, int pixels) {
          alignas(64) float sums[kTile * kVectors * kLanes];
          run_tile<T, 3>(plan, layer, row - plan.row + x * kBlock, v, pixels, sums, kVectors * kLanes);
          for (std::int64_t i = 0; i < kVectors && v + i < layer.vectors; ++i) {
            const std::int64_t out = (v + i) * kLanes;
            T* const to = row + (layer.blocks + out / kBlock) * plan.pitch + (x + 1) * kBlock + out % kBlock;
            activate(sums + i * kLanes, pixels, a.slope, emulates_bf16<T>(a), to);
          }
        });
      });
    }
    const std::int64_t stride = last.vectors * kLanes, out_stride = round_up(last.outs, kLanes);
    auto give = [&](std::int64_t image, std::int64_t y, const float* row) {
      (bf16_x ? give_row<bf16> : give_row<float>)(a, row, out_stride, last.outs, start + image, y);
    };
    if (!last.spread) {
      for_each_row([&](std::int64_t image, std::int64_t y, std::int64_t, T* row, float* outs) {
        for_each_tile(last, a.width, [&](std::int64_t v, std::int64_t x, int pixels) {
          run_tile<T, 3>(plan, last, row - plan.row + x * kBlock, v, pixels, outs + x * stride + v * kLanes, stride);
        });
        give(image, y, outs);
      });
      continue;
    }
    for_each_row([&](std::int64_t, std::int64_t, std::int64_t r, T* row, float* products) {
      std::memset(products, 0, stride * sizeof(float));
      std::memset(products + (a.width + 1) * stride, 0, stride * sizeof(float));
      for_each_tile(last, a.width, [&](std::int64_t v, std::int64_t x, int pixels) {
        run_tile<T, 1>(plan, last, row + (x + 1) * kBlock, v, pixels, products + (x + 1) * stride + v * kLanes, stride);
      });
      sum_columns(last, a.width, products, plan.sums + (r + 1) * plan.sums_row);
    });
    for_each_row([&](std::int64_t image, std::int64_t y, std::int64_t r, T*, float* outs) {
      const float* const here = plan.sums + (r + 1) * plan.sums_row;
      const float* const sums[3] = {y > 0 ? here - plan.sums_row : plan.sums, here,
                                    y + 1 < a.height ? here + plan.sums_row : plan.sums};
      sum_rows(last, a.width, sums, outs, out_stride);
      give(image, y, outs);
    });
  }
}

}  // namespace

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
