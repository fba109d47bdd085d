"""Released checkpoints of ACMF -> this package's names, and networks from weight files of any origin.

The authors' script trains the Xception that most face-forgery repositories share: names as timm's ``legacy_xception``,
save that the head may be called ``last_linear`` and that the oldest files hold 1x1 convolutions as matrices. Their
notebook applies stage 2 to an EfficientNet-B4 in the names of the package efficientnet_pytorch (``_blocks.0...``),
inside a detector that calls it ``net``; in timm that is ``tf_efficientnet_b4``. Which of the two a file holds is told
from its keys. Any other key is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pyface.backbones.weights import read_weights
from pyface.engine import load_config, load_weights, read_about
from pyface.errors import UserError
from pyface.methods.acmf.model import ACMF

_WRAPPINGS = ("module.", "model.", "network.", "net.", "xception.", "efficientnet.", "encoder.")
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_PLAIN = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw", "_bn2": "bn2",
}  # fmt: skip
_EXPANDED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
# By the blocks of a file: timm's name. Depths grow with the model: 16, 23, 32 blocks are B0, B1 (and B2), B4.
_DEPTHS = {16: "tf_efficientnet_b0", 23: "tf_efficientnet_b1", 26: "tf_efficientnet_b3", 32: "tf_efficientnet_b4"}


def convert_state_dict(official: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Rename a released checkpoint.

    Args:
        official: the authors' state dict, with or without wrappers' names in front of every key.

    Returns:
        (backbone, tensors by the names of ``ACMF(backbone)``).

    Raises:
        UserError: the keys are not those of either network, or the head has not two outputs.
    """
    values = dict(official)
    while wrapping := next((w for w in _WRAPPINGS if values and all(key.startswith(w) for key in values)), None):
        values = {key.removeprefix(wrapping): value for key, value in values.items()}
    if "_conv_stem.weight" in values:
        backbone, values = _from_efficientnet(values)
    elif "block1.rep.0.pointwise.weight" in values:
        backbone, values = "xception", _from_xception(values)
    else:
        some = ", ".join(map(repr, sorted(official)[:3]))
        raise UserError(
            f"not a checkpoint of ACMF: expected the keys of Xception (block1.rep.0.pointwise.weight, ...) or of "
            f"efficientnet_pytorch (_conv_stem.weight, ...), found {some}"
        )
    with torch.device("meta"):
        own = ACMF(backbone).network.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - values.keys() - counters)
    strange = sorted(values.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & values.keys() if own[key].shape != values[key].shape)
    for what, keys in (("it lacks", missing), ("it has unknown", strange), ("of another shape is", wrong)):
        if keys:
            shape = f" {tuple(values[keys[0]].shape)} instead of {tuple(own[keys[0]].shape)}" if keys is wrong else ""
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"not a complete checkpoint of ACMF ({backbone}): {what} {keys[0]!r}{shape}{more}")
    # Files older than torch 0.4.1 do not count batches.
    values |= {key: torch.zeros((), dtype=torch.int64) for key in counters - values.keys()}
    return backbone, {f"network.{key}": value for key, value in values.items()}


def _from_xception(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = {}
    for key, value in theirs.items():
        name = re.sub(r"^last_linear(\.1)?\.", "fc.", key)
        values[name] = value[..., None, None] if name.endswith("pointwise.weight") and value.dim() == 2 else value
    return values


def _from_efficientnet(theirs: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    from timm import create_model

    blocks = 1 + max((int(key.split(".")[1]) for key in theirs if key.startswith("_blocks.")), default=-1)
    if blocks not in _DEPTHS:
        raise UserError(f"not a checkpoint of ACMF: an EfficientNet of {blocks} blocks is not one that pyface knows")
    backbone = _DEPTHS[blocks]
    with torch.device("meta"):
        stages = [len(stage) for stage in create_model(backbone, num_classes=2).blocks]
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(stages) for block in range(depth)]
    values = {}
    for key, value in theirs.items():
        name = key
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key):
            index, layer, rest = int(match[1]), match[2], match[3]
            names = _EXPANDED if f"_blocks.{index}._expand_conv.weight" in theirs else _PLAIN
            name = f"{places[index]}.{names.get(layer, layer)}.{rest}"
        elif (layer := key.partition(".")[0]) in _TOP:
            name = _TOP[layer] + key[len(layer) :]
        values[name] = value
    return backbone, values


def load(path: str | os.PathLike) -> tuple[ACMF, dict[str, str]]:
    """A network with its weights, in evaluation mode on the CPU, and what its file says of them.

    Args:
        path: the folder of a run; ``.safetensors`` as training writes it; or a checkpoint of the authors (``.pth``),
            read without running any code that it may hold.

    Returns:
        (the network, texts by name: ``backbone``, ``image_size``, ``margin``, ``training``, and where they were
        chosen ``threshold`` and ``calibration``; a checkpoint of the authors says nothing).

    Raises:
        UserError: there is no such thing, it belongs to another method, or it does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = run_weights(path)
    if path.suffix != ".safetensors":
        try:
            backbone, values = convert_state_dict(read_weights(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        model = ACMF(backbone)
        model.load_state_dict(values)
        return model.eval(), {}
    about = read_about(path)
    if about.get("method") != "acmf":
        whose = f"weights of {about['method']}" if "method" in about else "weights that name no method"
        raise UserError(f"{path} holds {whose}, expected weights of acmf as 'pyface train acmf' writes them")
    try:
        model = ACMF(about["backbone"], int(about["image_size"]), target=about["target"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} does not say how its network is built; give the folder of its run ({error})"
        ) from error
    load_weights(model, path)
    return model.eval(), about


def run_weights(folder: Path) -> Path:
    """The file of weights of a run's folder.

    Raises:
        UserError: no run, of another method, or one that has not ended.
    """
    from pyface.methods.acmf.recipe import Config

    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder} is not the folder of a run (it has no config.toml); give a file of weights")
    load_config(Config, file=folder / "config.toml")  # says so if it is another method's
    path = folder / "acmf.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} holds a run that has not ended; go on with it by pyface train acmf --resume")
    return path
