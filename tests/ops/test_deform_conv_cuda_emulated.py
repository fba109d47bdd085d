"""csrc/cuda/deform_conv.cu and its launcher, run on the CPU under AddressSanitizer and UBSan, against float64.

The emulation has no tensor cores: the plain product stands in for them (kTensorCores in the source).
"""

import pytest
import torch
from cuda_emulation import CSRC, HERE, ORDERS, build, compiler, run
from deform_conv_expected import (
    BF16,
    CASES,
    F32,
    TYPE_IDS,
    TYPES,
    Case,
    border,
    check_backward,
    check_forward,
    tensors,
)

from pyface.ops import _deform_conv_gpu
from pyface.ops._deform_conv_gpu import DTYPE_CODES, Cuda

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX or g++) to build the emulation with")

ALL = (True, True, True, True)
FORWARD, COLUMNS, GATHER, WEIGHT, NUMBERS = range(5)


class Module:
    """The deform_conv part of pyface._cuda, emulated. Takes tensors where the real one takes addresses."""

    def __init__(self, program, order):
        self.program, self.order = program, order

    def call(self, op, *arguments):
        flat = [v for a in arguments for v in (_flat(a) if isinstance(a, tuple) else [a])]
        assert run(self.program, [(op, *flat)], order=self.order) == [0]

    def numbers(self, *arguments):
        out = torch.zeros(3, dtype=torch.int64)
        self.call(NUMBERS, *arguments, out)
        return out.tolist()

    def deform_conv_splits(self, *arguments):
        return self.numbers(*arguments)[0]

    def deform_conv_weight_splits(self, *arguments):
        return self.numbers(*arguments)[1]

    def deform_conv_steps(self, *arguments):
        return self.numbers(*arguments, 0)[2]

    def deform_conv_forward(self, *arguments):
        self.call(FORWARD, *arguments)

    def deform_conv_columns(self, *arguments):
        self.call(COLUMNS, *arguments)

    def deform_conv_gather(self, *arguments):
        self.call(GATHER, *arguments)

    def deform_conv_weight(self, *arguments):
        self.call(WEIGHT, *arguments)


def _flat(value):
    return [w for v in value for w in _flat(v)] if isinstance(value, tuple) else [value]


class Emulated(Cuda):
    def pointer(self, t):
        return t

    def where(self, x):
        return ()


@pytest.fixture(scope="module")
def program():
    return build(CSRC / "cuda" / "deform_conv.cu", HERE / "deform_conv.cpp")


@pytest.fixture
def core(program):
    return Emulated(Module(program, "shuffled"))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forward(core, case, t):
    return core.forward(t["input"], t["offset"], t["weight"], t["bias"], t["mask"], *case.geometry)


def backward(core, case, t, grad, needs=ALL):
    needs = (*needs[:3], needs[3] and case.mask)
    return core.backward(grad, t["input"], t["offset"], t["weight"], t["mask"], *case.geometry, needs)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(core, name):
    case = CASES[name]
    t = tensors(case)
    out = forward(core, case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, backward(core, case, t, grad))


@pytest.mark.parametrize("types", TYPES[1:], ids=TYPE_IDS[1:])
def test_types(core, types):
    case = Case(2, 10, 6, (2, 3), (2, 1), 1, 2, padding=(1, 0))
    t = tensors(case, types)
    out = forward(core, case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, backward(core, case, t, grad))


@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16)], ids=["float32", "bfloat16"])
def test_every_width_of_the_tile_of_outputs(core, types):
    for outs in (65, 130):
        case = Case(1, 8, outs, (2, 1), (1, 1), padding=(0, 0))
        t = tensors(case, types)
        out = forward(core, case, t)
        check_forward(case, t, out)
        needs = (False, False, True, False)
        grad = torch.randn_like(out)
        check_backward(case, t, grad, backward(core, case, t, grad, needs), needs)


def test_splits_follow_from_sizes_and_are_summed(core):
    def numbers(case, dtype=F32):
        t = {k: v if v is None else v.to(dtype) for k, v in tensors(case).items()}
        call = _deform_conv_gpu._CudaCall(
            core.pointer, t["input"], t["offset"], t["weight"], t["mask"], *case.geometry
        )  # fmt: skip
        return core.module.numbers(*call.numbers, DTYPE_CODES[dtype])

    assert numbers(CASES["few pixels"])[0] > 1  # so that test_values_and_gradients has summed splits
    assert numbers(Case(1, 256, 256, (64, 64)))[:2] == [2, 3]
    assert numbers(Case(1, 512, 512, (2, 2), offset_groups=2))[0] == 18
    narrow = Case(4, 2, 3, (12, 12), (1, 1), padding=(0, 0))
    assert numbers(narrow)[1] > 1
    t = tensors(narrow)
    grad = torch.randn(4, 3, 12, 12)
    needs = (False, False, True, False)
    check_backward(narrow, t, grad, backward(core, narrow, t, grad, needs), needs)


def test_deterministic_gradients_have_the_same_bits_in_any_order_of_threads(program, deterministic, monkeypatch):
    case = Case(2, 70, 4, (3, 2), (2, 2), 1, 1, padding=(1, 0), layout=torch.channels_last)
    t = tensors(case)
    grad = torch.randn(2, 4, *t["offset"].shape[2:]).contiguous(memory_format=torch.channels_last)
    found = []
    for order, workspace in zip(ORDERS, (2**26, 1, 2**26), strict=True):  # 1: one step of channels at a time
        monkeypatch.setattr(_deform_conv_gpu, "WORKSPACE", workspace)
        found.append(backward(Emulated(Module(program, order)), case, t, grad))
    check_backward(case, t, grad, found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_only_what_is_asked_for(core):
    case = CASES["one pixel"]
    t = tensors(case)
    grad = torch.randn(case.batch, case.outs, 1, 1)
    for which in range(4):
        needs = tuple(i == which for i in range(4))
        check_backward(case, t, grad, backward(core, case, t, grad, needs), needs)


def test_borders_whole_positions_and_no_numbers(core):
    case, t = border()
    out = forward(core, case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, backward(core, case, t, grad))


def test_nan_pixel_reaches_only_what_interpolates_it(core):
    case = CASES["channels_last"]
    t = tensors(case)
    t["input"][0, 3, 1, 2] = torch.nan
    out = forward(core, case, t)
    assert out.isnan().any()
    assert not out.isnan().all()
    check_forward(case, t, out)


def test_views_and_strange_strides_are_taken(core):
    case = Case(2, 6, 4, (5, 4))
    t = tensors(case)
    packed = torch.cat([t["offset"], t["mask"]], 1)
    views = {
        **t,
        "offset": packed[:, :18],
        "mask": packed[:, 18:],
        "weight": t["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "input": t["input"].transpose(2, 3).contiguous().transpose(2, 3),
    }
    out = forward(core, case, views)
    assert torch.equal(out, forward(core, case, t))
    grad = torch.randn_like(out)
    found = backward(core, case, views, grad.contiguous(memory_format=torch.channels_last))
    check_backward(case, t, grad, found)
