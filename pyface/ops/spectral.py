"""Op table of core `spectral`: high-pass, masking of high frequencies, and gains on the half spectrum.

Order of this file: argument checks, the paths' implementations, the ops with their gradients, the public functions.
Every argument is checked here, once, before any pointer is taken.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pyface.ops import _paths
from pyface.ops._paths import Core, chosen_path
from pyface.ops._register import register
from pyface.ops.reference import spectral as reference

Pair = tuple[int, int]

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# ---- checks ---------------------------------------------------------------------------------------------------------


def _pair(name: str, value: int | Pair) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(d, int) and d >= 0 for d in pair):
        raise ValueError(f"{name}: half_width must be a whole number >= 0 or a pair (y, x) of them, got {value!r}")
    return pair


def _check(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPE_CODES:
        raise TypeError(f"{name}: x must be a real floating-point tensor, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name}: x must be Tensor[..., H, W], got shape {tuple(x.shape)}")
    if x.shape[-2] * x.shape[-1] >= 2**31:
        raise ValueError(f"{name}: an image may have 2^31 - 1 pixels, got {x.shape[-2]} x {x.shape[-1]}")


def _check_like(name: str, what: str, t: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if t.shape != x.shape or t.dtype != dtype or t.device != x.device:
        raise ValueError(
            f"{name}: {what} must be {tuple(x.shape)}, {dtype} on {x.device}, got {tuple(t.shape)}, {t.dtype} on "
            f"{t.device}"
        )


def _check_keep(name: str, x: Tensor, keep: Tensor) -> None:
    if keep.is_complex():
        raise TypeError(f"{name}: keep must be bool or a real number, got {keep.dtype}")
    if keep.device != x.device:
        raise ValueError(f"{name}: keep must be on the device of x, {x.device}, got {keep.device}")
    fits = keep.dim() <= x.dim() and all(k in (1, n) for k, n in zip(reversed(keep.shape), reversed(x.shape)))
    if not fits:
        raise ValueError(
            f"{name}: keep must have the shape of x or broadcast to it; x is {tuple(x.shape)}, keep {tuple(keep.shape)}"
        )


def _check_gain(name: str, x: Tensor, gain: Tensor) -> None:
    if not gain.is_floating_point():
        raise TypeError(f"{name}: gain must be a real floating-point tensor, got {gain.dtype}")
    if gain.device != x.device:
        raise ValueError(f"{name}: gain must be on the device of x, {x.device}, got {gain.device}")
    shape = (*x.shape[:-1], x.shape[-1] // 2 + 1)
    fits = 2 <= gain.dim() <= x.dim() and gain.shape[-2:] == shape[-2:]
    if not (fits and all(k in (1, n) for k, n in zip(reversed(gain.shape[:-2]), reversed(shape[:-2])))):
        raise ValueError(
            f"{name}: gain must be {tuple(shape)} (the half spectrum of x, W // 2 + 1 columns) or broadcast to it in "
            f"the leading dimensions, got {tuple(gain.shape)}"
        )


# ---- paths ----------------------------------------------------------------------------------------------------------
# Each implementation has high_pass, mask_high_frequencies (also returns the sign of the high frequencies where asked
# to) and mask_high_frequencies_backward, on checked tensors that are not empty. Gains go through torch.fft everywhere.


def _order(x: Tensor) -> torch.memory_format:
    """The order of results: channels_last where x has it, else contiguous."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=_order(x))


class _Reference:
    @staticmethod
    def high_pass(x, half_width, symmetric, out=None):
        return _into(out, x, reference.high_pass(x, half_width, symmetric))

    @staticmethod
    def mask_high_frequencies(x, keep, half_width, symmetric, with_sign, out=None):
        y, sign = reference.mask_high_frequencies(x, keep, half_width, symmetric)
        return _into(out, x, y), sign.contiguous(memory_format=_order(x)) if with_sign else None

    @staticmethod
    def mask_high_frequencies_backward(grad, sign, keep, half_width, symmetric):
        return _into(None, grad, reference.mask_high_frequencies_backward(grad, sign, keep, half_width, symmetric))


def _into(out: Tensor | None, x: Tensor, result: Tensor) -> Tensor:
    return result.contiguous(memory_format=_order(x)) if out is None else out.copy_(result)


@functools.lru_cache(256)
def _axis(size: int, half_width: int, symmetric: bool) -> tuple[Tensor, bool]:
    """(U, edge): float64[size, 1 + 2 harmonics] with U U^T the real part of the filter that keeps the block, and
    whether its last harmonic has no mirror image. Columns: 1 / sqrt(size), then cosine and sine of each harmonic."""
    full = 2 * half_width + symmetric > size - 1 + symmetric  # the block holds all frequencies
    edge = not symmetric and half_width > 0 and not full
    if not symmetric and half_width == 0:
        return torch.empty(size, 0, dtype=torch.float64), False
    harmonics = min(half_width, size // 2)
    k = torch.arange(1, harmonics + 1)
    turns = torch.outer(torch.arange(size), k) % size  # whole numbers: an angle of 4096 turns would lose 1e-5
    angle = turns.double() * (2 * math.pi / size)
    scale = torch.full((harmonics,), 2.0 / size, dtype=torch.float64)
    if harmonics and (edge or 2 * harmonics == size):
        scale[-1] = 1.0 / size
    waves = torch.stack((angle.cos(), angle.sin()), -1) * scale.sqrt()[:, None]
    waves[:, -1:, 1] *= 2 * harmonics != size  # the sine of half the size is 0 everywhere
    mean = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    return torch.cat((mean, waves.flatten(1)), 1), edge


@functools.lru_cache(256)
def _tables(size: Pair, half_width: Pair, symmetric: bool, dtype: torch.dtype, device: torch.device) -> tuple | None:
    """The factors as the compiled core takes them, and what it is told of them; see pyface/spectral.h."""
    (rows, row_edge), (columns, column_edge) = (_axis(n, d, symmetric) for n, d in zip(size, half_width, strict=True))
    if not rows.numel() or not columns.numel():
        return None
    rank, width = columns.shape[1], columns.shape[0]
    upper = rows[: size[0] // 2 + 1].to(device, dtype).contiguous()
    padded = _padded(columns, -(-rank // 16) * 16).to(device, dtype)
    turned = _padded(columns.T, -(-width // 16) * 16).to(device, dtype)
    told = (
        (upper.data_ptr(), rows.shape[1], rows.shape[1]), (padded.data_ptr(), rank, padded.shape[1]),
        turned.data_ptr(), row_edge and column_edge,
    )  # fmt: skip
    return told, (upper, padded, turned)


def _padded(table: Tensor, columns: int) -> Tensor:
    wider = table.new_zeros(table.shape[0], columns)
    wider[:, : table.shape[1]] = table
    return wider


def _merged(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[list[int], list[list[int]]] | None:
    """Leading dimensions and their strides in several tensors as at most two, or None: (sizes, strides of each)."""
    sizes, merged = [], [[] for _ in strides]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        step = [s[axis] for s in strides]
        if sizes and all(m[-1] == s * size for m, s in zip(merged, step)):
            sizes[-1] *= size
            for m, s in zip(merged, step):
                m[-1] = s
        else:
            sizes.append(size)
            for m, s in zip(merged, step):
                m.append(s)
    if len(sizes) > 2:
        return None
    pad = 2 - len(sizes)
    return [1] * pad + sizes, [[0] * pad + m for m in merged]


class _Cpu:
    """The spectral core of the compiled module: cuts tensors into planes, hands over addresses."""

    def __init__(self, module):
        self.module = module

    def high_pass(self, x, half_width, symmetric, out=None):
        if _transform_is_faster(tuple(x.shape[-2:]), tuple(half_width)):
            return _Reference.high_pass(x, half_width, symmetric, out)
        return self.run(0, x, None, None, half_width, symmetric, out)

    def mask_high_frequencies(self, x, keep, half_width, symmetric, with_sign, out=None):
        if _transform_is_faster(tuple(x.shape[-2:]), tuple(half_width)):
            return _Reference.mask_high_frequencies(x, keep, half_width, symmetric, with_sign, out)
        sign = _empty(x, torch.int8) if with_sign else None
        return self.run(1, x, keep, sign, half_width, symmetric, out), sign

    def mask_high_frequencies_backward(self, grad, sign, keep, half_width, symmetric):
        if _transform_is_faster(tuple(grad.shape[-2:]), tuple(half_width)):
            return _Reference.mask_high_frequencies_backward(grad, sign, keep, half_width, symmetric)
        return self.run(2, grad, keep, sign.contiguous(memory_format=_order(grad)), half_width, symmetric, None)

    tables = staticmethod(_tables)

    def run(self, task, x, keep, sign, half_width, symmetric, out):
        out = _empty(x) if out is None else out
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        tables = self.tables(tuple(x.shape[-2:]), tuple(half_width), symmetric, wide, x.device)
        if tables is None:  # nothing is low
            return _nothing_low(task, x, keep, sign, out)
        height, width = x.shape[-2:]
        channels = 1
        if _order(x) is torch.channels_last:
            # a row of pixels is one long row: planes, channels and all
            channels, x = x.shape[1], x.permute(0, 2, 3, 1).flatten(2)
            if keep is not None and keep.dim() > 2:
                keep = keep.expand(*keep.shape[:-3], channels, height, width).movedim(-3, -1).flatten(-2)
            elif keep is not None:
                keep = keep.expand(height, width)[..., None].expand(height, width, channels).flatten(-2)
        elif width > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        if keep is not None:
            keep = _plain_keep(keep, wide)
            keep = keep.expand(*keep.shape[:-2], *x.shape[-2:])
            keep = (keep if keep.stride(-1) == 1 else keep.contiguous()).expand(x.shape)
        planes = _merged(x.shape[:-2], x.stride()[:-2], (x if keep is None else keep).stride()[:-2])
        if planes is None:
            x = x.contiguous()
            keep = None if keep is None else keep.contiguous()
            planes = _merged(x.shape[:-2], x.stride()[:-2], (x if keep is None else keep).stride()[:-2])
        sizes, (x_strides, keep_strides) = planes
        sizes = (*sizes, height, width, channels)
        x_strides = (*x_strides, x.stride(-2))
        keep_strides = (0, 0, 0) if keep is None else (*keep_strides, keep.stride(-2))
        self.launch(task, x, out, keep, sign, tables, sizes, x_strides, keep_strides)
        return out

    def launch(self, task, x, out, keep, sign, tables, sizes, x_strides, keep_strides):
        told, _alive = tables
        self.module.spectral(
            task, _DTYPE_CODES[x.dtype], *told, sizes, x.data_ptr(), x_strides, out.data_ptr(),
            0 if keep is None else keep.data_ptr(), keep_strides, keep is not None and keep.dtype == torch.bool,
            0 if sign is None else sign.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


class _Triton(_Cpu):
    def mask_high_frequencies_backward(self, grad, sign, keep, half_width, symmetric):
        if grad.dtype != torch.float64:
            return super().mask_high_frequencies_backward(grad, sign, keep, half_width, symmetric)
        # Triton 3.7 does not compile a float64 product whose factor is made of bytes: multiplied beforehand
        return grad - self.high_pass(reference.dropped(keep, grad) * sign * grad, half_width, symmetric)

    @staticmethod
    @functools.lru_cache(256)
    def tables(size, half_width, symmetric, dtype, device):
        """U of either axis in full, and for a block with an edge J and J^T, which turn its last harmonics."""
        from pyface.kernels import spectral as kernels

        (rows, row_edge), (columns, column_edge) = (_axis(n, d, symmetric) for n, d in zip(size, half_width))
        if not rows.numel() or not columns.numel():
            return None
        turns = []
        for table, sign in ((rows, 1.0), (columns, -1.0)):
            block, last = kernels.block_of(table.shape[1]), table.shape[1] - 1
            turn = torch.zeros(block, block, dtype=torch.float64)
            if row_edge and column_edge:
                turn[last - 1, last], turn[last, last - 1] = sign, -sign
            turns.append(turn.to(device, dtype))
        padded = [_padded(t, kernels.block_of(t.shape[1])).to(device, dtype) for t in (rows, columns)]
        return *padded, turns if row_edge and column_edge else None

    def launch(self, task, x, out, keep, sign, tables, sizes, x_strides, keep_strides):
        self.module.run(task, x, out, keep, sign, *tables, sizes, x_strides, keep_strides)


class _Cuda(_Cpu):
    def launch(self, task, x, out, keep, sign, tables, sizes, x_strides, keep_strides):
        told, (upper, *_) = tables
        # freed at once, yet not given to anybody else before the kernels are done: one stream
        scratch = upper.new_empty(self.scratch(tables, sizes))
        self.module.spectral(
            task, _DTYPE_CODES[x.dtype], *told, sizes, x.data_ptr(), x_strides, out.data_ptr(),
            0 if keep is None else keep.data_ptr(), keep_strides, keep is not None and keep.dtype == torch.bool,
            0 if sign is None else sign.data_ptr(), scratch.data_ptr(), *self.where(x),
        )  # fmt: skip

    @staticmethod
    def scratch(tables, sizes):
        """Numbers of T, M and C for all planes."""
        _, (upper, padded, _) = tables
        outer, inner, _, width, channels = sizes
        return outer * inner * upper.shape[1] * channels * (2 * width + padded.shape[1])

    def where(self, x):
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _plain_keep(keep: Tensor, wide: torch.dtype) -> Tensor:
    """keep as bytes 0 and 1, or as numbers of the arithmetic type."""
    if keep.dtype == torch.uint8 and not (keep > 1).any():
        return keep.view(torch.bool)
    return keep if keep.dtype == torch.bool else keep.to(wide)


def _nothing_low(task: int, x: Tensor, keep: Tensor | None, sign: Tensor | None, out: Tensor) -> Tensor:
    """The three tasks where no frequency is taken away: the high part is x."""
    if task == 0:
        return out.copy_(x)
    dropped = reference.dropped(keep, reference._wide(x))
    if task == 2:
        return out.copy_(x - dropped * sign * x)
    if sign is not None:
        sign.copy_(_sign(x))
    return out.copy_(x - dropped * x.abs())


@functools.lru_cache(256)
def _transform_is_faster(shape: Pair, half_width: Pair) -> bool:
    """Whether torch.fft beats the products for a block of so many frequencies.

    Measured (Xeon, AVX-512, one thread): a product of a pixel costs 0.024 ns, rfft2 and back 6 ns where sizes have
    small prime factors, and over 20 ns elsewhere, which no block makes up for.
    """
    down, across = (1 + 2 * min(d, n // 2) for n, d in zip(shape, half_width, strict=True))
    products = down + 2 * down * across / shape[0]
    return products > 250 and all(_has_small_factors(n) for n in shape)


def _has_small_factors(size: int) -> bool:
    for prime in (2, 3, 5, 7):
        while size % prime == 0:
            size //= prime
    return size == 1


def _load_triton() -> object:
    from pyface.kernels import spectral as kernels

    return _Triton(kernels)


_TYPES = {(dtype,) for dtype in _DTYPE_CODES}

CORE = Core(
    "spectral",
    dtypes={"cpu": _TYPES, "cuda": _TYPES, "triton": _TYPES},
    load={
        "cpu": lambda: _Cpu(_paths.loaded("_cpu")),
        "cuda": lambda: _Cuda(_paths.loaded("_cuda")),
        "triton": _load_triton,
        "reference": _Reference,
    },
)

# ---- high_pass ------------------------------------------------------------------------------------------------------
# Linear and its own transpose: gradient, tangent and every higher order are the op again.


def _implementation(x: Tensor, path: str | None) -> object:
    return CORE.pick(x.device.type, (x.dtype,), path)


def _high_pass_launch(x, half_width, symmetric, path):
    implementation = _implementation(x, path)
    return implementation.high_pass(x, half_width, symmetric) if x.numel() else _empty(x)


def _high_pass_forward(x, half_width, symmetric, path):
    _check("high_pass", x)
    return _high_pass_launch(x, tuple(half_width), symmetric, path)


def _high_pass_fake(x, half_width, symmetric, path):
    _check("high_pass", x)
    return _empty(x)


def _high_pass_setup(ctx, inputs, output):
    _, ctx.half_width, ctx.symmetric, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward()


def _high_pass_grad(ctx, grad):
    return None if grad is None else _high_pass(grad, ctx.half_width, ctx.symmetric, ctx.path), None, None, None


def _high_pass_jvp(ctx, tangent, *_):
    return _high_pass(tangent, ctx.half_width, ctx.symmetric, ctx.path)


def _high_pass_vmap(op, info, in_dims, x, *options):
    return op(x.movedim(in_dims[0], 0), *options), 0


_high_pass = register(
    "high_pass",
    "(Tensor x, int[2] half_width, bool symmetric, str? path) -> Tensor",
    1,
    _high_pass_forward,
    _high_pass_fake,
    launch=_high_pass_launch,
    setup_context=_high_pass_setup,
    backward=_high_pass_grad,
    jvp=_high_pass_jvp,
    vmap=_high_pass_vmap,
)


def high_pass(x: Tensor, half_width: int | Pair = 5, *, symmetric: bool = False, out: Tensor | None = None) -> Tensor:
    """Images without their low frequencies: the real part, after a block in the middle of the spectrum is set to 0.

    The chain `fft2`, `fftshift`, zeros at `[H//2 - d : H//2 + d, W//2 - d : W//2 + d]`, back, `.real`, without any
    complex number: a block of frequencies is a product of few cosines and sines along each axis, and what is taken
    away is `U_y (U_y^T x U_x) U_x^T` with 2d + 1 columns in U.

    Args:
        x: Tensor[..., H, W] of any size; float32, float64, bfloat16 or float16. Each plane by itself.
        half_width: d in frequency bins, or a pair (d_y, d_x). The block is -d..d-1 on each axis, clipped to the
            frequencies that there are; 0 removes nothing. ACMF (arXiv:2307.11438) has 5: 10 x 10 frequencies.
        symmetric: the block is -d..d instead (0 removes the mean), and the result an orthogonal projection. Of the
            block -d..d-1 a real result keeps half of the frequencies at its edges.
        out: write the result here (no gradient), also over x itself. Fresh pages of a large result cost more than the
            filter. Written at once if it is contiguous (or channels_last, where x is), else through a copy.

    Returns:
        Tensor[..., H, W] of the dtype of x, channels_last where x is, else contiguous. Empty for empty x.

    All arithmetic is float32 at least; nothing is cast under autocast. Differentiable to any order (the filter is its
    own transpose), forward mode, vmap. The result does not depend on the number of threads or the rest of the batch.
    Constant planes give rounding noise, not 0. A NaN or an infinite pixel makes its whole plane non-finite, and no
    other.

    Raises:
        ValueError: fewer than two dimensions, a bad half_width or an `out` that does not fit. TypeError: x is not of
        a real floating-point type. pyface.PathError: the explicitly chosen path cannot serve the call.
    """
    half_width = _pair("high_pass", half_width)
    _check("high_pass", x)
    path = chosen_path()
    if out is None:
        return _high_pass(x, half_width, symmetric, path)
    direct = _check_out("high_pass", x, out)
    if not direct:
        return out.copy_(_high_pass(x, half_width, symmetric, path))
    return _implementation(x, path).high_pass(x, half_width, symmetric, out=out)


def _check_out(name: str, x: Tensor, out: Tensor, *others: Tensor) -> bool:
    """Whether a path can write into `out` itself, after the checks that any out= needs."""
    _check_like(name, "out", out, x, x.dtype)
    if torch.is_grad_enabled() and (out.requires_grad or any(t.requires_grad for t in (x, *others))):
        raise RuntimeError(f"{name}: out= has no gradient; call it under torch.no_grad() or without out")
    plain = type(x) is Tensor and type(out) is Tensor and not torch.compiler.is_compiling()
    # over x itself is fine (every pixel is read before it is written), a little beside it is not
    apart = x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
    same = x.data_ptr() == out.data_ptr() and x.stride() == out.stride()
    return plain and bool(x.numel()) and (apart or same) and out.is_contiguous(memory_format=_order(x))


# ---- mask_high_frequencies ------------------------------------------------------------------------------------------
# With h = high_pass(x), s = sign(h) (0 at 0) and m = (1 - keep) s: y = x - m h. The backward op maps g to
# g - high_pass(m g), is linear in g, and its transpose maps v to v - m high_pass(v). Everything else, the gradient of
# keep included, is written with the ops of this file and so differentiable again. Only s is saved, a byte per pixel.


def _mask_launch(x, keep, half_width, symmetric, with_sign, path):
    implementation = _implementation(x, path)
    if not x.numel():
        return _empty(x), _empty(x, torch.int8) if with_sign else None
    return implementation.mask_high_frequencies(x, keep, half_width, symmetric, with_sign)


def _mask_forward(x, keep, half_width, symmetric, with_sign, path):
    _check("mask_high_frequencies", x)
    _check_keep("mask_high_frequencies", x, keep)
    y, sign = _mask_launch(x, keep, tuple(half_width), symmetric, with_sign, path)
    return y, x.new_empty(0, dtype=torch.int8) if sign is None else sign


def _mask_fake(x, keep, half_width, symmetric, with_sign, path):
    _check("mask_high_frequencies", x)
    _check_keep("mask_high_frequencies", x, keep)
    return _empty(x), _empty(x, torch.int8) if with_sign else x.new_empty(0, dtype=torch.int8)


def _mask_setup(ctx, inputs, output):
    x, keep, ctx.half_width, ctx.symmetric, ctx.with_sign, ctx.path = inputs
    ctx.set_materialize_grads(False)
    # x is needed for |h|, the gradient of keep, and where the sign was not asked for
    ctx.save_for_backward(x if keep.is_floating_point() or not ctx.with_sign else None, keep, output[1])


def _mask_grad(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    x, keep, sign = ctx.saved_tensors
    options = ctx.half_width, ctx.symmetric, ctx.path
    high = None if ctx.with_sign and not ctx.needs_input_grad[1] else _high_pass(x, *options)
    grad_x = grad_keep = None
    if ctx.needs_input_grad[0]:
        grad_x = _mask_backward(grad, sign if ctx.with_sign else _sign(high), keep, *options)
    if ctx.needs_input_grad[1]:
        grad_keep = (high.abs() * grad).sum_to_size(keep.shape).to(keep.dtype)
    return grad_x, grad_keep, None, None, None, None


def _mask_jvp(ctx, d_x, d_keep, *_):
    x, keep, sign = ctx.saved_tensors
    options = ctx.half_width, ctx.symmetric, ctx.path
    high = None if ctx.with_sign and d_keep is None else _high_pass(x, *options)
    parts = []
    if d_x is not None:
        sign = sign if ctx.with_sign else _sign(high)
        parts.append(d_x - reference.dropped(keep, d_x) * sign * _high_pass(d_x, *options))
    if d_keep is not None:
        parts.append((high.abs() * d_keep).to(x.dtype))
    return sum(parts), None


def _sign(high: Tensor) -> Tensor:
    return high.detach().sign().nan_to_num(0).to(torch.int8)


def _mask_vmap(op, info, in_dims, x, keep, *options):
    x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(info.batch_size, *x.shape)
    return op(x, _vmap_keep(x, keep, in_dims[1]), *options), (0, 0 if options[2] else None)


def _vmap_keep(x: Tensor, keep: Tensor, dim: int | None) -> Tensor:
    """The keep of a batch of calls: its mapped dimension first, and ones where it broadcasts."""
    if dim is None:
        return keep
    keep = keep.movedim(dim, 0)
    return keep.reshape(keep.shape[0], *[1] * (x.dim() - keep.dim()), *keep.shape[1:])


def _backward_launch(grad, sign, keep, half_width, symmetric, path):
    implementation = _implementation(grad, path)
    if not grad.numel():
        return _empty(grad)
    return implementation.mask_high_frequencies_backward(grad, sign, keep, half_width, symmetric)


def _check_backward(grad, sign, keep):
    _check("mask_high_frequencies_backward", grad)
    _check_keep("mask_high_frequencies_backward", grad, keep)
    _check_like("mask_high_frequencies_backward", "sign", sign, grad, torch.int8)


def _backward_forward(grad, sign, keep, half_width, symmetric, path):
    _check_backward(grad, sign, keep)
    return _backward_launch(grad, sign, keep, tuple(half_width), symmetric, path)


def _backward_fake(grad, sign, keep, half_width, symmetric, path):
    _check_backward(grad, sign, keep)
    return _empty(grad)


def _backward_setup(ctx, inputs, output):
    grad, sign, keep, ctx.half_width, ctx.symmetric, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad if keep.is_floating_point() else None, sign, keep)


def _backward_grad(ctx, v):
    if v is None:
        return (None,) * 6
    grad, sign, keep = ctx.saved_tensors
    high = _high_pass(v, ctx.half_width, ctx.symmetric, ctx.path)
    to_grad = to_keep = None
    if ctx.needs_input_grad[0]:
        to_grad = v - (reference.dropped(keep, v) * sign) * high
    if ctx.needs_input_grad[2]:
        to_keep = (sign * grad * high).sum_to_size(keep.shape).to(keep.dtype)
    return to_grad, None, to_keep, None, None, None


def _backward_jvp(ctx, d_grad, d_sign, d_keep, *_):
    grad, sign, keep = ctx.saved_tensors
    options = ctx.half_width, ctx.symmetric, ctx.path
    tangent = torch.zeros(sign.shape, dtype=(d_grad if grad is None else grad).dtype, device=sign.device)
    if d_grad is not None:
        tangent = tangent + _mask_backward(d_grad, sign, keep, *options)
    if d_keep is not None:
        tangent = tangent + _high_pass((d_keep * sign * grad).to(grad.dtype), *options)
    return tangent


def _backward_vmap(op, info, in_dims, grad, sign, keep, *options):
    grad, sign = (
        t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
        for t, dim in ((grad, in_dims[0]), (sign, in_dims[1]))
    )
    return op(grad, sign, _vmap_keep(grad, keep, in_dims[2]), *options), 0


_mask_backward = register(
    "mask_high_frequencies_backward",
    "(Tensor grad, Tensor sign, Tensor keep, int[2] half_width, bool symmetric, str? path) -> Tensor",
    3,
    _backward_forward,
    _backward_fake,
    setup_context=_backward_setup,
    backward=_backward_grad,
    jvp=_backward_jvp,
    vmap=_backward_vmap,
)

_mask = register(
    "mask_high_frequencies",
    "(Tensor x, Tensor keep, int[2] half_width, bool symmetric, bool with_sign, str? path) -> (Tensor, Tensor)",
    2,
    _mask_forward,
    _mask_fake,
    launch=_mask_launch,
    setup_context=_mask_setup,
    backward=_mask_grad,
    jvp=_mask_jvp,
    vmap=_mask_vmap,
)


def mask_high_frequencies(
    x: Tensor, keep: Tensor, half_width: int | Pair = 5, *, symmetric: bool = False, out: Tensor | None = None
) -> Tensor:
    """`x - (1 - keep) * abs(high_pass(x))`: images that lose their high frequencies where `keep` is 0.

    The masked-frequency transform of ACMF (arXiv:2307.11438) in one pass over memory.

    Args:
        x: Tensor[..., H, W] of any size; float32, float64, bfloat16 or float16. Each plane by itself.
        keep: bool or any real type, of the shape of x or broadcast to it: [H, W] for all planes, [B, 1, H, W] for each
            image. 1 leaves a pixel as it is, 0 takes abs(high) away; other numbers take a part. bool and uint8 are
            read as they are, other types are converted to that of the arithmetic.
        half_width, symmetric, out: as in `high_pass`.

    Returns:
        Tensor[..., H, W] of the dtype of x, channels_last where x is, else contiguous. Not clipped to a range.

    Dtypes, determinism, values that are no numbers: as in `high_pass`; all arithmetic is float32 at least.
    Gradients: of x and of a floating-point keep, to any order; forward mode; vmap. Where the high part is exactly 0 its
        sign counts as 0, as in `torch.abs`. For the backward pass one byte per pixel is saved, and x if keep is of a
        floating-point type.

    Raises:
        ValueError: fewer than two dimensions, a bad half_width, a keep that does not broadcast, several devices, or an
        `out` that does not fit. TypeError: x is not of a real floating-point type, keep is complex. pyface.PathError:
        the explicitly chosen path cannot serve the call.
    """
    half_width = _pair("mask_high_frequencies", half_width)
    _check("mask_high_frequencies", x)
    _check_keep("mask_high_frequencies", x, keep)
    path = chosen_path()
    if out is not None and _check_out("mask_high_frequencies", x, out, keep) and not _shares(out, keep):
        return _implementation(x, path).mask_high_frequencies(x, keep, half_width, symmetric, False, out=out)[0]
    with_sign = x.requires_grad and torch.is_grad_enabled()
    y, _ = _mask(x, keep, half_width, symmetric, with_sign, path)
    return y if out is None else out.copy_(y)


def _shares(out: Tensor, other: Tensor) -> bool:
    return type(other) is not Tensor or out.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# ---- spectral_filter ------------------------------------------------------------------------------------------------
# filter(x, gain) is linear in both and its own transpose in x; cross(x, g) is its gradient in gain at every plane. The
# two are closed under differentiation: <cross(x, g), v> = <filter(x, v), g> = <x, filter(g, v)>.


def _filter_forward(x, gain, path):
    _check("spectral_filter", x)
    _check_gain("spectral_filter", x, gain)
    _implementation(x, path)  # every path takes torch.fft for this; what it cannot serve it refuses all the same
    return _into(None, x, reference.spectral_filter(x, gain)) if x.numel() else _empty(x)


def _filter_fake(x, gain, path):
    _check("spectral_filter", x)
    _check_gain("spectral_filter", x, gain)
    return _empty(x)


def _filter_setup(ctx, inputs, output):
    x, gain, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gain)


def _filter_grad(ctx, grad):
    if grad is None:
        return None, None, None
    x, gain = ctx.saved_tensors
    grad_x = _filter(grad, gain, ctx.path) if ctx.needs_input_grad[0] else None
    grad_gain = None
    if ctx.needs_input_grad[1]:
        grad_gain = _cross(x, grad, ctx.path).sum_to_size(gain.shape).to(gain.dtype)
    return grad_x, grad_gain, None


def _filter_jvp(ctx, d_x, d_gain, _):
    x, gain = ctx.saved_tensors
    parts = [] if d_x is None else [_filter(d_x, gain, ctx.path)]
    parts += [] if d_gain is None else [_filter(x, d_gain, ctx.path)]
    return sum(parts)


def _filter_vmap(op, info, in_dims, x, gain, path):
    x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(info.batch_size, *x.shape)
    return op(x, _vmap_keep(x, gain, in_dims[1]), path), 0


def _cross_forward(x, grad, path):
    _check("spectral_filter_backward", x)
    _check_like("spectral_filter_backward", "grad", grad, x, x.dtype)
    return reference.cross_spectrum(x, grad).contiguous() if x.numel() else _cross_fake(x, grad, path).zero_()


def _cross_fake(x, grad, path):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 + 1), dtype=dtype)


def _cross_setup(ctx, inputs, output):
    x, grad, ctx.path = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, grad)


def _cross_grad(ctx, v):
    x, grad = ctx.saved_tensors
    if v is None:
        return None, None, None
    to_x = _filter(grad, v, ctx.path) if ctx.needs_input_grad[0] else None
    return to_x, _filter(x, v, ctx.path) if ctx.needs_input_grad[1] else None, None


def _cross_jvp(ctx, d_x, d_grad, _):
    x, grad = ctx.saved_tensors
    parts = [] if d_x is None else [_cross(d_x, grad, ctx.path)]
    parts += [] if d_grad is None else [_cross(x, d_grad, ctx.path)]
    return sum(parts)


def _cross_vmap(op, info, in_dims, x, grad, path):
    x, grad = (
        t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
        for t, dim in ((x, in_dims[0]), (grad, in_dims[1]))
    )
    return op(x, grad, path), 0


_cross = register(
    "spectral_filter_backward",
    "(Tensor x, Tensor grad, str? path) -> Tensor",
    2,
    _cross_forward,
    _cross_fake,
    setup_context=_cross_setup,
    backward=_cross_grad,
    jvp=_cross_jvp,
    vmap=_cross_vmap,
)

_filter = register(
    "spectral_filter",
    "(Tensor x, Tensor gain, str? path) -> Tensor",
    2,
    _filter_forward,
    _filter_fake,
    setup_context=_filter_setup,
    backward=_filter_grad,
    jvp=_filter_jvp,
    vmap=_filter_vmap,
)


def spectral_filter(x: Tensor, gain: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`irfft2(gain * rfft2(x), s=(H, W))` for any real gain, the same on every device.

    A real image has conjugate values at (k_y, k_x) and (-k_y, k_x) where k_x is 0 or W/2, and both are stored in these
    columns. Only the mean of their two gains can act on a real result; the gain is symmetrised so beforehand, because
    libraries differ in what they do with other spectra.

    Args:
        x: Tensor[..., H, W] of any size; float32, float64, bfloat16 or float16.
        gain: Tensor[H, W // 2 + 1] in the order of `torch.fft.rfft2`, with leading dimensions that broadcast to those
            of x; a real floating-point type, converted to that of the arithmetic.
        out: write the result here (no gradient).

    Returns:
        Tensor[..., H, W] of the dtype of x, channels_last where x is, else contiguous. Empty for empty x.

    Every path computes it with `torch.fft`, in float32 at least: for a rectangle of frequencies `high_pass` is several
    times faster. Gradients of x and gain to any order; forward mode; vmap.

    Raises:
        ValueError: shapes that do not fit, several devices. TypeError: x or gain is not of a real floating-point type.
        pyface.PathError: the explicitly chosen path cannot serve the call.
    """
    _check("spectral_filter", x)
    _check_gain("spectral_filter", x, gain)
    if out is not None:
        _check_out("spectral_filter", x, out, gain)
    y = _filter(x, gain, chosen_path())
    return y if out is None else out.copy_(y)
