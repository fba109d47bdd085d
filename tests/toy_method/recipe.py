"""Recipes of every kind the engine serves, on a regression from four numbers to one."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import torch
from torch import nn

from pyface import engine
from pyface.engine import TrainConfig, setting

LENGTH = 70


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hidden:
    width: int = setting(8, "units")
    dropout: float = setting(0.0, "part of the units that is dropped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    method = "toy_method"
    presets = {"default": {}, "tiny": {"epochs": 1, "hidden": {"width": 3}}}

    epochs: int | None = setting(3, "passes over the numbers", free=True)
    batch_size: int = setting(8, "numbers per step")
    lr: float = setting(3e-2, "learning rate")
    hidden: Hidden = setting(Hidden, "the hidden layer")
    noise: float = setting(0.1, "standard deviation of the noise on the inputs")
    die_at: int | None = setting(None, "step in which the process kills itself", free=True)
    sizes: tuple[tuple[int, float], ...] = setting(((1, 0.5), (2, 1.0)), "pairs that nothing uses")


class Numbers(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(LENGTH, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.x[index].sum(), "index": index}


class Regression(engine.Recipe):
    """Automatic mode, a data set, augmentation, schedules per step and per epoch, selection of the best."""

    Config = Config
    best = {"error": "min"}

    def model(self):
        hidden = self.config.hidden
        return nn.Sequential(
            nn.Linear(4, hidden.width), nn.Tanh(), nn.Dropout(hidden.dropout), nn.Linear(hidden.width, 1)
        )

    def optimizers(self, model):
        return torch.optim.AdamW(model.parameters(), self.config.lr)

    def schedulers(self, run):
        (optimizer,) = run.optimizers.values()
        return [
            (torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.lr, total_steps=run.steps + 1), "step"),
            (torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.7), "epoch"),
        ]

    def data(self):
        return Numbers()

    def augment(self, sample, rng):
        noise = torch.from_numpy(rng.standard_normal(4)).float() + torch.randn(4)
        return sample | {"x": sample["x"] + self.config.noise * noise}

    def loss(self, model, batch):
        return (model(batch["x"])[:, 0] - batch["y"]).square().mean()

    def step(self, run, batch):
        if run.step == self.config.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"loss": self.loss(run.model, batch), "progress": run.progress}

    @torch.no_grad()
    def validate(self, network):
        assert not network.training
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 4))).float()
        return [{"error": (network(x)[:, 0] - x.sum(1)).square().mean().item()}]


Recipe = Regression
