"""Released checkpoints of HIDA -> this package's names, and networks from weight files of any origin.

The authors' Lightning checkpoint holds ``Generator.*`` and ``Discrimanator.discriminator_0.*`` (their spelling). Of the
generator's 108.7 M values 27.8 M are never used: the up-sampler each decoder block did not take, a second set of SPADE
layers, batch norms whose call is commented out. They are dropped by name; any other unknown name is refused.

Two changes are made on the way. Their style planes stand in the order 2, 3, 1, ours in the order 1, 2, 3: the channels
of the condition's first convolution are permuted. And their three convolutions for theta, gamma and b, which read the
same input, become one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pyface.errors import UserError
from pyface.methods.hida.model import HIDA, OUTLINE_BLOCKS

GENERATOR, CRITIC = "Generator.", "Discrimanator.discriminator_0."
ENCODER_LAYERS, DECODER_BLOCKS = 7, 7
USED = 80_894_566  # values of the released generator
# Channels of the condition are depth, three style planes, view; theirs are the planes of styles 2, 3, 1.
_CONDITION_ORDER = (0, 3, 1, 2, 4)
_ACON = {"p1": "p1", "p2": "p2", "reduce": "fc1", "expand": "fc2"}
_UNUSED = re.compile(
    r"(?:down\d\.model\.0|up\d\.metaAcon|up\d\.metaAcon_en|final_(?:rgb|par)\.0)\.bn[12]\..+"
    r"|up[01]\.layers\..+|up[2-6]\.dcn\..+|up0\.(?:fc1|en_conv|metaAcon_en)\..+|up[1-6]\.fc2\..+"
    r"|up\d\.norm\.(?:mlp_shared|metaAcon)\..+"
)
_OTHERS = ("Discrimanator.", "criterion")


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released checkpoint's generator, so that ``HIDA().load_state_dict(..., strict=True)`` takes it.

    Args:
        official: their complete state dict, with or without ``Generator.`` in front; the critic's part is left out.

    Returns:
        Tensors under our names, 80,894,566 values.

    Raises:
        UserError: a key is not one of theirs, or one that is needed is missing.
    """
    theirs = {
        key.removeprefix(GENERATOR): value
        for key, value in official.items()
        if not key.startswith(_OTHERS) and not _UNUSED.fullmatch(key.removeprefix(GENERATOR))
    }
    converted = _renamed(theirs, _generator_names())
    for index in range(DECODER_BLOCKS):
        name = f"up.{index}.condition.0.weight"
        order = [channel for channel in _CONDITION_ORDER if channel < converted[name].shape[1]]
        converted[name] = converted[name][:, order]
    return converted


def convert_critic(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released checkpoint's critic for ``Discriminator().load_state_dict``; arguments, errors as above."""
    theirs = {key.removeprefix(CRITIC): value for key, value in official.items() if key.startswith(CRITIC)}
    places = {"model0.0": 0, "model1.1": 3, "model2.1": 6, "model3.1": 9, "model5.0": 13}
    names = {f"layers.{ours}": (his,) for his, ours in places.items()}
    return _renamed(theirs, _with_parts(names))


def _renamed(theirs: dict[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    known = {name for parts in names.values() for name in parts}
    for what, keys in (("unknown key", theirs.keys() - known), ("no value for", known - theirs.keys())):
        if keys:
            raise UserError(f"not a complete HIDA checkpoint: {what} {_some(sorted(keys))}")
    return {ours: torch.cat([theirs[name] for name in parts]) for ours, parts in names.items()}


def _generator_names() -> dict[str, tuple[str, ...]]:
    """Our name -> theirs; several are stacked."""
    layers = {"photo_stem": ("down_rgb",), "depth_stem": ("down_par",)}
    acons = {}
    for index in range(ENCODER_LAYERS):
        acons[f"down.{index}.0"] = f"down{index + 2}.model.0"
        layers[f"down.{index}.1"] = (f"down{index + 2}.model.1",)
    for head, part in (("sketch_head", "rgb"), ("depth_head", "par")):
        acons[f"{head}.0"] = f"final_{part}.0"
        layers[f"{head}.1"] = (f"final_{part}.1",)
    names = {}
    for index in range(DECODER_BLOCKS):
        ours, his = f"up.{index}", f"up{index}"
        names |= {f"{ours}.{p}": (f"{his}.{p}",) for p in ("p1", "p2")}
        if index < OUTLINE_BLOCKS:
            layers[f"{ours}.up.conv"] = (f"{his}.dcn",)
            layers[f"{ours}.up.conv.conv_offset"] = (f"{his}.dcn.conv_offset_mask",)
        else:
            layers[f"{ours}.up"] = (f"{his}.layers",)
        if index:
            layers[f"{ours}.view.0"] = (f"{his}.en_conv",)
            acons[f"{ours}.view.1"] = f"{his}.metaAcon_en"
        layers[f"{ours}.condition.0"] = (f"{his}.fc1" if index else f"{his}.fc2",)
        acons[f"{ours}.condition.1"] = f"{his}.metaAcon"
        layers[f"{ours}.modulation"] = (f"{his}.fc3", f"{his}.norm.mlp_gamma", f"{his}.norm.mlp_beta")
    for ours, his in acons.items():
        names |= {f"{ours}.{p}": (f"{his}.{p}",) for p in ("p1", "p2")}
        layers |= {f"{ours}.{layer}": (f"{his}.{_ACON[layer]}",) for layer in ("reduce", "expand")}
    return names | _with_parts(layers)


def _with_parts(layers: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    parts = ("weight", "bias")
    return {f"{ours}.{part}": tuple(f"{name}.{part}" for name in his) for ours, his in layers.items() for part in parts}


def load(path: str | os.PathLike) -> HIDA:
    """A generator with its weights, in evaluation mode on the CPU.

    Args:
        path: the folder of a run; ``.safetensors`` as training writes it, of any width and size; or a released
            checkpoint (``.ckpt``, ``.pth``). Only a run's ``config.toml`` tells the variants of gain and residual, so
            a file alone is taken for the code's.

    Raises:
        UserError: there is no such thing, or it does not fit.
    """
    from pyface.backbones.weights import read_weights
    from pyface.engine import load_config
    from pyface.methods.hida.recipe import Config

    path, variant = Path(path), {}
    if path.is_dir():
        config = load_config(Config, file=path / "config.toml")
        path, variant = path / "hida.safetensors", {"gain": config.gain, "residual": config.residual}
    values = read_weights(path)
    if path.suffix != ".safetensors":
        values = convert_state_dict(values)
    try:
        model = HIDA(**_settings(values), **variant)
        model.load_state_dict(values)
    except (KeyError, RuntimeError, IndexError) as error:
        raise UserError(f"{path} does not hold HIDA's weights: {str(error).splitlines()[-1].strip()}") from error
    return model.eval()


def _settings(values: Mapping[str, Tensor]) -> dict[str, int | bool | str]:
    """The arguments of HIDA that the shapes of its weights tell."""
    layers = 1 + max((int(key.split(".")[1]) for key in values if key.startswith("down.")), default=0)
    return {
        "width": len(values["photo_stem.weight"]),
        "image_size": 2 ** (layers + 1),
        "deformable": any(key.startswith("up.0.up.conv.conv_offset") for key in values),
        "adaptation": "style" if values["up.0.modulation.weight"].dim() == 2 else "pixel",
    }


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
