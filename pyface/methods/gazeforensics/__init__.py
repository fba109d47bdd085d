"""GazeForensics: forged videos found by where the eyes look (He et al., arXiv:2311.07075)."""

from __future__ import annotations

import os

from pyface.errors import UserError
from pyface.methods._registry import register_model
from pyface.methods.gazeforensics.convert import convert_state_dict, load
from pyface.methods.gazeforensics.model import GazeAngles, GazeForensics, GazeNetwork

__all__ = ["GazeAngles", "GazeForensics", "GazeNetwork", "convert_state_dict", "create", "load_official"]


def create(pretrained: bool = False, **config) -> GazeForensics:
    """A :class:`GazeForensics`. No weights of it ship with the package.

    Raises:
        UserError: an unknown setting, or ``pretrained``.
    """
    if pretrained:
        raise UserError("gazeforensics: no weights ship with pyface; train some by 'pyface train gazeforensics'")
    try:
        return GazeForensics(**config)
    except TypeError as error:
        raise UserError(f"gazeforensics: {str(error).replace('GazeForensics.__init__() ', '')}") from error


def load_official(checkpoint: str | os.PathLike) -> GazeForensics:
    """The network with the weights of a released checkpoint (``.pth``), or of a run of this package.

    Raises:
        UserError: the file cannot be read, or is not a complete checkpoint of GazeForensics.
    """
    return load(checkpoint)[0].train()


register_model("gazeforensics", create, load_official)
