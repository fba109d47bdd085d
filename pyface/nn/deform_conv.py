"""Deformable convolutions as layers: torchvision's, and the one with an offset branch of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyface.ops import deform_conv2d

Pair = tuple[int, int]


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else tuple(value)


class DeformConv2d(nn.Module):
    """`torchvision.ops.DeformConv2d` on `pyface.ops.deform_conv2d`: same constructor, state dict, initial values and
    calls.

    Args:
        in_channels, out_channels, groups: as in `torch.nn.Conv2d`; both channels are multiples of groups.
        kernel_size, stride, padding, dilation: whole numbers or pairs (y, x).
        bias: whether there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a multiple of groups ({groups}), got {channels}"
                )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of `torch.nn.Conv2d`: uniform within 1 / sqrt(inputs of an output)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tensor[N, in_channels, H, W], offset Tensor[N, 2 * G * K, OH, OW] and mask Tensor[N, G * K, OH, OW] as in
        `pyface.ops.deform_conv2d` to Tensor[N, out_channels, OH, OW]."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask=mask)


class ModulatedDeformConv2d(DeformConv2d):
    """Deformable convolution, version 2, that predicts its offsets and masks from its input (arXiv:1811.11168).

    A convolution `conv_offset` of the same geometry gives 2 G K offsets, then G K masks, which pass a sigmoid. Its
    weight and bias start at zero: the layer starts as a convolution of half the strength. It usually learns at a tenth
    of the rate of the rest.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `DeformConv2d`.
        offset_groups: G, groups of input channels with offsets and masks of their own.

    Loads state dicts of mmcv's `ModulatedDeformConv2dPack`, whose names these are, and of DCNv2's `DCN`
    (`conv_offset_mask`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if in_channels % offset_groups:
            raise ValueError(
                f"ModulatedDeformConv2d: in_channels must be a multiple of offset_groups ({offset_groups}), got "
                f"{in_channels}"
            )
        self.offset_groups = offset_groups
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels, 3 * offset_groups * taps, self.kernel_size, self.stride, self.padding, self.dilation
        )
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)
        self.register_load_state_dict_pre_hook(_rename)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}"

    def forward(self, input: Tensor) -> Tensor:
        """Tensor[N, in_channels, H, W] to Tensor[N, out_channels, OH, OW]."""
        predicted = self.conv_offset(input)
        offset, mask = predicted.split([2 * predicted.shape[1] // 3, predicted.shape[1] // 3], dim=1)
        return super().forward(input, offset, mask.sigmoid())


def _rename(module, state_dict, prefix, *_) -> None:
    """DCNv2's name of the offset branch becomes ours, before a state dict is read."""
    for name in ("weight", "bias"):
        if f"{prefix}conv_offset_mask.{name}" in state_dict:
            state_dict[f"{prefix}conv_offset.{name}"] = state_dict.pop(f"{prefix}conv_offset_mask.{name}")


def replace_deform_conv(model: nn.Module) -> int:
    """Turns every `torchvision.ops.DeformConv2d` in a model into a `DeformConv2d`, in place.

    The layers stay the same objects with the same parameters: optimizers, hooks and references to them go on working.
    Layers of classes derived from torchvision's, and calls of its function, are left alone.

    Args:
        model: any module; it may itself be such a layer.

    Returns:
        How many layers were turned.
    """
    from torchvision.ops import DeformConv2d as Theirs

    layers = [layer for layer in model.modules() if type(layer) is Theirs]
    for layer in layers:
        layer.__class__ = DeformConv2d
    return len(layers)
