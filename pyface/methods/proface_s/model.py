"""The network of PRO-Face S (arXiv:2307.09146): a keyed invertible hider of one face inside its obfuscated version.

Conventions: pictures are RGB in [-1, 1]; wavelet bands are orthonormal Haar, sub-band major
(``[LL_R, LL_G, LL_B, HL_R, ..., HH_B]``); key maps hold only -1 and +1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pyface.errors import UserError
from pyface.ops import affine_coupling, dense_block, haar_dwt2d, haar_idwt2d

BAND_CHANNELS = 12  # three colours times four Haar bands
KEY_CHANNELS = 4
SLOPE = 0.01


def _dense_forward(parts: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Run the five convolutions over one growing buffer; returns (output, buffer)."""
    *inner, (last_weight, last_bias) = zip(weights[0::2], weights[1::2], strict=True)
    batch, _, height, width = parts[0].shape
    buffer = torch.empty(
        (batch, last_weight.shape[1], height, width),
        dtype=last_weight.dtype,
        device=last_weight.device,
        memory_format=torch.channels_last,
    )
    filled = 0
    for part in parts:
        buffer[:, filled : filled + part.shape[1]] = part
        filled += part.shape[1]
    for weight, bias in inner:
        feature = F.conv2d(buffer[:, :filled], weight, bias, padding=1)
        torch.nn.functional.leaky_relu_(feature, SLOPE)
        buffer[:, filled : filled + feature.shape[1]] = feature
        filled += feature.shape[1]
    return F.conv2d(buffer, last_weight, last_bias, padding=1), buffer


class _DenseFunction(torch.autograd.Function):
    """The dense sub-net with a memory plan: one buffer is saved instead of a concatenation per layer."""

    @staticmethod
    def forward(ctx, stream: Tensor, key: Tensor, *weights: Tensor) -> Tensor:
        out, buffer = _dense_forward((stream, key), weights)
        ctx.save_for_backward(buffer, *weights)
        ctx.input_channels = stream.shape[1], key.shape[1]
        ctx.input_dtypes = stream.dtype, key.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        buffer, *weights = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(weights)
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        grad_buffer: Tensor | None = None
        for layer in reversed(range(len(weights) // 2)):
            weight = weights[2 * layer]
            inputs = weight.shape[1]
            if grad_buffer is not None:
                # f > 0 exactly where its pre-activation was > 0, so the stored output is all the derivative needs.
                here = slice(inputs, inputs + weight.shape[0])
                grad_out = torch.ops.aten.leaky_relu_backward(
                    grad_buffer[:, here].contiguous(memory_format=torch.channels_last),
                    buffer[:, here].contiguous(memory_format=torch.channels_last),
                    SLOPE,
                    True,
                )
            wanted = [True, *ctx.needs_input_grad[2 + 2 * layer : 4 + 2 * layer]]
            grad_in, grads[2 * layer], grads[2 * layer + 1] = torch.ops.aten.convolution_backward(
                grad_out, buffer[:, :inputs], weight, [weight.shape[0]],
                [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted,
            )  # fmt: skip
            if grad_buffer is None:
                grad_buffer = grad_in
            else:
                grad_buffer[:, :inputs] += grad_in
        stream_channels, key_channels = ctx.input_channels
        grad_stream = grad_buffer[:, :stream_channels].to(ctx.input_dtypes[0])
        grad_key = None
        if ctx.needs_input_grad[1]:
            grad_key = grad_buffer[:, stream_channels : stream_channels + key_channels].to(ctx.input_dtypes[1])
        return grad_stream, grad_key, *grads


class DenseSubnet(nn.Module):
    """Dense block of five 3x3 convolutions, ``[stream; key]`` -> ``out_channels`` (omega, phi, rho, eta of the paper).

    LeakyReLU(0.01) after the first four convolutions, none after the fifth; no normalisation, no residual.
    Every layer reads all earlier features; they live in one buffer of ``in + 4 * growth`` channels, channels last.

    Args:
        in_channels: channels of the stream plus channels of the key.
        out_channels: channels of the result.
        growth: channels added by each of the first four convolutions.
    """

    def __init__(
        self, in_channels: int = BAND_CHANNELS + KEY_CHANNELS, out_channels: int = BAND_CHANNELS, growth: int = 32
    ) -> None:
        super().__init__()
        for layer in range(4):
            self.add_module(f"conv{layer + 1}", nn.Conv2d(in_channels + layer * growth, growth, 3, padding=1))
        self.conv5 = nn.Conv2d(in_channels + 4 * growth, out_channels, 3, padding=1)

    def forward(self, stream: Tensor, key: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Tensor[B, C, h, w], Tensor[B or 1, K, h, w] -> Tensor[B, out, h, w] in ``dtype`` (or stream's)."""
        dtype = dtype or stream.dtype
        inference = not torch.is_grad_enabled() or not any(t.requires_grad for t in (stream, key, *self.parameters()))
        if inference and stream.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
            convs = list(self.children())
            return dense_block(
                (stream, key), [c.weight for c in convs], [c.bias for c in convs],
                negative_slope=SLOPE, compute_dtype=dtype,
            )  # fmt: skip
        weights = tuple(
            p.to(dtype, memory_format=torch.channels_last) if p.ndim == 4 else p.to(dtype)
            for conv in self.children()
            for p in (conv.weight, conv.bias)
        )
        inputs = (stream, key.expand(stream.shape[0], -1, -1, -1), *weights)
        # Autocast would choose other dtypes in protecting than in recovering; `dtype` alone decides.
        with torch.autocast(stream.device.type, enabled=False):
            return _dense_forward(inputs[:2], weights)[0] if inference else _DenseFunction.apply(*inputs)


class SecureCouplingBlock(nn.Module):
    """Secure affine coupling block (the paper's SACB): Y changes first, driven by X; then X, driven by the new Y."""

    def __init__(self, growth: int = 32, clamp: float = 2.0) -> None:
        super().__init__()
        self.clamp = clamp
        for name in ("omega", "phi", "rho", "eta"):
            self.add_module(name, DenseSubnet(growth=growth))

    def forward(
        self, x: Tensor, y: Tensor, key: Tensor, dtype: torch.dtype | None = None, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x and y Tensor[B, 12, h, w], key Tensor[B or 1, 4, h, w] -> both streams after (or before) the block."""
        c = self.clamp
        if inverse:
            x = affine_coupling(x, self.rho(y, key, dtype), self.eta(y, key, dtype), clamp=c, inverse=True)
            y = affine_coupling(y, self.omega(x, key, dtype), self.phi(x, key, dtype), clamp=c, inverse=True)
        else:
            y = affine_coupling(y, self.omega(x, key, dtype), self.phi(x, key, dtype), clamp=c)
            x = affine_coupling(x, self.rho(y, key, dtype), self.eta(y, key, dtype), clamp=c)
        return x, y


class ProFaceS(nn.Module):
    """PRO-Face S: hides a face in its obfuscated version under a key map, and restores it with the same network.

    Any even height and width of at least 2 is accepted; quality is measured at 128 to 400 pixels.

    Args:
        blocks: number of coupling blocks (released: 3, which gives 1,073,040 parameters).
        growth: growth of the dense sub-nets.
        clamp: bound c of the log gain, ``alpha(s) = exp(c * tanh(s / 2))``.
        recovery_input: what stands in for the discarded half at recovery: ``"key"`` repeats the key bands three
            times (released), ``"noise"`` draws standard normal numbers (HiNet's way; an ablation).
        subnet_dtype: dtype in which the sub-nets compute, e.g. ``torch.bfloat16``; None is that of the stream.
            Protection and recovery must use the same one. It may be changed on the instance at any time.

    The coupled streams are never narrower than float32, because inverting multiplies their rounding errors.
    """

    def __init__(
        self,
        blocks: int = 3,
        growth: int = 32,
        clamp: float = 2.0,
        recovery_input: str = "key",
        subnet_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if blocks < 1 or growth < 1 or not clamp > 0:
            raise UserError(f"ProFaceS: blocks and growth must be >= 1 and clamp > 0, got {blocks}, {growth}, {clamp}")
        if recovery_input not in ("key", "noise"):
            raise UserError(f"ProFaceS: recovery_input must be 'key' or 'noise', got {recovery_input!r}")
        self.recovery_input = recovery_input
        self.subnet_dtype = subnet_dtype
        self.blocks = nn.ModuleList(SecureCouplingBlock(growth, clamp) for _ in range(blocks))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.01) -> None:
        """Draw all parameters from ``std * N(0, 1)``, then zero each conv5: the network starts as the identity."""
        for subnet in (m for m in self.modules() if isinstance(m, DenseSubnet)):
            for parameter in subnet.parameters():
                nn.init.normal_(parameter, std=std)
            nn.init.zeros_(subnet.conv5.weight)
            nn.init.zeros_(subnet.conv5.bias)

    def protect(
        self, image: Tensor, obfuscated: Tensor, key_map: Tensor, *, return_by_product: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hide ``image`` in ``obfuscated``.

        Args:
            image: Tensor[B, 3, H, W] in [-1, 1], H and W even.
            obfuscated: Tensor[B, 3, H, W] in [-1, 1], what the result should look like.
            key_map: Tensor[B or 1, 1, H, W] of -1 and +1.
            return_by_product: also return the other half of the output. It undoes the hiding exactly:
                never store or log it.

        Returns:
            The protected picture, Tensor[B, 3, H, W], **not** clamped to [-1, 1]; with ``return_by_product`` the pair
            (protected, by-product Tensor[B, 12, H/2, W/2]).

        Raises:
            UserError: a shape is wrong, a size is odd, or a tensor is not floating point.
        """
        _check_picture("protect", "image", image)
        _check_picture("protect", "obfuscated", obfuscated)
        if image.shape != obfuscated.shape:
            raise UserError(
                f"ProFaceS.protect: image and obfuscated must have the same shape, "
                f"got {tuple(image.shape)} and {tuple(obfuscated.shape)}"
            )
        _check_key("protect", key_map, image)
        x, y, key = haar_dwt2d(_wide(image)), haar_dwt2d(_wide(obfuscated)), haar_dwt2d(key_map.to(_wide(image).dtype))
        for block in self.blocks:
            x, y = block(x, y, key, self.subnet_dtype)
        protected = haar_idwt2d(y)
        return (protected, x) if return_by_product else protected

    def recover(self, protected: Tensor, key_map: Tensor, *, by_product: Tensor | None = None) -> Tensor:
        """Restore the picture hidden in ``protected``.

        Args:
            protected: Tensor[B, 3, H, W], as returned by :meth:`protect` or read back from a file.
            key_map: Tensor[B or 1, 1, H, W] of -1 and +1, the map used for protecting. Another map gives noise.
            by_product: Tensor[B, 12, H/2, W/2] from :meth:`protect`. When given, recovery is the exact inverse.

        Returns:
            The recovered picture, Tensor[B, 3, H, W], not clamped.

        Raises:
            UserError: a shape is wrong, a size is odd, or a tensor is not floating point.
        """
        _check_picture("recover", "protected", protected)
        _check_key("recover", key_map, protected)
        y = haar_dwt2d(_wide(protected))
        key = haar_dwt2d(key_map.to(y.dtype))
        if by_product is not None:
            if by_product.shape != y.shape:
                raise UserError(
                    f"ProFaceS.recover: by_product must be Tensor{list(y.shape)}, got {tuple(by_product.shape)}"
                )
            x = by_product.to(y.dtype)
        elif self.recovery_input == "noise":
            x = torch.randn_like(y)
        else:
            x = key.repeat(1, BAND_CHANNELS // KEY_CHANNELS, 1, 1).expand_as(y)
        for block in reversed(self.blocks):
            x, y = block(x, y, key, self.subnet_dtype, inverse=True)
        return haar_idwt2d(x)

    def forward(self, image: Tensor, obfuscated: Tensor, key_map: Tensor) -> Tensor:
        """Same as :meth:`protect`."""
        return self.protect(image, obfuscated, key_map)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_picture(function: str, name: str, x: Tensor) -> None:
    where = f"ProFaceS.{function}: {name}"
    if x.ndim != 4 or x.shape[1] != 3:
        raise UserError(f"{where} must be Tensor[B, 3, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"{where} must be floating point in [-1, 1], got {x.dtype}; map bytes by x / 127.5 - 1")
    if x.shape[0] == 0 or x.shape[2] == 0 or x.shape[3] == 0 or x.shape[2] % 2 or x.shape[3] % 2:
        raise UserError(f"{where} must not be empty, with even height and width, got shape {tuple(x.shape)}; pad it")


def _check_key(function: str, key_map: Tensor, picture: Tensor) -> None:
    batch, _, height, width = picture.shape
    if key_map.ndim != 4 or key_map.shape[0] not in (1, batch) or key_map.shape[1:] != (1, height, width):
        raise UserError(
            f"ProFaceS.{function}: key_map must be Tensor[{batch} or 1, 1, {height}, {width}] of -1 and +1, "
            f"got shape {tuple(key_map.shape)}"
        )
