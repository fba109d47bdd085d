"""Op table of core `sharpness`: norms, ascent, rules and update of sharpness-aware training over lists of tensors.

Every argument is checked here, once, before any pointer is taken. Lists of plain dense tensors that fit each
other are recognised as such by the compiled module (`_ran`): over thousands of tensors the checks in Python take longer
than the work. Whatever is not plain comes here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from pyface.ops import _paths
from pyface.ops._paths import Core, chosen_path
from pyface.ops._register import LIBRARY
from pyface.ops.reference import sharpness as reference

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# The rules and their parameters, in the order of pyface/sharpness.h.
RULES: dict[str, tuple[str, ...]] = {
    "second": (),
    "mix": ("t",),
    "gsam": ("alpha",),
    "gsam_first": ("alpha",),
    "constrained": ("lower", "upper"),
    "surgery": (),
}
_RULE_CODES = {name: code for code, name in enumerate(RULES)}


class Sums(NamedTuple):
    """What the passes decide by, on the device of the gradients.

    Attributes:
        values: Tensor[T + 1, 3] float64, of each tensor and (last row) of all: the sums of x², y², xy.
        nonfinite: Tensor[2] float32: 1 where an x, a y has an element that is not finite, else 0.
    """

    values: Tensor
    nonfinite: Tensor


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check(op: str, **lists: Sequence[Tensor]) -> None:
    """Lists of one length whose tensors have, number by number, one shape, and all one device."""
    (name, first), *others = lists.items()
    for other, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(
                f"{op}: {name} and {other} must be equally long, got {len(first)} and {len(tensors)} tensors"
            )
    if not first:
        return
    device = first[0].device
    for kind, tensors in lists.items():
        for p, t in enumerate(tensors):
            if t.layout != torch.strided:
                raise TypeError(
                    f"{op}: {kind}[{p}] is sparse ({t.layout}): only dense tensors are taken; make it dense with "
                    ".to_dense(), or leave it out"
                )
            if not t.dtype.is_floating_point:
                hint = "; give torch.view_as_real of it" if t.dtype.is_complex else ""
                raise TypeError(f"{op}: {kind}[{p}] must be floating point, got {t.dtype}{hint}")
            if t.device != device:
                raise ValueError(
                    f"{op}: all tensors must be on one device, got {device} for {name}[0] and {t.device} for "
                    f"{kind}[{p}]; call it once per device"
                )
            if t.shape != first[p].shape:
                raise ValueError(
                    f"{op}: {name}[{p}] and {kind}[{p}] must have one shape, got {tuple(first[p].shape)} and "
                    f"{tuple(t.shape)}"
                )


def _check_types(op: str, weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for w, other in zip(weights, others, strict=False):
        if w.dtype != other.dtype:
            raise TypeError(f"{op}: saved weights and momenta must have the weight's type {w.dtype}, got {other.dtype}")


def _check_sums(op: str, count: int, sums: Tensor, nonfinite: Tensor) -> None:
    if sums.shape != (count + 1, 3) or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise ValueError(
            f"{op}: sums.values must be a contiguous float64 Tensor[{count + 1}, 3] (of multi_norm or multi_dots over "
            f"the same {count} tensors), got {sums.dtype} {tuple(sums.shape)}"
        )
    if nonfinite.shape != (2,) or nonfinite.dtype != torch.float32:
        raise ValueError(f"{op}: sums.nonfinite must be float32 Tensor[2], got {nonfinite.dtype} {nonfinite.shape}")


def _check_rule(op: str, rule: str, parameters: dict) -> tuple:
    if rule not in RULES:
        raise ValueError(f"{op}: no rule is called {rule!r}; the rules are {', '.join(RULES)}")
    if set(parameters) != set(RULES[rule]):
        raise TypeError(
            f"{op}: rule {rule!r} takes the parameters ({', '.join(RULES[rule])}), got ({', '.join(parameters)})"
        )
    if rule == "constrained" and not parameters["lower"] <= parameters["upper"]:
        raise ValueError(f"{op}: lower must not be above upper, got {parameters['lower']} and {parameters['upper']}")
    return (*(parameters[name] for name in RULES[rule]), 0.0, 0.0)[:2]


def _granularity(op: str, rule: str, granularity: str | None) -> bool:
    if granularity not in (None, "tensor", "global"):
        raise ValueError(f"{op}: granularity must be 'tensor', 'global' or None, got {granularity!r}")
    return granularity == "tensor" or (granularity is None and rule == "constrained")


# ---- paths ----------------------------------------------------------------------------------------------------------


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


class Listed:
    """What the compiled paths share: operands that lie in one order, results, and the calls of their passes.

    A path gives `run(name, lists, *arguments)`, with lists of the weights, saved weights, xs, ys and momenta, or None
    for what the pass has no use for.
    """

    def launch(self, name: str, lists, written: tuple[int, ...], *arguments) -> None:
        """Runs a pass over flat memory: an operand in another order than its tensor's first one is copied."""
        lists, back = [list(tensors) if tensors else None for tensors in lists], []
        leading = next(filter(None, lists))
        for p, like in enumerate(leading):
            dense = _is_dense(like)
            for i, tensors in enumerate(lists):
                t = None if tensors is None else tensors[p]
                if t is None or (dense and t.stride() == like.stride()) or (t.is_contiguous() and like.is_contiguous()):
                    continue
                copy = torch.empty_like(like, dtype=t.dtype, memory_format=torch.preserve_format).copy_(t)
                tensors[p] = copy
                if i in written:
                    back.append((copy, t))
        self.run(name, lists, *arguments)
        for copy, original in back:
            original.copy_(copy)

    def sums(self, xs, ys, weights, eta):
        values = torch.empty(len(ys) + 1, 3, dtype=torch.float64, device=ys[0].device)
        nonfinite = torch.empty(2, device=ys[0].device)
        self.launch("sums", (weights, None, xs, ys, None), (), values, nonfinite, weights is not None, eta)
        return values, nonfinite

    def perturb_(self, weights, saved, ys, sums, nonfinite, rho, eps, shrink, eta):
        lists = weights, saved, None, ys, None
        self.launch("perturb", lists, (0, 1), sums, nonfinite, list(rho), eps, shrink, eta is not None, eta or 0.0)

    def restore_(self, weights, saved):
        self.launch("restore", (weights, saved, None, None, None), (0,))

    def combine_(self, xs, ys, sums, nonfinite, rule, p0, p1, per_tensor):
        rule = _RULE_CODES[rule], p0, p1, per_tensor
        self.launch("combine", (None, None, xs, ys, None), (2,), sums, nonfinite, *rule)

    def step_(self, weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *sgd):
        rule = _RULE_CODES[rule], p0, p1, per_tensor
        self.launch("step", (weights, saved, xs, ys, momenta), (0, 4), sums, nonfinite, *rule, *sgd)


def table(lists, address=Tensor.data_ptr, null=0) -> list:
    """The flat table of the compiled modules: five addresses, size and two types of each tensor."""
    weights, _, xs, ys, _ = lists
    gradients = ys or xs or weights
    rows = []
    for p, like in enumerate(weights or gradients):
        rows += [null if tensors is None else address(tensors[p]) for tensors in lists]
        rows += (like.numel(), DTYPE_CODES[like.dtype], DTYPE_CODES[gradients[p].dtype])
    return rows


class Compiled(Listed):
    """The passes of a compiled module, `pyface._cpu` or `pyface._cuda`."""

    names = ("sums", "perturb", "restore", "combine", "step")

    def __init__(self, module, device_type: int):
        self.module = module
        self.passes = {name: getattr(self.module, f"sharpness_{name}") for name in self.names}
        self.reader = None
        with contextlib.suppress(AttributeError, ValueError):  # an older torch, or a newer DLPack: checks in Python
            capsule = torch.Tensor.__dlpack_c_exchange_api__
            self.reader = module.TensorReader(capsule, torch.Tensor, torch.nn.Parameter, device_type)

    def read(self, lists, sums: Tensor | None, nonfinite: Tensor | None):
        """The lists as the passes take them, or None if they or the sums are not as plain as can be."""
        return None if self.reader is None else self.module.read_sharpness_lists(self.reader, lists, sums, nonfinite)

    def run(self, name, lists, *arguments):
        self.call(name, self.module.SharpnessLists(table(lists)), next(filter(None, lists))[0], *arguments)

    def call(self, name: str, read, some: Tensor, sums: Tensor | None = None, nonfinite=None, *others) -> None:
        """Runs a pass over lists that were read, of which `some` tensor is one."""
        addresses = () if sums is None else (sums.data_ptr(), nonfinite.data_ptr())
        self.passes[name](read, *addresses, *others, *self.where(some))


class _Cpu(Compiled):
    def __init__(self):
        super().__init__(_paths.loaded("_cpu"), 1)

    def where(self, some: Tensor) -> tuple[int, ...]:
        return (torch.get_num_threads(),)


def _triton() -> Listed:
    from pyface.kernels import sharpness
    from pyface.ops._sharpness_gpu import Triton

    return Triton(sharpness)


def _cuda() -> Listed:
    from pyface.ops._sharpness_gpu import Cuda

    return Cuda(_paths.loaded("_cuda"))


class _Reference:
    def sums(self, xs, ys, weights, eta):
        return reference.sums(xs, ys, weights, eta)

    def perturb_(self, *args):
        reference.perturb_(*args)

    def restore_(self, weights, saved):
        for w, kept in zip(weights, saved, strict=True):
            w.copy_(kept)

    def combine_(self, xs, ys, sums, nonfinite, rule, p0, p1, per_tensor):
        u, v = reference.coefficients(sums, rule, p0, p1, per_tensor)
        skip = nonfinite.amax() > 0
        for x, g in zip(xs, reference.combined(xs, ys, u, v), strict=True):
            x.copy_(torch.where(skip, x, g.to(x.dtype)))

    def step_(self, weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *sgd):
        gradients = reference.combined(xs, ys, *reference.coefficients(sums, rule, p0, p1, per_tensor))
        reference.step_(weights, saved, gradients, momenta, nonfinite.amax() > 0, *sgd)


_CPU_TYPES = {  # of weight and gradient
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
}
_GPU_TYPES = _CPU_TYPES | {
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
}
CORE = Core(
    "sharpness",
    dtypes={"cpu": _CPU_TYPES, "cuda": _GPU_TYPES, "triton": _GPU_TYPES},
    load={"cpu": _Cpu, "cuda": _cuda, "triton": _triton, "reference": _Reference},
    order=("cpu", "cuda", "triton", "reference"),
)


def _pick(path: str | None, weights: Sequence[Tensor], *gradients: Sequence[Tensor]) -> Listed | _Reference:
    """One implementation for the whole list: the reference if any tensor of it needs that."""
    device = weights[0].device.type
    kinds = {(w.dtype, g.dtype) for tensors in gradients for w, g in zip(weights, tensors, strict=True)}
    found = [CORE.pick(device, kind, path) for kind in kinds]
    # A mixture of types (x and y of one tensor differ) is the reference's business.
    mixed = any(x.dtype != y.dtype for x, y in zip(gradients[0], gradients[-1], strict=True))
    if mixed and path not in (None, "reference"):
        raise _paths.PathError(f"sharpness: the path {path!r} needs x and y of one type for each tensor")
    if mixed or any(one is not found[0] for one in found):
        return CORE.pick(device, next(iter(kinds)), "reference")
    return found[0]


@functools.cache
def _compiled(device: str) -> Compiled | None:
    """What serves plain lists of a type of device."""
    if device not in ("cpu", "cuda") or _paths.machine_reasons(device):
        return None
    return CORE.pick(device, (torch.float32, torch.float32), device)


def _ran(path: str | None, name: str, lists, some: Tensor, *arguments) -> bool:
    """Runs a pass of a compiled core if the lists and sums are as plain as can be, and says whether it did.

    arguments: sums and flags, if the pass takes any, then the rest.
    """
    device = "cpu" if some.is_cpu else some.device.type
    core = _compiled(device) if path is None or path == device else None
    if core is None:
        return False
    read = core.read(lists, *(arguments[:2] or (None, None)))
    if read is None:
        return False
    core.call(name, read, some, *arguments)
    return True


# ---- the ops --------------------------------------------------------------------------------------------------------


def _empty_sums(count: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    return torch.zeros(count + 1, 3, dtype=torch.float64, device=device), torch.zeros(2, device=device)


def _quick_sums(xs, ys, weights, eta, path):
    if not ys:
        return None
    device = ys[0].device
    sums = torch.empty(len(ys) + 1, 3, dtype=torch.float64, device=device), torch.empty(2, device=device)
    lists = weights, None, xs, ys, None
    return sums if _ran(path, "sums", lists, ys[0], *sums, weights is not None, eta) else None


def _norm(ys, weights, eta, path):
    weights = weights or None
    _check("multi_norm", ys=ys, **({} if weights is None else {"weights": weights}))
    if not ys:
        return _empty_sums(0, None)
    return _pick(path, ys if weights is None else weights, ys).sums(None, ys, weights, eta)


def _quick_norm(ys, weights, eta, path):
    return _quick_sums(None, ys, weights or None, eta, path)


def _norm_fake(ys, weights, eta, path):
    return _empty_sums(len(ys), ys[0].device if ys else None)


def _dots(xs, ys, path):
    _check("multi_dots", xs=xs, ys=ys)
    return _pick(path, xs, xs, ys).sums(xs, ys, None, 0.0) if ys else _empty_sums(0, None)


def _quick_dots(xs, ys, path):
    return _quick_sums(xs, ys, None, 0.0, path)


def _dots_fake(xs, ys, path):
    return _norm_fake(ys, None, 0.0, path)


def _check_rhos(op, rhos, weights):
    if len(rhos) != len(weights):
        raise ValueError(f"{op}: rho must be one number or one per tensor ({len(weights)}), got {len(rhos)}")
    if not all(isinstance(r, Tensor) or 0 <= r < float("inf") for r in set(rhos)):
        raise ValueError(f"{op}: rho must be finite and not negative, got {rhos}")


def _perturb(weights, saved, ys, sums, nonfinite, rho, eps, shrink, eta, path):
    _check_rhos("perturb_", rho, weights)
    _check("perturb_", weights=weights, saved=saved, ys=ys)
    _check_types("perturb_", weights, saved)
    _check_sums("perturb_", len(ys), sums, nonfinite)
    if weights:
        _pick(path, weights, ys).perturb_(weights, saved, ys, sums, nonfinite, rho, eps, shrink, eta)
        torch.autograd.graph.increment_version((*weights, *saved))


def _quick_perturb(weights, saved, ys, sums, nonfinite, rho, eps, shrink, eta, path):
    lists = weights, saved, None, ys, None
    if not ys or not _ran(
        path, "perturb", lists, ys[0], sums, nonfinite, rho, eps, shrink, eta is not None, eta or 0.0
    ):
        return None
    torch.autograd.graph.increment_version((*weights, *saved))
    return ()


def _restore(weights, saved, path):
    _check("restore_", weights=weights, saved=saved)
    _check_types("restore_", weights, saved)
    if weights:
        _pick(path, weights, saved).restore_(weights, saved)
        torch.autograd.graph.increment_version(weights)


def _quick_restore(weights, saved, path):
    if not weights or not _ran(path, "restore", (weights, saved, None, None, None), weights[0]):
        return None
    torch.autograd.graph.increment_version(weights)
    return ()


def _combine(xs, ys, sums, nonfinite, rule, p0, p1, per_tensor, path):
    _check("multi_combine_", xs=xs, ys=ys)
    _check_sums("multi_combine_", len(ys), sums, nonfinite)
    if xs:
        _pick(path, xs, xs, ys).combine_(xs, ys, sums, nonfinite, rule, p0, p1, per_tensor)
        torch.autograd.graph.increment_version(xs)


def _quick_combine(xs, ys, sums, nonfinite, rule, p0, p1, per_tensor, path):
    lists = None, None, xs, ys, None
    if not xs or not _ran(path, "combine", lists, xs[0], sums, nonfinite, _RULE_CODES[rule], p0, p1, per_tensor):
        return None
    torch.autograd.graph.increment_version(xs)
    return ()


def _step(weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *rest):
    *sgd, path = rest
    _check("multi_step_", weights=weights, saved=saved, xs=xs, ys=ys, **({"momenta": momenta} if momenta else {}))
    for others in (saved, momenta):
        _check_types("multi_step_", weights, others)
    _check_sums("multi_step_", len(ys), sums, nonfinite)
    if weights:
        run = _pick(path, weights, xs, ys)
        run.step_(weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *sgd)
        torch.autograd.graph.increment_version((*weights, *momenta))


def _quick_step(weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *rest):
    *sgd, path = rest
    lists = weights, saved, xs, ys, momenta or None
    if not xs or not _ran(path, "step", lists, xs[0], sums, nonfinite, _RULE_CODES[rule], p0, p1, per_tensor, *sgd):
        return None
    torch.autograd.graph.increment_version((*weights, *momenta))
    return ()


def _define(
    name: str, schema: str, implementation: Callable, quick: Callable, fake: Callable | None = None
) -> Callable:
    """Registers `pyface::<name>`, whose schema says what it writes, and returns its eager door."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyface::{name}", fake or (lambda *args: None), lib=LIBRARY)
    dispatched = getattr(torch.ops.pyface, name).default

    def call(*args):
        if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
            return dispatched(*args)
        done = quick(*args)
        if done is not None:
            return done
        with torch.no_grad():
            return implementation(*args)

    return call


_RULE = "Tensor sums, Tensor nonfinite, str rule, float p0, float p1, bool per_tensor"
_norm_op = _define(
    "multi_norm",
    "(Tensor[] ys, Tensor[] weights, float eta, str? path) -> (Tensor, Tensor)",
    _norm,
    _quick_norm,
    _norm_fake,
)
_dots_op = _define(
    "multi_dots", "(Tensor[] xs, Tensor[] ys, str? path) -> (Tensor, Tensor)", _dots, _quick_dots, _dots_fake
)
_perturb_op = _define(
    "perturb_",
    "(Tensor(a!)[] weights, Tensor(b!)[] saved, Tensor[] ys, Tensor sums, Tensor nonfinite, float[] rho, float eps, "
    "float shrink, "
    "float? eta, str? path) -> ()",
    _perturb,
    _quick_perturb,
)
_restore_op = _define("restore_", "(Tensor(a!)[] weights, Tensor[] saved, str? path) -> ()", _restore, _quick_restore)
_combine_op = _define(
    "multi_combine_", f"(Tensor(a!)[] xs, Tensor[] ys, {_RULE}, str? path) -> ()", _combine, _quick_combine
)
_step_op = _define(
    "multi_step_",
    f"(Tensor(a!)[] weights, Tensor[] saved, Tensor[] xs, Tensor[] ys, Tensor(b!)[] momenta, {_RULE}, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, str? path) -> ()",
    _step,
    _quick_step,
)


def multi_norm(ys: Sequence[Tensor], *, weights: Sequence[Tensor] | None = None, eta: float = 0.0) -> Sums:
    """Sums of squares of each tensor and of all, in float64, without waiting for the device.

    Args:
        ys: T tensors of any shapes and floating types, on one device.
        weights: T tensors shaped like ys: y is then multiplied by |w| + eta (ASAM, arXiv:2102.11600).
        eta: see weights.

    Returns:
        :class:`Sums`, whose columns for x and xy are 0.

    Raises:
        TypeError: sparse, complex or integer tensors.
        ValueError: several devices, lists or shapes that do not fit.
    """
    return Sums(*_norm_op(list(ys), list(weights or ()), float(eta), chosen_path()))


def multi_dots(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Sums:
    """Sums of x², y² and xy of each tensor and of all in one pass, in float64; see :func:`multi_norm`."""
    return Sums(*_dots_op(list(xs), list(ys), chosen_path()))


def perturb_(
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    saved: Sequence[Tensor],
    sums: Sums,
    rho: float | Sequence[float],
    *,
    eps: float = 1e-12,
    shrink: float = 0.0,
    eta: float | None = None,
) -> None:
    """Saves the weights, then moves them uphill: w += (rho / (sqrt(b) + eps) - shrink) y, b = sum of y² over all.

    Where b is 0 or an element of ys is not finite, the weights keep their bits. (SAM, arXiv:2010.01412, equation 2.)

    Args:
        weights: T tensors, changed in place.
        ys: T gradients shaped like them.
        saved: T tensors shaped and typed like the weights, which receive their bits.
        sums: of :func:`multi_norm` over ys.
        rho: length of the step, one or one per tensor; 0 moves nothing.
        eps: added to the norm.
        shrink: taken off the factor of y (SAGM).
        eta: not None: the ascent of ASAM, y times (|w| + eta)²; `sums` must then be taken with the weights.
    """
    rhos = [float(rho)] * len(weights) if isinstance(rho, int | float) else list(map(float, rho))
    _check_rhos("perturb_", rhos, weights)
    _perturb_op(
        list(weights),
        list(saved),
        list(ys),
        sums.values,
        sums.nonfinite,
        rhos,
        float(eps),
        float(shrink),
        eta,
        chosen_path(),
    )


def restore_(weights: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Gives the weights the bits of `saved`, in the memory they have."""
    _restore_op(list(weights), list(saved), chosen_path())


def multi_combine_(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    sums: Sums,
    rule: str,
    *,
    granularity: str | None = None,
    **parameters: float,
) -> None:
    """G = u x + v y, written into xs; u and v follow on the device from a = <x, x>, b = <y, y>, k = <x, y>.

    ================  =====================================================================  ===================
    rule              G                                                                      source
    ================  =====================================================================  ===================
    ``second``        x                                                                      SAM
    ``mix``           t x + (1 - t) y (SAGM: t = 1/2; gradient-norm penalty)                 arXiv:2202.03599
    ``gsam``          x - alpha (y - (k/a) x)                                                arXiv:2203.08065
    ``gsam_first``    y + alpha (x - (k/b) y)                                                the same, for f
    ``constrained``   c = k / sqrt(a b): x for c >= upper, y for c <= lower, else the        arXiv:2309.07866
                      projection of x on x + y
    ``surgery``       x - (k/b) y for k < 0, else x                                          arXiv:2001.06782
    ================  =====================================================================  ===================

    Where a or b is 0, G is x (except for ``mix``); where x = -y to rounding, ``constrained`` gives y. Where an element
    of xs or ys is not finite, xs stay as they are.

    Args:
        xs, ys: T tensors each, shaped alike.
        sums: of :func:`multi_dots` over them.
        granularity: "tensor": every tensor by its own sums; "global": all by the sums of all; None: "tensor" for
            ``constrained``, else "global", as the papers have it.
        parameters: of the rule, by the names of the table.
    """
    p0, p1 = map(float, _check_rule("multi_combine_", rule, parameters))
    per_tensor = _granularity("multi_combine_", rule, granularity)
    _combine_op(list(xs), list(ys), sums.values, sums.nonfinite, rule, p0, p1, per_tensor, chosen_path())


def multi_step_(
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    sums: Sums,
    rule: str,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    granularity: str | None = None,
    **parameters: float,
) -> None:
    """:func:`restore_`, :func:`multi_combine_` and a step of SGD in one pass; G is never stored.

    Args:
        weights, saved, xs, ys: T tensors each, shaped alike. Only the weights are written.
        momenta: T buffers typed like the weights, written in place; None or empty with momentum 0.
        first: the buffers hold nothing yet: they become the gradient, as in torch.optim.SGD.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        sums, rule, granularity, parameters: as in :func:`multi_combine_`. Where a gradient is not finite the
            weights are restored and nothing else happens.
    """
    p0, p1 = map(float, _check_rule("multi_step_", rule, parameters))
    if bool(momenta) != (momentum != 0) and len(weights):
        raise ValueError(
            f"multi_step_: momentum {momentum} needs {'a buffer per weight' if momentum else 'no buffers'}, "
            f"got {len(momenta or ())}"
        )
    per_tensor = _granularity("multi_step_", rule, granularity)
    _step_op(
        list(weights), list(saved), list(xs), list(ys), list(momenta or ()), sums.values, sums.nonfinite, rule, p0, p1,
        per_tensor, float(lr), float(momentum), float(dampening), float(weight_decay), nesterov, maximize, first,
        chosen_path(),
    )  # fmt: skip


# ---- out of place ---------------------------------------------------------------------------------------------------


def perturb(
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    rho: float | Tensor | Sequence[float | Tensor],
    *,
    eps: float = 1e-12,
    shrink: float | Tensor = 0.0,
    eta: float | None = None,
) -> list[Tensor]:
    """The weights that :func:`perturb_` would leave, as new tensors with gradients: for meta-learning.

    Plain tensor code, whatever the path: it takes any order of derivatives, forward mode, torch.func and
    torch.compile, and keeps float64 copies of its lists for the backward pass. With C the cotangents, <, > over the
    whole lists and n = sqrt(<y, y>)::

        dw = C,  dy = (rho/(n + eps) - shrink) C - rho <C, y> y / (n (n + eps)^2),  drho = <C, y> / (n + eps)

    Where y is 0 or not finite nothing moves, and C goes to the weights alone.

    Args:
        weights, ys: T tensors each, shaped alike.
        rho: one length or one per tensor; a Tensor[] or Tensor[T] has a gradient, and is taken as it is: to look
            whether it is negative would wait for the device.
        eps, shrink, eta: as in :func:`perturb_`; shrink may be a Tensor[].

    Returns:
        T tensors, shaped and typed like the weights.
    """
    weights, ys = list(weights), list(ys)
    _check("perturb", weights=weights, ys=ys)
    one = isinstance(rho, int | float) or (isinstance(rho, Tensor) and not rho.dim())
    rhos = [rho] * len(weights) if one else list(rho)
    _check_rhos("perturb", rhos, weights)
    return reference.perturbed(weights, ys, rhos, eps, shrink, eta) if weights else []


def multi_combine(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    rule: str,
    *,
    granularity: str | None = None,
    **parameters: float | Tensor,
) -> list[Tensor]:
    """G of :func:`multi_combine_` as new tensors with gradients; like :func:`perturb`, plain tensor code.

    u and v are differentiated with the sums they follow from; the choice of a case is constant. Where a or b is 0, and
    where an element is not finite, G is x, and so is its gradient.

    Args:
        xs, ys: T tensors each, shaped alike.
        rule, granularity, parameters: as in :func:`multi_combine_`; t and alpha may be a Tensor[] with a gradient.

    Returns:
        T tensors, shaped and typed like the xs.
    """
    xs, ys = list(xs), list(ys)
    p0, p1 = _check_rule("multi_combine", rule, parameters)
    per_tensor = _granularity("multi_combine", rule, granularity)
    _check("multi_combine", xs=xs, ys=ys)
    return reference.combination(xs, ys, rule, p0, p1, per_tensor) if xs else []
