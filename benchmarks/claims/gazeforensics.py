"""GazeForensics' claim: a feature tied to the gaze, and a few free ones beside it, find forgeries better.

    python -m benchmarks.claims.gazeforensics --out benchmarks/results/xeon-spr-2core/claims

Trains the detector, the same without the gaze loss (mu = 0) and the same without free features (lambda = 0), with equal
data, budget, schedule and seeds, on procedural videos, and measures areas under the ROC curve of video scores on people
that training never saw, once for each forgery family: re-enactment, whose gaze agrees with neither head nor source,
and four families that leave the gaze alone. Two trainings: on all five families, and on the four without
re-enactment, so that a gaze that disagrees is met for the first time in the test. Weights are chosen on validation
videos of the training families. All runs share one teacher, a gaze network trained on procedural faces, and start from
its trunk. Reported as it comes out, with the area on the training videos, to see that something was learnt. A killed
run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import machine_header
from pyface.data.forgery import FORGERIES
from pyface.data.images import replacing
from pyface.data.protocols import FaceClip, Part, face_clips
from pyface.engine import Trainer
from pyface.methods.gazeforensics.recipe import Config, Recipe, measures

OURS = "GazeForensics"
NETWORKS = {OURS: {}, "no gaze loss (mu = 0)": {"gaze_weight": 0.0}, "no free features (lambda = 0)": {"leaky": 0}}
DISAGREES = "reenactment"
AGREE = tuple(name for name in FORGERIES if name != DISAGREES)
TRAININGS = {"all five": "all", "without re-enactment": ",".join(AGREE)}


def settings(arguments: argparse.Namespace, **changes: object) -> Config:
    return Config.preset(
        "tiny", trunk=arguments.trunk, image_size=arguments.size, frames=arguments.frames, videos=arguments.videos,
        validation=arguments.validation, tests=arguments.tests, epochs=None, steps=arguments.steps, lr=arguments.lr,
        cache=str(arguments.work / "crops"), validate_every=arguments.steps // 4, checkpoint_every=100, keep=1,
        **changes,
    )  # fmt: skip


def teacher(arguments: argparse.Namespace) -> Path:
    folder = arguments.work / "teacher"
    config = Config.preset(
        "teacher", trunk=arguments.trunk, image_size=arguments.size, epochs=None, steps=arguments.teacher_steps,
        lr=4e-3, teacher_faces=arguments.faces, precision="bf16", validate_every=0, checkpoint_every=100, keep=1,
        margin=Config.preset("tiny").margin, augment=False,
    )  # fmt: skip
    recipe = Recipe(config)
    network = Trainer(recipe, folder, resume=True, quiet=True).fit()
    print(f"teacher: {recipe.evaluate(network)[0]}", flush=True)
    return folder


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[tuple[str, str], list]]:
    header = machine_header("cpu")
    torch.set_num_threads(1)
    source = teacher(arguments)
    base = settings(arguments)
    videos = face_clips(
        Part("procedural"), "test", size=base.image_size, margin=base.margin, frames=base.frames, step=1,
        videos=base.tests, cache=base.cache,
    )  # fmt: skip
    rows: list[dict[str, object]] = []
    kept: dict[tuple[str, str], list] = {}
    for training in arguments.trainings:
        for seed in arguments.seeds:
            for name, changes in NETWORKS.items():
                folder = arguments.work / "-".join((training, name, str(seed))).replace(" ", "_")
                config = settings(arguments, seed=seed, train_on=TRAININGS[training], teacher=str(source), **changes)
                recipe = Recipe(config)
                network = Trainer(recipe, folder, resume=True, quiet=True).fit()
                scores = recipe.scores(network, videos)
                kept.setdefault((training, name), []).append(scores)
                known = recipe.clips.videos
                trained = measures(known, recipe.scores(network, known))["auc"]
                for family, chosen in groups(videos).items():
                    found = measures([videos[i] for i in chosen], [scores[i] for i in chosen])
                    about = {"training": training, "network": name, "seed": seed, "steps": config.steps,
                             "size": config.image_size, "trunk": config.trunk, "couples": config.videos,
                             "training_auc": trained}  # fmt: skip
                    rows.append(about | {"family": family} | found | header)
                    print(f"{training:22}{name:32}{seed} {family:24} auc {found['auc']:.3f}", flush=True)
                print(f"{training:22}{name:32}{seed} {'training videos':24} auc {trained:.3f}", flush=True)
                write(arguments.out, rows)
        picture(arguments.out / "gazeforensics.png", videos, kept)
    return rows, kept


def groups(videos: list[FaceClip]) -> dict[str, list[int]]:
    """Videos of each test: the real ones with the fakes of one family, or of the four whose gaze agrees."""
    named = {name: (name,) for name in FORGERIES} | {"gaze agrees": AGREE}
    return {
        title: [i for i, video in enumerate(videos) if not video.label or video.family in names]
        for title, names in named.items()
    }


def write(out: Path, rows: list[dict[str, object]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "gazeforensics.csv", overwrite=True) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def picture(path: Path, videos: list[FaceClip], kept: dict[tuple[str, str], list]) -> None:
    """ROC curves of video scores: one panel for each training and kind of forgery, one line per network and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trainings = list(dict.fromkeys(training for training, _ in kept))
    tests = {DISAGREES: "gaze disagrees: re-enactment", "gaze agrees": "gaze agrees: the other four"}
    size = (4.2 * len(tests), 4.2 * len(trainings))
    figure, panels = pyplot.subplots(len(trainings), len(tests), figsize=size, squeeze=False, layout="constrained")
    for row, training in zip(panels, trainings):
        for panel, (family, title) in zip(row, tests.items()):
            chosen = groups(videos)[family]
            labels = np.array([videos[i].label for i in chosen])
            for colour, name in enumerate(NETWORKS):
                for number, scores in enumerate(kept.get((training, name), [])):
                    means = np.array([scores[i].mean() for i in chosen])
                    alarms, hits = curve(means, labels)
                    panel.plot(alarms, hits, color=f"C{colour}", lw=1, label=name if not number else None)
            panel.plot([0, 1], [0, 1], color="0.7", lw=0.8, ls=":")
            panel.set(title=f"trained on {training}\n{title}", xlabel="false alarms", ylabel="forgeries found")
            panel.set_aspect("equal")
    panels[0, 0].legend(fontsize=7, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of real and of fake videos with at least each score, from none to all."""
    places = np.unique(scores)[::-1]
    over = scores[None] >= np.concatenate(([np.inf], places))[:, None]
    return over[:, labels == 0].mean(1), over[:, labels == 1].mean(1)


def summary(rows: list[dict[str, object]]) -> str:
    """Mean areas over seeds, and the mean difference from GazeForensics with the seeds' smallest and largest."""
    lines = []
    for training in dict.fromkeys(row["training"] for row in rows):
        for name in NETWORKS:
            areas = {r["seed"]: r["training_auc"] for r in rows if (r["training"], r["network"]) == (training, name)}
            lines.append(f"{training:22}{'training videos':18}{name:32}auc {statistics.fmean(areas.values()):.3f}")
        for family in (DISAGREES, "gaze agrees", *AGREE):
            for name in NETWORKS:
                own = {
                    r["seed"]: r["auc"]
                    for r in rows
                    if (r["training"], r["network"], r["family"]) == (training, name, family)
                }
                ours = {
                    r["seed"]: r["auc"]
                    for r in rows
                    if (r["training"], r["network"], r["family"]) == (training, OURS, family)
                }
                text = f"{training:22}{family:18}{name:32}auc {statistics.fmean(own.values()):.3f}"
                if name != OURS:
                    gaps = [own[seed] - ours[seed] for seed in own]
                    text += f"  ({statistics.fmean(gaps):+.3f}, {min(gaps):+.3f} to {max(gaps):+.3f})"
                lines.append(text)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/claims"), help="for CSV and picture")
    parser.add_argument("--work", type=Path, default=Path("runs/claims-gazeforensics"), help="folder of the runs")
    parser.add_argument("--trunk", default="test_resnet", help="backbone, by timm's name")
    parser.add_argument("--size", type=int, default=80, help="side in pixels")
    parser.add_argument("--frames", type=int, default=14, help="of each video")
    parser.add_argument("--videos", type=int, default=60, help="couples to train on; each has six videos")
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--tests", type=int, default=24, help="couples to measure on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak, for 32 clips")
    parser.add_argument("--faces", type=int, default=4000, help="to train the gaze network on")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainings", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    print(summary(run(arguments)[0]))


if __name__ == "__main__":
    main()
