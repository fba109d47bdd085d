"""Op table of core `sharpness`: norms, ascent, rules and update of sharpness-aware training over lists of tensors.

Every argument is checked here, once, before any pointer is taken. Lists of plain dense tensors that fit each
other are recognised as such by the compiled module (`_ran`): over thousands of tensors the checks in Python take longer
than the work. Whatever is not plain comes here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd.graph import increment_version

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
# The last is for the ops themselves: u and v stand in the place of a tensor's sums.
_RULE_CODES = {name: code for code, name in enumerate((*RULES, "given"))}
_RULE_NAMES = {name: frozenset(parameters) for name, parameters in RULES.items()}


class Sums(NamedTuple):
    """What the passes decide by, on the device of the gradients.

    Attributes:
        values: Tensor[T + 1, 3] float64, of each tensor and (last row) of all: the sums of x², y², xy.
        nonfinite: Tensor[2] float32: 1 where an x, a y has an element that is not finite, else 0. In a norm taken with
            weights the second looks at them too.
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


def check_apart(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Refuses tensors that share memory: a second one would be saved when the first has moved it.

    The compiled modules read plain lists without this. A tensor with gaps, or of a class of its own, is not looked at.
    """
    spans = [
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), p)
        for p, t in enumerate(tensors)
        if type(t) in (Tensor, torch.nn.Parameter) and (t.is_cpu or t.is_cuda) and t.numel() and _is_dense(t)
    ]
    spans.sort()
    for (_, end, p), (begin, _, q) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(
                f"{op}: {name}[{p}] and {name}[{q}] share memory; list it once. What is tied must be one "
                "nn.Parameter, whose gradient is then the sum"
            )


def _check_sums(op: str, count: int, sums: Tensor, nonfinite: Tensor) -> None:
    if sums.shape != (count + 1, 3) or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise ValueError(
            f"{op}: sums.values must be a contiguous float64 Tensor[{count + 1}, 3] (of multi_norm or multi_dots over "
            f"the same {count} tensors), got {sums.dtype} {tuple(sums.shape)}"
        )
    if nonfinite.shape != (2,) or nonfinite.dtype != torch.float32:
        raise ValueError(f"{op}: sums.nonfinite must be float32 Tensor[2], got {nonfinite.dtype} {nonfinite.shape}")


def _check_flags(op: str, sums: Sums | None, nonfinite: Tensor, tensors: Sequence[Tensor]) -> None:
    """Flags that are to be added to."""
    if sums is not None:
        raise ValueError(f"{op}: nonfinite is for sums taken here; put the flags into sums.nonfinite instead")
    if nonfinite.shape != (2,) or nonfinite.dtype != torch.float32 or not nonfinite.is_contiguous():
        raise ValueError(f"{op}: nonfinite must be float32 Tensor[2], got {nonfinite.dtype} {tuple(nonfinite.shape)}")
    if len(tensors) and nonfinite.device != tensors[0].device:
        raise ValueError(f"{op}: nonfinite must be on {tensors[0].device} as the tensors, got {nonfinite.device}")


def _check_rule(op: str, rule: str, parameters: dict) -> tuple:
    if rule not in RULES:
        raise ValueError(f"{op}: no rule is called {rule!r}; the rules are {', '.join(RULES)}")
    if parameters.keys() != _RULE_NAMES[rule]:
        raise TypeError(
            f"{op}: rule {rule!r} takes the parameters ({', '.join(RULES[rule])}), got ({', '.join(parameters)})"
        )
    if rule == "constrained" and not parameters["lower"] <= parameters["upper"]:
        raise ValueError(f"{op}: lower must not be above upper, got {parameters['lower']} and {parameters['upper']}")
    values = [parameters[name] for name in RULES[rule]]
    return (values or [0.0])[0], values[1] if len(values) > 1 else 0.0


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

    written = {"sums": (), "perturb": (0, 1), "restore": (0,), "combine": (2,), "step": (0, 4)}  # lists of each pass

    def __init__(self, module, device_type: int):
        self.module = module
        self.passes = {name: getattr(self.module, f"sharpness_{name}") for name in self.written}
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

    def quick(self, name: str, lists, some: Tensor, values, flags, takes: int, arguments, taken) -> bool:
        """Runs a pass over plain lists; False, and nothing done, if they are not.

        takes: 1: the pass of sums runs first, with the arguments `taken`; 2: and adds what is not finite to the flags.
        """
        read = self.read(lists, values, flags)
        if read is None:
            return False
        if takes:
            found = torch.empty_like(flags) if takes == 2 else flags
            self.call("sums", read, some, values, found, *taken)
            if takes == 2:
                torch.maximum(flags, found, out=flags)
        if name != "sums":
            self.call(name, read, some, values, flags, *arguments)
        for kind in self.written[name]:
            if lists[kind]:
                increment_version(lists[kind])
        return True


class _Cpu(Compiled):
    def __init__(self):
        super().__init__(_paths.loaded("_cpu"), 1)

        self.codes = {name: code for code, name in enumerate(self.written)}

    def where(self, some: Tensor) -> tuple[int, ...]:
        return (torch.get_num_threads(),)

    def quick(self, name, lists, some, values, flags, takes, arguments, taken):
        """The same in one call."""
        return self.reader is not None and self.module.sharpness_run(
            self.reader, increment_version, torch.get_num_threads(), self.codes[name], *lists, values, flags, takes,
            arguments,
        )  # fmt: skip


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


def _ran(path, name, lists, some, sums=(None, None), arguments=(), taken=None):
    """Runs a pass of a compiled core if the lists and sums are as plain as can be, else returns None.

    some: one of the lists. sums: values and flags, if the pass needs any. taken: what is multiplied into y, for a
    pass that takes its sums first where it is given none; they are returned.
    """
    if not some:
        return None
    first = some[0]
    device = "cpu" if first.is_cpu else first.device.type
    core = _compiled(device) if path is None or path == device else None
    if core is None:
        return None
    (values, flags), takes = sums, 0
    if taken is not None and values is None:
        takes = 1 if flags is None else 2
        values = torch.empty(len(some) + 1, 3, dtype=torch.float64, device=first.device)
        if flags is None:
            flags = torch.empty(2, device=first.device)
    if not core.quick(name, lists, first, values, flags, takes, arguments, taken):
        return None
    return (values, flags) if takes else ()


# ---- the ops --------------------------------------------------------------------------------------------------------


_ALONE = (False, 0.0)  # nothing is multiplied into y


def _empty_sums(count: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    return torch.zeros(count + 1, 3, dtype=torch.float64, device=device), torch.zeros(2, device=device)


def _norm(ys, weights, eta, path):
    weights = weights or None
    _check("multi_norm", ys=ys, **({} if weights is None else {"weights": weights}))
    if not ys:
        return _empty_sums(0, None)
    return _pick(path, ys if weights is None else weights, ys).sums(None, ys, weights, eta)


def _quick_norm(ys, weights, eta, path):
    taken = bool(weights), eta
    return _ran(path, "sums", (weights or None, None, None, ys, None), ys, (None, None), taken, taken)


def _norm_fake(ys, weights, eta, path):
    return _empty_sums(len(ys), ys[0].device if ys else None)


def _dots(xs, ys, path):
    _check("multi_dots", xs=xs, ys=ys)
    return _pick(path, xs, xs, ys).sums(xs, ys, None, 0.0) if ys else _empty_sums(0, None)


def _quick_dots(xs, ys, path):
    return _ran(path, "sums", (None, None, xs, ys, None), ys, (None, None), _ALONE, _ALONE)


def _dots_fake(xs, ys, path):
    return _norm_fake(ys, None, 0.0, path)


def _check_rhos(op, rhos, weights):
    if len(rhos) != len(weights):
        raise ValueError(f"{op}: rho must be one number or one per tensor ({len(weights)}), got {len(rhos)}")


def _rhos(op, rho, weights) -> list:
    one = isinstance(rho, int | float) or (isinstance(rho, Tensor) and not rho.dim())
    rhos = [rho] * len(weights) if one else list(rho)
    _check_rhos(op, rhos, weights)
    if not all(isinstance(r, Tensor) or 0 <= r < float("inf") for r in ((rho,) if one else set(rhos))):
        raise ValueError(f"{op}: rho must be finite and not negative, got {rho}")
    return rhos


def _perturb(weights, saved, ys, sums, nonfinite, rho, eps, shrink, eta, path):
    _check_rhos("perturb_", rho, weights)
    _check("perturb_", weights=weights, saved=saved, ys=ys)
    _check_types("perturb_", weights, saved)
    check_apart("perturb_", "weights", weights)
    _check_sums("perturb_", len(ys), sums, nonfinite)
    if weights:
        _pick(path, weights, ys).perturb_(weights, saved, ys, sums, nonfinite, rho, eps, shrink, eta)
        increment_version((*weights, *saved))


def _quick_perturb(weights, saved, ys, sums, nonfinite, rho, eps, shrink, eta, path):
    lists, adaptive = (weights, saved, None, ys, None), (eta is not None, eta or 0.0)
    return _ran(path, "perturb", lists, ys, (sums, nonfinite), (rho, eps, shrink, *adaptive), adaptive)


def _restore(weights, saved, path):
    _check("restore_", weights=weights, saved=saved)
    _check_types("restore_", weights, saved)
    if weights:
        _pick(path, weights, saved).restore_(weights, saved)
        increment_version(weights)


def _quick_restore(weights, saved, path):
    return _ran(path, "restore", (weights, saved, None, None, None), weights)


def _combine(xs, ys, sums, nonfinite, rule, p0, p1, per_tensor, path):
    _check("multi_combine_", xs=xs, ys=ys)
    _check_sums("multi_combine_", len(ys), sums, nonfinite)
    if xs:
        _pick(path, xs, xs, ys).combine_(xs, ys, sums, nonfinite, rule, p0, p1, per_tensor)
        increment_version(xs)


def _quick_combine(xs, ys, sums, nonfinite, rule, p0, p1, per_tensor, path):
    lists, arguments = (None, None, xs, ys, None), (_RULE_CODES[rule], p0, p1, per_tensor)
    return _ran(path, "combine", lists, xs, (sums, nonfinite), arguments, _ALONE)


def _step(weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *rest):
    *sgd, path = rest
    _check("multi_step_", weights=weights, saved=saved, xs=xs, ys=ys, **({"momenta": momenta} if momenta else {}))
    for others in (saved, momenta):
        _check_types("multi_step_", weights, others)
    check_apart("multi_step_", "weights", weights)
    _check_sums("multi_step_", len(ys), sums, nonfinite)
    if weights:
        run = _pick(path, weights, xs, ys)
        run.step_(weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *sgd)
        increment_version((*weights, *momenta))


def _quick_step(weights, saved, xs, ys, momenta, sums, nonfinite, rule, p0, p1, per_tensor, *rest):
    *sgd, path = rest
    lists, arguments = (weights, saved, xs, ys, momenta or None), (_RULE_CODES[rule], p0, p1, per_tensor, *sgd)
    return _ran(path, "step", lists, xs, (sums, nonfinite), arguments, _ALONE)


def _define(
    name: str,
    schema: str,
    implementation: Callable,
    quick: Callable,
    fake: Callable | None = None,
    taken: tuple[int, Callable] | None = None,
) -> Callable:
    """Registers `pyface::<name>`, whose schema says what it writes, and returns its eager door.

    taken: where the arguments have values and flags of sums, and what computes them from the arguments. The door can be
    called with None instead, and returns them then.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyface::{name}", fake or (lambda *args: None), lib=LIBRARY)
    dispatched = getattr(torch.ops.pyface, name).default

    def call(*args):
        traced = torch.compiler.is_compiling() or _len_torch_dispatch_stack()
        if not traced:
            done = quick(*args)
            if done is not None:
                return done
        sums = ()
        if taken is not None and args[taken[0]] is None:
            at, take = taken
            sums, flags = take(*args), args[at + 1]
            if flags is not None:
                sums = sums[0], flags.copy_(torch.maximum(flags, sums[1]))
            args = *args[:at], *sums, *args[at + 2 :]
        if traced:
            result = dispatched(*args)
        else:
            with torch.no_grad():
                result = implementation(*args)
        return sums or result

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
    taken=(3, lambda ws, saved, ys, *rest: _norm_op(ys, [] if rest[-2] is None else ws, rest[-2] or 0.0, rest[-1])),
)
_restore_op = _define("restore_", "(Tensor(a!)[] weights, Tensor[] saved, str? path) -> ()", _restore, _quick_restore)
_combine_op = _define(
    "multi_combine_",
    f"(Tensor(a!)[] xs, Tensor[] ys, {_RULE}, str? path) -> ()",
    _combine,
    _quick_combine,
    taken=(2, lambda xs, ys, *rest: _dots_op(xs, ys, rest[-1])),
)
_step_op = _define(
    "multi_step_",
    f"(Tensor(a!)[] weights, Tensor[] saved, Tensor[] xs, Tensor[] ys, Tensor(b!)[] momenta, {_RULE}, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, str? path) -> ()",
    _step,
    _quick_step,
    taken=(5, lambda weights, saved, xs, ys, *rest: _dots_op(xs, ys, rest[-1])),
)


def _listed(tensors: Sequence[Tensor]) -> list[Tensor]:
    return tensors if type(tensors) is list else list(tensors)


def _sums_or_none(sums: Sums | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sums is None else (sums.values, sums.nonfinite)


# ---- gradients of a scaled loss -------------------------------------------------------------------------------------

Scale = float | Tensor  # a Tensor[] is used where it is, without waiting for its device


def _is_scale(scale: Scale | tuple[Scale, Scale]) -> bool:
    return isinstance(scale, Tensor | tuple) or scale != 1


def _inverses(scale: Scale | tuple[Scale, Scale], device: torch.device) -> tuple[Tensor, Tensor]:
    """1 / S of x and of y, float64."""
    x, y = (
        s.to(device, torch.float64) if isinstance(s, Tensor) else torch.full((), s, dtype=torch.float64, device=device)
        for s in (scale if isinstance(scale, tuple) else (scale, scale))
    )
    return 1 / x, 1 / y


def _unscaled(sums: Sums, scale) -> Sums:
    if not _is_scale(scale):
        return sums
    x, y = _inverses(scale, sums.values.device)
    return Sums(sums.values * torch.stack([x * x, y * y, x * y]), sums.nonfinite)


def _with_scale(sums: Sums, scale, rule: str, p0: float, p1: float, per_tensor: bool):
    """What makes a pass compute (u / S) x + (v / S) y: sums, rule, its parameters, granularity."""
    x, y = _inverses(scale, sums.values.device)
    u, v = reference.coefficients(sums.values, rule, p0, p1, per_tensor)
    rows = torch.zeros_like(sums.values)
    rows[:-1, 0], rows[:-1, 1] = u * x, v * y
    return Sums(rows, sums.nonfinite), "given", 0.0, 0.0, True


# ---- the functions --------------------------------------------------------------------------------------------------


def multi_norm(
    ys: Sequence[Tensor], *, weights: Sequence[Tensor] | None = None, eta: float = 0.0, grad_scale: Scale = 1.0
) -> Sums:
    """Sums of squares of each tensor and of all, in float64, without waiting for the device.

    Args:
        ys: T tensors of any shapes and floating types, on one device.
        weights: T tensors shaped like ys: y is then multiplied by |w| + eta (ASAM, arXiv:2102.11600).
        eta: see weights.
        grad_scale: how many times too large the ys are (those of a loss that a GradScaler has scaled): a number or a
            Tensor[]. The sums are those of ys / grad_scale.

    Returns:
        :class:`Sums`, whose columns for x and xy are 0.

    Raises:
        TypeError: sparse, complex or integer tensors.
        ValueError: several devices, lists or shapes that do not fit.
    """
    return _unscaled(Sums(*_norm_op(_listed(ys), _listed(weights or []), float(eta), chosen_path())), grad_scale)


def multi_dots(xs: Sequence[Tensor], ys: Sequence[Tensor], *, grad_scale: Scale | tuple[Scale, Scale] = 1.0) -> Sums:
    """Sums of x², y² and xy of each tensor and of all in one pass, in float64; see :func:`multi_norm`.

    grad_scale may be a pair, of the xs and of the ys.
    """
    return _unscaled(Sums(*_dots_op(_listed(xs), _listed(ys), chosen_path())), grad_scale)


def perturb_(
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    saved: Sequence[Tensor],
    sums: Sums | None,
    rho: float | Sequence[float],
    *,
    eps: float = 1e-12,
    shrink: float = 0.0,
    eta: float | None = None,
    grad_scale: Scale = 1.0,
) -> Sums:
    """Saves the weights, then moves them uphill: w += (rho / (sqrt(b) + eps) - shrink) y, b = sum of y² over all.

    Where b is 0 or an element of ys (with `eta` also: of the weights) is not finite, the weights keep their bits. (SAM,
    arXiv:2010.01412, equation 2.)

    Args:
        weights: T tensors that share no memory, changed in place.
        ys: T gradients shaped like them.
        saved: T tensors shaped and typed like the weights, which receive their bits.
        sums: of :func:`multi_norm` over ys; None: taken here, which looks at every list once instead of twice.
        rho: length of the step, one or one per tensor; 0 moves nothing.
        eps: added to the norm.
        shrink: taken off the factor of y (SAGM).
        eta: not None: the ascent of ASAM, y times (|w| + eta)²; `sums` must then be taken with the weights.
        grad_scale: how many times too large the ys are; `sums` must then be taken with it. With a Tensor[] and a
            `shrink` this waits for the device.

    Returns:
        The sums.
    """
    rho = float(rho) if isinstance(rho, int | float) else list(map(float, rho))
    rhos = _rhos("perturb_", rho, weights)
    if _is_scale(grad_scale):
        if sums is None:
            sums = multi_norm(ys, weights=None if eta is None else weights, eta=eta or 0.0, grad_scale=grad_scale)
        own = sums
        if isinstance(grad_scale, Tensor) and not shrink:
            # The norm that makes rho / (norm + eps) smaller by S.
            values, (_, over) = sums.values.clone(), _inverses(grad_scale, sums.values.device)
            b = values[-1, 1]
            values[-1, 1] = torch.where(b > 0, ((b.sqrt() + eps) / over - eps).square(), b)
            own = Sums(values, sums.nonfinite)
        else:
            scale = float(grad_scale)
            rhos, shrink = [r / scale for r in rhos], shrink / scale
        perturb_(weights, ys, saved, own, rhos, eps=eps, shrink=shrink, eta=eta)
        return sums
    found = _perturb_op(
        _listed(weights), _listed(saved), _listed(ys), *_sums_or_none(sums), rhos, float(eps), float(shrink), eta,
        chosen_path(),
    )  # fmt: skip
    return Sums(*found) if sums is None else sums


def restore_(weights: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Gives the weights the bits of `saved`, in the memory they have."""
    _restore_op(_listed(weights), _listed(saved), chosen_path())


def multi_combine_(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    sums: Sums | None,
    rule: str,
    *,
    granularity: str | None = None,
    grad_scale: Scale | tuple[Scale, Scale] = 1.0,
    **parameters: float,
) -> Sums:
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
        sums: of :func:`multi_dots` over them; None: taken here.
        granularity: "tensor": every tensor by its own sums; "global": all by the sums of all; None: "tensor" for
            ``constrained``, else "global", as the papers have it.
        grad_scale: how many times too large xs and ys are, one or a pair; `sums` must then be taken with it. G is what
            it would be without: dividing by it costs no pass.
        parameters: of the rule, by the names of the table.

    Returns:
        The sums.
    """
    p0, p1 = map(float, _check_rule("multi_combine_", rule, parameters))
    per_tensor = _granularity("multi_combine_", rule, granularity)
    if _is_scale(grad_scale):
        sums = multi_dots(xs, ys, grad_scale=grad_scale) if sums is None else sums
        _check_sums("multi_combine_", len(ys), *sums)
        own, *arguments = _with_scale(sums, grad_scale, rule, p0, p1, per_tensor)
        _combine_op(_listed(xs), _listed(ys), *own, *arguments, chosen_path())
        return sums
    found = _combine_op(_listed(xs), _listed(ys), *_sums_or_none(sums), rule, p0, p1, per_tensor, chosen_path())
    return Sums(*found) if sums is None else sums


def multi_step_(
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    sums: Sums | None,
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
    grad_scale: Scale | tuple[Scale, Scale] = 1.0,
    nonfinite: Tensor | None = None,
    **parameters: float,
) -> Sums:
    """:func:`restore_`, :func:`multi_combine_` and a step of SGD in one pass; G is never stored.

    Args:
        weights, saved, xs, ys: T tensors each, shaped alike. Only the weights are written; they share no memory.
        momenta: T buffers typed like the weights, written in place; None or empty with momentum 0.
        first: the buffers hold nothing yet: they become the gradient, as in torch.optim.SGD.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        sums, rule, granularity, grad_scale, parameters: as in :func:`multi_combine_`. Where a gradient is not finite
            the weights are restored and nothing else happens.
        nonfinite: only where the sums are taken here: flags of an earlier pass, Tensor[2] float32, which forbid the
            step as well; what this pass finds is added to them.

    Returns:
        The sums.
    """
    p0, p1 = map(float, _check_rule("multi_step_", rule, parameters))
    if bool(momenta) != (momentum != 0) and len(weights):
        raise ValueError(
            f"multi_step_: momentum {momentum} needs {'a buffer per weight' if momentum else 'no buffers'}, "
            f"got {len(momenta or ())}"
        )
    if nonfinite is not None:
        _check_flags("multi_step_", sums, nonfinite, xs)
    per_tensor = _granularity("multi_step_", rule, granularity)
    values, flags = (None, nonfinite) if sums is None else sums
    if _is_scale(grad_scale):
        if sums is None:
            sums = multi_dots(xs, ys, grad_scale=grad_scale)
            if nonfinite is not None:
                sums = Sums(sums.values, nonfinite.copy_(torch.maximum(nonfinite, sums.nonfinite)))
        _check_sums("multi_step_", len(ys), *sums)
        (values, flags), rule, p0, p1, per_tensor = _with_scale(sums, grad_scale, rule, p0, p1, per_tensor)
    found = _step_op(
        _listed(weights), _listed(saved), _listed(xs), _listed(ys), _listed(momenta or []), values, flags, rule, p0, p1,
        per_tensor, float(lr), float(momentum), float(dampening), float(weight_decay), nesterov, maximize, first,
        chosen_path(),
    )  # fmt: skip
    return Sums(*found) if sums is None else sums


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
    rhos = _rhos("perturb", rho, weights)
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
