// Python module pyface._cpu: pointers in, nothing else. The op table (pyface/ops) has checked every argument.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/coupling.h"

namespace py = pybind11;
using namespace pyface;

namespace {

typedef std::uintptr_t Address;  // 0 is a null pointer

const void* in(Address a) { return reinterpret_cast<const void*>(a); }
void* out(Address a) { return reinterpret_cast<void*>(a); }

const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};

// The instruction set in use: the best this machine has, until Python narrows it (PYFACE_CPU_ISA, tests).
cpu::Isa current_isa = cpu::best_isa();

#if defined(__x86_64__)
#define PYFACE_CALL(function, ...)                                                  \
  do {                                                                              \
    py::gil_scoped_release unlocked;                                                \
    switch (current_isa) {                                                          \
      case cpu::Isa::avx512: cpu::avx512::function(__VA_ARGS__); break;             \
      case cpu::Isa::avx2: cpu::avx2::function(__VA_ARGS__); break;                 \
      default: cpu::baseline::function(__VA_ARGS__);                                \
    }                                                                               \
  } while (0)
#else
#define PYFACE_CALL(function, ...)                  \
  do {                                              \
    py::gil_scoped_release unlocked;                \
    cpu::baseline::function(__VA_ARGS__);           \
  } while (0)
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

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i)
    if (name == kIsaNames[i]) {
      current_isa = static_cast<cpu::Isa>(i);
      return;
    }
  throw py::value_error("instruction set '" + name + "' is unknown or not to be had on this machine");
}

py::list isas() {
  py::list names;
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i) names.append(kIsaNames[i]);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU cores of pyface: plain functions on addresses, sizes and strides";
  m.def("coupling_forward", &coupling_forward);
  m.def("coupling_backward", &coupling_backward);
  m.def("haar", &haar);
  m.def("isa", [] { return kIsaNames[static_cast<int>(current_isa)]; }, "The instruction set in use");
  m.def("isas", &isas, "Every instruction set this machine can run, best last");
  m.def("set_isa", &set_isa, "Use another instruction set than the best one");
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
