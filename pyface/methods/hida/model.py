"""The networks of HIDA (arXiv:2309.00216): a generator of face sketches under depth and style, and its critic.

Conventions: photos and sketches in [-1, 1], depth in [0, 1] (0 background, nearer = brighter), a style is three weights
that sum to 1, in the order of styles 1, 2, 3. Names of the paper's figures stand in the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyface.errors import UserError
from pyface.nn import ModulatedDeformConv2d

STYLES = 3
OUTLINE_BLOCKS = 2
DROPOUT_BLOCKS = 3
REDUCTION = 16


def style_weights(style: int | Sequence[float] | Tensor, batch: int = 1) -> Tensor:
    """A style as :class:`HIDA` takes it.

    Args:
        style: 1, 2 or 3; three weights of these styles, at least 0 and with sum 1; or Tensor[batch] of numbers, or
            Tensor[batch, 3] of weights.
        batch: number of pictures.

    Returns:
        Tensor[batch, 3] float32.

    Raises:
        UserError: anything else.
    """
    wanted = f"expected 1, 2 or 3, or {STYLES} weights that are not negative and sum to 1, such as 0.5,0.5,0"
    try:
        given = torch.as_tensor(style)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"unknown style {style!r}; {wanted}") from None
    if not given.is_floating_point():
        numbers = given.reshape(-1).expand(batch) if given.numel() == 1 else given
        if given.dtype == torch.bool or numbers.shape != (batch,) or not ((numbers >= 1) & (numbers <= STYLES)).all():
            raise UserError(f"unknown style {style!r}; {wanted}")
        return F.one_hot(numbers.long() - 1, STYLES).float()
    weights = given.float().reshape(-1, given.shape[-1] if given.dim() else 1)
    sums = weights.sum(1)
    if weights.shape[1] != STYLES or not (weights >= 0).all() or not torch.allclose(sums, torch.ones_like(sums)):
        raise UserError(f"unknown style {style!r}; {wanted}")
    if len(weights) not in (1, batch):
        raise UserError(f"style must be one for all, or one for each of {batch} pictures, got {len(weights)}")
    return weights.expand(batch, STYLES)


def acon(x: Tensor, p1: Tensor, p2: Tensor, switch: Tensor) -> Tensor:
    """ACON-C (arXiv:2009.04759): ``(p1 - p2) x sigmoid(switch (p1 - p2) x) + p2 x``, everything broadcast."""
    steep = (p1 - p2) * x
    return steep * torch.sigmoid(switch * steep) + p2 * x


class MetaAcon(nn.Module):
    """ACON-C whose switching factor comes from the picture's channel means (metaACON).

    ``switch = sigmoid(W2 (W1 mean_hw(x)))`` with nothing between W1 and W2, as the released weights need it.

    Args:
        channels: C of the input, Tensor[B, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(REDUCTION, channels // REDUCTION)
        self.p1 = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.p2 = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        switch = torch.sigmoid(self.expand(self.reduce(x.mean((2, 3), keepdim=True))))
        return acon(x, self.p1, self.p2, switch)


class OutlineUp(nn.Module):
    """The coarse up-sampler (DOG): bilinear to twice the size, then a 3 x 3 convolution that moves its taps.

    Modulated deformable convolution with two offset groups (DCNv2, arXiv:1811.11168); its offset branch starts at zero.

    Args:
        inputs, outputs: channels.
        deformable: False for an ordinary convolution.
    """

    def __init__(self, inputs: int, outputs: int, deformable: bool) -> None:
        super().__init__()
        if deformable:
            self.conv = ModulatedDeformConv2d(inputs, outputs, 3, padding=1, offset_groups=2)
        else:
            self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        bound = 1 / math.sqrt(9 * inputs)
        nn.init.uniform_(self.conv.weight, -bound, bound)
        nn.init.zeros_(self.conv.bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False))


class AdaptiveUp(nn.Module):
    """One decoder block (IDA): up-sample, then let depth, style and the encoder's view steer activation and norm.

    ::

        z = [previous, skip];   y = up(z)                       Tensor[B, C, h, w]
        Q = [depth, style planes, metaACON(TrConv(skip))]        3 x 3 conv and metaACON make h of it
        theta = sigmoid(conv h),  gamma = conv h,  b = conv h    one convolution C -> 3C here
        F = acon(y, theta)                                       InfoACON
        K = IN(F) (1 + gamma) + b + F                            DySPADE

    Args:
        previous, skip, outputs: channels; ``skip`` 0 without a skip connection.
        outline: up-sample by :class:`OutlineUp` instead of a 4 x 4 transposed convolution of stride 2.
        dropout: probability in training.
        deformable, adaptation, gain, residual: see :class:`HIDA`.
    """

    def __init__(
        self,
        previous: int,
        skip: int,
        outputs: int,
        *,
        outline: bool,
        dropout: float,
        deformable: bool,
        adaptation: str,
        gain: str,
        residual: str,
    ) -> None:
        super().__init__()
        self.adaptation, self.gain, self.residual, self.dropout = adaptation, gain, residual, dropout
        inputs = previous + skip
        self.up = OutlineUp(inputs, outputs, deformable) if outline else nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        self.p1 = nn.Parameter(torch.randn(1, outputs, 1, 1))
        self.p2 = nn.Parameter(torch.randn(1, outputs, 1, 1))
        if adaptation == "style":
            self.modulation = nn.Linear(STYLES, 3 * outputs)
            return
        if skip:
            self.view = nn.Sequential(nn.ConvTranspose2d(skip, 1, 4, 2, 1), MetaAcon(1))
        condition = 1 + STYLES + bool(skip)
        self.condition = nn.Sequential(nn.Conv2d(condition, outputs, 3, padding=1), MetaAcon(outputs))
        self.modulation = nn.Conv2d(outputs, 3 * outputs, 3, padding=1)

    def forward(self, previous: Tensor, skip: Tensor | None, depth: Tensor, style: Tensor) -> Tensor:
        """Tensor[B, previous, h, w], Tensor[B, skip, h, w], Tensor[B, 1, 2h, 2w], Tensor[B, 3] -> [B, C, 2h, 2w]."""
        y = self.up(previous if skip is None else torch.cat((previous, skip), 1))
        if self.adaptation == "style":
            modulation = self.modulation(style)[:, :, None, None]
        else:
            parts = [depth, style[:, :, None, None].expand(-1, -1, *depth.shape[2:])]
            if skip is not None:
                parts.append(self.view(skip))
            modulation = self.modulation(self.condition(torch.cat([part.to(y.dtype) for part in parts], 1)))
        theta, gamma, shift = modulation.chunk(3, 1)
        activated = acon(y, self.p1, self.p2, torch.sigmoid(theta))
        gain = 1 + gamma if self.gain == "1+gamma" else gamma
        normal = F.instance_norm(activated)
        out = normal * gain + shift + (activated if self.residual == "post" else y)
        return F.dropout(out, self.dropout, self.training)


def _down(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
    layers = [MetaAcon(inputs), nn.Conv2d(inputs, outputs, 4, 2, 1)]
    return nn.Sequential(*layers, nn.InstanceNorm2d(outputs)) if norm else nn.Sequential(*layers)


def _head(inputs: int, *last: nn.Module) -> nn.Sequential:
    return nn.Sequential(MetaAcon(inputs), nn.ConvTranspose2d(inputs, 1, 4, 2, 1), *last)


class HIDA(nn.Module):
    """The generator: an encoder of photo and depth down to one pixel, and a decoder of :class:`AdaptiveUp` blocks.

    With the defaults it is the released network, 80,894,566 parameters. ``width`` and ``image_size`` make smaller ones
    of the same shape: everything scales with ``width``, and each halving of ``image_size`` takes away one encoder layer
    and one decoder block of the innermost kind.

    Args:
        width: channels of each stem; 64 as published.
        image_size: side in pixels that the encoder brings down to one pixel: 32, 64, 128, 256 or 512. Pictures may have
            any sides that are multiples of it.
        gain: ``"1+gamma"`` as the code has it (and the released weights need it), or ``"gamma"`` as the paper's figure.
        residual: what is added after the norm: ``"post"``, the activated feature (code), or ``"pre"``, what the
            up-sampler gave (figure).
        deformable: False puts ordinary convolutions into the two outline blocks (ablation).
        adaptation: ``"pixel"``, or ``"style"``: theta, gamma and b are constants that the style alone chooses, so depth
            and the encoder's view no longer steer the decoder (ablation; conditional instance norm, arXiv:1610.07629).

    Raises:
        UserError: a setting that is none of these.
    """

    def __init__(
        self,
        width: int = 64,
        image_size: int = 256,
        *,
        gain: str = "1+gamma",
        residual: str = "post",
        deformable: bool = True,
        adaptation: str = "pixel",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("image_size", image_size, (32, 64, 128, 256, 512)),
            ("gain", gain, ("1+gamma", "gamma")),
            ("residual", residual, ("post", "pre")),
            ("adaptation", adaptation, ("pixel", "style")),
        ):
            if value not in known:
                raise UserError(f"hida: {name} must be one of {', '.join(map(str, known))}; got {value!r}")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise UserError(f"hida: width must be a positive whole number, got {width!r}")
        self.width, self.image_size = width, image_size
        levels = image_size.bit_length() - 1
        encoded = [2 * width, 2 * width, 4 * width] + [8 * width] * (levels - 3)
        decoded = [8 * width] * (levels - 4) + [4 * width, 2 * width, width]
        self.photo_stem, self.depth_stem = nn.Conv2d(3, width, 4, 2, 1), nn.Conv2d(1, width, 4, 2, 1)
        self.down = nn.ModuleList(
            _down(inputs, outputs, norm=index < levels - 2)
            for index, (inputs, outputs) in enumerate(zip(encoded, encoded[1:]))
        )
        self.up = nn.ModuleList(
            AdaptiveUp(
                decoded[index - 1] if index else encoded[-1],
                encoded[-1 - index] if index else 0,
                outputs,
                outline=index < OUTLINE_BLOCKS,
                dropout=0.5 if index < DROPOUT_BLOCKS else 0.0,
                deformable=deformable,
                adaptation=adaptation,
                gain=gain,
                residual=residual,
            )
            for index, outputs in enumerate(decoded)
        )
        self.sketch_head, self.depth_head = _head(2 * width, nn.Tanh()), _head(2 * width)

    def forward(
        self, photo: Tensor, depth: Tensor, style: Tensor, *, return_depth: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw.

        Args:
            photo: Tensor[B, 3, H, W] in [-1, 1].
            depth: Tensor[B, 1, H, W] in [0, 1].
            style: Tensor[B, 3], see :func:`style_weights`.
            return_depth: also give the depth that the second head reconstructs (no bounds; training wants it).

        Returns:
            Tensor[B, 1, H, W] in [-1, 1], white paper = 1; or that and the depth, Tensor[B, 1, H, W].

        Raises:
            UserError: shapes that do not fit, or sides that are no multiples of ``image_size``.
        """
        self._check(photo, depth, style)
        seen, relief = self.photo_stem(photo), self.depth_stem(depth)
        features = [torch.cat((seen, relief), 1)]
        for layer in self.down:
            features.append(layer(features[-1]))
        out = features.pop()
        for index, block in enumerate(self.up):
            skip = features[len(features) - index] if index else None
            step = photo.shape[-1] // (2 * out.shape[-1])
            # Nearest-neighbour reduction by a whole number takes every step-th pixel.
            out = block(out, skip, depth[..., ::step, ::step], style)
        sketch = self.sketch_head(torch.cat((out, seen), 1))
        return (sketch, self.depth_head(torch.cat((out, relief), 1))) if return_depth else sketch

    def _check(self, photo: Tensor, depth: Tensor, style: Tensor) -> None:
        if photo.dim() != 4 or photo.shape[1] != 3:
            raise UserError(f"hida: photo must be Tensor[B, 3, H, W], got {tuple(photo.shape)}")
        batch, _, height, width = photo.shape
        if min(height, width) < 1 or height % self.image_size or width % self.image_size:
            raise UserError(f"hida: sides must be multiples of {self.image_size}, got {height} x {width}; pad them")
        for name, value, shape in (("depth", depth, (batch, 1, height, width)), ("style", style, (batch, STYLES))):
            if value.shape != shape:
                raise UserError(f"hida: {name} must be Tensor{list(shape)}, got {tuple(value.shape)}")


class Discriminator(nn.Module):
    """The critic: one PatchGAN on depth and sketch, 2,763,713 parameters with the published width.

    Norms stand before the convolutions, and the style is not told, as in the released code.

    Args:
        width: channels of the first layer; 64 as published.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(2, width, 4, 2, 2), nn.LeakyReLU(0.2)]
        for index in range(3):
            inputs = width * 2**index
            stride = 2 if index < 2 else 1
            layers += [nn.InstanceNorm2d(inputs), nn.Conv2d(inputs, 2 * inputs, 4, stride, 2), nn.LeakyReLU(0.2)]
        layers += [nn.InstanceNorm2d(8 * width), nn.LeakyReLU(0.2), nn.Conv2d(8 * width, 1, 4, 1, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, depth: Tensor, sketch: Tensor) -> Tensor:
        """Tensor[B, 1, H, W] each (depth in [0, 1], sketch in [-1, 1]) -> logits Tensor[B, 1, h, w]; 35 x 35 at 256."""
        return self.layers(torch.cat((depth, sketch), 1))
