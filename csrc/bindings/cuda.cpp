// Python module pyface._cuda: pointers in, nothing else. The op table (pyface/ops) has checked every argument; an error
// of the CUDA runtime becomes a RuntimeError.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/coupling.h"

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
}
