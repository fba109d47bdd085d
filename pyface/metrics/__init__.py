"""Measures that torchmetrics does not have, as `torchmetrics.Metric` classes; see docs/metrics.md for which to use."""

import importlib

_HOMES = {
    "AdaptiveAccuracy": "sequence",
    "AngularError": "identity",
    "ClipAccuracy": "forensics",
    "ClipAlignment": "clip",
    "ClipEncoders": "clip",
    "CompleteSequenceMatch": "sequence",
    "EqualErrorRate": "forensics",
    "FixedAccuracy": "sequence",
    "Fsim": "drawing",
    "IdentitySimilarity": "identity",
    "KeyRecovery": "privacy",
    "Scoot": "drawing",
    "VerificationRate": "identity",
    "VideoAUROC": "forensics",
    "VideoAccuracy": "forensics",
    "VideoEqualErrorRate": "forensics",
    "fsim": "drawing",
    "load_clip": "clip",
    "scoot": "drawing",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"pyface.metrics.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pyface.metrics' has no attribute {name!r}")


def __dir__():
    return __all__
