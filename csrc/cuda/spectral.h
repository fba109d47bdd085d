// High-pass filters on CUDA. Device pointers in, kernels queued on `stream`, nothing allocated, nothing synchronised: safe
// under graph capture. The returned error is that of the launch.
#pragma once

#include <cuda_runtime.h>

#include "pyface/spectral.h"

namespace pyface::cuda {

// scratch: planes x rank of rows x (2 x columns of a plane + channels x padded rank of columns) numbers of the arithmetic
// type. Sums have a fixed order: the same bits in any batch. y may be x.
cudaError_t spectral(const Spectral& call, void* scratch, cudaStream_t stream);

}  // namespace pyface::cuda
