"""The two GPU paths of core `deform_conv`: layouts, and the launcher of the CUDA one.

Inside, images are channels_last and weights [O, kh, kw, C/g]: what torch calls channels_last as well, so a model
converted by `.to(memory_format=torch.channels_last)` is taken as it lies; anything else is copied once a call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyface.ops._paths import address
from pyface.ops.reference import deform_conv as reference

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WORKSPACE = 2**26  # bytes of columns' gradients that the deterministic backward keeps at a time


def tf32_allowed() -> bool:
    """Whether torch would multiply float32 matrices on this process' GPUs in TF32: never by default."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9 and later; reading both would mix the two ways
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def dense(t: Tensor | None) -> Tensor | None:
    """The tensor with each sample dense: half of a packed prediction is taken as it lies."""
    return t if t is None or t.is_contiguous() or t[:1].is_contiguous() else t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    """Strictly: torch counts [N, C, 1, 1] as channels_last with any strides of the dimensions of size 1."""
    return t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_plan(
    offset: Tensor, size: tuple[int, int], kernel: tuple[int, int], stride, padding, dilation
) -> tuple[Tensor, Tensor, Tensor]:
    """The sampling of one image by one offset group turned round: which columns a pixel of the input went into.

    Args:
        offset: Tensor[1, 2 K, OH, OW].
        size: of the image, H and W.

    Returns:
        rows int64[4 K OH OW], into columns [K, OH OW], ordered by the pixel they read and then by corner, tap and
        output pixel; the weights with which they read it; first int64[H W + 1], where in the two the list of a pixel
        begins. Entries that read nothing come last and belong to no pixel.
    """
    points = reference.sample_points(offset.to(wide(offset.dtype)), size, kernel, stride, padding, dilation)
    pixels = size[0] * size[1]
    target = torch.stack([i.where(inside, pixels) for i, inside in zip(points.index, points.inside, strict=True)])
    target, order = torch.sort(target.flatten(), stable=True)
    weights = torch.stack(reference.bilinear(points)).flatten()[order]
    first = torch.searchsorted(target, torch.arange(pixels + 1, device=offset.device))
    return order % points.fy.numel(), weights, first


def order(t: Tensor) -> torch.memory_format:
    last = not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def strided(t: Tensor) -> Tensor:
    """The tensor, dense in either order."""
    return t if order(t) is torch.channels_last else t.contiguous()


def like(sums: Tensor | None, t: Tensor) -> Tensor | None:
    """Sums in the type and the order of t."""
    return None if sums is None else sums.to(t.dtype).contiguous(memory_format=order(t))


def out_strides(t: Tensor) -> tuple[int, int, int]:
    """Of images, channels and pixels, for a tensor that is dense in either order."""
    return t.stride(0), t.stride(1), t.stride(3) if t.shape[3] > 1 else t.stride(2)


class Triton:
    """The kernels of `pyface.kernels.deform_conv`."""

    def __init__(self, module):
        self.module = module

    def forward(self, input, offset, weight, bias, mask, stride, padding, dilation):
        return self.module.forward(
            channels_last(input), dense(offset), channels_last(weight), bias, dense(mask), stride, padding, dilation,
            order(input), tf32_allowed(),
        )  # fmt: skip

    def backward(self, grad, input, offset, weight, mask, stride, padding, dilation, needs):
        grad_input, *others = self.module.backward(
            strided(grad), channels_last(input), dense(offset), channels_last(weight), dense(mask), stride, padding,
            dilation, needs, tf32_allowed(),
            gather_plan if torch.are_deterministic_algorithms_enabled() else None, WORKSPACE,
        )  # fmt: skip
        return like(grad_input, input), *others


class Cuda:
    """The core of the compiled module `pyface._cuda`: allocates results, hands over addresses."""

    def __init__(self, module):
        self.module = module

    pointer = staticmethod(address)

    def where(self, x: Tensor) -> tuple[int, int]:
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream

    def forward(self, input, offset, weight, bias, mask, stride, padding, dilation):
        shape = (len(input), weight.shape[0], *offset.shape[2:])
        out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=order(input))
        call = _CudaCall(self.pointer, input, offset, weight, mask, stride, padding, dilation)
        splits = self.module.deform_conv_splits(*call.numbers, call.type)
        scratch = call.x.new_empty((splits, out.numel()) if splits > 1 else 0, dtype=wide(input.dtype))
        bias = None if bias is None else bias.contiguous()
        self.module.deform_conv_forward(
            *call.arguments, self.pointer(bias), self.pointer(out), out_strides(out), self.pointer(scratch),
            *self.where(input),
        )  # fmt: skip
        return out

    def backward(self, grad, input, offset, weight, mask, stride, padding, dilation, needs):
        needs_input, needs_offset, needs_weight, needs_mask = needs
        grad = strided(grad)
        call = _CudaCall(self.pointer, input, offset, weight, mask, stride, padding, dilation)
        grad_offset = torch.empty_like(call.offset, memory_format=torch.contiguous_format) if needs_offset else None
        grad_mask = torch.empty_like(call.mask, memory_format=torch.contiguous_format) if needs_mask else None
        sums = torch.zeros_like(call.x, dtype=wide(input.dtype)) if needs_input else None
        gathers = needs_input and torch.are_deterministic_algorithms_enabled()
        if needs_offset or needs_mask or (needs_input and not gathers):
            taps = offset.shape[1] // 2
            steps = self.module.deform_conv_steps(*call.numbers)
            self.module.deform_conv_columns(
                *call.arguments, self.pointer(grad), out_strides(grad), self.pointer(grad_offset),
                self.pointer(grad_mask), self.pointer(None if gathers else sums), self.pointer(None), 0, taps, 0,
                steps, *self.where(input),
            )  # fmt: skip
        if gathers:
            self.gather(grad, call, weight, stride, padding, dilation, sums)
        grad_weight = None
        if needs_weight:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            splits = self.module.deform_conv_weight_splits(*call.numbers, call.type)
            scratch = call.x.new_empty((splits, weight.numel()), dtype=wide(input.dtype))
            self.module.deform_conv_weight(
                *call.arguments, self.pointer(grad), out_strides(grad), self.pointer(grad_weight),
                self.pointer(scratch), *self.where(input),
            )  # fmt: skip
        return like(sums, input), grad_offset, grad_weight, grad_mask

    def gather(self, grad, whole, weight, stride, padding, dilation, sums):
        """The gradient of the input without atomics: by image, by offset group, channels in pieces."""
        taps, size = weight.shape[2] * weight.shape[3], tuple(sums.shape[2:])
        groups = whole.offset.shape[1] // (2 * taps)
        steps = self.module.deform_conv_steps(*whole.numbers)
        row = taps * math.prod(grad.shape[2:]) * 64 * sums.element_size()  # of one step
        each = min(max(WORKSPACE // row, 1), steps)
        columns = sums.new_empty(each * row // sums.element_size())
        for n in range(len(grad)):
            one = slice(n, n + 1)
            offset, mask = whole.offset[one], None if whole.mask is None else whole.mask[one]
            call = _CudaCall(self.pointer, whole.x[one], offset, whole.weight, mask, stride, padding, dilation)
            for group in range(groups):
                of_group = offset[:, 2 * taps * group : 2 * taps * (group + 1)]
                rows, weights, first = gather_plan(of_group, size, tuple(weight.shape[2:]), stride, padding, dilation)
                weights = weights.to(sums.dtype)
                for begin in range(0, steps, each):
                    end = min(begin + each, steps)
                    self.module.deform_conv_columns(
                        *call.arguments, self.pointer(grad[one]), out_strides(grad), *[self.pointer(None)] * 3,
                        self.pointer(columns), group * taps, taps, begin, end, *self.where(grad),
                    )  # fmt: skip
                    self.module.deform_conv_gather(
                        *call.numbers, call.type, self.pointer(columns), self.pointer(rows), self.pointer(weights),
                        self.pointer(first), self.pointer(sums[n]), group, begin, end, *self.where(grad),
                    )  # fmt: skip


class _CudaCall:
    """Arguments of a call in the layouts that the kernels take; holds the copies while they are queued."""

    def __init__(self, pointer, input, offset, weight, mask, stride, padding, dilation):
        self.x, self.weight = channels_last(input), channels_last(weight)
        self.offset, self.mask = dense(offset), dense(mask)
        outs, inputs, *kernel = weight.shape
        groups = offset.shape[1] // (2 * kernel[0] * kernel[1])
        sizes = (*input.shape, outs, *offset.shape[2:], input.shape[1] // inputs, groups)
        self.numbers = sizes, (*kernel, *stride, *padding, *dilation)
        self.type = DTYPE_CODES[input.dtype]
        self.arguments = (
            *self.numbers, pointer(self.x), pointer(self.offset), self.offset.stride(0), pointer(self.mask),
            0 if mask is None else self.mask.stride(0), pointer(self.weight), self.type, DTYPE_CODES[offset.dtype],
            input.dtype == torch.float32 and tf32_allowed(),
        )  # fmt: skip
