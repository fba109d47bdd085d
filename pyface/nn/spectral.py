"""Filters of frequencies as layers: ACMF's masked-frequency augmentation, and gains by distance from frequency 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyface.ops import mask_high_frequencies, spectral_filter
from pyface.ops.reference import spectral as reference

PER = ("batch", "image", "channel")
Pair = tuple[int, int]


class MaskedFrequency(nn.Module):
    """Drops high frequencies at random pixels of training images: the masked-frequency transform of ACMF
    (arXiv:2307.11438), `x - (1 - keep) * abs(high_pass(x))`. In eval mode, or with drop_rate 0, x itself.

    Args:
        drop_rate: r, the share of pixels (of frequencies, in the domain "spectrum") that is dropped, 0..1.
        half_width: d, or a pair (d_y, d_x): the low frequencies -d..d-1 are never dropped. See
            `pyface.ops.high_pass`.
        per: one mask for the "batch" and all its channels (the authors' way), for each "image", or for each "channel".
        symmetric: keep -d..d instead.
        modulus: take the modulus of the complex high-pass instead of abs of its real part: what the authors' NumPy
            function does, which none of their stored scripts calls. It differs by up to 0.05 for images in 0..1, and
            runs as complex FFTs in plain PyTorch. The same for symmetric blocks.
        mask_domain: "image" (as above: a pixel loses all its high frequencies), or "spectrum": each frequency outside
            the block is itself dropped with probability r, together with its mirror image. That is what the paper's
            abstract can be read as; the authors' code does not do it.
        seed: of this layer's own random numbers; None takes one from torch's, so that `torch.manual_seed` decides.

    Random numbers and state: call number n draws from a new generator on the device of x, seeded with `seed` and n.
    So the masks depend on nothing else, differ between CPU and GPU, and go on where they were after a state dict is
    loaded: its entry `_extra_state` is an int64 tensor (seed, n). Give the processes of a parallel training different
    seeds. The draw breaks the graph of `torch.compile`: apply the layer before the compiled model.
    """

    def __init__(
        self,
        drop_rate: float = 0.1,
        half_width: int | Pair = 5,
        per: str = "batch",
        *,
        symmetric: bool = False,
        modulus: bool = False,
        mask_domain: str = "image",
        seed: int | None = None,
    ):
        super().__init__()
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"MaskedFrequency: drop_rate must be within 0..1, got {drop_rate}")
        if per not in PER:
            raise ValueError(f"MaskedFrequency: per must be one of {', '.join(PER)}, got {per!r}")
        if mask_domain not in ("image", "spectrum"):
            raise ValueError(f"MaskedFrequency: mask_domain must be image or spectrum, got {mask_domain!r}")
        if modulus and mask_domain == "spectrum":
            raise ValueError("MaskedFrequency: modulus belongs to mask_domain='image'; a spectrum is masked as it is")
        self.drop_rate, self.per, self.symmetric, self.modulus = drop_rate, per, symmetric, modulus
        self.half_width = (half_width, half_width) if isinstance(half_width, int) else tuple(half_width)
        self.mask_domain = mask_domain
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.draws = 0

    def extra_repr(self) -> str:
        return (
            f"drop_rate={self.drop_rate}, half_width={self.half_width}, per={self.per!r}, symmetric={self.symmetric}, "
            f"modulus={self.modulus}, mask_domain={self.mask_domain!r}"
        )

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, self.draws])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.draws = state.tolist()

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, C, H, W] (any leading dimensions for per="batch") to the same, dtype kept."""
        least = {"batch": 2, "image": 3, "channel": 3}[self.per]
        if x.dim() < least:
            raise ValueError(
                f"MaskedFrequency: per={self.per!r} needs at least {least} dimensions, got {tuple(x.shape)}"
            )
        if not self.training or not self.drop_rate:
            return x
        if self.mask_domain == "spectrum":
            return spectral_filter(x, self._spectrum(x))
        height, width = x.shape[-2:]
        keep = self._draw(x, height, width)
        if self.modulus:
            high = reference.high_pass_modulus(x, self.half_width, self.symmetric)
            return x - reference.dropped(keep, x) * high
        return mask_high_frequencies(x, keep, self.half_width, symmetric=self.symmetric)

    def _draw(self, x: Tensor, height: int, width: int) -> Tensor:
        """bool[..., height, width]: False with probability drop_rate."""
        # a step that is odd and far from any small number: neighbouring calls get unrelated seeds
        seed = (self.seed + self.draws * 0x9E3779B97F4A7C15) % 2**63
        self.draws += 1
        leading = {"batch": (), "image": (*x.shape[:-3], 1), "channel": x.shape[:-2]}[self.per]
        generator = torch.Generator(x.device).manual_seed(seed)
        return torch.rand(*leading, height, width, device=x.device, generator=generator) >= self.drop_rate

    def _spectrum(self, x: Tensor) -> Tensor:
        """The gain of the half spectrum: 1, or 0 where a frequency outside the block is dropped."""
        height, width = x.shape[-2:]
        keep = self._draw(x, height, width // 2 + 1)
        # the columns that hold both of (k_y, k_x) and (-k_y, k_x): the first half decides for both
        rows = torch.arange(height, device=x.device)
        first = torch.minimum(rows, (height - rows) % height)
        for column in {0, width // 2} if width % 2 == 0 else {0}:
            keep[..., column] = keep[..., column][..., first]
        low = reference.low_gain((height, width), self.half_width, self.symmetric)[:, : width // 2 + 1]
        return (keep | (low > 0).to(x.device)).to(torch.promote_types(x.dtype, torch.float32))


class SpectralFilter(nn.Module):
    """A gain that depends on the distance from frequency 0, applied to planes of any size with
    `pyface.ops.spectral_filter`: low-pass, high-pass or band-pass, ideal or smooth, fixed or learned.

    Args:
        low: frequencies nearer than this are stopped, in cycles per pixel (0.5 is the finest pattern); 0: none is.
        high: frequencies further than this are stopped; None: none is.
        distance: "radial", sqrt(f_y^2 + f_x^2), or "square", max(|f_y|, |f_x|).
        order: None cuts off sharply (both limits pass); n >= 1 are Butterworth's flanks of that order, with a gain of
            sqrt(1/2) at the limits.
        learnable: the gain becomes a parameter `profile`, Tensor[channels, bins], at distances from 0 to the furthest
            frequency in equal steps, linear between, which starts as the fixed filter.
        channels: 1 for all planes, or that of the images, for learnable filters.
        bins: how many gains a profile has, at least 2.

    For an ideal high-pass of a rectangle of few frequencies, `pyface.ops.high_pass` is several times faster.
    """

    def __init__(
        self,
        low: float = 0.0,
        high: float | None = None,
        *,
        distance: str = "radial",
        order: int | None = None,
        learnable: bool = False,
        channels: int = 1,
        bins: int = 33,
    ):
        super().__init__()
        if low < 0 or (high is not None and high < low):
            raise ValueError(f"SpectralFilter: expected 0 <= low <= high in cycles per pixel, got {low} and {high}")
        if distance not in ("radial", "square"):
            raise ValueError(f"SpectralFilter: distance must be radial or square, got {distance!r}")
        if order is not None and order < 1:
            raise ValueError(f"SpectralFilter: order must be None or a whole number >= 1, got {order}")
        if channels < 1 or bins < 2:
            raise ValueError(f"SpectralFilter: expected channels >= 1 and bins >= 2, got {channels} and {bins}")
        if channels > 1 and not learnable:
            raise ValueError("SpectralFilter: a fixed filter is the same for all channels; leave channels at 1")
        self.low, self.high, self.distance, self.order = low, high, distance, order
        self.furthest = 0.5 * math.sqrt(2) if distance == "radial" else 0.5
        self.register_parameter("profile", None)
        if learnable:
            gain = self._fixed(torch.linspace(0, self.furthest, bins, dtype=torch.float64)).float()
            self.profile = nn.Parameter(gain.repeat(channels, 1))

    def extra_repr(self) -> str:
        learned = "" if self.profile is None else f", learnable {tuple(self.profile.shape)}"
        return f"low={self.low}, high={self.high}, distance={self.distance!r}, order={self.order}{learned}"

    def gain(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """The gain for images of height x width: Tensor[height, width // 2 + 1], or [channels, height, width // 2 + 1]
        if it is learned. float32, or the type of the profile."""
        rows = torch.fft.fftfreq(height, dtype=torch.float64, device=device).abs()[:, None]
        columns = torch.fft.rfftfreq(width, dtype=torch.float64, device=device)
        distance = torch.hypot(rows, columns) if self.distance == "radial" else torch.maximum(rows, columns)
        if self.profile is None:
            return self._fixed(distance).float()
        last = self.profile.shape[1] - 1
        at = distance * (last / self.furthest)
        left = at.floor().long().clamp(max=last - 1)
        share = (at - left).to(self.profile.dtype)
        return self.profile[:, left] * (1 - share) + self.profile[:, left + 1] * share

    def _fixed(self, distance: Tensor) -> Tensor:
        gain = torch.ones_like(distance)
        if self.order is None:
            gain = gain * (distance >= self.low)
            return gain if self.high is None else gain * (distance <= self.high)
        if self.low:
            gain = gain / (1 + (self.low / distance) ** (2 * self.order)).sqrt()  # 1 / inf = 0 at distance 0
        if self.high is not None:
            ratio = distance / self.high if self.high else torch.where(distance > 0, math.inf, 0.0)
            gain = gain / (1 + ratio ** (2 * self.order)).sqrt()
        return gain

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[..., H, W] (Tensor[..., channels, H, W] for a profile of several channels) to the same."""
        if x.dim() < 2:
            raise ValueError(f"SpectralFilter: x must be Tensor[..., H, W], got shape {tuple(x.shape)}")
        gain = self.gain(*x.shape[-2:], device=x.device)
        return spectral_filter(x, gain[0] if gain.dim() == 3 and len(gain) == 1 else gain)
