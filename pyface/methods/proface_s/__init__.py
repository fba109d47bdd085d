"""PRO-Face S: reversible face obfuscation under a key (Yuan et al., arXiv:2307.09146; IEEE TCSVT 34(7), 2024)."""

from __future__ import annotations

import os

from pyface.errors import UserError
from pyface.methods._registry import register_model
from pyface.methods.proface_s.convert import convert_state_dict, count_blocks, read_checkpoint
from pyface.methods.proface_s.model import ProFaceS

__all__ = ["ProFaceS", "convert_state_dict", "create", "load_official"]


def create(pretrained: bool = False, **config) -> ProFaceS:
    """A :class:`ProFaceS`; with ``pretrained`` it carries the weights that ship with the package.

    Raises:
        UserError: an unknown setting, or one that the shipped weights do not fit.
    """
    try:
        model = ProFaceS(**config)
    except TypeError as error:
        raise UserError(f"proface_s: {str(error).replace('ProFaceS.__init__() ', '')}") from error
    if pretrained:
        from importlib.resources import as_file, files

        with as_file(files("pyface") / "weights" / "proface_s.safetensors") as path:
            weights = read_checkpoint(path)
        own = model.state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in weights.items()}:
            raise UserError(
                "proface_s: the shipped weights need blocks=3 and growth=32; drop pretrained or the setting"
            )
        model.load_state_dict(weights)
    return model


def load_official(checkpoint: str | os.PathLike) -> ProFaceS:
    """The network with the weights of a released checkpoint file (``.pth`` or ``.safetensors``).

    Raises:
        UserError: the file cannot be read, or is not a complete PRO-Face S state dict.
    """
    weights = convert_state_dict(read_checkpoint(checkpoint))
    model = ProFaceS(blocks=count_blocks(weights))
    for name, value in model.state_dict().items():
        if weights[name].shape != value.shape:
            raise UserError(
                f"checkpoint {os.fspath(checkpoint)}: {name} has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(value.shape)}"
            )
    model.load_state_dict(weights)
    return model


register_model("proface_s", create, load_official)
