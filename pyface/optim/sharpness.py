"""SAM and its relatives as `torch.optim.Optimizer` subclasses around a base optimiser."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer

from pyface.errors import UserError
from pyface.ops import multi_combine_, multi_dots, multi_norm, multi_step_, perturb_, restore_
from pyface.ops.sharpness import Sums, check_apart

# What a step of SGD needs of a group.
_SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class _Place:
    """A parameter and what is kept for it: a copy of the weight, always in the same memory, and the first gradient."""

    __slots__ = ("first", "moved", "param", "saved")

    def __init__(self, param: Tensor):
        self.param, self.moved = param, False
        self.saved: Tensor | None = None
        self.first: Tensor | None = None

    def copy(self) -> Tensor:
        """Memory for the weight's bits that fits the parameter as it is now."""
        kept, p = self.saved, self.param
        if kept is None or kept.dtype != p.dtype or kept.shape != p.shape or kept.device != p.device:
            kept = self.saved = torch.empty_like(p, memory_format=torch.preserve_format, requires_grad=False)
        return kept


class SAM(Optimizer):
    """Sharpness-aware minimisation (arXiv:2010.01412) around any base optimiser.

    ``first_step`` moves the weights uphill by rho along the first gradient y; ``second_step`` gives them their old bits
    back and lets the base optimiser step with the gradient x found there. ``step(closure)`` is both, with the first
    gradients already in ``.grad``::

        loss.backward()
        optimizer.step(closure)  # closure: loss at the moved weights, with its backward

    A step with a gradient that is not finite, in either pass, is skipped and counted in :attr:`skipped`; the weights
    keep their bits. A parameter without a gradient in the first pass does not move in it; one without one in the second
    gets its weight back and is not updated. Where all first gradients are 0 nothing moves. With ``maximize=True`` the
    first step goes downhill: training is then the same as with the negated loss. A parameter that is listed twice
    counts once; two that share memory are refused.

    Under plain torch.optim.SGD the restoring, the rule and SGD's step are one pass over memory
    (:func:`pyface.ops.multi_step_`), equal to the separate passes to rounding, and nothing waits for the device.
    Separate passes are for other base optimisers, rho 0, a GradScaler, hooks on the base's step, a tensor lr and
    ``differentiable``.

    Args:
        params: parameters or groups; a group may have its own rho. The norm is taken over all groups together.
        base_optimizer: class of the base optimiser (torch.optim.SGD). It shares param_groups and state with this one.
        rho: length of the step uphill, >= 0. With 0 the weights stay, both gradients are the same, and the base
            optimiser's own trajectory results, at twice its price.
        base_arguments: of the base optimiser (lr=0.1).

    Raises:
        UserError: a rho that is negative or not finite; steps out of order; no gradients; an instance, or LBFGS, for
            a base optimiser.
        TypeError: sparse or complex gradients. ValueError: parameters on several devices, or that share memory.
    """

    rule = "second"
    rule_parameters: dict[str, float]
    shrink = 0.0  # what is taken off the factor of y in the ascent

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        **base_arguments: Any,
    ):
        name = type(self).__name__
        if isinstance(base_optimizer, Optimizer):
            raise UserError(
                f"{name}: base_optimizer must be a class, as in {name}(params, torch.optim.SGD, lr=0.1), got one of "
                f"{type(base_optimizer).__name__}'s instances"
            )
        if base_optimizer is torch.optim.LBFGS:
            raise UserError(
                f"{name}: LBFGS evaluates the loss itself, several times a step, and cannot be a base optimiser; take "
                "one whose step needs no closure"
            )
        self.rule_parameters = {}
        self._skips: Tensor | None = None
        self._flags: list[Tensor] = []  # of steps that are not in _skips yet
        self._placed: list[tuple[list[Tensor], list[_Place]]] = []  # of each group
        self._moved: list[_Place] | None = None  # what the first pass moved, until the second
        self._nonfinite: Tensor | None = None
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base_optimizer(self.param_groups, **base_arguments)
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self.defaults |= self.base_optimizer.defaults | {"rho": self.defaults["rho"]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rho = param_group.get("rho", self.defaults["rho"])
        if not 0 <= rho < float("inf"):
            raise UserError(f"{type(self).__name__}: rho must be finite and not negative, got {rho}")
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.add_param_group({"rho": rho, **param_group})
        else:
            super().add_param_group(param_group)
        group = self.param_groups[-1]
        params = group["params"]
        if len(set(params)) < len(params):  # of which torch warns
            first = sorted({p: n for n, p in reversed(list(enumerate(params)))}.values())
            group |= {key: [group[key][n] for n in first] for key in ("params", "param_names") if key in group}

    # ---- the two passes ---------------------------------------------------------------------------------------------

    def _places(self) -> list[list[_Place]]:
        """Of each group; made anew when the groups' parameters are others."""
        groups, placed = self.param_groups, self._placed
        if len(placed) != len(groups) or not all(
            len(params) == len(group["params"]) and all(map(operator.is_, params, group["params"]))
            for (params, _), group in zip(placed, groups, strict=True)
        ):
            check_apart(type(self).__name__, "parameters", [p for group in groups for p in group["params"]])
            known = {place.param: place for _, places in placed for place in places}
            self._placed = [
                (list(group["params"]), [known.get(p) or _Place(p) for p in group["params"]]) for group in groups
            ]
        return [places for _, places in self._placed]

    def _ascent(self, params: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        """Along what the weights move."""
        return ys

    def _eta(self) -> float | None:
        return None

    # No decorator torch.no_grad(): it takes as long as all the rest for a small prompt, and the ops need none.
    def first_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Move the weights uphill along the gradients in ``.grad``, which are taken away (they become None).

        Args:
            zero_grad: accepted for davda54's call style; the gradients are cleared in any case.
            scaler: the GradScaler the loss was scaled by. SAGM and FriendlySAM need it, whose ascents depend on the
                length of y.
        """
        if self._moved is not None:
            raise UserError(f"{type(self).__name__}: first_step was called twice without a second_step between")
        self._scale = 1.0 if scaler is None else scaler.get_scale()
        moved, ys, rhos, downhill = [], [], [], []
        for group, places in zip(self.param_groups, self._places(), strict=True):
            for place in places:
                y = place.param.grad
                if y is not None:
                    moved.append(place)
                    # A view (DDP's bucket) is written again by the second backward pass.
                    ys.append(y if y._base is None else y.detach().clone())
            more = len(moved) - len(rhos)
            rhos += [group["rho"]] * more
            if group.get("maximize"):
                downhill += range(len(rhos) - more, len(rhos))
        if not moved:
            raise UserError(
                f"{type(self).__name__}: no parameter has a gradient; call loss.backward() before the step, "
                "the closure only computes the second gradients"
            )
        params = [place.param for place in moved]
        directions = list(self._ascent(params, ys))
        for n in downhill:
            directions[n] = -directions[n]

        def move(saved: list[Tensor]) -> Sums:
            return perturb_(params, directions, saved, None, rhos, eta=self._eta(), shrink=self.shrink / self._scale)

        known = [place.saved if place.saved is not None else place.copy() for place in moved]
        try:
            sums = move(known)
        except (TypeError, ValueError):  # before anything was written: are these copies of what is another tensor now?
            saved = [place.copy() for place in moved]
            if all(map(operator.is_, saved, known)):
                raise
            sums = move(saved)
        self._nonfinite, self._moved = sums.nonfinite, moved
        keeps = self.rule != "second"
        for place, y in zip(moved, ys, strict=True):
            place.moved, place.first = True, y if keeps else None
            place.param.grad = None

    def restore(self) -> None:
        """Give the weights the bits they had before ``first_step``, and forget the first gradients."""
        if self._moved:
            restore_([place.param for place in self._moved], [place.saved for place in self._moved])
        self._forget()

    def _forget(self) -> None:
        for place in self._moved or ():
            place.moved, place.first = False, None
        self._moved = None

    def second_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Restore the weights and step with the gradients in ``.grad``, found at the moved weights.

        Args:
            zero_grad: clear the gradients afterwards.
            scaler: the GradScaler both losses were scaled by: it unscales, skips the step after an overflow in either
                pass, and halves its scale once at ``scaler.update()``, which the caller calls.

        Where gradients are refused the weights are restored.
        """
        if self._moved is None:
            raise UserError(f"{type(self).__name__}: second_step needs a first_step before it")
        if scaler is not None and not scaler.is_enabled():
            scaler = None  # it would step with gradients that are not finite
        groups, xs = [], []
        for places in self._places():
            mine = []
            for place in places:
                x = place.param.grad
                if x is not None:
                    mine.append(place)
                    xs.append(x)
            groups.append(mine)
        momenta = self._momenta(groups) if scaler is None else None
        if momenta is None or not self._step_at_once(groups, xs, momenta):
            with torch.no_grad():
                self._step_in_passes(groups, momenta, scaler)
        # What schedulers look at, to warn if they step before the optimiser.
        self._opt_called = self.base_optimizer._opt_called = True
        if zero_grad:
            self.zero_grad()

    def _step_at_once(self, groups: list[list[_Place]], xs: list[Tensor], momenta: list[list[Tensor]]) -> bool:
        """Sums, restoring, rule and SGD in one call, if one rule is for all."""
        if len(groups) != 1 or not xs:
            return False
        (group,), (places,), (buffers,) = self.param_groups, groups, momenta
        second = self.rule == "second"
        ys = xs if second else [place.first for place in places]
        if not second and any(y is None for y in ys):
            return False
        # Where only some moved the others are where they were: their copy is themselves.
        saved = [place.saved if place.moved else place.param for place in places]
        rule = {} if second else self.rule_parameters
        try:
            multi_step_(
                [place.param for place in places], saved, xs, ys, buffers or None, None, self.rule,
                nonfinite=self._nonfinite, **rule, **{name: group[name] for name in _SGD},
            )  # fmt: skip
        except BaseException:
            self.restore()
            raise
        self._count(self._nonfinite)
        self._finish(sum(place.moved for place in places) < len(self._moved))
        return True

    def _finish(self, some_left: bool) -> None:
        """Gives back the weights of what moved and has no second gradient, and forgets the first ones."""
        if some_left:
            left = [place for place in self._moved if place.param.grad is None]
            restore_([place.param for place in left], [place.saved for place in left])
        self._forget()

    def _step_in_passes(self, groups: list[list[_Place]], momenta: list[list[Tensor]] | None, scaler) -> None:
        both = [place for places in groups for place in places if place.first is not None]
        # To take as they are; all of them under SAM's own rule.
        alone = [place for places in groups for place in places if place.first is None]
        xs, ys = [place.param.grad for place in both], [place.first for place in both]
        try:
            dots = multi_dots(xs, ys) if both else None
            norms = multi_norm([place.param.grad for place in alone]) if alone else None
        except BaseException:
            self.restore()
            raise
        flags = torch.stack([self._nonfinite, *(s.nonfinite for s in (dots, norms) if s is not None)]).amax(0)
        self._count(flags)
        if momenta is not None:
            self._fused_step(groups, momenta, dots, norms, flags)
            self._finish(any(place.param.grad is None for place in self._moved))
            return
        bad = flags.amax()
        self.restore()
        if both:
            multi_combine_(xs, ys, dots, self.rule, **self.rule_parameters)
        if scaler is not None:
            # The scaler looks at the gradients for itself: an overflow of the first pass must be seen there too.
            for g in (place.param.grad for places in groups for place in places):
                if g.numel():
                    corner = g[(0,) * g.dim()]
                    corner.copy_(torch.where(bad > 0, torch.full_like(corner, float("inf")), corner))
                    break
            scaler.step(self.base_optimizer)
        elif not bad.item():
            self.base_optimizer.step()

    def _count(self, flags: Tensor) -> None:
        """Counts a step as skipped where flags are not 0; from time to time, and without waiting for the device."""
        self._flags.append(flags)
        if len(self._flags) == 64:
            self._count_flags()

    def _count_flags(self) -> None:
        if self._flags:
            found = torch.stack(self._flags).amax(1).sum(dtype=torch.float64)
            self._skips = found if self._skips is None else self._skips + found
            self._flags = []

    @property
    def skipped(self) -> int:
        """How many steps were skipped for a gradient that is not finite. Reading it waits for the device."""
        self._count_flags()
        return 0 if self._skips is None else int(self._skips.item())

    def _momenta(self, groups: list[list[_Place]]) -> list[list[Tensor]] | None:
        """SGD's buffers of what has a second gradient; None if :func:`multi_step_` is not all the base's step does."""
        base = self.base_optimizer
        if type(base) is not SGD or not hasattr(vars(base).get("step", _wrapped), "_wrapped_by_lr_sched"):
            return None
        hooks = (
            base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks,
        )  # fmt: skip
        if any(hooks):
            return None
        found = []
        for group, places in zip(self.param_groups, groups, strict=True):
            # With rho 0 the base optimiser's very bits are wanted, which a pass of other roundings does not give.
            if group["differentiable"] or isinstance(group["lr"], Tensor) or not group["rho"]:
                return None
            states = [self.state[place.param] for place in places] if group["momentum"] else []
            buffers = [state.get("momentum_buffer") for state in states]
            for place, buffer in zip(places, buffers, strict=False):
                # A first buffer is the gradient, whatever the dampening; from 0 that comes out without.
                if group["dampening"] if buffer is None else buffer.dtype != place.param.dtype:
                    return None
            found.append((places, states, buffers))
        for places, states, buffers in found:
            for n, buffer in enumerate(buffers):
                if buffer is None:
                    p = places[n].param
                    buffers[n] = states[n]["momentum_buffer"] = torch.zeros_like(
                        p, memory_format=torch.preserve_format, requires_grad=False
                    )
        return [buffers for _, _, buffers in found]

    def _fused_step(self, groups, momenta, dots: Sums | None, norms: Sums | None, flags: Tensor) -> None:
        """Group by group, with the sums of the rows that are the group's."""
        sums = [(found.values, first) for found, first in ((dots, True), (norms, False)) if found is not None]
        rows = {True: 0, False: 0}
        for group, places, buffers in zip(self.param_groups, groups, momenta, strict=True):
            sgd = {name: group[name] for name in _SGD}
            for values, has_first in sums:
                mine = [n for n, place in enumerate(places) if (place.first is not None) is has_first]
                if not mine:
                    continue
                start, rows[has_first] = rows[has_first], rows[has_first] + len(mine)
                if len(mine) + 1 != len(values):
                    values = torch.cat([values[start : rows[has_first]], values[-1:]])
                chosen = [places[n] for n in mine]
                params = [place.param for place in chosen]
                xs = [p.grad for p in params]
                multi_step_(
                    params,
                    [place.saved if place.moved else place.param for place in chosen],
                    xs,
                    [place.first for place in chosen] if has_first else xs,
                    [buffers[n] for n in mine] if group["momentum"] else None,
                    Sums(values, flags),
                    self.rule if has_first else "second",
                    **(self.rule_parameters if has_first else {}),
                    **sgd,
                )

    def step(self, closure: Callable[[], Any] | None = None, *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """Both passes; returns what the closure returns, the loss at the moved weights.

        Args:
            closure: computes the loss and its gradients again. None: the second pass only, after ``first_step`` and a
                backward pass of the caller's.
            scaler: see :meth:`second_step`; both losses must be scaled by it.

        An exception in the closure leaves the weights as they were before the step.
        """
        if closure is None:
            if self._moved is None:
                raise UserError(
                    f"{type(self).__name__}.step needs a closure that computes the gradients at the moved weights, or "
                    "first_step() and a backward pass before it"
                )
            self.second_step(scaler=scaler)
            return None
        self.first_step(scaler=scaler)
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            self.restore()
            raise
        self.second_step(scaler=scaler)
        return loss

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self._share()
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])  # the base optimiser's own state dict has none

    def __getstate__(self) -> dict[str, Any]:
        self._count_flags()
        own = ("base_optimizer", "rule_parameters", "_skips", "shrink", "eta", "sigma", "decay", "_means")
        transient = {"_flags": [], "_placed": [], "_moved": None, "_nonfinite": None, "_scale": 1.0}
        return super().__getstate__() | {k: self.__dict__[k] for k in own if k in self.__dict__} | transient


class ASAM(SAM):
    """Adaptive SAM (arXiv:2102.11600): the step uphill is measured relative to the size of every weight.

    e = rho t² y / ||t y|| with t = |w| + eta, for every parameter.
    """

    def __init__(self, params, base_optimizer, rho: float = 0.5, eta: float = 0.01, **base_arguments):
        if not 0 <= eta < float("inf"):
            raise UserError(f"ASAM: eta must be finite and not negative, got {eta}")
        self.eta = eta
        super().__init__(params, base_optimizer, rho, **base_arguments)

    def _eta(self) -> float:
        return self.eta


class GSAM(SAM):
    """Surrogate-gap SAM (arXiv:2203.08065): x minus alpha times the part of y orthogonal to x.

    alpha and rho may follow a schedule: set ``rule_parameters["alpha"]`` and the groups' ``rho``.
    """

    rule = "gsam"

    def __init__(self, params, base_optimizer, rho: float = 0.05, alpha: float = 0.4, **base_arguments):
        super().__init__(params, base_optimizer, rho, **base_arguments)
        self.rule_parameters = {"alpha": alpha}


class SAGM(SAM):
    """Sharpness-aware gradient matching: e = (rho / ||y|| - alpha) y, and the step follows (x + y) / 2."""

    rule = "mix"

    def __init__(self, params, base_optimizer, rho: float = 0.05, alpha: float = 0.001, **base_arguments):
        super().__init__(params, base_optimizer, rho, **base_arguments)
        self.shrink, self.rule_parameters = float(alpha), {"t": 0.5}


class FriendlySAM(SAM):
    """Friendly SAM (arXiv:2403.12350): the step uphill follows y - sigma m, with m a running mean of earlier y.

    m = decay m + (1 - decay) y after the ascent, and m = y after the first: y - sigma m is what the batch adds to the
    full gradient. A gradient that is not finite leaves m as it is.
    """

    def __init__(
        self, params, base_optimizer, rho: float = 0.05, sigma: float = 1.0, decay: float = 0.9, **base_arguments
    ):
        if not 0 <= decay < 1:
            raise UserError(f"FriendlySAM: decay must be at least 0 and below 1, got {decay}")
        self.sigma, self.decay = float(sigma), float(decay)
        self._means: dict[Tensor, Tensor] = {}
        super().__init__(params, base_optimizer, rho, **base_arguments)

    @torch.no_grad()
    def _ascent(self, params, ys):
        finite = multi_norm(ys).nonfinite[1] == 0
        begins = len(self._means) < len(params) and bool(finite)
        directions = []
        for p, y in zip(params, ys, strict=True):
            mean = self._means.get(p)
            if mean is not None:
                directions.append(y - (self.sigma * self._scale * mean).to(y.dtype))
                mean.copy_(torch.where(finite, mean.lerp(y.to(mean.dtype) / self._scale, 1 - self.decay), mean))
                continue
            directions.append(y)
            if begins:
                self._means[p] = y.to(p.dtype) / self._scale
        return directions

    def state_dict(self):
        params = [p for group in self.param_groups for p in group["params"]]
        return super().state_dict() | {"gradient_means": [self._means.get(p) for p in params]}

    def load_state_dict(self, state_dict):
        state_dict = dict(state_dict)
        means = state_dict.pop("gradient_means", None)
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        self._means = {
            p: m.to(p.device, p.dtype, copy=True) for p, m in zip(params, means or (), strict=False) if m is not None
        }


class GradientConstrainedSAM(SAM):
    """Gradient-constrained SAM of GCSCoOp (arXiv:2309.07866), tensor by tensor by the cosine c of x and y.

    x where c >= upper; y where c <= lower; between them the projection of x on x + y.

    Args:
        lower: None: x is projected however much the two gradients disagree.
        granularity: "tensor", as in the authors' code; "global": one cosine over all parameters, which does not depend
            on how they are cut into tensors.
    """

    rule = "constrained"

    def __init__(
        self,
        params,
        base_optimizer,
        rho: float = 0.1,
        lower: float | None = 0.5,
        upper: float = 0.8,
        granularity: str = "tensor",
        **base_arguments,
    ):
        lower = -2.0 if lower is None else lower  # below every cosine
        if not lower <= upper:
            raise UserError(f"GradientConstrainedSAM: lower must not be above upper, got {lower} and {upper}")
        if granularity not in ("tensor", "global"):
            raise UserError(f"GradientConstrainedSAM: granularity must be 'tensor' or 'global', got {granularity!r}")
        super().__init__(params, base_optimizer, rho, **base_arguments)
        self.rule_parameters = {"lower": lower, "upper": upper, "granularity": granularity}


def _wrapped() -> None:
    """Stands for a step that nobody replaced."""


_wrapped._wrapped_by_lr_sched = True


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch and instance normalisation use the batch's statistics and do not record them: for the second pass."""
    modules = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training
        and m.track_running_stats
    ]  # fmt: skip
    kept = [(m.running_mean, m.running_var) for m in modules]
    for module in modules:
        module.track_running_stats = False
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):  # which writes to what it has all the same
            module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, (mean, var) in zip(modules, kept, strict=True):
            module.track_running_stats, module.running_mean, module.running_var = True, mean, var
