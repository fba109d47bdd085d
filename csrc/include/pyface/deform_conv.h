// Deformable convolution: what the CPU core is asked to do.
//
//   py = oy sh - ph + i dh + offset[n, 2 (G K + k), oy, ox]        px likewise from the channel after it
//   out[n, o, oy, ox] = bias[o] + sum over c, k of weight[o, c, k] mask[n, G K + k, oy, ox] S(n, c, py, px)
//
// where k = i kw + j is the tap, K = kh kw, G the offset group of channel c, and S the bilinear interpolation of the input
// with zeros outside the image. A position that is not inside (-1, height) x (-1, width), be it NaN, reads nothing.
//
// All strides are in elements. Python has checked every pointer, size and dtype before a call (pyface/ops/deform_conv.py);
// nothing is checked again here.
#pragma once

#include "pyface/types.h"

namespace pyface {

struct DeformConvShape {
  std::int64_t batch, channels, height, width;
  std::int64_t outs, out_height, out_width;
  std::int64_t kernel[2], stride[2], padding[2], dilation[2];  // y, x
  std::int64_t groups;         // of the weight: each has channels / groups inputs and outs / groups outputs
  std::int64_t offset_groups;  // each has channels / offset_groups inputs
};

// Every type is f32, f64 or bf16: `type` that of input, weight, bias and result, `offset_type` that of offset and mask,
// which is the same or, beside bf16, f32. Sums are float32 (f64: float64).
struct DeformConv {
  DeformConvShape shape;
  const void* input;  // any strides
  std::int64_t input_strides[4];  // batch, channel, row, column
  const void* offset;  // [batch, 2 offset_groups K, out_height, out_width], each sample dense
  std::int64_t offset_stride;  // of the batch
  const void* mask;  // [batch, offset_groups K, out_height, out_width], likewise, or null: all ones
  std::int64_t mask_stride;
  const void* weight;  // dense [outs, channels / groups, kh, kw]
  const void* bias;    // dense [outs], or null
  void* out;           // dense [batch, outs, out_height, out_width], or the same in channels_last order
  bool out_channels_last;
  DType type, offset_type;
};

// Gradients from that of the result. Those of which the pointer is null are not computed.
struct DeformConvBackward {
  DeformConvShape shape;
  const void* grad_out;  // dense [batch, outs, out_height, out_width]
  const void* input;     // as above
  std::int64_t input_strides[4];
  const void* offset;
  std::int64_t offset_stride;
  const void* mask;
  std::int64_t mask_stride;
  const void* weight;
  void* grad_input;  // [batch, channels, height, width], dense or dense channels_last
  bool grad_input_channels_last;
  void* grad_offset;  // dense, of offset_type
  void* grad_mask;    // dense, of offset_type
  void* grad_weight;  // dense
  DType type, offset_type;
};

}  // namespace pyface
