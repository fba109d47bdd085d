"""Secrets, and the keys made from them.

One secret (a 32-byte key file or a password) and one random salt per photo give, through HKDF-SHA256 with a label per
use, keys that tell nothing about each other: a key map stream per face, the key of the record's HMAC, the AES-256-GCM
key of the exact residual, a key that fingerprints the original, and a short check value that recognises a wrong secret.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyface.errors import UserError

KEY_BYTES = 32
SALT_BYTES = 16
CHECK_BYTES = 8
# A record is read from an untrusted file before anything in it can be verified: it must not be able to ask for more.
MAX_ARGON2_MEMORY_KIB = 1 << 20
MAX_ARGON2_PASSES = 16
MAX_ARGON2_LANES = 16


class WrongKeyError(UserError):
    """The secret is not the one the photo was protected with."""


@dataclass(frozen=True)
class Argon2Cost:
    """Cost of one password guess (Argon2id, RFC 9106): memory in KiB, passes over it, parallel lanes."""

    memory_kib: int = 64 * 1024
    passes: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("lanes", 1, MAX_ARGON2_LANES),
            ("passes", 1, MAX_ARGON2_PASSES),
            ("memory_kib", 8 * self.lanes, MAX_ARGON2_MEMORY_KIB),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"Argon2id {name} must be between {low} and {high}, got {value}")


@dataclass(frozen=True)
class Secret:
    """What the owner keeps: 32 random bytes, or a password. Build it with one of the three constructors."""

    material: bytes = field(repr=False)
    is_password: bool

    @classmethod
    def generate(cls) -> Secret:
        """A new random 32-byte key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES), is_password=False)

    @classmethod
    def from_key(cls, key: bytes) -> Secret:
        """A key of exactly 32 bytes; UserError for any other length."""
        if len(key) != KEY_BYTES:
            raise UserError(f"a key must be exactly {KEY_BYTES} bytes, got {len(key)}")
        return cls(bytes(key), is_password=False)

    @classmethod
    def from_password(cls, password: str) -> Secret:
        """A password; it is brought to Unicode NFC, so that the same letters typed on another system are the same."""
        if not password:
            raise UserError("the password is empty; give one, or use a key file")
        return cls(unicodedata.normalize("NFC", password).encode(), is_password=True)


def read_key_file(path: str | os.PathLike) -> Secret:
    """Read a key file: exactly 32 raw bytes, or 64 hexadecimal digits with an optional line end."""
    try:
        with open(path, "rb") as file:
            content = file.read(2 * KEY_BYTES + 3)
    except OSError as error:
        raise UserError(f"cannot read key file {path}: {error.strerror or error}") from error
    if len(content) == KEY_BYTES:
        return Secret.from_key(content)
    text = content.strip()
    if len(text) == 2 * KEY_BYTES:
        try:
            return Secret.from_key(bytes.fromhex(text.decode("ascii")))
        except ValueError:  # includes UnicodeDecodeError; said below
            pass
    raise UserError(
        f"key file {path} must hold exactly {KEY_BYTES} raw bytes or {2 * KEY_BYTES} hexadecimal digits; "
        f"make one with --new-key-file"
    )


def write_key_file(path: str | os.PathLike, secret: Secret) -> None:
    """Write a key as 64 hexadecimal digits, readable by its owner only; never replaces a file."""
    if secret.is_password:
        raise UserError("a password is not written to a file; generate a key instead")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(f"key file {path} already exists and is never replaced; use it with --key-file") from None
    except OSError as error:
        raise UserError(f"cannot create key file {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secret.material.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise UserError(f"cannot write key file {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class PhotoKeys:
    """The keys of one photo; see :func:`derive`."""

    salt: bytes
    master: bytes = field(repr=False)

    def key(self, label: str, length: int = KEY_BYTES) -> bytes:
        """HKDF-SHA256 of the master key under ``label``; different labels give independent keys."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        hkdf = HKDF(algorithm=hashes.SHA256(), length=length, salt=self.salt, info=b"pyface 1 " + label.encode())
        return hkdf.derive(self.master)

    @property
    def check(self) -> bytes:
        """Eight bytes that recognise the secret. Testing a guess against them costs one whole key derivation."""
        return self.key("check", CHECK_BYTES)

    def mac(self, label: str, data: bytes | memoryview) -> str:
        """HMAC-SHA256 of ``data`` under the key of ``label``, in hexadecimal."""
        return hmac.new(self.key(label), data, hashlib.sha256).hexdigest()

    def key_map(self, face: int, height: int, width: int) -> np.ndarray:
        """Key map of one face: ndarray[height, width] int8 of -1 and +1.

        Bits of a ChaCha20 key stream (a key of its own per face, so the nonce may be constant), most significant first,
        row by row, as ``2 * bit - 1``.
        """
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        stream_key = self.key(f"key map {face}")
        stream = Cipher(algorithms.ChaCha20(stream_key, bytes(16)), mode=None).encryptor()
        return _signs(stream.update(bytes(math.ceil(height * width / 8))), height, width)

    def encrypt(self, plain: bytes, bound_to: bytes) -> bytes:
        """AES-256-GCM of ``plain``, tied to ``bound_to``: 12-byte nonce, cipher text, 16-byte tag."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = secrets.token_bytes(12)
        return nonce + AESGCM(self.key("residual")).encrypt(nonce, plain, bound_to)

    def decrypt(self, sealed: bytes, bound_to: bytes) -> bytes | None:
        """Undo :meth:`encrypt`; None if the key, the cipher text or ``bound_to`` is not the right one."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            return AESGCM(self.key("residual")).decrypt(sealed[:12], sealed[12:], bound_to)
        except (InvalidTag, ValueError):
            return None


def derive(secret: Secret, salt: bytes, kdf: Mapping[str, str | int]) -> PhotoKeys:
    """Keys of one photo.

    Args:
        secret: key or password.
        salt: 16 random bytes, new for every photo.
        kdf: as :func:`kdf_of` returns and a record stores it: ``{"name": "none"}`` for a key, or ``"argon2id"`` with
            ``memory_kib``, ``passes`` and ``lanes`` for a password.

    Raises:
        WrongKeyError: a password where the photo wants a key file, or the reverse.
        UserError: the cost is out of bounds.
    """
    if (kdf["name"] == "argon2id") != secret.is_password:
        wanted, got = ("a password", "a key file") if kdf["name"] == "argon2id" else ("a key file", "a password")
        raise WrongKeyError(f"this photo was protected with {wanted}, not {got}")
    if not secret.is_password:
        return PhotoKeys(salt, secret.material)
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    cost = Argon2Cost(kdf["memory_kib"], kdf["passes"], kdf["lanes"])
    argon2 = Argon2id(
        salt=salt, length=KEY_BYTES, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib
    )
    return PhotoKeys(salt, argon2.derive(secret.material))


def kdf_of(secret: Secret, cost: Argon2Cost | None = None) -> dict[str, str | int]:
    """How keys are derived from ``secret``, in the form a record stores; ``cost`` None is the default cost."""
    if not secret.is_password:
        return {"name": "none"}
    cost = cost or Argon2Cost()
    return {"name": "argon2id", "memory_kib": cost.memory_kib, "passes": cost.passes, "lanes": cost.lanes}


def legacy_key_map(secret: str | bytes | int, height: int, width: int) -> np.ndarray:
    """Key map of the authors' released code: ndarray[height, width] int8 of -1 and +1. **Insecure.**

    PBKDF2-HMAC-SHA512 with the constant salt ``0x01`` and 10 iterations (PRO-Face S, released code): every photo of one
    secret shares one map and a guess costs next to nothing. Only for reading files made with that code.

    Args:
        secret: text (UTF-8), bytes, or an integer from 0 to 255 that stands for one byte.
        height: rows. ``height * width`` must be a multiple of 8.
        width: columns.
    """
    if height < 1 or width < 1 or height * width % 8:
        raise UserError(f"legacy_key_map: height * width must be a positive multiple of 8, got {height} x {width}")
    if isinstance(secret, int):
        if not 0 <= secret <= 255:
            raise UserError(f"legacy_key_map: an integer secret is one byte, 0 to 255, got {secret}")
        secret = bytes([secret])
    elif isinstance(secret, str):
        secret = secret.encode()
    return _signs(hashlib.pbkdf2_hmac("sha512", secret, b"\x01", 10, height * width // 8), height, width)


def _signs(stream: bytes, height: int, width: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=height * width)
    return (2 * bits.astype(np.int8) - 1).reshape(height, width)
