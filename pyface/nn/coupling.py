"""Invertible layers: affine coupling, the Haar wavelet, and a sequence whose activation memory does not grow with its
depth.

The contract of an invertible layer here, fixed once: `forward(x, condition=None, *, return_log_det=False)` and
`inverse(...)` with the same arguments return the transformed tensor, or `(tensor, log_det)` with log_det Tensor[B] in
nats, the log-determinant of the Jacobian of the direction that was computed. Any module with these two methods fits
`InvertibleSequential`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from pyface.ops import affine_coupling, haar_dwt2d, haar_idwt2d
from pyface.ops.coupling import affine_coupling_backward_from_output


class AffineCoupling(nn.Module):
    """One affine coupling step (RealNVP, arXiv:1605.08803): one part of the channels is scaled and shifted as the
    other part says.

    ::

        a, b = x[:, :split], x[:, split:]            log_scale, shift = subnet(cat([a, condition], 1))
        y = cat([a, b * exp(l(log_scale)) + shift], 1)

    Args:
        subnet: any module. Alone, it maps Tensor[B, P (+ condition), ...] to Tensor[B, 2T, ...], log-scale then
            shift, with P passive and T transformed channels. With `shift_subnet`, it maps to Tensor[B, T, ...]
            log-scale alone.
        shift_subnet: a second module for the shift (PRO-Face S and HiNet have two).
        split: channels of the first part; half of the channels (rounded down) by default.
        transform: "second" (default) transforms the second part from the first, "first" the first from the second.
        clamp, clamp_activation: as in `pyface.ops.affine_coupling`.

    Two layers, `transform="first"` then `transform="second"`, make FrEIA's GLOWCouplingBlock.
    """

    def __init__(
        self,
        subnet: nn.Module,
        shift_subnet: nn.Module | None = None,
        *,
        split: int | None = None,
        transform: str = "second",
        clamp: float = 2.0,
        clamp_activation: str = "sigmoid",
    ):
        super().__init__()
        if transform not in ("first", "second"):
            raise ValueError(f'AffineCoupling: transform must be "first" or "second", got {transform!r}')
        self.subnet, self.shift_subnet = subnet, shift_subnet
        self.split, self.transform = split, transform
        self.clamp, self.clamp_activation = clamp, clamp_activation

    def extra_repr(self) -> str:
        return f"split={self.split}, transform={self.transform}, clamp={self.clamp}, activation={self.clamp_activation}"

    def forward(
        self, x: Tensor, condition: Tensor | None = None, *, return_log_det: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tensor[B, C, ...] to the same shape; `condition` Tensor[B, K, ...] joins the sub-net's input."""
        return self._couple(x, condition, inverse=False, return_log_det=return_log_det)

    def inverse(
        self, y: Tensor, condition: Tensor | None = None, *, return_log_det: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Undoes `forward` with the same condition, up to rounding."""
        return self._couple(y, condition, inverse=True, return_log_det=return_log_det)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(passive, transformed) parts of Tensor[B, C, ...]."""
        split = x.shape[1] // 2 if self.split is None else self.split
        if not 0 < split < x.shape[1]:
            raise ValueError(
                f"AffineCoupling: cannot split {x.shape[1]} channels at {split}; give split between 1 and C - 1"
            )
        first, second = x[:, :split], x[:, split:]
        return (second, first) if self.transform == "first" else (first, second)

    def _join(self, passive: Tensor, transformed: Tensor) -> Tensor:
        return torch.cat([transformed, passive] if self.transform == "first" else [passive, transformed], dim=1)

    def _log_scale_and_shift(self, passive: Tensor, condition: Tensor | None, channels: int) -> tuple[Tensor, Tensor]:
        seen = passive if condition is None else torch.cat([passive, condition], dim=1)
        if self.shift_subnet is not None:
            return self.subnet(seen), self.shift_subnet(seen)
        out = self.subnet(seen)
        if out.shape[1] != 2 * channels:
            raise ValueError(
                f"AffineCoupling: the sub-net must return {2 * channels} channels (log-scale and shift of {channels}), "
                f"got {out.shape[1]}"
            )
        return out[:, :channels], out[:, channels:]

    def _couple(self, x: Tensor, condition: Tensor | None, inverse: bool, return_log_det: bool):
        passive, moved = self._parts(x)
        log_scale, shift = self._log_scale_and_shift(passive, condition, moved.shape[1])
        out = affine_coupling(
            moved, log_scale, shift, clamp=self.clamp, clamp_activation=self.clamp_activation, inverse=inverse,
            return_log_det=return_log_det,
        )  # fmt: skip
        if return_log_det:
            return self._join(passive, out[0]), out[1]
        return self._join(passive, out)

    def backward_from_output(
        self, y: Tensor, condition: Tensor | None, grad_y: Tensor, grad_log_det: Tensor | None, wanted: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Input and gradients from the output alone: `(x, grad_x, gradients of wanted)`; one run of the sub-net,
        forward and back.

        `wanted` are tensors the sub-net's result depends on: parameters, the condition.
        """
        passive, moved = self._parts(y)
        grad_passive, grad_moved = self._parts(grad_y)
        passive = passive.detach().requires_grad_()
        with torch.enable_grad():
            log_scale, shift = self._log_scale_and_shift(passive, condition, moved.shape[1])
        x_moved, grad_x, grad_s, grad_t = affine_coupling_backward_from_output(
            grad_moved, grad_log_det, moved, log_scale.detach(), shift.detach(), self.clamp, self.clamp_activation
        )
        grads = _grads([log_scale, shift], [grad_s, grad_t], [passive, *wanted])
        grad_passive = grad_passive if grads[0] is None else grad_passive + grads[0]
        return self._join(passive.detach(), x_moved), self._join(grad_passive, grad_x), grads[1:]


class HaarDWT2d(nn.Module):
    """The orthonormal Haar wavelet as an invertible layer: Tensor[B, C, H, W] to Tensor[B, 4C, H/2, W/2], see
    `pyface.ops.haar_dwt2d`.

    Its log-determinant is 0. `condition` is accepted and ignored, so that it can stand in an `InvertibleSequential`.
    """

    def forward(self, x: Tensor, condition: Tensor | None = None, *, return_log_det: bool = False):
        return (haar_dwt2d(x), x.new_zeros(x.shape[0])) if return_log_det else haar_dwt2d(x)

    def inverse(self, y: Tensor, condition: Tensor | None = None, *, return_log_det: bool = False):
        return (haar_idwt2d(y), y.new_zeros(y.shape[0])) if return_log_det else haar_idwt2d(y)


class InvertibleSequential(nn.ModuleList):
    """Invertible layers in a row, keeping for the backward pass only the last output.

    The backward pass rebuilds each layer's input from its output, so activation memory does not grow with depth
    (RevNet, arXiv:1707.04585). `AffineCoupling` layers cost one extra run of their sub-nets; other layers one inverse
    and one forward.

    Args:
        *layers: modules of this file's contract.
        recompute: False keeps activations as any `nn.Sequential` does.
        preserve_rng_state: replay the random numbers of the forward pass in the rebuilding one, so that dropout in a
            sub-net draws the same mask.

    Notes:
        Keep the stream in float32 (sub-nets may be in low precision): rebuilding from a bfloat16 output is off by
        percents. Layers with running statistics (batch norm) update them twice per step. Second-order gradients need
        `recompute=False`. Under `torch.compile` activations are kept, the compiler decides what to recompute.
        `reconstruction_error` tells whether a deep stack with a large clamp is still invertible in the precision at
        hand.
    """

    def __init__(self, *layers: nn.Module, recompute: bool = True, preserve_rng_state: bool = True):
        super().__init__(layers)
        self.recompute, self.preserve_rng_state = recompute, preserve_rng_state

    def forward(
        self, x: Tensor, condition: Tensor | None = None, *, return_log_det: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            parameters = [p for p in self.parameters() if p.requires_grad]
            y, log_det = _Rebuilding.apply(x, condition, self, return_log_det, *parameters)
        else:
            y, log_det = self._run(list(self), "forward", x, condition, return_log_det)
        return (y, log_det) if return_log_det else y

    def inverse(
        self, y: Tensor, condition: Tensor | None = None, *, return_log_det: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Undoes `forward`. Differentiable; its activations are kept."""
        x, log_det = self._run(list(self)[::-1], "inverse", y, condition, return_log_det)
        return (x, log_det) if return_log_det else x

    @staticmethod
    def _run(layers, method, x, condition, return_log_det):
        log_det = None
        for layer in layers:
            # called as a module where possible, so that hooks run
            call = layer if method == "forward" else layer.inverse
            if return_log_det:
                x, term = call(x, condition, return_log_det=True)
                log_det = term if log_det is None else log_det + term
            else:
                x = call(x, condition)
        if return_log_det and log_det is None:
            log_det = x.new_zeros(x.shape[0])
        return x, log_det

    @torch.no_grad()
    def reconstruction_error(self, x: Tensor, condition: Tensor | None = None) -> float:
        """max |inverse(forward(x)) - x|. Gradients of the rebuilding backward pass are no better than this."""
        return (self.inverse(self(x, condition), condition) - x).abs().max().item()


class _Surroundings:
    """Random-number and autocast state at a layer's forward pass, to be met again when it is run a second time."""

    def __init__(self, x: Tensor, preserve_rng_state: bool):
        self.device = x.device.type
        self.autocast = [
            {"device_type": kind, "enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
            for kind in dict.fromkeys(("cpu", self.device))
        ]
        self.cpu_state = torch.get_rng_state() if preserve_rng_state else None
        self.device_state = get_device_states(x) if preserve_rng_state and self.device != "cpu" else None

    @contextlib.contextmanager
    def again(self):
        with contextlib.ExitStack() as stack:
            for state in self.autocast:
                stack.enter_context(torch.autocast(**state))
            if self.cpu_state is not None:
                devices = [] if self.device_state is None else self.device_state[0]
                stack.enter_context(
                    torch.random.fork_rng(devices, device_type="cuda" if self.device == "cpu" else self.device)
                )
                torch.set_rng_state(self.cpu_state)
                if self.device_state is not None:
                    set_device_states(*self.device_state, device_type=self.device)
            yield


class _Rebuilding(torch.autograd.Function):
    """Forward pass of an `InvertibleSequential` that keeps the output alone."""

    @staticmethod
    def forward(ctx, x, condition, sequence, return_log_det, *parameters):
        ctx.layers, ctx.surroundings, log_det = list(sequence), [], None
        y = x
        for layer in ctx.layers:
            ctx.surroundings.append(_Surroundings(y, sequence.preserve_rng_state))
            y, term = sequence._run([layer], "forward", y, condition, return_log_det)
            log_det = term if log_det is None else log_det + term
        if not ctx.layers:
            y, log_det = x.clone(), x.new_zeros(x.shape[0]) if return_log_det else None
        ctx.save_for_backward(y, condition, *parameters)
        ctx.set_materialize_grads(False)
        return y, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_log_det):
        y, condition, *parameters = ctx.saved_tensors
        if grad is None:
            if grad_log_det is None:
                return (None,) * (4 + len(parameters))
            grad = torch.zeros_like(y)
        if condition is not None:
            condition = condition.detach().requires_grad_(ctx.needs_input_grad[1])
        wanted = parameters + ([condition] if ctx.needs_input_grad[1] else [])
        totals: dict[int, Tensor] = {}
        for layer, surroundings in zip(reversed(ctx.layers), reversed(ctx.surroundings)):
            own = {id(p) for p in layer.parameters()} | {id(condition)}
            mine = [t for t in wanted if id(t) in own]
            step = (
                layer.backward_from_output if hasattr(layer, "backward_from_output") else _Generic(layer, surroundings)
            )
            with surroundings.again():
                y, grad, grads = step(y, condition, grad, grad_log_det, mine)
            for tensor, g in zip(mine, grads):
                if g is not None:
                    totals[id(tensor)] = g if id(tensor) not in totals else totals[id(tensor)] + g
        grad_condition = totals.get(id(condition)) if ctx.needs_input_grad[1] else None
        return (
            grad if ctx.needs_input_grad[0] else None,
            grad_condition,
            None,
            None,
            *(totals.get(id(p)) for p in parameters),
        )


class _Generic:
    """`backward_from_output` of a layer that has none: inverse, then forward once more with gradients."""

    def __init__(self, layer: nn.Module, surroundings: _Surroundings):
        self.layer, self.surroundings = layer, surroundings

    def __call__(self, y, condition, grad_y, grad_log_det, wanted):
        with torch.no_grad(), self.surroundings.again():
            x = self.layer.inverse(y, condition).detach()
        x.requires_grad_()
        with torch.enable_grad():
            out = self.layer(x, condition, return_log_det=grad_log_det is not None)
        outputs, grad_outputs = (out, (grad_y, grad_log_det)) if grad_log_det is not None else ([out], [grad_y])
        grad_x, *grads = _grads(outputs, grad_outputs, [x, *wanted])
        return x.detach(), torch.zeros_like(x) if grad_x is None else grad_x, grads


def _grads(outputs, grad_outputs, inputs) -> list[Tensor | None]:
    """Gradients of `inputs`, None where there is none; outputs that depend on nothing are left out."""
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs) if o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    return list(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
