"""`ConcatKVAttention`: the same as concatenating by hand, as `torch.nn.MultiheadAttention`, and trained by its rows."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyface.ops.attention as op
from pyface.errors import UserError
from pyface.nn import ConcatKVAttention, ExtraKV


def by_hand(layer, query, key=None, value=None, mask=None):
    """The layer's definition in float64; everything it uses is a function of the layer's parameters."""
    key = query if key is None else key
    value = key if value is None else value
    heads = layer.num_heads

    def project(linear, t):
        return F.linear(t.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())

    def split(t):
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    projections = (layer.q_proj, query), (layer.k_proj, key), (layer.v_proj, value)
    q, k, v = (split(project(*each)) for each in projections)
    extra = layer.extra_kv
    rows = extra.key.shape[1]
    k = torch.cat((extra.key.double().expand(len(k), -1, -1, -1), k), 2)
    v = torch.cat((extra.value.double().expand(len(v), -1, -1, -1), v), 2)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    queries, keys = q.shape[2], k.shape[2] - rows
    front, back = scores[..., :rows] + extra.extra_bias.double(), scores[..., rows:]
    if mask is not None:
        back = back.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else back + mask.double()
    if layer.is_causal:
        back = back.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries), -torch.inf)
    out = torch.softmax(torch.cat((front, back), -1), -1) @ v
    return project(layer.out_proj, out.transpose(1, 2).flatten(2))


def close(ours, expected, tolerance=4e-6):
    """Within a part of the largest expected number."""
    assert ours.shape == expected.shape
    if expected.numel():
        assert (ours.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


def shaken(layer):
    """The layer with biases that are not zero."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return layer


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("kind", ["self", "shorter", "longer", "key is value", "other widths"])
def test_equals_softmax_by_hand(kind, rows, is_causal, dtype):
    options = {"kdim": 20, "vdim": 12, "bias": False} if kind == "other widths" else {}
    layer = ConcatKVAttention(32, 4, rows, is_causal=is_causal, extra_bias=0.5, dtype=dtype, **options)
    assert all(p.dtype == dtype for p in layer.parameters())
    assert ("q_proj.bias" in dict(layer.named_parameters())) == ("bias" not in options)
    shaken(layer)
    # Without rows a causal query of more queries than keys may see nothing at all, which torch.softmax cannot say.
    length = {"self": 6, "shorter": 3, "longer": 17 if rows or not is_causal else 9}.get(kind, 5)
    query, key, value = (torch.randn(2, n, c, dtype=dtype, requires_grad=True) for n, c in (
        (length, 32), (9, layer.kdim), (9, layer.vdim)))  # fmt: skip
    given = {"self": (query,), "key is value": (query, key)}.get(kind, (query, key, value))
    wanted = [*given, *layer.parameters()]
    out, expected = layer(*given), by_hand(layer, *given)
    assert out.dtype == dtype
    exact = dtype == torch.float64
    close(out, expected, 1e-13 if exact else 4e-6)
    direction = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((t * direction).sum(), wanted) for t in (out, expected))
    # The bias of the keys moves all scores of a query alike but the rows': without rows its gradient is rounding alone.
    largest = max(g.abs().max() for g in theirs if g.numel())
    for mine, other in zip(ours, theirs):
        assert mine.shape == other.shape
        assert not mine.numel() or (mine - other).abs().max() <= (1e-13 if exact else 1e-5) * largest


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (2, 4, 5, 7), (5, 7), (7,), (2, 1, 5, 1)], ids=str)
def test_masks(shape, rows, is_causal):
    layer = shaken(ConcatKVAttention(32, 4, rows, is_causal=is_causal, extra_bias=1.0))
    query, key = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    visible = torch.rand(shape) > 0.3
    visible[..., :2] = True  # for every query at least one
    close(layer(query, key, mask=visible), by_hand(layer, query, key, mask=visible))
    numbers = torch.randn(shape)
    close(layer(query, key, mask=numbers), by_hand(layer, query, key, mask=numbers))


def test_rows_are_seen_by_queries_that_see_nothing_else():
    layer = shaken(ConcatKVAttention(16, 2, 1, is_causal=True))
    out = layer(torch.randn(3, 6, 16), torch.randn(3, 4, 16))  # queries 0 and 1 see no key
    expected = layer.out_proj(layer.extra_kv.value.flatten())
    close(out[:, :2], expected.expand(3, 2, 16))
    assert (out[:, 2:] - expected).abs().amax(-1).min() > 1e-3
    without = shaken(ConcatKVAttention(16, 2, 0, is_causal=True))
    close(without(torch.randn(3, 6, 16), torch.randn(3, 4, 16))[:, :2], without.out_proj.bias.expand(3, 2, 16))
    assert layer(torch.randn(0, 6, 16)).shape == (0, 6, 16)
    assert layer(torch.randn(2, 0, 16)).shape == (2, 0, 16)


def test_minus_infinity_switches_rows_off():
    layer = ConcatKVAttention(16, 2, 3, extra_bias=-torch.inf)
    plain = ConcatKVAttention(16, 2, 0)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "extra_kv" not in k}, strict=False)
    x = torch.randn(2, 5, 16)
    close(layer(x), plain(x), 1e-6)
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(layer(x).sum(), list(layer.extra_kv.parameters())))


def test_rows_are_shared_by_the_batch():
    layer = ConcatKVAttention(32, 4, 2)
    x, direction = torch.randn(5, 6, 32), torch.randn(5, 6, 32)
    rows = list(layer.extra_kv.parameters())
    whole = torch.autograd.grad((layer(x) * direction).sum(), rows)
    each = [torch.autograd.grad((layer(a[None]) * b[None]).sum(), rows) for a, b in zip(x, direction)]
    for mine, parts in zip(whole, zip(*each)):
        close(mine, sum(parts), 1e-5)


# ---- dtypes, compilers, copies ---------------------------------------------------------------------------------------


def test_bfloat16_projections_have_rows_in_float32():
    layer = shaken(ConcatKVAttention(32, 4, 2, dtype=torch.bfloat16))
    assert layer.extra_kv.key.dtype == layer.extra_kv.value.dtype == torch.float32
    assert layer.q_proj.weight.dtype == torch.bfloat16
    x = torch.randn(2, 7, 32).bfloat16()
    out, expected = layer(x), by_hand(layer, x)
    assert out.dtype == torch.bfloat16
    close(out, expected, 0.03)
    gradient, other = (torch.autograd.grad(t.double().square().sum(), layer.extra_kv.key)[0] for t in (out, expected))
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())
    close(gradient, other, 0.05)
    assert layer.bfloat16()(x).dtype == torch.bfloat16  # the rows, too


def test_half_precision():
    layer = shaken(ConcatKVAttention(32, 4, 2, dtype=torch.float16))
    x = torch.randn(2, 7, 32).half()
    out, expected = layer(x), by_hand(layer, x)
    assert out.dtype == torch.float16
    close(out, expected, 4e-3)
    gradient, other = (torch.autograd.grad(t.double().sum(), layer.extra_kv.value)[0] for t in (out, expected))
    assert gradient.dtype == torch.float32
    close(gradient, other, 4e-3)


def test_autocast():
    layer = shaken(ConcatKVAttention(32, 4, 2, is_causal=True))
    x = torch.randn(2, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out, masked = layer(x), layer(x, mask=torch.ones(1, 1, 1, 7, dtype=torch.bool))
    assert out.dtype == masked.dtype == torch.bfloat16
    close(out, by_hand(layer, x), 0.03)
    close(masked, by_hand(layer, x), 0.03)
    for gradient, other in zip(
        torch.autograd.grad(out.float().square().sum(), list(layer.parameters())),
        torch.autograd.grad(by_hand(layer, x).square().sum(), list(layer.parameters())),
    ):
        assert gradient.dtype == torch.float32
        close(gradient, other, 0.06)


def test_compiles_as_one_graph():
    layer = shaken(ConcatKVAttention(32, 4, 2, is_causal=True, extra_bias=1.0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, parameters = torch.randn(2, 7, 32), list(layer.parameters())
    out, expected = compiled(x), layer(x)
    close(out, expected)
    ours, theirs = (torch.autograd.grad(t.square().sum(), parameters) for t in (out, expected))
    for mine, other in zip(ours, theirs):
        close(mine, other, 1e-5)
    mask = torch.rand(2, 1, 1, 7) > 0.3
    with torch.no_grad():
        close(compiled(x, mask=mask), layer(x, mask=mask))


def test_copies_files_and_meta_device():
    layer = shaken(ConcatKVAttention(32, 4, 2, extra_bias=1.0))
    x = torch.randn(2, 7, 32)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = ConcatKVAttention(32, 4, 2)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), layer(x))
        assert other.extra_kv.key.data_ptr() != layer.extra_kv.key.data_ptr()
    empty = ConcatKVAttention(32, 4, 2, extra_bias=1.0, device="meta")
    assert all(t.is_meta for t in empty.state_dict().values())
    assert "extra_bias=1" in repr(empty)
    empty.to_empty(device="cpu").reset_parameters()
    assert empty.extra_kv.extra_bias == 1
    close(empty(x), by_hand(empty, x))


def test_initial_values():
    torch.manual_seed(0)
    layer = ConcatKVAttention(256, 4, 32)
    for row in layer.extra_kv.parameters():
        assert abs(row.std() - 1) < 0.03
        assert abs(row.mean()) < 0.03
    small, zero = ConcatKVAttention(256, 4, 32, init=0.02), ConcatKVAttention(256, 4, 32, init=0)
    assert abs(small.extra_kv.key.std() - 0.02) < 0.001
    assert all(not row.any() for row in zero.extra_kv.parameters())
    bound = (6 / 512) ** 0.5
    for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    assert ConcatKVAttention(256, 4, 2, kdim=8, vdim=9).extra_repr() == (
        "embed_dim=256, num_heads=4, rows=2, kdim=8, vdim=9, is_causal=False"
    )


# ---- training the rows alone -----------------------------------------------------------------------------------------


def test_frozen_projections_leave_the_rows_backward_alone(monkeypatch):
    """The op is asked for the gradients of the rows and of nothing else."""
    asked, backward = [], op._attention_backward
    monkeypatch.setattr(op, "_attention_backward", lambda *a: asked.append(list(a[-2])) or backward(*a))
    layer, x = ConcatKVAttention(32, 4, 2).freeze_projections(), torch.randn(2, 7, 32)
    layer(x).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["extra_kv.key", "extra_kv.value"]
    for gradient, other in zip(
        (layer.extra_kv.key.grad, layer.extra_kv.value.grad),
        torch.autograd.grad(by_hand(layer, x).square().sum(), [layer.extra_kv.key, layer.extra_kv.value]),
    ):
        close(gradient, other, 1e-5)
    assert asked == [[False, False, False, True, True, False, False]]
    layer.requires_grad_(True)(x).sum().backward()
    assert asked[1][:5] == [True] * 5
    assert all(p.grad is not None for p in layer.parameters())


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, rows):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = ConcatKVAttention(32, 4, rows, is_causal=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_prefix_tuning_learns_through_the_rows_alone():
    """A frozen causal transformer imitates one with hidden rows: the loss falls at least thirtyfold, and nothing but
    the rows has moved by a bit."""
    torch.manual_seed(1)
    teacher = nn.Sequential(Block(3), Block(3)).requires_grad_(False)
    student = copy.deepcopy(teacher)
    trained = []
    for layer in student.modules():
        if isinstance(layer, ExtraKV):
            layer.reset_parameters()
            trained += layer.requires_grad_(True).parameters()
    assert len(trained) == 4
    before = {name: t.clone() for name, t in student.state_dict().items()}
    optimizer = torch.optim.Adam(trained, lr=0.03)
    losses = []
    for _ in range(200):
        x = torch.randn(8, 10, 32)
        loss = F.mse_loss(student(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-10:]) < losses[0] / 30
    for name, t in student.state_dict().items():
        assert torch.equal(t, before[name]) == (not name.endswith(("extra_kv.key", "extra_kv.value"))), name


# ---- weights of torch.nn.MultiheadAttention --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 20, "vdim": 12}], ids=str)
def test_loads_weights_of_torch(options, add_bias_kv, batch_first):
    theirs = nn.MultiheadAttention(
        32, 4, add_bias_kv=add_bias_kv, batch_first=batch_first, dtype=torch.float64, **options
    )
    shaken(theirs)
    made = ConcatKVAttention.from_multihead_attention(theirs)
    loaded = ConcatKVAttention(32, 4, int(add_bias_kv), extra_bias=0.7, dtype=torch.float64, **options)
    if not add_bias_kv:
        loaded.extra_kv.extra_bias.zero_()
    state = theirs.state_dict()
    assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"
    assert list(state) == list(theirs.state_dict())  # the caller's dict is as it was
    query = torch.randn(2, 5, 32, dtype=torch.float64)
    key, value = (torch.randn(2, 7, n, dtype=torch.float64) for n in (theirs.kdim, theirs.vdim))
    call = (query, key, value) if batch_first else [t.transpose(0, 1) for t in (query, key, value)]
    expected = theirs(*call, need_weights=False)[0]
    expected = expected if batch_first else expected.transpose(0, 1)
    gradients = dict(zip(
        dict(theirs.named_parameters()), torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))
    ))  # fmt: skip
    for ours in (made, loaded):
        assert ours.extra_kv.key.shape == (4, int(add_bias_kv), 8)
        assert ours.extra_kv.extra_bias == 0
        out = ours(query, key, value)
        close(out, expected, 1e-13)
        out.square().sum().backward()
        weights = [ours.q_proj.weight.grad, ours.k_proj.weight.grad, ours.v_proj.weight.grad]
        packed = gradients["in_proj_weight"].chunk(3) if "in_proj_weight" in gradients else [
            gradients[f"{n}_proj_weight"] for n in "qkv"
        ]  # fmt: skip
        for mine, other in zip(weights, packed):
            close(mine, other, 1e-12)
        if add_bias_kv:
            close(ours.extra_kv.key.grad.view(1, 1, 32), gradients["bias_k"], 1e-12)
            close(ours.extra_kv.value.grad.view(1, 1, 32), gradients["bias_v"], 1e-12)


def test_loads_weights_of_torch_inside_a_model():
    theirs = nn.ModuleDict({"a": nn.MultiheadAttention(32, 4, add_bias_kv=True), "b": nn.MultiheadAttention(32, 4)})
    ours = nn.ModuleDict({"a": ConcatKVAttention(32, 4, 1, extra_bias=1.0), "b": ConcatKVAttention(32, 4, 2)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "b.extra_kv.key", "b.extra_kv.value"'):
        ours.load_state_dict(theirs.state_dict())
    kept = ours["b"].extra_kv.key.clone()
    report = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert torch.equal(ours["b"].extra_kv.key, kept)
    x = torch.randn(5, 2, 32)
    close(ours["a"](x.transpose(0, 1)).transpose(0, 1), theirs["a"](x, x, x, need_weights=False)[0])
    assert torch.equal(ours["b"].out_proj.weight, theirs["b"].out_proj.weight)
    with pytest.raises(RuntimeError, match=r"size mismatch for extra_kv.key"):
        ConcatKVAttention(32, 4, 2).load_state_dict(theirs["a"].state_dict())


@pytest.mark.parametrize("add_bias_kv", [False, True])
def test_conversion_with_further_rows(add_bias_kv):
    theirs = nn.MultiheadAttention(32, 4, add_bias_kv=add_bias_kv, batch_first=True).eval().requires_grad_(False)
    ours = ConcatKVAttention.from_multihead_attention(theirs, 3, is_causal=True, init=0.5)
    assert ours.extra_kv.key.shape == (4, 3 + add_bias_kv, 8)
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["extra_kv.key", "extra_kv.value"]
    assert not ours.training
    x = torch.randn(2, 6, 32)
    close(ours(x), by_hand(ours, x))
    ours.extra_kv.key = nn.Parameter(ours.extra_kv.key[:, :add_bias_kv].detach())
    ours.extra_kv.value = nn.Parameter(ours.extra_kv.value[:, :add_bias_kv].detach())
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    close(ours(x), theirs(x, x, x, attn_mask=future, need_weights=False)[0])
    with torch.no_grad():
        ours.q_proj.weight.zero_()
    assert theirs.in_proj_weight.all()  # copies
    half = nn.MultiheadAttention(32, 4, add_bias_kv=add_bias_kv, dtype=torch.bfloat16)
    made = ConcatKVAttention.from_multihead_attention(half, 1)
    assert (made.q_proj.weight.dtype, made.extra_kv.key.dtype) == (torch.bfloat16, torch.float32)
    if not add_bias_kv:
        assert ConcatKVAttention.from_multihead_attention(theirs, 1, extra_bias=1.0).extra_kv.extra_bias == 1


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((30, 4, 1), {}, "embed_dim must be a positive multiple of num_heads, got embed_dim=30, num_heads=4"),
        ((32, 0, 1), {}, "got embed_dim=32, num_heads=0"),
        ((32, 4, -1), {}, "rows at least 0, got heads=4, rows=-1"),
        ((32, 4, 1), {"kdim": 0}, "kdim must be at least 1, got 0"),
        ((32, 4, 1), {"vdim": -3}, "vdim must be at least 1, got -3"),
        ((32, 4, 1), {"init": -1.0}, "init, a standard deviation, must be finite and at least 0, got -1"),
        ((32, 4, 1), {"extra_bias": float("inf")}, "extra_bias must be finite or minus infinity, got inf"),
        ((32, 4, 1), {"extra_bias": float("nan")}, "extra_bias must be finite or minus infinity, got nan"),
    ],
)
def test_wrong_options_are_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        ConcatKVAttention(*args, **options)


def test_wrong_inputs_are_named():
    layer = ConcatKVAttention(32, 4, 1, kdim=20, vdim=12)
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 20), torch.randn(2, 7, 12)
    layer(query, key, value)
    wrong = [
        ((query[0], key, value), r"query must be Tensor\[B, L, 32\], got shape \(5, 32\)"),
        ((query[..., :31], key, value), r"query must be Tensor\[B, L, 32\], got shape \(2, 5, 31\)"),
        ((query,), r"key must be Tensor\[2, S, 20\] beside query \(2, 5, 32\), got shape \(2, 5, 32\)"),
        ((query, key[:1], value), r"key must be Tensor\[2, S, 20\] .* got shape \(1, 7, 20\)"),
        ((query, key), r"value must be Tensor\[2, 7, 12\] beside key \(2, 7, 20\), got shape \(2, 7, 20\)"),
        ((query, key, value[:, :6]), r"value must be Tensor\[2, 7, 12\] .* got shape \(2, 6, 12\)"),
        ((query, None, value), "value is given without key"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            layer(*call)
    for shape in ((2, 7), (2, 3, 1, 7), (1, 2, 1, 5, 7)):
        with pytest.raises(ValueError, match=r"mask must broadcast to Tensor\[2, 4, 5, 7\]"):
            layer(query, key, value, mask=torch.ones(shape, dtype=torch.bool))


def test_what_cannot_be_converted_is_refused():
    make = ConcatKVAttention.from_multihead_attention
    with pytest.raises(TypeError, match=r"layer must be a torch.nn.MultiheadAttention, got Linear"):
        make(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"dropout=0.1; pyface.nn.attention_hub.MultiheadAttention can"):
        make(nn.MultiheadAttention(32, 4, dropout=0.1))
    with pytest.raises(UserError, match="add_zero_attn=True"):
        make(nn.MultiheadAttention(32, 4, add_zero_attn=True))
    with pytest.raises(ValueError, match=r"extra_bias must be 0 where the layer has a row of add_bias_kv, got 1.0"):
        make(nn.MultiheadAttention(32, 4, add_bias_kv=True), extra_bias=1.0)
