"""SAM and its relatives as `torch.optim.Optimizer` subclasses around a base optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer

from pyface.errors import UserError
from pyface.ops import multi_combine_, multi_dots, multi_norm, multi_step_, perturb_, restore_
from pyface.ops.sharpness import Sums


class SAM(Optimizer):
    """Sharpness-aware minimisation (arXiv:2010.01412) around any base optimiser.

    ``first_step`` moves the weights uphill by rho along the first gradient y; ``second_step`` gives them their old bits
    back and lets the base optimiser step with the gradient x found there. ``step(closure)`` is both, with the first
    gradients already in ``.grad``::

        loss.backward()
        optimizer.step(closure)  # closure: loss at the moved weights, with its backward

    A step with a gradient that is not finite, in either pass, is skipped and counted in :attr:`skipped`; the weights
    keep their bits. A parameter without a gradient in the first pass does not move in it; one without one in the second
    gets its weight back and is not updated. Where all first gradients are 0 nothing moves.

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
        UserError: a rho that is negative or not finite; steps out of order; no gradients.
        TypeError: sparse or complex gradients. ValueError: parameters on several devices.
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
        self.rule_parameters = {}
        self._skips: Tensor | None = None
        self._saved: dict[Tensor, Tensor] = {}  # memory of the weights' copies, kept from step to step
        self._moved: list[Tensor] | None = None  # parameters between the two passes
        self._first: dict[Tensor, Tensor] = {}
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

    # ---- the two passes ---------------------------------------------------------------------------------------------

    def _ascent(self, params: list[Tensor]) -> list[Tensor]:
        """Along what the weights move; the first gradient."""
        return [self._first[p] for p in params]

    def _eta(self) -> float | None:
        return None

    @torch.no_grad()
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
        found, rhos = {}, []
        for group in self.param_groups:
            mine = {p: g for p in group["params"] if (g := p.grad) is not None}
            found |= mine
            rhos += [group["rho"]] * len(mine)
        params = list(found)
        if not params:
            raise UserError(
                f"{type(self).__name__}: no parameter has a gradient; call loss.backward() before the step, "
                "the closure only computes the second gradients"
            )
        # A view (DDP's bucket) is written again by the second backward pass.
        self._first = {p: g.clone() if g.layout == torch.strided and g._is_view() else g for p, g in found.items()}
        directions, eta = self._ascent(params), self._eta()
        sums = multi_norm(directions) if eta is None else multi_norm(directions, weights=params, eta=eta)
        saved = [self._copy_of(p) for p in params]
        perturb_(params, directions, saved, sums, rhos, eta=eta, shrink=self.shrink / self._scale)
        self._nonfinite = sums.nonfinite
        self._moved = params
        if self.rule == "second":
            self._first = {}
        for p in params:
            p.grad = None

    def _copy_of(self, p: Tensor) -> Tensor:
        """Where the weight is kept between the passes: the same memory in every step."""
        kept = self._saved.get(p)
        if kept is None or kept.dtype != p.dtype or kept.shape != p.shape or kept.device != p.device:
            kept = self._saved[p] = torch.empty_like(p, memory_format=torch.preserve_format, requires_grad=False)
        return kept

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights the bits they had before ``first_step``, and forget the first gradients."""
        if self._moved is not None:
            restore_(self._moved, [self._saved[p] for p in self._moved])
        self._moved, self._first = None, {}

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Restore the weights and step with the gradients in ``.grad``, found at the moved weights.

        Args:
            zero_grad: clear the gradients afterwards.
            scaler: the GradScaler both losses were scaled by: it unscales, skips the step after an overflow in either
                pass, and halves its scale once at ``scaler.update()``, which the caller calls.
        """
        if self._moved is None:
            raise UserError(f"{type(self).__name__}: second_step needs a first_step before it")
        first, moved = self._first, self._moved
        mine = [{p: g for p in group["params"] if (g := p.grad) is not None} for group in self.param_groups]
        seconds = {p: g for gradients in mine for p, g in gradients.items()}
        both = [p for p in seconds if p in first]
        alone = [p for p in seconds if p not in first]  # to take as they are; all of them under SAM's own rule
        xs, ys = [seconds[p] for p in both], [first[p] for p in both]
        dots = multi_dots(xs, ys) if both else None
        norms = multi_norm([seconds[p] for p in alone]) if alone else None
        flags = torch.stack([self._nonfinite, *(s.nonfinite for s in (dots, norms) if s is not None)]).amax(0)
        bad = flags.amax()
        self._skips = bad.double() if self._skips is None else self._skips + bad
        # What schedulers look at, to warn if they step before the optimiser.
        self._opt_called = self.base_optimizer._opt_called = True
        if scaler is None and self._is_fused(seconds):
            self._fused_step(mine, both, alone, dots, norms, flags)
            self._moved = [p for p in moved if p not in seconds]
            self.restore()
        else:
            self.restore()
            if both:
                multi_combine_(xs, ys, dots, self.rule, **self.rule_parameters)
            if scaler is not None:
                # The scaler looks at the gradients for itself: an overflow of the first pass must be seen there too.
                for g in seconds.values():
                    if g.numel():
                        corner = g[(0,) * g.dim()]
                        corner.copy_(torch.where(bad > 0, torch.full_like(corner, float("inf")), corner))
                        break
                scaler.step(self.base_optimizer)
            elif not bad.item():
                self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @property
    def skipped(self) -> int:
        """How many steps were skipped for a gradient that is not finite. Reading it waits for the device."""
        return 0 if self._skips is None else int(self._skips.item())

    def _is_fused(self, seconds: dict[Tensor, Tensor]) -> bool:
        """Whether :func:`multi_step_` does all that the base optimiser's step would."""
        base = self.base_optimizer
        if type(base) is not SGD or not hasattr(vars(base).get("step", _wrapped), "_wrapped_by_lr_sched"):
            return False
        hooks = (
            base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks,
        )  # fmt: skip
        if any(hooks):
            return False
        for group in self.param_groups:
            # With rho 0 the base optimiser's very bits are wanted, which a pass of other roundings does not give.
            if group["differentiable"] or isinstance(group["lr"], Tensor) or not group["rho"]:
                return False
            if group["momentum"]:
                for p in group["params"]:
                    buffer = self.state[p].get("momentum_buffer") if p in seconds else p
                    # A first buffer is the gradient, whatever the dampening; from 0 that comes out without.
                    if group["dampening"] if buffer is None else buffer.dtype != p.dtype:
                        return False
        return True

    def _fused_step(self, mine, both, alone, dots, norms, flags) -> None:
        """Group by group; the sums stand in the order of the groups."""
        moved, in_both, rows = set(self._moved), set(both), [0, 0]
        for group, gradients in zip(self.param_groups, mine, strict=True):
            sgd = {k: group[k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
            for which, (everything, sums) in enumerate(((both, dots), (alone, norms))):
                params = [p for p in gradients if (p in in_both) is (which == 0)]
                if not params:
                    continue
                values, end = sums.values, rows[which] + len(params)
                if len(params) != len(everything):
                    values = torch.cat([values[rows[which] : end], values[-1:]])
                rows[which] = end
                xs = [gradients[p] for p in params]
                rule, parameters, ys = ("second", {}, xs) if which else (self.rule, self.rule_parameters, None)
                multi_step_(
                    params,
                    [self._saved[p] if p in moved else p for p in params],
                    xs,
                    ys or [self._first[p] for p in params],
                    [self._momentum_of(p) for p in params] if group["momentum"] else None,
                    Sums(values, flags),
                    rule,
                    **parameters,
                    **sgd,
                )

    def _momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False)
        return state["momentum_buffer"]

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

    def __getstate__(self) -> dict[str, Any]:
        own = ("base_optimizer", "rule_parameters", "_skips", "shrink", "eta", "sigma", "decay", "_means")
        transient = {"_saved": {}, "_moved": None, "_first": {}, "_nonfinite": None, "_scale": 1.0}
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

    def _ascent(self, params):
        ys = super()._ascent(params)
        finite = multi_norm(ys).nonfinite[1] == 0
        begins = len(self._means) < len(self._first) and bool(finite)
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
    """Batch normalisation uses the batch's statistics and does not record them: for the second pass of a closure."""
    modules = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training
        and m.track_running_stats
    ]  # fmt: skip
    for module in modules:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in modules:
            module.track_running_stats = True
