"""csrc/cuda/attention.cu and its launcher, run on the CPU under AddressSanitizer and UBSan, against float64.

Tensor cores are emulated by the register layouts of PTX (tests/cuda_emulation/include/cuda_runtime.h).
"""

import pytest
import torch
from attention_gpu_expected import (
    CASES,
    F16,
    F32,
    TYPE_IDS,
    TYPES,
    Case,
    backward,
    both,
    check,
    check_backward,
    exact,
    forward,
    frozen_model,
    model,
    not_a_number,
    switched_off,
    tensors,
    views,
)
from cuda_emulation import CSRC, HERE, ORDERS, build, compiler, run

from pyface.ops import _attention_gpu
from pyface.ops._attention_gpu import Cuda
from pyface.ops.attention import TENSORS

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX or g++) to build the emulation with")

FORWARD, BACKWARD, SUM = range(3)


class Module:
    """The attention part of pyface._cuda, emulated. Takes tensors where the real one takes addresses."""

    def __init__(self, program, order="shuffled"):
        self.program, self.order, self.calls = program, order, []

    def call(self, op, arguments):
        self.calls.append(op)
        assert run(self.program, [(op, *_flat(arguments))], order=self.order) == [0]

    def attention_forward(self, *arguments):
        self.call(FORWARD, arguments)

    def attention_backward(self, *arguments):
        self.call(BACKWARD, arguments)

    def attention_sum(self, *arguments):
        self.call(SUM, arguments)


def _flat(value):
    return [w for v in value for w in _flat(v)] if isinstance(value, tuple) else [value]


class Emulated(Cuda):
    def pointer(self, t):
        return t

    def where(self, x):
        return ()


@pytest.fixture(scope="module")
def program():
    return build(CSRC / "cuda" / "attention.cu", HERE / "attention.cpp")


@pytest.fixture
def core(program):
    return Emulated(Module(program))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(core, name):
    both(core, CASES[name], tensors(CASES[name]))


@pytest.mark.parametrize("types", TYPES[1:], ids=TYPE_IDS[1:])
@pytest.mark.parametrize("name", ["causal, more keys", "wide", "uneven", "prior"])
def test_types(core, types, name):
    both(core, CASES[name], tensors(CASES[name], types))


@pytest.mark.parametrize(
    ("types", "case"),
    [
        (TYPES[2], Case(133, 70, 3, depth=64, causal=True)),
        (TYPES[3], Case(70, 66, 17, depth=80, width=96)),
        (TYPES[0], Case(90, 20, 1, depth=40, width=72, causal=True)),
    ],
    ids=["bfloat16", "float16", "float32"],
)
def test_more_rows_than_a_block_owns_and_a_tile_holds(core, types, case):
    both(core, case, tensors(case, types))


def test_tf32_rounds_factors_only_where_torch_allows_it(core, monkeypatch):
    case = Case(21, 37, 2, depth=24, width=40, causal=True)
    t = tensors(case)
    plain, _ = forward(core, case, t)
    monkeypatch.setattr(_attention_gpu, "tf32_allowed", lambda: True)
    out, lse = forward(core, case, t)
    assert not torch.equal(out, plain)
    rounded = {k: v if k in ("extra_bias", "prior") else _tf32(v) for k, v in t.items()}
    expected, expected_lse = model(case, exact(rounded))
    check("lse", lse, expected_lse, F32, 4.0)  # sums of exactly rounded factors
    check("out", out, expected, F16, 0.5)  # weights are rounded as well
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    found = backward(core, case, t, grad_out, grad_lse, out, lse)
    exact_out, exact_lse = model(case, exact(t))
    check_backward(case, t, grad_out, grad_lse, found, loose=200.0)
    check("out", plain, exact_out, F32)
    check("lse", lse, exact_lse, F16)


def _tf32(x):
    """To 10 bits of fraction, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_deterministic_in_any_order_of_threads(program):
    case = Case(19, 20, 3, depth=24, batch=3, causal=True)
    for types in (TYPES[0], TYPES[4]):
        t = tensors(case, types)
        torch.manual_seed(0)
        grad_out, grad_lse = torch.randn(3, 1, 19, 24).to(types[0]), torch.randn(3, 1, 19)
        found = []
        for order in ORDERS:
            core = Emulated(Module(program, order))
            out, lse = forward(core, case, t)
            found.append([out, lse, *backward(core, case, t, grad_out, grad_lse, out, lse)])
        for again in found[1:]:
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@pytest.mark.parametrize("which", TENSORS)
def test_only_the_gradient_asked_for(core, which):
    case = CASES["prior"]
    both(core, case, tensors(case), tuple(n == which for n in TENSORS), with_lse=False)


def test_frozen_model_reads_no_key(core):
    frozen_model(core)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[2]], ids=["float32", "bfloat16"])
def test_what_is_not_a_number_reaches_only_rows_that_see_it(core, types):
    not_a_number(core, types)


def test_rows_switched_off_and_huge_scores(core):
    switched_off(core)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[4]], ids=["float32", "bfloat16 with float32"])
def test_views_and_odd_addresses_are_taken(core, types):
    """16 bytes are moved at a time where address and strides allow it: the emulation stops a misaligned access."""
    views(core, types)


def test_one_launch_forward_and_one_backward(core):
    case = Case(5, 6, 1, biased=False)
    t = tensors(case)
    out, lse = forward(core, case, t)
    backward(core, case, t, out, None, out, lse, case.needs)
    assert core.module.calls == [FORWARD, BACKWARD, SUM, SUM]


def test_empty_results(core):
    for case in (Case(0, 4, 2), Case(3, 4, 2, batch=0), Case(3, 4, 2, heads=0)):
        t = tensors(case)
        out, lse = forward(core, case, t)
        found = backward(core, case, t, torch.randn_like(out), None, out, lse)
        assert all(g is None or not g.any() for g in found)
    assert core.module.calls == [SUM] * 3 * 2  # nothing was queued but sums over samples
