"""HIDA, a sketch of 256 x 256: the whole network, its parts, and what fused modulation and our operator are worth."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Options, Peer, Target
from pyface.methods.hida.model import HIDA, style_weights
from pyface.nn import ModulatedDeformConv2d

WHOLE = "pyface fp32"
SPLIT = "three convolutions for theta, gamma, b"
TORCHVISION = "torchvision's deform_conv2d"


def cases(options: Options) -> list[Case]:
    side = 64 if options.quick else 256
    return [
        Case(
            "HIDA",
            "sketch",
            f"{side} x {side}",
            lambda: _network_peers(options, side),
            ratio_to=WHOLE,
            # Both change nothing but the time, so they may not lose any.
            targets=() if options.quick else tuple(Target(WHOLE, "at most", 1.0, o) for o in (SPLIT, TORCHVISION)),
            seconds=40,
            memory=True,
        ),
        Case(
            "Parts of HIDA", "forward", f"{side} x {side}", lambda: _part_peers(options, side),
            ratio_to="pyface: whole", seconds=20,
        ),
    ]  # fmt: skip


def _network(options: Options, side: int) -> tuple[HIDA, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = HIDA(4 if options.quick else 64, side).eval().to(options.device)
    for module in model.modules():
        if isinstance(module, ModulatedDeformConv2d):  # fresh offsets are zero, and zeros may be cheap
            for parameter in module.conv_offset.parameters():
                nn.init.normal_(parameter, std=0.05)
    image = torch.rand(1, 3, side, side) * 2 - 1
    inputs = image, torch.rand(1, 1, side, side), style_weights(1)
    return model, tuple(value.to(options.device) for value in inputs)


class _Split(nn.Module):
    """A convolution to 3C channels as three to C, as the released code has them."""

    def __init__(self, fused: nn.Conv2d) -> None:
        super().__init__()
        outputs = fused.out_channels // 3
        self.parts = nn.ModuleList(nn.Conv2d(fused.in_channels, outputs, 3, padding=1) for _ in range(3))
        for part, weight, bias in zip(self.parts, fused.weight.chunk(3), fused.bias.chunk(3)):
            part.weight.data.copy_(weight)
            part.bias.data.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class _Torchvision(nn.Module):
    """Our deformable layer's weights under torchvision's operator."""

    def __init__(self, layer: ModulatedDeformConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        branch = self.layer.conv_offset(x)
        taps = branch.shape[1] // 3
        offset, mask = branch[:, : 2 * taps], torch.sigmoid(branch[:, 2 * taps :])
        return deform_conv2d(x, offset.contiguous(), self.layer.weight, self.layer.bias, padding=1, mask=mask)


def _network_peers(options: Options, side: int) -> list[Peer]:
    model, inputs = _network(options, side)
    split, theirs = copy.deepcopy(model).to(options.device), copy.deepcopy(model)
    for block in split.up:
        block.modulation = _Split(block.modulation).to(options.device)
    for block in theirs.up[:2]:
        block.up.conv = _Torchvision(block.up.conv)
    wide = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def calls(network: nn.Module) -> Callable[[], object]:
        return lambda: network(*inputs)

    def halved() -> object:
        with torch.autocast(options.device, torch.bfloat16):
            return model(*inputs)

    return [
        Peer(WHOLE, calls(model), required=True),
        Peer("pyface autocast bf16", halved, dtype="bf16", required=True),
        Peer("pyface fp32, with the depth head", lambda: model(*inputs, return_depth=True), required=True),
        Peer("pyface fp32, channels_last weights", calls(wide)),
        Peer(SPLIT, calls(split)),
        Peer(TORCHVISION, calls(theirs)),
    ]


def _part_peers(options: Options, side: int) -> list[Peer]:
    """Each part on the inputs that it gets within the network; the ratios say where the time goes."""
    model, inputs = _network(options, side)
    parts: dict[str, nn.Module] = {"stem of the photo": model.photo_stem}
    parts |= {f"encoder E{index}": layer for index, layer in enumerate(model.down, 2)}
    for index, block in enumerate(model.up):
        parts |= {f"block up{index}": block, f"block up{index}, up-sampler": block.up}
        parts |= {f"block up{index}, theta, gamma, b": block.modulation}
    parts["head of the sketch"] = model.sketch_head
    seen: dict[str, tuple] = {}
    hooks = [
        part.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given}))
        for name, part in parts.items()
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    peers = [Peer("pyface: whole", lambda: model(*inputs), required=True)]
    for name, part in parts.items():
        given = tuple(value.clone() if isinstance(value, Tensor) else value for value in seen[name])
        peers.append(Peer(f"pyface: {name}", lambda part=part, given=given: part(*given), required=True))
    return peers
