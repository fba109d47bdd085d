// Entry points of the attention core, once per instruction set. Work runs on at most `threads` threads; `scratch` has as many
// bytes as the function of that name says, aligned to 64.
#pragma once

#include "cpu/isa.h"
#include "pyface/attention.h"

namespace pyface::cpu {

#define PYFACE_DECLARE(isa)                                                                                \
  namespace isa {                                                                                          \
  std::int64_t attention_scratch(const AttentionCall&, int threads);                                       \
  void attention(const AttentionCall&, void* scratch, int threads);                                        \
  std::int64_t attention_backward_scratch(const AttentionCall&, int threads);                              \
  void attention_backward(const AttentionCall&, const AttentionBackward&, void* scratch, int threads);     \
  void attention_sum(const void* parts, std::int64_t batch, std::int64_t size, DType type, void* out,      \
                     DType out_type, int threads);                                                         \
  }
PYFACE_FOR_EACH_ISA(PYFACE_DECLARE)
PYFACE_FOR_AMX(PYFACE_DECLARE)
#undef PYFACE_DECLARE

}  // namespace pyface::cpu
