"""Triton path of core `deform_conv`: deformable convolution as an implicit matrix product, and its gradients.

Called through `pyface.ops._deform_conv_gpu` with checked arguments that are not empty: images strictly channels_last,
weights [O, C/g, kh, kw] with memory in the order [O, kh, kw, C/g], offset and mask with each sample dense. Runs on CPU
tensors when TRITON_INTERPRET=1 was set before the import.

Channels are walked in steps: runs of channels that lie in one weight group and in one offset group, tap by tap, block
by block. A step places its taps (a few vector operations a pixel), reads four corners of a block of channels, and
hands the interpolated tile to `tl.dot`: columns never reach memory. Positions, interpolation and sums are float32
(float64 for float64); the interpolated values are rounded to the storage type once, before the product.

Work is cut by sizes alone, so sums have the same order on every GPU. The gradient of the input is added up by atomics,
unless torch asks for determinism: then the columns' gradient is stored a bounded piece at a time, and every pixel
gathers what went into it in a fixed order.
"""

import contextlib
import math
import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles chosen on paper, for the registers of 8 warps (ptxas spills 0 to 420 bytes a thread); written without a GPU, so
# not tuned on one. First to try there: 128 pixels to a tile or 32 channels to a step, num_stages 2 to 4.
_PROGRAMS = 264  # two to each of the 132 multiprocessors of a Hopper GPU: fewer tiles than that are split
_LEAST_STEPS = 4  # of a split: below, the sum over the splits costs more than it brings
_OPTIONS = {"enable_fp_fusion": True}

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@triton.jit
def _place(
    offset, mask, n, q, here, tap_group, k, geometry, height, width, pixels, out_width, offset_stride, mask_stride,
    KERNEL_WIDTH: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(row, column, fractions below and right, whether anything is read, mask) of tap k at output pixels q."""
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x = geometry
    oy = q // out_width
    ox = q - oy * out_width
    at = offset + n * offset_stride + 2 * tap_group * pixels + q
    y = tl.load(at, here, other=0.0).to(REAL)
    x = tl.load(at + pixels, here, other=0.0).to(REAL)
    y += (oy * stride_y - padding_y + k // KERNEL_WIDTH * dilation_y).to(REAL)
    x += (ox * stride_x - padding_x + k % KERNEL_WIDTH * dilation_x).to(REAL)
    # Written so that a NaN fails it, and before any conversion to an integer.
    reads = here & (y >= -1) & (y < height) & (x >= -1) & (x < width)
    y = tl.where(reads, y, 0.0)
    x = tl.where(reads, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    if mask is not None:
        m = tl.load(mask + n * mask_stride + tap_group * pixels + q, here, other=0.0).to(REAL)
    else:
        m = tl.full(y.shape, 1.0, REAL)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, reads, m


@triton.jit
def _corner(image, y, x, reads, c_here, height, width, channels):
    """(addresses, which of them exist) of pixels (y, x) of channels_last images; `image` is at the wanted channels."""
    inside = reads & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = (y.to(tl.int64) * width + x) * channels
    return image + at[:, None], inside[:, None] & c_here[None, :]


@triton.jit
def _corners(image, y, x, reads, c_here, height, width, channels, REAL: tl.constexpr):
    at, here = _corner(image, y, x, reads, c_here, height, width, channels)
    v00 = tl.load(at, here, other=0.0).to(REAL)
    at, here = _corner(image, y, x + 1, reads, c_here, height, width, channels)
    v01 = tl.load(at, here, other=0.0).to(REAL)
    at, here = _corner(image, y + 1, x, reads, c_here, height, width, channels)
    v10 = tl.load(at, here, other=0.0).to(REAL)
    at, here = _corner(image, y + 1, x + 1, reads, c_here, height, width, channels)
    v11 = tl.load(at, here, other=0.0).to(REAL)
    return v00, v01, v10, v11


@triton.jit
def _blend(v00, v01, v10, v11, fy, fx, m):
    """m times the interpolated values."""
    ey = 1.0 - fy
    ex = 1.0 - fx
    return (
        v00 * (ey * ex * m)[:, None] + v01 * (ey * fx * m)[:, None]
        + v10 * (fy * ex * m)[:, None] + v11 * (fy * fx * m)[:, None]
    )  # fmt: skip


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:  # the interpreter has no product of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _step(step, blocks, taps, length, BLOCK: tl.constexpr):
    """(segment, tap, first channel in the segment) of a step."""
    run = step // blocks
    return run // taps, run % taps, (step - run * blocks) * BLOCK


@triton.jit
def _forward_kernel(
    x, offset, mask, weight, bias, out, partial, total_pixels, pixel_tiles, out_tiles, splits, steps, blocks, length,
    channels, height, width, outs, pixels, out_width, inputs, group_outs, offset_group, taps,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_stride, mask_stride, out_n, out_o, out_q,
    KERNEL_WIDTH: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    geometry = (stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    item = tl.program_id(0)
    split = item // (pixel_tiles * out_tiles)
    item = item - split * (pixel_tiles * out_tiles)
    out_tile = item % out_tiles  # neighbours read the same pixels
    group_tiles = tl.cdiv(group_outs, OUTS)
    group = out_tile // group_tiles
    in_group = (out_tile - group * group_tiles) * OUTS + tl.arange(0, OUTS)
    o_here = in_group < group_outs
    o = (group * group_outs + in_group).to(tl.int64)
    p = (item // out_tiles).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    p_here = p < total_pixels
    n = p // pixels
    q = p - n * pixels
    image = x + n * (tl.cast(channels, tl.int64) * height * width)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([PIXELS, OUTS], REAL)
    each = tl.cdiv(steps, splits)
    for step in range(split * each, tl.minimum((split + 1) * each, steps)):
        run, k, begin = _step(step, blocks, taps, length, BLOCK)
        c_here = begin + lanes < length
        c = run * length + begin + lanes
        channel = group * inputs + c
        tap_group = ((group * inputs + run * length) // offset_group * taps + k).to(tl.int64)
        top, left, fy, fx, reads, m = _place(
            offset, mask, n, q, p_here, tap_group, k, geometry, height, width, pixels, out_width, offset_stride,
            mask_stride, KERNEL_WIDTH, REAL,
        )  # fmt: skip
        v00, v01, v10, v11 = _corners(
            image[:, None] + channel[None, :], top, left, reads, c_here, height, width, channels, REAL
        )
        columns = _blend(v00, v01, v10, v11, fy, fx, m).to(x.dtype.element_ty)
        w = tl.load(
            weight + ((o * taps + k) * inputs)[None, :] + c[:, None], c_here[:, None] & o_here[None, :], other=0.0
        )
        total = _dot(columns, w, total, PRECISION, WIDE)
    here = p_here[:, None] & o_here[None, :]
    if partial is not None:
        at = partial + (split.to(tl.int64) * total_pixels + p)[:, None] * outs + o[None, :]
        tl.store(at, total, here)
    else:
        if bias is not None:
            total += tl.load(bias + o, o_here, other=0.0).to(REAL)[None, :]
        at = out + (n * out_n + q * out_q)[:, None] + (o * out_o)[None, :]
        tl.store(at, total.to(out.dtype.element_ty), here)


@triton.jit
def _sum_kernel(
    partial, bias, out, splits, total_pixels, outs, pixels, out_n, out_o, out_q, REAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up the splits in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(total_pixels, tl.int64) * outs
    here = i < size
    total = tl.zeros([BLOCK], REAL)
    for split in range(splits):
        total += tl.load(partial + split * size + i, here, other=0.0)
    p = i // outs
    o = i - p * outs
    n = p // pixels
    if bias is not None:
        total += tl.load(bias + o, here, other=0.0).to(REAL)
    tl.store(out + n * out_n + (p - n * pixels) * out_q + o * out_o, total.to(out.dtype.element_ty), here)


@triton.jit
def _columns_kernel(
    grad, x, offset, mask, weight, grad_offset, grad_mask, grad_x, columns,
    total_pixels, first_tap_group, tap_groups, first_step, last_step, blocks, length,
    channels, height, width, pixels, out_width, inputs, group_outs, offset_group, taps,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_stride, mask_stride, grad_n, grad_o, grad_q,
    KERNEL_WIDTH: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns' gradient of one tap of one offset group at a tile of pixels, step by step, and all that follows from
    it: sums over channels for offset and mask; atomics into grad_x, or a stored piece of columns [taps, pixels, ...].
    """
    geometry = (stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    item = tl.program_id(0)
    tap_group = (first_tap_group + item % tap_groups).to(tl.int64)
    k = (tap_group % taps).to(tl.int32)
    first_channel = (tap_group // taps).to(tl.int32) * offset_group
    p = (item // tap_groups).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    p_here = p < total_pixels
    n = p // pixels
    q = p - n * pixels
    image = n * (tl.cast(channels, tl.int64) * height * width)
    top, left, fy, fx, reads, m = _place(
        offset, mask, n, q, p_here, tap_group, k, geometry, height, width, pixels, out_width, offset_stride,
        mask_stride, KERNEL_WIDTH, REAL,
    )  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    d_y = tl.zeros([PIXELS], REAL)
    d_x = tl.zeros([PIXELS], REAL)
    d_m = tl.zeros([PIXELS], REAL)
    for step in range(first_step, last_step):
        run = step // blocks
        begin = (step - run * blocks) * BLOCK
        c_here = begin + lanes < length
        channel = first_channel + run * length + begin + lanes
        group = (first_channel + run * length) // inputs
        u = tl.zeros([PIXELS, BLOCK], REAL)
        for first in range(0, group_outs, OUTS):
            in_group = first + tl.arange(0, OUTS)
            o_here = in_group < group_outs
            o = (group * group_outs + in_group).to(tl.int64)
            at = grad + (n * grad_n + q * grad_q)[:, None] + (o * grad_o)[None, :]
            g = tl.load(at, p_here[:, None] & o_here[None, :], other=0.0)
            at = weight + ((o * taps + k) * inputs)[:, None] + (channel - group * inputs)[None, :]
            w = tl.load(at, o_here[:, None] & c_here[None, :], other=0.0)
            u = _dot(g, w, u, PRECISION, WIDE)
        where = image[:, None] + channel[None, :]
        if (grad_offset is not None) or (grad_mask is not None):
            v00, v01, v10, v11 = _corners(x + where, top, left, reads, c_here, height, width, channels, REAL)
            down = (1.0 - fx)[:, None] * (v10 - v00) + fx[:, None] * (v11 - v01)
            d_y += tl.sum(u * down, 1)
            d_x += tl.sum(u * ((1.0 - fy)[:, None] * (v01 - v00) + fy[:, None] * (v11 - v10)), 1)
            upper = (1.0 - fx)[:, None] * v00 + fx[:, None] * v01
            d_m += tl.sum(u * (upper + fy[:, None] * down), 1)
        um = u * m[:, None]
        if columns is not None:
            at = (k.to(tl.int64) * pixels + q) * ((last_step - first_step) * BLOCK) + (step - first_step) * BLOCK
            tl.store(columns + at[:, None] + lanes[None, :], um, p_here[:, None])
        if grad_x is not None:
            at, here = _corner(grad_x + where, top, left, reads, c_here, height, width, channels)
            tl.atomic_add(at, um * ((1.0 - fy) * (1.0 - fx))[:, None], here, sem="relaxed")
            at, here = _corner(grad_x + where, top, left + 1, reads, c_here, height, width, channels)
            tl.atomic_add(at, um * ((1.0 - fy) * fx)[:, None], here, sem="relaxed")
            at, here = _corner(grad_x + where, top + 1, left, reads, c_here, height, width, channels)
            tl.atomic_add(at, um * (fy * (1.0 - fx))[:, None], here, sem="relaxed")
            at, here = _corner(grad_x + where, top + 1, left + 1, reads, c_here, height, width, channels)
            tl.atomic_add(at, um * (fy * fx)[:, None], here, sem="relaxed")
    where = n * (channels // offset_group * taps * tl.cast(pixels, tl.int64)) + tap_group * pixels + q
    if grad_offset is not None:
        at = (
            grad_offset + where + n * (channels // offset_group * taps * tl.cast(pixels, tl.int64)) + tap_group * pixels
        )
        tl.store(at, (d_y * m).to(grad_offset.dtype.element_ty), p_here)
        tl.store(at + pixels, (d_x * m).to(grad_offset.dtype.element_ty), p_here)
    if grad_mask is not None:
        tl.store(grad_mask + where, d_m.to(grad_mask.dtype.element_ty), p_here)


@triton.jit
def _gather_kernel(
    columns, rows, weights, first, grad_x, steps, blocks, length, channels, first_channel, first_step,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A pixel's gradient from the stored piece of the columns', in the order of its list."""
    item = tl.program_id(0).to(tl.int64)
    pixel = item // steps
    slot = (item - pixel * steps).to(tl.int32)
    step = first_step + slot
    run = step // blocks
    begin = (step - run * blocks) * BLOCK
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], REAL)
    for i in range(tl.load(first + pixel), tl.load(first + pixel + 1)):
        row = tl.load(rows + i) * steps + slot
        total += tl.load(columns + row * BLOCK + lanes) * tl.load(weights + i)
    at = grad_x + pixel * channels + first_channel + run * length + begin + lanes
    tl.store(at, total.to(grad_x.dtype.element_ty), begin + lanes < length)


@triton.jit
def _weight_kernel(
    grad, x, offset, mask, partial, total_pixels, out_tiles, splits, steps, blocks, length,
    channels, height, width, outs, pixels, out_width, inputs, group_outs, offset_group, taps,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_stride, mask_stride, grad_n, grad_o, grad_q,
    KERNEL_WIDTH: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    geometry = (stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    item = tl.program_id(0)
    split = item // (out_tiles * steps)
    item = item - split * (out_tiles * steps)
    out_tile = item % out_tiles
    group_tiles = tl.cdiv(group_outs, OUTS)
    group = out_tile // group_tiles
    in_group = (out_tile - group * group_tiles) * OUTS + tl.arange(0, OUTS)
    o_here = in_group < group_outs
    o = (group * group_outs + in_group).to(tl.int64)
    run, k, begin = _step(item // out_tiles, blocks, taps, length, BLOCK)
    lanes = tl.arange(0, BLOCK)
    c_here = begin + lanes < length
    c = run * length + begin + lanes
    channel = group * inputs + c
    tap_group = ((group * inputs + run * length) // offset_group * taps + k).to(tl.int64)
    total = tl.zeros([OUTS, BLOCK], REAL)
    tiles = tl.cdiv(total_pixels, PIXELS)
    each = tl.cdiv(tiles, splits)
    for tile in range(split * each, tl.minimum((split + 1) * each, tiles)):
        p = tl.cast(tile, tl.int64) * PIXELS + tl.arange(0, PIXELS)
        p_here = p < total_pixels
        n = p // pixels
        q = p - n * pixels
        top, left, fy, fx, reads, m = _place(
            offset, mask, n, q, p_here, tap_group, k, geometry, height, width, pixels, out_width, offset_stride,
            mask_stride, KERNEL_WIDTH, REAL,
        )  # fmt: skip
        image = x + n * (tl.cast(channels, tl.int64) * height * width)
        v00, v01, v10, v11 = _corners(
            image[:, None] + channel[None, :], top, left, reads, c_here, height, width, channels, REAL
        )
        columns = _blend(v00, v01, v10, v11, fy, fx, m).to(x.dtype.element_ty)
        at = grad + (o * grad_o)[:, None] + (n * grad_n + q * grad_q)[None, :]
        g = tl.load(at, o_here[:, None] & p_here[None, :], other=0.0)
        total = _dot(g, columns, total, PRECISION, WIDE)
    at = partial + ((split.to(tl.int64) * outs + o) * taps + k)[:, None] * inputs + c[None, :]
    tl.store(at, total, o_here[:, None] & c_here[None, :])


# ---- launchers ------------------------------------------------------------------------------------------------------


def _on(tensor: Tensor):
    """Makes the tensor's device current: Triton launches on the current stream of the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The type a kernel stores where `dtype` is wanted: the interpreter cuts a bfloat16 off instead of rounding it."""
    return torch.float32 if _INTERPRETED and dtype == torch.bfloat16 else dtype


def _block(size: int, most: int) -> int:
    """A tile's length along `size`: a power of two, at least 16 as tl.dot wants it."""
    return min(max(triton.next_power_of_2(size), 16), most)


def _tiles(dtype: torch.dtype) -> tuple[int, int, int]:
    """Most (pixels, outputs, channels) of a tile."""
    return {torch.float64: (32, 32, 16), torch.float32: (64, 128, 32)}.get(dtype, (64, 256, 64))


class _Call:
    """The numbers that every kernel of a call is given."""

    def __init__(self, input: Tensor, offset: Tensor, weight: Tensor, mask, stride, padding, dilation, tf32: bool):
        batch, self.channels, self.height, self.width = input.shape
        self.outs, self.inputs, *self.kernel = weight.shape
        self.taps = self.kernel[0] * self.kernel[1]
        self.out_height, self.out_width = offset.shape[2:]
        self.pixels = self.out_height * self.out_width
        self.total = batch * self.pixels
        self.offset_groups = offset.shape[1] // (2 * self.taps)
        self.offset_group = self.channels // self.offset_groups
        self.group_outs = self.outs // (self.channels // self.inputs)
        # The longest run of channels that never straddles two weight groups or two offset groups.
        self.length = math.gcd(self.inputs, self.offset_group)
        self.dtype = input.dtype
        self.wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.image_strides = (offset.stride(0), 0 if mask is None else mask.stride(0))
        self.where = (*stride, *padding, *dilation)
        self.most = _tiles(input.dtype)
        self.block = _block(self.length, self.most[2])
        self.blocks = triton.cdiv(self.length, self.block)
        self.constants = dict(
            KERNEL_WIDTH=self.kernel[1], REAL=tl.float64 if self.wide == torch.float64 else tl.float32,
            PRECISION="tf32" if tf32 and self.dtype == torch.float32 else "ieee",
            WIDE=_INTERPRETED and self.dtype == torch.bfloat16, BLOCK=self.block,
            **_OPTIONS,
        )  # fmt: skip

    def sizes(self, *, outs: bool) -> tuple[int, ...]:
        return (
            self.channels, self.height, self.width, *([self.outs] if outs else []), self.pixels, self.out_width,
            self.inputs, self.group_outs, self.offset_group, self.taps, *self.where, *self.image_strides,
        )  # fmt: skip

    def tile(self, pixels: int, outs: int, wide: int) -> dict:
        """Constants of a tile whose sums are `wide` along their second side, and warps enough for them."""
        return dict(PIXELS=pixels, OUTS=outs, num_warps=8 if max(pixels, outs) * wide >= 64 * 32 else 4)

    @property
    def steps(self) -> int:
        """Steps that a weight group's channels and taps are walked in."""
        return self.inputs // self.length * self.taps * self.blocks


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of images, channels and pixels, for a tensor that is dense in either order."""
    return t.stride(0), t.stride(1), t.stride(3) if t.shape[3] > 1 else t.stride(2)


def forward(
    x: Tensor, offset: Tensor, w: Tensor, bias, mask, stride, padding, dilation, order: torch.memory_format, tf32: bool
) -> Tensor:
    """Tensor[N, O, OH, OW] in the given order."""
    shape = (len(x), w.shape[0], *offset.shape[2:])
    out = torch.empty(shape, dtype=_stored(x.dtype), device=x.device, memory_format=order)
    strides = _strides(out)
    call = _Call(x, offset, w, mask, stride, padding, dilation, tf32)
    pixels, outs = _block(call.total, call.most[0]), _block(call.group_outs, call.most[1])
    pixel_tiles = triton.cdiv(call.total, pixels)
    out_tiles = call.channels // call.inputs * triton.cdiv(call.group_outs, outs)
    splits = max(min(_PROGRAMS // (pixel_tiles * out_tiles), call.steps // _LEAST_STEPS), 1)
    partial = x.new_empty((splits, call.total, call.outs), dtype=call.wide) if splits > 1 else None
    with _on(x):
        _forward_kernel[(pixel_tiles * out_tiles * splits,)](
            x, offset, mask, w, bias, out, partial, call.total, pixel_tiles, out_tiles, splits, call.steps,
            call.blocks, call.length, *call.sizes(outs=True), *strides, **call.constants,
            **call.tile(pixels, outs, outs),
        )  # fmt: skip
        if splits > 1:
            _sum_kernel[(triton.cdiv(call.total * call.outs, 256),)](
                partial, bias, out, splits, call.total, call.outs, call.pixels, *strides,
                REAL=call.constants["REAL"], BLOCK=256, **_OPTIONS,
            )  # fmt: skip
    return out.to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, w: Tensor, mask, stride, padding, dilation, needs: tuple[bool, ...],
    tf32: bool, plan: Callable | None, workspace: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of input (in the type of sums), offset, weight (contiguous) and mask, None where not needed.

    Args:
        plan: for an order of sums that is always the same `pyface.ops._deform_conv_gpu.gather_plan`; None: atomics.
        workspace: bytes of columns' gradient to keep at a time with a plan.
    """
    needs_input, needs_offset, needs_weight, needs_mask = needs
    call = _Call(x, offset, w, mask, stride, padding, dilation, tf32)
    like = dict(dtype=_stored(offset.dtype), device=x.device)
    grad_offset = torch.empty(offset.shape, **like) if needs_offset else None
    grad_mask = torch.empty(mask.shape, **like) if needs_mask else None
    grad_input = grad_weight = None
    gathers = needs_input and plan is not None
    with _on(x):
        if needs_input:
            grad_input = torch.zeros_like(x, dtype=call.wide)
        if needs_offset or needs_mask or (needs_input and not gathers):
            steps = call.offset_group // call.length * call.blocks
            _columns(call, grad, x, offset, mask, w, grad_offset, grad_mask, None if gathers else grad_input, None,
                     0, call.offset_groups * call.taps, 0, steps)  # fmt: skip
        if gathers:
            _gather(call, grad, x, offset, mask, w, grad_input, (stride, padding, dilation), plan, workspace)
        if needs_weight:
            grad_weight = _weight(call, grad, x, offset, mask)
    return (
        grad_input,
        None if grad_offset is None else grad_offset.to(offset.dtype),
        None if grad_weight is None else grad_weight.to(w.dtype),
        None if grad_mask is None else grad_mask.to(mask.dtype),
    )


def _columns(
    call, grad, x, offset, mask, w, grad_offset, grad_mask, grad_x, columns, first_tap_group, tap_groups, first, last
) -> None:
    total = len(x) * call.pixels
    pixels, outs = _block(total, call.most[0]), _block(call.group_outs, min(call.most[1], 64))
    _columns_kernel[(triton.cdiv(total, pixels) * tap_groups,)](
        grad, x, offset, mask, w, grad_offset, grad_mask, grad_x, columns, total, first_tap_group, tap_groups,
        first, last, call.blocks, call.length, *call.sizes(outs=False), *_strides(grad),
        **call.constants, **call.tile(pixels, outs, call.block),
    )  # fmt: skip


def _gather(call, grad, x, offset, mask, w, grad_x, geometry, plan, workspace) -> None:
    """The gradient of the input without atomics: image by image, offset group by offset group, channels in pieces."""
    steps = call.offset_group // call.length * call.blocks
    row = call.taps * call.pixels * call.block * grad_x.element_size()  # of one step
    each = min(max(workspace // row, 1), steps)
    columns = grad_x.new_empty(each * row // grad_x.element_size())
    for n in range(len(x)):
        one = slice(n, n + 1)
        tensors = grad[one], x[one], offset[one], None if mask is None else mask[one], w
        for group in range(call.offset_groups):
            of_group = offset[one, 2 * call.taps * group : 2 * call.taps * (group + 1)]
            rows, weights, first = plan(of_group, (call.height, call.width), tuple(call.kernel), *geometry)
            weights = weights.to(call.wide)
            for begin in range(0, steps, each):
                end = min(begin + each, steps)
                _columns(call, *tensors, None, None, None, columns, group * call.taps, call.taps, begin, end)
                _gather_kernel[(call.height * call.width * (end - begin),)](
                    columns, rows, weights, first, grad_x[n], end - begin, call.blocks, call.length, call.channels,
                    group * call.offset_group, begin, REAL=call.constants["REAL"], BLOCK=call.block, **_OPTIONS,
                )  # fmt: skip


def _weight(call, grad, x, offset, mask) -> Tensor:
    pixels, outs = _block(call.total, call.most[0]), _block(call.group_outs, call.most[1] // 2)
    out_tiles = call.channels // call.inputs * triton.cdiv(call.group_outs, outs)
    tiles = triton.cdiv(call.total, pixels)
    splits = max(min(_PROGRAMS // (out_tiles * call.steps), tiles // _LEAST_STEPS), 1)
    partial = x.new_empty((splits, call.outs, *call.kernel, call.inputs), dtype=call.wide)
    _weight_kernel[(out_tiles * call.steps * splits,)](
        grad, x, offset, mask, partial, call.total, out_tiles, splits, call.steps, call.blocks, call.length,
        *call.sizes(outs=True), *_strides(grad), **call.constants, **call.tile(pixels, outs, call.block),
    )  # fmt: skip
    total = partial[0] if splits == 1 else partial.sum(0)  # in torch's fixed order: no atomics
    return total.permute(0, 3, 1, 2).contiguous()
