// Stored element types and the types they are computed in, and 16-byte memory access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "pyface/types.h"

namespace pyface::cuda {

// float for everything but double.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline __device__ float widen(float v) { return v; }
inline __device__ double widen(double v) { return v; }
inline __device__ float widen(__half v) { return __half2float(v); }
inline __device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

inline __device__ void narrow(float v, float& out) { out = v; }
inline __device__ void narrow(double v, double& out) { out = v; }
inline __device__ void narrow(float v, __half& out) { out = __float2half_rn(v); }
inline __device__ void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// 16-byte words in N elements.
template <typename T, int N>
constexpr int kWords = sizeof(T) * N / 16;

template <typename T>
__device__ bool aligned(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// out[0, N) = in[0, N) as the compute type; entries from `count` on do not exist and read as 0. `wide`: in is aligned.
template <int N, typename T>
__device__ void load(const T* in, std::int64_t count, bool wide, Real<T>* out) {
  if (wide && count >= N) {
    alignas(16) T values[N];
#pragma unroll
    for (int i = 0; i < kWords<T, N>; ++i) {
      reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(in)[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = widen(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = i < count ? widen(in[i]) : Real<T>(0);
  }
}

template <int N, typename T>
__device__ void store(T* out, std::int64_t count, bool wide, const Real<T>* in) {
  alignas(16) T values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(in[i], values[i]);
  if (wide && count >= N) {
#pragma unroll
    for (int i = 0; i < kWords<T, N>; ++i) {
      // A plain assignment is four stores to the optimiser, which shares them with the branch below and never joins
      // them again.
      __stwb(reinterpret_cast<uint4*>(out) + i, reinterpret_cast<const uint4*>(values)[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) out[i] = values[i];
    }
  }
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) for the stored type that `dtype` names.
template <typename F>
cudaError_t with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(Type<float>{});
    case DType::f64: return f(Type<double>{});
    case DType::bf16: return f(Type<__nv_bfloat16>{});
    case DType::f16: return f(Type<__half>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyface::cuda
