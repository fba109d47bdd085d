"""Attention with extra key and value rows: cat + SDPA in its forms, SDPA without the rows, FlexAttention, torch's
`add_bias_kv`; and attention under a spatial prior.

The limit is a square matrix product of the same FLOPs, those of the query-key pairs that are seen; on a GPU, up to 512
keys, the bytes of query, key, value and result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyface.ops
from benchmarks import peers
from benchmarks.harness import Case, Options, Peer, Target
from pyface.nn.attention_hub import MultiheadAttention
from pyface.ops import _paths
from pyface.ops.attention import CORE

GROUP = "attention with extra rows"
CAT, PLAIN, TRICK = "cat + SDPA", "SDPA without rows", "cat + SDPA, R queries more"
SQUARE, COPY = "square product", "copy_"
SIDE = 1024  # of the square product


class Shape(NamedTuple):
    batch: int
    heads: int
    length: int  # queries, and keys
    depth: int
    rows: int
    is_causal: bool

    @property
    def title(self) -> str:
        seen = "causal" if self.is_causal else "full"
        return f"{self.batch}x{self.heads}x{self.length}x{self.depth} R={self.rows} {seen}"

    @property
    def flops(self) -> float:
        """Of both products of the forward pass."""
        keys = (self.length + 1) / 2 if self.is_causal else self.length
        return 4.0 * self.batch * self.heads * self.depth * self.length * (keys + self.rows)


SHAPES = [
    Shape(1, 12, 77, 64, 1, True),
    Shape(8, 12, 77, 64, 1, True),
    Shape(64, 12, 77, 64, 1, True),
    Shape(64, 12, 77, 64, 1, False),
    Shape(8, 12, 77, 64, 16, True),
    Shape(8, 12, 77, 64, 64, True),
    Shape(8, 8, 197, 64, 4, False),
    Shape(1, 8, 1024, 64, 16, False),
    Shape(1, 8, 1024, 64, 16, True),
    Shape(1, 4, 4096, 64, 16, False),
    Shape(1, 4, 4096, 64, 16, True),
]
QUICK = [Shape(2, 2, 19, 16, 1, True), Shape(1, 2, 33, 16, 3, False)]
FLEX = {SHAPES[1], SHAPES[8]}  # its compilation takes longer than all the rest of a case
SECONDS = 2.0


def cases(options: Options) -> list[Case]:
    made = []
    for shape in QUICK if options.quick else SHAPES:
        for operation in ("forward", "backward"):

            def build(shape=shape, operation=operation):
                return (_forward_peers if operation == "forward" else _backward_peers)(options, shape)

            targets = () if options.quick or options.device != "cpu" else _targets(operation, shape)
            made.append(
                Case(
                    GROUP, operation, shape.title, build, targets=targets, grad=operation == "backward",
                    seconds=SECONDS, memory=operation == "forward" and shape.batch * shape.length >= 4096,
                )
            )  # fmt: skip
    return [*made, *_layer_cases(options), *_prior_cases(options)]


def _targets(operation: str, shape: Shape) -> tuple[Target, ...]:
    """The must column of the issue."""
    forward = operation == "forward"
    if shape.length == 4096:
        if not shape.is_causal:
            return (Target("pyface", "faster", 1.0 if forward else 1.2, CAT),)
        return tuple(Target("pyface", "faster", 1.1 if forward else 1.6, peer) for peer in (CAT, TRICK))
    if shape.length != 77 or shape.rows > 16 or shape.batch < 8:
        return ()
    found = [Target("pyface", "faster", 1.5, PLAIN)]
    if shape.rows == 1:
        bound = 2.0 if shape.is_causal else 1.6 if forward else 1.5
        found += [
            Target("pyface", "faster", bound, CAT),
            Target("pyface avx2", "faster", 1.5, CAT),
            Target("pyface bf16", "faster", 1.6 if forward else 1.5, "pyface"),
        ]
        found += [] if forward else [Target("pyface, rows only", "faster", 4.0, "pyface")]
    return tuple(found)


def _tensors(options: Options, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, length, depth, rows, _ = shape
    large = [(batch, heads, length, depth)] * 3
    return [torch.randn(*size, device=options.device).to(dtype) for size in (*large, *[(heads, rows, depth)] * 2)]


def _dtype(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.device == "cuda" else torch.float32


def _ours(tensors: list[Tensor], shape: Shape) -> Callable[[], Tensor]:
    return lambda: pyface.ops.concat_kv_attention(*tensors, is_causal=shape.is_causal)


def _theirs(tensors: list[Tensor], shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """What needs no compilation. Masks are made once, before: a model would keep them."""
    query, key, value = tensors[:3]
    pad = -(shape.length + shape.rows) % 16
    mask, padded = (
        peers.causal_mask(shape.length, shape.length, shape.rows, query, extra) if shape.is_causal else None
        for extra in (0, pad)
    )
    if pad and padded is None:
        padded = query.new_zeros(shape.length + shape.rows + pad)
        padded[-pad:] = -torch.inf
        padded = padded.expand(shape.length, -1)
    found = {
        CAT: lambda: peers.cat_attention(*tensors, mask),
        f"{CAT}, padded to 16": lambda: peers.cat_attention(*tensors, padded, pad),
    }
    if shape.is_causal:
        found[TRICK] = lambda: peers.trick_attention(*tensors)
    if shape.length <= 1024:
        found["cat, softmax, products"] = lambda: peers.softmax_attention(*tensors, mask)
    found[PLAIN] = lambda: F.scaled_dot_product_attention(query, key, value, is_causal=shape.is_causal)
    return found


def _by_path(options: Options, call: Callable[[], object], **about) -> list[Peer]:
    """Each path by name where there is a choice, each instruction set where there is one."""
    found = []
    if options.device == "cuda":
        for path in ("triton", "cuda"):

            def chosen(path=path):
                with pyface.paths(path):
                    return call()

            reasons = CORE.reasons(path, "cuda", (torch.bfloat16, torch.bfloat16), explicit=True)
            found.append(Peer(f"pyface {path}", None if reasons else chosen, why="; ".join(reasons), **about))
        return found
    module, why = _paths.load_module("_cpu")
    if module is not None and "avx2" in module.isas() and module.isa() != "avx2":
        best = module.isa()

        def narrower():
            module.set_isa("avx2")
            try:
                return call()
            finally:
                module.set_isa(best)

        found.append(Peer("pyface avx2", narrower, **about))
    else:
        found.append(Peer("pyface avx2", None, why=why or "it is the best there is, or is not there", **about))
    return found


def _limits(options: Options, shape: Shape, factor: float, dtype: torch.dtype) -> tuple[dict, list[Peer]]:
    """(`about` of the peers in dtype, the peer that is the limit); factor: work over that of the forward pass."""
    if options.device == "cuda" and shape.length <= 512:
        source = torch.randn(shape[:4], device="cuda").to(dtype)
        target = torch.empty_like(source)
        return {"limit": (COPY, 2 * factor)}, [Peer(COPY, lambda: target.copy_(source), dtype=_name(dtype))]
    side = torch.randn(SIDE, SIDE, device=options.device).to(dtype)
    name = SQUARE if dtype == _dtype(options) else f"{SQUARE} {_name(dtype)}"
    about = {"limit": (name, factor * shape.flops / (2 * SIDE**3))}
    return about, [Peer(name, lambda: torch.mm(side, side), dtype=_name(dtype))]


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _forward_peers(options: Options, shape: Shape) -> list[Peer]:
    dtype = _dtype(options)
    tensors = _tensors(options, shape, dtype)
    about, limit = _limits(options, shape, 1.0, dtype)
    about |= {"dtype": _name(dtype)}
    ours, theirs = _ours(tensors, shape), _theirs(tensors, shape)
    found = [Peer("pyface", ours, required=True, **about), *_by_path(options, ours, **about)]
    found += [Peer(name, call, **about) for name, call in theirs.items()]
    if options.quick or shape not in FLEX:
        found.append(Peer("FlexAttention", None, why="compiled for two of the shapes only", **about))
    else:
        found.append(Peer("FlexAttention", _when_first_called(tensors, shape), **about))
    if options.device == "cpu":
        low = [t.bfloat16() for t in tensors]
        about_low, limit_low = _limits(options, shape, 1.0, torch.bfloat16)
        about_low |= {"dtype": "bf16"}
        found.append(Peer("pyface bf16", _ours(low, shape), required=True, **about_low))
        mixed = [*low[:3], *tensors[3:]]
        found.append(Peer("pyface bf16, rows fp32", _ours(mixed, shape), required=True, **about_low))
        low_calls = _theirs(low, shape)
        found += [Peer(f"{name} bf16", low_calls[name], **about_low) for name in (CAT, PLAIN)]
        limit += limit_low
    return found + limit


def _when_first_called(tensors: list[Tensor], shape: Shape) -> Callable[[], Tensor]:
    """FlexAttention, whose preparation may fail: in the call, where the harness lists the reason."""
    make = functools.cache(lambda: peers.flex_attention(*tensors, shape.is_causal))
    return lambda: make()()


def _gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _backward_peers(options: Options, shape: Shape) -> list[Peer]:
    """Gradients of all five tensors, and of the rows alone, as where a layer's input is frozen."""
    dtype = _dtype(options)
    about, limit = _limits(options, shape, 2.5, dtype)
    about |= {"dtype": _name(dtype)}
    tensors = _tensors(options, shape, dtype)
    grad = torch.randn_like(tensors[0])
    leaves = [t.requires_grad_() for t in tensors]
    frozen = [*(t.detach() for t in tensors[:3]), *leaves[3:]]

    calls = {"pyface": _gradients(_ours(leaves, shape)(), leaves, grad)}
    by_path = []
    for peer in _by_path(options, _ours(leaves, shape), **about):
        if peer.call is None:
            by_path.append(peer)
        elif options.device == "cuda":  # the backward pass takes the path of its forward pass
            by_path.append(Peer(peer.name, _gradients(peer.call(), leaves, grad), **about))
        else:
            by_path += _by_path(options, calls["pyface"], **about)
    # Rows alone: another amount of work, so no limit.
    calls["pyface, rows only"] = _gradients(_ours(frozen, shape)(), frozen[3:], grad)
    for name, call in _theirs(leaves, shape).items():
        calls[name] = _gradients(call(), leaves[:3] if name == PLAIN else leaves, grad)
    calls[f"{CAT}, rows only"] = _gradients(_theirs(frozen, shape)[CAT](), frozen[3:], grad)
    found = [
        Peer(
            name, call, required=name.startswith("pyface"),
            **({"dtype": _name(dtype)} if name.endswith("rows only") else about),
        )
        for name, call in calls.items()
    ]  # fmt: skip
    found[1:1] = by_path
    found.append(Peer("FlexAttention", None, why="no backward pass on the CPU", **about))
    if options.device == "cpu":
        low = [t.detach().bfloat16().requires_grad_() for t in tensors]
        about_low, limit_low = _limits(options, shape, 2.5, torch.bfloat16)
        about_low |= {"dtype": "bf16"}
        low_grad, low_calls = grad.bfloat16(), _theirs(low, shape)
        found.append(Peer("pyface bf16", _gradients(_ours(low, shape)(), low, low_grad), required=True, **about_low))
        for name in (CAT, PLAIN):
            wanted = low[:3] if name == PLAIN else low
            found.append(Peer(f"{name} bf16", _gradients(low_calls[name](), wanted, low_grad), **about_low))
        limit += limit_low
    return found + limit


# ---- torch.nn.MultiheadAttention with a bias row ---------------------------------------------------------------------


def _layer_cases(options: Options) -> list[Case]:
    batch, length, width, heads = (2, 9, 16, 2) if options.quick else (8, 77, 768, 12)

    def build(operation):
        kind = {"device": options.device, "dtype": _dtype(options)}
        theirs = nn.MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True, **kind)
        ours = MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True, **kind)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(batch, length, width, **kind)
        mask = torch.ones(length, length, dtype=torch.bool, device=options.device).triu(1)
        projections = [nn.Linear(width, 3 * width, **kind), nn.Linear(width, width, **kind)]
        grad = torch.randn_like(x)

        def both(layer, **how):
            if operation == "forward":
                return lambda: layer(x, x, x, need_weights=False, **how)[0]
            leaf, parameters = x.clone().requires_grad_(), list(layer.parameters())
            return lambda: torch.autograd.grad(
                layer(leaf, leaf, leaf, need_weights=False, **how)[0], [leaf, *parameters], grad
            )

        def bare():
            return projections[1](projections[0](x)[..., :width])

        about = {"limit": ("its projections", 1.0)} if operation == "forward" else {}
        found = [
            Peer("pyface", both(ours, is_causal=True), required=True, **about),
            Peer("torch, add_bias_kv", both(theirs, attn_mask=mask), **about),
        ]
        return found + ([Peer("its projections", bare)] if operation == "forward" else [])

    return [
        Case(
            "MultiheadAttention layer", operation, f"{batch}x{length}x{width}, {heads} heads, causal",
            lambda operation=operation: build(operation), grad=operation != "forward", seconds=SECONDS,
        )
        for operation in ("forward", "forward + backward")
    ]  # fmt: skip


# ---- spatial prior ---------------------------------------------------------------------------------------------------


def _prior_cases(options: Options) -> list[Case]:
    """The cross-attention of SeqFakeFormer's decoder: 6 queries, 16 x 16 places, 4 heads of 64."""
    batch, side, depth = (2, 4, 16) if options.quick else (32, 16, 64)

    def build(operation):
        grad = operation != "forward"
        query, key, value = (
            torch.randn(batch, 4, n, depth, device=options.device) for n in (6, side * side, side * side)
        )
        centre = side * torch.rand(batch, 4, 6, 2, device=options.device)
        sharpness = torch.rand(batch, 4, 6, 2, device=options.device)
        tensors = [query, key, value, centre, sharpness]
        seed = torch.randn_like(query)
        if grad:
            tensors = [t.requires_grad_() for t in tensors]
        calls = {
            "pyface": lambda: pyface.ops.spatial_prior_attention(*tensors, side),
            "prior, softmax, products": lambda: peers.softmax_prior_attention(*tensors, side, 4.0),
            "prior as SDPA's mask": lambda: peers.sdpa_prior_attention(*tensors, side, 4.0),
        }
        if not options.quick:
            fast = peers.compiled(peers.softmax_prior_attention)
            calls["torch.compile"] = lambda: fast(*tensors, side, 4.0)
        if grad:
            calls = {name: lambda call=call: torch.autograd.grad(call(), tensors, seed) for name, call in calls.items()}
        limit = "keys and values read once"
        about = {"limit": (limit, 1.0)} if not grad else {}
        found = [Peer(name, call, required=name == "pyface", **about) for name, call in calls.items()]
        both = torch.cat((key.detach().flatten(), value.detach().flatten()))
        return found + ([] if grad else [Peer(limit, both.sum)])

    return [
        Case(
            "attention with a spatial prior", operation, f"{batch}x4x6 on {side}x{side}",
            lambda operation=operation: build(operation), grad=operation != "forward", seconds=SECONDS,
        )
        for operation in ("forward", "forward + backward")
    ]  # fmt: skip
