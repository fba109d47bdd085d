"""Networks that several methods share: timm's, and a face recogniser that timm lacks. Nothing is ever downloaded."""

import importlib

_HOMES = {
    "FaceEmbedder": "iresnet",
    "IResNet": "iresnet",
    "create_backbone": "create",
    "create_recogniser": "iresnet",
    "find_weights": "weights",
    "load_weights": "weights",
    "read_weights": "weights",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"pyface.backbones.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pyface.backbones' has no attribute {name!r}")


def __dir__():
    return __all__
