"""The training engine: a step of its loop against the same step in a bare PyTorch loop."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import OURS, Case, Options, Peer, Target
from pyface.engine import Recipe, Run, TrainConfig, Trainer, setting

BARE = "bare loop"
SAMPLES = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    method = "benchmark"

    steps: int | None = setting(10**9, "never reached")
    batch_size: int = setting(16, "pictures per step")
    clip: float = setting(1.0, "largest norm of the gradient")
    checkpoint_every: int = setting(10**9, "never reached", free=True)
    validate_every: int = setting(0, "never", free=True)
    width: int = setting(16, "channels of the convolutions")
    side: int = setting(64, "pixels of a picture's side")


class Classifier(Recipe):
    """Eight convolutions and a linear layer on random pictures of ten classes."""

    Config = Config

    def model(self) -> nn.Module:
        width = self.config.width
        layers = [layer for _ in range(7) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        return nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1),
            nn.ReLU(),
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 10),
        )

    def optimizers(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), self.config.lr)

    def data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        side = self.config.side
        pictures = torch.rand(SAMPLES, 3, side, side, generator=generator)
        return TensorDataset(pictures, torch.randint(10, (SAMPLES,), generator=generator))

    def step(self, run: Run, batch: list[Tensor]) -> dict[str, Tensor | float]:
        pictures, labels = batch
        return {"loss": F.cross_entropy(run.model(pictures), labels)}


def cases(options: Options) -> list[Case]:
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else the engine takes the GPU there is
    made = []
    for size, width, side, ema in (
        ("small network", 8, 16, 0.0),
        ("network", 16, 64, 0.0),
        ("network, ema", 16, 64, 0.999),
    ):
        if options.quick and size != "small network":
            continue
        target = () if width == 8 else (Target(OURS, "at most", 1.03, BARE),)
        config = Config.preset(width=width, side=side, ema=ema)
        made.append(
            Case(
                "training engine",
                "step",
                size,
                lambda config=config: _peers(options, config),
                ratio_to=BARE,
                targets=target,
                grad=True,
                seconds=20,
                host=True,
            )
        )
    return made


def _peers(options: Options, config: Config) -> list[Peer]:
    folder = tempfile.TemporaryDirectory()
    ours = Trainer(Classifier(config), folder.name, quiet=True).steps()
    theirs = _bare_loop(Classifier(config), options.device)
    bare = Peer(BARE, lambda: next(theirs), required=True)
    # The folder lives as long as the call.
    return [Peer(OURS, _next(ours, folder), required=True), bare]


def _next(steps: Iterator[object], folder: tempfile.TemporaryDirectory) -> Callable[[], object]:
    return lambda: (next(steps), folder)


def _bare_loop(recipe: Classifier, device: str) -> Iterator[None]:
    """What one would write by hand: the same data, clipping, averaging and mean loss; no files, no checks."""
    config = recipe.config
    model = recipe.model().to(device)
    optimizer = recipe.optimizers(model)
    average = None
    if config.ema:
        averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema)
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging)
    loader = DataLoader(recipe.data(), config.batch_size, shuffle=True, drop_last=True, pin_memory=device == "cuda")
    losses: list[Tensor] = []
    while True:
        for batch in loader:
            pictures, labels = (part.to(device, non_blocking=True) for part in batch)
            loss = F.cross_entropy(model(pictures), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
            losses.append(loss.detach())
            if len(losses) == config.log_every:
                torch.stack(losses).mean().item()
                losses.clear()
            yield
