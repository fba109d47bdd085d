// A CPU meaning for the CUDA that csrc/cuda uses, for tests only: put this folder before any other on the include path
// and the same .cu files compile with g++. Threads of a block are fibers, blocks run one after another (emulation.cpp).
// Memory is plain memory, so AddressSanitizer and UBSan see what a kernel does with it. What is not here, no kernel has
// needed yet.
//
// Kernels and their __shared__ arrays must sit in an anonymous namespace: the arrays then share one section, which the
// emulator fills with a poison pattern before every block.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// The running thread's own; the emulator sets them at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace emulation {

// The one stream that launches may use: a kernel queued anywhere else would escape the caller's order and any graph
// capture.
constexpr std::uintptr_t kStream = 0x5712ea0;

// Order in which the threads of a block get their turns. A missing barrier goes unseen in some orders, not in all.
enum class Order { ascending, descending, shuffled };
void set_order(Order order, unsigned seed);

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

void block_barrier(int line);
// All lanes in `mask` meet and each learns what every lane brought.
const std::uint64_t* warp_exchange(unsigned mask, std::uint64_t value, int line);
[[noreturn]] void fail(const char* format, ...);

template <typename T>
T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t) && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* all = warp_exchange(mask, bits, line);
  if (!(mask >> source & 1)) fail("line %d: a shuffle reads lane %d, which is not in its mask %#x", line, source, mask);
  std::memcpy(&value, all + source, sizeof(T));
  return value;
}

// ---- tensor cores (csrc/cuda/mma.h has the layouts) ----

// Shows every lane what all of them brought, until all have gone through `look`.
template <typename T, typename F>
void with_all_lanes(const T& brought, F look, int line) {
  std::uint64_t all[32];
  std::memcpy(all, warp_exchange(0xffffffffu, reinterpret_cast<std::uintptr_t>(&brought), line), sizeof all);
  look([&](int lane) -> const T& { return *reinterpret_cast<const T*>(all[lane]); });
  warp_exchange(0xffffffffu, 0, line);
}

int lane();

// T is a 2-byte type with a to_float, or anything else for TF32.
template <typename T, bool Pairs>
void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
  struct Brought {
    const unsigned *a, *b;
  };
  const auto read = [](unsigned bits, int half) {
    if constexpr (Pairs) {
      const std::uint16_t part = static_cast<std::uint16_t>(half ? bits >> 16 : bits);
      T value;
      std::memcpy(&value, &part, sizeof value);
      return to_float(value);
    } else {
      const std::uint32_t kept = bits & 0xffffe000u;
      float value;
      std::memcpy(&value, &kept, sizeof value);
      return value;
    }
  };
  const int g = lane() / 4, t = lane() % 4;
  with_all_lanes(Brought{a, b}, [&](auto of) {
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + i % 2, low = i / 2;  // of the result; whether its row is g + 8
      float sum = 0;
      for (int k = 0; k < (Pairs ? 16 : 8); ++k) {
        const int half = Pairs ? k % 2 : 0, owner = Pairs ? k % 8 / 2 : k % 4, right = Pairs ? k / 8 : k / 4;
        sum += read(of(4 * g + owner).a[2 * right + low], half) * read(of(4 * column + owner).b[right], half);
      }
      c[i] += sum;
    }
  }, line);
}

inline void load_transposed(unsigned (&out)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) fail("line %d: a matrix row is not 16-byte aligned", line);
  const int g = lane() / 4, t = lane() % 4;
  with_all_lanes(row, [&](auto of) {
    for (int m = 0; m < 4; ++m) {
      const auto* first = static_cast<const std::uint16_t*>(of(8 * m + 2 * t));
      const auto* second = static_cast<const std::uint16_t*>(of(8 * m + 2 * t + 1));
      out[m] = first[g] | unsigned(second[g]) << 16;
    }
  }, line);
}

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulation::launch(*config, [=] { kernel(arguments...); });
}

inline void __syncthreads(int line = __builtin_LINE()) { emulation::block_barrier(line); }

// Whether any thread of the block said yes.
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  static int any;
  any = 0;
  emulation::block_barrier(line);
  any |= predicate != 0;
  emulation::block_barrier(line);
  const int result = any;
  emulation::block_barrier(line);
  return result;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulation::warp_exchange(mask, 0, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, source & 31, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int line = __builtin_LINE()) {
  const int source = emulation::lane() + static_cast<int>(step);
  return emulation::shuffle(mask, value, source < 32 ? source : emulation::lane(), line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, (emulation::lane() ^ bits) & 31, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const std::uint64_t* all = emulation::warp_exchange(mask, predicate != 0, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1) && all[i] ? 1u << i : 0u;
  return votes;
}

inline void __threadfence() {}  // blocks run one after another

// Threads only change at barriers, so a plain read-modify-write is atomic.
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline void __stwb(uint4* address, uint4 value) { *address = value; }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
