// Entry points of the coupling core, once per instruction set. Work runs on at most `threads` threads.
#pragma once

#include "cpu/isa.h"
#include "pyface/coupling.h"

namespace pyface::cpu {

#define PYFACE_DECLARE(isa)                                   \
  namespace isa {                                             \
  void coupling_forward(const CouplingForward&, int threads); \
  void coupling_backward(const CouplingBackward&, int threads); \
  void haar(const Haar&, int threads);                        \
  }
PYFACE_FOR_EACH_ISA(PYFACE_DECLARE)
#undef PYFACE_DECLARE

}  // namespace pyface::cpu
