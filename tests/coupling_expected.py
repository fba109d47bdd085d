"""What the affine coupling and the Haar transform must give, in float64, and how far a kernel may be off.

Written from the definitions (plain torch.sigmoid, tanh, atan, and autograd for the gradients), so that no closed form
of a kernel is checked against itself.
"""

import torch

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPE_PAIRS = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16)]
ACTIVATIONS = {"none": 0, "sigmoid": 1, "tanh": 2, "atan": 3}
DTYPE_CODES = {F32: 0, F64: 1, BF16: 2, F16: 3}
PAIR_IDS = ["-".join(str(t).removeprefix("torch.") for t in pair) for pair in TYPE_PAIRS]


def log_scale(s, clamp, activation):
    if activation == "none":
        return s
    if activation == "sigmoid":
        return 2 * clamp * (torch.sigmoid(s) - 0.5)
    return clamp * torch.tanh(s) if activation == "tanh" else 0.636 * clamp * torch.atan(s)


def log_det_type(x_type):
    return F64 if x_type == F64 else F32


def _allowed(compute_type, stored_type, value, magnitude, reference=0.0, slack=1):
    """Half a unit in the last place of the stored type, plus eight (times `slack`) half units of the compute type.

    The former of the result `value`, the latter of `magnitude`, the size of what went into it.
    `reference` is what the float64 formulas here themselves cancel from (sigmoid - 1/2, 1 - tanh^2).
    """
    ulp, stored = torch.finfo(compute_type).eps / 2, torch.finfo(stored_type)
    allowed = slack * 8 * ulp * magnitude + 1.01 * stored.eps / 2 * value.abs() + stored.smallest_normal * stored.eps
    return allowed + 2.0**-50 * reference


def check(got, expected, allowed, what):
    """`got` within `allowed` of `expected` everywhere; says where it is worst when not."""
    got, expected, allowed = got.double(), expected.double(), allowed.double()
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    excess = (got - expected).abs() - allowed
    if not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(nan=torch.inf).flatten().argmax())
        g, e, a = (v.expand_as(got).flatten()[worst].item() for v in (got, expected, allowed))
        raise AssertionError(f"{what}: element {worst} is {g!r} instead of {e!r}, allowed error {a:.3g}")


def check_forward(x, s, t, y, log_det, *, clamp, activation, inverse, slack=1):
    """x, s, t and the results as [B, ...]; log_det [B] or None."""
    compute = log_det_type(x.dtype)
    xd, sd, td = x.double(), s.double(), t.double()
    scale = log_scale(sd, clamp, activation)
    expected = (xd - td) * torch.exp(-scale) if inverse else xd * torch.exp(scale) + td
    moved = (xd - td).abs() * torch.exp(-scale) if inverse else xd.abs() * torch.exp(scale) + td.abs()
    check(y, expected, _allowed(compute, y.dtype, expected, moved * (1 + scale.abs()), moved * clamp, slack), "y")
    if log_det is not None:
        total = (-scale if inverse else scale).flatten(1).sum(1)
        assert log_det.dtype == compute
        room = scale.abs().flatten(1).sum(1)
        check(log_det, total, _allowed(compute, compute, total, room, clamp * s[0].numel(), slack), "log_det")


def check_backward(
    grad_out, grad_log_det, value, s, t, grad_x, grad_s, *, clamp, activation, inverse, from_output, slack=1
):
    """`value`, `t` and `grad_log_det` as the backward op takes them; grad_x or grad_s None when not computed."""
    compute = log_det_type(value.dtype)
    g, v, sd = grad_out.double(), value.double(), s.double()
    scale = log_scale(sd, clamp, activation)
    if inverse:
        x = v * torch.exp(scale)  # with t = 0, the input whose inverse transform is `value`
    else:
        x = (v - t.double()) * torch.exp(-scale) if from_output else v
    x, leaf = x.requires_grad_(), sd.clone().requires_grad_()
    moved = log_scale(leaf, clamp, activation)
    loss = (g * x * torch.exp(-moved if inverse else moved)).sum()
    lam = torch.zeros(len(g), dtype=F64) if grad_log_det is None else grad_log_det.double()
    loss = loss + (lam * (-moved if inverse else moved).flatten(1).sum(1)).sum()
    expected_x, expected_s = torch.autograd.grad(loss, (x, leaf))
    room = 1 + scale.abs()
    if grad_x is not None:
        check(
            grad_x,
            expected_x,
            _allowed(compute, grad_x.dtype, expected_x, expected_x.abs() * room, expected_x.abs() * clamp, slack),
            "grad_x",
        )
    if grad_s is not None:
        leaf = sd.clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_scale(leaf, clamp, activation).sum(), leaf)
        lam = lam.abs().view(-1, *[1] * (g.dim() - 1))
        inside = (
            g.abs() * (v.abs() + t.double().abs())
            if from_output
            else g.abs() * (v * torch.exp(scale * (not inverse))).abs()
        )
        moved = inside + lam
        check(
            grad_s,
            expected_s,
            _allowed(compute, grad_s.dtype, expected_s, moved * slope * room, moved * clamp, slack),
            "grad_s",
        )


def haar(image):
    """[B, C, 2R, 2W] -> [B, 4C, R, W], as a product with the 4x4 matrix of the definition."""
    a, b, c, d = (image[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    bands = [(a, b, c, d), (-a, b, -c, d), (-a, -b, c, d), (a, -b, -c, d)]
    return torch.cat([sum(band) / 2 for band in bands], dim=1)


def check_haar(image, bands):
    check(bands, haar(image.double()), _haar_allowed(image, bands, haar(image.double())), "bands")


def check_inverse_haar(bands, image):
    """The transform of what came back must be the bands again: one law instead of a second definition."""
    exact = torch.linalg.inv(_haar_matrix()) @ bands.double().unflatten(1, (4, -1)).flatten(2)
    batch, _, rows, cols = bands.shape
    pixels = exact.view(batch, 2, 2, bands.shape[1] // 4, rows, cols).permute(0, 3, 4, 1, 5, 2)
    pixels = pixels.reshape(batch, bands.shape[1] // 4, 2 * rows, 2 * cols)
    check(image, pixels, _haar_allowed(bands, image, pixels), "image")


def _haar_matrix():
    eye = torch.eye(4, dtype=F64).view(4, 1, 2, 2)
    return haar(eye).view(4, 4).T


def _haar_allowed(source, result, expected):
    largest = source.double().abs().amax() if source.numel() else torch.zeros(())
    return _allowed(log_det_type(source.dtype), result.dtype, expected, largest)
