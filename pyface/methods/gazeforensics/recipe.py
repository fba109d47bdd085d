"""Training and evaluation: the gaze network (``stage=teacher``) and the detector that learns from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from pyface import engine
from pyface.backbones import create_backbone
from pyface.data.protocols import FaceClip, Part, describe, face_clips, families, parse_parts, test_parts
from pyface.engine import PROCEDURAL, TrainConfig, setting
from pyface.errors import UserError
from pyface.methods.gazeforensics import losses
from pyface.methods.gazeforensics.clips import clip_quota, epoch_order, evaluation_clips, paired_order, training_frames
from pyface.methods.gazeforensics.model import FRAMES, GazeForensics, GazeNetwork, prepared
from pyface.methods.gazeforensics.teacher import GazeFaces, GazeLabels, embeddings, load_teacher

REFERENCE_BATCH = 32  # the learning rate is for this many clips, and scales with the batch
OTHER_PEOPLE = 1_000_003  # added to the seed: the gaze network is measured on faces that it was not trained on
VALIDATION_FACES = 256
_TEACHER = {"stage": "teacher", "epochs": 25, "batch_size": 32, "lr": 1e-4, "schedule": "step", "warm": 0.2,
            "augment": True}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of one training run.

    ``"default"`` and ``"paper"`` are those of the code on the paper's date; ``"rework"`` has the crop and the start of
    the later one. ``"teacher"`` trains the gaze network alone. ``"tiny"`` is a small trunk on small procedural faces,
    for two CPU cores; it trains its own teacher first.
    """

    method = "gazeforensics"
    presets = {
        "default": {},
        "paper": {},
        "rework": {"crop": "central", "init": "gaze"},
        "teacher": _TEACHER,
        "tiny": {
            "trunk": "test_resnet", "image_size": 80, "margin": 0.8, "heads": 4, "head_width": 32, "init": "gaze",
            "frames": 14, "videos": 60, "validation": 8, "tests": 8, "share": 1.0, "pairs": True, "epochs": None,
            "steps": 300, "batch_size": 8, "lr": 4e-3, "schedule": "step", "warm": 0.1, "teacher_faces": 2000,
            "teacher_steps": 800, "teacher_lr": 4e-3, "teacher_augment": False, "precision": "bf16",
            "validate_every": 100, "checkpoint_every": 100, "log_every": 20,
        },
    }  # fmt: skip

    epochs: int | None = setting(25, "passes over the part of the clips that an epoch takes")
    batch_size: int = setting(32, "clips of 14 frames (teacher: pictures) per step")
    lr: float = setting(7e-5, "peak learning rate for 32 clips; it is scaled with the batch")
    checkpoint_every: int = setting(0, "steps between checkpoints; 0 writes one after each epoch", free=True)
    stage: Literal["detector", "teacher"] = setting("detector", "what is trained")
    train_on: str = setting("all", "forgery families of data, or data sets, to train on; separated by commas")
    test_on: str = setting(
        "all", "the same, to test on; also seen and unseen: families that are or are not trained on", free=True
    )
    cache: str = setting(
        "none", "folder to keep face crops in; none takes the run's, and memory when testing", free=True
    )
    detector: str = setting("cascade", "how faces are found in videos")
    margin: float = setting(1.2, "side of the face crop in sides of the detected box")
    frames: int = setting(300, "first frames of each video that are used")
    videos: int | None = setting(
        None, "real videos, and fakes of each family, to train on; none for all (procedural: 40)"
    )
    validation: int | None = setting(None, "the same, to choose the weights by")
    tests: int | None = setting(None, "the same, to test on", free=True)
    cap: int = setting(
        0, "most clips of one training video: 36 for FaceForensics++, 8 for WildDeepfake; 0 for no limit"
    )
    share: float = setting(0.2, "part of the training clips that each epoch takes")
    pairs: bool = setting(
        False, "each clip of a real video comes with one of a fake of the same person; false draws them apart (paper)"
    )
    trunk: str = setting("resnet18", "backbone of both networks, by timm's name")
    image_size: int = setting(224, "side of the networks' pictures in pixels")
    crop: Literal["full", "central"] = setting("full", "of the face crop: all (paper), or the central 79 % (2024)")
    leaky: int = setting(32, "lambda, features per frame that are not tied to the gaze; 0 for the variant without")
    gaze_weight: float = setting(4.0, "mu at the beginning; 0 for the variant without a gaze loss")
    gaze_decay: float = setting(0.01, "mu at the end, as a part of that at the beginning")
    frozen: bool = setting(False, "variant: the teacher's embedding itself instead of a learnt one")
    heads: int = setting(8, "of the attention over frames")
    head_width: int = setting(64, "features per head")
    compressed: int = setting(32, "features per frame that are classified")
    init: str = setting(
        "imagenet",
        "start of the trunk: imagenet (resnet18.pth in PYFACE_WEIGHTS), gaze (the teacher's), none, or a file",
    )
    teacher: str = setting("train", "gaze network: a run or file; train makes one on procedural faces first")
    teacher_faces: int = setting(20_000, "procedural faces to train a gaze network on")
    teacher_steps: int = setting(10_000, "steps of the gaze network that teacher=train makes")
    teacher_lr: float = setting(1e-4, "its peak learning rate")
    teacher_augment: bool = setting(True, "and whether its pictures change in crop, colours and size")
    cached: bool = setting(
        True, "embed all frames before training; false asks the teacher at every step (the same result)"
    )
    augment: bool = setting(
        False,
        "random crops and colours for the student while its teacher sees plain pictures; stage=teacher: and sizes",
    )
    smooth: tuple[float, float] = setting((0.0, 0.0), "label smoothing: targets move by the first plus U[0, second)")
    schedule: Literal["epoch", "step"] = setting("epoch", "the one-cycle learning rate moves after each (as published)")
    warm: float = setting(0.3, "part of the run in which the learning rate rises")
    weight_decay: float = setting(0.01, "AdamW's")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("videos", "validation", "tests", "frames", "teacher_faces", "teacher_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"gazeforensics: {name} must be at least 1, got {value}")
        if not 0 < self.share <= 1 or not 0 < self.warm < 1 or not 0 < self.gaze_decay <= 1:
            raise UserError(
                f"gazeforensics: share and gaze_decay must be above 0 and at most 1, warm between 0 and 1; got "
                f"{self.share}, {self.gaze_decay} and {self.warm}"
            )
        if self.gaze_weight < 0 or self.cap < 0 or self.leaky < 0 or min(self.smooth) < 0:
            raise UserError("gazeforensics: gaze_weight, cap, leaky and smooth must not be negative")
        if self.schedule == "epoch" and (self.epochs is None or self.epochs < 2):
            raise UserError("gazeforensics: schedule=epoch needs at least 2 epochs; set epochs, or schedule=step")


class Clips(Dataset):
    """Training videos by index: ``[i]`` is the video's number; :meth:`Recipe.augment` draws a clip of it."""

    def __init__(self, videos: Sequence[FaceClip]) -> None:
        self.videos = list(videos)
        self.labels = [video.label for video in self.videos]
        self.people = [video.identity for video in self.videos]
        self.lengths = [len(video.faces) for video in self.videos]
        self.starts = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> int:
        return index


class Recipe(engine.Recipe):
    """GazeForensics, or its teacher."""

    Config = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.is_teacher = config.stage == "teacher"
        self.alike = 2 if config.pairs and not self.is_teacher else 1
        self.best = {"angular_error": "min"} if self.is_teacher else {"auc": "max"}
        self.teacher: GazeNetwork | None = None
        self.known: Tensor | None = None
        self.start: dict[str, Tensor] | None = None
        self._validation: list[FaceClip] | None = None
        self._settings: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------------------ data

    def prepare(self, folder: Path, quiet: bool) -> None:
        """Face crops, the teacher and its embeddings of them; or the gaze network's faces."""
        config = self.config
        if self.is_teacher:
            self.gaze = self._gaze_data("train", folder, quiet)
            return
        cache = folder / "crops" if config.cache == "none" else Path(config.cache)
        self.clips = Clips(self._videos(config.train_on, "train", config.videos, cache, quiet))
        self.quota = clip_quota(self.clips.lengths, self.clips.labels, config.cap)
        self._validation = self._videos(config.train_on, "val", config.validation, cache, quiet)
        if config.gaze_weight or config.frozen or config.init == "gaze":
            self.teacher = self._teacher(folder, quiet)
            if config.cached and (config.gaze_weight or config.frozen):
                self.known = embeddings(
                    folder / "embeddings.safetensors", self.teacher, self.clips.videos, size=config.image_size,
                    crop=config.crop, quiet=quiet,
                )  # fmt: skip
        if config.init == "gaze":
            self.start = self.teacher.trunk.state_dict()
        elif config.init != "none":
            file = None if config.init == "imagenet" else config.init
            self.start = create_backbone(config.trunk, weights=file, pretrained=True).state_dict()

    def _videos(
        self, text: str, split: str, count: int | None, cache: Path | None, quiet: bool = True
    ) -> list[FaceClip]:
        parts = parse_parts(text, self.config.data)
        return [clip for part in parts for clip in self._part(part, split, count, cache, quiet)]

    def _part(
        self, part: Part, split: str, count: int | None, cache: Path | None, quiet: bool = True
    ) -> list[FaceClip]:
        from rich.progress import track

        config = self.config
        return face_clips(
            part, split, size=config.image_size, margin=config.margin, frames=config.frames, step=1, videos=count,
            detector=config.detector, cache=cache,
            progress=lambda jobs: track(jobs, f"reading videos ({split})", disable=quiet),
        )  # fmt: skip

    def _teacher(self, folder: Path, quiet: bool) -> GazeNetwork:
        config = self.config
        if config.teacher != "train":
            return load_teacher(config.teacher, config.trunk)
        from pyface.engine import Trainer
        from pyface.engine.run import processes

        own = folder / "teacher"
        if not (own / f"{config.method}.safetensors").exists():
            if processes().num_processes > 1:
                raise UserError(
                    "gazeforensics: several processes cannot train the teacher on the way; train it first by 'pyface "
                    "train gazeforensics --preset teacher', and give its folder by --set teacher=FOLDER"
                )
            changes = _TEACHER | {
                "data": PROCEDURAL, "epochs": None, "steps": config.teacher_steps, "lr": config.teacher_lr,
                "teacher_faces": config.teacher_faces, "trunk": config.trunk, "image_size": config.image_size,
                "crop": config.crop, "margin": config.margin, "augment": config.teacher_augment,
                "precision": config.precision, "seed": config.seed, "validate_every": 0, "checkpoint_every": 500,
            }  # fmt: skip
            recipe = Recipe(Config.preset("teacher", **changes))
            Trainer(recipe, own, resume=True, quiet=quiet).fit()
        return load_teacher(own, config.trunk)

    def _gaze_data(self, split: str, folder: Path | None, quiet: bool = True) -> Dataset:
        config = self.config
        if config.data != PROCEDURAL:
            return GazeLabels(config.data, split, config.image_size)
        if split == "train":
            return GazeFaces(config.teacher_faces, config.image_size, config.seed, config.margin, folder, quiet)
        return GazeFaces(VALIDATION_FACES, config.image_size, config.seed + OTHER_PEOPLE, config.margin)

    def data(self) -> Dataset:
        return self.gaze if self.is_teacher else self.clips

    def order(self, epoch: int, length: int, rng: np.random.Generator) -> Sequence[int]:
        if self.is_teacher:
            return rng.permutation(length)
        if self.config.pairs:
            return paired_order(self.quota, self.clips.labels, self.clips.people, self.config.share, rng)
        return epoch_order(self.quota, self.clips.labels, self.config.share, rng)

    def augment(self, sample: Any, rng: np.random.Generator) -> Any:
        """A clip of a video, mirrored or not, with the teacher's embeddings; pictures for the teacher as they are."""
        if self.is_teacher:
            return sample
        video = self.clips.videos[sample]
        places = training_frames(len(video.faces), rng)
        mirrored = bool(rng.random() < 0.5)
        clip: dict[str, Any] = {
            "pixels": torch.from_numpy(video.faces[places]).permute(0, 3, 1, 2),
            "mirrored": mirrored,
            "label": video.label,
        }
        if self.known is not None:
            clip["gaze"] = self.known[int(mirrored), places + self.clips.starts[sample]]
        return clip

    # -------------------------------------------------------------------------------------------------------- training

    def model(self) -> nn.Module:
        config = self.config
        if self.is_teacher:
            return GazeNetwork(config.trunk).to(memory_format=torch.channels_last)
        width = GazeNetwork(config.trunk).width if self.teacher is None else self.teacher.width
        network = GazeForensics(
            config.trunk, gaze=width, leaky=config.leaky, heads=config.heads, head_width=config.head_width,
            compressed=config.compressed, frozen=config.frozen, angles=True,
        )  # fmt: skip
        self._settings = network.settings()
        if self.teacher is not None:
            network.angles.load_state_dict(self.teacher.angles.state_dict())
            # Without the gaze loss z_gaze is no embedding of the teacher's, and its heads would read nothing off it.
            if not config.gaze_weight and not config.frozen:
                network.angles.known.fill_(False)
            if config.frozen:
                network.teacher.load_state_dict(self.teacher.trunk.state_dict())
        if self.start is not None and network.trunk is not None:
            network.trunk.load_state_dict(self.start)
        return network.to(memory_format=torch.channels_last)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        groups = {"backbone": [], "classifier": []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                own = self.is_teacher or name.startswith(("trunk.", "embedding."))
                groups["backbone" if own else "classifier"].append(parameter)
        return {
            name: torch.optim.AdamW(values, self._lr(), weight_decay=config.weight_decay, fused=True)
            for name, values in groups.items()
            if values
        }

    def _lr(self) -> float:
        return self.config.lr * self.config.batch_size / REFERENCE_BATCH

    def schedulers(self, run: engine.Run) -> list[tuple[OneCycleLR, Literal["step", "epoch"]]]:
        config = self.config
        total = config.epochs if config.schedule == "epoch" else run.steps
        if total is None:
            raise UserError("gazeforensics: the one-cycle schedule needs to know the run's length; set steps or epochs")
        return [
            (OneCycleLR(optimizer, self._lr(), total, pct_start=config.warm, div_factor=1e3), config.schedule)
            for optimizer in run.optimizers.values()
        ]

    def step(self, run: engine.Run, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        return self._gaze_step(run, batch) if self.is_teacher else self._clip_step(run, batch)

    def _gaze_step(self, run: engine.Run, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        config = self.config
        images = batch["pixels"].float() / 255
        degrees = batch["degrees"].clone()
        if config.augment:
            images = degraded(changed(images, 1, area=(0.7, 1.0), ratio=(0.8, 1.3), colours=0.25))
        mirrored = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        degrees[:, 1] = torch.where(mirrored, -degrees[:, 1], degrees[:, 1])
        pitch, yaw = run.model(prepared(images, config.image_size, config.crop))
        terms = {"pitch": losses.angle_loss(pitch, degrees[:, 0]), "yaw": losses.angle_loss(yaw, degrees[:, 1])}
        return {"loss": sum(terms.values()), **terms}

    def _clip_step(self, run: engine.Run, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        config = self.config
        pixels = batch["pixels"].flatten(0, 1)
        mirrored = batch["mirrored"].repeat_interleave(FRAMES)[:, None, None, None]
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        plain = images = prepared(pixels, config.image_size, config.crop)
        if config.augment:
            values = changed(pixels.float() / 255, FRAMES, area=(0.7, 1.0), ratio=(0.8, 1.3), colours=0.2)
            images = prepared(values, config.image_size, config.crop)
        target = batch.get("gaze")
        if target is None and (config.gaze_weight or config.frozen):
            self.teacher.to(run.device)
            with torch.no_grad():
                target = self.teacher.embed(plain).unflatten(0, (-1, FRAMES))
        logits, z = run.model(images.unflatten(0, (-1, FRAMES)), target if config.frozen else None)
        verdict = losses.classification_loss(logits, batch["label"], config.smooth)
        right = ((logits[:, 0] > logits[:, 1]) == (batch["label"] == 1)).float().mean()
        report = {"verdict": verdict, "accuracy": right}
        if not config.gaze_weight or config.frozen:
            return {"loss": verdict, **report}
        gone = run.epoch / config.epochs if config.schedule == "epoch" else run.progress
        mu = losses.gaze_weight(config.gaze_weight, config.gaze_decay, gone)
        gaze = losses.gaze_loss(z, target)
        return {"loss": verdict + mu * gaze, "gaze": gaze, "mu": mu, **report}

    # ------------------------------------------------------------------------------------------------------ evaluation

    def validate(self, network: nn.Module) -> list[engine.Row]:
        """Videos of people that training never saw, forged as the training videos; or faces with their gaze."""
        from pyface.metrics.forensics import best_threshold

        if self.is_teacher:
            return [self._gaze_row(network, "val")]
        if self._validation is None:
            self._validation = self._videos(self.config.train_on, "val", self.config.validation, self._own_cache())
        scores = self.scores(network, self._validation)
        means = torch.tensor([own.mean() for own in scores], dtype=torch.float64)
        labels = torch.tensor([video.label for video in self._validation])
        return [measures(self._validation, scores) | {"threshold": best_threshold(means, labels)}]

    def evaluate(self, network: nn.Module) -> list[engine.Row]:
        """One row per forgery family of ``test_on`` with the real videos of its data set, and one per data set."""
        if self.is_teacher:
            return [self._gaze_row(network, "test")]
        rows = []
        for part in test_parts(self.config.train_on, self.config.test_on, self.config.data):
            videos = self._part(part, "test", self.config.tests, self._own_cache())
            scores = self.scores(network, videos)
            names = part.families or families(part.data)
            for name in names:
                chosen = [i for i, video in enumerate(videos) if not video.label or video.family == name]
                about = {"data": Path(part.data).name, "family": name}
                rows.append(about | measures([videos[i] for i in chosen], [scores[i] for i in chosen]))
            if len(names) > 1:
                rows.append({"data": Path(part.data).name, "family": "all of them"} | measures(videos, scores))
        return rows

    def about(self, rows: list[engine.Row]) -> dict[str, str]:
        """How to build the network, what it was trained on, and the threshold with the data it comes from."""
        config = self.config
        if self.is_teacher:
            return {"network": json.dumps({"stage": "teacher", "trunk": config.trunk})}
        network = {
            "trunk": config.trunk, "image_size": config.image_size, "crop": config.crop, "margin": config.margin,
        } | self._settings  # fmt: skip
        parts = "; ".join(map(str, parse_parts(config.train_on, config.data)))
        said = {
            "network": json.dumps(network),
            "training": f"{describe(self.clips.videos)} videos of {parts}",
        }
        threshold = rows[0].get("threshold") if rows else None
        if threshold is not None and np.isfinite(threshold):
            said["threshold"] = f"{threshold:.6g}"
            said["calibration"] = f"validation videos ({describe(self._validation)}) of {parts}"
        return said

    def _own_cache(self) -> Path | None:
        return None if self.config.cache == "none" else Path(self.config.cache)

    def scores(self, network: nn.Module, videos: Sequence[FaceClip]) -> list[np.ndarray]:
        return [score_video(network, video.faces, self.config.image_size, self.config.crop)[1] for video in videos]

    @torch.no_grad()
    def _gaze_row(self, network: nn.Module, split: str) -> engine.Row:
        from pyface.metrics import AngularError

        data, error = self._gaze_data(split, None), AngularError()
        device = next(network.parameters()).device
        for start in range(0, len(data), 64):
            samples = [data[i] for i in range(start, min(start + 64, len(data)))]
            pixels = torch.stack([sample["pixels"] for sample in samples]).to(device)
            truth = torch.stack([sample["degrees"] for sample in samples]).deg2rad()
            error.update(network.gaze(prepared(pixels, self.config.image_size, self.config.crop)).cpu(), truth)
        return {"pictures": len(data), "angular_error": error.compute().item()}


# ------------------------------------------------------------------------------------------------------- what is shared


@torch.no_grad()
def score_video(
    network: GazeForensics, faces: np.ndarray, size: int, crop: str, batch: int = 64
) -> tuple[list[list[int]], np.ndarray]:
    """The clips that a video is tested on, and the probability that each is fake.

    Args:
        network: in evaluation mode.
        faces: ndarray[T, S, S, 3] uint8.
        size, crop: see :func:`~pyface.methods.gazeforensics.model.prepared`.

    Returns:
        positions of 14 frames for each clip, ndarray[clips] float64.
    """
    clips = evaluation_clips(len(faces))
    device = next(network.parameters()).device
    # A frame of several clips goes through the trunk once.
    wanted = sorted({place for clip in clips for place in clip})
    found = []
    for start in range(0, len(wanted), batch):
        pixels = torch.from_numpy(faces[wanted[start : start + batch]]).permute(0, 3, 1, 2)
        found.append(network.embed(prepared(pixels.to(device), size, crop)))
    where = {place: index for index, place in enumerate(wanted)}
    places = torch.tensor([[where[place] for place in clip] for clip in clips], device=device)
    logits = network.classify(torch.cat(found)[places])
    return clips, losses.fake_probability(logits).double().cpu().numpy()


def measures(videos: Sequence[FaceClip], scores: Sequence[np.ndarray]) -> engine.Row:
    """Counts, and accuracy of clips and videos, area under the ROC curve and equal error rate of videos."""
    from pyface.metrics import ClipAccuracy, VideoAccuracy, VideoAUROC, VideoEqualErrorRate

    metrics = {"accuracy": VideoAccuracy(), "auc": VideoAUROC(), "eer": VideoEqualErrorRate()}
    clips = ClipAccuracy()
    for number, (video, own) in enumerate(zip(videos, scores, strict=True)):
        values, labels = torch.from_numpy(own), torch.full((len(own),), video.label)
        clips.update(values, labels)
        for metric in metrics.values():
            metric.update(values, labels, [number] * len(own))
    return {
        "real": sum(not video.label for video in videos),
        "fake": sum(video.label for video in videos),
        "clip_accuracy": clips.compute().item(),
        **{name: metric.compute().item() for name, metric in metrics.items()},
    }


def changed(
    values: Tensor, frames: int, *, area: tuple[float, float], ratio: tuple[float, float], colours: float
) -> Tensor:
    """Random crops, enlarged again, and other brightness, contrast and saturation; one draw for ``frames`` pictures.

    Args:
        values: Tensor[N, 3, S, S] in [0, 1], N a multiple of ``frames``. Draws from torch's generator.
        frames: pictures in a row that are changed alike.
        area: range of the part that is cut out.
        ratio: range of its width over its height; its logarithm is uniform.
        colours: factors are uniform in [1 - colours, 1 + colours].
    """
    groups = len(values) // frames

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(groups, device=values.device)

    part, shape = uniform(*area).sqrt(), (uniform(*np.log(ratio).tolist()) / 2).exp()
    width, height = (part * shape).clamp(max=1), (part / shape).clamp(max=1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    zero = torch.zeros_like(x)
    maps = torch.stack((width, zero, x, zero, height, y), 1).view(-1, 2, 3).repeat_interleave(frames, 0)
    grid = F.affine_grid(maps, values.shape, align_corners=False)
    values = F.grid_sample(values, grid, padding_mode="border", align_corners=False)
    light, contrast, colour = (
        uniform(1 - colours, 1 + colours).repeat_interleave(frames)[:, None, None, None] for _ in range(3)
    )
    values = (values * light).clamp(0, 1)
    grey = (values * values.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
    mean = grey.mean((1, 2, 3), keepdim=True)
    values = (mean + (values - mean) * contrast).clamp(0, 1)
    grey = (values * values.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
    return (grey + (values - grey) * colour).clamp(0, 1)


def degraded(values: Tensor, least: int = 32) -> Tensor:
    """Each picture brought to a random side from ``least`` pixels up to its own, and back."""
    side = values.shape[-1]
    if side <= least:
        return values
    pictures = []
    for picture in values.split(1):
        small = int(torch.randint(least, side + 1, ()))
        picture = F.interpolate(picture, (small, small), mode="bilinear", antialias=True, align_corners=False)
        pictures.append(F.interpolate(picture, (side, side), mode="bilinear", align_corners=False))
    return torch.cat(pictures)
