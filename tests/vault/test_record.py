"""The record's reader: whatever the file says, it is either the record that was written or a clear refusal."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyface.vault.keys import PhotoKeys, WrongKeyError
from pyface.vault.record import AlteredError, Record, RecordError, digest

KEYS = PhotoKeys(bytes(16), bytes(range(32)))
PIXELS = np.arange(40 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3)
UNSEALED = Record(
    method="proface_s",
    weights="0a" * 32,
    width=60,
    height=40,
    alpha=False,
    faces=((0, 0, 16, 20), (20, 2, 40, 38)),
    tile=512,
    obfuscator="blur",
    strength=None,
    salt="00" * 16,
    kdf={"name": "argon2id", "memory_kib": 65536, "passes": 3, "lanes": 4},
    check=KEYS.check.hex(),
    original="1b" * 32,
    pixels=digest(PIXELS),
)
RECORD = UNSEALED.sealed(KEYS, None)
TEXT = RECORD.to_json()


def test_round_trip():
    assert Record.from_json(TEXT) == RECORD
    assert Record.from_json(TEXT.encode()) == RECORD
    with_strength = replace(UNSEALED, strength=20.0, kdf={"name": "none"}).sealed(KEYS, b"residual")
    assert Record.from_json(with_strength.to_json()) == with_strength


def test_sound_photo_has_no_problems():
    assert RECORD.problems(KEYS, PIXELS, None) == []
    assert UNSEALED.sealed(KEYS, b"residual").problems(KEYS, PIXELS, b"residual") == []


def test_wrong_key_is_told_from_alteration():
    wrong = PhotoKeys(bytes(16), bytes(32))
    assert [type(p) for p in RECORD.problems(wrong, PIXELS, None)] == [WrongKeyError]
    changed = PIXELS.copy()
    changed[3, 4, 1] ^= 1
    problems = RECORD.problems(KEYS, changed, None)
    assert [type(p) for p in problems] == [AlteredError]
    assert "pixels were changed" in str(problems[0])
    # Whoever changes pixels and mends their digest still lacks the key of the HMAC.
    problems = replace(RECORD, pixels=digest(changed)).problems(KEYS, changed, None)
    assert [str(p) for p in problems] == ["the photo's record was altered after protection"]


@pytest.mark.parametrize(("stored", "found"), [(b"residual", None), (b"residual", b"residuaL"), (None, b"residual")])
def test_residual_is_authenticated(stored, found):
    problems = UNSEALED.sealed(KEYS, stored).problems(KEYS, PIXELS, found)
    assert [type(p) for p in problems] == [AlteredError]
    assert "residual" in str(problems[0])


@pytest.mark.parametrize(
    "field", ["weights", "original", "salt", "obfuscator", "strength", "tile", "faces", "alpha", "kdf", "method"]
)
def test_every_field_is_authenticated(field):
    other = {
        "weights": "ff" * 32, "original": "ff" * 32, "salt": "ff" * 16, "obfuscator": "median", "strength": 3.0,
        "tile": 256, "faces": ((0, 0, 16, 20),), "alpha": True, "kdf": {"name": "none"}, "method": "other",
    }[field]  # fmt: skip
    problems = replace(RECORD, **{field: other}).problems(KEYS, PIXELS, None)
    assert "record was altered" in str(problems[0])


IMPOSSIBLE = {
    "faces": [
        [], [[0, 0, 16]], [[0, 0, 15, 16]], [[0, 0, 16, 17]], [[0, 0, 0, 16]], [[-2, 0, 16, 16]], [[50, 0, 16, 16]],
        [[0, 30, 16, 16]], [[0, 0, 16, 16], [14, 0, 16, 16]], [[0, 0, 16, 16], [0, 0, 16, 16]], [[0.0, 0, 16, 16]],
        [["0", 0, 16, 16]], [[True, 0, 16, 16]], {"0": 1}, None, "faces", [[0, 0, 16, 16]] * 5000,
        [[0, 0, 1 << 62, 16]],
    ],
    "width": [0, -60, 60.0, "60", None, True, 1 << 40, 10**100],
    "tile": [0, 63, 1 << 20, 512.0, None],
    "alpha": [0, None, "false"],
    "salt": ["", "00" * 15, "00" * 17, "0G" * 16, "AA" * 16, 0, None],
    "mac": ["", "00" * 31, None],
    "residual": ["", 0, "00" * 31],
    "strength": [0, 0.0, -1.0, "15", True, 15],
    "method": ["", "a" * 65, 3, None, "a\nb", "é"],
    "kdf": [
        None, {}, [], {"name": "argon2id"}, {"name": "scrypt"}, {"name": "none", "passes": 1}, {"name": ["none"]},
        {"name": "argon2id", "memory_kib": 100 << 20, "passes": 3, "lanes": 4},
        {"name": "argon2id", "memory_kib": 65536, "passes": 1 << 40, "lanes": 4},
        {"name": "argon2id", "memory_kib": 65536, "passes": 3, "lanes": 0},
        {"name": "argon2id", "memory_kib": 65536, "passes": 3, "lanes": 4.0},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, vs in IMPOSSIBLE.items() for v in vs], ids=lambda v: repr(v)[:40]
)
def test_impossible_values_are_refused(field, value):
    values = json.loads(TEXT)
    values[field] = value
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    with pytest.raises(RecordError, match=field if field != "width" else "width|canonical"):
        Record.from_json(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ("[" * 100_000, "JSON"),
        ('{"format":1}', "fields"),
        ('{"format":true}', "fields"),
        (TEXT.replace('"format":1', '"format":2'), "newer pyface"),
        (TEXT.replace('"format":1', '"format":0'), "fields"),
        (TEXT[:-1] + ',"more":1}', "fields"),
        (TEXT.replace(":", ": ", 1), "canonical"),
        (TEXT[:-1] + ',"width":60}', "canonical"),
        (TEXT.replace('"width":60', '"width":' + "9" * 5000), "JSON"),
        (TEXT.replace('"strength":null', '"strength":NaN'), "strength"),
        (TEXT.replace('"strength":null', '"strength":1e999'), "strength"),
        (b"\xff\xfe" + TEXT.encode(), "JSON"),
        ("{" + " " * (1 << 20) + "}", "larger"),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_broken_texts_are_refused(text, match):
    with pytest.raises(RecordError, match=match):
        Record.from_json(text)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_text_is_refused_or_fails_authentication(data):
    """Any edit is either refused at reading or shows when the record is verified; nothing else is ever raised."""
    text = bytearray(TEXT.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 8)))
        text[start:stop] = data.draw(st.binary(max_size=8) | st.sampled_from([b"0", b"-", b"]", b"[", b"null", b"1e9"]))
    try:
        record = Record.from_json(bytes(text))
    except RecordError:
        return
    assert bytes(text) == TEXT.encode() or record.problems(KEYS, PIXELS, None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted(json.loads(TEXT))), json_values)
@settings(max_examples=300, deadline=None)
def test_any_json_in_any_field_is_refused_or_sane(field, value):
    values = json.loads(TEXT)
    values[field] = value
    try:
        record = Record.from_json(json.dumps(values, sort_keys=True, separators=(",", ":")))
    except RecordError:
        return
    assert type(getattr(record, field)) is type(getattr(RECORD, field)) or field in ("strength", "residual")
