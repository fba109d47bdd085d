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

// The lists: weights, saved, xs, ys, momenta.
constexpr int kSharpnessLists = 5;
typedef std::array<PyObject*, kSharpnessLists> SharpnessSequences;

// Writes the table of the lists (None for one that is not there) and has a look at sums and flags (or None); false where
// anything is not as plain as can be. Then Python's checks tell what is wrong, or how it is dealt with. `takes` says whether
// the module has the types of a weight and a gradient.
inline bool read_sharpness_lists(const TensorReader& reader, SharpnessSequences lists, PyObject* sums, PyObject* nonfinite,
                                 bool (*takes)(DType weight, DType gradient), SharpnessTable* table) {
  Py_ssize_t count = -1;
  for (PyObject*& list : lists) {
    if (list == Py_None) {
      list = nullptr;
      continue;
    }
    if (!PyList_CheckExact(list)) return false;
    if (count >= 0 && PyList_GET_SIZE(list) != count) return false;
    count = PyList_GET_SIZE(list);
  }
  if (count <= 0) return false;
  table->resize(count * 8);
  std::int64_t* row = table->data();
  std::int32_t device = 0;
  for (Py_ssize_t p = 0; p < count; ++p, row += 8) {
    DLTensor first{};
    bool begun = false;
    DType weight{}, gradient{};
    bool has_weight = false, has_gradient = false;
    for (int kind = 0; kind < kSharpnessLists; ++kind) {
      row[kind] = 0;
      if (!lists[kind]) continue;
      DLTensor t;
      DType type;
      if (!reader.read(PyList_GET_ITEM(lists[kind], p), &t) || !TensorReader::type_of(t, &type)) return false;
      if (begun ? !TensorReader::same_order(first, t) : !TensorReader::is_dense(t)) return false;
      if (!begun) first = t, begun = true;
      const bool is_gradient = kind == 2 || kind == 3;
      DType& known = is_gradient ? gradient : weight;
      bool& has = is_gradient ? has_gradient : has_weight;
      if (has && known != type) return false;
      known = type, has = true;
      row[kind] = reinterpret_cast<std::int64_t>(TensorReader::data_of(t));
    }
    if (p == 0) device = first.device_id;
    if (first.device_id != device) return false;
    if (!has_weight) weight = gradient;
    if (!has_gradient) gradient = weight;
    if (!takes(weight, gradient)) return false;
    row[5] = TensorReader::size_of(first), row[6] = static_cast<int>(weight), row[7] = static_cast<int>(gradient);
  }
  DType type;
  if (sums != Py_None) {
    DLTensor values;
    if (!reader.read(sums, &values) || !TensorReader::type_of(values, &type) || type != DType::f64 ||
        values.device_id != device || values.ndim != 2 || values.shape[0] != count + 1 || values.shape[1] != 3 ||
        values.strides[1] != 1 || values.strides[0] != 3)
      return false;
  }
  if (nonfinite != Py_None) {
    DLTensor flags;
    if (!reader.read(nonfinite, &flags) || !TensorReader::type_of(flags, &type) || type != DType::f32 ||
        flags.device_id != device || flags.ndim != 1 || flags.shape[0] != 2 || flags.strides[0] != 1)
      return false;
  }
  return true;
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
             [takes](const TensorReader& reader, const std::array<py::object, kSharpnessLists>& lists, py::object sums,
                     py::object nonfinite) -> py::object {
               SharpnessSequences sequences;
               for (int kind = 0; kind < kSharpnessLists; ++kind) sequences[kind] = lists[kind].ptr();
               SharpnessLists result;
               if (!read_sharpness_lists(reader, sequences, sums.ptr(), nonfinite.ptr(), takes, &result.table))
                 return py::none();
               return py::cast(std::move(result));
             });
}

}  // namespace pyface
