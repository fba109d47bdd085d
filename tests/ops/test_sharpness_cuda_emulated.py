"""csrc/cuda/sharpness.cu, run on the CPU under AddressSanitizer and UBSan (tests/cuda_emulation), against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import CSRC, HERE, build, compiler, run
from sharpness_expected import (
    BF16,
    F16,
    F32,
    F64,
    GPU_TYPES,
    RULES,
    RULES_AND_STEPS,
    check_ascent,
    check_bits_survive,
    check_degenerate,
    check_extremes,
    check_layouts,
    check_mixed_list,
    check_nonfinite,
    check_rule,
    check_step,
    check_sums,
    make,
)

from pyface.ops._sharpness_gpu import Cuda
from pyface.ops.sharpness import table

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX or g++) to build the emulation with")

PASSES = ["sums", "perturb", "restore", "combine", "step"]
CHUNK = 2048  # of the emulated build
FEW = [0, 1, 17, 2047, 5003, 2049]


class Emulated(Cuda):
    """The path `cuda` with its tensors handed to the emulation instead of their addresses."""

    def __init__(self, order="shuffled"):
        self.program, self.order = build(CSRC / "cuda" / "sharpness.cu", HERE / "sharpness.cpp"), order

    def run(self, name, lists, *arguments):
        rows = table(lists, lambda t: t, None)
        arguments = [a for given in arguments for a in (given if isinstance(given, list) else [given])]
        if name == "sums":
            count = len(rows) // 8
            chunks = sum(-(-size // CHUNK) for size in rows[5::8])
            scratch = torch.full((40 * chunks + 4 * (count + 1),), 255, dtype=torch.uint8)  # NaN
            arguments += [len(scratch), scratch]
        assert run(self.program, [(PASSES.index(name), len(rows) // 8, *rows, *arguments)], self.order) == [0]


@pytest.fixture(scope="module")
def core():
    return Emulated()


@pytest.mark.parametrize("types", GPU_TYPES, ids=str)
def test_sums(core, types):
    check_sums(core, types, FEW if types != (F32, F32) else [70001, 2048, 2047])


@pytest.mark.parametrize("eta", [None, 0.01])
@pytest.mark.parametrize("types", GPU_TYPES, ids=str)
def test_ascent_and_restoring(core, types, eta):
    check_ascent(core, types, eta, FEW)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_bits_survive(core, dtype):
    check_bits_survive(core, dtype)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(("rule", "parameters"), RULES)
def test_rules(core, rule, parameters, per_tensor):
    check_rule(core, (F32, F32), rule, parameters, per_tensor, FEW)


@pytest.mark.parametrize("types", GPU_TYPES, ids=str)
def test_types_of_rules_and_steps(core, types):
    check_rule(core, types, "gsam", {"alpha": 0.4}, False, FEW)
    check_step(core, types, "gsam", {"alpha": 0.4}, "nesterov", FEW)


@pytest.mark.parametrize(("rule", "parameters", "step"), RULES_AND_STEPS)
def test_steps(core, rule, parameters, step):
    check_step(core, (F32, F32), rule, parameters, step, FEW)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_nonfinite_gradients_change_nothing(core, dtype):
    check_nonfinite(core, dtype, (20, 5003), ((0, 0), (1, 5002)))


def test_edges(core):
    check_extremes(core)
    check_degenerate(core)
    check_layouts(core)


def test_lists_of_several_launches(core):
    check_mixed_list(core)


def test_bits_do_not_depend_on_the_order_of_threads():
    _, x, y = make([3000, 5, 70000])
    results = [Emulated(order).sums(x, y, None, 0.0)[0] for order in ("ascending", "descending", "shuffled")]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
