// __half for the emulated CUDA: the compiler's own half type does the rounding.
#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }
inline float to_float(__half v) { return __half2float(v); }
