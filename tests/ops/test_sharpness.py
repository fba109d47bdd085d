"""Core sharpness: paths against float64 definitions, laws, edges, bits, torch integration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharpness_expected import RULES, TYPES, check_nonfinite_weights, make, rule_expected

import pyface
from pyface.ops import multi_combine_, multi_dots, multi_norm, multi_step_, paths, perturb_, restore_
from pyface.ops.sharpness import CORE


@pytest.fixture(params=["cpu", "reference"])
def path(request):
    with paths(request.param):
        yield request.param


@pytest.mark.parametrize(("rule", "parameters"), RULES)
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_rules_follow_their_definitions(isa, rule, parameters, types, granularity):
    _, xs, ys = make(types=types)
    if granularity == "global" and rule == "constrained":
        pytest.skip("the literal projection is written for one tensor")
    rows = [(float(x.double() @ x.double()), float(y.double() @ y.double()), float(x.double() @ y.double()))
            for x, y in zip(xs, ys, strict=True)]  # fmt: skip
    if granularity == "global":
        rows = [tuple(map(sum, zip(*rows, strict=True)))] * len(rows)
    wanted = [
        rule_expected(x.double(), y.double(), *r, rule, **parameters) for x, y, r in zip(xs, ys, rows, strict=True)
    ]
    multi_combine_(xs, ys, multi_dots(xs, ys), rule, granularity=granularity, **parameters)
    low = types[1].itemsize == 2
    for x, g in zip(xs, wanted, strict=True):
        torch.testing.assert_close(x.double(), g, rtol=8e-3 if low else 1e-5, atol=8e-3 if low else 2e-6)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_sums_are_accurate(isa, types):
    _, xs, ys = make(types=types)
    sums = multi_dots(xs, ys).values
    for p, (x, y) in enumerate(zip(xs, ys, strict=True)):
        x, y = x.double(), y.double()
        exact = [math.fsum((u * v).tolist()) for u, v in ((x, x), (y, y), (x, y))]
        scale = max(exact[0], exact[1], 1e-300)
        assert all(abs(float(s) - e) <= 1e-13 * scale for s, e in zip(sums[p], exact, strict=True))
    torch.testing.assert_close(sums[-1], sums[:-1].sum(0), rtol=1e-14, atol=1e-9)
    assert torch.equal(multi_norm(ys).values[:, 1], sums[:, 1])


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("eta", [None, 0.01])
def test_perturb_and_restore(isa, types, eta):
    w, _, y = make(types=types)
    w[1].fill_(-0.0)
    y[1].zero_()
    old, where = [t.clone() for t in w], [t.data_ptr() for t in w]
    saved = [torch.empty_like(t) for t in w]
    sums = multi_norm(y) if eta is None else multi_norm(y, weights=w, eta=eta)
    perturb_(w, y, saved, sums, 0.3, eta=eta)
    t = [torch.ones_like(v.double()) if eta is None else v.double().abs() + eta for v in old]
    norm = math.sqrt(sum(float(((a.double() * b) ** 2).sum()) for a, b in zip(y, t, strict=True)))
    low = types[0].itemsize == 2
    for a, b, g, s in zip(w, old, y, t, strict=True):
        want = b.double() + 0.3 * s**2 * g.double() / norm
        torch.testing.assert_close(a.double(), want, rtol=8e-3 if low else 1e-6, atol=1e-2 if low else 1e-6)
    restore_(w, saved)
    assert where == [t.data_ptr() for t in w]
    for a, b in zip(w, old, strict=True):
        assert a.view(torch.uint8).equal(b.view(torch.uint8)) if a.numel() else True


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.01}])
def test_fused_step_is_restore_combine_sgd(path, nesterov, maximize, sgd):
    sgd = sgd | {"nesterov": nesterov and "momentum" in sgd, "maximize": maximize, "lr": 0.1}
    w, xs, ys = make()
    own = [torch.nn.Parameter(t.clone()) for t in w]
    optimizer = torch.optim.SGD(own, foreach=False, **sgd)
    momenta = [torch.full_like(t, float("nan")) for t in w] if "momentum" in sgd else None
    for step in range(3):
        saved = [t.clone() for t in w]
        for t in w:
            t.fill_(7.0)
        sums = multi_dots(xs, ys)
        multi_step_(w, saved, xs, ys, momenta, sums, "gsam", alpha=0.4, first=step == 0, **sgd)
        g = [x.clone() for x in xs]
        multi_combine_(g, ys, sums, "gsam", alpha=0.4)
        for p, grad in zip(own, g, strict=True):
            p.grad = grad
        optimizer.step()
        for a, b in zip(w, own, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("position", [0, 40000, 70000])
def test_nonfinite_gradients_change_nothing(path, dtype, value, position):
    w, xs, ys = make(types=(dtype, dtype))
    for bad in (xs, ys):
        bad[-1][position], kept = value, bad[-1][position].clone()
        sums = multi_dots(xs, ys)
        assert sums.nonfinite.tolist() == [float(bad is xs), float(bad is ys)]
        before, x_before = [t.clone() for t in w], [t.clone() for t in xs]
        saved = [t.clone() for t in w]
        if bad is ys:
            perturb_(w, ys, saved, multi_norm(ys), 0.5)
            assert all(torch.equal(a, b) for a, b in zip(w, before, strict=True))
        multi_combine_(xs, ys, sums, "gsam", alpha=0.4)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(xs, x_before, strict=True))
        multi_step_(w, saved, xs, ys, None, sums, "gsam", alpha=0.4, lr=1.0)
        assert all(torch.equal(a, b) for a, b in zip(w, before, strict=True))
        bad[-1][position] = kept


# ---- gradients of a scaled loss -------------------------------------------------------------------------------------


@pytest.fixture(params=["numbers", "tensors"])
def scales(request):
    """Of x and of y."""
    return (48.0, 1024.0) if request.param == "numbers" else (torch.tensor(48.0), torch.tensor(1024.0))


def same(found, expected, tolerance=2e-6):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rule", "parameters"), RULES)
@pytest.mark.parametrize("granularity", ["tensor", "global"])
@pytest.mark.parametrize("taken", [True, False], ids=["sums taken", "sums given"])
def test_unscaling_in_a_rule_equals_unscaling_before(path, scales, rule, parameters, granularity, taken):
    w, xs, ys = make()
    big_xs, big_ys = [x * float(scales[0]) for x in xs], [y * float(scales[1]) for y in ys]
    sums, small = multi_dots(big_xs, big_ys, grad_scale=scales), multi_dots(xs, ys)
    same(sums.values, small.values, 1e-6 * float(small.values.abs().max()))
    own = {"rule": rule, "granularity": granularity, **parameters}
    steps = []
    for x, y, scale in ((xs, ys, 1.0), (big_xs, big_ys, scales)):
        moved, m = [t.clone() for t in w], [t.cos() for t in w]
        multi_step_(
            moved, w, x, y, m, None if taken else multi_dots(x, y, grad_scale=scale), grad_scale=scale, lr=0.1,
            momentum=0.9, weight_decay=0.01, **own,
        )  # fmt: skip
        multi_combine_(x, y, None if taken else multi_dots(x, y, grad_scale=scale), grad_scale=scale, **own)
        steps.append([*moved, *m, *x])
    same(*steps, 1e-5)


@pytest.mark.parametrize("eta", [None, 0.01])
@pytest.mark.parametrize("eps", [1e-12, 3.0])
@pytest.mark.parametrize("shrink", [0.0, 0.01])
def test_unscaling_in_the_ascent_equals_unscaling_before(path, scales, eta, eps, shrink):
    w, _, ys = make()
    big, how = [y * float(scales[1]) for y in ys], {"eta": eta, "eps": eps, "shrink": shrink}
    sums = multi_norm(big, weights=None if eta is None else w, eta=eta or 0.0, grad_scale=scales[1])
    moved = [[t.clone() for t in w] for _ in range(3)]
    saved = [torch.empty_like(t) for t in w]
    found = perturb_(moved[0], ys, saved, None, 0.3, **how)
    for m, ready in ((moved[1], None), (moved[2], sums)):
        again = perturb_(m, big, saved, ready, 0.3, grad_scale=scales[1], **how)
        torch.testing.assert_close(again.values, found.values, rtol=1e-6, atol=0)
        same(m, moved[0])
        assert all(map(torch.equal, saved, w))
    zeros = [torch.zeros_like(y) for y in ys]
    again = [t.clone() for t in w]
    perturb_(again, zeros, saved, None, 0.3, grad_scale=scales[1], **how)
    assert all(map(torch.equal, again, w))


def test_overflow_of_a_scaled_gradient_stops_the_step(path):
    w, xs, ys = make([5, 40])
    xs[1][7] = math.inf
    moved, flags = [torch.full_like(t, 7) for t in w], torch.tensor([0.0, 0.0])
    sums = multi_step_(moved, w, xs, ys, None, None, "gsam", alpha=0.4, lr=0.1, grad_scale=2.0, nonfinite=flags)
    assert all(map(torch.equal, moved, w))
    assert flags.tolist() == sums.nonfinite.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_finite_stop_the_adaptive_ascent(path, dtype):
    check_nonfinite_weights(CORE.pick("cpu", (dtype, dtype), path), dtype)


def test_large_and_small_values_are_finite(path):
    for value in (1e20, 1e-42):
        ys = [torch.full((100,), value)]
        sums = multi_norm(ys)
        assert sums.nonfinite.tolist() == [0, 0]
        torch.testing.assert_close(sums.values[-1, 1], 100 * ys[0][0].double() ** 2)
    ys = [torch.full((100,), 1e200, dtype=torch.float64)]
    assert multi_norm(ys).nonfinite.tolist() == [0, 0]


def test_the_ends_of_half_precision(isa):
    """Sums of its largest and smallest numbers are exact; results round to even, and to infinity from 65520 on."""
    for value in (65504.0, -(2.0**-24)):
        ys = [torch.full((1000,), value, dtype=torch.float16)]
        sums = multi_norm(ys)
        assert sums.nonfinite.tolist() == [0, 0]
        assert sums.values[-1, 1] == 1000 * value**2
    # Halves of sums that lie between two numbers, then sums that do.
    x = [torch.tensor([2048.0, 2050.0, 65504.0, 65504.0, 2.0**-24] * 7, dtype=torch.float16)]
    y = [torch.tensor([1.0, 1.0, 16.0, 15.0, 2.0**-24] * 7, dtype=torch.float16)]
    multi_combine_(x, y, multi_dots(x, y), "mix", t=0.5)
    assert x[0].tolist() == [1024.0, 1026.0, 32768.0, 32752.0, 2.0**-24] * 7
    w = [torch.tensor([2048.0, 2050.0, 65504.0, 65504.0, 2.0**-24] * 7, dtype=torch.float16)]
    step = [torch.tensor([1.0, 1.0, 16.0, 15.0, 2.0**-24] * 7, dtype=torch.float16)]
    sums = multi_norm(step)
    perturb_(w, step, [torch.empty_like(w[0])], sums, math.sqrt(sums.values[-1, 1]), eps=0.0)
    assert w[0].tolist() == [2048.0, 2052.0, math.inf, 65504.0, 2.0**-23] * 7


def test_degenerate_gradients(path):
    y = torch.randn(50)
    for x, wanted in ((y.neg(), y), (torch.zeros(50), torch.zeros(50)), (y.clone(), y)):
        xs = [x.clone()]
        multi_combine_(xs, [y], multi_dots(xs, [y]), "constrained", lower=-1.5, upper=0.9)
        torch.testing.assert_close(xs[0], wanted, rtol=0, atol=0)
    xs = [y.clone()]
    multi_combine_(xs, [torch.zeros(50)], multi_dots(xs, [torch.zeros(50)]), "surgery")
    assert torch.equal(xs[0], y)
    assert multi_norm([]).values.tolist() == [[0, 0, 0]]


def test_bits_do_not_depend_on_threads(isa):
    _, xs, ys = make([300001, 5, 70000])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            sums, g = multi_dots(xs, ys), [x.clone() for x in xs]
            multi_combine_(g, ys, sums, "gsam", alpha=0.4)
            results.append((sums.values, *g))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_layouts_and_offsets(path):
    w = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    y, x = torch.randn(4, 6, 5, 5), torch.randn(6, 4, 5, 5).transpose(0, 1)
    saved = torch.empty_like(w)
    flat = torch.randn(101)[1:]
    old, norm = [w.clone(), flat.clone()], math.sqrt(float(y.square().sum() + flat.square().sum()))
    step = flat.clone()
    perturb_([w, flat], [y, step], [saved, torch.empty(100)], multi_norm([y, step]), 0.5)
    torch.testing.assert_close(w, old[0] + 0.5 * y / norm)
    torch.testing.assert_close(flat, old[1] + 0.5 * step / norm)
    want = 0.3 * x + 0.7 * y
    multi_combine_([x], [y], multi_dots([x], [y]), "mix", t=0.3)
    torch.testing.assert_close(x, want)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 300), min_size=1, max_size=6), st.floats(0.1, 8))
def test_laws(seed, sizes, factor):
    _, xs, ys = make(sizes, seed=seed)
    sums = multi_dots(xs, ys)
    # split invariance: the concatenated vector has the same global sums
    joined = multi_dots([torch.cat(xs)], [torch.cat(ys)])
    scale = float(sums.values[-1, :2].sum()) + 1e-300
    assert float((joined.values[-1] - sums.values[-1]).abs().max()) <= 1e-14 * scale

    def combine(xs, ys, rule, **kw):
        g = [x.clone() for x in xs]
        multi_combine_(g, ys, multi_dots(g, ys), rule, **kw)
        return torch.cat(g)

    # permuting tensors permutes results
    order = list(reversed(range(len(xs))))
    turned = [xs[i] for i in order], [ys[i] for i in order]
    reverse = torch.cat([p for p in reversed(combine(*turned, "constrained", lower=0.2, upper=0.7).split(
        [sizes[i] for i in order]))])  # fmt: skip
    assert torch.equal(reverse, combine(xs, ys, "constrained", lower=0.2, upper=0.7))
    # both gradients t times as large give t G; GSAM changes x orthogonally to it, and is SAM for alpha = 0
    g, x = combine(xs, ys, "gsam", alpha=0.4), torch.cat(xs)
    scaled = combine([t * factor for t in xs], [t * factor for t in ys], "gsam", alpha=0.4)
    torch.testing.assert_close(scaled, g * factor, rtol=1e-4, atol=1e-5)
    assert abs(float((g - x).double() @ x.double())) <= 1e-5 * scale
    assert torch.equal(combine(xs, ys, "gsam", alpha=0.0), x)
    # thresholds beyond all cosines: SAM and plain descent
    assert torch.equal(combine(xs, ys, "constrained", lower=-1.01, upper=-1.01), x)
    plain = combine(xs, ys, "constrained", lower=1.01, upper=1.01)
    torch.testing.assert_close(plain, torch.cat(ys))
    # a projection is never longer than what is projected
    for p, part in enumerate(combine(xs, ys, "constrained", lower=-2, upper=2).split(sizes)):
        assert float(part.norm()) <= 1.00001 * float(xs[p].norm()) + 1e-6


def test_bad_input_is_refused():
    a = [torch.ones(3)]
    sums = multi_dots(a, a)
    with pytest.raises(TypeError, match="sparse"):
        multi_norm([torch.eye(3).to_sparse()])
    with pytest.raises(TypeError, match="view_as_real"):
        multi_norm([torch.ones(3, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="one device"):
        multi_norm([torch.ones(3), torch.ones(3, device="meta")])
    with pytest.raises(ValueError, match="one shape"):
        multi_dots(a, [torch.ones(4)])
    with pytest.raises(ValueError, match="equally long"):
        multi_dots(a, [])
    whole = torch.ones(8)
    for parts in ([whole, whole], [whole[:5], whole[4:]]):
        again = [t.clone() for t in parts]
        with paths("reference"), pytest.raises(ValueError, match="share memory"):
            perturb_(parts, again, again, None, 0.1)
        with paths("reference"), pytest.raises(ValueError, match="share memory"):
            multi_step_(parts, again, again, again, None, None, "second", lr=0.1)
    assert torch.equal(whole, torch.ones(8))
    with pytest.raises(ValueError, match="no rule"):
        multi_combine_(a, a, sums, "best")
    with pytest.raises(ValueError, match="rho"):
        perturb_(a, a, a, sums, -0.1)
    with pytest.raises(ValueError, match="momentum"):
        multi_step_(a, a, a, a, None, sums, "second", lr=0.1, momentum=0.9)
    with pytest.raises(pyface.ops.PathError), paths("cuda"):
        multi_norm(a)


def test_opcheck_and_compile():
    w, xs, ys = make([5, 40])
    saved = [torch.empty_like(t) for t in w]
    sums = multi_dots(xs, ys)
    ops, checks = torch.ops.pyface, ("test_schema", "test_faketensor", "test_autograd_registration")
    rule = (sums.values, sums.nonfinite, "gsam", 0.4, 0.0, False)
    torch.library.opcheck(ops.multi_norm.default, (ys, [], 0.0, None), test_utils=checks)
    torch.library.opcheck(ops.multi_dots.default, (xs, ys, None), test_utils=checks)
    args = (w, saved, ys, sums.values, sums.nonfinite, [0.1, 0.1], 1e-12, 0.0, None, None)
    torch.library.opcheck(ops.perturb_.default, args, test_utils=checks)
    torch.library.opcheck(ops.restore_.default, (w, saved, None), test_utils=checks)
    torch.library.opcheck(ops.multi_combine_.default, (xs, ys, *rule, None), test_utils=checks)
    sgd = (0.1, 0.0, 0.0, 0.0, False, False, False)
    torch.library.opcheck(ops.multi_step_.default, (w, saved, xs, ys, [], *rule, *sgd, None), test_utils=checks)

    def step(w, xs, ys, saved):
        perturb_(w, ys, saved, multi_norm(ys), 0.1)
        restore_(w, saved)
        multi_combine_(xs, ys, multi_dots(xs, ys), "gsam", alpha=0.4)

    copies = [[t.clone() for t in tensors] for tensors in (w, xs, ys, saved)]
    step(w, xs, ys, saved)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*copies)
    for ours, theirs in zip((w, xs, saved), (copies[0], copies[1], copies[3]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_core_under_sanitizers(sanitized):
    sanitized("sharpness", "-fopenmp")
