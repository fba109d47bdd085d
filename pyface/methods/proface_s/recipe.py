"""Training and evaluation of PRO-Face S, on pictures made on the spot, for storage as 8-bit PNG."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyface.data.obfuscators import obfuscate, obfuscator
from pyface.data.scenes import scene
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


@dataclasses.dataclass
class Config:
    """Settings of one training run; :meth:`preset` gives the named ones.

    Training ends at ``steps`` or after ``max_minutes`` of wall time, whichever comes first; the learning rate follows
    a cosine over the part of the way that is gone, so it ends low either way.

    Attributes:
        objective: ``"deployable"`` (pictures pass an 8-bit file on their way), or ``"random_wr"`` / ``"obfuscated_wr"``
            as released (they do not).
        data: folder of photographs to train on; None paints scenes.
        scenes, scene_size: number and side in pixels of the training pairs, made once per run folder.
        odd_strengths: part of the pairs whose obfuscation is much weaker or stronger than the training range, as in
            a small or large face.
        stages: ``(until, crop, batch)`` triples; ``until`` is the fraction of the way at which a stage ends.
        augment: flip and turn the crops at random.
        lr, lr_end, warmup: peak and final learning rate, and steps of linear increase at the beginning.
        clip: largest norm of the gradient.
        ema: decay per step of the averaged weights, which are the result; 0 takes the last ones.
        wrong_every: the wrong-key term joins every so many steps (right and wrong recovery then share one pass).
        protected_psnr, wrong_psnr, protected_weight, wrong_weight, leak_weight: see
            :func:`~.losses.deployable_loss`.
        leak_from: part of the way after which the leak term joins; the shipped weights learned to recover first.
        init_std: standard deviation of the initial weights.
        subnet: ``"bfloat16"`` or ``"float32"``, arithmetic of the sub-nets while training.
        validation_size: side in pixels of the photographs that the run is measured on.
    """

    objective: str = "deployable"
    data: str | None = None
    scenes: int = 1200
    scene_size: int = 256
    odd_strengths: float = 0.3
    steps: int = 40_000
    max_minutes: float | None = 92.0
    stages: tuple[tuple[float, int, int], ...] = ((0.7, 64, 4), (1.0, 128, 2))
    augment: bool = True
    lr: float = 2e-3
    lr_end: float = 1e-5
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    wrong_every: int = 2
    protected_psnr: float = 40.0
    wrong_psnr: float = 10.0
    protected_weight: float = 2.0
    wrong_weight: float = 1.0
    leak_weight: float = 0.5
    leak_from: float = 0.25
    init_std: float = 0.01
    subnet: str = "bfloat16"
    seed: int = 0
    workers: int = 2
    checkpoint_every: int = 500
    validate_every: int = 1500
    validation_size: int = 256
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.objective not in _OBJECTIVES:
            raise UserError(f"proface_s: unknown objective {self.objective!r}; known: {', '.join(_OBJECTIVES)}")
        if self.subnet not in ("bfloat16", "float32"):
            raise UserError(f"proface_s: subnet must be bfloat16 or float32, got {self.subnet!r}")
        if min(self.steps, self.scenes, self.wrong_every, self.workers) < 1 or not (self.max_minutes or 1) > 0:
            raise UserError("proface_s: steps, scenes, wrong_every, workers and max_minutes must be positive")
        if (
            not self.stages
            or self.stages[-1][0] != 1
            or any(crop % 2 or not 2 <= crop <= self.scene_size or batch < 1 for _, crop, batch in self.stages)
        ):
            raise UserError(
                f"proface_s: every stage is (until, crop, batch) with an even crop of at most {self.scene_size}, "
                f"and the last one ends at 1; got {self.stages}"
            )

    @classmethod
    def preset(cls, name: str, **changes: object) -> Config:
        """A named preset with some settings changed.

        ``"default"`` has the objective, the data and the schedule of the shipped weights (two CPU cores; they were
        made in several sittings, see their card); ``"tiny"`` walks the whole path in a few minutes;
        ``"published"`` has the settings of the authors' script, for their photographs (``data``) and a GPU.
        """
        if name not in _PRESETS:
            raise UserError(f"proface_s: unknown preset {name!r}; known: {', '.join(_PRESETS)}")
        return cls(**(_PRESETS[name] | changes))


_OBJECTIVES = ("deployable", "random_wr", "obfuscated_wr")
_PRESETS: dict[str, dict] = {
    "default": {},
    "tiny": {
        "scenes": 48, "scene_size": 128, "steps": 400, "max_minutes": None, "stages": ((1.0, 64, 2),), "warmup": 20,
        "ema": 0.98, "checkpoint_every": 100, "validate_every": 400, "validation_size": 128, "log_every": 20,
    },
    "published": {
        "objective": "random_wr", "scenes": 20_000, "odd_strengths": 0.0, "steps": 300_000, "max_minutes": None,
        "stages": ((1.0, 256, 6),), "augment": False, "lr": 1e-5, "lr_end": 1e-5, "warmup": 1, "betas": (0.9, 0.999),
        "eps": 1e-6, "weight_decay": 1e-5, "ema": 0.0, "wrong_every": 1, "subnet": "float32",
        "checkpoint_every": 1000, "validate_every": 5000,
    },
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- pictures


def _pair(task: tuple[Config, int, str | None]) -> np.ndarray:
    """One training pair (picture, obfuscated), uint8 [2, size, size, 3]."""
    config, index, file = task
    torch.set_num_threads(1)
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
            return np.asarray(ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC))
    except OSError as error:
        raise UserError(f"cannot read {file} as a picture: {error}; take it out of the training folder") from error


def _files(config: Config) -> list[str | None]:
    """One entry per training pair: a photograph's path, or None for a painted scene."""
    if config.data is None:
        return [None] * config.scenes
    files = sorted(str(p) for p in Path(config.data).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise UserError(f"{config.data} holds no .jpg, .jpeg or .png file; give a folder of photographs")
    # A fixed draw, so that a part of a sorted collection does not stand for all of it.
    return list(np.random.default_rng(config.seed).permutation(files)[: config.scenes])


def _pool(folder: Path, config: Config, quiet: bool) -> np.ndarray:
    """The run's training pairs, a memory map uint8 [N, 2, S, S, 3], built on first use."""
    path = folder / "pool.npy"
    if not path.exists():
        from rich.progress import track

        tasks = [(config, index, file) for index, file in enumerate(_files(config))]
        partial = path.with_suffix(".partial")
        shape = (len(tasks), 2, config.scene_size, config.scene_size, 3)
        pool = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        with ProcessPoolExecutor(config.workers, get_context("spawn")) as executor:
            pairs = executor.map(_pair, tasks, chunksize=8)
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


class _Run:
    """Everything that a checkpoint holds: weights, their average, optimiser moments, step and elapsed seconds."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.path = config, folder / "state.safetensors"
        torch.manual_seed(config.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = ProFaceS(subnet_dtype=getattr(torch, config.subnet))
        self.model.reset_parameters(config.init_std)
        self.model.to(self.device)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), config.lr, config.betas, config.eps, config.weight_decay, fused=True
        )
        self.step, self.earlier = 0, 0.0
        self.started = time.monotonic()
        if self.path.exists():
            self._load()

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """Fraction of the way that is gone, 0 to 1."""
        part = self.step / self.config.steps
        if self.config.max_minutes is not None:
            part = max(part, self.seconds / (60 * self.config.max_minutes))
        return min(part, 1.0)

    def learning_rate(self) -> float:
        config = self.config
        rate = config.lr_end + (config.lr - config.lr_end) * (1 + math.cos(math.pi * self.progress)) / 2
        return rate * min(1.0, (self.step + 1) / max(1, config.warmup))

    def save(self) -> None:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"ema.{name}"] = self.average[name]
            moments = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if key in moments:
                    tensors[f"{key}.{name}"] = moments[key].detach().clone()
        about = {"step": self.step, "seconds": self.seconds, "config": dataclasses.asdict(self.config)}
        _write_tensors(self.path, tensors, {"about": json.dumps(about)})

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {key: file.get_tensor(key).to(self.device) for key in file.keys()}
        self.step, self.earlier = about["step"], about["seconds"]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"ema.{name}"])
                if f"step.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                    }

    @torch.no_grad()
    def update_average(self) -> None:
        # A short memory at first, so that the average does not drag the initial weights along.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter, 1 - decay)

    def averaged_model(self) -> ProFaceS:
        model = ProFaceS(subnet_dtype=self.model.subnet_dtype).to(self.device)
        model.load_state_dict(self.average)
        return model.eval()


def _train_step(run: _Run, pool: np.ndarray, perceptual: Perceptual | None) -> dict[str, float]:
    config, step = run.config, run.step
    # Batches and keys depend on (seed, step) alone, so a resumed run sees what an unbroken one would have seen.
    rng = np.random.default_rng((config.seed, step, 2))
    crop, batch = next((c, b) for until, c, b in config.stages if run.progress <= until)
    image, hidden = (t.to(run.device) for t in _batch(pool, crop, batch, config.augment, rng))
    key = random_key_map(batch, crop, crop, rng).to(run.device)
    rate = run.learning_rate()
    for group in run.optimizer.param_groups:
        group["lr"] = rate

    released = config.objective != "deployable"
    protected = run.model.protect(image, hidden, key)
    stored = protected if released else store_8bit(protected)
    draw_wrong = random_key_map if released else wrong_key_map
    other_key = draw_wrong(batch, crop, crop, rng).to(run.device)
    wrong = None
    if released or step % config.wrong_every == 0:
        both = run.model.recover(torch.cat((stored, stored)), torch.cat((key, other_key)))
        recovered, wrong = both.chunk(2)
    else:
        recovered = run.model.recover(stored, key)
    if released:
        objective = random_wr_loss if config.objective == "random_wr" else obfuscated_wr_loss
        loss, report = objective(image, hidden, stored, recovered, wrong, perceptual=perceptual)
    else:
        loss, report = deployable_loss(
            image, hidden, stored, recovered, wrong,
            protected_psnr=config.protected_psnr, wrong_psnr=config.wrong_psnr,
            protected_weight=config.protected_weight, wrong_weight=config.wrong_weight,
            leak_weight=config.leak_weight if run.progress >= config.leak_from else 0.0,
        )  # fmt: skip
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
    if torch.isfinite(norm):
        run.optimizer.step()
    run.step += 1
    run.update_average()
    return report | {"loss": loss.item(), "norm": norm.item()}


def train(config: Config, out: str | Path, *, perceptual: Perceptual | None = None, quiet: bool = False) -> ProFaceS:
    """Train, or go on with the run in ``out``; killing it at any moment loses at most ``checkpoint_every`` steps.

    Writes ``config.json``, ``pool.npy`` (training pairs), ``state.safetensors`` (weights, average, optimiser),
    ``log.csv`` and ``validation.csv``. Uses the GPU if there is one. The same settings give the same run, step by step,
    unless ``max_minutes`` decides its end.

    Args:
        config: settings. A run that exists must have been started with the same ones.
        out: folder of the run, created if need be.
        perceptual: the released objectives' perceptual distance, see :func:`~.losses.random_wr_loss`.
        quiet: no progress bar.

    Returns:
        The network with the averaged weights.

    Raises:
        UserError: the folder holds a run with other settings, or there is nothing to train on.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(dataclasses.asdict(config), indent=1)
    record = folder / "config.json"
    if record.exists() and record.read_text() != settings:
        raise UserError(f"{folder} holds a run with other settings; give another folder, or the same settings")
    record.write_text(settings)

    pool = _pool(folder, config, quiet)
    run = _Run(config, folder)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"),
                   TimeElapsedColumn(), TextColumn("{task.fields[left]}"), disable=quiet)  # fmt: skip
    with bar, _Log(folder / "log.csv", run.step) as log, _Log(folder / "validation.csv", run.step) as validation:
        task = bar.add_task("training", total=1.0, completed=run.progress, left="")
        reports: dict[str, list[float]] = {}
        photographs = validation_pictures(config.validation_size)
        begun, at = run.progress, time.monotonic()
        while run.progress < 1:
            for name, value in _train_step(run, pool, perceptual).items():
                reports.setdefault(name, []).append(value)
            if run.step % config.log_every == 0:
                means = {name: float(np.mean(values)) for name, values in sorted(reports.items())}
                reports.clear()
                log.write({"step": run.step, "minutes": run.seconds / 60, "lr": run.learning_rate(), **means})
                left = (1 - run.progress) * (time.monotonic() - at) / max(run.progress - begun, 1e-9) / 60
                shown = "  ".join(f"{name} {value:.2f}" for name, value in means.items() if name != "norm")
                bar.update(task, completed=run.progress, left=f"{left:.0f} min left",
                           description=f"step {run.step}  {shown}")  # fmt: skip
            done = run.progress >= 1
            if run.step % config.validate_every == 0 or done:
                for row in evaluate(run.averaged_model(), photographs):
                    validation.write({"step": run.step, "minutes": run.seconds / 60, **row})
            if run.step % config.checkpoint_every == 0 or done:
                run.save()
    return run.averaged_model()


def export(model: ProFaceS, path: str | Path, about: dict[str, str] | None = None) -> None:
    """Write a model's weights as safetensors, complete or not at all; ``about`` goes into the file's metadata."""
    _write_tensors(Path(path), {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, about)


def _write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None) -> None:
    from safetensors.torch import save

    temporary = path.with_name(path.name + ".partial")
    # Plain bytes, because safetensors' own writer makes files that only their owner can read.
    temporary.write_bytes(save(tensors, about))
    os.replace(temporary, path)


class _Log:
    """A CSV file that grows row by row; rows after ``step``, from a run that was killed, are dropped when it opens."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= step]
            with path.open("w", newline="") as file:
                csv.writer(file).writerows(kept)
        self.path = path

    def __enter__(self) -> _Log:
        self.file = self.path.open("a", newline="")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, row: dict[str, object]) -> None:
        if self.file.tell() == 0:
            csv.writer(self.file).writerow(row)
        csv.writer(self.file).writerow([f"{v:.5g}" if isinstance(v, float) else v for v in row.values()])
        self.file.flush()
