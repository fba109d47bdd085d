// The arguments of the sharpness core as Python gives them, to both modules.
#pragma once

#include <cstdint>
#include <vector>

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

}  // namespace pyface
