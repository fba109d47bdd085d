"""A world of people who do not exist: parameters, a renderer, and a data set that knows all about its pictures."""

from __future__ import annotations

import importlib

_HOMES = {
    **dict.fromkeys(
        ("Background", "Beard", "Brows", "Camera", "Clothes", "Eyes", "Frames", "Framing", "Hair", "Light", "Lips",
         "Nose", "Person", "Shape", "Skin", "View", "draw_clip", "draw_person", "draw_view"), "parameters"),
    **dict.fromkeys(("attributes", "caption"), "describe"),
    **dict.fromkeys(("render",), "photo"),
    **dict.fromkeys(("ProceduralFaces",), "faces"),
    **dict.fromkeys(("contact_sheet",), "sheet"),
}  # fmt: skip
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
