// Python module pyface._cpu: pointers in, nothing else. The op table (pyface/ops) has checked every argument.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/sharpness.h"
#include "cpu/attention.h"
#include "cpu/coupling.h"
#include "cpu/deform_conv.h"
#include "cpu/dense_block.h"
#include "cpu/spectral.h"
#include "cpu/sharpness.h"

namespace py = pybind11;
using namespace pyface;

namespace {

typedef std::uintptr_t Address;  // 0 is a null pointer

const void* in(Address a) { return reinterpret_cast<const void*>(a); }
void* out(Address a) { return reinterpret_cast<void*>(a); }

const char* const kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

// The instruction set in use: the best this machine has, until Python narrows it (PYFACE_CPU_ISA, tests).
cpu::Isa current_isa = cpu::best_isa();

#if defined(__x86_64__)
#define PYFACE_CALL(function, ...)                                                        \
  [&] {                                                                                   \
    py::gil_scoped_release unlocked;                                                      \
    switch (current_isa) {                                                                \
      case cpu::Isa::amx: return cpu::amx::function(__VA_ARGS__);                         \
      case cpu::Isa::avx512_bf16: return cpu::avx512_bf16::function(__VA_ARGS__);         \
      case cpu::Isa::avx512: return cpu::avx512::function(__VA_ARGS__);                   \
      case cpu::Isa::avx2: return cpu::avx2::function(__VA_ARGS__);                       \
      default: return cpu::baseline::function(__VA_ARGS__);                               \
    }                                                                                     \
  }()
#else
#define PYFACE_CALL(function, ...)                  \
  [&] {                                             \
    py::gil_scoped_release unlocked;                \
    return cpu::baseline::function(__VA_ARGS__);    \
  }()
#endif

void coupling_forward(Address x, Address s, Address t, Address y, Address log_det, std::int64_t batch, std::int64_t inner,
                      std::int64_t x_stride, std::int64_t s_stride, std::int64_t t_stride, std::int64_t y_stride, int x_type,
                      int st_type, int activation, double clamp, bool inverse, int threads) {
  const CouplingForward args{in(x),    in(s),    in(t),    out(y),           out(log_det),    batch,
                             inner,    x_stride, s_stride, t_stride,         y_stride,        static_cast<DType>(x_type),
                             static_cast<DType>(st_type),  static_cast<Activation>(activation), clamp, inverse};
  PYFACE_CALL(coupling_forward, args, threads);
}

void coupling_backward(Address grad_out, Address grad_log_det, Address value, Address s, Address t, Address grad_x,
                       Address grad_s, std::int64_t batch, std::int64_t inner, std::int64_t grad_out_stride,
                       std::int64_t value_stride, std::int64_t s_stride, std::int64_t t_stride, int x_type, int st_type,
                       int activation, double clamp, bool inverse, bool from_output, int threads) {
  const CouplingBackward args{in(grad_out),    in(grad_log_det), in(value), in(s),    in(t),
                              out(grad_x),     out(grad_s),      batch,     inner,    grad_out_stride,
                              value_stride,    s_stride,         t_stride,  static_cast<DType>(x_type),
                              static_cast<DType>(st_type),       static_cast<Activation>(activation),
                              clamp,           inverse,          from_output};
  PYFACE_CALL(coupling_backward, args, threads);
}

void haar(Address input, Address output, std::int64_t batch, std::int64_t channels, std::int64_t rows, std::int64_t cols,
          int type, bool inverse, int threads) {
  const Haar args{in(input), out(output), batch, channels, rows, cols, static_cast<DType>(type), inverse};
  PYFACE_CALL(haar, args, threads);
}

// A buffer of the last call, kept for the next one: fresh pages cost up to a third of the time of the work done in them.
// The spare one is touched with the GIL held only, and a call that runs meanwhile has its own.
struct WorkBuffer {
  static constexpr std::int64_t kKept = 256 << 20;  // bytes; a larger one is freed at once
  std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
  std::int64_t bytes = 0;

  static WorkBuffer& spare() {
    static WorkBuffer buffer;
    return buffer;
  }
  static WorkBuffer take(std::int64_t bytes) {  // a multiple of 64
    WorkBuffer buffer = std::move(spare());
    if (!buffer.data || buffer.bytes < bytes) {
      buffer.data.reset();  // first, so that the two need not fit together
      buffer.data.reset(std::aligned_alloc(64, bytes));
      buffer.bytes = bytes;
    }
    return buffer;
  }
  static void give_back(WorkBuffer buffer) {
    if (buffer.bytes <= kKept && (!spare().data || spare().bytes < buffer.bytes)) spare() = std::move(buffer);
  }
};

// Calls work(scratch) with a buffer of `bytes`, a multiple of 64.
template <class Work>
void with_scratch(const char* name, std::int64_t bytes, Work work) {
  WorkBuffer buffer = WorkBuffer::take(bytes);
  if (!buffer.data) {
    const std::string what = std::string(name) + ": no memory for a work buffer of " + std::to_string(bytes) + " bytes";
    py::set_error(PyExc_MemoryError, what.c_str());
    throw py::error_already_set();
  }
  work(buffer.data.get());
  WorkBuffer::give_back(std::move(buffer));
}

// parts: (address, channels, batch stride, channel stride, row stride, column stride); layers: (weight, bias, outputs).
typedef std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t> PartTuple;
typedef std::tuple<Address, Address, std::int64_t> LayerTuple;

void dense_block(const std::vector<PartTuple>& parts, const std::vector<LayerTuple>& layers, Address result,
                 const std::array<std::int64_t, 4>& strides, std::int64_t batch, std::int64_t height,
                 std::int64_t width, int x_type, int weight_type, int compute, float slope, int threads) {
  std::vector<DenseBlockPart> part_list;
  for (const auto& [data, channels, b, c, h, w] : parts) part_list.push_back({in(data), channels, {b, c, h, w}});
  std::vector<DenseBlockLayer> layer_list;
  for (const auto& [weight, bias, outs] : layers) layer_list.push_back({in(weight), in(bias), outs});
  const DenseBlock args{part_list.data(),
                        layer_list.data(),
                        static_cast<std::int64_t>(part_list.size()),
                        static_cast<std::int64_t>(layer_list.size()),
                        out(result),
                        {strides[0], strides[1], strides[2], strides[3]},
                        batch,
                        height,
                        width,
                        static_cast<DType>(x_type),
                        static_cast<DType>(weight_type),
                        static_cast<DType>(compute),
                        slope};
  const std::int64_t bytes = PYFACE_CALL(dense_block_scratch, args, threads);
  with_scratch("dense_block", bytes, [&](void* scratch) { PYFACE_CALL(dense_block, args, scratch, threads); });
}

// (batch, channels, height, width, outs, out height, out width, groups, offset groups), then kernel, stride, padding and
// dilation as (y, x).
DeformConvShape deform_conv_shape(const std::array<std::int64_t, 9>& sizes, const std::array<std::int64_t, 8>& geometry) {
  const auto& [n, c, h, w, o, oh, ow, groups, offset_groups] = sizes;
  const auto& g = geometry;
  return {n, c, h, w, o, oh, ow, {g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}, {g[6], g[7]}, groups, offset_groups};
}

typedef std::array<std::int64_t, 4> Strides;

void deform_conv(const std::array<std::int64_t, 9>& sizes, const std::array<std::int64_t, 8>& geometry, Address input,
                 const Strides& strides, Address offset, std::int64_t offset_stride, Address mask, std::int64_t mask_stride,
                 Address weight, Address bias, Address result, bool channels_last, int type, int offset_type, int threads) {
  const DeformConv args{deform_conv_shape(sizes, geometry),
                        in(input),
                        {strides[0], strides[1], strides[2], strides[3]},
                        in(offset),
                        offset_stride,
                        in(mask),
                        mask_stride,
                        in(weight),
                        in(bias),
                        out(result),
                        channels_last,
                        static_cast<DType>(type),
                        static_cast<DType>(offset_type)};
  const std::int64_t bytes = PYFACE_CALL(deform_conv_scratch, args, threads);
  with_scratch("deform_conv2d", bytes, [&](void* scratch) { PYFACE_CALL(deform_conv, args, scratch, threads); });
}

void deform_conv_backward(const std::array<std::int64_t, 9>& sizes, const std::array<std::int64_t, 8>& geometry,
                          Address grad_out, Address input, const Strides& strides, Address offset,
                          std::int64_t offset_stride, Address mask, std::int64_t mask_stride, Address weight,
                          Address grad_input, bool channels_last, Address grad_offset, Address grad_mask,
                          Address grad_weight, int type, int offset_type, int threads) {
  const DeformConvBackward args{deform_conv_shape(sizes, geometry),
                                in(grad_out),
                                in(input),
                                {strides[0], strides[1], strides[2], strides[3]},
                                in(offset),
                                offset_stride,
                                in(mask),
                                mask_stride,
                                in(weight),
                                out(grad_input),
                                channels_last,
                                out(grad_offset),
                                out(grad_mask),
                                out(grad_weight),
                                static_cast<DType>(type),
                                static_cast<DType>(offset_type)};
  const std::int64_t bytes = PYFACE_CALL(deform_conv_backward_scratch, args, threads);
  with_scratch("deform_conv2d_backward", bytes,
               [&](void* scratch) { PYFACE_CALL(deform_conv_backward, args, scratch, threads); });
}

// Of a weight and its gradient.
bool takes_sharpness_types(DType weight, DType gradient) {
  return weight == gradient || (weight == DType::f32 && gradient != DType::f64);
}

void sharpness_sums(const SharpnessLists& lists, Address sums, Address nonfinite, bool adaptive, double eta, int threads) {
  const SharpnessCall call(lists.table, sums, nonfinite, {}, 0, 0, adaptive, eta);
  const std::int64_t bytes = PYFACE_CALL(sharpness_scratch, call.args);
  with_scratch("sharpness", bytes, [&](void* scratch) { PYFACE_CALL(sharpness_sums, call.args, scratch, threads); });
}

void sharpness_perturb(const SharpnessLists& lists, Address sums, Address nonfinite, const std::vector<double>& rho,
                       double eps, double shrink, bool adaptive, double eta, int threads) {
  const SharpnessCall call(lists.table, sums, nonfinite, rho, eps, shrink, adaptive, eta);
  PYFACE_CALL(sharpness_perturb, call.args, threads);
}

void sharpness_restore(const SharpnessLists& lists, int threads) {
  const SharpnessCall call(lists.table);
  PYFACE_CALL(sharpness_restore, call.args, threads);
}

void sharpness_combine(const SharpnessLists& lists, Address sums, Address nonfinite, int rule, double p0, double p1,
                       bool per_tensor, int threads) {
  const SharpnessCall call(lists.table, sums, nonfinite, rule, p0, p1, per_tensor);
  PYFACE_CALL(sharpness_combine, call.args, threads);
}

void sharpness_step(const SharpnessLists& lists, Address sums, Address nonfinite, int rule, double p0, double p1,
                    bool per_tensor, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                    bool maximize, bool first, int threads) {
  SharpnessCall call(lists.table, sums, nonfinite, rule, p0, p1, per_tensor);
  call.update(lr, momentum, dampening, weight_decay, nesterov, maximize, first);
  PYFACE_CALL(sharpness_step, call.args, threads);
}

// Reading plain lists and a pass over them in one call without pybind11, for lists of a few or of small tensors. The arguments:
// reader, a function that bumps the versions of a list of tensors, threads, the pass, five lists (or None), sums and flags (or
// None), whether the sums are taken before the pass (2: what is not finite is added to the flags), a tuple with the pass's own
// arguments. True if that was done, False if anything is not plain.
enum SharpnessPass : long { kSums, kPerturb, kRestore, kCombine, kStep };

PyObject* sharpness_run(PyObject*, PyObject* const* given, Py_ssize_t) try {
  const auto number = [](PyObject* o) { return PyFloat_AsDouble(o); };
  const auto integer = [](PyObject* o) { return PyLong_AsLong(o); };
  const auto data = [](PyObject* o, const TensorReader& reader) -> Address {
    DLTensor t{};
    return o != Py_None && reader.read(o, &t) ? reinterpret_cast<Address>(TensorReader::data_of(t)) : 0;
  };
  const auto& reader = py::handle(given[0]).cast<const TensorReader&>();
  PyObject* const increment = given[1];
  const int threads = static_cast<int>(integer(given[2]));
  const long pass = integer(given[3]), takes = integer(given[11]);
  PyObject *const *lists = given + 4, *sums = given[9], *nonfinite = given[10];
  if (!PyTuple_Check(given[12])) throw py::type_error("a tuple is expected");
  PyObject** const own = &PyTuple_GET_ITEM(given[12], 0);
  const Py_ssize_t count = PyTuple_GET_SIZE(given[12]);
  constexpr Py_ssize_t counts[] = {2, 5, 0, 4, 11};
  if (PyErr_Occurred()) return nullptr;
  if (pass < kSums || pass > kStep || count != counts[pass]) throw py::value_error("no such pass");

  SharpnessTable table;
  if (!read_sharpness_lists(reader, {lists[0], lists[1], lists[2], lists[3], lists[4]}, sums, nonfinite,
                            takes_sharpness_types, &table))
    Py_RETURN_FALSE;
  SharpnessCall call(table, data(sums, reader), data(nonfinite, reader));
  std::vector<double> rho;
  Sharpness& args = call.args;
  if (pass == kSums) {
    args.adaptive = integer(own[0]) != 0, args.eta = number(own[1]);
  } else if (pass == kPerturb) {
    if (!PyList_Check(own[0]) || PyList_GET_SIZE(own[0]) != args.count) throw py::value_error("a rho for each tensor");
    rho.resize(args.count);
    for (std::int64_t p = 0; p < args.count; ++p) rho[p] = number(PyList_GET_ITEM(own[0], p));
    args.rho = rho.data(), args.eps = number(own[1]), args.shrink = number(own[2]);
    args.adaptive = integer(own[3]) != 0, args.eta = number(own[4]);
  } else if (pass != kRestore) {
    args.rule = static_cast<SharpnessRule>(integer(own[0])), args.p0 = number(own[1]), args.p1 = number(own[2]);
    args.per_tensor = integer(own[3]) != 0;
    if (pass == kStep)
      call.update(number(own[4]), number(own[5]), number(own[6]), number(own[7]), integer(own[8]) != 0,
                  integer(own[9]) != 0, integer(own[10]) != 0);
  }
  if (PyErr_Occurred()) return nullptr;

  if (takes) {
    const std::int64_t bytes = PYFACE_CALL(sharpness_scratch, args);
    const float earlier[] = {args.nonfinite[0], args.nonfinite[1]};
    with_scratch("sharpness", bytes, [&](void* scratch) { PYFACE_CALL(sharpness_sums, args, scratch, threads); });
    for (int i = 0; i < 2; ++i)
      if (takes == 2 && earlier[i] != 0) args.nonfinite[i] = earlier[i];
  }
  if (pass == kPerturb) PYFACE_CALL(sharpness_perturb, args, threads);
  if (pass == kRestore) PYFACE_CALL(sharpness_restore, args, threads);
  if (pass == kCombine) PYFACE_CALL(sharpness_combine, args, threads);
  if (pass == kStep) PYFACE_CALL(sharpness_step, args, threads);

  const bool written[] = {pass != kSums && pass != kCombine, pass == kPerturb, pass == kCombine, false, pass == kStep};
  for (int kind = 0; kind < kSharpnessLists; ++kind) {
    if (!written[kind] || lists[kind] == Py_None) continue;
    PyObject* const none = PyObject_CallOneArg(increment, lists[kind]);
    if (!none) return nullptr;
    Py_DECREF(none);
  }
  Py_RETURN_TRUE;
} catch (py::error_already_set& error) {
  return error.restore(), nullptr;
} catch (const std::exception& error) {
  return PyErr_SetString(PyExc_ValueError, error.what()), nullptr;
}

// By way of the type that may be cast to any other: Python knows by the flag what it really calls.
PyMethodDef sharpness_run_method = {
    "sharpness_run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(sharpness_run)), METH_FASTCALL, nullptr};

// (address, batch stride, head stride, row stride)
typedef std::tuple<Address, std::int64_t, std::int64_t, std::int64_t> RowsTuple;

AttentionTensor rows(const RowsTuple& t) {
  const auto& [data, batch, head, row] = t;
  return {out(data), {batch, head, row}};
}

// (batch, heads, queries, keys, extras, depth, width); tensors: query, key, value, extra key, extra value, result.
AttentionCall attention_call(const std::array<std::int64_t, 7>& sizes, const std::array<RowsTuple, 6>& tensors, Address bias,
                             const std::array<std::int64_t, 2>& bias_strides, Address lse, Address prior,
                             std::int64_t grid_width, double smooth, double scale, int type, int extra_type, bool causal) {
  const auto& [batch, heads, queries, keys, extras, depth, width] = sizes;
  return {batch, heads, queries, keys, extras, depth, width, rows(tensors[0]), rows(tensors[1]), rows(tensors[2]),
          rows(tensors[3]), rows(tensors[4]), rows(tensors[5]), in(bias), {bias_strides[0], bias_strides[1]}, out(lse),
          in(prior), grid_width, smooth, scale, static_cast<DType>(type), static_cast<DType>(extra_type), causal};
}

void attention(const std::array<std::int64_t, 7>& sizes, const std::array<RowsTuple, 6>& tensors, Address bias,
               const std::array<std::int64_t, 2>& bias_strides, Address lse, Address prior, std::int64_t grid_width,
               double smooth, double scale, int type, int extra_type, bool causal, int threads) {
  const AttentionCall args = attention_call(sizes, tensors, bias, bias_strides, lse, prior, grid_width, smooth, scale, type,
                                            extra_type, causal);
  const std::int64_t bytes = PYFACE_CALL(attention_scratch, args, threads);
  with_scratch("attention", bytes, [&](void* scratch) { PYFACE_CALL(attention, args, scratch, threads); });
}

// grads: of the result (read), then of query, key and value; a null address is not computed.
void attention_backward(const std::array<std::int64_t, 7>& sizes, const std::array<RowsTuple, 6>& tensors, Address bias,
                        const std::array<std::int64_t, 2>& bias_strides, Address lse, Address prior,
                        std::int64_t grid_width, double smooth, double scale, int type, int extra_type, bool causal,
                        const std::array<RowsTuple, 4>& grads, Address grad_lse, Address grad_extra_key,
                        Address grad_extra_value, Address grad_bias, Address grad_prior, int threads) {
  const AttentionCall args = attention_call(sizes, tensors, bias, bias_strides, lse, prior, grid_width, smooth, scale, type,
                                            extra_type, causal);
  const AttentionBackward wanted{rows(grads[0]),      in(grad_lse),          rows(grads[1]),  rows(grads[2]), rows(grads[3]),
                                 out(grad_extra_key), out(grad_extra_value), out(grad_bias), out(grad_prior)};
  const std::int64_t bytes = PYFACE_CALL(attention_backward_scratch, args, threads);
  with_scratch("attention_backward", bytes,
               [&](void* scratch) { PYFACE_CALL(attention_backward, args, wanted, scratch, threads); });
}

void attention_sum(Address parts, std::int64_t batch, std::int64_t size, int type, Address result, int result_type,
                   int threads) {
  PYFACE_CALL(attention_sum, in(parts), batch, size, static_cast<DType>(type), out(result), static_cast<DType>(result_type),
              threads);
}

// rows, columns: (table, rank, padded); sizes: (outer, inner, height, width, channels)
typedef std::tuple<Address, std::int64_t, std::int64_t> AxisTuple;
typedef std::array<std::int64_t, 3> PlaneStrides;

void spectral(int task, int type, const AxisTuple& rows, const AxisTuple& columns, Address columns_turned, bool edge,
              const std::array<std::int64_t, 5>& sizes, Address x, const PlaneStrides& x_stride, Address y, Address keep,
              const PlaneStrides& keep_stride, bool keep_is_bool, Address sign, int threads) {
  const Spectral args{static_cast<SpectralTask>(task),
                      static_cast<DType>(type),
                      {in(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)},
                      {in(std::get<0>(columns)), std::get<1>(columns), std::get<2>(columns)},
                      in(columns_turned),
                      edge,
                      sizes[0],
                      sizes[1],
                      sizes[2],
                      sizes[3],
                      sizes[4],
                      in(x),
                      {x_stride[0], x_stride[1], x_stride[2]},
                      out(y),
                      in(keep),
                      {keep_stride[0], keep_stride[1], keep_stride[2]},
                      keep_is_bool,
                      static_cast<std::int8_t*>(out(sign))};
  const std::int64_t bytes = PYFACE_CALL(spectral_scratch, args, threads);
  with_scratch("spectral", bytes, [&](void* scratch) { PYFACE_CALL(spectral, args, scratch, threads); });
}

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i)
    if (name == kIsaNames[i]) {
      current_isa = static_cast<cpu::Isa>(i);
      return;
    }
  throw py::value_error("instruction set '" + name + "' is unknown or does not serve this machine");
}

py::list isas() {
  py::list names;
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i) names.append(kIsaNames[i]);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU cores of pyface: plain functions on addresses, sizes and strides";
  m.def("attention", &attention);
  m.def("attention_backward", &attention_backward);
  m.def("attention_sum", &attention_sum);
  m.def("coupling_forward", &coupling_forward);
  m.def("coupling_backward", &coupling_backward);
  m.def("haar", &haar);
  m.def("dense_block", &dense_block);
  m.def("deform_conv", &deform_conv);
  m.def("deform_conv_backward", &deform_conv_backward);
  m.def("spectral", &spectral);
  define_sharpness_lists(m, takes_sharpness_types);
  m.attr("sharpness_run") = py::reinterpret_steal<py::object>(PyCFunction_New(&sharpness_run_method, nullptr));
  m.def("sharpness_sums", &sharpness_sums);
  m.def("sharpness_perturb", &sharpness_perturb);
  m.def("sharpness_restore", &sharpness_restore);
  m.def("sharpness_combine", &sharpness_combine);
  m.def("sharpness_step", &sharpness_step);
  m.def("isa", [] { return kIsaNames[static_cast<int>(current_isa)]; }, "The instruction set in use");
  m.def("isas", &isas, "Every instruction set that serves this machine, best last");
  m.def("set_isa", &set_isa, "Use another instruction set than the best one");
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
