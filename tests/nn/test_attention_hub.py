"""Extra rows in models of transformers, diffusers and torch: the same as concatenating them by hand."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyface.errors import UserError
from pyface.nn.attention_hub import (
    IMPLEMENTATION,
    ConcatKVAttnProcessor,
    ExtraKV,
    MultiheadAttention,
    add_extra_kv,
    register_transformers_attention,
    replace_multihead_attention,
    transformers_attention,
)


def by_hand(query, key, value, extra_key, extra_value, visible=None, extra_bias=0.0, scale=None):
    """Softmax over the rows and the keys in float64; visible Tensor[..., L, S], or None: all."""
    q, k, v, xk, xv = (t.double() for t in (query, key, value, extra_key, extra_value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    front = scale * q @ xk.transpose(-1, -2) + extra_bias
    back = scale * q @ k.transpose(-1, -2)
    if visible is not None:
        back = back.masked_fill(~visible, -torch.inf)
    p = torch.softmax(torch.cat((front, back), -1), -1)
    rows = xk.shape[-2]
    return p[..., :rows] @ xv + p[..., rows:] @ v


def close(ours, expected, tolerance=4e-6):
    """Within a part of the largest expected number."""
    assert ours.shape == expected.shape
    if expected.numel():
        assert (ours.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", ["no mask", "bool", "float", "bool, causal"])
def test_extra_kv_equals_softmax_by_hand(groups, masked):
    extra = ExtraKV(2, 3, 8, 6, extra_bias=1.0)
    query, key, value = torch.randn(2, 2 * groups, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    visible = torch.rand(2, 1, 5, 5) > 0.4
    seen = {"no mask": causal, "bool": visible, "float": visible, "bool, causal": visible & causal}[masked]
    mask = None if masked == "no mask" else visible
    if masked == "float":
        mask = torch.zeros(2, 1, 5, 5).masked_fill(~visible, -torch.inf)
    out = extra(query, key, value, mask, is_causal=masked in ("no mask", "bool, causal"), scale=0.3)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = [t.repeat_interleave(groups, 0) for t in (extra.key, extra.value)]
    close(out, by_hand(query, key, value, *rows, seen, 1.0, 0.3))


def test_extra_kv_keeps_its_bias_in_the_state_dict_and_draws_from_its_generator():
    made = [ExtraKV(2, 1, 4, extra_bias=b, generator=torch.Generator().manual_seed(5)) for b in (1.0, 0.0)]
    assert torch.equal(made[0].key, made[1].key)
    made[1].load_state_dict(made[0].state_dict())
    assert made[1].extra_bias == 1
    with pytest.raises(ValueError, match="rows at least 0"):
        ExtraKV(2, -1, 4)
    with pytest.raises(ValueError, match="2 heads of 4 numbers, but the layer's keys are 3 heads of 4"):
        made[0](*torch.randn(3, 1, 3, 5, 4))


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def clip_text(transformers, **changes):
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=20, bos_token_id=0, eos_token_id=98, pad_token_id=1, **changes
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def explicit(name, calls):
    """Registers concatenation and softmax as an attention function of transformers; counts its calls."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attention(module, query, key, value, attention_mask, scaling=None, is_causal=None, **_):
        calls.append(module)
        extra = getattr(module, "extra_kv", None)
        rows = (extra.key, extra.value) if extra else (key.new_empty(key.shape[1], 0, key.shape[3]),) * 2
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        rows = [t.repeat_interleave(groups, 0) for t in rows]
        visible = attention_mask
        if visible is None and (module.is_causal if is_causal is None else is_causal):
            visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        bias = extra.extra_bias.double() if extra else 0
        out = by_hand(query, key, value, *rows, visible, bias, scaling)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


@pytest.mark.parametrize("padded", [False, True], ids=["all tokens", "padding"])
def test_clip_text_without_rows_is_what_it_was(transformers, padded):
    model, tokens = clip_text(transformers), torch.randint(2, 98, (3, 20))
    mask = torch.ones(3, 20, dtype=torch.long)
    if padded:
        mask[0, 7:] = 0
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        theirs = model(tokens, attention_mask=mask).last_hidden_state
        model.set_attn_implementation(register_transformers_attention())
        close(model(tokens, attention_mask=mask).last_hidden_state, theirs, 5e-6)


@pytest.mark.parametrize("padded", [False, True], ids=["all tokens", "padding"])
@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("extra_bias", [0.0, 1.0])
def test_clip_text_with_rows_equals_concatenation(transformers, rows, extra_bias, padded):
    model, tokens, calls = clip_text(transformers), torch.randint(2, 98, (3, 20)), []
    plain = model(tokens).last_hidden_state
    made = add_extra_kv(model, rows, layers=(-2, -1), extra_bias=extra_bias)
    assert [name.split("layers.")[1] for name in made] == ["1.self_attn.extra_kv", "2.self_attn.extra_kv"]
    assert all(extra.key.shape == (4, rows, 12) for extra in made.values())
    mask = torch.ones(3, 20, dtype=torch.long)
    if padded:
        mask[0, 7:] = 0
    parameters = [p for extra in made.values() for p in (extra.key, extra.value)]
    results, direction = [], torch.randn(3, 20, 48)
    for name in (IMPLEMENTATION, explicit("explicit", calls)):
        model.set_attn_implementation(name)
        out = model(tokens, attention_mask=mask).last_hidden_state
        results.append((out, torch.autograd.grad((out * direction).sum(), parameters)))
    assert len(calls) == 3
    close(results[0][0], results[1][0], 5e-6)
    for ours, theirs in zip(results[0][1], results[1][1]):
        close(ours, theirs, 2e-5)
    if rows:
        assert (results[0][0] - plain).abs().max() > 0.01
        assert min(gradient.abs().max() for gradient in results[0][1]) > 1e-3


def test_rows_are_saved_with_the_model(transformers):
    model, tokens = clip_text(transformers), torch.randint(2, 98, (2, 20))
    add_extra_kv(model, 2, extra_bias=1.0)
    again = clip_text(transformers)
    add_extra_kv(again, 2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens).last_hidden_state, model(tokens).last_hidden_state)


def test_low_precision_model_keeps_rows_in_float32(transformers):
    model, tokens = clip_text(transformers), torch.randint(2, 98, (2, 20))
    for extra in add_extra_kv(model, 2).values():
        assert extra.key.dtype == torch.float32
    expected = model(tokens).last_hidden_state
    low = clip_text(transformers).bfloat16()
    for extra in add_extra_kv(low, 2).values():
        assert (extra.key.dtype, extra.value.dtype) == (torch.float32, torch.float32)
    low.load_state_dict(model.state_dict())
    out = low(tokens).last_hidden_state
    assert out.dtype == torch.bfloat16
    close(out, expected, 0.03)
    gradient = torch.autograd.grad(out.float()[:, 3, :5].sum(), low.encoder.layers[0].self_attn.extra_kv.key)[0]
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_compiles_as_one_graph(transformers):
    model = clip_text(transformers)
    add_extra_kv(model, 2, extra_bias=1.0)
    compiled = torch.compile(model.encoder.layers[0].self_attn, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 20, 48)
    close(compiled(x, is_causal=True)[0], model.encoder.layers[0].self_attn(x, is_causal=True)[0])


def test_vision_model_sees_everything(transformers):
    config = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    model, pictures, calls = transformers.CLIPVisionModel(config).eval(), torch.randn(2, 3, 32, 32), []
    theirs = model(pictures).last_hidden_state
    model.set_attn_implementation(register_transformers_attention())
    close(model(pictures).last_hidden_state, theirs, 5e-6)
    assert len(add_extra_kv(model, 3)) == 2
    ours = model(pictures).last_hidden_state
    model.set_attn_implementation(explicit("explicit", calls))
    close(ours, model(pictures).last_hidden_state, 5e-6)
    assert len(calls) == 2


def test_prefix_tuning_is_the_same_as_a_prefix_in_the_cache(transformers):
    """Prefix tuning (arXiv:2101.00190) puts R trained keys and values before those of the tokens. As a filled cache,
    which is how it is usually run, the prefix is expanded over the batch, and takes part in the counting of places."""
    model, rows = llama(transformers), 5
    tokens, places = torch.randint(0, 61, (3, 9)), torch.arange(9).expand(3, 9)
    made = add_extra_kv(model, rows)
    ours = model(tokens, use_cache=False).logits
    parameters = [p for extra in made.values() for p in (extra.key, extra.value)]
    gradients = torch.autograd.grad(ours.square().mean(), parameters)

    def cached(query_tokens, places, cache):
        return model(query_tokens, past_key_values=cache, position_ids=places, use_cache=True).logits

    def prefix():
        cache = transformers.DynamicCache()
        for layer, extra in enumerate(made.values()):
            cache.update(*(t.expand(3, -1, -1, -1) for t in (extra.key, extra.value)), layer)
        return cache

    rows_of = {name: layer.extra_kv for name, layer in model.named_modules() if hasattr(layer, "extra_kv")}
    for name in rows_of:
        del model.get_submodule(name).extra_kv
    model.set_attn_implementation("sdpa")
    theirs = cached(tokens, places, prefix())
    close(ours, theirs, 5e-6)
    for mine, other in zip(gradients, torch.autograd.grad(theirs.square().mean(), parameters)):
        close(mine, other)

    # Decoding: the rows are no entries of the cache, so tokens keep their places.
    for name, extra in rows_of.items():
        model.get_submodule(name).extra_kv = extra
    model.set_attn_implementation(IMPLEMENTATION)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        pieces = [cached(tokens[:, a:b], places[:, a:b], cache) for a, b in ((0, 4), (4, 7), (7, 8), (8, 9))]
    close(torch.cat(pieces, 1), ours, 5e-6)
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    longer = model(generated[:, :-1], use_cache=False).logits[:, 8:].argmax(-1)
    assert torch.equal(generated[:, 9:], longer)


def test_static_cache_and_left_padding(transformers):
    model = llama(transformers)
    add_extra_kv(model, 2)
    tokens, mask = torch.randint(1, 61, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=mask)
    dynamic = model.generate(tokens, **how)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **how, disable_compile=True), dynamic)
    alone = model.generate(tokens[1:, 3:], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(dynamic[1:, 3:], alone)


@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_other_models(transformers, kind):
    if kind == "Bert":
        config = transformers.BertConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        model = transformers.BertModel(config)
    else:
        config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=20)
        model = transformers.GPT2Model(config)
    model, tokens, calls = model.eval(), torch.randint(0, 61, (2, 7)), []
    theirs = model(tokens).last_hidden_state
    model.set_attn_implementation(register_transformers_attention())
    close(model(tokens).last_hidden_state, theirs, 5e-6)
    assert len(add_extra_kv(model, 3)) == 2
    ours = model(tokens).last_hidden_state
    model.set_attn_implementation(explicit("explicit", calls))
    close(ours, model(tokens).last_hidden_state, 5e-6)
    assert len(calls) == 2


def test_what_cannot_be_done_is_refused(transformers):
    model = clip_text(transformers, attention_dropout=0.1)
    add_extra_kv(model, 1)
    tokens = torch.randint(2, 98, (1, 20))
    model(tokens)
    with pytest.raises(UserError, match=r"cannot do dropout \(0.1\), which CLIPAttention asks for"):
        model.train()(tokens)
    with pytest.raises(UserError, match="cannot do attention weights, which CLIPAttention asks for"):
        model.eval()(tokens, output_attentions=True)
    with pytest.raises(UserError, match="attention sinks"):
        transformers_attention(nn.Identity(), *torch.randn(3, 1, 2, 4, 8), s_aux=torch.zeros(2))
    with pytest.raises(UserError, match="has 3 attention layers, and no layer 3"):
        add_extra_kv(clip_text(transformers), 1, layers=[3])
    with pytest.raises(UserError, match="Linear has no attention layers"):
        add_extra_kv(nn.Linear(2, 2), 1)


# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def unet():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, attention_head_dim=8,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def unet_inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 7, 24)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padding"])
def test_unet_without_rows_is_what_it_was(unet, masked):
    x, t, text = unet_inputs()
    how = {"encoder_attention_mask": torch.arange(7).expand(2, 7) < torch.tensor([[7], [3]])} if masked else {}
    theirs = unet(x, t, text, **how).sample
    unet.set_attn_processor({name: ConcatKVAttnProcessor() for name in unet.attn_processors})
    close(unet(x, t, text, **how).sample, theirs, 1e-5)


def test_unet_with_rows_equals_longer_text(unet):
    """In cross-attention a row of text is a key and a value: the rows of one more token are that token."""
    x, t, text = unet_inputs()
    token = torch.randn(24)
    layers = {name: unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors}
    theirs = unet(x, t, torch.cat((token.expand(2, 1, 24), text), 1)).sample
    processors = {}
    for name, layer in layers.items():
        processors[name] = ConcatKVAttnProcessor()
        if "attn2" in name:
            extra = ExtraKV(layer.heads, 1, layer.inner_dim // layer.heads)
            with torch.no_grad():
                extra.key.copy_(layer.to_k(token).view(layer.heads, 1, -1))
                extra.value.copy_(layer.to_v(token).view(layer.heads, 1, -1))
            processors[name] = ConcatKVAttnProcessor(extra)
    unet.set_attn_processor(processors)
    out = unet(x, t, text).sample
    close(out, theirs, 1e-5)
    assert (unet(x, t, torch.cat((text, text[:, :1]), 1)).sample - out).abs().max() > 1e-4
    named = dict(unet.named_parameters())
    mine = [p for name, p in named.items() if "extra_kv" in name]
    assert len(mine) == 2 * sum("attn2" in name for name in layers)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(out.square().mean(), mine))


def test_processor_equals_diffusers_in_every_option():
    attention = pytest.importorskip("diffusers.models.attention_processor")
    layer = attention.Attention(
        query_dim=32, heads=2, dim_head=16, norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0,
        qk_norm="layer_norm", bias=True,
    ).eval()  # fmt: skip
    for x in (torch.randn(2, 9, 32), torch.randn(2, 32, 3, 5)):
        theirs = layer(x)
        close(ConcatKVAttnProcessor()(layer, x), theirs)
    crossed = attention.Attention(
        query_dim=32, cross_attention_dim=24, heads=2, dim_head=16, cross_attention_norm="layer_norm"
    )
    x, text = torch.randn(2, 9, 32), torch.randn(2, 5, 24)
    close(ConcatKVAttnProcessor()(crossed, x, text), crossed(x, text))


def test_processor_masks_text_but_no_rows():
    attention = pytest.importorskip("diffusers.models.attention_processor")
    layer = attention.Attention(query_dim=32, cross_attention_dim=24, heads=2, dim_head=16)
    x, text, token = torch.randn(2, 9, 32), torch.randn(2, 5, 24), torch.randn(24)
    extra = ExtraKV(2, 1, 16)
    with torch.no_grad():
        extra.key.copy_(layer.to_k(token).view(2, 1, 16))
        extra.value.copy_(layer.to_v(token).view(2, 1, 16))
    hidden = torch.arange(5).expand(2, 1, 5) >= torch.tensor([5, 2]).view(2, 1, 1)
    mask = torch.zeros(2, 1, 5).masked_fill(hidden, -torch.inf)
    theirs = layer(x, torch.cat((token.expand(2, 1, 24), text), 1), attention_mask=F.pad(mask, (1, 0)))
    close(ConcatKVAttnProcessor(extra)(layer, x, text, mask), theirs)
    added = attention.Attention(query_dim=32, heads=2, dim_head=16, added_kv_proj_dim=24)
    with pytest.raises(UserError, match=r"added keys and values of its own \(added_kv_proj_dim=24\)"):
        ConcatKVAttnProcessor(extra)(added, x, text)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_constructor_and_calls_are_those_of_torch():
    ours, theirs = MultiheadAttention.forward, nn.MultiheadAttention.forward
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert MultiheadAttention.__init__ is nn.MultiheadAttention.__init__


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}, {"bias": False}, {"kdim": 20, "vdim": 12}], ids=str)
def test_loaded_weights_give_torchs_results(options, batch_first):
    theirs = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=batch_first, **options)
    ours = MultiheadAttention(32, 4, add_bias_kv=True, batch_first=batch_first, **options)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(6, 5, 32), torch.randn(6, 5, 32), torch.randn(6, 5, 32)
    if "kdim" in options:
        key, value = torch.randn(6, 5, 20), torch.randn(6, 5, 12)
    calls = [(query, key, value), (query[0], key[0], value[0])] + ([] if "kdim" in options else [(query, query, query)])
    for call in calls:
        out, expected = (layer(*call, need_weights=False)[0] for layer in (ours, theirs))
        close(out, expected)
        (_, weights), (_, their_weights) = (layer(*call) for layer in (ours, theirs))
        close(weights, their_weights)
        parameters = dict(ours.named_parameters())
        gradients = torch.autograd.grad(out.square().sum(), list(parameters.values()))
        others = torch.autograd.grad(expected.square().sum(), [theirs.get_parameter(name) for name in parameters])
        for mine, other in zip(gradients, others):
            close(mine, other, 1e-5)


def test_masks():
    theirs = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True)
    ours = copy.deepcopy(theirs)
    assert replace_multihead_attention(ours) == 1
    x, causal = torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=causal, need_weights=False)[0]
    for how in ({"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}, {"is_causal": True}):
        for need_weights in (False, True):
            close(ours(x, x, x, need_weights=need_weights, **how)[0], expected)
    padding = torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])
    expected = theirs(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=False)[0]
    close(ours(x, x, x, key_padding_mask=padding, is_causal=True, need_weights=False)[0], expected)
    lower_right = torch.ones(2, 6, dtype=torch.bool).triu(5)
    expected = theirs(x[:, :2], x, x, attn_mask=lower_right, need_weights=False)[0]
    close(ours(x[:, :2], x, x, is_causal=True, need_weights=False)[0], expected)
    # The row counts in every call above.
    with torch.no_grad():
        ours.bias_v += 1
    moved = ours(x, x, x, is_causal=True, need_weights=False)[0]
    assert (moved - theirs(x, x, x, attn_mask=causal, need_weights=False)[0]).abs().amax(-1).min() > 1e-3


def test_dropout_in_training_is_torchs():
    layer = MultiheadAttention(32, 4, dropout=0.5, add_bias_kv=True)
    x = torch.randn(6, 2, 32)
    results = []
    for call in (layer, lambda *a, **k: nn.MultiheadAttention.forward(layer, *a, **k)):
        torch.manual_seed(3)
        results.append(call(x, x, x, need_weights=False)[0])
    assert torch.equal(*results)
    assert not torch.equal(results[0], layer.eval()(x, x, x, need_weights=False)[0])


def test_only_layers_with_a_row_are_turned():
    class Mine(nn.MultiheadAttention):
        pass

    model = nn.ModuleList(
        [nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2), Mine(8, 2, add_bias_kv=True)]
    )
    before = list(model.parameters())
    assert replace_multihead_attention(model) == 1
    assert [type(layer) for layer in model] == [MultiheadAttention, nn.MultiheadAttention, Mine]
    assert all(a is b for a, b in zip(before, model.parameters()))
    close(
        model[0](x := torch.randn(3, 1, 8), x, x, need_weights=False)[0],
        F.linear(_one_head_at_a_time(model[0], x), model[0].out_proj.weight, model[0].out_proj.bias),
    )


def _one_head_at_a_time(layer, x):
    """Attention of a layer for one sample, Tensor[L, 1, E], by the definition."""
    q, k, v = F.linear(x[:, 0], layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    k, v = torch.cat((k, layer.bias_k[0])), torch.cat((v, layer.bias_v[0]))
    size = layer.head_dim
    heads = [
        torch.softmax(q[:, i : i + size] @ k[:, i : i + size].T * size**-0.5, -1) @ v[:, i : i + size]
        for i in range(0, q.shape[1], size)
    ]
    return torch.cat(heads, 1).unsqueeze(1)
