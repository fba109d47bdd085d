"""Released checkpoints of PRO-Face S -> this package's names.

The authors' training script saves the plain state dict of their network: ``model.inv_blocks.{i}.{sub-net}.conv{1..5}``
and nothing else (their wavelets hold no state), so there is no key to drop. ``module.`` in front, from data-parallel
training, is accepted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from torch import Tensor

from pyface.errors import UserError

SUBNETS = {"p": "omega", "f": "phi", "r": "rho", "y": "eta"}
_KEY = re.compile(r"(?:module\.)?model\.inv_blocks\.(\d+)\.([pfry])\.(conv[1-5]\.(?:weight|bias))")


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict, so that ``ProFaceS(blocks=N).load_state_dict(..., strict=True)`` takes it.

    Args:
        official: their complete state dict; the number of blocks N is read off it.

    Returns:
        The same tensors under our names.

    Raises:
        UserError: a key is not one of theirs, or one of theirs is missing.
    """
    converted, strange = {}, []
    for key, value in official.items():
        match = _KEY.fullmatch(key)
        if match:
            block, subnet, rest = match.groups()
            converted[f"blocks.{block}.{SUBNETS[subnet]}.{rest}"] = value
        else:
            strange.append(key)
    if strange:
        raise UserError(
            f"not a PRO-Face S state dict: unknown key {_some(strange)}; "
            f"expected model.inv_blocks.<i>.<r|y|f|p>.conv<1-5>.<weight|bias>"
        )
    missing = [key for key in _layout(count_blocks(converted)) if key not in converted]
    if missing:
        raise UserError(f"incomplete PRO-Face S state dict: no value for our {_some(missing)}")
    return converted


def count_blocks(converted: Mapping[str, Tensor]) -> int:
    """Number of blocks that the keys of a converted state dict speak of, at least 1."""
    return 1 + max((int(key.split(".")[1]) for key in converted), default=0)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or a PyTorch file, read without running any code the file may hold.

    Raises:
        UserError: the file is missing, or is not a mapping from names to tensors.
    """
    import torch
    from safetensors.torch import load_file

    path = os.fspath(path)
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # on bytes that are no checkpoint the unpickler may raise anything
        raise UserError(f"{path} is not a checkpoint of tensors only, in PyTorch's or safetensors' format") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint {path} is not a state dict (a mapping from names to tensors)")
    return dict(content)


def _layout(blocks: int) -> list[str]:
    return [
        f"blocks.{block}.{subnet}.conv{layer}.{part}"
        for block in range(blocks)
        for subnet in SUBNETS.values()
        for layer in range(1, 6)
        for part in ("weight", "bias")
    ]


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
