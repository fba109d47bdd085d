// Entry points of the dense-block core, once per instruction set. Work runs on at most `threads` threads, and needs a
// scratch buffer of dense_block_scratch() bytes, a multiple of 64 and aligned to 64.
#pragma once

#include "cpu/isa.h"
#include "pyface/dense_block.h"

namespace pyface::cpu {

#define PYFACE_DECLARE(isa)                                                \
  namespace isa {                                                          \
  std::int64_t dense_block_scratch(const DenseBlock&, int threads);        \
  void dense_block(const DenseBlock&, void* scratch, int threads);         \
  }
PYFACE_FOR_EACH_ISA(PYFACE_DECLARE)
#undef PYFACE_DECLARE

}  // namespace pyface::cpu
