// csrc/cuda/attention.cu under the emulation. Arguments come in the order of pyface._cuda, sizes and strides one by one.
#include "cuda/attention.h"

#include "request.h"

using namespace pyface;

namespace {

cuda::AttentionTensor tensor(emulation::Call& in) {
  cuda::AttentionTensor t{};
  t.data = in.pointer();
  for (auto& stride : t.strides) stride = in.integer();
  return t;
}

cuda::AttentionCall arguments(emulation::Call& in) {
  cuda::AttentionCall call{};
  for (auto* size : {&call.batch, &call.heads, &call.queries, &call.keys, &call.extras, &call.depth, &call.width}) {
    *size = in.integer();
  }
  for (auto* t : {&call.query, &call.key, &call.value, &call.extra_key, &call.extra_value, &call.out}) *t = tensor(in);
  call.bias = in.pointer();
  for (auto& stride : call.bias_strides) stride = in.integer();
  call.lse = in.pointer();
  call.prior = in.pointer();
  call.grid_width = in.integer();
  call.smooth = in.real();
  call.scale = in.real();
  call.type = static_cast<DType>(in.integer());
  call.extra_type = static_cast<DType>(in.integer());
  call.causal = in.integer();
  call.tf32 = in.integer();
  return call;
}

cudaError_t backward(emulation::Call& in) {
  const auto call = arguments(in);
  cuda::AttentionBackward wanted{};
  wanted.grad_out = tensor(in);
  wanted.grad_lse = in.pointer();
  wanted.delta = in.pointer();
  for (auto* t : {&wanted.grad_query, &wanted.grad_key, &wanted.grad_value}) *t = tensor(in);
  for (auto* part : {&wanted.grad_extra_key, &wanted.grad_extra_value, &wanted.grad_bias, &wanted.grad_prior}) {
    *part = in.pointer();
  }
  return cuda::attention_backward(call, wanted, in.stream());
}

cudaError_t sum(emulation::Call& in) {
  const void* parts = in.pointer();
  const std::int64_t batch = in.integer(), size = in.integer();
  const auto type = static_cast<DType>(in.integer());
  void* out = in.pointer();
  return cuda::attention_sum(parts, batch, size, type, out, static_cast<DType>(in.integer()), in.stream());
}

}  // namespace

int main(int, char** argv) {
  return emulation::serve(argv, [](emulation::Call& call) {
    switch (call.op()) {
      case 0: return cuda::attention_forward(arguments(call), call.stream());
      case 1: return backward(call);
      default: return sum(call);
    }
  });
}
