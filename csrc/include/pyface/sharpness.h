// Sharpness-aware gradient work over a list of tensors: what a core is asked to do.
//
// Tensor p has a weight w, a saved copy of it, a first gradient y (at w), a second gradient x (at the perturbed weight) and
// a momentum buffer m, all `size` elements in one dense order. Python has checked every pointer, size and dtype
// (pyface/ops/sharpness.py); nothing is checked again here. Definitions: pyface/ops/reference/sharpness.py.
#pragma once

#include <cmath>

#include "pyface/types.h"

#if defined(__CUDACC__)
#define PYFACE_ANYWHERE __host__ __device__
#else
#define PYFACE_ANYWHERE
#endif

namespace pyface {

// Types of (weight, saved, m) and of (x, y): (f32, f32), (f32, bf16), (bf16, bf16), (f64, f64). Pointers a pass does not
// use are null.
struct SharpnessTensor {
  void* weight;
  void* saved;
  void* x;
  void* y;
  void* momentum;
  std::int64_t size;
  DType weight_type, grad_type;
};

// How G = u x + v y follows from a = <x, x>, b = <y, y>, k = <x, y>.
enum class SharpnessRule : int {
  second = 0,       // x
  mix = 1,          // p0 x + (1 - p0) y
  gsam = 2,         // x - p0 (y - (k / a) x)
  gsam_first = 3,   // y + p0 (x - (k / b) y)
  constrained = 4,  // by c = k / sqrt(a b): x where c >= p1, y where c <= p0, else the projection of x on x + y
  surgery = 5,      // x - (k / b) y where k < 0, else x
  given = 6,        // the first two "sums" are u and v
};

struct Sharpness {
  const SharpnessTensor* tensors;
  std::int64_t count;
  double* sums;      // [count + 1][3]: a, b, k of each tensor, then of all
  float* nonfinite;  // [2]: 1 where an x, a y is not finite; in an adaptive norm also for a weight, as y's
  SharpnessRule rule;
  double p0, p1;
  bool per_tensor;    // the rule looks at one tensor, or at all
  const double* rho;  // [count]
  double eps;
  double shrink;  // taken off the factor of y in the ascent
  bool adaptive;  // y is multiplied by (|w| + eta) in the norm, by its square in the ascent
  double eta;
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, first;  // first: the momentum buffers hold nothing yet
};

struct SharpnessPair {
  double u, v;
};

// u and v of tensor p. Static: a copy in each instruction set.
PYFACE_ANYWHERE static inline SharpnessPair sharpness_pair(const Sharpness& s, std::int64_t p) {
  const double* sums = s.sums + 3 * (s.per_tensor ? p : s.count);
  const double a = sums[0], b = sums[1], k = sums[2];
  if (s.rule == SharpnessRule::given) return {a, b};
  if (s.rule == SharpnessRule::mix) return {s.p0, 1 - s.p0};
  if (s.rule == SharpnessRule::second || a == 0 || b == 0) return {1, 0};
  if (s.rule == SharpnessRule::gsam) return {1 + s.p0 * k / a, -s.p0};
  if (s.rule == SharpnessRule::gsam_first) return {s.p0, 1 - s.p0 * k / b};
  if (s.rule == SharpnessRule::surgery) return {1, k < 0 ? -k / b : 0};
  const double c = k / (std::sqrt(a) * std::sqrt(b)), z = a + 2 * k + b;
  if (c >= s.p1) return {1, 0};
  if (c <= s.p0 || z <= 1e-14 * (a + b)) return {0, 1};
  return {(a + k) / z, (a + k) / z};
}

}  // namespace pyface
