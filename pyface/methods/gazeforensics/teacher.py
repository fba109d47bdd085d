"""Data for the gaze network, and its embeddings of a data set, computed once."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyface.backbones.weights import read_weights
from pyface.data.images import read_photo, replacing
from pyface.errors import UserError
from pyface.methods.gazeforensics.model import GazeNetwork, prepared

BOX = 0.79
"""Side of the detected box in sides of a procedural photo."""
LIMITS = {"train": 180.0, "val": 90.0, "test": 90.0}
"""Largest |pitch| and |yaw| in degrees that are kept, as L2CS-Net does on Gaze360."""
_COLUMNS = "face, left eye, right eye, name, 3-D gaze, 2-D gaze (pitch,yaw in radians)"


class GazeLabels(Dataset):
    """Gaze360 as L2CS-Net prepares it: ``Label/SPLIT.label`` and face crops under ``Image``.

    A label file has a header, then a line per picture of columns separated by spaces: path of the face crop, left eye,
    right eye, name, 3-D gaze, 2-D gaze as ``pitch,yaw`` in radians. Pictures beyond :data:`LIMITS` are left out.

    ``[i]``: dict of ``pixels`` (uint8 Tensor[3, S, S]) and ``degrees`` (float32 Tensor[2], pitch and yaw).

    Args:
        root: of the data set.
        split: "train", "val" or "test".
        size: side S of the pictures in pixels.

    Raises:
        UserError: a file is missing, or a line cannot be read.
    """

    def __init__(self, root: str | os.PathLike, split: str, size: int) -> None:
        self.root, self.size = Path(root), size
        if split not in LIMITS:
            raise UserError(f"gaze labels: no split {split!r}; there are {', '.join(LIMITS)}")
        file = self.root / "Label" / f"{split}.label"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()[1:]
        except OSError as error:
            raise UserError(
                f"gaze labels: cannot read {file} ({error.strerror or error}); expected a folder with "
                f"Label/train.label and Image, as L2CS-Net prepares Gaze360"
            ) from error
        self.samples: list[tuple[str, float, float]] = []
        for number, line in enumerate(lines, 2):
            if not line.strip():
                continue
            columns = line.split()
            try:
                pitch, yaw = (float(np.rad2deg(float(angle))) for angle in columns[5].split(","))
            except (IndexError, ValueError) as error:
                raise UserError(f"gaze labels: line {number} of {file} does not read {_COLUMNS}: {line!r}") from error
            if max(abs(pitch), abs(yaw)) <= LIMITS[split]:
                self.samples.append((columns[0], pitch, yaw))
        if not self.samples:
            raise UserError(f"gaze labels: {file} lists no pictures within {LIMITS[split]:g} degrees")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name, pitch, yaw = self.samples[index]
        pixels = torch.from_numpy(read_photo(self.root / "Image" / name).pixels.copy()).permute(2, 0, 1)
        if pixels.shape[1:] != (self.size, self.size):
            small = torch.nn.functional.interpolate(
                pixels[None].float(), (self.size, self.size), mode="bilinear", antialias=True
            )
            pixels = small[0].round().clamp(0, 255).to(torch.uint8)
        return {"pixels": pixels.contiguous(), "degrees": torch.tensor([pitch, yaw])}


class GazeFaces(Dataset):
    """Procedural faces with their gaze, rendered once into ``folder`` (or into memory); samples as above.

    ``margin`` is the side of the crop in sides of the face's box, as videos are cropped.
    """

    def __init__(
        self, count: int, size: int, seed: int, margin: float, folder: Path | None = None, quiet: bool = True
    ) -> None:
        files = [] if folder is None else [folder / "gaze-faces.npy", folder / "gaze-degrees.npy"]
        if not files or not all(file.exists() for file in files):
            faces, degrees = _rendered(count, size, seed, margin, quiet)
            for file, values in zip(files, (faces, degrees)):
                with replacing(file, overwrite=True) as temporary, open(temporary, "wb") as stream:
                    np.save(stream, values)
        if files:
            faces, degrees = np.load(files[0], mmap_mode="r"), np.load(files[1])
        self.faces, self.degrees = faces, degrees

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": torch.from_numpy(self.faces[index].copy()), "degrees": torch.from_numpy(self.degrees[index])}


def _rendered(count: int, size: int, seed: int, margin: float, quiet: bool) -> tuple[np.ndarray, np.ndarray]:
    from rich.progress import track

    from pyface.data.procedural import ProceduralFaces, render

    world = ProceduralFaces(count, size, seed, identities=count, occluders=False)
    faces, degrees = np.empty((count, 3, size, size), np.uint8), np.empty((count, 2), np.float32)
    for start in track(range(0, count, 16), "rendering faces for the gaze network", disable=quiet):
        people, views = zip(*[world.parameters(index) for index in range(start, min(start + 16, count))])
        framings = [replace(view.framing, scale=view.framing.scale / (BOX * margin)) for view in views]
        views = [replace(view, framing=framing) for view, framing in zip(views, framings)]
        for index, sample in enumerate(render(people, views, size), start):
            faces[index] = (sample["image"] * 255).round().byte().numpy()
            degrees[index] = np.rad2deg(np.asarray(sample["gaze"]))
    return faces, degrees


# -------------------------------------------------------------------------------------------------- weights of teachers


def load_teacher(path: str | os.PathLike, trunk: str = "resnet18") -> GazeNetwork:
    """A gaze network, in evaluation mode: a run of ``stage=teacher`` (its folder or file), a checkpoint of L2CS-Net, or
    the headless ``gazeBackend_512.pkl`` of the authors.

    Raises:
        UserError: the file cannot be read or does not fit ``trunk``.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "gazeforensics.safetensors"
    values = read_weights(path)
    if "trunk.conv1.weight" not in values and not any(key.startswith("trunk.") for key in values):
        values = _from_l2cs(values)
    network = GazeNetwork(trunk)
    if not any(key.startswith("angles.") for key in values):
        network.angles.known.fill_(False)
        values |= {key: value for key, value in network.state_dict().items() if key.startswith("angles.")}
    try:
        network.load_state_dict(values)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not hold a gaze network with the trunk {trunk}: {reason}") from error
    return network.eval()


def _from_l2cs(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """L2CS-Net's names: a torchvision ResNet, heads fc_yaw_gaze and fc_pitch_gaze, an fc_finetune nobody uses."""
    heads = {"fc_yaw_gaze": "angles.yaw", "fc_pitch_gaze": "angles.pitch"}
    converted = {}
    for key, value in values.items():
        layer, _, kind = key.rpartition(".")
        if layer in heads:
            converted[f"{heads[layer]}.{kind}"] = value
        elif layer != "fc_finetune":
            converted[f"trunk.{key}"] = value
    if any(key.startswith("angles.") for key in converted):
        converted["angles.known"] = torch.tensor(True)
    return converted


# -------------------------------------------------------------------------------------------------- cached embeddings


def fingerprint(network: torch.nn.Module) -> str:
    """SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(videos: Sequence[Any]) -> str:
    """SHA-256 of the face crops of :class:`~pyface.data.protocols.FaceClip` and their ids."""
    digest = hashlib.sha256()
    for video in videos:
        digest.update(f"{video.id} {video.faces.shape};".encode())
        digest.update(np.ascontiguousarray(video.faces))
    return digest.hexdigest()


@torch.no_grad()
def embeddings(
    path: Path | None,
    teacher: GazeNetwork,
    videos: Sequence[Any],
    *,
    size: int,
    crop: str = "full",
    batch: int = 64,
    quiet: bool = True,
) -> Tensor:
    """The teacher's embeddings of every frame as it is and mirrored, which is all that training needs of the teacher.

    Args:
        path: safetensors file to keep them in; its metadata names the weights, the crops and the settings that they
            were made with. A file made with others is made anew, with a warning. None keeps nothing.
        teacher: in evaluation mode, on any device.
        videos: with ``faces``, ndarray[T, S, S, 3] uint8.
        size, crop: see :func:`~pyface.methods.gazeforensics.model.prepared`.
        batch: frames at a time.

    Returns:
        Tensor[2, F, G] float16 on the CPU: plain and mirrored, frames of all videos one after the other.
    """
    key = {"teacher": fingerprint(teacher), "crops": fingerprint_of(videos), "size": size, "crop": crop}
    if path is not None and path.exists():
        known = _kept(path, key)
        if known is not None:
            return known
        warnings.warn(f"{path} was made with another teacher, data set or size; it is made anew", stacklevel=2)
    from rich.progress import track

    device = next(teacher.parameters()).device
    found: list[list[Tensor]] = [[], []]
    for video in track(videos, "embedding by the gaze network", disable=quiet):
        for start in range(0, len(video.faces), batch):
            pixels = torch.from_numpy(np.array(video.faces[start : start + batch])).permute(0, 3, 1, 2)
            images = prepared(pixels.to(device), size, crop)
            for kind, values in zip(found, (images, images.flip(-1))):
                kind.append(teacher.embed(values).half().cpu())
    result = torch.stack([torch.cat(kind) for kind in found])
    if path is not None:
        from safetensors.torch import save

        content = save({"embeddings": result}, {"about": json.dumps(key)})
        with replacing(path, overwrite=True) as temporary:
            temporary.write_bytes(content)
    return result


def _kept(path: Path, key: dict[str, Any]) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("about", "{}")) != key:
                return None
            return file.get_tensor("embeddings")
    except (OSError, SafetensorError, ValueError):
        return None
