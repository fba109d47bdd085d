"""Triton path of core `sharpness`: norms, ascent, restoring, rules and update over lists of tensors.

Called by the op table (`pyface.ops.sharpness`) with checked arguments: lists of weights, saved weights, xs, ys and
momenta, or None for what a pass has no use for; tensors with one number have one size and one order. A pass is a launch
for each combination of types and alignment, and sums take two more. Tensors are cut into chunks of a fixed size that
never cross a tensor; a program takes one, and finds it by a table of addresses on the device.

Sums are taken in float64, over a chunk, then over the chunks of a tensor and over the tensors, in a fixed order. What
they decide is decided on the device: nothing waits. A float64 holds the square of every float, so such a sum is finite
if and only if its data are. Written without a GPU, so not tuned on one. Runs on CPU tensors when TRITON_INTERPRET=1 was
set before the import.
"""

import collections
import contextlib
import os
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(32768)  # elements
_BLOCK = 2048  # of them at a time
_OPTIONS = {"num_warps": 8}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

# The table: the bits of up to _SETTINGS float64 numbers, then for each tensor five addresses, its size, its first chunk
# among all and the bits of its rho, then for each chunk its tensor, first element and number among all.
_SETTINGS = tl.constexpr(8)
_COLUMNS = tl.constexpr(8)
_NUMBERS = tl.constexpr(5)  # of a chunk's sums: a, b, k, and two that are finite where x, y are
WEIGHT, SAVED, X, Y, MOMENTUM, SIZE, FIRST, RHO = (tl.constexpr(i) for i in range(8))


@triton.jit
def _number(table, i):
    return tl.load(table + i).to(tl.float64, bitcast=True)


@triton.jit
def _chunk(table, chunks):
    """A program's chunk: its tensor, that one's row of the table, first element, elements, and number among all."""
    at = table + chunks + 3 * tl.program_id(0).to(tl.int64)
    p = tl.load(at)
    row = table + _SETTINGS + _COLUMNS * p
    first = tl.load(at + 1)
    count = tl.minimum(tl.load(row + SIZE) - first, CHUNK).to(tl.int32)
    return p, row, first, count, tl.load(at + 2)


@triton.jit
def _memory(row, COLUMN: tl.constexpr, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE)) + first
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, at, count, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + at)
    return tl.load(pointer + at, at < count, other=0)


@triton.jit
def _store(pointer, at, value, count, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + at, value)
    else:
        tl.store(pointer + at, value, at < count)


@triton.jit
def _narrow(value, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rounds to nearest even; the interpreter would cut a bfloat16 off."""
    if INTERPRETED and TYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, (bits >> 16) | 0x40)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(TYPE)


# ---- sums -----------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_block(
    a, b, k, bad_x, bad_y, w, x, y, eta, at, count,
    DOTS: tl.constexpr, ADAPTIVE: tl.constexpr, DOUBLES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    yv = _load(y, at, count, WHOLE).to(tl.float64)
    if DOUBLES:
        bad_y += yv - yv
    if ADAPTIVE:
        stretch = tl.abs(_load(w, at, count, WHOLE).to(tl.float64)) + eta
        if DOUBLES:
            bad_y += stretch - stretch
        yv *= stretch
    b += yv * yv
    if DOTS:
        xv = _load(x, at, count, WHOLE).to(tl.float64)
        if DOUBLES:
            bad_x += xv - xv
        a += xv * xv
        k += xv * yv
    return a, b, k, bad_x, bad_y


@triton.jit(do_not_specialize=("chunks",))
def _sums_kernel(
    table, chunks, partial, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, DOTS: tl.constexpr,
    ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, row, first, count, number = _chunk(table, chunks)
    DOUBLES: tl.constexpr = G == tl.float64
    y = _memory(row, Y, first, G, ALIGNED)
    x = _memory(row, X, first, G, ALIGNED) if DOTS else y
    w = _memory(row, WEIGHT, first, W, ALIGNED) if ADAPTIVE else y
    eta = _number(table, 0)
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    k = tl.zeros((BLOCK,), tl.float64)
    bad_x = tl.zeros((BLOCK,), tl.float64)
    bad_y = tl.zeros((BLOCK,), tl.float64)
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        a, b, k, bad_x, bad_y = _sum_block(
            a, b, k, bad_x, bad_y, w, x, y, eta, begin + lanes, count, DOTS, ADAPTIVE, DOUBLES, True
        )
    a, b, k, bad_x, bad_y = _sum_block(
        a, b, k, bad_x, bad_y, w, x, y, eta, whole + lanes, count, DOTS, ADAPTIVE, DOUBLES, False
    )
    out = partial + number * _NUMBERS
    sum_a = tl.sum(a)
    sum_b = tl.sum(b)
    tl.store(out, sum_a)
    tl.store(out + 1, sum_b)
    tl.store(out + 2, tl.sum(k))
    tl.store(out + 3, tl.sum(bad_x) if DOUBLES else sum_a)
    tl.store(out + 4, tl.sum(bad_y) if DOUBLES else sum_b)


@triton.jit
def _tensor_kernel(table, partial, sums, bad, BLOCK: tl.constexpr):
    """Adds the chunks of one tensor."""
    p = tl.program_id(0).to(tl.int64)
    row = table + _SETTINGS + _COLUMNS * p
    chunks = tl.cdiv(tl.load(row + SIZE), CHUNK).to(tl.int32)
    base = partial + tl.load(row + FIRST) * _NUMBERS
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    k = tl.zeros((BLOCK,), tl.float64)
    bad_x = tl.zeros((BLOCK,), tl.float64)
    bad_y = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, chunks, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < chunks
        numbers = base + at * _NUMBERS
        a += tl.load(numbers, inside, other=0)
        b += tl.load(numbers + 1, inside, other=0)
        k += tl.load(numbers + 2, inside, other=0)
        of_x = tl.load(numbers + 3, inside, other=0)
        of_y = tl.load(numbers + 4, inside, other=0)
        bad_x += of_x - of_x
        bad_y += of_y - of_y
    tl.store(sums + 3 * p, tl.sum(a))
    tl.store(sums + 3 * p + 1, tl.sum(b))
    tl.store(sums + 3 * p + 2, tl.sum(k))
    tl.store(bad + 2 * p, (tl.sum(bad_x) != 0).to(tl.float32))
    tl.store(bad + 2 * p + 1, (tl.sum(bad_y) != 0).to(tl.float32))


@triton.jit(do_not_specialize=("tensors",))
def _total_kernel(sums, bad, nonfinite, tensors, BLOCK: tl.constexpr):
    """Adds the tensors."""
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    k = tl.zeros((BLOCK,), tl.float64)
    bad_x = tl.zeros((BLOCK,), tl.float32)
    bad_y = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, tensors, BLOCK):
        p = begin + tl.arange(0, BLOCK)
        inside = p < tensors
        a += tl.load(sums + 3 * p, inside, other=0)
        b += tl.load(sums + 3 * p + 1, inside, other=0)
        k += tl.load(sums + 3 * p + 2, inside, other=0)
        bad_x = tl.maximum(bad_x, tl.load(bad + 2 * p, inside, other=0))
        bad_y = tl.maximum(bad_y, tl.load(bad + 2 * p + 1, inside, other=0))
    tl.store(sums + 3 * tensors, tl.sum(a))
    tl.store(sums + 3 * tensors + 1, tl.sum(b))
    tl.store(sums + 3 * tensors + 2, tl.sum(k))
    tl.store(nonfinite, tl.max(bad_x))
    tl.store(nonfinite + 1, tl.max(bad_y))


# ---- ascent and restoring -------------------------------------------------------------------------------------------


@triton.jit
def _move_block(
    w, saved, y, factor, eta, at, count,
    W: tl.constexpr, REAL: tl.constexpr, ADAPTIVE: tl.constexpr, INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    old = _load(w, at, count, WHOLE)
    _store(saved, at, old, count, WHOLE)
    if factor != 0:
        e = _load(y, at, count, WHOLE).to(REAL) * factor
        if ADAPTIVE:
            stretch = tl.abs(old.to(REAL)) + eta
            e *= stretch * stretch
        _store(w, at, _narrow(old.to(REAL) + e, W, INTERPRETED), count, WHOLE)


@triton.jit(do_not_specialize=("chunks", "tensors"))
def _perturb_kernel(
    table, chunks, sums, nonfinite, tensors, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr,
    ADAPTIVE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p, row, first, count, _ = _chunk(table, chunks)
    REAL: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    w = _memory(row, WEIGHT, first, W, ALIGNED)
    saved = _memory(row, SAVED, first, W, ALIGNED)
    y = _memory(row, Y, first, G, ALIGNED)
    b = tl.load(sums + 3 * tensors + 1)
    moves = (tl.load(nonfinite + 1) == 0) & (b > 0)
    factor = tl.where(moves, _number(row, RHO) / (tl.sqrt(b) + _number(table, 0)) - _number(table, 1), 0.0).to(REAL)
    eta = _number(table, 2).to(REAL)
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        _move_block(w, saved, y, factor, eta, begin + lanes, count, W, REAL, ADAPTIVE, INTERPRETED, True)
    _move_block(w, saved, y, factor, eta, whole + lanes, count, W, REAL, ADAPTIVE, INTERPRETED, False)


@triton.jit(do_not_specialize=("chunks",))
def _restore_kernel(table, chunks, W: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    p, row, first, count, _ = _chunk(table, chunks)
    w = _memory(row, WEIGHT, first, W, ALIGNED)
    saved = _memory(row, SAVED, first, W, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        tl.store(w + begin + lanes, tl.load(saved + begin + lanes))
    _store(w, whole + lanes, _load(saved, whole + lanes, count, False), count, False)


# ---- rules and update -----------------------------------------------------------------------------------------------


@triton.jit
def _pair(table, sums, p, RULE: tl.constexpr):
    """u and v by row p of the sums; the rules have the numbers of pyface/sharpness.h."""
    a = tl.load(sums + 3 * p)
    b = tl.load(sums + 3 * p + 1)
    k = tl.load(sums + 3 * p + 2)
    p0 = _number(table, 0)
    one = p0 * 0 + 1
    zero = p0 * 0
    if RULE == 0:
        return one, zero
    if RULE == 1:
        return p0, 1 - p0
    if RULE == 6:
        return a, b
    undefined = (a == 0) | (b == 0)
    a = tl.where(undefined, 1.0, a)
    b = tl.where(undefined, 1.0, b)
    if RULE == 2:
        u = 1 + p0 * k / a
        v = -p0
    elif RULE == 3:
        u = p0
        v = 1 - p0 * k / b
    elif RULE == 5:
        u = one
        v = tl.where(k < 0, -k / b, zero)
    else:
        c = k / (tl.sqrt(a) * tl.sqrt(b))
        z = a + 2 * k + b
        takes_x = c >= _number(table, 1)
        takes_y = (c <= p0) | (z <= 1e-14 * (a + b))
        s = (a + k) / tl.where(takes_y, 1.0, z)
        u = tl.where(takes_x, one, tl.where(takes_y, zero, s))
        v = tl.where(takes_x, zero, tl.where(takes_y, one, s))
    return tl.where(undefined, one, u), tl.where(undefined, zero, v)


@triton.jit
def _combine_block(
    x, y, u, v, copies, at, count,
    G: tl.constexpr, REAL: tl.constexpr, INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    yv = _load(y, at, count, WHOLE)
    if copies:
        _store(x, at, yv, count, WHOLE)
    else:
        g = _load(x, at, count, WHOLE).to(REAL) * u + yv.to(REAL) * v
        _store(x, at, _narrow(g, G, INTERPRETED), count, WHOLE)


@triton.jit(do_not_specialize=("chunks", "tensors"))
def _combine_kernel(
    table, chunks, sums, nonfinite, tensors, G: tl.constexpr, ALIGNED: tl.constexpr, RULE: tl.constexpr,
    PER_TENSOR: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p, row, first, count, _ = _chunk(table, chunks)
    REAL: tl.constexpr = tl.float64 if G == tl.float64 else tl.float32
    u, v = _pair(table, sums, p if PER_TENSOR else tensors, RULE)
    finite = (tl.load(nonfinite) == 0) & (tl.load(nonfinite + 1) == 0)
    changes = finite & ((u != 1) | (v != 0))
    copies = (u == 0) & (v == 1)
    u = u.to(REAL)
    v = v.to(REAL)
    if changes:
        x = _memory(row, X, first, G, ALIGNED)
        y = _memory(row, Y, first, G, ALIGNED)
        lanes = tl.arange(0, BLOCK)
        whole = count // BLOCK * BLOCK
        for begin in range(0, whole, BLOCK):
            _combine_block(x, y, u, v, copies, begin + lanes, count, G, REAL, INTERPRETED, True)
        _combine_block(x, y, u, v, copies, whole + lanes, count, G, REAL, INTERPRETED, False)


@triton.jit
def _step_block(
    w, saved, x, y, m, u, v, lr, mu, fresh, decay, skip, takes_x, takes_y, at, count,
    W: tl.constexpr, REAL: tl.constexpr, MOMENTUM: tl.constexpr, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr,
    INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    kept = _load(saved, at, count, WHOLE)
    if skip:
        _store(w, at, kept, count, WHOLE)
    else:
        old = kept.to(REAL)
        g = old * decay
        if takes_x:  # a gradient with the coefficient 0 is not read
            g += _load(x, at, count, WHOLE).to(REAL) * u
        if takes_y:
            g += _load(y, at, count, WHOLE).to(REAL) * v
        if MOMENTUM:
            if FIRST_STEP:
                new = g
            else:
                new = _load(m, at, count, WHOLE).to(REAL) * mu + g * fresh
            _store(m, at, _narrow(new, W, INTERPRETED), count, WHOLE)
            if NESTEROV:
                g += new * mu
            else:
                g = new
        _store(w, at, _narrow(old - g * lr, W, INTERPRETED), count, WHOLE)


@triton.jit(do_not_specialize=("chunks", "tensors"))
def _step_kernel(
    table, chunks, sums, nonfinite, tensors, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr,
    RULE: tl.constexpr, PER_TENSOR: tl.constexpr, WITH_MOMENTUM: tl.constexpr, FIRST_STEP: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p, row, first, count, _ = _chunk(table, chunks)
    REAL: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    u, v = _pair(table, sums, p if PER_TENSOR else tensors, RULE)
    takes_x = u != 0
    takes_y = v != 0
    if MAXIMIZE:
        u = -u
        v = -v
    u = u.to(REAL)
    v = v.to(REAL)
    skip = (tl.load(nonfinite) != 0) | (tl.load(nonfinite + 1) != 0)
    lr = _number(table, 2).to(REAL)
    mu = _number(table, 3).to(REAL)
    fresh = (1 - _number(table, 4)).to(REAL)
    decay = _number(table, 5).to(REAL)
    w = _memory(row, WEIGHT, first, W, ALIGNED)
    saved = _memory(row, SAVED, first, W, ALIGNED)
    x = _memory(row, X, first, G, ALIGNED)
    y = _memory(row, Y, first, G, ALIGNED)
    m = _memory(row, MOMENTUM, first, W, ALIGNED) if WITH_MOMENTUM else w
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        _step_block(
            w, saved, x, y, m, u, v, lr, mu, fresh, decay, skip, takes_x, takes_y, begin + lanes, count,
            W, REAL, WITH_MOMENTUM, FIRST_STEP, NESTEROV, INTERPRETED, True,
        )  # fmt: skip
    _step_block(
        w, saved, x, y, m, u, v, lr, mu, fresh, decay, skip, takes_x, takes_y, whole + lanes, count,
        W, REAL, WITH_MOMENTUM, FIRST_STEP, NESTEROV, INTERPRETED, False,
    )  # fmt: skip


# ---- tables ---------------------------------------------------------------------------------------------------------

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Table:
    """The table of a call, on its device.

    Attributes:
        data: Tensor[...] int64.
        groups: of each launch (weight type, gradient type, whether all begins at 16 bytes, place of its first chunk in
            the table, chunks).
        chunks: of all tensors.
        tensors: their number.
    """

    def __init__(self, lists, settings: tuple[float, ...], rho):
        leading = next(filter(None, lists))
        gradients = lists[3] or lists[2] or leading
        self.tensors, self.chunks = len(leading), 0
        numbers = [_bits(s) for s in settings] + [0] * (_SETTINGS.value - len(settings))
        groups, starts, counts = collections.defaultdict(list), [], []
        for p, like in enumerate(leading):
            addresses = [0 if tensors is None else tensors[p].data_ptr() for tensors in lists]
            numbers += (*addresses, like.numel(), self.chunks, _bits(rho[p]) if rho else 0)
            starts.append(self.chunks)
            counts.append(-(-like.numel() // CHUNK.value))
            self.chunks += counts[-1]
            if counts[-1]:
                aligned = not any(address % 16 for address in addresses)
                groups[like.dtype, gradients[p].dtype, aligned].append(p)
        starts, counts = torch.tensor(starts), torch.tensor(counts)
        self.groups, pieces, place = [], [torch.tensor(numbers)], len(numbers)
        for (weight, gradient, aligned), own in groups.items():
            own = torch.tensor(own)
            tensor = own.repeat_interleave(counts[own])
            before = (counts[own].cumsum(0) - counts[own]).repeat_interleave(counts[own])
            of_tensor = torch.arange(len(tensor)) - before
            pieces.append(torch.stack([tensor, of_tensor * CHUNK.value, starts[tensor] + of_tensor], 1).flatten())
            self.groups.append((_TYPES[weight], _TYPES[gradient], aligned, place, len(tensor)))
            place += len(pieces[-1])
        self.data = _upload(torch.cat(pieces), leading[0].device)


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


_tables: collections.OrderedDict[tuple, _Table] = collections.OrderedDict()
_of_graphs: list = []  # what captured graphs will read, as long as the process lives
_pinned: Tensor | None = None  # memory for the tables that are made under capture, where none can be allocated
_PINNED = 1 << 19  # numbers


def _table(lists, settings=(), rho=None) -> _Table:
    """The table of a call: an earlier one if it would be the same, on the same stream."""
    leading = next(filter(None, lists))
    stream = torch.cuda.current_stream(leading[0].device).cuda_stream if leading[0].is_cuda else 0
    key = (
        leading[0].device, stream, settings, tuple(rho or ()), tuple(t.numel() for t in leading),
        *(None if ts is None else tuple((t.data_ptr(), t.dtype) for t in ts) for ts in lists),
    )  # fmt: skip
    captured = leading[0].is_cuda and torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None:
        table = _Table(lists, settings, rho)
        if not captured:  # under capture nothing is copied until the replay
            _tables[key] = table
            if len(_tables) > 64:
                _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    if captured:
        _of_graphs.append(table)
    return table


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Copies without waiting."""
    global _pinned
    if device.type != "cuda":
        return numbers
    if not torch.cuda.is_current_stream_capturing():
        if _pinned is None:
            _pinned = torch.empty(_PINNED, dtype=torch.int64, pin_memory=True)
        return numbers.pin_memory().to(device, non_blocking=True)
    if _pinned is None or len(numbers) > len(_pinned):
        raise RuntimeError(
            "pyface: no memory is left for the address tables of captured graphs; take the path 'cuda', which needs "
            "none, or run the passes once on the same tensors before they are captured"
        )
    own, _pinned = _pinned[: len(numbers)], _pinned[len(numbers) :]
    _of_graphs.append(own)
    return own.copy_(numbers).to(device, non_blocking=True)


def _on(lists):
    """Makes the tensors' device current: Triton launches on the current stream of the current device."""
    device = next(filter(None, lists))[0].device
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---- passes: each returns what it wrote -----------------------------------------------------------------------------


def sums(lists, values: Tensor, nonfinite: Tensor, adaptive: bool, eta: float):
    """Fills values Tensor[T + 1, 3] float64 and nonfinite Tensor[2] float32."""
    with _on(lists):
        table = _table(lists, (eta,))
        partial = values.new_empty(table.chunks, _NUMBERS.value)
        bad = nonfinite.new_empty(table.tensors, 2)
        for weight, gradient, aligned, place, chunks in table.groups:
            weight = weight if adaptive else gradient  # of no interest otherwise
            _sums_kernel[(chunks,)](
                table.data, place, partial, W=weight, G=gradient, ALIGNED=aligned, DOTS=lists[2] is not None,
                ADAPTIVE=adaptive, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
        _tensor_kernel[(table.tensors,)](table.data, partial, values, bad, BLOCK=128, num_warps=4)
        _total_kernel[(1,)](values, bad, nonfinite, table.tensors, BLOCK=256, num_warps=4)
    return values, nonfinite


def perturb(lists, sums, nonfinite, rho, eps: float, shrink: float, adaptive: bool, eta: float):
    with _on(lists):
        table = _table(lists, (eps, shrink, eta), rho)
        for weight, gradient, aligned, place, chunks in table.groups:
            _perturb_kernel[(chunks,)](
                table.data, place, sums, nonfinite, table.tensors, W=weight, G=gradient, ALIGNED=aligned,
                ADAPTIVE=adaptive, INTERPRETED=_INTERPRETED, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
    return lists[0], lists[1]


def restore(lists):
    with _on(lists):
        table = _table(lists)
        for weight, _, aligned, place, chunks in table.groups:
            _restore_kernel[(chunks,)](table.data, place, W=weight, ALIGNED=aligned, BLOCK=_BLOCK, **_OPTIONS)
    return (lists[0],)


def combine(lists, sums, nonfinite, rule: int, p0: float, p1: float, per_tensor: bool):
    with _on(lists):
        table = _table(lists, (p0, p1))
        for _, gradient, aligned, place, chunks in table.groups:
            _combine_kernel[(chunks,)](
                table.data, place, sums, nonfinite, table.tensors, G=gradient, ALIGNED=aligned, RULE=rule,
                PER_TENSOR=per_tensor, INTERPRETED=_INTERPRETED, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
    return (lists[2],)


def step(
    lists, sums, nonfinite, rule: int, p0: float, p1: float, per_tensor: bool, lr: float, momentum: float,
    dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool,
):  # fmt: skip
    with _on(lists):
        table = _table(lists, (p0, p1, lr, momentum, dampening, weight_decay))
        for weight, gradient, aligned, place, chunks in table.groups:
            _step_kernel[(chunks,)](
                table.data, place, sums, nonfinite, table.tensors, W=weight, G=gradient, ALIGNED=aligned, RULE=rule,
                PER_TENSOR=per_tensor, WITH_MOMENTUM=lists[4] is not None, FIRST_STEP=first, NESTEROV=nesterov,
                MAXIMIZE=maximize, INTERPRETED=_INTERPRETED, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
    return lists[0], lists[4] or []
