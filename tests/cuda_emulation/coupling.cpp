// csrc/cuda/coupling.cu under the emulation. Arguments come in the order of pyface._cuda.
#include "cuda/coupling.h"

#include "request.h"

using namespace pyface;

namespace {

cudaError_t forward(emulation::Call& in) {
  CouplingForward call{};
  call.x = in.pointer();
  call.s = in.pointer();
  call.t = in.pointer();
  call.y = in.pointer();
  call.log_det = in.pointer();
  for (auto* field : {&call.batch, &call.inner, &call.x_stride, &call.s_stride, &call.t_stride, &call.y_stride}) {
    *field = in.integer();
  }
  call.x_type = static_cast<DType>(in.integer());
  call.st_type = static_cast<DType>(in.integer());
  call.activation = static_cast<Activation>(in.integer());
  call.clamp = in.real();
  call.inverse = in.integer();
  // The caller of the real core brings scratch of just this size.
  const std::unique_ptr<double[]> scratch(call.log_det ? new double[cuda::coupling_scratch(call.batch, call.inner)]
                                                       : nullptr);
  return cuda::coupling_forward(call, scratch.get(), in.stream());
}

cudaError_t backward(emulation::Call& in) {
  CouplingBackward call{};
  call.grad_out = in.pointer();
  call.grad_log_det = in.pointer();
  call.value = in.pointer();
  call.s = in.pointer();
  call.t = in.pointer();
  call.grad_x = in.pointer();
  call.grad_s = in.pointer();
  for (auto* field :
       {&call.batch, &call.inner, &call.grad_out_stride, &call.value_stride, &call.s_stride, &call.t_stride}) {
    *field = in.integer();
  }
  call.x_type = static_cast<DType>(in.integer());
  call.st_type = static_cast<DType>(in.integer());
  call.activation = static_cast<Activation>(in.integer());
  call.clamp = in.real();
  call.inverse = in.integer();
  call.from_output = in.integer();
  return cuda::coupling_backward(call, in.stream());
}

cudaError_t haar(emulation::Call& in) {
  Haar call{};
  call.in = in.pointer();
  call.out = in.pointer();
  for (auto* field : {&call.batch, &call.channels, &call.rows, &call.cols}) *field = in.integer();
  call.type = static_cast<DType>(in.integer());
  call.inverse = in.integer();
  return cuda::haar(call, in.stream());
}

}  // namespace

int main(int, char** argv) {
  return emulation::serve(argv, [](emulation::Call& call) {
    switch (call.op()) {
      case 0: return forward(call);
      case 1: return backward(call);
      default: return haar(call);
    }
  });
}
