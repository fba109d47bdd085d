// csrc/cpu/attention.cpp on its own, for the sanitizers: random sizes, every buffer exactly as large as it must be, scratch and
// results full of NaN before, results and gradients against plain loops in double. Prints
// "ok" or the first failed case.
#include "cpu/attention.h"

#include "sanitized.h"

using namespace pyface;
namespace core = pyface::cpu::PYFACE_ISA;

namespace {

// [batch or 1, heads, rows, columns] in exactly its memory, rows as [rows, heads] where `turned`.
struct Tensor {
  Array data;
  long batch, heads, rows, columns, strides[3];
  Tensor(DType type, long batch, long heads, long rows, long columns, bool turned)
      : data(type, batch * heads * rows * columns), batch(batch), heads(heads), rows(rows), columns(columns) {
    strides[0] = batch == 1 ? 0 : heads * rows * columns;
    strides[1] = turned ? columns : rows * columns;
    strides[2] = turned ? heads * columns : columns;
  }
  long at(long b, long h, long row, long column) const {
    return b * strides[0] + h * strides[1] + row * strides[2] + column;
  }
  double get(long b, long h, long row, long column) const { return data.get(at(b, h, row, column)); }
  AttentionTensor view() const { return {data.data.get(), {strides[0], strides[1], strides[2]}}; }
};

bool close(double got, double expected, double allowed, const char* what, int number, long at) {
  if (got == expected || std::abs(got - expected) <= allowed * (1 + std::abs(expected))) return true;
  std::printf("case %d: %s[%ld] is %g, not %g\n", number, what, at, got, expected);
  return false;
}

bool run_case(int number) {
  const DType types[] = {DType::f32, DType::f64, DType::bf16};
  const DType type = types[number % 3], real = type == DType::f64 ? type : DType::f32;
  const DType extra_type = type == DType::bf16 && pick(0, 1) ? DType::f32 : type;
  const long most = number % 4 ? 20 : 140;
  const long B = pick(1, 3), H = pick(1, 3), L = pick(1, most), S = pick(0, most), E = pick(1, 40), Ev = pick(1, 40);
  const bool prior = S > 0 && pick(0, 3) == 0;
  const long R = prior ? 0 : pick(S ? 0 : 1, number % 5 ? 6 : 70), shared = pick(0, 1), width = pick(1, 9);
  const bool causal = !prior && pick(0, 1), biased = R && pick(0, 1), wants_lse_grad = pick(0, 1);

  Tensor q(type, B, H, L, E, pick(0, 1)), k(type, B, H, S, E, pick(0, 1)), v(type, B, H, S, Ev, pick(0, 1));
  Tensor xk(extra_type, shared ? 1 : B, H, R, E, pick(0, 1)), xv(extra_type, shared ? 1 : B, H, R, Ev, pick(0, 1));
  Tensor out(type, B, H, L, Ev, pick(0, 1)), go(type, B, H, L, Ev, pick(0, 1));
  Array bias(real, H * R), lse(real, B * H * L), glse(real, B * H * L), numbers(real, B * H * L * 4);
  for (Array* a : {&q.data, &k.data, &v.data, &xk.data, &xv.data, &go.data, &bias, &glse}) a->fill();
  for (long i = 0; i < numbers.size; ++i) numbers.set(i, i % 4 < 2 ? 4 + 2 * normal() : std::abs(normal()));

  AttentionCall a{};
  a.batch = B, a.heads = H, a.queries = L, a.keys = S, a.extras = R, a.depth = E, a.width = Ev;
  a.query = q.view(), a.key = k.view(), a.value = v.view(), a.extra_key = xk.view(), a.extra_value = xv.view();
  a.out = out.view(), a.bias = biased ? bias.data.get() : nullptr, a.bias_strides[0] = R, a.bias_strides[1] = 1;
  a.lse = lse.data.get(), a.prior = prior ? numbers.data.get() : nullptr, a.grid_width = width, a.smooth = 4;
  a.scale = 1 / std::sqrt((double)E), a.type = type, a.extra_type = extra_type, a.causal = causal;
  const int threads = (int)pick(1, 4);
  auto scratch_of = [](long bytes) {
    bytes = (bytes + 63) / 64 * 64;
    std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
    std::memset(scratch.get(), 0xff, bytes);
    return scratch;
  };
  core::attention(a, scratch_of(core::attention_scratch(a, threads)).get(), threads);

  bool needs[7];
  for (bool& need : needs) need = pick(0, 3) > 0;
  needs[3] &= R > 0, needs[4] &= R > 0, needs[5] &= biased, needs[6] &= prior;
  Tensor gq(type, B, H, L, E, false), gk(type, B, H, S, E, false), gv(type, B, H, S, Ev, false);
  Array gxk(real, B * H * R * E), gxv(real, B * H * R * Ev), gb(real, B * H * R), gp(real, numbers.size);
  AttentionBackward d{};
  d.grad_out = go.view(), d.grad_lse = wants_lse_grad ? glse.data.get() : nullptr;
  auto wanted = [](bool need, const Tensor& t) { return need ? t.view() : AttentionTensor{}; };
  d.grad_query = wanted(needs[0], gq), d.grad_key = wanted(needs[1], gk), d.grad_value = wanted(needs[2], gv);
  d.grad_extra_key = needs[3] ? gxk.data.get() : nullptr, d.grad_extra_value = needs[4] ? gxv.data.get() : nullptr;
  d.grad_bias = needs[5] ? gb.data.get() : nullptr, d.grad_prior = needs[6] ? gp.data.get() : nullptr;
  core::attention_backward(a, d, scratch_of(core::attention_backward_scratch(a, threads)).get(), threads);

  const double allowed = type == DType::bf16 ? 6e-2 : type == DType::f32 ? 1e-4 : 1e-11;
  std::vector<double> dq(gq.data.size), dk(gk.data.size), dv(gv.data.size), dxk(gxk.size), dxv(gxv.size), db(gb.size);
  std::vector<double> dp(gp.size), s(R + S);
  for (long b = 0; b < B; ++b)
    for (long h = 0; h < H; ++h)
      for (long i = 0; i < L; ++i) {
        const long at = (b * H + h) * L + i, xb = shared ? 0 : b;
        auto K = [&](long j, long e) { return j < R ? xk.get(xb, h, j, e) : k.get(b, h, j - R, e); };
        auto V = [&](long j, long e) { return j < R ? xv.get(xb, h, j, e) : v.get(b, h, j - R, e); };
        double top = -INFINITY, sum = 0;
        for (long j = 0; j < R + S; ++j) {
          s[j] = 0;
          for (long e = 0; e < E; ++e) s[j] += a.scale * q.get(b, h, i, e) * K(j, e);
          if (j < R && biased) s[j] += bias.get(h * R + j);
          if (prior)
            for (int axis = 0; axis < 2; ++axis) {
              const double away = numbers.get(at * 4 + axis) - (axis ? (j - R) / width : (j - R) % width);
              s[j] -= numbers.get(at * 4 + 2 + axis) * away * away / 4;
            }
          if (j >= R && causal && j - R > i + S - L) s[j] = -INFINITY;
          top = std::max(top, s[j]);
        }
        if (top == -INFINITY) top = 0;
        for (double x : s) sum += std::exp(x - top);
        const double total = top + std::log(sum);
        if (!close(lse.get(at), total, allowed, "lse", number, at)) return false;
        double delta = wants_lse_grad ? -glse.get(at) : 0;
        for (long e = 0; e < Ev; ++e) {
          double o = 0;
          for (long j = 0; j < R + S && sum; ++j) o += s[j] == -INFINITY ? 0 : std::exp(s[j] - total) * V(j, e);
          if (!close(out.get(b, h, i, e), o, allowed, "out", number, at)) return false;
          delta += o * go.get(b, h, i, e);
        }
        for (long j = 0; j < R + S; ++j) {
          if (s[j] == -INFINITY) continue;
          const double p = std::exp(s[j] - total);
          double dP = 0;
          for (long e = 0; e < Ev; ++e) dP += go.get(b, h, i, e) * V(j, e);
          const double step = p * (dP - delta);
          for (long e = 0; e < E; ++e) {
            dq[gq.at(b, h, i, e)] += a.scale * step * K(j, e);
            const double part = a.scale * step * q.get(b, h, i, e);
            if (j < R) dxk[((b * H + h) * R + j) * E + e] += part;
            else dk[gk.at(b, h, j - R, e)] += part;
          }
          for (long e = 0; e < Ev; ++e) {
            const double part = p * go.get(b, h, i, e);
            if (j < R) dxv[((b * H + h) * R + j) * Ev + e] += part;
            else dv[gv.at(b, h, j - R, e)] += part;
          }
          if (j < R) db[(b * H + h) * R + j] += step;
          if (prior)
            for (int axis = 0; axis < 2; ++axis) {
              const double away = numbers.get(at * 4 + axis) - (axis ? (j - R) / width : (j - R) % width);
              dp[at * 4 + axis] -= step * 2 * numbers.get(at * 4 + 2 + axis) * away / 4;
              dp[at * 4 + 2 + axis] -= step * away * away / 4;
            }
        }
      }
  const struct {
    bool needed;
    const Array& got;
    const std::vector<double>& expected;
    const char* name;
  } gradients[] = {{needs[0], gq.data, dq, "grad_query"}, {needs[1], gk.data, dk, "grad_key"},
                   {needs[2], gv.data, dv, "grad_value"}, {needs[3], gxk, dxk, "grad_extra_key"},
                   {needs[4], gxv, dxv, "grad_extra_value"}, {needs[5], gb, db, "grad_bias"},
                   {needs[6], gp, dp, "grad_prior"}};
  for (const auto& g : gradients)
    for (long i = 0; g.needed && i < g.got.size; ++i)
      if (!close(g.got.get(i), g.expected[i], (g.name[5] == 'p' ? 60 : 6) * allowed, g.name, number, i)) return false;
  return true;
}

}  // namespace

int main() {
  cpu::best_isa();  // asks the system for AMX, where there is any
  for (int number = 0; number < 150; ++number)
    if (!run_case(number)) return 1;
  std::puts("ok");
}
