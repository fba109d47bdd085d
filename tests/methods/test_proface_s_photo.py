"""Whole photos, through a small untrained network: what is promised here does not depend on what it has learnt.

The last tests use the weights of the package, on portraits they were never trained on.
"""

import math
import os
import struct
import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyface.data.images import Photo
from pyface.errors import UserError
from pyface.methods.proface_s import photo as photos
from pyface.methods.proface_s.model import ProFaceS
from pyface.methods.proface_s.photo import (
    NoFaceError,
    ProtectedPhoto,
    find_faces,
    is_protected,
    is_protection_of,
    load_protected,
    protect_photo,
    recover_photo,
    save_protected,
    weights_digest,
)
from pyface.vault.keys import Argon2Cost, Secret, WrongKeyError
from pyface.vault.record import AlteredError, RecordError

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (51, 64, 3), np.uint8)  # an odd height on purpose
BOXES = [(3, 5, 21, 18), (30, 10, 34, 41)]
SECRET = Secret.from_key(bytes(range(32)))
OTHER = Secret.from_key(bytes(32))
LIGHT = Argon2Cost(memory_kib=64, passes=1, lanes=1)


def small_model(seed: int = 0) -> ProFaceS:
    torch.manual_seed(seed)
    model = ProFaceS(blocks=1, growth=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


MODEL = small_model()


def protect(photo=PHOTO, secret=SECRET, **options) -> ProtectedPhoto:
    options = {"boxes": BOXES, "model": MODEL, "cost": LIGHT, **options}
    return protect_photo(photo, secret, **options)[0]


def recover(protected, secret=SECRET, **options):
    return recover_photo(protected, secret, **{"model": MODEL, **options})


def outside(faces, shape=PHOTO.shape[:2]) -> np.ndarray:
    mask = np.ones(shape, bool)
    for x, y, w, h in faces:
        mask[y : y + h, x : x + w] = False
    return mask


# ---- faces ---------------------------------------------------------------------


@given(st.integers(16, 90), st.integers(16, 90), st.data())
@settings(max_examples=200, deadline=None)
def test_faces_are_even_disjoint_inside_and_cover_what_was_asked_for(width, height, data):
    boxes = []
    for _ in range(data.draw(st.integers(1, 5))):
        x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        boxes.append((x, y, data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y))))
    faces = find_faces(np.zeros((height, width, 3), np.uint8), boxes)
    covered = np.zeros((height, width), int)
    for x, y, w, h in faces:
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        assert min(w, h) >= 16
        assert w % 2 == h % 2 == 0
        covered[y : y + h, x : x + w] += 1
    assert covered.max() == 1
    for x, y, w, h in boxes:
        # Only the last line or column of an odd photo can be left over.
        missed = np.argwhere(covered[y : y + h, x : x + w] == 0) + (y, x)
        at_edge = ((missed[:, 0] == height - 1) & (height % 2 == 1)) | ((missed[:, 1] == width - 1) & (width % 2 == 1))
        at_edge |= ((missed[:, 0] == 0) & (height % 2 == 1)) | ((missed[:, 1] == 0) & (width % 2 == 1))
        assert at_edge.all()


@pytest.mark.parametrize("box", [(0, 0, 65, 20), (-1, 0, 20, 20), (0, 0, 0, 20), (60, 40, 10, 10), (0, 0, 20, -20)])
def test_box_outside_the_photo(box):
    with pytest.raises(UserError, match="leaves the photo of 64 x 51 pixels"):
        find_faces(PHOTO, [box])


def test_photo_that_is_too_small():
    for shape in ((1, 1), (15, 100), (100, 15)):
        with pytest.raises(UserError, match="at least 16 x 16 are needed"):
            find_faces(np.zeros((*shape, 3), np.uint8), [(0, 0, 1, 1)])


def test_no_face_offers_a_box():
    with pytest.raises(NoFaceError, match="--box"):
        protect(boxes=())


def test_detector_adds_to_boxes():
    assert find_faces(PHOTO, [(0, 0, 16, 16)], lambda photo: [(40, 20, 16, 16)]) == ((0, 0, 16, 16), (40, 20, 16, 16))
    assert find_faces(PHOTO, (), lambda photo: [(40, 20, 16, 16)]) == ((40, 20, 16, 16),)


@given(st.integers(1, 2000).map(lambda n: 2 * n), st.integers(32, 1024))
@settings(max_examples=200, deadline=None)
def test_tiles_are_even_and_fill_the_face(size, tile):
    spans = photos._spans(size, tile)
    assert spans[0].start == 0
    assert spans[-1].stop == size
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert all((s.stop - s.start) % 2 == 0 and 0 < s.stop - s.start <= tile for s in spans)
    assert len(spans) == math.ceil(size / (tile - tile % 2))


# ---- protecting and recovering ----------------------------------------------------


def test_only_faces_change_and_size_stays():
    before = PHOTO.copy()
    protected = protect()
    mask = outside(protected.record.faces)
    assert protected.pixels.shape == PHOTO.shape
    assert (protected.pixels[mask] == PHOTO[mask]).all()
    assert (protected.pixels[~mask] != PHOTO[~mask]).mean() > 0.9
    assert (PHOTO == before).all()
    recovered = recover(protected)
    assert (recovered.pixels[mask] == PHOTO[mask]).all()
    assert recovered.exact is False
    assert recovered.problems == ()


def test_what_goes_through_the_network_is_what_the_paper_says():
    """One face, one tile: key map, obfuscated 8-bit picture, clamp and 8-bit rounding, put together by hand."""
    from pyface.data.obfuscators import obfuscate
    from pyface.vault.keys import derive

    protected = protect(boxes=[(4, 6, 20, 30)], obfuscator="pixelate", strength=40.0)
    keys = derive(SECRET, bytes.fromhex(protected.record.salt), {"name": "none"})
    key_map = torch.from_numpy(keys.key_map(0, 30, 20)).float()[None, None]
    face = torch.from_numpy(PHOTO[6:36, 4:24]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        target = ((obfuscate(face, "pixelate", 40.0) + 1) * 127.5).round() / 127.5 - 1
        stored = MODEL.protect(face, target, key_map).clamp(-1, 1)
        stored = ((stored + 1) * 127.5).round()
        again = MODEL.recover(stored / 127.5 - 1, key_map).clamp(-1, 1)
    found = torch.from_numpy(protected.pixels[6:36, 4:24]).permute(2, 0, 1)[None]
    assert (found - stored).abs().max() <= 1
    assert (found == stored).float().mean() > 0.999
    back = torch.from_numpy(recover(protected).pixels[6:36, 4:24]).permute(2, 0, 1)[None]
    assert (back - (again + 1) * 127.5).abs().max() < 2


def test_every_photo_has_its_own_salt_and_map():
    a, b = protect(), protect()
    assert a.record.salt != b.record.salt
    assert (a.pixels != b.pixels).any()


@pytest.mark.parametrize("exact", [False, True])
def test_alpha_and_colour_profile_are_kept(exact):
    alpha = RNG.integers(0, 256, PHOTO.shape[:2], np.uint8)
    protected = protect(Photo(PHOTO, alpha, b"profile"), exact=exact)
    assert (protected.pixels[..., 3] == alpha).all()
    assert protected.icc_profile == b"profile"
    recovered = recover(protected)
    assert (recovered.pixels[..., 3] == alpha).all()
    assert recovered.icc_profile == b"profile"
    if exact:
        assert (recovered.pixels == np.dstack((PHOTO, alpha))).all()


def test_pillow_images_and_arrays_are_photos():
    for photo in (
        Image.fromarray(PHOTO),
        PHOTO,
        np.dstack((PHOTO, PHOTO[..., 0])),
        Image.fromarray(PHOTO).convert("L"),
    ):
        assert recover(protect(photo, exact=True)).exact


def test_exact_recovery_is_bit_for_bit():
    protected = protect(exact=True)
    recovered = recover(protected)
    assert recovered.exact
    assert (recovered.pixels == PHOTO).all()


def test_exact_recovery_does_not_depend_on_threads_or_tiny_differences(monkeypatch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        protected = protect(exact=True)
        torch.set_num_threads(2)
        assert recover(protected).exact
    finally:
        torch.set_num_threads(threads)
    honest, noise = photos._recover_levels, np.random.default_rng(1)

    def another_machine(*args, **kwargs):
        return [face + noise.uniform(-1e-7, 1e-7, face.shape) for face in honest(*args, **kwargs)]

    monkeypatch.setattr(photos, "_recover_levels", another_machine)
    assert (recover(protected).pixels == PHOTO).all()


def test_residual_mends_levels_at_a_rounding_boundary():
    faces = [(0, 0, 16, 16)]
    original = PHOTO[:16, :16]
    levels = original.astype(float)
    levels[::2] = np.clip(levels[::2] + 0.5, 0, 254.5)
    payload = photos._pack_residual(original, [levels + 1e-8], faces)
    (found,) = photos._apply_residual(payload, [photos._to_bytes(levels - 1e-8)])
    assert (found == original).all()


def test_exact_recovery_that_fails_says_so(monkeypatch):
    protected = protect(exact=True)
    honest = photos._recover_levels
    monkeypatch.setattr(photos, "_recover_levels", lambda *args, **kw: [255 - face for face in honest(*args, **kw)])
    with pytest.raises(AlteredError, match="did not reproduce"):
        recover(protected)
    forced = recover(protected, force=True)
    assert not forced.exact
    assert len(forced.problems) == 1


def test_residual_is_not_readable_without_the_key():
    flat = np.zeros_like(PHOTO)
    residual = protect(flat, exact=True).residual
    assert len(np.unique(np.frombuffer(residual, np.uint8))) > min(200, len(residual) // 2)


def test_large_faces_go_through_in_tiles_and_come_back():
    sizes = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MODEL

        def protect(self, image, *rest):
            sizes.append(tuple(image.shape[2:]))
            return self.inner.protect(image, *rest)

        def recover(self, image, *rest):
            sizes.append(tuple(image.shape[2:]))
            return self.inner.recover(image, *rest)

    model, photo = Spy(), RNG.integers(0, 256, (150, 201, 3), np.uint8)
    protected = protect(photo, boxes=[(0, 0, 201, 150)], tile=64, model=model, exact=True)
    assert set(sizes) == {(h, w) for h in (50,) for w in (50,)}
    assert len(sizes) == 2 * 3 * 4
    assert (recover(protected, model=model).pixels == photo).all()
    assert protected.record.tile == 64


def test_password_photos():
    secret = Secret.from_password("correct horse")
    protected = protect(secret=secret, exact=True)
    assert protected.record.kdf["name"] == "argon2id"
    assert recover(protected, secret).exact
    with pytest.raises(WrongKeyError, match="wrong key"):
        recover(protected, Secret.from_password("correct horsf"))
    with pytest.raises(WrongKeyError, match="protected with a password"):
        recover(protected, SECRET)
    assert len(recover(protected, SECRET, force=True).problems) == 2


@pytest.mark.parametrize("exact", [False, True])
def test_wrong_key_is_an_error_and_forced_it_is_not_the_original(exact):
    protected = protect(exact=exact)
    with pytest.raises(WrongKeyError, match="wrong key"):
        recover(protected, OTHER)
    forced = recover(protected, OTHER, force=True)
    assert isinstance(forced.problems[0], WrongKeyError)
    assert not forced.exact
    mask = outside(protected.record.faces)
    assert (forced.pixels[~mask] != PHOTO[~mask]).mean() > 0.9


def test_other_weights_are_an_error():
    protected = protect()
    with pytest.raises(RecordError, match="other weights"):
        recover(protected, model=small_model(1))
    assert recover(protected, model=small_model(1), force=True).problems
    assert weights_digest(small_model(0)) == weights_digest(MODEL) != weights_digest(small_model(1))


def test_network_driven_to_infinity_is_still_a_picture():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def protect(self, image, obfuscated, key_map):
            return obfuscated

        def recover(self, image, key_map):
            return image / 0 * 0 + float("nan")

    protected = protect(model=Broken())
    assert recover(protected, model=Broken()).pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strength": -1.0}, "strength must be positive"),
        ({"strength": float("nan")}, "strength must be positive"),
        ({"obfuscator": "blurr"}, "unknown obfuscator"),
        ({"tile": 1}, "tile must be"),
        ({"detector": "none"}, "unknown detector"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(UserError, match=match):
        protect(**options)


# ---- files -------------------------------------------------------------------------


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    position, chunks = 8, []
    while position < len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        chunks.append((name, content[position + 8 : position + 8 + length]))
        position += 12 + length
    return chunks


def with_chunks(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks, with right checksums: what a forger would write."""
    body = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.fixture(scope="module")
def stored_content(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "a.png"
    save_protected(path, protect(exact=True))
    return path.read_bytes()


@pytest.fixture
def stored(tmp_path, stored_content):
    path = tmp_path / "a.png"
    path.write_bytes(stored_content)
    return path


def test_file_round_trip(stored):
    protected = load_protected(stored)
    assert (recover(protected).pixels == PHOTO).all()
    assert is_protected(stored)
    assert (np.asarray(Image.open(stored)) == protected.pixels).all()
    assert os.listdir(stored.parent) == ["a.png"]


def test_chunks_are_private_and_unsafe_to_copy(stored):
    names = [name for name, _ in chunks_of(stored.read_bytes())]
    assert names == [b"IHDR", b"iTXt", b"IDAT", b"pfRX", b"IEND"]


def test_nothing_secret_is_stored(stored):
    content = stored.read_bytes()
    assert SECRET.material not in content
    assert SECRET.material.hex().encode() not in content


def test_pixels_changed_by_an_editor(stored):
    protected = load_protected(stored)
    x, y, _, _ = protected.record.faces[0]
    for px, py in ((x, y), (0, 0)):
        pixels = protected.pixels.copy()
        pixels[py, px, 0] ^= 1
        with pytest.raises(AlteredError, match="pixels were changed"):
            recover(replace(protected, pixels=pixels))
        assert recover(replace(protected, pixels=pixels), force=True).problems


def test_forged_record_and_residual(stored):
    chunks = chunks_of(stored.read_bytes())
    for index, old, new, error in (
        (1, b'"tile":512', b'"tile":256', AlteredError),
        (1, b'"obfuscator":"blur"', b'"obfuscator":"blus"', AlteredError),
        (1, b'"format":1', b'"format":2', RecordError),
        (1, b'"width":64', b'"width":66', RecordError),
    ):
        forged = list(chunks)
        forged[index] = (forged[index][0], forged[index][1].replace(old, new))
        assert forged != chunks
        stored.write_bytes(with_chunks(forged))
        with pytest.raises(error):
            recover(load_protected(stored))
    residual = bytearray(chunks[3][1])
    residual[20] ^= 1
    for forged in (chunks[:3] + chunks[4:], [*chunks[:3], (b"pfRX", bytes(residual)), chunks[4]]):
        stored.write_bytes(with_chunks(forged))
        with pytest.raises(AlteredError, match="residual"):
            recover(load_protected(stored))
        forced = recover(load_protected(stored), force=True)
        assert not forced.exact
        assert len(forced.problems) == 1


def test_recompressed_file_has_no_record(stored, tmp_path):
    for suffix in ("png", "jpg"):
        path = tmp_path / f"copy.{suffix}"
        Image.open(stored).save(path)
        with pytest.raises(UserError, match="carries no pyface record|is not a PNG"):
            load_protected(path)
        assert not is_protected(path)


def test_losslessly_recompressed_pixels_with_the_record_still_open(stored, tmp_path):
    chunks = chunks_of(stored.read_bytes())
    again = zlib.compress(zlib.decompress(b"".join(c for n, c in chunks if n == b"IDAT")), 1)
    stored.write_bytes(with_chunks([(n, again if n == b"IDAT" else c) for n, c in chunks]))
    assert recover(load_protected(stored)).exact


def test_resized_file_is_refused(stored):
    chunks = dict(chunks_of(stored.read_bytes()))
    small = Image.fromarray(PHOTO[:20, :20])
    small.save(stored)
    others = dict(chunks_of(stored.read_bytes()))
    chunks[b"IHDR"], chunks[b"IDAT"] = others[b"IHDR"], others[b"IDAT"]
    stored.write_bytes(with_chunks(list(chunks.items())))
    with pytest.raises(RecordError, match="resized or altered"):
        load_protected(stored)


def test_record_for_another_shape_is_refused():
    protected = protect()
    for pixels in (protected.pixels[:-1], np.dstack((protected.pixels, protected.pixels[..., 0]))):
        with pytest.raises(RecordError, match="is for a photo of 64 x 51 pixels"):
            recover(replace(protected, pixels=pixels), force=True)


def test_cut_off_file(stored):
    content = stored.read_bytes()
    for length in (0, 7, 20, 100, len(content) // 2, len(content) - 1):
        stored.write_bytes(content[:length])
        with pytest.raises(UserError, match="not a PNG|cut off"):
            load_protected(stored)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_no_forgery_crashes_or_passes(stored_content, tmp_path_factory, data):
    """Whatever a forger does to the chunks, checksums mended, is refused or recovers exactly the original."""
    chunks = chunks_of(stored_content)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(chunks) - 1))
        name, content = chunks[index]
        action = data.draw(st.sampled_from(["flip", "drop", "double", "cut"]))
        if action == "drop":
            del chunks[index]
            if not chunks:
                break
        elif action == "double":
            chunks.insert(index, chunks[index])
        elif content:
            position = data.draw(st.integers(0, len(content) - 1))
            changed = bytes([content[position] ^ data.draw(st.integers(1, 255))]) if action == "flip" else b""
            chunks[index] = (name, content[:position] + changed + (content[position + 1 :] if changed else b""))
    path = tmp_path_factory.getbasetemp() / "forged.png"
    path.write_bytes(with_chunks(chunks))
    try:
        recovered = recover(load_protected(path, max_megapixels=1))
    except UserError:
        return
    assert (recovered.pixels[..., :3] == PHOTO).all()


def test_file_that_does_not_read_back_never_appears(tmp_path, monkeypatch):
    protected = protect()
    other = replace(protected, pixels=protected.pixels ^ 1)
    monkeypatch.setattr(photos, "load_protected", lambda *args, **kwargs: other)
    with pytest.raises(UserError, match="did not read back"):
        save_protected(tmp_path / "a.png", protected)
    assert os.listdir(tmp_path) == []


def test_is_protection_of_knows_photo_key_and_content():
    protected = protect()
    assert is_protection_of(protected, Photo(PHOTO), SECRET)
    assert not is_protection_of(protected, Photo(PHOTO), OTHER)
    assert not is_protection_of(protected, Photo(PHOTO), Secret.from_password("correct horse"))
    changed = PHOTO.copy()
    changed[8, 8, 0] ^= 1  # inside a face, where the protected photo no longer shows it
    assert not is_protection_of(protected, Photo(changed), SECRET)
    pixels = protected.pixels.copy()
    pixels[0, 0, 0] ^= 1
    assert not is_protection_of(replace(protected, pixels=pixels), Photo(PHOTO), SECRET)


# ---- with the weights of the package --------------------------------------------------


def test_portrait_meets_the_bars_from_its_file(tmp_path):
    """Bars of the project: recovery >= 36 dB, protected against obfuscated >= 38 dB, wrong key <= 13 dB."""
    from skimage.data import astronaut

    original = astronaut()
    protected, quality = protect_photo(original, SECRET)
    save_protected(tmp_path / "a.png", protected)
    stored = load_protected(tmp_path / "a.png")
    ((x, y, w, h),) = stored.record.faces
    area = np.s_[y : y + h, x : x + w]
    recovered = recover_photo(stored, SECRET).pixels[area]
    wrong = recover_photo(stored, OTHER, force=True).pixels[area]
    assert quality.protected >= 38
    assert photos._psnr(recovered, original[area]) >= 36
    assert photos._psnr(recovered, original[area]) == pytest.approx(quality.recovered, abs=0.1)
    assert photos._psnr(wrong, original[area]) <= 13
