// Attention over S keys and R extra rows on CUDA (pyface/attention.h has the formulas). Device pointers in, kernels queued
// on `stream`, nothing allocated, nothing synchronised: safe under graph capture. The returned error is that of a launch.
// `tf32`: f32 products may round their factors to TF32.
#pragma once

#include <cuda_runtime.h>

#include "pyface/attention.h"

namespace pyface::cuda {

cudaError_t attention_forward(const AttentionCall& call, bool tf32, cudaStream_t stream);

// `delta`: Real scratch, as large as lse.
cudaError_t attention_backward(const AttentionCall& call, const AttentionBackward& wanted, void* delta, bool tf32,
                               cudaStream_t stream);

// out[i] = sum over b of parts[b, i], b ascending; parts are Real of `type`, out is of `out_type`.
cudaError_t attention_sum(const void* parts, std::int64_t batch, std::int64_t size, DType type, void* out, DType out_type,
                          cudaStream_t stream);

}  // namespace pyface::cuda
