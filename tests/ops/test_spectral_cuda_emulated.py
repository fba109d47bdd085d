"""csrc/cuda/spectral.cu, run on the CPU under AddressSanitizer and UBSan (tests/cuda_emulation), against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import CSRC, HERE, build, compiler, run
from spectral_expected import CASES, DTYPES, F32, F64, check_core

from pyface.ops.spectral import _DTYPE_CODES, _Cuda

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX or g++) to build the emulation with")


class Emulated(_Cuda):
    """The path `cuda` with its tensors handed to the emulation instead of their addresses."""

    def __init__(self, order="shuffled"):
        self.program, self.order = build(CSRC / "cuda" / "spectral.cu", HERE / "spectral.cpp"), order

    def launch(self, task, x, out, keep, sign, tables, sizes, x_strides, keep_strides):
        told, (upper, padded, _) = tables
        (_, *rows), (_, *columns), _, edge = told
        scratch = upper.new_full((self.scratch(tables, sizes),), torch.nan)  # what no kernel wrote cannot pass
        code = run(
            self.program,
            [(0, task, _DTYPE_CODES[x.dtype], upper, *rows, padded, *columns, edge, *sizes, x, *x_strides, out, keep,
              *keep_strides, keep is not None and keep.dtype == torch.bool, sign, scratch)],
            self.order,
        )  # fmt: skip
        assert code == [0]


@pytest.fixture(scope="module")
def core():
    return Emulated()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, F32) for case in CASES), *((CASES[0], dtype) for dtype in DTYPES[1:])],
    ids=str,
)
def test_values_signs_and_gradients(core, case, dtype):
    check_core(core, case, dtype)


def test_layouts_order_of_threads_and_results_in_place(core):
    check_core(core, ((2, 3, 16, 17), (2, 3), False), F32, layout=torch.channels_last)
    wide = torch.randn(2, 3, 20, 40, dtype=F64)
    x = wide[:, :, ::2, 3:36]
    dense = x.contiguous()
    expected = core.high_pass(dense, (2, 2), False)
    assert torch.equal(core.high_pass(x, (2, 2), False), expected)
    for order in ("ascending", "descending"):
        assert torch.equal(Emulated(order).high_pass(dense, (2, 2), False), expected)
    inside = dense.clone()
    core.high_pass(inside, (2, 2), False, out=inside)
    assert torch.equal(inside, expected)
    assert torch.equal(core.high_pass(dense[1:], (2, 2), False), expected[1:])
