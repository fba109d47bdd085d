// Affine coupling and the Haar wavelet on CUDA. Device pointers in, kernels queued on `stream`, nothing allocated,
// nothing synchronised: safe under graph capture. The returned error is that of the launch.
#pragma once

#include <cuda_runtime.h>

#include "pyface/coupling.h"

namespace pyface::cuda {

// Doubles of scratch that coupling_forward needs for its log-det; none is needed when log_det is null.
std::int64_t coupling_scratch(std::int64_t batch, std::int64_t inner);

// The log-det of a sample is a sum in double whose order depends on `inner` alone: it has the same bits in any batch,
// and those of the inverse with the sign flipped. y may be x.
cudaError_t coupling_forward(const CouplingForward& call, double* scratch, cudaStream_t stream);
cudaError_t coupling_backward(const CouplingBackward& call, cudaStream_t stream);
cudaError_t haar(const Haar& call, cudaStream_t stream);

}  // namespace pyface::cuda
