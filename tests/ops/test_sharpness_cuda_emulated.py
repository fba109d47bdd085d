"""csrc/cuda/sharpness.cu, run on the CPU under AddressSanitizer and UBSan (tests/cuda_emulation), against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import CSRC, HERE, build, compiler, run
from sharpness_expected import Passes, make

from pyface.ops._sharpness_gpu import Cuda
from pyface.ops.sharpness import table

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX or g++) to build the emulation with")

PASSES = ["sums", "perturb", "restore", "combine", "step"]
CHUNK = 2048  # of the emulated build


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


class TestPasses(Passes):
    few = [0, 1, 17, 2047, 5003, 2049]
    long = [*few, 70001]

    def positions(self, dtype):
        return [5002]


def test_bits_do_not_depend_on_the_order_of_threads():
    _, x, y = make([3000, 5, 70000])
    results = [Emulated(order).sums(x, y, None, 0.0)[0] for order in ("ascending", "descending", "shuffled")]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
