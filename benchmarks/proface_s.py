"""PRO-Face S, a face of 256 x 256: protect, recover, one sub-net, against bare convolutions and torch.cat forms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyface.ops
from benchmarks import peers
from benchmarks.harness import Case, Options, Peer, Target
from pyface.methods.proface_s.model import DenseSubnet, ProFaceS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARE = "bare convolutions"
NAIVE = "cat, NCHW fp32"


def cases(options: Options) -> list[Case]:
    side, blocks = (32, 1) if options.quick else (256, 3)
    full = () if options.quick else (1.1, 1.2, 2.7)
    made = []
    for operation in ("protect", "recover"):
        made.append(
            Case(
                "PRO-Face S",
                operation,
                f"{side} x {side}",
                lambda operation=operation: _pass_peers(options, operation, side, blocks),
                ratio_to=NAIVE,
                targets=_targets(*full) if full else (),
                seconds=30,
                memory=True,
            )
        )
    for operation in ("forward", "training step"):
        made.append(
            Case(
                "Dense sub-net",
                operation,
                f"{side // 2} x {side // 2}",
                lambda operation=operation: _subnet_peers(options, operation, side // 2),
                ratio_to=NAIVE,
                grad=operation == "training step",
                seconds=8,
                memory=True,
            )
        )
    return made


def _targets(bare: float, fp32: float, bf16: float) -> tuple[Target, ...]:
    return (
        Target("pyface fp32", "at most", bare, f"{BARE} fp32"),
        Target("pyface bf16", "at most", bare, f"{BARE} bf16"),
        Target("pyface fp32", "faster", fp32, NAIVE, threads=2),
        Target("pyface bf16", "faster", bf16, NAIVE, threads=2),
        Target("pyface fp32", "faster", 1.05, NAIVE, threads=1),
        Target("pyface bf16", "faster", 2.0, NAIVE, threads=1),
    )


def _best_convolutions(
    subnets: list[nn.Module], side: int, device: str
) -> tuple[list[Peer], dict[str, tuple[str, float]]]:
    """A convolution that suits the machine well (128 to 128 channels, channels last), and the limit it sets:
    the time that the FLOPs of `subnets` take at torch's rate there. Better convolutions than torch's may go below 1."""
    found, limits = [], {}
    for name, dtype in DTYPES.items():
        x = torch.randn(1, 128, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        peer = f"one convolution, 128 to 128, {name}"
        found.append(Peer(peer, lambda x=x, w=weight: torch.nn.functional.conv2d(x, w, padding=1), dtype=name))
        limits[name] = peer, peers.flops(subnets, 1, side, side) / (2.0 * side * side * weight.numel())
    return found, limits


def _random(module: nn.Module, device: str) -> nn.Module:
    """All parameters from 0.01 N(0, 1), the last convolutions too: fresh ones are zero, and zeros may be cheap."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape))
    return module.to(device)


def _autocast(call: Callable[[], object], device: str) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast(device, torch.bfloat16):
            return call()

    return run


def _pass_peers(options: Options, operation: str, side: int, blocks: int) -> list[Peer]:
    device = options.device
    models = {}
    for name in DTYPES:
        torch.manual_seed(0)
        models[name] = _random(ProFaceS(blocks=blocks, subnet_dtype=None if name == "fp32" else torch.bfloat16), device)
    subnets = [m for m in models["fp32"].modules() if isinstance(m, DenseSubnet)]
    naive = peers.CatProFaceS(blocks).to(device)
    naive.load_state_dict(models["fp32"].state_dict())
    wide = peers.CatProFaceS(blocks, torch.channels_last).to(device, memory_format=torch.channels_last)
    wide.load_state_dict(models["fp32"].state_dict())

    image, obfuscated = (torch.rand(1, 3, side, side, device=device) * 2 - 1 for _ in range(2))
    key = torch.randint(0, 2, (1, 1, side, side), device=device).float() * 2 - 1
    inputs = (image, obfuscated, key) if operation == "protect" else (image, key)

    def calls(model: nn.Module) -> Callable[[], object]:
        method = getattr(model, operation)
        return lambda: method(*inputs)

    best, limits = _best_convolutions(subnets, side // 2, device)
    if options.quick:
        fast = Peer("torch.compile of it, fp32", None, why="left out by --quick")
    else:
        method = peers.compiled(getattr(peers.CatProFaceS, operation))
        fast = Peer("torch.compile of it, fp32", lambda: method(wide, *inputs), limits["fp32"])
    return [
        Peer("pyface fp32", calls(models["fp32"]), limits["fp32"], "fp32", required=True),
        Peer("pyface bf16", calls(models["bf16"]), limits["bf16"], "bf16", required=True),
        *(
            Peer(
                f"{BARE} {name}",
                peers.bare_convolutions(subnets, 1, side // 2, side // 2, dtype, device),
                limits[name],
                name,
            )
            for name, dtype in DTYPES.items()
        ),
        Peer(NAIVE, calls(naive), limits["fp32"]),
        Peer("cat, channels_last fp32", calls(wide), limits["fp32"]),
        fast,
        Peer("cat, NCHW, autocast bf16", _autocast(calls(naive), device), limits["bf16"], "bf16"),
        Peer("cat, channels_last, autocast bf16", _autocast(calls(wide), device), limits["bf16"], "bf16"),
        *best,
    ]


def _subnet_peers(options: Options, operation: str, side: int) -> list[Peer]:
    """One dense sub-net; a training step is its forward and backward pass to the input and all weights."""
    device, trains = options.device, operation == "training step"
    torch.manual_seed(0)
    ours = _random(DenseSubnet(), device)
    naive = peers.CatSubnet().to(device)
    naive.load_state_dict(ours.state_dict())
    wide = peers.CatSubnet().to(device, memory_format=torch.channels_last)
    wide.load_state_dict(ours.state_dict())
    stream = torch.randn(1, 12, side, side, device=device, requires_grad=trains)
    key = torch.randn(1, 4, side, side, device=device)
    seed = torch.randn(1, 12, side, side, device=device)

    def step(module: nn.Module, forward: Callable[[], Tensor], dtype: str = "fp32") -> Callable[[], object]:
        if not trains:
            return forward
        wanted, grad_out = [stream, *module.parameters()], seed.to(DTYPES[dtype])
        return lambda: torch.autograd.grad(forward(), wanted, grad_out)

    def compiled(x: Tensor) -> Tensor:
        return peers.compiled(peers.CatSubnet.forward)(wide, x)

    def joined(module: Callable[[Tensor], Tensor], memory_format: torch.memory_format) -> Callable[[], Tensor]:
        return lambda: module(torch.cat((stream, key), 1).contiguous(memory_format=memory_format))

    best, limits = _best_convolutions([ours], side, device)
    # Backward is two more convolutions of the same size for each, one for the input and one for the weights.
    limits = {name: (peer, factor * (3 if trains else 1)) for name, (peer, factor) in limits.items()}
    nchw, nhwc = joined(naive, torch.contiguous_format), joined(wide, torch.channels_last)
    if options.quick:
        fast = Peer("torch.compile of it, fp32", None, why="left out by --quick")
    else:
        fast = Peer("torch.compile of it, fp32", step(wide, joined(compiled, torch.channels_last)), limits["fp32"])
    inference = []
    if not trains:
        convs = list(ours.children())
        weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
        for name, dtype in DTYPES.items():
            fused = functools.partial(pyface.ops.dense_block, (stream, key), weights, biases, compute_dtype=dtype)
            bare = peers.bare_convolutions([ours], 1, side, side, dtype, device)
            inference += [
                Peer(f"pyface.ops.dense_block {name}", fused, limits[name], name, required=True),
                Peer(f"{BARE} {name}", bare, limits[name], name),
            ]
    return [
        Peer("pyface fp32", step(ours, lambda: ours(stream, key)), limits["fp32"], required=True),
        Peer(
            "pyface bf16",
            step(ours, lambda: ours(stream, key, torch.bfloat16), "bf16"),
            limits["bf16"],
            "bf16",
            required=True,
        ),
        *inference,
        Peer(NAIVE, step(naive, nchw), limits["fp32"]),
        Peer("cat, channels_last fp32", step(wide, nhwc), limits["fp32"]),
        fast,
        Peer("cat, NCHW, autocast bf16", step(naive, _autocast(nchw, device), "bf16"), limits["bf16"], "bf16"),
        Peer("cat, channels_last, autocast bf16", step(wide, _autocast(nhwc, device), "bf16"), limits["bf16"], "bf16"),
        *best,
    ]
