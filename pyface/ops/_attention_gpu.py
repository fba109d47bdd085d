"""The two GPU paths of core `attention`: layouts, sums over the batch, and the launcher of the CUDA one.

Both take tensors with any strides but dense rows: query, key and value as they lie in the common views, extra rows
[1 or B, H, R, E], with 1 shared by the batch. Their bias [H, R] and the prior's numbers [B, H, L, 4] have the type of
sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyface.ops._deform_conv_gpu import DTYPE_CODES, tf32_allowed
from pyface.ops._paths import address
from pyface.ops.attention import TENSORS, _empty, _empty_lse, _rows


def strides(t: Tensor) -> tuple[int, int, int]:
    """Of sample, head and row, where one sample stands for all."""
    return 0 if len(t) == 1 else t.stride(0), t.stride(1), t.stride(2)


class Call(NamedTuple):
    """Arguments in layouts that the kernels take; holds the copies while they are queued."""

    query: Tensor
    key: Tensor
    value: Tensor
    extra_key: Tensor
    extra_value: Tensor
    bias: Tensor | None
    prior: Tensor | None
    is_causal: bool
    scale: float
    grid_width: int
    smooth: float
    out: Tensor
    lse: Tensor | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """B, H, L, S, R, E, Ev."""
        batch, heads, queries, depth = self.query.shape
        return batch, heads, queries, self.key.shape[2], self.extra_key.shape[2], depth, self.value.shape[3]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.extra_key, self.extra_value, self.out

    @property
    def tf32(self) -> bool:
        return self.query.dtype == torch.float32 and tf32_allowed()


class _Attention:
    """What the paths share: allocation, and the sum over the batch where it shares extra rows."""

    def __init__(self, module):
        self.module = module

    def forward(
        self, query, key, value, extra_key, extra_value, extra_bias, prior, is_causal, scale, grid_width, smooth,
        wants_lse,
    ):  # fmt: skip
        out = _empty(query, value)
        lse = _empty_lse(query, wants_lse)
        if out.numel():
            out, lse = self.launch_forward(
                self.call(
                    query, key, value, extra_key, extra_value, extra_bias, prior, is_causal, scale, grid_width, smooth,
                    out, lse,
                )
            )  # fmt: skip
        return out, lse

    def backward(
        self, grad, grad_lse, query, key, value, extra_key, extra_value, extra_bias, prior, out, lse, is_causal, scale,
        grid_width, smooth, needs,
    ):  # fmt: skip
        real, batch = lse.dtype, len(query)
        asked = dict(zip(TENSORS, needs, strict=True))
        given = dict(zip(TENSORS, (query, key, value, extra_key, extra_value, extra_bias, prior), strict=True))
        asked = {name: asked[name] and given[name] is not None for name in TENSORS}
        new = dict.fromkeys(TENSORS)
        for name in ("query", "key", "value", "prior"):
            if asked[name]:
                new[name] = torch.empty_like(given[name], memory_format=torch.contiguous_format)
        for name in ("extra_key", "extra_value", "extra_bias"):
            if asked[name]:  # what every sample gives
                shape = given[name].shape if name == "extra_bias" else given[name].shape[1:]
                new[name] = query.new_empty(batch, *shape, dtype=real)
        if lse.numel() and any(asked.values()):
            call = self.call(
                query, key, value, extra_key, extra_value, extra_bias, prior, is_causal, scale, grid_width, smooth, out,
                lse,
            )  # fmt: skip
            grad_lse = None if grad_lse is None else grad_lse.to(real).contiguous()
            grads = self.launch_backward(call, _rows(grad), grad_lse, torch.empty_like(call.lse), new)
            new = dict(zip(TENSORS, grads, strict=True))
        else:
            new = {name: None if t is None else t.zero_() for name, t in new.items()}
        for name in ("extra_key", "extra_value"):
            if new[name] is not None:
                dtype, shared = given[name].dtype, len(given[name]) == 1
                new[name] = self.sum(new[name], dtype).unsqueeze(0) if shared else new[name].to(dtype)
        if new["extra_bias"] is not None:
            new["extra_bias"] = self.sum(new["extra_bias"], real)
        return tuple(new[name] for name in TENSORS)

    def call(
        self, query, key, value, extra_key, extra_value, bias, prior, is_causal, scale, grid_width, smooth, out, lse
    ):  # fmt: skip
        if extra_key is None:
            extra_key, extra_value = (t.new_empty(1, t.shape[1], 0, t.shape[3]) for t in (query, value))
        prior = None if prior is None else prior.contiguous()
        rows = (_rows(t) for t in (query, key, value, extra_key, extra_value))
        return Call(
            *rows,
            bias,
            prior,
            is_causal,
            float(scale),
            grid_width,
            float(smooth),
            _rows(out),
            None if lse is None else lse.contiguous(),
        )


class Triton(_Attention):
    """The kernels of `pyface.kernels.attention`."""

    def launch_forward(self, call):
        return self.module.forward(*self.arguments(call))

    def launch_backward(self, call, grad, grad_lse, delta, new):
        return self.module.backward(*self.arguments(call), grad, strides(grad), grad_lse, delta, tuple(new.values()))

    def sum(self, parts, dtype):
        out = parts.new_empty(parts.shape[1:], dtype=dtype)
        return self.module.sum_samples(parts, out) if out.numel() else out

    def arguments(self, call):
        return (
            call.sizes, call.tensors, tuple(map(strides, call.tensors)), call.bias, call.lse, call.prior,
            call.grid_width, call.smooth, call.is_causal, call.scale, call.tf32,
        )  # fmt: skip


class Cuda(_Attention):
    """The core of the compiled module `pyface._cuda`: hands over addresses."""

    pointer = staticmethod(address)

    def where(self, x: Tensor) -> tuple[int, int]:
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream

    def rows(self, t: Tensor | None) -> tuple[int, tuple[int, int, int]]:
        return self.pointer(t), (0, 0, 0) if t is None else strides(t)

    def launch_forward(self, call):
        self.module.attention_forward(*self.arguments(call), *self.where(call.query))
        return call.out, call.lse

    def launch_backward(self, call, grad, grad_lse, delta, new):
        self.module.attention_backward(
            *self.arguments(call), self.rows(grad), self.pointer(grad_lse), self.pointer(delta),
            tuple(self.rows(new[name]) for name in TENSORS[:3]), tuple(self.pointer(new[name]) for name in TENSORS[3:]),
            *self.where(call.query),
        )  # fmt: skip
        return tuple(new.values())

    def sum(self, parts, dtype):
        out = parts.new_empty(parts.shape[1:], dtype=dtype)
        if out.numel():
            self.module.attention_sum(
                self.pointer(parts), len(parts), out.numel(), DTYPE_CODES[parts.dtype], self.pointer(out),
                DTYPE_CODES[dtype], *self.where(parts),
            )  # fmt: skip
        return out

    def arguments(self, call):
        return (
            call.sizes, tuple(map(self.rows, call.tensors)), self.pointer(call.bias),
            (0, 0) if call.bias is None else call.bias.stride(), self.pointer(call.lse), self.pointer(call.prior),
            call.grid_width, call.smooth, call.scale, DTYPE_CODES[call.query.dtype], DTYPE_CODES[call.extra_key.dtype],
            call.is_causal, call.tf32,
        )  # fmt: skip
