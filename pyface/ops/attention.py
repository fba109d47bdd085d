"""Op table of core `attention`: attention over keys and extra rows, and attention under a spatial prior.

Order of this file: argument checks, the paths' implementations, the op with its gradients, the public functions. Every
argument is checked here, once, before any pointer is taken. One op serves both public functions.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyface.ops import _paths
from pyface.ops._paths import Core, address, autocast_dtype, chosen_path
from pyface.ops._register import register
from pyface.ops.reference import attention as reference

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
TENSORS = ("query", "key", "value", "extra_key", "extra_value", "extra_bias", "prior")


def real(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, of lse, extra_bias and prior."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check(query, key, value, extra_key, extra_value, extra_bias, prior, is_causal, scale, grid_width, smooth) -> None:
    for name, t in zip(TENSORS[:3], (query, key, value)):
        if t.dim() != 4 or t.shape[-1] < 1:
            rows = "L" if name == "query" else "S"
            raise ValueError(
                f"attention: {name} must be Tensor[B, H, {rows}, E] with E >= 1, got shape {tuple(t.shape)}"
            )
    batch, heads, _, depth = query.shape
    size, width = key.shape[2], value.shape[3]
    if key.shape != (batch, heads, size, depth):
        raise ValueError(
            f"attention: key must be Tensor[{batch}, {heads}, S, {depth}] beside query {tuple(query.shape)}, got shape "
            f"{tuple(key.shape)}"
        )
    if value.shape[:3] != (batch, heads, size):
        raise ValueError(
            f"attention: value must be Tensor[{batch}, {heads}, {size}, Ev] beside key {tuple(key.shape)}, got shape "
            f"{tuple(value.shape)}"
        )
    if (extra_key is None) != (extra_value is None):
        raise ValueError("attention: extra_key and extra_value belong together, and only one of them is given")
    extras = 0 if extra_key is None else extra_key.shape[-2] if extra_key.dim() == 4 else -1
    for name, t, columns in (("extra_key", extra_key, depth), ("extra_value", extra_value, width)):
        if t is not None and (t.dim() != 4 or len(t) not in (1, batch) or t.shape[1:] != (heads, extras, columns)):
            raise ValueError(
                f"attention: {name} must be Tensor[{heads}, R, {columns}], or Tensor[{batch}, {heads}, R, {columns}] "
                f"with rows for each sample, the same R in both; got shape {_shown(t)}"
            )
    if extra_key is not None and len(extra_key) != len(extra_value):
        raise ValueError(
            f"attention: extra_key and extra_value must both be shared or both be given for each sample, got shapes "
            f"{_shown(extra_key)} and {_shown(extra_value)}"
        )
    if extra_bias is not None and extra_bias.shape != (heads, extras):
        raise ValueError(
            f"attention: extra_bias must be a number or broadcast to Tensor[{heads}, {extras}], got shape "
            f"{tuple(extra_bias.shape)}"
        )
    if prior is not None and prior.shape != (*query.shape[:3], 4):
        raise ValueError(
            f"attention: centre and sharpness must both be Tensor[{batch}, {heads}, {query.shape[2]}, 2], got "
            f"{tuple(prior.shape)} for the two together"
        )
    if prior is not None and (grid_width < 1 or not 0 < smooth < math.inf):
        raise ValueError(
            f"attention: grid_width must be at least 1 and smooth positive, got {grid_width} and {smooth}"
        )
    if not -math.inf < scale < math.inf:  # a comparison, which torch.compile can trace
        raise ValueError(f"attention: scale must be finite, got {scale}")
    if max(query.shape[2], size + max(extras, 0)) >= 2**31:
        raise ValueError("attention: at most 2^31 - 1 queries, and as many keys and extra rows together")
    given = {
        name: t
        for name, t in zip(TENSORS, (query, key, value, extra_key, extra_value, extra_bias, prior), strict=True)
        if t is not None
    }
    for name, t in given.items():
        if t.device != query.device:
            raise ValueError(
                f"attention: all tensors must be on the device of query, {query.device}; {name} is on {t.device}"
            )
        if not t.is_floating_point():
            raise TypeError(f"attention: {name} must be of a floating-point type, got {t.dtype}")
    for name in ("key", "value"):
        if given[name].dtype != query.dtype:
            raise TypeError(
                f"attention: query, key and value must be of one type, got {query.dtype} and {given[name].dtype} for "
                f"{name}"
            )
    for name in ("extra_key", "extra_value"):
        if name in given and given[name].dtype not in (query.dtype, real(query.dtype)):
            raise TypeError(
                f"attention: {name} must be {query.dtype} as query is"
                f"{'' if real(query.dtype) == query.dtype else f', or {real(query.dtype)}'}, got {given[name].dtype}"
            )
    if extra_key is not None and extra_key.dtype != extra_value.dtype:
        raise TypeError(
            f"attention: extra_key and extra_value must be of one type, got {extra_key.dtype} and {extra_value.dtype}"
        )
    for name in ("extra_bias", "prior"):
        if name in given and given[name].dtype != real(query.dtype):
            raise TypeError(
                f"attention: {name} must be {real(query.dtype)} beside {query.dtype}, got {given[name].dtype}"
            )


def _shown(t: Tensor) -> tuple[int, ...]:
    """The shape as the user gave it: shared rows were given a first dimension of 1."""
    return tuple(t.shape[1:]) if t.dim() == 4 and len(t) == 1 else tuple(t.shape)


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """Room for the result, in memory as [B, L, H, Ev] where query is so: what models flatten next."""
    batch, heads, length, _ = query.shape
    shape = batch, heads, length, value.shape[3]
    if not query.is_contiguous() and query.transpose(1, 2).is_contiguous():
        return torch.empty(batch, length, heads, shape[3], dtype=query.dtype, device=query.device).transpose(1, 2)
    return torch.empty(shape, dtype=query.dtype, device=query.device)


def _empty_lse(query: Tensor, wants_lse: bool) -> Tensor | None:
    return torch.empty(query.shape[:3], dtype=real(query.dtype), device=query.device) if wants_lse else None


# ---- paths ----------------------------------------------------------------------------------------------------------
# Each implementation has forward and backward on checked tensors with at least one query and at least one row to see.


def _widened(t: Tensor | None, query: Tensor) -> Tensor | None:
    return None if t is None else t.to(real(query.dtype))


def _reference() -> object:
    def forward(query, key, value, extra_key, extra_value, extra_bias, prior, *options):
        *options, wants_lse = options
        tensors = (query, key, value, extra_key, extra_value, extra_bias, prior)
        found, lse = reference.attention(*(_widened(t, query) for t in tensors), options)
        out = _empty(query, value)
        out.copy_(found)
        return out, lse if wants_lse else None

    def backward(grad, grad_lse, *args):
        *tensors, _out, _lse, is_causal, scale, grid_width, smooth, needs = args
        query = tensors[0]
        found = reference.backward(
            *(_widened(t, query) for t in (grad, grad_lse, *tensors)), (is_causal, scale, grid_width, smooth)
        )
        return tuple(
            g.to(t.dtype).contiguous() if need and t is not None else None
            for g, t, need in zip(found, tensors, needs, strict=True)
        )

    return SimpleNamespace(forward=forward, backward=backward)


class _Cpu:
    """The core of the compiled module: allocates results, hands over addresses."""

    def __init__(self, module):
        self.module = module

    def forward(
        self, query, key, value, extra_key, extra_value, extra_bias, prior, is_causal, scale, grid_width, smooth,
        wants_lse,
    ):  # fmt: skip
        out = _empty(query, value)
        if query.dtype == torch.float16:  # the kernel has no such type
            tensors = (query, key, value, extra_key, extra_value, extra_bias, prior)
            options = (is_causal, scale, grid_width, smooth, wants_lse)
            found, lse = self.forward(*(_widened(t, query) for t in tensors), *options)
            return out.copy_(found), lse
        lse = _empty_lse(query, wants_lse)
        call, held = self._call(
            query, key, value, extra_key, extra_value, extra_bias, prior, out, lse, is_causal, scale, grid_width, smooth
        )
        self.module.attention(*call, torch.get_num_threads())
        del held
        return out, lse

    def backward(
        self, grad, grad_lse, query, key, value, extra_key, extra_value, extra_bias, prior, out, lse, is_causal, scale,
        grid_width, smooth, needs,
    ):  # fmt: skip
        threads, wide = torch.get_num_threads(), real(query.dtype)
        tensors = (query, key, value, extra_key, extra_value, extra_bias, prior)
        if query.dtype == torch.float16:
            wide_args = (_widened(t, query) for t in (grad, grad_lse, *tensors, out, lse))
            found = self.backward(*wide_args, is_causal, scale, grid_width, smooth, needs)
            return tuple(None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True))
        grads = [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else None
            for t, need in zip(tensors, needs, strict=True)
        ]
        # Extra rows: the core leaves each sample's own part, which are then added up in their order.
        batch, heads = query.shape[:2]
        parts = [
            None if g is None else torch.empty(batch, heads, *t.shape[-2 + (k == 2) :], dtype=wide)
            for k, (g, t) in enumerate(zip(grads[3:6], tensors[3:6]))
        ]
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        call, held = self._call(*tensors, _rows(out), lse.contiguous(), is_causal, scale, grid_width, smooth)
        grad = _rows(grad)
        self.module.attention_backward(
            *call, [_tuple(grad), *(_tuple(g) for g in grads[:3])], address(grad_lse),
            *(address(p) for p in parts), address(grads[6]), threads,
        )  # fmt: skip
        for part, g in zip(parts, grads[3:6], strict=True):
            if g is not None:
                many = 1 if g.dim() == 4 and len(g) == batch else batch
                self.module.attention_sum(
                    part.data_ptr(), many, g.numel(), _DTYPE_CODES[wide], g.data_ptr(), _DTYPE_CODES[g.dtype], threads
                )
        del held
        return tuple(grads)

    @staticmethod
    def _call(query, key, value, extra_key, extra_value, extra_bias, prior, out, lse, *options):
        is_causal, scale, grid_width, smooth = options
        query, key, value, extra_key, extra_value = map(_rows, (query, key, value, extra_key, extra_value))
        prior = None if prior is None else prior.contiguous()
        extras = 0 if extra_key is None else extra_key.shape[2]
        sizes = (*query.shape[:3], key.shape[2], extras, query.shape[3], value.shape[3])
        tensors = [_tuple(t) for t in (query, key, value, extra_key, extra_value, out)]
        call = (
            sizes, tensors, address(extra_bias), (0, 0) if extra_bias is None else extra_bias.stride(), address(lse),
            address(prior), grid_width, smooth, scale, _DTYPE_CODES[query.dtype],
            _DTYPE_CODES[query.dtype if extra_key is None else extra_key.dtype], is_causal,
        )  # fmt: skip
        return call, (query, key, value, extra_key, extra_value, extra_bias, prior, lse)  # alive until the call is over


def _rows(t: Tensor | None) -> Tensor | None:
    """The tensor with dense rows."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _tuple(t: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of sample, head and row; one sample is shared by all."""
    if t is None:
        return 0, 0, 0, 0
    batch, head, row, _ = t.stride()
    return t.data_ptr(), 0 if len(t) == 1 else batch, head, row


def _load_cuda() -> object:
    from pyface.ops._attention_gpu import Cuda

    return Cuda(_paths.loaded("_cuda"))


def _load_triton() -> object:
    from pyface.kernels import attention
    from pyface.ops._attention_gpu import Triton

    return Triton(attention)


_TYPES = {(d, d) for d in _DTYPE_CODES} | {(d, torch.float32) for d in (torch.bfloat16, torch.float16)}

CORE = Core(
    "attention",
    # (query, extra rows)
    dtypes={
        "cuda": _TYPES,
        "triton": _TYPES,
        "cpu": _TYPES,  # float16 through copies in float32
    },
    load={
        "cpu": lambda: _Cpu(_paths.loaded("_cpu")),
        "cuda": _load_cuda,
        "triton": _load_triton,
        "reference": _reference,
    },
)

# ---- the op ---------------------------------------------------------------------------------------------------------


def _nothing_to_see(query: Tensor, key: Tensor, extra_key: Tensor | None) -> bool:
    return query.numel() == 0 or key.shape[2] + (0 if extra_key is None else extra_key.shape[2]) == 0


def _launch(query, key, value, extra_key, extra_value, extra_bias, prior, *options):
    *options, wants_lse, path = options
    types = (query.dtype, query.dtype if extra_key is None else extra_key.dtype)
    implementation = CORE.pick(query.device.type, types, path)
    if _nothing_to_see(query, key, extra_key):
        lse = _empty_lse(query, wants_lse)
        return _empty(query, value).zero_(), lse if lse is None else lse.fill_(-torch.inf)
    return implementation.forward(
        query, key, value, extra_key, extra_value, extra_bias, prior, *options, wants_lse
    )


def _forward(query, key, value, extra_key, extra_value, extra_bias, prior, *options):
    _check(query, key, value, extra_key, extra_value, extra_bias, prior, *options[:4])
    return _launch(query, key, value, extra_key, extra_value, extra_bias, prior, *options)


def _forward_fake(query, key, value, extra_key, extra_value, extra_bias, prior, *options):
    _check(query, key, value, extra_key, extra_value, extra_bias, prior, *options[:4])
    lse = _empty_lse(query, options[4])
    return _empty(query, value), query.new_empty(0) if lse is None else lse


def _check_backward(grad, grad_lse, tensors, out, lse, options) -> None:
    _check(*tensors, *options)
    query, value = tensors[0], tensors[2]
    shape = (*query.shape[:3], value.shape[3])
    for name, t in (("grad", grad), ("out", out)):
        if t.shape != shape or t.dtype != query.dtype or t.device != query.device:
            raise ValueError(
                f"attention_backward: {name} must be {shape}, {query.dtype} on {query.device}, got {tuple(t.shape)}, "
                f"{t.dtype} on {t.device}"
            )
    for name, t in (("lse", lse), ("grad_lse", grad_lse)):
        if t is not None and (t.shape != query.shape[:3] or t.dtype != real(query.dtype) or t.device != query.device):
            raise ValueError(
                f"attention_backward: {name} must be {tuple(query.shape[:3])}, {real(query.dtype)} on {query.device}, "
                f"got {tuple(t.shape)}, {t.dtype} on {t.device}"
            )


def _backward(grad, grad_lse, *args):
    *tensors, out, lse, is_causal, scale, grid_width, smooth, needs, path = args
    options = is_causal, scale, grid_width, smooth
    _check_backward(grad, grad_lse, tensors, out, lse, options)
    query, key, extra_key = tensors[0], tensors[1], tensors[3]
    if _nothing_to_see(query, key, extra_key):
        return tuple(torch.zeros_like(t) if n and t is not None else None for t, n in zip(tensors, needs, strict=True))
    types = (query.dtype, query.dtype if extra_key is None else extra_key.dtype)
    implementation = CORE.pick(query.device.type, types, path)
    return implementation.backward(grad, grad_lse, *tensors, out, lse, *options, needs)


def _backward_fake(grad, grad_lse, *args):
    *tensors, out, lse, is_causal, scale, grid_width, smooth, needs, _path = args
    _check_backward(grad, grad_lse, tensors, out, lse, (is_causal, scale, grid_width, smooth))
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if n and t is not None else grad.new_empty(0)
        for t, n in zip(tensors, needs, strict=True)
    )


def _setup(ctx, inputs, output):
    *tensors, ctx.is_causal, ctx.scale, ctx.grid_width, ctx.smooth, ctx.wants_lse, ctx.path = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse)


def _grads(ctx, grad, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    if not ctx.wants_lse:
        raise RuntimeError("attention: this result was computed without what its gradient needs (wants_lse=False)")
    if grad is None and grad_lse is None:
        return (None,) * 13
    if grad is None:
        grad = torch.zeros_like(out)
    needs = [bool(n) for n in ctx.needs_input_grad[:7]]
    found = _attention_backward(
        grad, grad_lse, *tensors, out, lse, ctx.is_causal, ctx.scale, ctx.grid_width, ctx.smooth, needs, ctx.path
    )
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 6)


def _jvp(ctx, *tangents):
    """The tangents in plain PyTorch: correct, and slower than the op."""
    *tensors, _out, _lse = ctx.saved_tensors
    query = tensors[0]
    options = ctx.is_causal, ctx.scale, ctx.grid_width, ctx.smooth
    widened = [[_widened(t, query) for t in group] for group in (tensors, tangents[:7])]
    d_out, d_lse = reference.tangent(*widened, options)
    return d_out.to(query.dtype), d_lse


def _backward_setup(ctx, inputs, output):
    *tensors, _out, _lse, ctx.is_causal, ctx.scale, ctx.grid_width, ctx.smooth, needs, _path = inputs
    ctx.needs = list(needs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _second_order(ctx, *cotangents):
    """Gradients of the gradients, by torch's own derivative of the reference's: correct, and slower than the op."""
    saved = ctx.saved_tensors
    query = saved[2]
    options = ctx.is_causal, ctx.scale, ctx.grid_width, ctx.smooth
    wanted = [i for i in range(7) if ctx.needs[i] and saved[2 + i] is not None and cotangents[i] is not None]
    given = [i for i, t in enumerate(saved) if t is not None]
    found: list[Tensor | None] = [None] * 9
    if wanted:

        def gradients(*tensors):
            full = [None] * 9
            for i, t in zip(given, tensors, strict=True):
                full[i] = t
            every = reference.backward(*full, options)
            return tuple(every[i] for i in wanted)

        _, pull = torch.func.vjp(gradients, *(_widened(saved[i], query) for i in given))
        for i, g in zip(given, pull(tuple(_widened(cotangents[i], query) for i in wanted)), strict=True):
            found[i] = g.to(saved[i].dtype)
    return (*found, *[None] * 8)  # out and lse were taken as what they are, functions of the others


# ---- vmap: many calls are one call with more heads ------------------------------------------------------------------


def _fold(size: int, t: Tensor | None, dim: int | None, axis: int) -> Tensor | None:
    """The mapped dimension (expanded where absent) folded into the heads."""
    if t is None:
        return None
    t = t.movedim(dim, axis) if dim is not None else t.unsqueeze(axis).expand(*t.shape[:axis], size, *t.shape[axis:])
    return t.flatten(axis, axis + 1)


_AXES = (1, 1, 1, 1, 1, 0, 1)  # of the heads in the seven tensors


def _unfold(size: int, found: tuple[Tensor, ...], axes: tuple[int, ...]):
    results, dims, some = [], [], next(t for t in found if t is not None)
    for t, axis in zip(found, axes, strict=True):
        absent = t is None or (t.dim() == 1 and t.numel() == 0)  # what was not asked for
        results.append(some.new_empty(size, 0) if absent else t.unflatten(axis, (size, t.shape[axis] // size)))
        dims.append(0 if absent else axis)
    return tuple(results), tuple(dims)


def _vmap(op, info, in_dims, *args):
    size, options = info.batch_size, args[7:]
    folded = [_fold(size, t, dim, axis) for t, dim, axis in zip(args[:7], in_dims[:7], _AXES, strict=True)]
    return _unfold(size, op(*folded, *options), (1, 1))


def _backward_vmap(op, info, in_dims, *args):
    size, options = info.batch_size, args[11:]
    axes = (1, 1, *_AXES, 1, 1)
    folded = [_fold(size, t, dim, axis) for t, dim, axis in zip(args[:11], in_dims[:11], axes, strict=True)]
    return _unfold(size, op(*folded, *options), _AXES)


_attention_backward = register(
    "attention_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? extra_key, Tensor? extra_value, "
    "Tensor? extra_bias, Tensor? prior, Tensor out, Tensor lse, bool is_causal, float scale, int grid_width, "
    "float smooth, bool[7] needs, str? path) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    11,
    _backward,
    _backward_fake,
    setup_context=_backward_setup,
    backward=_second_order,
    vmap=_backward_vmap,
)

_attention = register(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? extra_key, Tensor? extra_value, Tensor? extra_bias, "
    "Tensor? prior, bool is_causal, float scale, int grid_width, float smooth, bool wants_lse, str? path) "
    "-> (Tensor, Tensor)",
    7,
    _forward,
    _forward_fake,
    launch=_launch,
    setup_context=_setup,
    backward=_grads,
    jvp=_jvp,
    vmap=_vmap,
)

# ---- public ---------------------------------------------------------------------------------------------------------


def concat_kv_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    extra_bias: float | Tensor = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys and R extra rows that every query sees, without concatenating anything in memory.

    ::

        s[i, j] = scale * q_i.k_j,  seen if not causal or j <= i + (S - L)        (aligned at the lower right)
        r[i, m] = scale * q_i.xk_m + extra_bias[m],  always seen
        out_i = softmax over [r_i, s_i] times the rows [extra_value, value];  lse_i = log of its sum of exponentials

    With learned rows this is CatVersion's personalized attention (arXiv:2311.14631), prefix tuning (arXiv:2101.00190),
    and `add_bias_kv` of `torch.nn.MultiheadAttention`.

    Args:
        query: Tensor[B, H, L, E]. key: Tensor[B, H, S, E]. value: Tensor[B, H, S, Ev].
        extra_key, extra_value: Tensor[H, R, E] and Tensor[H, R, Ev], shared by all samples, or Tensor[B, H, R, E] and
            Tensor[B, H, R, Ev]. R = 0 or None: plain attention.
        is_causal: query i sees the keys up to i + S - L: the last query all of them. (torch's own `is_causal` aligns at
            the upper left.)
        scale: of scores; 1 / sqrt(E) by default.
        extra_bias: added to the scores of the extra rows after scaling: a number, or a tensor that broadcasts to
            Tensor[H, R]. Adapters released by CatVersion's authors want 1. Minus infinity switches rows off.
        return_lse: also return the log-sum-exp.

    Returns:
        out Tensor[B, H, L, Ev] of query's dtype, in memory as [B, L, H, Ev] where query is so; with return_lse also
        lse Tensor[B, H, L], natural logarithm, float32 (float64 for float64), scale and bias included, with a gradient
        of its own. A query that sees nothing gets out = 0 and lse = -inf, and gives zero gradients.

    Dtypes: query, key and value of one floating-point type; extra rows of the same, or float32 beside bfloat16 and
        float16, in which case their gradient is float32 too. Sums and exponentials are float32 at least. The path
        `cpu` computes float16 in copies in float32. Under autocast query, key and value take its type, float32 extra
        rows stay.

    Gradients: of every argument, to second order; forward mode; vmap. Only those asked for are computed; where only
        the extra rows want one, the cost is that of R rows. Those of shared rows are summed over the samples in order.
        Second order and forward mode run in plain PyTorch.
    Deterministic: results and gradients do not depend on the number of threads, bit for bit.
    Not a number: a NaN reaches the queries that see it, and no other, masked ones included.
    Memory: results, and on the path `cpu` per thread about 1 KB for each number of a row, in the backward pass also the
        gradients of a head in float32.

    Raises:
        ValueError: shapes that do not fit, several devices, infinity or NaN for extra_bias (a tensor is not read for
            them: they make NaN). TypeError: dtypes that do not.
        pyface.PathError: the explicitly chosen path cannot serve the call.
    """
    if (extra_key is None) != (extra_value is None):
        raise ValueError("concat_kv_attention: extra_key and extra_value belong together; give both, or None for both")
    query, key, value, low = _autocast(query, key, value)
    if extra_key is not None:
        if extra_key.dim() not in (3, 4) or extra_value.dim() != extra_key.dim():
            raise ValueError(
                "concat_kv_attention: extra_key and extra_value must both be Tensor[H, R, E] or both Tensor[B, H, R, E]"
                f", got shapes {tuple(extra_key.shape)} and {tuple(extra_value.shape)}"
            )
        if low is not None:
            extra_key, extra_value = (
                t.to(low) if t.dtype not in (low, torch.float32) else t for t in (extra_key, extra_value)
            )
        if extra_key.dim() == 3:
            extra_key, extra_value = extra_key.unsqueeze(0), extra_value.unsqueeze(0)
    bias = None
    if extra_key is not None and extra_key.shape[2] and not (isinstance(extra_bias, (int, float)) and extra_bias == 0):
        bias = _bias(extra_bias, query, extra_key.shape[2])
    return _call(query, key, value, extra_key, extra_value, bias, None, is_causal, scale, 1, 1.0, return_lse)


def _bias(extra_bias: float | Tensor, query: Tensor, extras: int) -> Tensor:
    wide, shape = real(query.dtype), (query.shape[1], extras)
    if not isinstance(extra_bias, Tensor):
        if not hasattr(extra_bias, "__float__"):
            raise TypeError(f"concat_kv_attention: extra_bias must be a number or a tensor, got {extra_bias!r}")
        if math.isnan(extra_bias) or extra_bias == math.inf:
            raise ValueError(f"concat_kv_attention: extra_bias must be finite or minus infinity, got {extra_bias}")
        return torch.full((), extra_bias, dtype=wide, device=query.device).expand(shape)
    try:
        return extra_bias.to(wide).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"concat_kv_attention: extra_bias must be a number or broadcast to Tensor[{shape[0]}, {shape[1]}] (heads, "
            f"extra rows), got shape {tuple(extra_bias.shape)}"
        ) from None


def spatial_prior_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centre: Tensor,
    sharpness: Tensor,
    grid_width: int,
    *,
    smooth: float = 4.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the places of a picture under a Gaussian prior that every query and head sets for itself.

    ::

        score[i, j] = scale * q_i.k_j - (sharpness_x (centre_x - x_j)^2 + sharpness_y (centre_y - y_j)^2) / smooth

    with key j at (x_j, y_j) = (j % grid_width, j // grid_width): the spatially enhanced cross-attention (SECA) of
    MMNet (arXiv:2307.02733) and SeqFakeFormer. No [L, S] prior is made in memory.

    Args:
        query: Tensor[B, H, L, E]. key: Tensor[B, H, S, E]. value: Tensor[B, H, S, Ev]; the S places row by row.
        centre: Tensor[B, H, L, 2], x and y in places.
        sharpness: Tensor[B, H, L, 2], per axis; 0 is no prior. Usually a square, so not negative.
        grid_width: places in a row.
        smooth: the authors' beta.
        scale, return_lse: as in :func:`concat_kv_attention`.

    Returns:
        out Tensor[B, H, L, Ev], and with return_lse lse Tensor[B, H, L].

    Dtypes, gradients (of centre and sharpness, too), determinism and errors: as in :func:`concat_kv_attention`. centre
    and sharpness are taken in float32 (float64 beside float64).
    """
    for name, t in (("centre", centre), ("sharpness", sharpness)):
        if query.dim() == 4 and t.shape != (*query.shape[:3], 2):
            raise ValueError(
                f"spatial_prior_attention: {name} must be Tensor{[*query.shape[:3], 2]}, got shape {tuple(t.shape)}"
            )
        if t.device != query.device:
            raise ValueError(
                f"spatial_prior_attention: all tensors must be on the device of query, {query.device}; {name} is on "
                f"{t.device}"
            )
    if int(grid_width) != grid_width:
        raise ValueError(f"spatial_prior_attention: grid_width must be a whole number of places, got {grid_width}")
    query, key, value, _ = _autocast(query, key, value)
    prior = torch.cat([centre, sharpness], dim=-1).to(real(query.dtype))
    return _call(query, key, value, None, None, None, prior, False, scale, int(grid_width), float(smooth), return_lse)


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype | None]:
    low = autocast_dtype(query.device.type)
    if low is None:
        return query, key, value, None
    cast = (t.to(low) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (query, key, value))
    return *cast, low if query.dtype != torch.float64 else None


def _call(query, key, value, extra_key, extra_value, bias, prior, is_causal, scale, grid_width, smooth, return_lse):
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None and query.dim() else scale
    tensors = (query, key, value, extra_key, extra_value, bias, prior)
    _check(*tensors, is_causal, float(scale), grid_width, smooth)
    # Without a gradient in sight nobody needs the log-sum-exp: a logarithm less for every query.
    wants_lse = (
        return_lse
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )
    out, lse = _attention(
        *tensors, bool(is_causal), float(scale), grid_width, smooth, wants_lse, chosen_path()
    )
    return (out, lse) if return_lse else out
