"""GazeForensics: a training step with cached teacher embeddings against the two-trunk reference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from benchmarks.harness import Case, Options, Peer, Target
from pyface.methods.gazeforensics import GazeForensics, GazeNetwork, losses
from pyface.methods.gazeforensics.model import FRAMES, prepared

CACHED = "pyface: cached embeddings, fp32"
FAST = "pyface: cached embeddings, bf16"
REFERENCE = "two trunks, fp32"


def cases(options: Options) -> list[Case]:
    side, clips = (64, 1) if options.quick else (112, 2)
    return [
        Case(
            "GazeForensics",
            "training step",
            f"{clips} clips, {side} x {side}",
            lambda: _peers(options, side, clips),
            ratio_to=REFERENCE,
            # The teacher's forward pass is a quarter of the work, so that leaving it out alone cannot reach this.
            targets=() if options.quick else tuple(Target(p, "at most", 1 / 1.6, REFERENCE) for p in (CACHED, FAST)),
            grad=True,
            seconds=25,
        )
    ]


def _peers(options: Options, side: int, clips: int) -> list[Peer]:
    device = options.device
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (clips * FRAMES, 3, side, side), dtype=torch.uint8, device=device)
    labels = torch.arange(clips, device=device) % 2
    teacher = GazeNetwork().eval().requires_grad_(False).to(device)
    with torch.no_grad():
        known = teacher.embed(prepared(pixels, side)).half()

    def peer(cached: bool, layout: torch.memory_format, half: bool) -> Callable[[], object]:
        model = GazeForensics().train().to(device, memory_format=layout)
        own = copy.deepcopy(teacher).to(memory_format=layout)
        # The recipe's optimiser, and the reference's: torch's as it comes.
        optimizer = torch.optim.AdamW(model.parameters(), 7e-5, weight_decay=0.01, fused=cached or None)

        def step() -> object:
            images = prepared(pixels, side).contiguous(memory_format=layout)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                with torch.no_grad():
                    target = known if cached else own.embed(images)
                logits, z = model(images.unflatten(0, (clips, FRAMES)))
                loss = losses.classification_loss(logits, labels)
                loss = loss + 4.0 * losses.gaze_loss(z, target.unflatten(0, (clips, FRAMES)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    last = torch.channels_last
    return [
        Peer(CACHED, peer(True, last, False), required=True),
        Peer(FAST, peer(True, last, True), dtype="bf16", required=True),
        Peer(REFERENCE, peer(False, torch.contiguous_format, False)),
        Peer("two trunks, channels last, fp32", peer(False, last, False)),
        Peer("two trunks, channels last, bf16", peer(False, last, True), dtype="bf16"),
    ]
