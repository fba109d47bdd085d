"""kernels/spectral.py without a GPU: run by Triton's interpreter against float64, and compiled for sm_90."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from spectral_expected import BF16, CASES, DTYPES, F16, F32, F64, check_core
from triton_interpreter import KERNELS, Interpreter, load

from pyface.ops.spectral import _Triton

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    return load(KERNELS / "spectral.py")


@pytest.fixture(scope="module")
def core():
    interpreter = Interpreter("spectral")

    def run(task, x, y, keep, sign, *rest):
        out, signs = interpreter("run", task, x, y, keep, sign, *rest)
        y.copy_(out)
        if sign is not None:
            sign.copy_(signs)

    yield _Triton(SimpleNamespace(run=run))
    interpreter.close()


# what a size does is the same in all types, and the interpreter is slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, F32) for case in CASES), *((CASES[0], dtype) for dtype in DTYPES[1:])],
    ids=str,
)
def test_values_signs_and_gradients(core, case, dtype):
    check_core(core, case, dtype)


def test_layouts_and_results_in_place(core):
    check_core(core, ((2, 3, 16, 17), (2, 3), False), F32, layout=torch.channels_last)
    wide = torch.randn(2, 3, 20, 40)
    x = wide[:, :, ::2, 3:36]
    dense = x.contiguous()
    torch.testing.assert_close(core.high_pass(x, (2, 2), False), core.high_pass(dense, (2, 2), False))
    expected = core.high_pass(dense, (2, 2), False)
    inside = dense.clone()
    core.high_pass(inside, (2, 2), False, out=inside)
    assert torch.equal(inside, expected)


NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_compile_for_sm90(kernels, dtype):
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    real, wide = (tl.float64, "*fp64") if dtype == F64 else (tl.float32, "*fp32")
    stored = f"*{NAMES[dtype]}"
    tables = {name: wide for name in ("sums", "spread", "rows", "across", "turn_rows", "turn_columns")}
    for kernel, constants in (
        (kernels._gather_kernel, {"SIGNED": dtype != F64, "ROWS": kernels._ROWS}),
        (kernels._transform_kernel, {"EDGE": True, "ACROSS": 16, "COLUMNS": 32}),
        (kernels._spread_kernel, {"TASK": 1, "WITH_SIGN": True, "ROWS": kernels._ROWS}),
        (kernels._spread_kernel, {"TASK": 2, "WITH_SIGN": True, "ROWS": kernels._ROWS}),
    ):
        constants = {"RANK": 16, "REAL": real, "COLUMNS": kernels._COLUMNS, **constants}
        types = {"x": stored, "y": stored, "keep": "*u8", "sign": "*i8", **tables}
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(kernels._OPTIONS))
        assert len(result.asm["cubin"]) > 1000
        assert ".tf32" not in result.asm["ptx"]
        assert "mul.wide" in result.asm["ptx"] or "mad.lo.s64" in result.asm["ptx"] or "mul.lo.s64" in result.asm["ptx"]
