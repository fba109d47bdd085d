"""kernels/deform_conv.py without a GPU: run by Triton's interpreter against float64, and compiled for sm_90."""

import functools
from types import SimpleNamespace

import pytest
import torch
from deform_conv_expected import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    TYPE_IDS,
    TYPES,
    Case,
    border,
    check,
    check_backward,
    check_forward,
    tensors,
)
from triton_interpreter import KERNELS, Interpreter, load

from pyface.ops import _deform_conv_gpu
from pyface.ops._deform_conv_gpu import Triton

triton = pytest.importorskip("triton")

ALL = (True, True, True, True)


@pytest.fixture(scope="module")
def interpreted():
    interpreter = Interpreter("deform_conv")
    calls = {name: functools.partial(interpreter, name) for name in ("forward", "backward")}
    yield Triton(SimpleNamespace(**calls))
    interpreter.close()


@pytest.fixture(scope="module")
def kernels():
    return load(KERNELS / "deform_conv.py")


def forward(core, case, t):
    return core.forward(t["input"], t["offset"], t["weight"], t["bias"], t["mask"], *case.geometry)


def gradients(core, case, t, grad, needs=ALL):
    needs = (*needs[:3], needs[3] and case.mask)
    return core.backward(grad, t["input"], t["offset"], t["weight"], t["mask"], *case.geometry, needs)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(interpreted, name):
    case = CASES[name]
    t = tensors(case)
    out = forward(interpreted, case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, gradients(interpreted, case, t, grad))


@pytest.mark.parametrize("types", TYPES[1:], ids=TYPE_IDS[1:])
def test_types(interpreted, types):
    case = CASES["one pixel"]
    t = tensors(case, types)
    out = forward(interpreted, case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, gradients(interpreted, case, t, grad))


def test_deterministic_gradient_gathers_in_pieces_what_atomics_scatter(interpreted, monkeypatch):
    case = Case(2, 6, 4, (3, 2), (2, 2), 2, 3, padding=(0, 1), layout=torch.channels_last)
    t = tensors(case)
    grad = torch.randn(case.batch, case.outs, *t["offset"].shape[2:])
    needs = (True, False, False, False)
    torch.use_deterministic_algorithms(True)
    try:
        found = gradients(interpreted, case, t, grad, needs)
        monkeypatch.setattr(_deform_conv_gpu, "WORKSPACE", 1)  # one step of channels at a time
        pieces = gradients(interpreted, case, t, grad, needs)
    finally:
        torch.use_deterministic_algorithms(False)
    check_backward(case, t, grad, found, needs)
    assert torch.equal(pieces[0], found[0])


def test_only_what_is_asked_for(interpreted):
    case = CASES["one pixel"]
    t = tensors(case)
    grad = torch.randn(case.batch, case.outs, 1, 1)
    for which in range(4):
        needs = tuple(i == which for i in range(4))
        check_backward(case, t, grad, gradients(interpreted, case, t, grad, needs), needs)


def test_borders_whole_positions_and_no_numbers(interpreted):
    case, t = border()
    out = forward(interpreted, case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, gradients(interpreted, case, t, grad))


def test_nan_pixel_reaches_only_what_interpolates_it(interpreted):
    case = CASES["channels_last"]
    t = tensors(case)
    t["input"][0, 3, 1, 2] = torch.nan
    out = forward(interpreted, case, t)
    assert out.isnan().any()
    assert not out.isnan().all()
    check_forward(case, t, out)


def test_views_and_strange_strides_are_taken(interpreted):
    case = Case(2, 6, 4, (5, 4))
    t = tensors(case)
    dense = forward(interpreted, case, t)
    packed = torch.cat([t["offset"], t["mask"]], 1)
    views = {
        **t,
        "offset": packed[:, :18],
        "mask": packed[:, 18:],
        "weight": t["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "input": t["input"].transpose(2, 3).contiguous().transpose(2, 3),
    }
    assert torch.equal(forward(interpreted, case, views), dense)
    grad = torch.randn_like(dense)
    last = grad.contiguous(memory_format=torch.channels_last)
    expected, found = gradients(interpreted, case, t, grad), gradients(interpreted, case, views, last)
    for name, a, b in zip(("input", "offset", "weight", "mask"), found, expected, strict=True):
        check(name, a, b.double(), F32)


def test_sums_are_split_where_pixels_are_few_and_by_sizes_alone(kernels, monkeypatch):
    grids = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append((self.name, grid[0]))

    for name in ("_forward_kernel", "_sum_kernel", "_weight_kernel"):
        monkeypatch.setattr(kernels, name, Recorder(name))
    many, few = Case(1, 512, 512, (64, 64)), Case(1, 512, 512, (2, 2), offset_groups=2)
    for case in (many, few):
        grids.clear()
        t = tensors(case)
        forward(Triton(kernels), case, t)
        launched = dict(grids)
        assert ("_sum_kernel" in launched) == (case is few)
        assert launched["_forward_kernel"] >= 64
        assert launched["_forward_kernel"] <= kernels._PROGRAMS


# ---- compiled, not run -----------------------------------------------------------------------------------------------

NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}
COMPILED = [
    pytest.param(BF16, "ieee", id="bf16"),
    *(
        pytest.param(dtype, precision, id=f"{NAMES[dtype]}-{precision}", marks=pytest.mark.slow)
        for dtype, precision in ((F16, "ieee"), (F32, "ieee"), (F32, "tf32"), (F64, "ieee"))
    ),
]


def compiled(kernel, constants, warps, options, **types):
    """PTX of the kernel for sm_90, with sizes that are multiples of 16 told as a call would tell them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    sixteens = ("channels", "inputs", "length", "offset_group", "outs", "group_outs", "pixels", "out_o", "grad_o")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in sixteens and signature[name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, **options))
    assert len(result.asm["cubin"]) > 1000
    return result.asm["ptx"]


@pytest.mark.parametrize(("dtype", "precision"), COMPILED)
def test_kernels_compile_for_sm90(kernels, dtype, precision):
    import triton.language as tl

    pixels, outs, block = kernels._tiles(dtype)
    real, sums = (tl.float64, "*fp64") if dtype == F64 else (tl.float32, "*fp32")
    stored = f"*{NAMES[dtype]}"
    common = dict(KERNEL_WIDTH=3, REAL=real, PRECISION=precision, WIDE=False, BLOCK=block, PIXELS=pixels)
    images = dict(x=stored, offset=sums, mask=sums, weight=stored)
    forward = compiled(
        kernels._forward_kernel, {**common, "OUTS": outs, "partial": None}, 8,
        kernels._OPTIONS, **images, bias=stored, out=stored,
    )  # fmt: skip
    columns = compiled(
        kernels._columns_kernel, {**common, "OUTS": min(outs, 64), "columns": None, "grad_q": 1}, 8, kernels._OPTIONS,
        **images, grad=stored, grad_offset=sums, grad_mask=sums, grad_x=sums,
    )  # fmt: skip
    weight = compiled(
        kernels._weight_kernel, {**common, "OUTS": outs // 2, "grad_q": 1}, 8, kernels._OPTIONS,
        grad=stored, x=stored, offset=sums, mask=sums, partial=sums,
    )  # fmt: skip
    product = {"ieee": "fma.rn.f32" if dtype == F32 else "mma.sync" if dtype == F64 else "wgmma", "tf32": "wgmma"}
    for ptx in (forward, columns, weight):
        assert product[precision] in ptx
        assert precision == "tf32" or ".tf32" not in ptx
    assert "cp.async.cg.shared.global" in forward  # corners come 16 bytes at a time, ahead of their product
    assert "red" in columns or "atom" in columns
    common = dict(REAL=real, BLOCK=block)
    compiled(kernels._sum_kernel, common, 4, kernels._OPTIONS, partial=sums, bias=stored, out=stored)
    lists = dict(rows="*i64", weights=sums, first="*i64")
    compiled(kernels._gather_kernel, common, 4, kernels._OPTIONS, columns=sums, grad_x=sums, **lists)


def test_kernels_compile_where_sizes_are_one(kernels):
    """An integer 1 reaches a kernel as a constant: a 1 x 1 image, and every stride of an ordinary convolution."""
    import triton.language as tl

    pointers = {
        "_forward_kernel": ("x", "offset", "weight", "out"),
        "_sum_kernel": ("partial", "out"),
        "_columns_kernel": ("grad", "x", "offset", "weight", "grad_offset", "columns"),
        "_weight_kernel": ("grad", "x", "offset", "partial"),
        "_gather_kernel": ("columns", "rows", "weights", "first", "grad_x"),
    }
    nothing = {"mask", "bias", "grad_mask", "grad_x"}
    chosen = dict(KERNEL_WIDTH=1, REAL=tl.float32, PRECISION="ieee", WIDE=False, PIXELS=16, OUTS=16, BLOCK=16)
    for name, given in pointers.items():
        kernel = getattr(kernels, name)
        constants = {n: chosen.get(n, None if n in nothing or n == "partial" else 1) for n in kernel.arg_names}
        types = {n: "*i64" if n in ("rows", "first") else "*fp32" for n in given}
        constants = {n: v for n, v in constants.items() if n not in given}
        compiled(kernel, constants, 4, kernels._OPTIONS, **types)
