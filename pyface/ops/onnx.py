"""Export to ONNX: the standard operators that pyface's ops become."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

import pyface.ops.deform_conv  # noqa: F401 - registers the op named below
from pyface.errors import UserError

FIRST_OPSET = 19  # the first with DeformConv


def translations(opset_version: int = 22) -> dict[Any, Callable]:
    """What `torch.onnx.export(..., dynamo=True, custom_translation_table=...)` needs to know of pyface's ops.

    `deform_conv2d`, and with it `pyface.nn.DeformConv2d` and `ModulatedDeformConv2d`, become the standard operator
    DeformConv. Batch and picture size may be dynamic, channels may not. Sums are in the order of whoever runs the
    model; offsets that are no numbers mean nothing in ONNX.

    Args:
        opset_version: the one given to `torch.onnx.export`; 19 or later. bfloat16 needs 22.

    Raises:
        UserError: an opset without DeformConv, or one that the installed onnxscript does not know; no onnxscript.
    """
    if opset_version < FIRST_OPSET:
        raise UserError(
            f"ONNX has DeformConv from opset {FIRST_OPSET} on, got opset_version={opset_version}; export with "
            f"opset_version={FIRST_OPSET} or later"
        )
    try:
        opset = getattr(importlib.import_module("onnxscript"), f"opset{opset_version}")
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs onnxscript (pip install onnx onnxscript): {error}") from error
    except AttributeError:
        raise UserError(f"the installed onnxscript has no opset {opset_version}; install a newer one") from None

    def deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation, path=None):
        channels, (_, group_channels, *kernel) = input.shape[1], weight.shape
        sizes = (channels, group_channels, *kernel, offset.shape[1])
        if not all(isinstance(size, int) for size in sizes):
            raise UserError(
                "deform_conv2d: to become DeformConv, channels, kernel and offset groups must be fixed numbers, got "
                f"input {list(input.shape)}, weight {list(weight.shape)}, offset {list(offset.shape)}; let only the "
                "batch and the picture's size be dynamic"
            )
        # ONNX has one type for all: beside wider offsets the layer is computed in theirs.
        given, inside = input.dtype, offset.dtype
        if given != inside:
            input, weight = (opset.Cast(t, to=inside) for t in (input, weight))
            bias = None if bias is None else opset.Cast(bias, to=inside)
        out = opset.DeformConv(
            input,
            weight,
            offset,
            bias,
            mask,
            kernel_shape=kernel,
            strides=list(stride),
            pads=[*padding, *padding],
            dilations=list(dilation),
            group=channels // group_channels,
            offset_group=offset.shape[1] // (2 * kernel[0] * kernel[1]),
        )
        return out if given == inside else opset.Cast(out, to=given)

    return {torch.ops.pyface.deform_conv2d.default: deform_conv2d}
