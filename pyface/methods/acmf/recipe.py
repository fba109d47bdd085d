"""Training and evaluation of ACMF: masked frequencies, and the cross-forgery protocol with and without stage 2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from pyface import engine
from pyface.data.protocols import FaceClip, Part, describe, face_clips, families, parse_parts, test_parts
from pyface.engine import PROCEDURAL, TrainConfig, setting
from pyface.errors import UserError
from pyface.methods.acmf.adapt import Adaptation, Adapter
from pyface.methods.acmf.losses import consistency_loss, fake_share
from pyface.methods.acmf.model import ACMF, scaled_maps
from pyface.metrics import VideoAUROC, VideoEqualErrorRate
from pyface.metrics.forensics import best_threshold
from pyface.nn import MaskedFrequency

BATCH = 64  # frames that are judged at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of one training run.

    ``"paper"`` holds the constants of the authors' scripts, as far as they are published (stage 1 is not), for
    FaceForensics++ (``data``), ImageNet weights and a GPU; ``"notebook"`` their notebook's variant with an
    EfficientNet-B4. ``"tiny"`` trains a small ResNet from nothing in a few minutes on two CPU cores. ``"default"`` is
    ``"paper"`` without ImageNet weights.
    """

    method = "acmf"
    presets = {
        "default": {},
        "paper": {"imagenet": "folder"},
        "notebook": {
            "imagenet": "folder", "backbone": "tf_efficientnet_b4", "fac_steps": 1, "fac_scale": 0.1, "flood": 0.0,
            "fac_masked": False, "fac_pool": 1,
        },
        "tiny": {
            "backbone": "test_resnet", "target": "layer3", "image_size": 96, "margin": 0.8, "frames": 4, "videos": 80,
            "test_videos": 24, "test_frames": 4, "epochs": None, "steps": 600, "batch_size": 32, "lr": 4e-3,
            "schedule": "cosine", "precision": "bf16", "validate_every": 200, "checkpoint_every": 200, "log_every": 50,
            "fac_batch": 16, "fac_pool": 4, "fac_lr": 1e-4,
        },
    }  # fmt: skip

    data: str = setting(PROCEDURAL, "folder of a data set of forged videos, or procedural for people made on the spot")
    train_on: str = setting(
        "all", "forgery families of data, data sets, or DATASET:FAMILY, separated by commas; see docs/acmf.md"
    )
    test_on: str = setting(
        "all", "the same for the evaluation; also seen and unseen: families of data that are, or are not, trained on",
        free=True,
    )  # fmt: skip
    epochs: int | None = setting(6, "passes over the real frames, each with as many forged ones", free=True)
    batch_size: int = setting(64, "images per step, over all processes and accumulated parts; half of them forged")
    lr: float = setting(1e-3, "learning rate (peak, where there is a schedule); 2e-4 if it diverges")
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the learning rate over the run")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay of the first and second moment, per step")
    weight_decay: float = setting(0.01, "AdamW's")
    backbone: str = setting("xception", "network of pyface.backbones")
    target: str = setting("none", "module whose output attention is measured at; none takes the backbone's usual one")
    imagenet: str = setting(
        "none", "weights of the backbone to start from: a file, folder for those in PYFACE_WEIGHTS, or none"
    )
    image_size: int = setting(224, "side of the face crops in pixels")
    margin: float = setting(1.3, "side of the face crops in sides of the detected box")
    detector: str = setting("cascade", "face detector, for data sets of whole frames")
    frames: int = setting(50, "frames of each training video, evenly spread")
    videos: int | None = setting(None, "training videos of each family and of real ones, at most (procedural: 40)")
    drop_rate: float = setting(0.1, "share of pixels whose high frequencies are dropped; 0 trains without masking")
    half_width: int = setting(5, "d: the frequencies -d to d-1 count as low")
    per: Literal["batch", "image", "channel"] = setting("batch", "one mask for the whole batch, per image or channel")
    mask_domain: Literal["image", "spectrum"] = setting(
        "image", "drop pixels of the high-frequency image, or frequencies"
    )
    flip: bool = setting(True, "mirror training images at random")
    consistency: float = setting(
        0.0, "weight of the distance between attention on an image and on its masked version, from the second sixth of "
        "training on; not part of the published method, needs no test videos",
    )  # fmt: skip
    test_videos: int | None = setting(
        None, "validation and test videos of each family, at most (procedural: 40)", free=True
    )
    test_frames: int = setting(50, "frames of each validation and test video, evenly spread", free=True)
    fac: bool = setting(
        True, "evaluate with stage 2 (test-time adaptation) as well; it takes most of the time", free=True
    )
    fac_lr: float = setting(1e-3, "stage 2: learning rate", free=True)
    fac_steps: int = setting(2, "stage 2: gradient steps per video", free=True)
    fac_batch: int = setting(30, "stage 2: training images per step", free=True)
    fac_pool: int = setting(16, "stage 2: training batches to choose from, whose attention is measured once", free=True)
    fac_scale: float = setting(1.0, "stage 2: factor of the loss", free=True)
    fac_masked: bool = setting(True, "stage 2: mask the training batch's frequencies", free=True)
    flood: float = setting(0.04, "stage 2: flood level of the classification loss", free=True)
    carry_state: bool = setting(False, "stage 2: as released, keep the optimiser's state between videos", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frames", "test_frames", "fac_steps", "fac_batch", "fac_pool"):
            if getattr(self, name) < 1:
                raise UserError(f"acmf: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.drop_rate <= 1:
            raise UserError(f"acmf: drop_rate must be from 0 to 1, got {self.drop_rate}")
        for name in ("half_width", "consistency", "fac_lr", "flood"):
            if getattr(self, name) < 0:
                raise UserError(f"acmf: {name} must not be negative, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise UserError("acmf: batch_size must be at least 2, one real and one forged image")

    @property
    def adaptation(self) -> Adaptation:
        """Settings of stage 2."""
        return Adaptation(
            steps=self.fac_steps, lr=self.fac_lr, betas=self.betas, weight_decay=self.weight_decay, flood=self.flood,
            scale=self.fac_scale, drop_rate=self.drop_rate if self.fac_masked else 0.0, half_width=self.half_width,
            carry_state=self.carry_state, precision="bf16" if self.precision == "bf16" else "no",
        )  # fmt: skip


class Frames(Dataset):
    """The frames of clips one by one: ``image`` uint8 Tensor[3, S, S], ``label`` 0 real or 1 fake."""

    def __init__(self, clips: Sequence[FaceClip]) -> None:
        self.clips = clips
        self.places = [(clip, frame) for clip, one in enumerate(clips) for frame in range(len(one.faces))]
        self.starts = np.cumsum([0, *(len(one.faces) for one in clips)]).tolist()
        self.fakes: dict[tuple[str, str], list[int]] = {}  # clips by family and person
        for number, one in enumerate(clips):
            if one.label:
                self.fakes.setdefault((one.family, one.identity), []).append(number)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip, frame = self.places[index]
        pixels = np.array(self.clips[clip].faces[frame])
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1), "label": self.clips[clip].label}

    def balanced(self, rng: np.random.Generator) -> np.ndarray:
        """Every real frame once, in random order, each with a forged one; all families alike.

        The forged one is made of the same person at the same moment, where there is such a one: what differs is then
        the forgery alone. Networks that start from nothing hardly learn from pictures that differ in all else as well.
        """
        real = rng.permutation([i for i, (clip, _) in enumerate(self.places) if not self.clips[clip].label])
        names = sorted({family for family, _ in self.fakes})
        chosen = rng.permutation(np.resize(names, len(real)))
        fake = [self._forged(index, family, rng) for index, family in zip(real, chosen)]
        return np.stack((real, fake), 1).ravel()

    def _forged(self, real: int, family: str, rng: np.random.Generator) -> int:
        clip, frame = self.places[real]
        own = self.fakes.get((family, self.clips[clip].identity))
        number = rng.choice(own or [i for (name, _), ones in self.fakes.items() if name == family for i in ones])
        length = len(self.clips[number].faces)
        return self.starts[number] + (min(frame, length - 1) if own else int(rng.integers(length)))


class Recipe(engine.Recipe):
    """Stage 1 trains; stage 2 is part of the evaluation."""

    Config = Config
    best = {"frame_auc": "max"}
    alike = 2  # a real frame and a forged one, mirrored together

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.train_clips: list[FaceClip] | None = None
        self.validation_clips: list[FaceClip] | None = None

    def prepare(self, folder: Path, quiet: bool) -> None:
        """Make the face crops of the training and validation videos, in the folder ``faces``."""
        self.train_clips = self._clips("train", folder, quiet)
        self.validation_clips = self._clips("val", folder, quiet)
        for what, clips in (("training", self.train_clips), ("validation", self.validation_clips)):
            if {clip.label for clip in clips} != {0, 1}:
                raise UserError(
                    f"acmf: the {what} videos are {describe(clips) or 'none'}; both real and fake are needed"
                )

    def _parts(self) -> list[Part]:
        return parse_parts(self.config.train_on, self.config.data)

    def _clips(self, split: str, folder: Path | None = None, quiet: bool = True, **changes: Any) -> list[FaceClip]:
        config, found = self.config, []
        training = split == "train"
        for part in changes.pop("parts", None) or self._parts():
            found += face_clips(
                part, split, size=config.image_size, margin=config.margin,
                frames=config.frames if training else config.test_frames,
                videos=changes.get("videos", config.videos if training else config.test_videos),
                seed=0,  # of the data: runs of different seeds see the same people
                detector=config.detector, cache=None if folder is None else folder / "faces",
                progress=None if quiet else _bar(f"{split} faces"),
            )  # fmt: skip
        return found

    def model(self) -> nn.Module:
        config = self.config
        given = config.imagenet not in ("", "none", "folder")
        network = ACMF(
            config.backbone, config.image_size, target=None if config.target == "none" else config.target,
            weights=config.imagenet if given else None, pretrained=config.imagenet == "folder",
        )  # fmt: skip
        return network.to(memory_format=torch.channels_last)

    def optimizers(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )

    def data(self) -> Dataset:
        return Frames(self.train_clips)

    def order(self, epoch: int, length: int, rng: np.random.Generator) -> Sequence[int]:
        return Frames(self.train_clips).balanced(rng)

    def augment(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if self.config.flip and rng.random() < 0.5:
            sample["image"] = sample["image"].flip(-1)
        return sample

    def step(self, run: engine.Run, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        config, network = self.config, run.model
        if config.schedule == "cosine":
            for group in run.optimizers["main"].param_groups:
                group["lr"] = config.lr * (1 + math.cos(math.pi * run.progress)) / 2
        images = batch["image"].float() / 255
        # A new layer draws its seed from torch's generator, which the engine seeds for every step.
        mask = MaskedFrequency(config.drop_rate, config.half_width, config.per, mask_domain=config.mask_domain)
        masked = mask(images)
        report: dict[str, Tensor | float] = {}
        extra: Tensor | float = 0.0
        if config.consistency and run.progress >= 1 / 6:
            network.eval()
            maps = [scaled_maps(network.attend(x, graph=True)[1], config.image_size).mean(0) for x in (images, masked)]
            network.train()
            report["consistency"] = consistency_loss(*maps)
            extra = config.consistency * report["consistency"]
        logits = network(masked)
        loss = F.cross_entropy(logits.float(), batch["label"])
        right = (logits.argmax(1) == batch["label"]).float().mean()
        return report | {"loss": loss + extra, "accuracy": right}

    def validate(self, network: nn.Module) -> list[engine.Row]:
        """One row: error rates on validation videos of the training families, and the threshold chosen there."""
        clips = self.validation_clips or self._clips("val")
        logits = [judge(network, clip.faces) for clip in clips]
        labels = torch.tensor([clip.label for clip in clips])
        return [
            {"videos": len(clips)}
            | error_rates(clips, logits)
            | {"threshold": best_threshold(video_scores(logits), labels)}
        ]

    def about(self, rows: list[engine.Row]) -> dict[str, str]:
        config, trained, checked = self.config, self.train_clips, self.validation_clips
        about = {
            "backbone": config.backbone, "image_size": str(config.image_size), "margin": str(config.margin),
            "target": ACMF(config.backbone, config.image_size).target if config.target == "none" else config.target,
        }  # fmt: skip
        masked = f"masked frequencies (drop rate {config.drop_rate:g})" if config.drop_rate else "no masking"
        where = "; ".join(map(str, self._parts()))
        if trained is not None:
            about["training"] = f"{where} (train: {describe(trained)} videos), {masked}"
        threshold = rows[0].get("threshold", math.nan) if rows else math.nan
        if checked is not None and math.isfinite(threshold):
            about["threshold"] = f"{threshold:.6f}"
            about["calibration"] = f"{where} (val: {describe(checked)} videos), best balanced accuracy of video scores"
        return about

    def evaluate(self, network: nn.Module) -> list[engine.Row]:
        """The cross-forgery table: one row per tested family, real videos shared.

        Returns:
            ``data``, ``family``, ``trained_on`` (yes or no), ``videos``; of stage 1 ``frame_auc``, ``video_auc``,
            ``video_eer`` and ``video_accuracy`` (at score 0.5); with ``fac`` the same of stage 2 as ``fac_...``.
            Label 1 is fake. A last row has the means.
        """
        adapter = self._adapter(network) if self.config.fac else None
        trained = {part.data: part.families or families(part.data) for part in self._parts()}
        table = []
        for part in test_parts(self.config.train_on, self.config.test_on, self.config.data):
            clips = self._clips("test", parts=[part])
            logits = [judge(network, clip.faces) for clip in clips]
            adapted = None
            if adapter is not None:
                adapted = [adapter(to_images(clip.faces), clip.id) for clip in clips]
            for family in sorted({clip.family for clip in clips} - {"real"}):
                chosen = [index for index, clip in enumerate(clips) if clip.family in ("real", family)]
                some = [clips[index] for index in chosen]
                row = {
                    "data": part.data if part.data == PROCEDURAL else Path(part.data).name, "family": family,
                    "trained_on": "yes" if family in trained.get(part.data, ()) else "no", "videos": len(some),
                }  # fmt: skip
                row |= error_rates(some, [logits[index] for index in chosen])
                if adapted is not None:
                    rates = error_rates(some, [adapted[index] for index in chosen])
                    row |= {f"fac_{name}": value for name, value in rates.items()}
                table.append(row)
        if not table:
            raise UserError(f"acmf: there are no fakes to test on (test_on={self.config.test_on})")
        if len(table) > 1:
            means = {
                name: math.fsum(row[name] for row in table) / len(table)
                for name, value in table[0].items()
                if isinstance(value, float)
            }
            table.append({"data": "mean", "family": "", "trained_on": "", "videos": ""} | means)
        return table

    def _adapter(self, network: nn.Module) -> Adapter:
        config = self.config
        clips = self.train_clips
        if clips is None:
            # Enough videos for the pool of batches, and no more: this is only for the evaluation.
            wanted = config.fac_pool * config.fac_batch
            some = max(2, -(-wanted // (2 * config.frames)))
            clips = self._clips("train", videos=min(some, config.videos or some))
        frames = Frames(clips)
        rng = np.random.default_rng((config.seed, 2))
        order = frames.balanced(rng)
        order = np.resize(order, config.fac_pool * config.fac_batch)
        batches = []
        for chosen in order.reshape(config.fac_pool, config.fac_batch):
            samples = [frames[index] for index in chosen]
            images = torch.stack([sample["image"] for sample in samples]).float() / 255
            batches.append((images, torch.tensor([sample["label"] for sample in samples])))
        return Adapter(network, batches, config.adaptation, seed=config.seed)


def _bar(title: str) -> Any:
    def wrapped(items: Sequence[Any]) -> Any:
        from rich.progress import track

        return track(items, title, total=len(items))

    return wrapped


# --------------------------------------------------------------------------------------------------------- evaluation


def to_images(faces: np.ndarray) -> Tensor:
    """uint8 ndarray[T, S, S, 3] -> Tensor[T, 3, S, S] in [0, 1]."""
    return torch.from_numpy(np.array(faces)).permute(0, 3, 1, 2).contiguous().float() / 255


@torch.no_grad()
def judge(network: nn.Module, faces: np.ndarray) -> Tensor:
    """Logits Tensor[T, 2] (real, fake) of plain frames, on the CPU; the network is in evaluation mode."""
    device = next(network.parameters()).device
    return torch.cat([network(part.to(device)).float().cpu() for part in to_images(faces).split(BATCH)])


def video_scores(logits: Sequence[Tensor]) -> Tensor:
    """Score of each video, Tensor[V] float64, of its frames' logits Tensor[T, 2]: that of their mean."""
    return fake_share(torch.stack([one.double().mean(0) for one in logits]))


def error_rates(clips: Sequence[FaceClip], logits: Sequence[Tensor]) -> dict[str, float]:
    """``frame_auc``, ``video_auc``, ``video_eer`` and ``video_accuracy`` by the authors' rules.

    Args:
        clips: the videos.
        logits: of each, Tensor[T, 2] (real, fake).

    Returns:
        Rates in [0, 1]; NaN where they need both labels and one is absent.
    """
    video_auc, video_eer = VideoAUROC("sigmoid_ratio"), VideoEqualErrorRate("sigmoid_ratio")
    frame_auc, counted = VideoAUROC("mean"), 0
    for index, (clip, one) in enumerate(zip(clips, logits, strict=True)):
        labels = torch.full((len(one),), clip.label)
        for metric in (video_auc, video_eer):
            metric.update(one, labels, [index] * len(one))
        # Every frame is a video of its own: the frame protocol.
        frame_auc.update(fake_share(one), labels, list(range(counted, counted + len(one))))
        counted += len(one)
    right = (video_scores(logits) >= 0.5) == torch.tensor([clip.label == 1 for clip in clips])
    return {
        "frame_auc": float(frame_auc.compute()), "video_auc": float(video_auc.compute()),
        "video_eer": float(video_eer.compute()), "video_accuracy": float(right.float().mean()),
    }  # fmt: skip
