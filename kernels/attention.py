"""Triton path of core `attention`: attention over extra rows and keys with a running softmax, and its gradients.

Called through `pyface.ops._attention_gpu` with checked arguments, allocated results and dense rows. Runs on CPU tensors
when TRITON_INTERPRET=1 was set before the import.

A program owns a block of rows of one result: of queries going forward and for their gradient, of keys or extra rows for
theirs. Extra rows and keys are two loops over rows where they lie, and scores never reach memory. Nothing is added by
atomics: shared extra rows get one partial sum for every sample, added up in the order of samples. Sums are float32
(float64 for float64); weights and gradients of scores are rounded to the storage type before a product.
"""

import contextlib
import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles chosen on paper; written without a GPU, so not tuned on one. First to try there: num_stages 3 for long
# sequences, 128 queries with 8 warps from 512 queries on, one launch for the three kinds of gradients.
_OPTIONS = {"enable_fp_fusion": True}

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@triton.jit
def _load(base, first, count, stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """Rows [first, first + ROWS) of one head, 0 where there are none."""
    r = first + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = base + r.to(tl.int64)[:, None] * stride + c[None, :]
    return tl.load(at, (r < count)[:, None] & (c < columns)[None, :], other=0.0).to(TYPE)


@triton.jit
def _store(base, first, count, stride, columns, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = first + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = base + r.to(tl.int64)[:, None] * stride + c[None, :]
    tl.store(at, value.to(base.dtype.element_ty), (r < count)[:, None] & (c < columns)[None, :])


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _add(total, weights, rows, seen, hides, PRECISION: tl.constexpr, ROWS: tl.constexpr):
    """total + weights @ rows, where a weight that is not `seen` adds nothing: 0 times what is not a number is not 0."""
    weights = tl.where(seen, weights, 0.0)
    if hides:
        wide = rows.to(total.dtype)
        strange = (wide - wide) != 0
        total = _dot(weights.to(rows.dtype), tl.where(strange, 0.0, rows).to(rows.dtype), total, PRECISION)
        if tl.max(tl.max(strange.to(tl.int32), 1), 0) > 0:
            of_rows = tl.arange(0, ROWS)
            for j in range(ROWS):
                here = of_rows == j
                weight = tl.sum(tl.where(here[None, :], weights, 0.0), 1)
                sees = tl.sum(tl.where(here[None, :], seen.to(tl.int32), 0), 1) > 0
                row = tl.sum(tl.where(here[:, None] & strange, wide, 0.0), 0)
                odd = tl.sum(tl.where(here[:, None], strange.to(tl.int32), 0), 0) > 0
                total = tl.where(sees[:, None] & odd[None, :], total + weight[:, None] * row[None, :], total)
    else:
        total = _dot(weights.to(rows.dtype), rows, total, PRECISION)
    return total


@triton.jit
def _numbers(prior, i, count, REAL: tl.constexpr):
    """Centre x, y and sharpness x, y of queries i."""
    at = prior + 4 * i.to(tl.int64)
    here = i < count
    cx = tl.load(at, here, other=0.0).to(REAL)
    cy = tl.load(at + 1, here, other=0.0).to(REAL)
    sx = tl.load(at + 2, here, other=0.0).to(REAL)
    sy = tl.load(at + 3, here, other=0.0).to(REAL)
    return cx, cy, sx, sy


@triton.jit
def _from_centres(numbers, j, grid_width, REAL: tl.constexpr):
    """How far right of and below keys j the centres are: [queries, keys]."""
    y = j // grid_width
    x = j - y * grid_width
    return numbers[0][:, None] - x.to(REAL)[None, :], numbers[1][:, None] - y.to(REAL)[None, :]


@triton.jit
def _fall(numbers, j, grid_width, smooth, REAL: tl.constexpr):
    """What the prior takes off the scores: [queries, keys]."""
    dx, dy = _from_centres(numbers, j, grid_width, REAL)
    return (numbers[2][:, None] * dx * dx + numbers[3][:, None] * dy * dy) / smooth


@triton.jit
def _bias(bias, h, m, count, bias_h, bias_r, REAL: tl.constexpr):
    return tl.load(bias + h * bias_h + m.to(tl.int64) * bias_r, m < count, other=0.0).to(REAL)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _absorb(
    scores, seen, hides, rows, top, total, sums, PRECISION: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The running softmax takes in a tile of scores and the rows that they weigh."""
    scores = tl.where(seen, scores, -float("inf"))
    now = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(now == -float("inf"), 0.0, now)
    before = tl.exp(top - shift)
    weights = tl.exp(scores - shift[:, None])
    total = total * before + tl.sum(weights, 1)
    sums = _add(sums * before[:, None], weights, rows, seen, hides, PRECISION, ROWS)
    return now, total, sums


@triton.jit
def _forward_kernel(
    query, key, value, extra_key, extra_value, bias, prior, out, lse,
    heads, queries, keys, extras, depth, width, causal, scale, grid_width, smooth,
    query_b, query_h, query_r, key_b, key_h, key_r, value_b, value_h, value_r,
    extra_key_b, extra_key_h, extra_key_r, extra_value_b, extra_value_h, extra_value_r, out_b, out_h, out_r,
    bias_h, bias_r,
    REAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EXTRAS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, QUERIES)
    head = tl.program_id(0).to(tl.int64) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # causal: the longest first
    b = head // heads
    h = head - b * heads
    i = first + tl.arange(0, QUERIES)
    q = _load(query + b * query_b + h * query_h, first, queries, query_r, depth, QUERIES, DEPTH, TYPE)
    numbers = _numbers(prior + 4 * head * queries, i, queries, REAL) if prior is not None else (i, i, i, i)
    top = tl.full([QUERIES], -float("inf"), REAL)
    total = tl.zeros([QUERIES], REAL)
    sums = tl.zeros([QUERIES, WIDTH], REAL)
    for at in range(0, extras, EXTRAS):
        m = at + tl.arange(0, EXTRAS)
        k = _load(extra_key + b * extra_key_b + h * extra_key_h, at, extras, extra_key_r, depth, EXTRAS, DEPTH, TYPE)
        v = _load(
            extra_value + b * extra_value_b + h * extra_value_h, at, extras, extra_value_r, width, EXTRAS, WIDTH, TYPE
        )
        scores = _dot(q, tl.trans(k), tl.zeros([QUERIES, EXTRAS], REAL), PRECISION) * scale
        if bias is not None:
            scores += _bias(bias, h, m, extras, bias_h, bias_r, REAL)[None, :]
        seen = (i < queries)[:, None] & (m < extras)[None, :]
        top, total, sums = _absorb(scores, seen, False, v, top, total, sums, PRECISION, EXTRAS)
    shift = keys - queries
    last = tl.minimum(first + QUERIES, queries) - 1
    end = tl.minimum(tl.maximum(last + shift + 1, 0), keys) if causal else keys
    for at in range(0, end, KEYS):
        j = at + tl.arange(0, KEYS)
        k = _load(key + b * key_b + h * key_h, at, keys, key_r, depth, KEYS, DEPTH, TYPE)
        v = _load(value + b * value_b + h * value_h, at, keys, value_r, width, KEYS, WIDTH, TYPE)
        scores = _dot(q, tl.trans(k), tl.zeros([QUERIES, KEYS], REAL), PRECISION) * scale
        if prior is not None:
            scores -= _fall(numbers, j, grid_width, smooth, REAL)
        seen = (i < queries)[:, None] & (j < keys)[None, :]
        if causal:
            seen = seen & (j[None, :] <= i[:, None] + shift)
        hides = (causal != 0) & (at + KEYS > first + shift + 1)
        top, total, sums = _absorb(scores, seen, hides, v, top, total, sums, PRECISION, KEYS)
    nothing = total == 0
    sums = tl.where(nothing[:, None], 0.0, sums / total[:, None])
    _store(out + b * out_b + h * out_h, first, queries, out_r, width, sums, QUERIES, WIDTH)
    if lse is not None:
        result = tl.where(top == -float("inf"), tl.where(nothing, top, total), top + tl.log(total))
        tl.store(lse + head * queries + i, result, i < queries)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _delta_kernel(
    grad, out, grad_lse, delta, heads, queries, width, grad_b, grad_h, grad_r, out_b, out_h, out_r,
    REAL: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """delta = sum of grad times out - grad_lse: what every gradient of scores loses."""
    blocks = tl.cdiv(queries, QUERIES)
    head = tl.program_id(0).to(tl.int64) // blocks
    first = tl.program_id(0) % blocks * QUERIES
    b = head // heads
    h = head - b * heads
    i = first + tl.arange(0, QUERIES)
    g = _load(grad + b * grad_b + h * grad_h, first, queries, grad_r, width, QUERIES, WIDTH, REAL)
    o = _load(out + b * out_b + h * out_h, first, queries, out_r, width, QUERIES, WIDTH, REAL)
    result = tl.sum(g * o, 1)
    if grad_lse is not None:
        result -= tl.load(grad_lse + head * queries + i, i < queries, other=0.0)
    tl.store(delta + head * queries + i, result, i < queries)


@triton.jit
def _weights(scores, seen, lse):
    return tl.where(seen & (lse > -float("inf")), tl.exp(scores - tl.where(lse > -float("inf"), lse, 0.0)), 0.0)


@triton.jit
def _query_kernel(
    query, key, value, extra_key, extra_value, bias, prior, grad, lse, delta, grad_query, grad_prior,
    heads, queries, keys, extras, depth, width, causal, scale, grid_width, smooth,
    query_b, query_h, query_r, key_b, key_h, key_r, value_b, value_h, value_r,
    extra_key_b, extra_key_h, extra_key_r, extra_value_b, extra_value_h, extra_value_r, grad_b, grad_h, grad_r,
    bias_h, bias_r, to_b, to_h, to_r,
    REAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EXTRAS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries and of their priors."""
    blocks = tl.cdiv(queries, QUERIES)
    head = tl.program_id(0).to(tl.int64) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    b = head // heads
    h = head - b * heads
    i = first + tl.arange(0, QUERIES)
    q = _load(query + b * query_b + h * query_h, first, queries, query_r, depth, QUERIES, DEPTH, TYPE)
    g = _load(grad + b * grad_b + h * grad_h, first, queries, grad_r, width, QUERIES, WIDTH, TYPE)
    of_lse = tl.load(lse + head * queries + i, i < queries, other=-float("inf"))[:, None]
    of_delta = tl.load(delta + head * queries + i, i < queries, other=0.0)[:, None]
    numbers = _numbers(prior + 4 * head * queries, i, queries, REAL) if prior is not None else (i, i, i, i)
    sums = tl.zeros([QUERIES, DEPTH], REAL)
    sum_x = tl.zeros([QUERIES], REAL)
    sum_y = tl.zeros([QUERIES], REAL)
    sum_xx = tl.zeros([QUERIES], REAL)
    sum_yy = tl.zeros([QUERIES], REAL)
    if grad_query is not None:
        for at in range(0, extras, EXTRAS):
            m = at + tl.arange(0, EXTRAS)
            k = _load(
                extra_key + b * extra_key_b + h * extra_key_h, at, extras, extra_key_r, depth, EXTRAS, DEPTH, TYPE
            )
            v = _load(
                extra_value + b * extra_value_b + h * extra_value_h, at, extras, extra_value_r, width, EXTRAS, WIDTH,
                TYPE,
            )  # fmt: skip
            scores = _dot(q, tl.trans(k), tl.zeros([QUERIES, EXTRAS], REAL), PRECISION) * scale
            if bias is not None:
                scores += _bias(bias, h, m, extras, bias_h, bias_r, REAL)[None, :]
            seen = (i < queries)[:, None] & (m < extras)[None, :]
            p = _weights(scores, seen, of_lse)
            ds = p * (_dot(g, tl.trans(v), tl.zeros([QUERIES, EXTRAS], REAL), PRECISION) - of_delta)
            sums = _add(sums, ds, k, seen, False, PRECISION, EXTRAS)
    shift = keys - queries
    last = tl.minimum(first + QUERIES, queries) - 1
    end = tl.minimum(tl.maximum(last + shift + 1, 0), keys) if causal else keys
    for at in range(0, end, KEYS):
        j = at + tl.arange(0, KEYS)
        k = _load(key + b * key_b + h * key_h, at, keys, key_r, depth, KEYS, DEPTH, TYPE)
        v = _load(value + b * value_b + h * value_h, at, keys, value_r, width, KEYS, WIDTH, TYPE)
        scores = _dot(q, tl.trans(k), tl.zeros([QUERIES, KEYS], REAL), PRECISION) * scale
        if prior is not None:
            scores -= _fall(numbers, j, grid_width, smooth, REAL)
        seen = (i < queries)[:, None] & (j < keys)[None, :]
        if causal:
            seen = seen & (j[None, :] <= i[:, None] + shift)
        hides = (causal != 0) & (at + KEYS > first + shift + 1)
        p = _weights(scores, seen, of_lse)
        ds = p * (_dot(g, tl.trans(v), tl.zeros([QUERIES, KEYS], REAL), PRECISION) - of_delta)
        ds = tl.where(seen, ds, 0.0)
        if grad_query is not None:
            sums = _add(sums, ds, k, seen, hides, PRECISION, KEYS)
        if grad_prior is not None:
            dx, dy = _from_centres(numbers, j, grid_width, REAL)
            sum_x += tl.sum(ds * dx, 1)
            sum_y += tl.sum(ds * dy, 1)
            sum_xx += tl.sum(ds * dx * dx, 1)
            sum_yy += tl.sum(ds * dy * dy, 1)
    if grad_query is not None:
        _store(grad_query + b * to_b + h * to_h, first, queries, to_r, depth, sums * scale, QUERIES, DEPTH)
    if grad_prior is not None:
        at = grad_prior + 4 * (head * queries + i)
        tl.store(at, -2.0 * numbers[2] * sum_x / smooth, i < queries)
        tl.store(at + 1, -2.0 * numbers[3] * sum_y / smooth, i < queries)
        tl.store(at + 2, -sum_xx / smooth, i < queries)
        tl.store(at + 3, -sum_yy / smooth, i < queries)


@triton.jit
def _key_kernel(
    query, key, value, bias, prior, grad, lse, delta, grad_key, grad_value, grad_bias,
    heads, queries, keys, depth, width, causal, scale, grid_width, smooth,
    query_b, query_h, query_r, key_b, key_h, key_r, value_b, value_h, value_r, grad_b, grad_h, grad_r, bias_h, bias_r,
    to_key_b, to_key_h, to_key_r, to_value_b, to_value_h, to_value_r,
    REAL: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, or of extra rows (without causal and prior) and their bias."""
    blocks = tl.cdiv(keys, KEYS)
    head = tl.program_id(0).to(tl.int64) // blocks
    first = tl.program_id(0) % blocks * KEYS
    b = head // heads
    h = head - b * heads
    j = first + tl.arange(0, KEYS)
    k = _load(key + b * key_b + h * key_h, first, keys, key_r, depth, KEYS, DEPTH, TYPE)
    v = _load(value + b * value_b + h * value_h, first, keys, value_r, width, KEYS, WIDTH, TYPE)
    of_bias = _bias(bias, h, j, keys, bias_h, bias_r, REAL) if bias is not None else tl.zeros([KEYS], REAL)
    key_sums = tl.zeros([KEYS, DEPTH], REAL)
    value_sums = tl.zeros([KEYS, WIDTH], REAL)
    bias_sums = tl.zeros([KEYS], REAL)
    shift = keys - queries
    begin = tl.maximum(first - shift, 0) // QUERIES * QUERIES if causal else 0
    all_see = tl.minimum(first + KEYS, keys) - 1 - shift if causal else 0  # the first query that sees the whole block
    for at in range(begin, queries, QUERIES):
        i = at + tl.arange(0, QUERIES)
        q = _load(query + b * query_b + h * query_h, at, queries, query_r, depth, QUERIES, DEPTH, TYPE)
        g = _load(grad + b * grad_b + h * grad_h, at, queries, grad_r, width, QUERIES, WIDTH, TYPE)
        of_lse = tl.load(lse + head * queries + i, i < queries, other=-float("inf"))[None, :]
        scores = _dot(k, tl.trans(q), tl.zeros([KEYS, QUERIES], REAL), PRECISION) * scale + of_bias[:, None]
        if prior is not None:
            numbers = _numbers(prior + 4 * head * queries, i, queries, REAL)
            scores -= tl.trans(_fall(numbers, j, grid_width, smooth, REAL))
        seen = (j < keys)[:, None] & (i < queries)[None, :]
        if causal:
            seen = seen & (j[:, None] <= i[None, :] + shift)
        hides = at < all_see
        p = _weights(scores, seen, of_lse)
        if grad_value is not None:
            value_sums = _add(value_sums, p, g, seen, hides, PRECISION, QUERIES)
        if grad_key is not None or grad_bias is not None:
            of_delta = tl.load(delta + head * queries + i, i < queries, other=0.0)[None, :]
            ds = p * (_dot(v, tl.trans(g), tl.zeros([KEYS, QUERIES], REAL), PRECISION) - of_delta)
            ds = tl.where(seen, ds, 0.0)
            if grad_key is not None:
                key_sums = _add(key_sums, ds, q, seen, hides, PRECISION, QUERIES)
            bias_sums += tl.sum(ds, 1)
    if grad_key is not None:
        _store(grad_key + b * to_key_b + h * to_key_h, first, keys, to_key_r, depth, key_sums * scale, KEYS, DEPTH)
    if grad_value is not None:
        _store(grad_value + b * to_value_b + h * to_value_h, first, keys, to_value_r, width, value_sums, KEYS, WIDTH)
    if grad_bias is not None:
        tl.store(grad_bias + head * keys + j, bias_sums, j < keys)


@triton.jit
def _sum_kernel(parts, out, samples, size, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over samples, in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], REAL)
    for sample in range(samples):
        total += tl.load(parts + tl.cast(sample, tl.int64) * size + i, i < size, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), i < size)


# ---- launches --------------------------------------------------------------------------------------------------------


def _on(tensor: Tensor):
    """Makes the tensor's device current: Triton launches on the current stream of the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _tile(rows: int, dtype: torch.dtype, columns: int) -> int:
    """Rows of a tile: of those whose tiles stay in registers, the number that leaves the fewest idle."""
    most = 64 if columns <= 64 else 32 if columns <= 128 else 16
    if dtype == torch.float64:
        most = 16
    elif dtype == torch.float32:
        most = max(most // 2, 16)
    choices = [n for n in (64, 32, 16) if n <= most]
    return min(choices, key=lambda n: (triton.cdiv(max(rows, 1), n) * n, -n))


class _Sizes:
    """The numbers that every kernel of a call is given, and its tiles."""

    def __init__(self, sizes, dtype: torch.dtype, tf32: bool):
        self.batch, self.heads, self.queries, self.keys, self.extras, self.depth, self.width = sizes
        columns = [max(triton.next_power_of_2(n), 16) for n in (self.depth, self.width)]
        wide = max(columns)
        cut_off = _INTERPRETED and dtype == torch.bfloat16  # no product of bfloat16 there, and no rounding to it
        self.constants = dict(
            REAL=tl.float64 if dtype == torch.float64 else tl.float32,
            TYPE=tl.float32 if cut_off else _TYPES[dtype],
            PRECISION="tf32" if tf32 else "ieee",
            QUERIES=_tile(self.queries, dtype, wide),
            DEPTH=columns[0],
            WIDTH=columns[1],
            num_warps=4,
            **_OPTIONS,
        )
        self.of_keys = _tile(self.keys, dtype, wide)
        self.of_extras = _tile(self.extras, dtype, wide)

    def blocks(self, count: int, tile: int) -> tuple[int]:
        return (self.batch * self.heads * triton.cdiv(count, tile),)


@contextlib.contextmanager
def _stored(*tensors: Tensor | None):
    """What kernels write where these are wanted: the interpreter cuts a bfloat16 off instead of rounding it."""
    wide = [
        torch.empty_like(t, dtype=torch.float32) if _INTERPRETED and t is not None and t.dtype == torch.bfloat16 else t
        for t in tensors
    ]
    yield wide
    for t, w in zip(tensors, wide, strict=True):
        if w is not t:
            t.copy_(w)


def _rounded(tensors, dtype: torch.dtype):
    """Longer extra rows in the type of products, where the interpreter would cut them off."""
    return [t.to(dtype) if _INTERPRETED and dtype == torch.bfloat16 else t for t in tensors]


def _strides_of(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else bias.stride()


def forward(sizes, tensors, strides, bias, lse, prior, grid_width, smooth, causal, scale, tf32):
    """Writes and returns the last of `tensors` (query, key, value, extra_key, extra_value, out) and `lse`.

    Args:
        sizes: B, H, L, S, R, E, Ev.
        strides: for each tensor those of samples, heads and rows; 0 shares.
        bias: [H, R] or None.
        lse: dense [B, H, L], or None.
        prior: dense [B, H, L, 4] or None.
    """
    *given, out = tensors
    s = _Sizes(sizes, out.dtype, tf32)
    with _on(out), _stored(out) as (stored,):
        _forward_kernel[s.blocks(s.queries, s.constants["QUERIES"])](
            *_rounded(given, out.dtype), bias, prior, stored, lse, *sizes[1:], int(causal), scale, grid_width, smooth,
            *(n for one in strides for n in one), *_strides_of(bias),
            KEYS=s.of_keys, EXTRAS=s.of_extras, **s.constants,
        )  # fmt: skip
    return out, lse


def backward(
    sizes, tensors, strides, bias, lse, prior, grid_width, smooth, causal, scale, tf32, grad, grad_strides, grad_lse,
    delta, grads,
):  # fmt: skip
    """Writes those of `grads` (query, key, value, extra_key, extra_value, bias, prior) that are not None, all dense;
    extra rows and bias for every sample. Returns them all."""
    *given, out = tensors
    query, key, value, extra_key, extra_value = _rounded(given, out.dtype)
    of_query, of_key, of_value, of_extra_key, of_extra_value, of_out = strides
    s = _Sizes(sizes, out.dtype, tf32)
    numbers = int(causal), scale, grid_width, smooth
    with _on(out), _stored(*grads) as (to_query, to_key, to_value, to_extra_key, to_extra_value, to_bias, to_prior):
        _delta_kernel[s.blocks(s.queries, 16)](
            grad, out, grad_lse, delta, s.heads, s.queries, s.width, *grad_strides, *of_out,
            REAL=s.constants["REAL"], QUERIES=16, WIDTH=s.constants["WIDTH"], **_OPTIONS,
        )  # fmt: skip
        if to_query is not None or to_prior is not None:
            _query_kernel[s.blocks(s.queries, s.constants["QUERIES"])](
                query, key, value, extra_key, extra_value, bias, prior, grad, lse, delta, to_query, to_prior,
                *sizes[1:], *numbers, *(n for one in strides[:5] for n in one), *grad_strides, *_strides_of(bias),
                *_head_strides(s.heads, s.queries, s.depth), KEYS=s.of_keys, EXTRAS=s.of_extras, **s.constants,
            )  # fmt: skip
        kinds = (
            (key, value, None, prior, of_key, of_value, to_key, to_value, None, s.keys, s.of_keys, causal),
            (extra_key, extra_value, bias, None, of_extra_key, of_extra_value, to_extra_key, to_extra_value, to_bias,
             s.extras, s.of_extras, False),
        )  # fmt: skip
        for k, v, b, p, key_strides, value_strides, to_k, to_v, to_b, count, tile, hides in kinds:
            if count and not (to_k is None and to_v is None and to_b is None):
                _key_kernel[s.blocks(count, tile)](
                    query, k, v, b, p, grad, lse, delta, to_k, to_v, to_b,
                    s.heads, s.queries, count, s.depth, s.width, int(hides), *numbers[1:],
                    *of_query, *key_strides, *value_strides, *grad_strides, *_strides_of(b),
                    *_head_strides(s.heads, count, s.depth), *_head_strides(s.heads, count, s.width),
                    KEYS=tile, **s.constants,
                )  # fmt: skip
    return grads


def _head_strides(heads: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Of a dense tensor."""
    return heads * rows * columns, rows * columns, columns


def sum_samples(parts: Tensor, out: Tensor) -> Tensor:
    """out = parts summed over their first dimension, in its order."""
    with _on(parts), _stored(out) as (stored,):
        _sum_kernel[(triton.cdiv(out.numel(), 256),)](
            parts, stored, len(parts), math.prod(out.shape), BLOCK=256,
            REAL=tl.float64 if parts.dtype == torch.float64 else tl.float32, **_OPTIONS,
        )  # fmt: skip
    return out
