"""ACMF's claims: masked frequencies and attention consistency make detectors better on forgeries they never saw.

    python -m benchmarks.claims.acmf --out benchmarks/results/xeon-spr-2core/claims

Leave one forgery out: of the five procedural families a detector trains on four and is tested on the fifth (with real
videos of other people), for each family and seed once with masked training images and once without; all else is equal:
backbone, data, order, budget. Each of these networks then judges the same test videos as it is (stage 1) and after
adapting to each of them (stage 2), at the authors' learning rate and at a tenth of it. Reported as it comes out: area
under the ROC curve of videos and frames, and the equal error rate, one line per network, and the differences family by
family and seed by seed; beside them, to see that the network learnt anything, the area on its training videos and on
the families it knows but of other people. A killed run goes on where it was; what is there is always written out, so
the table says how many seeds it holds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import statistics
import warnings
from pathlib import Path

import torch

from benchmarks.harness import machine_header
from pyface.data.forgery import FORGERIES
from pyface.data.images import replacing
from pyface.data.protocols import Part
from pyface.engine import PROCEDURAL, Trainer
from pyface.methods.acmf.recipe import Config, Recipe, error_rates, judge, to_images, video_scores

TRAININGS = {"plain": 0.0, "masked": 0.1}
STAGES = {"stage 1": None, "stage 2": 1e-3, "stage 2, rate 1e-4": 1e-4}
"""Learning rates of the adaptation: that of the authors' Xception, and one that moves a small network less."""
MEASURES = ("video_auc", "frame_auc", "video_eer")


def settings(arguments: argparse.Namespace, held_out: str, seed: int, drop_rate: float) -> Config:
    return Config.preset(
        "tiny", backbone=arguments.backbone, image_size=arguments.size, frames=arguments.frames,
        test_frames=arguments.frames, videos=arguments.videos, test_videos=arguments.tests, steps=arguments.steps,
        lr=arguments.lr, drop_rate=drop_rate, seed=seed, validate_every=0, checkpoint_every=arguments.steps, keep=1,
        train_on=",".join(name for name in FORGERIES if name != held_out), test_on=held_out,
    )  # fmt: skip


def scored(arguments: argparse.Namespace, held_out: str, seed: int, training: str, found: dict) -> dict[str, object]:
    """Scores of the test videos of one network, of each stage; and how well it knows the families it trained on.

    ``found`` holds what is known already.
    """
    config = settings(arguments, held_out, seed, TRAININGS[training])
    folder = arguments.work / f"{held_out}-{training}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    shared = arguments.work / "faces"
    shared.mkdir(exist_ok=True)
    if not (folder / "faces").exists():
        os.symlink(shared.resolve(), folder / "faces")  # crops depend on no seed: all runs share them
    recipe = Recipe(config)
    network = Trainer(recipe, folder, resume=True, quiet=True).fit().eval()
    clips = recipe._clips("test", folder, parts=[Part(PROCEDURAL, (held_out,))])
    recipe.train_clips = recipe.train_clips or recipe._clips("train", folder)
    found = {"labels": [clip.label for clip in clips]} | found
    for name in ("trained", "familiar"):
        if name not in found:
            known = recipe.train_clips if name == "trained" else recipe._clips("test", folder)
            found[name] = error_rates(known, [judge(network, clip.faces) for clip in known])["video_auc"]
    for stage, rate in STAGES.items():
        if stage in found:
            continue
        if rate is None:
            logits = [judge(network, clip.faces) for clip in clips]
        else:
            # Masks of stage 2 belong to it in either case.
            adapter = Recipe(dataclasses.replace(config, drop_rate=0.1, fac_lr=rate))
            adapter.train_clips = recipe.train_clips
            adapt = adapter._adapter(network)
            logits = [adapt(to_images(clip.faces), clip.id) for clip in clips]
        found[stage] = {"scores": video_scores(logits).tolist(), "rates": error_rates(clips, logits)}
    return found


def cell(arguments: argparse.Namespace, held_out: str, seed: int, training: str) -> dict[str, object]:
    file = arguments.work / f"{held_out}-{training}-{seed}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if STAGES.keys() - found.keys():
        found = scored(arguments, held_out, seed, training, found)
        with replacing(file, overwrite=True) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
    return found


def write(arguments: argparse.Namespace, cells: dict[tuple[str, str, int], dict], header: dict[str, object]) -> None:
    rows = []
    for (held_out, training, seed), found in cells.items():
        for stage in (stage for stage in STAGES if stage in found):
            rows.append(
                {"held_out": held_out, "training": training, "stage": stage, "seed": seed,
                 "videos": len(found["labels"]), "training_video_auc": found["trained"],
                 "familiar_video_auc": found["familiar"]}
                | found[stage]["rates"]
                | {"backbone": arguments.backbone, "size": arguments.size, "steps": arguments.steps,
                   "train_videos": arguments.videos, "frames": arguments.frames}
                | header
            )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out / "acmf.csv", overwrite=True) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    _plot(arguments.out / "acmf-roc.png", cells)


def _plot(path: Path, cells: dict[tuple[str, str, int], dict]) -> None:
    """ROC curves of videos, one panel per family left out, all seeds' videos ranked within their own run."""
    import matplotlib.pyplot as plt
    from torchmetrics.functional.classification import binary_roc

    figure, axes = plt.subplots(1, len(FORGERIES), figsize=(15, 4.6), sharey=True, constrained_layout=True)
    for panel, held_out in zip(axes, FORGERIES):
        for colour, training in zip(("tab:blue", "tab:orange"), TRAININGS):
            for line, stage in zip(("-", "--", ":"), STAGES):
                chosen = [
                    found
                    for (one, other, _), found in cells.items()
                    if (one, other) == (held_out, training) and stage in found
                ]
                if not chosen:
                    continue
                ranks = [torch.tensor(found[stage]["scores"]).argsort().argsort() for found in chosen]
                scores = torch.cat([rank / len(rank) for rank in ranks])
                labels = torch.cat([torch.tensor(found["labels"]) for found in chosen])
                passed, caught, _ = binary_roc(scores, labels)
                auc = statistics.fmean(found[stage]["rates"]["video_auc"] for found in chosen)
                name = f"{training}, {stage}: {auc:.2f}"
                panel.plot(passed, caught, line, color=colour, lw=1.6, label=name)
        panel.plot([0, 1], [0, 1], color="0.8", lw=0.8)
        panel.set(title=f"{held_out} unseen", xlabel="real videos called fake")
        if panel.lines[1:]:
            panel.legend(
                fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), title="video AUC", title_fontsize=7
            )
    axes[0].set_ylabel("fakes found")
    with replacing(path, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def summary(cells: dict[tuple[str, str, int], dict]) -> str:
    """Means, and the differences in pairs that share family and seed."""
    seeds = sorted({seed for _, _, seed in cells})
    lines = [f"{len(cells)} networks, seeds {seeds}, means over families and seeds:"]

    def values(training: str, stage: str, measure: str) -> dict[tuple[str, int], float]:
        return {(h, s): found[stage]["rates"][measure] for (h, t, s), found in cells.items() if t == training}

    for training in TRAININGS:
        known = [
            f"{title} {statistics.fmean(found[name] for (_, t, _), found in cells.items() if t == training):.3f}"
            for name, title in (("trained", "training videos"), ("familiar", "families it knows, other people"))
        ]
        lines.append(f"  {training:7}{'stage 1':20}video_auc of " + ", of ".join(known))
        for stage in STAGES:
            means = [f"{m} {statistics.fmean(values(training, stage, m).values()):.3f}" for m in MEASURES]
            lines.append(f"  {training:7}{stage:20}" + "  ".join(means))
    comparisons = [("masked - plain, stage 1", ("masked", "stage 1"), ("plain", "stage 1"))]
    for stage in list(STAGES)[1:]:
        comparisons += [
            (f"{stage} - stage 1, plain", ("plain", stage), ("plain", "stage 1")),
            (f"{stage} - stage 1, masked", ("masked", stage), ("masked", "stage 1")),
            (f"masked, {stage} - plain", ("masked", stage), ("plain", "stage 1")),
        ]
    for title, one, other in comparisons:
        a, b = values(*one, "video_auc"), values(*other, "video_auc")
        gaps = [a[key] - b[key] for key in sorted(a.keys() & b.keys())]
        better = sum(gap > 0 for gap in gaps)
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        lines.append(
            f"  {title:36} video AUC {statistics.fmean(gaps):+.3f} +- {error:.3f} (standard error), "
            f"better in {better} of {len(gaps)}, {min(gaps):+.3f} to {max(gaps):+.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/claims"), help="for CSV and picture")
    parser.add_argument("--work", type=Path, default=Path("runs/claims-acmf"), help="folder of the training runs")
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--size", type=int, default=96, help="side in pixels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--videos", type=int, default=80, help="training videos of each family")
    parser.add_argument("--tests", type=int, default=30, help="test videos of each family")
    parser.add_argument("--frames", type=int, default=4, help="of each video")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "pyface: spectral runs on the reference path")
    arguments.work.mkdir(parents=True, exist_ok=True)
    header, cells = machine_header("cpu"), {}
    for seed in arguments.seeds:
        for held_out in FORGERIES:
            for training in TRAININGS:
                cells[held_out, training, seed] = found = cell(arguments, held_out, seed, training)
                rates = {stage: round(found[stage]["rates"]["video_auc"], 3) for stage in STAGES}
                print(seed, held_out, training, rates, flush=True)
            write(arguments, cells, header)
    print(summary(cells))


if __name__ == "__main__":
    main()
