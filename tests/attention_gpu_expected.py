"""What the GPU paths of core `attention` must give: cases, tensors, and a float64 model of the definition.

The model is written from the definition alone and handles a case at a time; values and gradients come from autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyface.ops.attention import TENSORS

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (query, extra rows)
TYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
TYPE_IDS = ["float32", "float64", "bfloat16", "float16", "bfloat16 with float32", "float16 with float32"]


SMOOTH = 4.0


@dataclass
class Case:
    queries: int
    keys: int
    extras: int = 1
    depth: int = 8
    width: int | None = None
    batch: int = 1
    heads: int = 1
    causal: bool = False
    shared: bool = True
    biased: bool = True
    grid: int = 0  # width of the prior's grid; 0: no prior
    by_rows: bool = False  # [B, L, H, E] seen as [B, H, L, E]

    @property
    def needs(self) -> tuple[bool, ...]:
        return (*[True] * 5, self.biased, bool(self.grid))


CASES = {
    "text encoder, small": Case(77, 77, 1, depth=16, causal=True),
    "two samples": Case(5, 9, 2, depth=8, batch=2, heads=2),
    "rows of each sample": Case(17, 7, 3, depth=8, batch=2, shared=False),
    "no extra rows": Case(7, 16, 0, biased=False),
    "only extra rows": Case(3, 0, 5, depth=8, width=24),
    "nothing to see": Case(3, 0, 0, biased=False),
    "causal, more queries": Case(20, 9, 2, causal=True),
    "causal, more queries, no rows": Case(20, 9, 0, causal=True, biased=False),
    "causal, more keys": Case(9, 37, 1, causal=True),
    "many rows": Case(6, 5, 70, depth=8, heads=2, causal=True),
    "wide": Case(9, 18, 2, depth=72, width=160, causal=True),
    "uneven": Case(33, 41, 3, depth=13, width=7, by_rows=True, heads=2),
    "one of each": Case(1, 1, 1, depth=1, width=1),
    "prior": Case(6, 24, 2, depth=16, heads=2, grid=6),
    "prior, every key": Case(19, 40, 0, depth=8, biased=False, grid=8, batch=2),
}


def tensors(case: Case, types=(F32, F32), device="cpu") -> dict:
    generator = torch.Generator().manual_seed(7)
    real = F64 if types[0] == F64 else F32

    def random(*shape, dtype=types[0]):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype).to(device)

    def rows(count, columns):
        if case.by_rows:
            return random(case.batch, count, case.heads, columns).transpose(1, 2)
        return random(case.batch, case.heads, count, columns)

    width = case.depth if case.width is None else case.width
    samples = (1,) if case.shared else (case.batch,)
    t = dict(
        query=rows(case.queries, case.depth),
        key=rows(case.keys, case.depth),
        value=rows(case.keys, width),
        extra_key=random(*samples, case.heads, case.extras, case.depth, dtype=types[1]),
        extra_value=random(*samples, case.heads, case.extras, width, dtype=types[1]),
        extra_bias=random(case.heads, case.extras, dtype=real) if case.biased else None,
        prior=None,
    )
    if case.grid:
        centre = random(case.batch, case.heads, case.queries, 2, dtype=real) * 2 + 1
        sharpness = random(case.batch, case.heads, case.queries, 2, dtype=real).square()
        t["prior"] = torch.cat([centre, sharpness], -1)
    return t


def scale(case: Case) -> float:
    return 1 / math.sqrt(case.depth)


def model(case: Case, t: dict):
    """(out, lse) in float64."""
    batch, heads, queries, _ = t["query"].shape
    extra_key, extra_value = (t[n].expand(batch, -1, -1, -1) for n in ("extra_key", "extra_value"))
    keys = t["key"].shape[2]
    scores = scale(case) * t["query"] @ t["key"].transpose(-1, -2)
    rows = scale(case) * t["query"] @ extra_key.transpose(-1, -2)
    if t["extra_bias"] is not None:
        rows = rows + t["extra_bias"][:, None, :]
    if t["prior"] is not None:
        numbers = t["prior"]
        at = torch.arange(keys, device=scores.device)
        x, y = (at % case.grid).double(), (at // case.grid).double()
        far = numbers[..., 2:3] * (numbers[..., 0:1] - x) ** 2 + numbers[..., 3:4] * (numbers[..., 1:2] - y) ** 2
        scores = scores - far / SMOOTH
    seen = torch.ones(queries, rows.shape[-1] + keys, dtype=torch.bool, device=scores.device)
    if case.causal:
        i = torch.arange(queries, device=scores.device)[:, None]
        seen[:, rows.shape[-1] :] = torch.arange(keys, device=scores.device) <= i + keys - queries
    every = torch.cat([rows, scores], -1).masked_fill(~seen, -math.inf)
    some = seen.any(-1)
    if not every.shape[-1]:
        none = every.new_zeros(*every.shape[:-1], t["value"].shape[-1])
        return none, every.new_full(every.shape[:-1], -math.inf)
    lse = torch.where(some, every.logsumexp(-1), -math.inf)
    p = torch.exp(every - torch.where(some & (lse > -math.inf), lse, 0.0)[..., None])
    p = p.masked_fill(~seen, 0.0)
    return p @ torch.cat([extra_value, t["value"]], 2), lse


def exact(t: dict, leaves: bool = False) -> dict:
    """In float64, rows of a longer type rounded to that of the query as the kernels do when they load them."""

    def one(name, x):
        x = x.detach()
        x = x.to(t["query"].dtype) if name in ("extra_key", "extra_value") else x
        return x.double().requires_grad_(leaves)

    return {name: None if v is None else one(name, v) for name, v in t.items()}


TOLERANCE = {F32: 2e-6, F64: 1e-13, BF16: 1.6e-2, F16: 2e-3}


def check(name: str, found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, loose: float = 1.0):
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    found = found.double()
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite), f"{name}: finite in other places than expected"
    assert torch.equal(found.isnan(), expected.isnan()), f"{name}: not a number in other places than expected"
    assert torch.equal(found[found.isinf()], expected[expected.isinf()]), f"{name}: another infinity than expected"
    largest = expected[finite].abs().amax().item() if finite.any() else 0.0
    error = (found - expected)[finite].abs().amax().item() if finite.any() else 0.0
    assert error <= loose * TOLERANCE[dtype] * max(largest, 1.0), f"{name}: {error:.3g} off, largest {largest:.3g}"


def options(case):
    return case.causal, scale(case), case.grid or 1, SMOOTH


def forward(core, case, t):
    return core.forward(*t.values(), *options(case), True)


def backward(core, case, t, grad, grad_lse, out, lse, needs=None):
    return core.backward(grad, grad_lse, *t.values(), out, lse, *options(case), needs or case.needs)


def check_forward(case, t, out, lse, loose=1.0):
    expected_out, expected_lse = model(case, exact(t))
    dtype = t["query"].dtype
    assert out.dtype == dtype
    assert lse.dtype == (F64 if dtype == F64 else F32)
    check("out", out, expected_out, dtype, loose)
    check("lse", lse, expected_lse, F32 if dtype in (BF16, F16) else dtype, loose * (4 if dtype != F64 else 1))


def check_backward(case, t, grad_out, grad_lse, found, needs=None, loose=1.0):
    needs = case.needs if needs is None else needs
    leaves = exact(t, leaves=True)
    out, lse = model(case, leaves)
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + torch.where(lse > -math.inf, lse, 0.0).mul(grad_lse.double()).sum()
    wanted = [n for n, need in zip(TENSORS, needs, strict=True) if need]
    inputs = [leaves[n] for n in wanted]
    given = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None] * len(inputs)
    expected = {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(wanted, inputs, given, strict=True)}
    for name, g, need in zip(TENSORS, found, needs, strict=True):
        assert (g is not None) == need, f"{name}: wanted {need}"
        if g is None:
            continue
        assert g.dtype == t[name].dtype, f"grad_{name} is {g.dtype}"
        check(f"grad_{name}", g, expected[name], t["query"].dtype, loose * (8 if t["query"].dtype in (F32, F64) else 2))


# ---- what holds on every GPU path ------------------------------------------------------------------------------------


def both(core, case, t, needs=None, with_lse=True, loose=1.0):
    """Results and gradients, checked on the way."""
    out, lse = forward(core, case, t)
    check_forward(case, t, out, lse, loose)
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse) if with_lse else None
    found = backward(core, case, t, grad_out, grad_lse, out, lse, needs)
    check_backward(case, t, grad_out, grad_lse, found, needs, loose)
    return out, lse, *found


def frozen_model(core, device="cpu"):
    """Rows-only backward costs O(L R): with NaN keys and the statistics of clean ones the gradients stay clean."""
    case = Case(40, 50, 2, causal=True)
    t = tensors(case, device=device)
    out, lse = forward(core, case, t)
    grad_out = torch.randn_like(out)
    needs = (False, False, False, True, True, True, False)
    expected = backward(core, case, t, grad_out, None, out, lse, needs)
    spoiled = {**t, "key": torch.full_like(t["key"], torch.nan), "value": torch.full_like(t["value"], torch.nan)}
    found = backward(core, case, spoiled, grad_out, None, out, lse, needs)
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)
    check_backward(case, t, grad_out, None, expected, needs)


def not_a_number(core, types, device="cpu"):
    """Values, keys and gradients that are not finite behind the mask leave the bits of rows that do not see them."""
    case = Case(40, 43, 1, depth=16, causal=True)
    t = tensors(case, types, device)
    clean, clean_lse = forward(core, case, t)
    t["key"][0, 0, 30] = torch.nan
    t["value"][0, 0, 20] = torch.nan
    t["value"][0, 0, 34, 3] = torch.inf
    out, lse = forward(core, case, t)
    assert torch.equal(out[:, :, :17], clean[:, :, :17])  # query i sees key i + 3
    assert torch.equal(lse[:, :, :27], clean_lse[:, :, :27])
    assert out[:, :, 17:].isnan().all()
    assert lse[:, :, 27:].isnan().all()
    grad = torch.randn_like(out)
    t = tensors(case, types, device)
    found = backward(core, case, t, grad, None, clean, clean_lse)
    spoiled = grad.clone()
    spoiled[0, 0, 12] = torch.nan  # seen by keys up to 15 and by the extra row
    again = backward(core, case, t, spoiled, None, clean, clean_lse)
    for a, b, name in zip(again[:3], found[:3], ("query", "key", "value"), strict=True):
        rest = slice(13, None) if name == "query" else slice(16, None)
        assert torch.equal(a[:, :, rest], b[:, :, rest]), name
    assert again[0][0, 0, 12].isnan().all()
    assert again[2][0, 0, :16].isnan().all()
    assert again[3].isnan().all()


def switched_off(core, device="cpu"):
    """A bias of -inf is as good as no rows; scores of 1e4 overflow nothing."""
    case = Case(9, 12, 2, causal=True)
    t = tensors(case, device=device)
    t["extra_bias"][:] = -torch.inf
    out, lse, *grads = both(core, case, t)
    without = Case(9, 12, 0, causal=True, biased=False)
    plain = {**t, "extra_key": t["extra_key"][:, :, :0], "extra_value": t["extra_value"][:, :, :0], "extra_bias": None}
    for found, expected in zip((out, lse), forward(core, without, plain), strict=True):
        check("with rows switched off", found, expected.double(), F32)
    assert not any(g.any() for g in grads[3:6])
    t = tensors(case, device=device)
    t["query"] = t["query"] * 1e4
    both(core, case, t, (False, False, True, False, True, False, False))
    t["query"][0, 0, 3] = torch.inf
    assert forward(core, case, t)[1][0, 0, 3].isnan()


def views(core, types, device="cpu"):
    """Packed projections, transposed heads, expanded rows: the same bits as dense copies."""
    case = Case(18, 21, 2, depth=16, batch=2, heads=2, causal=True)
    t = tensors(case, types, device)
    expected = forward(core, case, t)
    packed = torch.zeros(2, 21, 2, 35, dtype=types[0], device=device)
    packed[..., 1:17], packed[..., 17:33] = t["key"].transpose(1, 2), t["value"].transpose(1, 2)
    views = {
        **t,
        "query": t["query"].transpose(2, 3).contiguous().transpose(2, 3),
        "key": packed[..., 1:17].transpose(1, 2),
        "value": packed[..., 17:33].transpose(1, 2),
        "extra_key": t["extra_key"].expand(2, 2, 2, 16),
        "extra_value": t["extra_value"].expand(2, 2, 2, 16),
        "extra_bias": t["extra_bias"].t().contiguous().t(),
    }
    found = forward(core, case, views)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    grad = torch.randn(2, 18, 2, 16).to(device, types[0]).transpose(1, 2)
    ours = backward(core, case, views, grad, None, *found)
    theirs = backward(core, case, t, grad, None, *expected)
    for name, a, b in zip(TENSORS, ours, theirs, strict=True):
        if name in ("extra_key", "extra_value"):
            check(name, a.sum(0, keepdim=True), b.double(), F32, 4.0)
        elif a is not None:
            assert torch.equal(a, b), name
