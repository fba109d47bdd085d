// The instruction sets the CPU cores are compiled for, and how a core declares its entry points for each. A core that makes
// use of AMX declares those for `amx` too.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyface::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// Whether there are AMX tiles for bf16 and the system lets this process use them, which it must be asked for.
inline bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  constexpr long kAskFor = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM; the state asked for
  return (d & kTiles) == kTiles && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}

// The best set for this machine; `avx512` stands for F, BW, DQ and VL together, `avx512_bf16` adds BF16, `amx` tiles. Where the
// system refuses the tiles to an Intel processor, its dot products of bf16 are no substitute: a Sapphire Rapids takes two
// cycles for one, in which it multiplies twice as much in float32.
inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512bf16") ? Isa::avx512
           : may_use_amx()                       ? Isa::amx
           : __builtin_cpu_is("intel")           ? Isa::avx512
                                                 : Isa::avx512_bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

#if defined(__x86_64__)
// What has no variant of its own for AMX.
namespace avx512_bf16 {}
namespace amx {
using namespace avx512_bf16;
}
#endif

}  // namespace pyface::cpu

#if defined(__x86_64__)
#define PYFACE_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16)
#define PYFACE_FOR_AMX(X) X(amx)
#else
#define PYFACE_FOR_EACH_ISA(X) X(baseline)
#define PYFACE_FOR_AMX(X)
#endif
