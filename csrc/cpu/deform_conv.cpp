// Deformable convolution. See pyface/deform_conv.h for what is computed.
//
// Forward: a tile of pixels is sampled into columns that stay in the cache, kBlock channels of a pixel together, and
// multiplied by packed weights in register tiles, outputs in the lanes. Where the weights outweigh the pixels they are read
// as they lie, and the columns are turned instead: pixels in the lanes. For so few pixels that they would leave most lanes
// empty every output is a dot product.
//
// Backward: a task owns some channels of the input, and so their gradients, of which no other task knows: nothing is locked,
// and nothing of the size of the columns is stored. What a task adds to the gradients of offset and mask is kept apart and
// summed in a fixed order. How the work is cut depends on the sizes alone and never on the threads.
//
// Every result is summed in one order whatever the number of threads: the same input gives the same bits.

#include "cpu/deform_conv.h"

#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace pyface::cpu::PYFACE_ISA {
namespace {

constexpr std::int64_t kBlock = 16;       // channels that lie together in the columns
constexpr std::int64_t kPixels = 224;     // of a tile, at most: a multiple of the rows of a register tile and of the lanes
constexpr int kVectors = 2;               // vectors of sums in a row of a register tile
constexpr std::int64_t kSteps = 768;      // products in one running sum: about oneDNN's rounding error
constexpr std::int64_t kNeighbours = 4;   // pixels that are sampled together
constexpr std::int64_t kFewPixels = 8;    // of all images together: up to here every output is a dot product
constexpr std::int64_t kTurned = 2;       // pixels for each output: up to here the columns are turned
constexpr std::int64_t kLeastPixels = 64; // of a task, unless there are no more: fewer would read the weights too often
constexpr std::int64_t kWeightBytes = 2 << 20;    // of packed weights for each thread; more weights are taken in stages
constexpr std::int64_t kImageBytes = 1 << 20;     // of copied images for each thread, but at least one image
constexpr std::int64_t kSerialProducts = 200000;  // below this a team costs more than it saves

// Rows of a register tile: with two vectors of sums each, two factors and a broadcast they fill the registers.
template <class T>
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
template <>
constexpr int kRows<float> = 14;
template <>
constexpr int kRows<bf16> = 14;
#endif
template <>
constexpr int kRows<double> = 4;  // enough to keep the adders busy, and far less code

// Rows of weights, read as they lie, that are multiplied with all pixels of a tile before the next ones.
template <class T>
constexpr std::int64_t kTogether = 2 * kRows<T>;
#if defined(__AMX_BF16__)
template <>
constexpr std::int64_t kTogether<bf16> = 32;
#endif

template <class T>
using Sum = typename Arithmetic<T>::sum;
template <class T>
using SumScalar = typename Lanes<Sum<T>>::scalar;
template <class T>
constexpr std::int64_t kWide = kVectors * Lanes<Sum<T>>::count;  // sums in a row of a register tile

// ---- matrix products ------------------------------------------------------------------------------------------------

// In what order the numbers of a row of the left factor are taken: `taps` times counts[0], then `taps` times counts[1] and
// so on, each time from `pitch` elements further on.
struct Walk {
  const std::int64_t* counts;
  std::int64_t blocks, taps, pitch;
  std::int64_t row;  // distance of the rows, for Row = 0
};

// c[row][kWide] (+)= sum over steps of a[row][step] * b[step][kWide]. Row and Step are the distances in a.
template <class T, int Row, int Step, int V, int R>
__attribute__((noinline)) void tile(const T* a, const T* b, const Walk* walk, SumScalar<T>* c, bool add) {
  typedef Arithmetic<T> A;
  constexpr int W = Lanes<Sum<T>>::count;
  const std::int64_t row = Row ? Row : walk->row;
  Sum<T> sums[R][V];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = Sum<T>{};
  for (std::int64_t block = 0; block < walk->blocks; ++block)
    for (std::int64_t tap = 0; tap < walk->taps; ++tap, a += walk->pitch) {
      const T* x = a;
      for (const T* const end = x + walk->counts[block] * Step; x < end; x += A::pair * Step, b += kWide<T> * A::pair) {
        typename A::operand factors[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) std::memcpy(&factors[v], b + v * W * A::pair, sizeof factors[v]);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
          const typename A::operand left = A::broadcast(x + r * row);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[r][v] = A::multiply_add(left, factors[v], sums[r][v]);
        }
      }
    }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      SumScalar<T>* const at = c + r * kWide<T> + v * W;
      store(at, add ? sums[r][v] + load(at) : sums[r][v]);
    }
}

template <class T, int Row, int Step, int V, int R, class... Args>
PYFACE_INLINE void tile_of(std::int64_t rows, Args... args) {
  if (rows == R)
    tile<T, Row, Step, V, R>(args...);
  else if constexpr (R > 1)
    tile_of<T, Row, Step, V, R - 1>(rows, args...);
}

#if defined(__AMX_BF16__)
// The product of two times 16 rows, or of 16, with a panel of 32 columns, `turns` times 16 steps.
template <bool Two>
PYFACE_INLINE void tiles_of_amx(const bf16* a, std::int64_t row, const bf16* b, std::int64_t turns, std::int64_t pitch,
                                float* c, bool add) {
  constexpr int kStep = 32 * 2 * sizeof(bf16), kSums = 32 * sizeof(float);
  const std::int64_t row_bytes = row * (std::int64_t)sizeof(bf16);
  if (add) {
    _tile_loadd(0, c, kSums);
    _tile_loadd(1, c + 16, kSums);
    if constexpr (Two) _tile_loadd(2, c + 16 * 32, kSums);
    if constexpr (Two) _tile_loadd(3, c + 16 * 32 + 16, kSums);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; turns > 0; --turns, a += pitch, b += kBlock * 32) {
    _tile_loadd(6, b, kStep);
    _tile_loadd(4, a, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 32, kStep);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Two) {
      _tile_loadd(5, a + 16 * row, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, kSums);
  _tile_stored(1, c + 16, kSums);
  if constexpr (Two) _tile_stored(2, c + 16 * 32, kSums);
  if constexpr (Two) _tile_stored(3, c + 16 * 32 + 16, kSums);
}

// `multiply` for steps in sixteens. Rows up to the next multiple of 16 are computed too, from whatever lies there.
__attribute__((noinline)) inline void multiply_amx(std::int64_t rows, std::int64_t vectors, const bf16* a, std::int64_t row,
                                                   const bf16* b, std::int64_t b_panel, std::int64_t turns,
                                                   std::int64_t pitch, float* c, std::int64_t c_panel, bool add) {
  static_assert(kBlock == 16 && kPixels % 16 == 0 && kWide<bf16> == 32);
  shape_tiles(kBlock);
  for (std::int64_t v = 0; v < vectors; v += kVectors, b += b_panel, c += c_panel)
    for (std::int64_t r = 0; r < rows; r += 32) {
      if (rows - r > 16)
        tiles_of_amx<true>(a + r * row, row, b, turns, pitch, c + r * 32, add);
      else
        tiles_of_amx<false>(a + r * row, row, b, turns, pitch, c + r * 32, add);
    }
  _tile_release();
}
#endif

// The product of all rows with `vectors` vectors of columns. b and c lie in panels of kWide columns, [panel][step or row].
template <class T, int Row, int Step>
void multiply(std::int64_t rows, std::int64_t vectors, const T* a, const T* b, std::int64_t b_panel, const Walk& walk,
              SumScalar<T>* c, std::int64_t c_panel, bool add) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bf16> && Row == kBlock) {  // columns: there is room behind the last row
    bool whole = true;
    for (std::int64_t i = 0; i < walk.blocks; ++i) whole = whole && walk.counts[i] == kBlock;
    if (whole) return multiply_amx(rows, vectors, a, Row, b, b_panel, walk.blocks * walk.taps, walk.pitch, c, c_panel, add);
  }
  if constexpr (std::is_same_v<T, bf16> && Row == 0) {  // the caller's weights: there is none
    const std::int64_t most = rows / 16 * 16;
    if (most && *walk.counts % kBlock == 0) {
      multiply_amx(most, vectors, a, walk.row, b, b_panel, *walk.counts / kBlock, kBlock, c, c_panel, add);
      if (most == rows) return;
      rows -= most, a += most * walk.row, c += most * kWide<T>;
    }
  }
#endif
  const std::int64_t tiles = ceil_div(rows, kRows<T>), row = Row ? Row : walk.row;
  for (std::int64_t v = 0; v < vectors; v += kVectors, b += b_panel, c += c_panel)
    for (std::int64_t i = 0; i < tiles; ++i) {  // of nearly equal sizes
      const std::int64_t r = rows * i / tiles, here = rows * (i + 1) / tiles - r;
      if (vectors - v >= kVectors)
        tile_of<T, Row, Step, kVectors, kRows<T>>(here, a + r * row, b, &walk, c + r * kWide<T>, add);
      else
        tile_of<T, Row, Step, 1, kRows<T>>(here, a + r * row, b, &walk, c + r * kWide<T>, add);
    }
}

// ---- images ---------------------------------------------------------------------------------------------------------

// Without rounding: v holds bf16 numbers.
PYFACE_INLINE void put(float* p, f32v v) { store(p, v); }
PYFACE_INLINE void put(double* p, f64v v) { store(p, v); }
PYFACE_INLINE void put(bf16* p, f32v v) {
  const u16v h = __builtin_convertvector((u32v)v >> 16, u16v);
  std::memcpy(p, &h, sizeof h);
}

// Calls each(pixel, count, element) for pixels of an image that lie in a line, `element` being where the first one lies.
template <class Each>
PYFACE_INLINE void for_each_line(const DeformConvShape& s, const std::int64_t strides[4], std::int64_t begin,
                                 std::int64_t end, Each each) {
  const bool dense = strides[2] == s.width * strides[3];
  for (std::int64_t p = begin; p < end;) {
    const std::int64_t y = p / s.width, x = p % s.width;
    const std::int64_t count = dense ? end - p : smaller(end - p, s.width - x);
    each(p, count, y * strides[2] + x * strides[3]);
    p += count;
  }
}

// Pixels begin..end of some channels, `from` being the first one's image, to [pixel][pitch]; zeros up to a whole vector.
template <class X, class D>
void take_pixels(const DeformConvShape& s, const X* from, const std::int64_t strides[4], std::int64_t channels,
                 std::int64_t begin, std::int64_t end, D* to, std::int64_t pitch) {
  typedef typename Storage<X>::vector V;
  constexpr int W = Lanes<V>::count;
  for_each_line(s, strides, begin, end, [&](std::int64_t first, std::int64_t count, std::int64_t element) {
    const X* const line = from + element;
    if (strides[1] == 1) {
      for (std::int64_t p = 0; p < count; ++p)
        for (std::int64_t c = 0; c < channels; c += W)
          put(to + (first + p) * pitch + c, load_some(line + p * strides[3] + c, 1, channels - c));
      return;
    }
    for (std::int64_t c = 0; c < channels; c += W)
      for (std::int64_t p = 0; p < count; p += W) {
        V v[W];
        for (int i = 0; i < W; ++i)
          v[i] = c + i < channels ? load_some(line + (c + i) * strides[1] + p * strides[3], strides[3], count - p) : V{};
        transpose(v);
        for (int i = 0; i < W && p + i < count; ++i) put(to + (first + p + i) * pitch + c, v[i]);
      }
  });
}

// All pixels of [pixel][pitch] to some channels of an image, rounded to X.
template <class X, class D>
void give_pixels(const DeformConvShape& s, const D* from, std::int64_t pitch, std::int64_t channels, X* to,
                 bool channels_last) {
  typedef typename Storage<X>::vector V;
  constexpr int W = Lanes<V>::count;
  const std::int64_t pixels = s.height * s.width;
  if (channels_last) {
    for (std::int64_t p = 0; p < pixels; ++p)
      for (std::int64_t c = 0; c < channels; c += W)
        store_some(to + p * s.channels + c, 1, channels - c, load(from + p * pitch + c));
    return;
  }
  for (std::int64_t p = 0; p < pixels; p += W)
    for (std::int64_t c = 0; c < channels; c += W) {
      V v[W];
      for (int i = 0; i < W; ++i) v[i] = p + i < pixels ? load(from + (p + i) * pitch + c) : V{};
      transpose(v);
      for (int i = 0; i < W && c + i < channels; ++i) store_some(to + (c + i) * pixels + p, 1, pixels - p, v[i]);
    }
}

// ---- where the taps read --------------------------------------------------------------------------------------------

// For the taps of one offset group and the pixels of a tile. A corner outside the image has the index behind the last
// pixel: reading there must give zeros.
template <class C>
struct Taps {
  typedef typename Storage<C>::vector V;
  typedef typename Lanes<V>::mask Indices;
  typedef decltype(Indices{}[0] + 0) Index;
  Index* index;  // [tap][corner][kPixels]: top left, top right, bottom left, bottom right
  C* weight;     // [tap][corner][kPixels], times the mask
  C* parts;      // [tap][3][kPixels]: fractions in y and x, mask; null if nobody needs them
  C* base;       // [2][kPixels]: y and x of the pixels before taps and offsets
};

template <class C>
Taps<C> take_taps(Carver& carver, std::int64_t count, bool parts) {
  Taps<C> taps;
  taps.index = carver.take<typename Taps<C>::Index>(count * 4 * kPixels);
  taps.weight = carver.take<C>(count * 4 * kPixels);
  taps.parts = parts ? carver.take<C>(count * 3 * kPixels) : nullptr;
  taps.base = carver.take<C>(2 * kPixels);
  return taps;
}

template <class C>
void begin_tile(const DeformConvShape& s, std::int64_t first, std::int64_t pixels, const Taps<C>& taps) {
  std::int64_t y = first / s.out_width, x = first % s.out_width;
  for (std::int64_t p = 0; p < kPixels; ++p) {
    taps.base[p] = (C)(y * s.stride[0] - s.padding[0]);
    taps.base[kPixels + p] = (C)(x * s.stride[1] - s.padding[1]);
    if (p + 1 < pixels && ++x == s.out_width) ++y, x = 0;
  }
}

// offset and mask are those of the sample and group, from the first pixel of the tile on.
template <class C, class O>
void locate(const DeformConvShape& s, const O* offset, const O* mask, std::int64_t pixels, const Taps<C>& taps) {
  typedef typename Taps<C>::V V;
  typedef typename Taps<C>::Indices I;
  typedef typename Taps<C>::Index Index;
  constexpr int W = Lanes<V>::count;
  const std::int64_t plane = s.out_height * s.out_width;
  const C height = (C)s.height, width = (C)s.width;
  const Index last_y = (Index)(s.height - 1), last_x = (Index)(s.width - 1), columns = (Index)s.width;
  const I outside = I{} + (Index)(s.height * s.width);
  for (std::int64_t i = 0, k = 0; i < s.kernel[0]; ++i)
    for (std::int64_t j = 0; j < s.kernel[1]; ++j, ++k) {
      const C tap_y = (C)(i * s.dilation[0]), tap_x = (C)(j * s.dilation[1]);
      for (std::int64_t p = 0; p < pixels; p += W) {
        const std::int64_t n = pixels - p;
        V y = load(taps.base + p) + tap_y + load_some(offset + 2 * k * plane + p, 1, n);
        V x = load(taps.base + kPixels + p) + tap_x + load_some(offset + (2 * k + 1) * plane + p, 1, n);
        const V m = mask ? load_some(mask + k * plane + p, 1, n) : splat<V>(1);
        // NaN fails, and so nothing that is no pixel is ever converted to an integer
        const I reads = (y >= (C)-1) & (y < height) & (x >= (C)-1) & (x < width);
        y = reads ? y : V{};
        x = reads ? x : V{};
        I y0 = __builtin_convertvector(y, I), x0 = __builtin_convertvector(x, I);
        y0 += __builtin_convertvector(y0, V) > y;  // truncated becomes rounded down
        x0 += __builtin_convertvector(x0, V) > x;
        const V fy = y - __builtin_convertvector(y0, V), fx = x - __builtin_convertvector(x0, V);
        const I top = reads & (y0 >= (Index)0), bottom = reads & (y0 < last_y);
        const I left = x0 >= (Index)0, right = x0 < last_x;
        const I pixel = y0 * columns + x0;
        Index* const index = taps.index + k * 4 * kPixels + p;
        const I corner[4] = {(top & left) ? pixel : outside, (top & right) ? pixel + (Index)1 : outside,
                             (bottom & left) ? pixel + columns : outside,
                             (bottom & right) ? pixel + columns + (Index)1 : outside};
        for (int c = 0; c < 4; ++c) std::memcpy(index + c * kPixels, &corner[c], sizeof(I));
        C* const weight = taps.weight + k * 4 * kPixels + p;
        const V above = ((C)1 - fy) * m, below = fy * m;
        store(weight, above * ((C)1 - fx));
        store(weight + kPixels, above * fx);
        store(weight + 2 * kPixels, below * ((C)1 - fx));
        store(weight + 3 * kPixels, below * fx);
        if (taps.parts) {
          C* const parts = taps.parts + k * 3 * kPixels + p;
          store(parts, fy);
          store(parts + kPixels, fx);
          store(parts + 2 * kPixels, m);
        }
      }
    }
}

// The same for addresses: of an image, an offset group and a tile.
template <class C, class Args>
void locate_group(const Args& a, std::int64_t image, std::int64_t group, std::int64_t first, std::int64_t pixels,
                  const Taps<C>& taps) {
  const DeformConvShape& s = a.shape;
  const std::int64_t at = group * s.kernel[0] * s.kernel[1] * s.out_height * s.out_width;
  const std::int64_t offset = image * a.offset_stride + 2 * at + first, mask = image * a.mask_stride + at + first;
  auto run = [&](auto* type) {
    typedef std::remove_reference_t<decltype(*type)> O;
    locate(s, (const O*)a.offset + offset, a.mask ? (const O*)a.mask + mask : nullptr, pixels, taps);
  };
  if constexpr (sizeof(C) == sizeof(float)) {
    if (a.offset_type == DType::bf16) return run((bf16*)nullptr);
  }
  run((C*)nullptr);
}

// ---- forward: how the work is cut -----------------------------------------------------------------------------------

// Neighbouring channels, at most kBlock, of one offset group and one weight group.
struct Block {
  std::int64_t first, offset_group;
};

template <class X, class T>
struct Forward {
  typedef typename Storage<X>::compute C;

  std::int64_t taps, pixels;              // of the kernel; of a result
  std::int64_t inputs, outputs;           // of a weight group
  std::int64_t block_count, chunk_blocks; // in all; whose columns there is room for
  std::int64_t steps;                     // of a panel of packed weights, at most
  std::int64_t group_panels, stage_panels;  // of a weight group; packed at a time
  std::int64_t images;                    // copied at a time, 0: none is
  std::int64_t pitch;                     // of a pixel of an image
  bool few, as_they_lie;                  // pixels; how the weights are read otherwise
  bool copied;                            // some rows at a time, to widen them or to fill up their last pair

  Block* blocks;
  std::int64_t* counts;  // channels of the blocks
  std::int64_t* starts;  // first block of every weight group, and the end
  X* zeros;              // a pixel outside the image
  X* copies;             // [image][pixel][pitch]
  T* weights;            // [panel][block][tap][channel / pair][kWide][pair]
  T* natural;            // few pixels: columns [weight group][pixel of all images][row]
  std::int64_t row;
  // for every share:
  std::int64_t shares;
  Taps<C>* located;
  T** columns;           // [block][tap][kPixels][kBlock]; turned: [panel][step / pair][kWide][pair]
  SumScalar<T>** sampled;  // before it is turned: [tap][kPixels][kBlock]
  Sum<T>** rows;         // of a block, [channel][tap]: its weights for a vector of outputs, its columns for one of pixels
  T** copy;              // of weights: [row][step]
  SumScalar<T>** sums;   // [panel][kPixels][kWide]; turned: [panel][output][kWide]
  std::int64_t bytes;
};

// Calls each(first, count, offset group, weight group) for the blocks of at most `most` channels.
template <class Each>
void for_each_block(const DeformConvShape& s, std::int64_t most, Each each) {
  const std::int64_t group = s.channels / s.groups, offset_group = s.channels / s.offset_groups;
  for (std::int64_t begin = 0; begin < s.channels;) {
    const std::int64_t end = smaller((begin / group + 1) * group, (begin / offset_group + 1) * offset_group);
    const std::int64_t pieces = ceil_div(end - begin, most), size = round_up(ceil_div(end - begin, pieces), 16);
    for (std::int64_t c = begin; c < end; c += size)
      each(c, smaller(size, end - c), c / offset_group, c / group);
    begin = end;
  }
}

template <class X, class T>
Forward<X, T> plan_forward(const DeformConv& a, void* scratch, int threads) {
  typedef Forward<X, T> F;
  constexpr std::int64_t pair = Arithmetic<T>::pair;
  const DeformConvShape& s = a.shape;
  Carver carver{(char*)scratch};
  F f;
  f.taps = s.kernel[0] * s.kernel[1], f.pixels = s.out_height * s.out_width;
  f.inputs = s.channels / s.groups, f.outputs = s.outs / s.groups;

  f.block_count = 0, f.steps = 0;
  bool whole = true;   // every block has kBlock channels
  bool paired = true;  // no pair of steps, in the weights' order, lies across two blocks
  std::int64_t steps = 0, group_now = 0, lone = 0;
  for_each_block(s, kBlock, [&](std::int64_t, std::int64_t count, std::int64_t, std::int64_t group) {
    if (group != group_now) group_now = group, steps = lone = 0;
    paired = paired && !lone, lone = count * f.taps % pair;
    ++f.block_count, steps += ceil_div(count, pair) * f.taps, whole = whole && count == kBlock;
    f.steps = larger(f.steps, steps);
  });
  f.few = s.batch * f.pixels <= kFewPixels;
  f.as_they_lie = !f.few && paired && s.batch * f.pixels <= kTurned * f.outputs;
  f.copied = !std::is_same_v<X, T> || f.inputs * f.taps % pair;
  f.blocks = carver.take<Block>(f.block_count);
  f.counts = carver.take<std::int64_t>(f.block_count);
  f.starts = carver.take<std::int64_t>(s.groups + 1);
  if (scratch) {
    std::int64_t b = 0;
    group_now = -1;
    for_each_block(s, kBlock, [&](std::int64_t first, std::int64_t count, std::int64_t og, std::int64_t group) {
      if (group != group_now) f.starts[group_now = group] = b;
      f.blocks[b] = {first, og}, f.counts[b++] = count;
    });
    f.starts[s.groups] = b;
  }

  // Channels that lie together in the caller's memory, pixels at one distance: no copy is needed.
  const std::int64_t* const st = a.input_strides;
  const bool usable = whole && st[1] == 1 && st[2] == s.width * st[3];
  const std::int64_t image = s.height * s.width;
  f.pitch = usable ? st[3] : round_up(s.channels, kBlock);
  const std::int64_t room = threads * kImageBytes / (image * f.pitch * (std::int64_t)sizeof(X) + 1);
  f.images = usable ? 0 : smaller(larger(room, 1), s.batch);
  if (f.few && !usable) f.images = s.batch;
  f.zeros = carver.take<X>(round_up(s.channels, kBlock) + kBlock);
  f.copies = carver.take<X>(f.images * image * f.pitch + kBlock);  // a last block that is short is read whole

  f.chunk_blocks = larger(kSteps / (kBlock * f.taps), 1);
  f.chunk_blocks = smaller(f.chunk_blocks, f.block_count);
  f.group_panels = ceil_div(f.outputs, kWide<T>), f.stage_panels = 0;
  f.weights = f.natural = nullptr, f.row = 0;
  if (f.few) {
    f.row = round_up(f.inputs * f.taps, Lanes<Sum<T>>::count * pair);
    f.natural = carver.take<T>(s.groups * s.batch * f.pixels * f.row);
    f.chunk_blocks = 1;
  } else if (!f.as_they_lie) {
    const std::int64_t panel = f.steps * kWide<T> * pair * (std::int64_t)sizeof(T), panels = s.groups * f.group_panels;
    const std::int64_t stages = ceil_div(panels, larger(threads * kWeightBytes / panel, 1));
    f.stage_panels = ceil_div(panels, stages);
    f.weights = carver.take<T>(f.stage_panels * f.steps * kWide<T> * pair);
  }
  f.shares = threads;
  f.located = carver.take<Taps<typename F::C>>(f.shares);
  f.columns = carver.take<T*>(f.shares);
  f.sampled = carver.take<SumScalar<T>*>(f.shares);
  f.rows = carver.take<Sum<T>*>(f.shares);
  f.copy = carver.take<T*>(f.shares);
  f.sums = carver.take<SumScalar<T>*>(f.shares);
  const std::int64_t block = f.taps * kBlock, wide = round_up(smaller(kPixels, s.batch * f.pixels), kWide<T>);
  for (std::int64_t i = 0; i < f.shares; ++i) {
    const auto taps = take_taps<typename F::C>(carver, f.taps, false);
    T* const columns = carver.take<T>(f.chunk_blocks * block * (f.as_they_lie ? wide : kPixels));
    auto* const sampled = carver.take<SumScalar<T>>(f.as_they_lie ? block * kPixels : 0);
    Sum<T>* const rows = carver.take<Sum<T>>(round_up(block, Lanes<Sum<T>>::count) + 1);
    T* const copy = carver.take<T>(f.as_they_lie && f.copied ? kTogether<T> * (f.chunk_blocks * block + pair) : 0);
    auto* const sums = carver.take<SumScalar<T>>(
        f.as_they_lie ? f.outputs * wide : smaller(f.stage_panels, f.group_panels) * kPixels * kWide<T>);
    if (!scratch) continue;
    f.located[i] = taps, f.columns[i] = columns, f.sampled[i] = sampled, f.rows[i] = rows, f.copy[i] = copy;
    f.sums[i] = sums;
  }
  f.bytes = carver.used;
  return f;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Images first .. first + images into the buffer, kBlock zeros behind each row of channels that is short.
template <class X, class T>
void copy_images(const DeformConv& a, const Forward<X, T>& f, std::int64_t first, std::int64_t images, int threads) {
  const DeformConvShape& s = a.shape;
  // Long pieces of few channels: every channel lies on pages of its own, which the hardware reads ahead once it is under way.
  const std::int64_t size = s.height * s.width, piece = larger(ceil_div(size * images, 4 * threads), 64);
  const std::int64_t line = larger(smaller(round_up(piece, 16), 1024), s.width), lines = ceil_div(size, line);
  parallel_for(threads, images * lines, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t image = task / lines, p = task % lines * line;
      take_pixels(s, (const X*)a.input + (first + image) * a.input_strides[0], a.input_strides, s.channels, p,
                  smaller(p + line, size), f.copies + image * size * f.pitch, f.pitch);
    }
  });
}

// Packs a panel: kWide outputs of a weight group, all its inputs.
template <class X, class T>
void pack_panel(const DeformConv& a, const Forward<X, T>& f, std::int64_t panel, T* to, Sum<T>* rows) {
  typedef Arithmetic<T> A;
  constexpr int W = Lanes<Sum<T>>::count;
  const std::int64_t group = panel / f.group_panels, out = panel % f.group_panels * kWide<T>, length = f.inputs * f.taps;
  const X* const from = (const X*)a.weight + (group * f.outputs + out) * length;
  const std::int64_t outs = smaller(kWide<T>, f.outputs - out);
  for (std::int64_t b = f.starts[group]; b < f.starts[group + 1]; ++b) {
    const std::int64_t count = f.counts[b], first = (f.blocks[b].first - group * f.inputs) * f.taps, n = count * f.taps;
    const std::int64_t pairs = ceil_div(count, A::pair);
    for (int v = 0; v < kVectors; ++v) {
      for (std::int64_t t = 0; t < n; t += W) {  // rows of `rows` are [channel][tap], as the weights lie
        for (int i = 0; i < W; ++i) {
          if (v * W + i < outs) __builtin_prefetch(from + (v * W + i) * length + first + t + n);  // of the next block
          rows[t + i] = v * W + i < outs ? load_some(from + (v * W + i) * length + first + t, 1, n - t) : Sum<T>{};
        }
        transpose(rows + t);
      }
      for (std::int64_t c = 0; c < count; c += A::pair)
        for (std::int64_t k = 0; k < f.taps; ++k) {
          Sum<T> both[A::pair];
          for (std::int64_t j = 0; j < A::pair; ++j) both[j] = c + j < count ? rows[(c + j) * f.taps + k] : Sum<T>{};
          const typename A::operand joined = A::join(both);
          std::memcpy(to + ((k * pairs + c / A::pair) * kWide<T> + v * W) * A::pair, &joined, sizeof joined);
        }
    }
    to += f.taps * pairs * kWide<T> * A::pair;
  }
}

// Samples neighbouring blocks, `from` being the first channel of the image's first pixel. Where a count is odd and products
// take pairs, the column behind it becomes zero.
template <class X, class T, class D>
void sample(const Forward<X, T>& f, const X* from, std::int64_t outside, const Taps<typename Storage<X>::compute>& taps,
            std::int64_t pixels, const std::int64_t* counts, std::int64_t blocks, D* to) {
  typedef typename Storage<X>::vector V;
  constexpr int W = Lanes<V>::count;
  // All taps of a few neighbours before the next ones: what they read stays in the first cache.
  for (std::int64_t begin = 0; begin < pixels; begin += kNeighbours)
    for (std::int64_t k = 0; k < f.taps; ++k)
      for (std::int64_t p = begin; p < begin + kNeighbours && p < pixels; ++p) {
        const X* corner[4];
        V w[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const std::int64_t at = taps.index[(k * 4 + i) * kPixels + p];
          corner[i] = at == outside ? f.zeros : from + at * f.pitch;
          w[i] = splat<V>(taps.weight[(k * 4 + i) * kPixels + p]);
        }
        D* here = to + (k * kPixels + p) * kBlock;
        for (std::int64_t c = 0; c < blocks * kBlock; here += f.taps * kPixels * kBlock)
#pragma GCC unroll 4
          for (int v = 0; v < kBlock / W; ++v, c += W) {
            const V s = load(corner[0] + c) * w[0] + load(corner[1] + c) * w[1] + load(corner[2] + c) * w[2] +
                        load(corner[3] + c) * w[3];
            Arithmetic<D>::store_factors(here + v * W, sizeof(D) > sizeof(X) ? rounded(s) : s);  // bf16 numbers in float
          }
      }
  if constexpr (Arithmetic<D>::pair > 1)
    for (std::int64_t b = 0; b < blocks; ++b)
      if (counts[b] % Arithmetic<D>::pair)
        for (std::int64_t k = 0; k < f.taps; ++k)
          for (std::int64_t p = 0; p < pixels; ++p) to[((b * f.taps + k) * kPixels + p) * kBlock + counts[b]] = D{};
}

// The sums of a tile, with the bias, into the result.
template <class X, class T>
void give_tile(const DeformConv& a, const Forward<X, T>& f, std::int64_t image, std::int64_t first, std::int64_t pixels,
               std::int64_t out, std::int64_t outs, const SumScalar<T>* sums) {
  typedef typename Storage<X>::vector V;
  constexpr int W = Lanes<V>::count;
  for (std::int64_t o = 0; o < outs; o += W) {
    const SumScalar<T>* const from = sums + o / kWide<T> * kPixels * kWide<T> + o % kWide<T>;
    const V bias = a.bias ? load_some((const X*)a.bias + out + o, 1, outs - o) : V{};
    if (a.out_channels_last) {
      X* const to = (X*)a.out + (image * f.pixels + first) * a.shape.outs + out + o;
      for (std::int64_t p = 0; p < pixels; ++p)
        store_some(to + p * a.shape.outs, 1, outs - o, load(from + p * kWide<T>) + bias);
      continue;
    }
    X* const to = (X*)a.out + (image * a.shape.outs + out + o) * f.pixels + first;
    for (std::int64_t p = 0; p < pixels; p += W) {
      V v[W];
      for (int i = 0; i < W; ++i) v[i] = load(from + (p + i) * kWide<T>) + bias;
      transpose(v);
      for (int i = 0; i < W && o + i < outs; ++i) store_some(to + i * f.pixels + p, 1, pixels - p, v[i]);
    }
  }
}

// A tile of pixels times the packed panels begin .. end.
template <class X, class T>
void run_tile(const DeformConv& a, const Forward<X, T>& f, const X* from, std::int64_t image, std::int64_t first,
              std::int64_t pixels, std::int64_t begin, std::int64_t end, std::int64_t share) {
  constexpr std::int64_t pair = Arithmetic<T>::pair;
  const DeformConvShape& s = a.shape;
  const auto& taps = f.located[share];
  T* const columns = f.columns[share];
  begin_tile(s, first, pixels, taps);
  std::int64_t located = -1;
  for (std::int64_t group = begin / f.group_panels; group * f.group_panels < end; ++group) {
    const std::int64_t low = larger(begin, group * f.group_panels), high = smaller(end, (group + 1) * f.group_panels);
    const std::int64_t out = (low - group * f.group_panels) * kWide<T>;
    const std::int64_t outs = smaller(f.outputs, (high - group * f.group_panels) * kWide<T>) - out;
    const std::int64_t start = f.starts[group], blocks = f.starts[group + 1] - start;
    const std::int64_t chunks = ceil_div(blocks, f.chunk_blocks);
    const T* weights = f.weights + (low - begin) * f.steps * kWide<T> * pair;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t b0 = start + blocks * chunk / chunks, b1 = start + blocks * (chunk + 1) / chunks;
      std::int64_t steps = 0;
      for (std::int64_t b = b0; b < b1;) {  // neighbours of one offset group at once
        std::int64_t next = b;
        for (; next < b1 && f.blocks[next].offset_group == f.blocks[b].offset_group; ++next)
          steps += ceil_div(f.counts[next], pair) * f.taps;
        if (f.blocks[b].offset_group != located)
          locate_group(a, image, located = f.blocks[b].offset_group, first, pixels, taps);
        sample(f, from + f.blocks[b].first, s.height * s.width, taps, pixels, f.counts + b, next - b,
               columns + (b - b0) * f.taps * kPixels * kBlock);
        b = next;
      }
      const Walk walk{f.counts + b0, b1 - b0, f.taps, kPixels * kBlock, 0};
      multiply<T, kBlock, 1>(pixels, ceil_div(outs, Lanes<Sum<T>>::count), columns, weights,
                             f.steps * kWide<T> * pair, walk, f.sums[share], kPixels * kWide<T>, chunk > 0);
      weights += steps * kWide<T> * pair;
    }
    give_tile(a, f, image, first, pixels, group * f.outputs + out, outs, f.sums[share]);
  }
}

template <class X, class T>
void run_many(const DeformConv& a, const Forward<X, T>& f, int threads) {
  const DeformConvShape& s = a.shape;
  const std::int64_t panels = s.groups * f.group_panels, image_size = s.height * s.width * f.pitch;
  const std::int64_t together = f.images ? f.images : s.batch;
  for (std::int64_t begin = 0; begin < panels; begin += f.stage_panels) {
    const std::int64_t end = smaller(begin + f.stage_panels, panels);
    parallel_for(threads, f.shares, [&](std::int64_t share, std::int64_t last) {
      for (; share < last; ++share)
        for (std::int64_t p = (end - begin) * share / f.shares; p < (end - begin) * (share + 1) / f.shares; ++p)
          pack_panel(a, f, begin + p, f.weights + p * f.steps * kWide<T> * Arithmetic<T>::pair, f.rows[share]);
    });
    for (std::int64_t first = 0; first < s.batch; first += together) {
      const std::int64_t images = smaller(together, s.batch - first);
      if (f.images && (begin == 0 || images < s.batch)) copy_images(a, f, first, images, threads);
      // A pixel's bits do not depend on its tile: tiles may be as many as the threads like.
      std::int64_t tiles = ceil_div(f.pixels, kPixels);
      while (images * tiles % threads && images * tiles < 16 * threads && tiles * 16 < f.pixels) ++tiles;
      parallel_for(threads, f.shares, [&](std::int64_t share, std::int64_t last) {
        for (; share < last; ++share)
          for (std::int64_t t = images * tiles * share / f.shares; t < images * tiles * (share + 1) / f.shares; ++t) {
            const std::int64_t image = t / tiles, tile = t % tiles, p = f.pixels * tile / tiles;
            const X* const from = f.images ? f.copies + image * image_size
                                           : (const X*)a.input + (first + image) * a.input_strides[0];
            run_tile(a, f, from, first + image, p, f.pixels * (tile + 1) / tiles - p, begin, end, share);
          }
      });
    }
  }
}

// ---- few pixels -----------------------------------------------------------------------------------------------------

constexpr int kDots = 4;                          // outputs of a register tile of dot products
constexpr std::int64_t kDotOuts = 4 * kDots;      // of a task, which takes the columns from the first cache that often
constexpr std::int64_t kDotBytes = 32 << 10;      // of columns taken at a time
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotPixels = 6;
#else
constexpr int kDotPixels = 2;
#endif

// Holds a value in a register that the compiler would rather load again for every use.
template <class V>
PYFACE_INLINE void keep([[maybe_unused]] V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}

// Factors as they lie in memory; bf16 widened where products are float.
template <class T, class X>
PYFACE_INLINE typename Arithmetic<T>::operand load_factors(const X* p) {
  if constexpr (sizeof(X) == sizeof(T)) {
    typename Arithmetic<T>::operand v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    return load(p);
  }
}

// sums[pixel][out] (+)= sum over steps of weights[out][step] * columns[pixel][step], `length` numbers each, lane by lane.
template <class X, class T, int R, int Q>
__attribute__((noinline)) void dots(const X* weights, std::int64_t row, const T* columns, std::int64_t column_row,
                                    std::int64_t length, Sum<T>* sums, bool add) {
  typedef Arithmetic<T> A;
  constexpr std::int64_t step = Lanes<Sum<T>>::count * A::pair;
  Sum<T> s[Q][R];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) s[q][r] = add ? sums[q * kDots + r] : Sum<T>{};
  auto take = [&](const X* w, std::int64_t w_row, std::int64_t t) __attribute__((always_inline)) {
    typename A::operand factors[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) factors[r] = load_factors<T>(w + r * w_row);
#pragma GCC unroll 6
    for (int q = 0; q < Q; ++q) {
      typename A::operand column = load_factors<T>(columns + q * column_row + t);
      keep(column);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) s[q][r] = A::multiply_add(column, factors[r], s[q][r]);
    }
  };
  std::int64_t t = 0;
  for (; t + step <= length; t += step) take(weights + t, row, t);
  if (t < length) {
    X rest[R * step] = {};
    for (int r = 0; r < R; ++r) std::memcpy(rest + r * step, weights + r * row + t, (length - t) * sizeof(X));
    take(rest, step, t);
  }
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) sums[q * kDots + r] = s[q][r];
}

template <class X, class T, int R, int Q, class... Args>
PYFACE_INLINE void dots_of(std::int64_t outs, std::int64_t pixels, Args... args) {
  if (outs == R && pixels == Q)
    dots<X, T, R, Q>(args...);
  else if constexpr (Q > 1) {
    if (pixels < Q) return dots_of<X, T, R, Q - 1>(outs, pixels, args...);
    if constexpr (R > 1) dots_of<X, T, R - 1, Q>(outs, pixels, args...);
  } else if constexpr (R > 1)
    dots_of<X, T, R - 1, Q>(outs, pixels, args...);
}

template <class X, class T>
void run_few(const DeformConv& a, const Forward<X, T>& f, int threads) {
  typedef typename Storage<X>::vector V;
  constexpr int W = Lanes<V>::count;
  const DeformConvShape& s = a.shape;
  const std::int64_t pixels = s.batch * f.pixels, length = f.inputs * f.taps;
  if (f.images) copy_images(a, f, 0, s.batch, threads);

  parallel_for(threads, f.shares, [&](std::int64_t share, std::int64_t last) {
    for (; share < last; ++share) {
      const auto& taps = f.located[share];
      begin_tile(s, 0, f.pixels, taps);
      std::int64_t located = -1;
      const std::int64_t tasks = s.batch * f.block_count;
      for (std::int64_t t = tasks * share / f.shares; t < tasks * (share + 1) / f.shares; ++t) {
        const std::int64_t image = t / f.block_count, b = t % f.block_count, first = f.blocks[b].first;
        const std::int64_t offset_group = f.blocks[b].offset_group, group = first / f.inputs;
        if (located != image * s.offset_groups + offset_group) {
          located = image * s.offset_groups + offset_group;
          locate_group(a, image, offset_group, 0, f.pixels, taps);
        }
        const X* const from = f.images ? f.copies + image * s.height * s.width * f.pitch
                                       : (const X*)a.input + image * a.input_strides[0];
        sample(f, from + first, s.height * s.width, taps, f.pixels, f.counts + b, 1, f.columns[share]);
        for (std::int64_t p = 0; p < f.pixels; ++p) {
          const T* const column = f.columns[share] + p * kBlock;
          T* const to = f.natural + (group * pixels + image * f.pixels + p) * f.row + (first - group * f.inputs) * f.taps;
          for (std::int64_t c = 0; c < f.counts[b]; ++c)
            for (std::int64_t k = 0; k < f.taps; ++k) to[c * f.taps + k] = column[k * kPixels * kBlock + c];
        }
      }
    }
  });
  for (std::int64_t i = 0; i < s.groups * pixels; ++i)
    for (std::int64_t t = length; t < f.row; ++t) f.natural[i * f.row + t] = T{};

  constexpr std::int64_t step = Lanes<Sum<T>>::count * Arithmetic<T>::pair;
  const std::int64_t some = larger(kDotBytes / (pixels * (std::int64_t)sizeof(T)) / step, 1) * step;
  const std::int64_t group_tasks = ceil_div(f.outputs, kDotOuts), tiles = ceil_div(pixels, kDotPixels);
  parallel_for(threads, s.groups * group_tasks, [&](std::int64_t begin, std::int64_t end) {
    Sum<T> sums[kFewPixels * kDotOuts + W];
    SumScalar<T> values[kFewPixels * kDots + W];
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t group = task / group_tasks, o = task % group_tasks * kDotOuts;
      const std::int64_t outs = smaller(kDotOuts, f.outputs - o), out = group * f.outputs + o;
      const X* const weights = (const X*)a.weight + out * length;
      const T* const columns = f.natural + group * pixels * f.row;
      for (std::int64_t i = 0; i < pixels * kDotOuts + W; ++i) sums[i] = Sum<T>{};
      for (std::int64_t t = 0; t < length; t += some)
        for (std::int64_t r = 0; r < outs; r += kDots)
          for (std::int64_t i = 0; i < tiles; ++i) {
            const std::int64_t p = pixels * i / tiles;
            dots_of<X, T, kDots, kDotPixels>(smaller(kDots, outs - r), pixels * (i + 1) / tiles - p,
                                             weights + r * length + t, length, columns + p * f.row + t, f.row,
                                             smaller(some, length - t), sums + r * pixels + p * kDots, t > 0);
          }
      for (std::int64_t r = 0; r < outs; r += kDots) {
        Sum<T>* const found = sums + r * pixels;
        for (std::int64_t i = 0; i < pixels * kDots; i += W) {
          Sum<T> some_sums[W];
          for (std::int64_t j = 0; j < W; ++j) some_sums[j] = found[i + j];
          store(values + i, reduce(some_sums));
        }
        for (std::int64_t k = r; k < smaller(r + kDots, outs); ++k) {
          const V bias = splat<V>(a.bias ? widen(((const X*)a.bias)[out + k]) : 0);
          for (std::int64_t i = 0; i < pixels; ++i) {
            const std::int64_t image = i / f.pixels, p = i % f.pixels;
            const std::int64_t at = a.out_channels_last ? (image * f.pixels + p) * s.outs + out + k
                                                        : (image * s.outs + out + k) * f.pixels + p;
            store_some((X*)a.out + at, 1, 1, splat<V>(values[i * kDots + k - r]) + bias);
          }
        }
      }
    }
  });
}

// ---- forward with the weights as they lie ---------------------------------------------------------------------------

// The columns of a block, turned: `first` is its first step's place among those of the chunk.
template <class X, class T>
void turn(const Forward<X, T>& f, std::int64_t share, std::int64_t pixels, std::int64_t count, std::int64_t first,
          std::int64_t chunk_steps) {
  typedef Arithmetic<T> A;
  constexpr int W = Lanes<Sum<T>>::count;
  Sum<T>* const rows = f.rows[share];
  const std::int64_t steps = count * f.taps;
  rows[steps] = Sum<T>{};  // the partner of a last step
  for (std::int64_t p = 0; p < pixels; p += W) {
    for (std::int64_t k = 0; k < f.taps; ++k) {
      const SumScalar<T>* const from = f.sampled[share] + (k * kPixels + p) * kBlock;
      for (std::int64_t c = 0; c < count; c += W) {
        Sum<T> v[W];
        for (int i = 0; i < W; ++i) v[i] = p + i < pixels ? load(from + i * kBlock + c) : Sum<T>{};
        transpose(v);
        for (int i = 0; i < W && c + i < count; ++i) rows[(c + i) * f.taps + k] = v[i];
      }
    }
    T* const to = f.columns[share] + (p / kWide<T> * chunk_steps + first) * kWide<T> + p % kWide<T> * A::pair;
    for (std::int64_t t = 0; t < steps; t += A::pair) {
      const typename A::operand joined = A::join(rows + t);
      std::memcpy(to + t * kWide<T>, &joined, sizeof joined);
    }
  }
}

// The sums of some pixels of an image, with the bias, into the result: `at` is the first one's place in the tile.
template <class X, class T>
void give_turned(const DeformConv& a, const Forward<X, T>& f, std::int64_t image, std::int64_t first, std::int64_t pixels,
                 std::int64_t at, std::int64_t out, std::int64_t outs, const SumScalar<T>* sums) {
  constexpr int W = Lanes<Sum<T>>::count;
  auto sum = [&](std::int64_t p, std::int64_t o) {
    return sums + ((at + p) / kWide<T> * outs + o) * kWide<T> + (at + p) % kWide<T>;
  };
  auto bias = [&](std::int64_t o) { return a.bias ? (SumScalar<T>)widen(((const X*)a.bias)[out + o]) : 0; };
  if (a.out_channels_last) {
    X* const to = (X*)a.out + (image * f.pixels + first) * a.shape.outs + out;
    for (std::int64_t p = 0; p < pixels; ++p)
      for (std::int64_t o = 0; o < outs; o += W) {
        Sum<T> v{};
        for (int i = 0; i < W && o + i < outs; ++i) v[i] = *sum(p, o + i) + bias(o + i);
        store_some(to + p * a.shape.outs + o, 1, outs - o, v);
      }
    return;
  }
  for (std::int64_t o = 0; o < outs; ++o) {
    X* const to = (X*)a.out + (image * a.shape.outs + out + o) * f.pixels + first;
    for (std::int64_t p = 0, here; p < pixels; p += here) {
      here = smaller(W, smaller(pixels - p, kWide<T> - (at + p) % kWide<T>));
      store_some(to + p, 1, here, load_some(sum(p, o), 1, here) + splat<Sum<T>>(bias(o)));
    }
  }
}

// Pixels first .. first + pixels, counted through the images from `image` on, and some outputs of a weight group.
template <class X, class T>
void run_turned(const DeformConv& a, const Forward<X, T>& f, const X* images, std::int64_t image_size, std::int64_t image,
                std::int64_t first, std::int64_t pixels, std::int64_t group, std::int64_t low, std::int64_t outs,
                std::int64_t share) {
  const DeformConvShape& s = a.shape;
  const auto& taps = f.located[share];
  const std::int64_t start = f.starts[group], blocks = f.starts[group + 1] - start, length = f.inputs * f.taps;
  const std::int64_t chunks = ceil_div(blocks, f.chunk_blocks), vectors = ceil_div(pixels, Lanes<Sum<T>>::count);
  SumScalar<T>* const sums = f.sums[share];
  auto for_each_part = [&](auto each) {  // (image, first pixel, pixels, place in the tile)
    for (std::int64_t p = 0, here; p < pixels; p += here) {
      const std::int64_t in_image = (first + p) % f.pixels;
      here = smaller(pixels - p, f.pixels - in_image);
      each((first + p) / f.pixels, in_image, here, p);
    }
  };
  std::int64_t located_image = -1, located_group = -1;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t b0 = start + blocks * chunk / chunks, b1 = start + blocks * (chunk + 1) / chunks;
    std::int64_t steps = 0;
    for (std::int64_t b = b0; b < b1; ++b) steps += f.counts[b] * f.taps;
    const std::int64_t filled = round_up(steps, Arithmetic<T>::pair);
    for (std::int64_t b = b0, step = 0; b < b1; step += f.counts[b++] * f.taps) {
      for_each_part([&](std::int64_t i, std::int64_t p, std::int64_t count, std::int64_t at) {
        if (i != located_image || f.blocks[b].offset_group != located_group) {
          located_image = i, located_group = f.blocks[b].offset_group;
          begin_tile(s, p, count, taps);
          locate_group(a, image + i, located_group, p, count, taps);
        }
        sample(f, images + i * image_size + f.blocks[b].first, s.height * s.width, taps, count, f.counts + b, 1,
               f.sampled[share] + at * kBlock);
      });
      turn(f, share, pixels, f.counts[b], step, filled);
    }
    const std::int64_t from = (f.blocks[b0].first - group * f.inputs) * f.taps;
    const X* const weights = (const X*)a.weight + (group * f.outputs + low) * length + from;
    for (std::int64_t r = 0; r < outs; r += kTogether<T>) {
      const std::int64_t rows = smaller(kTogether<T>, outs - r);
      const T* left = f.copy[share];
      if (f.copied) {
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t t = 0; t < filled; ++t) {
            T& to = f.copy[share][i * filled + t];
            if constexpr (std::is_same_v<X, T>)
              to = t < steps ? weights[(r + i) * length + t] : T{};
            else
              to = t < steps ? widen(weights[(r + i) * length + t]) : 0;
          }
      } else if constexpr (std::is_same_v<X, T>) {
        left = weights + r * length;
      }
      const Walk walk{&filled, 1, 1, 0, f.copied ? filled : length};
      multiply<T, 0, 1>(rows, vectors, left, f.columns[share], filled * kWide<T>, walk, sums + r * kWide<T>,
                        outs * kWide<T>, chunk > 0);
    }
  }
  for_each_part([&](std::int64_t i, std::int64_t p, std::int64_t count, std::int64_t at) {
    give_turned(a, f, image + i, p, count, at, group * f.outputs + low, outs, sums);
  });
}

template <class X, class T>
void run_as_they_lie(const DeformConv& a, const Forward<X, T>& f, int threads) {
  const DeformConvShape& s = a.shape;
  const std::int64_t image_size = f.images ? s.height * s.width * f.pitch : a.input_strides[0];
  const std::int64_t together = f.images ? f.images : s.batch;
  for (std::int64_t image = 0; image < s.batch; image += together) {
    const std::int64_t images = smaller(together, s.batch - image), pixels = images * f.pixels;
    if (f.images) copy_images(a, f, image, images, threads);
    const X* const from = f.images ? f.copies : (const X*)a.input + image * image_size;
    // A result's bits depend neither on its tile nor on its part: there may be as many as the threads like.
    std::int64_t tiles = ceil_div(pixels, kPixels);
    while (tiles % threads && (tiles + 1) * kLeastPixels <= pixels) ++tiles;
    const std::int64_t panels = ceil_div(pixels, kWide<T>);
    const std::int64_t parts = smaller(ceil_div(threads, s.groups * tiles), f.outputs), tasks = s.groups * tiles * parts;
    parallel_for(threads, f.shares, [&](std::int64_t share, std::int64_t last) {
      for (; share < last; ++share)
        for (std::int64_t t = tasks * share / f.shares; t < tasks * (share + 1) / f.shares; ++t) {
          const std::int64_t part = t % parts, tile = t / parts % tiles, group = t / parts / tiles;
          const std::int64_t p = panels * tile / tiles * kWide<T>;
          const std::int64_t end = smaller(panels * (tile + 1) / tiles * kWide<T>, pixels);
          const std::int64_t low = f.outputs * part / parts, high = f.outputs * (part + 1) / parts;
          run_turned(a, f, from, image_size, image, p, end - p, group, low, high - low, share);
        }
    });
  }
}

// How many threads a call is worth.
int team(const DeformConvShape& s, int threads) {
  const std::int64_t products = s.batch * s.out_height * s.out_width * s.outs * (s.channels / s.groups);
  return products * s.kernel[0] * s.kernel[1] < kSerialProducts ? 1 : threads;
}

template <class X, class T>
void run_forward(const DeformConv& a, void* scratch, int threads) {
  const Forward<X, T> f = plan_forward<X, T>(a, scratch, threads);
  std::memset((void*)f.zeros, 0, (round_up(a.shape.channels, kBlock) + kBlock) * sizeof(X));
  (f.few ? run_few<X, T> : f.as_they_lie ? run_as_they_lie<X, T> : run_many<X, T>)(a, f, threads);
}

// ---- backward: how the work is cut ----------------------------------------------------------------------------------

constexpr std::int64_t kLanesWanted = 8;             // tasks, where there are channels and images for them
constexpr std::int64_t kPartialBytes = 4 << 20;      // of the sums for offset and mask: as many images at a time as fit

// Channels of one offset group and one weight group, whose gradients one task makes.
struct Chunk {
  std::int64_t first, count, offset_group, group;
};

template <class C>
struct Backward {
  static constexpr int W = Lanes<Sum<C>>::count;

  std::int64_t taps, pixels, inputs, outputs, image;  // as Forward; pixels of an input
  std::int64_t most;          // channels of a chunk, whole vectors
  std::int64_t panels;        // of a chunk: its most * taps columns by kWide
  std::int64_t chunk_count, lanes;  // lanes: tasks of an image, each for some chunks of one offset group
  std::int64_t round, slots;  // images taken together, and how many tasks share them
  bool kept;                  // weight gradients are added up in `sums` over several images
  bool wants_columns_gradient;

  Chunk* chunks;
  std::int64_t* starts;  // first chunk of every lane, and the end
  C* partial;            // [image of the round][lane][y, x, mask][tap][pixel]
  C* sums;               // gradient of the weights, [slot][chunk][panel][output][kWide]
  // for every share:
  struct Share {
    Taps<C> taps;
    C *image, *grad_image;      // [pixel][wide], and a pixel for what is outside
    C* grad_out;                // [output][kPixels]
    C *grad_columns, *columns;  // [panel][kPixels][kWide]
    C* weights;                 // [panel][output][kWide]
    C* sums;                    // if none are kept
  };
  Share* per_share;
  std::int64_t shares, bytes;
  PYFACE_INLINE std::int64_t panel_sums(const Backward& b) { return b.panels * b.outputs * kWide<C>; }
};

template <class C>
Backward<C> plan_backward(const DeformConvBackward& a, void* scratch, int threads) {
  const DeformConvShape& s = a.shape;
  Carver carver{(char*)scratch};
  Backward<C> b;
  b.taps = s.kernel[0] * s.kernel[1], b.pixels = s.out_height * s.out_width, b.image = s.height * s.width;
  b.inputs = s.channels / s.groups, b.outputs = s.outs / s.groups;
  b.wants_columns_gradient = a.grad_input || a.grad_offset || a.grad_mask;

  // The packed weights of a chunk and the gradients of these should stay in the second cache.
  const std::int64_t wanted = b.outputs > 256 ? 16 : 32;
  std::int64_t widest = 0, least = s.channels, in_group = 0, group_now = 0;  // least: chunks of an offset group
  b.chunk_count = 0;
  for_each_block(s, wanted, [&](std::int64_t, std::int64_t count, std::int64_t og, std::int64_t) {
    if (og != group_now) least = smaller(least, in_group), group_now = og, in_group = 0;
    ++b.chunk_count, ++in_group, widest = larger(widest, count);
  });
  least = smaller(least, in_group);
  b.most = round_up(widest, Backward<C>::W);
  b.panels = ceil_div(b.taps * b.most, kWide<C>);
  const std::int64_t group_lanes = smaller(least, larger(kLanesWanted / s.offset_groups, 1));
  b.lanes = s.offset_groups * group_lanes;
  b.chunks = carver.take<Chunk>(b.chunk_count);
  b.starts = carver.take<std::int64_t>(b.lanes + 1);
  if (scratch) {
    std::int64_t n = 0;
    for_each_block(s, wanted, [&](std::int64_t first, std::int64_t count, std::int64_t og, std::int64_t group) {
      b.chunks[n++] = {first, count, og, group};
    });
    for (std::int64_t og = 0, low = 0, high = 0; og < s.offset_groups; ++og, low = high) {
      while (high < n && b.chunks[high].offset_group == og) ++high;
      for (std::int64_t lane = 0; lane < group_lanes; ++lane)
        b.starts[og * group_lanes + lane] = low + (high - low) * lane / group_lanes;
    }
    b.starts[b.lanes] = n;
  }
  const std::int64_t partial = b.lanes * 3 * b.taps * b.pixels;
  b.round = smaller(larger(kPartialBytes / (partial * (std::int64_t)sizeof(C)), 1), s.batch);
  b.slots = smaller(b.round, ceil_div(kLanesWanted, b.lanes));
  b.kept = s.batch > 1;
  const std::int64_t chunk_sums = Backward<C>::panel_sums(b);
  b.partial = carver.take<C>(a.grad_offset || a.grad_mask ? b.round * partial : 0);
  b.sums = carver.take<C>(b.kept && a.grad_weight ? b.slots * b.chunk_count * chunk_sums : 0);
  b.shares = smaller(threads, b.lanes * b.slots);
  b.per_share = carver.take<typename Backward<C>::Share>(b.shares);
  const std::int64_t image = (b.image + 1) * b.most, columns = b.panels * kPixels * kWide<C>;
  for (std::int64_t i = 0; i < b.shares; ++i) {
    typename Backward<C>::Share share;
    share.taps = take_taps<C>(carver, b.taps, true);
    share.image = carver.take<C>(image);
    share.grad_image = carver.take<C>(a.grad_input ? image : 0);
    share.grad_out = carver.take<C>(b.outputs * kPixels);
    share.grad_columns = carver.take<C>(b.wants_columns_gradient ? columns : 0);
    share.columns = carver.take<C>(a.grad_weight ? columns : 0);
    share.weights = carver.take<C>(b.wants_columns_gradient ? chunk_sums : 0);
    share.sums = carver.take<C>(a.grad_weight && !b.kept ? chunk_sums : 0);
    if (scratch) b.per_share[i] = share;
  }
  b.bytes = carver.used;
  return b;
}

// ---- backward -------------------------------------------------------------------------------------------------------

// A chunk's weights as [panel][output][kWide] with columns [tap][channel], zero where there is no channel.
template <class X, class C>
void pack_chunk(const DeformConvBackward& a, const Backward<C>& b, const Chunk& chunk, std::int64_t wide, C* to) {
  const std::int64_t length = b.inputs * b.taps;
  const X* const from = (const X*)a.weight + chunk.group * b.outputs * length + (chunk.first % b.inputs) * b.taps;
  for (std::int64_t k = 0; k < b.taps; ++k)
    for (std::int64_t v = 0; v < wide; v += Backward<C>::W) {
      const std::int64_t column = k * wide + v;
      C* const panel = to + column / kWide<C> * b.outputs * kWide<C> + column % kWide<C>;
      for (std::int64_t o = 0; o < b.outputs; ++o)
        for (std::int64_t c = 0; c < Backward<C>::W; ++c)
          panel[o * kWide<C> + c] = v + c < chunk.count ? widen(from[o * length + (v + c) * b.taps + k]) : 0;
    }
}

// The weight gradients of a chunk, summed over the slots, to where they belong.
template <class X, class C>
void give_chunk(const DeformConvBackward& a, const Backward<C>& b, const Chunk& chunk, std::int64_t wide, const C* sums,
                std::int64_t slots, std::int64_t slot_size) {
  typedef Sum<C> V;
  const std::int64_t length = b.inputs * b.taps;
  X* const to = (X*)a.grad_weight + chunk.group * b.outputs * length + (chunk.first % b.inputs) * b.taps;
  for (std::int64_t o = 0; o < b.outputs; ++o)
    for (std::int64_t k = 0; k < b.taps; ++k)
      for (std::int64_t v = 0; v < wide; v += Backward<C>::W) {
        const std::int64_t column = k * wide + v;
        const C* const from = sums + (column / kWide<C> * b.outputs + o) * kWide<C> + column % kWide<C>;
        V sum = load(from);
        for (std::int64_t slot = 1; slot < slots; ++slot) sum += load(from + slot * slot_size);
        store_some(to + o * length + v * b.taps + k, b.taps, chunk.count - v, sum);
      }
}

// The sampling of a chunk for some pixels, from its gradient: columns for the weights, the gradient of the image, and the
// products of the corners with the columns' gradient, summed over the channels.
template <class C, bool Dots, bool Scatter, bool Columns>
void sample_back(const Backward<C>& b, const typename Backward<C>::Share& share, std::int64_t wide, std::int64_t pixels,
                 std::int64_t first, bool add, C* partial) {
  typedef Sum<C> V;
  constexpr int W = Lanes<V>::count;
  const std::int64_t vectors = wide / W;
  V products[4][W];
  for (std::int64_t k = 0; k < b.taps; ++k) {
    const auto* const index = share.taps.index + k * 4 * kPixels;
    const C* const weight = share.taps.weight + k * 4 * kPixels;
    for (std::int64_t begin = 0; begin < pixels; begin += W) {
      const std::int64_t end = smaller(begin + W, pixels);
      for (std::int64_t p = begin; p < end; ++p) {
        std::int64_t at[4];
        V w[4], sum[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          at[i] = index[i * kPixels + p] * wide, w[i] = splat<V>(weight[i * kPixels + p]), sum[i] = V{};
        for (std::int64_t v = 0; v < vectors; ++v) {
          const std::int64_t column = (k * vectors + v) * W;
          const std::int64_t here = (column / kWide<C> * kPixels + p) * kWide<C> + column % kWide<C>;
          V u{};
          if constexpr (Dots || Scatter) u = load(share.grad_columns + here);
          if constexpr (Dots || Columns) {
            V sampled{};
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
              const V corner = load(share.image + at[i] + v * W);
              if constexpr (Dots) sum[i] += u * corner;
              if constexpr (Columns) sampled += w[i] * corner;
            }
            if constexpr (Columns) store(share.columns + here, sampled);
          }
          if constexpr (Scatter)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
              C* const to = share.grad_image + at[i] + v * W;
              store(to, load(to) + u * w[i]);
            }
        }
        if constexpr (Dots)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) products[i][p - begin] = sum[i];
      }
      if constexpr (Dots) {
        for (std::int64_t p = end; p < begin + W; ++p)
          for (int i = 0; i < 4; ++i) products[i][p - begin] = V{};
        const V d00 = reduce(products[0]), d01 = reduce(products[1]), d10 = reduce(products[2]), d11 = reduce(products[3]);
        const C* const parts = share.taps.parts + k * 3 * kPixels + begin;
        const V fy = load(parts), fx = load(parts + kPixels), m = load(parts + 2 * kPixels);
        const V ey = (C)1 - fy, ex = (C)1 - fx;
        const V found[3] = {m * (ex * (d10 - d00) + fx * (d11 - d01)), m * (ey * (d01 - d00) + fy * (d11 - d10)),
                            ey * (ex * d00 + fx * d01) + fy * (ex * d10 + fx * d11)};
        for (int i = 0; i < 3; ++i) {
          C* const to = partial + (i * b.taps + k) * b.pixels + first + begin;
          store_some(to, 1, end - begin, add ? found[i] + load_some(to, 1, end - begin) : found[i]);
        }
      }
    }
  }
}

template <class C, class... Args>
void sample_back_as(bool dots, bool scatter, bool columns, Args&&... args) {
  auto pick = [&](auto d, auto s) {
    columns ? sample_back<C, d.value, s.value, true>(args...) : sample_back<C, d.value, s.value, false>(args...);
  };
  auto pick_scatter = [&](auto d) { scatter ? pick(d, std::true_type{}) : pick(d, std::false_type{}); };
  dots ? pick_scatter(std::true_type{}) : pick_scatter(std::false_type{});
}

// One chunk and image.
template <class X, class C>
void run_chunk(const DeformConvBackward& a, const Backward<C>& b, const Chunk& chunk, std::int64_t wide,
               std::int64_t image, const typename Backward<C>::Share& share, C* sums, bool add_sums, C* partial,
               bool add_partial) {
  typedef Sum<C> V;
  constexpr int W = Lanes<V>::count;
  const DeformConvShape& s = a.shape;
  const bool dots = a.grad_offset || a.grad_mask;
  const std::int64_t vectors = b.taps * wide / W;
  const std::int64_t lines = larger(64, s.width);
  const X* const from = (const X*)a.input + image * a.input_strides[0] + chunk.first * a.input_strides[1];
  for (std::int64_t p = 0; p < b.image; p += lines)  // in pieces that stay in the first cache while they are turned
    take_pixels(s, from, a.input_strides, chunk.count, p, smaller(p + lines, b.image), share.image, wide);
  std::memset((void*)(share.image + b.image * wide), 0, wide * sizeof(C));
  if (a.grad_input) std::memset((void*)share.grad_image, 0, (b.image + 1) * wide * sizeof(C));

  const std::int64_t tiles = ceil_div(b.pixels, kPixels);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t first = b.pixels * tile / tiles, pixels = b.pixels * (tile + 1) / tiles - first;
    begin_tile(s, first, pixels, share.taps);
    locate_group(a, image, chunk.offset_group, first, pixels, share.taps);
    const X* const grads = (const X*)a.grad_out + (image * s.outs + chunk.group * b.outputs) * b.pixels + first;
    for (std::int64_t o = 0; o < b.outputs; ++o)
      for (std::int64_t p = 0; p < pixels; p += W)
        store(share.grad_out + o * kPixels + p, load_some(grads + o * b.pixels + p, 1, pixels - p));
    if (b.wants_columns_gradient) {
      const Walk outs{&b.outputs, 1, 1, 0, 0};
      multiply<C, 1, kPixels>(pixels, vectors, share.grad_out, share.weights, b.outputs * kWide<C>, outs,
                              share.grad_columns, kPixels * kWide<C>, false);
    }
    sample_back_as<C>(dots, a.grad_input != nullptr, a.grad_weight != nullptr, b, share, wide, pixels, first, add_partial,
                      partial);
    if (a.grad_weight) {
      const Walk steps{&pixels, 1, 1, 0, 0};
      multiply<C, kPixels, 1>(b.outputs, vectors, share.grad_out, share.columns, kPixels * kWide<C>, steps, sums,
                              b.outputs * kWide<C>, add_sums || tile > 0);
    }
  }
  if (a.grad_input) {
    const std::int64_t next = a.grad_input_channels_last ? 1 : b.image;
    X* const to = (X*)a.grad_input + image * s.channels * b.image + chunk.first * next;
    give_pixels(s, share.grad_image, wide, chunk.count, to, a.grad_input_channels_last);
  }
}

// The gradients of offset and mask for the images of a round.
template <class C, class O>
void give_partial(const DeformConvBackward& a, const Backward<C>& b, std::int64_t start, std::int64_t images, int threads) {
  typedef Sum<C> V;
  const DeformConvShape& s = a.shape;
  const std::int64_t lanes = b.lanes / s.offset_groups, lane_size = 3 * b.taps * b.pixels;
  parallel_for(threads, images * s.offset_groups * b.taps, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t k = task % b.taps, group = task / b.taps % s.offset_groups, image = task / b.taps / s.offset_groups;
      const std::int64_t to = ((start + image) * s.offset_groups + group) * b.taps + k;
      for (int i = 0; i < 3; ++i) {
        O* const out = i == 2 ? (a.grad_mask ? (O*)a.grad_mask + to * b.pixels : nullptr)
                              : (a.grad_offset ? (O*)a.grad_offset + (2 * to + i) * b.pixels : nullptr);
        const C* const from = b.partial + (image * b.lanes + group * lanes) * lane_size + (i * b.taps + k) * b.pixels;
        for (std::int64_t p = 0; out && p < b.pixels; p += Backward<C>::W) {
          V sum = load_some(from + p, 1, b.pixels - p);
          for (std::int64_t lane = 1; lane < lanes; ++lane)
            sum += load_some(from + lane * lane_size + p, 1, b.pixels - p);
          store_some(out + p, 1, b.pixels - p, sum);
        }
      }
    }
  });
}

template <class X, class C>
void run_backward(const DeformConvBackward& a, void* scratch, int threads) {
  const DeformConvShape& s = a.shape;
  const Backward<C> b = plan_backward<C>(a, scratch, threads);
  const std::int64_t chunk_sums = Backward<C>::panel_sums(b), lane_size = 3 * b.taps * b.pixels;
  const std::int64_t tasks = b.lanes * b.slots;
  auto wide_of = [&](const Chunk& chunk) { return round_up(chunk.count, Backward<C>::W); };
  for (std::int64_t start = 0; start < s.batch; start += b.round) {
    const std::int64_t images = smaller(b.round, s.batch - start);
    parallel_for(threads, b.shares, [&](std::int64_t i, std::int64_t last) {
      for (; i < last; ++i)
        for (std::int64_t task = tasks * i / b.shares; task < tasks * (i + 1) / b.shares; ++task) {
          const typename Backward<C>::Share& share = b.per_share[i];
          const std::int64_t slot = task / b.lanes, lane = task % b.lanes;
          for (std::int64_t c = b.starts[lane]; c < b.starts[lane + 1]; ++c) {
            const Chunk& chunk = b.chunks[c];
            const std::int64_t wide = wide_of(chunk);
            if (b.wants_columns_gradient) pack_chunk<X>(a, b, chunk, wide, share.weights);
            C* const sums = b.kept ? b.sums + (slot * b.chunk_count + c) * chunk_sums : share.sums;
            const std::int64_t from = images * slot / b.slots, to = images * (slot + 1) / b.slots;
            if (a.grad_weight && start == 0 && from == to) std::memset((void*)sums, 0, chunk_sums * sizeof(C));
            for (std::int64_t image = from; image < to; ++image)
              run_chunk<X>(a, b, chunk, wide, start + image, share, sums, start > 0 || image > from,
                           b.partial + (image * b.lanes + lane) * lane_size, c > b.starts[lane]);
            if (a.grad_weight && !b.kept) give_chunk<X>(a, b, chunk, wide, sums, 1, 0);
          }
        }
    });
    if (a.grad_offset || a.grad_mask) {
      if constexpr (sizeof(C) == sizeof(float)) {
        if (a.offset_type == DType::bf16) {
          give_partial<C, bf16>(a, b, start, images, threads);
          continue;
        }
      }
      give_partial<C, C>(a, b, start, images, threads);
    }
  }
  if (a.grad_weight && b.kept)
    parallel_for(threads, b.chunk_count, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c)
        give_chunk<X>(a, b, b.chunks[c], wide_of(b.chunks[c]), b.sums + c * chunk_sums, b.slots,
                      b.chunk_count * chunk_sums);
    });
}

}  // namespace

#if defined(__AVX512BF16__)
typedef bf16 BFactor;
#else
typedef float BFactor;
#endif

std::int64_t deform_conv_scratch(const DeformConv& args, int threads) {
  threads = team(args.shape, threads);
  if (args.type == DType::f64) return plan_forward<double, double>(args, nullptr, threads).bytes;
  if (args.type == DType::bf16) return plan_forward<bf16, BFactor>(args, nullptr, threads).bytes;
  return plan_forward<float, float>(args, nullptr, threads).bytes;
}

void deform_conv(const DeformConv& args, void* scratch, int threads) {
  threads = team(args.shape, threads);
  if (args.type == DType::f64) return run_forward<double, double>(args, scratch, threads);
  if (args.type == DType::bf16) return run_forward<bf16, BFactor>(args, scratch, threads);
  run_forward<float, float>(args, scratch, threads);
}

std::int64_t deform_conv_backward_scratch(const DeformConvBackward& args, int threads) {
  threads = team(args.shape, threads);
  if (args.type == DType::f64) return plan_backward<double>(args, nullptr, threads).bytes;
  return plan_backward<float>(args, nullptr, threads).bytes;
}

void deform_conv_backward(const DeformConvBackward& args, void* scratch, int threads) {
  threads = team(args.shape, threads);
  if (args.type == DType::f64) return run_backward<double, double>(args, scratch, threads);
  if (args.type == DType::bf16) return run_backward<bf16, float>(args, scratch, threads);
  run_backward<float, float>(args, scratch, threads);
}

}  // namespace pyface::cpu::PYFACE_ISA
