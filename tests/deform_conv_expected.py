"""Calls of the deform_conv core and what they must give, from the reference in float64. For the tests of GPU paths."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyface.ops.reference import deform_conv as reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = [(F32, F32), (F64, F64), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]
TYPE_IDS = ["-".join(str(t).removeprefix("torch.") for t in pair) for pair in TYPES]
# Of the largest element: one rounding of the factors, one of the result.
TOLERANCE = {F32: 2e-6, F64: 4e-15, F16: 1.5e-3, BF16: 1.2e-2}


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    outs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    offset_groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    mask: bool = True
    layout: torch.memory_format = torch.contiguous_format
    sigma: float = 1.5

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation


CASES = {
    "uneven": Case(2, 6, 4, (7, 9), (3, 2), 2, 3, (2, 1), (1, 0), (1, 2)),  # the two groupings are not nested
    "depthwise": Case(1, 5, 10, (6, 5), (1, 3), 5, 1, padding=(0, 1)),
    "pointwise": Case(3, 17, 3, (4, 5), (1, 1), offset_groups=17, padding=(0, 0), mask=False),
    "channels_last": Case(2, 40, 20, (5, 5), padding=(1, 1), layout=torch.channels_last, mask=False),
    "one pixel": Case(3, 8, 33, (1, 1), (3, 3), offset_groups=2),
    "far": Case(1, 3, 2, (5, 6), (5, 1), padding=(2, 0), sigma=8.0),
    "few pixels": Case(1, 160, 8, (2, 2), offset_groups=2),  # its sum is split
    "wide": Case(1, 4, 140, (3, 3), (2, 2), padding=(0, 0)),  # more than one tile of outputs in some types
}


def tensors(case: Case, types=(F32, F32), device="cpu") -> dict[str, Tensor | None]:
    """Random arguments. Offsets are odd sixteenths: exact in all types, never on a pixel, where derivatives jump."""
    n, taps = case.batch, case.kernel[0] * case.kernel[1]
    oh, ow = reference.output_size(case.size, case.kernel, *case.geometry)
    options = dict(device=device)
    offset = torch.randn(n, 2 * case.offset_groups * taps, oh, ow, **options) * case.sigma
    inputs = case.channels // case.groups
    found = {
        "input": torch.randn(n, case.channels, *case.size, **options).to(types[0], memory_format=case.layout),
        "offset": (((offset * 8).floor() + 0.5) / 8).clamp(-15, 15).to(types[1]),
        "weight": (torch.randn(case.outs, inputs, *case.kernel, **options) / (inputs * taps) ** 0.5).to(types[0]),
        "bias": torch.randn(case.outs, **options).to(types[0]),
        "mask": torch.randn(n, case.offset_groups * taps, oh, ow, **options).to(types[1]) if case.mask else None,
    }
    return found


def wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().cpu().double()


def check(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """NaN where NaN is due, and everything else within the tolerance of `dtype`."""
    got = wide(got)
    assert got.shape == exact.shape, name
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in other places"
    if exact.numel():
        scale = exact.nan_to_num(0).abs().amax().clamp_min(1e-3)
        error = (got - exact).nan_to_num(0).abs().amax() / scale
        assert error <= TOLERANCE[dtype], f"{name}: off by {error:.2e} of the largest element"


def check_forward(case: Case, t: dict, out: Tensor) -> None:
    exact = reference.deform_conv2d(
        *(wide(t[name]) for name in ("input", "offset", "weight", "bias")), *case.geometry, wide(t["mask"])
    )
    assert out.dtype == t["input"].dtype
    if out[0].numel() > 1:
        assert out.is_contiguous(memory_format=case.layout)
    check("out", out, exact, t["input"].dtype)


def check_backward(case: Case, t: dict, grad: Tensor, found, needs=(True, True, True, True)) -> None:
    names = ("input", "offset", "weight", "mask")
    exact = reference.backward(wide(grad), *(wide(t[name]) for name in names), *case.geometry)
    for name, g, e, need in zip(names, found, exact, needs, strict=True):
        assert (g is not None) == (need and t[name] is not None), name
        if g is not None:
            assert g.dtype == t[name].dtype
            # sums of float32: their result alone is rounded further
            check(f"gradient of {name}", g, e, t["input"].dtype)


def border(dtype=F32) -> tuple[Case, dict]:
    """One tap at each pair of positions on, before and beyond the edges of a 4 x 5 image, and where no number is."""
    case = Case(1, 3, 2, (4, 5), (1, 1), padding=(5, 5))
    t = tensors(case, (dtype, dtype))
    oh, ow = t["offset"].shape[2:]
    edges = [(n - 1, n - 0.5, n - 0.0625, n, n + 1) for n in case.size]
    none = (torch.nan, torch.inf, 1e10, -1e10)
    y, x = (torch.tensor([-1.5, -1, -0.75, -0.5, 0, *far, *none], dtype=dtype) for far in edges)
    y, x = y.repeat(2)[:oh], x.repeat(2)[:ow]
    t["offset"][0, 0] = y[:, None] - (torch.arange(oh, dtype=dtype) - 5)[:, None]
    t["offset"][0, 1] = x[None, :] - (torch.arange(ow, dtype=dtype) - 5)[None, :]
    return case, t
