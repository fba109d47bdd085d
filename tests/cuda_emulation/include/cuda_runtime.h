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

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulation::launch(*config, [=] { kernel(arguments...); });
}

inline void __syncthreads(int line = __builtin_LINE()) { emulation::block_barrier(line); }

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

// Threads only change at barriers, so a plain read-modify-write is atomic.
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline void __stwb(uint4* address, uint4 value) { *address = value; }
