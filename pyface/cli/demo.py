"""``pyface demo``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import nn

    from pyface.vault.record import Box

PANEL = 320
MARGIN = 28
# The picture shows this much more than the face, so that a seam around it would be seen.
SURROUNDINGS = 1.3


@dataclass(frozen=True)
class Panel:
    """One picture of the sheet: its name, the photo, and lines below it."""

    title: str
    photo: np.ndarray
    lines: Sequence[str]


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write into; earlier demo files there are replaced.")
    ] = Path("pyface-demo"),
) -> None:
    """Protect and recover scikit-image's portrait, and draw what happened.

    Writes sheet.png (original, obfuscated, protected, recovered, wrong key, each with PSNR and SSIM over the face),
    the protected and the recovered photo, and the key, so that 'pyface recover' can be tried on them.
    """
    import torch
    from skimage.data import astronaut

    from pyface.data.images import write_png
    from pyface.methods.proface_s.photo import (
        default_model,
        load_protected,
        obfuscate_faces,
        protect_photo,
        recover_photo,
        save_protected,
    )
    from pyface.vault.keys import Secret, read_key_file, write_key_file

    original, model = astronaut(), default_model()
    output.mkdir(parents=True, exist_ok=True)
    files = {
        name: output / name for name in ("portrait.png", "protected.png", "recovered.png", "demo.key", "sheet.png")
    }
    if files["demo.key"].exists():
        secret = read_key_file(files["demo.key"])
    else:
        secret = Secret.generate()
        write_key_file(files["demo.key"], secret)

    started = time.perf_counter()
    protected, _ = protect_photo(original, secret, model=model)
    protect_seconds = time.perf_counter() - started
    write_png(files["portrait.png"], original, overwrite=True)
    save_protected(files["protected.png"], protected, overwrite=True)

    stored = load_protected(files["protected.png"])
    started = time.perf_counter()
    recovered = recover_photo(stored, secret, model=model).pixels
    recover_seconds = time.perf_counter() - started
    write_png(files["recovered.png"], recovered, overwrite=True)
    wrong = recover_photo(stored, Secret.generate(), model=model, force=True).pixels
    faces = protected.record.faces
    obfuscated = obfuscate_faces(original, faces, protected.record.obfuscator)

    def against(photo: np.ndarray, reference: np.ndarray, name: str) -> tuple[str, str]:
        psnr, ssim = _compare(photo, reference, faces[0])
        return f"PSNR {psnr:.1f} dB, SSIM {ssim:.3f}", f"against the {name} face"

    x, y, w, h = faces[0]
    panels = (
        Panel("original", original, (f"face of {w} by {h} pixels", "what the key protects")),
        Panel("obfuscated", obfuscated, against(obfuscated, original, "original")),
        Panel("protected", stored.pixels, against(stored.pixels, obfuscated, "obfuscated")),
        Panel("recovered", recovered, against(recovered, original, "original")),
        Panel("wrong key", wrong, against(wrong, original, "original")),
    )
    write_png(files["sheet.png"], draw_sheet(panels, faces[0]), overwrite=True)

    for panel in panels[1:]:
        typer.echo(f"{panel.title:<11} {' '.join(panel.lines)}")
    typer.echo(
        f"protected in {protect_seconds:.2f} s (finding the face and checking the recovery included), "
        f"recovered in {recover_seconds:.2f} s"
    )
    typer.echo(f"coupling and wavelet: {_compute_path(model)}; {torch.get_num_threads()} CPU threads")
    typer.echo("wrote " + ", ".join(str(file) for file in files.values()))
    typer.echo(f"try: pyface recover {files['protected.png']} --key-file {files['demo.key']} -o {output / 'mine.png'}")


def draw_sheet(panels: Sequence[Panel], face: Box) -> np.ndarray:
    """The panels in one row, each cut to ``face`` and its surroundings: ndarray[H, W, 3] uint8."""
    import numpy as np
    from PIL import Image, ImageDraw

    title, text = _font(26), _font(19)
    head, line = 44, 28
    width = MARGIN + len(panels) * (PANEL + MARGIN)
    height = MARGIN + head + PANEL + 12 + line * max(len(panel.lines) for panel in panels) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, panel in enumerate(panels):
        left = MARGIN + index * (PANEL + MARGIN)
        draw.text((left, MARGIN), panel.title, fill=(20, 20, 20), font=title)
        sheet.paste(_cut(panel.photo, face), (left, MARGIN + head))
        for row, words in enumerate(panel.lines):
            shade = (40, 40, 40) if row == 0 else (110, 110, 110)
            draw.text((left, MARGIN + head + PANEL + 12 + row * line), words, fill=shade, font=text)
    return np.asarray(sheet)


def _cut(photo: np.ndarray, face: Box) -> Image.Image:
    from PIL import Image

    x, y, w, h = face
    height, width = photo.shape[:2]
    side = min(round(SURROUNDINGS * max(w, h)), width, height)
    left = min(max(x + w // 2 - side // 2, 0), width - side)
    top = min(max(y + h // 2 - side // 2, 0), height - side)
    cut = Image.fromarray(photo[top : top + side, left : left + side])
    return cut.resize((PANEL, PANEL), Image.Resampling.BICUBIC)


def _compare(photo: np.ndarray, reference: np.ndarray, face: Box) -> tuple[float, float]:
    """(PSNR in dB, SSIM) over the face."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x, y, w, h = face
    a, b = (picture[y : y + h, x : x + w] for picture in (reference, photo))
    return peak_signal_noise_ratio(a, b), structural_similarity(a, b, channel_axis=2)


def _compute_path(model: nn.Module) -> str:
    """Which path serves the model's tensors: the chosen one, or the first that can."""
    from pyface.ops._paths import chosen_path
    from pyface.ops.coupling import CORE

    parameter = next(model.parameters())
    device, dtypes = parameter.device.type, (parameter.dtype, parameter.dtype)
    path = chosen_path() or next(p for p in CORE.order if not CORE.reasons(p, device, dtypes, explicit=False))
    return f"path {path!r} on {device}"


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
