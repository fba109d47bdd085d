"""The clip classifier, the gaze network that teaches it, and the heads that turn an embedding into angles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyface.backbones import create_backbone
from pyface.errors import UserError

FRAMES = 14
FAKE, REAL = 0, 1
"""Places of the two classes among the network's outputs; :mod:`pyface.metrics` wants the probability of fake."""
BINS, BIN_DEGREES, FIRST_DEGREE = 90, 4.0, -180.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS = {"full": 1.0, "central": 177 / 224}
"""The part of a face crop's side that is shown: all of it (the paper's code), or the middle (the rework of 2024)."""


def prepared(pixels: Tensor, size: int, crop: str = "full") -> Tensor:
    """Network input from face crops.

    Args:
        pixels: Tensor[N, 3, S, S], uint8, or float in [0, 1].
        size: side of the result in pixels.
        crop: one of :data:`CROPS`. "central" brings the picture to ``size`` first, cuts, and enlarges again.

    Returns:
        Tensor[N, 3, size, size] float32, ImageNet-normalised, channels last in memory (faster convolutions).
    """
    if crop not in CROPS:
        raise UserError(f"gazeforensics: crop must be one of {', '.join(CROPS)}; got {crop!r}")
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    values = _resized(values, size)
    if crop != "full":
        side = round(size * CROPS[crop])
        start = (size - side) // 2
        values = _resized(values[..., start : start + side, start : start + side], size)
    mean, std = (values.new_tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return ((values - mean) / std).contiguous(memory_format=torch.channels_last)


def _resized(values: Tensor, size: int) -> Tensor:
    if values.shape[-2:] == (size, size):
        return values
    return nn.functional.interpolate(values, (size, size), mode="bilinear", antialias=True)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them: Kaiming-uniform weights, zero biases."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layer = nn.Linear(before, after)
        nn.init.kaiming_uniform_(layer.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class GazeAngles(nn.Module):
    """L2CS-Net's heads: an embedding Tensor[N, G] -> logits of 90 bins of 4 degrees for pitch and for yaw.

    Attributes:
        known: whether the weights are of trained heads; a teacher that comes without heads has none.
    """

    known: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pitch, self.yaw = nn.Linear(width, BINS), nn.Linear(width, BINS)
        self.register_buffer("known", torch.tensor(False))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        return self.pitch(embedding), self.yaw(embedding)

    def degrees(self, embedding: Tensor) -> Tensor:
        """Expected angles, Tensor[N, 2] (pitch, yaw) in degrees; bin i counts as 4 i - 180."""
        return torch.stack([expected_degrees(logits) for logits in self(embedding)], 1)


def expected_degrees(logits: Tensor) -> Tensor:
    """Tensor[N, 90] -> Tensor[N]: sum of p_i (4 i - 180), equation (8)."""
    places = torch.arange(BINS, device=logits.device, dtype=torch.float32) * BIN_DEGREES + FIRST_DEGREE
    return logits.float().softmax(1) @ places


class GazeNetwork(nn.Module):
    """The teacher, L2CS-Net: a trunk's pooled feature is the embedding, two heads read the angles off it.

    Args:
        trunk: a backbone of timm's; "resnet18" as published.

    ``forward``: Tensor[N, 3, H, W], ImageNet-normalised -> logits (pitch, yaw), each Tensor[N, 90].
    """

    def __init__(self, trunk: str = "resnet18") -> None:
        super().__init__()
        self.trunk = create_backbone(trunk)
        self.width: int = self.trunk.num_features
        self.angles = GazeAngles(self.width)
        self.angles.known.fill_(True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.angles(self.trunk(images))

    def embed(self, images: Tensor) -> Tensor:
        """Tensor[N, G], what the student is to reproduce."""
        return self.trunk(images)

    def gaze(self, images: Tensor) -> Tensor:
        """Tensor[N, 2], (pitch, yaw) in radians, conventions as in Gaze360."""
        return self.angles.degrees(self.trunk(images)).deg2rad()


class GazeForensics(nn.Module):
    """Is a clip of 14 face crops forged? (He et al., arXiv:2311.07075; sheet, section 2)

    A trunk gives a feature per frame; one linear layer maps it to ``z = [z_gaze; z_leaky]``, of which ``z_gaze`` is to
    reproduce the teacher's embedding and ``z_leaky`` is free. Self-attention over the frames (no positional encoding,
    residual or norm) and an MLP on the flattened result classify the clip. 14,455,874 parameters as published.

    Args:
        trunk: a backbone of timm's.
        gaze: G, width of the teacher's embedding.
        leaky: lambda, free features per frame.
        heads, head_width: of the attention.
        compressed: features per frame after it.
        frozen: the variant whose gaze part is the frozen teacher's embedding itself; the trunk, needed only if
            ``leaky`` is not 0, gives the free features.
        angles: hold the teacher's heads, to read the gaze off ``z_gaze``; not trained.
        teacher: the frozen variant's gaze backbone; by default the same kind as ``trunk``.
        hidden: widths inside the MLPs: of queries, keys and values; of the per-frame MLP; of the last one. None takes
            the published rule.

    Raises:
        UserError: numbers that do not fit.
    """

    def __init__(
        self,
        trunk: str = "resnet18",
        *,
        gaze: int = 512,
        leaky: int = 32,
        heads: int = 8,
        head_width: int = 64,
        compressed: int = 32,
        frozen: bool = False,
        angles: bool = False,
        teacher: str | None = None,
        hidden: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if gaze < 1 or leaky < 0 or heads < 1 or head_width < 1 or compressed < 1:
            raise UserError(
                f"gazeforensics: need gaze, heads, head_width, compressed >= 1 and leaky >= 0, got {gaze}, {heads}, "
                f"{head_width}, {compressed} and {leaky}"
            )
        self.gaze, self.leaky = gaze, leaky
        self.teacher = None
        if frozen:
            self.teacher = create_backbone(teacher or trunk).requires_grad_(False).eval()
            if self.teacher.num_features != gaze:
                raise UserError(
                    f"gazeforensics: the teacher {teacher or trunk} has {self.teacher.num_features} features, "
                    f"gaze is {gaze}"
                )
        self.trunk = self.embedding = None
        if not frozen or leaky:
            self.trunk = create_backbone(trunk)
            self.embedding = mlp((self.trunk.num_features, leaky if frozen else gaze + leaky))
        width = heads * head_width
        mixed, per_frame, last = hidden or ((width,), (256, 128), (256, 128, 64))
        self.query, self.key, self.value = (mlp((gaze + leaky, *mixed, width)) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.compress = mlp((width, *per_frame, compressed))
        self.classifier = mlp((FRAMES * compressed, *last, 2))
        self.angles = GazeAngles(gaze).requires_grad_(False) if angles else None

    def train(self, mode: bool = True) -> GazeForensics:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, clips: Tensor, gaze: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classify clips.

        Args:
            clips: Tensor[B, 14, 3, H, W], ImageNet-normalised.
            gaze: Tensor[B, 14, G], the teacher's embeddings where they are known; the frozen variant then need not
                compute them.

        Returns:
            logits Tensor[B, 2] (fake, real), z_gaze Tensor[B, 14, G].
        """
        if clips.ndim != 5 or clips.shape[1] != FRAMES or clips.shape[2] != 3:
            raise UserError(f"gazeforensics: clips must be Tensor[B, {FRAMES}, 3, H, W], got {tuple(clips.shape)}")
        batch = len(clips)
        if gaze is not None:
            gaze = gaze.flatten(0, 1)
        z = self.embed(clips.flatten(0, 1), gaze).unflatten(0, (batch, FRAMES))
        return self.classify(z), z[..., : self.gaze]

    def embed(self, images: Tensor, gaze: Tensor | None = None) -> Tensor:
        """z of single frames: Tensor[N, 3, H, W] -> Tensor[N, G + lambda]."""
        pooled = None if self.trunk is None else self.trunk(images)
        return self.project(pooled, images, gaze)

    def project(self, pooled: Tensor | None, images: Tensor, gaze: Tensor | None = None) -> Tensor:
        """z from the trunk's pooled features; ``images`` and ``gaze`` matter to the frozen variant only."""
        free = None if self.embedding is None else self.embedding(pooled)
        if self.teacher is None:
            return free
        if gaze is None:
            with torch.no_grad():
                gaze = self.teacher(images)
        return gaze if free is None else torch.cat((gaze.to(free.dtype), free), 1)

    def classify(self, z: Tensor) -> Tensor:
        """Tensor[B, 14, G + lambda] -> logits Tensor[B, 2] (fake, real)."""
        mixed, _ = self.attention(self.query(z), self.key(z), self.value(z), need_weights=False)
        return self.classifier(self.compress(mixed).flatten(1))

    def settings(self) -> dict[str, int | bool]:
        """What of the constructor's arguments a file of weights must say to be read back."""
        width = self.attention.embed_dim
        return {
            "gaze": self.gaze, "leaky": self.leaky, "heads": self.attention.num_heads,
            "head_width": width // self.attention.num_heads, "compressed": self.compress[-1].out_features,
            "frozen": self.teacher is not None, "angles": self.angles is not None,
        }  # fmt: skip


def parameters_of(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)
