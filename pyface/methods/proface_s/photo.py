"""Whole photos: hide every face under a key, and bring the faces back.

A face is processed at the photo's own pixels, because what is hidden in them would not survive resizing. Large faces
pass through the network in even-sized tiles, so memory does not grow with the face. Pixels outside the faces, and
alpha, stay as they are.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pyface.data.detect import Box, Detector, detect_faces
from pyface.data.images import MAX_MEGAPIXELS, Photo, as_photo, read_photo, read_png_chunks, write_png
from pyface.data.obfuscators import obfuscate
from pyface.errors import UserError
from pyface.vault.keys import SALT_BYTES, Argon2Cost, PhotoKeys, Secret, WrongKeyError, derive, kdf_of
from pyface.vault.record import (
    MAX_FACES,
    MAX_TILE,
    MIN_TILE,
    RESIDUAL_CHUNK,
    TEXT_KEYWORD,
    AlteredError,
    Record,
    RecordError,
    digest,
)

if TYPE_CHECKING:
    from PIL import Image

METHOD = "proface_s"
TILE = 512
# The key map has one bit per pixel: a smaller face would have fewer key bits than the key.
MIN_FACE = 16
# Recoveries computed in float64 on two machines differ by far less; closer to a rounding boundary, the pixel is stored.
ROUNDING_GUARD = 1e-6


class NoFaceError(UserError):
    """The detector found no face."""


@dataclass(frozen=True)
class ProtectedPhoto:
    """A photo whose faces are hidden.

    Attributes:
        pixels: ndarray[H, W, 3 or 4] uint8.
        record: what recovery needs besides the secret.
        residual: encrypted correction for exact recovery, or None.
        icc_profile: colour profile of the photo, or None.
    """

    pixels: np.ndarray
    record: Record
    residual: bytes | None = None
    icc_profile: bytes | None = None


@dataclass(frozen=True)
class Quality:
    """PSNR in dB over the pixels of all faces, as stored in 8 bits.

    Attributes:
        protected: the protected faces against their obfuscated versions: how unremarkable the hiding is.
        recovered: the faces recovered with the right key against the original, without the exact residual.
    """

    protected: float
    recovered: float


@dataclass(frozen=True)
class RecoveredPhoto:
    """A photo whose faces were brought back.

    Attributes:
        pixels: ndarray[H, W, 3 or 4] uint8.
        exact: every face is bit for bit the original (verified by its SHA-256).
        problems: reasons not to trust the result; only ever filled when recovery was forced.
        icc_profile: colour profile of the photo, or None.
    """

    pixels: np.ndarray
    exact: bool
    problems: tuple[UserError, ...] = ()
    icc_profile: bytes | None = None


def protect_photo(
    photo: Photo | Image.Image | np.ndarray,
    secret: Secret,
    *,
    boxes: Iterable[Box] = (),
    detector: str | Detector | None = None,
    obfuscator: str = "blur",
    strength: float | None = None,
    exact: bool = False,
    tile: int = TILE,
    cost: Argon2Cost | None = None,
    model: nn.Module | None = None,
) -> tuple[ProtectedPhoto, Quality]:
    """Hide every face of a photo under a secret.

    Args:
        photo: a :class:`~pyface.data.images.Photo`, an 8-bit Pillow image, or ndarray[H, W, 3 or 4] uint8 (RGB, RGBA).
        secret: key or password, see :class:`pyface.vault.keys.Secret`.
        boxes: faces (x, y, width, height) in pixels, inside the photo. Boxes that overlap become one.
        detector: finds faces in addition to ``boxes``: a name, "module:function", or a callable. None with boxes uses
            the boxes alone; None without boxes is the default detector.
        obfuscator: what the faces shall look like, see :func:`pyface.data.obfuscators.list_obfuscators`.
        strength: strength of the obfuscator in pixels of a face of 256; None is its default.
        exact: also store an encrypted residual, so that recovery gives the original bit for bit.
        tile: largest side in pixels that goes through the network at once; memory grows with its square.
        cost: cost of one password guess; None is the default.
        model: a network with ``protect`` and ``recover`` as :class:`ProFaceS` has; None is the one with the weights
            that come with the package. Recovery needs the same.

    Returns:
        The protected photo, and its measured quality.

    Raises:
        NoFaceError: no box was given and the detector found none.
        UserError: a box leaves the photo, the photo is too small, a name is unknown, or a value out of range.
    """
    photo = as_photo(photo)
    model = model or default_model()
    if not MIN_TILE <= tile <= MAX_TILE:
        raise UserError(f"tile must be between {MIN_TILE} and {MAX_TILE} pixels, got {tile}")
    if strength is not None and not (math.isfinite(strength) and strength > 0):
        raise UserError(f"strength must be positive and finite, got {strength}")
    faces = find_faces(photo.pixels, boxes, detector)
    salt, kdf = secrets.token_bytes(SALT_BYTES), kdf_of(secret, cost)
    keys = derive(secret, salt, kdf)

    obfuscated = obfuscate_faces(photo.pixels, faces, obfuscator, strength)
    pixels = photo.pixels.copy()
    device = _device(model)
    for area, key_map in _tiles(faces, tile, keys):
        image, target = _to_tensor(photo.pixels[area], device), _to_tensor(obfuscated[area], device)
        with torch.inference_mode():
            pixels[area] = _to_bytes(_to_levels(model.protect(image, target, _key_tensor(key_map, image))))

    protected = photo.with_pixels(pixels)
    record = Record(
        method=METHOD,
        weights=weights_digest(model),
        width=photo.pixels.shape[1],
        height=photo.pixels.shape[0],
        alpha=photo.alpha is not None,
        faces=faces,
        tile=tile,
        obfuscator=obfuscator,
        strength=None if strength is None else float(strength),
        salt=salt.hex(),
        kdf=kdf,
        check=keys.check.hex(),
        original=_fingerprint(keys, photo),
        pixels=digest(protected.stacked()),
    )
    levels = _recover_levels(pixels, record, keys, model, exact)
    residual = keys.encrypt(_pack_residual(photo.pixels, levels, faces), record.binding()) if exact else None
    quality = Quality(
        protected=_psnr(_faces_of(pixels, faces), _faces_of(obfuscated, faces)),
        recovered=_psnr(np.concatenate([_to_bytes(face).reshape(-1) for face in levels]),
                        _faces_of(photo.pixels, faces)),
    )  # fmt: skip
    return (
        ProtectedPhoto(protected.stacked(), record.sealed(keys, residual), residual, photo.icc_profile),
        quality,
    )


def recover_photo(
    protected: ProtectedPhoto, secret: Secret, *, model: nn.Module | None = None, force: bool = False
) -> RecoveredPhoto:
    """Bring the faces of a protected photo back.

    Args:
        protected: from :func:`protect_photo` or :func:`load_protected`.
        secret: the key or password it was protected with.
        model: see :func:`protect_photo`.
        force: recover whatever comes out, even with a wrong key or from an altered photo, and report the reasons in
            ``problems`` instead of raising the first.

    Raises:
        WrongKeyError: the secret is another one.
        AlteredError: pixels, record or residual are not what was written.
        RecordError: the record does not fit this photo, or another method or other weights are needed.
    """
    record = protected.record
    if protected.pixels.shape != (record.height, record.width, 4 if record.alpha else 3):
        raise RecordError(
            f"the pyface record is for a photo of {record.width} x {record.height} pixels "
            f"{'with' if record.alpha else 'without'} alpha, but this is ndarray{list(protected.pixels.shape)}"
        )
    if record.method != METHOD:
        raise RecordError(f"this photo was protected with method {record.method!r}, expected {METHOD!r}")
    model = model or default_model()
    problems: list[UserError] = []
    if weights_digest(model) != record.weights:
        problems.append(
            RecordError(
                f"this photo was protected with other weights (SHA-256 {record.weights[:12]}..., "
                f"here {weights_digest(model)[:12]}...); use the version of pyface that wrote it"
            )
        )
    try:
        keys = derive(secret, bytes.fromhex(record.salt), record.kdf)
    except WrongKeyError as error:
        # A password where a key is wanted, or the reverse: forced, it is a wrong key like any other.
        problems.append(error)
        keys = PhotoKeys(bytes.fromhex(record.salt), hashlib.sha256(secret.material).digest())
    problems += record.problems(keys, protected.pixels, protected.residual)
    if problems and not force:
        raise problems[0]

    sealed = protected.residual
    plain = keys.decrypt(sealed, record.binding()) if sealed is not None else None
    pixels = protected.pixels.copy()
    levels = _recover_levels(pixels[..., :3], record, keys, model, exact=plain is not None)
    faces = [_to_bytes(face) for face in levels]
    exact = False
    if plain is not None:
        try:
            faces, exact = _apply_residual(plain, faces), True
        except AlteredError as error:
            if not force:
                raise
            problems.append(error)
    for (x, y, w, h), face in zip(record.faces, faces, strict=True):
        pixels[y : y + h, x : x + w, :3] = face
    return RecoveredPhoto(pixels, exact, tuple(problems), protected.icc_profile)


def save_protected(path: str | os.PathLike, protected: ProtectedPhoto, *, overwrite: bool = False) -> None:
    """Write a protected photo as one PNG, read it back, and only then let it appear at ``path``.

    Raises:
        UserError: the file exists and ``overwrite`` is not set, or it cannot be written.
    """

    def verify(temporary: Path) -> None:
        stored = load_protected(temporary, max_megapixels=math.inf)
        if (
            stored.record != protected.record
            or digest(stored.pixels) != protected.record.pixels
            or stored.residual != protected.residual
        ):
            raise UserError(f"{path} did not read back as it was written; check the disk")

    write_png(
        path,
        protected.pixels,
        icc_profile=protected.icc_profile,
        texts={TEXT_KEYWORD: protected.record.to_json()},
        private={RESIDUAL_CHUNK: protected.residual} if protected.residual is not None else None,
        overwrite=overwrite,
        verify=verify,
    )


def load_protected(path: str | os.PathLike, *, max_megapixels: float = MAX_MEGAPIXELS) -> ProtectedPhoto:
    """Read a protected photo. Its content is checked for sanity here and for authenticity by :func:`recover_photo`.

    Raises:
        UserError: not a PNG, cut off, damaged or too large.
        RecordError: it has no record, or an unreadable one.
    """
    chunks = read_png_chunks(path, keywords=(TEXT_KEYWORD,), private=(RESIDUAL_CHUNK,))
    if TEXT_KEYWORD not in chunks.texts:
        raise RecordError(
            f"{path} carries no pyface record: it was not written by 'pyface protect', or another program has saved "
            f"or re-compressed it since and dropped the record; look for the file as it was first written"
        )
    record = Record.from_json(chunks.texts[TEXT_KEYWORD])
    if (chunks.width, chunks.height) != (record.width, record.height):
        raise RecordError(
            f"{path} has {chunks.width} x {chunks.height} pixels, but its pyface record says "
            f"{record.width} x {record.height}: it was resized or altered"
        )
    photo = read_photo(path, max_megapixels)
    return ProtectedPhoto(photo.stacked(), record, chunks.private.get(RESIDUAL_CHUNK), photo.icc_profile)


def is_protected(path: str | os.PathLike) -> bool:
    """Whether the file is a PNG with a pyface record, readable or not."""
    try:
        return TEXT_KEYWORD in read_png_chunks(path, keywords=(TEXT_KEYWORD,)).texts
    except UserError:
        return False


def is_protection_of(protected: ProtectedPhoto, photo: Photo, secret: Secret) -> bool:
    """Whether ``protected`` is intact, was made with ``secret``, and hides exactly this ``photo``."""
    record = protected.record
    try:
        keys = derive(secret, bytes.fromhex(record.salt), record.kdf)
    except WrongKeyError:
        return False
    if record.problems(keys, protected.pixels, protected.residual):
        return False
    return record.original == _fingerprint(keys, photo)


def find_faces(
    pixels: np.ndarray, boxes: Iterable[Box] = (), detector: str | Detector | None = None
) -> tuple[Box, ...]:
    """The faces to process: disjoint boxes of even size, sorted.

    Boxes grow by a pixel where a side is odd (and shrink by one only if they span the whole odd side of the photo),
    grow to 16 pixels where they are smaller, and become one where they overlap. Arguments as in :func:`protect_photo`.
    """
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_FACE:
        raise UserError(f"the photo has {width} x {height} pixels; at least {MIN_FACE} x {MIN_FACE} are needed")
    wanted: list[Box] = []
    for box in boxes:
        x, y, w, h = box
        if w < 1 or h < 1 or x < 0 or y < 0 or x + w > width or y + h > height:
            raise UserError(
                f"box {x},{y},{w},{h} is empty or leaves the photo of {width} x {height} pixels; "
                f"expected x,y,width,height inside it"
            )
        wanted.append((x, y, w, h))
    if detector is not None or not wanted:
        wanted += detect_faces(pixels, detector or "cascade")
    if not wanted:
        raise NoFaceError("no face found; mark it yourself with --box x,y,w,h (pixels), or try another --detector")

    faces: list[Box] = []
    for box in wanted:
        box = _fit(box, width, height)
        while (other := next((face for face in faces if _overlap(face, box)), None)) is not None:
            faces.remove(other)
            left, top = min(box[0], other[0]), min(box[1], other[1])
            right, bottom = max(box[0] + box[2], other[0] + other[2]), max(box[1] + box[3], other[1] + other[3])
            box = _fit((left, top, right - left, bottom - top), width, height)
        faces.append(box)
    if len(faces) > MAX_FACES:
        raise UserError(f"{len(faces)} faces in one photo; at most {MAX_FACES} are supported")
    return tuple(sorted(faces))


def obfuscate_faces(
    pixels: np.ndarray, faces: Iterable[Box], obfuscator: str = "blur", strength: float | None = None
) -> np.ndarray:
    """A copy of ``pixels``, ndarray[H, W, 3] uint8, with every face obfuscated and nothing hidden in it."""
    result = pixels.copy()
    for x, y, w, h in faces:
        area = np.s_[y : y + h, x : x + w]
        result[area] = _to_bytes(_to_levels(obfuscate(_to_tensor(pixels[area]), obfuscator, strength)))
    return result


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's state (names, dtypes, shapes, values), hexadecimal."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


@lru_cache(maxsize=1)
def default_model() -> nn.Module:
    """The network with the weights that come with the package, on the GPU if there is one."""
    from pyface.methods import create_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return create_model(METHOD, pretrained=True).to(device).eval()


def _fit(box: Box, width: int, height: int) -> Box:
    x, w = _fit_side(box[0], box[2], width)
    y, h = _fit_side(box[1], box[3], height)
    return x, y, w, h


def _fit_side(start: int, length: int, limit: int) -> tuple[int, int]:
    fitted = max(length, MIN_FACE)
    fitted = min(fitted + fitted % 2, limit - limit % 2)
    return min(max(start - (fitted - length) // 2, 0), limit - fitted), fitted


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _tiles(faces: Iterable[Box], tile: int, keys: PhotoKeys) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Areas of the photo that go through the network one by one, each with its part of the face's key map."""
    for index, (x, y, w, h) in enumerate(faces):
        key_map = keys.key_map(index, h, w)
        for rows in _spans(h, tile):
            for cols in _spans(w, tile):
                area = slice(y + rows.start, y + rows.stop), slice(x + cols.start, x + cols.stop)
                yield area, key_map[rows, cols]


def _spans(size: int, tile: int) -> list[slice]:
    """Cut an even ``size`` into the fewest even parts of at most ``tile``, as equal as possible."""
    pairs = size // 2
    count = math.ceil(pairs / (tile // 2))
    edges = [2 * (pairs * part // count) for part in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _recover_levels(
    pixels: np.ndarray, record: Record, keys: PhotoKeys, model: nn.Module, exact: bool
) -> list[np.ndarray]:
    """Recovered faces, ndarray[h, w, 3] of levels in [0, 255], not rounded.

    Exact recovery runs in float64, where all machines agree to far below the rounding guard.
    """
    dtype = torch.float64 if exact else torch.float32
    if exact:
        model = copy.deepcopy(model).double()
        model.subnet_dtype = None
    device = _device(model)
    whole = np.empty(pixels.shape, np.float64 if exact else np.float32)
    for area, key_map in _tiles(record.faces, record.tile, keys):
        image = _to_tensor(pixels[area], device, dtype)
        with torch.inference_mode():
            whole[area] = _to_levels(model.recover(image, _key_tensor(key_map, image)))
    return [whole[y : y + h, x : x + w] for x, y, w, h in record.faces]


def _pack_residual(original: np.ndarray, levels: list[np.ndarray], faces: Iterable[Box]) -> bytes:
    """What turns recovered levels into the original: SHA-256, values too close to a rounding boundary, differences."""
    truth = _faces_of(original, faces)
    flat = np.concatenate([face.reshape(-1) for face in levels])
    doubtful = np.flatnonzero(np.abs(flat - np.floor(flat) - 0.5) < ROUNDING_GUARD)
    difference = truth - _to_bytes(flat)  # modulo 256
    difference[doubtful] = 0
    # The differences are noise: Huffman codes do nearly all of it, and matches only lengthen them.
    squeeze = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    return b"".join(
        (
            hashlib.sha256(truth).digest(),
            struct.pack("<Q", len(doubtful)),
            doubtful.astype("<u8").tobytes(),
            truth[doubtful].tobytes(),
            squeeze.compress(difference) + squeeze.flush(),
        )
    )


def _apply_residual(payload: bytes, recovered: list[np.ndarray]) -> list[np.ndarray]:
    """Undo :func:`_pack_residual`; AlteredError unless the result is the original."""
    flat = np.concatenate([face.reshape(-1) for face in recovered])
    checksum, count = payload[:32], struct.unpack_from("<Q", payload, 32)[0]
    positions = np.frombuffer(payload, "<u8", count, 40)
    values = np.frombuffer(payload, np.uint8, count, 40 + 8 * count)
    difference = zlib.decompressobj().decompress(payload[40 + 9 * count :], flat.size)
    flat = flat + np.frombuffer(difference, np.uint8)
    flat[positions] = values
    if hashlib.sha256(flat).digest() != checksum:
        raise AlteredError(
            "exact recovery did not reproduce the original on this machine; --force writes the approximate one"
        )
    sizes = np.cumsum([face.size for face in recovered])[:-1]
    return [part.reshape(face.shape) for part, face in zip(np.split(flat, sizes), recovered, strict=True)]


def _fingerprint(keys: PhotoKeys, photo: Photo) -> str:
    return keys.mac("original", np.ascontiguousarray(photo.stacked()).reshape(-1).data)


def _faces_of(pixels: np.ndarray, faces: Iterable[Box]) -> np.ndarray:
    return np.concatenate([pixels[y : y + h, x : x + w, :3].reshape(-1) for x, y, w, h in faces])


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _to_tensor(pixels: np.ndarray, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """ndarray[h, w, 3] uint8 -> Tensor[1, 3, h, w] in [-1, 1]."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    return image.to(device, dtype) / 127.5 - 1


def _to_levels(image: Tensor) -> np.ndarray:
    """Tensor[1, 3, h, w] -> ndarray[h, w, 3] of levels cut to [0, 255], not rounded."""
    # A wrong key may drive the network to infinity, which must still be a picture.
    return ((image[0].nan_to_num(0).clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().numpy()


def _to_bytes(levels: np.ndarray) -> np.ndarray:
    return np.round(levels).astype(np.uint8)


def _key_tensor(key_map: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(key_map)).to(like.device, like.dtype)[None, None]
