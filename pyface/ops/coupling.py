"""Op table of core `coupling`: affine coupling and the Haar wavelet.

Order of this file: argument checks, the paths' implementations, the ops with their gradients, the public functions.
Every argument is checked here, once, before any pointer is taken.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from pyface.ops import _paths
from pyface.ops._paths import Core, chosen_path
from pyface.ops._register import register
from pyface.ops.reference import coupling as reference

ACTIVATIONS = {"none": 0, "sigmoid": 1, "tanh": 2, "atan": 3}
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_shapes(x: Tensor, log_scale: Tensor, shift: Tensor) -> None:
    if x.shape != log_scale.shape or x.shape != shift.shape:
        raise ValueError(
            f"affine_coupling: x, log_scale and shift must have one shape, got {tuple(x.shape)}, "
            f"{tuple(log_scale.shape)} and {tuple(shift.shape)}"
        )


def _check_coupling(x: Tensor, log_scale: Tensor, shift: Tensor, clamp: float, activation: str) -> None:
    """Everything but the shapes."""
    device, s_dtype = x.device, log_scale.dtype
    if device != log_scale.device or device != shift.device:
        raise ValueError(
            f"affine_coupling: x, log_scale and shift must be on one device, got {device}, {log_scale.device} and "
            f"{shift.device}"
        )
    if s_dtype != shift.dtype or x.dtype not in _DTYPE_CODES or s_dtype not in _DTYPE_CODES:
        raise TypeError(
            "affine_coupling: expected floating-point x, and log_scale and shift of one floating type, got "
            f"{x.dtype}, {s_dtype} and {shift.dtype}"
        )
    if x.dim() == 0:
        raise ValueError("affine_coupling: x needs a batch dimension, got a 0-dimensional tensor")
    if not 0 <= clamp < math.inf:
        raise ValueError(f"affine_coupling: clamp must be a finite number >= 0, got {clamp}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"affine_coupling: clamp_activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def _check_backward(grad_out, grad_log_det, value, log_scale, shift, clamp, activation, from_output) -> None:
    if from_output and shift is None:
        raise ValueError("affine_coupling_backward: from_output needs the shift, got None")
    _check_shapes(value, log_scale, value if shift is None else shift)
    _check_coupling(value, log_scale, log_scale if shift is None else shift, clamp, activation)
    for name, grad, shape, dtype in (
        ("grad_out", grad_out, value.shape, value.dtype),
        ("grad_log_det", grad_log_det, value.shape[:1], _log_det_dtype(value)),
    ):
        if grad is not None and (grad.shape != shape or grad.dtype != dtype or grad.device != value.device):
            raise ValueError(
                f"affine_coupling_backward: {name} must be {tuple(shape)}, {dtype} on {value.device}, got "
                f"{tuple(grad.shape)}, {grad.dtype} on {grad.device}"
            )


def _check_haar(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name}: expected a 4-dimensional tensor [B, C, H, W], got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPE_CODES:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if name == "haar_dwt2d" and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(
            f"{name}: height and width must be even, got {x.shape[2]} x {x.shape[3]}; pad or crop the input"
        )
    if name == "haar_idwt2d" and x.shape[1] % 4:
        raise ValueError(f"{name}: channels must be a multiple of 4 (LL, HL, LH, HH), got {x.shape[1]}")


# ---- layout ---------------------------------------------------------------------------------------------------------
# Element-wise maths needs one element order inside a sample, shared by all tensors, and does not care how far samples
# lie apart: the halves of a packed sub-net output and tensors expanded over the batch are taken as they are.


def _order(x: Tensor) -> torch.memory_format:
    """The order of x's results: channels_last where x has it, else contiguous."""
    if x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1:
        return torch.channels_last
    if x.dim() == 5 and x.shape[1] > 1 and x.stride(1) == 1 and x.shape[2] * x.shape[3] * x.shape[4] > 1:
        return torch.channels_last_3d
    return torch.contiguous_format


def _align(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors with each sample dense in x's order, copied only where they are not."""
    order = _order(x)
    return [
        t if t is None or t.is_contiguous(memory_format=order) or t[:1].is_contiguous(memory_format=order)
        else t.contiguous(memory_format=order)
        for t in (x, *others)
    ]  # fmt: skip


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=_order(x))


def _log_det_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- paths ----------------------------------------------------------------------------------------------------------
# Each implementation has forward, backward, haar_dwt2d and haar_idwt2d on checked and aligned tensors.


def _reference() -> object:
    def forward(x, log_scale, shift, clamp, activation, inverse, log_det):
        out = reference.affine_coupling(
            x, log_scale, shift, clamp=clamp, clamp_activation=activation, inverse=inverse, return_log_det=log_det
        )
        y, sums = out if log_det else (out, None)
        return y.contiguous(memory_format=_order(x)), sums

    def backward(
        grad_out, grad_log_det, value, log_scale, shift, *, clamp, activation, inverse, from_output, needs_x, needs_s
    ):
        wide = torch.promote_types(value.dtype, torch.float32)
        s, v, g = log_scale.to(wide), value.to(wide), grad_out.to(wide)
        log_gain = reference.clamped_log_scale(s, clamp, activation)
        slope, _ = reference.log_scale_slopes(s, clamp, activation)
        grad_x = g * torch.exp(-log_gain if inverse else log_gain)
        lam = 0 if grad_log_det is None else grad_log_det.to(wide).reshape(-1, *[1] * (v.dim() - 1))
        through = g * (v - shift.to(wide)) if from_output else (g if inverse else grad_x) * v
        grad_s = (-1 if inverse else 1) * (through + lam) * slope
        order = _order(value)
        return (
            grad_x.to(value.dtype).contiguous(memory_format=order) if needs_x else None,
            grad_s.to(log_scale.dtype).contiguous(memory_format=order) if needs_s else None,
        )

    return SimpleNamespace(
        forward=forward, backward=backward, haar_dwt2d=reference.haar_dwt2d, haar_idwt2d=reference.haar_idwt2d
    )


class _Compiled:
    """The coupling core of a compiled module: allocates results, hands over addresses."""

    def __init__(self, module):
        self.module = module

    def forward(self, x, log_scale, shift, clamp, activation, inverse, log_det):
        batch, y = x.shape[0], torch.empty_like(x) if x.is_contiguous() else _empty(x)
        sums = torch.empty(batch, dtype=_log_det_dtype(x), device=x.device) if log_det else None
        if batch:
            inner = x.numel() // batch
            scratch, _alive = self.scratch(x, batch, inner) if log_det else self.no_scratch
            self.module.coupling_forward(
                x.data_ptr(), log_scale.data_ptr(), shift.data_ptr(), y.data_ptr(), sums.data_ptr() if log_det else 0,
                batch, inner, x.stride(0), log_scale.stride(0), shift.stride(0), inner,
                _DTYPE_CODES[x.dtype], _DTYPE_CODES[log_scale.dtype], ACTIVATIONS[activation], clamp, inverse,
                *scratch, *self.where(x),
            )  # fmt: skip
        return y, sums

    def backward(
        self,
        grad_out,
        grad_log_det,
        value,
        log_scale,
        shift,
        *,
        clamp,
        activation,
        inverse,
        from_output,
        needs_x,
        needs_s,
    ):
        batch = value.shape[0]
        grad_x = _empty(value) if needs_x else None
        grad_s = _empty(value, log_scale.dtype) if needs_s else None
        if batch and (needs_x or needs_s):
            self.module.coupling_backward(
                grad_out.data_ptr(), 0 if grad_log_det is None else grad_log_det.data_ptr(), value.data_ptr(),
                log_scale.data_ptr(), shift.data_ptr() if from_output else 0,
                grad_x.data_ptr() if needs_x else 0, grad_s.data_ptr() if needs_s else 0,
                batch, value.numel() // batch, grad_out.stride(0), value.stride(0), log_scale.stride(0),
                shift.stride(0) if from_output else 0,
                _DTYPE_CODES[value.dtype], _DTYPE_CODES[log_scale.dtype], ACTIVATIONS[activation], clamp, inverse,
                from_output, *self.where(value),
            )  # fmt: skip
        return grad_x, grad_s

    def haar_dwt2d(self, x, out=None):
        batch, channels, height, width = x.shape
        if out is None:
            out = torch.empty((batch, 4 * channels, height // 2, width // 2), dtype=x.dtype, device=x.device)
        return self.run_haar(x, out, batch, channels, height // 2, width // 2, False)

    def haar_idwt2d(self, bands, out=None):
        batch, channels, rows, cols = bands.shape
        if out is None:
            out = torch.empty((batch, channels // 4, 2 * rows, 2 * cols), dtype=bands.dtype, device=bands.device)
        return self.run_haar(bands, out, batch, channels // 4, rows, cols, True)

    def run_haar(self, source, out, batch, channels, rows, cols, inverse):
        if out.numel():
            source = source.contiguous()
            self.module.haar(
                source.data_ptr(), out.data_ptr(), batch, channels, rows, cols, _DTYPE_CODES[source.dtype], inverse,
                *self.where(source),
            )  # fmt: skip
        return out


class _Cpu(_Compiled):
    no_scratch = (), None

    def where(self, _):
        return (torch.get_num_threads(),)

    def scratch(self, x, batch, inner):
        return self.no_scratch  # the core keeps its own


class _Cuda(_Compiled):
    no_scratch = (0,), None

    def where(self, x):
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream

    def scratch(self, x, batch, inner):
        """Partial sums of the log-determinant: (addresses, what keeps them until the kernels are queued)."""
        sums = torch.empty(self.module.coupling_scratch(batch, inner), dtype=torch.float64, device=x.device)
        return (sums.data_ptr(),), sums


def _load_triton() -> object:
    from pyface.kernels import coupling

    return coupling


_PAIRS = {(d, d) for d in (torch.float32, torch.float64, torch.bfloat16)} | {(torch.float32, torch.bfloat16)}
_GPU_PAIRS = _PAIRS | {(torch.float16, torch.float16), (torch.float32, torch.float16)}

CORE = Core(
    "coupling",
    # (x, log_scale and shift) for the coupling, (x,) for the wavelet
    dtypes={
        "cpu": _PAIRS | {(pair[0],) for pair in _PAIRS},
        "cuda": _GPU_PAIRS | {(pair[0],) for pair in _GPU_PAIRS},
        "triton": _GPU_PAIRS | {(pair[0],) for pair in _GPU_PAIRS},
    },
    load={
        "cpu": lambda: _Cpu(_paths.loaded("_cpu")),
        "cuda": lambda: _Cuda(_paths.loaded("_cuda")),
        "triton": _load_triton,
        "reference": _reference,
    },
)

# ---- affine coupling ------------------------------------------------------------------------------------------------


def _launch(x, log_scale, shift, clamp, activation, inverse, log_det, path):
    implementation = CORE.pick(x.device.type, (x.dtype, log_scale.dtype), path)
    if not (x.is_contiguous() and log_scale.is_contiguous() and shift.is_contiguous()):
        x, log_scale, shift = _align(x, log_scale, shift)
    return implementation.forward(x, log_scale, shift, clamp, activation, inverse, log_det)


def _forward(x, log_scale, shift, clamp, activation, inverse, log_det, path):
    _check_shapes(x, log_scale, shift)
    _check_coupling(x, log_scale, shift, clamp, activation)
    return _launch(x, log_scale, shift, clamp, activation, inverse, log_det, path)


def _forward_fake(x, log_scale, shift, clamp, activation, inverse, log_det, path):
    _check_shapes(x, log_scale, shift)
    _check_coupling(x, log_scale, shift, clamp, activation)
    return _empty(x), x.new_empty(x.shape[0], dtype=_log_det_dtype(x)) if log_det else x.new_empty(0)


def _backward(
    grad_out, grad_log_det, value, log_scale, shift, clamp, activation, inverse, from_output, needs_x, needs_s, path
):
    _check_backward(grad_out, grad_log_det, value, log_scale, shift, clamp, activation, from_output)
    implementation = CORE.pick(value.device.type, (value.dtype, log_scale.dtype), path)
    value, grad_out, log_scale, shift = _align(value, grad_out, log_scale, shift)
    if grad_log_det is not None:
        grad_log_det = grad_log_det.contiguous()
    return implementation.backward(
        grad_out, grad_log_det, value, log_scale, shift, clamp=clamp, activation=activation, inverse=inverse,
        from_output=from_output, needs_x=needs_x, needs_s=needs_s,
    )  # fmt: skip


def _backward_fake(
    grad_out, grad_log_det, value, log_scale, shift, clamp, activation, inverse, from_output, needs_x, needs_s, path
):
    _check_backward(grad_out, grad_log_det, value, log_scale, shift, clamp, activation, from_output)
    grad_x = _empty(value) if needs_x else grad_out.new_empty(0)
    return grad_x, _empty(value, log_scale.dtype) if needs_s else grad_out.new_empty(0)


def _setup(ctx, inputs, output):
    x, log_scale, shift, ctx.clamp, ctx.activation, ctx.inverse, ctx.log_det, ctx.path = inputs
    ctx.set_materialize_grads(False)
    # The inverse is differentiated from its own output: it needs neither its input nor the shift.
    ctx.save_for_backward(output[0] if ctx.inverse else x, log_scale)
    ctx.shift_dtype = shift.dtype


def _grads(ctx, grad_y, grad_log_det):
    value, log_scale = ctx.saved_tensors
    if not ctx.log_det:
        grad_log_det = None
    if grad_y is None:
        if grad_log_det is None:
            return (None,) * 8
        grad_y = torch.zeros_like(value)
    needs_x = ctx.needs_input_grad[0] or (ctx.inverse and ctx.needs_input_grad[2])
    grad_x = grad_s = None
    if needs_x or ctx.needs_input_grad[1]:
        grad_x, grad_s = _affine_coupling_backward(
            grad_y, grad_log_det, value, log_scale, None, ctx.clamp, ctx.activation, ctx.inverse, False,
            needs_x, ctx.needs_input_grad[1], ctx.path,
        )  # fmt: skip
    grad_t = None
    if ctx.needs_input_grad[2]:
        grad_t = (-grad_x if ctx.inverse else grad_y).to(ctx.shift_dtype)
    return (
        grad_x if ctx.needs_input_grad[0] else None, grad_s if ctx.needs_input_grad[1] else None, grad_t,
        None, None, None, None, None,
    )  # fmt: skip


def _per_sample(v: Tensor, like: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (like.dim() - 1))


def _sum_samples(v: Tensor) -> Tensor:
    return v.flatten(1).sum(1) if v.dim() > 1 else v


def _jvp(ctx, dx, ds, dt, *_):
    value, s = ctx.saved_tensors
    log_gain = reference.clamped_log_scale(s, ctx.clamp, ctx.activation)
    through = 0 if ds is None else reference.log_scale_slopes(s, ctx.clamp, ctx.activation)[0] * ds
    sign = -1 if ctx.inverse else 1
    e = torch.exp(sign * log_gain)
    moved = 0 if dx is None else dx
    if ctx.inverse:
        dy = e * (moved - (0 if dt is None else dt)) - value * through
    else:
        dy = e * moved + value * e * through + (0 if dt is None else dt)
    dlog_det = sign * _sum_samples(through + torch.zeros_like(value)) if ctx.log_det else None
    return (dy + torch.zeros_like(value)).to(value.dtype), dlog_det.to(_log_det_dtype(value)) if ctx.log_det else None


def _backward_setup(ctx, inputs, output):
    (grad_out, grad_log_det, value, log_scale, shift, ctx.clamp, ctx.activation, ctx.inverse, ctx.from_output,
     ctx.needs_x, ctx.needs_s, _) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_out, grad_log_det, value, log_scale, shift)


def _second_order(ctx, u, v):
    """Gradients of (grad_x, grad_s) in plain, again differentiable, PyTorch. u and v are their cotangents.

    grad_x = g e and grad_s = sign (g m + lam) l', where e = exp(sign l) and m is what multiplies g: x e for the
    forward op, y - t from its output, x_out for the inverse.
    """
    g, lam, value, s, shift = ctx.saved_tensors
    wide = torch.promote_types(value.dtype, torch.float32)
    g, value, s = g.to(wide), value.to(wide), s.to(wide)
    sign = -1 if ctx.inverse else 1
    log_gain = reference.clamped_log_scale(s, ctx.clamp, ctx.activation)
    slope, curvature = reference.log_scale_slopes(s, ctx.clamp, ctx.activation)
    e = torch.exp(sign * log_gain)
    u = u.to(wide) if u is not None and ctx.needs_x else torch.zeros_like(g)
    v = v.to(wide) if v is not None and ctx.needs_s else torch.zeros_like(g)
    lam_full = 0 if lam is None else _per_sample(lam.to(wide), g)
    through_e = not (ctx.from_output or ctx.inverse)  # m = value * e
    m = value - shift.to(wide) if ctx.from_output else value * e if through_e else value
    to_g = u * e + sign * v * m * slope
    to_s = sign * u * g * e * slope + sign * v * (g * m + lam_full) * curvature
    if through_e:
        to_s = to_s + v * g * m * slope**2
    to_value = sign * v * g * slope * (e if through_e else 1)
    to_shift = -to_value if ctx.from_output else None
    to_lam = None if lam is None else _sum_samples(sign * v * slope).to(lam.dtype)
    saved = ctx.saved_tensors
    first = [to_g, to_lam, to_value, to_s, to_shift]
    return (*(None if d is None else d.to(t.dtype) for d, t in zip(first, saved)), *[None] * 7)


def _stack(size: int, tensors: tuple, dims: tuple) -> list[Tensor | None]:
    """vmap: the mapped dimension first (expanded where absent), then folded into the batch dimension."""
    out = []
    for t, dim in zip(tensors, dims):
        if t is not None:
            t = t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)
            t = t.reshape(-1, *t.shape[2:])
        out.append(t)
    return out


def _unstack(size: int, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(size, t.shape[0] // size, *t.shape[1:])


def _vmap(op, info, in_dims, x, log_scale, shift, *options):
    y, log_det = op(*_stack(info.batch_size, (x, log_scale, shift), in_dims), *options)
    return (_unstack(info.batch_size, y), _unstack(info.batch_size, log_det)), (0, None if log_det is None else 0)


def _backward_vmap(op, info, in_dims, *args):
    out = op(*_stack(info.batch_size, args[:5], in_dims[:5]), *args[5:])
    return tuple(_unstack(info.batch_size, t) for t in out), tuple(None if t is None else 0 for t in out)


_affine_coupling_backward = register(
    "affine_coupling_backward",
    "(Tensor grad_out, Tensor? grad_log_det, Tensor value, Tensor log_scale, Tensor? shift, float clamp, "
    "str clamp_activation, bool inverse, bool from_output, bool needs_x, bool needs_s, str? path) -> (Tensor, Tensor)",
    5,
    _backward,
    _backward_fake,
    setup_context=_backward_setup,
    backward=_second_order,
    vmap=_backward_vmap,
)

_affine_coupling = register(
    "affine_coupling",
    "(Tensor x, Tensor log_scale, Tensor shift, float clamp, str clamp_activation, bool inverse, bool log_det, "
    "str? path) -> (Tensor, Tensor)",
    3,
    _forward,
    _forward_fake,
    launch=_launch,
    setup_context=_setup,
    backward=_grads,
    jvp=_jvp,
    vmap=_vmap,
)


def affine_coupling(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor,
    *,
    clamp: float = 2.0,
    clamp_activation: str = "sigmoid",
    inverse: bool = False,
    return_log_det: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Affine coupling in one pass: `y = x * exp(l(log_scale)) + shift`, or its inverse `(x - shift) *
    exp(-l(log_scale))`.

    The transform of RealNVP (arXiv:1605.08803, eq. 7) with the clamps in use since Glow:

    ============  =====================================================  ====================
    activation    l(s)                                                   bound on abs(l)
    ============  =====================================================  ====================
    ``sigmoid``   ``clamp * tanh(s / 2)`` (HiNet, PRO-Face S, FrEIA)     ``clamp``
    ``tanh``      ``clamp * tanh(s)`` (RealNVP, FrEIA)                   ``clamp``
    ``atan``      ``0.636 * clamp * atan(s)`` (FrEIA's default)          ``0.99903 * clamp``
    ``none``      ``s`` (`clamp` is ignored)                             none
    ============  =====================================================  ====================

    Args:
        x: Tensor[B, ...], the half that is transformed.
        log_scale: s, a tensor of x's shape or broadcastable to it (a copy is made where it broadcasts inside a sample).
        shift: t, likewise.
        clamp: bound on the log-scale, >= 0; 0 makes the coupling additive.
        clamp_activation: "sigmoid", "tanh", "atan" or "none".
        inverse: compute the inverse. With the same log_scale and shift it undoes the forward transform up to rounding.
        return_log_det: also return the log-determinant of the Jacobian.

    Returns:
        Tensor[B, ...] of x's dtype and element order (channels_last stays channels_last); with `return_log_det` also
        Tensor[B]: the sum of l over each sample, in nats, negated for the inverse, float32 (float64 for float64
        input). It is accumulated in float64 in a fixed order: reproducible for any number of threads, independent of
        the other samples of the batch, and `log_det(inverse) == -log_det(forward)` bit for bit.

    Dtypes: float32, float64, bfloat16, float16; or x float32 with log_scale and shift bfloat16 or float16, the useful
        mode for
    sub-nets in low precision (also under autocast, which casts nothing here). Other mixtures are computed in their
    promoted type and returned as x's dtype. All arithmetic is float32 at least.

    Gradients: with respect to x, log_scale and shift, to any order; forward mode; vmap. Only the gradients asked for
        are computed.
    Non-finite values: log_scale = +-inf gives l = +-clamp and a zero gradient for the bounded activations; a NaN
    stays in its element and its sample's log-determinant. Empty tensors give empty results (log-determinants 0).

    Raises:
        ValueError: shapes that do not broadcast to x's, several devices, unknown activation, negative or non-finite
            clamp.
        TypeError: a dtype that is not floating point.
        pyface.PathError: the explicitly chosen path cannot serve the call.
    """
    if log_scale.shape != x.shape or shift.shape != x.shape:
        log_scale, shift = _broadcast(x, "log_scale", log_scale), _broadcast(x, "shift", shift)
    dtype, st = x.dtype, log_scale.dtype
    if not (st == shift.dtype and (st == dtype or (dtype == torch.float32 and st in (torch.bfloat16, torch.float16)))):
        st = torch.promote_types(st, shift.dtype)
        if not (dtype == torch.float32 and st in (torch.bfloat16, torch.float16)):
            st = torch.promote_types(dtype, st)
            x = x.to(st)
        log_scale, shift = log_scale.to(st), shift.to(st)
    _check_coupling(x, log_scale, shift, clamp, clamp_activation)
    y, log_det = _affine_coupling(
        x, log_scale, shift, float(clamp), clamp_activation, inverse, return_log_det, chosen_path()
    )
    if y.dtype != dtype:
        y = y.to(dtype)
    return (y, log_det) if return_log_det else y


def _broadcast(x: Tensor, name: str, value: Tensor) -> Tensor:
    try:
        return value.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"affine_coupling: {name} must have x's shape or broadcast to it; x is {tuple(x.shape)}, "
            f"{name} is {tuple(value.shape)}"
        ) from None


def affine_coupling_backward_from_output(
    grad_y: Tensor,
    grad_log_det: Tensor | None,
    y: Tensor,
    log_scale: Tensor,
    shift: Tensor,
    clamp: float,
    clamp_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reversible backward: `(x, grad_x, grad_log_scale, grad_shift)` of the forward coupling from its output.

    x is rebuilt by the inverse; the gradients need no x at all, since x exp(l) = y - shift. Dtypes as
    `affine_coupling` takes them without promotion, or promoted here; gradients of log_scale and shift have their own
    dtype.
    """
    st = torch.promote_types(log_scale.dtype, shift.dtype)
    if st != y.dtype and not (y.dtype == torch.float32 and st in (torch.bfloat16, torch.float16)):
        st = torch.promote_types(y.dtype, st)
    wide = torch.promote_types(y.dtype, st)
    s, t, v, g = log_scale.to(st), shift.to(st), y.to(wide), grad_y.to(wide)
    if grad_log_det is not None:  # that of a sum over layers may be wider than this layer's own
        grad_log_det = grad_log_det.to(_log_det_dtype(v))
    path = chosen_path()
    x, _ = _affine_coupling(v, s, t, float(clamp), clamp_activation, True, False, path)
    grad_x, grad_s = _affine_coupling_backward(
        g, grad_log_det, v, s, t, float(clamp), clamp_activation, False, True, True, True, path
    )
    return x.to(y.dtype), grad_x.to(y.dtype), grad_s.to(log_scale.dtype), grad_y.to(shift.dtype)


# ---- Haar wavelet ---------------------------------------------------------------------------------------------------


def _haar(name: str, undo: str):
    """Registers one direction. The transform is orthonormal: gradient and tangent are the other direction and
    itself."""

    def implementation(x, path):
        _check_haar(name, x)
        return getattr(CORE.pick(x.device.type, (x.dtype,), path), name)(x)

    def fake(x, path):
        _check_haar(name, x)
        batch, channels, height, width = x.shape
        if name == "haar_dwt2d":
            return x.new_empty((batch, 4 * channels, height // 2, width // 2))
        return x.new_empty((batch, channels // 4, 2 * height, 2 * width))

    def setup(ctx, inputs, output):
        ctx.path = inputs[1]
        ctx.save_for_backward()

    def backward(ctx, grad):
        return _HAAR[undo](grad, ctx.path), None

    def jvp(ctx, tangent, _):
        return _HAAR[name](tangent, ctx.path)

    def vmap(op, info, in_dims, x, path):
        (x,) = _stack(info.batch_size, (x,), in_dims)
        return _unstack(info.batch_size, op(x, path)), 0

    return register(
        name,
        "(Tensor x, str? path) -> Tensor",
        1,
        implementation,
        fake,
        setup_context=setup,
        backward=backward,
        jvp=jvp,
        vmap=vmap,
    )


_HAAR: dict = {}
_HAAR["haar_dwt2d"] = _haar("haar_dwt2d", "haar_idwt2d")
_HAAR["haar_idwt2d"] = _haar("haar_idwt2d", "haar_dwt2d")


def _haar_into(name: str, x: Tensor, out: Tensor) -> Tensor:
    """The transform written into `out`: at once where a compiled core can, else through a copy."""
    _check_haar(name, x)
    batch, channels, height, width = x.shape
    forward = name == "haar_dwt2d"
    shape = (batch, 4 * channels, height // 2, width // 2) if forward else (batch, channels // 4, 2 * height, 2 * width)
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"{name}: out must be {shape}, {x.dtype} on {x.device}, got {tuple(out.shape)}, {out.dtype} on {out.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise RuntimeError(f"{name}: out= has no gradient; call it under torch.no_grad() or without out")
    path = chosen_path()
    if type(x) is Tensor and type(out) is Tensor and out.is_contiguous() and not torch.compiler.is_compiling():
        implementation = CORE.pick(x.device.type, (x.dtype,), path)
        apart = x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
        if isinstance(implementation, _Compiled) and apart:
            return getattr(implementation, name)(x, out)
    return out.copy_(_HAAR[name](x, path))


def haar_dwt2d(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """One level of the orthonormal 2-D Haar wavelet transform.

    With a, b, c, d the (even row, even column), (even, odd), (odd, even), (odd, odd) pixel of each 2 x 2 patch::

        LL = ( a+b+c+d)/2   HL = (-a+b-c+d)/2   LH = (-a-b+c+d)/2   HH = (a-b-c+d)/2

    Args:
        x: Tensor[B, C, H, W], H and W even; float32, float64, bfloat16 or float16.
        out: write the result here (no gradient). For results of 32 MiB and more, whose fresh pages cost several times
            the transform, and for the smallest. Written at once if contiguous and apart from x, else through a copy.

    Returns:
        Tensor[B, 4C, H/2, W/2], contiguous, sub-band major (channel = band * C + c, bands LL, HL, LH, HH): order and
        signs of HiNet and PRO-Face S. FrEIA's HaarDownsampling with `order_by_wavelet=True` has the same order with
        HL and LH negated.

    The transform preserves energy; its gradient is `haar_idwt2d`. Sums of low-precision inputs are taken in float32
    and rounded once. Differentiable to any order, forward mode, vmap.

    Raises:
        ValueError: not 4-dimensional, H or W odd, or an `out` that does not fit. TypeError: not floating point.
        RuntimeError: `out` where a gradient would be needed.
    """
    return _HAAR["haar_dwt2d"](x, chosen_path()) if out is None else _haar_into("haar_dwt2d", x, out)


def haar_idwt2d(bands: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Inverse, and transpose, of `haar_dwt2d`: Tensor[B, 4C, h, w] to Tensor[B, C, 2h, 2w]; `out` as there.

    Raises:
        ValueError: not 4-dimensional, or channels not a multiple of 4. TypeError: not floating point.
    """
    return _HAAR["haar_idwt2d"](bands, chosen_path()) if out is None else _haar_into("haar_idwt2d", bands, out)
