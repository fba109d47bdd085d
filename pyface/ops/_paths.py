"""Paths: the ways an op can be computed, why one cannot serve a call, and which one does.

A path answers "why can't you serve this call?" with a list of sentences. That one answer drives the automatic choice,
the explicit choice (`pyface.paths("triton")`, `PYFACE_PATH=triton`), the error text and the table of `pyface info`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from pyface.errors import UserError

PATHS = ("cpu", "cuda", "triton", "reference")


class PathError(UserError, RuntimeError):
    """No path, or not the path that was asked for, can serve a call. The message lists every reason."""


# ---- what this installation and this machine have -------------------------------------------------------------------


@functools.cache
def build_record() -> dict:
    """What the build wrote down about itself (`_build.json`); empty if the package was never built."""
    file = Path(__file__).resolve().parent.parent / "_build.json"
    return json.loads(file.read_text()) if file.is_file() else {}


@functools.cache
def load_module(name: str) -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it cannot be used). Nothing is raised here: the first use of a path explains."""
    try:
        module = importlib.import_module(f"pyface.{name}")
    except ImportError as error:
        if importlib.util.find_spec(f"pyface.{name}") is not None:
            return None, f"pyface.{name} is installed but does not load: {error}"
        record = build_record()
        if not record:
            return (
                None,
                f"pyface.{name} was not built: install the package (pip install .) instead of running from its source",
            )
        why = record.get(name.lstrip("_"), {}).get("reason", "the build record gives no reason")
        return None, f"pyface.{name} was not built: {why}"
    if name == "_cpu" and "PYFACE_CPU_ISA" in os.environ:
        try:
            module.set_isa(os.environ["PYFACE_CPU_ISA"])
        except ValueError as error:
            return None, f"PYFACE_CPU_ISA: {error}; choose from {', '.join(module.isas())}"
    return module, None


def loaded(name: str) -> ModuleType:
    """The compiled module, for a path that the registry has found usable."""
    module, reason = load_module(name)
    assert module is not None, reason
    return module


def address(t: Tensor | None) -> int:
    """Where a tensor's data lie; 0, a null pointer in the compiled modules, for None."""
    return 0 if t is None else t.data_ptr()


def triton_is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def _no_gpu() -> list[str]:
    if torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} was built without CUDA"]
    return ["torch finds no CUDA device"]


@functools.cache
def machine_reasons(path: str) -> tuple[str, ...]:
    """Why a path cannot be used on this machine at all, whatever the call."""
    if path == "cpu":
        reason = load_module("_cpu")[1]
        return (reason,) if reason else ()
    if path == "cuda":
        reason = load_module("_cuda")[1]
        return (*([reason] if reason else []), *_no_gpu())
    if path == "triton":
        if importlib.util.find_spec("triton") is None:
            return ("triton is not installed (pip install triton)",)
        return () if triton_is_interpreted() else tuple(_no_gpu())
    return ()


# ---- the explicit choice --------------------------------------------------------------------------------------------


def _check_path(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in PATHS:
        raise PathError(f"{source}: no path is called {name!r}; the paths are {', '.join(PATHS)}, or auto")
    return name


_chosen: str | None = None
_chosen_read = False


def chosen_path() -> str | None:
    """The explicitly chosen path, or None for the automatic choice."""
    global _chosen, _chosen_read
    if not _chosen_read:  # at first use, so that a mistyped PYFACE_PATH fails the call and not the import
        _chosen, _chosen_read = _check_path(os.environ.get("PYFACE_PATH"), "PYFACE_PATH"), True
    return _chosen


class paths:
    """Context in which every op takes the named path: `with pyface.paths("reference"): ...`.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" / None for the automatic choice.

    A path that cannot serve a call inside the context raises `PathError` with its reasons: an explicit choice is
    never replaced. The choice holds for the whole process, like torch's backend flags; a backward pass takes the path
    of its forward pass.
    """

    def __init__(self, name: str | None):
        self.name = _check_path(name, "pyface.paths")

    def __enter__(self) -> None:
        global _chosen
        self.previous = chosen_path()
        _chosen = self.name

    def __exit__(self, *exc_info) -> None:
        global _chosen
        _chosen = self.previous


# ---- a core and its paths -------------------------------------------------------------------------------------------


@dataclass
class Core:
    """One kernel core: which path serves which element types, and how to load a path's implementation.

    Attributes:
        name: the core's stem ("coupling").
        dtypes: for each path, the tuples of element types it takes; a path that is missing takes everything.
        load: for each path, a function that returns its implementation (any object; loaded once, when first chosen).
        order: the automatic order, best measured first.
    """

    name: str
    dtypes: dict[str, set[tuple[torch.dtype, ...]]]
    load: dict[str, Callable[[], object]]
    order: tuple[str, ...] = PATHS
    _picked: dict = field(default_factory=dict, repr=False)
    _loaded: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        CORES[self.name] = self

    def reasons(self, path: str, device: str, dtypes: tuple[torch.dtype, ...], explicit: bool) -> list[str]:
        """Why `path` cannot serve a call with tensors of `dtypes` on a `device` type; empty if it can."""
        if path not in self.load:
            return [f"core {self.name} has no {path} path"]
        why = list(machine_reasons(path))
        if path == "cpu" and device != "cpu":
            why.append(f"it takes CPU tensors, these are on {device}")
        if path == "cuda" and device != "cuda":
            why.append(f"it takes CUDA tensors, these are on {device}")
        if path == "triton" and device != "cuda":
            if not triton_is_interpreted():
                why.append(
                    f"it takes CUDA tensors, these are on {device} (TRITON_INTERPRET=1 runs it slowly on the CPU)"
                )
            elif not explicit:
                why.append("interpreted Triton is for checks and must be asked for by name")
        if path in self.dtypes and dtypes not in self.dtypes[path]:
            why.append(
                f"it does not take {_names(dtypes)}; it takes {'; '.join(sorted(map(_names, self.dtypes[path])))}"
            )
        return why

    def pick(self, device: str, dtypes: tuple[torch.dtype, ...], chosen: str | None) -> object:
        """The implementation that serves a call; raises `PathError` if the chosen path cannot."""
        key = (device, dtypes, chosen)
        implementation = self._picked.get(key)
        if implementation is None:
            path = self._pick_path(device, dtypes, chosen)
            if path not in self._loaded:
                self._loaded[path] = self.load[path]()
            implementation = self._picked[key] = self._loaded[path]
        return implementation

    def _pick_path(self, device: str, dtypes: tuple[torch.dtype, ...], chosen: str | None) -> str:
        if chosen is not None:
            why = self.reasons(chosen, device, dtypes, explicit=True)
            if why:
                raise PathError(
                    f"{self.name}: the path {chosen!r} was asked for but cannot serve this call: {'; '.join(why)}"
                )
            return chosen
        refused = {}
        for path in self.order:
            why = self.reasons(path, device, dtypes, explicit=False)
            if not why:
                break
            refused[path] = why
        if path == "reference" and refused.get(
            device
        ):  # the compiled path of this very device is missing: slower, so said once
            warnings.warn(
                f"pyface: {self.name} runs on the reference path (plain PyTorch, several times slower) for "
                f"{_names(dtypes)} on {device}: {'; '.join(refused[device])}",
                stacklevel=4,
            )
        return path


CORES: dict[str, Core] = {}


def autocast_dtype(device: str) -> torch.dtype | None:
    """In which autocast wants multiplications on this kind of device; None: in no other, or it knows no such device."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " with ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))


def table() -> list[dict]:
    """Every core × path: `{"core", "path", "usable", "reasons", "dtypes"}`, as `pyface info` shows it."""
    rows = []
    for core in CORES.values():
        for path in PATHS:
            missing = [] if path in core.load else [f"core {core.name} has no {path} path"]
            reasons = missing or list(machine_reasons(path))
            dtypes = sorted(set(map(_names, core.dtypes[path]))) if path in core.dtypes else ["any floating type"]
            rows.append({"core": core.name, "path": path, "usable": not reasons, "reasons": reasons, "dtypes": dtypes})
    return rows
