// __nv_bfloat16 for the emulated CUDA: the upper half of a float, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const std::uint32_t wide = std::uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  std::uint32_t wide;
  std::memcpy(&wide, &v, sizeof wide);
  if ((wide & 0x7fffffff) > 0x7f800000) return {0x7fff};  // NaN: rounding its bits could carry into infinity
  return {static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
