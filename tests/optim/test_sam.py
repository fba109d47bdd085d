"""SAM and relatives: against the papers written plainly, and as optimisers among torch's tools."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyface
from pyface.optim import ASAM, GSAM, SAGM, SAM, FriendlySAM, GradientConstrainedSAM, frozen_statistics

ROUNDING = {"rtol": 2.4e-7, "atol": 1e-7}
ALL = [SAM, ASAM, GSAM, SAGM, FriendlySAM, GradientConstrainedSAM]


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(c), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


def resnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Block(8), nn.AvgPool2d(2), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 4, (8,), generator=g)


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(i))

        def closure(x=x):
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.zero_grad()
        closure()
        optimizer.step(closure)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sam_of_the_paper(model, base, loss, rho):
    """Algorithm 1 of arXiv:2010.01412 around a base optimiser, with nothing of pyface."""
    base.zero_grad()
    loss(model).backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    old = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p += rho / norm * p.grad
    base.zero_grad()
    loss(model).backward()
    with torch.no_grad():
        for p, w in zip(model.parameters(), old, strict=True):
            p.copy_(w)
    base.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_resnet_trained_as_in_the_paper(dtype):
    """50 steps of a ResNet with batch norm, momentum and weight decay.

    Training is chaotic: a last bit grows tenfold every few steps, so two right programs that round differently are far
    apart after 50 steps of float32. So in float32 every one of the 50 steps begins from the same weights, buffers and
    momenta, and must end at the same weights to rounding: the two ascents differ in the last bit of a weight, which the
    gradient (a sum of thousands of terms behind batch norms) shows as about 1e-6 of its size, and lr brings into the
    weights. In float64, where 50 steps amplify 1e-16 to something still small, the two run freely.
    """
    free = dtype == torch.float64
    ours, plain = resnet().to(dtype), resnet().to(dtype)
    sgd = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = SAM(ours.parameters(), torch.optim.SGD, rho=0.05, **sgd)
    base = torch.optim.SGD(plain.parameters(), foreach=False, **sgd)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(50):
            if not free:
                plain.load_state_dict(ours.state_dict())
                base.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            x, label = batch(i)
            x = x.to(dtype)

            def loss(model, x=x, label=label):
                return F.cross_entropy(model(x), label)

            optimizer.zero_grad()
            loss(ours).backward()
            optimizer.step(lambda loss=loss: loss(ours).backward())
            sam_of_the_paper(plain, base, loss, 0.05)
            for a, b in zip(weights(ours), weights(plain), strict=True):
                torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-10} if free else ROUNDING))
    finally:
        torch.set_num_threads(threads)
    moved = [float((a - b).abs().max()) for a, b in zip(weights(ours), weights(resnet().to(dtype)), strict=True)]
    assert max(moved) > 0.01


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_contract(kind, base):
    model = small()
    optimizer = kind(model.parameters(), base, lr=0.05)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    start = weights(model)
    train(model, optimizer, 3)
    assert not same(start, weights(model))
    assert optimizer.skipped == 0
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    # a state dict in mid-training goes on as if nothing had happened
    twin = small()
    twin.load_state_dict(model.state_dict())
    other = kind(twin.parameters(), base, lr=0.7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # so does a copy and a pickle of both together
    third, copied = copy.deepcopy((model, optimizer))
    fourth, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (twin, other), (third, copied), (fourth, loaded)):
        train(m, o, 3, start=3)
    assert all(same(weights(model), weights(m)) for m in (twin, third, fourth))
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "rho": 0.2})
    assert optimizer.param_groups[-1]["rho"] == 0.2
    assert optimizer.base_optimizer.param_groups[-1]["params"] == [extra]


@pytest.mark.parametrize("kind", ALL)
def test_rho_zero_lr_zero_and_exceptions(kind):
    model = small()
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.0)
    start, where = weights(model), [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, 20)
    assert same(start, weights(model))
    assert where == [p.data_ptr() for p in model.parameters()]
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    assert same(start, weights(model))


def test_rho_zero_is_the_base_optimiser():
    ours, plain = small(), small()
    optimizer = SAM(ours.parameters(), torch.optim.SGD, rho=0, lr=0.1, momentum=0.9)
    train(ours, optimizer, 10)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for i in range(10):
        base.zero_grad()
        plain(torch.randn(6, 3, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        base.step()
    assert same(weights(ours), weights(plain))


def test_two_call_styles_are_one():
    a, b = small(), small()
    x = torch.randn(6, 3)
    one, two = GSAM(a.parameters(), torch.optim.SGD, lr=0.1), GSAM(b.parameters(), torch.optim.SGD, lr=0.1)
    a(x).square().mean().backward()
    one.step(lambda: a(x).square().mean().backward())
    b(x).square().mean().backward()
    two.first_step(zero_grad=True)
    b(x).square().mean().backward()
    two.second_step(zero_grad=True)
    assert same(weights(a), weights(b))
    assert all(p.grad is None for p in b.parameters())


@pytest.mark.parametrize("overflow", [{1}, {2}, {1, 2}])
@pytest.mark.parametrize("kind", ALL)
def test_grad_scaler(kind, overflow):
    model = small()
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(6, 3)

    def backward(bad):
        loss = scaler.scale(model(x).square().mean())
        loss.backward()
        if bad:
            model[0].weight.grad[0, 1] = float("inf")
        return loss

    def step(overflow):
        optimizer.zero_grad()
        backward(1 in overflow)
        optimizer.step(lambda: backward(2 in overflow), scaler=scaler)
        scaler.update()

    before = weights(model)
    step(overflow)
    assert same(before, weights(model))
    assert scaler.get_scale() == 512.0
    plain = copy.deepcopy(model)
    step(())
    assert not same(before, weights(model))
    assert scaler.get_scale() == 512.0
    if kind is not FriendlySAM:  # whose running mean has seen a step more
        unscaled = kind(plain.parameters(), torch.optim.SGD, lr=0.1)
        plain(x).square().mean().backward()
        unscaled.step(lambda: plain(x).square().mean().backward())
        for a, b in zip(weights(model), weights(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_nan_gradients_skip_the_step(bad_pass):
    model = small()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = weights(model)

    def closure(number):
        model(torch.ones(2, 3)).sum().backward()
        if number == bad_pass:
            model[2].bias.grad[0] = float("nan")

    closure(1)
    optimizer.step(lambda: closure(2))
    assert same(before, weights(model))
    assert optimizer.skipped == 1


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_disabled_scaler_is_none(bad_pass):
    model = small()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = weights(model)

    def step(bad):
        def backward(number):
            scaler.scale(model(torch.ones(2, 3)).sum()).backward()
            if number == bad:
                model[0].weight.grad[0, 1] = float("nan")

        optimizer.zero_grad()
        backward(1)
        optimizer.step(lambda: backward(2), scaler=scaler)
        scaler.update()

    step(bad_pass)
    assert same(before, weights(model))
    assert optimizer.skipped == 1
    step(None)
    assert not same(before, weights(model))
    assert optimizer.skipped == 1


def test_gradients_missing_in_one_pass():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = GradientConstrainedSAM([p, q], torch.optim.SGD, lr=0.1, weight_decay=0.5)
    p.grad = torch.ones(3)
    optimizer.first_step()
    assert not torch.equal(p.detach(), torch.ones(3))
    assert torch.equal(q.detach(), torch.ones(3))
    q.grad = torch.ones(3)
    optimizer.second_step()
    assert torch.equal(p.detach(), torch.ones(3))  # restored, not updated
    torch.testing.assert_close(q.detach(), torch.full((3,), 1 - 0.1 * 1.5))


def test_bad_input():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(pyface.UserError, match="rho"):
        SAM([p], torch.optim.SGD, rho=-1, lr=0.1)
    with pytest.raises(pyface.UserError, match="must be a class"):
        SAM([p], torch.optim.SGD([p], lr=0.1))
    with pytest.raises(pyface.UserError, match="LBFGS"):
        SAM([p], torch.optim.LBFGS, lr=0.1)
    with pytest.raises(pyface.UserError, match="lower"):
        GradientConstrainedSAM([p], torch.optim.SGD, lower=0.9, lr=0.1)
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    with pytest.raises(pyface.UserError, match="no parameter has a gradient"):
        optimizer.step(lambda: None)
    with pytest.raises(pyface.UserError, match="closure"):
        optimizer.step()
    with pytest.raises(pyface.UserError, match="first_step"):
        optimizer.second_step()
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.first_step()


def test_statistics_are_frozen_in_the_context():
    model = resnet()
    x, _ = batch(0)
    before = [b.clone() for b in model.buffers()]
    with frozen_statistics(model):
        frozen = model(x)
    assert same(before, list(model.buffers()))
    assert torch.equal(frozen, model(x))
    assert not same(before, list(model.buffers()))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_every_kind_are_frozen(kind, training):
    module, x = kind(4, track_running_stats=True).train(training), torch.randn(5, 4, 6) + 3
    before, plain = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    if kind is nn.SyncBatchNorm:
        pytest.importorskip("torch.distributed")
        with frozen_statistics(module):  # its forward pass wants a GPU
            assert module.track_running_stats is not training
    else:
        with frozen_statistics(module):
            frozen = module(x)
        assert torch.equal(frozen, plain(x))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.track_running_stats
    with pytest.raises(ZeroDivisionError), frozen_statistics(module):
        1 / 0  # noqa: B018
    assert module.track_running_stats
    assert module.running_mean is not None


def test_named_parameters_and_a_base_optimisers_state_dict():
    model, base = small(), torch.optim.SGD(small().parameters(), lr=0.3, momentum=0.9)
    optimizer = SAM(model.named_parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    optimizer.load_state_dict(base.state_dict())  # as if training had begun without SAM
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.2, 0.3)
    before = weights(model)
    train(model, optimizer, 1)
    assert not same(before, weights(model))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("named", [False, True])
def test_a_parameter_that_is_listed_twice_counts_once(base, named):
    ours, plain = small(), small()
    params = list(ours.named_parameters() if named else ours.parameters())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SAM([*params, params[0], *params[1:3]], base, rho=0.3, lr=0.1)
    train(ours, optimizer, 3)
    train(plain, SAM(plain.parameters(), base, rho=0.3, lr=0.1), 3)
    assert same(weights(ours), weights(plain))
    if named:
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in params]


def test_parameters_that_share_memory_are_refused():
    buffer = torch.ones(10)
    for a, b, apart in ((buffer[:5], buffer[5:], True), (buffer, buffer, False), (buffer[:6], buffer[5:], False)):
        p, q = nn.Parameter(a), nn.Parameter(b)
        optimizer = SAM([{"params": [p]}, {"params": [q]}], torch.optim.SGD, lr=0.0)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        if apart:
            optimizer.first_step()
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            optimizer.second_step()
        else:
            with pytest.raises(ValueError, match=r"parameters\[0\] and parameters\[1\] share memory"):
                optimizer.first_step()
        assert torch.equal(buffer, torch.ones(10))
