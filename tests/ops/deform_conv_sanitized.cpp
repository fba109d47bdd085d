// csrc/cpu/deform_conv.cpp on its own, for the sanitizers: random sizes, every buffer exactly as large as it must be,
// scratch and results full of NaN before, offsets of which some are no numbers, results and gradients against plain loops in
// double. Prints "ok" or the first failed case.
#include <limits>

#include "cpu/deform_conv.h"

#include "sanitized.h"

using namespace pyface;
namespace core = pyface::cpu::PYFACE_ISA;

namespace {

// One value of the input, 0 outside.
struct Image {
  const Array& x;
  long base, row, column, height, width;
  double at(long y, long x_at) const {
    if (y < 0 || y >= height || x_at < 0 || x_at >= width) return 0;
    return x.get(base + y * row + x_at * column);
  }
};

bool close(double got, double expected, double allowed, const char* what, int number, long at) {
  if (std::abs(got - expected) <= allowed * (1 + std::abs(expected))) return true;
  std::printf("case %d: %s[%ld] is %g, not %g\n", number, what, at, got, expected);
  return false;
}

bool run_case(int number) {
  const DType types[] = {DType::f32, DType::f64, DType::bf16};
  const DType type = types[number % 3], offset_type = type == DType::bf16 && pick(0, 1) ? DType::f32 : type;
  const long groups = pick(1, 3), offset_groups = pick(0, 1) ? groups : pick(1, 3);
  const long channels = groups * offset_groups * pick(1, number % 4 ? 8 : 40), outs = groups * pick(1, number % 5 ? 20 : 120);
  const long batch = pick(1, 3), kh = pick(1, 3), kw = pick(1, 3), sh = pick(1, 2), sw = pick(1, 2), ph = pick(0, 2),
             pw = pick(0, 2), dh = pick(1, 2), dw = pick(1, 2);
  const long height = dh * (kh - 1) + pick(1, number % 2 ? 4 : 14), width = dw * (kw - 1) + pick(1, number % 2 ? 4 : 14);
  const long oh = (height + 2 * ph - dh * (kh - 1) - 1) / sh + 1, ow = (width + 2 * pw - dw * (kw - 1) - 1) / sw + 1;
  const long taps = kh * kw, inputs = channels / groups, pixels = oh * ow, image = height * width;
  const bool masked = pick(0, 1), biased = pick(0, 1), last = pick(0, 1);

  Array x(type, batch * channels * image), w(type, outs * inputs * taps), b(type, outs);
  Array offset(offset_type, batch * 2 * offset_groups * taps * pixels), mask(offset_type, offset.size / 2);
  x.fill(), b.fill(), mask.fill();
  const double scale = 1 / std::sqrt((double)(inputs * taps));
  for (long i = 0; i < w.size; ++i) w.set(i, normal() * scale);
  const double wild[] = {NAN, INFINITY, -INFINITY, 1e10, -1e10, 3e38, -1, 0, 1e-44};
  for (long i = 0; i < offset.size; ++i) offset.set(i, pick(0, 9) ? 2 * normal() : wild[pick(0, 8)]);
  Array out(type, batch * outs * pixels);
  DeformConv a{};
  a.shape = {batch, channels, height, width, outs, oh, ow, {kh, kw}, {sh, sw}, {ph, pw}, {dh, dw}, groups, offset_groups};
  a.input = x.data.get();
  const long strides[2][4] = {{channels * image, image, width, 1}, {channels * image, 1, width * channels, channels}};
  std::memcpy(a.input_strides, strides[last], sizeof a.input_strides);
  a.offset = offset.data.get(), a.offset_stride = 2 * offset_groups * taps * pixels;
  a.mask = masked ? mask.data.get() : nullptr, a.mask_stride = a.offset_stride / 2;
  a.weight = w.data.get(), a.bias = biased ? b.data.get() : nullptr;
  a.out = out.data.get(), a.out_channels_last = last, a.type = type, a.offset_type = offset_type;
  const int threads = (int)pick(1, 4);
  auto scratch_of = [](long bytes) {
    std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
    std::memset(scratch.get(), 0xff, bytes);
    return scratch;
  };
  core::deform_conv(a, scratch_of(core::deform_conv_scratch(a, threads)).get(), threads);

  const bool needs[4] = {pick(0, 3) > 0, pick(0, 3) > 0, pick(0, 3) > 0, masked && pick(0, 3) > 0};
  Array grad(type, out.size), gx(type, x.size), go(offset_type, offset.size), gw(type, w.size), gm(offset_type, mask.size);
  grad.fill();
  DeformConvBackward d{};
  d.shape = a.shape, d.grad_out = grad.data.get(), d.input = a.input;
  std::memcpy(d.input_strides, a.input_strides, sizeof a.input_strides);
  d.offset = a.offset, d.offset_stride = a.offset_stride, d.mask = a.mask, d.mask_stride = a.mask_stride;
  d.weight = a.weight, d.grad_input = needs[0] ? gx.data.get() : nullptr, d.grad_input_channels_last = last;
  d.grad_offset = needs[1] ? go.data.get() : nullptr, d.grad_weight = needs[2] ? gw.data.get() : nullptr;
  d.grad_mask = needs[3] ? gm.data.get() : nullptr, d.type = type, d.offset_type = offset_type;
  core::deform_conv_backward(d, scratch_of(core::deform_conv_backward_scratch(d, threads)).get(), threads);

  std::vector<double> sums(out.size), dx(x.size), d_offset(offset.size), d_w(w.size), d_mask(mask.size);
  for (long n = 0; n < batch; ++n)
    for (long c = 0; c < channels; ++c)
      for (long k = 0; k < taps; ++k)
        for (long p = 0; p < pixels; ++p) {
          const long tap = (n * offset_groups + c / (channels / offset_groups)) * taps + k, group = c / inputs;
          const double y = p / ow * sh - ph + k / kw * dh + offset.get(2 * tap * pixels + p);
          const double x_at = p % ow * sw - pw + k % kw * dw + offset.get((2 * tap + 1) * pixels + p);
          const double m = masked ? mask.get(tap * pixels + p) : 1;
          if (!(y >= -1 && y < height && x_at >= -1 && x_at < width)) continue;
          const long y0 = (long)std::floor(y), x0 = (long)std::floor(x_at);
          const double fy = y - y0, fx = x_at - x0;
          const Image im{x, n * strides[last][0] + c * strides[last][1], strides[last][2], strides[last][3], height, width};
          const double v[4] = {im.at(y0, x0), im.at(y0, x0 + 1), im.at(y0 + 1, x0), im.at(y0 + 1, x0 + 1)};
          const double q[4] = {(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx};
          const double s = q[0] * v[0] + q[1] * v[1] + q[2] * v[2] + q[3] * v[3];
          double u = 0;
          for (long o = group * (outs / groups); o < (group + 1) * (outs / groups); ++o) {
            const long wi = (o * inputs + c % inputs) * taps + k;
            sums[(n * outs + o) * pixels + p] += w.get(wi) * m * s;
            u += w.get(wi) * grad.get((n * outs + o) * pixels + p);
            d_w[wi] += grad.get((n * outs + o) * pixels + p) * m * s;
          }
          d_mask[tap * pixels + p] += u * s;
          d_offset[2 * tap * pixels + p] += u * m * ((1 - fx) * (v[2] - v[0]) + fx * (v[3] - v[1]));
          d_offset[(2 * tap + 1) * pixels + p] += u * m * ((1 - fy) * (v[1] - v[0]) + fy * (v[3] - v[2]));
          for (long i = 0; i < 4; ++i) {
            const long yy = y0 + i / 2, xx = x0 + i % 2;
            if (yy < 0 || yy >= height || xx < 0 || xx >= width) continue;
            dx[im.base + yy * im.row + xx * im.column] += u * m * q[i];
          }
        }
  const double allowed = type == DType::bf16 ? 8e-2 : type == DType::f32 ? 2e-4 : 1e-11;
  for (long n = 0; n < batch; ++n)
    for (long o = 0; o < outs; ++o)
      for (long p = 0; p < pixels; ++p) {
        const long at = last ? (n * pixels + p) * outs + o : (n * outs + o) * pixels + p;
        const double expected = sums[(n * outs + o) * pixels + p] + (biased ? b.get(o) : 0);
        if (!close(out.get(at), expected, allowed, "out", number, at)) return false;
      }
  const struct {
    bool needed;
    const Array& got;
    const std::vector<double>& expected;
    const char* name;
  } gradients[] = {{needs[0], gx, dx, "grad_input"}, {needs[1], go, d_offset, "grad_offset"},
                   {needs[2], gw, d_w, "grad_weight"}, {needs[3], gm, d_mask, "grad_mask"}};
  for (const auto& g : gradients)
    for (long i = 0; g.needed && i < g.got.size; ++i)
      if (!close(g.got.get(i), g.expected[i], 3 * allowed, g.name, number, i)) return false;
  return true;
}

}  // namespace

int main() {
  cpu::best_isa();  // asks the system for AMX, where there is any
  for (int number = 0; number < 120; ++number)
    if (!run_case(number)) return 1;
  std::puts("ok");
}
