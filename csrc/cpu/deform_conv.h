// Entry points of the deformable-convolution core, once per instruction set. Work runs on at most `threads` threads, and
// needs a scratch buffer of as many bytes as the function beside it says, a multiple of 64 and aligned to 64.
#pragma once

#include "cpu/isa.h"
#include "pyface/deform_conv.h"

namespace pyface::cpu {

#define PYFACE_DECLARE(isa)                                                           \
  namespace isa {                                                                     \
  std::int64_t deform_conv_scratch(const DeformConv&, int threads);                   \
  void deform_conv(const DeformConv&, void* scratch, int threads);                    \
  std::int64_t deform_conv_backward_scratch(const DeformConvBackward&, int threads);  \
  void deform_conv_backward(const DeformConvBackward&, void* scratch, int threads);   \
  }
PYFACE_FOR_EACH_ISA(PYFACE_DECLARE)
PYFACE_FOR_AMX(PYFACE_DECLARE)
#undef PYFACE_DECLARE

}  // namespace pyface::cpu
