// Python module pyface._cuda: pointers in, nothing else. The op table (pyface/ops) has checked every argument; an error
// of the CUDA runtime becomes a RuntimeError.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/sharpness.h"
#include "cuda/attention.h"
#include "cuda/coupling.h"
#include "cuda/deform_conv.h"
#include "cuda/sharpness.h"
#include "cuda/spectral.h"

#ifndef PYFACE_CUDA_ARCHS
#define PYFACE_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using pyface::Activation;
using pyface::DType;

namespace {

using Address = std::uintptr_t;  // 0 stands for a null pointer

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(error)) + ", " +
                           cudaGetErrorString(error));
}

// Makes `device` current for one call, and gives the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

void coupling_forward(Address x, Address s, Address t, Address y, Address log_det, std::int64_t batch,
                      std::int64_t inner, std::int64_t x_stride, std::int64_t s_stride, std::int64_t t_stride,
                      std::int64_t y_stride, int x_type, int st_type, int activation, double clamp, bool inverse,
                      Address scratch, int device, Address stream) {
  const pyface::CouplingForward call{at(x),
                                     at(s),
                                     at(t),
                                     at(y),
                                     at(log_det),
                                     batch,
                                     inner,
                                     x_stride,
                                     s_stride,
                                     t_stride,
                                     y_stride,
                                     static_cast<DType>(x_type),
                                     static_cast<DType>(st_type),
                                     static_cast<Activation>(activation),
                                     clamp,
                                     inverse};
  const DeviceGuard guard(device);
  check(pyface::cuda::coupling_forward(call, at<double>(scratch), at<CUstream_st>(stream)), "coupling_forward");
}

void coupling_backward(Address grad_out, Address grad_log_det, Address value, Address s, Address t, Address grad_x,
                       Address grad_s, std::int64_t batch, std::int64_t inner, std::int64_t grad_out_stride,
                       std::int64_t value_stride, std::int64_t s_stride, std::int64_t t_stride, int x_type, int st_type,
                       int activation, double clamp, bool inverse, bool from_output, int device, Address stream) {
  const pyface::CouplingBackward call{at(grad_out),
                                      at(grad_log_det),
                                      at(value),
                                      at(s),
                                      at(t),
                                      at(grad_x),
                                      at(grad_s),
                                      batch,
                                      inner,
                                      grad_out_stride,
                                      value_stride,
                                      s_stride,
                                      t_stride,
                                      static_cast<DType>(x_type),
                                      static_cast<DType>(st_type),
                                      static_cast<Activation>(activation),
                                      clamp,
                                      inverse,
                                      from_output};
  const DeviceGuard guard(device);
  check(pyface::cuda::coupling_backward(call, at<CUstream_st>(stream)), "coupling_backward");
}

void haar(Address input, Address output, std::int64_t batch, std::int64_t channels, std::int64_t rows,
          std::int64_t cols, int type, bool inverse, int device, Address stream) {
  const pyface::Haar call{at(input), at(output), batch, channels, rows, cols, static_cast<DType>(type), inverse};
  const DeviceGuard guard(device);
  check(pyface::cuda::haar(call, at<CUstream_st>(stream)), "haar");
}

// (batch, channels, height, width, outs, out height, out width, groups, offset groups), then kernel, stride, padding and
// dilation as (y, x).
using Sizes = std::array<std::int64_t, 9>;
using Geometry = std::array<std::int64_t, 8>;
using Strides = std::array<std::int64_t, 3>;

pyface::DeformConvShape deform_conv_shape(const Sizes& sizes, const Geometry& g) {
  const auto& [n, c, h, w, o, oh, ow, groups, offset_groups] = sizes;
  return {n, c, h, w, o, oh, ow, {g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}, {g[6], g[7]}, groups, offset_groups};
}

pyface::cuda::DeformConvOut tensor(Address data, const Strides& strides) {
  return {at(data), {strides[0], strides[1], strides[2]}};
}

std::int64_t deform_conv_splits(const Sizes& sizes, const Geometry& geometry, int type) {
  return pyface::cuda::deform_conv_splits(deform_conv_shape(sizes, geometry), static_cast<DType>(type));
}

std::int64_t deform_conv_weight_splits(const Sizes& sizes, const Geometry& geometry, int type) {
  return pyface::cuda::deform_conv_weight_splits(deform_conv_shape(sizes, geometry), static_cast<DType>(type));
}

std::int64_t deform_conv_steps(const Sizes& sizes, const Geometry& geometry) {
  return pyface::cuda::deform_conv_steps(deform_conv_shape(sizes, geometry));
}

pyface::cuda::DeformConvCall deform_conv_call(const Sizes& sizes, const Geometry& geometry, Address input, Address offset,
                                              std::int64_t offset_stride, Address mask, std::int64_t mask_stride,
                                              Address weight, int type, int offset_type, bool tf32) {
  return {deform_conv_shape(sizes, geometry), at(input),  at(offset), offset_stride, at(mask), mask_stride,
          at(weight), static_cast<DType>(type), static_cast<DType>(offset_type), tf32};
}

void deform_conv_forward(const Sizes& sizes, const Geometry& geometry, Address input, Address offset,
                         std::int64_t offset_stride, Address mask, std::int64_t mask_stride, Address weight, int type,
                         int offset_type, bool tf32, Address bias, Address out, const Strides& out_strides,
                         Address scratch, int device, Address stream) {
  const auto call = deform_conv_call(sizes, geometry, input, offset, offset_stride, mask, mask_stride, weight, type,
                                     offset_type, tf32);
  const DeviceGuard guard(device);
  check(pyface::cuda::deform_conv_forward(call, at(bias), tensor(out, out_strides), at(scratch), at<CUstream_st>(stream)),
        "deform_conv_forward");
}

void deform_conv_columns(const Sizes& sizes, const Geometry& geometry, Address input, Address offset,
                         std::int64_t offset_stride, Address mask, std::int64_t mask_stride, Address weight, int type,
                         int offset_type, bool tf32, Address grad, const Strides& grad_strides, Address grad_offset,
                         Address grad_mask, Address grad_input, Address columns, std::int64_t first_tap,
                         std::int64_t taps, std::int64_t first_step, std::int64_t last_step, int device,
                         Address stream) {
  const auto call = deform_conv_call(sizes, geometry, input, offset, offset_stride, mask, mask_stride, weight, type,
                                     offset_type, tf32);
  const pyface::cuda::DeformConvColumns wanted{tensor(grad, grad_strides), at(grad_offset), at(grad_mask),
                                               at(grad_input), at(columns), first_tap, taps, first_step, last_step};
  const DeviceGuard guard(device);
  check(pyface::cuda::deform_conv_columns(call, wanted, at<CUstream_st>(stream)), "deform_conv_columns");
}

void deform_conv_gather(const Sizes& sizes, const Geometry& geometry, int type, Address columns, Address rows,
                        Address weights, Address first, Address grad_input, std::int64_t group,
                        std::int64_t first_step, std::int64_t last_step, int device, Address stream) {
  const pyface::cuda::DeformConvGather gather{at(columns), at<std::int64_t>(rows), at(weights), at<std::int64_t>(first),
                                              at(grad_input), group, first_step, last_step};
  const DeviceGuard guard(device);
  check(pyface::cuda::deform_conv_gather(deform_conv_shape(sizes, geometry), static_cast<DType>(type), gather,
                                         at<CUstream_st>(stream)),
        "deform_conv_gather");
}

void deform_conv_weight(const Sizes& sizes, const Geometry& geometry, Address input, Address offset,
                        std::int64_t offset_stride, Address mask, std::int64_t mask_stride, Address weight, int type,
                        int offset_type, bool tf32, Address grad, const Strides& grad_strides, Address grad_weight,
                        Address scratch, int device, Address stream) {
  const auto call = deform_conv_call(sizes, geometry, input, offset, offset_stride, mask, mask_stride, weight, type,
                                     offset_type, tf32);
  const DeviceGuard guard(device);
  check(pyface::cuda::deform_conv_weight(call, tensor(grad, grad_strides), at(grad_weight), at(scratch),
                                         at<CUstream_st>(stream)),
        "deform_conv_weight");
}

// (batch, heads, queries, keys, extra rows, columns of query and key, of value); a tensor is (address, strides of sample,
// head and row).
using AttentionSizes = std::array<std::int64_t, 7>;
using Rows = std::pair<Address, Strides>;

pyface::AttentionTensor rows(const Rows& t) { return {at(t.first), {t.second[0], t.second[1], t.second[2]}}; }

pyface::AttentionCall attention_call(const AttentionSizes& sizes, const std::array<Rows, 6>& tensors, Address bias,
                                     const std::array<std::int64_t, 2>& bias_strides, Address lse, Address prior,
                                     std::int64_t grid_width, double smooth, double scale, int type, int extra_type,
                                     bool causal) {
  const auto& [b, h, l, s, r, e, ev] = sizes;
  const auto& [query, key, value, extra_key, extra_value, out] = tensors;
  return {b,          h,
          l,          s,
          r,          e,
          ev,         rows(query),
          rows(key),  rows(value),
          rows(extra_key), rows(extra_value),
          rows(out),  at(bias),
          {bias_strides[0], bias_strides[1]}, at(lse),
          at(prior),  grid_width,
          smooth,     scale,
          static_cast<DType>(type), static_cast<DType>(extra_type),
          causal};
}

void attention_forward(const AttentionSizes& sizes, const std::array<Rows, 6>& tensors, Address bias,
                       const std::array<std::int64_t, 2>& bias_strides, Address lse, Address prior,
                       std::int64_t grid_width, double smooth, double scale, int type, int extra_type, bool causal,
                       bool tf32, int device, Address stream) {
  const auto call = attention_call(sizes, tensors, bias, bias_strides, lse, prior, grid_width, smooth, scale, type,
                                   extra_type, causal);
  const DeviceGuard guard(device);
  check(pyface::cuda::attention_forward(call, tf32, at<CUstream_st>(stream)), "attention_forward");
}

// Gradients of query, key and value; of extra keys, extra values, bias and prior.
void attention_backward(const AttentionSizes& sizes, const std::array<Rows, 6>& tensors, Address bias,
                        const std::array<std::int64_t, 2>& bias_strides, Address lse, Address prior,
                        std::int64_t grid_width, double smooth, double scale, int type, int extra_type, bool causal,
                        bool tf32, const Rows& grad_out, Address grad_lse, Address delta,
                        const std::array<Rows, 3>& grads, const std::array<Address, 4>& sums, int device, Address stream) {
  const auto call = attention_call(sizes, tensors, bias, bias_strides, lse, prior, grid_width, smooth, scale, type,
                                   extra_type, causal);
  const pyface::AttentionBackward wanted{rows(grad_out), at(grad_lse),  rows(grads[0]), rows(grads[1]), rows(grads[2]),
                                         at(sums[0]),    at(sums[1]),   at(sums[2]),    at(sums[3])};
  const DeviceGuard guard(device);
  check(pyface::cuda::attention_backward(call, wanted, at(delta), tf32, at<CUstream_st>(stream)), "attention_backward");
}

void attention_sum(Address parts, std::int64_t batch, std::int64_t size, int type, Address out, int out_type, int device,
                   Address stream) {
  const DeviceGuard guard(device);
  check(pyface::cuda::attention_sum(at(parts), batch, size, static_cast<DType>(type), at(out),
                                    static_cast<DType>(out_type), at<CUstream_st>(stream)),
        "attention_sum");
}

py::dict build_info() {
  py::dict info;
  info["nvcc"] = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
                 std::to_string(__CUDACC_VER_BUILD__);
  info["runtime"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["archs"] = PYFACE_CUDA_ARCHS;
  return info;
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) return 0;
  check(error, "device_count");
  return count;
}

}  // namespace

// rows, columns: (table, rank, padded); sizes: (outer, inner, height, width, channels)
using AxisTuple = std::tuple<Address, std::int64_t, std::int64_t>;

void spectral(int task, int type, const AxisTuple& rows, const AxisTuple& columns, Address columns_turned, bool edge,
              const std::array<std::int64_t, 5>& sizes, Address x, const Strides& x_stride, Address y, Address keep,
              const Strides& keep_stride, bool keep_is_bool, Address sign, Address scratch, int device, Address stream) {
  const pyface::Spectral call{static_cast<pyface::SpectralTask>(task),
                              static_cast<DType>(type),
                              {at(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)},
                              {at(std::get<0>(columns)), std::get<1>(columns), std::get<2>(columns)},
                              at(columns_turned),
                              edge,
                              sizes[0],
                              sizes[1],
                              sizes[2],
                              sizes[3],
                              sizes[4],
                              at(x),
                              {x_stride[0], x_stride[1], x_stride[2]},
                              at(y),
                              at(keep),
                              {keep_stride[0], keep_stride[1], keep_stride[2]},
                              keep_is_bool,
                              at<std::int8_t>(sign)};
  const DeviceGuard guard(device);
  check(pyface::cuda::spectral(call, at(scratch), at<CUstream_st>(stream)), "spectral");
}

using pyface::SharpnessCall;
using pyface::SharpnessLists;

// Of a weight and its gradient.
bool takes_sharpness_types(DType weight, DType gradient) {
  const bool doubles = weight == DType::f64 || gradient == DType::f64;
  return weight == gradient || (!doubles && (weight == DType::f32 || gradient == DType::f32));
}

std::int64_t sharpness_scratch(const SharpnessLists& lists) {
  return pyface::cuda::sharpness_scratch(SharpnessCall(lists.table).args);
}

void sharpness_sums(const SharpnessLists& lists, Address sums, Address nonfinite, bool adaptive, double eta,
                    Address scratch, int device, Address stream) {
  const SharpnessCall call(lists.table, sums, nonfinite, {}, 0, 0, adaptive, eta);
  const DeviceGuard guard(device);
  check(pyface::cuda::sharpness_sums(call.args, at(scratch), at<CUstream_st>(stream)), "sharpness_sums");
}

void sharpness_perturb(const SharpnessLists& lists, Address sums, Address nonfinite, const std::vector<double>& rho,
                       double eps, double shrink, bool adaptive, double eta, int device, Address stream) {
  const SharpnessCall call(lists.table, sums, nonfinite, rho, eps, shrink, adaptive, eta);
  const DeviceGuard guard(device);
  check(pyface::cuda::sharpness_perturb(call.args, at<CUstream_st>(stream)), "sharpness_perturb");
}

void sharpness_restore(const SharpnessLists& lists, int device, Address stream) {
  const SharpnessCall call(lists.table);
  const DeviceGuard guard(device);
  check(pyface::cuda::sharpness_restore(call.args, at<CUstream_st>(stream)), "sharpness_restore");
}

void sharpness_combine(const SharpnessLists& lists, Address sums, Address nonfinite, int rule, double p0, double p1,
                       bool per_tensor, int device, Address stream) {
  const SharpnessCall call(lists.table, sums, nonfinite, rule, p0, p1, per_tensor);
  const DeviceGuard guard(device);
  check(pyface::cuda::sharpness_combine(call.args, at<CUstream_st>(stream)), "sharpness_combine");
}

void sharpness_step(const SharpnessLists& lists, Address sums, Address nonfinite, int rule, double p0, double p1,
                    bool per_tensor, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                    bool maximize, bool first, int device, Address stream) {
  SharpnessCall call(lists.table, sums, nonfinite, rule, p0, p1, per_tensor);
  call.update(lr, momentum, dampening, weight_decay, nesterov, maximize, first);
  const DeviceGuard guard(device);
  check(pyface::cuda::sharpness_step(call.args, at<CUstream_st>(stream)), "sharpness_step");
}

PYBIND11_MODULE(_cuda, module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  module.doc() = "CUDA cores of pyface. Addresses, sizes and strides in elements; nothing is checked here.";

  module.def("build_info", &build_info, "nvcc and CUDA runtime versions, and the architectures compiled for.");
  module.def("device_count", &device_count, Released(),
             "Number of CUDA devices; RuntimeError with the reason when there is no usable driver.");

  module.def("coupling_scratch", &pyface::cuda::coupling_scratch, py::arg("batch"), py::arg("inner"),
             "Doubles of scratch that coupling_forward needs when log_det is wanted.");
  module.def("coupling_forward", &coupling_forward, Released(), py::arg("x"), py::arg("s"), py::arg("t"), py::arg("y"),
             py::arg("log_det"), py::arg("batch"), py::arg("inner"), py::arg("x_stride"), py::arg("s_stride"),
             py::arg("t_stride"), py::arg("y_stride"), py::arg("x_type"), py::arg("st_type"), py::arg("activation"),
             py::arg("clamp"), py::arg("inverse"), py::arg("scratch"), py::arg("device"), py::arg("stream"));
  module.def("coupling_backward", &coupling_backward, Released(), py::arg("grad_out"), py::arg("grad_log_det"),
             py::arg("value"), py::arg("s"), py::arg("t"), py::arg("grad_x"), py::arg("grad_s"), py::arg("batch"),
             py::arg("inner"), py::arg("grad_out_stride"), py::arg("value_stride"), py::arg("s_stride"),
             py::arg("t_stride"), py::arg("x_type"), py::arg("st_type"), py::arg("activation"), py::arg("clamp"),
             py::arg("inverse"), py::arg("from_output"), py::arg("device"), py::arg("stream"));
  module.def("haar", &haar, Released(), py::arg("input"), py::arg("output"), py::arg("batch"), py::arg("channels"),
             py::arg("rows"), py::arg("cols"), py::arg("type"), py::arg("inverse"), py::arg("device"),
             py::arg("stream"));

  // Positional, in the order of the functions above; csrc/cuda/deform_conv.h says what each does.
  module.def("deform_conv_splits", &deform_conv_splits);
  module.def("deform_conv_weight_splits", &deform_conv_weight_splits);
  module.def("deform_conv_steps", &deform_conv_steps);
  module.def("deform_conv_forward", &deform_conv_forward, Released());
  module.def("deform_conv_columns", &deform_conv_columns, Released());
  module.def("deform_conv_gather", &deform_conv_gather, Released());
  module.def("deform_conv_weight", &deform_conv_weight, Released());

  module.def("attention_forward", &attention_forward, Released());
  module.def("attention_backward", &attention_backward, Released());
  module.def("attention_sum", &attention_sum, Released());
  module.def("spectral", &spectral, Released());
  pyface::define_sharpness_lists(module, takes_sharpness_types);
  module.def("sharpness_scratch", &sharpness_scratch, Released());
  module.def("sharpness_sums", &sharpness_sums, Released());
  module.def("sharpness_perturb", &sharpness_perturb, Released());
  module.def("sharpness_restore", &sharpness_restore, Released());
  module.def("sharpness_combine", &sharpness_combine, Released());
  module.def("sharpness_step", &sharpness_step, Released());
}
