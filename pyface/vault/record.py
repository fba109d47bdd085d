"""The record of a protected photo: how its faces were hidden, and the proof that nothing was changed since.

It travels as canonical JSON (keys sorted, no spaces, ASCII) in an iTXt chunk named ``pyface``; the exact residual, if
any, in a private chunk ``pfRX``. Whatever is read comes from an untrusted file, so every value is checked for type
and range before anybody acts on it, and the text must be byte for byte the one that we would write.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pyface.errors import UserError
from pyface.vault.keys import (
    CHECK_BYTES,
    MAX_ARGON2_LANES,
    MAX_ARGON2_MEMORY_KIB,
    MAX_ARGON2_PASSES,
    SALT_BYTES,
    PhotoKeys,
    WrongKeyError,
)

FORMAT = 1
TEXT_KEYWORD = "pyface"
# Ancillary, private, unsafe to copy: an editor that changes the pixels has to drop it.
RESIDUAL_CHUNK = b"pfRX"
MAX_TEXT_BYTES = 1 << 20
MAX_FACES = 4096
MAX_SIDE = 1 << 20
MIN_TILE = 64
MAX_TILE = 2048

Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""


class RecordError(UserError):
    """The file has no record, or one that this version cannot read."""


class AlteredError(UserError):
    """The photo or its record is not what was written."""


@dataclass(frozen=True)
class Record:
    """Everything recovery needs except the secret.

    Attributes:
        method: registered name of the model.
        weights: SHA-256 of the model's state, hexadecimal.
        width, height: size of the photo in pixels.
        alpha: whether the photo has an alpha channel (kept as it was, covered by ``pixels``).
        faces: disjoint boxes (x, y, width, height) of even width and height.
        tile: largest side of the pieces in which a face goes through the network.
        obfuscator: its registered name.
        strength: its strength, None for the default.
        salt: 16 random bytes, hexadecimal.
        kdf: see :func:`pyface.vault.keys.kdf_of`.
        check: recognises the secret, hexadecimal.
        original: HMAC-SHA256 of the original pixels, hexadecimal; lets the owner tell an exact recovery.
        pixels: SHA-256 of the protected pixels, hexadecimal.
        residual: SHA-256 of the encrypted residual, hexadecimal; None without one.
        mac: HMAC-SHA256 over all of the above, hexadecimal.
    """

    method: str
    weights: str
    width: int
    height: int
    alpha: bool
    faces: tuple[Box, ...]
    tile: int
    obfuscator: str
    strength: float | None
    salt: str
    kdf: Mapping[str, str | int]
    check: str
    original: str
    pixels: str
    residual: str | None = None
    mac: str = ""

    def sealed(self, keys: PhotoKeys, residual: bytes | None) -> Record:
        """A copy that carries the digest of ``residual`` and the HMAC over everything."""
        record = replace(self, residual=digest(residual) if residual is not None else None)
        return replace(record, mac=keys.mac("record", record._signed_bytes()))

    def binding(self) -> bytes:
        """What the encryption of the residual is tied to: this record before the residual's digest and the HMAC."""
        return replace(self, residual=None)._signed_bytes()

    def problems(self, keys: PhotoKeys, pixels: np.ndarray, residual: bytes | None) -> list[UserError]:
        """Reasons not to trust this photo, the most telling first; empty when secret, record and pixels agree."""
        found: list[UserError] = []
        if keys.check.hex() != self.check:
            found.append(WrongKeyError("wrong key: this is not the key or password that the photo was protected with"))
        elif keys.mac("record", self._signed_bytes()) != self.mac:
            found.append(AlteredError("the photo's record was altered after protection"))
        if digest(pixels) != self.pixels:
            found.append(
                AlteredError("the photo's pixels were changed after protection; the hidden original is damaged there")
            )
        if (digest(residual) if residual is not None else None) != self.residual:
            found.append(AlteredError("the residual for exact recovery is missing or was altered after protection"))
        return found

    def to_json(self) -> str:
        """Canonical JSON, ASCII."""
        return _canonical({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: bytes | str) -> Record:
        """Read a record from an untrusted file.

        Raises:
            RecordError: it is not a record, is of another format version, or holds a value out of range.
        """
        if len(text) > MAX_TEXT_BYTES:
            raise RecordError(f"the pyface record is larger than {MAX_TEXT_BYTES} bytes: not written by pyface")
        try:
            text = text.decode("ascii") if isinstance(text, bytes) else text
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise RecordError("the pyface record is not readable JSON; the file is damaged") from None
        if not isinstance(values, dict):
            raise RecordError("the pyface record is not a JSON object; the file is damaged")
        version = values.pop("format", None)
        if type(version) is int and version > FORMAT:
            raise RecordError(
                f"written by a newer pyface (record format {version}, this one reads {FORMAT}); update it"
            )
        if version != FORMAT or set(values) != set(_FIELDS):
            raise RecordError("the pyface record lacks fields or has unknown ones; the file is damaged")
        for name, is_valid in _FIELDS.items():
            if not is_valid(values[name]):
                raise RecordError(f"the pyface record holds an impossible value for {name!r}; the file is damaged")
        values["faces"] = tuple(tuple(face) for face in values["faces"])
        record = cls(**values)
        if not _faces_fit(record.faces, record.width, record.height):
            raise RecordError("the pyface record holds faces that overlap or leave the photo; the file is damaged")
        if record.to_json() != text:
            raise RecordError("the pyface record is not in canonical form; the file is damaged")
        return record

    def _signed_bytes(self) -> bytes:
        return replace(self, mac="").to_json().encode("ascii")


def digest(data: np.ndarray | bytes) -> str:
    """SHA-256 in hexadecimal; of an array, its bytes row by row."""
    return hashlib.sha256(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data).hexdigest()


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _hex(count: int) -> Callable[[Any], bool]:
    pattern = re.compile(f"[0-9a-f]{{{2 * count}}}")
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 64 and value.isascii() and value.isprintable()


def _strength(value: Any) -> bool:
    return value is None or (type(value) is float and math.isfinite(value) and value > 0)


def _kdf(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if value.get("name") == "none":
        return len(value) == 1
    return (
        set(value) == {"name", "memory_kib", "passes", "lanes"}
        and value["name"] == "argon2id"
        and _integer(1, MAX_ARGON2_LANES)(value["lanes"])
        and _integer(1, MAX_ARGON2_PASSES)(value["passes"])
        and _integer(8 * value["lanes"], MAX_ARGON2_MEMORY_KIB)(value["memory_kib"])
    )


def _face_list(value: Any) -> bool:
    in_range = _integer(0, MAX_SIDE)
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_FACES
        and all(isinstance(face, list) and len(face) == 4 and all(map(in_range, face)) for face in value)
    )


def _faces_fit(faces: tuple[Box, ...], width: int, height: int) -> bool:
    x, y, w, h = np.array(faces, np.int64).T
    if (w < 2).any() or (h < 2).any() or (w % 2).any() or (h % 2).any():
        return False
    right, bottom = x + w, y + h
    if (right > width).any() or (bottom > height).any():
        return False
    apart = (right[:, None] <= x) | (x[:, None] >= right) | (bottom[:, None] <= y) | (y[:, None] >= bottom)
    np.fill_diagonal(apart, True)
    return bool(apart.all())


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "method": _name,
    "weights": _hex(32),
    "width": _integer(2, MAX_SIDE),
    "height": _integer(2, MAX_SIDE),
    "alpha": lambda value: isinstance(value, bool),
    "faces": _face_list,
    "tile": _integer(MIN_TILE, MAX_TILE),
    "obfuscator": _name,
    "strength": _strength,
    "salt": _hex(SALT_BYTES),
    "kdf": _kdf,
    "check": _hex(CHECK_BYTES),
    "original": _hex(32),
    "pixels": _hex(32),
    "residual": lambda value: value is None or _hex(32)(value),
    "mac": _hex(32),
}
