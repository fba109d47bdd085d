"""Released checkpoints of GazeForensics -> this package's names, and networks from weight files of any origin.

The authors' file is a dict of ``epoch``, ``state_dict``, ``history`` and ``config``; the last is an object of a class
of theirs, so the file cannot be read with ``weights_only=True`` as it is. It is read so nevertheless, with an empty
class in the place of every class that torch does not know: no code of the file runs.

Their order of the frozen variant's features is [leaky; gaze], ours is [gaze; leaky] throughout: the first layers of
queries, keys and values are permuted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyface.backbones.weights import read_weights
from pyface.errors import UserError
from pyface.methods.gazeforensics.model import CROPS, FRAMES, GazeForensics

PARTS = {
    "base_model": "trunk",
    "gaze_fc": "embedding",
    "MHA_Q_fc": "query",
    "MHA_K_fc": "key",
    "MHA_V_fc": "value",
    "multihead_attn": "attention",
    "MHA_comp": "compress",
    "last_fc": "classifier",
}
_MLP = ("gaze_fc", "MHA_Q_fc", "MHA_K_fc", "MHA_V_fc", "MHA_comp", "last_fc")
_LAYER = re.compile(r"fc\.(\d+)\.(weight|bias)")
OFFICIAL = {"trunk": "resnet18", "image_size": 224, "crop": "full", "margin": 1.2}
HEADS = 8


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict, so that :class:`GazeForensics` of the right widths takes it.

    Args:
        official: theirs, with or without ``module.`` in front.

    Raises:
        UserError: a key is not one of theirs.
    """
    theirs = {key.removeprefix("module."): value for key, value in official.items()}
    converted: dict[str, Tensor] = {}
    for key, value in theirs.items():
        part, _, rest = key.partition(".")
        if part == "gaze_backend":
            rest = rest.removeprefix("module.")
            # L2CS-Net's heads may be in there; the frozen teacher does without.
            if not rest.startswith(("fc_", "avg_encoder.")):
                converted[f"teacher.{rest}"] = value
            continue
        if part not in PARTS:
            raise UserError(f"not a checkpoint of GazeForensics: unknown key {key!r}")
        if part == "base_model" and rest.startswith("fc."):
            continue  # ImageNet's classifier, which is not used
        if part in _MLP:
            layer = _LAYER.fullmatch(rest)
            if layer is None:
                raise UserError(f"not a checkpoint of GazeForensics: unknown key {key!r}")
            rest = f"{2 * int(layer[1])}.{layer[2]}"  # ReLUs stand between
        converted[f"{PARTS[part]}.{rest}"] = value
    if any(key.startswith("teacher.") for key in converted) and "embedding.0.weight" in converted:
        leaky = _outputs(converted, "embedding")
        for part in ("query", "key", "value"):
            weight = converted.get(f"{part}.0.weight")
            if weight is not None:
                converted[f"{part}.0.weight"] = torch.cat((weight[:, leaky:], weight[:, :leaky]), 1)
    return converted


def load(path: str | os.PathLike) -> tuple[GazeForensics, dict[str, Any]]:
    """A detector with its weights, in evaluation mode on the CPU, and what is known of its input.

    Args:
        path: the folder of a run, its ``.safetensors``, or a released checkpoint (``.pth``, ``.pkl``).

    Returns:
        the network; a dict of ``image_size``, ``crop``, ``margin`` and, where the file says them, ``training``,
        ``threshold`` (a float) and ``calibration``.

    Raises:
        UserError: there is no such file, it does not fit, or it is of another method.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "gazeforensics.safetensors"
    if path.suffix == ".safetensors":
        return _own(path)
    values = convert_state_dict(_read(path))
    network = _fitted(values, path, OFFICIAL["trunk"], HEADS)
    return network, {name: OFFICIAL[name] for name in ("image_size", "crop", "margin")}


def _own(path: Path) -> tuple[GazeForensics, dict[str, Any]]:
    from safetensors import safe_open

    values = read_weights(path)
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
    method = about.get("method")
    if method not in (None, "gazeforensics"):
        raise UserError(f"{path} holds weights of {method}, not of gazeforensics")
    network = json.loads(about.get("network", "{}"))
    if network.get("stage") == "teacher":
        raise UserError(f"{path} holds a gaze network (stage=teacher), not a detector; give it by --set teacher={path}")
    known = {**OFFICIAL, **{name: network[name] for name in OFFICIAL if name in network}}
    if known["crop"] not in CROPS:
        raise UserError(f"{path} says that its crop is {known['crop']!r}; expected one of {', '.join(CROPS)}")
    model = _fitted(values, path, known.pop("trunk"), network.get("heads", HEADS))
    said = {name: about[name] for name in ("training", "calibration") if name in about}
    if "threshold" in about:
        said["threshold"] = float(about["threshold"])
    return model, known | said


def _fitted(values: dict[str, Tensor], path: Path, trunk: str, heads: int) -> GazeForensics:
    """A network of the widths that the weights have."""
    try:
        frozen = any(key.startswith("teacher.") for key in values)
        total = values["query.0.weight"].shape[1]
        width = values["attention.out_proj.weight"].shape[0]
        if width % heads:
            raise UserError(f"{path}: the attention's {width} features do not go into {heads} heads")
        if frozen:
            leaky = _outputs(values, "embedding") if "embedding.0.weight" in values else 0
        else:
            leaky = total - _gaze_width(values, total)
        model = GazeForensics(
            trunk,
            gaze=total - leaky,
            leaky=leaky,
            heads=heads,
            head_width=width // heads,
            compressed=_outputs(values, "compress"),
            frozen=frozen,
            angles="angles.pitch.weight" in values,
            hidden=tuple(_hidden(values, part) for part in ("query", "compress", "classifier")),
        )
        model.load_state_dict(values)
    except (KeyError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not hold GazeForensics' weights: {reason}") from error
    if model.classifier[0].in_features != FRAMES * model.compress[-1].out_features:
        raise UserError(f"{path} is for clips of another length than {FRAMES} frames")
    return model.eval()


def _gaze_width(values: Mapping[str, Tensor], total: int) -> int:
    """G: what the stored heads take; a released file has none, and its gaze part is as wide as the trunk's feature."""
    heads = values.get("angles.pitch.weight")
    return heads.shape[1] if heads is not None else min(total, values["embedding.0.weight"].shape[1])


def _layers(values: Mapping[str, Tensor], part: str) -> list[Tensor]:
    numbers = sorted(int(key.split(".")[1]) for key in values if re.fullmatch(rf"{part}\.\d+\.weight", key))
    return [values[f"{part}.{number}.weight"] for number in numbers]


def _outputs(values: Mapping[str, Tensor], part: str) -> int:
    return _layers(values, part)[-1].shape[0]


def _hidden(values: Mapping[str, Tensor], part: str) -> list[int]:
    return [weight.shape[0] for weight in _layers(values, part)[:-1]]


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict of a released checkpoint, read without running any code of it."""
    stand_ins = [(type(name.rpartition(".")[2], (), {}), name) for name in _unknown_classes(path)]
    with torch.serialization.safe_globals(stand_ins):
        return read_weights(path)


def _unknown_classes(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # on bytes that are no checkpoint the parser may raise anything; read_weights says what is wrong
        return []
