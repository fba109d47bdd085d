"""Secrets and derived keys. The frozen vectors guard every photo that is already out there: they must never change."""

import hashlib
import hmac
import os
import stat

import numpy as np
import pytest

from pyface.errors import UserError
from pyface.vault.keys import (
    Argon2Cost,
    PhotoKeys,
    Secret,
    WrongKeyError,
    derive,
    kdf_of,
    legacy_key_map,
    read_key_file,
    write_key_file,
)

SALT = bytes(range(16))
KEY = bytes(range(32))
FROZEN_MAP = "8e217b50878f3f07b8cf282c9801eeaac3e7b61a06dbc37cc0a82f9fdb22f693"
FROZEN_ARGON2 = "25ce5233cc1e4d37e9bca31bfef41710e40446cd1cb575932791c5fd3780bd3c"
LIGHT = Argon2Cost(memory_kib=64, passes=1, lanes=1)


def keys_of(key: bytes = KEY, salt: bytes = SALT) -> PhotoKeys:
    return derive(Secret.from_key(key), salt, {"name": "none"})


def hkdf_sha256(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, written from its text."""
    extracted = hmac.digest(salt, key, "sha256")
    block, out = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


def test_subkeys_are_hkdf_of_the_master_key():
    keys = keys_of()
    assert keys.key("record") == hkdf_sha256(KEY, SALT, b"pyface 1 record", 32)
    assert keys.check == hkdf_sha256(KEY, SALT, b"pyface 1 check", 8)
    assert keys.mac("record", b"data") == hmac.digest(keys.key("record"), b"data", "sha256").hex()


def test_keys_of_different_uses_faces_and_photos_differ():
    keys, other_photo, other_key = keys_of(), keys_of(salt=bytes(16)), keys_of(key=bytes(32))
    labels = ("record", "original", "residual", "check", "key map 0", "key map 1")
    made = [k.key(label) for k in (keys, other_photo, other_key) for label in labels]
    assert len(set(made)) == len(made)
    assert not any(KEY in key for key in made)


def test_key_map_is_the_frozen_chacha20_stream():
    key_map = keys_of().key_map(3, 6, 10)
    assert key_map.shape == (6, 10)
    assert key_map.dtype == np.int8
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream_key = hkdf_sha256(KEY, SALT, b"pyface 1 key map 3", 32)
    stream = Cipher(algorithms.ChaCha20(stream_key, bytes(16)), None).encryptor().update(bytes(8))
    bits = "".join(f"{byte:08b}" for byte in stream)[:60]
    assert [2 * int(bit) - 1 for bit in bits] == key_map.reshape(-1).tolist()
    assert hashlib.sha256(keys_of().key_map(0, 64, 48)).hexdigest() == FROZEN_MAP


def test_key_map_is_balanced_and_unlike_that_of_another_face():
    a, b = (keys_of().key_map(face, 256, 256).astype(int) for face in (0, 1))
    assert abs(a.mean()) < 0.02  # five standard deviations of 65,536 fair signs
    assert abs((a * b).mean()) < 0.02
    assert abs((a[1:] * a[:-1]).mean()) < 0.02


def test_password_goes_through_argon2id():
    secret = Secret.from_password("correct horse")
    kdf = kdf_of(secret, LIGHT)
    assert kdf == {"name": "argon2id", "memory_kib": 64, "passes": 1, "lanes": 1}
    assert derive(secret, SALT, kdf).master.hex() == FROZEN_ARGON2
    assert derive(secret, bytes(16), kdf).master.hex() != FROZEN_ARGON2
    assert kdf_of(secret) == {"name": "argon2id", "memory_kib": 65536, "passes": 3, "lanes": 4}


def test_password_is_the_same_in_composed_and_decomposed_unicode():
    assert Secret.from_password("\u00e9t\u00e9") == Secret.from_password("e\u0301te\u0301")


def test_password_for_a_key_photo_and_the_reverse_are_wrong_keys():
    with pytest.raises(WrongKeyError, match="protected with a key file, not a password"):
        derive(Secret.from_password("correct horse"), SALT, {"name": "none"})
    with pytest.raises(WrongKeyError, match="protected with a password, not a key file"):
        derive(Secret.from_key(KEY), SALT, kdf_of(Secret.from_password("x"), LIGHT))


@pytest.mark.parametrize(
    "cost",
    [
        {"memory_kib": 100 << 20, "passes": 3, "lanes": 4},
        {"memory_kib": 64, "passes": 10**6, "lanes": 1},
        {"memory_kib": 64, "passes": 0, "lanes": 1},
        {"memory_kib": 64, "passes": 1, "lanes": 1000},
        {"memory_kib": 8, "passes": 1, "lanes": 4},
    ],
    ids=["100 GiB", "a million passes", "no pass", "1000 lanes", "less than 8 KiB a lane"],
)
def test_hostile_argon2_cost_is_refused(cost):
    with pytest.raises(UserError, match="Argon2id"):
        derive(Secret.from_password("correct horse"), SALT, {"name": "argon2id", **cost})


def test_secret_does_not_show_in_its_repr():
    for thing in (Secret.from_key(KEY), Secret.from_password("correct horse"), keys_of()):
        assert KEY.hex() not in repr(thing)
        assert str(KEY) not in repr(thing)
        assert "horse" not in repr(thing)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_key_of_wrong_length_is_refused(key):
    with pytest.raises(UserError, match="exactly 32 bytes"):
        Secret.from_key(key)


def test_empty_password_is_refused():
    with pytest.raises(UserError, match="empty"):
        Secret.from_password("")


def test_new_key_file_is_private_and_never_replaced(tmp_path):
    path, secret = tmp_path / "key", Secret.generate()
    write_key_file(path, secret)
    assert read_key_file(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 65
    with pytest.raises(UserError, match="never replaced"):
        write_key_file(path, Secret.generate())
    assert read_key_file(path) == secret
    assert Secret.generate() != Secret.generate()


@pytest.mark.parametrize(
    "content", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n", KEY.hex().encode() + b"\r\n"]
)
def test_key_file_raw_or_hexadecimal(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    assert read_key_file(path) == Secret.from_key(KEY)


@pytest.mark.parametrize("content", [b"", KEY + b"\n", b"z" * 64, b"\xff" * 64, KEY.hex().encode()[:-1], bytes(10**6)])
def test_bad_key_file_is_refused(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UserError, match="exactly 32 raw bytes or 64 hexadecimal digits"):
        read_key_file(path)


def test_missing_key_file_and_unwritable_one_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot read key file"):
        read_key_file(tmp_path / "none")
    with pytest.raises(UserError, match="cannot create key file"):
        write_key_file(tmp_path / "none" / "key", Secret.generate())
    with pytest.raises(UserError, match="password is not written"):
        write_key_file(tmp_path / "key", Secret.from_password("correct horse"))


def test_key_file_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_key_file(tmp_path / "key", Secret.generate())
    assert list(tmp_path.iterdir()) == []


def test_encryption_is_bound_to_key_data_and_context():
    keys = keys_of()
    sealed = keys.encrypt(b"plain", b"context")
    assert keys.decrypt(sealed, b"context") == b"plain"
    assert keys.encrypt(b"plain", b"context") != sealed
    assert keys.decrypt(sealed, b"other context") is None
    assert keys_of(key=bytes(32)).decrypt(sealed, b"context") is None
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        assert keys.decrypt(bytes(changed), b"context") is None
    for length in (0, 5, 12, 20):
        assert keys.decrypt(sealed[:length], b"context") is None


def test_legacy_key_map_is_the_released_key_derivation():
    secret, height, width = "secret", 16, 24
    blocks = []
    for number in (1,):  # one block of SHA-512 is 512 bits, more than 16 * 24
        u = hmac.digest(secret.encode(), b"\x01" + number.to_bytes(4, "big"), "sha512")
        total = int.from_bytes(u, "big")
        for _ in range(9):
            u = hmac.digest(secret.encode(), u, "sha512")
            total ^= int.from_bytes(u, "big")
        blocks.append(total.to_bytes(64, "big"))
    bits = "".join(f"{byte:08b}" for byte in b"".join(blocks))[: height * width]
    assert legacy_key_map(secret, height, width).reshape(-1).tolist() == [2 * int(bit) - 1 for bit in bits]
    assert (legacy_key_map(7, 16, 16) == legacy_key_map(b"\x07", 16, 16)).all()


@pytest.mark.parametrize(("secret", "height", "width"), [("a", 3, 5), ("a", 0, 8), (256, 8, 8), (-1, 8, 8)])
def test_legacy_key_map_refuses(secret, height, width):
    with pytest.raises(UserError, match="legacy_key_map"):
        legacy_key_map(secret, height, width)
