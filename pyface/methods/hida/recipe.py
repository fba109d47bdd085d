"""Training and evaluation of HIDA: photos, their depth, and sketches by three artists."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from pyface import engine
from pyface.engine import PROCEDURAL, TrainConfig, setting
from pyface.errors import UserError
from pyface.methods.hida import losses
from pyface.methods.hida.depth import rough_head
from pyface.methods.hida.model import HIDA, STYLES, Discriminator, style_weights

PHOTO_SHARE = 250 / 256  # the face crop's part of the network's side; the rest is padding
LOAD_SHARE = 1.117  # training crops are drawn from a picture padded to this multiple of the network's side
TEST_SEED = 1_000_003  # added to the seed: other people than those of training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of one training run.

    ``"default"`` and ``"paper"`` are the authors' settings, for FS2K with depth maps (``data``) and a GPU; with
    procedural faces they train the same network on those. ``"tiny"`` is a network of a sixteenth of the work, on 400
    procedural faces, for two CPU cores. A budget so short needs a plainer objective to tell the styles apart: batches
    hold a photo in all three, gradient directions are compared with the artist's sketch, and pixels weigh more. The
    learning rate is constant for the first half of the run and then falls to 0 in a line, in steps or in minutes.
    """

    method = "hida"
    presets = {
        "default": {},
        "paper": {},
        "tiny": {
            "width": 16, "critic_width": 16, "faces": 400, "rough": 0.4, "flat": 0.1, "jitter": 0.5, "redraw": False,
            "texture_target": "sketch", "pixel": 10.0, "together": True, "epochs": None, "steps": 1200, "batch_size": 3,
            "lr": 1e-3, "clip": 10.0, "ema": 0.99, "checkpoint_every": 200, "validate_every": 600, "validation": 4,
            "log_every": 50,
        },
    }  # fmt: skip

    data: str = setting(PROCEDURAL, "folder of FS2K with a folder depth inside, or procedural")
    epochs: int | None = setting(800, "passes over the data set", free=True)
    batch_size: int = setting(4, "pairs per step, over all processes and accumulated parts")
    lr: float = setting(2e-4, "learning rate of both networks in the first half of the run")
    betas: tuple[float, float] = setting((0.5, 0.999), "AdamW's decay of the first and second moment, per step")
    weight_decay: float = setting(0.01, "AdamW's")
    validate_every: int = setting(
        25, "epochs between validations, or steps where the run is not counted in epochs; 0 validates at the end only",
        free=True,
    )  # fmt: skip
    checkpoint_every: int = setting(0, "steps between checkpoints; 0 writes one after each epoch", free=True)
    width: int = setting(64, "channels of the generator's stems; everything scales with it")
    image_size: int = setting(256, "side of the network's pictures in pixels: 32, 64, 128, 256 or 512")
    critic_width: int = setting(64, "channels of the critic's first layer")
    gain: Literal["1+gamma", "gamma"] = setting("1+gamma", "norm times this: as in the code, or in the paper's figure")
    residual: Literal["post", "pre"] = setting("post", "added after the norm: activated feature (code), or before it")
    deformable: bool = setting(True, "false: ordinary convolutions in the two coarsest decoder blocks (ablation)")
    adaptation: Literal["pixel", "style"] = setting("pixel", "style: only the style steers the decoder (ablation)")
    use_depth: bool = setting(True, "false: depth is 0 everywhere (ablation), and need not be there")
    gan: float = setting(1.0, "weight of the critic's verdict")
    pixel: float = setting(4.0, "weight of the mean absolute difference from the artist's sketch")
    geometry: float = setting(4.0, "weight of the depth reconstruction")
    texture: float = setting(1.0, "weight of the gradient directions")
    texture_target: Literal["photo", "sketch"] = setting("photo", "what gradient directions are compared with")
    balance: float = setting(2.0, "weight of the term that keeps the critic's two means together")
    redraw: bool = setting(True, "the critic's turn crops and draws anew (as published); false takes the generator's")
    together: bool = setting(
        False, "a photo's three sketches follow one another, so that batches compare styles; procedural faces only"
    )
    faces: int = setting(1200, "procedural people to train on, in all three styles; 0.9 MB of disk each at 256 pixels")
    rough: float = setting(0.0, "part of the training pairs whose depth is the rough head of pyface sketch")
    flat: float = setting(0.0, "part of the training pairs whose depth is 0 everywhere")
    jitter: float = setting(0.0, "random changes of the training photos' light, colour and noise; 1 is strong")
    validation: int = setting(16, "procedural people to measure on, in all three styles", free=True)
    inception: str = setting(
        "none", "file of FID's Inception weights (pt_inception-2015-12-05-6726825d.pth), for standard FID", free=True
    )
    inception_torchvision: str = setting(
        "none", "file of torchvision's Inception weights (inception_v3_google-*.pth), for the authors' FID", free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rough", "flat", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"hida: {name} must be from 0 to 1, got {getattr(self, name)}")
        if self.rough + self.flat > 1:
            raise UserError(f"hida: rough and flat are parts of one whole, got {self.rough} + {self.flat}")
        for name in ("faces", "validation"):
            if getattr(self, name) < 1:
                raise UserError(f"hida: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def photo_size(self) -> int:
        """Side of the face crops in pixels: 250 at 256."""
        return round(self.image_size * PHOTO_SHARE)


# --------------------------------------------------------------------------------------------------------------- data

Pair = dict[str, Any]
"""``photo`` Tensor[3, S, S], ``depth`` Tensor[1, S, S], ``sketch`` Tensor[1, S, S], all in [0, 1]; ``style`` 1 to 3."""


def procedural_pairs(config: Config, seed: int, faces: int, *, training: bool) -> Iterator[Pair]:
    """``faces`` procedural people, one photo each, three pairs per photo; in training with some spoilt depth maps."""
    from pyface.data.procedural import ProceduralFaces
    from pyface.data.sketch import sketch

    people = ProceduralFaces(faces, config.photo_size, seed, identities=faces, occluders=False)
    for index in range(faces):
        sample = people[index]
        depth = sample["depth"]
        rng = np.random.default_rng((seed, index, 5))
        for style in range(1, STYLES + 1):
            given = _spoilt(depth, sample["landmarks"], config, rng) if training else depth
            drawn = sketch(sample, style, seed=seed + index)
            yield {"photo": sample["image"], "depth": given, "sketch": drawn, "style": style}


def _spoilt(depth: Tensor, landmarks: Tensor, config: Config, rng: np.random.Generator) -> Tensor:
    kind = rng.random()
    if kind < config.flat:
        return torch.zeros_like(depth)
    if kind < config.flat + config.rough:
        x, y, w, h = face_box(landmarks)
        dx, dy, grown = rng.normal(0, 0.03, 3)
        side = h * (1 + grown)
        return rough_head(*depth.shape[1:], (x + dx * w + (w - side) / 2, y + dy * h + (h - side) / 2, side, side))
    return depth


def face_box(landmarks: Tensor) -> tuple[float, float, float, float]:
    """The box (x, y, width, height) in pixels that a detector would give for landmarks Tensor[68, 2]."""
    brows, chin = float(landmarks[17:27, 1].mean()), float(landmarks[8, 1])
    side = max(chin - brows, 1.0) / 0.51
    centre = float(landmarks[[0, 16], 0].mean())
    return centre - side / 2, brows - 0.33 * side, side, side


def fs2k_pairs(config: Config, split: str) -> Iterator[Pair]:
    """Pairs of an FS2K folder, resized where need be (bilinear, no anti-aliasing, as the authors do)."""
    from pyface.data.sets.fs2k import FS2K

    data = FS2K(config.data, split, drop_incomplete=True)
    if data.dropped:
        warnings.warn(f"{len(data.dropped)} pairs of {split} lack a photo or sketch and are left out", stacklevel=2)
    size = (config.photo_size,) * 2
    for index in range(len(data)):
        sample = data[index]
        if "depth" not in sample:
            if config.use_depth:
                raise UserError(
                    f"hida: {sample['name']} has no depth map in {Path(config.data) / 'depth'}; render one with a face "
                    f"reconstruction such as 3DDFA_V2, or train without depth by --set use_depth=false"
                )
            sample["depth"] = torch.zeros(1, *sample["image"].shape[1:])
        pair = {"photo": sample["image"], "depth": sample["depth"], "sketch": sample["sketch"]}
        for name, value in pair.items():
            if value.shape[1:] != size:
                pair[name] = F.interpolate(value[None], size, mode="bilinear", align_corners=False)[0]
        yield pair | {"style": sample["style"] + 1}


def _count(config: Config) -> int:
    if config.data == PROCEDURAL:
        return config.faces * STYLES
    from pyface.data.sets.fs2k import FS2K

    return len(FS2K(config.data, "train", drop_incomplete=True))


class Pool(Dataset):
    """A run's training pairs, decoded once: ``pixels`` uint8 Tensor[5, S, S] (photo, depth, sketch) and ``style``."""

    def __init__(self, folder: Path, config: Config, quiet: bool) -> None:
        path, names = folder / "pool.npy", folder / "styles.npy"
        if not path.exists():
            from rich.progress import track

            if config.data == PROCEDURAL:
                pairs = procedural_pairs(config, config.seed, config.faces, training=True)
            else:
                pairs = fs2k_pairs(config, "train")
            count, side = _count(config), config.photo_size
            partial = path.with_suffix(".partial")
            pool = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, 5, side, side))
            styles = np.zeros(count, np.int64)
            for index, pair in enumerate(track(pairs, "preparing pictures", total=count, disable=quiet)):
                values = torch.cat([pair[name] for name in ("photo", "depth", "sketch")])
                pool[index] = values.mul(255).round().to(torch.uint8).numpy()
                styles[index] = pair["style"]
            pool.flush()
            np.save(names, styles)
            os.replace(partial, path)
        self.pixels, self.styles = np.load(path, mmap_mode="r"), np.load(names)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": torch.from_numpy(self.pixels[index].copy()), "style": int(self.styles[index])}


def random_windows(pixels: Tensor, size: int) -> Tensor:
    """Flip half of the pairs, pad them with zeros and crop, one draw for photo, depth and sketch alike.

    Args:
        pixels: uint8 Tensor[B, 5, S, S].
        size: of the crop; the padded side is 1.117 times that, rounded up to an even number.

    Returns:
        Tensor[B, 5, size, size] in [0, 1]. Draws from torch's generator.
    """
    padded = 2 * math.ceil(math.ceil(size * LOAD_SHARE) / 2)
    margin = padded - pixels.shape[-1]
    before = margin // 2
    values = F.pad(pixels.float() / 255, (before, margin - before, before, margin - before))
    crops = []
    for one in values:
        flipped, top, left = (int(torch.randint(n, ())) for n in (2, padded - size + 1, padded - size + 1))
        crop = one[:, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if flipped else crop)
    return torch.stack(crops)


def jittered(photo: Tensor, amount: float) -> Tensor:
    """Other light, colours and noise: Tensor[B, 3, H, W] in [0, 1] -> the same. Draws from torch's generator."""

    def draw(spread: float) -> Tensor:
        return 1 + amount * spread * (2 * torch.rand(len(photo), 1, 1, 1, device=photo.device) - 1)

    grey = photo.mean(1, keepdim=True)
    photo = grey + (photo - grey) * (1 - amount * torch.rand(len(photo), 1, 1, 1, device=photo.device))
    photo = photo.clamp(min=0) ** draw(0.8)
    mean = photo.mean((1, 2, 3), keepdim=True)
    photo = mean * draw(0.6) + (photo - mean) * draw(0.6)
    noise = 0.08 * amount * torch.rand(len(photo), 1, 1, 1, device=photo.device) * torch.randn_like(photo)
    return (photo + noise).clamp(0, 1)


def pad_to(image: Tensor, size: int) -> Tensor:
    """Tensor[..., h, w] centred on zeros, Tensor[..., size, size]; what training's padding is on average."""
    height, width = image.shape[-2:]
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(image, (left, size - width - left, top, size - height - top))


@torch.no_grad()
def draw(network: HIDA, photo: Tensor, depth: Tensor, style: Tensor) -> Tensor:
    """Sketches of face crops, padded to the network's size and cut back.

    Args:
        network: in evaluation mode.
        photo: Tensor[B, 3, S, S] in [0, 1], sides at most the network's.
        depth: Tensor[B, 1, S, S] in [0, 1].
        style: Tensor[B, 3].

    Returns:
        Tensor[B, 1, S, S] in [0, 1], on the CPU.
    """
    device = next(network.parameters()).device
    size, (height, width) = network.image_size, photo.shape[-2:]
    photo, depth = (pad_to(value.to(device), size) for value in (photo, depth))
    drawn = network(photo * 2 - 1, depth, style.to(device)).float()
    top, left = (size - height) // 2, (size - width) // 2
    return ((drawn[..., top : top + height, left : left + width] + 1) / 2).clamp(0, 1).cpu()


# ------------------------------------------------------------------------------------------------------------- recipe


class Recipe(engine.Recipe):
    """Training and evaluation of HIDA; generator and critic take turns."""

    Config = Config
    manual = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if _given(config.inception):
            self.best = {"fid": "min"}  # as published; without FID's weights the last step's are the result

    def prepare(self, folder: Path, quiet: bool) -> None:
        """Make the training pairs, ``pool.npy`` and ``styles.npy``."""
        self.pool = Pool(folder, self.config, quiet)

    def model(self) -> nn.Module:
        config = self.config
        generator = HIDA(
            config.width, config.image_size, gain=config.gain, residual=config.residual, deformable=config.deformable,
            adaptation=config.adaptation,
        )  # fmt: skip
        return nn.ModuleDict({"generator": generator, "critic": Discriminator(config.critic_width)})

    def result(self, model: nn.Module) -> nn.Module:
        return model["generator"]

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        return {
            name: torch.optim.AdamW(
                part.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
            )
            for name, part in model.items()
        }

    def data(self) -> Dataset:
        return self.pool

    def order(self, epoch: int, length: int, rng: np.random.Generator) -> Sequence[int]:
        if not self.config.together or self.config.data != PROCEDURAL:
            return rng.permutation(length)
        people = rng.permutation(length // STYLES)
        return (people[:, None] * STYLES + np.arange(STYLES)).ravel()

    def step(self, run: engine.Run, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        config, model = self.config, run.model
        for optimizer in run.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, 2 * (1 - run.progress))
        style = style_weights(batch["style"], len(batch["style"])).to(run.device)

        photo, depth, target = self._windows(batch["pixels"])
        drawn, relief = model["generator"](photo, depth, style, return_depth=True)
        terms = {
            "gan": losses.generator_loss(model["critic"](depth, drawn)),
            "pixel": losses.pixel_loss(drawn, target),
            "geometry": losses.geometry_loss(relief, depth),
            "texture": losses.texture_loss(drawn, photo if config.texture_target == "photo" else target),
        }
        run.backward(sum(getattr(config, name) * term for name, term in terms.items()), run.optimizers["generator"])
        run.update(run.optimizers["generator"])

        if config.redraw:
            photo, depth, target = self._windows(batch["pixels"])
            with torch.no_grad():
                drawn = model["generator"](photo, depth, style)
        verdicts = model["critic"](torch.cat((depth, depth)), torch.cat((target, drawn.detach().to(target.dtype))))
        critic = losses.critic_loss(*verdicts.chunk(2), config.balance)
        run.backward(critic, run.optimizers["critic"])
        run.update(run.optimizers["critic"])
        return terms | {"critic": critic}

    def _windows(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Photo and sketch in [-1, 1], depth in [0, 1]."""
        config = self.config
        photo, depth, target = random_windows(pixels, config.image_size).split((3, 1, 1), 1)
        if config.jitter:
            photo = jittered(photo, config.jitter)
        return photo * 2 - 1, depth if config.use_depth else torch.zeros_like(depth), target * 2 - 1

    def validate(self, network: nn.Module) -> list[engine.Row]:
        """Other procedural people, or FS2K's test split; see :func:`evaluate`."""
        return evaluate(network, self.config)


def evaluate(network: HIDA, config: Config) -> list[engine.Row]:
    """Draw test photos and compare with the artists' sketches, at the size of the face crop, 250 at 256.

    Returns:
        One row per style (FS2K's third has 46 test pairs): ``style``, ``pictures``, means of ``scoot``, ``fsim`` (grey)
        and ``ssim``, all better when higher; with weights at hand, ``lpips`` (AlexNet v0.1, from torch.hub's folder),
        ``fid`` (standard) and ``fid_authors`` (torchvision's Inception, see :func:`authors_features`), all better when
        lower. What has no weights is left out, with a warning.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    from pyface.metrics import fsim, scoot

    if config.data == PROCEDURAL:
        pairs = procedural_pairs(config, config.seed + TEST_SEED, config.validation, training=False)
    else:
        pairs = fs2k_pairs(config, "test")
    device = next(network.parameters()).device
    distances = _distances(config, device)
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for batch in _batches(pairs, 8):
        photo, depth, sketch = (torch.stack([pair[name] for pair in batch]) for name in ("photo", "depth", "sketch"))
        styles = torch.tensor([pair["style"] for pair in batch])
        depth = depth if config.use_depth else torch.zeros_like(depth)
        drawn = draw(network, photo, depth, style_weights(styles, len(styles)))
        for style, one, other in zip(styles.tolist(), drawn, sketch, strict=True):
            rows.setdefault(style, []).append((one, other))
    table = []
    for style, both in sorted(rows.items()):
        drawn, sketch = (torch.stack(pictures) for pictures in zip(*both, strict=True))
        row = {
            "style": style,
            "pictures": len(drawn),
            "scoot": scoot(drawn, sketch).mean().item(),
            "fsim": fsim(drawn, sketch).mean().item(),
            "ssim": float(ssim(drawn, sketch, data_range=1.0)),
        }
        table.append(row | {name: measure(drawn, sketch) for name, measure in distances.items()})
    return table


def _batches(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------- measures that need weights


def _given(file: str) -> bool:
    return file not in ("", "none")


def _distances(config: Config, device: torch.device) -> dict[str, Any]:
    found, missing = {}, []
    alex = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    try:
        import lpips
    except ImportError:
        missing.append("lpips (pip install lpips)")
    else:
        if alex.exists():
            found["lpips"] = _lpips(lpips.LPIPS(net="alex", verbose=False).to(device).eval(), device)
        else:
            missing.append(f"lpips (torchvision's {alex.name} in {alex.parent})")
    if _given(config.inception):
        found["fid"] = _standard_fid(config.inception, device)
    else:
        missing.append("fid (--set inception=FILE)")
    if _given(config.inception_torchvision):
        found["fid_authors"] = _authors_fid(config.inception_torchvision, device)
    else:
        missing.append("fid_authors (--set inception_torchvision=FILE)")
    if missing:
        warnings.warn(f"not measured, because weights are missing: {', '.join(missing)}", stacklevel=3)
    return found


def _lpips(network: nn.Module, device: torch.device) -> Any:
    @torch.no_grad()
    def measure(drawn: Tensor, sketch: Tensor) -> float:
        pairs = zip(drawn.split(8), sketch.split(8), strict=True)
        both = [network(*(x.expand(-1, 3, -1, -1).to(device) * 2 - 1 for x in pair)).flatten() for pair in pairs]
        return torch.cat(both).mean().item()

    return measure


def _standard_fid(file: str, device: torch.device) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=file).to(device)
    except ModuleNotFoundError as error:
        raise UserError(f"standard FID needs torch-fidelity: pip install torch-fidelity ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error

    def measure(drawn: Tensor, sketch: Tensor) -> float:
        metric.reset()
        for real, pictures in ((False, drawn), (True, sketch)):
            for part in pictures.split(16):
                metric.update(part.expand(-1, 3, -1, -1).to(device), real=real)
        return metric.compute().item()

    return measure


def _authors_fid(file: str, device: torch.device) -> Any:
    features = authors_features(file, device)

    def measure(drawn: Tensor, sketch: Tensor) -> float:
        return frechet_distance(features(drawn), features(sketch))

    return measure


def authors_features(file: str, device: torch.device | str = "cpu", batch: int = 10) -> Any:
    """The features of the authors' FID script, by which their numbers must be compared and no others.

    torchvision's Inception on pictures in [0, 1], although its input formula is meant for ImageNet-normalised ones,
    at 299 x 299 (bilinear); 2048 pooled numbers; the last incomplete batch is dropped (if there is another one).

    Args:
        file: torchvision's ``inception_v3_google-*.pth``.
        device: where to compute.
        batch: pictures at a time; 10 as published.

    Returns:
        Callable from Tensor[N, 1, H, W] in [0, 1] to Tensor[M, 2048] float64.

    Raises:
        UserError: the file is not that.
    """
    from torchvision.models import inception_v3

    from pyface.backbones.weights import read_weights

    network = inception_v3(weights=None, init_weights=False, transform_input=True)
    try:
        network.load_state_dict(read_weights(file))
    except RuntimeError as error:
        raise UserError(f"{file} does not hold torchvision's Inception v3: {str(error).splitlines()[0]}") from error
    network.fc = nn.Identity()
    network.eval().to(device)

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        whole = len(pictures) // batch * batch or len(pictures)
        found = []
        for part in pictures[:whole].split(batch):
            large = F.interpolate(part.expand(-1, 3, -1, -1).to(device), (299, 299), mode="bilinear")
            found.append(network(large).double().cpu())
        return torch.cat(found)

    return features


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features.

    ``|mu1 - mu2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))``; the trace of the root comes from singular values of the centred
    features, which needs no matrix root and takes fewer pictures than features: it is the nuclear norm of
    ``A1 A2^T`` with ``Ci = Ai^T Ai``.

    Args:
        first, second: Tensor[N, D] and Tensor[M, D], N and M at least 2.
    """
    if min(len(first), len(second)) < 2:
        return math.nan
    first, second = first.double(), second.double()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (first, second))
    root = torch.linalg.matrix_norm(a @ b.T, "nuc")
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return float(gap + a.square().sum() + b.square().sum() - 2 * root)
