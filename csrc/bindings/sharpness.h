// The arguments of the sharpness core as Python gives them, to both modules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "pyface/sharpness.h"

namespace pyface {

// (weight, saved, x, y, momentum, size, weight type, gradient type) of each tensor, one after the other.
typedef std::vector<std::int64_t> SharpnessTable;

struct SharpnessCall {
  typedef std::uintptr_t Address;

  std::vector<SharpnessTensor> tensors;
  Sharpness args{};

  explicit SharpnessCall(const SharpnessTable& table, Address sums = 0, Address nonfinite = 0) {
    constexpr std::size_t columns = 8;
    const auto at = [](std::int64_t address) { return reinterpret_cast<void*>(address); };
    tensors.reserve(table.size() / columns);
    for (auto t = table.data(), end = t + table.size(); t != end; t += columns)
      tensors.push_back({at(t[0]), at(t[1]), at(t[2]), at(t[3]), at(t[4]), t[5], static_cast<DType>(t[6]),
                         static_cast<DType>(t[7])});
    args.tensors = tensors.data();
    args.count = static_cast<std::int64_t>(tensors.size());
    args.sums = reinterpret_cast<double*>(sums);
    args.nonfinite = reinterpret_cast<float*>(nonfinite);
  }

  // Of sums (without rho) and ascent. `rho` must outlive this.
  SharpnessCall(const SharpnessTable& table, Address sums, Address nonfinite, const std::vector<double>& rho, double eps,
                double shrink, bool adaptive, double eta)
      : SharpnessCall(table, sums, nonfinite) {
    args.rho = rho.empty() ? nullptr : rho.data(), args.eps = eps, args.shrink = shrink;
    args.adaptive = adaptive, args.eta = eta;
  }

  // Of a rule.
  SharpnessCall(const SharpnessTable& table, Address sums, Address nonfinite, int rule, double p0, double p1,
                bool per_tensor)
      : SharpnessCall(table, sums, nonfinite) {
    args.rule = static_cast<SharpnessRule>(rule), args.p0 = p0, args.p1 = p1;
    args.per_tensor = per_tensor;
  }

  void update(double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
              bool first) {
    args.lr = lr, args.momentum = momentum, args.dampening = dampening, args.weight_decay = weight_decay;
    args.nesterov = nesterov, args.maximize = maximize, args.first = first;
  }

  SharpnessCall(const SharpnessCall&) = delete;
  SharpnessCall& operator=(const SharpnessCall&) = delete;
};

// Kept by Python from the reading of a list of tensors to the call; then they may be gone.
struct SharpnessLists {
  SharpnessTable table;
};

// The table of the lists (weights, saved, xs, ys, momenta; None for one that is not there), and a look at the sums; None where
// anything is not as plain as can be. Then Python's checks tell what is wrong, or how it is dealt with. `takes` says whether
// the module has the types of a weight and a gradient.
inline pybind11::object read_sharpness_lists(const TensorReader& reader, const std::array<pybind11::object, 5>& lists,
                                             pybind11::object sums, pybind11::object nonfinite,
                                             bool (*takes)(DType weight, DType gradient)) {
  constexpr int kinds = 5;
  PyObject* sequences[kinds] = {};
  Py_ssize_t count = -1;
  for (int kind = 0; kind < kinds; ++kind) {
    if (lists[kind].is_none()) continue;
    sequences[kind] = lists[kind].ptr();
    if (!PyList_CheckExact(sequences[kind])) return pybind11::none();
    if (count >= 0 && PyList_GET_SIZE(sequences[kind]) != count) return pybind11::none();
    count = PyList_GET_SIZE(sequences[kind]);
  }
  if (count <= 0) return pybind11::none();
  SharpnessLists result;
  result.table.reserve(count * 8);
  std::int32_t device = 0;
  for (Py_ssize_t p = 0; p < count; ++p) {
    DLTensor first{};
    bool begun = false;
    DType weight{}, gradient{};
    bool has_weight = false, has_gradient = false;
    std::int64_t row[8] = {};
    for (int kind = 0; kind < kinds; ++kind) {
      if (!sequences[kind]) continue;
      DLTensor t;
      DType type;
      if (!reader.read(PyList_GET_ITEM(sequences[kind], p), &t) || !TensorReader::type_of(t, &type)) return pybind11::none();
      if (begun ? !TensorReader::same_order(first, t) : !TensorReader::is_dense(t)) return pybind11::none();
      if (!begun) first = t, begun = true;
      const bool is_gradient = kind == 2 || kind == 3;
      DType& known = is_gradient ? gradient : weight;
      bool& has = is_gradient ? has_gradient : has_weight;
      if (has && known != type) return pybind11::none();
      known = type, has = true;
      row[kind] = reinterpret_cast<std::int64_t>(TensorReader::data_of(t));
    }
    if (p == 0) device = first.device_id;
    if (first.device_id != device) return pybind11::none();
    if (!has_weight) weight = gradient;
    if (!has_gradient) gradient = weight;
    if (!takes(weight, gradient)) return pybind11::none();
    row[5] = TensorReader::size_of(first), row[6] = static_cast<int>(weight), row[7] = static_cast<int>(gradient);
    result.table.insert(result.table.end(), row, row + 8);
  }
  if (!sums.is_none()) {
    DLTensor values, flags;
    DType type;
    if (!reader.read(sums.ptr(), &values) || !TensorReader::type_of(values, &type) || type != DType::f64 ||
        values.device_id != device || values.ndim != 2 || values.shape[0] != count + 1 || values.shape[1] != 3 ||
        values.strides[1] != 1 || values.strides[0] != 3)
      return pybind11::none();
    if (!reader.read(nonfinite.ptr(), &flags) || !TensorReader::type_of(flags, &type) || type != DType::f32 ||
        flags.device_id != device || flags.ndim != 1 || flags.shape[0] != 2 || flags.strides[0] != 1)
      return pybind11::none();
  }
  return pybind11::cast(std::move(result));
}

// Defines TensorReader, SharpnessLists and read_sharpness_lists in a module, for itself alone: the other has its own.
inline void define_sharpness_lists(pybind11::module_& module, bool (*takes)(DType weight, DType gradient)) {
  namespace py = pybind11;
  py::class_<TensorReader>(module, "TensorReader", py::module_local())
      .def(py::init<py::object, py::object, py::object, int>());
  py::class_<SharpnessLists>(module, "SharpnessLists", py::module_local())
      .def(py::init([](SharpnessTable table) { return SharpnessLists{std::move(table)}; }))
      .def_readonly("table", &SharpnessLists::table);
  module.def("read_sharpness_lists",
             [takes](const TensorReader& reader, const std::array<py::object, 5>& lists, py::object sums,
                     py::object nonfinite) { return read_sharpness_lists(reader, lists, sums, nonfinite, takes); });
}

}  // namespace pyface
