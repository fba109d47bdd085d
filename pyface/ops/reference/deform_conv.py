"""Deformable convolution, written to be read: gather, interpolate, multiply. Same signature as `pyface.ops`.

Shapes: input [N, C, H, W], weight [O, C/g, kh, kw], K = kh kw taps, G offset groups, P = OH OW output pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class Points(NamedTuple):
    """Where the taps of a call read: for each of four corners (top left, top right, bottom left, bottom right) a flat
    pixel index and whether it is inside the image, and the fractions of a pixel below and right of the first one."""

    index: list[Tensor]  # 4 x [N, G, K, P], clamped into the image
    inside: list[Tensor]
    fy: Tensor  # [N, G, K, P]
    fx: Tensor


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of the result."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def sample_points(offset: Tensor, size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Points:
    """Points of offset [N, 2 G K, OH, OW] (y before x) in an image of `size`. A position that is not inside (-1, H) x
    (-1, W), be it NaN or infinite, reads nothing: all its corners are outside and it has no gradient."""
    (height, width), (kh, kw), (oh, ow) = size, kernel, offset.shape[2:]
    n, groups = offset.shape[0], offset.shape[1] // (2 * kh * kw)
    like = {"dtype": offset.dtype, "device": offset.device}
    tap_y = torch.arange(kh, **like) * dilation[0] - padding[0]
    tap_x = torch.arange(kw, **like) * dilation[1] - padding[1]
    y = tap_y.view(kh, 1, 1, 1) + (torch.arange(oh, **like) * stride[0]).view(oh, 1)
    x = tap_x.view(kw, 1, 1) + torch.arange(ow, **like) * stride[1]
    offset = offset.reshape(n, groups, kh, kw, 2, oh, ow)
    y, x = y + offset[..., 0, :, :], x + offset[..., 1, :, :]
    # -1 belongs to the derivative from the right, though nothing is read there with weight
    reads = (y >= -1) & (y < height) & (x >= -1) & (x < width)
    y, x, reads = (t.reshape(n, groups, kh * kw, oh * ow) for t in (y, x, reads))
    y, x = torch.where(reads, y, 0.0), torch.where(reads, x, 0.0)
    y0, x0 = y.detach().floor(), x.detach().floor()
    index, inside = [], []
    for row in (y0.long(), y0.long() + 1):
        for column in (x0.long(), x0.long() + 1):
            index.append(row.clamp(0, height - 1) * width + column.clamp(0, width - 1))
            inside.append(reads & (row >= 0) & (row < height) & (column >= 0) & (column < width))
    return Points(index, inside, y - y0, x - x0)


def bilinear(points: Points) -> list[Tensor]:
    """The weights of the corners, 4 x [N, G, K, P]."""
    fy, fx = points.fy, points.fx
    return [(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx]


def bilinear_dy(points: Points) -> list[Tensor]:
    """Their derivatives in y, from below at a whole number."""
    return [points.fx - 1, -points.fx, 1 - points.fx, points.fx]


def bilinear_dx(points: Points) -> list[Tensor]:
    """Their derivatives in x, from the right at a whole number."""
    return [points.fy - 1, 1 - points.fy, -points.fy, points.fy]


def corners(image: Tensor, points: Points) -> list[Tensor]:
    """Values of [N, C, H, W] at the four corners, 4 x [N, G, C/G, K, P]; 0 outside the image."""
    n, groups, taps, pixels = points.fy.shape
    flat = image.reshape(n, groups, image.shape[1] // groups, -1)
    found = []
    for index, inside in zip(points.index, points.inside, strict=True):
        index = index.reshape(n, groups, 1, -1).expand(-1, -1, flat.shape[2], -1)
        values = flat.gather(3, index).reshape(n, groups, -1, taps, pixels)
        found.append(torch.where(inside.unsqueeze(2), values, 0.0))
    return found


def scatter(values: list[Tensor], points: Points, like: Tensor) -> Tensor:
    """The transpose of `corners`: an image in which every corner's values are added up."""
    n, groups = points.fy.shape[:2]
    image = values[0].new_zeros(n, groups, like.shape[1] // groups, like.shape[2] * like.shape[3])
    for value, index, inside in zip(values, points.index, points.inside, strict=True):
        value = torch.where(inside.unsqueeze(2), value, 0.0).flatten(3)
        image = image.scatter_add(3, index.reshape(n, groups, 1, -1).expand_as(value), value)
    return image.reshape(like.shape)


def blend(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Sum over the corners of values [N, G, C/G, K, P] times weights [N, G, K, P]."""
    return sum(v * w.unsqueeze(2) for v, w in zip(values, weights, strict=True))


def multiply(weight: Tensor, columns: Tensor) -> Tensor:
    """Weight [O, C/g, kh, kw] times columns [N, G, C/G, K, P]: [N, O, P]."""
    n, pixels = columns.shape[0], columns.shape[-1]
    rows = weight[0].numel()  # C/g K
    columns = columns.reshape(n, math.prod(columns.shape[1:4]) // rows, rows, pixels)
    return (weight.reshape(columns.shape[1], -1, rows) @ columns).reshape(n, -1, pixels)


def multiply_back(weight: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """Its transpose: the gradient of columns shaped `like` from that of the result, [N, O, P]."""
    n, rows = like.shape[0], weight[0].numel()
    groups = math.prod(like.shape[1:4]) // rows
    weight = weight.reshape(groups, -1, rows)
    return (weight.mT @ grad.reshape(n, groups, -1, grad.shape[-1])).reshape(like.shape)


def multiply_weight(grad: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight from that of the result, [N, O, P]."""
    n, rows = columns.shape[0], weight[0].numel()
    groups = math.prod(columns.shape[1:4]) // rows
    columns = columns.reshape(n, groups, rows, -1)
    return (grad.reshape(n, groups, -1, grad.shape[-1]) @ columns.mT).sum(0).reshape(weight.shape)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution (arXiv:1703.06211; with a mask arXiv:1811.11168); see `pyface.ops.deform_conv2d`."""
    wide = torch.promote_types(input.dtype, torch.float32)
    points = sample_points(offset.to(wide), input.shape[2:], weight.shape[2:], stride, padding, dilation)
    columns = blend(corners(input.to(wide), points), bilinear(points))
    if mask is not None:
        columns = columns * _masks(mask.to(wide), points)
    out = multiply(weight.to(wide), columns)
    if bias is not None:
        out = out + bias.to(wide).unsqueeze(1)
    return out.reshape(len(input), -1, *offset.shape[2:]).to(input.dtype)


def _masks(mask: Tensor, points: Points) -> Tensor:
    """[N, G K, OH, OW] as a factor of columns, [N, G, 1, K, P]."""
    return mask.reshape(points.fy.shape).unsqueeze(2)


def _offsets(offset: Tensor, points: Points) -> tuple[Tensor, Tensor]:
    """The y and x parts of an offset-shaped tensor as factors of columns, [N, G, 1, K, P]."""
    n, groups, taps, pixels = points.fy.shape
    offset = offset.reshape(n, groups, 1, taps, 2, pixels)
    return offset[..., 0, :], offset[..., 1, :]


def backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of input, offset, weight and mask; that of the bias is a sum over `grad`."""
    points = sample_points(offset, input.shape[2:], weight.shape[2:], stride, padding, dilation)
    image = corners(input, points)
    weights = bilinear(points)
    sampled = blend(image, weights)
    grad = grad.flatten(2)
    u = multiply_back(weight, grad, sampled)
    m = 1.0 if mask is None else _masks(mask, points)
    along = [(m * u * blend(image, slope(points))).sum(2) for slope in (bilinear_dy, bilinear_dx)]
    return (
        scatter([m * u * w.unsqueeze(2) for w in weights], points, input),
        torch.stack(along, dim=3).reshape(offset.shape),
        multiply_weight(grad, m * sampled, weight),
        None if mask is None else (u * sampled).sum(2).reshape(mask.shape),
    )


def tangent(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    d_input: Tensor | None,
    d_offset: Tensor | None,
    d_weight: Tensor | None,
    d_mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """The directional derivative of the result without bias, along directions of which None is zero."""
    points = sample_points(offset, input.shape[2:], weight.shape[2:], stride, padding, dilation)
    image = corners(input, points)
    sampled = blend(image, bilinear(points))
    m = 1.0 if mask is None else _masks(mask, points)
    moved = _moved(points, image, d_input, d_offset)
    columns = m * moved if d_mask is None else m * moved + _masks(d_mask, points) * sampled
    out = multiply(weight, columns + torch.zeros_like(sampled))
    if d_weight is not None:
        out = out + multiply(d_weight, m * sampled)
    return out.reshape(len(input), -1, *offset.shape[2:])


def _moved(points: Points, image: list[Tensor], d_input: Tensor | None, d_offset: Tensor | None) -> Tensor | float:
    """The derivative of the sampled values along directions of input and offset."""
    moved = 0.0
    if d_input is not None:
        moved = moved + blend(corners(d_input, points), bilinear(points))
    if d_offset is not None:
        gy, gx = _offsets(d_offset, points)
        moved = moved + gy * blend(image, bilinear_dy(points)) + gx * blend(image, bilinear_dx(points))
    return moved


def second_order(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    v_input: Tensor | None,
    v_offset: Tensor | None,
    v_weight: Tensor | None,
    v_mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of (grad, input, offset, weight, mask) for cotangents v of the results of `backward`, None being zero.

    The second derivative of the interpolation in y alone and in x alone is 0; the mixed one is v00 - v01 - v10 + v11.
    """
    points = sample_points(offset, input.shape[2:], weight.shape[2:], stride, padding, dilation)
    image, weights = corners(input, points), bilinear(points)
    slopes_y, slopes_x = bilinear_dy(points), bilinear_dx(points)
    sampled, along_y, along_x = (blend(image, w) for w in (weights, slopes_y, slopes_x))
    mixed = image[0] - image[1] - image[2] + image[3]
    zero = torch.zeros_like(sampled)
    m = 1.0 if mask is None else _masks(mask, points)
    vm = 0.0 if v_mask is None else _masks(v_mask, points)
    vy, vx = (0.0, 0.0) if v_offset is None else _offsets(v_offset, points)
    other = [zero] * 4 if v_input is None else corners(v_input, points)
    flat = grad.flatten(2)
    u = multiply_back(weight, flat, sampled)
    v = zero if v_weight is None else multiply_back(v_weight, flat, sampled)

    moved = blend(other, weights) + vy * along_y + vx * along_x
    columns = vm * sampled + m * moved
    to_grad = multiply(weight, columns)
    if v_weight is not None:
        to_grad = to_grad + multiply(v_weight, m * sampled)
    both = u * vm + v * m  # what multiplies the interpolated values
    to_y = both * along_y + m * u * (blend(other, slopes_y) + vx * mixed)
    to_x = both * along_x + m * u * (blend(other, slopes_x) + vy * mixed)
    to_corners = [
        both * w.unsqueeze(2) + m * u * (vy * wy.unsqueeze(2) + vx * wx.unsqueeze(2))
        for w, wy, wx in zip(weights, slopes_y, slopes_x, strict=True)
    ]
    return (
        to_grad.reshape(grad.shape),
        scatter(to_corners, points, input),
        torch.stack([to_y.sum(2), to_x.sum(2)], dim=3).reshape(offset.shape),
        multiply_weight(flat, columns, weight),
        None if mask is None else (u * moved + v * sampled).sum(2).reshape(mask.shape),
    )
