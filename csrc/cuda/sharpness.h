// Sharpness-aware gradient work over a list of tensors on CUDA. Addresses of tensors travel as arguments of the kernels,
// decisions are taken on the device: nothing is allocated, copied or synchronised, so every pass is safe under graph
// capture. Kernels are queued on `stream`; the returned error is that of the launch.
//
// On top of the CPU core's types: (f32, f16), (f16, f16), (bf16, f32), (f16, f32).
#pragma once

#include <cuda_runtime.h>

#include "pyface/sharpness.h"

namespace pyface::cuda {

// Bytes of scratch that `sharpness_sums` needs, aligned to 8.
std::int64_t sharpness_scratch(const Sharpness& call);

// A sum's bits depend on its tensor alone: neither on the other tensors nor on the number of blocks.
cudaError_t sharpness_sums(const Sharpness& call, void* scratch, cudaStream_t stream);
cudaError_t sharpness_perturb(const Sharpness& call, cudaStream_t stream);
cudaError_t sharpness_restore(const Sharpness& call, cudaStream_t stream);
cudaError_t sharpness_combine(const Sharpness& call, cudaStream_t stream);
cudaError_t sharpness_step(const Sharpness& call, cudaStream_t stream);

}  // namespace pyface::cuda
