"""ACMF: masked frequencies and attention consistency against face forgeries (Liu et al., 2024, arXiv:2307.11438)."""

from __future__ import annotations

import os

from pyface.errors import UserError
from pyface.methods._registry import register_model
from pyface.methods.acmf.adapt import NOTEBOOK, Adaptation, Adapter
from pyface.methods.acmf.convert import convert_state_dict, load
from pyface.methods.acmf.losses import fake_share
from pyface.methods.acmf.model import ACMF

__all__ = ["ACMF", "NOTEBOOK", "Adaptation", "Adapter", "convert_state_dict", "create", "fake_share", "load_official"]


def create(pretrained: bool = False, **config) -> ACMF:
    """An :class:`ACMF`. ``pretrained`` takes a backbone trained on ImageNet from the folder ``PYFACE_WEIGHTS``; there
    are no weights of the whole detector in this package.

    Raises:
        UserError: an unknown setting, or missing weights.
    """
    try:
        return ACMF(pretrained=pretrained, **config)
    except TypeError as error:
        raise UserError(f"acmf: {str(error).replace('ACMF.__init__() ', '')}") from error


def load_official(checkpoint: str | os.PathLike) -> ACMF:
    """The network with the weights of a released checkpoint (``.pth``), or of a run of this package.

    Raises:
        UserError: the file cannot be read, or is not a complete ACMF checkpoint.
    """
    return load(checkpoint)[0].train()


register_model("acmf", create, load_official)
