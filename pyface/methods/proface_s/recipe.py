"""Training and evaluation of PRO-Face S, on pictures made on the spot, for storage as 8-bit PNG."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pyface import engine
from pyface.data.obfuscators import obfuscate, obfuscator
from pyface.data.scenes import scene
from pyface.engine import PROCEDURAL, TrainConfig, setting
from pyface.errors import UserError
from pyface.methods.proface_s.losses import (
    Perceptual,
    deployable_loss,
    leak,
    obfuscated_wr_loss,
    random_wr_loss,
    store_8bit,
)
from pyface.methods.proface_s.model import ProFaceS

OBFUSCATORS = ("blur", "pixelate", "median")
VGG = "vgg16-397923af.pth"  # torchvision's, which LPIPS looks for


Stage = tuple[float, int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of one training run.

    The learning rate follows a cosine over the part of the way that is gone, in steps or in minutes, so it ends low
    either way. ``"default"`` has the objective, the data and the schedule of the shipped weights (two CPU cores; they
    were made in several sittings, see their card); ``"tiny"`` walks the whole path in a few minutes; ``"paper"`` has
    the settings of the authors' script, for their photographs (``data``) and a GPU.
    """

    method = "proface_s"
    presets = {
        "default": {},
        "tiny": {
            "scenes": 48, "scene_size": 128, "steps": 400, "max_minutes": None, "stages": ((1.0, 64, 1.0),),
            "batch_size": 2, "warmup": 20, "ema": 0.98, "checkpoint_every": 100, "validate_every": 400,
            "validation_size": 128, "log_every": 20,
        },
        "paper": {
            "objective": "random_wr", "scenes": 20_000, "odd_strengths": 0.0, "steps": 300_000, "max_minutes": None,
            "stages": ((1.0, 256, 1.0),), "batch_size": 6, "augment": False, "lr": 1e-5, "lr_end": 1e-5, "warmup": 1,
            "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 1e-5, "ema": 0.0, "wrong_every": 1,
            "subnet": "float32", "checkpoint_every": 1000, "validate_every": 5000,
        },
    }  # fmt: skip

    data: str = setting(PROCEDURAL, "folder of photographs to train on, or procedural to paint scenes")
    steps: int | None = setting(40_000, "optimiser steps of the whole run", free=True)
    max_minutes: float | None = setting(92.0, "minutes of training, over all sittings", free=True)
    batch_size: int = setting(4, "pairs per step, over all processes and accumulated parts")
    lr: float = setting(2e-3, "peak learning rate")
    lr_end: float = setting(1e-5, "final learning rate")
    warmup: int = setting(100, "steps of linear increase of the learning rate at the beginning")
    betas: tuple[float, float] = setting((0.9, 0.99), "Adam's decay of the first and second moment, per step")
    eps: float = setting(1e-8, "Adam's epsilon")
    weight_decay: float = setting(0.0, "Adam's L2 penalty")
    clip: float = setting(1.0, "largest norm of the gradient; 0 does not clip")
    ema: float = setting(0.999, "decay per step of the averaged weights, which are the result; 0 takes the last ones")
    workers: int = setting(2, "processes that prepare the training pairs; 0 prepares them in this one", free=True)
    validate_every: int = setting(1500, "steps between validations; 0 validates at the end only", free=True)
    validation_size: int = setting(256, "side in pixels of the photographs that the run is measured on")
    objective: Literal["deployable", "random_wr", "obfuscated_wr"] = setting(
        "deployable", "deployable (pictures pass an 8-bit file), or as released, random_wr or obfuscated_wr"
    )
    perceptual: bool = setting(True, "the released objectives' LPIPS terms; false leaves them out")
    scenes: int = setting(1200, "number of training pairs, made once per run")
    scene_size: int = setting(256, "side of the training pairs in pixels")
    odd_strengths: float = setting(
        0.3, "part of the pairs whose obfuscation is much weaker or stronger than in training, as in odd-sized faces"
    )
    stages: tuple[Stage, ...] = setting(
        ((0.7, 64, 1.0), (1.0, 128, 0.5)),
        "[until, crop, part]: up to which fraction of the way, side of the crops in pixels, part of batch_size",
    )
    augment: bool = setting(True, "flip and turn the crops at random")
    wrong_every: int = setting(2, "steps from one with the wrong-key term to the next (it shares the right key's pass)")
    protected_psnr: float = setting(40.0, "dB above which the protected picture is close enough to the obfuscated one")
    wrong_psnr: float = setting(10.0, "dB below which the wrong recovery is far enough from the picture")
    protected_weight: float = setting(2.0, "slope of the protected picture's hinge, relative to the recovery term")
    wrong_weight: float = setting(1.0, "slope of the wrong recovery's hinge, relative to the recovery term")
    leak_weight: float = setting(0.5, "weight of the leak term")
    leak_from: float = setting(0.25, "part of the way after which the leak term joins; first the network must recover")
    init_std: float = setting(0.01, "standard deviation of the initial weights")
    subnet: Literal["bfloat16", "float32"] = setting("bfloat16", "arithmetic of the sub-nets while training")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.scenes, self.wrong_every) < 1:
            raise UserError("proface_s: scenes and wrong_every must be positive")
        if (
            not self.stages
            or self.stages[-1][0] != 1
            or any(crop % 2 or not 2 <= crop <= self.scene_size for _, crop, _ in self.stages)
            or any(self.batch_size * part < 1 or self.batch_size * part % 1 for _, _, part in self.stages)
        ):
            raise UserError(
                f"proface_s: every stage is [until, crop, part] with an even crop of at most {self.scene_size} and a "
                f"part that makes batch_size a whole number, and the last one ends at 1; got {self.stages}"
            )


# ----------------------------------------------------------------------------------------------------------- pictures


def _pair(task: tuple[Config, int, str | None]) -> np.ndarray:
    """One training pair (picture, obfuscated), uint8 [2, size, size, 3]."""
    config, index, file = task
    if file is None:
        picture = scene(config.seed, index, config.scene_size)
    else:
        picture = _photograph(file, config.scene_size)
    rng = np.random.default_rng((config.seed, index, 1))
    name = OBFUSCATORS[index % len(OBFUSCATORS)]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    image = _to_tensor(picture[None])
    if rng.random() >= config.odd_strengths:
        hidden = obfuscate(image, name, generator=generator)
    else:
        hidden = obfuscate(image, name, obfuscator(name).strength * math.exp(rng.uniform(math.log(0.1), math.log(2))))
    return np.stack((picture, _to_bytes(hidden)[0]))


def _photograph(file: str, size: int) -> np.ndarray:
    """The central square of a photograph, resized, uint8 [size, size, 3]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            photo = ImageOps.exif_transpose(opened).convert("RGB")
            return np.array(ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC))
    except OSError as error:
        raise UserError(f"cannot read {file} as a picture: {error}; take it out of the training folder") from error


def _photographs(config: Config) -> list[str]:
    """Photographs of the training folder in a fixed random order, so that a part does not stand for all of it."""
    files = sorted(str(p) for p in Path(config.data).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise UserError(f"{config.data} holds no .jpg, .jpeg or .png file; give a folder of photographs")
    return list(np.random.default_rng(config.seed).permutation(files))


def _held_out(config: Config) -> list[str]:
    """The last of them, one in ten and at most 16, are kept from training."""
    files = [] if config.data == PROCEDURAL else _photographs(config)
    return files[len(files) - min(16, len(files) // 10) :]


def _files(config: Config) -> list[str | None]:
    """One entry per training pair: a photograph's path, or None for a painted scene."""
    if config.data == PROCEDURAL:
        return [None] * config.scenes
    files = _photographs(config)
    return list(files[: len(files) - len(_held_out(config))][: config.scenes])


def _pool(folder: Path, config: Config, quiet: bool) -> np.ndarray:
    """The run's training pairs, a memory map uint8 [N, 2, S, S, 3], built on first use."""
    path = folder / "pool.npy"
    if not path.exists():
        from rich.progress import track

        tasks = [(config, index, file) for index, file in enumerate(_files(config))]
        partial = path.with_suffix(".partial")
        shape = (len(tasks), 2, config.scene_size, config.scene_size, 3)
        pool = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        with contextlib.ExitStack() as stack:
            if config.workers:
                executor = ProcessPoolExecutor(
                    config.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
                )
                pairs = stack.enter_context(executor).map(_pair, tasks, chunksize=8)
            else:
                pairs = map(_pair, tasks)
            for index, pair in enumerate(track(pairs, "preparing pictures", total=len(tasks), disable=quiet)):
                pool[index] = pair
        pool.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def _batch(pool: np.ndarray, crop: int, batch: int, augment: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops (pictures, obfuscated), two Tensor[batch, 3, crop, crop]."""
    limit = pool.shape[2] - crop + 1
    pairs = []
    for index in rng.integers(len(pool), size=batch):
        top, left = rng.integers(limit, size=2)
        pair = pool[index, :, top : top + crop, left : left + crop]
        if augment:
            pair = np.rot90(pair, rng.integers(4), (1, 2))[:, :, :: rng.choice((-1, 1))]
        pairs.append(pair)
    both = np.stack(pairs, 1)
    return _to_tensor(both[0]), _to_tensor(both[1])


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> Tensor[B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _to_bytes(image: Tensor) -> np.ndarray:
    """Tensor[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _through_png(image: Tensor) -> Tensor:
    """The picture as it comes back from a real 8-bit PNG file, Tensor[B, 3, H, W]."""
    from PIL import Image

    back = []
    for pixels in _to_bytes(image):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        with Image.open(file) as opened:
            back.append(np.asarray(opened.convert("RGB")))
    return _to_tensor(np.stack(back)).to(image.device)


def random_key_map(batch: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Fair signs for training and evaluation only (deployment derives them from a secret), Tensor[batch, 1, H, W]."""
    return torch.from_numpy(rng.integers(0, 2, (batch, 1, height, width)) * 2 - 1).float()


def wrong_key_map(batch: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """What somebody without the key may feed the network, Tensor[batch, 1, H, W]: half the time fair signs, else a map
    that is no key at all. Trained on signs alone, the network notices signs that disagree, and opens to a map of zeros.
    """
    maps = []
    for _ in range(batch):
        signs = random_key_map(1, height, width, rng)
        kind = rng.choice(
            ("signs", "weak", "constant", "checker", "zeros", "normal", "blocks"),
            p=(0.4, 0.1, 0.2, 0.1, 0.05, 0.05, 0.1),
        )
        if kind == "weak":
            signs = signs * rng.random()
        elif kind == "constant":
            signs = torch.full_like(signs, np.clip(rng.uniform(-2, 2), -1, 1))
        elif kind == "checker":
            parity = torch.arange(height)[:, None] + torch.arange(width)
            signs = (signs[0, 0, 0, 0] * (1 - 2 * (parity % 2))).expand_as(signs)
        elif kind == "zeros":
            signs = torch.zeros_like(signs)
        elif kind == "normal":
            signs = torch.from_numpy(rng.standard_normal(signs.shape)).float() * rng.random()
        elif kind == "blocks":
            rows, cols = (int(rng.integers(1, 9)) for _ in range(2))
            signs = signs.repeat_interleave(rows, 2)[:, :, :height].repeat_interleave(cols, 3)[..., :width]
        maps.append(signs)
    return torch.cat(maps)


def validation_pictures(size: int = 256) -> dict[str, Tensor]:
    """Photographs that training never sees, Tensor[1, 3, size, size] in [-1, 1]; ``lfw`` is four small grey faces.

    They come with scikit-image: portrait (astronaut), coffee, cat (chelsea), rocket and ``lfw_subset`` (25 pixels a
    side, four of them side by side, enlarged to ``size``).
    """
    from skimage import data
    from skimage.transform import resize

    centres = {"astronaut": (128, 224), "coffee": (200, 300), "chelsea": (140, 225), "rocket": (213, 320)}
    pictures = {}
    for name, (row, column) in centres.items():
        photo = getattr(data, name)()
        # The largest square around the centre that holds `size` or as much as the photograph has.
        side = min(size, *photo.shape[:2])
        top = min(max(row - side // 2, 0), photo.shape[0] - side)
        left = min(max(column - side // 2, 0), photo.shape[1] - side)
        crop = photo[top : top + side, left : left + side]
        if side != size:
            crop = np.rint(resize(crop, (size, size), order=3, preserve_range=True).clip(0, 255)).astype(np.uint8)
        pictures[name] = _to_tensor(crop[None])
    faces = data.lfw_subset()[[0, 25, 50, 75]]
    mosaic = np.vstack((np.hstack(faces[:2]), np.hstack(faces[2:])))
    mosaic = resize(mosaic, (size, size), order=3).clip(0, 1)
    pictures["lfw"] = _to_tensor(np.rint(mosaic * 255).astype(np.uint8)[None, ..., None].repeat(3, -1))
    return pictures


# --------------------------------------------------------------------------------------------------------- evaluation


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in [-1, 1], on the [0, 1] scale after clamping, data range 1."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).double().square().mean().item() / 4
    return math.inf if error == 0 else -10 * math.log10(error)


@torch.no_grad()
def evaluate(
    model: ProFaceS,
    pictures: dict[str, Tensor] | None = None,
    obfuscators: Iterable[str] = OBFUSCATORS,
    seed: int = 0,
) -> list[dict[str, str | float]]:
    """Protect every picture with every obfuscator, store it as 8-bit PNG, read it back and recover it.

    Args:
        model: the network; evaluated as it stands (set ``model.subnet_dtype`` before).
        pictures: name -> Tensor[1, 3, H, W] in [-1, 1]; None takes :func:`validation_pictures`.
        obfuscators: names; each at its fixed deployment strength.
        seed: of the key maps.

    Returns:
        One row per picture and obfuscator: ``picture``, ``obfuscator``, and PSNR in dB ``recovered`` (right key,
        against the picture), ``protected`` (against the obfuscated picture) and ``wrong`` (the best of four wrong
        keys, against the picture); and two values of :func:`~.losses.leak`: ``leak`` of the mean of the four wrong
        recoveries, ``keyless`` the worst over maps that need no secret (all 0, all 1, a checkerboard).
    """
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device
    rows = []
    for picture_name, image in (validation_pictures() if pictures is None else pictures).items():
        image = image.to(device)
        for name in obfuscators:
            hidden = obfuscate(image, name)
            key, *wrong_keys = (random_key_map(1, *image.shape[2:], rng).to(device) for _ in range(5))
            stored = _through_png(model.protect(image, hidden, key))
            # One by one: a batch would need that many times the memory on large pictures.
            wrong = [model.recover(stored, wrong_key) for wrong_key in wrong_keys]
            checkerboard = (torch.arange(key.numel(), device=device) % 2 * 2 - 1.0).view_as(key)
            checkerboard[..., 1::2, :] *= -1
            open_maps = (torch.zeros_like(key), torch.ones_like(key), checkerboard)
            rows.append(
                {
                    "picture": picture_name,
                    "obfuscator": name,
                    "recovered": psnr(model.recover(stored, key), image),
                    "protected": psnr(stored, hidden),
                    "wrong": max(psnr(one, image) for one in wrong),
                    "leak": leak(torch.stack(wrong).mean(0), image).item(),
                    "keyless": max(leak(model.recover(stored, one), image).item() for one in open_maps),
                }
            )
    return rows


# ----------------------------------------------------------------------------------------------------------- training


class Recipe(engine.Recipe):
    """Training and evaluation of PRO-Face S.

    Args:
        config: settings.
        perceptual: the released objectives' perceptual distance, see :func:`~.losses.random_wr_loss`; None takes LPIPS
            on VGG-16, as published, if ``config.perceptual`` asks for it.
    """

    Config = Config

    def __init__(self, config: Config, perceptual: Perceptual | None = None) -> None:
        super().__init__(config)
        self.perceptual = perceptual

    def prepare(self, folder: Path, quiet: bool) -> None:
        """Make the training pairs, ``pool.npy``."""
        if self.perceptual is None and self.config.perceptual and self.config.objective != "deployable":
            self.perceptual = _vgg_lpips()
        self.pool = _pool(folder, self.config, quiet)

    def model(self) -> ProFaceS:
        model = ProFaceS(subnet_dtype=getattr(torch, self.config.subnet))
        model.reset_parameters(self.config.init_std)
        return model

    def optimizers(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.Adam(
            model.parameters(), config.lr, config.betas, config.eps, config.weight_decay, fused=True
        )

    def step(self, run: engine.Run, batch: None) -> dict[str, Tensor | float]:
        config, step, model = self.config, run.step, run.model
        # Batches and keys depend on (seed, step) alone, and every process takes its share of them.
        rng = np.random.default_rng((config.seed, step, 2))
        crop, count = next((c, round(config.batch_size * p)) for until, c, p in config.stages if run.progress <= until)
        mine = run.share(count)
        image, hidden = (t[mine].to(run.device) for t in _batch(self.pool, crop, count, config.augment, rng))
        key = random_key_map(count, crop, crop, rng)[mine].to(run.device)
        for group in run.optimizers["main"].param_groups:
            group["lr"] = self._learning_rate(run)

        released = config.objective != "deployable"
        protected = model.protect(image, hidden, key)
        stored = protected if released else store_8bit(protected)
        draw_wrong = random_key_map if released else wrong_key_map
        other_key = draw_wrong(count, crop, crop, rng)[mine].to(run.device)
        wrong = None
        if released or step % config.wrong_every == 0:
            both = model.recover(torch.cat((stored, stored)), torch.cat((key, other_key)))
            recovered, wrong = both.chunk(2)
        else:
            recovered = model.recover(stored, key)
        if released:
            objective = random_wr_loss if config.objective == "random_wr" else obfuscated_wr_loss
            loss, report = objective(image, hidden, stored, recovered, wrong, perceptual=self._distance(run))
        else:
            loss, report = deployable_loss(
                image, hidden, stored, recovered, wrong,
                protected_psnr=config.protected_psnr, wrong_psnr=config.wrong_psnr,
                protected_weight=config.protected_weight, wrong_weight=config.wrong_weight,
                leak_weight=config.leak_weight if run.progress >= config.leak_from else 0.0,
            )  # fmt: skip
        return {"loss": loss} | report

    def _learning_rate(self, run: engine.Run) -> float:
        config = self.config
        rate = config.lr_end + (config.lr - config.lr_end) * (1 + math.cos(math.pi * run.progress)) / 2
        return rate * min(1.0, (run.step + 1) / max(1, config.warmup))

    def _distance(self, run: engine.Run) -> Perceptual | None:
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(run.device)
        return self.perceptual

    def validate(self, network: nn.Module) -> list[engine.Row]:
        """Photographs never trained on, read back from 8-bit PNG; see :func:`evaluate`."""
        return evaluate(network, validation_pictures(self.config.validation_size))

    def evaluate(self, network: nn.Module) -> list[engine.Row]:
        """As :meth:`validate`; from a folder of photographs, those that training leaves out."""
        files = _held_out(self.config)
        if not files:
            return self.validate(network)
        pictures = {Path(file).name: _to_tensor(_photograph(file, self.config.validation_size)[None]) for file in files}
        return evaluate(network, pictures)


def _vgg_lpips() -> Perceptual:
    """The perceptual distance of the released objectives."""
    try:
        import lpips
    except ImportError:
        raise UserError(
            "the released objectives need LPIPS: pip install lpips; or leave it out with --set perceptual=false"
        ) from None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / VGG).exists():
        raise UserError(
            f"LPIPS needs VGG-16's weights for ImageNet: put https://download.pytorch.org/models/{VGG} into {folder}; "
            f"or leave it out with --set perceptual=false"
        )
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
