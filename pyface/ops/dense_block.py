"""Op table of core `dense_block`: densely connected 3x3 convolutions, for inference.

Every argument is checked here, once, before any pointer is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyface.ops import _paths
from pyface.ops._paths import Core, chosen_path
from pyface.ops._register import register
from pyface.ops.reference import dense_block as reference

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 2}


def _check(parts: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], compute: torch.dtype) -> None:
    if not parts or not weights or len(weights) != len(biases):
        raise ValueError(
            f"dense_block: expected x, and as many biases as weights, at least one each; got {len(parts)} x, "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    first = parts[0]
    batch = max(part.shape[0] if part.dim() == 4 else 0 for part in parts)
    for part in parts:
        if part.dim() != 4 or part.shape[1] == 0:
            raise ValueError(f"dense_block: x must be Tensor[B, C, H, W] with C >= 1, got shape {tuple(part.shape)}")
        if part.shape[0] not in (1, batch) or part.shape[2:] != first.shape[2:]:
            raise ValueError(
                "dense_block: all parts of x must have one height and width, and one batch size or 1; got "
                f"{', '.join(str(tuple(p.shape)) for p in parts)}"
            )
    channels = sum(part.shape[1] for part in parts)
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 4 or weight.shape[0] == 0 or weight.shape[1:] != (channels, 3, 3):
            raise ValueError(
                f"dense_block: weights[{k}] must be Tensor[G, {channels}, 3, 3] with G >= 1 (it reads x and all "
                f"features before it through a 3x3 kernel), got shape {tuple(weight.shape)}"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"dense_block: biases[{k}] must be Tensor[{weight.shape[0]}], got shape {tuple(bias.shape)}"
            )
        channels += weight.shape[0]
    for name, tensors in (("x", parts), ("weights and biases", [*weights, *biases])):
        kinds = {t.dtype for t in tensors}
        if len(kinds) > 1 or not tensors[0].is_floating_point():
            raise TypeError(
                f"dense_block: {name} must have one floating-point type, got {', '.join(sorted(map(str, kinds)))}"
            )
    if not compute.is_floating_point:
        raise TypeError(f"dense_block: compute_dtype must be a floating-point type, got {compute}")
    devices = {t.device for t in (*parts, *weights, *biases)}
    if len(devices) > 1:
        raise ValueError(f"dense_block: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def _empty(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The result: of the dtype and element order of x (its first part)."""
    x = parts[0]
    shape = (max(part.shape[0] for part in parts), weights[-1].shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_order(x))


def _order(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


# ---- paths ----------------------------------------------------------------------------------------------------------


def _load_cpu():
    module = _paths.loaded("_cpu")

    def run(parts, weights, biases, negative_slope, compute):
        out = _empty(parts, weights)
        batch, _, height, width = out.shape
        weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
        module.dense_block(
            [(p.data_ptr(), p.shape[1], p.stride(0) if p.shape[0] > 1 else 0, *p.stride()[1:]) for p in parts],
            [(w.data_ptr(), b.data_ptr(), len(b)) for w, b in zip(weights, biases, strict=True)],
            out.data_ptr(), out.stride(), batch, height, width,
            _DTYPE_CODES[out.dtype], _DTYPE_CODES[weights[0].dtype], _DTYPE_CODES[compute], negative_slope,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    return run


def _reference(parts, weights, biases, negative_slope, compute):
    out = reference.dense_block(parts, weights, biases, negative_slope=negative_slope, compute_dtype=compute)
    return out.contiguous(memory_format=_order(parts[0]))


CORE = Core(
    "dense_block",
    # (x, weights, compute)
    dtypes={"cpu": {(x, w, c) for x in _DTYPE_CODES for w in _DTYPE_CODES for c in _DTYPE_CODES}},
    load={"cpu": _load_cpu, "reference": lambda: _reference},
    order=("cpu", "reference"),  # no GPU path to miss: cuDNN's convolutions are what the reference runs there
)


@functools.cache
def _has_amx() -> bool:
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.is_file() and "amx_bf16" in cpu_info.read_text()


def _automatic(device: str, compute: torch.dtype) -> str | None:
    """The path to take where it is not simply the first that can serve.

    Matrix units multiply bfloat16 several times as fast as the vector units the `cpu` path uses, and oneDNN uses them.
    """
    return "reference" if device == "cpu" and compute == torch.bfloat16 and _has_amx() else None


# ---- the op ---------------------------------------------------------------------------------------------------------


def _forward(parts, weights, biases, negative_slope, compute, path):
    _check(parts, weights, biases, compute)
    device = parts[0].device.type
    run = CORE.pick(device, (parts[0].dtype, weights[0].dtype, compute), path or _automatic(device, compute))
    out = _empty(parts, weights)
    return run(parts, weights, biases, negative_slope, compute) if out.numel() else out


def _forward_fake(parts, weights, biases, negative_slope, compute, path):
    _check(parts, weights, biases, compute)
    return _empty(parts, weights)


_dense_block = register(
    "dense_block",
    "(Tensor[] x, Tensor[] weights, Tensor[] biases, float negative_slope, ScalarType compute_dtype, str? path) "
    "-> Tensor",
    3,
    _forward,
    _forward_fake,
)


def dense_block(
    x: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    negative_slope: float = 0.01,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Densely connected 3x3 convolutions in one call, for inference.

    ::

        f[0] = x
        f[k] = leaky_relu(conv[k]([f[0], ..., f[k-1]]), negative_slope)      k = 1 .. L-1
        out  = conv[L]([f[0], ..., f[L-1]])

    with stride 1 and zero padding 1: the sub-net of HiNet and PRO-Face S (arXiv:2307.09146, section 3.2; 16 channels,
    four times 32, then 12), the dense block of arXiv:1809.00219 (ESRGAN).

    Args:
        x: Tensor[B, C0, H, W], or a sequence of Tensor[B or 1, C, H, W] that stand for their concatenation on the
            channel axis (none is made; a batch of 1 is shared by all samples). Any strides.
        weights: L tensors; weights[k] is Tensor[G_k, C0 + G_0 + ... + G_(k-1), 3, 3].
        biases: L tensors; biases[k] is Tensor[G_k].
        negative_slope: of the LeakyReLU.
        compute_dtype: type in which x, weights and features are multiplied; None: that of the weights. Converting here
            costs less than casting the weights before: parameters may stay float32.

    Returns:
        Tensor[B, G_(L-1), H, W] of x's dtype. It is channels_last where x (its first part) is, else contiguous, as the
        coupling that follows wants it. An empty x gives an empty result.

    Dtypes: the path `cpu` takes float32 and bfloat16 for x, weights and compute_dtype, in any mixture; sums are float32
    in both. In bfloat16 each feature is rounded once, after the LeakyReLU; a CPU without AVX512-BF16 does the same
    roundings at the speed of float32. Other types run on the path `reference`, and by default so does bfloat16 on a CPU
    with AMX, whose matrix units only oneDNN uses.

    Deterministic: on the path `cpu` a pixel's result does not depend on the number of threads, on the rest of the
    batch, on the layout of x or on where in its row it lies, bit for bit. Instruction sets differ in rounding.

    Memory: a work buffer of 4 (bfloat16: 2) bytes times H+2 rows, W+2 columns and C0 + G_0 + ... + G_(L-2) channels
    (C0 and each G rounded up to 16), for one image, or for as many as have 128 rows together; when G_(L-1) is no
    multiple of 16 up to 12 G_(L-1) H W bytes more. PRO-Face S at 256x256: 13 MB in float32, 8 MB in bfloat16. The
    buffer of the last call is kept for the next one, unless it is larger than 256 MiB.

    Raises:
        ValueError: shapes that do not fit together, kernels other than 3x3, several devices.
        TypeError: types that are not floating point, or several among the parts of x or among the weights and biases.
        RuntimeError: a gradient would be needed.
        pyface.PathError: the explicitly chosen path cannot serve the call.
    """
    parts = [x] if isinstance(x, Tensor) else list(x)
    weights, biases = list(weights), list(biases)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*parts, *weights, *biases)):
        raise RuntimeError(
            "dense_block has no gradient: call it under torch.no_grad(), or train with the differentiable module "
            "(pyface.methods.proface_s.model.DenseSubnet)"
        )
    if compute_dtype is None:
        compute_dtype = weights[0].dtype if weights else torch.float32
    return _dense_block(parts, weights, biases, float(negative_slope), compute_dtype, chosen_path())
