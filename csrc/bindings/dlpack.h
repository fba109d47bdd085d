// Reads address, size, type and order of torch tensors without linking torch: through the C functions that torch.Tensor hands
// out for this (`__dlpack_c_exchange_api__`, DLPack 1.3), some 20 ns a tensor where Python attributes take 500.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "pyface/types.h"

namespace pyface {

// ---- the binary interface of DLPack 1 -----------------------------------------------------------------------------------------

struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLPackExchange {
  std::uint32_t major, minor;
  void* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*view)(void* object, DLTensor* result);  // -1 with a Python error; the view lives as long as the object does
  void* current_stream;
};

// ---- the reader ---------------------------------------------------------------------------------------------------------------

class TensorReader {
 public:
  // capsule: torch.Tensor.__dlpack_c_exchange_api__; plain types of tensors, whose memory is what it seems to be; where that
  // is: 1 on the CPU, 2 on a CUDA device.
  TensorReader(pybind11::object capsule, pybind11::object tensor, pybind11::object parameter, int device_type)
      : tensor_(tensor.ptr()), parameter_(parameter.ptr()), device_type_(device_type) {
    const auto* api = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw pybind11::error_already_set();
    if (api->major != 1 || !api->view) throw pybind11::value_error("another DLPack than version 1");
    view_ = api->view;
  }

  // False where this is no plain tensor on such a device. `view` holds until control returns to Python.
  bool read(PyObject* object, DLTensor* view) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_ && type != parameter_) return false;
    if (view_(object, view) != 0) return PyErr_Clear(), false;
    return view->device_type == device_type_ && view->lanes == 1;
  }

  // False for types the cores do not know.
  static bool type_of(const DLTensor& t, DType* type) {
    constexpr std::uint8_t real = 2, brain = 4;
    if (t.code == real && t.bits == 32) return *type = DType::f32, true;
    if (t.code == real && t.bits == 64) return *type = DType::f64, true;
    if (t.code == real && t.bits == 16) return *type = DType::f16, true;
    if (t.code == brain && t.bits == 16) return *type = DType::bf16, true;
    return false;
  }

  static std::int64_t size_of(const DLTensor& t) {
    std::int64_t size = 1;
    for (int i = 0; i < t.ndim; ++i) size *= t.shape[i];
    return size;
  }

  static void* data_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

  // No gaps, and row by row or any other order of the dimensions.
  static bool is_dense(const DLTensor& t) {
    std::int64_t expected = 1;
    bool taken[kDims] = {};
    if (t.ndim > kDims) return false;
    for (int found = 0; found < t.ndim; ++found) {
      int next = -1;
      for (int i = t.ndim - 1; i >= 0 && next < 0; --i)
        if (!taken[i] && (t.shape[i] == 1 || t.strides[i] == expected)) next = i;
      if (next < 0) return false;
      taken[next] = true, expected *= t.shape[next];
    }
    return true;
  }

  // On one device, and their elements lie in one order.
  static bool same_order(const DLTensor& a, const DLTensor& b) {
    if (a.ndim != b.ndim || a.device_id != b.device_id) return false;
    for (int i = 0; i < a.ndim; ++i)
      if (a.shape[i] != b.shape[i] || (a.shape[i] != 1 && a.strides[i] != b.strides[i])) return false;
    return true;
  }

 private:
  static constexpr int kDims = 16;
  PyObject *tensor_, *parameter_;  // they live as long as torch does
  std::int32_t device_type_;
  int (*view_)(void*, DLTensor*);
};

}  // namespace pyface
