"""Core `attention`: every instruction set against float64 concatenation and softmax, gradients to second order, edges,
laws, the same bits, torch integration, and the C++ core under sanitizers."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import pyface
from pyface.ops import _paths, concat_kv_attention, spatial_prior_attention

CPU = _paths.load_module("_cpu")[0]
CSRC = Path(__file__).resolve().parents[2] / "csrc"
PATHS = ["reference", "cpu"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF = math.inf
SHAPES = [  # B, H, L, S, E, Ev, R, causal
    (2, 3, 77, 77, 64, 64, 1, True),
    (2, 2, 77, 77, 64, 64, 4, False),
    (1, 12, 17, 33, 40, 24, 16, True),
    (2, 1, 33, 17, 8, 16, 5, True),  # the first queries see the rows alone
    (1, 2, 1, 130, 80, 80, 2, True),  # decoding
    (3, 1, 16, 15, 3, 5, 17, False),
    (1, 1, 197, 257, 128, 160, 64, False),
    (1, 2, 81, 80, 16, 16, 0, True),
    (2, 2, 7, 0, 8, 8, 3, True),  # rows and no key
]


def shape_id(shape):
    return "x".join(map(str, shape[:7])) + ("-causal" if shape[7] else "")


def sample(shape, dtype=F64, *, shared=True, grad=False, extra_dtype=None):
    """[query, key, value, extra_key, extra_value]."""
    b, h, length, size, e, ev, r, _ = shape
    rows = (h, r) if shared else (b, h, r)
    shapes = [(b, h, length, e), (b, h, size, e), (b, h, size, ev), (*rows, e), (*rows, ev)]
    dtypes = [dtype] * 3 + [extra_dtype or dtype] * 2
    return [torch.randn(s, dtype=F64).to(d).requires_grad_(grad) for s, d in zip(shapes, dtypes)]


def visible(length, size, causal):
    seen = torch.ones(length, size, dtype=torch.bool)
    return seen.tril(size - length) if causal else seen


def exact(tensors, causal=False, extra_bias=0.0, scale=None):
    """(out, lse) by concatenation, masking and softmax in float64, with torch's autograd."""
    query, key, value, extra_key, extra_value = (t.double() for t in tensors)
    b, (length, size), r = len(query), (query.shape[2], key.shape[2]), extra_key.shape[-2]
    keys = torch.cat((extra_key.expand(b, -1, -1, -1), key), 2)
    values = torch.cat((extra_value.expand(b, -1, -1, -1), value), 2)
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ keys.transpose(-1, -2)
    bias = torch.as_tensor(extra_bias, dtype=F64)
    bias = bias.unsqueeze(-2) if bias.dim() == 2 else bias
    scores = torch.cat((scores[..., :r] + bias, scores[..., r:].masked_fill(~visible(length, size, causal), -INF)), -1)
    lse = torch.logsumexp(scores, -1) if r + size else scores.new_full(scores.shape[:-1], -INF)
    p = torch.exp(scores - torch.where(lse == -INF, 0, lse).unsqueeze(-1))
    return p @ values, lse


def ours(tensors, causal=False, path="cpu", **how):
    with pyface.paths(path):
        return concat_kv_attention(*tensors, is_causal=causal, return_lse=True, **how)


def grads_of(call, tensors, grad, grad_lse, **how):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = call(leaves, **how)
    seen = lse != -INF
    loss = (out.double() * grad).sum() + (lse[seen].double() * grad_lse[seen]).sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


def off_by(a, b):
    """Error relative to the size of the data."""
    if a.numel() == 0:
        return 0.0
    assert torch.equal(a.isfinite(), b.isfinite())
    a, b = (torch.where(t.isfinite(), t, 0).double() for t in (a, b))
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item() if b.norm() > 0 else a.norm().item()


NAMES = ("out", "lse", "query", "key", "value", "extra_key", "extra_value")


def query_terms(tensors, grad, grad_lse, causal, extra_bias=0.0, scale=None):
    """What the gradient of query is without cancellation: the sum of the sizes of its terms."""
    query, key, value, extra_key, extra_value = (t.double() for t in tensors)
    out, lse = exact(tensors, causal, extra_bias, scale)
    keys, values = (
        torch.cat((extra.expand(len(query), -1, -1, -1), own), 2)
        for extra, own in ((extra_key, key), (extra_value, value))
    )
    r, size = extra_key.shape[-2], key.shape[-2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * query @ keys.transpose(-1, -2)
    bias = torch.as_tensor(extra_bias, dtype=F64)
    scores[..., :r] += bias.unsqueeze(-2) if bias.dim() == 2 else bias
    scores[..., r:].masked_fill_(~visible(query.shape[2], size, causal), -INF)
    p = torch.exp(scores - torch.where(lse == -INF, 0, lse).unsqueeze(-1))
    delta = (grad * out).sum(-1, keepdim=True) - torch.where(lse == -INF, 0, grad_lse).unsqueeze(-1)
    return factor * (p * ((grad @ values.transpose(-1, -2)).abs() + delta.abs())) @ keys.abs()


def compare(tensors, causal, path, allowed, **how):
    length, width = tensors[0].shape[2], tensors[2].shape[3]
    grad = torch.randn(*tensors[0].shape[:2], length, width, dtype=F64)
    grad_lse = torch.randn(*tensors[0].shape[:3], dtype=F64)
    found = grads_of(ours, tensors, grad, grad_lse, causal=causal, path=path, **how)
    wanted = grads_of(exact, [t.double() for t in tensors], grad, grad_lse, causal=causal, **how)
    for name, a, b in zip(NAMES, found, wanted):
        error = off_by(a, b)
        if name == "query" and error > allowed:  # a sum over the list whose terms may cancel, but not their roundings
            error *= (b.norm() / query_terms(tensors, grad, grad_lse, causal, **how).norm()).item()
        assert error <= allowed, (name, error)
    for t, g in zip(tensors, found[2:]):
        assert (g.dtype, g.shape) == (t.dtype, t.shape)
    assert found[0].dtype == tensors[0].dtype
    assert found[1].dtype == (F64 if tensors[0].dtype == F64 else F32)


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per sample"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_isa_and_its_gradients_are_close_to_float64(isa, shape, dtype, shared):
    compare(sample(shape, dtype, shared=shared), shape[7], "cpu", {F64: 1e-13, F32: 2e-6, BF16: 1.6e-2}[dtype],
            extra_bias=0.5)  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_the_reference_too(dtype):
    for shape in SHAPES:
        allowed = {F64: 1e-13, F32: 2e-6, BF16: 1.6e-2, F16: 2e-3}[dtype]
        compare(sample(shape, dtype), shape[7], "reference", allowed, extra_bias=1.0)


def test_random_sweep(isa):
    draw = random.Random(7)
    lengths, depths = [0, 1, 7, 15, 16, 17, 77, 80, 81, 129, 197, 257], [1, 8, 16, 40, 64, 80, 128, 160]
    for _ in range(50):
        shape = (
            draw.choice([1, 2, 3]), draw.choice([1, 2, 12]), draw.choice(lengths), draw.choice(lengths),
            draw.choice(depths), draw.choice(depths), draw.choice([0, 1, 2, 5, 16, 17, 64]), draw.random() < 0.6,
        )  # fmt: skip
        tensors = sample(shape, F32, shared=draw.random() < 0.7)
        compare(tensors, shape[7], "cpu", 3e-6, extra_bias=draw.choice([0, 1, -2.5]))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per sample"])
def test_half_precision_on_a_cpu_is_close_to_float64(shared):
    for shape in SHAPES:
        compare(sample(shape, F16, shared=shared), shape[7], "cpu", 2e-3, extra_bias=0.5)
    tensors = sample(SHAPES[0], F16)
    view = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[:3]]  # the layout of models
    with pyface.paths("cpu"):
        out = concat_kv_attention(*view, *tensors[3:])
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, ours(tensors, False)[0])


@pytest.mark.parametrize("low", [BF16, F16], ids=str)
def test_rows_in_float32_beside_low_precision(low):
    shape = SHAPES[0]
    tensors = sample(shape, low, extra_dtype=F32)
    compare(tensors, True, "cpu", 1.6e-2)
    out, _ = ours(tensors, True)
    rounded, _ = ours([*tensors[:3], *(t.to(low) for t in tensors[3:])], True)
    assert off_by(out, rounded) <= 1e-2
    leaves = [t.detach().requires_grad_() for t in tensors]
    gradient = torch.autograd.grad(ours(leaves, True)[0].float().square().sum(), leaves[3])[0]
    assert gradient.dtype == F32
    assert not torch.equal(gradient, gradient.to(low).float())


def test_long_sequences_go_through_blocks():
    for causal in (False, True):
        tensors = sample((1, 1, 1100, 4096, 16, 16, 5, causal), F32)
        out, lse = ours(tensors, causal)
        expected, expected_lse = exact(tensors, causal)
        assert off_by(out, expected) <= 2e-6
        assert off_by(lse, expected_lse) <= 2e-6


def test_large_scores_do_not_overflow(isa):
    tensors = sample(SHAPES[0], F32)
    tensors[0] *= 1e3
    tensors[1] *= 80
    tensors[3] *= 80
    out, lse = ours(tensors, True)
    expected, expected_lse = exact(tensors, True)
    assert lse.abs().max() > 1e4
    assert off_by(lse, expected_lse) <= 1e-6
    assert (out - expected).abs().max() <= 2e-2  # scores of 1e4 have steps of 1e-3 in float32


def test_the_lse_of_one_visible_key_is_its_score(isa):
    tensors = sample((2, 2, 5, 5, 8, 8, 0, True), F64)
    _, lse = ours(tensors, True)
    torch.testing.assert_close(lse[..., 0], (tensors[0][..., 0, :] * tensors[1][..., 0, :]).sum(-1) / 8**0.5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_to_second_order_and_forward_mode(path, causal):
    for shape, shared in [((2, 2, 3, 4, 3, 2, 2, causal), True), ((2, 1, 4, 3, 2, 3, 1, causal), False)]:
        tensors = sample(shape, grad=True, shared=shared)
        bias = torch.randn(shape[1], shape[6], dtype=F64, requires_grad=True)

        def f(*t, return_lse):
            with pyface.paths(path):
                found = concat_kv_attention(*t[:5], is_causal=causal, extra_bias=t[5], return_lse=return_lse)
            return found

        for return_lse in (False, True):
            def g(*t, return_lse=return_lse):
                return f(*t, return_lse=return_lse)

            assert torch.autograd.gradcheck(g, (*tensors, bias), check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(g, (*tensors, bias))


@pytest.mark.parametrize("path", PATHS)
def test_only_the_gradients_asked_for(path):
    shape = (2, 2, 20, 19, 8, 8, 3, True)
    tensors, grad = sample(shape, F32), torch.randn(2, 2, 20, 8)
    every = [t.clone().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(ours(every, True, path)[0], every, grad)
    for needs in itertools.product([False, True], repeat=5):
        if not any(needs):
            continue
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs)]
        asked = [t for t in leaves if t.requires_grad]
        found = torch.autograd.grad(ours(leaves, True, path)[0], asked, grad)
        for a, b in zip(found, (w for w, need in zip(wanted, needs) if need)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["number", "heads", "one", "all"])
def test_extra_bias_and_its_gradient(isa, form):
    shape = (2, 3, 18, 18, 8, 8, 4, True)
    tensors = sample(shape)
    size = {"number": (), "heads": (3, 1), "one": (1,), "all": (3, 4)}[form]
    bias = torch.randn(size, dtype=F64, requires_grad=True)
    out, lse = ours(tensors, True, extra_bias=bias)
    expected, expected_lse = exact(tensors, True, bias.expand(3, 4))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    seed = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, bias, seed), torch.autograd.grad(expected, bias, seed))


# ---- the table of edges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path):
    tensors = sample((2, 3, 20, 20, 8, 8, 0, True), F32, grad=True)
    out, lse = ours(tensors, True, path)
    plain = F.scaled_dot_product_attention(*tensors[:3], is_causal=True)
    torch.testing.assert_close(out, plain)
    none = ours([*tensors[:3], None, None], True, path)
    assert torch.equal(out, none[0])
    assert torch.equal(lse, none[1])
    grads = torch.autograd.grad(out.sum(), tensors[3:])
    assert [tuple(g.shape) for g in grads] == [(3, 0, 8), (3, 0, 8)]


@pytest.mark.parametrize("path", PATHS)
def test_queries_that_see_nothing(path):
    tensors = sample((1, 2, 9, 4, 8, 8, 0, True), F32, grad=True)
    out, lse = ours(tensors, True, path)
    assert out[:, :, :5].eq(0).all()
    assert lse[:, :, :5].eq(-INF).all()
    assert lse[:, :, 5:].isfinite().all()
    seed = torch.zeros_like(lse)
    seed[:, :, 5:] = 1
    grads = torch.autograd.grad((out, lse), tensors[:3], (torch.ones_like(out), seed))
    assert grads[0][:, :, :5].eq(0).all()
    assert all(g.isfinite().all() for g in grads)
    nothing = sample((1, 2, 9, 0, 8, 8, 0, False), F32, grad=True)
    out, lse = ours(nothing, False, path)
    assert out.eq(0).all()
    assert lse.eq(-INF).all()
    assert torch.autograd.grad(out.sum(), nothing[0])[0].eq(0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("empty", [0, 1, 2], ids=["B", "H", "L"])
def test_empty(path, empty):
    shape = [2, 3, 4, 5, 8, 8, 2, False]
    shape[empty] = 0
    tensors = sample(tuple(shape), F32, grad=True)
    out, lse = ours(tensors, False, path)
    assert tuple(out.shape) == (*shape[:3], 8)
    assert tuple(lse.shape) == tuple(shape[:3])
    for g in torch.autograd.grad(out.sum() + lse.sum(), tensors):
        assert g.eq(0).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_bias_of_minus_infinity_switches_rows_off(path):
    tensors = sample((2, 2, 20, 20, 8, 8, 3, True), F32, grad=True)
    out, lse = ours(tensors, True, path, extra_bias=-INF)
    expected, expected_lse = ours([*tensors[:3], None, None], True, path)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(out.square().sum(), tensors)
    assert grads[3].eq(0).all()
    assert grads[4].eq(0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2, 3, 4], ids=NAMES[2:])
def test_a_nan_reaches_those_who_see_it_and_no_other(isa, where, dtype):
    for path in PATHS:
        tensors = sample((1, 1, 40, 40, 40, 8, 2, True), dtype)
        clean, clean_lse = ours(tensors, True, path)
        tensors[where].select(-2, min(20, tensors[where].shape[-2] - 1))[..., 3] = torch.nan
        out, lse = ours(tensors, True, path)
        # A row of queries alone; a key or value for the later queries; an extra row for all.
        hit = {0: slice(20, 21), 1: slice(20, 40), 2: slice(20, 40)}.get(where, slice(0, 40))
        spoiled = torch.zeros(40, dtype=torch.bool)
        spoiled[hit] = True
        channels = out[0, 0].isnan().any(-1)
        assert torch.equal(channels, spoiled), path
        assert torch.equal(out[..., ~spoiled, :], clean[..., ~spoiled, :])
        if where in (0, 1, 3):
            assert torch.equal(lse[0, 0].isnan(), spoiled)
        assert torch.equal(lse[..., ~spoiled], clean_lse[..., ~spoiled])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("what", [math.nan, INF], ids=str)
def test_gradients_of_what_a_nan_does_not_reach(isa, dtype, what):
    """What is spoiled from row j on, queries before j and the keys behind them know nothing of."""
    shape, j = (1, 2, 150, 150, 40, 33, 3, True), 140
    tensors = sample(shape, dtype)
    grad = torch.randn(1, 2, 150, 33, dtype=F64)
    grad[:, :, j:] = 0
    grad_lse = torch.zeros(1, 2, 150, dtype=F64)
    clean = grads_of(ours, tensors, grad, grad_lse, causal=True, path="cpu")
    spoiled = [t.clone() for t in tensors]
    for t in spoiled[:3]:
        t[:, :, j:, 2] = what
    found = grads_of(ours, spoiled, grad, grad_lse, causal=True, path="cpu")
    assert torch.equal(found[2][:, :, :j], clean[2][:, :, :j])
    # A spoiled query reaches every key that it sees, by way of its own weights.
    assert not found[3].isfinite().all(-1).any()
    assert not found[5].isfinite().all()
    # The gradient of a result that nobody uses is 0: it does not reach further than the query itself.
    grad[:, :, j:] = torch.randn(1, 2, 150 - j, 33, dtype=F64)
    clean = grads_of(ours, tensors, grad, grad_lse, causal=True, path="cpu")
    grad[:, :, 100] = what
    found = grads_of(ours, tensors, grad, grad_lse, causal=True, path="cpu")
    untouched = torch.ones(150, dtype=torch.bool)
    untouched[100] = False
    assert torch.equal(found[2][:, :, untouched], clean[2][:, :, untouched])
    for after, before in zip(found[3:5], clean[3:5]):
        assert not after[:, :, :101].isfinite().all(-1).any()
        assert torch.equal(after[:, :, 101:], before[:, :, 101:])


def test_infinite_scores():
    tensors = sample((1, 1, 6, 6, 4, 4, 1, False), F32)
    tensors[0][0, 0, 2] = torch.tensor([INF, 0, 0, 0])
    tensors[1][0, 0, :, 0] = 1.0
    tensors[3][..., 0] = 1.0
    for path in PATHS:
        out, _ = ours(tensors, False, path)
        assert out[0, 0, 2].isnan().all()
        assert out[0, 0, [0, 1, 3, 4, 5]].isfinite().all()


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_any_strides_are_read(isa):
    shape = (2, 3, 33, 33, 16, 24, 4, True)
    tensors = sample(shape, F32)
    expected, expected_lse = ours(tensors, True)
    layouts = {
        "B L H E": lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),
        "sliced": lambda t: F.pad(t, (3, 2, 1, 1))[..., 1:-1, 3:-2],
        "columns apart": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    }
    seed = torch.randn_like(expected)
    plain = [t.clone().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(ours(plain, True)[0], plain, seed)
    for name, layout in layouts.items():
        moved = [layout(t).requires_grad_() for t in tensors]
        out, lse = ours(moved, True)
        assert torch.equal(out, expected), name
        assert torch.equal(lse, expected_lse), name
        found = torch.autograd.grad(out, moved, layout(seed))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted)), name
    moved = [layouts["B L H E"](t) for t in tensors]
    assert ours(moved, True)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("apart", [0, 1, 2], ids=["samples", "heads", "rows"])
def test_addresses_beyond_32_bits(apart):
    """So far apart that neither their elements nor their bytes can be counted in 32 bits."""
    try:
        room = torch.empty(2**33, dtype=torch.uint8).view(BF16)  # only the few pages written below become memory
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    tensors = sample((2, 2, 2, 2, 8, 8, 2, True), BF16)
    strides = [64, 32, 16, 1]
    strides[apart] = 2**31 + 64
    moved = [room.as_strided(t.shape, strides, 512 * i).copy_(t) for i, t in enumerate(tensors[:3])]
    seeds = torch.randn(2, 2, 2, 8, dtype=F64), torch.randn(2, 2, 2, dtype=F64)
    found, wanted = [], []
    for these, results in ((moved, found), (tensors[:3], wanted)):
        leaves = [t.detach().requires_grad_() for t in (*these, *tensors[3:])]
        out, lse = ours(leaves, True)
        results += out, lse, *torch.autograd.grad((out, lse), leaves, (seeds[0].to(BF16), seeds[1].float()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_memory_is_results_and_little_more():
    """No copy of keys and values, no scores: what comes on top of the results is the stated workspace."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("peak memory is read from Linux's /proc")

    def megabytes(call):
        status = Path("/proc/self/status")
        peak.write_text("5")  # forgets the peak so far
        before = int(status.read_text().split("VmHWM:")[1].split()[0])
        call()
        return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024

    for dtype in (F32, BF16):
        size = 140000 if dtype == F32 else 280000  # keys, and values, of 34 MiB: memory that comes from the system
        query, key, value = (torch.randn(1, 1, n, 64, dtype=dtype) for n in (16, size, size))
        rows = torch.randn(2, 1, 4, 64, requires_grad=True)
        ours([query, key[:, :, :256], value[:, :, :256], *rows])
        with torch.no_grad():
            assert megabytes(lambda t=(query, key, value, *rows): ours(t)) <= 4
        loss = ours([query, key, value, *rows])[0].float().sum()
        assert megabytes(lambda loss=loss, rows=rows: torch.autograd.grad(loss, rows)) <= 4
        leaves = key.requires_grad_(), value.requires_grad_()
        loss = ours([query, key, value, *rows])[0].float().sum()
        allowed = 2 * 34 if dtype == F32 else 2 * 34 + 2 * 68  # 16 bits: also those of a head in float32, as is stated
        assert megabytes(lambda loss=loss, leaves=leaves: torch.autograd.grad(loss, leaves)) <= allowed + 6


def test_rows_expanded_over_the_batch_are_shared_rows():
    tensors = sample((3, 2, 17, 17, 8, 8, 2, True), F32, grad=True)
    expanded = [*tensors[:3], *(t.expand(3, -1, -1, -1) for t in tensors[3:])]
    out, _ = ours(tensors, True)
    again, _ = ours(expanded, True)
    assert torch.equal(out, again)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), tensors[3:], retain_graph=True) for o in (out, again))):
        torch.testing.assert_close(a, b)


# ---- laws -----------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 24)
some_rows = st.integers(1, 6)
either = st.booleans()


@st.composite
def problems(draw, rows=some_rows, causal=either):
    shape = (
        draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(sizes), draw(sizes), draw(st.integers(1, 20)),
        draw(st.integers(1, 20)), draw(rows), draw(causal),
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return sample(shape), shape


law = settings(max_examples=25, deadline=None)


@law
@given(problems(), st.integers(0, 6))
def test_law_rows_merged_in_parts_are_rows_merged_at_once(problem, cut):
    """Residual form: outputs of disjoint sets of keys merge by their lse."""
    tensors, shape = problem
    cut = min(cut, shape[6])
    query, key, value, extra_key, extra_value = tensors

    def part(key, value, rows, causal):
        return ours([query, key, value, extra_key[:, rows], extra_value[:, rows]], causal)

    none = key[:, :, :0], value[:, :, :0]
    parts = [
        part(key, value, slice(0, 0), shape[7]), part(*none, slice(0, cut), False), part(*none, slice(cut, None), False)
    ]  # fmt: skip
    lse = torch.logsumexp(torch.stack([p[1] for p in parts]), 0)
    out = sum(p[0] * torch.exp(p[1] - lse).unsqueeze(-1) for p in parts)
    whole = ours(tensors, shape[7])
    torch.testing.assert_close(whole[0], out)
    torch.testing.assert_close(whole[1], lse)


@law
@given(problems(), st.floats(-3, 3))
def test_law_order_copies_and_shifts(problem, shift):
    tensors, shape = problem
    out, lse = ours(tensors, shape[7], extra_bias=shift)
    order = torch.randperm(shape[6])
    mixed = ours([*tensors[:3], *(t[:, order] for t in tensors[3:])], shape[7], extra_bias=shift)
    torch.testing.assert_close(mixed, (out, lse))
    twice = [*tensors[:3], *(t.repeat(1, 2, 1) for t in tensors[3:])]
    torch.testing.assert_close(ours(twice, shape[7], extra_bias=shift - math.log(2)), (out, lse))
    # Adding c to all scores: a channel more, 1 in every query, c in every key and row.
    ones = torch.ones(*tensors[0].shape[:-1], 1, dtype=F64)
    wider = [torch.cat((tensors[0], ones), -1)]
    scale = shape[4] ** -0.5
    for t in (tensors[1], tensors[3]):
        wider.append(torch.cat((t, torch.full((*t.shape[:-1], 1), shift / scale, dtype=F64)), -1))
    moved = ours([wider[0], wider[1], tensors[2], wider[2], tensors[4]], shape[7], extra_bias=shift, scale=scale)
    torch.testing.assert_close(moved, (out, lse + shift))


@law
@given(problems(causal=st.just(False)))
def test_law_a_key_may_become_a_row(problem):
    (query, key, value, extra_key, extra_value), shape = problem
    found = ours([query[:1], key[:1], value[:1], extra_key, extra_value])
    moved = [
        query[:1], key[:1, :, 1:], value[:1, :, 1:],
        torch.cat((extra_key, key[0, :, :1]), 1), torch.cat((extra_value, value[0, :, :1]), 1),
    ]  # fmt: skip
    torch.testing.assert_close(ours(moved), found)


@law
@given(problems(causal=st.just(True)), st.integers(0, 23))
def test_law_causality(problem, j):
    tensors, (_, _, length, size, *_) = problem
    j = min(j, size - 1)
    before = ours(tensors, True)
    changed = [t.clone() for t in tensors]
    changed[1][:, :, j] += 1
    changed[2][:, :, j] = torch.nan
    after = ours(changed, True)
    first = min(length, max(0, j - (size - length)))
    for a, b in zip(after, before):
        assert torch.equal(a[:, :, :first], b[:, :, :first])
    assert after[0][:, :, first:].isnan().all()


@law
@given(problems(), st.floats(-2, 2))
def test_law_values(problem, factor):
    tensors, shape = problem
    out, lse = ours(tensors, shape[7])
    scaled = [*tensors[:2], factor * tensors[2], tensors[3], factor * tensors[4]]
    torch.testing.assert_close(ours(scaled, shape[7])[0], factor * out)
    constant = [*tensors[:2], torch.full_like(tensors[2], 3.0), tensors[3], torch.full_like(tensors[4], 3.0)]
    torch.testing.assert_close(ours(constant, shape[7])[0], torch.full_like(out, 3.0))
    # A mean of visible values, and the rows' share grows with their bias.
    every = torch.cat((tensors[4].expand(shape[0], -1, -1, -1), tensors[2]), 2)
    assert (out <= every.amax(2, keepdim=True) + 1e-12).all()
    assert (out >= every.amin(2, keepdim=True) - 1e-12).all()
    share = [*tensors[:2], torch.zeros_like(tensors[2]), tensors[3], torch.ones_like(tensors[4])]
    shares = [ours(share, shape[7], extra_bias=b)[0] for b in (-1.0, 0.0, 1.0)]
    assert (shares[0] > 0).all()
    assert (shares[2] <= 1 + 1e-12).all()
    assert (shares[0] <= shares[1] + 1e-12).all()  # where no key is seen, all of them are 1 but for rounding
    assert (shares[1] <= shares[2] + 1e-12).all()


@law
@given(problems())
def test_law_batches_add_up_and_scores_only_differ(problem):
    tensors, shape = problem
    tensors = [t.requires_grad_() for t in tensors]
    seed = torch.randn(*tensors[0].shape[:3], shape[5], dtype=F64)
    out, _ = ours(tensors, shape[7])
    whole = torch.autograd.grad(out, tensors[3:], seed)
    parts = [
        torch.autograd.grad(
            ours([*(t[i : i + 1] for t in tensors[:3]), *tensors[3:]], shape[7])[0], tensors[3:], seed[i : i + 1]
        )
        for i in range(shape[0])
    ]
    for a, *b in zip(whole, *parts):
        torch.testing.assert_close(a, torch.stack(b).sum(0))
    # A number added to all scores of a query changes nothing: 0 is the gradient of a channel of the query that is 1 in
    # all keys and rows, and that of a bias of rows alone, with no key.
    query, key, value, extra_key, extra_value = (t.detach() for t in tensors)
    query, key, extra_key = (F.pad(t, (0, 1), value=1.0) for t in (query, key, extra_key))
    query.requires_grad_()
    pulled = ours([query, key, value, extra_key, extra_value], shape[7])[0]
    assert torch.autograd.grad(pulled, query, seed)[0][..., -1].abs().max() <= 1e-11 * (1 + seed.abs().sum())
    bias = torch.zeros((), dtype=F64, requires_grad=True)
    alone = [tensors[0], tensors[1][:, :, :0], tensors[2][:, :, :0], *tensors[3:]]
    gradient = torch.autograd.grad(ours(alone, extra_bias=bias)[0], bias, seed)[0]
    assert gradient.abs() <= 1e-11 * (1 + seed.abs().sum())


def test_released_adapters_are_an_additive_mask():
    """CatVersion's files: (n, 6, 12, 64), keys and values of three layers, run with a mask row of ones."""
    flat = torch.randn(2, 6, 12, 64)
    query, key, value = torch.randn(3, 2, 12, 77, 64)
    mask = torch.zeros(77, 77).masked_fill(~visible(77, 77, True), -INF)
    mask = torch.cat((torch.ones(77, 2), mask), 1)
    for layer in range(3):
        extra_key, extra_value = (flat[:, i].transpose(0, 1) for i in (layer, 3 + layer))
        keys, values = (
            torch.cat((e.expand(2, -1, -1, -1), t), 2) for e, t in ((extra_key, key), (extra_value, value))
        )
        expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        out = concat_kv_attention(query, key, value, extra_key, extra_value, is_causal=True, extra_bias=1.0)
        torch.testing.assert_close(out, expected)


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], (1, 1, 300, 280, 16, 16, 5, True)], ids=shape_id)
def test_the_same_bits_on_any_number_of_threads_and_every_time(isa, shape, dtype):
    tensors = sample(shape, dtype)
    grad, grad_lse = torch.randn(*shape[:3], shape[5], dtype=F64), torch.randn(shape[:3], dtype=F64)
    before = torch.get_num_threads()
    results = []
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            results.append(grads_of(ours, tensors, grad, grad_lse, causal=shape[7], extra_bias=0.5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- the spatial prior ----------------------------------------------------------------------------------------------


def prior_sample(batch=2, heads=3, length=6, width=5, height=4, depth=8, dtype=F64, grad=False):
    tensors = [torch.randn(batch, heads, n, depth, dtype=F64) for n in (length, width * height, width * height)]
    tensors += [
        width * torch.rand(batch, heads, length, 2, dtype=F64), torch.rand(batch, heads, length, 2, dtype=F64) ** 2
    ]
    return [t.to(dtype).requires_grad_(grad) for t in tensors]


def prior_exact(tensors, width, smooth=4.0):
    query, key, value, centre, sharpness = (t.double() for t in tensors)
    y, x = torch.meshgrid(torch.arange(key.shape[2] // width), torch.arange(width), indexing="ij")
    grid = torch.stack((x, y), -1).reshape(-1, 2).double()
    prior = -(sharpness.unsqueeze(-2) * (centre.unsqueeze(-2) - grid) ** 2).sum(-1) / smooth
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + prior
    return torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1)


def prior_ours(tensors, width, path="cpu", **how):
    with pyface.paths(path):
        return spatial_prior_attention(*tensors, width, return_lse=True, **how)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_the_prior_is_that_of_explicit_distances(isa, dtype):
    for size in ({}, {"batch": 1, "length": 37, "width": 16, "height": 16, "depth": 64}, {"width": 1, "height": 7}):
        tensors = prior_sample(dtype=dtype, grad=True, **size)
        tensors[3:] = [t.detach().to(F64 if dtype == F64 else F32).requires_grad_() for t in tensors[3:]]
        width = size.get("width", 5)
        for path in PATHS:
            found, wanted = prior_ours(tensors, width, path), prior_exact(tensors, width)
            allowed = {F64: 1e-12, F32: 5e-6, BF16: 1.6e-2, F16: 4e-3}[dtype]
            seed = torch.randn_like(wanted[0])
            gradients = (
                torch.autograd.grad((o.double() * seed).sum() + lse.double().sum(), tensors)
                for o, lse in (found, wanted)
            )
            for a, b in zip((*found, *next(gradients)), (*wanted, *next(gradients))):
                assert off_by(a, b) <= allowed


@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_the_prior_to_second_order(path):
    tensors = prior_sample(1, 2, 3, 3, 2, 3, grad=True)

    def f(*t):
        return prior_ours(t, 3, path)

    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_laws_of_the_prior(isa):
    query, key, value, centre, sharpness = tensors = prior_sample()
    plain = ours([query, key, value, None, None])
    torch.testing.assert_close(prior_ours([query, key, value, centre, 0 * sharpness], 5), plain)
    # Every place one row down, and the centres too; the first row of places is made too far away to count.
    lower = [torch.cat((torch.full_like(t[:, :, :5], filler), t), 2) for t, filler in ((key, 0.0), (value, 9.0))]
    steep = sharpness + 1e4 * torch.tensor([0.0, 1.0], dtype=F64)
    on_rows = torch.stack((centre[..., 0], (centre[..., 1] % 3).round() + 0.1), -1)
    moved = prior_ours([query, *lower, on_rows + torch.tensor([0.0, 1.0]), steep], 5)
    torch.testing.assert_close(moved, prior_ours([query, key, value, on_rows, steep], 5), rtol=1e-6, atol=1e-6)
    # The sharpest prior sees the nearest place alone.
    nearest = (on_rows[..., 1].round() * 5 + centre[..., 0].floor().clamp(max=4)).long()
    at = torch.stack((centre[..., 0].floor().clamp(max=4) + 0.2, on_rows[..., 1]), -1)
    found, _ = prior_ours([query, key, value, at, torch.full_like(sharpness, 1e5)], 5)
    expected = torch.gather(value, 2, nearest.unsqueeze(-1).expand_as(found))
    torch.testing.assert_close(found, expected)
    # Four more channels are the same prior (fp64): the authors' bias without a bias tensor.
    x, y = torch.arange(20) % 5, torch.arange(20) // 5
    more = torch.stack((x, y, x**2, y**2), -1).double().expand(2, 3, -1, -1)
    first = torch.cat((2 * sharpness * centre, -sharpness), -1) / 4
    wide = F.scaled_dot_product_attention(
        torch.cat((query * 8**-0.5, first), -1), torch.cat((key, more), -1), value, scale=1.0
    )
    torch.testing.assert_close(prior_ours(tensors, 5)[0], wide)


# ---- torch ----------------------------------------------------------------------------------------------------------

OPTIONS = (True, 0.3, 1, 1.0)


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("path", PATHS)
def test_opcheck(path, grad):
    for shape in [(2, 2, 5, 6, 4, 3, 2, True), (0, 2, 5, 6, 4, 3, 2, True)]:
        tensors = sample(shape, F32)
        tensors[3:] = [t.unsqueeze(0) for t in tensors[3:]]
        tensors = [t.requires_grad_(grad) for t in tensors]
        bias = torch.randn(2, 2).requires_grad_(grad)
        args = (*tensors, bias, None, *OPTIONS)
        torch.library.opcheck(torch.ops.pyface.attention.default, (*args, True, path))
        out, lse = (t.detach() for t in torch.ops.pyface.attention(*args, True, path))
        for needs in ([True] * 6 + [False], [False] * 3 + [True] * 2 + [False] * 2):
            aot = "test_aot_dispatch_static" if grad else "test_aot_dispatch_dynamic"
            torch.library.opcheck(
                torch.ops.pyface.attention_backward.default,
                (torch.randn_like(out), None, *tensors, bias, None, out, lse, *OPTIONS, needs, path),
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor", aot),
            )


@pytest.mark.parametrize("mapped", ["q", "xy", "qkv", "qkvxy"])
def test_vmap(mapped):
    samples = [sample((2, 2, 7, 7, 4, 3, 2, True)) for _ in range(3)]
    dims = tuple(0 if letter in mapped else None for letter in "qkvxy")
    tensors = [torch.stack([s[i] for s in samples]) if dim == 0 else samples[0][i] for i, dim in enumerate(dims)]

    def f(*t):
        return concat_kv_attention(*t, is_causal=True, extra_bias=0.5)

    def gradients(*t):
        return torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2, 3, 4))(*t)

    each = [[t[k] if dim == 0 else t for t, dim in zip(tensors, dims)] for k in range(3)]
    torch.testing.assert_close(torch.vmap(f, in_dims=dims)(*tensors), torch.stack([f(*t) for t in each]))
    for a, *b in zip(torch.vmap(gradients, in_dims=dims)(*tensors), *[gradients(*t) for t in each]):
        torch.testing.assert_close(a, torch.stack(b))


def test_compiles_to_one_graph_and_does_not_recompile():
    torch._dynamo.reset()

    def f(*t):
        out, lse = concat_kv_attention(t[0].relu(), *t[1:], is_causal=True, extra_bias=1.0, return_lse=True)
        return out * 2 + lse.unsqueeze(-1)

    graph = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in [(2, 9), (3, 7), (5, 12)]:
        tensors = sample((batch, 4, length, length, 8, 6, 3, True), F32, grad=True)
        with torch._dynamo.config.patch(error_on_recompile=batch != 2):
            got = graph(*tensors)
        expected = f(*tensors)
        torch.testing.assert_close(got, expected)
        found, wanted = (torch.autograd.grad(y.square().sum(), tensors) for y in (got, expected))
        torch.testing.assert_close(found, wanted)


def test_exports():
    class Net(torch.nn.Module):
        def forward(self, *t):
            return concat_kv_attention(*t, is_causal=True)

    tensors = tuple(sample(SHAPES[0], F32))
    program = torch.export.export(Net(), tensors)
    assert "pyface.attention.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*tensors), Net()(*tensors))


def test_autocast_keeps_rows_and_their_gradients_in_float32():
    tensors = sample(SHAPES[0], F32, grad=True)
    with torch.autocast("cpu", dtype=BF16):
        out = concat_kv_attention(*tensors, is_causal=True)
        assert out.dtype == BF16
        assert concat_kv_attention(*(t.double() for t in tensors), is_causal=True).dtype == F64
    low = [*(t.detach().bfloat16() for t in tensors[:3]), *tensors[3:]]
    assert torch.equal(out, concat_kv_attention(*low, is_causal=True))
    gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    assert all(g.dtype == F32 for g in gradients)
    assert not torch.equal(gradients[3], gradients[3].bfloat16().float())


def test_meta_tensors_have_the_results_shapes():
    tensors = [t.to("meta") for t in sample((2, 3, 5, 7, 8, 6, 2, True), BF16, extra_dtype=F32, grad=True)]
    out, lse = concat_kv_attention(*tensors, is_causal=True, return_lse=True)
    assert (out.shape, out.dtype, out.is_meta) == ((2, 3, 5, 6), BF16, True)
    assert (lse.shape, lse.dtype) == ((2, 3, 5), F32)
    assert [g.dtype for g in torch.autograd.grad(out.sum(), tensors)] == [BF16, BF16, BF16, F32, F32]


def test_checkpointing():
    tensors = sample(SHAPES[0], F32, grad=True)

    def f(*t):
        return concat_kv_attention(*t, is_causal=True)

    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, *tensors, use_reentrant=False).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(f(*tensors).sum(), tensors)))


# ---- paths, errors --------------------------------------------------------------------------------------------------


def test_a_path_says_why_it_cannot_serve():
    with pytest.raises(pyface.ops.PathError, match="does not take float8_e4m3fn"):
        ours([t.to(torch.float8_e4m3fn) for t in sample(SHAPES[0], F32)])
    rows = {row["path"]: row for row in pyface.ops.table() if row["core"] == "attention"}
    assert rows["cpu"]["usable"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: (2, 7, 4)}, ValueError, "query must be Tensor"),
        ({1: (2, 3, 5, 4)}, ValueError, r"key must be Tensor\[2, 2, S, 4\]"),
        ({1: (2, 2, 5, 3)}, ValueError, r"key must be Tensor\[2, 2, S, 4\]"),
        ({2: (2, 2, 6, 4)}, ValueError, r"value must be Tensor\[2, 2, 5, Ev\]"),
        ({3: (3, 1, 4)}, ValueError, "extra_key must be Tensor"),
        ({3: (2, 1, 3)}, ValueError, "extra_key must be Tensor"),
        ({3: (2, 2, 4)}, ValueError, "extra_value must be Tensor"),
        ({3: (2, 2, 1, 4)}, ValueError, "both be Tensor"),
        ({3: (3, 2, 1, 4), 4: (3, 2, 1, 4)}, ValueError, "extra_key must be Tensor"),
        ({4: None}, ValueError, "belong together"),
        ({0: (2, 2, 7, 0), 1: (2, 2, 5, 0), 3: (2, 1, 0)}, ValueError, "E >= 1"),
    ],
)
def test_wrong_shapes_are_named(change, error, message):
    shapes = [(2, 2, 7, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 1, 4), (2, 1, 4)]
    tensors = [None if change.get(i, s) is None else torch.randn(change.get(i, s)) for i, s in enumerate(shapes)]
    with pytest.raises(error, match=message):
        concat_kv_attention(*tensors)


def test_other_mistakes_are_named():
    tensors = sample((2, 2, 7, 5, 4, 4, 1, False), F32)

    def call(change, **how):
        return concat_kv_attention(*[change.get(i, t) for i, t in enumerate(tensors)], **how)

    with pytest.raises(TypeError, match="query, key and value must be of one type"):
        call({1: tensors[1].double()})
    with pytest.raises(TypeError, match="extra_key must be"):
        call({3: tensors[3].bfloat16(), 4: tensors[4].bfloat16()})
    with pytest.raises(TypeError, match="of one type"):
        call({0: tensors[0].bfloat16(), 1: tensors[1].bfloat16(), 2: tensors[2].bfloat16(), 4: tensors[4].bfloat16()})
    with pytest.raises(TypeError, match="floating-point"):
        call({0: tensors[0].int(), 1: tensors[1].int(), 2: tensors[2].int()})
    with pytest.raises(ValueError, match="on the device of query, cpu; extra_key is on meta"):
        call({3: tensors[3].to("meta")})
    for bias in (INF, math.nan):
        with pytest.raises(ValueError, match="finite or minus infinity"):
            call({}, extra_bias=bias)
    with pytest.raises(ValueError, match="broadcast"):
        call({}, extra_bias=torch.zeros(3, 5))
    for bias in (None, "one"):
        with pytest.raises(TypeError, match="extra_bias must be a number or a tensor, got"):
            call({}, extra_bias=bias)
    with pytest.raises(ValueError, match="on the device of query, cpu; extra_bias is on meta"):
        call({}, extra_bias=torch.zeros(2, 1, device="meta"))
    many = torch.empty(1, 1, 2**31, 1, device="meta")
    with pytest.raises(ValueError, match="at most 2"):
        concat_kv_attention(many[:, :, :4], many, many, None, None)
    with pytest.raises(ValueError, match="at most 2"):
        concat_kv_attention(many, many[:, :, :4], many[:, :, :4], None, None)
    with pytest.raises(ValueError, match="scale must be finite"):
        call({}, scale=math.nan)
    query, key, value, centre, sharpness = prior_sample()
    with pytest.raises(ValueError, match="centre must be Tensor"):
        spatial_prior_attention(query, key, value, centre[..., :1], sharpness, 5)
    with pytest.raises(ValueError, match="on the device of query, cpu; sharpness is on meta"):
        spatial_prior_attention(query, key, value, centre, sharpness.to("meta"), 5)
    with pytest.raises(ValueError, match="grid_width must be a whole number of places, got 5.5"):
        spatial_prior_attention(query, key, value, centre, sharpness, 5.5)
    with pytest.raises(ValueError, match="grid_width must be at least 1"):
        spatial_prior_attention(query, key, value, centre, sharpness, 0)
    with pytest.raises(ValueError, match="smooth positive"):
        spatial_prior_attention(query, key, value, centre, sharpness, 5, smooth=0.0)


# ---- the core by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [False, True])
def test_core_under_sanitizers(sanitized, tiles):
    if tiles and "amx" not in CPU.isas():
        pytest.skip("no AMX tiles, or the system refuses them")
    if tiles:
        sanitized("attention", isa="amx")
    else:
        sanitized("attention", "-U__AMX_BF16__")
