"""Names of the published methods, and how to make each one."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyface.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from pyface.engine import Recipe

# Listed here so that asking for names loads no method; each module calls register_model when it is imported.
_MODULES = {
    "acmf": "pyface.methods.acmf",
    "gazeforensics": "pyface.methods.gazeforensics",
    "hida": "pyface.methods.hida",
    "proface_s": "pyface.methods.proface_s",
}
_MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {}


def register_model(
    name: str, create: Callable[..., nn.Module], load_official: Callable[[str | os.PathLike], nn.Module]
) -> None:
    """Make ``name`` known to :func:`create_model` and :func:`load_official`; UserError if it is taken."""
    if name in _MODELS:
        raise UserError(f"model {name!r} is already registered; choose another name")
    _MODELS[name] = create, load_official


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern such as ``"pro*"``, sorted."""
    return fnmatch.filter(sorted(_MODULES.keys() | _MODELS), pattern)


def create_model(name: str, pretrained: bool = False, **config) -> nn.Module:
    """Make a model.

    Args:
        name: one of :func:`list_models`.
        pretrained: with the weights that ship with the package; otherwise freshly initialised.
        **config: arguments of the model's class.

    Raises:
        UserError: unknown name (the nearest known one is suggested), unknown setting, or no shipped weights for it.
    """
    return _find(name)[0](pretrained=pretrained, **config)


def load_official(name: str, checkpoint: str | os.PathLike) -> nn.Module:
    """Make a model with the weights of a checkpoint file that the method's authors released.

    Raises:
        UserError: unknown name, unreadable file, or keys that are unknown or missing.
    """
    return _find(name)[1](checkpoint)


def find_recipe(name: str) -> type[Recipe]:
    """The class ``Recipe`` of a method's module ``recipe``: how it is trained and evaluated.

    Raises:
        UserError: unknown name (the nearest known one is suggested), or the method is not trained here.
    """
    _find(name)
    home = f"{_MODULES.get(name, name)}.recipe"
    try:
        return importlib.import_module(home).Recipe
    except ModuleNotFoundError as error:
        if error.name not in (home, home.rpartition(".")[0]):
            raise
        raise UserError(f"{name} has no recipe; it cannot be trained or evaluated here") from None


def _find(name: str) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    if name not in _MODELS and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _MODELS:
        near = difflib.get_close_matches(name, list_models(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(list_models())}"
        raise UserError(f"unknown model {name!r}; {hint}")
    return _MODELS[name]
