// Element types shared by the CPU and CUDA cores, and the codes by which Python names them.
#pragma once

#include <cstdint>

namespace pyface {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

}  // namespace pyface
