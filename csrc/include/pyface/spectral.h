// High-pass filters that remove a rectangle of low frequencies: what the CPU and the CUDA core are asked to do.
//
// A rectangle of frequencies is a product of few cosines and sines along each axis. With U the matrix of those of one axis,
//   low(x) = U_y fix(U_y^T x U_x) U_x^T        high(x) = x - low(x)
// and U has rank 1 + 2 harmonics. Python makes the tables in double and casts them once to the arithmetic type, which is double
// for f64 images and float for all others. It has checked every pointer, size and dtype before a call (pyface/ops/spectral.py);
// nothing is checked again here.
#pragma once

#include "pyface/types.h"

namespace pyface {

enum class SpectralTask : int {
  high_pass = 0,      // y = high(x)
  mask = 1,           // y = x - (1 - keep) |high(x)|, and sign = sign(high(x)) where it is wanted
  mask_backward = 2,  // y = x - high(m x) with m = (1 - keep) sign
};

// Columns of U at every position t of an axis of n: 1/sqrt(n), then cosine and sine of harmonic 1, 2, ..., scaled so that
// U U^T is the filter of that axis. `rank` is 1 + 2 harmonics; or 0: nothing is low.
struct SpectralAxis {
  const void* table;  // rows: [n/2 + 1][rank], the rest follows by symmetry; columns: [n][padded], zeros beyond rank
  std::int64_t rank, padded;
};

// planes = outer x inner images of height x width, interleaved by `channels` (1, or C of a channels_last image): element
// (h, w, c) of a plane is at h * row stride + w * channels + c. y and sign are dense; x and keep have strides in elements,
// 0 where they repeat. `keep` is bytes 0 and 1 when keep_is_bool, else numbers of the arithmetic type.
struct Spectral {
  SpectralTask task;
  DType type;
  SpectralAxis rows, columns;
  const void* columns_turned;  // the column table as [rank][width rounded up to 16]
  bool edge;  // both axes have a last harmonic without a mirror image (the block -d..d-1)
  std::int64_t outer, inner, height, width, channels;
  const void* x;
  std::int64_t x_stride[3];  // outer, inner, row
  void* y;
  const void* keep;
  std::int64_t keep_stride[3];
  bool keep_is_bool;
  std::int8_t* sign;
};

}  // namespace pyface
