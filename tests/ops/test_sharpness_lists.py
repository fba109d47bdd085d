"""Core sharpness: lists that the compiled module reads itself, those that Python deals with, many and large ones."""

from __future__ import annotations

import pytest
import torch
from sharpness_expected import TYPES
from torch import nn

from pyface.ops import multi_combine_, multi_dots, multi_norm, multi_step_, paths, perturb_, restore_
from pyface.ops import sharpness as core_module


class Labelled(torch.Tensor):
    pass


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stretched(t):
    """The same numbers with gaps between them."""
    wide = torch.zeros(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def last(t):
    return t.to(memory_format=torch.channels_last)


# name: (tensors w, x, y from their numbers, whether the module reads them itself)
LISTS = {
    "plain": (lambda t: t, True),
    "parameters": (nn.Parameter, True),
    "nothing in them": (lambda t: t[:, :0], False),
    "views with an offset": (lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:], True),
    "channels last": (last, True),
    "permuted alike": (lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), True),
    "one row": (lambda t: t[:1], True),
    "numbers": (lambda t: t.flatten()[3].clone(), True),
    "gaps": (stretched, False),
    "subclass": (lambda t: t.as_subclass(Labelled), False),
    "expanded": (lambda t: t.flatten()[:4].contiguous(), True),
}


def passes(make, types, orders=(lambda t: t,) * 2):
    """All passes over a list of such tensors; what they leave behind."""
    weights = [make(random((2, 6, 3, 5), n, types[0])) for n in range(3)]
    xs, ys = (
        [order(make(random((2, 6, 3, 5), seed + n, types[1]))) for n in range(3)]
        for seed, order in ((10, orders[0]), (20, orders[1]))
    )
    with torch.no_grad():
        saved, momenta = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        norms = multi_norm(ys)
        perturb_(weights, ys, saved, norms, [0.1, 0.2, 0.3])
        moved = [w.detach().clone() for w in weights]
        restore_(weights, saved)
        sums = multi_dots(xs, ys)
        rule = {"rule": "constrained", "lower": -0.1, "upper": 0.05}
        multi_step_(weights, saved, xs, ys, momenta, sums, lr=0.1, momentum=0.9, weight_decay=0.01, **rule)
        multi_combine_(xs, ys, sums, **rule)
    return [*norms, *sums, *moved, *weights, *saved, *momenta, *xs]


@pytest.fixture
def reads(monkeypatch):
    core = core_module._compiled("cpu")
    if core is None or core.reader is None:
        pytest.skip("this torch does not hand out __dlpack_c_exchange_api__")
    found, quick = [], core.quick
    monkeypatch.setattr(core, "quick", lambda *a: (found.append(quick(*a)), found[-1])[1])
    return found


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_what_is_read_and_what_is_checked_agree(reads, monkeypatch, name, types):
    make, plain = LISTS[name]
    quick = passes(make, types)
    assert reads == [plain] * 6
    monkeypatch.setattr(core_module._compiled("cpu"), "quick", lambda *a: False)
    for a, b in zip(quick, passes(make, types), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:pyface. sharpness runs on the reference path")
def test_types_without_a_kernel_go_through_the_reference(reads):
    found = passes(lambda t: t, (torch.bfloat16, torch.float32))
    assert reads == [True, False, True, True, False, True]  # gradients alone are plain
    assert all(t.isfinite().all() for t in found)


def test_other_orders_are_copied(reads):
    """w in channels last, x and y row by row: the numbers are what they are with all row by row."""
    rows = passes(lambda t: t, TYPES[0])
    reads.clear()
    mixed = passes(last, TYPES[0], (torch.Tensor.contiguous,) * 2)
    assert reads == [True, False, True, True, False, True]
    for a, b in zip(rows, mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_older_torch_is_served(monkeypatch):
    """Without torch.Tensor.__dlpack_c_exchange_api__."""
    monkeypatch.setattr(core_module._compiled("cpu"), "reader", None)
    rows = passes(lambda t: t, TYPES[0])
    assert all(t.isfinite().all() for t in rows)


@pytest.mark.parametrize("wrong", ["shape", "sparse", "count", "type", "sums", "device", "gaps in the sums"])
def test_bad_lists_are_refused_before_anything_is_read(wrong):
    w, y, s = ([torch.ones(4, 3) for _ in range(3)] for _ in range(3))
    sums = multi_norm(y)
    error, words = ValueError, "one shape"
    if wrong == "shape":
        y[1] = torch.ones(3, 4)
    elif wrong == "sparse":
        y[1], error, words = torch.ones(4, 3).to_sparse(), TypeError, "sparse"
    elif wrong == "count":
        y, words = y[:2], "equally long"
    elif wrong == "type":
        s[2], error, words = s[2].double(), TypeError, "the weight's type"
    elif wrong == "device":
        y[2], words = torch.ones(4, 3, device="meta"), "one device"
    elif wrong == "sums":
        sums, words = multi_norm(y[:2]), "sums.values must be"
    else:
        sums, words = sums._replace(values=torch.ones(4, 6, dtype=torch.float64)[:, ::2]), "sums.values must be"
    with pytest.raises(error, match=words):
        perturb_(w, y, s, sums, 0.1)
    assert all(torch.equal(t, torch.ones(4, 3)) for t in w)


def test_a_rho_for_every_tensor_or_for_all():
    w = [torch.ones(3), torch.ones(3)]
    with pytest.raises(ValueError, match="one per tensor"):
        perturb_(w, w, w, multi_norm(w), [0.1])
    with pytest.raises(ValueError, match="one per tensor"):
        torch.ops.pyface.perturb_(w, w, w, *multi_norm(w), [0.1], 0.0, 0.0, None, None)


@pytest.mark.parametrize("make", [lambda t: t, stretched], ids=["plain", "gaps"])
@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("eta", [None, 0.1])
def test_a_pass_takes_its_sums(make, path, eta):
    """As if they had been taken before, and what was not finite earlier forbids the step too."""
    results = []
    for taken in (False, True):
        ws, ys, xs = ([make(random((5, 7), s + n)) for n in range(3)] for s in (0, 10, 20))
        saved, momenta = ([torch.zeros_like(w) for w in ws] for _ in range(2))
        with paths(path):
            norms = None if taken else multi_norm(ys, weights=None if eta is None else ws, eta=eta or 0.0)
            norms = perturb_(ws, ys, saved, norms, 0.3, eta=eta)
            sums = None if taken else multi_dots(xs, ys)
            sgd = {"lr": 0.1, "momentum": 0.9}
            sums = multi_step_(ws, saved, xs, ys, momenta, sums, "gsam", alpha=0.3, **sgd)
            combined = multi_combine_(xs, ys, sums if not taken else None, "gsam", alpha=0.3)
            before = [w.clone() for w in ws]
            flags = torch.tensor([0.0, 1.0])
            last = multi_step_(before, ws, xs, ys, momenta, None, "second", nonfinite=flags, **sgd)
        assert last.nonfinite is flags
        assert flags.tolist() == [0, 1]
        assert all(torch.equal(a, b) for a, b in zip(before, ws, strict=True))
        results.append([*norms, *sums, *combined, *ws, *saved, *momenta, *xs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_flags_of_an_earlier_pass_are_checked():
    w, flags = [torch.ones(3)], torch.zeros(2)
    for wrong in (torch.zeros(3), flags.double(), torch.zeros(4)[::2], torch.zeros(2, device="meta")):
        with pytest.raises(ValueError, match="nonfinite must be"):
            multi_step_(w, w, w, w, None, None, "second", lr=0.1, nonfinite=wrong)
    with pytest.raises(ValueError, match="taken here"):
        multi_step_(w, w, w, w, None, multi_dots(w, w), "second", lr=0.1, nonfinite=flags)
    multi_step_(w, w, [torch.full((3,), torch.inf)], w, None, None, "second", lr=0.1, nonfinite=flags)
    assert flags.tolist() == [1, 0]


def test_autograd_sees_what_was_written():
    w = nn.Parameter(torch.ones(3))
    for write in (
        lambda: perturb_([w], [torch.ones(3)], [torch.empty(3)], multi_norm([torch.ones(3)]), 0.1),
        lambda: restore_([w], [torch.ones(3)]),
    ):
        loss = (w * w).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_thousands_of_tensors():
    shapes = [(n % 7, 3) for n in range(2000)]
    ws, xs, ys = ([random(shape, n + s, torch.float64) for n, shape in enumerate(shapes)] for s in (0, 5000, 9000))
    sums = multi_dots(xs, ys).values
    pairs = list(zip(xs, ys, strict=True))
    wanted = torch.stack([torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum()]) for x, y in pairs])
    torch.testing.assert_close(sums[:-1], wanted, rtol=1e-12, atol=1e-12)
    before, saved = [w.clone() for w in ws], [torch.empty_like(w) for w in ws]
    perturb_(ws, ys, saved, multi_norm(ys), 0.5)
    factor = 0.5 / torch.cat([y.flatten() for y in ys]).norm()
    for w, old, y in zip(ws, before, ys, strict=True):
        torch.testing.assert_close(w, old + factor * y)
    restore_(ws, saved)
    assert all(torch.equal(w, old) for w, old in zip(ws, before, strict=True))


def test_long_sums_are_exact():
    """Whole numbers, whose sums float64 holds exactly. torch's norm of as many floats is off by 1e-5 and more."""
    n = 20_000_003
    x, y = (torch.randint(-9, 10, (n,), generator=torch.Generator().manual_seed(s)).float() for s in (1, 2))
    sums = multi_dots([x], [y]).values[0].tolist()
    whole = [t.to(torch.int16) for t in (x, y)]
    assert sums == [int((a * b).sum(dtype=torch.int64)) for a, b in ((whole[0],) * 2, (whole[1],) * 2, whole)]


def test_large_lists_take_streaming_stores():
    """More than 2^25 elements, in a tensor that begins at a vector and one that does not."""
    n = (1 << 24) + 77
    ws = [torch.zeros(n), torch.zeros(n + 1)[1:]]
    ys = [torch.ones(n), torch.full((n,), 2.0)]
    saved = [torch.full((n,), 7.0), torch.full((n + 1,), 7.0)[1:]]
    perturb_(ws, ys, saved, multi_norm(ys), (5 * n) ** 0.5)
    for w, y, kept in zip(ws, ys, saved, strict=True):
        torch.testing.assert_close(w, y, rtol=1e-6, atol=0)
        assert not kept.any()
    restore_(ws, saved)
    assert not any(w.any() for w in ws)
    multi_step_(ws, saved, ys, ys, None, multi_dots(ys, ys), "second", lr=1.0)
    assert all(torch.equal(w, -y) for w, y in zip(ws, ys, strict=True))
