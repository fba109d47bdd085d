"""Pictures of a detection: where the network looked, where the face looks, and its score through time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np

from pyface.methods.detection.scan import Scan

# Colours that people who confuse red and green tell apart, dark enough on white, each with a dash of its own.
STROKES = (
    ("#0b5c9c", ""),
    ("#b34700", "7 3"),
    ("#00735c", "2 3"),
    ("#8c2d75", "9 3 2 3"),
    ("#6b5900", "4 4"),
    ("#474747", "1 4"),
)
# Dark to bright, also in grey: black, violet, red, orange, pale yellow.
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 920, 250, 46, 14, 14, 44
POINTS = 600


def jpeg(pixels: np.ndarray, quality: int = 88) -> bytes:
    """ndarray[H, W, 3] uint8 as a JPEG file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="JPEG", quality=quality)
    return content.getvalue()


def heat(attention: np.ndarray) -> np.ndarray:
    """ndarray[H, W] in [0, 1] -> ndarray[H, W, 3] float64 in [0, 255], the brighter the higher."""
    place = np.clip(np.nan_to_num(attention), 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    share = (place - low)[..., None]
    return (1 - share) * _HEAT[low] + share * _HEAT[low + 1]


def overlay(crop: np.ndarray, attention: np.ndarray | None = None, gaze: np.ndarray | None = None) -> np.ndarray:
    """The crop under its attention map, with an arrow where the face looks.

    Args:
        crop: ndarray[S, S, 3] uint8.
        attention: ndarray[h, w] in [0, 1]; what is 0 leaves the crop as it is.
        gaze: ndarray[2], yaw and pitch in radians, to the viewer's right and up. The arrow is as long as half a crop
            where the face looks along the picture, and a dot where it looks straight out of it.

    Returns:
        ndarray[S, S, 3] uint8.
    """
    from PIL import Image, ImageDraw

    shown = crop.astype(float)
    side = crop.shape[0]
    if attention is not None:
        map_ = Image.fromarray(attention.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        map_ = np.clip(np.nan_to_num(np.asarray(map_)), 0, 1)
        grey = shown.mean(-1, keepdims=True)
        weight = 0.65 * map_[..., None]
        shown = (1 - weight) * (0.5 * shown + 0.5 * grey) + weight * heat(map_)
    picture = Image.fromarray(shown.round().clip(0, 255).astype(np.uint8))
    if gaze is not None and np.isfinite(gaze).all():
        yaw, pitch = map(float, gaze)
        step = np.array((np.sin(yaw) * np.cos(pitch), -np.sin(pitch))) * side / 2
        _arrow(ImageDraw.Draw(picture), np.array((side / 2, 0.42 * side)), step, side)
    return np.asarray(picture)


def _arrow(draw, start: np.ndarray, step: np.ndarray, side: int) -> None:
    length = float(np.hypot(*step))
    end, thick = start + step, max(2, side // 56)
    for colour, width in (((0, 0, 0), thick + 2), ((80, 255, 120), thick)):
        dot = width + 1
        draw.ellipse([*(start - dot), *(start + dot)], fill=colour)
        if length < 2:
            continue
        along = step / length
        across, head = np.array((-along[1], along[0])), min(length, 0.09 * side) + (width - thick)
        draw.line([*start, *(end - along * head / 2)], fill=colour, width=width)
        back = end - along * head
        tip = [end + along * (width - thick), back + across * head / 2, back - across * head / 2]
        draw.polygon([tuple(point) for point in tip], fill=colour)


def framed(pixels: np.ndarray, squares: dict[int, Sequence[int]], longest: int = 640) -> np.ndarray:
    """A frame, reduced to ``longest`` pixels, with a numbered square round each face."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    height, width = pixels.shape[:2]
    scale = min(1.0, longest / max(height, width))
    picture = Image.fromarray(pixels).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for number, (left, top, side) in squares.items():
        colour = ImageColor.getrgb(STROKES[(number - 1) % len(STROKES)][0])
        x, y, reach = left * scale, top * scale, side * scale
        draw.rectangle([x - 1, y - 1, x + reach + 1, y + reach + 1], outline=(255, 255, 255), width=4)
        draw.rectangle([x, y, x + reach, y + reach], outline=colour, width=2)
        wide = 10 * len(str(number)) + 8
        draw.rectangle([x, y, x + wide, y + 20], fill=colour)
        draw.text((x + 4, y + 1), str(number), fill=(255, 255, 255), font=font)
    return np.asarray(picture)


def timeline(scan: Scan, threshold: float | None, name: str) -> str:
    """The scores of all faces over time as an SVG element; grey where no face was found."""
    start, end = float(scan.times[scan.places[0]]), float(scan.times[scan.places[-1]])
    span = max(end - start, 1e-9)

    def across(seconds: float) -> float:
        return LEFT + (seconds - start) / span * (WIDTH - LEFT - RIGHT)

    def down(score: float) -> float:
        return TOP + (1 - score) * (HEIGHT - TOP - BOTTOM)

    words = [f"Face {face.number}: {describe(face.scores.video)}." for face in scan.faces]
    parts = [
        f'<svg class="timeline" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Scores through time of '
        f'{escape(name, quote=True)}. {escape(" ".join(words), quote=True)}">'
    ]
    order = {place: index for index, place in enumerate(scan.places)}
    half = span / max(1, len(scan.places) - 1) / 2
    for run in _runs([order[place] for place in scan.without]):
        a = across(max(start, scan.times[scan.places[run[0]]] - half))
        b = across(min(end, scan.times[scan.places[run[-1]]] + half))
        wide = max(1, b - a)
        parts.append(f'<rect x="{a:.1f}" y="{TOP}" width="{wide:.1f}" height="{down(0) - TOP:.1f}" fill="#e3e3e3"/>')
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = down(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#c8c8c8"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for seconds in _ticks(start, end):
        x = across(seconds)
        parts.append(f'<path d="M{x:.1f} {down(0)}v5" stroke="#555"/>')
        parts.append(f'<text x="{x:.1f}" y="{down(0) + 19}" text-anchor="middle">{clock(seconds, span)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}" text-anchor="middle">time</text>')
    for face in scan.faces:
        colour, dash = STROKES[(face.number - 1) % len(STROKES)]
        seconds = scan.times[face.places]
        for run in _runs([order[place] for place, s in zip(face.places, face.scores.fake) if np.isfinite(s)]):
            chosen = np.searchsorted(face.places, [scan.places[index] for index in run])
            parts += _curve(
                [across(second) for second in seconds[chosen]],
                [down(score) for score in face.scores.fake[chosen]],
                f'stroke="{colour}"' + (f' stroke-dasharray="{dash}"' if dash else ""),
                colour,
            )
    if threshold is not None:
        y = down(min(max(threshold, 0), 1))
        stroke = 'stroke="#b00020" stroke-width="1.5" stroke-dasharray="10 4"'
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" {stroke}/>')
        above, words = y - 5 if y > TOP + 16 else y + 15, f"threshold {threshold:.3g}"
        parts.append(f'<text x="{WIDTH - RIGHT - 3}" y="{above:.1f}" text-anchor="end" class="halo">{words}</text>')
    return "".join(parts) + "</svg>"


def _curve(xs: Sequence[float], ys: Sequence[float], stroke: str, colour: str) -> list[str]:
    """A line; of many points their mean, on an area from their least to their greatest."""
    if len(xs) == 1:
        return [f'<circle cx="{xs[0]:.1f}" cy="{ys[0]:.1f}" r="3" fill="{colour}"/>']
    if len(xs) <= POINTS:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))
        return [f'<polyline points="{points}" fill="none" stroke-width="1.8" {stroke}/>']
    parts = [(np.mean(x), y) for x, y in zip(np.array_split(xs, POINTS), np.array_split(ys, POINTS))]
    upper = [f"{x:.1f},{y.min():.1f}" for x, y in parts]
    lower = [f"{x:.1f},{y.max():.1f}" for x, y in reversed(parts)]
    means = " ".join(f"{x:.1f},{y.mean():.1f}" for x, y in parts)
    return [
        f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" fill-opacity="0.2"/>',
        f'<polyline points="{means}" fill="none" stroke-width="1.5" {stroke}/>',
    ]


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Rising whole numbers, cut wherever one is left out."""
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in groups]


def _ticks(start: float, end: float) -> list[float]:
    span = end - start
    if span <= 0:
        return [start]
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)
    step = next((step for step in steps if span / step <= 10), span)
    return [step * index for index in range(int(np.ceil(start / step - 1e-9)), int(end / step + 1e-9) + 1)]


def clock(seconds: float, span: float = 0.0) -> str:
    """A time as people write it: "4.20 s", or "12:05" in a video of more than two minutes."""
    if max(seconds, span) < 120:
        return f"{seconds:.2f} s" if span < 5 else f"{seconds:.3g} s"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def describe(score: float) -> str:
    """A score in words."""
    return "not scored" if np.isnan(score) else f"score {score:.3f}"
