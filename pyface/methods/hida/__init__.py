"""HIDA: face sketches in chosen artists' styles, under depth (Gao et al., ICCV 2023, arXiv:2309.00216)."""

from __future__ import annotations

import os

from pyface.errors import UserError
from pyface.methods._registry import register_model
from pyface.methods.hida.convert import convert_critic, convert_state_dict, load
from pyface.methods.hida.model import HIDA, Discriminator, style_weights

__all__ = ["HIDA", "Discriminator", "convert_critic", "convert_state_dict", "create", "load_official", "style_weights"]


def create(pretrained: bool = False, **config) -> HIDA:
    """A :class:`HIDA`. With ``pretrained`` it is the small network whose weights ship with the package (width 16).

    Raises:
        UserError: an unknown setting, or one that the shipped weights do not fit.
    """
    if pretrained:
        from importlib.resources import as_file, files

        if config:
            raise UserError(f"hida: the shipped weights fix all settings; drop pretrained or {', '.join(config)}")
        with as_file(files("pyface") / "weights" / "hida_tiny.safetensors") as path:
            return load(path).train()
    try:
        return HIDA(**config)
    except TypeError as error:
        raise UserError(f"hida: {str(error).replace('HIDA.__init__() ', '')}") from error


def load_official(checkpoint: str | os.PathLike) -> HIDA:
    """The network with the weights of a released checkpoint (``.ckpt``, ``.pth``), or of a run of this package.

    Raises:
        UserError: the file cannot be read, or is not a complete HIDA checkpoint.
    """
    return load(checkpoint).train()


register_model("hida", create, load_official)
