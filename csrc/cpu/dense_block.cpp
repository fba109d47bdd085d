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
  static PYFACE_INLINE operand broadcast(const float* p) { return *p - operand{}; }
  static PYFACE_INLINE f32v multiply_add(operand x, operand w, f32v sum) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
template <>
struct Arithmetic<bf16> {
  static constexpr int pair = 2;
  typedef i32v operand;
  static PYFACE_INLINE operand broadcast(const bf16* p) {
    std::int32_t both;
    std::memcpy(&both, p, sizeof both);
    return both - operand{};
  }
  static PYFACE_INLINE f32v multiply_add(operand x, operand w, f32v sum) {
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
  float* bias;  // [vectors][lane], zero when spread
};

template <class T>
struct Plan {
  Block* blocks;
  Layer<T>* layers;
  T* features;             // [image][row][block][pixel][kBlock], one border pixel on every side
  float* sums;             // spread: [image][row][pixel][ky][out], sums over kx; a row of zeros before the first
  float* rows;             // one per share: what a row of the last layer is made of
  std::int64_t pitch;      // of a block of a row
  std::int64_t row;        // of a row of the features
  std::int64_t sums_row, rows_row;
  std::int64_t images;     // taken together
  std::int64_t shares;     // of the rows, for the threads
  std::int64_t bytes;
};

PYFACE_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The plan, and with a base address also the arrays it refers to.
template <class T>
Plan<T> make_plan(const DenseBlock& a, char* base, int threads) {
  constexpr std::int64_t pair = Arithmetic<T>::pair;
  Plan<T> plan;
  std::int64_t used = 0, block = 0;
  auto take = [&](auto*& pointer, std::int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += ceil_div(count * (std::int64_t)sizeof *pointer, 64) * 64;
  };
  (void)take;
  (void)block;
  (void)pair;
  return plan;
}
}
}
