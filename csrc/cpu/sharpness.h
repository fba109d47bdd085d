// Entry points of the sharpness core, once per instruction set. Work runs on at most `threads` threads. `sums` needs a
// buffer of sharpness_scratch() bytes, a multiple of 64 and aligned to 64.
#pragma once

#include "cpu/isa.h"
#include "pyface/sharpness.h"

namespace pyface::cpu {

#define PYFACE_DECLARE(isa)                                                     \
  namespace isa {                                                               \
  std::int64_t sharpness_scratch(const Sharpness&);                             \
  void sharpness_sums(const Sharpness&, void* scratch, int threads);            \
  void sharpness_perturb(const Sharpness&, int threads);                        \
  void sharpness_restore(const Sharpness&, int threads);                        \
  void sharpness_combine(const Sharpness&, int threads);                        \
  void sharpness_step(const Sharpness&, int threads);                           \
  }
PYFACE_FOR_EACH_ISA(PYFACE_DECLARE)
#undef PYFACE_DECLARE

}  // namespace pyface::cpu
