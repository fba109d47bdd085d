// csrc/cpu/spectral.cpp on its own, for the sanitizers: random sizes, layouts and numbers of threads, every buffer exactly as
// large as it must be, scratch and results full of NaN before, results against plain sums in double. Prints "ok" or the first
// failed case.
#include "cpu/spectral.h"

#include "sanitized.h"

using namespace pyface;
namespace core = pyface::cpu::PYFACE_ISA;

namespace {

// Eighths: the same in all types.
void fill(Array& a) {
  for (long i = 0; i < a.size; ++i) a.set(i, std::fmin(std::fmax(std::round(normal() * 8) / 8, -7.875), 7.875));
}

// U of an axis and what it stands for: A = U U^T, and B of a last harmonic without a mirror image.
struct Axis {
  long n, rank;
  bool edge;
  std::vector<double> u, a, b;
  Axis(long n, long d, bool symmetric) : n(n), a(n * n), b(n * n) {
    const bool full = 2 * d >= n;
    edge = !symmetric && !full;
    const long harmonics = d < n / 2 ? d : n / 2;
    rank = 1 + 2 * harmonics;
    u.resize(n * rank);
    for (long t = 0; t < n; ++t) {
      u[t * rank] = 1 / std::sqrt((double)n);
      for (long k = 1; k <= harmonics; ++k) {
        const bool last = k == harmonics && (edge || 2 * k == n);
        const double angle = 2 * M_PI * (k * t % n) / n, scale = std::sqrt((last ? 1.0 : 2.0) / n);
        u[t * rank + 2 * k - 1] = scale * std::cos(angle);
        u[t * rank + 2 * k] = 2 * k == n ? 0 : scale * std::sin(angle);
      }
    }
    for (long i = 0; i < n; ++i)
      for (long j = 0; j < n; ++j) {
        for (long r = 0; r < rank; ++r) a[i * n + j] += u[i * rank + r] * u[j * rank + r];
        const double *p = &u[i * rank + rank - 2], *q = &u[j * rank + rank - 2];
        if (edge) b[i * n + j] = p[0] * q[1] - p[1] * q[0];
      }
  }
};

template <class C>
std::vector<C> cast(const std::vector<double>& from, long rows, long columns, long padded, bool turned) {
  std::vector<C> to((turned ? columns : rows) * padded);
  for (long i = 0; i < rows; ++i)
    for (long j = 0; j < columns; ++j) to[turned ? j * padded + i : i * padded + j] = (C)from[i * columns + j];
  return to;
}

template <class C>
bool check(long number) {
  const DType types[] = {DType::f32, DType::bf16, DType::f16};
  const DType type = sizeof(C) == 8 ? DType::f64 : types[pick(0, 2)];
  const auto task = static_cast<SpectralTask>(pick(0, 2));
  const long h = pick(1, 37), w = pick(0, 3) ? pick(1, 45) : pick(60, 100), channels = pick(0, 3) ? 1 : pick(2, 4);
  const long outer = pick(1, 3), inner = pick(1, 3), planes = outer * inner, row = w * channels, threads = pick(1, 3);
  const bool symmetric = pick(0, 1), is_bool = pick(0, 1), with_sign = pick(0, 1) || task == SpectralTask::mask_backward;
  const Axis rows(h, pick(1, 20), symmetric), columns(w, pick(1, 20), symmetric);
  const bool edge = rows.edge && columns.edge;

  const long x_row = row + pick(0, 5), x_plane = x_row * (h - 1) + row;
  Array x(type, planes * x_plane), y(type, planes * h * row);
  fill(x);
  const bool shared = pick(0, 1);
  const long keeps = shared ? 1 : planes;
  std::unique_ptr<std::uint8_t[]> bytes(new std::uint8_t[keeps * h * row]);
  std::unique_ptr<C[]> numbers(new C[keeps * h * row]);
  for (long i = 0; i < keeps * h * row; ++i) bytes[i] = pick(0, 1), numbers[i] = (C)normal();
  std::unique_ptr<std::int8_t[]> sign(new std::int8_t[planes * h * row]);
  for (long i = 0; i < planes * h * row; ++i) sign[i] = pick(-1, 1);
  const std::vector<std::int8_t> signs(sign.get(), sign.get() + planes * h * row);

  const long padded = (columns.rank + 15) / 16 * 16, turned = (w + 15) / 16 * 16;
  auto upper = cast<C>(rows.u, h / 2 + 1 < h ? h / 2 + 1 : h, rows.rank, rows.rank, false);
  auto table = cast<C>(columns.u, w, columns.rank, padded, false), across = cast<C>(columns.u, w, columns.rank, turned, true);
  Spectral a{task, type, {upper.data(), rows.rank, rows.rank}, {table.data(), columns.rank, padded}, across.data(), edge,
             outer, inner, h, w, channels, x.data.get(), {inner * x_plane, x_plane, x_row}, y.data.get(),
             is_bool ? (const void*)bytes.get() : numbers.get(),
             {shared ? 0 : inner * h * row, shared ? 0 : h * row, row}, is_bool, with_sign ? sign.get() : nullptr};
  const std::int64_t need = core::spectral_scratch(a, (int)threads);
  std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, need), &std::free);
  std::memset(scratch.get(), 0xff, need);
  core::spectral(a, scratch.get(), (int)threads);

  const double allowed = type == DType::f64 ? 1e-12 : type == DType::f32 ? 3e-5 : type == DType::f16 ? 2e-2 : 1.5e-1;
  std::vector<double> q(h * w), left(h * w), crossed(h * w);
  for (long plane = 0; plane < planes; ++plane)
    for (long channel = 0; channel < channels; ++channel) {
      auto at = [&](long t, long c) { return (plane * h + t) * row + c * channels + channel; };
      auto value = [&](long t, long c) { return x.get(plane * x_plane + t * x_row + c * channels + channel); };
      auto drop = [&](long t, long c) {
        const long i = ((shared ? 0 : plane) * h + t) * row + c * channels + channel;
        return is_bool ? 1.0 - bytes[i] : 1.0 - (double)numbers[i];
      };
      for (long t = 0; t < h; ++t)
        for (long c = 0; c < w; ++c)
          q[t * w + c] = value(t, c) * (task == SpectralTask::mask_backward ? drop(t, c) * signs[at(t, c)] : 1);
      for (long t = 0; t < h; ++t)
        for (long c = 0; c < w; ++c) {
          double p = 0, s = 0;
          for (long i = 0; i < h; ++i) p += rows.a[t * h + i] * q[i * w + c], s += rows.b[t * h + i] * q[i * w + c];
          left[t * w + c] = p, crossed[t * w + c] = s;
        }
      for (long t = 0; t < h; ++t)
        for (long c = 0; c < w; ++c) {
          double low = 0;
          for (long i = 0; i < w; ++i) low += left[t * w + i] * columns.a[c * w + i] - (edge ? crossed[t * w + i] * columns.b[c * w + i] : 0);
          const double high = q[t * w + c] - low, v = value(t, c);
          const double exact = task == SpectralTask::high_pass ? high
                               : task == SpectralTask::mask    ? v - drop(t, c) * std::fabs(high)
                                                               : v - high;
          const double found = y.get(at(t, c));
          bool right = std::fabs(found - exact) <= allowed * (1 + std::fabs(exact));
          if (task == SpectralTask::mask && with_sign && std::fabs(high) > 1e-3) right = right && sign[at(t, c)] == (high > 0 ? 1 : -1);
          if (!right) {
            std::printf("case %ld: task %d type %d, %ld x %ld x %ld, plane %ld at %ld, %ld: %g instead of %g\n", number, (int)task,
                        (int)type, h, w, channels, plane, t, c, found, exact);
            return false;
          }
        }
    }
  return true;
}

}  // namespace

int main() {
  for (long number = 0; number < 120; ++number)
    if (!(number % 4 ? check<float>(number) : check<double>(number))) return 1;
  std::puts("ok");
}
