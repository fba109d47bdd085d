// csrc/cuda/deform_conv.cu under the emulation. Arguments come in the order of pyface._cuda, sizes and strides one by one.
#include "cuda/deform_conv.h"

#include "request.h"

using namespace pyface;

namespace {

DeformConvShape shape(emulation::Call& in) {
  DeformConvShape s{};
  for (auto* field : {&s.batch, &s.channels, &s.height, &s.width, &s.outs, &s.out_height, &s.out_width, &s.groups,
                      &s.offset_groups}) {
    *field = in.integer();
  }
  for (auto* pair : {&s.kernel, &s.stride, &s.padding, &s.dilation}) {
    for (auto& field : *pair) field = in.integer();
  }
  return s;
}

cuda::DeformConvCall arguments(emulation::Call& in) {
  cuda::DeformConvCall call{};
  call.shape = shape(in);
  call.input = in.pointer();
  call.offset = in.pointer();
  call.offset_stride = in.integer();
  call.mask = in.pointer();
  call.mask_stride = in.integer();
  call.weight = in.pointer();
  call.type = static_cast<DType>(in.integer());
  call.offset_type = static_cast<DType>(in.integer());
  call.tf32 = in.integer();
  return call;
}

cuda::DeformConvOut tensor(emulation::Call& in) {
  cuda::DeformConvOut out{};
  out.data = in.pointer();
  for (auto& stride : out.strides) stride = in.integer();
  return out;
}

cudaError_t forward(emulation::Call& in) {
  const auto call = arguments(in);
  const void* bias = in.pointer();
  const auto out = tensor(in);
  return cuda::deform_conv_forward(call, bias, out, in.pointer(), in.stream());
}

cudaError_t columns(emulation::Call& in) {
  const auto call = arguments(in);
  cuda::DeformConvColumns wanted{};
  wanted.grad = tensor(in);
  wanted.grad_offset = in.pointer();
  wanted.grad_mask = in.pointer();
  wanted.grad_input = in.pointer();
  wanted.columns = in.pointer();
  for (auto* field : {&wanted.first_tap, &wanted.taps, &wanted.first_step, &wanted.last_step}) *field = in.integer();
  return cuda::deform_conv_columns(call, wanted, in.stream());
}

cudaError_t gather(emulation::Call& in) {
  const auto sizes = shape(in);
  const auto type = static_cast<DType>(in.integer());
  cuda::DeformConvGather call{};
  call.columns = in.pointer();
  call.rows = in.pointer<std::int64_t>();
  call.weights = in.pointer();
  call.first = in.pointer<std::int64_t>();
  call.grad_input = in.pointer();
  for (auto* field : {&call.group, &call.first_step, &call.last_step}) *field = in.integer();
  return cuda::deform_conv_gather(sizes, type, call, in.stream());
}

cudaError_t weight(emulation::Call& in) {
  const auto call = arguments(in);
  const auto grad = tensor(in);
  void* grad_weight = in.pointer();
  return cuda::deform_conv_weight(call, grad, grad_weight, in.pointer(), in.stream());
}

// Numbers that Python asks for come back in a buffer.
cudaError_t numbers(emulation::Call& in) {
  const auto sizes = shape(in);
  const auto type = static_cast<DType>(in.integer());
  auto* out = in.pointer<std::int64_t>();
  out[0] = cuda::deform_conv_splits(sizes, type);
  out[1] = cuda::deform_conv_weight_splits(sizes, type);
  out[2] = cuda::deform_conv_steps(sizes);
  return cudaSuccess;
}

}  // namespace

int main(int, char** argv) {
  return emulation::serve(argv, [](emulation::Call& call) {
    switch (call.op()) {
      case 0: return forward(call);
      case 1: return columns(call);
      case 2: return gather(call);
      case 3: return weight(call);
      default: return numbers(call);
    }
  });
}
