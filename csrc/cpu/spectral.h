// Entry points of the spectral core, once per instruction set. Work runs on at most `threads` threads; `scratch` has the bytes
// that spectral_scratch names, aligned to 64.
#pragma once

#include "cpu/isa.h"
#include "pyface/spectral.h"

namespace pyface::cpu {

#define PYFACE_DECLARE(isa)                                          \
  namespace isa {                                                    \
  std::int64_t spectral_scratch(const Spectral&, int threads);       \
  void spectral(const Spectral&, void* scratch, int threads);        \
  }
PYFACE_FOR_EACH_ISA(PYFACE_DECLARE)
#undef PYFACE_DECLARE

}  // namespace pyface::cpu
