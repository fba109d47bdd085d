"""Core `sharpness`: data, the papers' definitions, and what every compiled path must do (a `Listed` of pyface.ops)."""

from __future__ import annotations

import math

import pytest
import torch

from pyface.ops.reference import sharpness as reference
from pyface.ops.sharpness import RULES as PARAMETERS

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
RULES = [
    ("second", {}), ("mix", {"t": 0.3}), ("gsam", {"alpha": 0.4}), ("gsam_first", {"alpha": 0.4}),
    ("constrained", {"lower": 0.3, "upper": 0.6}), ("surgery", {}),
]  # fmt: skip
TYPES = [(F32,) * 2, (F64,) * 2, (BF16,) * 2, (F16,) * 2, (F32, BF16), (F32, F16)]  # of weight and gradient
SIZES = [0, 1, 15, 16, 17, 32767, 32768, 32769, 70001]


def make(sizes=SIZES, types=(F32, F32), seed=0):
    g = torch.Generator().manual_seed(seed)
    w, y, noise = ([torch.randn(n, generator=g, dtype=F64) for n in sizes] for _ in range(3))
    # cosines from clearly positive to clearly negative, so that every branch of every rule is taken
    x = [(1 - p % 3) * a + 0.9 * b for p, (a, b) in enumerate(zip(y, noise, strict=True))]
    return [t.to(types[0]) for t in w], [t.to(types[1]) for t in x], [t.to(types[1]) for t in y]


def rule_expected(x, y, a, b, k, rule, lower=None, upper=None, t=None, alpha=None):
    """The definitions of the papers, literally, in float64."""
    if rule == "second":
        return x
    if rule == "mix":
        return t * x + (1 - t) * y
    if a == 0 or b == 0:
        return x
    if rule == "gsam":
        return x - alpha * (y - k / a * x)
    if rule == "gsam_first":
        return y + alpha * (x - k / b * y)
    if rule == "surgery":
        return x - k / b * y if k < 0 else x
    c = k / math.sqrt(a * b)
    if c >= upper:
        return x
    if c <= lower:
        return y
    z = x + y
    return (x @ z) / (z @ z) * z


# ---- checks of a path -----------------------------------------------------------------------------------------------

GPU_TYPES = [*TYPES, (BF16, F32), (F16, F32)]
STEPS = {
    "plain": {},
    "first": {"momentum": 0.9, "first": True},
    "momentum": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.02},
    "nesterov": {"momentum": 0.9, "nesterov": True, "maximize": True},
}
# Every rule and every kind of step; one does not look at the other.
RULES_AND_STEPS = [*((*rule, "momentum") for rule in RULES), *(("gsam", {"alpha": 0.4}, step) for step in STEPS)]
_SGD = {
    "lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
    "first": False,
}  # fmt: skip
_ROUNDING = {F64: 1e-12, F32: 2e-6, F16: 2**-10, BF16: 2**-7}


def to(device, *lists):
    return [[t.to(device) for t in tensors] for tensors in lists]


def wide(tensors):
    return [t.to("cpu", F64, copy=True) for t in tensors]


def same_bits(a, b):
    return a.dtype == b.dtype and bytes(a.cpu().view(torch.uint8).numpy()) == bytes(b.cpu().view(torch.uint8).numpy())


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        error = _ROUNDING[a.dtype]
        torch.testing.assert_close(a.double().cpu(), b, rtol=error, atol=min(error, 4e-6))


def rule_arguments(rule, parameters, per_tensor):
    return (rule, *[*(parameters[name] for name in PARAMETERS[rule]), 0.0, 0.0][:2], per_tensor)


def check_sums(core, types, sizes=SIZES, device="cpu"):
    w, x, y = to(device, *make(sizes, types))
    values, nonfinite = core.sums(x, y, None, 0.0)
    exact, _ = reference.sums(wide(x), wide(y), None, 0.0)
    scale = exact[:, :2].sum(1, keepdim=True) + 1e-300
    assert ((values.cpu() - exact).abs() <= 1e-13 * scale).all()
    assert nonfinite.tolist() == [0, 0]
    norms, nonfinite = core.sums(None, y, None, 0.0)
    assert torch.equal(norms[:, 1], values[:, 1])
    assert not norms[:, ::2].any()
    assert nonfinite.tolist() == [0, 0]
    adaptive, _ = core.sums(None, y, w, 0.01)
    exact, _ = reference.sums(None, wide(y), wide(w), 0.01)
    torch.testing.assert_close(adaptive.cpu(), exact, rtol=1e-13, atol=0)
    # a tensor's bits are its own business
    alone, _ = core.sums(x[-1:], y[-1:], None, 0.0)
    assert torch.equal(alone[0], values[len(sizes) - 1])


def check_ascent(core, types, eta, sizes=SIZES, device="cpu"):
    w, _, y = make(sizes, types)
    w[1].fill_(-0.0)
    y[1].zero_()
    w, y = to(device, w, y)
    old, saved = [t.clone() for t in w], [torch.full_like(t, 7) for t in w]
    rho = [0.3 + 0.1 * p for p in range(len(w))]
    sums = core.sums(None, y, w if eta is not None else None, eta or 0.0)
    core.perturb_(w, saved, y, *sums, rho, 1e-12, 0.01, eta)
    expected = wide(old)
    exact = reference.sums(None, wide(y), None if eta is None else wide(old), eta or 0.0)
    reference.perturb_(expected, wide(saved), wide(y), *exact, rho, 1e-12, 0.01, eta)
    close(w, expected)
    assert all(map(same_bits, saved, old))
    core.restore_(w, saved)
    assert all(map(same_bits, w, old))
    core.perturb_(w, saved, y, *sums, [0.0] * len(w), 1e-12, 0.0, eta)  # rho 0 moves nothing
    assert all(map(same_bits, w, old))
    nothing = [torch.zeros_like(t) for t in y]
    core.perturb_(w, saved, nothing, *core.sums(None, nothing, None, 0.0), rho, 1e-12, 0.0, None)  # nor does a zero
    assert all(map(same_bits, w, old))


def check_bits_survive(core, dtype, device="cpu"):
    """Every bit pattern of two bytes, NaNs of all payloads among them, and some of the longer types."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype in (F16, BF16):
        w = bits.to(torch.int16).view(dtype)
    elif dtype == F32:
        w = (bits << 16 | 0x1234).view(dtype)
    else:
        w = (bits.long() << 48 | 0x123456789ABC).view(dtype)
    w, y = [w[:33003].to(device)], [torch.ones(33003, dtype=dtype, device=device)]
    old, saved = w[0].clone(), [torch.zeros_like(w[0])]
    core.perturb_(w, saved, y, *core.sums(None, y, None, 0.0), [0.5], 1e-12, 0.0, None)
    assert same_bits(saved[0], old)
    assert not same_bits(w[0], old)
    core.restore_(w, saved)
    assert same_bits(w[0], old)


def check_rule(core, types, rule, parameters, per_tensor, sizes=SIZES, device="cpu"):
    _, x, y = to(device, *make(sizes, types))
    arguments = rule_arguments(rule, parameters, per_tensor)
    exact, _ = reference.sums(wide(x), wide(y), None, 0.0)
    expected = reference.combined(wide(x), wide(y), *reference.coefficients(exact, *arguments))
    core.combine_(x, y, *core.sums(x, y, None, 0.0), *arguments)
    close(x, expected)


def check_given(core, sizes=SIZES, device="cpu"):
    """u and v in the place of sums."""
    _, x, y = to(device, *make(sizes))
    w, rows = [t.sin() for t in x], torch.zeros(len(sizes) + 1, 3, dtype=F64, device=device)
    rows[:-1, 0] = torch.linspace(-1, 0.5, len(sizes))
    rows[:-1, 1] = torch.linspace(0, 2, len(sizes))
    rows[1], rows[2] = torch.tensor([0.0, 1, 0]), torch.tensor([1.0, 0, 0])
    expected = reference.combined(wide(x), wide(y), rows[:-1, 0].cpu(), rows[:-1, 1].cpu())
    stepped = [a - 0.1 * b for a, b in zip(wide(w), expected, strict=True)]
    arguments, finite = ("given", 0.0, 0.0, True), torch.zeros(2, device=device)
    core.step_(w, [t.clone() for t in w], x, y, [], rows, finite, *arguments, *_SGD.values())
    close(w, stepped)
    core.combine_(x, y, rows, finite, *arguments)
    close(x, expected)


def check_step(core, types, rule, parameters, step, sizes=SIZES, device="cpu"):
    sgd = _SGD | STEPS[step]
    w, x, y = to(device, *make(sizes, types))
    saved, momenta = [t.clone() for t in w], [t.cos() for t in w] if sgd["momentum"] else []
    if sgd["first"]:
        momenta = [torch.full_like(t, math.nan) for t in w]
    arguments = rule_arguments(rule, parameters, rule == "constrained")
    sums, before = core.sums(x, y, None, 0.0), [t.clone() for t in (*x, *y)]
    exact, nonfinite = reference.sums(wide(x), wide(y), None, 0.0)
    gradients = reference.combined(wide(x), wide(y), *reference.coefficients(exact, *arguments))
    expected, expected_momenta = wide(w), wide(momenta)
    reference.step_(expected, wide(saved), gradients, expected_momenta, nonfinite.amax() > 0, *sgd.values())
    for t in w:
        t.fill_(7)
    core.step_(w, saved, x, y, momenta, *sums, *arguments, *sgd.values())
    close(w, expected)
    close(momenta, expected_momenta)
    assert all(map(same_bits, (*x, *y), before))


def check_nonfinite(core, dtype, sizes=(20, 40003), positions=((0, 0), (1, 0), (1, 33000), (1, 40002)), device="cpu"):
    for number, (p, i) in enumerate(positions):
        for which, value in ((0, math.inf), (1, math.nan), (1, -math.inf)):
            w, *gradients = to(device, *make(sizes, (dtype, dtype), seed=number))
            gradients[which][p][i] = value
            x, y = gradients
            sums = core.sums(x, y, None, 0.0)
            assert sums[1].tolist() == [float(which == 0), float(which == 1)]
            old, kept, momenta = [[t.clone() for t in tensors] for tensors in (w, x, w)]
            saved = [t.clone() for t in w]
            if which == 1:
                norms = core.sums(None, y, None, 0.0)
                assert norms[1].tolist() == [0, 1]
                core.perturb_(w, saved, y, *norms, [0.5] * len(w), 1e-12, 0.1, None)
                assert all(map(same_bits, w, old))
            arguments = rule_arguments("gsam", {"alpha": 0.4}, False)
            core.combine_(x, y, *sums, *arguments)
            assert all(map(same_bits, x, kept))
            for t in w:
                t.fill_(7)
            core.step_(w, saved, x, y, momenta, *sums, *arguments, *(_SGD | STEPS["momentum"]).values())
            assert all(map(same_bits, (*w, *momenta), (*old, *old)))


def check_nonfinite_weights(core, dtype, sizes=(20, 40003), positions=((0, 3), (1, 40002)), device="cpu"):
    """They stop the adaptive ascent, also where their y is 0."""
    for p, i in positions:
        for value in (math.inf, -math.inf, math.nan):
            w, _, y = to(device, *make(sizes, (dtype, dtype)))
            w[p][i], y[p][i] = value, 0
            old, saved = [t.clone() for t in w], [torch.zeros_like(t) for t in w]
            sums = core.sums(None, y, w, 0.01)
            assert sums[1].tolist() == [0, 1]
            core.perturb_(w, saved, y, *sums, [0.5] * len(w), 1e-12, 0.0, 0.01)
            assert all(map(same_bits, (*w, *saved), (*old, *old)))
            assert core.sums(None, y, None, 0.0)[1].tolist() == [0, 0]


def check_extremes(core, device="cpu"):
    """Values whose squares no float holds."""
    for value, dtype in ((1e20, F32), (1e-42, F32), (1e30, BF16), (65504.0, F16), (1e150, F64)):
        y = [torch.full((100,), value, dtype=dtype, device=device)]
        values, nonfinite = core.sums(y, y, None, 0.0)
        assert nonfinite.tolist() == [0, 0]
        exact = 100 * y[0][0].double().cpu() ** 2
        torch.testing.assert_close(values.cpu(), exact.expand(2, 3), rtol=1e-14, atol=0)
    # squares of doubles may overflow: the flag looks at the data
    y = [torch.full((100,), 1e200, dtype=F64, device=device)]
    values, nonfinite = core.sums(None, y, None, 0.0)
    assert values[-1, 1].isinf()
    assert nonfinite.tolist() == [0, 0]


def check_degenerate(core, device="cpu"):
    y = torch.randn(50, device=device)
    constrained = rule_arguments("constrained", {"lower": -1.5, "upper": 0.9}, True)
    for x, expected in ((-y, y), (torch.zeros_like(y), torch.zeros_like(y)), (y.clone(), y)):
        x = [x]
        core.combine_(x, [y], *core.sums(x, [y], None, 0.0), *constrained)
        assert torch.equal(x[0], expected)
    x, zero = [y.clone()], [torch.zeros_like(y)]
    for rule in ("surgery", "gsam", "gsam_first", "constrained"):
        parameters = {"alpha": 0.4, "lower": 0.1, "upper": 0.2}
        core.combine_(x, zero, *core.sums(x, zero, None, 0.0), *rule_arguments(rule, parameters, False))
        assert torch.equal(x[0], y)
    empty = [torch.empty(0, device=device)] * 2
    assert not core.sums(empty, empty, None, 0.0)[0].any()


def check_mixed_list(core, device="cpu"):
    """More tensors than one launch takes, of all types, some empty, some that begin between two 16-byte words."""
    lists = [], [], []
    for number, types in enumerate(GPU_TYPES * 2):
        for tensors, own in zip(lists, make((33, 0, 5000 + number), types, seed=number), strict=True):
            tensors += own
    w, x, y = to(device, *lists)
    saved, momenta = [t.clone() for t in w], [t.sin() for t in w]
    for number, tensors in enumerate((w, saved, x, y, momenta)):  # each by itself once
        for p in range(number, len(tensors), 7):
            tensors[p] = torch.cat([tensors[p][:1], tensors[p]])[1:] if len(tensors[p]) else tensors[p]
    values, _ = core.sums(x, y, None, 0.0)
    exact, _ = reference.sums(wide(x), wide(y), None, 0.0)
    torch.testing.assert_close(values.cpu(), exact, rtol=1e-12, atol=1e-9)
    old, rho = [t.clone() for t in w], [0.01 * p for p in range(len(w))]
    core.perturb_(w, saved, y, *core.sums(None, y, None, 0.0), rho, 1e-12, 0.0, None)
    expected = wide(old)
    reference.perturb_(expected, wide(old), wide(y), exact, torch.zeros(2), rho, 1e-12, 0.0, None)
    close(w, expected)
    core.restore_(w, saved)
    assert all(map(same_bits, w, old))
    nonfinite = torch.zeros(2, device=device)
    arguments = rule_arguments("mix", {"t": 0.3}, False)  # which reads all
    expected = reference.combined(wide(x), wide(y), *reference.coefficients(exact, *arguments))
    sgd = _SGD | STEPS["nesterov"]
    stepped, moments = wide(w), wide(momenta)
    reference.step_(stepped, wide(saved), expected, moments, torch.tensor(False), *sgd.values())
    core.step_(w, saved, x, y, momenta, values, nonfinite, *arguments, *sgd.values())
    close(w, stepped)
    close(momenta, moments)
    for rule in (arguments, rule_arguments("constrained", {"lower": 0.3, "upper": 0.6}, True)):
        expected = reference.combined(wide(x), wide(y), *reference.coefficients(exact, *rule))
        core.combine_(x, y, values, nonfinite, *rule)
        close(x, expected)


def check_layouts(core, device="cpu"):
    w = torch.randn(4, 6, 5, 5, device=device).to(memory_format=torch.channels_last)
    y, x = torch.randn(4, 6, 5, 5, device=device), torch.randn(6, 4, 5, 5, device=device).transpose(0, 1)
    saved, old = torch.empty_like(w), w.clone()
    core.perturb_([w], [saved], [y], *core.sums(None, [y], None, 0.0), [0.5], 1e-12, 0.0, None)
    torch.testing.assert_close(w, old + 0.5 * y / y.norm(), rtol=0, atol=1e-6)
    torch.testing.assert_close(saved, old, rtol=0, atol=0)
    expected = 0.3 * x + 0.7 * y
    core.combine_([x], [y], *core.sums([x], [y], None, 0.0), *rule_arguments("mix", {"t": 0.3}, False))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


class Passes:
    """The tests of a path; a module that has a fixture `core` derives its own from them."""

    device = "cpu"
    few: list[int]  # sizes of the tensors
    long: list[int]

    def positions(self, dtype) -> list[int]:
        """Where something that is not finite is put, the last at a tensor's end."""
        raise NotImplementedError

    @pytest.mark.parametrize("types", GPU_TYPES, ids=str)
    def test_sums(self, core, types):
        check_sums(core, types, self.long, self.device)

    @pytest.mark.parametrize("eta", [None, 0.01])
    @pytest.mark.parametrize("types", GPU_TYPES, ids=str)
    def test_ascent_and_restoring(self, core, types, eta):
        check_ascent(core, types, eta, self.long if types == (F32, F32) else self.few, self.device)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_bits_survive(self, core, dtype):
        check_bits_survive(core, dtype, self.device)

    @pytest.mark.parametrize("per_tensor", [False, True])
    @pytest.mark.parametrize(("rule", "parameters"), RULES)
    def test_rules(self, core, rule, parameters, per_tensor):
        check_rule(core, (F32, F32), rule, parameters, per_tensor, self.few, self.device)

    def test_given_factors(self, core):
        check_given(core, self.few, self.device)

    @pytest.mark.parametrize("types", GPU_TYPES, ids=str)
    def test_types_of_rules_and_steps(self, core, types):
        check_rule(core, types, "gsam", {"alpha": 0.4}, False, self.long, self.device)
        check_step(core, types, "gsam", {"alpha": 0.4}, "nesterov", self.long, self.device)

    @pytest.mark.parametrize(("rule", "parameters", "step"), RULES_AND_STEPS)
    def test_steps(self, core, rule, parameters, step):
        check_step(core, (F32, F32), rule, parameters, step, self.few, self.device)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_nonfinite_gradients_change_nothing(self, core, dtype):
        *others, last = self.positions(dtype)
        positions = [(0, 0), *((1, i) for i in (*others, last))]
        check_nonfinite(core, dtype, (20, last + 1), positions, self.device)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_nonfinite_weights_stop_the_adaptive_ascent(self, core, dtype):
        last = self.positions(dtype)[-1]
        check_nonfinite_weights(core, dtype, (20, last + 1), [(0, 3), (1, last)], self.device)

    def test_edges(self, core):
        check_extremes(core, self.device)
        check_degenerate(core, self.device)
        check_layouts(core, self.device)

    def test_lists_of_several_launches(self, core):
        check_mixed_list(core, self.device)
