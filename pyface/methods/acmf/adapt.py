"""Stage 2 of ACMF: the network adapts to each test video before it judges it, without knowing the answer.

The published name is forgery attention consistency. Numbers measured with it are those of *test-time adaptation*: every
video is seen by a network that took gradient steps on that video's own, unlabelled frames.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyface.errors import UserError
from pyface.methods.acmf.losses import consistency_loss, flooded
from pyface.methods.acmf.model import ACMF, scaled_maps
from pyface.nn import MaskedFrequency


@dataclass(frozen=True)
class Adaptation:
    """Settings of stage 2. The defaults are those of the authors' script; see :data:`NOTEBOOK`.

    Attributes:
        steps: gradient steps per video, each with another training batch.
        lr, betas, weight_decay: of AdamW, on all parameters.
        flood: level below which the classification loss is climbed again; 0 is no flooding.
        scale: factor of the whole loss.
        drop_rate, half_width: of the masked frequencies of the training batch; drop_rate 0 leaves it as it is.
        carry_state: keep the optimiser's moments, and the order of training batches, from video to video, as the
            authors' script does. Results then depend on the order of the videos.
        precision: "no", or "bf16" to compute the passes in bfloat16 (autocast).
    """

    steps: int = 2
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    flood: float = 0.04
    scale: float = 1.0
    drop_rate: float = 0.1
    half_width: int = 5
    carry_state: bool = False
    precision: str = "no"


NOTEBOOK = Adaptation(steps=1, flood=0.0, scale=0.1, drop_rate=0.0)
"""The variant of the authors' notebook, for another detector: 0.1 (CE + consistency), one step, unmasked batch. There
the reference map is computed once; give :class:`Adapter` a single batch for that."""


class Adapter:
    """Judges videos with a copy of a network that adapts to each of them and goes back.

    Args:
        network: trained in stage 1; it is left alone.
        batches: of training data, (images Tensor[B, 3, S, S] in [0, 1], labels Tensor[B] int64). Their mean attention
            maps depend on nothing else but the network, so they are measured here, once.
        settings: of the adaptation.
        seed: of the choice of batches and of the masks.
    """

    def __init__(
        self,
        network: ACMF,
        batches: Sequence[tuple[Tensor, Tensor]],
        settings: Adaptation = Adaptation(),
        *,
        seed: int = 0,
    ) -> None:
        if not batches:
            raise UserError("acmf: stage 2 needs at least one batch of training data")
        self.settings, self.seed = settings, seed
        self.device = next(network.parameters()).device
        # Convolutions are faster with channels last in memory; weights so laid out make their maps so.
        self.network = copy.deepcopy(network).eval().requires_grad_(True).to(memory_format=torch.channels_last)
        own = [*self.network.parameters(), *self.network.buffers()]
        self._own = [value.detach() for value in own]
        self._initial = [value.detach().clone() for value in own]
        self.batches = [(images.to(self.device), labels.to(self.device)) for images, labels in batches]
        self.references = [self.mean_map(images).detach() for images, _ in self.batches]
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.mask = MaskedFrequency(settings.drop_rate, settings.half_width, seed=seed)
        self._rng = np.random.default_rng(seed)

    def mean_map(self, images: Tensor, *, graph: bool = False) -> Tensor:
        """Mean over a batch of its attention maps, Tensor[S, S] in [0, 1], in evaluation mode."""
        with self._cast():
            _, maps = self.network.attend(images, graph=graph)
        return scaled_maps(maps, images.shape[-1]).mean(0)

    def reset(self) -> None:
        """Back to the weights and running statistics of stage 1, and unless carried on, to a fresh optimiser."""
        torch._foreach_copy_(self._own, self._initial)
        if not self.settings.carry_state:
            self.optimizer.state.clear()

    def adapt(self, frames: Tensor, key: str = "") -> list[dict[str, float]]:
        """Adapt to a video.

        Args:
            frames: Tensor[T, 3, S, S] in [0, 1].
            key: the video's id; with the seed it decides which training batches are used, so that results depend on
                the video alone and not on those before it.

        Returns:
            For each step the losses ``classification`` (before flooding) and ``consistency``.
        """
        settings, network = self.settings, self.network
        self.reset()
        frames = frames.to(self.device)
        rng = self._rng
        if not settings.carry_state:
            rng = np.random.default_rng((self.seed, zlib.crc32(key.encode())))
            self.mask.seed, self.mask.draws = int(rng.integers(2**62)), 0
        history = []
        for index in _cycled(len(self.batches), settings.steps, rng):
            images, labels = self.batches[index]
            network.train()
            with self._cast():
                logits = network(self.mask(images))
            classification = F.cross_entropy(logits.float(), labels)
            network.eval()
            consistency = consistency_loss(self.mean_map(frames, graph=True), self.references[index])
            self.optimizer.zero_grad(set_to_none=True)
            (settings.scale * (flooded(classification, settings.flood) + consistency)).backward()
            self.optimizer.step()
            history.append({"classification": classification.item(), "consistency": consistency.item()})
        return history

    @torch.no_grad()
    def logits(self, frames: Tensor) -> Tensor:
        """Logits Tensor[T, 2] of frames by the network as it is now, float32 on the CPU."""
        self.network.eval()
        with self._cast():
            return self.network(frames.to(self.device)).float().cpu()

    def __call__(self, frames: Tensor, key: str = "") -> Tensor:
        """Adapt to a video, then judge it: logits Tensor[T, 2]; a video's score is that of their mean."""
        self.adapt(frames, key)
        return self.logits(frames)

    def _cast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")


def _cycled(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """``wanted`` places of ``count``, shuffled; none comes again before all have been."""
    order: list[int] = []
    while len(order) < wanted:
        order += rng.permutation(count).tolist()
    return order[:wanted]
