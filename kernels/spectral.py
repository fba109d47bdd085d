"""Triton path of core `spectral`: high-pass filters as thin matrix products.

Called by the op table (`pyface.ops.spectral`) with checked arguments; csrc/include/pyface/spectral.h describes planes
and strides. Three kernels: T = U_y^T x, M = fix(T U_x) U_x^T, and y from U_y M; x is read twice. Products are never
taken in TF32, whatever torch's flags say: what is left of x without its low frequencies is small. Written without a
GPU, so not tuned on one. Runs on CPU tensors when TRITON_INTERPRET=1 was set before the import.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_OPTIONS = {"num_warps": 4, "num_stages": 2}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
_ROWS, _COLUMNS = 32, 64  # of a tile
HIGH_PASS, MASK, MASK_BACKWARD = range(3)


def block_of(rank: int) -> int:
    """Columns of a table: a power of two, at least 16 as tl.dot wants it."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _plane(base, plane, inner, outer_stride, inner_stride):
    return base + plane // inner * outer_stride + plane % inner * inner_stride


@triton.jit
def _drop(keep, at, inside, REAL: tl.constexpr):
    return 1.0 - tl.load(keep + at, inside, other=1).to(REAL)


@triton.jit
def _gather_kernel(
    x, keep, sign, rows, sums, inner, height, columns, x_outer, x_inner, x_row, keep_outer, keep_inner, keep_row,
    SIGNED: tl.constexpr, RANK: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, COLUMNS)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    x = _plane(x, plane, inner, x_outer, x_inner)
    if SIGNED:
        keep = _plane(keep, plane, inner, keep_outer, keep_inner)
        sign += plane * height * columns
    total = tl.zeros((RANK, COLUMNS), REAL)
    for begin in range(0, height, ROWS):
        r = (begin + tl.arange(0, ROWS)).to(tl.int64)
        inside = (r[:, None] < height) & (c[None, :] < columns)
        v = tl.load(x + r[:, None] * x_row + c[None, :], inside, other=0).to(REAL)
        if SIGNED:
            s = tl.load(sign + r[:, None] * columns + c[None, :], inside, other=0).to(REAL)
            v = v * (_drop(keep, r[:, None] * keep_row + c[None, :], inside, REAL) * s)
        u = tl.load(rows + r[None, :] * RANK + k[:, None], r[None, :] < height, other=0)
        total = tl.dot(u, v, total, input_precision="ieee", out_dtype=REAL)
    at = sums + plane * RANK * columns + k[:, None] * columns + c[None, :]
    tl.store(at, total, c[None, :] < columns)


@triton.jit
def _transform_kernel(
    sums, spread, across, turn_rows, turn_columns, width, channels,
    EDGE: tl.constexpr, RANK: tl.constexpr, ACROSS: tl.constexpr, REAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = width * channels
    plane = (tl.program_id(0) // channels).to(tl.int64)
    k = tl.arange(0, RANK)
    j = tl.arange(0, ACROSS)
    base = plane * RANK * columns + tl.program_id(0) % channels
    small = tl.zeros((RANK, ACROSS), REAL)
    for begin in range(0, width, COLUMNS):
        w = begin + tl.arange(0, COLUMNS)
        t = tl.load(sums + base + k[:, None] * columns + w[None, :] * channels, w[None, :] < width, other=0)
        u = tl.load(across + w[:, None] * ACROSS + j[None, :], w[:, None] < width, other=0)
        small = tl.dot(t, u, small, input_precision="ieee", out_dtype=REAL)
    if EDGE:  # the last harmonic of the block -d..d-1 has no mirror image: C - J C J^T
        left = tl.load(turn_rows + k[:, None] * RANK + k[None, :])
        right = tl.load(turn_columns + j[:, None] * ACROSS + j[None, :])
        turned = tl.dot(left, small, input_precision="ieee", out_dtype=REAL)
        small -= tl.dot(turned, right, input_precision="ieee", out_dtype=REAL)
    for begin in range(0, width, COLUMNS):
        w = begin + tl.arange(0, COLUMNS)
        u = tl.load(across + w[None, :] * ACROSS + j[:, None], w[None, :] < width, other=0)
        m = tl.dot(small, u, input_precision="ieee", out_dtype=REAL)
        tl.store(spread + base + k[:, None] * columns + w[None, :] * channels, m, w[None, :] < width)


@triton.jit
def _spread_kernel(
    x, y, keep, sign, rows, spread, inner, height, columns,
    x_outer, x_inner, x_row, keep_outer, keep_inner, keep_row,
    TASK: tl.constexpr, WITH_SIGN: tl.constexpr, RANK: tl.constexpr, REAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, COLUMNS)
    down = tl.cdiv(height, ROWS)
    tile = tl.program_id(0)
    plane = (tile // (blocks * down)).to(tl.int64)
    c = tile % blocks * COLUMNS + tl.arange(0, COLUMNS)
    r = (tile // blocks % down * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, RANK)
    inside = (r[:, None] < height) & (c[None, :] < columns)
    u = tl.load(rows + r[:, None] * RANK + k[None, :], r[:, None] < height, other=0)
    m = tl.load(spread + plane * RANK * columns + k[:, None] * columns + c[None, :], c[None, :] < columns, other=0)
    low = tl.dot(u, m, input_precision="ieee", out_dtype=REAL)
    v = tl.load(_plane(x, plane, inner, x_outer, x_inner) + r[:, None] * x_row + c[None, :], inside, other=0).to(REAL)
    dense = plane * height * columns + r[:, None] * columns + c[None, :]
    if TASK == 0:
        out = v - low
    else:
        keep = _plane(keep, plane, inner, keep_outer, keep_inner)
        drop = _drop(keep, r[:, None] * keep_row + c[None, :], inside, REAL)
        if TASK == 1:
            high = v - low
            out = tl.where(drop == 0, v, v - drop * tl.abs(high))
            if WITH_SIGN:
                tl.store(sign + dense, (high > 0).to(tl.int8) - (high < 0).to(tl.int8), inside)
        else:
            m_sign = drop * tl.load(sign + dense, inside, other=0).to(REAL)
            out = (v - m_sign * v) + low
    tl.store(y + dense, out.to(y.dtype.element_ty), inside)


def run(
    task: int, x: Tensor, y: Tensor, keep: Tensor | None, sign: Tensor | None, rows: Tensor, columns: Tensor,
    turns: tuple[Tensor, Tensor] | None, sizes: tuple[int, ...], x_strides: tuple[int, ...],
    keep_strides: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Fills and returns y (and sign) of all planes; y may be x.

    rows, columns: [H, block_of(rank)] and [W, block_of(rank)]; turns: J and J^T of the last harmonics, for an edge.
    """
    outer, inner, height, width, channels = sizes
    planes, across, rank = outer * inner, width * channels, rows.shape[1]
    real = tl.float64 if rows.dtype == torch.float64 else tl.float32
    sums, spread = rows.new_empty(2, planes, rank, across)
    keep = keep.view(torch.uint8) if keep is not None and keep.dtype == torch.bool else keep
    # the interpreter does not round what it stores as bfloat16
    out = torch.empty_like(y, dtype=torch.float32) if _INTERPRETED and y.dtype == torch.bfloat16 else y
    common = dict(RANK=rank, REAL=real, **_OPTIONS)
    strides = (inner, height, across, *x_strides, *keep_strides)
    blocks = triton.cdiv(across, _COLUMNS)
    _gather_kernel[(planes * blocks,)](
        x, keep, sign, rows, sums, *strides, SIGNED=task == MASK_BACKWARD, ROWS=_ROWS, COLUMNS=_COLUMNS, **common,
    )  # fmt: skip
    _transform_kernel[(planes * channels,)](
        sums, spread, columns, *(turns or (None, None)), width, channels,
        EDGE=turns is not None, ACROSS=columns.shape[1], COLUMNS=32, **common,
    )  # fmt: skip
    _spread_kernel[(planes * blocks * triton.cdiv(height, _ROWS),)](
        x, out, keep, sign, rows, spread, *strides, TASK=task, WITH_SIGN=sign is not None, ROWS=_ROWS, COLUMNS=_COLUMNS,
        **common,
    )  # fmt: skip
    return (y if out is y else y.copy_(out)), sign
