"""Plug-ins that a user names: an installed entry point, or ``module:name``."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from pyface.errors import UserError


def installed(group: str) -> set[str]:
    """Names of the installed entry points of a group."""
    return {point.name for point in metadata.entry_points(group=group)}


def find_plugin(name: str, group: str, kind: str) -> Any | None:
    """What the entry point ``name`` of ``group``, or "module:attribute", leads to; None if ``name`` is neither.

    Raises:
        UserError: it cannot be imported; ``kind`` says what was looked for.
    """
    try:
        for point in metadata.entry_points(group=group, name=name):
            return point.load()
        module, colon, attribute = name.partition(":")
        return getattr(importlib.import_module(module), attribute) if colon else None
    except Exception as error:  # somebody else's module: whatever it raises, the user needs to see which one it was
        raise UserError(f"cannot load {kind} {name!r}: {error}") from error
