// Attention over S keys and R extra rows on CUDA. Device pointers in, kernels queued on `stream`, nothing allocated,
// nothing synchronised: safe under graph capture. The returned error is that of a launch.
//
//   p_i = softmax over [scale q_i.xk_m + bias_m, m < R; scale q_i.k_j + g_ij, j < S]      o_i = sum of p_i times rows of xv, v
//
// Causal: query i sees key j iff j <= i + S - L; it always sees the extra rows. g is the spatial prior, 0 without one.
// Sums are float32 (f64: float64): the type "Real" of everything said to be Real. All strides are in elements. Python
// has checked every argument before a call (pyface/ops/attention.py); nothing is checked again here.
#pragma once

#include <cuda_runtime.h>

#include "pyface/types.h"

namespace pyface::cuda {

// [batch, heads, rows, columns]: strides of the first three, columns are dense. A stride of 0 shares.
struct AttentionTensor {
  void* data;
  std::int64_t strides[3];
};

struct AttentionCall {
  std::int64_t batch, heads, queries, keys, extras;  // B, H, L, S, R
  std::int64_t depth, width;                         // E of query and key, Ev of value and result
  AttentionTensor query, key, value, extra_key, extra_value;  // read
  AttentionTensor out;                                        // written by forward, read by backward
  const void* bias;                // Real [heads, extras] with any strides, or null: 0
  std::int64_t bias_strides[2];
  void* lse;                       // Real, dense [batch, heads, queries]: log of the sum of exponentials, as `out`;
                                   // forward: or null
  const void* prior;               // Real, dense [batch, heads, queries, 4]: centre x, y and sharpness x, y; or null
  std::int64_t grid_width;         // key j stands at (j % grid_width, j / grid_width)
  double smooth;                   // g = -(sharpness_x (centre_x - x)^2 + sharpness_y (centre_y - y)^2) / smooth
  double scale;
  DType type, extra_type;  // extra_type: `type`, or f32 beside bf16 and f16
  bool causal;
  bool tf32;  // f32 products may round their factors to TF32
};

cudaError_t attention_forward(const AttentionCall& call, cudaStream_t stream);

// What follows from the result's gradient. A null pointer is not computed, and what only it needs is not either.
struct AttentionBackward {
  AttentionTensor grad_out;  // read
  const void* grad_lse;      // Real, dense like lse, or null: 0
  void* delta;               // Real scratch like lse
  AttentionTensor grad_query, grad_key, grad_value;
  void* grad_extra_key;    // Real, dense [batch, heads, extras, depth]: of each sample, for attention_sum to add up
  void* grad_extra_value;  // Real, dense [batch, heads, extras, width]
  void* grad_bias;         // Real, dense [batch, heads, extras]
  void* grad_prior;        // Real, dense like prior
};

cudaError_t attention_backward(const AttentionCall& call, const AttentionBackward& wanted, cudaStream_t stream);

// out[i] = sum over b of parts[b, i], b ascending; parts are Real of `type`, out is of `out_type`.
cudaError_t attention_sum(const void* parts, std::int64_t batch, std::int64_t size, DType type, void* out, DType out_type,
                          cudaStream_t stream);

}  // namespace pyface::cuda
