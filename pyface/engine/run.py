"""A training run as a recipe's step sees it: networks, optimisers, progress, and what must be done with gradients."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyface.engine.recipe import Recipe
from pyface.engine.sampling import Order
from pyface.errors import UserError

if TYPE_CHECKING:
    from accelerate.state import PartialState

_HOPELESS = 100  # skipped steps in a row: a run does not come back from that


class Run:
    """State of one run.

    Gradients are averaged over processes here, by hand, when an optimiser is about to use them, instead of in a wrapper
    around the network: so a step may call any method of any network, as often as it likes, and use parts of it only.

    Attributes:
        model, network: the recipe's ``model()`` and its ``result()``.
        optimizers: by name; a single one is called ``"main"``.
        device, rank, ranks: where this process computes, which one it is, and of how many.
        step: finished steps.
        steps: all steps of the run, or None where time alone ends it.
        per_epoch: steps of an epoch, or None without a data set.
        progress: how much of the run is gone, 0 to 1: of ``steps`` or of ``max_minutes``, whichever is further on. It
            stays the same within a step, and is the same in all processes.
        part: which of the ``accumulate`` parts of the step's batch is at work, from 0.
    """

    def __init__(self, recipe: Recipe) -> None:
        from accelerate.utils import broadcast

        state = processes()
        self.device: torch.device = state.device
        self.rank, self.ranks = state.process_index, state.num_processes
        self.recipe, self.config = recipe, recipe.config
        self.part = self.step = self.skipped = 0
        self.progress, self.earlier, self.started = 0.0, 0.0, time.monotonic()
        self.values: dict[str, list[Tensor | float]] = {}
        self._unlucky, self._scaled = 0, False
        self.share(self.config.batch_size)  # an impossible one shall be told before any work is done

        self.model = recipe.model().to(self.device)
        self.network = recipe.result(self.model)
        if self.ranks > 1:
            for value in self.model.state_dict().values():
                broadcast(value)
        made = recipe.optimizers(self.model)
        self.optimizers: dict[str, Optimizer] = made if isinstance(made, dict) else {"main": made}
        self._parameters = {
            id(o): [p for group in o.param_groups for p in group["params"]] for o in self.optimizers.values()
        }
        self.scaler = torch.amp.GradScaler(self.device.type) if self.config.precision == "fp16" else None
        self.ema: dict[str, Tensor] = {}
        if self.config.ema:
            trained = {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}
            self.ema = {name: p.float().clone() for name, p in trained.items()}

        self.data = recipe.data()
        self.order = None if self.data is None else Order(recipe, self.data)
        self.per_epoch = self.order.per_epoch if self.order else None
        if self.config.epochs and not self.per_epoch:
            raise UserError("this method makes its own batches and has no epochs; set steps instead")
        totals = [self.config.steps, self.config.epochs and self.config.epochs * (self.per_epoch or 0)]
        self.steps: int | None = min((total for total in totals if total), default=None)
        self.schedulers = recipe.schedulers(self)

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 0; always 0 without a data set."""
        return self.step // self.per_epoch if self.per_epoch else 0

    @property
    def seconds(self) -> float:
        """Time spent so far, over all sittings."""
        return self.earlier + time.monotonic() - self.started

    def share(self, count: int, part: int | None = None) -> slice:
        """This process's part of ``count`` things that all processes and accumulated parts share evenly.

        Raises:
            UserError: they cannot be shared evenly.
        """
        shares = self.ranks * self.config.accumulate
        if count % shares:
            raise UserError(
                f"a batch of {count} cannot be shared evenly by {self.ranks} processes x {self.config.accumulate} "
                f"accumulated parts; take a multiple of {shares}"
            )
        size, place = count // shares, (self.part if part is None else part) * self.ranks + self.rank
        return slice(place * size, (place + 1) * size)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision as the settings want it; :meth:`Recipe.step` already runs in it."""
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.config.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, kinds[self.config.precision])

    def backward(self, loss: Tensor, optimizer: Optimizer | None = None) -> None:
        """Add the gradient of a scalar loss, a mean over this process's part, to the parameters.

        Args:
            loss: Tensor[].
            optimizer: only its parameters get a gradient, so that a generator's loss leaves its critic alone.
        """
        loss = loss / self.config.accumulate if self.config.accumulate > 1 else loss
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        wanted = None
        if optimizer is not None:
            wanted = [p for p in self._parameters[id(optimizer)] if p.requires_grad]
        if self.config.precision == "no":
            loss.backward(inputs=wanted)
        else:
            with torch.autocast(self.device.type, enabled=False):
                loss.backward(inputs=wanted)

    def update(self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None) -> None:
        """Step an optimiser with the gradients of all processes and accumulated parts, then clear them.

        Until the last part of an accumulated batch this does nothing. A step whose gradient is not finite is skipped
        and counted.

        Args:
            optimizer: one of :attr:`optimizers`.
            closure: for optimisers that look at the gradient in a second place (SAM): handed to ``optimizer.step`` as a
                function that clears the gradients, evaluates the loss that ``closure`` returns, and leaves its
                averaged gradients. Not for accumulated batches nor fp16.

        Raises:
            UserError: a hundred steps in a row were skipped, or a closure where there can be none.
        """
        if closure is not None and (self.config.accumulate > 1 or self.scaler is not None):
            raise UserError("this method evaluates each batch twice: set accumulate to 1, and precision to no or bf16")
        if self.part < self.config.accumulate - 1:
            return
        norm = self._finish_gradients(optimizer, clip=closure is None)
        finite = math.isfinite(norm)
        if finite:
            name = next(name for name, one in self.optimizers.items() if one is optimizer)
            self._note("norm" if len(self.optimizers) == 1 else f"norm_{name}", norm)
        if self.scaler is not None:
            self.scaler.step(optimizer)  # looks for itself whether the gradient is finite
            self._scaled = True
        elif finite and closure is None:
            optimizer.step()
        elif finite:
            optimizer.step(lambda: self._evaluate(optimizer, closure))
        optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        self._unlucky = 0 if finite else self._unlucky + 1
        if self._unlucky >= _HOPELESS:
            raise UserError(
                f"training diverged: the last {_HOPELESS} gradients before step {self.step} were not finite; "
                f"lower lr, set clip, or train with precision no"
            )

    @torch.enable_grad()
    def _evaluate(self, optimizer: Optimizer, closure: Callable[[], Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = closure()
        self.backward(loss, optimizer)
        self._finish_gradients(optimizer, clip=True)
        return loss

    def _finish_gradients(self, optimizer: Optimizer, clip: bool) -> float:
        """Average over processes, unscale and clip the gradients; returns their 2-norm before clipping."""
        parameters = self._parameters[id(optimizer)]
        if self.ranks > 1:
            _average(parameters)
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip and self.config.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        return norm.item()

    # ---------------------------------------------------------------------------------------- for the trainer's loop

    def measure_progress(self) -> None:
        """Set :attr:`progress`, from the first process's clock where time counts."""
        gone = [self.step / self.steps] if self.steps else []
        if self.config.max_minutes:
            seconds = self.seconds
            if self.ranks > 1:
                from accelerate.utils import broadcast

                seconds = broadcast(torch.tensor([seconds], dtype=torch.float32, device=self.device)).item()
            gone.append(seconds / (60 * self.config.max_minutes))
        self.progress = min(1.0, max(gone))

    def finish_step(self) -> None:
        """Count the step, and advance what follows it: scaler, averaged weights, schedulers."""
        if self._scaled and self.scaler is not None:
            self.scaler.update()
            self._scaled = False
        self.step += 1
        if self.ema:
            # A short memory at first, so that the average does not drag the initial weights along.
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            own = dict(self.network.named_parameters())
            torch._foreach_lerp_(list(self.ema.values()), [own[n].detach().float() for n in self.ema], 1 - decay)
        ended = self.per_epoch is not None and self.step % self.per_epoch == 0
        for scheduler, after in self.schedulers:
            if after == "step" or ended:
                scheduler.step()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """The resulting network with averaged weights, in evaluation mode; as it was, afterwards."""
        modes = {module: module.training for module in self.network.modules()}
        own = dict(self.network.named_parameters())
        kept = {name: own[name].detach().clone() for name in self.ema}
        with torch.no_grad():
            for name, value in self.ema.items():
                own[name].copy_(value)
        self.network.eval()
        try:
            yield self.network
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    own[name].copy_(value)
            for module, mode in modes.items():
                module.training = mode

    def note(self, report: dict[str, Tensor | float]) -> None:
        """Keep a step's scalars until they are logged; on a GPU nobody waits for them."""
        for name, value in report.items():
            self._note(name, value.detach() if isinstance(value, Tensor) else float(value))

    def _note(self, name: str, value: Tensor | float) -> None:
        self.values.setdefault(name, []).append(value)

    def settle(self) -> dict[str, list[float]]:
        """The scalars noted since the last log, means over processes, as plain numbers."""
        for name in sorted(self.values):
            values = [float(value) for value in self.values[name]]
            if self.ranks > 1:
                from accelerate.utils import reduce

                values = reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "mean").tolist()
            self.values[name] = list(values)
        return self.values  # type: ignore[return-value]

    def agree(self, value: Any) -> Any:
        """The first process's ``value``, in all of them."""
        if self.ranks == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def processes() -> PartialState:
    """What accelerate knows about this process: its device, its rank, and the others."""
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ and "LOCAL_RANK" not in os.environ:
        warnings.warn(
            "accelerate launch --cpu starts one process only, unless MPI starts the others; for several processes on "
            "the CPU use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N",
            stacklevel=1,  # always the same place, so that it is said once
        )
    # Without an accelerator, processes that torchrun started would otherwise not know of each other.
    return PartialState(cpu=on_cpu or ("LOCAL_RANK" in os.environ and not torch.accelerator.is_available()))


def _average(parameters: list[Tensor]) -> None:
    """Mean gradients over all processes, in one transfer; a gradient that no process has stays away."""
    from accelerate.utils import reduce

    like = parameters[0]
    present = like.new_tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    *means, present = reduce(torch.cat([g.flatten().float() for g in flat] + [present]), "mean").split(
        [p.numel() for p in parameters] + [len(parameters)]
    )
    for parameter, mean, share in zip(parameters, means, present.tolist(), strict=True):
        if share > 0:
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)
