"""Attention with learned keys and values that every query sees: the rows, and the multi-head layer around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyface.errors import UserError
from pyface.ops import concat_kv_attention


class ExtraKV(nn.Module):
    """R learned keys and values of one attention layer, seen by every query: arXiv:2311.14631, arXiv:2101.00190.

    Args:
        heads: H, heads of keys and values.
        rows: R.
        key_dim: E, of one head.
        value_dim: Ev, of one head; None: E.
        extra_bias: added to the rows' scores: 0 is plain concatenation, 1 what CatVersion's released adapters were
            trained with, minus infinity no rows at all. It is part of the state dict: rows trained with one value are
            wrong with another.
        init: standard deviation of the initial values (CatVersion: 1); 0: zeros, and R rows that start equal stay so.
        generator: where they come from.
        device, dtype: of the parameters.

    Attributes:
        key: Parameter[H, R, E].
        value: Parameter[H, R, Ev].
    """

    def __init__(
        self,
        heads: int,
        rows: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        extra_bias: float = 0.0,
        init: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if heads < 1 or rows < 0 or key_dim < 1 or (value_dim is not None and value_dim < 1):
            raise ValueError(
                "ExtraKV: heads, key_dim and value_dim must be at least 1 and rows at least 0, got "
                f"heads={heads}, rows={rows}, key_dim={key_dim}, value_dim={value_dim}"
            )
        if not 0 <= init < math.inf:
            raise ValueError(f"ExtraKV: init, a standard deviation, must be finite and at least 0, got {init}")
        if not extra_bias < math.inf:
            raise ValueError(f"ExtraKV: extra_bias must be finite or minus infinity, got {extra_bias}")
        self.init, self._given_bias = float(init), float(extra_bias)
        like = {"device": device, "dtype": dtype}
        self.key = nn.Parameter(torch.empty(heads, rows, key_dim, **like))
        self.value = nn.Parameter(torch.empty(heads, rows, value_dim or key_dim, **like))
        self.register_buffer("extra_bias", torch.empty((), **like))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """New initial values, and `extra_bias` as it was given."""
        for row in (self.key, self.value):
            row.normal_(0, self.init, generator=generator)
        self.extra_bias.fill_(self._given_bias)

    def extra_repr(self) -> str:
        heads, rows, depth = self.key.shape
        bias = self._given_bias if self.extra_bias.is_meta else self.extra_bias.item()
        return f"{heads}, {rows}, {depth}, {self.value.shape[-1]}, extra_bias={bias:g}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Attention with the rows.

        Args:
            query, key, value: Tensor[B, G * H, L, E], Tensor[B, H, S, E], Tensor[B, H, S, Ev]; G query heads share a
                key head.
            mask: of the S keys, as in `scaled_dot_product_attention`; the rows are never masked. A mask is served by
                concatenation, in plain PyTorch.
            is_causal: lower right aligned.
            scale: None: 1 / sqrt(E).

        Returns:
            Tensor[B, G * H, L, Ev].
        """
        if key.shape[1] != len(self.key) or key.shape[-1] != self.key.shape[-1]:
            raise ValueError(
                f"ExtraKV: its rows are {len(self.key)} heads of {self.key.shape[-1]} numbers, but the layer's keys "
                f"are {key.shape[1]} heads of {key.shape[-1]}"
            )
        return attend(self, query, key, value, mask, is_causal, scale)


def attend(
    extra: ExtraKV | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What `ExtraKV` does, for layers that may have none."""
    groups = query.shape[1] // key.shape[1]
    rows = None if extra is None else (extra.key, extra.value)
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        rows = rows and [t.repeat_interleave(groups, 0) for t in rows]
    if mask is None:
        bias = 0.0 if extra is None else extra.extra_bias
        return concat_kv_attention(
            query, key, value, *(rows or (None, None)), is_causal=is_causal, scale=scale, extra_bias=bias
        )
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    mask, queries, keys = torch.atleast_2d(mask), query.shape[2], key.shape[2]
    if is_causal:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
        mask = mask.masked_fill(~visible, -torch.inf)  # a mask for all queries becomes one for each
    if rows:
        mask = mask.expand(*mask.shape[:-1], keys)
        front = extra.extra_bias.to(mask.dtype).expand(*mask.shape[:-1], rows[0].shape[1])
        mask = torch.cat((front, mask), -1)
        key, value = (
            torch.cat((row.to(t.dtype).expand(len(t), -1, -1, -1), t), 2) for row, t in zip(rows, (key, value))
        )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class ConcatKVAttention(nn.Module):
    """Multi-head attention, to itself or to other tokens, whose every query also sees R learned keys and values.

    ::

        q, k, v = q_proj(query), k_proj(key), v_proj(value)            in H heads of E = embed_dim / H numbers
        out = out_proj(softmax over the rows [extra_kv.key, k] of q, times [extra_kv.value, v])

    The rows stand behind the projections: they are keys and values, not tokens. They cost no tokens' memory (see
    `pyface.ops.concat_kv_attention`), and where they alone are trained the backward pass of the attention is that of R
    rows. So this is prefix tuning (arXiv:2101.00190), CatVersion's residual embeddings (arXiv:2311.14631), and with
    one row `torch.nn.MultiheadAttention(add_bias_kv=True)`, whose state dicts `load_state_dict` takes (those without
    that row, too: `strict=False` then keeps the rows that are here).

    Args:
        embed_dim: of query and result; a multiple of num_heads.
        num_heads: H.
        rows: R; 0: plain attention.
        kdim, vdim: of key and value; None: embed_dim.
        bias: whether the four projections have one.
        is_causal: query i sees the keys up to i + S - L: aligned at the lower right. The rows are seen by all.
        extra_bias, init: of the rows, as in `ExtraKV`; normally distributed with deviation 1 by default, 0 for zeros.
        device, dtype: of the parameters. The rows are float32 at least, also beside projections of 16 bits: they are
            trained.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: `torch.nn.Linear`. Weights start Xavier-uniform, biases at 0.
        extra_kv: the rows, an `ExtraKV`.

    There is no dropout of attention weights, and they cannot be returned: they are never made.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rows: int,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        is_causal: bool = False,
        extra_bias: float = 0.0,
        init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                "ConcatKVAttention: embed_dim must be a positive multiple of num_heads, got "
                f"embed_dim={embed_dim}, num_heads={num_heads}"
            )
        self.embed_dim, self.num_heads, self.is_causal = embed_dim, num_heads, is_causal
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        for name in ("kdim", "vdim"):
            if getattr(self, name) < 1:
                raise ValueError(f"ConcatKVAttention: {name} must be at least 1, got {getattr(self, name)}")
        like = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **like)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias, **like)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, **like)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **like)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.extra_kv = ExtraKV(
            num_heads, rows, embed_dim // num_heads, extra_bias=extra_bias, init=init, device=device, dtype=wide
        )
        self._reset_projections()

    def _projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj, self.out_proj

    def _reset_projections(self) -> None:
        for projection in self._projections():
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def reset_parameters(self) -> None:
        """New initial values for projections and rows."""
        self._reset_projections()
        self.extra_kv.reset_parameters()

    def freeze_projections(self) -> ConcatKVAttention:
        """Leaves the rows as the only parameters that want a gradient. `requires_grad_(True)` undoes it."""
        for projection in self._projections():
            projection.requires_grad_(False)
        return self

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, rows={self.extra_kv.key.shape[1]}, "
            f"kdim={self.kdim}, vdim={self.vdim}, is_causal={self.is_causal}"
        )

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of L tokens to S tokens and the rows.

        Args:
            query: Tensor[B, L, embed_dim].
            key: Tensor[B, S, kdim]; None: query.
            value: Tensor[B, S, vdim]; None: key.
            mask: broadcasts to Tensor[B, H, L, S]: bool, True where a key is seen, or numbers added to the scores; for
                padding Tensor[B, 1, 1, S]. With `is_causal` both count. The rows are never masked. A mask is served by
                concatenation, in plain PyTorch.

        Returns:
            Tensor[B, L, embed_dim].

        Raises:
            ValueError: shapes that do not fit.
        """
        if key is None and value is not None:
            raise ValueError("ConcatKVAttention: value is given without key; give both, or key alone")
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value, mask)
        q, k, v = (
            project(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, t in zip(self._projections(), (query, key, value))
        )
        out = self.extra_kv(q, k, v, mask, self.is_causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _check(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        if query.dim() != 3 or query.shape[2] != self.embed_dim:
            raise ValueError(
                f"ConcatKVAttention: query must be Tensor[B, L, {self.embed_dim}], got shape {tuple(query.shape)}"
            )
        if key.dim() != 3 or len(key) != len(query) or key.shape[2] != self.kdim:
            raise ValueError(
                f"ConcatKVAttention: key must be Tensor[{len(query)}, S, {self.kdim}] beside query "
                f"{tuple(query.shape)}, got shape {tuple(key.shape)}"
            )
        if value.dim() != 3 or value.shape[:2] != key.shape[:2] or value.shape[2] != self.vdim:
            raise ValueError(
                f"ConcatKVAttention: value must be Tensor[{len(key)}, {key.shape[1]}, {self.vdim}] beside key "
                f"{tuple(key.shape)}, got shape {tuple(value.shape)}"
            )
        full = len(query), self.num_heads, query.shape[1], key.shape[1]
        if mask is not None and (
            mask.dim() > 4 or any(size not in (1, n) for size, n in zip(mask.shape[::-1], full[::-1]))
        ):
            raise ValueError(
                f"ConcatKVAttention: mask must broadcast to Tensor{list(full)} (samples, heads, queries, keys), got "
                f"shape {tuple(mask.shape)}"
            )

    # ---- weights of torch.nn.MultiheadAttention ----

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        _rename_torch_weights(state_dict, prefix, self.num_heads, self.extra_kv)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def from_multihead_attention(
        cls,
        layer: nn.MultiheadAttention,
        rows: int = 0,
        *,
        is_causal: bool = False,
        extra_bias: float = 0.0,
        init: float = 1.0,
    ) -> ConcatKVAttention:
        """The same attention with copies of a layer's weights, and further rows to train.

        The result takes Tensor[B, L, embed_dim] whatever `batch_first` says in the layer, and returns the output
        alone.

        Args:
            layer: `torch.nn.MultiheadAttention` or derived from it. The rows begin with that of `add_bias_kv`, if any.
                What is frozen in it is frozen in the result; the rows are not.
            rows: how many more.
            is_causal, extra_bias, init: as in the class. extra_bias is for all rows, so it must be 0 beside a row of
                `add_bias_kv`.

        Raises:
            UserError: the layer has dropout (set its `dropout` to 0 to do without), or `add_zero_attn`.
        """
        if not isinstance(layer, nn.MultiheadAttention):
            raise TypeError(
                f"ConcatKVAttention: layer must be a torch.nn.MultiheadAttention, got {type(layer).__name__}"
            )
        if layer.dropout or layer.add_zero_attn:
            what = f"dropout={layer.dropout:g}" if layer.dropout else "add_zero_attn=True"
            raise UserError(
                f"ConcatKVAttention cannot do what the layer was made with: {what}; "
                "pyface.nn.attention_hub.MultiheadAttention can, or change it in the layer"
            )
        had = layer.bias_k is not None
        if had and extra_bias:
            raise ValueError(
                f"ConcatKVAttention: extra_bias must be 0 where the layer has a row of add_bias_kv, got {extra_bias}"
            )
        weight = layer.out_proj.weight
        made = cls(
            layer.embed_dim, layer.num_heads, int(had) + rows, kdim=layer.kdim, vdim=layer.vdim,
            bias=layer.in_proj_bias is not None, is_causal=is_causal, extra_bias=extra_bias, init=init,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        weights = layer.state_dict()
        for name, own in (("key", made.extra_kv.key.detach()), ("value", made.extra_kv.value.detach())):
            if had:
                own[:, 0] = weights.pop(f"bias_{name[0]}").view(made.num_heads, -1)
            weights[f"extra_kv.{name}"] = own
        weights["extra_kv.extra_bias"] = made.extra_kv.extra_bias
        made.load_state_dict(weights)
        packed = layer.in_proj_weight is not None
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(made, name)
            source = layer.in_proj_weight if packed else getattr(layer, f"{name}_weight")
            projection.weight.requires_grad_(source.requires_grad)
            if projection.bias is not None:
                projection.bias.requires_grad_(layer.in_proj_bias.requires_grad)
        for name, source in layer.out_proj.named_parameters():
            made.out_proj.get_parameter(name).requires_grad_(source.requires_grad)
        return made.train(layer.training)


def _rename_torch_weights(state: dict[str, Tensor], prefix: str, heads: int, extra: ExtraKV) -> None:
    """Names of `torch.nn.MultiheadAttention` in a state dict to those of `ConcatKVAttention`, in place."""
    names = "q_proj", "k_proj", "v_proj"
    found = [state.pop(f"{prefix}{name}_weight", None) for name in names]
    if (packed := state.pop(f"{prefix}in_proj_weight", None)) is not None:
        found = packed.chunk(3)
    if found[0] is None:
        return
    state.update({f"{prefix}{name}.weight": weight for name, weight in zip(names, found) if weight is not None})
    if (bias := state.pop(f"{prefix}in_proj_bias", None)) is not None:
        state.update({f"{prefix}{name}.bias": part for name, part in zip(names, bias.chunk(3))})
    loaded = {name: state.pop(f"{prefix}bias_{name[0]}", None) for name in ("key", "value")}
    if loaded["key"] is not None:
        rows = {name: row.view(heads, 1, -1) for name, row in loaded.items() if row is not None}
        rows["extra_bias"] = torch.zeros_like(extra.extra_bias)  # torch's row has none
    elif extra.key.shape[1] == 0:
        rows = extra.state_dict()  # nothing is missing
    else:
        rows = {}
    for name, row in rows.items():
        state.setdefault(f"{prefix}extra_kv.{name}", row)
