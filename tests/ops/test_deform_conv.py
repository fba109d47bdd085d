"""Core `deform_conv`: every instruction set against float64 and torchvision, gradients to second order, borders,
offsets that are no numbers, the same bits, torch integration, and the C++ core under sanitizers."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import pyface
from pyface.ops import _paths, deform_conv2d
from pyface.ops.reference import deform_conv as reference

CPU = _paths.load_module("_cpu")[0]
CSRC = Path(__file__).resolve().parents[2] / "csrc"
PATHS = ["reference", "cpu"]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = [  # images, channels, outputs, weight groups, offset groups, kernel, stride, padding, dilation, height, width
    (2, 6, 4, 2, 3, (3, 2), (2, 1), (1, 0), (2, 1), 7, 6),  # nothing square; a weight group straddles offset groups
    (1, 64, 64, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 14, 14),
    (3, 16, 33, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 9, 9),
    (2, 48, 20, 2, 3, (3, 3), (1, 1), (1, 1), (1, 1), 13, 11),
    (1, 96, 40, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 2, 2),  # few pixels: dot products
    (4, 17, 5, 1, 17, (1, 1), (1, 1), (0, 0), (1, 1), 4, 4),
    (2, 17, 17, 17, 1, (3, 3), (1, 1), (1, 1), (1, 1), 8, 9),  # depthwise
    (1, 3, 2, 1, 3, (1, 7), (1, 1), (0, 3), (1, 1), 12, 10),
    (33, 5, 3, 1, 5, (5, 5), (2, 2), (2, 2), (1, 1), 7, 7),
    (1, 100, 70, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 12, 12),  # two chunks of columns
    # fewer pixels than weights: these are read as they lie
    (2, 200, 90, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 9, 8),  # a tile of two images, three chunks
    (3, 40, 80, 2, 2, (3, 3), (1, 1), (1, 1), (1, 1), 5, 5),
    (2, 33, 60, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 7, 7),  # an odd number of products
    (1, 32, 100, 1, 1, (3, 3), (2, 2), (1, 1), (1, 1), 8, 7),
]


def shape_id(shape):
    return "x".join(map(str, shape[:5])) + f"-{shape[5][0]}x{shape[5][1]}"


def sample(shape, dtype=F64, *, masked=True, sigma=1.5, grad=False):
    """(input, offset, weight, bias, mask or None), (stride, padding, dilation); offsets stay clear of whole numbers."""
    n, c, o, groups, offset_groups, kernel, stride, padding, dilation, height, width = shape
    size = reference.output_size((height, width), kernel, stride, padding, dilation)
    taps = kernel[0] * kernel[1]
    offset = torch.randn(n, 2 * offset_groups * taps, *size, dtype=F64) * sigma
    offset = torch.where((offset - offset.round()).abs() < 0.01, offset + 0.05, offset)
    tensors = [
        torch.randn(n, c, height, width, dtype=F64),
        offset,
        torch.randn(o, c // groups, *kernel, dtype=F64) * (groups / c / taps) ** 0.5,
        torch.randn(o, dtype=F64),
        torch.rand(n, offset_groups * taps, *size, dtype=F64) * 2 - 0.5 if masked else None,
    ]
    tensors = [None if t is None else t.to(dtype).requires_grad_(grad) for t in tensors]
    return tensors, (stride, padding, dilation)


def ours(tensors, geometry, path="cpu"):
    with pyface.paths(path):
        return deform_conv2d(*tensors[:4], *geometry, mask=tensors[4])


def theirs(tensors, geometry):
    return torchvision.ops.deform_conv2d(*tensors[:4], *geometry, mask=tensors[4])


def grads_of(call, tensors, geometry, grad=None):
    """The result and the gradients of all tensors, as new leaves."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = call(leaves, geometry)
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)


def off_by(a: Tensor, b: Tensor) -> float:
    """Error relative to the size of the data; NaN on one side alone is one too."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item() if a.numel() else 0.0


# ---- the reference by itself ----------------------------------------------------------------------------------------


def naive(tensors, geometry):
    """The definition as loops, with the interpolation written as a sum over all pixels of the image."""
    x, offset, weight, bias, mask = tensors
    stride, padding, dilation = geometry
    n, c, height, width = x.shape
    o, inputs, kh, kw = weight.shape
    groups = offset.shape[1] // (2 * kh * kw)
    rows, columns = torch.arange(height, dtype=F64), torch.arange(width, dtype=F64)
    out = bias.view(1, -1, 1, 1).repeat(n, 1, *offset.shape[2:])
    places = itertools.product(range(n), range(c), range(kh), range(kw), *(range(s) for s in offset.shape[2:]))
    for b, channel, i, j, oy, ox in places:
        tap = channel // (c // groups) * kh * kw + i * kw + j
        y = oy * stride[0] - padding[0] + i * dilation[0] + offset[b, 2 * tap, oy, ox]
        x_at = ox * stride[1] - padding[1] + j * dilation[1] + offset[b, 2 * tap + 1, oy, ox]
        hats = (1 - (y - rows).abs()).clamp(0)[:, None] * (1 - (x_at - columns).abs()).clamp(0)
        value = (hats * x[b, channel]).sum() * (1 if mask is None else mask[b, tap, oy, ox])
        per_group = o // (c // inputs)
        first = channel // inputs * per_group
        out[b, first : first + per_group, oy, ox] += weight[first : first + per_group, channel % inputs, i, j] * value
    return out


@pytest.mark.parametrize("masked", [True, False], ids=["v2", "v1"])
def test_the_reference_is_the_definition(masked):
    tensors, geometry = sample((2, 6, 4, 2, 3, (3, 2), (2, 1), (1, 0), (2, 1), 7, 6), masked=masked)
    torch.testing.assert_close(ours(tensors, geometry, "reference"), naive(tensors, geometry))


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_isa_and_its_gradients_are_close_to_float64(isa, shape, dtype, masked):
    tensors, geometry = sample(shape, dtype, masked=masked)
    wide = [None if t is None else t.double() for t in tensors]
    grad = torch.randn_like(theirs(wide, geometry)).to(dtype)
    exact = grads_of(theirs, wide, geometry, grad)
    found = grads_of(ours, tensors, geometry, grad)
    allowed = {F64: 1e-14, F32: 1e-6, BF16: 6e-3}[dtype]
    for name, a, b in zip(("out", "input", "offset", "weight", "bias", "mask"), found, exact):
        assert a.dtype == dtype
        assert off_by(a, b) <= allowed, name


def test_float32_is_at_most_twice_as_far_from_float64_as_torchvision(isa):
    for shape in SHAPES[:4]:
        tensors, geometry = sample(shape, F32)
        wide = [t.double() for t in tensors]
        exact = grads_of(theirs, wide, geometry)
        peer, found = grads_of(theirs, tensors, geometry), grads_of(ours, tensors, geometry)
        for a, b, c in zip(found, peer, exact):
            assert off_by(a, c) <= max(2 * off_by(b, c), 3e-7)


def test_bfloat16_means_the_same_on_every_isa():
    before, results = CPU.isa(), []
    for few in (False, True):
        tensors, geometry = sample(SHAPES[4] if few else SHAPES[1], BF16)
        exact = theirs([t.double() for t in tensors], geometry)
        for name in CPU.isas():
            CPU.set_isa(name)
            results.append(ours(tensors, geometry))
            # columns rounded once, products summed in float32, and the result rounded once
            assert off_by(results[-1], exact) <= 2.0**-8
        CPU.set_isa(before)
        assert all(off_by(r, results[0]) <= 2.0**-9 for r in results)
        results.clear()


pairs = st.sampled_from([(1, 1), (2, 2), (2, 1)])
layouts = st.fixed_dictionaries(
    {
        "kernel": st.sampled_from([(1, 1), (3, 3), (3, 2), (5, 5), (1, 7)]),
        "stride": pairs,
        "dilation": pairs,
        "padding": st.sampled_from([(0, 0), (1, 1), (1, 0), (3, 3)]),
        "channels": st.sampled_from([1, 3, 4, 6, 16, 17, 24, 64]),
        "groups": st.sampled_from([1, 2, 3, 100]),  # 100: as many as channels
        "offset_groups": st.sampled_from([1, 2, 3, 100]),
        "outs": st.sampled_from([1, 2, 16, 33]),
        "batch": st.sampled_from([1, 2, 5]),
        "size": st.tuples(st.integers(5, 13), st.integers(7, 13)),
        "sigma": st.sampled_from([0.0, 0.3, 2.0, 50.0]),
        "masked": st.booleans(),
        "last": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_equals_torchvision_for_all_parameters(case):
    c = case["channels"]
    groups, offset_groups = (c if g == 100 or c % g else g for g in (case["groups"], case["offset_groups"]))
    geometry = case["stride"], case["padding"], case["dilation"]
    size = reference.output_size(case["size"], case["kernel"], *geometry)
    if min(size) < 1:
        return
    outs = -(-case["outs"] // groups) * groups
    shape = (case["batch"], c, outs, groups, offset_groups, case["kernel"], *geometry, *case["size"])
    tensors, _ = sample(shape, masked=case["masked"], sigma=case["sigma"])
    if case["last"]:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    exact = grads_of(theirs, tensors, geometry)
    for path in PATHS:
        found = grads_of(lambda t, g, path=path: ours(t, g, path), tensors, geometry)
        for a, b in zip(found, exact):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    single = ours([None if t is None else t.float() for t in tensors], geometry)
    torch.testing.assert_close(single.double(), exact[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_zero_offset_is_a_convolution_whole_offsets_shift_it_and_a_zero_mask_leaves_the_bias(path, shape):
    (x, offset, weight, bias, mask), geometry = tensors, _ = sample(shape)
    offset.zero_()
    mask.fill_(1)
    torch.testing.assert_close(ours(tensors, geometry, path), F.conv2d(x, weight, bias, *geometry, shape[3]))
    offset[:, 0::2] += 1  # y
    offset[:, 1::2] -= 2
    stride, padding, dilation = geometry
    (top, left), width = padding, x.shape[3]
    # what is read: the image with its padding, from one row further down and two columns further left
    seen = F.pad(x, (left + 2, left, top, top + 1))[:, :, 1:, : width + 2 * left]
    torch.testing.assert_close(
        ours(tensors, geometry, path), F.conv2d(seen, weight, bias, stride, 0, dilation, shape[3])
    )
    mask.zero_()
    out = ours(tensors, geometry, path)
    assert torch.equal(out, bias.view(1, -1, 1, 1).expand_as(out))


@pytest.mark.parametrize("path", PATHS)
def test_a_constant_image_stays_constant_while_offsets_stay_inside(path):
    (x, offset, weight, bias, mask), geometry = tensors, _ = sample(
        (2, 32, 5, 1, 2, (3, 3), (1, 1), (0, 0), (1, 1), 9, 9)
    )
    x.fill_(3)
    mask.fill_(1)
    offset[:, :, 3, 3].clamp_(-3, 3)
    out = ours(tensors, geometry, path)[:, :, 3, 3]
    torch.testing.assert_close(out, (3 * weight.sum((1, 2, 3)) + bias).expand_as(out))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_borders_fade_and_derivatives_are_one_sided(path, dtype):
    height, width = 4, 5
    x = torch.arange(1.0, height * width + 1, dtype=dtype).view(1, 1, height, width)
    ys = [-1.5, -1, -0.999, -0.5, 0, height - 1, height - 0.5, height - 0.001, height, height + 1]
    xs = [-1.5, -1, -0.999, -0.5, 0, 2, width - 1, width - 0.5, width - 0.001, width, width + 1]
    places = torch.tensor(list(itertools.product(ys, xs)), dtype=dtype)
    n = len(places)
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    images = x.expand(n, -1, -1, -1)
    offset = places.view(n, 2, 1, 1)
    tensors = [images, offset, weight, torch.zeros(1, dtype=dtype), None]
    geometry = (height, width), (0, 0), (1, 1)  # one output pixel, at the origin
    rows, columns = torch.arange(height, dtype=F64), torch.arange(width, dtype=F64)
    y, x_at = places.double().T
    vertical, across = (1 - (y[:, None] - rows).abs()).clamp(0), (1 - (x_at[:, None] - columns).abs()).clamp(0)
    hats = vertical[:, :, None] * across[:, None]
    out, *grads = grads_of(lambda t, g: ours(t, g, path), tensors, geometry)
    expected = (hats * x[0].double()).sum((1, 2))
    torch.testing.assert_close(out.flatten().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0].double(), hats[:, None], rtol=1e-5, atol=1e-6)
    _, _, by_torchvision, *_ = grads_of(theirs, tensors, geometry)
    torch.testing.assert_close(grads[1], by_torchvision, rtol=1e-5, atol=1e-5)
    at_edge = places[:, 0].eq(-1) & places[:, 1].eq(2)
    assert out[at_edge].item() == 0
    assert grads[1][at_edge].flatten().tolist() == [3.0, 0.0]  # the pixel right below


# ---- offsets that are no numbers, and pixels that are none ----------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=["many pixels", "few pixels"])
def test_an_offset_that_is_no_number_reads_nothing(path, dtype, shape):
    tensors, geometry = sample(shape, dtype)
    wild = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e10, -1e10, 1e38, 5e-45], dtype=dtype)
    hit = torch.rand(tensors[1].shape) < 0.3
    tensors[1] = torch.where(hit, wild[torch.randint(len(wild), hit.shape)], tensors[1])
    tame = [*tensors]
    tame[1] = torch.where(hit & ~(tensors[1].abs() < 1e-30), torch.full_like(tensors[1], 1e4), tensors[1])
    found = grads_of(lambda t, g: ours(t, g, path), tensors, geometry)
    expected = grads_of(lambda t, g: ours(t, g, path), tame, geometry)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    y, x = (hit & (tensors[1].abs() > 1).logical_or(tensors[1].isnan())).unflatten(1, (-1, 2)).unbind(2)
    assert (found[2].unflatten(1, (-1, 2))[(y | x).unsqueeze(2).expand(-1, -1, 2, -1, -1)] == 0).all()


def test_a_nan_pixel_reaches_the_outputs_that_read_it_and_no_other(isa):
    for shape, dtype in itertools.product([SHAPES[1], SHAPES[4], SHAPES[2]], [F32, BF16]):
        tensors, geometry = sample(shape, dtype, sigma=0.7)
        tensors[1][:, :, :1] = 100  # outside: must not read what it is clamped to
        clean = ours(tensors, geometry)
        x = tensors[0].clone()
        x[0, 1, 0, 0] = torch.nan
        y = ours([x, *tensors[1:]], geometry)
        reads = [torch.zeros_like(x), *tensors[1:4], torch.ones_like(tensors[4])]
        reads[0][0, 1, 0, 0] = 1
        reads[2] = torch.ones_like(tensors[2])
        reads[3] = torch.zeros_like(tensors[3])
        hit = theirs([t.double() for t in reads], geometry) > 0
        assert torch.equal(y.isnan(), hit)
        assert torch.equal(y[~hit], clean[~hit])


# ---- second order, forward mode, subsets ----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck_to_second_order_and_forward(path, masked):
    for shape in (
        (2, 4, 2, 2, 1, (2, 2), (1, 1), (1, 0), (1, 1), 3, 3),
        (1, 3, 2, 1, 3, (1, 2), (2, 1), (0, 1), (1, 1), 4, 2),
    ):
        tensors, geometry = sample(shape, masked=masked, grad=True)
        leaves = [t for t in tensors if t is not None]

        def f(x, offset, weight, bias, mask=None, geometry=geometry):
            return ours([x, offset, weight, bias, mask], geometry, path)

        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize(("dtype", "allowed"), [(F32, 1e-5), (BF16, 2e-2)], ids=str)
def test_forward_mode_and_second_order_in_low_precision(dtype, allowed):
    tensors, geometry = sample(SHAPES[2], dtype)
    tangents = [torch.randn_like(t) for t in tensors]

    def call(*t):
        return ours(t, geometry)

    def derivatives(dtype):
        primal, moved = ([t.to(dtype) for t in ts] for ts in (tensors, tangents))
        out, tangent = torch.func.jvp(call, tuple(primal), tuple(moved))
        leaves = [t.clone().requires_grad_() for t in primal]
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, moved)), leaves)
        assert out.dtype == tangent.dtype == dtype
        return tangent, *second

    for a, b in zip(derivatives(dtype), derivatives(F64)):
        assert off_by(a, b) <= allowed


@pytest.mark.parametrize("few", [False, True], ids=["many pixels", "few pixels"])
def test_only_the_gradients_asked_for(monkeypatch, few):
    core = importlib.import_module("pyface.ops.deform_conv")
    tensors, geometry = sample(SHAPES[5 if few else 3], F32)
    expected = grads_of(ours, tensors, geometry)[1:]
    asked = []
    implementation = core.CORE.pick("cpu", (F32, F32), "cpu")
    plain = implementation.backward
    monkeypatch.setattr(implementation, "backward", lambda *args: asked.append(args[-1]) or plain(*args))
    for wanted in itertools.product((False, True), repeat=5):
        if not any(wanted):
            continue
        asked.clear()
        leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, wanted)]
        ours(leaves, geometry).sum().backward()
        for leaf, need, g in zip(leaves, wanted, expected):
            assert (leaf.grad is not None) == need
            assert not need or torch.equal(leaf.grad, g)
        needs = (wanted[0], wanted[1], wanted[2], wanted[4])
        assert asked == ([needs] if any(needs) else [])  # a gradient of the bias alone starts no kernel


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bits_do_not_depend_on_threads_or_luck(isa, dtype):
    threads = torch.get_num_threads()
    odd = (5, 40, 24, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 17, 9)
    for shape in (SHAPES[3], SHAPES[1], SHAPES[4], SHAPES[10], odd):
        tensors, geometry = sample(shape, dtype)
        expected = grads_of(ours, tensors, geometry)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for _ in range(20 if shape is SHAPES[3] else 2):
                    assert all(torch.equal(a, b) for a, b in zip(grads_of(ours, tensors, geometry), expected)), count
        finally:
            torch.set_num_threads(threads)


def test_a_result_does_not_depend_on_the_rest_of_the_batch(isa):
    tensors, geometry = sample((5, 40, 24, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 11, 13), F32)
    y = ours(tensors, geometry)
    for i in range(5):
        x, offset, weight, bias, mask = tensors
        alone = [x[i : i + 1], offset[i : i + 1], weight, bias, mask[i : i + 1]]
        assert torch.equal(ours(alone, geometry)[0], y[i])


def test_weights_that_are_packed_in_stages_and_images_in_turns():
    """9 MB of weights, of which one thread packs 4 at a time, and images of 2 MB, of which it copies one."""
    tensors, geometry = sample((3, 512, 520, 1, 1, (3, 3), (2, 2), (1, 1), (1, 1), 18, 20), F32)
    big, wide = sample((3, 80, 4, 1, 1, (1, 1), (9, 9), (0, 0), (1, 1), 90, 91), F32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert off_by(ours(tensors, geometry), theirs([t.double() for t in tensors], geometry)) <= 1e-6
        one = ours(tensors, geometry), *grads_of(ours, big, wide)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, (ours(tensors, geometry), *grads_of(ours, big, wide))))
        assert all(off_by(a, b) <= 1e-5 for a, b in zip(one[1:], grads_of(theirs, [t.double() for t in big], wide)))
    finally:
        torch.set_num_threads(threads)


# ---- layouts, types, sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_layouts(path):
    shape = (2, 32, 24, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 9, 11)
    tensors, geometry = sample(shape, F32)
    x, offset, weight, bias, mask = tensors
    expected = grads_of(lambda t, g: ours(t, g, path), tensors, geometry)
    packed = torch.cat([offset, mask], 1)  # as one convolution predicts both
    wide = torch.randn(2, 64, 9, 11).contiguous(memory_format=torch.channels_last)
    wide[:, 16:48] = x
    strided = torch.randn(2, 32, 18, 22)
    strided[:, :, ::2, ::2] = x
    last = torch.channels_last
    variants = {
        "channels_last": [x.contiguous(memory_format=last), offset, weight, bias, mask],
        "all channels_last": [t if t.dim() == 1 else t.contiguous(memory_format=last) for t in tensors],
        "halves of a prediction": [x, packed[:, :18], weight, bias, packed[:, 18:]],
        "slice of channels_last": [wide[:, 16:48], offset, weight, bias, mask],
        "every second pixel": [strided[:, :, ::2, ::2], offset, weight, bias, mask],
        "turned": [x.mT.contiguous().mT, offset, weight.transpose(0, 1).contiguous().transpose(0, 1), bias, mask],
        "strided bias": [x, offset, weight, bias.repeat_interleave(2)[::2], mask],
    }
    for name, variant in variants.items():
        leaves = [t.detach().requires_grad_() for t in variant]
        out = ours(leaves, geometry, path)
        found = out, *torch.autograd.grad(out, leaves, torch.ones_like(out))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        is_last = name in ("channels_last", "all channels_last")
        assert out.is_contiguous(memory_format=last if is_last else torch.contiguous_format), name
        assert found[1].is_contiguous(memory_format=last if is_last else torch.contiguous_format), name
    one = x[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        ours([one, *tensors[1:]], geometry, path), ours([one.contiguous(), *tensors[1:]], geometry, path)
    )


@pytest.mark.parametrize("path", PATHS)
def test_offset_and_mask_may_be_wider_than_the_input(path):
    tensors, geometry = sample(SHAPES[1], BF16, sigma=2)
    exact = theirs([t.double() for t in tensors], geometry)
    wide = [t.float() if i in (1, 4) else t for i, t in enumerate(tensors)]
    assert off_by(ours(wide, geometry, path), exact) <= 6e-3
    found = grads_of(lambda t, g: ours(t, g, path), wide, geometry)
    assert [g.dtype for g in found] == [BF16, BF16, F32, BF16, BF16, F32]
    mixed = [*wide]
    mixed[4] = tensors[4]  # mask in bf16 beside an offset in float32
    assert torch.equal(ours(mixed, geometry, path), ours(wide, geometry, path))
    double = [t.double() if i == 1 else t.float() for i, t in enumerate(tensors)]
    assert ours(double, geometry, path).dtype == F32


def test_float16_positions_are_computed_in_float32():
    """Near 256 pixels float16 is a quarter of a pixel coarse: torchvision, which adds there, is off by 2e-2."""
    x = torch.rand(1, 1, 256, 256, dtype=torch.float16)
    offset = (torch.randn(1, 18, 256, 256) * 0.7).half()
    weight = torch.full((1, 1, 3, 3), 1 / 9).half()
    exact = theirs([x.double(), offset.double(), weight.double(), None, None], ((1, 1), (1, 1), (1, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference path serves float16 on the CPU and says so
        found = deform_conv2d(x, offset, weight, padding=1)
    assert (found.double() - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_empty_batch(path):
    tensors, geometry = sample((0, 4, 6, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 5, 7), F32)
    out, *grads = grads_of(lambda t, g: ours(t, g, path), tensors, geometry)
    assert out.shape == (0, 6, 5, 7)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert grads[2].eq(0).all()


def test_autocast_multiplies_in_its_type_and_leaves_offsets_alone():
    tensors, geometry = sample(SHAPES[1], F32)
    tensors = [t.requires_grad_() for t in tensors]
    low = [t if i in (1, 4) else t.detach().bfloat16() for i, t in enumerate(tensors)]
    with torch.autocast("cpu", dtype=BF16):
        out = deform_conv2d(*tensors[:4], *geometry, mask=tensors[4])
        assert out.dtype == BF16
        assert torch.equal(out, deform_conv2d(*low[:4], *geometry, mask=tensors[4]))
        double = [t.detach().double() for t in tensors]
        assert deform_conv2d(*double[:4], *geometry, mask=double[4]).dtype == F64
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert all(g.dtype == F32 for g in grads)


# ---- paths, errors --------------------------------------------------------------------------------------------------


def test_a_path_says_why_it_cannot_serve():
    tensors, geometry = sample(SHAPES[0], torch.float16)
    with pytest.raises(pyface.ops.PathError, match="does not take float16"):
        ours(tensors, geometry)
    rows = {row["path"]: row for row in pyface.ops.table() if row["core"] == "deform_conv"}
    assert rows["cpu"]["usable"]
    assert rows["reference"]["usable"]
    for path in ("triton", "cuda"):
        if not rows[path]["usable"]:
            with pytest.raises(pyface.ops.PathError, match=f"path '{path}' was asked for but cannot serve"):
                ours(sample(SHAPES[0], F32)[0], geometry, path)


def test_errors_name_what_is_wrong():
    x, offset, weight = torch.randn(2, 4, 6, 6), torch.randn(2, 18, 4, 4), torch.randn(6, 4, 3, 3)
    mask, bias = torch.randn(2, 9, 4, 4), torch.randn(6)
    cases = [
        (ValueError, r"input must be Tensor\[N, C, H, W\]", (x[0], offset, weight), {}),
        (ValueError, r"input must be .* C, H and W >= 1", (x[:, :, :0], offset, weight), {}),
        (ValueError, r"weight must be Tensor\[O, C/groups", (x, offset, weight[0]), {}),
        (ValueError, "does not fit the input's 4 channels", (x, offset, weight[:, :3]), {}),
        (ValueError, "number of groups", (x, offset, weight[:3, :2]), {}),
        (ValueError, r"offset must be Tensor\[2, 2 \* G \* 9, 4, 4\].*got shape \(2, 18, 6, 6\)",
         (x, torch.randn(2, 18, 6, 6), weight), {}),
        (ValueError, "offset must be .* divisor of the input's 4", (x, torch.randn(2, 54, 4, 4), weight), {}),
        (ValueError, r"offset must be .*got shape \(1, 18, 4, 4\)", (x, offset[:1], weight), {}),
        (ValueError, r"offset must be .*got shape \(2, 18, 4\)", (x, offset[..., 0], weight), {}),
        (ValueError, r"offset must be Tensor\[2, 2 \* G \* 9, 2, 2\]", (x, offset, weight), {"stride": 2}),
        (ValueError, r"mask must be Tensor\[2, 9, 4, 4\]", (x, offset, weight), {"mask": mask[:, :8]}),
        (ValueError, r"bias must be Tensor\[6\]", (x, offset, weight, bias[:5]), {}),
        (ValueError, "larger than the padded input, 6 x 6", (x, offset, weight), {"dilation": 3}),
        (ValueError, "stride must be a whole number >= 1", (x, offset, weight), {"stride": 0}),
        (ValueError, "padding must be a whole number >= 0", (x, offset, weight), {"padding": (1, -1)}),
        (ValueError, r"dilation must be .* pair \(y, x\)", (x, offset, weight), {"dilation": (1, 1, 1)}),
        (ValueError, "device of input, cpu; offset is on meta", (x, offset.to("meta"), weight), {}),
        (TypeError, "mask must be of a floating-point type, got torch.bool", (x, offset, weight), {"mask": mask > 0}),
        (TypeError, "input must be of a floating-point type", (x.long(), offset, weight), {}),
        (TypeError, "weight is torch.float64", (x, offset, weight.double()), {}),
        (TypeError, "bias is torch.bfloat16", (x, offset, weight, bias.bfloat16()), {}),
    ]  # fmt: skip
    for kind, message, args, options in cases:
        with pytest.raises(kind, match=message):
            deform_conv2d(*args, **options)
    op = torch.ops.pyface.deform_conv2d
    with pytest.raises(TypeError, match="offset and mask must both be torch.float32, got torch.float64"):
        op(x, offset.double(), weight, None, None, [1, 1], [0, 0], [1, 1], "cpu")
    backward = torch.ops.pyface.deform_conv2d_backward
    with pytest.raises(ValueError, match=r"grad must be \(2, 6, 4, 4\)"):
        backward(x, x, offset, weight, None, [1, 1], [0, 0], [1, 1], True, True, True, True, "cpu")


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("path", PATHS)
def test_opcheck(path, grad):
    for shape, masked, layout in [
        (SHAPES[0], True, torch.contiguous_format),
        (SHAPES[2], False, torch.channels_last),
        ((0, 4, 6, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 5, 7), True, torch.contiguous_format),
    ]:
        tensors, geometry = sample(shape, F32, masked=masked)
        tensors[0] = tensors[0].contiguous(memory_format=layout)
        x, offset, weight, bias, mask = (None if t is None else t.requires_grad_(grad) for t in tensors)
        torch.library.opcheck(torch.ops.pyface.deform_conv2d.default, (x, offset, weight, bias, mask, *geometry, path))
        g = torch.randn_like(theirs([x, offset, weight, bias, mask], geometry)).detach()
        for needs in ((True,) * 4, (False, True, True, False)):
            args = (g, x, offset, weight, mask, *geometry, *needs, path)
            # symbolic sizes through all formulas of the second order take torch a minute, so there they are fixed
            aot = "test_aot_dispatch_static" if grad else "test_aot_dispatch_dynamic"
            utils = ("test_schema", "test_autograd_registration", "test_faketensor", aot)
            torch.library.opcheck(torch.ops.pyface.deform_conv2d_backward.default, args, test_utils=utils)


@pytest.mark.parametrize("mapped", ["x", "xomb", "w", "b", "xowbm"])
def test_vmap(mapped):
    samples = [sample(SHAPES[0], F64) for _ in range(3)]
    geometry = samples[0][1]
    dims = [0 if letter in mapped else None for letter in "xowbm"]
    tensors = [torch.stack([s[0][i] for s in samples]) if dim == 0 else samples[0][0][i] for i, dim in enumerate(dims)]

    def f(*t):
        return deform_conv2d(*t[:4], *geometry, mask=t[4])

    def gradients(*t):
        return torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2, 3, 4))(*t)

    each = [[t[k] if dim == 0 else t for t, dim in zip(tensors, dims)] for k in range(3)]
    got = torch.vmap(f, in_dims=tuple(dims))(*tensors)
    torch.testing.assert_close(got, torch.stack([f(*t) for t in each]))
    got = torch.vmap(gradients, in_dims=tuple(dims))(*tensors)
    for a, *b in zip(got, *[gradients(*t) for t in each]):
        torch.testing.assert_close(a, torch.stack(b))


def test_compiles_to_one_graph_and_does_not_recompile():
    torch._dynamo.reset()

    def f(x, offset, weight, bias, mask):
        return deform_conv2d(x.relu(), offset, weight, bias, padding=1, mask=mask.sigmoid()) * 2

    graph = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, height, width in [(2, 8, 9), (3, 10, 7), (5, 6, 12)]:
        tensors, _ = sample((batch, 6, 5, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), height, width), F32, grad=True)
        with torch._dynamo.config.patch(error_on_recompile=batch != 2):
            got = graph(*tensors)
        expected = f(*tensors)
        torch.testing.assert_close(got, expected)
        found, wanted = (torch.autograd.grad(y.square().sum(), tensors) for y in (got, expected))
        torch.testing.assert_close(found, wanted)


def test_compiles_under_autocast():
    tensors, _ = sample(SHAPES[1], F32)

    def f(x, offset, weight, bias, mask):
        with torch.autocast("cpu", dtype=BF16):
            return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)

    torch._dynamo.reset()
    graph = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(*tensors), f(*tensors))


def test_exports():
    class Net(torch.nn.Module):
        def forward(self, x, offset, weight, bias, mask):
            return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)

    tensors, _ = sample(SHAPES[1], F32)
    program = torch.export.export(Net(), tuple(tensors))
    assert "pyface.deform_conv2d.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*tensors), Net()(*tensors))


# ---- the core by itself ---------------------------------------------------------------------------------------------


MEASURE_MEMORY = """
import ctypes, gc, sys
from pathlib import Path
import torch
from pyface.ops import deform_conv2d

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def tensors(n, c, o, side, groups, last):
    x = torch.randn(n, c, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    offset, mask = torch.randn(n, 18 * groups, side, side), torch.rand(n, 9 * groups, side, side)
    return [t.requires_grad_() for t in (x, offset, torch.randn(o, c, 3, 3), mask)]

def gradients(found, grad):
    x, offset, weight, mask = found
    out = deform_conv2d(x, offset, weight, padding=1, mask=mask)
    clear()
    return torch.autograd.grad(out, found, grad)

def forward(found, grad):
    x, offset, weight, mask = found
    with torch.no_grad():
        clear()
        return [deform_conv2d(x, offset, weight, padding=1, mask=mask)]

def clear():
    global before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")

ctypes.CDLL(None).mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD: what is freed leaves at once
torch.set_num_threads(int(sys.argv[1]))
call = gradients if sys.argv[2] == "backward" else forward
call(tensors(1, 16, 16, 4, 1, False), torch.ones(1, 16, 4, 4))  # what happens once; a work buffer is small here
n, c, o, side, groups, last = map(int, sys.argv[3:])
found, grad = tensors(n, c, o, side, groups, last), torch.ones(n, o, side, side)
results = call(found, grad)
print(resident("VmHWM") - before - sum(t.nbytes for t in results))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux counts it")
@pytest.mark.parametrize(
    ("what", "threads", "shape", "last"),
    [
        ("forward", 2, (1, 256, 256, 64, 1), False),
        ("forward", 1, (1, 512, 512, 32, 1), True),
        ("forward", 2, (4, 1024, 512, 4, 2), False),
        ("backward", 2, (8, 64, 64, 64, 1), False),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_memory_beside_the_results(what, threads, shape, last):
    """At most 4 MiB for each thread, columns, packed weights and the copy of an image that is not channels_last."""
    command = [sys.executable, "-c", MEASURE_MEMORY, str(threads), what, *map(str, shape), str(int(last))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    slack = 1 << 20  # the measure is this coarse
    assert int(done.stdout) <= threads * (4 << 20) + slack, f"{int(done.stdout) / 2**20:.1f} MiB"


def test_core_under_sanitizers(sanitized):
    # whose tiles the system may refuse
    sanitized("deform_conv", *([] if "amx" in CPU.isas() else ["-U__AMX_BF16__"]), isa=CPU.isas()[-1])
