"""kernels/sharpness.py without a GPU: run by Triton's interpreter against float64, and compiled for sm_90."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from sharpness_expected import BF16, F16, F32, F64, GPU_TYPES, Passes
from triton_interpreter import KERNELS, Interpreter, load

from pyface.ops._sharpness_gpu import Triton

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    return load(KERNELS / "sharpness.py")


@pytest.fixture(scope="module")
def core():
    interpreter = Interpreter("sharpness")

    def passing(name):
        def run(lists, *arguments):
            written = interpreter(name, lists, *arguments)
            targets = {
                "sums": arguments[:2], "perturb": lists[:2], "restore": lists[:1], "combine": lists[2:3],
                "step": (lists[0], lists[4] or []),
            }[name]  # fmt: skip
            for target, answer in zip(targets, written, strict=True):
                for a, b in [(target, answer)] if name == "sums" else zip(target, answer, strict=True):
                    a.copy_(b)

        return run

    yield Triton(SimpleNamespace(**{name: passing(name) for name in ("sums", "perturb", "restore", "combine", "step")}))
    interpreter.close()


class TestPasses(Passes):
    few = [0, 1, 17, 2047, 2049]  # the interpreter is slow
    long = [*few, 34817]

    def positions(self, dtype):
        return [32768 if dtype == F32 else 2100]


NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}


def compiled(kernels, kernel, **constants):
    """PTX of a kernel for sm_90 with these constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"table": "*i64", "chunks": "i32", "tensors": "i32", "nonfinite": "*fp32", "bad": "*fp32"}
    types |= dict.fromkeys(("sums", "partial"), "*fp64")
    constants = {"BLOCK": kernels._BLOCK, "INTERPRETED": False, **constants}
    constants = {n: c for n, c in constants.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(kernels._OPTIONS))
    assert len(result.asm["cubin"]) > 1000
    return result.asm["ptx"]


@pytest.mark.parametrize("types", GPU_TYPES, ids=str)
def test_kernels_compile_for_sm90(kernels, types):
    """What begins at 16 bytes is moved 16 bytes at a time."""
    weight, gradient = (kernels._TYPES[dtype] for dtype in types)
    own = {"W": weight, "G": gradient, "RULE": 4, "PER_TENSOR": True}
    step = {"WITH_MOMENTUM": True, "FIRST_STEP": False, "NESTEROV": True, "MAXIMIZE": False}
    for kernel, constants in (
        (kernels._sums_kernel, {"DOTS": True, "ADAPTIVE": False}),
        (kernels._sums_kernel, {"DOTS": False, "ADAPTIVE": True}),
        (kernels._perturb_kernel, {"ADAPTIVE": True}),
        (kernels._restore_kernel, {}),
        (kernels._combine_kernel, {}),
        (kernels._step_kernel, step),
    ):
        ptx = compiled(kernels, kernel, **own, ALIGNED=True, **constants)
        assert re.search(r"ld\.global\.v(4\.b32|2\.b64)", ptx), kernel
        assert kernel is kernels._sums_kernel or re.search(r"st\.global\.v(4\.b32|2\.b64)", ptx), kernel
    if types == (F32, F32):
        ptx = compiled(kernels, kernels._step_kernel, **own, ALIGNED=False, **step)
        assert not re.search(r"(ld|st)\.global\.v", ptx)


def test_kernels_of_last_sums_and_all_rules_compile_for_sm90(kernels):
    import triton.language as tl

    for kernel in (kernels._tensor_kernel, kernels._total_kernel):
        compiled(kernels, kernel, BLOCK=128)
    for rule in range(7):
        compiled(kernels, kernels._combine_kernel, G=tl.float32, RULE=rule, PER_TENSOR=False, ALIGNED=True)
