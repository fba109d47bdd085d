"""From one description of an op to everything torch wants of it: dispatcher entry, fake, autograd, forward mode, vmap.

Two doors lead to the same implementation. `torch.ops.pyface.<name>` is what compilers, exporters and modes see. The
eager door skips the dispatcher, which for small tensors costs more than the kernel: straight to the implementation
without gradients, through one `autograd.Function` with them. Both doors share the very same `setup_context`,
`backward` and `vmap` functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("pyface", "DEF")

_functorch_is_active = torch._C._are_functorch_transforms_active
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_plain_types = {torch.Tensor, torch.nn.Parameter}


def register(
    name: str,
    schema: str,
    tensors: int,
    implementation: Callable,
    fake: Callable,
    *,
    launch: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    jvp: Callable | None = None,
    vmap: Callable | None = None,
) -> Callable:
    """Registers `pyface::<name>` and returns its eager door, a function of positional arguments.

    Args:
        name: the op's name.
        tensors: how many of the first arguments are tensors (or None), or lists of tensors for an inference op; the
            others never are.
        schema: arguments and results in torch's schema language, "(Tensor x, ...) -> (Tensor, Tensor)".
        implementation: checks every argument, picks a path and computes. Results never alias arguments; one that was
            not asked for is None, which the dispatcher shows as an empty tensor of the first argument's dtype.
        fake: the same checks and result shapes without data, with that empty tensor for what was not asked for.
        launch: the implementation without its checks, for the eager door: the public function has made them.
        setup_context: `(ctx, inputs, output)`, saves what backward (and jvp) need.
        backward: `(ctx, *grads)`, one gradient per argument; must itself be differentiable for second order. Without
            it the op is for inference: its public function refuses tensors that need a gradient.
        jvp: `(ctx, *tangents)` for forward mode, using `ctx.saved_tensors`.
        vmap: `(op, info, in_dims, *args) -> (results, out_dims)`, calling `op` on tensors with the mapped dimension
            folded in.
    """
    qualified = f"pyface::{name}"
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, lambda *args: _filled(implementation(*args), args[0]), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    dispatched = getattr(torch.ops.pyface, name).default

    if backward is None:

        def infer(*args):
            plain = all(type(t) in _plain_types for group in args[:tensors] for t in group)
            if plain and not (torch.compiler.is_compiling() or _len_torch_dispatch_stack() or _functorch_is_active()):
                return implementation(*args)
            return dispatched(*args)

        return infer

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(qualified, functools.partial(vmap, dispatched), lib=LIBRARY)

    launch = launch or implementation

    def forward(*args):
        return launch(*args)

    def setup_with_tangents(ctx, inputs, output):
        setup_context(ctx, inputs, output)
        if jvp is not None:
            ctx.save_for_forward(*ctx.to_save)

    def forward_and_setup(ctx, *args):
        output = launch(*args)
        setup_with_tangents(ctx, args, output)
        return output

    rules = {"backward": backward} | ({} if jvp is None else {"jvp": jvp})
    transformable = rules | {"forward": forward, "setup_context": setup_with_tangents}
    if vmap is not None:
        transformable["vmap"] = lambda info, in_dims, *args: vmap(call, info, in_dims, *args)
    # The form with setup_context is the one function transforms accept; it inspects signatures at every call, which
    # costs more than a small kernel, so plain autograd goes through the older form.
    apply_transformed = _function(name, transformable).apply
    apply = _function(name, rules | {"forward": forward_and_setup}).apply

    def call(*args):
        if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
            return dispatched(*args)
        needs_grad = False
        for arg in args[:tensors]:
            if arg is not None:
                if type(arg) not in _plain_types:
                    return dispatched(*args)
                needs_grad = needs_grad or arg.requires_grad
        if _functorch_is_active():
            return apply_transformed(*args)
        if (needs_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
            return apply(*args)
        try:
            return launch(*args)
        except RuntimeError:
            # autograd.grad(is_grads_batched=True) sends tensors that look plain until their memory is asked for
            if any(t is not None and _is_legacy_batched(t) for t in args[:tensors]):
                return dispatched(*args)
            raise

    return call


def _filled(output: Tensor | tuple, first: Tensor) -> Tensor | tuple[Tensor, ...]:
    return tuple(first.new_empty(0) if t is None else t for t in output) if isinstance(output, tuple) else output


def _function(name: str, members: dict[str, Callable]) -> type[torch.autograd.Function]:
    return type(name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items()})
