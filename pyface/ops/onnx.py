"""How ONNX writes the ops of this package, for PyTorch's exporter (`torch.onnx.export(..., dynamo=True)`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyface.errors import UserError


def translation_table() -> dict[Callable, Callable]:
    """What `torch.onnx.export` needs as `custom_translation_table` to export models that use our ops.

    `deform_conv2d`, and with it the layers on it, becomes the standard operator DeformConv, which came with opset 19::

        torch.onnx.export(model, args, "model.onnx", dynamo=True, opset_version=19,
                          custom_translation_table=translation_table())

    Offsets or masks that are wider than the input (float32 beside bfloat16 or float16) are kept: ONNX wants one type,
    so that layer is computed in theirs. bfloat16 as such needs opset 22 and a runtime that takes it; ONNX Runtime's CPU
    kernel takes float32 and float64. The other ops of this package have no ONNX operator and are not in the table:
    exporting them is refused by the exporter, with the name of the op.

    Raises:
        UserError: onnxscript is not installed (`pip install onnxscript`; the exporter needs it too).
    """
    try:
        from onnxscript import opset19
    except ImportError as error:
        raise UserError(f"the ONNX export needs onnxscript (pip install onnxscript): {error}") from error

    def deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation, path=None):
        group, taps = input.shape[1] // weight.shape[1], weight.shape[2] * weight.shape[3]
        type_in, type_inside = input.dtype, offset.dtype
        if type_in != type_inside:
            input, weight = (opset19.Cast(t, to=type_inside) for t in (input, weight))
            bias = None if bias is None else opset19.Cast(bias, to=type_inside)
        out = opset19.DeformConv(
            input,
            weight,
            offset,
            bias,
            mask,
            strides=stride,
            pads=[*padding, *padding],
            dilations=dilation,
            group=group,
            offset_group=offset.shape[1] // (2 * taps),
        )
        return out if type_in == type_inside else opset19.Cast(out, to=type_in)

    return {torch.ops.pyface.deform_conv2d.default: deform_conv2d}
