"""Passes of sharpness-aware training over lists of tensors: loops as in davda54/sam, GSAM and GCSCoOp, torch._foreach,
torch.compile, torch.optim.SGD, and what the memory allows.

The limit of a pass is the bytes it cannot avoid at the speed of the memory, as a small C program reaches it in the same
rounds with the same threads: reading two streams for what is only read, a copy with streaming stores for the rest.
"""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Case, Options, Peer, Target
from pyface.ops import multi_combine_, multi_dots, multi_norm, multi_step_, perturb_, restore_
from pyface.optim import SAM, GradientConstrainedSAM

RHO, ALPHA = 0.05, 0.4
ALWAYS = {"lower": -2.0, "upper": 2.0}  # thresholds under which the projection, the dearest case, is always taken
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
CEILING, NOTHING = "the memory", "an empty call"
DAVDA, PLAIN, FOREACH = "davda54-style loop", "loop in place", "torch._foreach"
GSAM, GCSCOOP, COMPILED, INTO = "GSAM-style loop", "GCSCoOp-style loop", "torch.compile", "torch.compile, in place"
FUSED, MANY = "copy_, SGD(fused)", "copy_, SGD(foreach)"
BEST = f"{PLAIN}, {GCSCOOP}, {FUSED}"
MOST_COMPILED = 100  # tensors: compilation takes about a third of a second for each
LARGE = 1_000_000  # elements, above which a list is a matter of bytes
SECONDS = 6.0


def _vit_b_16() -> list[tuple[int, ...]]:
    width, wide = 768, 3072
    block = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
        (wide, width), (wide,), (width, wide), (width,),
    ]  # fmt: skip
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*stem, *block * 12, (width,), (width,), (1000, width), (1000,)]


LISTS: dict[str, list[tuple[int, ...]]] = {
    "ViT-B/16": _vit_b_16(),
    "100 x 1e6": [(1_000_000,)] * 100,
    "2000 x 64": [(64,)] * 2000,
    "1 x 4x512": [(4, 512)],
}
QUICK = {"7 x 300": [(300,)] * 7, "1 x 4x512": [(4, 512)]}


class Lists(NamedTuple):
    """What the passes work on."""

    ws: list[Tensor]
    saved: list[Tensor]
    xs: list[Tensor]
    ys: list[Tensor]
    momenta: list[Tensor]

    @property
    def count(self) -> int:
        return sum(w.numel() for w in self.ws)


def _make(options: Options, shapes: list[tuple[int, ...]]) -> Lists:
    def normal():
        return [torch.randn(shape, device=options.device) for shape in shapes]

    ws, ys, noise = normal(), normal(), normal()
    xs = [n.add_(y) for n, y in zip(noise, ys, strict=True)]
    return Lists(ws, [w.clone() for w in ws], xs, ys, [torch.zeros_like(w) for w in ws])


# ---- peers: the loops of public code, and what torch offers ----------------------------------------------------------


def davda54_norm(ys: list[Tensor]) -> Tensor:
    return torch.stack([(1.0 * y).norm(p=2) for y in ys]).norm(p=2)


def davda54_ascent(t: Lists) -> list[Tensor]:
    """Norm, copies of the weights (made new, as that class makes them), ascent."""
    scale = RHO / (davda54_norm(t.ys) + 1e-12)
    kept = []
    for w, y in zip(t.ws, t.ys, strict=True):
        kept.append(w.clone())
        w.add_(1.0 * y * scale)
    return kept


def plain_ascent(t: Lists) -> None:
    """The same without a temporary tensor."""
    norm = torch.stack([torch.linalg.vector_norm(y) for y in t.ys]).norm()
    scale = float(RHO / (norm + 1e-12))
    for w, kept, y in zip(t.ws, t.saved, t.ys, strict=True):
        kept.copy_(w)
        w.add_(y, alpha=scale)


def foreach_ascent(t: Lists) -> None:
    scale = RHO / (torch.stack(torch._foreach_norm(t.ys)).norm() + 1e-12)
    torch._foreach_copy_(t.saved, t.ws)
    torch._foreach_add_(t.ws, torch._foreach_mul(t.ys, scale))


def dots(t: Lists) -> list[Tensor]:
    flat = [(x.view(-1), y.view(-1)) for x, y in zip(t.xs, t.ys, strict=True)]
    return [torch.dot(*pair) for x, y in flat for pair in ((x, x), (y, y), (x, y))]


def gsam_combine(xs: list[Tensor], ys: list[Tensor], alpha: float = ALPHA) -> None:
    """Inner product, two norms, and y's part across x, tensor by tensor; into xs."""
    inner = sum((x * y).sum() for x, y in zip(xs, ys, strict=True))
    x_norm = torch.stack([x.norm(p=2) for x in xs]).norm(p=2)
    y_norm = torch.stack([y.norm(p=2) for y in ys]).norm(p=2)
    cosine = inner / (x_norm * y_norm + 1e-12)
    for x, y in zip(xs, ys, strict=True):
        x.sub_(y - cosine * y_norm * x / (x_norm + 1e-12), alpha=alpha)


def gcscoop_combine(xs: list[Tensor], ys: list[Tensor], lower: float, upper: float) -> list[Tensor]:
    """The cosine of normalised copies, then one of three cases, tensor by tensor."""
    combined = []
    for x, y in zip(xs, ys, strict=True):
        cosine = (x / x.norm() * (y / y.norm())).sum()
        if cosine >= upper:
            combined.append(x)
        elif cosine <= lower:
            combined.append(y)
        else:
            middle = x + y
            middle = middle / middle.norm()
            combined.append((x * middle).sum() * middle)
    return combined


def _gsam_scalars(a: Tensor, k: Tensor) -> Tensor:
    return 1 + ALPHA * k / a


def foreach_gsam(xs: list[Tensor], ys: list[Tensor]) -> None:
    """The GSAM-style loop, each line of it for all tensors."""
    inner = torch.stack([p.sum() for p in torch._foreach_mul(xs, ys)]).sum()
    x_norm, y_norm = (torch.stack(torch._foreach_norm(zs)).norm() for zs in (xs, ys))
    cosine = inner / (x_norm * y_norm + 1e-12)
    across = torch._foreach_sub(ys, torch._foreach_mul(xs, cosine * y_norm / (x_norm + 1e-12)))
    torch._foreach_sub_(xs, across, alpha=ALPHA)


def foreach_combine(xs: list[Tensor], ys: list[Tensor]) -> None:
    """GSAM in its closed form, in place."""
    a = torch.stack(torch._foreach_norm(xs)).square().sum()
    k = torch.stack([p.sum() for p in torch._foreach_mul(xs, ys)]).sum()
    torch._foreach_mul_(xs, _gsam_scalars(a, k))
    torch._foreach_add_(xs, ys, alpha=-ALPHA)


def closed_form(xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
    """The same, for torch.compile."""
    a, k = (sum((x * z).sum() for x, z in zip(xs, zs, strict=True)) for zs in (xs, ys))
    u = _gsam_scalars(a, k)
    return [u * x - ALPHA * y for x, y in zip(xs, ys, strict=True)]


def closed_form_(xs: list[Tensor], ys: list[Tensor]) -> None:
    for x, g in zip(xs, closed_form(xs, ys), strict=True):
        x.copy_(g)


def base_optimizer(t: Lists, **kind: bool) -> torch.optim.SGD:
    """torch's, over the very memory of the lists, with the gradients xs."""
    parameters = [torch.nn.Parameter(w) for w in t.ws]
    optimizer = torch.optim.SGD(parameters, **SGD, **kind)
    for p, x, m in zip(parameters, t.xs, t.momenta, strict=True):
        p.grad = x
        optimizer.state[p]["momentum_buffer"] = m
    return optimizer


def restore_loop(t: Lists) -> None:
    for w, kept in zip(t.ws, t.saved, strict=True):
        w.copy_(kept)


# ---- the memory ------------------------------------------------------------------------------------------------------

_C = r"""
#include <stddef.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#define STREAM(p, v) _mm512_stream_ps((p), (__m512)(v))
enum { LANES = 16 };
#elif defined(__AVX__)
#include <immintrin.h>
#define STREAM(p, v) _mm256_stream_ps((p), (__m256)(v))
enum { LANES = 8 };
#else
#define STREAM(p, v) (*(V*)(p) = (v))
enum { LANES = 4 };
#endif
typedef float V __attribute__((vector_size(4 * LANES)));
static V at(const float* p) { return *(const V*)p; }

float read_two(const float* a, const float* b, ptrdiff_t n, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(+ : total)
  for (ptrdiff_t block = 0; block < n; block += 32768) {
    const ptrdiff_t end = block + 32768 < n ? block + 32768 : n;
    V s[4] = {{0}, {0}, {0}, {0}};
    for (ptrdiff_t i = block; i + 4 * LANES <= end; i += 4 * LANES) {
      __builtin_prefetch(a + i + 1024);
      __builtin_prefetch(b + i + 1024);
      for (int j = 0; j < 4; ++j) s[j] += at(a + i + j * LANES) * at(b + i + j * LANES);
    }
    const V all = (s[0] + s[1]) + (s[2] + s[3]);
    for (int j = 0; j < LANES; ++j) total += all[j];
  }
  return total;
}

void copy_streaming(float* to, const float* from, ptrdiff_t n, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (ptrdiff_t block = 0; block < n; block += 32768) {
      const ptrdiff_t end = block + 32768 < n ? block + 32768 : n;
      for (ptrdiff_t i = block; i + LANES <= end; i += LANES) {
        __builtin_prefetch(from + i + 1024);
        STREAM(to + i, at(from + i));
      }
    }
#if defined(__AVX__)
    _mm_sfence();
#endif
  }
}

void copy_plain(float* to, const float* from, ptrdiff_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (ptrdiff_t block = 0; block < n; block += 32768) {
    const ptrdiff_t end = block + 32768 < n ? block + 32768 : n;
    for (ptrdiff_t i = block; i + LANES <= end; i += LANES) *(V*)(to + i) = at(from + i);
  }
}

void scale_in_place(float* a, ptrdiff_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (ptrdiff_t block = 0; block < n; block += 32768) {
    const ptrdiff_t end = block + 32768 < n ? block + 32768 : n;
    for (ptrdiff_t i = block; i + LANES <= end; i += LANES) *(V*)(a + i) = at(a + i) * 0.9999999f;
  }
}
"""


@functools.cache
def _memory() -> tuple[ctypes.CDLL | None, str]:
    """The C program, or why there is none. It shares torch's OpenMP team."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return None, "no C compiler"
    native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    # Sums in any order, but not -ffast-math: linked into a library, that would flush subnormal numbers everywhere.
    loose = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
    flags = ["-O3", *loose, native, "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "memory.c"), Path(folder, "memory.so")
        source.write_text(_C)
        done = subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, text=True)
        if done.returncode:
            return None, f"{compiler} fails: {(done.stderr.splitlines() or ['?'])[0]}"
        return ctypes.CDLL(str(library)), ""


class Ceiling:
    """What n elements cost when they are only moved. `read(k)`: k streams of n floats; `copy(k)`: k streams, one half
    read and one half written."""

    def __init__(self, options: Options, n: int):
        self.n, self.cuda = n, options.device == "cuda"
        self.module, self.why = (None, "torch's copy_ is the limit there") if self.cuda else _memory()
        self.a, self.b = (torch.ones(-(-n // 64) * 64, device=options.device) for _ in range(2))

    def _run(self, name: str, streams: float, *tensors: Tensor) -> None:
        threads = torch.get_num_threads() if self.n >= 65536 else 1
        while streams > 0:
            count = int(self.n * min(1.0, streams / 2))
            addresses = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
            getattr(self.module, name)(*addresses, ctypes.c_ssize_t(count), threads)
            streams -= 2

    def read(self, streams: float) -> None:
        if self.module is None:
            for _ in range(math.ceil(streams)):
                self.a.sum()
        else:
            self._run("read_two", streams, self.a, self.b)

    def copy(self, streams: float, plain: bool = False) -> None:
        if self.module is None:
            for _ in range(math.ceil(streams / 2)):
                self.b.copy_(self.a)
        else:
            self._run("copy_plain" if plain else "copy_streaming", streams, self.b, self.a)

    def scale(self) -> None:
        if self.module is None:
            self.a.mul_(1.0)
        else:
            self._run("scale_in_place", 2, self.a)

    def peer(self, read: float, copied: float) -> Peer:
        """Streams a pass only reads, and streams of its parts that also write."""

        def call():
            if read:
                self.read(read)
            if copied:
                self.copy(copied)

        return Peer(CEILING, call)


# ---- cases -----------------------------------------------------------------------------------------------------------


def cases(options: Options) -> list[Case]:
    made = []
    for size, shapes in (QUICK if options.quick else LISTS).items():
        is_large = sum(math.prod(s) for s in shapes) >= LARGE
        for operation, (build, bars) in PASSES.items():
            if operation == "bandwidth" and not (is_large or options.quick):
                continue
            targets = () if options.quick or options.device != "cpu" else tuple(bars(size))
            made.append(
                Case(
                    "sharpness", operation, size,
                    lambda build=build, shapes=shapes: build(options, shapes),
                    targets=targets, seconds=SECONDS if is_large else 1.0,
                )
            )  # fmt: skip
    return made


def _near(size: str) -> list[Target]:
    """At least 0.9 of the bandwidth."""
    return [Target("pyface", "at most", 1 / 0.9, CEILING, threads=2)] if size == "ViT-B/16" else []


def _faster(size: str, bounds: dict[str, float], where: str = "ViT-B/16") -> list[Target]:
    return [Target("pyface", "faster", bound, other) for other, bound in bounds.items()] if size == where else []


def _limit(options: Options, n: int) -> tuple[Ceiling, dict]:
    """The ceiling, and what the peers say of it: nothing where calls, not bytes, are what takes time."""
    return Ceiling(options, n), {"limit": (CEILING, 1.0)} if n >= LARGE or options.quick else {}


def _bandwidth(options: Options, shapes) -> list[Peer]:
    limit = Ceiling(options, sum(math.prod(s) for s in shapes))
    found = {
        "read two streams": lambda: limit.read(2),
        "copy, streaming stores": lambda: limit.copy(2),
        "copy, plain stores": lambda: limit.copy(2, plain=True),
        "torch copy_": lambda: limit.b.copy_(limit.a),
        "in place": limit.scale,
        "torch mul_": lambda: limit.a.mul_(1.0),
        "torch sum": lambda: limit.a.sum(),
    }
    return [Peer(name, call, why=limit.why) for name, call in found.items()]


def _norm(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    return [
        Peer("pyface", lambda: multi_norm(t.ys), required=True, **about),
        Peer("loop of norms", lambda: [torch.linalg.vector_norm(y) for y in t.ys], **about),
        Peer(FOREACH, lambda: torch._foreach_norm(t.ys), **about),
        limit.peer(1, 0),
    ]


def _ascent(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    return [
        Peer("pyface", lambda: perturb_(t.ws, t.ys, t.saved, None, RHO), required=True, **about),
        Peer(DAVDA, lambda: davda54_ascent(t), **about),
        Peer(PLAIN, lambda: plain_ascent(t), **about),
        Peer(FOREACH, lambda: foreach_ascent(t), **about),
        limit.peer(1, 4),
    ]


def _dots(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    return [
        Peer("pyface", lambda: multi_dots(t.xs, t.ys), required=True, **about),
        Peer("three dots a tensor", lambda: dots(t), **about),
        limit.peer(2, 0),
    ]


def _gsam(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    found = [
        Peer(
            "pyface", lambda: multi_combine_(t.xs, t.ys, None, "gsam", alpha=ALPHA), required=True,
            **about,
        ),
        Peer(GSAM, lambda: gsam_combine(t.xs, t.ys), **about),
        Peer(FOREACH, lambda: foreach_gsam(t.xs, t.ys), **about),
        Peer(f"{FOREACH}, closed form in place", lambda: foreach_combine(t.xs, t.ys), **about),
    ]  # fmt: skip
    for name, function in ((COMPILED, closed_form), (INTO, closed_form_)):
        why = "not compiled in a quick run" if options.quick else ""
        if len(shapes) > MOST_COMPILED:
            why = f"compiling code for {len(shapes)} tensors takes minutes; done for up to {MOST_COMPILED}"
        call = None if why else functools.partial(peers.compiled(function), t.xs, t.ys)
        found.append(Peer(name, call, why=why, **about))
    return [*found, limit.peer(2, 3)]


def _constrained(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    return [
        Peer(
            "pyface", lambda: multi_combine_(t.xs, t.ys, None, "constrained", **ALWAYS),
            required=True, **about,
        ),
        Peer(GCSCOOP, lambda: gcscoop_combine(t.xs, t.ys, **ALWAYS), **about),
        limit.peer(2, 3),
    ]  # fmt: skip


def _restore_step(t: Lists, sums, rule: str, **parameters: float) -> None:
    multi_step_(t.ws, t.saved, t.xs, t.ys, t.momenta, sums, rule, **parameters, **SGD)


def _step(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    sums = multi_dots(t.xs, t.ys)
    fused, many = base_optimizer(t, fused=True), base_optimizer(t, foreach=True)
    return [
        Peer("pyface", lambda: _restore_step(t, sums, "gsam", alpha=ALPHA), required=True, **about),
        Peer("pyface, SAM's rule", lambda: _restore_step(t, sums, "second"), required=True),
        Peer("pyface, restoring alone", lambda: restore_(t.ws, t.saved), required=True),
        Peer(FUSED, lambda: (restore_loop(t), fused.step()), **about),
        Peer(MANY, lambda: (torch._foreach_copy_(t.ws, t.saved), many.step()), **about),
        limit.peer(0, 6),
    ]


def _class_of_ours(t: Lists, kind, **parameters) -> Callable[[], None]:
    """Both passes of an optimiser with the gradients of the lists."""
    weights = [torch.nn.Parameter(w) for w in t.ws]
    optimizer = kind(weights, torch.optim.SGD, rho=RHO, **parameters, **SGD)

    def call():
        for gradients, step in ((t.ys, optimizer.first_step), (t.xs, optimizer.second_step)):
            for p, g in zip(weights, gradients, strict=True):
                p.grad = g
            step()

    return call


def _whole(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    fused, many = base_optimizer(t, fused=True), base_optimizer(t, foreach=True)

    def ours():
        perturb_(t.ws, t.ys, t.saved, None, RHO)
        _restore_step(t, None, "constrained", **ALWAYS)

    def best():
        plain_ascent(t)
        for p, g in zip(fused.param_groups[0]["params"], gcscoop_combine(t.xs, t.ys, **ALWAYS), strict=True):
            p.grad = g
        restore_loop(t)
        fused.step()

    def all_foreach():
        foreach_ascent(t)
        foreach_combine(t.xs, t.ys)
        torch._foreach_copy_(t.ws, t.saved)
        many.step()

    return [
        Peer("pyface", ours, required=True, **about),
        Peer("pyface.optim", _class_of_ours(t, GradientConstrainedSAM, **ALWAYS), required=True, **about),
        Peer(BEST, best, **about),
        Peer(f"{FOREACH} throughout (GSAM)", all_foreach, **about),
        limit.peer(3, 10),
        Peer(NOTHING, lambda: None),
    ]


def _whole_sam(options: Options, shapes) -> list[Peer]:
    t = _make(options, shapes)
    limit, about = _limit(options, t.count)
    base = base_optimizer(t)

    def davda54():
        for i, (p, kept) in enumerate(zip(base.param_groups[0]["params"], davda54_ascent(t), strict=True)):
            p.data = t.ws[i] = kept  # another memory in every step
        base.step()

    return [
        Peer("pyface.optim", _class_of_ours(t, SAM), required=True, **about),
        Peer(f"{DAVDA}, SGD", davda54, **about),
        limit.peer(1, 9),
    ]


# operation: (peers, targets of the list with this title)
PASSES: dict[str, tuple[Callable, Callable[[str], list[Target]]]] = {
    "bandwidth": (_bandwidth, lambda size: []),
    "norm": (_norm, _near),
    "norm, save, ascent": (_ascent, lambda size: [*_near(size), *_faster(size, {DAVDA: 1.7})]),
    "three sums": (_dots, _near),
    "sums, combine (GSAM)": (
        _gsam,
        lambda size: [
            *_near(size), *_faster(size, {GSAM: 2.8, FOREACH: 4.0}),
            *_faster(size, {COMPILED: 3.0, INTO: 1.2}, "100 x 1e6"),
        ],
    ),
    "sums, combine (GCSCoOp)": (_constrained, lambda size: [*_near(size), *_faster(size, {GCSCOOP: 3.5})]),
    "combine, restore, SGD": (_step, lambda size: [*_near(size), *_faster(size, {FUSED: 1.1})]),
    "whole step (GCSCoOp)": (
        _whole,
        lambda size: [
            *_near(size), *_faster(size, {BEST: 2.5}), *_faster(size, {BEST: 30.0}, "2000 x 64"),
            *_faster(size, {BEST: 3.0}, "1 x 4x512"),
            *([Target("pyface", "excess", 40.0, NOTHING)] if size == "1 x 4x512" else []),
        ],
    ),
    "whole step (SAM)": (_whole_sam, lambda size: []),
}  # fmt: skip
