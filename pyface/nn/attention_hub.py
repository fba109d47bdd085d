"""Extra key and value rows in other people's models: transformers, diffusers and `torch.nn.MultiheadAttention`.

transformers and diffusers are not imported before a function here needs transformers; the processor of diffusers needs
nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyface.errors import UserError
from pyface.nn.attention import ExtraKV, attend
from pyface.ops import concat_kv_attention

IMPLEMENTATION = "pyface_concat_kv"  # the name in transformers' registry
# What an attention function of transformers may be asked for beside masks, and this one cannot do.
_UNKNOWN = {"softcap": "a cap on scores", "s_aux": "attention sinks", "position_bias": "a position bias"}


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function in the form that transformers' registry asks for.

    Args:
        module: the calling layer; its child `extra_kv`, an `ExtraKV`, has the rows. Without one there are none.
        query, key, value: Tensor[B, G * H, L, E], Tensor[B, H, S, E], Tensor[B, H, S, Ev].
        attention_mask: as `sdpa` gets it; None where `is_causal` says all.
        dropout: must be 0.
        scaling: None: 1 / sqrt(E).
        is_causal: None: what the module says.

    Returns:
        (Tensor[B, L, G * H, Ev], None): attention weights are never made.

    Raises:
        UserError: the model wants dropout, a cap on scores, sinks, a position bias or attention weights.
    """
    wanted = [what for name, what in _UNKNOWN.items() if kwargs.get(name) is not None]
    wanted += ["attention weights"] if kwargs.get("output_attentions") else []
    wanted += [f"dropout ({dropout:g})"] if dropout else []
    if wanted:
        raise UserError(
            f"attention with extra rows cannot do {', '.join(wanted)}, which {type(module).__name__} asks for; "
            "change the model's config, or use another attention implementation"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # As transformers' own sdpa function reads its arguments: a mask has everything in it, a single query sees all
    # keys, and many keys for several queries without a mask are an empty static cache, whose later places are unused.
    is_causal = attention_mask is None and query.shape[2] > 1 and is_causal
    if is_causal and key.shape[2] > query.shape[2]:
        key, value = (t[:, :, : query.shape[2]] for t in (key, value))
    call = getattr(module, "extra_kv", None) or partial(attend, None)
    out = call(query, key, value, attention_mask, is_causal, scaling)
    return out.transpose(1, 2).contiguous(), None


def register_transformers_attention() -> str:
    """Makes `transformers_attention` known to transformers, and returns its name there.

    `model.set_attn_implementation(name)` or `from_config(config, attn_implementation=name)` then use it in any model
    whose layers call the registry; what they compute stays the same until a layer is given rows.

    Raises:
        UserError: transformers is missing or older than its registries.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise UserError(
            f"transformers 4.53 or newer is needed (pip install 'pyface-torch[hub]'): {error}"
        ) from error
    AttentionInterface.register(IMPLEMENTATION, transformers_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    return IMPLEMENTATION


def add_extra_kv(
    model: nn.Module,
    rows: int,
    *,
    layers: Iterable[int] | None = None,
    extra_bias: float = 0.0,
    init: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, ExtraKV]:
    """Gives attention layers of a transformers model learned rows, and sets the attention that uses them.

    Args:
        model: a `PreTrainedModel`.
        rows: R.
        layers: which attention layers, counted from 0 in the order of `model.modules()`, negative from the end; None:
            all. CatVersion trains the last three of CLIP's text model.
        extra_bias, init, generator: as in `ExtraKV`.

    Returns:
        The new children `extra_kv` by their names in the model, each on the device of its layer, in float32 (float64
        in a float64 model): rows are trained. They are part of the model's state dict. Nothing is frozen.

    Raises:
        UserError: no layer of the model calls the registry, or `layers` names one it has not.
    """
    found = [
        (name, layer) for name, layer in model.named_modules()
        if hasattr(layer, "is_causal") and _head_dim(layer) and any(True for _ in layer.parameters())
    ]  # fmt: skip
    if not found or not hasattr(model, "set_attn_implementation"):
        raise UserError(f"{type(model).__name__} has no attention layers that use transformers' attention registry")
    chosen = range(len(found)) if layers is None else list(layers)
    if bad := [i for i in chosen if not -len(found) <= i < len(found)]:
        raise UserError(f"{type(model).__name__} has {len(found)} attention layers, and no layer {bad[0]}")
    model.set_attn_implementation(register_transformers_attention())
    made = {}
    for name, layer in (found[i] for i in chosen):
        weight = next(layer.parameters())
        extra = ExtraKV(
            _kv_heads(layer), rows, _head_dim(layer), extra_bias=extra_bias, init=init, generator=generator
        )
        layer.extra_kv = extra.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        made[f"{name}.extra_kv"] = layer.extra_kv
    return made


def _head_dim(layer: nn.Module) -> int | None:
    return getattr(layer, "head_dim", None) or getattr(layer, "attention_head_size", None)


def _kv_heads(layer: nn.Module) -> int:
    """Models name it in the layer or in its config."""
    for place in (layer, getattr(layer, "config", None)):
        for name in ("num_key_value_heads", "num_heads", "num_attention_heads", "n_heads"):
            if isinstance(value := getattr(place, name, None), int):
                return value
    raise UserError(f"cannot tell how many heads {type(layer).__name__} has; give its child extra_kv an ExtraKV")


# ---- diffusers -------------------------------------------------------------------------------------------------------


class ConcatKVAttnProcessor(nn.Module):
    """An attention processor of diffusers for layers of its class `Attention`: `AttnProcessor2_0` with rows.

    Args:
        extra: the rows; None: none. As the processor of a layer it is part of the model's state dict.

    `unet.set_attn_processor({name: ConcatKVAttnProcessor(...) for name in unet.attn_processors})` sets one per layer.
    """

    def __init__(self, extra: ExtraKV | None = None):
        super().__init__()
        self.extra_kv = extra

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Tensor[B, L, C] or Tensor[B, C, h, w], which stands for L = h w tokens, to the same shape. The rows are never
        masked.

        Raises:
            UserError: a layer with projections for added keys and values (`added_kv_proj_dim`), which needs its own.
        """
        if getattr(attn, "added_kv_proj_dim", None) is not None:
            raise UserError(
                f"ConcatKVAttnProcessor takes the place of AttnProcessor2_0, but this {type(attn).__name__} has added "
                f"keys and values of its own (added_kv_proj_dim={attn.added_kv_proj_dim}); leave it its processor"
            )
        residual, picture = hidden_states, hidden_states.shape if hidden_states.dim() == 4 else None
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if picture is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        batch, keys, _ = source.shape
        query, key, value = (
            project(t).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, t in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        out = (self.extra_kv or partial(attend, None))(query, key, value, attention_mask)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).to(query.dtype)))
        if picture is not None:
            out = out.transpose(1, 2).reshape(picture)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


# ---- torch -----------------------------------------------------------------------------------------------------------


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `pyface.ops.concat_kv_attention`: same constructor, state dict and calls.

    Made for `add_bias_kv=True`, whose row is seen by every query, also with `is_causal=True, need_weights=False`, where
    torch's own class ignores it. Weights, padding masks, masks other than the causal one, and dropout in training go
    through torch's function, and there the row is right too.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's. `is_causal=True` needs no mask here, and is then lower right aligned; beside a mask it is, as in
        torch, the promise that the mask is the causal one."""
        is_batched = query.dim() == 3
        tokens = 1 if is_batched and self.batch_first else 0
        queries, keys = query.shape[tokens], key.shape[tokens]
        hint = is_causal and (attn_mask is None or queries == keys)
        masked = key_padding_mask is not None or (attn_mask is not None and not hint)
        if need_weights or masked or (self.training and self.dropout > 0):
            if is_causal and attn_mask is None:
                shape = queries, keys
                attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1 + keys - queries)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal=False
            )
        q, k, v = self._project(query, key, value)
        if not is_batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        rows = [self._rows(t) for t in (self.bias_k, self.bias_v)]
        out = concat_kv_attention(q, k, v, *rows, is_causal=hint).transpose(1, 2).flatten(2)
        if not is_batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(*each) for each in zip((query, key, value), weights, biases)]

    def _rows(self, bias: Tensor | None) -> Tensor:
        """Tensor[H, R, E]: the bias row, then the row of zeros that `add_zero_attn` stands for."""
        shape = self.num_heads, 1, self.head_dim
        weight = self.out_proj.weight
        rows = [] if bias is None else [bias.view(shape)]
        rows += [weight.new_zeros(shape)] if self.add_zero_attn else []
        return torch.cat(rows, 1) if rows else weight.new_empty(self.num_heads, 0, self.head_dim)


def replace_multihead_attention(model: nn.Module) -> int:
    """Turns every `torch.nn.MultiheadAttention` with a bias row in a model into a `MultiheadAttention`, in place.

    The layers stay the same objects with the same parameters: loaded weights, optimizers, hooks and references to them
    go on working. Layers of derived classes, and those without `add_bias_kv`, are left alone.

    Args:
        model: any module; it may itself be such a layer.

    Returns:
        How many layers were turned.
    """
    layers = [m for m in model.modules() if type(m) is nn.MultiheadAttention and m.bias_k is not None]
    for layer in layers:
        layer.__class__ = MultiheadAttention
    return len(layers)
