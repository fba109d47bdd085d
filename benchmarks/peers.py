"""What a user would take today instead of pyface. The tests check each one against `pyface.ops.reference`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLAMP = 2.0
SLOPE = 0.01  # of LeakyReLU in the dense sub-nets
KEY_CHANNELS = 4

# ---- torch.compile and FrEIA, where they are -------------------------------------------------------------------------


@functools.cache
def compiled(function: Callable) -> Callable:
    """`torch.compile` of a function, with room for all shapes, gradient modes and numbers of threads of a benchmark."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False)


def why_no_freia() -> str:
    """Empty if FrEIA can be used."""
    try:
        import FrEIA.modules  # noqa: F401
    except Exception as error:  # whatever a foreign package does at import
        return f"FrEIA does not load (pip install FrEIA): {error}"
    return ""


# ---- affine coupling -------------------------------------------------------------------------------------------------


def hinet_coupling(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The coupling as HiNet and PRO-Face S compute it; no log-determinant."""
    return x * torch.exp(CLAMP * 2 * (torch.sigmoid(s) - 0.5)) + t


def hinet_uncoupling(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Its inverse, with HiNet's division."""
    return (y - t) / torch.exp(CLAMP * 2 * (torch.sigmoid(s) - 0.5))


def coupling_with_log_det(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """FrEIA's maths as a plain function of tensors, which is what `torch.compile` gets."""
    log_scale = CLAMP * (2.0 * (torch.sigmoid(s) - 0.5))
    return torch.exp(log_scale) * x + t, log_scale.sum(tuple(range(1, x.ndim)))


def uncoupling_with_log_det(y: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Its inverse."""
    log_scale = CLAMP * (2.0 * (torch.sigmoid(s) - 0.5))
    return (y - t) * torch.exp(-log_scale), -log_scale.sum(tuple(range(1, y.ndim)))


class Given(nn.Module):
    """A sub-net that costs nothing: it returns a tensor it was given."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def freia_block(x: Tensor, s: Tensor, t: Tensor) -> nn.Module:
    """FrEIA's RealNVP block for a tensor of twice x's channels, with sub-nets that return s and t."""
    import FrEIA.modules

    shape = (2 * x.shape[1], *x.shape[2:])
    block = FrEIA.modules.RNVPCouplingBlock(
        [shape], subnet_constructor=lambda _in, _out: nn.Identity(), clamp=CLAMP, clamp_activation="SIGMOID"
    )
    block.subnet_s1, block.subnet_s2 = Given(s), Given(s)
    block.subnet_t1, block.subnet_t2 = Given(t), Given(t)
    return block


def freia_coupling(x: Tensor, s: Tensor, t: Tensor, inverse: bool = False) -> Callable[[], tuple[Tensor, Tensor]]:
    """FrEIA's own code for one coupling with log-determinant, on given s and t."""
    block = freia_block(x, s, t)
    return lambda: block._coupling1(x, x, rev=inverse)


# ---- Haar wavelet ----------------------------------------------------------------------------------------------------


def hinet_dwt(x: Tensor) -> Tensor:
    """HiNet's transform: strided halves of the rows, then of the columns, three sums per band, and a concatenation."""
    even, odd = x[:, :, 0::2] / 2, x[:, :, 1::2] / 2
    a, b, c, d = even[..., 0::2], even[..., 1::2], odd[..., 0::2], odd[..., 1::2]
    return torch.cat((a + b + c + d, b - a + d - c, c - a + d - b, a - b - c + d), 1)


def hinet_idwt(bands: Tensor) -> Tensor:
    """Its inverse: a tensor of zeros and four strided writes."""
    batch, channels, height, width = bands.shape
    ll, hl, lh, hh = (band / 2 for band in bands.split(channels // 4, 1))
    out = torch.zeros(batch, channels // 4, 2 * height, 2 * width, dtype=bands.dtype, device=bands.device)
    out[:, :, 0::2, 0::2] = ll - hl - lh + hh
    out[:, :, 0::2, 1::2] = ll + hl - lh - hh
    out[:, :, 1::2, 0::2] = ll - hl + lh - hh
    out[:, :, 1::2, 1::2] = ll + hl + lh + hh
    return out


def haar_weights(channels: int, device: str) -> Tensor:
    """Tensor[4C, C, 2, 2]: the transform as a dense convolution of stride 2."""
    kernels = (
        torch.tensor([[[1, 1], [1, 1]], [[-1, 1], [-1, 1]], [[-1, -1], [1, 1]], [[1, -1], [-1, 1]]], device=device) / 2
    )
    weights = torch.zeros(4, channels, channels, 2, 2, device=device)
    for channel in range(channels):
        weights[:, channel, channel] = kernels
    return weights.flatten(0, 1)


def conv_dwt(x: Tensor, weights: Tensor) -> Tensor:
    return F.conv2d(x, weights, stride=2)


def conv_idwt(bands: Tensor, weights: Tensor) -> Tensor:
    return F.conv_transpose2d(bands, weights, stride=2)


def freia_haar(channels: int, height: int, width: int, device: str, by_band: bool, inverse: bool = False) -> Callable:
    """FrEIA's HaarDownsampling (HL and LH negated against HiNet's).

    Its inverse multiplies its input in place in the default order. Called again and again that would end in denormal
    numbers, so the inverse is built with the factor 1 (`rebalance=0.5`): the same work, twice the values.
    """
    import FrEIA.modules

    module = FrEIA.modules.HaarDownsampling(
        [(channels, height, width)], order_by_wavelet=by_band, rebalance=0.5 if inverse else 1.0
    ).to(device)
    return lambda x: module((x,), rev=inverse)[0][0]


# ---- deformable convolution ------------------------------------------------------------------------------------------


def why_no(module: str, package: str) -> str:
    """Empty if a module can be used."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a foreign package does at import
        return f"{package} does not load (pip install {package}): {error}"
    return ""


def onnx_deform_conv(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, threads: int
) -> Callable[[], Tensor]:
    """The standard operator (opset 19) in ONNX Runtime: 3 x 3, padding 1, weights in the model."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    inputs = {"x": x, "offset": offset, "mask": mask}
    node = helper.make_node(
        "DeformConv",
        ["x", "weight", "offset", "bias", "mask"],
        ["y"],
        kernel_shape=[3, 3],
        pads=[1] * 4,
        offset_group=offset.shape[1] // 18,
    )
    graph = helper.make_graph(
        [node],
        "deform_conv",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(t.shape)) for name, t in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(t.numpy(), name) for name, t in (("weight", weight), ("bias", bias))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Between two calls its threads would turn on the cores that the next peer needs; within a call they may.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: t.numpy() for name, t in inputs.items()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_deform_conv(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, threads: int
) -> Callable[[], Tensor]:
    """OpenVINO's operator in float32: 3 x 3, padding 1, weights in the model. It has no bias."""
    import openvino
    from openvino import opset8

    parameters = [opset8.parameter(list(t.shape), np.float32) for t in (x, offset, mask)]
    node = opset8.deformable_convolution(
        parameters[0], parameters[1], opset8.constant(weight.numpy()), [1, 1], [1, 1], [1, 1], [1, 1],
        mask=parameters[2], deformable_group=offset.shape[1] // 18, bilinear_interpolation_pad=True,
    )  # fmt: skip
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", hints).create_infer_request()
    feed = [t.numpy() for t in (x, offset, mask)]
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])


# ---- PRO-Face S ------------------------------------------------------------------------------------------------------


class CatSubnet(nn.Module):
    """Dense block of five convolutions as HiNet writes it: the growing input is concatenated anew for every layer."""

    def __init__(self, in_channels: int = 16, out_channels: int = 12, growth: int = 32):
        super().__init__()
        for layer in range(4):
            self.add_module(f"conv{layer + 1}", nn.Conv2d(in_channels + layer * growth, growth, 3, padding=1))
        self.conv5 = nn.Conv2d(in_channels + 4 * growth, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        f1 = F.leaky_relu(self.conv1(x), SLOPE)
        f2 = F.leaky_relu(self.conv2(torch.cat((x, f1), 1)), SLOPE)
        f3 = F.leaky_relu(self.conv3(torch.cat((x, f1, f2), 1)), SLOPE)
        f4 = F.leaky_relu(self.conv4(torch.cat((x, f1, f2, f3), 1)), SLOPE)
        return self.conv5(torch.cat((x, f1, f2, f3, f4), 1))


class CatProFaceS(nn.Module):
    """PRO-Face S in plain PyTorch: `torch.cat` everywhere, HiNet's wavelet and coupling. Takes `ProFaceS`'s state dict.

    Inputs and results as `ProFaceS.protect` and `.recover` without by-product. The bands are brought into
    `memory_format` once; cat and convolution keep it.
    """

    def __init__(self, blocks: int = 3, memory_format: torch.memory_format = torch.contiguous_format):
        super().__init__()
        self.memory_format = memory_format
        names = ("omega", "phi", "rho", "eta")
        self.blocks = nn.ModuleList(nn.ModuleDict({name: CatSubnet() for name in names}) for _ in range(blocks))

    def _bands(self, picture: Tensor) -> Tensor:
        return hinet_dwt(picture).contiguous(memory_format=self.memory_format)

    def protect(self, image: Tensor, obfuscated: Tensor, key_map: Tensor) -> Tensor:
        x, y, key = self._bands(image), self._bands(obfuscated), self._bands(key_map)
        for block in self.blocks:
            seen = torch.cat((x, key), 1)
            y = hinet_coupling(y, block["omega"](seen), block["phi"](seen))
            seen = torch.cat((y, key), 1)
            x = hinet_coupling(x, block["rho"](seen), block["eta"](seen))
        return hinet_idwt(y)

    def recover(self, protected: Tensor, key_map: Tensor) -> Tensor:
        y, key = self._bands(protected), self._bands(key_map)
        x = torch.cat((key, key, key), 1)
        for block in reversed(self.blocks):
            seen = torch.cat((y, key), 1)
            x = hinet_uncoupling(x, block["rho"](seen), block["eta"](seen))
            seen = torch.cat((x, key), 1)
            y = hinet_uncoupling(y, block["omega"](seen), block["phi"](seen))
        return hinet_idwt(x)


def bare_convolutions(
    subnets: Sequence[nn.Module], batch: int, height: int, width: int, dtype: torch.dtype, device: str
) -> Callable[[], None]:
    """The convolutions of dense sub-nets and nothing else: channels last, nothing concatenated."""
    layers = []
    for subnet in subnets:
        for conv in (subnet.conv1, subnet.conv2, subnet.conv3, subnet.conv4, subnet.conv5):
            weight = conv.weight.detach().to(device, dtype).contiguous(memory_format=torch.channels_last)
            layers.append((weight, conv.bias.detach().to(device, dtype)))
    inputs = {
        weight.shape[1]: torch.randn(batch, weight.shape[1], height, width, device=device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for weight, _ in layers
    }

    def run() -> None:
        for weight, bias in layers:
            F.conv2d(inputs[weight.shape[1]], weight, bias, padding=1)

    return run


def flops(subnets: Sequence[nn.Module], batch: int, height: int, width: int) -> float:
    """Floating-point operations of the convolutions of sub-nets, a multiplication and an addition counted as two."""
    weights = [conv.weight for subnet in subnets for conv in subnet.children()]
    return 2.0 * batch * height * width * sum(weight.numel() for weight in weights)


# ---- attention with extra rows ---------------------------------------------------------------------------------------
# query Tensor[B, H, L, E], key and value Tensor[B, H, S, E], extra rows Tensor[H, R, E].


def causal_mask(queries: int, keys: int, rows: int, like: Tensor, pad: int = 0) -> Tensor:
    """Additive Tensor[L, R + S + pad]: rows seen by all, keys lower right aligned, and hidden padding."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    visible = F.pad(F.pad(visible, (rows, 0), value=True), (0, pad), value=False)
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill(~visible, -torch.inf)


def cat_rows(rows: Tensor, t: Tensor, pad: int = 0) -> Tensor:
    """Rows in front of keys or values, and zeros behind them."""
    parts = [rows.expand(len(t), -1, -1, -1), t]
    return torch.cat(parts + ([t.new_zeros(*t.shape[:2], pad, t.shape[3])] if pad else []), 2)


def cat_attention(query, key, value, extra_key, extra_value, mask: Tensor | None, pad: int = 0) -> Tensor:
    """`torch.cat` and SDPA. The mask is made beforehand."""
    key, value = cat_rows(extra_key, key, pad), cat_rows(extra_value, value, pad)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def trick_attention(query, key, value, extra_key, extra_value) -> Tensor:
    """R queries too many in front, so that torch's `is_causal`, upper left aligned, hides the right keys (L = S)."""
    rows = extra_key.shape[1]
    query = torch.cat((query.new_zeros(*query.shape[:2], rows, query.shape[3]), query), 2)
    key, value = cat_rows(extra_key, key), cat_rows(extra_value, value)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)[:, :, rows:]


def softmax_attention(query, key, value, extra_key, extra_value, mask: Tensor | None) -> Tensor:
    """Two matrix products around a softmax."""
    key, value = cat_rows(extra_key, key), cat_rows(extra_value, value)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ value


def flex_attention(query, key, value, extra_key, extra_value, is_causal: bool) -> Callable[[], Tensor]:
    """torch's FlexAttention after a cat, compiled, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    rows, queries, keys = extra_key.shape[1], query.shape[2], key.shape[2]

    def visible(b, h, i, j):
        return j <= i + rows + keys - queries

    # Rows come first: with their number added, the one comparison shows them to every query (S >= L).
    mask = create_block_mask(visible, None, None, queries, rows + keys, device=query.device) if is_causal else None
    fast = compiled(flex)
    return lambda: fast(query, cat_rows(extra_key, key), cat_rows(extra_value, value), block_mask=mask)


def prior_of_all_keys(centre: Tensor, sharpness: Tensor, keys: int, grid_width: int, smooth: float) -> Tensor:
    """Tensor[B, H, L, S], as SeqFakeFormer's and SMCA-DETR's users compute it: distances first."""
    place = torch.arange(keys, device=centre.device)
    grid = torch.stack((place % grid_width, place // grid_width), -1).to(centre.dtype)
    return -((centre.unsqueeze(-2) - grid).square() * sharpness.unsqueeze(-2)).sum(-1) / smooth


def softmax_prior_attention(query, key, value, centre, sharpness, grid_width: int, smooth: float) -> Tensor:
    """Scores, prior and weights as tensors."""
    prior = prior_of_all_keys(centre, sharpness, key.shape[2], grid_width, smooth)
    return torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + prior, -1) @ value


def sdpa_prior_attention(query, key, value, centre, sharpness, grid_width: int, smooth: float) -> Tensor:
    """The prior as SDPA's additive mask."""
    prior = prior_of_all_keys(centre, sharpness, key.shape[2], grid_width, smooth)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=prior)
