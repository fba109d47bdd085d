"""Core `coupling`: every path against the float64 reference, gradients, laws, layouts, extremes, and torch
integration."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyface
from pyface.ops import _paths, affine_coupling, haar_dwt2d, haar_idwt2d
from pyface.ops import coupling as op_table
from pyface.ops.reference import coupling as reference

CPU = _paths.load_module("_cpu")[0]
PATHS = ["reference", "cpu"]  # triton and cuda have files of their own: interpreter, emulation, GPU
ACTIVATIONS = ["sigmoid", "tanh", "atan", "none"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [1, 2, 3, 15, 16, 17, 31, 111, 2047, 2048, 2049]


def triple(*shape, dtype=torch.float32, requires_grad=False) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def worst(a: Tensor, b: Tensor) -> float:
    """Largest error relative to the magnitude of the data; NaN if one side has NaN where the other has not."""
    a, b = a.double(), b.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("nan")
    return ((a - b).abs() / (1 + b.abs())).nan_to_num(0).max().item() if a.numel() else 0.0


def eager(x, s, t, *, clamp=2.0, clamp_activation="sigmoid", inverse=False):
    """What a user writes without us, in the tensors' own dtype."""
    gain = reference.clamped_log_scale(s, clamp, clamp_activation)
    return (x - t) * torch.exp(-gain) if inverse else x * torch.exp(gain) + t


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa_agrees_with_float64(isa, dtype, activation, inverse):
    for size in SIZES:
        x, s, t = triple(3, size, dtype=dtype)
        options = {"clamp": 1.5, "clamp_activation": activation, "inverse": inverse}
        exact, exact_log_det = reference.affine_coupling(
            x.double(), s.double(), t.double(), return_log_det=True, **options
        )
        with pyface.paths("cpu"):
            y, log_det = affine_coupling(x, s, t, return_log_det=True, **options)
        # at most twice the error of plain PyTorch in the same dtype, or a few roundings where that error is zero
        # (the float64 "exact" rounds as well)
        roundings = 16 if dtype == torch.float64 else 4
        allowed = max(2 * worst(eager(x, s, t, **options), exact), roundings * torch.finfo(dtype).eps)
        assert worst(y, exact) <= allowed, size
        sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert (log_det.double() - exact_log_det).abs().max() <= sums * (4 + size**0.5) * 4, size
        assert log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_mixed_precision_keeps_the_stream_in_float32(path):
    x, s, t = triple(2, 3, 8, 9)
    s, t = s.bfloat16(), t.bfloat16()
    with pyface.paths(path):
        y, log_det = affine_coupling(x, s, t, return_log_det=True)
    assert y.dtype == torch.float32
    expected, sums = reference.affine_coupling(x.double(), s.double(), t.double(), return_log_det=True)
    assert worst(y, expected) < 1e-6
    assert worst(log_det, sums) < 1e-6


def test_other_mixtures_are_promoted_and_return_the_dtype_of_x():
    for x_dtype, s_dtype, t_dtype in [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.bfloat16, torch.bfloat16),
    ]:
        x, s, t = triple(2, 40)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = affine_coupling(x.to(x_dtype), s.to(s_dtype), t.to(t_dtype))
        assert y.dtype == x_dtype
        assert worst(y, eager(x.double(), s.double(), t.double())) < 4e-2


def test_log_det_is_as_accurate_as_torch_sum():
    """One running float32 vector per chunk would be worse than torch's cascade."""
    ours = theirs = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        x, s, t = triple(1, 196608)
        exact = reference.clamped_log_scale(s.double(), 2.0, "sigmoid").sum()
        ours += (affine_coupling(x, s, t, return_log_det=True)[1] - exact).abs().item()
        theirs += (reference.clamped_log_scale(s, 2.0, "sigmoid").sum() - exact).abs().item()
    assert ours <= theirs


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("log_det", [False, True], ids=["y", "y+logdet"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_to_second_order(path, activation, inverse, log_det):
    inputs = triple(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def f(x, s, t):
        return affine_coupling(x, s, t, clamp=1.5, clamp_activation=activation, inverse=inverse, return_log_det=log_det)

    with pyface.paths(path):
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_asked_for(wanted, inverse):
    full, part = triple(2, 50, requires_grad=True), triple(2, 50)
    for i, (a, b) in enumerate(zip(full, part)):
        b.copy_(a.detach())
        b.requires_grad_(i in wanted)
    y, log_det = affine_coupling(*full, inverse=inverse, return_log_det=True)
    expected = torch.autograd.grad((y**2).sum() + log_det.sum(), full)
    y, log_det = affine_coupling(*part, inverse=inverse, return_log_det=True)
    ((y**2).sum() + log_det.sum()).backward()
    for i, b in enumerate(part):
        if i in wanted:
            assert torch.equal(b.grad, expected[i])
        else:
            assert b.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_backward_of_every_isa(isa, dtype, inverse):
    for size in (1, 17, 111, 2049):
        x, s, t = triple(2, size, dtype=dtype, requires_grad=True)
        g = torch.randn(2, size).to(dtype)
        lam = torch.randn(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        with pyface.paths("cpu"):
            out = affine_coupling(x, s, t, inverse=inverse, return_log_det=True)
        got = torch.autograd.grad(out, (x, s, t), (g, lam))
        xd, sd, td = (v.detach().double().requires_grad_() for v in (x, s, t))
        out = reference.affine_coupling(xd, sd, td, inverse=inverse, return_log_det=True)
        exact = torch.autograd.grad(out, (xd, sd, td), (g.double(), lam.double()))
        for a, b in zip(got, exact):
            assert a.dtype == dtype
            assert worst(a, b) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("st_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_from_output_equals_backward_from_input(path, st_dtype):
    x, s, t = triple(4, 12, 9, 7)
    s, t = s.to(st_dtype).requires_grad_(), t.to(st_dtype).requires_grad_()
    x.requires_grad_()
    g, lam = torch.randn_like(x), torch.randn(4)
    with pyface.paths(path):
        y, log_det = affine_coupling(x, s, t, return_log_det=True)
        expected = torch.autograd.grad((y, log_det), (x, s, t), (g, lam))
        with torch.no_grad():
            rebuilt, *got = op_table.affine_coupling_backward_from_output(g, lam, y, s, t, 2.0, "sigmoid")
    assert worst(rebuilt, x) < 2e-6
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        assert worst(a, b) < (2e-2 if st_dtype == torch.bfloat16 else 5e-6)


def test_gradient_is_one_storage_only_where_autograd_allows():
    """The gradient of shift is the incoming gradient itself: no copy, and nothing that in-place use could break."""
    x, s, t = triple(2, 30, requires_grad=True)
    y = affine_coupling(x, s, t)
    g = torch.randn_like(y)
    keep = g.clone()
    (grad_t,) = torch.autograd.grad(y, t, g)
    assert torch.equal(g, keep)
    assert torch.equal(grad_t, keep)


# ---- laws -----------------------------------------------------------------------------------------------------------

floats = st.floats(-50, 50, width=32)
cases = st.tuples(
    st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=70),
    st.sampled_from(ACTIVATIONS[:3]),
    st.sampled_from([1e-3, 1.0, 2.0, 5.0]),
)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_inverse_undoes_forward_and_log_dets_cancel(case):
    rows, activation, clamp = case
    x, s, t = torch.tensor(rows).T.unsqueeze(1).contiguous()
    options = {"clamp": clamp, "clamp_activation": activation, "return_log_det": True}
    y, forward = affine_coupling(x, s, t, **options)
    back, inverse = affine_coupling(y, s, t, inverse=True, **options)
    ulp = torch.finfo(torch.float32).eps * max(x.abs().max().item(), t.abs().max().item(), 1e-30)
    assert (back - x).abs().max() <= 4 * ulp * torch.tensor(2 * clamp).exp()
    assert torch.equal(forward, -inverse)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_log_scale_is_odd_bounded_and_monotone(case):
    rows, activation, clamp = case
    s = torch.tensor([row[0] for row in rows]).sort().values
    options = {"clamp": clamp, "clamp_activation": activation, "return_log_det": True}
    column, zero = s[:, None], torch.zeros(len(s), 1)  # one element a sample: log_det is l(s) itself
    log_gain = affine_coupling(zero, column, zero, **options)[1]
    assert torch.equal(affine_coupling(zero, -column, zero, **options)[1], -log_gain)
    assert log_gain.abs().max() <= clamp
    assert (log_gain.diff() >= -2 * torch.finfo(torch.float32).eps * clamp).all()
    assert torch.equal(affine_coupling(zero, column, zero, **options)[0], zero)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS[:3])
def test_zero_log_scale_adds_the_shift_bitwise(path, activation):
    x, _, t = triple(3, 100)
    with pyface.paths(path):
        y, log_det = affine_coupling(x, torch.zeros_like(x), t, clamp_activation=activation, return_log_det=True)
    assert torch.equal(y, x + t)
    assert torch.equal(log_det, torch.zeros(3))


def test_sigmoid_clamp_is_tanh_clamp_of_half():
    x, s, t = triple(2, 999)
    torch.testing.assert_close(
        affine_coupling(x, s, t), affine_coupling(x, s / 2, t, clamp_activation="tanh"), rtol=0, atol=0
    )


def test_log_det_is_the_slogdet_of_the_jacobian():
    _, s, t = triple(1, 6, dtype=torch.float64)
    x = torch.randn(6, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda v: affine_coupling(v[None], s, t)[0])(x)
    log_det = affine_coupling(x[None], s, t, return_log_det=True)[1]
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_reproducible_over_threads_batches_and_repeats(inverse):
    x, s, t = triple(5, 3, 61, 67)  # 12,261 elements a sample: chunks with a tail
    options = {"inverse": inverse, "return_log_det": True}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y, log_det = affine_coupling(x, s, t, **options)
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            again = affine_coupling(x, s, t, **options)
            assert torch.equal(again[0], y)
            assert torch.equal(again[1], log_det)
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(5)
    permuted = affine_coupling(x[order], s[order], t[order], **options)
    assert torch.equal(permuted[0], y[order])
    assert torch.equal(permuted[1], log_det[order])
    for b in range(5):
        assert torch.equal(affine_coupling(x[b : b + 1], s[b : b + 1], t[b : b + 1], **options)[1], log_det[b : b + 1])


# ---- layouts and sizes ----------------------------------------------------------------------------------------------


def layouts(shape=(3, 4, 5, 6)):
    n, c, h, w = shape
    packed = torch.randn(n, 2 * c, h, w)
    yield "halves", torch.randn(shape), packed[:, :c], packed[:, c:]
    last = [v.contiguous(memory_format=torch.channels_last) for v in triple(*shape)]
    yield "channels_last", *last
    yield "mixed order", torch.randn(shape), last[0], last[1]
    yield "stream last", last[0], *triple(*shape)[:2]
    yield "transposed", *[v.transpose(0, 1) for v in triple(c, n, h, w)]
    yield "strided", *[v[:, ::2] for v in triple(n, 2 * c, h, w)]
    yield "unaligned", *[torch.randn(n * c * h * w + 1)[1:].view(shape) for _ in range(3)]
    yield "expanded over the batch", torch.randn(shape), *[torch.randn(1, c, h, w).expand(shape) for _ in range(2)]
    wide = packed.contiguous(memory_format=torch.channels_last)
    yield "channels_last halves", last[0], wide[:, :c], wide[:, c:]


@pytest.mark.parametrize("layout", [case[0] for case in layouts()])
@pytest.mark.parametrize("path", PATHS)
def test_layouts(path, layout):
    x, s, t = next(case[1:] for case in layouts() if case[0] == layout)
    x, s, t = (v.detach().requires_grad_() for v in (x, s, t))
    with pyface.paths(path):
        y, log_det = affine_coupling(x, s, t, return_log_det=True)
        grads = torch.autograd.grad((y * torch.arange(6.0)).sum() + log_det.sum(), (x, s, t))
    dense = [v.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for v in (x, s, t)]
    expected, sums = reference.affine_coupling(*dense, return_log_det=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, sums, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        grads, torch.autograd.grad((expected * torch.arange(6.0)).sum() + sums.sum(), dense), rtol=1e-4, atol=1e-5
    )
    if layout.startswith("channels_last"):
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_channel_wise_scale_broadcasts_and_its_gradient_is_reduced():
    x = torch.randn(2, 3, 4, 4)
    s = torch.randn(1, 3, 1, 1, requires_grad=True)
    t = torch.randn(3, 1, 1, requires_grad=True)
    affine_coupling(x, s, t).square().sum().backward()
    got = s.grad.clone(), t.grad.clone()
    s.grad = t.grad = None
    reference.affine_coupling(x, s.expand_as(x), t.expand_as(x)).square().sum().backward()
    torch.testing.assert_close(got, (s.grad, t.grad))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_empty(path, shape):
    x, s, t = triple(*shape, requires_grad=True)
    with pyface.paths(path):
        y, log_det = affine_coupling(x, s, t, return_log_det=True)
        (y.sum() + log_det.sum()).backward()
    assert y.shape == x.shape
    assert torch.equal(log_det, torch.zeros(shape[0]))
    assert x.grad.shape == x.shape


def test_rank_one_has_one_element_per_sample():
    x, s, t = triple(7)
    log_det = affine_coupling(x, s, t, return_log_det=True)[1]
    torch.testing.assert_close(log_det, 2 * torch.tanh(s / 2))


# ---- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_extreme_values_match_the_definition(path, activation, inverse):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, 1.0, -3.0, 1e-40, 1e30, -1e30, 100.0, -100.0, inf, -inf, nan])
    x, s, t = (v.reshape(-1, 1) for v in torch.meshgrid(values, values, values[:5], indexing="ij"))
    options = {"clamp_activation": activation, "inverse": inverse}
    with pyface.paths(path):
        y = affine_coupling(x, s, t, **options)
    # unclamped exponentials overflow in float32, and the definition says so
    wide = torch.float32 if activation == "none" else torch.float64
    exact = reference.affine_coupling(x.to(wide), s.to(wide), t.to(wide), **options).float()
    assert torch.equal(y.isnan(), exact.isnan())
    finite = exact.isfinite() & (exact.abs() > 1e-37)  # below that, a float holds fewer digits
    torch.testing.assert_close(y[finite], exact[finite], rtol=3e-6, atol=0)
    assert torch.equal(y[exact.isinf()], exact[exact.isinf()])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS[:3])
def test_infinite_log_scale_saturates_with_zero_gradient(path, activation):
    s = torch.tensor([[float("inf")], [-float("inf")]], requires_grad=True)
    x = torch.full((2, 1), 3.0)
    with pyface.paths(path):
        y, log_det = affine_coupling(x, s, torch.zeros(2, 1), clamp_activation=activation, return_log_det=True)
        (y.sum() + log_det.sum()).backward()
    bound = 2.0 * (0.636 * torch.pi / 2 if activation == "atan" else 1)
    torch.testing.assert_close(log_det.detach(), torch.tensor([bound, -bound]))
    assert torch.equal(s.grad, torch.zeros(2, 1))


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_element_and_its_sample(path):
    x, s, t = triple(3, 5000)
    with pyface.paths(path):
        clean, clean_log_det = affine_coupling(x, s, t, return_log_det=True)
        s[1, 4321] = float("nan")
        y, log_det = affine_coupling(x, s, t, return_log_det=True)
    assert y.isnan().sum() == 1
    assert y[1, 4321].isnan()
    assert log_det.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(log_det[[0, 2]], clean_log_det[[0, 2]])
    y[1, 4321] = clean[1, 4321]
    torch.testing.assert_close(y, clean)


@pytest.mark.parametrize("path", PATHS)
def test_clamp_zero_is_additive(path):
    x, s, t = triple(2, 33, requires_grad=True)
    with pyface.paths(path):
        y, log_det = affine_coupling(x, s, t, clamp=0.0, return_log_det=True)
        y.sum().backward()
    assert torch.equal(y, x + t)
    assert torch.equal(s.grad, torch.zeros_like(s))
    assert torch.equal(log_det, torch.zeros(2))


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument_expected_and_got():
    x, s, t = triple(2, 4)
    with pytest.raises(ValueError, match=r"shift must have x's shape.*\(2, 4\).*\(3, 4\)"):
        affine_coupling(x, s, torch.zeros(3, 4))
    with pytest.raises(TypeError, match="floating"):
        affine_coupling(x.int(), s.int(), t.int())
    with pytest.raises(ValueError, match="clamp must be a finite number >= 0, got -1"):
        affine_coupling(x, s, t, clamp=-1)
    with pytest.raises(ValueError, match="clamp must be a finite"):
        affine_coupling(x, s, t, clamp=float("inf"))
    with pytest.raises(ValueError, match="one of none, sigmoid, tanh, atan, got 'relu'"):
        affine_coupling(x, s, t, clamp_activation="relu")
    with pytest.raises(ValueError, match="batch dimension"):
        affine_coupling(*triple())
    with pytest.raises(ValueError, match="one device, got cpu, meta and cpu"):
        affine_coupling(x, s.to("meta"), t)
    with pytest.raises(ValueError, match="one shape"):
        torch.ops.pyface.affine_coupling(x, s[:1], t, 2.0, "sigmoid", False, False, None)
    backward, options = torch.ops.pyface.affine_coupling_backward, (2.0, "tanh", False, False, True, True, None)
    for grads, message in [
        ((torch.zeros(2, 3), None), r"grad_out must be \(2, 4\)"),
        ((x.double(), None), "grad_out must be .*float32 on cpu, got .*float64"),
        ((x, torch.zeros(2).double()), "grad_log_det must be .*float32 on cpu, got .*float64"),
        ((x, torch.zeros(3)), r"grad_log_det must be \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            backward(*grads, x, s, None, *options)
    with pytest.raises(ValueError, match="from_output needs the shift"):
        backward(x, None, x, s, None, 2.0, "tanh", False, True, True, True, None)
    with pytest.raises(ValueError, match="height and width must be even, got 3 x 4"):
        haar_dwt2d(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match=r"4-dimensional tensor \[B, C, H, W\], got shape \(4, 4\)"):
        haar_dwt2d(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="multiple of 4"):
        haar_idwt2d(torch.zeros(1, 6, 2, 2))
    with pytest.raises(TypeError, match="floating"):
        haar_dwt2d(torch.zeros(1, 1, 2, 2, dtype=torch.int64))


# ---- Haar -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_haar_of_every_isa(isa, dtype):
    for h, w in [(2, 2), (2, 6), (4, 30), (6, 32), (8, 34), (10, 66), (2, 298)]:
        x = torch.randn(2, 3, h, w).to(dtype)
        with pyface.paths("cpu"):
            bands = haar_dwt2d(x)
            back = haar_idwt2d(bands)
        exact = reference.haar_dwt2d(x.double())
        assert worst(bands, exact) <= torch.finfo(dtype).eps
        assert worst(back, reference.haar_idwt2d(bands.double())) <= torch.finfo(dtype).eps
        if dtype != torch.bfloat16:
            assert (back - x).abs().max() <= 2 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("path", PATHS)
def test_haar_laws(path):
    with pyface.paths(path):
        integers = torch.randint(-(2**20), 2**20, (2, 3, 8, 12)).float()
        assert torch.equal(haar_idwt2d(haar_dwt2d(integers)), integers)
        x = torch.randn(2, 3, 20, 24)
        keep = x.clone()
        bands = haar_dwt2d(x)
        assert torch.equal(x, keep)
        torch.testing.assert_close(bands.square().sum(), x.square().sum())
        torch.testing.assert_close(haar_dwt2d(x.roll((2, 2), (2, 3))), bands.roll((1, 1), (2, 3)), rtol=0, atol=0)
        constant = haar_dwt2d(torch.full((1, 1, 4, 4), 3.0))
        assert torch.equal(constant[:, 0], torch.full((1, 2, 2), 6.0))
        assert torch.equal(constant[:, 1:], torch.zeros(1, 3, 2, 2))
        ramp = haar_dwt2d(torch.arange(6.0).expand(1, 1, 4, 6))
        assert torch.equal(ramp[:, 1], torch.ones(1, 2, 3))
        assert torch.equal(ramp[:, 2:], torch.zeros(1, 2, 2, 3))
        signs = torch.randint(0, 2, (1, 1, 16, 16)) * 2.0 - 1
        assert set(haar_dwt2d(signs).unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0, 2.0}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("f", [haar_dwt2d, haar_idwt2d], ids=["dwt", "idwt"])
def test_haar_gradients(path, f):
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    with pyface.paths(path):
        assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, (x,))


def test_haar_layouts_and_empties():
    x = torch.randn(2, 3, 8, 10)
    expected = haar_dwt2d(x)
    assert torch.equal(haar_dwt2d(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(haar_dwt2d(torch.randn(2, 6, 8, 10).copy_(x.repeat(1, 2, 1, 1))[:, :3]), expected)
    assert haar_dwt2d(torch.zeros(0, 3, 4, 4)).shape == (0, 12, 2, 2)
    assert haar_dwt2d(torch.zeros(2, 3, 0, 4)).shape == (2, 12, 0, 2)
    assert haar_idwt2d(torch.zeros(2, 0, 2, 2)).shape == (2, 0, 4, 4)


@pytest.mark.parametrize("path", PATHS)
def test_haar_into_a_given_tensor(path):
    x = torch.randn(2, 3, 8, 10)
    with pyface.paths(path):
        expected = haar_dwt2d(x)
        for out in (torch.full((2, 12, 4, 5), 7.0), torch.full((2, 16, 4, 5), 7.0)[:, 2:14]):
            assert haar_dwt2d(x, out=out) is out
            assert torch.equal(out, expected)
        own = x.clone()
        haar_idwt2d(own.view(2, 12, 5, 4), out=own.view(2, 3, 10, 8))  # in place: through a copy
        assert torch.equal(own.view(2, 3, 10, 8), haar_idwt2d(x.view(2, 12, 5, 4)))
        with pytest.raises(ValueError, match=r"out must be \(2, 12, 4, 5\), torch.float32 on cpu, got \(2, 12, 5, 4\)"):
            haar_dwt2d(x, out=torch.empty(2, 12, 5, 4))
        with pytest.raises(RuntimeError, match="out= has no gradient"):
            haar_dwt2d(x.requires_grad_(), out=torch.empty(2, 12, 4, 5))


# ---- torch integration ----------------------------------------------------------------------------------------------


def op_samples():
    for requires_grad in (False, True):
        yield triple(2, 3, 4, requires_grad=requires_grad)
        yield [v.transpose(0, 1) for v in triple(3, 2, 4, requires_grad=requires_grad)]
        yield triple(0, 3, requires_grad=requires_grad)
        yield [v.contiguous(memory_format=torch.channels_last) for v in triple(2, 3, 4, 5, requires_grad=requires_grad)]
        yield [v[:, ::2] for v in triple(2, 6, 4, requires_grad=requires_grad)]


@pytest.mark.parametrize("log_det", [False, True], ids=["y", "y+logdet"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_opcheck_coupling(inverse, log_det):
    for inputs in op_samples():
        torch.library.opcheck(
            torch.ops.pyface.affine_coupling.default, (*inputs, 2.0, "sigmoid", inverse, log_det, None)
        )


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_coupling_backward(needs):
    g, lam, x, s, t = torch.randn(2, 5), torch.randn(2), *triple(2, 5)
    for mode in [(False, False), (True, False), (False, True)]:
        torch.library.opcheck(
            torch.ops.pyface.affine_coupling_backward.default, (g, lam, x, s, t, 2.0, "tanh", *mode, *needs, None)
        )


def test_opcheck_haar():
    for requires_grad in (False, True):
        for x in (torch.randn(2, 4, 6, 8), torch.randn(2, 4, 8, 6).transpose(2, 3), torch.zeros(0, 4, 2, 2)):
            x = x.requires_grad_(requires_grad)
            torch.library.opcheck(torch.ops.pyface.haar_dwt2d.default, (x, None))
            torch.library.opcheck(torch.ops.pyface.haar_idwt2d.default, (x, None))


@pytest.mark.parametrize("door", ["public", "dispatched"])
def test_vmap(door):
    x, s, t = triple(3, 2, 4, 5)

    def f(x, s, t):
        if door == "public":
            return affine_coupling(x, s, t, return_log_det=True)
        return torch.ops.pyface.affine_coupling(x, s, t, 2.0, "sigmoid", False, True, None)

    got = torch.vmap(f, in_dims=(0, 1, None))(x, s.movedim(0, 1), t[0])
    expected = [f(x[i], s[i], t[0]) for i in range(3)]
    torch.testing.assert_close(got[0], torch.stack([y for y, _ in expected]))
    torch.testing.assert_close(got[1], torch.stack([log_det for _, log_det in expected]))
    images = torch.randn(3, 2, 4, 6, 8)
    assert torch.equal(torch.vmap(haar_dwt2d)(images), torch.stack([haar_dwt2d(v) for v in images]))
    assert torch.vmap(lambda v: affine_coupling(v, v, v))(x).shape == x.shape


def test_function_transforms():
    x, s, t = triple(2, 4, dtype=torch.float64)
    f = lambda v: affine_coupling(v, s, t).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(f)(x), torch.autograd.functional.jacobian(f, x))
    forward = torch.func.jacfwd(lambda v: affine_coupling(x, v, t, inverse=True))(s)
    torch.testing.assert_close(forward, torch.func.jacrev(lambda v: affine_coupling(x, v, t, inverse=True))(s))
    per_sample = torch.vmap(torch.func.grad(lambda v, w: affine_coupling(v[None], w[None], w[None]).sum()))(x, s)
    torch.testing.assert_close(per_sample, torch.exp(2 * torch.tanh(s / 2)))


def test_autocast_casts_nothing_here():
    x, s, t = triple(2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(affine_coupling(x, s, t), affine_coupling(x, s, t))
        assert affine_coupling(x, s.bfloat16(), t.bfloat16()).dtype == torch.float32
        assert haar_dwt2d(torch.randn(1, 1, 2, 2)).dtype == torch.float32


def test_compiles_to_one_graph_and_does_not_recompile():
    torch._dynamo.reset()

    def f(x, s, t):
        y, log_det = affine_coupling(x, s, t, return_log_det=True)
        return haar_idwt2d(haar_dwt2d(y)) * 2, log_det

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in [(2, 8), (3, 10), (5, 6)]:
        inputs = triple(batch, 3, size, size + 4, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=batch != 2):
            got = compiled(*inputs)
        expected = f(*inputs)
        torch.testing.assert_close(got, expected)
        g = torch.autograd.grad(got[0].sum() + got[1].sum(), inputs)
        torch.testing.assert_close(g, torch.autograd.grad(expected[0].sum() + expected[1].sum(), inputs))


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, x, s, t):
            return affine_coupling(haar_dwt2d(x), s, t, inverse=True)

    inputs = (torch.randn(1, 1, 4, 4), torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2))
    program = torch.export.export(Module(), inputs)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"pyface.haar_dwt2d.default", "pyface.affine_coupling.default"} <= targets
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


def test_agrees_with_freia():
    """FrEIA 0.2's GLOW block with its three clamps, forward, inverse and log-determinant."""
    modules = pytest.importorskip("FrEIA.modules", reason="FrEIA is not installed (pip install '.[bench]')")
    x = torch.randn(4, 6)
    for freia_name, name in [("ATAN", "atan"), ("TANH", "tanh"), ("SIGMOID", "sigmoid")]:
        block = modules.GLOWCouplingBlock(
            [(6,)], subnet_constructor=torch.nn.Linear, clamp=1.7, clamp_activation=freia_name
        )
        options = {"clamp": 1.7, "clamp_activation": name, "return_log_det": True}
        (y,), log_det = block([x], jac=True)
        a, b = x[:, :3], x[:, 3:]
        s, t = block.subnet2(b).chunk(2, 1)
        a, first = affine_coupling(a, s, t, **options)
        s, t = block.subnet1(a).chunk(2, 1)
        b, second = affine_coupling(b, s, t, **options)
        torch.testing.assert_close(torch.cat([a, b], 1), y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first + second, log_det, rtol=1e-5, atol=1e-5)
    haar = modules.HaarDownsampling([(3, 8, 8)], order_by_wavelet=True)
    image = torch.randn(2, 3, 8, 8)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat_interleave(3).view(1, 12, 1, 1)
    torch.testing.assert_close(haar_dwt2d(image) * signs, haar([image])[0][0], rtol=1e-5, atol=1e-6)
