"""pyface: face privacy, forensics and synthesis on fused kernel cores.

`import pyface` is light: torch and everything else load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "paths": "pyface.ops",
    "PathError": "pyface.ops",
    "UserError": "pyface.errors",
    "list_models": "pyface.methods",
    "create_model": "pyface.methods",
    "load_official": "pyface.methods",
}
_SUBPACKAGES = {"backbones", "data", "engine", "kernels", "methods", "metrics", "nn", "ops", "vault"}

__all__ = [
    "PathError",
    "UserError",
    "__version__",
    "backbones",
    "create_model",
    "data",
    "engine",
    "kernels",
    "list_models",
    "load_official",
    "methods",
    "metrics",
    "nn",
    "ops",
    "paths",
    "vault",
]

if TYPE_CHECKING:
    from pyface.errors import UserError
    from pyface.methods import create_model, list_models, load_official
    from pyface.ops import PathError, paths


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pyface.{name}")
    raise AttributeError(f"module 'pyface' has no attribute {name!r}")


def __dir__():
    return __all__
