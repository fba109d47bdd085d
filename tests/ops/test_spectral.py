"""Core `spectral`: every path against the chain of complex FFTs in float64, laws, gradients to second order, layouts,
types, the same bits, torch integration, and the C++ core under sanitizers."""

from __future__ import annotations

import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyface
from pyface.ops import _paths, high_pass, mask_high_frequencies, spectral_filter
from pyface.ops.reference import spectral as reference

CPU = _paths.load_module("_cpu")[0]
CSRC = Path(__file__).resolve().parents[2] / "csrc"
PATHS = ["reference", "cpu"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(1, 1), (1, 9), (2, 3), (5, 1), (7, 8), (8, 8), (9, 16), (16, 9), (33, 33), (33, 20), (24, 112)]
SMALL = [(4, 5), (1, 6)]
BOTH = pytest.mark.parametrize("symmetric", [False, True], ids=["ACMF's block", "symmetric"])


def widths(size: int) -> set[int]:
    return {d for d in (0, 1, 2, 5, size // 2 - 1, size // 2, size // 2 + 1, size) if d >= 0}


def chain(x: Tensor, half_width: tuple[int, int], symmetric: bool) -> Tensor:
    """What users write, with the block clipped: complex, in float64."""
    block = torch.ones(1, 1, dtype=F64)
    for axis, d in zip((-2, -1), half_width):
        n = x.shape[axis]
        middle = n // 2
        b = torch.zeros(n, dtype=F64)
        b[max(middle - d, 0) : middle + d + symmetric] = 1
        block = block * (b[:, None] if axis == -2 else b)
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.to(F64)), dim=(-2, -1))
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * (1 - block), dim=(-2, -1))).real


def under(path, function, *args, **options):
    with pyface.paths(path):
        return function(*args, **options)


def natural(*shape, dtype=F64):
    """Images in about 0..1 whose spectrum falls as 1/f, like photographs."""
    height, width = shape[-2:]
    f = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)).double() * max(height, width)
    image = torch.fft.irfft2(torch.fft.rfft2(torch.randn(shape, dtype=F64)) / f.clamp_min(1), s=(height, width))
    return (0.5 + 0.2 * image / image.std().clamp_min(1e-9)).to(dtype)


# ---- values ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("path", PATHS)
def test_high_pass_is_the_chain_of_complex_transforms(path, symmetric):
    for height, width in SIZES:
        x = torch.randn(2, height, width, dtype=F64)
        for d in itertools.product(widths(height), widths(width)):
            exact = chain(x, d, symmetric)
            scale = x.abs().max()
            found = under(path, high_pass, x, d, symmetric=symmetric)
            assert (found - exact).abs().max() <= 1e-12 * scale, (height, width, d)
            found = under(path, high_pass, x.float(), d, symmetric=symmetric)
            assert (found - exact).abs().max() <= 1e-6 * scale * (1 + max(d) / 32), (height, width, d)


@BOTH
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("keep_type", [torch.bool, torch.uint8, F32, F64, BF16, torch.int64], ids=str)
def test_the_mask_takes_the_size_of_the_high_part(path, keep_type, symmetric):
    for height, width in SIZES:
        x = natural(2, 3, height, width)
        for shape in (
            (height, width),
            (2, 1, height, width),
            (3, height, width),
            (2, 3, height, width),
            (),
            (1, width),
        ):
            keep = torch.rand(shape, dtype=F64)
            keep = keep if keep_type.is_floating_point else (keep > 0.5)
            keep = keep.to(keep_type)
            high = chain(x, (2, 3), symmetric)
            exact = x - (1 - keep.to(F64)) * high.abs()
            found = under(path, mask_high_frequencies, x, keep, (2, 3), symmetric=symmetric)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-13)
            found = under(path, mask_high_frequencies, x.float(), keep, (2, 3), symmetric=symmetric)
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-6)


@pytest.mark.parametrize("path", PATHS)
def test_the_sizes_of_acmf(path):
    for size, d in itertools.product((112, 224, 299), (0, 5, 16)):
        x, keep = natural(3, size, size), torch.rand(size, size) > 0.1
        exact = x - (~keep).to(F64) * chain(x, (d, d), False).abs()
        for dtype, allowed in ((F64, 1e-12), (F32, 5e-7 * (1 + d / 32) * 2), (BF16, 2**-8), (F16, 2**-11)):
            low = x.to(dtype)
            exact = low.double() - (~keep).to(F64) * chain(low, (d, d), False).abs()
            found = under(path, mask_high_frequencies, low, keep, d)
            assert found.dtype == dtype
            assert (found.double() - exact).abs().max() <= allowed * low.abs().max().double(), (size, d, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_low_precision_is_the_float32_result_rounded_once(path, dtype):
    x, keep = natural(2, 33, 41, dtype=dtype), torch.rand(33, 41) > 0.3
    for function, args in ((high_pass, ()), (mask_high_frequencies, (keep,))):
        found, exact = under(path, function, x, *args), under(path, function, x.float(), *args).to(dtype)
        same = found == exact
        assert same.float().mean() > 0.99
        torch.testing.assert_close(found, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_edge_frequencies(path):
    """Cosines of one frequency: removed inside the block, halved at ACMF's edge, kept beyond."""
    size, d = 32, 4
    t = torch.arange(size, dtype=F64)
    for k, share, symmetric in [
        (0, 0, False),
        (3, 0, False),
        (4, 0.5, False),
        (5, 1, False),
        (4, 0, True),
        (5, 1, True),
    ]:
        for x in (torch.cos(2 * math.pi * k * t / size), torch.sin(2 * math.pi * k * t / size + 0.3)):
            rows, columns = x[:, None].expand(size, size), x.expand(size, size)
            for image in (rows, columns):
                found = under(path, high_pass, image, d, symmetric=symmetric)
                torch.testing.assert_close(found, share * image, rtol=0, atol=1e-12)
    # the block's two corners without a mirror image keep all of (d, -d)
    both = torch.cos(2 * math.pi * d * (t[:, None] - t) / size)
    torch.testing.assert_close(under(path, high_pass, both, d), both, rtol=0, atol=1e-12)
    both = torch.cos(2 * math.pi * d * (t[:, None] + t) / size)
    torch.testing.assert_close(under(path, high_pass, both, d), both / 2, rtol=0, atol=1e-12)


# ---- laws -----------------------------------------------------------------------------------------------------------

cases = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
        "half_width": st.tuples(st.integers(0, 24), st.integers(0, 24)),
        "symmetric": st.booleans(),
        "path": st.sampled_from(PATHS),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_laws(case):
    height, width = size = case["size"]
    d, symmetric = case["half_width"], case["symmetric"]
    generator = torch.Generator().manual_seed(case["seed"])

    def image():
        return torch.randn(size, dtype=F64, generator=generator)

    def high(x, d=d):
        return under(case["path"], high_pass, x, d, symmetric=symmetric)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)

    x, y = image(), image()
    close(high(x), chain(x, d, symmetric))
    close(high(2 * x - 3 * y), 2 * high(x) - 3 * high(y))  # linear
    close((high(x) * y).sum(), (x * high(y)).sum())  # its own transpose
    close(high(x.roll((3, 5), (0, 1))), high(x).roll((3, 5), (0, 1)))
    mirrored = high(x.flip((0, 1)).roll((1, 1), (0, 1)))
    close(mirrored, high(x).flip((0, 1)).roll((1, 1), (0, 1)))
    close(high(x.T, d[::-1]), high(x).T)
    assert high(x).square().sum() <= x.square().sum() * (1 + 1e-12)
    removed = torch.fft.fft2(x - high(x)).abs().square().sum() / x.numel()  # Parseval
    close(removed, (x - high(x)).square().sum())
    if symmetric:
        close(high(high(x)), high(x))
        close(high(x + (y - high(y))), high(x))  # low frequencies make no difference
        close(high(x.flip(0)), high(x).flip(0))
    if symmetric or min(d) >= 1:
        close(high(torch.full(size, 3.0, dtype=F64)), torch.zeros(size, dtype=F64))

    keep = torch.rand(size, generator=generator, dtype=F64)
    less = keep * 0.5

    def mask(x, keep):
        return under(case["path"], mask_high_frequencies, x, keep, d, symmetric=symmetric)

    assert torch.equal(mask(x, torch.ones(size, dtype=torch.bool)), x)
    close(mask(x, torch.zeros(())), x - high(x).abs())
    assert (mask(x, keep) <= x).all()
    assert (mask(x, less) <= mask(x, keep)).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_asymmetric_block_is_no_projection_and_knows_left_from_right(path):
    x = torch.randn(24, 24, dtype=F64)
    once = under(path, high_pass, x, 3)
    assert (under(path, high_pass, once, 3) - once).abs().max() > 1e-2
    assert (under(path, high_pass, x.flip(0), 3) - once.flip(0)).abs().max() > 1e-2
    torch.testing.assert_close(under(path, high_pass, x, 0), x, rtol=0, atol=1e-14)
    zero = under(path, mask_high_frequencies, x, torch.zeros(1), 0)
    torch.testing.assert_close(zero, x - x.abs(), rtol=0, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_spectral_filter(case):
    height, width = case["size"]
    generator = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(2, 3, height, width, dtype=F64, generator=generator)
    a, b = torch.randn(2, 3, 1, height, width // 2 + 1, dtype=F64, generator=generator)[:, :, 0].unbind()

    def apply(x, gain):
        return under(case["path"], spectral_filter, x, gain)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    close(apply(x, torch.ones(height, width // 2 + 1)), x)
    # the gain that a real result can follow, on the full spectrum
    k = torch.arange(width)
    half = torch.where(k <= width // 2, k, width - k)
    rows = torch.arange(height)[:, None].expand(height, width)
    full = a[:, torch.where(k <= width // 2, rows, (height - rows) % height), half]
    full = (full + full.flip((-2, -1)).roll((1, 1), (-2, -1))) / 2
    close(apply(x, a), torch.fft.ifft2(torch.fft.fft2(x) * full).real)
    sym = [reference.symmetrized(g, width) for g in (a, b)]
    close(apply(x, a), apply(x, sym[0]))
    close(apply(apply(x, a), b), apply(x, sym[0] * sym[1]))
    d = case["half_width"]
    low = reference.low_gain((height, width), d, case["symmetric"])[:, : width // 2 + 1]
    close(apply(x, 1 - low), chain(x, d, case["symmetric"]))


# ---- gradients ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck_to_second_order_and_forward(path, symmetric):
    for height, width in SMALL:
        x = torch.randn(2, height, width, dtype=F64, requires_grad=True)
        keep = torch.rand(height, width, dtype=F64, requires_grad=True)
        gain = torch.randn(height, width // 2 + 1, dtype=F64, requires_grad=True)
        fixed = torch.rand(height, width) > 0.5
        for f, args in [
            (lambda x: under(path, high_pass, x, (1, 2), symmetric=symmetric), (x,)),
            (lambda x, k: under(path, mask_high_frequencies, x, k, (1, 2), symmetric=symmetric), (x, keep)),
            (lambda x: under(path, mask_high_frequencies, x, fixed, (1, 2), symmetric=symmetric), (x,)),  # noqa: B023
            (lambda k: under(path, mask_high_frequencies, x.detach(), k, (1, 2)), (keep,)),  # noqa: B023
            (lambda x, g: under(path, spectral_filter, x, g), (x, gain)),
        ]:
            assert torch.autograd.gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(f, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_where_nothing_is_high_is_that_of_x_alone(path):
    x = torch.zeros(3, 12, 10, requires_grad=True)
    grad = torch.randn(3, 12, 10)
    y = under(path, mask_high_frequencies, x, torch.zeros(12, 10), 2)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_gradients_in_low_precision(path, dtype):
    x, keep = natural(2, 3, 33, 20, dtype=dtype), torch.rand(33, 20, dtype=F64)
    grad, v = torch.randn(2, 2, 3, 33, 20).to(dtype).unbind()

    def derivatives(dtype):
        leaves = [x.to(dtype).requires_grad_(), keep.to(F32 if dtype != F64 else F64).requires_grad_()]
        y = under(path, mask_high_frequencies, *leaves, 3)
        first = torch.autograd.grad(y, leaves, grad.to(dtype), create_graph=True)
        again = torch.autograd.grad((first[0] * v.to(dtype)).sum(), leaves[1:])
        return *first, *again

    keep = keep.float().double()
    for a, b in zip(derivatives(dtype), derivatives(F64)):
        error = (a.double() - b).norm() / b.norm()
        assert error <= {F32: 1e-5, BF16: 1e-2, F16: 2e-3}[dtype]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_saved_for_the_backward_pass(path):
    x = torch.rand(4, 40, 40, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        under(path, mask_high_frequencies, x, torch.rand(40, 40) > 0.5)
    assert sorted(t.numel() * t.element_size() for t in saved) == [40 * 40, 4 * 40 * 40]  # keep, and one byte per pixel


# ---- layouts, types, sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_layouts(path):
    x = natural(2, 3, 21, 18, dtype=F32)
    for keep in (torch.rand(21, 18) > 0.4, torch.rand(2, 1, 21, 18), torch.rand(3, 21, 1), torch.rand(2, 3, 21, 18)):
        expected = under(path, mask_high_frequencies, x, keep, 3)
        plain = under(path, high_pass, x, 3)
        wide = torch.randn(2, 3, 42, 40)
        wide[:, :, ::2, 5:23] = x
        strided = torch.randn(2, 3, 42, 36)
        strided[:, :, ::2, ::2] = x
        channels = torch.randn(2, 5, 21, 18).contiguous(memory_format=torch.channels_last)
        channels[:, 1:4] = x
        variants = {
            "channels_last": x.contiguous(memory_format=torch.channels_last),
            "every second row, odd offset": wide[:, :, ::2, 5:23],
            "every second pixel": strided[:, :, ::2, ::2],
            "turned": x.mT.contiguous().mT,
            "slice of channels_last": channels[:, 1:4],
            "planes in another order": x.transpose(0, 1).contiguous().transpose(0, 1),
        }
        for name, variant in variants.items():
            assert torch.equal(variant, x)
            leaf = variant.detach().requires_grad_()
            out = under(path, mask_high_frequencies, leaf, keep, 3)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
            torch.testing.assert_close(under(path, high_pass, variant, 3), plain, rtol=0, atol=2e-6)
            order = torch.channels_last if name == "channels_last" else torch.contiguous_format
            assert out.is_contiguous(memory_format=order), name
            a = torch.autograd.grad(out, leaf, x)[0]
            again = x.clone().requires_grad_()
            b = torch.autograd.grad(under(path, mask_high_frequencies, again, keep, 3), again, x)[0]
            torch.testing.assert_close(a, b, rtol=0, atol=3e-6)
    one = x[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(under(path, high_pass, one, 3), under(path, high_pass, one.contiguous(), 3))


@pytest.mark.parametrize("path", PATHS)
def test_out(path):
    x, keep = natural(2, 3, 21, 18, dtype=F32), torch.rand(21, 18) > 0.4
    gain = torch.rand(21, 10)
    for function, args in ((high_pass, (3,)), (mask_high_frequencies, (keep, 3)), (spectral_filter, (gain,))):
        expected = under(path, function, x, *args)
        last = torch.channels_last
        apart = torch.full_like(x, torch.nan)
        for out in (apart, apart.contiguous(memory_format=last), torch.zeros(2, 3, 21, 36)[..., ::2]):
            out = torch.full_like(out, torch.nan) if out.is_contiguous() else out
            assert under(path, function, x, *args, out=out) is out
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
        source = x.contiguous(memory_format=last)
        out = torch.empty_like(source)
        torch.testing.assert_close(under(path, function, source, *args, out=out), expected, rtol=0, atol=2e-6)
        inside = x.clone()
        under(path, function, inside, *args, out=inside)
        torch.testing.assert_close(inside, expected, rtol=0, atol=2e-6)
        storage = torch.zeros(x.numel() + 7)
        beside, into = storage[: x.numel()].view_as(x).copy_(x), storage[7:].view_as(x)
        expected_beside = expected
        torch.testing.assert_close(under(path, function, beside, *args, out=into), expected_beside, rtol=0, atol=2e-6)
        with pytest.raises(ValueError, match=r"out must be \(2, 3, 21, 18\), torch.float32"):
            function(x, *args, out=x.double())
        with pytest.raises(RuntimeError, match="out= has no gradient"):
            function(x.clone().requires_grad_(), *args, out=torch.empty_like(x))
        with torch.no_grad():
            function(x.clone().requires_grad_(), *args, out=torch.empty_like(x))
    over_mask = torch.rand(21, 18)
    expected = under(path, mask_high_frequencies, x[0, 0], over_mask, 3)
    under(path, mask_high_frequencies, x[0, 0], over_mask, 3, out=over_mask)
    torch.testing.assert_close(over_mask, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8), (2, 8, 0), (0, 0)], ids=str)
def test_empty(path, shape):
    x = torch.zeros(shape, requires_grad=True)
    keep = torch.ones(shape[-2:])
    for y in (
        under(path, high_pass, x),
        under(path, mask_high_frequencies, x, keep),
        under(path, spectral_filter, x, torch.ones(shape[-2], shape[-1] // 2 + 1)),
    ):
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    out = torch.zeros(shape)
    assert under(path, high_pass, x.detach(), out=out) is out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_plane_that_is_not_finite_leaves_the_others_alone(path, bad):
    x, keep = natural(3, 24, 37, dtype=F32), torch.rand(24, 37) > 0.5
    clean = under(path, mask_high_frequencies, x, keep, 3)
    x[1, 5, 7] = bad
    y = under(path, mask_high_frequencies, x, keep, 3)
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[2], clean[2])
    assert not y[1][~keep].isfinite().all()
    assert not under(path, high_pass, x, 3)[1].isfinite().any()


# ---- paths, errors --------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    x, keep = torch.randn(2, 3, 8, 9), torch.ones(8, 9)
    gain = torch.ones(8, 5)
    cases = [
        (TypeError, "high_pass: x must be a real floating-point tensor, got torch.int64", high_pass, (x.long(),)),
        (TypeError, "x must be a real floating-point tensor, got torch.complex64", high_pass, (x.cfloat(),)),
        (ValueError, r"x must be Tensor\[..., H, W\], got shape \(9,\)", high_pass, (x[0, 0, 0],)),
        (ValueError, "half_width must be a whole number >= 0 or a pair", high_pass, (x, -1)),
        (ValueError, r"half_width must be .* got \(1, 2, 3\)", high_pass, (x, (1, 2, 3))),
        (ValueError, r"half_width must be .* got \(1, 2.5\)", high_pass, (x, (1, 2.5))),
        (ValueError, r"keep must have the shape of x or broadcast to it; x is \(2, 3, 8, 9\), keep \(8, 8\)",
         mask_high_frequencies, (x, keep[:, :8])),
        (ValueError, "keep must have the shape", mask_high_frequencies, (x[0, 0], keep[None])),
        (ValueError, "keep must be on the device of x, cpu, got meta", mask_high_frequencies, (x, keep.to("meta"))),
        (TypeError, "keep must be bool or a real number", mask_high_frequencies, (x, keep.cfloat())),
        (TypeError, "mask_high_frequencies: x must be", mask_high_frequencies, (x.bool(), keep)),
        (ValueError, r"gain must be \(2, 3, 8, 5\)", spectral_filter, (x, gain[:, :4])),
        (ValueError, r"gain must be .* got \(2, 8, 5\)", spectral_filter, (x, gain.expand(2, -1, -1))),
        (ValueError, r"gain must be .* got \(5,\)", spectral_filter, (x, gain[0])),
        (TypeError, "gain must be a real floating-point", spectral_filter, (x, gain.cfloat())),
        (ValueError, "gain must be on the device of x", spectral_filter, (x, gain.to("meta"))),
    ]  # fmt: skip
    for kind, message, function, args in cases:
        with pytest.raises(kind, match=message):
            function(*args)
    backward = torch.ops.pyface.mask_high_frequencies_backward
    with pytest.raises(ValueError, match="sign must be"):
        backward(x, x, keep, [1, 1], False, None)
    with pytest.raises(ValueError, match="grad must be"):
        torch.ops.pyface.spectral_filter_backward(x, x[0], None)
    with pytest.raises(ValueError, match="2\\^31 - 1 pixels"):
        high_pass(torch.empty(1).expand(2**16, 2**15))


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("path", PATHS)
def test_opcheck(path, grad):
    ops = torch.ops.pyface
    for shape, layout in [
        ((2, 3, 8, 9), torch.contiguous_format),
        ((2, 3, 8, 9), torch.channels_last),
        ((0, 3, 8, 9), torch.contiguous_format),
    ]:
        x = torch.randn(shape).contiguous(memory_format=layout)
        sign = torch.randint(-1, 2, shape, dtype=torch.int8).contiguous(memory_format=layout)
        x.requires_grad_(grad)
        check = torch.library.opcheck
        check(ops.high_pass.default, (x, [2, 3], False, path))
        for keep in (torch.rand(8, 9) > 0.5, torch.rand(3, 8, 9).requires_grad_(grad)):
            check(ops.mask_high_frequencies.default, (x, keep, [2, 3], True, grad, path))
            check(ops.mask_high_frequencies_backward.default, (x, sign, keep, [2, 3], False, path))
        gain = torch.rand(3, 8, 5).requires_grad_(grad)
        check(ops.spectral_filter.default, (x, gain, path))
        check(ops.spectral_filter_backward.default, (x, torch.randn_like(x), path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_dims", [(0, None), (1, 0), (None, 1), (0, 2)], ids=str)
def test_vmap(path, in_dims):
    x, keep, gain = torch.randn(2, 8, 9, dtype=F64), torch.rand(8, 9, dtype=F64), torch.randn(8, 5, dtype=F64)

    def batched(t, dim):
        return t if dim is None else torch.stack([torch.randn_like(t) for _ in range(4)], dim)

    def pick(t, dim, i):
        return t if dim is None else t.select(dim, i)

    xs, keeps, gains = batched(x, in_dims[0]), batched(keep, in_dims[1]), batched(gain, in_dims[1])
    for f, others in (
        (lambda x, k: under(path, mask_high_frequencies, x, k, (2, 3)), keeps),
        (lambda x, k: under(path, high_pass, x * k, (2, 3)), keeps),
        (lambda x, g: under(path, spectral_filter, x, g), gains),
    ):
        for call in (f, torch.func.grad(lambda x, o, f=f: f(x, o).square().sum(), argnums=(0, 1))):
            got = torch.vmap(call, in_dims=in_dims)(xs, others)
            each = [call(pick(xs, in_dims[0], i), pick(others, in_dims[1], i)) for i in range(4)]
            if isinstance(got, tuple):
                for a, *b in zip(got, *each):
                    torch.testing.assert_close(a, torch.stack(b))
            else:
                torch.testing.assert_close(got, torch.stack(each))
    # the other way round: the gradient of a mapped function, and forward over reverse
    total = lambda x, k: torch.vmap(lambda x: mask_high_frequencies(x, k, 2).square().sum())(x).sum()  # noqa: E731
    images = torch.randn(4, 8, 9, dtype=F64)
    each = torch.func.grad(lambda x, k: mask_high_frequencies(x, k, 2).square().sum(), argnums=(0, 1))(images, keep)
    for a, b in zip(torch.func.grad(total, argnums=(0, 1))(images, keep), each):
        torch.testing.assert_close(a, b)
    hessian = torch.func.hessian(lambda x: mask_high_frequencies(x, keep[:3, :4], 2).square().sum())(images[0, :3, :4])
    assert hessian.shape == (3, 4, 3, 4)


@pytest.mark.parametrize("path", PATHS)
def test_compiles_to_one_graph_and_does_not_recompile(path):
    def f(x, keep, gain):
        y = mask_high_frequencies(x * 2, keep, 2) + high_pass(x.sin(), (1, 2), symmetric=True)
        return spectral_filter(y, gain) * 3

    torch._dynamo.reset()
    with pyface.paths(path):
        graph = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch, height, width in [(2, 8, 10), (3, 11, 7), (5, 6, 13)]:
            x = torch.randn(batch, 3, height, width, requires_grad=True)
            keep = torch.rand(height, width, requires_grad=True)
            gain = torch.rand(height, width // 2 + 1, requires_grad=True)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                got = graph(x, keep, gain)
            expected = f(x, keep, gain)
            torch.testing.assert_close(got, expected)
            found, wanted = (torch.autograd.grad(y.square().sum(), (x, keep, gain)) for y in (got, expected))
            torch.testing.assert_close(found, wanted)


def test_exports_and_survives_autocast():
    class Net(torch.nn.Module):
        def forward(self, x, keep):
            return mask_high_frequencies(x, keep)

    x, keep = torch.randn(2, 3, 16, 18), torch.rand(16, 18) > 0.5
    program = torch.export.export(Net(), (x, keep), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    assert "pyface.mask_high_frequencies.default" in {str(node.target) for node in program.graph.nodes}
    more = torch.randn(5, 3, 16, 18)
    torch.testing.assert_close(program.module()(more, keep), Net()(more, keep))
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(mask_high_frequencies(x, keep), Net()(x, keep))
        assert mask_high_frequencies(x, keep).dtype == F32


# ---- every instruction set, the same bits, the core by itself -------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_every_isa(isa, dtype, symmetric):
    for shape, d in [((3, 37, 83), (5, 4)), ((2, 16, 16), (3, 9)), ((2, 3, 9, 34), (12, 11)), ((1, 5, 2), (1, 1))]:
        x, keep = natural(*shape, dtype=dtype), torch.rand(shape[-2:]) > 0.4
        y = x.clone().requires_grad_()
        found = under("cpu", mask_high_frequencies, y, keep, d, symmetric=symmetric)
        exact, sign = reference.mask_high_frequencies(x.double(), keep, d, symmetric)
        allowed = {F64: 1e-13, F32: 2e-6, BF16: 2**-8, F16: 2**-11}[dtype] * x.abs().max().double()
        assert (found.double() - exact).abs().max() <= allowed
        grad = torch.randn(shape).to(dtype)
        got = torch.autograd.grad(found, y, grad)[0]
        near = reference.high_pass(x.double(), d, symmetric).abs() < 1e-5  # its sign is open
        if not near.any():
            exact = reference.mask_high_frequencies_backward(grad.double(), sign, keep, d, symmetric)
            assert (got.double() - exact).abs().max() <= 8 * allowed + 1e-6 * (dtype != F64)


def test_float16_and_bfloat16_numbers_survive_the_trip(isa):
    """All 65536 of them, NaN aside, through the loads and stores: nothing is low, and the mask keeps every pixel."""
    for dtype in (F16, BF16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype)
        x = x[x.isfinite() & ((x.abs() >= torch.finfo(dtype).tiny) | (dtype == F16))]
        plane = x[: x.numel() // 64 * 64].view(-1, 64)
        y = under("cpu", mask_high_frequencies, plane, torch.ones_like(plane, dtype=torch.bool), 2)
        assert torch.equal(y.view(torch.int16), plane.view(torch.int16))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bits_do_not_depend_on_threads_or_the_batch(isa, dtype):
    threads = torch.get_num_threads()
    x, keep = natural(11, 70, 99, dtype=dtype), torch.rand(70, 99) > 0.4
    grad, sign = torch.randn(11, 70, 99).to(dtype), torch.randint(-1, 2, (11, 70, 99), dtype=torch.int8)
    backward = torch.ops.pyface.mask_high_frequencies_backward

    def both(rows):
        return mask_high_frequencies(x[rows], keep, 7), backward(grad[rows], sign[rows], keep, [7, 7], False, "cpu")

    try:
        torch.set_num_threads(1)
        expected = both(slice(None))
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (slice(None), slice(3, 4), slice(2, 10)):  # whole planes to a thread, and shared ones
                assert all(torch.equal(a, b[rows]) for a, b in zip(both(rows), expected))
    finally:
        torch.set_num_threads(threads)


def test_core_under_sanitizers(sanitized):
    sanitized("spectral", "-fopenmp")


def test_the_largest_blocks_go_to_a_transform_and_mean_the_same():
    core = importlib.import_module("pyface.ops.spectral")
    assert not core._transform_is_faster((224, 224), (32, 32))
    assert core._transform_is_faster((224, 224), (80, 80))
    assert not core._transform_is_faster((299, 299), (149, 149))
    for d in (79, 80):
        x, keep = natural(2, 224, 224, dtype=F32).requires_grad_(), torch.rand(224, 224) > 0.5
        y = under("cpu", mask_high_frequencies, x, keep, d)
        expected = under("reference", mask_high_frequencies, x, keep, d)
        torch.testing.assert_close(y, expected, rtol=0, atol=3e-6)
        torch.testing.assert_close(
            under("cpu", high_pass, x, d), under("reference", high_pass, x, d), rtol=0, atol=3e-6
        )
