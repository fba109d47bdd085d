// csrc/cpu/dense_block.cpp on its own, for the sanitizers: random sizes, every buffer exactly as large as it must be,
// scratch and results full of NaN before, results against plain loops in double. Prints "ok" or the first failed case.
#include "cpu/dense_block.h"

#include "sanitized.h"

using namespace pyface;
namespace core = pyface::cpu::PYFACE_ISA;

namespace {

float to_bf16(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

DType pick_type() { return pick(0, 1) ? DType::f32 : DType::bf16; }

bool run_case(int number) {
  const long batch = pick(1, 3), height = pick(1, 9), width = number % 3 ? pick(1, 20) : pick(1, 70);
  const DType x_type = pick_type(), w_type = pick_type(), compute = pick_type();
  std::vector<Array> arrays;  // x parts, then weights and biases
  std::vector<DenseBlockPart> parts;
  std::vector<DenseBlockLayer> layers;
  std::vector<long> outs;
  long channels = 0;
  for (long i = pick(1, 3); i > 0; --i) {
    const long c = pick(1, 19), own = pick(0, 3) ? batch : 1;
    Array& x = arrays.emplace_back(x_type, own * c * height * width);
    for (long k = 0; k < x.size; ++k) x.set(k, normal());
    const long sample = own > 1 ? c * height * width : 0;
    if (pick(0, 1))
      parts.push_back({x.data.get(), c, {sample, height * width, width, 1}});
    else
      parts.push_back({x.data.get(), c, {sample, 1, width * c, c}});
    channels += c;
  }
  const long inputs = channels;
  for (long i = pick(1, 4); i > 0; --i) {
    const long out = i == 1 && pick(0, 1) ? pick(1, 3) : pick(1, 40);
    Array& w = arrays.emplace_back(w_type, out * channels * 9);
    for (long k = 0; k < w.size; ++k) w.set(k, normal() * std::sqrt(2.0f / (9 * channels)));
    const void* const weight = w.data.get();  // the vector may move the Array, not what it points to
    Array& b = arrays.emplace_back(w_type, out);
    for (long k = 0; k < out; ++k) b.set(k, normal());
    layers.push_back({weight, b.data.get(), out});
    outs.push_back(out);
    channels += out;
  }
  const long last = outs.back(), first_weight = parts.size();
  Array result(x_type, batch * last * height * width);
  const bool channels_last = pick(0, 1);
  const DenseBlock args{parts.data(), layers.data(), (long)parts.size(), (long)layers.size(), result.data.get(),
                        {last * height * width, channels_last ? 1 : height * width,
                         channels_last ? width * last : width, channels_last ? last : 1},
                        batch, height, width, x_type, w_type, compute, 0.1f};
  const int threads = (int)pick(1, 4);
  const long bytes = core::dense_block_scratch(args, threads);
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
  std::memset(scratch.get(), 0xff, bytes);
  core::dense_block(args, scratch.get(), threads);

  auto rounded = [&](float v) { return compute == DType::bf16 ? to_bf16(v) : v; };
  const double allowed = compute == DType::bf16 || x_type == DType::bf16 ? 6e-2 : 1e-4;
  for (long n = 0; n < batch; ++n) {
    std::vector<float> features(channels * height * width);
    long channel = 0;
    for (std::size_t i = 0; i < parts.size(); ++i)
      for (long c = 0; c < parts[i].channels; ++c, ++channel)
        for (long y = 0; y < height; ++y)
          for (long x = 0; x < width; ++x) {
            const auto& s = parts[i].strides;
            const long at = n * s[0] + c * s[1] + y * s[2] + x * s[3];
            features[(channel * height + y) * width + x] = rounded(arrays[i].get(at));
          }
    channel = inputs;
    for (std::size_t k = 0; k < outs.size(); ++k) {
      const Array &w = arrays[first_weight + 2 * k], &b = arrays[first_weight + 2 * k + 1];
      for (long o = 0; o < outs[k]; ++o)
        for (long y = 0; y < height; ++y)
          for (long x = 0; x < width; ++x) {
            double sum = b.get(o);
            for (long c = 0; c < channel; ++c)
              for (long t = 0; t < 9; ++t) {
                const long yy = y + t / 3 - 1, xx = x + t % 3 - 1;
                if (yy < 0 || yy >= height || xx < 0 || xx >= width) continue;
                sum += (double)rounded(w.get((o * channel + c) * 9 + t)) * features[(c * height + yy) * width + xx];
              }
            if (k + 1 < outs.size()) {
              features[((channel + o) * height + y) * width + x] = rounded((float)(sum > 0 ? sum : sum * 0.1f));
              continue;
            }
            const auto& s = args.out_strides;
            const float got = result.get(n * s[0] + o * s[1] + y * s[2] + x * s[3]);
            if (!(std::abs(got - sum) <= allowed * (1 + std::abs(sum)))) {
              std::printf("case %d (%zu layers, %ldx%ld, bf16 x %d, weights %d, compute %d): ", number, outs.size(),
                          height, width, x_type == DType::bf16, w_type == DType::bf16, compute == DType::bf16);
              std::printf("[%ld, %ld, %ld, %ld] is %g, not %g\n", n, o, y, x, got, sum);
              return false;
            }
          }
      channel += outs[k];
    }
  }
  return true;
}

}  // namespace

int main() {
  for (int number = 0; number < 60; ++number)
    if (!run_case(number)) return 1;
  std::puts("ok");
}
