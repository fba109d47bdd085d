"""Affine coupling and the Haar wavelet against FrEIA, HiNet, torch.compile and a plain copy; op overhead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import pyface.nn
import pyface.ops
from benchmarks import peers
from benchmarks.harness import Case, Options, Peer, Target, at_size
from pyface.ops.coupling import CORE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_COMPILE = "left out by --quick"
COPY = "copy_"


def cases(options: Options) -> list[Case]:
    return [*_coupling_cases(options), *_block_cases(options), *_haar_cases(options), *_overhead_cases(options)]


# ---- shared pieces ---------------------------------------------------------------------------------------------------


def _ours(options: Options, core, call: Callable[[], object], **about) -> list[Peer]:
    """The op as users call it, and each path by name where there is a choice."""
    found = [Peer("pyface", call, required=True, **about)]
    if options.device == "cuda":
        for path in ("triton", "cuda"):

            def chosen(path=path):
                with pyface.paths(path):
                    return call()

            reasons = core.reasons(path, "cuda", (torch.float32,), explicit=True)
            found.append(Peer(f"pyface {path}", None if reasons else chosen, why="; ".join(reasons), **about))
    return found


def _compiled(options: Options, function: Callable, *args, **about) -> Peer:
    if options.quick:
        return Peer("torch.compile", None, why=NO_COMPILE, **about)
    fast = peers.compiled(function)
    return Peer("torch.compile", lambda: fast(*args), **about)


def _freia(name: str, make: Callable[[], Callable[[], object]], **about) -> Peer:
    why = peers.why_no_freia()
    return Peer(name, None if why else make(), why=why, **about)


def _copies(x: Tensor) -> list[Peer]:
    target = torch.empty_like(x)
    return [Peer(COPY, lambda: target.copy_(x)), Peer("clone (copy, fresh memory)", x.clone)]


# ---- affine coupling -------------------------------------------------------------------------------------------------


def _coupling_cases(options: Options) -> list[Case]:
    shape = (2, 16, 16) if options.quick else (12, 128, 128)
    batches = at_size(options, (1, 6, 32), (1, 2))
    sizes = [(batch, "fp32") for batch in batches] + [(batches[-1], "bf16")]
    made = []
    for batch, st in sizes:
        size = f"B={batch}" + (" s,t bf16" if st == "bf16" else "")
        large = batch == 32
        dtype = DTYPES[st]
        # bytes per element of what must be read and written, over the 8 of a fp32 copy
        forward_limit = (4 + 2 * dtype.itemsize + 4) / 8
        backward_limit = (4 + 4 + dtype.itemsize + 4 + dtype.itemsize + (0 if st == "fp32" else dtype.itemsize)) / 8

        def build(operation, batch=batch, dtype=dtype, limits=(forward_limit, backward_limit)):
            return lambda: _coupling_peers(options, operation, (batch, *shape), dtype, *limits)

        def add(operation, targets=(), grad=False, size=size, large=large, build=build):
            made.append(
                Case(
                    "affine coupling",
                    operation,
                    size,
                    build(operation),
                    targets=tuple(targets),
                    grad=grad,
                    memory=large,
                )
            )

        fp32 = st == "fp32"
        add(
            "forward with log-det",
            (
                [Target("pyface", "at most", 2.6, COPY, threads=1), Target("pyface", "at most", 2.2, COPY, threads=2)]
                if large and fp32 and options.device == "cpu"
                else [Target("pyface", "at most", 2.3, COPY)]
                if large and fp32
                else []
            )
            + ([Target("pyface", "faster", 1.4, "torch.compile")] if large and fp32 else [])
            + ([Target("pyface", "faster", 1.5, "torch.compile")] if batch == 1 and fp32 and not options.quick else []),
        )
        add("forward")
        add("inverse with log-det")
        add("backward", grad=True)
        add(
            "forward + backward",
            [Target("pyface", "faster", 1.5, "torch.compile")] if fp32 and not options.quick else [],
            grad=True,
        )
    return made


def _coupling_peers(options, operation, shape, dtype, forward_limit, backward_limit) -> list[Peer]:
    device, is_mixed = options.device, dtype != torch.float32
    x = torch.randn(shape, device=device)
    s, t = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    name = "fp32/bf16" if is_mixed else "fp32"
    if operation in ("backward", "forward + backward"):
        return _gradient_peers(options, operation, x, s, t, name, forward_limit, backward_limit)

    about = {"limit": (COPY, forward_limit), "dtype": name}
    inverse, log_det = operation.startswith("inverse"), operation.endswith("log-det")
    found = _ours(
        options, CORE, lambda: pyface.ops.affine_coupling(x, s, t, inverse=inverse, return_log_det=log_det), **about
    )
    found += _kernel_alone(options, x, s, t, inverse, log_det, about)
    if log_det:
        found.append(
            _compiled(
                options, peers.uncoupling_with_log_det if inverse else peers.coupling_with_log_det, x, s, t, **about
            )
        )
        found.append(_freia("FrEIA", lambda: peers.freia_coupling(x, s, t, inverse), **about))
        eager = peers.hinet_uncoupling if inverse else peers.hinet_coupling
        found.append(Peer("HiNet (no log-det)", lambda: eager(x, s, t), **about))
    else:
        found.append(_compiled(options, peers.hinet_coupling, x, s, t, **about))
        found.append(Peer("HiNet", lambda: peers.hinet_coupling(x, s, t), **about))
    if not is_mixed:
        found.append(Peer("addcmul (same bytes)", lambda: torch.addcmul(t, x, s), **about))
    return found + _copies(x)


def _kernel_alone(options, x, s, t, inverse, log_det, about) -> list[Peer]:
    """The compiled kernel on a result that is there already: what the op costs without its allocation."""
    if options.device != "cpu":
        return []
    reasons = CORE.reasons("cpu", "cpu", (x.dtype, s.dtype), explicit=True)
    if reasons:
        return [Peer("pyface, result reused", None, why="; ".join(reasons), **about)]
    from pyface import _cpu
    from pyface.ops.coupling import _DTYPE_CODES, ACTIVATIONS

    y, sums = torch.empty_like(x), torch.empty(x.shape[0])
    batch, inner = x.shape[0], x.numel() // x.shape[0]
    fixed = (
        x.data_ptr(), s.data_ptr(), t.data_ptr(), y.data_ptr(), sums.data_ptr() if log_det else 0, batch, inner,
        inner, inner, inner, inner, _DTYPE_CODES[x.dtype], _DTYPE_CODES[s.dtype],
        ACTIVATIONS["sigmoid"], peers.CLAMP, inverse,
    )  # fmt: skip

    def call(_keep=(x, s, t, y, sums)):
        _cpu.coupling_forward(*fixed, torch.get_num_threads())

    return [Peer("pyface, result reused", call, **about)]


def _gradient_peers(options, operation, x, s, t, name, forward_limit, backward_limit) -> list[Peer]:
    """Gradients of x, s and t from those of y and the log-determinant, under autograd."""
    leaves = [v.detach().requires_grad_() for v in (x, s, t)]
    grad_y, grad_log_det = torch.randn_like(x), torch.randn(x.shape[0], device=x.device)
    both = operation == "forward + backward"
    about = {"limit": (COPY, forward_limit + backward_limit if both else backward_limit), "dtype": name}

    def gradients(forward: Callable[[], object]) -> Callable[[], object]:
        def differentiate(out, keep):
            outputs = out if isinstance(out, tuple) else (out,)
            return torch.autograd.grad(outputs, leaves, (grad_y, grad_log_det)[: len(outputs)], retain_graph=keep)

        if both:
            return lambda: differentiate(forward(), False)
        out = forward()
        return lambda: differentiate(out, True)

    with torch.enable_grad():
        found = _ours(
            options, CORE, gradients(lambda: pyface.ops.affine_coupling(*leaves, return_log_det=True)), **about
        )
        if options.quick:
            found.append(Peer("torch.compile", None, why=NO_COMPILE, **about))
        elif both:
            fast = peers.compiled(peers.coupling_with_log_det)
            found.append(Peer("torch.compile", gradients(lambda: fast(*leaves)), **about))
        else:
            why = "its backward reuses the memory of its forward, so it cannot run alone"
            found.append(Peer("torch.compile", None, why=why, **about))
        found.append(_freia("FrEIA", lambda: gradients(peers.freia_coupling(*leaves)), **about))
        found.append(Peer("HiNet (no log-det)", gradients(lambda: peers.hinet_coupling(*leaves)), **about))
    return found + _copies(x)


def _block_cases(options: Options) -> list[Case]:
    """A whole two-sided block around sub-nets that cost nothing: splitting, coupling both halves, joining."""
    shape = (2, 16, 16) if options.quick else (12, 128, 128)

    def build(batch):
        x = torch.randn(batch, 2 * shape[0], *shape[1:], device=options.device)
        s, t = (torch.randn(batch, *shape, device=options.device) for _ in range(2))

        layers = pyface.nn.InvertibleSequential(
            *(
                pyface.nn.AffineCoupling(peers.Given(s), peers.Given(t), transform=half, clamp=peers.CLAMP)
                for half in ("first", "second")
            )
        )

        def ops():
            first, second = x.chunk(2, 1)
            first, a = pyface.ops.affine_coupling(first, s, t, return_log_det=True)
            second, b = pyface.ops.affine_coupling(second, s, t, return_log_det=True)
            return torch.cat((first, second), 1), a + b

        def freia():
            block = peers.freia_block(x[:, : shape[0]], s, t)
            return lambda: block((x,))

        # x in, y out, s and t read for each half: 16 B per element; the copy of x moves 8.
        about = {"limit": (COPY, 2.0)}
        return [
            Peer("pyface.nn", lambda: layers(x, return_log_det=True), required=True, **about),
            Peer("pyface.ops, joined by hand", ops, **about),
            _freia("FrEIA", freia, **about),
            *_copies(x),
        ]

    return [
        Case(
            "coupling block",
            "forward with log-det",
            f"B={batch}",
            lambda batch=batch: build(batch),
            ratio_to="pyface.nn",
        )
        for batch in at_size(options, (1, 6, 32), (1,))
    ]


# ---- Haar wavelet ----------------------------------------------------------------------------------------------------


def _haar_cases(options: Options) -> list[Case]:
    side = 32 if options.quick else 256
    return [
        Case(
            "Haar wavelet",
            operation,
            f"B={batch}",
            lambda operation=operation, batch=batch: _haar_peers(options, operation, batch, side),
            targets=() if options.quick else (Target("pyface, out=", "at most", 1.3, COPY),),
            memory=batch >= 32,
        )
        for operation in ("dwt", "idwt")
        for batch in at_size(options, (1, 6, 32, 64), (1, 2))
    ]


def _haar_peers(options: Options, operation: str, batch: int, side: int) -> list[Peer]:
    inverse, device = operation == "idwt", options.device
    x = torch.randn((batch, 12, side // 2, side // 2) if inverse else (batch, 3, side, side), device=device)
    op, eager, conv, shuffle = (
        (pyface.ops.haar_idwt2d, peers.hinet_idwt, peers.conv_idwt, torch.nn.functional.pixel_shuffle)
        if inverse
        else (pyface.ops.haar_dwt2d, peers.hinet_dwt, peers.conv_dwt, torch.nn.functional.pixel_unshuffle)
    )
    weights = peers.haar_weights(3, device)
    about, out = {"limit": (COPY, 1.0)}, op(x)

    def freia(by_band):
        def make():
            module, mine = peers.freia_haar(3, side, side, device, by_band, inverse), x.clone()
            return lambda: module(mine)

        return make

    return [
        *_ours(options, CORE, lambda: op(x), **about),
        Peer("pyface, out=", lambda: op(x, out=out), **about),
        _compiled(options, eager, x, **about),
        Peer("HiNet", lambda: eager(x), **about),
        Peer("dense conv2d", lambda: conv(x, weights), **about),
        _freia("FrEIA, band order", freia(True), **about),
        _freia("FrEIA, default order", freia(False), **about),
        Peer("pixel shuffle alone", lambda: shuffle(x, 2), **about),
        *_copies(x),
    ]


# ---- op overhead -----------------------------------------------------------------------------------------------------


def _overhead_cases(options: Options) -> list[Case]:
    """Eight numbers: what remains is the way to the kernel and back."""

    def build(operation):
        x, s, t = (torch.randn(1, 8, device=options.device) for _ in range(3))
        if operation != "no grad":
            x, s, t = (v.requires_grad_() for v in (x, s, t))
        ours = {
            "pyface": lambda: pyface.ops.affine_coupling(x, s, t),
            "pyface through torch.ops": lambda: torch.ops.pyface.affine_coupling(
                x, s, t, 2.0, "sigmoid", False, False, None
            )[0],
            "addcmul": lambda: torch.addcmul(t, x, s),
            "HiNet": lambda: peers.hinet_coupling(x, s, t),
        }
        if operation == "forward + backward":
            seed = torch.ones(1, 8, device=options.device)
            ours = {name: lambda call=call: torch.autograd.grad(call(), (x, s, t), seed) for name, call in ours.items()}
        return [Peer(name, call, limit=("addcmul", 1.0), required=name == "pyface") for name, call in ours.items()]

    targets = {"no grad": (Target("pyface", "excess", 5.0, "addcmul"),), "recording": (), "forward + backward": ()}
    return [
        Case("op overhead", operation, "8 numbers", lambda operation=operation: build(operation), ratio_to="addcmul",
             targets=target, grad=operation != "no grad", host=True)
        for operation, target in targets.items()
    ]  # fmt: skip
