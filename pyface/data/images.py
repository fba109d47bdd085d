"""Reading pictures that strangers made, and writing pictures so that nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from pyface.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_MEGAPIXELS = 100.0
# Only these parsers of Pillow are ever run on a file; some of the others start external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"))
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PIL_LIMIT = threading.Lock()


@dataclass(frozen=True)
class Photo:
    """A decoded photo, upright.

    Attributes:
        pixels: ndarray[H, W, 3] uint8, RGB.
        alpha: ndarray[H, W] uint8, or None.
        icc_profile: colour profile of ``pixels`` as stored in the file, or None.
        notes: what the reader of the file should know about the conversion, one sentence each.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None
    notes: tuple[str, ...] = ()

    def stacked(self) -> np.ndarray:
        """ndarray[H, W, 3 or 4] uint8: the pixels, with alpha where there is one."""
        return self.pixels if self.alpha is None else np.dstack((self.pixels, self.alpha))

    def with_pixels(self, pixels: np.ndarray) -> Photo:
        """The same photo with other ``pixels``, ndarray[H, W, 3] uint8."""
        return replace(self, pixels=pixels)


def read_photo(path: str | os.PathLike, max_megapixels: float = MAX_MEGAPIXELS, *, reduce: bool = False) -> Photo:
    """Decode a picture file to 8-bit RGB.

    The size in the header is checked before any pixel is decoded. EXIF orientation is applied; grey, palette and CMYK
    become RGB. Of the metadata only the colour profile is kept.

    Args:
        path: of the file.
        max_megapixels: larger ones are refused.
        reduce: keep the upper 8 bits of 16 per channel, and say so in the notes, instead of refusing the picture.

    Raises:
        UserError: missing, not a picture, cut off, damaged, too large, or with more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    with _readable(path) as file, _no_pillow_limit():
        Image.init()  # Pillow only knows the parsers that something has loaded
        try:
            image = Image.open(file, formats=FORMATS)
        except Exception as error:  # a parser fed with hostile bytes may raise anything at all
            if isinstance(error, MemoryError):
                raise
            raise UserError(f"{path} is not a picture that pyface reads ({', '.join(FORMATS)})") from error
        width, height = image.size
        if not width * height <= max_megapixels * 1e6:
            raise UserError(
                f"{path} has {width} x {height} pixels ({width * height / 1e6:.0f} megapixels), more than the limit of "
                f"{max_megapixels:g}; raise it with --max-megapixels if you trust the file"
            )
        bits = _bits_per_channel(image, file)
        if bits > 8 and not (reduce and bits == 16 and image.mode != "F"):
            raise UserError(
                f"{path} has more than 8 bits per channel, which would be lost; convert it to 8 bits first"
            )
        try:
            image.load()
            has_exif = bool(image.getexif())
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright).clip(0, 0xFFFF) >> 8).astype(np.uint8))
            photo = _to_rgb(upright)
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            raise UserError(f"{path} is cut off or damaged and cannot be decoded ({error})") from error
    notes = photo.notes
    if bits > 8:
        notes += (f"{bits} bits per channel are reduced to 8",)
    if frames > 1:
        notes += (f"only the first of {frames} frames is used",)
    if has_exif:
        notes += ("EXIF data (place, time, camera) is not copied to the output",)
    return Photo(photo.pixels, photo.alpha, photo.icc_profile, notes)


def as_photo(picture: Photo | Image.Image | np.ndarray) -> Photo:
    """A Photo from what a library caller has: a Photo, a Pillow image of 8 bits, or ndarray[H, W, 3 or 4] uint8."""
    if isinstance(picture, Photo):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4) or 0 in picture.shape:
            raise UserError(
                f"a photo must be ndarray[H, W, 3 or 4] of uint8 that is not empty, "
                f"got {picture.dtype} {list(picture.shape)}"
            )
        alpha = picture[..., 3].copy() if picture.shape[2] == 4 else None
        return Photo(np.ascontiguousarray(picture[..., :3]), alpha)
    if picture.mode.startswith(("I", "F")):
        raise UserError(f"a photo must have 8 bits per channel, got a Pillow image of mode {picture.mode!r}")
    return _to_rgb(picture)


@dataclass(frozen=True)
class PngChunks:
    """What :func:`read_png_chunks` found: size in pixels, iTXt texts by keyword, private chunks by name."""

    width: int
    height: int
    texts: Mapping[str, bytes]
    private: Mapping[bytes, bytes]


def read_png_chunks(
    path: str | os.PathLike, keywords: Sequence[str] = (), private: Sequence[bytes] = (), max_text: int = 1 << 20
) -> PngChunks:
    """Walk the chunks of a PNG, check every checksum, and keep the wanted ones; no pixel is decoded.

    Args:
        path: the file.
        keywords: iTXt keywords to keep. Texts are returned as stored, at most ``max_text`` bytes each.
        private: names of four bytes of private chunks to keep.

    Raises:
        UserError: not a PNG, cut off, a wrong checksum, or a wanted chunk that comes twice.
    """
    path = Path(path)
    texts: dict[str, bytes] = {}
    found: dict[bytes, bytes] = {}
    size: tuple[int, int] | None = None
    with _readable(path) as file:
        if file.read(8) != PNG_SIGNATURE:
            raise UserError(
                f"{path} is not a PNG. A protected photo is the PNG that 'pyface protect' wrote; a copy that was "
                f"converted, or sent through a service that re-compresses pictures, no longer holds the original"
            )
        name = b""
        while name != b"IEND":
            length, name = struct.unpack(">I4s", _exactly(file, 8, path))
            if length > 0x7FFFFFFF or not name.isalpha():
                raise UserError(f"{path} is damaged: it has an impossible PNG chunk")
            keep = name in (b"IHDR", *private) or (name == b"iTXt" and length <= max_text + 256)
            checksum, content = zlib.crc32(name), bytearray()
            for start in range(0, length, 1 << 20):
                block = _exactly(file, min(1 << 20, length - start), path)
                checksum = zlib.crc32(block, checksum)
                if keep:
                    content += block
            if struct.unpack(">I", _exactly(file, 4, path))[0] != checksum:
                raise UserError(f"{path} is damaged: the checksum of its PNG chunk {name.decode()} is wrong")
            if size is None:
                if name != b"IHDR" or length != 13:
                    raise UserError(f"{path} is damaged: it does not begin with a PNG header")
                size = struct.unpack(">II", content[:8])
            elif name == b"iTXt":
                keyword, _, rest = bytes(content).partition(b"\0")
                parts = rest[2:].split(b"\0", 2)
                keyword = keyword.decode("latin-1")
                if keyword in keywords and rest[:1] == b"\0" and len(parts) == 3:
                    if keyword in texts:
                        raise UserError(f"{path} has two texts named {keyword!r}; it was altered")
                    texts[keyword] = parts[2]
            elif name in private:
                if name in found:
                    raise UserError(f"{path} has two chunks named {name.decode()}; it was altered")
                found[name] = bytes(content)
    return PngChunks(*size, texts, found)


def write_png(
    path: str | os.PathLike,
    pixels: np.ndarray,
    *,
    icc_profile: bytes | None = None,
    texts: Mapping[str, str] | None = None,
    private: Mapping[bytes, bytes] | None = None,
    overwrite: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write a lossless PNG of ``pixels``, ndarray[H, W, 3 or 4] uint8, through :func:`replacing`.

    Args:
        texts: iTXt chunks, keyword to text.
        private: private chunks, name to content; they follow the pixels.
        verify: called with the finished temporary file; if it raises, nothing appears at ``path``.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_itxt(keyword, text)
    for name, content in (private or {}).items():
        info.add(name, content, after_idat=True)
    with replacing(path, overwrite=overwrite) as temporary:
        with open(temporary, "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG", pnginfo=info, icc_profile=icc_profile)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new empty file that becomes ``path`` at the end, or is deleted if anything goes wrong.

    It lies in the folder of ``path``, which is made if need be.

    Raises:
        UserError: ``path`` exists and ``overwrite`` is not set, or it cannot be written (permission, disk full).
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    temporary = path.parent / f".pyface-{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        refuse_existing(path, overwrite)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: str | os.PathLike, overwrite: bool = False) -> None:
    """UserError if ``path`` exists and ``overwrite`` is not set, or is a folder."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected the name of a file")
    if not overwrite and os.path.lexists(path):
        raise UserError(f"{path} already exists; choose another name with -o, or add --overwrite")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        yield file


@contextlib.contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Switch Pillow's own size limit off: ours is checked before decoding, may be raised, and never only warns."""
    from PIL import Image

    with _PIL_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise UserError(f"{path} is cut off: the end of the file is missing")
    return data


def _bits_per_channel(image: Image.Image, file: BinaryIO) -> int:
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,)))
    if image.mode.startswith(("I", "F")):
        return 16
    if image.format == "PNG":  # Pillow reads 16-bit colour as 8-bit without saying so
        position = file.tell()
        file.seek(24)
        depth = file.read(1)[0]
        file.seek(position)
        return depth
    return 8


def _to_rgb(image: Image.Image) -> Photo:
    profile = image.info.get("icc_profile") or None
    mode = image.mode
    has_alpha = mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    notes: tuple[str, ...] = ()
    if mode in ("1", "L", "LA", "La"):
        notes, profile = ("a grey photo becomes RGB",), None
    elif mode not in ("RGB", "RGBA", "RGBa", "P", "PA"):
        notes, profile = (f"a {mode} photo becomes RGB; its colour profile is dropped",), None
    pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    alpha = pixels[..., 3].copy() if has_alpha else None
    return Photo(np.ascontiguousarray(pixels[..., :3]), alpha, profile, notes)
