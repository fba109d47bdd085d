// Affine coupling and the Haar wavelet: what the CPU and the CUDA core are asked to do.
//
// A tensor is `batch` samples of `inner` elements. The elements of one sample are dense in one order that all tensors of a
// call share (NCHW or channels_last: an element-wise core need not know which); the distance between samples is free, so that
// log_scale and shift may be the two halves of one sub-net output. All strides are in elements. Python has checked every
// pointer, size and dtype before a call (pyface/ops/coupling.py); nothing is checked again here.
#pragma once

#include "pyface/types.h"

namespace pyface {

// l(s), the clamped log-scale. c is `clamp` > 0 (0 makes l vanish); `none` ignores it.
enum class Activation : int {
  none = 0,     // l = s
  sigmoid = 1,  // l = c tanh(s / 2) = 2c (sigmoid(s) - 1/2)
  tanh = 2,     // l = c tanh(s)
  atan = 3,     // l = 0.636 c atan(s)      (0.636 is FrEIA's literal)
};

// forward: y = x exp(l) + t, log_det[b] = +sum l        inverse: y = (x - t) exp(-l), log_det[b] = -sum l
// Type pairs (x and y, s and t): (f32, f32), (f64, f64), (bf16, bf16), (f16, f16), (f32, bf16), (f32, f16).
// log_det is f64 for f64 tensors and f32 otherwise, [batch]; null when not wanted.
struct CouplingForward {
  const void* x;
  const void* s;
  const void* t;
  void* y;
  void* log_det;
  std::int64_t batch, inner;
  std::int64_t x_stride, s_stride, t_stride, y_stride;
  DType x_type, st_type;
  Activation activation;
  double clamp;
  bool inverse;
};

// Gradients of the above. `grad_out` is dL/dy, `grad_log_det` (null: zero) is dL/dlog_det, f32 or f64 like log_det.
//   forward op:              grad_x = g e         grad_s = (g x e + lam) l'
//   forward op, from output: grad_x = g e         grad_s = (g (y - t) + lam) l'      (`value` holds y, `t` is given)
//   inverse op:              grad_x = g / e       grad_s = -(g x_out + lam) l'       (`value` holds the op's own output)
// The gradient of t is g, or -grad_x for the inverse: Python's business, no kernel writes it.
// grad_x and grad_s are null when not wanted. grad_x has x's type, grad_s has s's type; both are written dense.
struct CouplingBackward {
  const void* grad_out;
  const void* grad_log_det;
  const void* value;  // x of the forward op; its y when from_output; the output of the inverse op
  const void* s;
  const void* t;  // only read when from_output
  void* grad_x;
  void* grad_s;
  std::int64_t batch, inner;
  std::int64_t grad_out_stride, value_stride, s_stride, t_stride;
  DType x_type, st_type;
  Activation activation;
  double clamp;
  bool inverse;
  bool from_output;
};

// Orthonormal Haar transform, sub-band major (out channel = band x channels + channel, bands LL, HL, LH, HH):
//   LL = (a+b+c+d)/2   HL = (-a+b-c+d)/2   LH = (-a-b+c+d)/2   HH = (a-b-c+d)/2
// with a, b, c, d the (even,even), (even,odd), (odd,even), (odd,odd) pixel. The image is dense [batch, channels, 2 rows, 2 cols],
// the bands dense [batch, 4 channels, rows, cols]; forward reads the image, the inverse reads the bands.
struct Haar {
  const void* in;
  void* out;
  std::int64_t batch, channels, rows, cols;  // channels of the image; rows, cols of one sub-band
  DType type;
  bool inverse;
};

}  // namespace pyface
