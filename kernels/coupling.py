"""Triton path of core `coupling`: affine coupling and the Haar wavelet.

Called by the op table (`pyface.ops.coupling`) with checked arguments: tensors of one shape [B, ...] on one device, each
sample dense in one common order, the distance between samples free. Runs on CPU tensors when TRITON_INTERPRET=1 was set
before the import.

Numbers follow csrc/cuda/coupling.cu: arithmetic in float32 (float64 for float64), l and l' without cancellation, and a
log-det that is summed in float64 in an order that depends on the number of elements of a sample alone.
"""

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# One fixed configuration a kernel, chosen on paper (at least 16 bytes a thread and tensor): written without a GPU, so
# not tuned on one.
_BLOCK = 1024
_MAX_RANGES = 256
_HAAR_BYTES = 2048  # of one sub-band: 16 to a thread
_MAX_PROGRAMS = 2**31 - 1  # of a launch; kernels walk the rest in grid-sized strides
# Only the fused multiply-adds that are written: which others the compiler would make differs between its versions.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@triton.jit
def _decay(a):
    """(exp(-a), exp(-a) - 1) for a >= 0 from one chain, each to a few units in the last place."""
    # ln(2) in two parts, the first short enough for n * high to be exact. Constants must be constexpr: a plain number
    # with a name is float32.
    double: tl.constexpr = a.dtype == tl.float64
    cut: tl.constexpr = 700.0 if double else 80.0
    ln2_high: tl.constexpr = 0.6931471803691238 if double else 0.693359375
    ln2_low: tl.constexpr = 1.9082149292705877e-10 if double else -2.1219444005469057e-4
    bounded = tl.where(a > cut, cut, a)  # and not tl.minimum, which would drop a NaN
    n = tl.floor(0.5 - bounded * 1.4426950408889634)
    r = -bounded - n * ln2_high - n * ln2_low  # |r| <= ln(2) / 2
    one = tl.full(a.shape, 1.0, a.dtype)
    p = one
    if double:
        for k in tl.static_range(14, 7, -1):
            p = tl.fma(p, r * (1.0 / k), one)
    for k in tl.static_range(7, 1, -1):
        p = tl.fma(p, r * (1.0 / k), one)
    p = p * r  # exp(r) - 1
    if double:
        scale = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    q = tl.where(a > cut, 0.0, tl.fma(scale, p, scale))
    return q, tl.fma(scale, p, scale - 1.0)


@triton.jit
def _atan(s):
    """atan to a few units in the last place; libdevice has one, the interpreter does not."""
    a = tl.abs(s)
    a = tl.where(a > 1e18, 1e18, a)
    steep = a > 1.0
    low = tl.where(steep, 1.0, a)  # atan(low / high), low <= high
    high = tl.where(steep, a, 1.0)
    one = low > 0.6681786379192989 * high  # tan(3 pi / 16): step down by pi / 4,
    half = low > 0.198912367379658 * high  # tan(pi / 16): by pi / 8
    zero = tl.zeros_like(a)  # carries the type: a choice between two plain numbers would be float32
    step = tl.where(one, zero + 1.0, tl.where(half, zero + 0.41421356237309503, zero))
    angle = tl.where(one, zero + 0.7853981633974483, tl.where(half, zero + 0.39269908169872414, zero))
    u = (low - step * high) / (high + step * low)
    v = u * u
    p = tl.full(a.shape, 0.0, a.dtype)
    for k in tl.static_range(11, 0, -1):
        p = (1.0 / (2 * k + 1) - p) * v
    angle = angle + (u - u * p)
    angle = tl.where(steep, 1.5707963267948966 - angle, angle)
    return tl.where(s < 0.0, -angle, angle)


@triton.jit
def _log_scale(s, clamp, ACTIVATION: tl.constexpr):
    """(l, l') of the clamped log-scale."""
    if ACTIVATION == "none":
        scale = s
        slope = tl.full(s.shape, 1.0, s.dtype)
    elif ACTIVATION == "atan":
        scale = 0.636 * clamp * _atan(s)
        slope = 0.636 * clamp / (1.0 + s * s)
    else:
        # tanh(s/2) and tanh(s) are (1 - q) / (1 + q) with q = exp(-rate |s|)
        rate: tl.constexpr = 1.0 if ACTIVATION == "sigmoid" else 2.0
        q, m = _decay(rate * tl.abs(s))
        size = clamp * (-m / (2.0 + m))
        scale = tl.where(s < 0.0, -size, size)
        slope = clamp * (2.0 * rate) * (q / ((1.0 + q) * (1.0 + q)))
    return scale, slope


@triton.jit
def _row(tensor, offset, ALIGNED: tl.constexpr):
    """A sample's first element. Its alignment is told here, not found by Triton's specialisation: see `_aligned`."""
    row = tensor + offset
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    return row


@triton.jit
def _range(item, ranges, length, inner):
    """(sample, begin, end) of a work item: one of the ranges that a sample is cut into."""
    b = item // ranges
    begin = tl.multiple_of((item - b * ranges) * length, 16)
    end = begin + length
    return b, begin, tl.where(end < inner, end, inner)


@triton.jit
def _elements(inner, ALIGNED: tl.constexpr):
    """Elements of a sample, given in sixteens where ALIGNED: a product shows the compiler what it may rely on."""
    inner = inner.to(tl.int64)
    if ALIGNED:
        inner = inner * 16
    return inner


@triton.jit(
    do_not_specialize=["inverse", "inner", "x_stride", "s_stride", "t_stride", "y_stride"],
    do_not_specialize_on_alignment=["x", "s", "t", "y", "partial"],
)
def _forward_kernel(
    x, s, t, y, partial, items, ranges, length, inner, x_stride, s_stride, t_stride, y_stride,
    clamp: tl.float64, inverse,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # `inverse` is no constexpr: both directions share the instructions that make l, so log-dets cancel bit for bit.
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    c = tl.full((), clamp, real)
    lanes = tl.arange(0, BLOCK)
    inner = _elements(inner, ALIGNED)
    first = tl.program_id(0).to(tl.int64)
    for item in range(first, items, tl.num_programs(0).to(tl.int64)):
        b, begin, end = _range(item, ranges, length, inner)
        x_row = _row(x, b * x_stride, ALIGNED)
        s_row = _row(s, b * s_stride, ALIGNED)
        t_row = _row(t, b * t_stride, ALIGNED)
        y_row = _row(y, b * y_stride, ALIGNED)
        total = tl.zeros([BLOCK], tl.float64)
        for i in range(begin, end, BLOCK):
            at = i + lanes
            here = at < inner
            x_tile = tl.load(x_row + at, here, other=0.0).to(real)
            s_tile = tl.load(s_row + at, here, other=0.0).to(real)
            t_tile = tl.load(t_row + at, here, other=0.0).to(real)
            scale, _ = _log_scale(s_tile, c, ACTIVATION)
            e = tl.exp(tl.where(inverse, -scale, scale))
            out = tl.where(inverse, (x_tile - t_tile) * e, tl.fma(x_tile, e, t_tile))
            tl.store(y_row + at, out.to(y.dtype.element_ty), here)
            total += scale.to(tl.float64)
        if partial is not None:
            tl.store(partial + item, tl.sum(total))


@triton.jit(do_not_specialize=["inverse"], do_not_specialize_on_alignment=["log_det", "partial"])
def _log_det_kernel(partial, log_det, batch, ranges, inverse, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64)
    for b in range(first, batch, tl.num_programs(0).to(tl.int64)):
        total = tl.sum(tl.load(partial + b * ranges + lanes, lanes < ranges, other=0.0))
        tl.store(log_det + b, tl.where(inverse, -total, total).to(log_det.dtype.element_ty))


@triton.jit(do_not_specialize=["inverse", "inner"])
def _backward_kernel(
    grad_out, grad_log_det, value, s, t, grad_x, grad_s, items, ranges, length, inner,
    grad_out_stride, value_stride, s_stride, t_stride, clamp: tl.float64, inverse,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    c = tl.full((), clamp, real)
    lanes = tl.arange(0, BLOCK)
    inner = _elements(inner, ALIGNED)
    first = tl.program_id(0).to(tl.int64)
    for item in range(first, items, tl.num_programs(0).to(tl.int64)):
        b, begin, end = _range(item, ranges, length, inner)
        grad_row = _row(grad_out, b * grad_out_stride, ALIGNED)
        value_row = _row(value, b * value_stride, ALIGNED)
        s_row = _row(s, b * s_stride, ALIGNED)
        for i in range(begin, end, BLOCK):
            at = i + lanes
            here = at < inner
            g = tl.load(grad_row + at, here, other=0.0).to(real)
            scale, slope = _log_scale(tl.load(s_row + at, here, other=0.0).to(real), c, ACTIVATION)
            gx = g * tl.exp(tl.where(inverse, -scale, scale))
            if grad_x is not None:
                tl.store(_row(grad_x, b * inner, ALIGNED) + at, gx.to(grad_x.dtype.element_ty), here)
            if grad_s is not None:
                v = tl.load(value_row + at, here, other=0.0).to(real)
                if t is not None:
                    through = g * (v - tl.load(_row(t, b * t_stride, ALIGNED) + at, here, other=0.0).to(real))
                else:
                    through = tl.where(inverse, g, gx) * v
                if grad_log_det is not None:
                    through += tl.load(grad_log_det + b).to(real)
                gs = tl.where(inverse, -through, through) * slope
                tl.store(_row(grad_s, b * inner, ALIGNED) + at, gs.to(grad_s.dtype.element_ty), here)


@triton.jit
def _haar_kernel(
    image, bands, items, col_blocks, lines, sample_lines, cols,
    INVERSE: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of LINES x COLS coefficients of each sub-band. Line k is row k of all planes' sub-bands stacked, and rows
    2k and 2k + 1 of the stacked images."""
    real: tl.constexpr = tl.float64 if image.dtype.element_ty == tl.float64 else tl.float32
    cols = tl.cast(cols, tl.int64)
    first = tl.program_id(0).to(tl.int64)
    for item in range(first, items, tl.num_programs(0).to(tl.int64)):
        tile = item // col_blocks
        block = item - tile * col_blocks
        line = tile * LINES + tl.arange(0, LINES)
        col = block * COLS + tl.arange(0, COLS)
        pixel_col = block * (2 * COLS) + tl.arange(0, 2 * COLS)
        band = cols * sample_lines
        coefficient = (line * cols + line // sample_lines * (3 * band))[:, None] + col[None, :]
        in_bands = (line < lines)[:, None] & (col < cols)[None, :]
        pixel = (line * 4 * cols)[:, None] + pixel_col[None, :]
        in_image = (line < lines)[:, None] & (pixel_col < 2 * cols)[None, :]
        if INVERSE:
            ll = tl.load(bands + coefficient, in_bands, other=0.0).to(real)
            hl = tl.load(bands + coefficient + band, in_bands, other=0.0).to(real)
            lh = tl.load(bands + coefficient + 2 * band, in_bands, other=0.0).to(real)
            hh = tl.load(bands + coefficient + 3 * band, in_bands, other=0.0).to(real)
            top = tl.join((ll - lh) - (hl - hh), (ll - lh) + (hl - hh)) * 0.5
            bottom = tl.join((ll + lh) - (hl + hh), (ll + lh) + (hl + hh)) * 0.5
            top = tl.reshape(top, [LINES, 2 * COLS]).to(image.dtype.element_ty)
            bottom = tl.reshape(bottom, [LINES, 2 * COLS]).to(image.dtype.element_ty)
            tl.store(image + pixel, top, in_image)
            tl.store(image + pixel + 2 * cols, bottom, in_image)
        else:
            top = tl.load(image + pixel, in_image, other=0.0).to(real)
            bottom = tl.load(image + pixel + 2 * cols, in_image, other=0.0).to(real)
            a, b = tl.split(tl.reshape(top, [LINES, COLS, 2]))
            c, d = tl.split(tl.reshape(bottom, [LINES, COLS, 2]))
            kind: tl.constexpr = bands.dtype.element_ty
            tl.store(bands + coefficient, (((a + b) + (c + d)) * 0.5).to(kind), in_bands)
            tl.store(bands + coefficient + band, (((b - a) + (d - c)) * 0.5).to(kind), in_bands)
            tl.store(bands + coefficient + 2 * band, (((c + d) - (a + b)) * 0.5).to(kind), in_bands)
            tl.store(bands + coefficient + 3 * band, (((d - c) - (b - a)) * 0.5).to(kind), in_bands)


def _on(tensor: Tensor):
    """Makes the tensor's device current: Triton launches on the current stream of the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The type a kernel stores where `dtype` is wanted: the interpreter cuts a bfloat16 off instead of rounding it."""
    return torch.float32 if _INTERPRETED and dtype == torch.bfloat16 else dtype


def _order(tensor: Tensor) -> torch.memory_format:
    """The element order inside the samples of `tensor`."""
    if tensor[:1].is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense uninitialised tensor in the element order of `tensor`."""
    return torch.empty_like(tensor, dtype=_stored(dtype), memory_format=_order(tensor))


def _ranges(inner: int) -> tuple[int, int]:
    """How many ranges a sample is cut into, and their length. They follow from `inner` alone: they fix the order of the
    log-det's sum."""
    tiles = triton.cdiv(inner, _BLOCK)
    each = triton.cdiv(tiles, _MAX_RANGES)
    return triton.cdiv(tiles, each), each * _BLOCK


def _aligned(inner: int, tensors: list[Tensor | None]) -> tuple[bool, list[Tensor | None]]:
    """Whether kernels may use 16-byte accesses, and tensors that allow it.

    The vector width decides which thread adds which elements of the log-det, so it too must follow from `inner` alone.
    Where the sample size allows vectors, the rare tensor that lies across the grain (a view at an odd offset) is
    copied.
    """
    if inner % 16:
        return False, tensors
    return True, [
        t if t is None or (t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0) else t.clone(memory_format=_order(t))
        for t in tensors
    ]


def forward(
    x: Tensor, log_scale: Tensor, shift: Tensor, clamp: float, activation: str, inverse: bool, log_det: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the log-determinants [B] (float64 for float64, else float32; None when not wanted)."""
    batch = x.shape[0]
    y = _like(x, x.dtype)
    allocate = x.new_empty if x.numel() else x.new_zeros  # the sum over no elements is written by no kernel
    sums = allocate(batch, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) if log_det else None
    if x.numel():
        inner = x.numel() // batch
        ranges, length = _ranges(inner)
        aligned, (x, log_scale, shift) = _aligned(inner, [x, log_scale, shift])
        partial = x.new_empty(batch * ranges, dtype=torch.float64) if log_det else None
        with _on(x):
            _forward_kernel[(min(batch * ranges, _MAX_PROGRAMS),)](
                x, log_scale, shift, y, partial, batch * ranges, ranges, length, inner // 16 if aligned else inner,
                x.stride(0), log_scale.stride(0), shift.stride(0), inner, clamp, inverse,
                ACTIVATION=activation, ALIGNED=aligned, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
            if log_det:
                _log_det_kernel[(min(batch, _MAX_PROGRAMS),)](
                    partial, sums, batch, ranges, inverse, BLOCK=_MAX_RANGES, **_OPTIONS
                )
    return y.to(x.dtype), sums


def backward(
    grad_out: Tensor, grad_log_det: Tensor | None, value: Tensor, log_scale: Tensor, shift: Tensor | None, *,
    clamp: float, activation: str, inverse: bool, from_output: bool, needs_x: bool, needs_s: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and log_scale, None where not needed; csrc/include/pyface/coupling.h has the formulas."""
    grad_x = _like(value, value.dtype) if needs_x else None
    grad_s = _like(value, log_scale.dtype) if needs_s else None
    if value.numel() and (needs_x or needs_s):
        batch = value.shape[0]
        inner = value.numel() // batch
        ranges, length = _ranges(inner)
        tensors = [grad_out, value, log_scale, shift if from_output and needs_s else None]
        aligned, (grad_out, value, log_scale, t) = _aligned(inner, tensors)
        with _on(value):
            _backward_kernel[(min(batch * ranges, _MAX_PROGRAMS),)](
                grad_out, grad_log_det, value, log_scale, t, grad_x, grad_s, batch * ranges, ranges, length,
                inner // 16 if aligned else inner, grad_out.stride(0), value.stride(0), log_scale.stride(0),
                0 if t is None else t.stride(0), clamp, inverse,
                ACTIVATION=activation, ALIGNED=aligned, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
    return None if grad_x is None else grad_x.to(value.dtype), None if grad_s is None else grad_s.to(log_scale.dtype)


def haar_dwt2d(x: Tensor) -> Tensor:
    """Tensor[B, C, 2R, 2W] to Tensor[B, 4C, R, W], contiguous."""
    batch, channels, height, width = x.shape
    bands = x.new_empty((batch, 4 * channels, height // 2, width // 2), dtype=_stored(x.dtype))
    _haar(x.contiguous(), bands, batch, channels, height // 2, width // 2, inverse=False)
    return bands.to(x.dtype)


def haar_idwt2d(bands: Tensor) -> Tensor:
    """Tensor[B, 4C, R, W] to Tensor[B, C, 2R, 2W], contiguous."""
    batch, channels, rows, cols = bands.shape
    image = bands.new_empty((batch, channels // 4, 2 * rows, 2 * cols), dtype=_stored(bands.dtype))
    _haar(image, bands.contiguous(), batch, channels // 4, rows, cols, inverse=True)
    return image.to(bands.dtype)


def _haar(image: Tensor, bands: Tensor, batch: int, channels: int, rows: int, cols: int, inverse: bool) -> None:
    if not image.numel():
        return
    tile_cols = min(triton.next_power_of_2(cols), 128)
    tile_lines = _HAAR_BYTES // max(image.element_size(), bands.element_size()) // tile_cols
    lines, col_blocks = batch * channels * rows, triton.cdiv(cols, tile_cols)
    items = triton.cdiv(lines, tile_lines) * col_blocks
    with _on(image):
        _haar_kernel[(min(items, _MAX_PROGRAMS),)](
            image, bands, items, col_blocks, lines, channels * rows, cols,
            INVERSE=inverse, LINES=tile_lines, COLS=tile_cols, **_OPTIONS,
        )  # fmt: skip
