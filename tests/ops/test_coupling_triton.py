"""kernels/coupling.py without a GPU: run by Triton's interpreter against float64, and compiled for sm_90."""

import itertools
import re

import pytest
import torch
from coupling_expected import (
    ACTIVATIONS,
    BF16,
    F16,
    F32,
    F64,
    PAIR_IDS,
    TYPE_PAIRS,
    check_backward,
    check_forward,
    check_haar,
    check_inverse_haar,
    log_det_type,
)
from triton_interpreter import KERNELS, Interpreter, load

triton = pytest.importorskip("triton")

SHAPES = {1: (1,), 15: (3, 5, 1), 16: (4, 2, 2), 17: (17,), 2047: (23, 89, 1), 2048: (8, 16, 16), 2049: (3, 683, 1)}
LAYOUTS = ["contiguous", "channels_last", "halves"]


@pytest.fixture(scope="module")
def interpreted():
    interpreter = Interpreter("coupling")
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def kernels():
    return load(KERNELS / "coupling.py")


def samples(size, dtype, layout, scale=1.5):
    """Random [2, ...] with `size` elements a sample; `halves`: rows twice as long, as the halves of one tensor have."""
    shape = SHAPES[size]
    v = torch.randn(2, 2, *shape).mul_(scale).to(dtype)
    if layout == "halves":
        return v[:, 1]
    v = v[0].clone()
    return v.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and v.dim() == 4 else v


def three(size, types, layout, **kwargs):
    return [samples(size, dtype, layout, **kwargs) for dtype in (types[0], types[1], types[1])]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_forward(interpreted, types, activation):
    layouts = itertools.cycle(LAYOUTS)  # 14 calls: every size both ways, every layout with large and small
    for size, inverse in itertools.product(SHAPES, [False, True]):
        x, s, t = three(size, types, next(layouts))
        options = dict(clamp=1.7, activation=activation, inverse=inverse)
        y, log_det = interpreted("forward", x, s, t, log_det=size % 2 == 1, **options)
        assert y.stride()[1:] == x.stride()[1:]
        assert y.dtype == x.dtype
        assert (log_det is None) == (size % 2 == 0)
        check_forward(x, s, t, y, log_det, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_backward(interpreted, types, activation):
    layouts, modes = (
        itertools.cycle(LAYOUTS),
        itertools.cycle([(False, False), (False, True), (True, False), (True, False)]),
    )
    wanted = itertools.cycle([(True, True), (True, False), (True, True), (False, True), (True, True)])
    for size in [*SHAPES, 16]:
        layout, (inverse, from_output), (needs_x, needs_s) = next(layouts), next(modes), next(wanted)
        value, s, t = three(size, types, layout)
        grad_out = samples(size, types[0], layout)
        lam = None if size == 2047 else torch.randn(2, dtype=log_det_type(types[0]))
        options = dict(clamp=1.7, activation=activation, inverse=inverse, from_output=from_output)
        arguments = (grad_out, lam, value, s, t if from_output else None)
        grad_x, grad_s = interpreted("backward", *arguments, **options, needs_x=needs_x, needs_s=needs_s)
        assert (grad_x is not None) == needs_x
        assert (grad_s is not None) == needs_s
        for gradient, like in ((grad_x, value), (grad_s, s)):
            assert gradient is None or (gradient.dtype == like.dtype and gradient.stride()[1:] == value.stride()[1:])
        check_backward(*arguments, grad_x, grad_s, **options)


def forward(interpreted, x, s, t, *, clamp=2.0, activation="sigmoid", inverse=False):
    return interpreted("forward", x, s, t, clamp=clamp, activation=activation, inverse=inverse, log_det=True)


def test_whether_accesses_are_wide_follows_from_the_sample_size_alone(kernels):
    """It decides the order of the log-det's sum on a GPU, which the interpreter cannot show."""
    odd = torch.arange(2 * 2049 + 1.0)[1:].view(2, 2049)
    for size, wide in [(2048, True), (2047, False)]:
        for given in (torch.randn(2, size), odd[:, :size], None):
            aligned, (used,) = kernels._aligned(size, [given])
            assert aligned == wide
            if given is not None:
                assert torch.equal(used, given)
                assert not wide or (used.data_ptr() % 16 == 0 and used.stride(0) % 16 == 0)


@pytest.mark.parametrize("types", [(F32, F32), (F64, F64), (F32, BF16)], ids=["float32", "float64", "mixed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inverse_undoes_forward_and_its_log_det_is_the_negative(interpreted, activation, types):
    x, s, t = three(2049, types, "halves", scale=1.0)
    y, log_det = forward(interpreted, x, s, t, activation=activation)
    back, negative = forward(interpreted, y, s, t, activation=activation, inverse=True)
    assert torch.equal(log_det, -negative)
    stretch = torch.exp(s.double().abs().amax() if activation == "none" else torch.tensor(2.0))
    allowed = 4 * torch.finfo(types[0]).eps * stretch * (y.double().abs().amax() + x.double().abs().amax())
    assert (back.double() - x.double()).abs().amax() <= allowed


def test_sample_has_the_same_bits_alone_and_across_the_grain(interpreted):
    x, s, t = (torch.randn(3, 2048) for _ in range(3))
    s[2, 100] = torch.nan
    y, log_det = forward(interpreted, x, s, t)
    assert log_det[2].isnan()
    assert y[2].isnan().sum() == 1
    assert not y[:2].isnan().any()
    alone_y, alone = forward(interpreted, *(v[1:2].clone() for v in (x, s, t)))
    assert torch.equal(alone, log_det[1:2])
    assert torch.equal(alone_y[0], y[1])
    rows = [torch.zeros(3 * 2049 + 1)[1:].view(3, 2049)[:, :2048].copy_(v) for v in (x, s, t)]  # none on 16 bytes
    channels_last = [v.unflatten(1, (16, 16, 8)).permute(0, 3, 1, 2) for v in rows]
    for across in (rows, channels_last):
        odd_y, odd_log_det = forward(interpreted, *across)
        odd_y = odd_y.permute(0, 2, 3, 1).flatten(1) if odd_y.dim() == 4 else odd_y
        assert torch.equal(odd_log_det[:2], log_det[:2])
        assert torch.equal(odd_y[:2], y[:2])


@pytest.mark.parametrize("types", [(F32, F32), (F64, F64)], ids=["float32", "float64"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "atan"])
def test_log_scale_is_odd_bounded_monotone_and_exact_near_zero(interpreted, activation, types):
    magnitudes = torch.cat([torch.logspace(-9, 4, 60, dtype=types[1]), torch.tensor([1e30, torch.inf], dtype=types[1])])
    s = torch.cat([-magnitudes.flip(0), magnitudes]).view(-1, 1)
    zeros = torch.zeros_like(s)
    _, scale = forward(interpreted, zeros, s, zeros, activation=activation)
    assert torch.equal(scale, -scale.flip(0))
    assert (scale.diff() >= 0).all()
    assert scale.abs().amax() <= 2
    limit = 0.636 * torch.pi if activation == "atan" else 2.0
    assert scale[-1].item() == pytest.approx(limit, rel=2 * torch.finfo(types[0]).eps if activation == "atan" else 0)
    argument = s.double()[:, 0] * (0.5 if activation == "sigmoid" else 1.0)
    exact = 2 * (0.636 * torch.atan(argument) if activation == "atan" else torch.tanh(argument))
    assert (scale.double() / exact - 1).abs().amax() < 4 * torch.finfo(types[0]).eps


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "atan"])
def test_special_values(interpreted, activation):
    x, s, t = (torch.randn(2, 70) for _ in range(3))
    for scale, clamp in [(torch.zeros_like(s), 2.0), (s, 0.0), (torch.full_like(s, torch.inf), 0.0)]:
        y, log_det = forward(interpreted, x, scale, t, clamp=clamp, activation=activation)
        assert torch.equal(y, x + t)
        assert torch.equal(log_det, torch.zeros(2))
    s = torch.full_like(s, -torch.inf)
    x[:, 0] = 0
    y, log_det = forward(interpreted, x, s, t, activation=activation)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    assert torch.equal(y[:, 0], t[:, 0])
    options = dict(clamp=2.0, activation=activation, inverse=False, from_output=False, needs_x=True, needs_s=True)
    grad_x, grad_s = interpreted("backward", x, torch.ones(2), x, s, None, **options)
    assert grad_x.isfinite().all()
    assert not grad_s.any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_nothing_to_do(interpreted, shape):
    none = torch.empty(shape)
    y, log_det = forward(interpreted, none, none, none)
    assert y.shape == shape
    assert torch.equal(log_det, torch.zeros(shape[0]))
    options = dict(clamp=2.0, activation="sigmoid", inverse=False, from_output=False, needs_x=True, needs_s=True)
    assert [g.shape for g in interpreted("backward", none, None, none, none, None, **options)] == [shape, shape]
    assert interpreted("haar_dwt2d", torch.empty(0, 3, 8, 8)).shape == (0, 12, 4, 4)
    assert interpreted("haar_idwt2d", torch.empty(2, 4, 0, 3)).shape == (2, 1, 0, 6)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_haar(interpreted, dtype):
    for shape in [(1, 1, 2, 2), (2, 3, 8, 32), (3, 2, 10, 14), (1, 1, 6, 260)]:
        image = torch.randn(shape).to(dtype)
        if shape[1] == 3:
            image = image.contiguous(memory_format=torch.channels_last)
        bands = interpreted("haar_dwt2d", image)
        assert bands.is_contiguous()
        assert bands.dtype == dtype
        check_haar(image, bands)
        back = interpreted("haar_idwt2d", bands)
        assert back.is_contiguous()
        assert back.dtype == dtype
        check_inverse_haar(bands, back)


# ---- compiled, not run -----------------------------------------------------------------------------------------------

NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}


def compiled(kernels, kernel, constants, divisible=(), **types):
    """The kernel compiled for sm_90; parameters that are neither in `types` nor constants are 32-bit integers.

    What Triton does by itself at a call is done by hand: arguments in `divisible` are multiples of 16, and an integer 1
    is a constant.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    multiples = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels._OPTIONS)
    assert len(result.asm["cubin"]) > 1000
    return result


def accesses(result, width):
    """(loads, stores) of global memory in the PTX, all of which must move `width` bytes."""
    bits = {"b8": 8, "b16": 16, "b32": 32, "b64": 64}
    found = {"ld": 0, "st": 0}
    for kind, vector, element in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.(b\d+) ", result.asm["ptx"]):
        assert int(vector or 1) * bits[element] == 8 * width, f"{kind}.global.v{vector}.{element}"
        found[kind] += 1
    return found["ld"], found["st"]


VARIANTS = [(types, "sigmoid") for types in TYPE_PAIRS] + [
    (TYPE_PAIRS[i], a) for i in (0, 1) for a in ("none", "tanh", "atan")
]
VARIANT_IDS = [f"{'-'.join(NAMES[t] for t in types)}-{activation}" for types, activation in VARIANTS]


@pytest.mark.parametrize(("types", "activation"), VARIANTS, ids=VARIANT_IDS)
def test_coupling_compiles_for_sm90_with_64_bit_offsets_and_wide_accesses(kernels, types, activation):
    x, st = (f"*{NAMES[t]}" for t in types)
    common = dict(clamp="fp64", inverse="u1")
    constants = dict(ACTIVATION=activation, ALIGNED=True, BLOCK=kernels._BLOCK)
    tensors = dict(x=x, s=st, t=st, y=x)
    forward = compiled(kernels, kernels._forward_kernel, {**constants, "partial": None}, **tensors, **common)
    tensors = dict(grad_out=x, value=x, s=st, t=st, grad_x=x, grad_s=st)
    backward = compiled(kernels, kernels._backward_kernel, {**constants, "grad_log_det": None}, **tensors, **common)
    per_thread = kernels._BLOCK // 128
    words = [per_thread * torch.finfo(t).bits // 128 for t in types]
    assert accesses(forward, 16) == (words[0] + 2 * words[1], words[0])
    assert accesses(backward, 16) == (2 * words[0] + 2 * words[1], words[0] + words[1])
    for result in (forward, backward):
        # sample index times stride, with 32-bit strides: the product itself must be 64 bits wide
        assert re.search(r"arith\.extsi %(\w*stride\w*) : i32 to i64", result.asm["ttir"])
        assert not re.search(r"arith\.muli.*: i32", result.asm["ttir"])


@pytest.mark.parametrize("log_det", ["fp32", "fp64"])
def test_log_det_compiles_for_sm90(kernels, log_det):
    types = dict(partial="*fp64", log_det=f"*{log_det}", inverse="u1")
    result = compiled(kernels, kernels._log_det_kernel, dict(BLOCK=kernels._MAX_RANGES), **types)
    assert re.search(r"arith\.muli.*: i64", result.asm["ttir"])


@pytest.mark.parametrize("inverse", [False, True], ids=["dwt", "idwt"])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_haar_compiles_for_sm90_with_64_bit_offsets_and_wide_accesses(kernels, dtype, inverse):
    coefficients = kernels._HAAR_BYTES * 8 // torch.finfo(dtype).bits
    constants = dict(INVERSE=inverse, LINES=coefficients // 128, COLS=128)
    pointer = f"*{NAMES[dtype]}"
    wide = ["image", "bands", "cols"]
    result = compiled(kernels, kernels._haar_kernel, constants, divisible=wide, image=pointer, bands=pointer)
    assert accesses(result, 16) == (4, 4)
    assert re.search(r"arith\.muli.*i64", result.asm["ttir"])
    assert not re.search(r"arith\.muli.*i32>? ", result.asm["ttir"])


def test_kernels_compile_where_sizes_are_one(kernels):
    types = dict(x="*fp32", s="*fp32", t="*fp32", y="*fp32", partial="*fp64", clamp="fp64", inverse="u1")
    constants = dict(ACTIVATION="sigmoid", ALIGNED=False, BLOCK=kernels._BLOCK, items=1, ranges=1)
    compiled(kernels, kernels._forward_kernel, constants, **types)
    types = dict(
        grad_out="*fp32", grad_log_det="*fp32", value="*fp32", s="*fp32", t="*fp32", grad_x="*fp32", grad_s="*fp32"
    )
    strides = dict(grad_out_stride=1, value_stride=1, s_stride=1, t_stride=1)
    compiled(kernels, kernels._backward_kernel, {**constants, **strides}, clamp="fp64", inverse="u1", **types)
    constants = dict(BLOCK=kernels._MAX_RANGES, batch=1, ranges=1)
    compiled(kernels, kernels._log_det_kernel, constants, partial="*fp64", log_det="*fp32", inverse="u1")
    constants = dict(LINES=512, COLS=1, items=1, col_blocks=1, lines=1, sample_lines=1, cols=1)
    for inverse in (False, True):
        compiled(kernels, kernels._haar_kernel, {**constants, "INVERSE": inverse}, image="*fp32", bands="*fp32")


def test_clamp_reaches_the_kernels_in_double_precision(kernels):
    for kernel in (kernels._forward_kernel, kernels._backward_kernel):
        assert {p.name: p.annotation_type for p in kernel.params}["clamp"] == "fp64"
