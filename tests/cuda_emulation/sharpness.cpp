// csrc/cuda/sharpness.cu under the emulation. Arguments come in the order of pyface._cuda, the table first.
#include "cuda/sharpness.h"

#include "request.h"

using namespace pyface;

int main(int, char** argv) {
  return emulation::serve(argv, [](emulation::Call& in) {
    Sharpness call{};
    call.count = in.integer();
    std::vector<SharpnessTensor> tensors(call.count);
    for (SharpnessTensor& t : tensors) {
      for (void** address : {&t.weight, &t.saved, &t.x, &t.y, &t.momentum}) *address = in.pointer();
      t.size = in.integer();
      t.weight_type = static_cast<DType>(in.integer());
      t.grad_type = static_cast<DType>(in.integer());
    }
    call.tensors = tensors.data();
    if (in.op() == 2) return cuda::sharpness_restore(call, in.stream());
    call.sums = in.pointer<double>();
    call.nonfinite = in.pointer<float>();
    std::vector<double> rho;
    if (in.op() == 1) {
      for (std::int64_t p = 0; p < call.count; ++p) rho.push_back(in.real());
      call.rho = rho.data();
      for (double* field : {&call.eps, &call.shrink}) *field = in.real();
    }
    if (in.op() <= 1) {
      call.adaptive = in.integer();
      call.eta = in.real();
      if (in.op() == 1) return cuda::sharpness_perturb(call, in.stream());
      const std::int64_t bytes = in.integer();
      if (cuda::sharpness_scratch(call) > bytes) emulation::fail("scratch of %ld bytes is too small", long(bytes));
      return cuda::sharpness_sums(call, in.pointer(), in.stream());
    }
    call.rule = static_cast<SharpnessRule>(in.integer());
    for (double* field : {&call.p0, &call.p1}) *field = in.real();
    call.per_tensor = in.integer();
    if (in.op() == 3) return cuda::sharpness_combine(call, in.stream());
    for (double* field : {&call.lr, &call.momentum, &call.dampening, &call.weight_decay}) *field = in.real();
    for (bool* field : {&call.nesterov, &call.maximize, &call.first}) *field = in.integer();
    return cuda::sharpness_step(call, in.stream());
  });
}
