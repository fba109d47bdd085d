"""`perturb` and `multi_combine`: the values of the ops in place, derivatives against closed forms, edges."""

from __future__ import annotations

import math

import pytest
import torch
from sharpness_expected import BF16, F16, F32, F64, RULES, make
from torch.autograd import gradcheck, gradgradcheck

import pyface
from pyface.ops import multi_combine, multi_combine_, multi_dots, multi_norm, perturb, perturb_

# A rule with thresholds on both sides of which it is looked at: cosines of `lists` are about 0.86, 0.53 and -0.5.
CASES = [
    *((rule, parameters, granularity) for rule, parameters in RULES for granularity in ("tensor", "global")),
    ("constrained", {"lower": -0.9, "upper": 0.99}, "global"),  # the projection
    ("constrained", {"lower": 0.6, "upper": 0.8}, "tensor"),  # x, y, y
    ("constrained", {"lower": -0.6, "upper": 0.4}, "tensor"),  # x, x, projection
]
IDS = [f"{rule}-{granularity}-{number}" for number, (rule, _, granularity) in enumerate(CASES)]
SHAPES = [(3,), (2, 2), (2, 1)]


def lists(dtype=F64, seed=0):
    """w, x, y with cosines of x and y that are positive, smaller, negative, and positive over all."""
    g = torch.Generator().manual_seed(seed)
    w, y, noise = ([torch.randn(shape, generator=g, dtype=F64) for shape in SHAPES] for _ in range(3))
    x = []
    for y_p, n_p, (along, across) in zip(y, noise, ((1.0, 0.6), (0.7, 1.1), (-0.6, 1.0)), strict=True):
        n_p = n_p - (n_p * y_p).sum() / (y_p * y_p).sum() * y_p
        x.append(along * y_p + across * n_p * (y_p.norm() / n_p.norm()))
    return [[t.to(dtype).requires_grad_() for t in tensors] for tensors in (w, x, y)]


def inner(a, b):
    return sum((s * t).sum() for s, t in zip(a, b, strict=True))


def cotangents(seed=9):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=F64) for shape in SHAPES]


def close(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-13)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("types", [(F32, F32), (F64, F64), (BF16, BF16), (F32, BF16)], ids=str)
def test_values_are_those_of_the_ops_in_place(path, types):
    rounding = {F32: 2e-6, F64: 1e-13, BF16: 2**-7}
    w, x, y = make([0, 1, 17, 70001], types)
    with pyface.paths(path):
        for eta in (None, 0.01):
            moved, saved = [t.clone() for t in w], [torch.empty_like(t) for t in w]
            sums = multi_norm(y, weights=None if eta is None else w, eta=eta or 0.0)
            perturb_(moved, y, saved, sums, [0.1, 0.2, 0.0, 0.4], eta=eta, shrink=0.0 if eta else 0.001)
            for f, e in zip(perturb(w, y, [0.1, 0.2, 0.0, 0.4], eta=eta, shrink=0.0 if eta else 0.001), moved,
                            strict=True):  # fmt: skip
                torch.testing.assert_close(f, e, rtol=rounding[types[0]], atol=rounding[types[0]])
        for rule, parameters, granularity in CASES:
            g = [t.clone() for t in x]
            multi_combine_(g, y, multi_dots(g, y), rule, granularity=granularity, **parameters)
            for f, e in zip(multi_combine(x, y, rule, granularity=granularity, **parameters), g, strict=True):
                torch.testing.assert_close(f, e, rtol=rounding[types[1]], atol=rounding[types[1]])


def test_types_are_those_of_weights_and_second_gradients():
    w, x, y = lists(F16)
    assert {t.dtype for t in perturb(w, [t.float() for t in y], 0.1)} == {F16}
    assert {t.dtype for t in multi_combine(x, [t.double() for t in y], "gsam", alpha=0.4)} == {F16}
    assert perturb([], [], 0.1) == multi_combine([], [], "second") == []


# ---- first order: the closed forms ----------------------------------------------------------------------------------


def test_ascent_has_the_gradients_of_the_closed_form():
    w, _, y = lists()
    c = cotangents()
    rho, eps, shrink = torch.tensor(0.3, dtype=F64, requires_grad=True), 1e-3, 0.02
    found = torch.autograd.grad(perturb(w, y, rho, eps=eps, shrink=shrink), [*w, *y, rho], c)
    n, q = inner(y, y).sqrt(), inner(c, y)
    factor, along = rho / (n + eps) - shrink, rho * q / (n * (n + eps) ** 2)
    dy = [factor * c_p - along * y_p for c_p, y_p in zip(c, y, strict=True)]
    close(found, [*c, *dy, q / (n + eps)])


def test_a_rho_for_each_tensor_has_its_own_gradient():
    w, _, y = lists()
    c, rho = cotangents(), torch.tensor([0.3, 0.0, 0.5], dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(perturb(w, y, rho), [rho], c)
    n = inner(y, y).sqrt()
    close(found, [(c_p * y_p).sum() / n for c_p, y_p in zip(c, y, strict=True)])
    mixed = perturb(w, y, [rho[0], 0.0, 0.5])
    close(mixed, perturb(w, y, rho))
    assert torch.autograd.grad(mixed, [rho], c)[0][1:].tolist() == [0, 0]


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_gsam_and_projection_have_the_gradients_of_the_closed_forms(granularity):
    _, *both = lists()
    c, alpha = cotangents(), 0.4
    whole = granularity == "global"
    groups = [tuple(zip(*both, c, strict=True))] if whole else [(row,) for row in zip(*both, c, strict=True)]
    wanted = {"gsam": ([], []), "constrained": ([], [])}
    for group in groups:
        xs, ys, cs = zip(*group, strict=True)
        a, b, k = inner(xs, xs), inner(ys, ys), inner(xs, ys)
        z_sum, s = a + 2 * k + b, (a + k) / (a + 2 * k + b)
        q, c_x = inner(cs, [x + y for x, y in zip(xs, ys, strict=True)]), inner(cs, xs)
        for x, y, c_p in group:
            dx, dy = wanted["gsam"]
            dx.append((1 + alpha * k / a) * c_p + alpha * c_x * (y / a - 2 * k * x / a**2))
            dy.append(-alpha * c_p + alpha * c_x * x / a)
            dx, dy = wanted["constrained"]
            dx.append(s * c_p + q / z_sum * (2 * x + y - 2 * s * (x + y)))
            dy.append(s * c_p + q / z_sum * (x - 2 * s * (x + y)))
    for rule, parameters in (("gsam", {"alpha": alpha}), ("constrained", {"lower": -2, "upper": 2})):
        g = multi_combine(*both, rule, granularity=granularity, **parameters)
        found = torch.autograd.grad(g, [*both[0], *both[1]], c)
        close(found, [*wanted[rule][0], *wanted[rule][1]])


def test_parameters_of_rules_have_gradients():
    _, x, y = lists()
    c = cotangents()
    for alpha in (0.0, 1.0):  # where u and v look like another rule's constants
        alpha = torch.tensor(alpha, dtype=F64, requires_grad=True)
        (found,) = torch.autograd.grad(multi_combine(x, y, "gsam", alpha=alpha), [alpha], c)
        k, a = inner(x, y), inner(x, x)
        close([found], [inner(c, [k / a * x_p - y_p for x_p, y_p in zip(x, y, strict=True)])])
        (found,) = torch.autograd.grad(multi_combine(x, y, "mix", t=alpha), [alpha], c)
        close([found], [inner(c, [x_p - y_p for x_p, y_p in zip(x, y, strict=True)])])
    # x = y makes u = 1 and v = 0 of GSAM's other form, whose gradient is another one all the same
    (dx,) = torch.autograd.grad(multi_combine(x, [t.detach().clone() for t in x], "gsam_first", alpha=1.0), x[:1], c)
    a, c_y = inner(x, x), inner(c, x)
    close([dx], [c[0] - c_y * x[0] / a])


# ---- all orders, modes and transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [None, 0.01])
def test_ascent_under_gradcheck(eta):
    w, _, y = lists()
    rho, shrink = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.3, 0.05))

    def ascent(rho, shrink, *tensors):
        return tuple(perturb(tensors[:3], tensors[3:], rho, shrink=shrink, eta=eta))

    everything = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(ascent, (rho, shrink, *w, *y), **everything)
    assert gradgradcheck(ascent, (rho, shrink, *w, *y), check_fwd_over_rev=True)


@pytest.mark.parametrize(("rule", "parameters", "granularity"), CASES, ids=IDS)
def test_rules_under_gradcheck(rule, parameters, granularity):
    _, x, y = lists()

    def combine(*tensors):
        return tuple(multi_combine(tensors[:3], tensors[3:], rule, granularity=granularity, **parameters))

    assert gradcheck(combine, (*x, *y), check_forward_ad=True)
    assert gradgradcheck(combine, (*x, *y), check_fwd_over_rev=True)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("side", [-1, 1])
def test_either_side_of_a_threshold_has_its_own_case(threshold, side):
    """A cosine of threshold ± 1e-6; the bounds are `lower` = 0.5 and `upper` = 0.8."""
    c = threshold + side * 1e-6
    y = torch.tensor([2.0, 0, 0], dtype=F64, requires_grad=True)
    x = torch.tensor([3 * c, 3 * math.sqrt(1 - c * c), 0], dtype=F64, requires_grad=True)

    def combine(x, y):
        return multi_combine([x], [y], "constrained", lower=0.5, upper=0.8)[0]

    jx, jy = torch.autograd.functional.jacobian(combine, (x, y))
    one, zero = torch.eye(3, dtype=F64), torch.zeros(3, 3, dtype=F64)
    if (threshold, side) == (0.5, -1):
        assert torch.equal(jx, zero)
        assert torch.equal(jy, one)
    elif (threshold, side) == (0.8, 1):
        assert torch.equal(jx, one)
        assert torch.equal(jy, zero)
    else:
        assert gradcheck(combine, (x, y), eps=1e-8, atol=1e-6)
        assert jx.norm() > 0.5
        assert jy.norm() > 0.1


def test_function_transforms():
    """A batch of lists by vmap, per-sample gradients, forward mode."""
    w, y, rho = torch.randn(4, 7), torch.randn(4, 7), torch.rand(4)

    def ascent(w, y, rho):
        return perturb([w], [y], rho)[0]

    def rule(x, y):
        return multi_combine([x], [y], "constrained", lower=-0.1, upper=0.3)[0]

    gradient = torch.func.grad(lambda w, y, rho: ascent(w, y, rho).sin().sum(), argnums=(0, 1, 2))
    for f, arguments in ((ascent, (w, y, rho)), (rule, (w, y)), (gradient, (w, y, rho))):
        found = torch.vmap(f)(*arguments)
        for i in range(4):
            torch.testing.assert_close(
                [t[i] for t in found] if isinstance(found, tuple) else found[i],
                list(alone) if isinstance(alone := f(*(a[i] for a in arguments)), tuple) else alone,
            )
    tangents = torch.randn(7), torch.randn(7)
    _, forward = torch.func.jvp(rule, (w[0], y[0]), tangents)
    jacobians = torch.func.jacrev(rule, argnums=(0, 1))(w[0], y[0])
    torch.testing.assert_close(forward, sum(j @ t for j, t in zip(jacobians, tangents, strict=True)))


def test_compiles_as_one_graph():
    w, x, y = lists(F32)

    def both(rho, w, x, y):
        moved = perturb(w, y, rho, eta=0.01)
        return [a * b for a, b in zip(moved, multi_combine(x, y, "constrained", lower=0.5, upper=0.8), strict=True)]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for f in (both, compiled):
        rho = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
        found = f(rho, w, x, y)
        results.append([*found, *torch.autograd.grad(sum(t.sum() for t in found), [rho, *w, *x, *y])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
def test_a_gradient_of_zero_moves_nothing_and_has_no_gradient(eta):
    w, _, y = lists()
    y = [torch.zeros_like(t, requires_grad=True) for t in y]
    rho = torch.tensor(0.3, dtype=F64, requires_grad=True)
    moved = perturb(w, y, rho, eta=eta)
    assert all(map(torch.equal, moved, w))
    c = cotangents()
    *found, drho = torch.autograd.grad(moved, [*w, *y, rho], c, create_graph=True)
    close(found, [*c, *(torch.zeros_like(t) for t in y)])
    assert drho == 0
    again = torch.autograd.grad(sum((f * f).sum() for f in found) + drho, [*w, *y, rho], allow_unused=True)
    assert all(g is None or not g.any() for g in again)


@pytest.mark.parametrize("rule", ["gsam", "gsam_first", "surgery", "constrained"])
@pytest.mark.parametrize("zero", ["x", "y", "both"])
def test_rules_of_zeros_are_x(rule, zero):
    _, x, y = lists()
    x = [torch.zeros_like(t, requires_grad=True) for t in x] if zero != "y" else x
    y = [torch.zeros_like(t, requires_grad=True) for t in y] if zero != "x" else y
    g, c = multi_combine(x, y, rule, **dict(RULES)[rule]), cotangents()
    assert all(map(torch.equal, g, x))
    close(torch.autograd.grad(g, [*x, *y], c), [*c, *(torch.zeros_like(t) for t in y)])


def test_opposed_gradients_give_y():
    """x = -y: there is nothing to project on."""
    _, _, y = lists()
    x = [(-t).detach().requires_grad_() for t in y]
    g, c = multi_combine(x, y, "constrained", lower=-1.5, upper=0.9), cotangents()
    assert all(map(torch.equal, g, y))
    close(torch.autograd.grad(g, [*x, *y], c), [*(torch.zeros_like(t) for t in x), *c])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_spoils_no_gradient(value):
    w, x, y = lists()
    c, bad = cotangents(), [t.detach().clone() for t in y]
    bad[1][0, 1] = value
    bad = [t.requires_grad_() for t in bad]
    rho = torch.tensor(0.3, dtype=F64, requires_grad=True)
    moved = perturb(w, bad, rho)
    assert all(map(torch.equal, moved, w))
    found = torch.autograd.grad(moved, [*w, *bad, rho], c)
    close(found, [*c, *(torch.zeros_like(t) for t in y), torch.zeros((), dtype=F64)])
    for first, second in ((bad, y), (x, bad)):
        g = multi_combine(first, second, "gsam", alpha=0.4)
        for f, e in zip(g, first, strict=True):
            torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True)
        close(torch.autograd.grad(g, [*first, *second], c), [*c, *(torch.zeros_like(t) for t in second)])
    # a weight that is not finite stops the adaptive ascent, and takes no part in the other
    spoilt = [t.detach().clone() for t in w]
    spoilt[0][0] = value
    spoilt = [t.requires_grad_() for t in spoilt]
    for eta in (None, 0.01):
        moved = perturb(spoilt, y, rho, eta=eta)
        assert torch.equal(moved[1], spoilt[1]) is (eta is not None)
        assert not moved[0][0].isfinite()
        found = torch.autograd.grad(moved, [*spoilt, *y, rho], c)
        close(found[:3], c)
        assert all(f.isfinite().all() for f in found)


def test_bad_input_is_refused():
    w, x, y = lists()
    with pytest.raises(ValueError, match="rho must be finite"):
        perturb(w, y, -0.1)
    with pytest.raises(ValueError, match="one per tensor"):
        perturb(w, y, torch.ones(2))
    with pytest.raises(ValueError, match="one shape"):
        perturb(w, y[::-1], 0.1)
    with pytest.raises(ValueError, match="equally long"):
        multi_combine(x, y[:1], "second")
    with pytest.raises(ValueError, match="no rule"):
        multi_combine(x, y, "best")
    with pytest.raises(TypeError, match="takes the parameters"):
        multi_combine(x, y, "gsam")
    with pytest.raises(TypeError, match="sparse"):
        perturb([torch.eye(3).to_sparse()], [torch.eye(3)], 0.1)


def test_a_radius_is_learned_through_two_steps_of_training():
    """Meta-learning: the gradient of a validation loss after two SAM steps, by rho, against finite differences."""
    data = torch.randn(2, 12, 4, dtype=F64, generator=torch.Generator().manual_seed(1))

    def loss(weights, x):
        return (torch.tanh(x @ weights[0]) @ weights[1]).sub(x.sum(1, keepdim=True).sin()).square().mean()

    def validation(rho):
        g = torch.Generator().manual_seed(2)
        weights = [torch.randn(shape, dtype=F64, generator=g).requires_grad_() for shape in ((4, 5), (5, 1))]
        for _ in range(2):
            ys = torch.autograd.grad(loss(weights, data[0]), weights, create_graph=True)
            xs = torch.autograd.grad(loss(perturb(weights, ys, rho), data[0]), weights, create_graph=True)
            steps = multi_combine(xs, ys, "gsam", alpha=0.3)
            weights = [w - 0.2 * g for w, g in zip(weights, steps, strict=True)]
        return loss(weights, data[1])

    rho = torch.tensor(0.1, dtype=F64, requires_grad=True)
    assert gradcheck(validation, (rho,), eps=1e-6, atol=1e-7)
    assert torch.autograd.grad(validation(rho), rho)[0].abs() > 1e-4
