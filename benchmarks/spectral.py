"""Masks of high frequencies against the usual chain of FFTs, rfft2, eager low rank, torch.compile, NumPy and a copy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import pyface
from benchmarks import peers
from benchmarks.harness import Case, Options, Peer, Target
from pyface.ops import mask_high_frequencies
from pyface.ops.reference import spectral as reference
from pyface.ops.spectral import CORE, _axis

COPY = "copy_"
CHAIN, HALF, LOW_RANK = "fft2, shift, mask, ifft2", "rfft2, folded mask", "low rank, matmul"
SHAPES = [(30, 3, 224, 224), (17, 3, 299, 299), (1, 3, 224, 224)]
QUICK = [(2, 3, 24, 20)]
HALF_WIDTHS = (5, 16, 32)


def cases(options: Options) -> list[Case]:
    made = []
    for shape in QUICK if options.quick else SHAPES:
        many = shape[0] > 1
        for d in (2,) if options.quick else HALF_WIDTHS if many else (5,):
            size = "x".join(map(str, shape)) + f" d={d}"

            def add(operation, build, targets=(), grad=False, size=size, d=d, shape=shape):
                bars = () if options.quick or options.device != "cpu" or shape[0] == 1 else targets
                call = lambda: build(options, shape, d)  # noqa: E731
                made.append(Case("mask", operation, size, call, targets=tuple(bars), grad=grad, seconds=2.0))

            wins = {5: (8.0, 1.6), 16: (4.0, 3.0), 32: (2.0, None)}.get(d, (1.0, None))
            bars = [Target("pyface, out=", "faster", wins[0], HALF)]
            if wins[1]:
                bars.append(Target("pyface, out=", "at most", wins[1], COPY, threads=2))
            if d == 5:
                bars += [
                    Target("pyface, out=", "at most", 2.2, COPY, threads=1),
                    Target("pyface, out=", "faster", 20.0, CHAIN),
                    Target("pyface bf16, out=", "at most", 0.8, "pyface, out="),
                ]
            add("forward", _forward, bars)
            if d == 5 or options.quick:
                add("backward", _backward, [Target("pyface", "at most", 1.3, "pyface, its forward")])
                add("forward + backward", _both, grad=True)
    return made


def _data(options: Options, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = torch.rand(shape, device=options.device)
    return x, torch.rand(shape[-2:], device=options.device) >= 0.1


# ---- the peers ------------------------------------------------------------------------------------------------------


def chain(x: Tensor, keep: Tensor, d: int) -> Tensor:
    """What users write."""
    height, width = x.shape[-2:]
    block = torch.ones(height, width, device=x.device)
    block[max(height // 2 - d, 0) : height // 2 + d, max(width // 2 - d, 0) : width // 2 + d] = 0
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) * block
    high = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.abs()
    return x - torch.where(keep, 0, high)


def half(x: Tensor, keep: Tensor, gain: Tensor) -> Tensor:
    """The best form with torch.fft: real, with the mask folded and made beforehand."""
    high = torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=x.shape[-2:])
    return x - torch.where(keep, 0, high.abs())


def low_rank(x: Tensor, keep: Tensor, rows: Tensor, columns: Tensor, turn: Tensor) -> Tensor:
    """The factors of this core with torch's own products."""
    small = rows.mT @ x @ columns
    small = small - turn @ small @ turn.mT
    return x - torch.where(keep, 0, (x - rows @ small @ columns.mT).abs())


def loops(x: np.ndarray, keep: np.ndarray, d: int) -> np.ndarray:
    """ACMF's way: one channel of one image at a time, and the real part where it takes the modulus."""
    out = np.empty_like(x)
    height, width = x.shape[-2:]
    for image, result in zip(x, out, strict=True):
        for c in range(len(image)):
            spectrum = np.fft.fftshift(np.fft.fft2(image[c]))
            spectrum[max(height // 2 - d, 0) : height // 2 + d, max(width // 2 - d, 0) : width // 2 + d] = 0
            high = np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum)).real)
            result[c] = keep * high + (image[c] - high)
    return out


def _factors(x: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    (rows, _), (columns, _) = (_axis(n, d, False) for n in x.shape[-2:])
    turn = torch.zeros(rows.shape[1], rows.shape[1])
    turn[-2, -1], turn[-1, -2] = 1, -1
    return rows.to(x), columns.to(x), turn.to(x)


def _gain(x: Tensor, d: int) -> Tensor:
    height, width = x.shape[-2:]
    return (1 - reference.low_gain((height, width), (d, d), False))[:, : width // 2 + 1].to(x)


def _compiled(options: Options, name: str, function: Callable, *args) -> Peer:
    if options.quick:
        return Peer(f"torch.compile, {name}", None, why="left out by --quick")
    fast = peers.compiled(function)
    return Peer(f"torch.compile, {name}", lambda: fast(*args))


# ---- the cases ------------------------------------------------------------------------------------------------------


def _forward(options: Options, shape: tuple[int, ...], d: int) -> list[Peer]:
    x, keep = _data(options, shape)
    low, out, target = x.bfloat16(), torch.empty_like(x), torch.empty_like(x)
    low_out = torch.empty_like(low)
    about = {"limit": (COPY, 1.0)}
    found = [
        Peer("pyface, out=", lambda: mask_high_frequencies(x, keep, d, out=out), required=True, **about),
        Peer("pyface", lambda: mask_high_frequencies(x, keep, d), required=True, **about),
        Peer(
            "pyface bf16, out=", lambda: mask_high_frequencies(low, keep, d, out=low_out), required=True, dtype="bf16",
            limit=(COPY, 0.5),
        ),
    ]  # fmt: skip
    if options.device == "cuda":
        for path in ("triton", "cuda"):

            def chosen(path=path):
                with pyface.paths(path):
                    return mask_high_frequencies(x, keep, d, out=out)

            reasons = CORE.reasons(path, "cuda", (torch.float32,), explicit=True)
            found.append(Peer(f"pyface {path}, out=", None if reasons else chosen, why="; ".join(reasons), **about))
    gain, factors = _gain(x, d), _factors(x, d)
    found += [
        Peer(CHAIN, lambda: chain(x, keep, d)),
        Peer(HALF, lambda: half(x, keep, gain)),
        Peer(LOW_RANK, lambda: low_rank(x, keep, *factors)),
        _compiled(options, HALF, half, x, keep, gain),
        _compiled(options, LOW_RANK, low_rank, x, keep, *factors),
    ]
    if options.device == "cpu":
        plain, mask = x.numpy(), keep.numpy()
        found.append(Peer("NumPy, one channel at a time", lambda: loops(plain, mask, d)))
    return [*found, Peer(COPY, lambda: target.copy_(x))]


def _backward(options: Options, shape: tuple[int, ...], d: int) -> list[Peer]:
    """The gradient alone, beside the forward pass that saves the signs; fresh results in both."""
    x, keep = _data(options, shape)
    core = CORE.pick(x.device.type, (x.dtype,), None)
    grad, target = torch.rand_like(x), torch.empty_like(x)
    _, sign = core.mask_high_frequencies(x, keep, (d, d), False, True)
    return [
        Peer("pyface", lambda: core.mask_high_frequencies_backward(grad, sign, keep, (d, d), False), required=True),
        Peer("pyface, its forward", lambda: core.mask_high_frequencies(x, keep, (d, d), False, True), required=True),
        Peer(COPY, lambda: target.copy_(x)),
    ]


def _both(options: Options, shape: tuple[int, ...], d: int) -> list[Peer]:
    x, keep = _data(options, shape)
    x.requires_grad_()
    grad, gain, factors = torch.rand_like(x), _gain(x, d), _factors(x.detach(), d)

    def gradient(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), x, grad)

    return [
        Peer("pyface", gradient(lambda: mask_high_frequencies(x, keep, d)), required=True),
        Peer(CHAIN, gradient(lambda: chain(x, keep, d))),
        Peer(HALF, gradient(lambda: half(x, keep, gain))),
        Peer(LOW_RANK, gradient(lambda: low_rank(x, keep, *factors))),
    ]
