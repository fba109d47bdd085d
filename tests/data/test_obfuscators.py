import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from pyface.data import obfuscators as ob
from pyface.errors import UserError

NAMES = ("blur", "pixelate", "median")


def picture(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (5, 3), (25, 25), (64, 31)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_keeps_shape_range_and_dtype(name, size):
    for dtype in (torch.float32, torch.float64):
        image = picture(*size, batch=2).to(dtype)
        hidden = ob.obfuscate(image, name)
        assert hidden.shape == image.shape
        assert hidden.dtype == dtype
        assert hidden.abs().max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_picture_stays_as_it_is(name):
    image = torch.tensor([-1.0, 0.2, 1.0]).view(1, 3, 1, 1).expand(1, 3, 40, 56)
    torch.testing.assert_close(ob.obfuscate(image, name), image, atol=0.5 / 127.5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_detail_is_gone(name):
    image = picture(128, 128)
    assert ob.obfuscate(image, name).std() < 0.25 * image.std()


@pytest.mark.parametrize("sigma", [0.7, 2.0, 11.3])
def test_blur_is_scipys_gaussian(sigma):
    image = picture(33, 20)
    reach = (0, 0, *[max(1, round(2 * sigma))] * 2)
    expected = ndimage.gaussian_filter(image.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=reach)
    np.testing.assert_allclose(ob.gaussian_blur(image, sigma).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("height", "width", "kernel"), [(24, 31, 5), (9, 9, 7), (12, 6, 23)])
def test_median_is_scipys_median_of_the_bytes(height, width, kernel):
    image = picture(height, width)
    levels = ((image + 1) * 127.5).round().numpy().astype(np.uint8)[0]
    radius = kernel // 2
    for plane, got in zip(levels, ob.median_blur(image, kernel)[0], strict=True):
        padded = plane
        for axis, size in enumerate(plane.shape):
            padded = padded.take(_mirrored(size, radius), axis)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel))
        expected = np.median(windows, (2, 3))
        np.testing.assert_allclose((got.numpy() + 1) * 127.5, expected, atol=1e-3)


def _mirrored(size, radius):
    walk = list(range(size)) + list(range(size - 2, 0, -1))
    return [walk[i % len(walk)] for i in range(-radius, size + radius)]


@pytest.mark.parametrize(("height", "width", "block"), [(40, 40, 8), (37, 23, 5.3), (10, 10, 99)])
def test_pixelate_shows_the_mean_of_each_cell(height, width, block):
    image = picture(height, width)
    mosaic = ob.pixelate(image, block)
    torch.testing.assert_close(ob.pixelate(mosaic, block), mosaic)
    rows, cols = max(1, int(height / block)), max(1, int(width / block))
    row_of, col_of = np.arange(height) * rows // height, np.arange(width) * cols // width
    for r in range(rows):
        for c in range(cols):
            cell = np.ix_(range(1), range(3), row_of == r, col_of == c)
            shown = mosaic.numpy()[cell]
            mean = image.numpy()[cell].mean((2, 3), keepdims=True)
            np.testing.assert_allclose(shown, np.broadcast_to(mean, shown.shape), atol=1e-6)


def test_legacy_pixelate_samples_instead_of_averaging():
    image = picture(256, 256)
    small = F.interpolate(image, (12, 12), mode="bilinear", align_corners=False)
    expected = F.interpolate(small, (256, 256), mode="nearest")
    torch.testing.assert_close(ob.pixelate(image, 20, legacy=True), expected)
    assert not torch.allclose(ob.pixelate(image, 20), expected, atol=0.1)


def test_strength_follows_the_size_of_the_face():
    image = picture(128, 256)
    torch.testing.assert_close(ob.obfuscate(image, "blur"), ob.gaussian_blur(image, 7.5))
    torch.testing.assert_close(ob.obfuscate(image, "pixelate", 8), ob.pixelate(image, 4))


def test_a_generator_draws_a_training_strength():
    image = picture(256, 256)
    drawn = [ob.obfuscate(image, "pixelate", generator=torch.Generator().manual_seed(s)) for s in range(12)]
    again = ob.obfuscate(image, "pixelate", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn[0], again)
    counts = {len(torch.unique(d[0, 0])) for d in drawn}
    assert len(counts) > 3
    assert all((256 // 26) ** 2 <= n <= (256 // 14) ** 2 for n in counts)


def test_no_gradient_and_input_untouched():
    image = picture(32, 32).requires_grad_()
    before = image.detach().clone()
    for name in NAMES:
        assert not ob.obfuscate(image, name).requires_grad
    assert torch.equal(image.detach(), before)


def test_sticker_covers_what_is_opaque():
    layer = torch.zeros(4, 8, 8)
    layer[0], layer[3, :, :4] = 1.0, 1.0
    image = picture(64, 64)
    hidden = ob.sticker(layer).apply(image, 1.0)
    torch.testing.assert_close(hidden[..., 40:], image[..., 40:])
    torch.testing.assert_close(hidden[0, 0, :, :20], torch.ones(64, 20))


def test_registering(monkeypatch):
    monkeypatch.setattr(ob, "_REGISTRY", dict(ob._REGISTRY))
    cover = torch.cat((torch.zeros(3, 4, 4), torch.ones(1, 4, 4)))
    ob.register_obfuscator("cover", ob.sticker(cover))
    assert "cover" in ob.list_obfuscators()
    torch.testing.assert_close(ob.obfuscate(picture(30, 30), "cover"), torch.zeros(1, 3, 30, 30))
    with pytest.raises(UserError, match="already registered"):
        ob.register_obfuscator("cover", ob.sticker(cover))


def test_a_face_swap_is_a_plug_in(monkeypatch, tmp_path):
    image = picture(16, 24, batch=2)
    swap = ob.face_swap(lambda faces: faces.flip(-1))
    torch.testing.assert_close(swap.apply(image, 1.0), image.flip(-1))
    torch.testing.assert_close(swap.apply(image, 0.25), 0.75 * image + 0.25 * image.flip(-1))
    monkeypatch.setattr(ob, "_REGISTRY", dict(ob._REGISTRY))
    ob.register_obfuscator("mirrored", swap)
    torch.testing.assert_close(ob.obfuscate(image, "mirrored"), image.flip(-1))

    (tmp_path / "my_swapper.py").write_text("def swap(faces): return -faces\ndef short(faces): return faces[:1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.testing.assert_close(ob.obfuscate(image, "my_swapper:swap"), -image)
    with pytest.raises(UserError, match=r"must return a Tensor of shape \(2, 3, 16, 24\), got \(1, 3, 16, 24\)"):
        ob.obfuscate(image, "my_swapper:short")


def test_an_installed_plug_in_is_found_by_its_entry_point(monkeypatch, tmp_path):
    info = tmp_path / "my_stickers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-stickers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pyface.obfuscators]\nred_nose = my_stickers:red_nose\n")
    (tmp_path / "my_stickers.py").write_text(
        "import torch\nfrom pyface.data.obfuscators import sticker\n"
        "red_nose = sticker(torch.tensor([1.0, -1, -1, 1]).view(4, 1, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "red_nose" in ob.list_obfuscators()
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 9, 9)
    torch.testing.assert_close(ob.obfuscate(picture(9, 9), "red_nose"), red)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ob.obfuscate(picture(8, 8), "blurr"), "did you mean 'blur'"),
        (lambda: ob.obfuscate(picture(8, 8), "xyz"), "known: blur, median, pixelate"),
        (lambda: ob.obfuscate(picture(8, 8)[0], "blur"), r"Tensor\[B, 3, H, W\]"),
        (lambda: ob.obfuscate(torch.zeros(1, 3, 0, 8), "blur"), "not empty"),
        (lambda: ob.obfuscate(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "blur"), "floating point"),
        (lambda: ob.obfuscate(picture(8, 8), "blur", strength=0.0), "positive and finite"),
        (lambda: ob.obfuscate(picture(8, 8), "blur", strength=float("nan")), "positive and finite"),
        (lambda: ob.sticker(torch.zeros(3, 8, 8)), "RGBA"),
        (lambda: ob.obfuscate(picture(8, 8), "no_such_module:swap"), "cannot load obfuscator 'no_such_module:swap'"),
        (lambda: ob.obfuscate(picture(8, 8), "math:pi"), "neither an Obfuscator nor a function"),
        (lambda: ob.obfuscate(picture(8, 8), "builtins:repr"), "must return a Tensor .* got str"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(UserError, match=message):
        call()
