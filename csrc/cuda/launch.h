// One way to start a kernel, so that every launch names its stream and hands its error back.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace pyface::cuda {

// More blocks than this only add scheduling: kernels walk the rest of their work in grid-sized strides.
#ifndef PYFACE_MAX_BLOCKS
#define PYFACE_MAX_BLOCKS 8192
#endif
constexpr std::int64_t kMaxBlocks = PYFACE_MAX_BLOCKS;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  if (blocks <= 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace pyface::cuda
