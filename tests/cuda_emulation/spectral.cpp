// csrc/cuda/spectral.cu under the emulation. Arguments come in the order of pyface._cuda.
#include "cuda/spectral.h"

#include "request.h"

using namespace pyface;

int main(int, char** argv) {
  return emulation::serve(argv, [](emulation::Call& in) {
    Spectral call{};
    call.task = static_cast<SpectralTask>(in.integer());
    call.type = static_cast<DType>(in.integer());
    for (auto* axis : {&call.rows, &call.columns}) {
      axis->table = in.pointer();
      axis->rank = in.integer();
      axis->padded = in.integer();
    }
    call.edge = in.integer();
    for (auto* field : {&call.outer, &call.inner, &call.height, &call.width, &call.channels}) *field = in.integer();
    call.x = in.pointer();
    for (auto& stride : call.x_stride) stride = in.integer();
    call.y = in.pointer();
    call.keep = in.pointer();
    for (auto& stride : call.keep_stride) stride = in.integer();
    call.keep_is_bool = in.integer();
    call.sign = in.pointer<std::int8_t>();
    void* scratch = in.pointer();
    return cuda::spectral(call, scratch, in.stream());
  });
}
