"""Each optimiser against its paper in float64 arithmetic of the test's own, and the pass that does all at once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import pyface
import pyface.optim.sharpness as module
from pyface.optim import ASAM, GSAM, SAGM, SAM, FriendlySAM, GradientConstrainedSAM

ALL = [SAM, ASAM, GSAM, SAGM, FriendlySAM, GradientConstrainedSAM]
RHO = 0.9  # far enough for every case of the rules to occur
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


def parameters(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in ((7,), (3, 5), (2, 2, 3))]


def loss_of(params, i=0):
    """Far from quadratic, with gradients that turn from tensor to tensor and differ between steps."""
    return sum(((1 + n + i) * p).sin().sum() + (p * p.roll(1, -1)).sum() ** 2 / 50 for n, p in enumerate(params))


def gradients(vectors, i):
    leaves = [v.clone().requires_grad_() for v in vectors]
    return torch.autograd.grad(loss_of(leaves, i), leaves)


def inner(xs, ys):
    return sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))


def projected(x, y, lower, upper):
    """Flat vectors x and y by the cosine between them."""
    c = float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))
    if c >= upper:
        return x
    if c <= lower:
        return y
    z = x + y
    return float(x @ z) / float(z @ z) * z


def papers(name, ws, i, memory, rho):
    """(ascent, combined gradient) by the papers; memory: what a method keeps between steps."""
    ys = gradients(ws, i)
    if name == "ASAM":
        t = [w.abs() + 0.01 for w in ws]
        norm = math.sqrt(sum(float(((a * y) ** 2).sum()) for a, y in zip(t, ys, strict=True)))
        e = [rho * a * a * y / norm for a, y in zip(t, ys, strict=True)]
    elif name == "FriendlySAM":
        means = memory.get("m")
        d = ys if means is None else [y - 0.8 * m for y, m in zip(ys, means, strict=True)]
        memory["m"] = ys if means is None else [0.7 * m + 0.3 * y for y, m in zip(ys, means, strict=True)]
        e = [rho * v / math.sqrt(inner(d, d)) for v in d]
    else:
        factor = rho / math.sqrt(inner(ys, ys)) - (0.02 if name == "SAGM" else 0)
        e = [factor * y for y in ys]
    xs = gradients([w + v for w, v in zip(ws, e, strict=True)], i)
    if name == "SAGM":
        return [(x + y) / 2 for x, y in zip(xs, ys, strict=True)]
    if name == "GSAM":
        along = inner(xs, ys) / inner(xs, xs)
        return [x - 0.3 * (y - along * x) for x, y in zip(xs, ys, strict=True)]
    if name == "GradientConstrainedSAM":
        return [projected(x.flatten(), y.flatten(), 0.15, 0.7).view_as(x) for x, y in zip(xs, ys, strict=True)]
    if name == "constrained globally":
        x, y = (torch.cat([v.flatten() for v in vs]) for vs in (xs, ys))
        parts = projected(x, y, 0.35, 0.85).split([w.numel() for w in ws])
        return [part.view_as(w) for part, w in zip(parts, ws, strict=True)]
    if name == "never given up":
        return [projected(x.flatten(), y.flatten(), -9, 0.7).view_as(x) for x, y in zip(xs, ys, strict=True)]
    return list(xs)


FAMILY = {
    "SAM": (SAM, {}),
    "ASAM": (ASAM, {}),
    "GSAM": (GSAM, {"alpha": 0.3}),
    "SAGM": (SAGM, {"alpha": 0.02}),
    "FriendlySAM": (FriendlySAM, {"sigma": 0.8, "decay": 0.7}),
    "GradientConstrainedSAM": (GradientConstrainedSAM, {"lower": 0.15, "upper": 0.7}),
    "constrained globally": (GradientConstrainedSAM, {"lower": 0.35, "upper": 0.85, "granularity": "global"}),
    "never given up": (GradientConstrainedSAM, {"lower": None, "upper": 0.7}),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_follows_its_paper(name, base):
    kind, own = FAMILY[name]
    ours, plain = parameters(), parameters()
    arguments = SGD if base is torch.optim.SGD else {"lr": 0.01}
    optimizer, theirs = kind(ours, base, rho=RHO, **own, **arguments), base(plain, **arguments)
    memory = {}
    for i in range(8):

        def closure(i=i):
            optimizer.zero_grad()
            value = loss_of(ours, i)
            value.backward()
            return value

        closure()
        optimizer.step(closure)
        for p, g in zip(plain, papers(name, [p.detach() for p in plain], i, memory, RHO), strict=True):
            p.grad = g
        theirs.step()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_cases_of_the_constrained_rule_all_occur():
    """Else the test above would say little."""
    whole, parts = set(), set()
    params = parameters()
    for i in range(8):
        ws = [p.detach() for p in params]
        ys = gradients(ws, i)
        xs = gradients([w + RHO * y / math.sqrt(inner(ys, ys)) for w, y in zip(ws, ys, strict=True)], i)
        for seen, lower, upper, pairs in (
            (parts, 0.15, 0.7, [([x], [y]) for x, y in zip(xs, ys, strict=True)]),
            (whole, 0.35, 0.85, [(xs, ys)]),
        ):
            for x, y in pairs:
                c = inner(x, y) / math.sqrt(inner(x, x) * inner(y, y))
                seen.add("x" if c >= upper else "y" if c <= lower else "between")
        for p, x in zip(params, xs, strict=True):
            p.data -= 0.05 * x
    assert parts == whole == {"x", "y", "between"}


@pytest.mark.parametrize("name", ["penalty", "surgery"])
def test_a_rule_of_the_core_makes_an_optimiser(name):
    """Gradient-norm penalty (arXiv:2202.03599) and PCGrad's surgery, as the documentation makes them."""

    class Own(SAM):
        rule = "mix" if name == "penalty" else "surgery"

    ours, plain = parameters(), parameters()
    optimizer = Own(ours, torch.optim.SGD, rho=0.9, **SGD)
    optimizer.rule_parameters = {"t": 0.8} if name == "penalty" else {}
    theirs = torch.optim.SGD(plain, **SGD)
    conflicts = 0
    for i in range(8):
        loss_of(ours, i).backward()
        optimizer.first_step()
        loss_of(ours, i).backward()
        optimizer.second_step(zero_grad=True)
        ws = [p.detach() for p in plain]
        ys = gradients(ws, i)
        xs = gradients([w + 0.9 * y / math.sqrt(inner(ys, ys)) for w, y in zip(ws, ys, strict=True)], i)
        k = inner(xs, ys)
        conflicts += k < 0
        for p, x, y in zip(plain, xs, ys, strict=True):
            p.grad = 0.8 * x + 0.2 * y if name == "penalty" else x - min(k, 0) / inner(ys, ys) * y
        theirs.step()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert 0 < conflicts < 8


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_maximising_is_minimising_the_negated_loss(kind, base):
    results = []
    for sign in (1, -1):
        params = parameters()
        optimizer = kind(
            [{"params": params[:1]}, {"params": params[1:], "rho": 0.5}], base, rho=0.3, lr=0.02, maximize=sign < 0
        )
        for i in range(4):
            for take in (optimizer.first_step, optimizer.second_step):
                (sign * loss_of(params, i)).backward()
                take(zero_grad=True)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_groups_have_their_own_rho_and_one_norm():
    ours, plain = parameters(), parameters()
    optimizer = SAM(
        [{"params": ours[:1], "rho": 0.5}, {"params": ours[1:], "lr": 0.01}], torch.optim.SGD, rho=0.1, **SGD
    )
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.1]
    theirs = torch.optim.SGD([{"params": plain[:1]}, {"params": plain[1:], "lr": 0.01}], **SGD)
    for i in range(4):
        loss_of(ours, i).backward()
        optimizer.first_step()
        loss_of(ours, i).backward()
        optimizer.second_step(zero_grad=True)
        ws = [p.detach() for p in plain]
        ys = gradients(ws, i)
        norm = math.sqrt(inner(ys, ys))
        moved = [w + rho * y / norm for w, y, rho in zip(ws, ys, (0.5, 0.1, 0.1), strict=True)]
        for p, x in zip(plain, gradients(moved, i), strict=True):
            p.grad = x
        theirs.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# ---- restoring, rule and SGD in one pass ---------------------------------------------------------------------------


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    real = module.multi_step_
    monkeypatch.setattr(module, "multi_step_", lambda *a, **k: (calls.append(len(a[0])), real(*a, **k)))
    return calls


def train(optimizer, params, steps=4, missing=False):
    for i in range(steps):
        optimizer.zero_grad()
        loss_of(params, i).backward()
        if missing:
            params[i % 3].grad = None
        optimizer.first_step()
        loss_of(params, i).backward()
        if missing:
            params[(i + 1) % 3].grad = None
        optimizer.second_step()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "sgd",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}, {"maximize": True},
     {"momentum": 0.8, "dampening": 0.3}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_one_pass_equals_separate_passes(fused_calls, kind, sgd, groups, missing, dtype):
    results = []
    for separate in (False, True):
        params = parameters(dtype)
        listed = params if groups == 1 else [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "rho": 0.4}]
        optimizer = kind(listed, torch.optim.SGD, rho=0.2, lr=0.05, **sgd)
        if separate:
            optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
        fused_calls.clear()
        train(optimizer, params, missing=missing)
        assert bool(fused_calls) is not separate
        buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
        results.append([*params, *(b for b in buffers if b is not None)])
    assert len(results[0]) == len(results[1])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_what_forbids_the_one_pass(fused_calls):
    class Other(torch.optim.SGD):
        pass

    params = parameters()
    for base, arguments in (
        (Other, {"lr": 0.1}),
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": torch.tensor(0.1)}),
        (torch.optim.SGD, {"lr": 0.1, "rho": 0}),
    ):
        train(SAM(params, base, **arguments), params, 1)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    steps = []
    step = optimizer.base_optimizer.step
    optimizer.base_optimizer.step = lambda *a: (steps.append(1), step(*a))  # somebody wraps it
    train(optimizer, params, 2)
    assert steps == [1, 1]
    assert not fused_calls
    train(SAM(params, torch.optim.SGD, lr=0.1, fused=True), params, 1)  # how torch does it is no matter
    assert fused_calls


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_zero_gradients_leave_every_bit(kind, momentum):
    params = parameters(torch.float32)
    with torch.no_grad():
        params[0][0] = -0.0
    before = [p.detach().clone().view(torch.uint8) for p in params]
    optimizer = kind(params, torch.optim.SGD, lr=0.1, momentum=momentum)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.first_step()
        assert all(torch.equal(p.detach().view(torch.uint8), b) for p, b in zip(params, before, strict=True))
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.second_step()
        assert all(torch.equal(p.detach().view(torch.uint8), b) for p, b in zip(params, before, strict=True))
    assert optimizer.skipped == 0


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_gradients_that_are_not_finite_leave_every_bit(kind, base, value, bad_pass):
    params = parameters(torch.float32)
    optimizer = kind(params, base, lr=0.1, **({"momentum": 0.9} if base is torch.optim.SGD else {}))
    train(optimizer, params, 1)
    before = [p.detach().clone() for p in params]
    state = [v.clone() for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    optimizer.zero_grad()
    for number in (1, 2):
        loss_of(params).backward()
        if number == bad_pass:
            params[1].grad[2, 4] = value
        (optimizer.first_step if number == 1 else optimizer.second_step)()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    after = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    assert optimizer.skipped == 1
    train(optimizer, params, 1)
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], before[0])
    assert optimizer.skipped == 1


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_gradients_missing_in_turn(base):
    """First only: restored and left alone. Second only: updated from where it is. Never: untouched."""
    params = parameters()
    optimizer = GradientConstrainedSAM(params, base, lr=0.1)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    optimizer.first_step()
    assert not torch.equal(params[0], before[0])
    params[1].grad = torch.ones_like(params[1])
    optimizer.second_step()
    assert torch.equal(params[0], before[0])
    torch.testing.assert_close(params[1].detach(), before[1] - 0.1)
    assert torch.equal(params[2], before[2])


def test_copies_keep_their_memory():
    """Addresses that a CUDA graph holds: of weights, saved copies and momenta."""
    params = parameters()
    optimizer = GSAM(params, torch.optim.SGD, **SGD)
    train(optimizer, params, 1)

    def addresses():
        buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
        return [t.data_ptr() for t in (*params, *(place.saved for place in optimizer._places()[0]), *buffers)]

    first = addresses()
    train(optimizer, params, 3)
    assert addresses() == first


def test_rho_is_checked_everywhere():
    (p,) = parameters()[:1]
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(pyface.UserError, match="rho must be finite and not negative"):
            SAM([p], torch.optim.SGD, rho=rho, lr=0.1)
        with pytest.raises(pyface.UserError, match="rho must be finite and not negative"):
            SAM([{"params": [p], "rho": rho}], torch.optim.SGD, lr=0.1)
        optimizer = SAM([p], torch.optim.SGD, lr=0.1)
        with pytest.raises(pyface.UserError, match="rho must be finite and not negative"):
            optimizer.add_param_group({"params": parameters()[1:2], "rho": rho})
        with pytest.raises(ValueError, match="rho must be finite and not negative"):
            pyface.ops.perturb_([p], [p], [p], pyface.ops.multi_norm([p]), rho)
    assert SAM([p], torch.optim.SGD, rho=0, lr=0.1).param_groups[0]["rho"] == 0


def test_bad_input_of_the_family():
    (p,) = parameters()[:1]
    with pytest.raises(pyface.UserError, match="granularity"):
        GradientConstrainedSAM([p], torch.optim.SGD, granularity="layer", lr=0.1)
    with pytest.raises(pyface.UserError, match="decay"):
        FriendlySAM([p], torch.optim.SGD, decay=1.0, lr=0.1)
    with pytest.raises(pyface.UserError, match="eta"):
        ASAM([p], torch.optim.SGD, eta=-1.0, lr=0.1)
    far = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = SAM([p, far], torch.optim.SGD, lr=0.1)
    p.grad, far.grad = torch.ones_like(p), torch.ones_like(far)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="one device"):
        optimizer.first_step()
    far.grad = None
    p.grad = torch.ones(7, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.first_step()
    p.grad = torch.ones_like(p)
    optimizer.first_step()
    p.grad = torch.ones(7, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.second_step()
    assert torch.equal(p, before)


def test_weights_of_another_type_get_other_copies():
    """model.double() in mid-training."""
    params = parameters(torch.float32)
    optimizer = GSAM(params, torch.optim.SGD, lr=0.05)
    train(optimizer, params, 1)
    for p in params:
        p.data, p.grad = p.data.double(), None
    before = [p.detach().clone() for p in params]
    loss_of(params).backward()
    optimizer.first_step()
    optimizer.restore()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    train(optimizer, params, 1)
    assert all(place.saved.dtype == torch.float64 for place in optimizer._places()[0])


def test_skipped_steps_are_counted_for_long():
    (p,) = parameters()[:1]
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    for i in range(150):
        for step in (optimizer.first_step, optimizer.second_step):
            p.grad = torch.full_like(p, float("nan") if i % 3 == 0 else 0.5)
            step()
        if i == 70:
            optimizer = copy.deepcopy(optimizer)
            (p,) = optimizer.param_groups[0]["params"]
    assert optimizer.skipped == 50
    assert p.isfinite().all()
