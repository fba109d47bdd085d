"""Weights and checkpoints on disk: safetensors and JSON, never pickle, complete or not there at all.

A checkpoint is a folder ``checkpoints/step-00000500`` with ``model.safetensors``, ``ema.safetensors``,
``optimizer.safetensors`` (each where it is not empty) and ``state.json``. It is written under a temporary name and
renamed when every byte is on the disk. ``state.json`` holds everything that is no tensor, and the checksum of every
other file.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyface.engine.run import Run
from pyface.errors import UserError

FORMAT = 1
_PREFIX = "step-"


# ------------------------------------------------------------------------------------------------------------- weights


def stored_tensors(module: nn.Module, stores: str = "all") -> dict[str, Tensor]:
    """The state dict, or with ``stores="trainable"`` its parameters that require a gradient and buffers beside them."""
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    if stores == "all":
        return state
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    homes = {name.rpartition(".")[0] for name in trainable}
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {n: v for n, v in state.items() if n in trainable or (n not in frozen and n.rpartition(".")[0] in homes)}


def save_weights(
    module: nn.Module, path: str | os.PathLike, about: Mapping[str, str] | None = None, stores: str = "all"
) -> None:
    """Write a module's weights as safetensors, complete or not at all; ``about`` goes into its metadata as JSON."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    _write(temporary, _packed(stored_tensors(module, stores), about))
    os.replace(temporary, path)


def load_weights(module: nn.Module, path: str | os.PathLike, stores: str = "all") -> dict[str, str]:
    """Read weights that :func:`save_weights` wrote into a module built alike; returns what was said about them.

    Raises:
        UserError: the file is missing or damaged, or its names or shapes are not the module's.
    """
    tensors, about = _read_tensors(Path(path))
    _fill(stored_tensors(module, stores), tensors, os.fspath(path))
    return about


def read_about(path: str | os.PathLike) -> dict[str, str]:
    """What :func:`save_weights` was told about the weights in a file; empty for a safetensors file of others.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _read_tensors(Path(path))[1]


def _fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    for kind, names in (("no value for", own.keys() - tensors.keys()), ("an unknown", tensors.keys() - own.keys())):
        if names:
            name = sorted(names)[0]
            raise UserError(f"{source} does not fit: it has {kind} {name!r}; was it made with other settings?")
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise UserError(
                f"{source} does not fit: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})") from error


def _packed(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    # One entry, because safetensors writes several in random order, and equal runs shall give equal files.
    return save(copies, {"about": json.dumps(about)} if about else None)


def _write(path: Path, content: bytes) -> None:
    # Plain bytes, because safetensors' own writer makes files that only their owner can read.
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------- anything as JSON and tensors


def pack(tree: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """A state dict as JSON: tensors move to ``tensors``, and dicts with other keys than texts become lists of pairs."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"$tensor": prefix}
    if isinstance(tree, dict):
        packed = [[key, pack(value, tensors, f"{prefix}.{key}" if prefix else str(key))] for key, value in tree.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in tree)
        return dict(packed) if plain else {"$dict": packed}
    if isinstance(tree, (list, tuple)):
        packed = [pack(value, tensors, f"{prefix}.{index}") for index, value in enumerate(tree)]
        return {"$tuple": packed} if isinstance(tree, tuple) else packed
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{prefix} is a {type(tree).__name__}; a checkpoint holds tensors, numbers, texts, lists and dicts")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`pack` was given."""
    if isinstance(packed, list):
        return [unpack(value, tensors) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if "$tensor" in packed:
        return tensors[packed["$tensor"]]
    if "$tuple" in packed:
        return tuple(unpack(packed["$tuple"], tensors))
    pairs = packed["$dict"] if "$dict" in packed else packed.items()
    return {key: unpack(value, tensors) for key, value in pairs}


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, run: Run, extra: Mapping[str, Any]) -> None:
    """Write the state of a run below ``folder``, and delete checkpoints beyond the last ``keep``.

    Args:
        folder: of the run.
        run: the run, its noted scalars settled. Its random generators are seeded anew for every step, and so are not
            part of its state.
        extra: more for ``state.json``.
    """
    home = folder / "checkpoints"
    final = home / f"{_PREFIX}{run.step:08d}"
    temporary = home / f".{final.name}.partial"
    for leftover in home.glob(".*.partial"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)

    moments: dict[str, Tensor] = {}
    optimizers = pack({name: one.state_dict() for name, one in run.optimizers.items()}, moments, "optimizer")
    schedulers = pack([scheduler.state_dict() for scheduler, _ in run.schedulers], moments, "scheduler")
    parts = {"model": stored_tensors(run.model, run.recipe.stores), "ema": run.ema, "optimizer": moments}
    # An empty one would be no valid file.
    files = {f"{name}.safetensors": _packed(tensors) for name, tensors in parts.items() if tensors}
    state = {
        "format": FORMAT,
        "step": run.step,
        "steps": run.steps,
        "seconds": run.seconds,
        "skipped": run.skipped,
        "values": run.values,
        "optimizers": optimizers,
        "schedulers": schedulers,
        "scaler": run.scaler.state_dict() if run.scaler else None,
        "checksums": {name: zlib.crc32(content) for name, content in files.items()},
        **extra,
    }
    for name, content in files.items():
        _write(temporary / name, content)
    _write(temporary / "state.json", json.dumps(state).encode())
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    os.rename(temporary, final)
    for old in _folders(home)[run.config.keep :]:
        _remove(old)


def load_checkpoint(folder: Path, run: Run) -> tuple[dict[str, Any], list[str]] | None:
    """Put a run back to the newest checkpoint that is complete.

    Returns:
        (``state.json``, one sentence for each newer checkpoint that was damaged), or None if there is no checkpoint.

    Raises:
        UserError: there are checkpoints, but all are damaged, or they do not fit the run.
    """
    problems = []
    for candidate in _folders(folder / "checkpoints"):
        try:
            state, tensors = _read_checkpoint(candidate)
        except UserError as error:
            problems.append(f"{candidate} is damaged ({error})")
            continue
        source = os.fspath(candidate)
        _fill(stored_tensors(run.model, run.recipe.stores), tensors.get("model", {}), source)
        _fill(run.ema, tensors.get("ema", {}), source)
        moments = tensors.get("optimizer", {})
        saved, schedulers = unpack(state["optimizers"], moments), unpack(state["schedulers"], moments)
        if saved.keys() != run.optimizers.keys() or len(schedulers) != len(run.schedulers):
            raise UserError(f"{source} has other optimisers or schedulers; it was written by another version")
        if run.schedulers and state["steps"] != run.steps:
            raise UserError(
                f"the learning rate's schedule was made for {state['steps']} steps and cannot span {run.steps}; "
                f"resume with the same steps and epochs"
            )
        for name, optimizer in run.optimizers.items():
            optimizer.load_state_dict(saved[name])
        for (scheduler, _), values in zip(run.schedulers, schedulers, strict=True):
            scheduler.load_state_dict(values)
        if run.scaler and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        run.step, run.skipped, run.earlier = state["step"], state["skipped"], state["seconds"]
        run.values = state["values"]
        return state, problems
    if problems:
        raise UserError(f"no checkpoint can be read: {'; '.join(problems)}. Start anew in another folder")
    return None


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    try:
        state = json.loads((folder / "state.json").read_bytes())
        if state["format"] != FORMAT:
            raise UserError(f"its format is {state['format']}, expected {FORMAT}")
        for name, checksum in state["checksums"].items():
            if zlib.crc32((folder / name).read_bytes()) != checksum:
                raise UserError(f"the checksum of {name} is wrong")
        return state, {name.partition(".")[0]: _read_tensors(folder / name)[0] for name in state["checksums"]}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"state.json cannot be read: {error}") from error


def _folders(home: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    if not home.is_dir():
        return []
    return sorted((f for f in home.iterdir() if f.name.startswith(_PREFIX) and f.is_dir()), reverse=True)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; killed halfway, what is left does not look like one."""
    doomed = folder.with_name(f".{folder.name}.partial")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
