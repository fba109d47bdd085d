"""The face recogniser of ArcFace's PyTorch releases, in their layout, so that their weight files load as they are."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from pyface.backbones.weights import find_weights, load_weights
from pyface.errors import UserError

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
_SIDE = 112  # pixels, of an aligned face


class _Block(nn.Module):
    """Residual block with the norm in front, PReLU between and none behind."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x)))))
        return self.bn3(y) + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """Improved residual network for faces (Duta et al., arXiv:2004.04989) with ArcFace's head (Deng et al., CVPR 2019).

    Tensor[N, 3, 112, 112] in [-1, 1], RGB, aligned -> Tensor[N, 512], not normalised.

    The names of the layers are those of insightface's arcface_torch. This layout is checked by its names, shapes and
    parameter counts; released weight files were not at hand, so none has been loaded yet.

    Args:
        depths: blocks in each of the four stages.
        features: length of the embedding.
        width: channels of the first stage; doubles at each of the next three.
        dropout: before the embedding, while training.
    """

    def __init__(self, depths: tuple[int, int, int, int], features: int = 512, width: int = 64, dropout: float = 0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        inputs = width
        for stage, depth in enumerate(depths, 1):
            outputs = width * 2 ** (stage - 1)
            blocks = [_Block(inputs, outputs, 2), *(_Block(outputs, outputs, 1) for _ in range(depth - 1))]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            inputs = outputs
        self.bn2 = nn.BatchNorm2d(inputs)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs * (_SIDE // 16) ** 2, features)
        self.features = nn.BatchNorm1d(features)
        # A free scale would only change the embedding's length, which is divided out
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.dropout(self.bn2(x).flatten(1))))


class FaceEmbedder(nn.Module):
    """Aligned faces Tensor[N, 3, H, W] in [0, 1] -> embeddings Tensor[N, 512] of length 1.

    Pictures of another size than 112 x 112 are resized (bilinear, antialiased). The crop is the caller's: recognisers
    expect the five landmarks at ArcFace's places, as an aligned data set or an aligner puts them.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (_SIDE, _SIDE):
            images = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        return F.normalize(self.network(images * 2 - 1), dim=1)


def create_recogniser(
    name: str = "iresnet50", *, weights: str | os.PathLike | None = None, pretrained: bool = True
) -> FaceEmbedder:
    """A face recogniser in evaluation mode.

    Args:
        name: "iresnet18", "iresnet34", "iresnet50" or "iresnet100".
        weights: ``backbone.pth`` of insightface's arcface_torch models, or the same as ``.safetensors``.
        pretrained: without ``weights``, take ``<name>.safetensors`` or ``.pth`` from the folder ``PYFACE_WEIGHTS``.
            False makes an untrained one, whose similarities mean nothing.

    Raises:
        UserError: unknown name, or weights that are missing or do not fit.
    """
    if name not in DEPTHS:
        raise UserError(f"unknown recogniser {name!r}; known: {', '.join(DEPTHS)}")
    if weights is None and pretrained:
        weights = find_weights(
            name, "https://github.com/deepinsight/insightface/tree/master/recognition/arcface_torch (backbone.pth)"
        )
    network = IResNet(DEPTHS[name])
    if weights is not None:
        load_weights(network, weights)
    return FaceEmbedder(network).eval()
