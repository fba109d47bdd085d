"""Deformable convolution, 3 x 3 with mask and bias, offsets of a pixel: torchvision, ONNX Runtime, OpenVINO, and the
plain convolution of the same shape, which is the practical floor where the result has many pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

import pyface.ops
from benchmarks import peers
from benchmarks.harness import Case, Options, Peer, Target
from pyface.ops.deform_conv import CORE

CONV = "conv2d"
WEIGHTS = "weights read once"
# images, channels, outputs, side, offset groups; the ones with 2 groups are HIDA's
SHAPES = [
    (1, 512, 512, 2, 2),
    (4, 512, 512, 2, 2),
    (1, 1024, 512, 4, 2),
    (4, 1024, 512, 4, 2),
    (1, 64, 64, 16, 1),
    (1, 64, 64, 32, 1),
    (1, 64, 64, 64, 1),
    (1, 64, 64, 128, 1),
    (8, 64, 64, 64, 1),
    (1, 128, 128, 32, 1),
    (1, 128, 128, 64, 1),
    (1, 256, 256, 16, 1),
    (1, 256, 256, 32, 1),
    (1, 256, 256, 64, 1),
    (1, 512, 512, 16, 1),
    (1, 512, 512, 32, 1),
]
QUICK = [(1, 32, 32, 2, 2), (1, 16, 16, 8, 1), (2, 16, 16, 12, 1)]
FEW_PIXELS = 64  # of the results together: reading the weights is the limit there


def cases(options: Options) -> list[Case]:
    made = []
    for shape in QUICK if options.quick else SHAPES:
        batch, channels, outs, side, groups = shape
        size = f"{batch}x{channels}->{outs} {side}x{side}" + (f" G={groups}" if groups > 1 else "")
        few = batch * side * side <= FEW_PIXELS
        for operation in ("forward", "backward", "forward + backward"):
            grad = operation != "forward"

            def build(shape=shape, operation=operation, few=few):
                return (_forward_peers if operation == "forward" else _gradient_peers)(options, operation, shape, few)

            targets = () if options.quick or options.device != "cpu" else _targets(operation, channels, few)
            made.append(
                Case(
                    "deformable convolution", operation, size, build, targets=targets, grad=grad,
                    memory=side >= 64 and not grad,
                )
            )  # fmt: skip
    return made


def _targets(operation: str, channels: int, few: bool) -> tuple[Target, ...]:
    if operation == "backward":
        return () if few else (Target("pyface", "at most", 3.5, CONV),)
    if operation != "forward":
        return ()
    ahead = tuple(Target("pyface", "at most", 1.0, peer) for peer in ("ONNX Runtime", "OpenVINO"))
    if few:
        return ahead
    return (
        Target("pyface", "at most", 1.35 if channels < 128 else 1.15, CONV),
        Target("pyface bf16", "at most", 0.65, "pyface"),
        *ahead,
    )


def _tensors(options: Options, shape: tuple[int, ...]):
    batch, channels, outs, side, groups = shape
    device = options.device
    return (
        torch.randn(batch, channels, side, side, device=device),
        torch.randn(batch, 18 * groups, side, side, device=device),
        torch.randn(outs, channels, 3, 3, device=device) / (9 * channels) ** 0.5,
        torch.randn(outs, device=device),
        torch.rand(batch, 9 * groups, side, side, device=device),
    )


def _ours(tensors) -> Callable[[], torch.Tensor]:
    x, offset, weight, bias, mask = tensors
    return lambda: pyface.ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def _theirs(tensors) -> Callable[[], torch.Tensor]:
    x, offset, weight, bias, mask = tensors
    return lambda: torchvision_deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def _forward_peers(options: Options, operation: str, shape: tuple[int, ...], few: bool) -> list[Peer]:
    tensors = x, offset, weight, bias, mask = _tensors(options, shape)
    low = [t.bfloat16() for t in tensors]
    last = x.contiguous(memory_format=torch.channels_last)
    about = {"limit": (WEIGHTS if few else CONV, 1.0)}
    found = [
        Peer("pyface", _ours(tensors), required=True, **about),
        Peer("pyface channels_last", _ours([last, *tensors[1:]]), required=True, **about),
        Peer("pyface bf16", _ours(low), required=True, dtype="bf16"),
    ]
    if options.device == "cuda":
        for path in ("triton", "cuda"):

            def chosen(path=path):
                with pyface.paths(path):
                    return _ours(low)()

            reasons = CORE.reasons(path, "cuda", (torch.bfloat16, torch.bfloat16), explicit=True)
            found.append(Peer(f"pyface {path} bf16", None if reasons else chosen, why="; ".join(reasons), dtype="bf16"))
    found.append(Peer("torchvision", _theirs(tensors), **about))
    if options.device == "cpu":
        threads = torch.get_num_threads()
        why = peers.why_no("onnxruntime", "onnxruntime") or peers.why_no("onnx", "onnx")
        call = None if why else peers.onnx_deform_conv(x, offset, weight, bias, mask, threads)
        found.append(Peer("ONNX Runtime", call, why=why, **about))
        why = peers.why_no("openvino", "openvino")
        call = None if why else peers.openvino_deform_conv(x, offset, weight, mask, threads)
        found.append(Peer("OpenVINO", call, why=why, **about))
    found.append(Peer(CONV, lambda: F.conv2d(x, weight, bias, padding=1)))
    found.append(Peer(f"{CONV} bf16", lambda: F.conv2d(low[0], low[2], low[3], padding=1), dtype="bf16"))
    if few:
        found.append(Peer(WEIGHTS, weight.sum))
    return found


def _gradient_peers(options: Options, operation: str, shape: tuple[int, ...], few: bool) -> list[Peer]:
    """Gradients of all five arguments; the plain convolution's forward pass is what they are related to."""
    tensors = _tensors(options, shape)
    leaves = [t.requires_grad_() for t in tensors]
    grad = torch.randn_like(_ours(tensors)())
    both = operation == "forward + backward"

    def gradients(forward: Callable[[], torch.Tensor], wanted) -> Callable[[], object]:
        if both:
            return lambda: torch.autograd.grad(forward(), wanted, grad)
        out = forward()
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)

    def conv():
        with torch.no_grad():
            return F.conv2d(tensors[0], tensors[2], tensors[3], padding=1)

    convolved = gradients(lambda: F.conv2d(tensors[0], tensors[2], tensors[3], padding=1), [leaves[0], *leaves[2:4]])
    return [
        Peer("pyface", gradients(_ours(tensors), leaves), required=True),
        Peer("torchvision", gradients(_theirs(tensors), leaves)),
        Peer(CONV, conv),
        Peer(f"{CONV}, its gradients", convolved),
    ]
