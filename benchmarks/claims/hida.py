"""HIDA's claim: depth, pixel-wise adaptation and deformable outlines make better sketches in the chosen style.

    python -m benchmarks.claims.hida --out benchmarks/results/epyc-zen4-2core/claims

Trains HIDA and three networks that each lack one of them (no depth: the map is 0 everywhere; no dynamic adaptation: the
style alone chooses constants for activation and norm; an ordinary convolution in the two outline blocks), with the same
data, budget, schedule and seeds, on procedural faces drawn by three artists. Measures them on other people: SCOOT, FSIM
and SSIM against the artist's drawing of the same photo, and how often a classifier that was trained on the artists' own
drawings recognises the style that was asked for. Reported as it comes out, one line per network and seed, and the
differences from HIDA seed by seed. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import machine_header
from pyface.data.images import replacing, write_png
from pyface.engine import Trainer
from pyface.methods.hida.model import STYLES, style_weights
from pyface.methods.hida.recipe import TEST_SEED, Config, Pair, Pool, Recipe, draw, procedural_pairs

OURS = "HIDA"
NETWORKS = {
    OURS: {},
    "no depth": {"use_depth": False},
    "no dynamic adaptation": {"adaptation": "style"},
    "ordinary convolution": {"deformable": False},
}
MEASURES = ("scoot", "fsim", "ssim", "style_accuracy")


def settings(arguments: argparse.Namespace, seed: int, **changes: object) -> Config:
    return Config.preset(
        "tiny", image_size=arguments.size, width=arguments.width, critic_width=arguments.width, faces=arguments.faces,
        steps=arguments.steps, lr=3e-3, seed=seed, rough=0.0, flat=0.0, jitter=0.0, ema=0.98, validate_every=0,
        validation=1, checkpoint_every=200, keep=1, **changes,
    )  # fmt: skip


def trained(arguments: argparse.Namespace, name: str, seed: int, shared: Path) -> tuple[nn.Module, Config]:
    """The network and its settings."""
    config = settings(arguments, seed, **NETWORKS[name])
    folder = arguments.work / f"{name.replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("styles.npy", "pool.npy"):
        if not (folder / file).exists():
            os.link(shared / file, folder / file)
    return Trainer(Recipe(config), folder, resume=True, quiet=True).fit(), config


class Classifier(nn.Module):
    """Which artist drew this? Tensor[B, 1, H, W] in [0, 1] -> logits Tensor[B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        layers = [(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(widths, widths[1:])]
        self.layers = nn.Sequential(*(layer for group in layers for layer in group))
        self.last = nn.Linear(widths[-1], STYLES)

    def forward(self, drawn: Tensor) -> Tensor:
        return self.last(self.layers(drawn).mean((2, 3)))


def classifier(pool: Pool, seed: int, steps: int = 200) -> Classifier:
    """Trained on the artists' drawings of the training photos."""
    torch.manual_seed(seed)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(len(pool), size=32)
        drawn = torch.from_numpy(pool.pixels[chosen, 4:].astype(np.float32) / 255)
        if rng.random() < 0.5:
            drawn = drawn.flip(-1)
        loss = F.cross_entropy(model(drawn), torch.from_numpy(pool.styles[chosen] - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, drawn: Tensor, styles: Tensor) -> float:
    return (model(drawn).argmax(1) == styles - 1).float().mean().item()


def measure(
    network: nn.Module, config: Config, pairs: list[Pair], judge: Classifier
) -> tuple[dict[str, float], Tensor]:
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    from pyface.metrics import fsim, scoot

    photo, depth, sketch = (torch.stack([pair[name] for pair in pairs]) for name in ("photo", "depth", "sketch"))
    styles = torch.tensor([pair["style"] for pair in pairs])
    depth = depth if config.use_depth else torch.zeros_like(depth)
    weights = style_weights(styles, len(styles))
    drawn = torch.cat([draw(network, *part) for part in zip(photo.split(8), depth.split(8), weights.split(8))])
    return {
        "scoot": scoot(drawn, sketch).mean().item(),
        "fsim": fsim(drawn, sketch).mean().item(),
        "ssim": float(ssim(drawn, sketch, data_range=1.0)),
        "style_accuracy": accuracy(judge, drawn, styles),
    }, drawn


def run(arguments: argparse.Namespace) -> list[dict[str, object]]:
    header = machine_header("cpu")
    rows, columns = [], {}
    for seed in arguments.seeds:
        config = settings(arguments, seed)
        shared = arguments.work / f"data-{seed}"
        shared.mkdir(parents=True, exist_ok=True)
        pool = Pool(shared, config, quiet=False)
        judge = classifier(pool, seed)
        pairs = list(procedural_pairs(config, seed + TEST_SEED, arguments.tests, training=False))
        sketches, styles = torch.stack([p["sketch"] for p in pairs]), torch.tensor([p["style"] for p in pairs])
        judged = accuracy(judge, sketches, styles)
        print(f"seed {seed}: the classifier recognises {judged:.1%} of the artists' own drawings")
        for name in NETWORKS:
            network, own = trained(arguments, name, seed, shared)
            found, drawn = measure(network, own, pairs, judge)
            print(f"  {name:24}" + "  ".join(f"{key} {value:.4f}" for key, value in found.items()))
            about = {"network": name, "seed": seed, "steps": config.steps, "size": config.image_size,
                     "width": config.width, "faces": config.faces, "test_pictures": len(pairs)}  # fmt: skip
            rows.append(about | found | {"style_accuracy_of_artists": judged} | header)
            if seed == arguments.seeds[0]:
                columns[name] = drawn
        if seed == arguments.seeds[0]:
            picture = sheet(pairs, columns)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out / "hida.csv", overwrite=True) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    write_png(arguments.out / "hida.png", picture, overwrite=True)
    return rows


def sheet(pairs: list[Pair], columns: dict[str, Tensor], people: int = 3, zoom: int = 2) -> np.ndarray:
    """Photo, depth, artist and every network side by side, one row per person and style; ndarray[H, W, 3] uint8."""
    from PIL import Image, ImageDraw

    side = pairs[0]["photo"].shape[-1] * zoom
    titles = ["photo", "depth", "artist", *columns]
    canvas = Image.new("RGB", (len(titles) * (side + 4) - 4, 16 + people * STYLES * (side + 4) - 4), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        pen.text((column * (side + 4) + 2, 2), title, fill="black")
    for row, pair in enumerate(pairs[: people * STYLES]):
        pictures = [pair["photo"], pair["depth"], pair["sketch"], *(drawn[row] for drawn in columns.values())]
        for column, one in enumerate(pictures):
            pixels = one.expand(3, -1, -1).mul(255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (column * (side + 4), 16 + row * (side + 4)))
    return np.asarray(canvas)


def summary(rows: list[dict[str, object]]) -> str:
    """Means over seeds, and the mean difference from HIDA with the seeds' smallest and largest."""
    lines = []
    for name in NETWORKS:
        own = {row["seed"]: row for row in rows if row["network"] == name}
        ours = {row["seed"]: row for row in rows if row["network"] == OURS}
        parts = []
        for key in MEASURES:
            text = f"{key} {statistics.fmean(row[key] for row in own.values()):.4f}"
            if name != OURS:
                gaps = [own[seed][key] - ours[seed][key] for seed in own]
                text += f" ({statistics.fmean(gaps):+.4f}, {min(gaps):+.4f} to {max(gaps):+.4f})"
            parts.append(text)
        lines.append(f"{name:24}" + "  ".join(parts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/claims"), help="for CSV and picture")
    parser.add_argument("--work", type=Path, default=Path("runs/claims-hida"), help="folder of the training runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--faces", type=int, default=150, help="people to train on")
    parser.add_argument("--tests", type=int, default=30, help="people to measure on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "not measured, because weights are missing")
    print(summary(run(arguments)))


if __name__ == "__main__":
    main()
