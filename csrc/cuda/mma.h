// Products of one warp on tensor cores, in the register layouts that PTX fixes, so that a result can be the next product's
// factor without going through memory. Lane 4 g + t holds of
//   c, 16 x 8:          rows g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2 t and 2 t + 1
//   a, 16 x 16 of 2 bytes: rows g, g + 8, g, g + 8, columns from 2 t, 2 t, 2 t + 8, 2 t + 8: pairs
//   b, 16 x 8 of 2 bytes:  column g, rows from 2 t and 2 t + 8: pairs
//   a, 16 x 8 of TF32:  rows g, g + 8, g, g + 8, columns t, t, t + 4, t + 4
//   b, 8 x 8 of TF32:   column g, rows t and t + 4
// Without nvcc the emulation (tests/cuda_emulation) stands in, by the same layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pyface::cuda {

struct Tf32 {};  // a float whose last 13 bits count as 0

#ifdef __CUDACC__
#define PYFACE_MMA(shape, types)                                                                                   \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "      \
               "{%0,%1,%2,%3};"                                                                                    \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

inline __device__ void mma(__nv_bfloat16, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  PYFACE_MMA("m16n8k16", "bf16.bf16");
}
inline __device__ void mma(__half, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  PYFACE_MMA("m16n8k16", "f16.f16");
}
inline __device__ void mma(Tf32, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  PYFACE_MMA("m16n8k8", "tf32.tf32");
}
#undef PYFACE_MMA

// Four 8 x 8 matrices of 2-byte elements from shared memory, each transposed: lane 8 m + r names the 16 aligned bytes of
// row r of matrix m, and lane 4 g + t gets elements (2 t, g) and (2 t + 1, g) of every matrix.
inline __device__ void load_transposed(unsigned (&out)[4], const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}
#else
template <typename T>
inline void mma(T, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulation::mma<T, sizeof(T) == 2>(c, a, b);
}
inline void load_transposed(unsigned (&out)[4], const void* row) { emulation::load_transposed(out, row); }
#endif

// The nearest TF32, ties away from zero as the hardware's own conversion; what is not finite stays as it is.
inline __device__ float to_tf32(float v) {
  std::uint32_t bits;
  static_assert(sizeof bits == sizeof v, "a float has 32 bits");
  memcpy(&bits, &v, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & 0xffffe000u;
  memcpy(&v, &bits, sizeof bits);
  return v;
}

}  // namespace pyface::cuda
