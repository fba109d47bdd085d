"""Settings of a training run: dataclasses whose fields carry their own documentation, read from and written to TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pyface.errors import UserError

Config = TypeVar("Config", bound="TrainConfig")
NONE = "none"  # TOML has no null
PROCEDURAL = "procedural"


def setting(default: Any, help: str, *, free: bool = False) -> Any:
    """A documented dataclass field.

    Args:
        default: its value; for a group of settings, the (frozen) dataclass.
        help: what it is, with units, in a line or two.
        free: the setting does not shape the course of a run, or is meant to prolong it, so resuming may change it.
    """
    about = {"help": help, "free": free}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=about)
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every method's settings begin with; a method adds its own fields and its presets.

    A run ends at ``steps``, after ``epochs`` or after ``max_minutes``, whichever comes first.
    """

    method: ClassVar[str] = ""
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}

    data: str = setting(PROCEDURAL, "folder of the data set, or procedural for faces made on the spot")
    steps: int | None = setting(None, "optimiser steps of the whole run", free=True)
    epochs: int | None = setting(None, "passes over the data set", free=True)
    max_minutes: float | None = setting(None, "minutes of training, over all sittings", free=True)
    batch_size: int = setting(32, "samples per step, over all processes and accumulated parts")
    accumulate: int = setting(1, "parts that a step's batch is cut into, one after the other, to save memory")
    lr: float = setting(1e-3, "learning rate (peak, where there is a schedule)")
    clip: float = setting(0.0, "largest norm of the gradient; 0 does not clip")
    precision: Literal["no", "bf16", "fp16"] = setting("no", "autocast to this type; no computes in float32")
    ema: float = setting(0.0, "decay per step of the averaged weights, which are the result; 0 takes the last ones")
    seed: int = setting(0, "seed of everything random")
    workers: int = setting(0, "processes that prepare data; 0 prepares it between the steps", free=True)
    checkpoint_every: int = setting(500, "steps between checkpoints; 0 writes one after each epoch", free=True)
    validate_every: int = setting(
        1, "epochs between validations, or steps where the run is not counted in epochs; 0 validates at the end only",
        free=True,
    )  # fmt: skip
    log_every: int = setting(50, "steps that a row of log.csv averages over")
    keep: int = setting(2, "checkpoints that are kept", free=True)

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "max_minutes", "batch_size", "accumulate", "log_every", "keep"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{self._title}{name} must be positive, got {value}")
        for name in ("lr", "clip", "seed", "workers", "checkpoint_every", "validate_every"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{self._title}{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise UserError(f"{self._title}ema must be at least 0 and below 1, got {self.ema}")
        if self.steps is self.epochs is self.max_minutes is None:
            raise UserError(f"{self._title}nothing says when training ends; set steps, epochs or max_minutes")

    @property
    def _title(self) -> str:
        return f"{self.method}: " if self.method else ""

    @classmethod
    def preset(cls: type[Config], name: str = "default", **changes: Any) -> Config:
        """A named preset with some settings changed; see :func:`load_config`."""
        return load_config(cls, preset=name, changes=changes)


def load_config(
    cls: type[Config],
    *,
    preset: str | None = None,
    file: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> Config:
    """Settings from up to four places, each overriding those before.

    Args:
        cls: the settings' class.
        preset: name of one of ``cls.presets``; None takes ``"default"``.
        file: TOML file as :func:`to_toml` writes it, or a part of one.
        changes: values by name; nested groups as mappings.
        assignments: texts such as ``"lr=1e-4"`` or ``"decoder.depth=2"``.

    Raises:
        UserError: unknown preset or setting (the nearest name is suggested), a value of the wrong type, a file that
            cannot be read, or settings that contradict each other.
    """
    presets = {"default": {}} | cls.presets
    if preset is not None and preset not in presets:
        raise UserError(f"{_title(cls)}unknown preset {preset!r}; {nearest(preset, presets)}")
    values = _merged({}, presets[preset or "default"])
    if file is not None:
        values = _merged(values, _read(cls, Path(file)))
    values = _merged(values, changes or {})
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"cannot read {assignment!r}; expected NAME=VALUE, such as lr=1e-4")
        nested: Any = _Text(text.strip())
        for part in reversed(name.strip().split(".")):
            nested = {part: nested}
        values = _merged(values, nested)
    return _build(cls, values, _title(cls))


def to_toml(config: TrainConfig) -> str:
    """Every setting with its documentation, as TOML; :func:`load_config` reads an equal config back."""
    head = [f"method = {_literal(config.method)}", ""] if config.method else []
    return "\n".join(head + _section(config, "")) + "\n"


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Settings that differ and must not when a run is resumed, as ``"lr (0.1, now 0.2)"``."""
    found = []

    def compare(a: Any, b: Any, prefix: str) -> None:
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
                compare(x, y, f"{prefix}{field.name}.")
            elif x != y and not field.metadata.get("free"):
                found.append(f"{prefix}{field.name} ({x}, now {y})")

    compare(old, new, "")
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


# ------------------------------------------------------------------------------------------------------------- reading


class _Text(str):
    """A value as somebody typed it on the command line."""


def _title(cls: type) -> str:
    return f"{cls.method}: " if getattr(cls, "method", "") else ""


def _read(cls: type[TrainConfig], path: Path) -> dict[str, Any]:
    try:
        values = _toml().loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # TOML's and UTF-8's errors are both ValueErrors
        raise UserError(f"{path} is not valid TOML: {error}") from error
    method = values.pop("method", cls.method)
    if method != cls.method:
        raise UserError(f"{path} holds settings of {method}, expected {cls.method}")
    return values


def _toml() -> types.ModuleType:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{where}unknown setting {name!r}; {nearest(name, known)}")
    return cls(**{name: _convert(value, hints[name], f"{where}{name}") for name, value in values.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    """``value`` as the annotation ``kind`` wants it, or a UserError that names the setting."""
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is a group of settings; set one of its fields, such as {where}.NAME")
        return _build(kind, value, f"{where}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == NONE:
            return None
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return _convert(value, kind, where)
    if isinstance(value, _Text) and kind is not str and origin is not Literal:
        try:
            value = _toml().loads(f"value = {value}")["value"]
        except ValueError:
            value = str(value)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} must be one of {', '.join(arguments)}; got {value!r}")
        return str(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        parts = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(parts) == len(value):
            return tuple(_convert(v, p, f"{where}[{i}]") for i, (v, p) in enumerate(zip(value, parts)))
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is str and isinstance(value, str):
        return str(value)
    elif kind in (int, bool) and type(value) is kind:
        return value
    raise UserError(f"{where} must be {_describe(kind)}, got {value!r}")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if typing.get_origin(kind) is not tuple:
        return names.get(kind, str(kind))
    arguments = typing.get_args(kind)
    if arguments[1:] == (...,):
        return f"a list, each entry {_describe(arguments[0])}"
    return f"[{', '.join(_describe(argument) for argument in arguments)}]"


# ------------------------------------------------------------------------------------------------------------- writing


def _section(config: Any, prefix: str) -> list[str]:
    lines, groups = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            name = f"{prefix}{field.name}"
            groups += ["", f"# {field.metadata['help']}", f"[{name}]", *_section(value, f"{name}.")]
        else:
            lines += [f"# {field.metadata['help']}", f"{field.name} = {_literal(value)}"]
    return lines + groups


def _literal(value: Any) -> str:
    if value is None:
        value = NONE
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML, too
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
