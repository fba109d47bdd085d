// A dense block of 3x3 convolutions: what the CPU core is asked to do.
//
//   f_0 = x        f_k = act(conv_k([f_0, ..., f_{k-1}])), k = 1 .. L-1        out = conv_L([f_0, ..., f_{L-1}])
//
// Zero padding 1, stride 1, act = LeakyReLU. All strides are in elements. Python has checked every pointer, size and
// dtype before a call (pyface/ops/dense_block.py); nothing is checked again here.
#pragma once

#include "pyface/types.h"

namespace pyface {

// x comes in parts that follow each other on the channel axis. A part whose batch stride is 0 is shared by all samples.
struct DenseBlockPart {
  const void* data;
  std::int64_t channels;
  std::int64_t strides[4];  // batch, channel, row, column
};

struct DenseBlockLayer {
  const void* weight;  // dense [outs, channels so far, 3, 3]
  const void* bias;    // dense [outs]
  std::int64_t outs;
};

// Sums are float32 always. `compute` is the type of the multiplied numbers: of the features as they are kept, and of x
// and the weights after rounding. Every type is f32 or bf16.
struct DenseBlock {
  const DenseBlockPart* parts;
  const DenseBlockLayer* layers;
  std::int64_t part_count, layer_count;
  void* out;                    // [batch, outs of the last layer, height, width], of x's type
  std::int64_t out_strides[4];  // as those of a part
  std::int64_t batch, height, width;
  DType x_type, weight_type, compute;
  float slope;  // of the LeakyReLU for negative arguments
};

}  // namespace pyface
