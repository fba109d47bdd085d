"""ACMF, stage 2: attention maps of a video in one batched pass, against one pass per image as in the authors' loop."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Case, Options, Peer, Target
from pyface.methods.acmf import ACMF, Adapter
from pyface.methods.acmf.model import scaled_maps

BATCHED = "pyface: batched"
HALVED = "pyface: batched, bf16"
SINGLE = "one pass per image, through the whole network"

# (backbone, target, side, test frames, training images): the published network at a fifth of the published 50 + 30
# images (a full one takes minutes per round on two cores), and a small network.
SETTINGS = (("xception", None, 224, 10, 6), ("resnet10t", "layer3", 96, 14, 16))
QUICK = (("resnet10t", "layer3", 32, 2, 2),)


def cases(options: Options) -> list[Case]:
    made = []
    for setting in QUICK if options.quick else SETTINGS:
        backbone, _, side, frames, images = setting
        made.append(
            Case(
                "ACMF, attention maps of one step of stage 2", "Grad-CAM",
                f"{backbone}, {side} x {side}, {frames} test + {images} training images",
                lambda setting=setting: _peers(options, *setting),
                ratio_to=SINGLE,
                targets=() if options.quick else (Target(BATCHED, "faster", 20, SINGLE),),
                grad=True,
                seconds=40,
            )
        )  # fmt: skip
    return made


def _peers(options: Options, backbone: str, target: str | None, side: int, frames: int, images: int) -> list[Peer]:
    torch.manual_seed(0)
    model = ACMF(backbone, side, target=target).eval().to(options.device)
    video = torch.rand(frames, 3, side, side, device=options.device)
    training = torch.rand(images, 3, side, side, device=options.device)
    # The reference map of a training batch is measured once for all videos: it is not part of a step.
    adapter = Adapter(model, [(training, torch.arange(images, device=options.device) % 2)])

    def single() -> Tensor:
        """Test frames by the adapting network, graph kept; training images by the frozen one."""
        means = []
        for batch in (video, training):
            means.append(torch.stack([_one(model, image) for image in batch]).mean(0))
        model.zero_grad()
        return (means[0] - means[1].detach()).square().mean()

    def batched() -> Tensor:
        return (adapter.mean_map(video, graph=True) - adapter.references[0]).square().mean()

    def halved() -> Tensor:
        with torch.autocast(options.device, torch.bfloat16):
            return batched()

    return [
        Peer(BATCHED, batched, required=True),
        Peer(HALVED, halved, dtype="bf16"),
        Peer(SINGLE, single, required=True),
    ]


def _one(model: ACMF, image: Tensor) -> Tensor:
    """Grad-CAM of one image by a backward pass to the first layer, with gradients for every parameter."""
    kept: list[Tensor] = []
    handle = model.network.get_submodule(model.target).register_forward_hook(lambda *given: kept.append(given[2]))
    logits = model(image[None])
    handle.remove()
    kept[0].retain_grad()
    logits.max().backward(retain_graph=True)
    weights = kept[0].grad.mean((2, 3))
    heat = torch.einsum("bc,bchw->bhw", weights, kept[0])
    return scaled_maps(heat, image.shape[-1])[0]
