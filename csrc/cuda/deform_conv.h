// Deformable convolution on CUDA (pyface/deform_conv.h has the formulas). Device pointers in, kernels queued on `stream`,
// nothing allocated, nothing synchronised: safe under graph capture. The returned error is that of a launch.
//
// Images are channels_last, [batch, height, width, channels]; weights are [outs, kh, kw, channels / groups]. Sums are
// float32 (f64: float64): the type "Real" of scratch and of everything said to be Real.
#pragma once

#include <cuda_runtime.h>

#include "pyface/deform_conv.h"

namespace pyface::cuda {

struct DeformConvCall {
  DeformConvShape shape;
  const void* input;
  const void* offset;  // [batch, 2 offset_groups K, out_height, out_width], each sample dense
  std::int64_t offset_stride;
  const void* mask;  // [batch, offset_groups K, out_height, out_width], likewise, or null: all ones
  std::int64_t mask_stride;
  const void* weight;
  DType type, offset_type;  // offset and mask: f32 or f64, or `type`
  bool tf32;                // f32 products may round their factors to TF32
};

// A tensor [batch, outs, out_height * out_width] with any strides.
struct DeformConvOut {
  void* data;
  std::int64_t strides[3];
};

// How often the sum of the forward pass (of the weight's gradient) is split, from sizes alone: more than once only for
// few pixels (few weights). Scratch is then splits * batch * out_height * out_width * outs Reals; for the weight's
// gradient it always is splits * outs * kh * kw * channels / groups.
std::int64_t deform_conv_splits(const DeformConvShape& shape, DType type);
std::int64_t deform_conv_weight_splits(const DeformConvShape& shape, DType type);

cudaError_t deform_conv_forward(const DeformConvCall& call, const void* bias, const DeformConvOut& out, void* scratch,
                                cudaStream_t stream);

// What follows from the columns' gradient. A null pointer is not computed.
struct DeformConvColumns {
  DeformConvOut grad;  // of the result; read
  void* grad_offset;   // dense, of offset_type
  void* grad_mask;     // dense, of offset_type
  void* grad_input;    // Real, channels_last, zeroed by the caller: added to by atomics, in no fixed order
  // Real [K, out_height, out_width, (last_step - first_step) * 64]: the masked gradient itself, for a batch of 1
  void* columns;
  // Taps of offset groups, group * K + tap, and steps of 64 channels of an offset group that are walked. All steps:
  // deform_conv_steps.
  std::int64_t first_tap, taps, first_step, last_step;
};

std::int64_t deform_conv_steps(const DeformConvShape& shape);
cudaError_t deform_conv_columns(const DeformConvCall& call, const DeformConvColumns& columns, cudaStream_t stream);

// grad_input (Real, channels_last, of one image) at the channels of those steps of one offset group, from stored columns,
// in a fixed order: for each pixel i the sum over [first[i], first[i + 1]) of weights times the rows `rows` of columns.
struct DeformConvGather {
  const void* columns;
  const std::int64_t* rows;
  const void* weights;  // Real
  const std::int64_t* first;
  void* grad_input;
  std::int64_t group, first_step, last_step;
};

cudaError_t deform_conv_gather(const DeformConvShape& shape, DType type, const DeformConvGather& gather,
                               cudaStream_t stream);

// grad_weight: dense [outs, channels / groups, kh, kw].
cudaError_t deform_conv_weight(const DeformConvCall& call, const DeformConvOut& grad, void* grad_weight, void* scratch,
                               cudaStream_t stream);

}  // namespace pyface::cuda
