"""The network of ACMF: a backbone with two outputs, and Grad-CAM of a whole batch in one pass."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyface.backbones import create_backbone
from pyface.errors import UserError

REAL, FAKE = 0, 1
_EFFICIENTNETS = ("efficientnet_", "tf_efficientnet_", "efficientnetv2_", "tf_efficientnetv2_")


class ACMF(nn.Module):
    """Real or forged? Logits of face crops, and the attention maps behind them.

    Images are Tensor[B, 3, S, S] in [0, 1], without further normalisation. Output 0 is real, 1 is fake.

    Args:
        backbone: of :func:`pyface.backbones.create_backbone`: "xception" as published, "tf_efficientnet_b4" as in the
            authors' notebook, or any other.
        image_size: S in pixels that the network is meant for; kept for its users.
        target: name of the module whose output attention is measured at; None takes ``conv3`` of Xception (before its
            norm, as published), the last projection of an EfficientNet's last block (as in the notebook), and the
            last stage of other backbones.
        weights, pretrained: of the backbone, trained on ImageNet; see ``create_backbone``.

    Raises:
        UserError: unknown backbone or target, or weights that are missing or do not fit.
    """

    def __init__(
        self,
        backbone: str = "xception",
        image_size: int = 224,
        *,
        target: str | None = None,
        weights: str | os.PathLike | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if image_size < 16:
            raise UserError(f"acmf: image_size must be at least 16, got {image_size}")
        self.backbone, self.image_size = backbone, image_size
        self.network = create_backbone(backbone, weights=weights, pretrained=pretrained, num_classes=2)
        self.target = target or _default_target(self.network, backbone)
        try:
            self._target  # noqa: B018 - an unknown name shall be told now
        except AttributeError:
            raise UserError(f"acmf: {backbone} has no module {self.target!r} to measure attention at") from None

    @property
    def _target(self) -> nn.Module:
        return self.network.get_submodule(self.target)

    def forward(self, images: Tensor) -> Tensor:
        """Logits Tensor[B, 2] (real, fake)."""
        return self.network(images)

    def attend(self, images: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Logits, and Grad-CAM of the class that each image is taken for, in one batched pass.

        ``sum_c mean(d z / d A_c) A_c`` with A the output of the target module, no ReLU; the gradients are constants.
        In evaluation mode images do not influence each other, so the gradient of the sum of their chosen logits is
        the gradient of each, and it only crosses the layers behind the target. Puts no gradients into parameters.

        Args:
            images: Tensor[B, 3, S, S] in [0, 1]. The network should be in evaluation mode.
            graph: keep the graph below the target, so that a loss of the maps can be minimised; the logits have no
                usable graph either way. Otherwise nothing below the target is kept, which saves memory.

        Returns:
            (logits Tensor[B, 2], detached; maps Tensor[B, h, w] of any scale).
        """
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not graph:
                torch.set_grad_enabled(True)  # until the block below is left
                output = output.detach().requires_grad_()
            kept.append(output)
            return output

        handle = self._target.register_forward_hook(keep)
        try:
            with torch.set_grad_enabled(graph):
                logits = self.network(images)
                chosen = logits.gather(1, logits.argmax(1, keepdim=True)).sum()
                (features,) = kept
                (slopes,) = torch.autograd.grad(chosen, features)
        finally:
            handle.remove()
        weights = slopes.float().mean((2, 3))
        features = features if graph else features.detach()
        return logits.detach().float(), torch.einsum("bc,bchw->bhw", weights, features.float())


def scaled_maps(maps: Tensor, size: int) -> Tensor:
    """Attention maps brought to the image's size (bilinear, corners aligned), then to [0, 1] each.

    Args:
        maps: Tensor[B, h, w].
        size: S in pixels.

    Returns:
        Tensor[B, S, S]; all 0 where a map is flat. Differentiable, through its minimum and maximum as well.
    """
    large = F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]
    low = large.amin((1, 2), keepdim=True)
    high = large.amax((1, 2), keepdim=True)
    span = high - low
    # Interpolation rounds, so a flat map need not stay quite flat.
    flat = span <= 1e-6 * torch.maximum(low.abs(), high.abs())
    return torch.where(flat, 0.0, (large - low) / torch.where(flat, 1.0, span))


def _default_target(network: nn.Module, backbone: str) -> str:
    if backbone.startswith(("xception", "legacy_xception")) and hasattr(network, "conv3"):
        return "conv3"
    if backbone.startswith(_EFFICIENTNETS):
        last = len(network.blocks) - 1
        return f"blocks.{last}.{len(network.blocks[last]) - 1}.conv_pwl"
    return network.feature_info[-1]["module"]
