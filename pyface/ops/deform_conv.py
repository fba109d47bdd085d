"""Op table of core `deform_conv`: deformable convolution, with or without a mask.

Order of this file: argument checks, the paths' implementations, the ops with their gradients, the public function.
Every argument is checked here, once, before any pointer is taken.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from pyface.ops import _paths
from pyface.ops._paths import Core, address, autocast_dtype, chosen_path
from pyface.ops._register import register
from pyface.ops.reference import deform_conv as reference

Pair = tuple[int, int]

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

# ---- checks ---------------------------------------------------------------------------------------------------------


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(
            f"deform_conv2d: {name} must be a whole number >= {least} or a pair (y, x) of them, got {value!r}"
        )
    return pair


def _check(input, offset, weight, bias, mask, stride, padding, dilation) -> None:
    if input.dim() != 4 or any(n < 1 for n in input.shape[1:]):
        raise ValueError(
            f"deform_conv2d: input must be Tensor[N, C, H, W] with C, H and W >= 1, got shape {tuple(input.shape)}"
        )
    if weight.dim() != 4 or any(n < 1 for n in weight.shape):
        raise ValueError(
            "deform_conv2d: weight must be Tensor[O, C/groups, kernel height, kernel width], none of them 0; got shape "
            f"{tuple(weight.shape)}"
        )
    batch, channels, height, width = input.shape
    outs, inputs, kernel_height, kernel_width = weight.shape
    if channels % inputs or outs % (channels // inputs):
        raise ValueError(
            f"deform_conv2d: weight {tuple(weight.shape)} does not fit the input's {channels} channels: its second "
            "size must divide them, and the number of groups so found must divide its first size"
        )
    taps = kernel_height * kernel_width
    size = reference.output_size((height, width), (kernel_height, kernel_width), stride, padding, dilation)
    if any(n < 1 for n in size):
        raise ValueError(
            f"deform_conv2d: the kernel {kernel_height} x {kernel_width}, dilation {tuple(dilation)}, is larger than "
            f"the padded input, {height + 2 * padding[0]} x {width + 2 * padding[1]}"
        )
    groups = offset.shape[1] // (2 * taps) if offset.dim() == 4 else 0
    if groups < 1 or offset.shape != (batch, 2 * groups * taps, *size) or channels % groups:
        raise ValueError(
            f"deform_conv2d: offset must be Tensor[{batch}, 2 * G * {taps}, {size[0]}, {size[1]}] (batch, offset "
            f"groups G times {kernel_height} x {kernel_width} taps, output size) with G a divisor of the input's "
            f"{channels} channels; got shape {tuple(offset.shape)}"
        )
    if mask is not None and mask.shape != (batch, groups * taps, *size):
        raise ValueError(
            f"deform_conv2d: mask must be Tensor[{batch}, {groups * taps}, {size[0]}, {size[1]}], half the channels of "
            f"offset; got shape {tuple(mask.shape)}"
        )
    if bias is not None and bias.shape != (outs,):
        raise ValueError(f"deform_conv2d: bias must be Tensor[{outs}], got shape {tuple(bias.shape)}")
    if height * width >= 2**31 - 1:
        raise ValueError(f"deform_conv2d: an image may have 2^31 - 2 pixels, got {height} x {width}")
    named = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    given = {name: t for name, t in named.items() if t is not None}
    for name, t in given.items():
        if t.device != input.device:
            raise ValueError(
                f"deform_conv2d: all tensors must be on the device of input, {input.device}; {name} is on {t.device}"
            )
        if not t.is_floating_point():
            raise TypeError(f"deform_conv2d: {name} must be of a floating-point type, got {t.dtype}")
    for name in ("weight", "bias"):
        if name in given and given[name].dtype != input.dtype:
            raise TypeError(
                f"deform_conv2d: weight and bias must be of the type of input, {input.dtype}; {name} is "
                f"{given[name].dtype}"
            )
    if offset.dtype not in _offset_dtypes(input) or (mask is not None and mask.dtype != offset.dtype):
        raise TypeError(
            f"deform_conv2d: for an input of {input.dtype} offset and mask must both be "
            f"{' or '.join(map(str, _offset_dtypes(input)))}, got {offset.dtype}"
            f"{'' if mask is None else f' and {mask.dtype}'}"
        )


def _offset_dtypes(input: Tensor) -> list[torch.dtype]:
    """What the op itself takes; the public function converts."""
    return list(dict.fromkeys((input.dtype, torch.promote_types(input.dtype, torch.float32))))


def _check_backward(grad, input, offset, weight, mask, stride, padding, dilation) -> None:
    _check(input, offset, weight, None, mask, stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    if grad.shape != shape or grad.dtype != input.dtype or grad.device != input.device:
        raise ValueError(
            f"deform_conv2d_backward: grad must be {shape}, {input.dtype} on {input.device}, got {tuple(grad.shape)}, "
            f"{grad.dtype} on {grad.device}"
        )


def _order(x: Tensor) -> torch.memory_format:
    """The order of results: channels_last where x has it, else contiguous."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _empty(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_order(input))


# ---- paths ----------------------------------------------------------------------------------------------------------
# Each implementation has forward and backward on checked tensors that are not empty.


def _reference() -> object:
    def forward(input, offset, weight, bias, mask, stride, padding, dilation):
        out = reference.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
        return out.contiguous(memory_format=_order(input))

    def backward(grad, input, offset, weight, mask, stride, padding, dilation, needs):
        found = reference.backward(
            *(_widened(t, input) for t in (grad, input, offset, weight, mask)), stride, padding, dilation
        )
        return tuple(
            g.to(t.dtype).contiguous(memory_format=_order(t) if t is input else torch.contiguous_format)
            if need
            else None
            for g, t, need in zip(found, (input, offset, weight, mask), needs, strict=True)
        )

    return SimpleNamespace(forward=forward, backward=backward)


def _widened(t: Tensor | None, input: Tensor) -> Tensor | None:
    return None if t is None else t.to(torch.promote_types(input.dtype, torch.float32))


class _Cpu:
    """The core of the compiled module: allocates results, hands over addresses."""

    def __init__(self, module):
        self.module = module

    def forward(self, input, offset, weight, bias, mask, stride, padding, dilation):
        out = _empty(input, offset, weight)
        offset, mask, weight = _dense(offset), _dense(mask), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        self.module.deform_conv(
            *_sizes(input, offset, weight, stride, padding, dilation), input.data_ptr(), input.stride(),
            offset.data_ptr(), offset.stride(0), address(mask), 0 if mask is None else mask.stride(0),
            weight.data_ptr(), address(bias), out.data_ptr(), not out.is_contiguous(),
            _DTYPE_CODES[input.dtype], _DTYPE_CODES[offset.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def backward(self, grad, input, offset, weight, mask, stride, padding, dilation, needs):
        dense = torch.contiguous_format
        grads = [
            torch.empty_like(t, memory_format=_order(t) if t is input else dense) if need else None
            for t, need in zip((input, offset, weight, mask), needs, strict=True)
        ]
        grad_input, grad_offset, grad_weight, grad_mask = grads
        grad, offset, mask, weight = grad.contiguous(), _dense(offset), _dense(mask), weight.contiguous()
        self.module.deform_conv_backward(
            *_sizes(input, offset, weight, stride, padding, dilation), grad.data_ptr(), input.data_ptr(),
            input.stride(), offset.data_ptr(), offset.stride(0), address(mask), 0 if mask is None else mask.stride(0),
            weight.data_ptr(), address(grad_input), grad_input is not None and not grad_input.is_contiguous(),
            address(grad_offset), address(grad_mask), address(grad_weight),
            _DTYPE_CODES[input.dtype], _DTYPE_CODES[offset.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return tuple(grads)


def _dense(t: Tensor | None) -> Tensor | None:
    """The tensor with each sample dense: half of a packed prediction is taken as it lies."""
    return t if t is None or t.is_contiguous() or t[:1].is_contiguous() else t.contiguous()


def _sizes(input, offset, weight, stride, padding, dilation):
    outs, inputs, *kernel = weight.shape
    groups = offset.shape[1] // (2 * kernel[0] * kernel[1])
    sizes = (*input.shape, outs, *offset.shape[2:], input.shape[1] // inputs, groups)
    return sizes, (*kernel, *stride, *padding, *dilation)


def _load_cuda() -> object:
    from pyface.ops._deform_conv_gpu import Cuda

    return Cuda(_paths.loaded("_cuda"))


def _load_triton() -> object:
    from pyface.kernels import deform_conv
    from pyface.ops._deform_conv_gpu import Triton

    return Triton(deform_conv)


_GPU_PAIRS = {(d, d) for d in (*_DTYPE_CODES, torch.float16)} | {
    (d, torch.float32) for d in (torch.bfloat16, torch.float16)
}

CORE = Core(
    "deform_conv",
    # (input, offset)
    dtypes={
        "cpu": {(d, d) for d in _DTYPE_CODES} | {(torch.bfloat16, torch.float32)},
        "cuda": _GPU_PAIRS,
        "triton": _GPU_PAIRS,
    },
    load={
        "cpu": lambda: _Cpu(_paths.loaded("_cpu")),
        "cuda": _load_cuda,
        "triton": _load_triton,
        "reference": _reference,
    },
)

# ---- the ops --------------------------------------------------------------------------------------------------------


def _launch(input, offset, weight, bias, mask, stride, padding, dilation, path):
    implementation = CORE.pick(input.device.type, (input.dtype, offset.dtype), path)
    if not len(input):
        return _empty(input, offset, weight)
    return implementation.forward(input, offset, weight, bias, mask, stride, padding, dilation)


def _forward(input, offset, weight, bias, mask, stride, padding, dilation, path):
    _check(input, offset, weight, bias, mask, stride, padding, dilation)
    return _launch(input, offset, weight, bias, mask, stride, padding, dilation, path)


def _forward_fake(input, offset, weight, bias, mask, stride, padding, dilation, path):
    _check(input, offset, weight, bias, mask, stride, padding, dilation)
    return _empty(input, offset, weight)


def _backward(
    grad, input, offset, weight, mask, stride, padding, dilation,
    needs_input, needs_offset, needs_weight, needs_mask, path,
):  # fmt: skip
    _check_backward(grad, input, offset, weight, mask, stride, padding, dilation)
    needs = needs_input, needs_offset, needs_weight, needs_mask and mask is not None
    implementation = CORE.pick(input.device.type, (input.dtype, offset.dtype), path)
    if not len(input) or not any(needs):
        return tuple(
            torch.zeros_like(t, memory_format=_order(t) if t is input else torch.contiguous_format) if need else None
            for t, need in zip((input, offset, weight, mask), needs, strict=True)
        )
    return implementation.backward(grad, input, offset, weight, mask, stride, padding, dilation, needs)


def _backward_fake(
    grad, input, offset, weight, mask, stride, padding, dilation,
    needs_input, needs_offset, needs_weight, needs_mask, path,
):  # fmt: skip
    _check_backward(grad, input, offset, weight, mask, stride, padding, dilation)
    needs = needs_input, needs_offset, needs_weight, needs_mask and mask is not None
    return tuple(
        torch.empty_like(t, memory_format=_order(t) if t is input else torch.contiguous_format)
        if need
        else grad.new_empty(0)
        for t, need in zip((input, offset, weight, mask), needs, strict=True)
    )


def _setup(ctx, inputs, output):
    input, offset, weight, bias, mask, ctx.stride, ctx.padding, ctx.dilation, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, offset, weight, mask)


def _grads(ctx, grad):
    if grad is None:
        return (None,) * 9
    input, offset, weight, mask = ctx.saved_tensors
    needs_input, needs_offset, needs_weight, needs_bias, needs_mask = ctx.needs_input_grad[:5]
    found = (None,) * 4
    if needs_input or needs_offset or needs_weight or needs_mask:
        found = _deform_conv2d_backward(
            grad, input, offset, weight, mask, ctx.stride, ctx.padding, ctx.dilation,
            needs_input, needs_offset, needs_weight, needs_mask, ctx.path,
        )  # fmt: skip
    needs = needs_input, needs_offset, needs_weight, needs_mask
    grad_input, grad_offset, grad_weight, grad_mask = (
        g if need else None for g, need in zip(found, needs, strict=True)
    )
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask, None, None, None, None


def _jvp(ctx, d_input, d_offset, d_weight, d_bias, d_mask, *_):
    """The tangent in plain PyTorch: correct, and several times slower than the op."""
    input, offset, weight, mask = ctx.saved_tensors
    if not len(input):
        return _empty(input, offset, weight)
    tensors = (input, offset, weight, mask, d_input, d_offset, d_weight, d_mask)
    out = reference.tangent(*(_widened(t, input) for t in tensors), ctx.stride, ctx.padding, ctx.dilation)
    if d_bias is not None:
        out = out + _widened(d_bias, input).view(-1, 1, 1)
    return out.to(input.dtype).contiguous(memory_format=_order(input))


def _backward_setup(ctx, inputs, output):
    grad, input, offset, weight, mask, ctx.stride, ctx.padding, ctx.dilation, *ctx.needs, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, input, offset, weight, mask)


def _second_order(ctx, *cotangents):
    """Gradients of the gradients in plain, again differentiable, PyTorch: correct, and several times slower."""
    saved = ctx.saved_tensors
    input = saved[1]
    if not len(input):
        return (*(None if t is None else torch.zeros_like(t) for t in saved), *[None] * 8)
    given = (need and t is not None for need, t in zip(ctx.needs, saved[1:], strict=True))
    wanted = [_widened(v, input) if need else None for v, need in zip(cotangents, given, strict=True)]
    found = reference.second_order(*(_widened(t, input) for t in saved), *wanted, ctx.stride, ctx.padding, ctx.dilation)
    return (*(None if g is None else g.to(t.dtype) for g, t in zip(found, saved, strict=True)), *[None] * 8)


# ---- vmap: many calls are one call with more images or, where each has weights of its own, with more groups ---------


def _fold(size: int, t: Tensor | None, dim: int | None, axis: int) -> Tensor | None:
    """The mapped dimension (expanded where absent) folded into dimension `axis` of what it maps."""
    if t is None:
        return None
    t = t.movedim(dim, axis) if dim is not None else t.unsqueeze(axis).expand(*t.shape[:axis], size, *t.shape[axis:])
    return t.flatten(axis, axis + 1)


def _vmap(op, info, in_dims, input, offset, weight, bias, mask, *options):
    size = info.batch_size
    axis = 0 if in_dims[2] is None and in_dims[3] is None else 1
    if axis:
        weight, bias = _fold(size, weight, in_dims[2], 0), _fold(size, bias, in_dims[3], 0)
    images = (_fold(size, t, dim, axis) for t, dim in ((input, in_dims[0]), (offset, in_dims[1])))
    out = op(*images, weight, bias, _fold(size, mask, in_dims[4], axis), *options)
    return out.unflatten(axis, (size, out.shape[axis] // size)), axis


def _backward_vmap(op, info, in_dims, grad, input, offset, weight, mask, *options):
    size = info.batch_size
    grad, input, offset, mask = (
        _fold(size, t, dim, 1)
        for t, dim in ((grad, in_dims[0]), (input, in_dims[1]), (offset, in_dims[2]), (mask, in_dims[4]))
    )
    found = op(grad, input, offset, _fold(size, weight, in_dims[3], 0), mask, *options)
    axes = tuple(0 if which == 2 or t.dim() == 1 else 1 for which, t in enumerate(found))
    return tuple(
        t.unflatten(axis, (size, t.shape[axis] // size)) if t.dim() > 1 else t.new_empty(size, 0)
        for t, axis in zip(found, axes, strict=True)
    ), axes


_deform_conv2d_backward = register(
    "deform_conv2d_backward",
    "(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int[2] stride, int[2] padding, "
    "int[2] dilation, bool needs_input, bool needs_offset, bool needs_weight, bool needs_mask, str? path) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    5,
    _backward,
    _backward_fake,
    setup_context=_backward_setup,
    backward=_second_order,
    vmap=_backward_vmap,
)

_deform_conv2d = register(
    "deform_conv2d",
    "(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, int[2] stride, int[2] padding, "
    "int[2] dilation, str? path) -> Tensor",
    5,
    _forward,
    _forward_fake,
    launch=_launch,
    setup_context=_setup,
    backward=_grads,
    jvp=_jvp,
    vmap=_vmap,
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = (1, 1),
    padding: int | Pair = (0, 0),
    dilation: int | Pair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, version 1 (arXiv:1703.06211) and, with a mask, version 2 (arXiv:1811.11168).

    A convolution whose K = kh kw taps are read at positions moved by `offset`, between pixels by bilinear
    interpolation, and multiplied by `mask`. Signature and contract are those of `torchvision.ops.deform_conv2d`::

        y = oy * stride_y - padding_y + i * dilation_y + offset[n, 2 * (G * K + k),     oy, ox]
        x = ox * stride_x - padding_x + j * dilation_x + offset[n, 2 * (G * K + k) + 1, oy, ox]
        out[n, o, oy, ox] = bias[o] + sum_{c, k} weight[o, c, k] * mask[n, G * K + k, oy, ox] * input[n, c, y, x]

    with the tap k = i * kw + j and G the offset group of channel c.

    Args:
        input: Tensor[N, C, H, W].
        offset: Tensor[N, 2 * G * K, OH, OW] in pixels, y before x, G offset groups (a divisor of C); OH and OW are
            those of a convolution. A pixel outside the image counts as 0, so the input fades out over one pixel around
            it.
        weight: Tensor[O, C / g, kh, kw]; g is inferred.
        bias: Tensor[O].
        stride, padding, dilation: whole numbers or pairs (y, x).
        mask: Tensor[N, G * K, OH, OW], multiplied as it is (no sigmoid); None: all ones.

    Returns:
        Tensor[N, O, OH, OW] of the dtype of input, channels_last where input is, else contiguous. An empty batch gives
        an empty result.

    Dtypes: input, weight and bias of one floating-point type; offset and mask may be of another and are converted to
        that of input, but beside bfloat16 and float16 they may stay float32 (positions in bfloat16 are coarse).
        Positions, interpolation and sums are float32 at least; in bfloat16 the interpolated values are rounded once,
        before the products. The path `cpu` takes float32, float64 and bfloat16; a CPU without AVX512-BF16 makes the
        same roundings at the speed of float32. Under autocast input, weight and bias take its type, as in a
        convolution. The paths `triton` and `cuda` take float16 too; they multiply float32 in TF32 only where
        `torch.backends.cuda.matmul` allows it.

    Gradients: of every argument, to second order; forward mode; vmap. Only those asked for are computed. At a whole
        position the derivative is that from below and from the right, as in torchvision. Second order and forward mode
        run in plain PyTorch: correct, but several times slower, and with columns in memory.
    Deterministic: on the path `cpu` results and gradients do not depend on the number of threads, bit for bit. On GPUs
        everything but the gradient of the input always has the same bits; that too under
        `torch.use_deterministic_algorithms(True)`.
    Non-finite values: an offset that is NaN or infinite reads nothing and has a zero gradient. A NaN pixel reaches the
        outputs that interpolate it, with weight 0 at whole positions too.

    Memory of the path `cpu`, beside arguments and results. Forward: per thread 0.4 MB, 14 KB for each 32 outputs, up to
        4 MB of packed weights and 1 MB of copied images (but at least one image; none if the input is channels_last
        with channels in multiples of 16). Backward: per thread 32 channels of an image and of its gradient, the weights
        of these twice, and 0.5 MB; up to 4 MB of sums for offset and mask, or 8 times their gradients for one image
        where that is more; for several images the weight gradient, in up to 8 copies if channels are few.

    Raises:
        ValueError: shapes that do not fit together, several devices. TypeError: dtypes that do not.
        pyface.PathError: the explicitly chosen path cannot serve the call.
    """
    stride, padding = _pair("stride", stride, 1), _pair("padding", padding, 0)
    dilation = _pair("dilation", dilation, 1)
    low = autocast_dtype(input.device.type)
    if low is not None:
        input, weight, bias = (
            t.to(low) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (input, weight, bias)
        )
    if offset.dtype != input.dtype or (mask is not None and mask.dtype != input.dtype):
        offset, mask = _converted(input, offset, mask)
    _check(input, offset, weight, bias, mask, stride, padding, dilation)
    return _deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation, chosen_path())


def _converted(input: Tensor, offset: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Offset and mask in the type in which the op takes them; what is no floating-point type is left to the checks."""
    tensors = [offset] if mask is None else [offset, mask]
    if not all(t.is_floating_point() for t in (input, *tensors)):
        return offset, mask
    low = all(t.dtype == input.dtype for t in tensors)
    dtype = input.dtype if low else torch.promote_types(input.dtype, torch.float32)
    return offset.to(dtype), None if mask is None else mask.to(dtype)
