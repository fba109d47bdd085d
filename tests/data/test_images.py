"""Reading what strangers made, and writing without ever leaving half a file."""

import io
import os
import resource
import struct
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyface.data.images import as_photo, read_photo, read_png_chunks, replacing, write_png
from pyface.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), np.uint8)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def saved(tmp_path):
    def save(image, name="photo.png", **options):
        path = tmp_path / name
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
        return path

    return save


@contextmanager
def disk_that_fills_after(size: int):
    """Writes beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- reading ----------------------------------------------------------------


def test_rgb_comes_back_as_it_is(saved):
    photo = read_photo(saved(RGB))
    assert (photo.pixels == RGB).all()
    assert photo.pixels.dtype == np.uint8
    assert photo.alpha is None
    assert photo.notes == ()


def test_alpha_is_kept(saved):
    rgba = RNG.integers(0, 256, (12, 17, 4), np.uint8)
    photo = read_photo(saved(rgba))
    assert (photo.stacked() == rgba).all()


def test_transparent_palette_becomes_rgba(saved):
    image = Image.fromarray(RGB).quantize(8)
    photo = read_photo(saved(image, transparency=0))
    assert photo.alpha is not None
    assert (photo.alpha == 0).any()
    assert (photo.pixels == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize(("mode", "note"), [("L", "grey"), ("1", "grey"), ("LA", "grey"), ("P", None)])
def test_other_modes_become_rgb(saved, mode, note):
    image = Image.fromarray(RGB).convert(mode)
    photo = read_photo(saved(image))
    assert photo.pixels.shape == RGB.shape
    assert (photo.pixels == np.asarray(image.convert("RGB"))).all()
    assert [note in text for text in photo.notes] == ([True] if note else [])


def test_cmyk_becomes_rgb_and_says_so(saved):
    photo = read_photo(saved(Image.fromarray(RGB).convert("CMYK"), "photo.jpg"))
    assert photo.pixels.shape == RGB.shape
    assert "CMYK" in photo.notes[0]


def test_exif_rotation_is_applied_and_exif_dropped(saved):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    exif.get_ifd(0x8825)[1] = "N"
    photo = read_photo(saved(RGB, exif=exif))
    assert (photo.pixels == np.rot90(RGB, -1)).all()
    assert any("EXIF" in note for note in photo.notes)


def test_colour_profile_is_kept(saved):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_photo(saved(RGB, icc_profile=profile)).icc_profile == profile


def test_first_frame_of_an_animation(saved):
    frames = [Image.fromarray(RGB).quantize(16), Image.fromarray(255 - RGB).quantize(16)]
    photo = read_photo(saved(frames[0], "photo.gif", save_all=True, append_images=frames[1:]))
    assert (photo.pixels == np.asarray(frames[0].convert("RGB"))).all()
    assert "first of 2 frames" in photo.notes[0]


def test_sixteen_bits_are_refused(tmp_path, saved):
    deep = tmp_path / "rgb16.png"
    deep.write_bytes(png(2, 2, 16, 2, 2 * (b"\0" + bytes(12))))
    grey = saved(np.zeros((4, 4), np.uint16), "grey16.png")
    tiff = saved(Image.fromarray(np.zeros((4, 4), np.float32)), "float.tiff")
    for path in (deep, grey, tiff):
        with pytest.raises(UserError, match="more than 8 bits per channel"):
            read_photo(path)


def test_more_than_8_bits_are_reduced_where_that_is_asked_for(saved, tmp_path):
    grey = np.linspace(0, 65535, 60, dtype=np.uint16).reshape(6, 10)
    for name in ("grey16.png", "grey16.tif"):
        photo = read_photo(saved(grey, name), reduce=True)
        np.testing.assert_array_equal(photo.pixels, np.repeat((grey >> 8)[..., None], 3, -1))
        assert "16 bits per channel are reduced to 8" in photo.notes
    colour = np.stack((grey, grey[::-1], grey[:, ::-1]), -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    (tmp_path / "rgb16.png").write_bytes(png(10, 6, 16, 2, rows))
    np.testing.assert_array_equal(read_photo(tmp_path / "rgb16.png", reduce=True).pixels, colour >> 8)
    for deeper, name in ((np.float32(grey), "float.tif"), (grey.astype(np.int32), "int32.tif")):
        with pytest.raises(UserError, match="more than 8 bits"):
            read_photo(saved(deeper, name), reduce=True)


def test_bomb_is_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(20_000, 10_000, 8, 2, b"\0"))
    with pytest.raises(UserError, match=r"20000 x 10000 pixels \(200 megapixels\), more than the limit of 100"):
        read_photo(path)
    with pytest.raises(UserError, match="limit of nan"):
        read_photo(path, float("nan"))


def test_limit_may_be_lowered_and_raised_beyond_pillows(saved, monkeypatch):
    path = saved(RGB)
    with pytest.raises(UserError, match="more than the limit"):
        read_photo(path, 1e-6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_photo(path).pixels.shape == RGB.shape
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff"]
)
def test_not_a_picture(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a picture that pyface reads"):
        read_photo(path)


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.tiff", "photo.webp"])
def test_cut_off_files(saved, name):
    path = saved(RNG.integers(0, 256, (64, 64, 3), np.uint8), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match="cut off or damaged|is not a picture"):
        read_photo(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_photo(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot read .*directory"):
        read_photo(tmp_path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_is_a_user_error(tmp_path_factory, data):
    suffix = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, format=suffix)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    for read in (lambda: read_photo(path, 1.0), lambda: read_png_chunks(path)):
        try:
            read()
        except UserError:
            pass


def test_as_photo_takes_arrays_and_pillow_images():
    assert (as_photo(RGB).pixels == RGB).all()
    rgba = np.dstack((RGB, RGB[..., 0]))
    assert (as_photo(rgba).stacked() == rgba).all()
    assert (as_photo(Image.fromarray(rgba)).stacked() == rgba).all()
    assert as_photo(as_photo(RGB)) is not None
    for bad in (RGB[..., 0], RGB.astype(np.float32), RGB[:0], RGB[..., :2], Image.new("I;16", (4, 4))):
        with pytest.raises(UserError, match="a photo must"):
            as_photo(bad)


# ---- PNG chunks ---------------------------------------------------------------


def test_chunks_round_trip(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, RGB, texts={"pyface": "{}", "other": "x"}, private={b"pfRX": b"\0\1" * 4})
    chunks = read_png_chunks(path, keywords=("pyface",), private=(b"pfRX",))
    assert (chunks.width, chunks.height) == (17, 12)
    assert chunks.texts == {"pyface": b"{}"}
    assert chunks.private == {b"pfRX": b"\0\1" * 4}
    assert (np.asarray(Image.open(path)) == RGB).all()


def test_every_flipped_byte_shows(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, RGB[:2, :2], texts={"pyface": "{}"}, private={b"pfRX": b"\0\1"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x20
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged|cut off|not a PNG"):
            read_png_chunks(path)
    for length in range(8, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut off"):
            read_png_chunks(path)


def test_doubled_chunks_are_refused(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, RGB)
    whole = path.read_bytes()
    for extra in (chunk(b"pfRX", b"1"), chunk(b"iTXt", b"pyface\0\0\0\0\0{}")):
        path.write_bytes(whole[:33] + extra + extra + whole[33:])
        with pytest.raises(UserError, match="two"):
            read_png_chunks(path, keywords=("pyface",), private=(b"pfRX",))


def test_huge_chunk_length_reads_no_more_than_the_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 2, 8, 2, b"")[:33] + struct.pack(">I", 0x7FFFFFFF) + b"pfRX" + b"abc")
    with pytest.raises(UserError, match="cut off"):
        read_png_chunks(path, private=(b"pfRX",))


# ---- writing ------------------------------------------------------------------


def test_existing_file_is_kept_unless_overwrite(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="already exists"):
        write_png(path, RGB)
    assert path.read_bytes() == b"mine"
    write_png(path, RGB, overwrite=True)
    assert (read_photo(path).pixels == RGB).all()
    assert os.listdir(tmp_path) == ["a.png"]


def test_target_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(UserError, match="already exists"), replacing(path):
        path.write_bytes(b"mine")
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.png"]


def test_full_disk_leaves_nothing(tmp_path):
    noise = RNG.integers(0, 256, (128, 128, 3), np.uint8)
    with disk_that_fills_after(4096), pytest.raises(UserError, match="cannot write .*File too large"):
        write_png(tmp_path / "a.png", noise)
    assert os.listdir(tmp_path) == []
    (tmp_path / "a.png").write_bytes(b"mine")
    with disk_that_fills_after(4096), pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "a.png", noise, overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.png"]


def test_failed_verification_and_interruption_leave_nothing(tmp_path):
    def refuse(temporary):
        assert (read_photo(temporary).pixels == RGB).all()
        raise UserError("no")

    def interrupt(temporary):
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="^no$"):
        write_png(tmp_path / "a.png", RGB, verify=refuse)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path / "a.png", RGB, verify=interrupt)
    assert os.listdir(tmp_path) == []


def test_unwritable_places(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "file" / "a.png", RGB)
    with pytest.raises(UserError, match="is a folder"):
        write_png(tmp_path, RGB)
    with pytest.raises(UserError, match="is a folder"):
        write_png(tmp_path, RGB, overwrite=True)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UserError, match="Permission denied"):
        write_png(tmp_path / "a.png", RGB)


def test_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_png(tmp_path / "a.png", RGB)
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640
