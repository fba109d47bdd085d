"""Invertible layers: inverses, log-determinants, and gradients and memory of the rebuilding backward pass."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from pyface.nn import AffineCoupling, HaarDWT2d, InvertibleSequential


def subnet(channels_in, channels_out, dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(channels_in, 16, 3, padding=1),
        nn.Dropout(dropout),
        nn.LeakyReLU(0.1),
        nn.Conv2d(16, channels_out, 3, padding=1),
    )


def flow(depth=4, condition=2, dropout=0.0, **options):
    """Haar on 2 channels, then couplings of 4 + 4 channels, packed and separate sub-nets in turn."""
    layers = [HaarDWT2d()]
    for i in range(depth):
        side = ("first", "second")[i % 2]
        if i % 3 == 2:
            nets = subnet(4 + condition, 4, dropout), subnet(4 + condition, 4, dropout)
            layers.append(AffineCoupling(*nets, transform=side, clamp_activation="tanh"))
        else:
            layers.append(AffineCoupling(subnet(4 + condition, 8, dropout), transform=side))
    return InvertibleSequential(*layers, **options)


def inputs(condition=2):
    return torch.randn(3, 2, 16, 12, requires_grad=True), torch.randn(3, condition, 8, 6, requires_grad=True)


def test_inverse_and_log_det():
    model, (x, c) = flow(), inputs()
    with torch.no_grad():
        y, forward = model(x, c, return_log_det=True)
        back, inverse = model.inverse(y, c, return_log_det=True)
    assert y.shape == (3, 8, 8, 6)
    torch.testing.assert_close(back, x.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(forward, -inverse, rtol=1e-5, atol=1e-4)
    assert model.reconstruction_error(x, c) < 1e-5


def test_log_det_is_that_of_the_jacobian():
    model = flow(2, condition=0).double()
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v).flatten(), x).reshape(8, 8)
    log_det = model(x, return_log_det=True)[1]
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("log_det", [False, True], ids=["y", "y+logdet"])
def test_rebuilding_gradients_equal_stored_ones(dropout, log_det):
    rebuilding = flow(6, dropout=dropout)
    storing = copy.deepcopy(rebuilding)
    storing.recompute = False
    x, c = inputs()
    results = []
    for model in (rebuilding, storing):
        torch.manual_seed(7)
        out = model(x, c, return_log_det=log_det)
        loss = (out[0].square().mean() + out[1].mean()) if log_det else out.square().mean()
        state = torch.get_rng_state()
        results.append((loss, torch.autograd.grad(loss, [x, c, *model.parameters()])))
        assert torch.equal(torch.get_rng_state(), state)  # the replay leaves the generator where it was
    assert torch.equal(results[0][0], results[1][0])
    for ours, stored in zip(results[0][1], results[1][1]):
        assert (ours - stored).abs().max() <= 1e-5 * stored.abs().max()


def test_parameters_get_their_gradient_through_backward_and_shared_layers_add_up():
    shared = AffineCoupling(subnet(4, 8))
    rebuilding = InvertibleSequential(shared, AffineCoupling(subnet(4, 8), transform="first"), shared)
    storing = copy.deepcopy(rebuilding)
    storing.recompute = False
    x = torch.randn(2, 8, 5, 5)  # itself without gradient
    for model in (rebuilding, storing):
        model(x).square().sum().backward()
    for ours, stored in zip(rebuilding.parameters(), storing.parameters()):
        torch.testing.assert_close(ours.grad, stored.grad, rtol=1e-4, atol=1e-4)


class Shuffle(nn.Module):
    """An invertible layer without a backward of its own: the generic route."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("order", torch.randperm(channels))
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x, condition=None, *, return_log_det=False):
        y = x[:, self.order] * self.scale.exp()
        return (y, self.scale.sum().expand(len(x)) * x[0, 0].numel()) if return_log_det else y

    def inverse(self, y, condition=None, *, return_log_det=False):
        x = (y * (-self.scale).exp())[:, self.order.argsort()]
        return (x, -self.scale.sum().expand(len(y)) * y[0, 0].numel()) if return_log_det else x


def test_any_invertible_module_fits():
    rebuilding = InvertibleSequential(Shuffle(8), AffineCoupling(subnet(4, 8)), Shuffle(8))
    storing = copy.deepcopy(rebuilding)
    storing.recompute = False
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    grads = []
    for model in (rebuilding, storing):
        y, log_det = model(x, return_log_det=True)
        grads.append(torch.autograd.grad(y.square().mean() + 0.01 * log_det.mean(), [x, *model.parameters()]))
    for ours, stored in zip(*grads):
        assert (ours - stored).abs().max() <= 1e-5 * stored.abs().max() + 1e-7


class WideLogDet(Shuffle):
    """Gives its log-determinant in float64, so that the sum over layers is float64 too."""

    def forward(self, x, condition=None, *, return_log_det=False):
        out = super().forward(x, condition, return_log_det=return_log_det)
        return (out[0], out[1].double()) if return_log_det else out


def test_a_wider_log_det_of_another_layer_does_not_reach_the_kernel_as_it_is():
    rebuilding = InvertibleSequential(AffineCoupling(subnet(4, 8)), WideLogDet(8))
    storing = copy.deepcopy(rebuilding)
    storing.recompute = False
    x, grads = torch.randn(2, 8, 5, 5, requires_grad=True), []
    for model in (rebuilding, storing):
        log_det = model(x, return_log_det=True)[1]
        assert log_det.dtype == torch.float64
        grads.append(torch.autograd.grad(log_det.sum(), [x, *model.parameters()], allow_unused=True))
    for ours, stored in zip(*grads):
        if stored is not None:
            assert (ours - stored).abs().max() <= 1e-5 * stored.abs().max() + 1e-6


def saved_bytes(model, x, c):
    """Bytes that autograd keeps between forward and backward, parameters and inputs aside."""
    own = {t.untyped_storage().data_ptr() for t in [x, c, *model.parameters()]}
    kept: dict[int, int] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x, c)
    assert y.requires_grad
    return sum(kept.values())


def test_activation_memory_does_not_grow_with_depth():
    x, c = inputs()
    shallow, deep = saved_bytes(flow(2), x, c), saved_bytes(flow(12), x, c)
    assert shallow == deep == 3 * 8 * 8 * 6 * 4  # the output, once
    assert saved_bytes(flow(12, recompute=False), x, c) > 20 * deep


def test_intermediate_tensors_are_freed():
    seen = []

    class Spy(AffineCoupling):
        def forward(self, x, condition=None, *, return_log_det=False):
            seen.append(weakref.ref(x))
            return super().forward(x, condition, return_log_det=return_log_det)

    model = InvertibleSequential(*[Spy(subnet(4, 8)) for _ in range(3)])
    y = model(torch.randn(2, 8, 5, 5, requires_grad=True))
    assert [ref() for ref in seen[1:]] == [None, None]
    assert y.grad_fn is not None


def test_autocast_is_replayed():
    rebuilding = flow(4)
    storing = copy.deepcopy(rebuilding)
    storing.recompute = False
    x, c = inputs()
    grads = []
    for model in (rebuilding, storing):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x, c)
        assert y.dtype == torch.float32
        grads.append(torch.autograd.grad(y.square().mean(), list(model.parameters())))
    for ours, stored in zip(*grads):
        assert (ours - stored).abs().max() <= 2e-2 * stored.abs().max()


def test_split_and_errors():
    layer = AffineCoupling(nn.Conv2d(3, 10, 1), split=3)
    x = torch.randn(2, 8, 4, 4)
    y = layer(x)
    assert torch.equal(y[:, :3], x[:, :3])
    torch.testing.assert_close(layer.inverse(y), x, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="must return 10 channels.*got 6"):
        AffineCoupling(nn.Conv2d(3, 6, 1), split=3)(x)
    with pytest.raises(ValueError, match="cannot split 8 channels at 8"):
        AffineCoupling(nn.Conv2d(8, 2, 1), split=8)(x)
    with pytest.raises(ValueError, match='"first" or "second", got \'third\''):
        AffineCoupling(nn.Identity(), transform="third")


def test_empty_sequence_and_no_grad():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y, log_det = InvertibleSequential()(x, return_log_det=True)
    assert torch.equal(y, x)
    assert torch.equal(log_det, torch.zeros(2))
    with torch.no_grad():
        assert not flow()(torch.randn(1, 2, 4, 4), torch.randn(1, 2, 2, 2)).requires_grad


def test_compiles():
    torch._dynamo.reset()
    model, (x, c) = flow(2), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, c), model(x, c))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, c).sum(), x), torch.autograd.grad(model(x, c).sum(), x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.gpu
def test_rebuilding_gradients_on_a_gpu():
    rebuilding = flow(4, dropout=0.2).cuda()
    storing = copy.deepcopy(rebuilding)
    storing.recompute = False
    x, c = (v.detach().cuda().requires_grad_() for v in inputs())
    grads = []
    for model in (rebuilding, storing):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(model(x, c).square().mean(), [x, *model.parameters()]))
    for ours, stored in zip(*grads):
        assert (ours - stored).abs().max() <= 1e-3 * stored.abs().max()
