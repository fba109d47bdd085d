// csrc/cpu/sharpness.cpp on its own, for the sanitizers: random lists, some tensors empty, every buffer exactly as large as it
// must be, scratch and results full of NaN before, every pass against plain loops in double. Prints "ok" or the first failed
// case.
#include "cpu/sharpness.h"

#include "sanitized.h"

using namespace pyface;
namespace core = pyface::cpu::PYFACE_ISA;

namespace {

struct Record {
  Array w, saved, x, y, m;
  Record(DType weight, DType gradient, long size)
      : w(weight, size), saved(weight, size), x(gradient, size), y(gradient, size), m(weight, size) {}
};

std::vector<double> numbers(const Array& a) {
  std::vector<double> all(a.size);
  for (long i = 0; i < a.size; ++i) all[i] = a.get(i);
  return all;
}

bool close(const char* pass, long number, const Array& found, const std::vector<double>& expected) {
  const double allowed = found.type == DType::f64 ? 1e-13 : found.type == DType::f32 ? 1e-5 : 1e-2;
  for (long i = 0; i < found.size; ++i)
    if (!(std::fabs(found.get(i) - expected[i]) <= allowed * (1 + std::fabs(expected[i])))) {
      std::printf("case %ld: %s, element %ld of %ld: %g instead of %g\n", number, pass, i, found.size, found.get(i), expected[i]);
      return false;
    }
  return true;
}

bool same(const char* pass, long number, const Array& a, const Array& b) {
  if (std::memcmp(a.data.get(), b.data.get(), a.size * a.width()) == 0) return true;
  std::printf("case %ld: %s changed bits\n", number, pass);
  return false;
}

bool check(long number) {
  const DType types[][2] = {
      {DType::f32, DType::f32}, {DType::f32, DType::bf16}, {DType::bf16, DType::bf16},
      {DType::f64, DType::f64}, {DType::f32, DType::f16},  {DType::f16, DType::f16}};
  const long count = pick(1, 5);
  const int threads = (int)pick(1, 3);
  std::vector<Record> records;
  for (long p = 0; p < count; ++p) {
    const auto& pair = types[pick(0, 5)];
    records.emplace_back(pair[0], pair[1], pick(0, 9) ? pick(0, 200) : pick(32760, 32800) * pick(1, 2));
    Record& r = records.back();
    for (Array* a : {&r.w, &r.x, &r.y, &r.m}) a->fill();
  }
  std::vector<SharpnessTensor> tensors;
  for (Record& r : records)
    tensors.push_back({r.w.data.get(), r.saved.data.get(), nullptr, r.y.data.get(), nullptr, r.w.size, r.w.type, r.x.type});
  std::unique_ptr<double[]> sums(new double[3 * (count + 1)]), rho(new double[count]);
  std::unique_ptr<float[]> nonfinite(new float[2]);
  for (long p = 0; p < count; ++p) rho[p] = 0.1 * (double)pick(0, 5);
  Sharpness s{};
  s.tensors = tensors.data(), s.count = count, s.sums = sums.get(), s.nonfinite = nonfinite.get();
  s.rho = rho.get(), s.eps = 1e-12, s.shrink = 0.01 * (double)pick(0, 1), s.adaptive = pick(0, 1), s.eta = 0.01;

  const auto take_sums = [&](const char* pass, bool dots) {
    const std::int64_t need = core::sharpness_scratch(s);
    std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, need), &std::free);
    std::memset(scratch.get(), 0xff, need);
    std::memset(sums.get(), 0xff, 3 * (count + 1) * sizeof(double));
    core::sharpness_sums(s, scratch.get(), threads);
    double all[3] = {}, scale = 1;
    for (long p = 0; p <= count; ++p) {
      double exact[3] = {};
      if (p == count) std::memcpy(exact, all, sizeof all);
      for (long i = 0; p < count && i < records[p].y.size; ++i) {
        const double stretch = !dots && s.adaptive ? std::fabs(records[p].w.get(i)) + s.eta : 1;
        const double y = records[p].y.get(i) * stretch, x = dots ? records[p].x.get(i) : 0;
        exact[0] += x * x, exact[1] += y * y, exact[2] += x * y;
      }
      for (int i = 0; i < 3; ++i) all[i] += p < count ? exact[i] : 0;
      scale += exact[0] + exact[1];
      for (int i = 0; i < 3; ++i)
        if (!(std::fabs(sums[3 * p + i] - exact[i]) <= 1e-12 * scale)) {
          std::printf("case %ld: %s, sum %d of tensor %ld: %g instead of %g\n", number, pass, i, p, sums[3 * p + i], exact[i]);
          return false;
        }
    }
    return true;
  };

  // ascent, and back
  if (!take_sums("norm", false) || nonfinite[0] != 0 || nonfinite[1] != 0) return false;
  std::vector<Array> old;
  for (Record& r : records) {
    old.emplace_back(r.w.type, r.w.size);
    if (r.w.size) std::memcpy(old.back().data.get(), r.w.data.get(), r.w.size * r.w.width());
  }
  core::sharpness_perturb(s, threads);
  const double b = sums[3 * count + 1];
  for (long p = 0; p < count; ++p) {
    const Record& r = records[p];
    std::vector<double> expected = numbers(old[p]);
    for (long i = 0; i < r.w.size; ++i) {
      const double stretch = s.adaptive ? std::fabs(expected[i]) + s.eta : 1;
      if (b > 0) expected[i] += (rho[p] / (std::sqrt(b) + s.eps) - s.shrink) * stretch * stretch * r.y.get(i);
    }
    if (!close("ascent", number, r.w, expected) || !same("saving", number, r.saved, old[p])) return false;
  }
  core::sharpness_restore(s, threads);
  for (long p = 0; p < count; ++p)
    if (!same("restoring", number, records[p].w, old[p])) return false;

  // rules and update
  const bool with_momentum = pick(0, 1);
  for (long p = 0; p < count; ++p) {
    tensors[p].x = records[p].x.data.get();
    if (with_momentum) tensors[p].momentum = records[p].m.data.get();
  }
  s.rule = static_cast<SharpnessRule>(pick(0, 5)), s.p0 = 0.1 * (double)pick(-5, 5), s.p1 = s.p0 + 0.1;
  s.per_tensor = pick(0, 1), s.lr = 0.1, s.momentum = with_momentum ? 0.9 : 0, s.dampening = 0.1 * (double)pick(0, 1);
  s.weight_decay = 0.01, s.nesterov = pick(0, 1), s.maximize = pick(0, 1), s.first = with_momentum && pick(0, 1);
  if (!take_sums("dots", true)) return false;
  const bool bad = !pick(0, 3);
  if (bad) nonfinite[pick(0, 1)] = 1;
  std::vector<std::vector<double>> combined, stepped, momenta;
  for (long p = 0; p < count; ++p) {
    const Record& r = records[p];
    const SharpnessPair pair = sharpness_pair(s, p);
    combined.push_back(numbers(r.x)), stepped.push_back(numbers(r.saved)), momenta.push_back(numbers(r.m));
    for (long i = 0; !bad && i < r.x.size; ++i) {
      combined[p][i] = pair.u * combined[p][i] + pair.v * r.y.get(i);
      double &w = stepped[p][i], &m = momenta[p][i], g = (s.maximize ? -1 : 1) * combined[p][i] + s.weight_decay * w;
      if (with_momentum) {
        m = s.first ? g : s.momentum * m + (1 - s.dampening) * g;
        g = s.nesterov ? g + s.momentum * m : m;
      }
      w -= s.lr * g;
    }
  }
  core::sharpness_step(s, threads);
  core::sharpness_combine(s, threads);
  for (long p = 0; p < count; ++p)
    if (!close("step", number, records[p].w, stepped[p]) || !close("momentum", number, records[p].m, momenta[p]) ||
        !close("rule", number, records[p].x, combined[p]))
      return false;
  return true;
}

}  // namespace

int main() {
  for (long number = 0; number < 100; ++number)
    if (!check(number)) return 1;
  std::puts("ok");
}
