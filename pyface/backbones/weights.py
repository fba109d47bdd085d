"""Weight files: finding, reading and loading them. They are always the user's own files; nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pyface.errors import UserError

FOLDER_VARIABLE = "PYFACE_WEIGHTS"
SUFFIXES = (".safetensors", ".pth", ".pt")
# Training scripts wrap the state dict under one of these names; the averaged weights are the better ones.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def find_weights(name: str, source: str) -> Path:
    """The file ``<name>.safetensors`` (or ``.pth``, ``.pt``) in the folder that ``PYFACE_WEIGHTS`` names.

    For a name with a tag, such as resnet50.a1_in1k, the name without it comes second.

    Args:
        name: of the network.
        source: where its weights can be had, for the message.

    Raises:
        UserError: the variable is not set, or the folder holds no such file; the message says what to do.
    """
    folder = os.environ.get(FOLDER_VARIABLE, "")
    stems = dict.fromkeys((name, name.partition(".")[0])) if folder else ()
    for path in (Path(folder) / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES):
        if path.is_file():
            return path
    looked = f"{FOLDER_VARIABLE}={folder} holds no {name}.safetensors, .pth or .pt" if folder else "no file was given"
    raise UserError(
        f"{name}: trained weights were asked for, but {looked}, and pyface never downloads weights; get them from "
        f"{source}, then give the file (weights=FILE) or save it as {name}.safetensors or "
        f"{name}.pth in a folder and set {FOLDER_VARIABLE} to that folder"
    )


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """State dict in a ``.safetensors`` file, or in a PyTorch file, read without running any code it may hold.

    Wrappers of training scripts (``state_dict``, ``model``, averaged ones first) and a ``module.`` in front of every
    key are taken off.

    Raises:
        UserError: the file is missing, damaged, holds more than tensors and plain values, or no state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {error.strerror or error}") from error
    except Exception as error:  # on bytes that are no checkpoint the parsers may raise anything
        raise UserError(
            f"{path} is not a weight file that pyface reads: safetensors, or a PyTorch file of tensors and plain "
            f"values only; if it holds more and you trust it, open it with torch.load(..., weights_only=False) and "
            f"save its state dict alone"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict (a mapping from names to tensors)")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    head: Sequence[str] = (),
    first: Sequence[str] = (),
) -> None:
    """Load a file into ``model``; everything must fit, except for what is named here.

    Args:
        model: the network.
        path: see :func:`read_weights`.
        head: modules whose stored weights are left out where they are absent from ``model`` or have another shape, as
            for another number of classes. They keep their fresh values; a warning says so.
        first: convolutions whose weights are adapted where ``model`` has another number of input channels than the 3
            of the file (timm's rule: summed for one channel, repeated and scaled for more).

    Raises:
        UserError: the file cannot be read, or its keys or shapes do not fit.
    """
    stored = read_weights(path)
    own = model.state_dict()
    for name in first:
        key = f"{name}.weight"
        if key in own and key in stored and own[key].shape[1] != stored[key].shape[1] == 3:
            from timm.models import adapt_input_conv

            stored[key] = adapt_input_conv(own[key].shape[1], stored[key])
    dropped = [
        key
        for name in head
        for key in (f"{name}.weight", f"{name}.bias")
        if key in stored and (key not in own or own[key].shape != stored[key].shape)
    ]
    fresh = [key for key in dropped if key in own]
    if fresh:
        warnings.warn(
            f"{path}: {', '.join(fresh)} not loaded (stored for {len(stored[fresh[0]])} outputs, wanted "
            f"{len(own[fresh[0]])}); the head starts untrained",
            stacklevel=3,
        )
    stored = {key: value for key, value in stored.items() if key not in dropped}
    missing = [key for key in own if key not in stored and key not in fresh and not _counter(key)]
    strange = [key for key in stored if key not in own and not _counter(key)]
    wrong = [
        f"{key} is {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in stored.items()
        if key in own and own[key].shape != value.shape
    ]
    if missing or strange or wrong:
        problems = [
            f"{what} {_some(keys)}"
            for what, keys in (("lacks", missing), ("has unknown", strange), ("has other shapes:", wrong))
            if keys
        ]
        raise UserError(f"weights {path} do not fit {type(model).__name__}: the file {'; '.join(problems)}")
    model.load_state_dict(stored, strict=False)


def _counter(key: str) -> bool:
    """BatchNorm's step counter, which older files lack and inference does not use."""
    return key.endswith(".num_batches_tracked")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
