"""kernels/attention.py without a GPU: run by Triton's interpreter against float64, and compiled for sm_90."""

import functools
from types import SimpleNamespace

import pytest
from attention_gpu_expected import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    TYPE_IDS,
    TYPES,
    Case,
    both,
    frozen_model,
    not_a_number,
    switched_off,
    tensors,
    views,
)
from triton_interpreter import KERNELS, Interpreter, load

from pyface.ops._attention_gpu import Triton
from pyface.ops.attention import TENSORS

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def core():
    interpreter = Interpreter("attention")
    yield Triton(
        SimpleNamespace(**{n: functools.partial(interpreter, n) for n in ("forward", "backward", "sum_samples")})
    )
    interpreter.close()


@pytest.fixture(scope="module")
def kernels():
    return load(KERNELS / "attention.py")


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(core, name):
    both(core, CASES[name], tensors(CASES[name]))


@pytest.mark.parametrize("types", TYPES[1:], ids=TYPE_IDS[1:])
@pytest.mark.parametrize("name", ["causal, more queries", "prior"])
def test_types(core, types, name):
    both(core, CASES[name], tensors(CASES[name], types))


def test_more_rows_than_a_tile_holds(core):
    case = Case(40, 50, 20, depth=32, causal=True)
    both(core, case, tensors(case))


@pytest.mark.parametrize("which", TENSORS)
def test_only_the_gradient_asked_for(core, which):
    case = CASES["prior"]
    both(core, case, tensors(case), tuple(n == which for n in TENSORS), with_lse=False)


def test_frozen_model_reads_no_key(core):
    frozen_model(core)


def test_what_is_not_a_number_reaches_only_rows_that_see_it(core):
    not_a_number(core, TYPES[0])


def test_rows_switched_off_and_huge_scores(core):
    switched_off(core)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[4]], ids=["float32", "bfloat16 with float32"])
def test_views_are_taken(core, types):
    views(core, types)


def test_tiles_fit_the_rows(kernels):
    assert [kernels._tile(rows, BF16, 64) for rows in (1, 16, 33, 64, 77, 200)] == [16, 16, 16, 64, 16, 16]


# ---- compiled, not run -----------------------------------------------------------------------------------------------

NAMED = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}
COMPILED = [
    pytest.param(BF16, "ieee", id="bf16"),
    *(
        pytest.param(dtype, precision, id=f"{NAMED[dtype]}-{precision}", marks=pytest.mark.slow)
        for dtype, precision in ((F16, "ieee"), (F32, "ieee"), (F32, "tf32"), (F64, "ieee"))
    ),
]


def compiled(kernel, constants, **types):
    """PTX of the kernel for sm_90, with strides that are multiples of 16 told as a call would tell them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = {"scale": "fp32", "smooth": "fp32", **types}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name[-2:] in ("_b", "_h", "_r") and signature[name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=True))
    assert len(result.asm["cubin"]) > 1000
    assert result.metadata.shared <= 227 * 1024
    return result.asm["ptx"]


@pytest.mark.parametrize(("dtype", "precision"), COMPILED)
def test_kernels_compile_for_sm90(kernels, dtype, precision):
    import triton.language as tl

    real, sums = (tl.float64, "*fp64") if dtype == F64 else (tl.float32, "*fp32")
    stored, extra = f"*{NAMED[dtype]}", "*fp64" if dtype == F64 else "*fp32"
    tile = kernels._tile(256, dtype, 64)
    constants = dict(
        REAL=real, TYPE=kernels._TYPES[dtype], PRECISION=precision, QUERIES=tile, KEYS=tile, EXTRAS=16, DEPTH=64,
        WIDTH=64,
    )  # fmt: skip
    rows = dict.fromkeys(("query", "key", "value", "out", "grad", "grad_query", "grad_key", "grad_value"), stored)
    others = dict.fromkeys(("bias", "prior", "lse", "delta", "grad_lse", "grad_prior", "grad_bias"), sums)
    types = {**rows, **others, "extra_key": extra, "extra_value": extra}
    product = {"ieee": "fma.rn.f32" if dtype == F32 else "mma", "tf32": "tf32"}[precision]
    for kernel in (kernels._forward_kernel, kernels._query_kernel, kernels._key_kernel):
        ptx = compiled(kernel, constants, **types)
        assert product in ptx
        assert precision == "tf32" or ".tf32" not in ptx
    bare = {**constants, "bias": None, "prior": None, "grad_prior": None, "grad_bias": None, "grad_value": None}
    for kernel in (kernels._forward_kernel, kernels._query_kernel, kernels._key_kernel):
        compiled(kernel, bare, **types)
    compiled(kernels._delta_kernel, constants, **types)
    compiled(kernels._sum_kernel, dict(REAL=real, BLOCK=256), parts=sums, out=stored)
