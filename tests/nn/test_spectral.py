"""Layers of frequencies: the masked-frequency augmentation and its own random numbers, and gains by distance."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from pyface.nn import MaskedFrequency, SpectralFilter
from pyface.ops import high_pass, mask_high_frequencies

F64 = torch.float64


def acmf(x: Tensor, keep: Tensor, d: int, *, modulus: bool) -> Tensor:
    """The published transform image by image and channel by channel, with shifts and a slice, as its code has it."""
    out = torch.empty_like(x)
    height, width = x.shape[-2:]
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            spectrum = torch.fft.fftshift(torch.fft.fft2(x[b, c]))
            spectrum[height // 2 - d : height // 2 + d, width // 2 - d : width // 2 + d] = 0
            back = torch.fft.ifft2(torch.fft.ifftshift(spectrum))
            high = back.abs() if modulus else back.real.abs()
            out[b, c] = keep * high + (x[b, c] - high)
    return out


def drawn(layer: MaskedFrequency, x: Tensor) -> Tensor:
    """The mask of the layer's next call, found from what an image of one high frequency loses."""
    probe = copy.deepcopy(layer)
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
    checks = torch.where((rows + columns) % 2 == 0, 1.0, -1.0).to(x)
    return probe(checks.expand_as(x)) == checks


@pytest.mark.parametrize("modulus", [False, True], ids=["real part", "modulus"])
def test_is_the_published_transform(modulus):
    layer = MaskedFrequency(0.3, 3, modulus=modulus)
    x = torch.rand(2, 3, 24, 20, dtype=F64)
    keep = drawn(layer, x)
    assert (keep == keep[0, 0]).all()  # one mask for all
    torch.testing.assert_close(layer(x), acmf(x, keep[0, 0], 3, modulus=modulus), rtol=0, atol=1e-12)
    if modulus:
        other = mask_high_frequencies(x, keep[0, 0], 3)
        assert (acmf(x, keep[0, 0], 3, modulus=True) - other).abs().max() > 1e-3
        layer = MaskedFrequency(0.3, 3, symmetric=True, modulus=True, seed=1)
        same = MaskedFrequency(0.3, 3, symmetric=True, seed=1)
        torch.testing.assert_close(layer(x), same(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("per", ["batch", "image", "channel"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masks_have_the_rate_and_are_shared_as_told(per, rate):
    layer = MaskedFrequency(rate, 2, per)
    x = torch.zeros(4, 3, 96, 96)
    keep = drawn(layer, x)
    assert abs((~keep).double().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / (keep.numel() / 12))
    images = {bytes(m) for m in keep[:, 0].flatten(1).numpy()}
    channels = {bytes(m) for m in keep[0].flatten(1).numpy()}
    assert (len(images), len(channels)) == {"batch": (1, 1), "image": (4, 1), "channel": (4, 3)}[per]
    flat = (~keep[0, 0]).double() - rate
    for other in (flat.roll(1, 0), flat.roll(1, 1)):
        assert abs((flat * other).mean()) < 0.05 * rate  # neighbours do not know of each other
    layer(x)
    assert not torch.equal(drawn(layer, x), keep)  # the next call draws anew


def test_eval_mode_and_rate_0_give_x_itself_and_draw_nothing():
    x = torch.rand(2, 3, 8, 8)
    for layer in (MaskedFrequency().eval(), MaskedFrequency(0.0)):
        assert layer(x) is x
        assert layer.draws == 0
    everything = MaskedFrequency(1.0, 2)
    torch.testing.assert_close(everything(x), x - high_pass(x, 2).abs())


def test_random_numbers_are_its_own_and_their_state_is_kept():
    x = torch.rand(2, 3, 16, 16)
    torch.manual_seed(3)
    first = MaskedFrequency(0.5)
    torch.manual_seed(3)
    second = MaskedFrequency(0.5)
    before = torch.random.get_rng_state()
    a = [first(x) for _ in range(3)]
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's numbers are left alone
    torch.rand(100)
    assert all(torch.equal(second(x), y) for y in a)
    state = {name: t.clone() for name, t in first.state_dict().items()}
    following = [first(x) for _ in range(2)]
    resumed = MaskedFrequency(0.5)
    assert not torch.equal(resumed(x), following[0])
    resumed.load_state_dict(state)
    assert all(torch.equal(resumed(x), y) for y in following)
    assert not torch.equal(MaskedFrequency(0.5, seed=1)(x), MaskedFrequency(0.5, seed=2)(x))


def test_gradients_pass_through():
    layer = MaskedFrequency(0.3, 2)
    x = torch.rand(2, 3, 12, 13, dtype=F64, requires_grad=True)
    keep = drawn(layer, x.detach())[0, 0]
    expected = torch.autograd.grad(acmf(x, keep, 2, modulus=False).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], expected)


@pytest.mark.parametrize("size", [(16, 18), (15, 17), (8, 9)])
def test_spectra_lose_whole_frequencies(size):
    layer = MaskedFrequency(0.4, (2, 3), "channel", mask_domain="spectrum")
    x = torch.randn(3, 2, *size, dtype=F64)
    y = layer(x)
    ratio = torch.fft.fft2(y) / torch.fft.fft2(x)
    dropped = ratio.abs() < 1e-9
    assert torch.equal(dropped, (ratio - 1).abs() > 1e-9)  # each frequency is there or is not
    share = dropped.double().mean()
    assert 0.1 < share < 0.6
    rows = torch.fft.fftfreq(size[0], 1 / size[0]).abs().round() <= 2
    columns = torch.fft.fftfreq(size[1], 1 / size[1]).abs().round() <= 3
    low = rows[:, None] & columns
    low[-2, 3] = low[2, -3] = False  # ACMF's block holds neither of its corners (-d, d) and (d, -d)
    assert not dropped[..., low].any()
    assert torch.equal(dropped, dropped.flip((-2, -1)).roll((1, 1), (-2, -1)))
    assert not torch.equal(dropped[0, 0], dropped[0, 1])


def test_errors_of_the_augmentation():
    for message, args, options in [
        ("drop_rate must be within", (1.5,), {}),
        ("per must be one of batch, image, channel", (), {"per": "pixel"}),
        ("mask_domain must be image or spectrum", (), {"mask_domain": "time"}),
        ("modulus belongs to", (), {"mask_domain": "spectrum", "modulus": True}),
    ]:
        with pytest.raises(ValueError, match=message):
            MaskedFrequency(*args, **options)
    with pytest.raises(ValueError, match="needs at least 3 dimensions"):
        MaskedFrequency(per="image")(torch.rand(8, 8))
    assert "drop_rate=0.1, half_width=(5, 5), per='batch'" in repr(MaskedFrequency())


# ---- gains by distance ----------------------------------------------------------------------------------------------


def response(layer: SpectralFilter, size: tuple[int, int]) -> Tensor:
    """The gain that the layer really has, from what it makes of a single bright pixel."""
    impulse = torch.zeros(1, 1, *size, dtype=F64)
    impulse[..., 0, 0] = 1
    return torch.fft.fft2(layer(impulse))[0, 0]


def distances(size, distance):
    y, x = torch.fft.fftfreq(size[0], dtype=F64)[:, None], torch.fft.fftfreq(size[1], dtype=F64)
    return torch.hypot(y, x) if distance == "radial" else torch.maximum(y.abs(), x.abs().expand(size))


@pytest.mark.parametrize("distance", ["radial", "square"])
@pytest.mark.parametrize("size", [(32, 32), (15, 24), (9, 7)])
def test_fixed_filters(size, distance):
    far = distances(size, distance)
    for low, high in ((0.0, 0.21), (0.13, None), (0.13, 0.31), (0.0, None)):
        expected = ((far >= low) & (far <= (9 if high is None else high))).to(F64)
        got = response(SpectralFilter(low, high, distance=distance), size)
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=1e-6)
        got = response(SpectralFilter(low, high, distance=distance, order=2), size).real
        expected = torch.ones(size, dtype=F64)
        if low:
            expected = expected * far**2 / (far**4 + low**4).sqrt()
        if high:
            expected = expected * high**2 / (far**4 + high**4).sqrt()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_learned_profile_starts_as_the_fixed_filter_and_learns():
    fixed = SpectralFilter(0.1, 0.3, order=3)
    learned = SpectralFilter(0.1, 0.3, order=3, learnable=True, channels=2, bins=400)
    for size in ((32, 32), (15, 24)):  # of any size
        torch.testing.assert_close(learned.gain(*size)[1], fixed.gain(*size), rtol=0, atol=1e-3)
    assert list(learned.state_dict()) == ["profile"]
    layer = SpectralFilter(learnable=True, channels=2, bins=9)
    x = torch.randn(16, 2, 12, 12)
    target = torch.stack([x[:, 0] * 0.5, SpectralFilter(high=0.3, order=1)(x[:, 1])], 1)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    torch.testing.assert_close(layer.profile[0, :8], torch.full((8,), 0.5), rtol=0, atol=0.05)
    one = SpectralFilter(learnable=True, bins=3)
    torch.testing.assert_close(one(x), x, rtol=0, atol=1e-5)
    one(x[0, 0]).sum().backward()
    assert one.profile.grad is not None
    assert "learnable (1, 3)" in repr(one)


def test_errors_of_the_filter():
    for message, args, options in [
        ("0 <= low <= high", (0.3, 0.1), {}),
        ("0 <= low <= high", (-0.3,), {}),
        ("distance must be radial or square", (), {"distance": "round"}),
        ("order must be None or", (), {"order": 0}),
        ("channels >= 1 and bins >= 2", (), {"learnable": True, "bins": 1}),
        ("the same for all channels", (), {"channels": 3}),
    ]:
        with pytest.raises(ValueError, match=message):
            SpectralFilter(*args, **options)
    with pytest.raises(ValueError, match=r"x must be Tensor\[..., H, W\]"):
        SpectralFilter()(torch.rand(4))
