// The instruction sets the CPU cores are compiled for, and how a core declares its entry points for each.
#pragma once

namespace pyface::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best set this machine can run; `avx512` stands for F, BW, DQ and VL together, `avx512_bf16` adds BF16.
inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace pyface::cpu

#if defined(__x86_64__)
#define PYFACE_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16)
#else
#define PYFACE_FOR_EACH_ISA(X) X(baseline)
#endif
