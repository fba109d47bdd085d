"""SCOOT and FSIM against examples worked out by hand and against other people's code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import astronaut
from skimage.feature import graycomatrix

from pyface.errors import UserError
from pyface.metrics import Fsim, Scoot, fsim, scoot
from pyface.metrics.drawing import _planes, phase_congruency


@pytest.fixture(scope="module")
def face():
    """Tensor[1, 3, 128, 128]: a real face."""
    return torch.from_numpy(astronaut()[30:158, 160:288].copy()).permute(2, 0, 1)[None] / 255


def test_scoot_by_hand():
    # 8 x 8 pixels make 16 blocks of 2 x 2. White paper has levels 5 only: contrast 0, energy 1. With the top left
    # pixel black, the first block's pairs are (0, 5) once, (5, 0) twice, (5, 5) three times over the four offsets;
    # averaged and rounded (1/2 goes up) 0, 1 and 1: contrast 25 / 2, energy 1/4 + 1/4.
    paper = torch.ones(1, 1, 8, 8)
    dotted = paper.clone()
    dotted[0, 0, 0, 0] = 0
    expected = 1 / (1 + math.hypot(12.5, 0.5))
    assert scoot(dotted, paper).item() == pytest.approx(expected)
    assert Scoot()(dotted, paper).item() == pytest.approx(expected)
    assert scoot(paper, paper).item() == 1


def test_scoot_levels_meet_at_the_toolbox_bounds():
    # level = floor(6 v / 255), so 84 and 85 part, 170 begins level 4, and 255 still is level 5
    def flat(v):
        return torch.full((1, 1, 8, 8), v / 255)

    assert scoot(flat(84), flat(43)).item() == 1
    stripes = torch.cat((flat(84)[..., :1], flat(85)[..., :1]), 3).repeat(1, 1, 1, 4)
    assert scoot(stripes, flat(84)).item() < 1
    assert scoot(flat(214), flat(255)).item() == 1  # nothing to see in a flat block, whatever its level


@pytest.mark.parametrize("size", [(64, 64), (61, 35), (9, 8)])
def test_scoot_agrees_with_scikit_image(size):
    drawn, reference = torch.rand(2, 1, 3, *size, generator=torch.Generator().manual_seed(1))

    def textures(image):
        grey = (image[0].double() * 255).round().permute(1, 2, 0).numpy() @ [0.298936021, 0.587043074, 0.114020904]
        levels = np.minimum(np.floor(np.round(grey) * 6 / 255), 5).astype(np.uint8)
        numbers = []
        rows, columns = ([side * k // 4 for k in range(5)] for side in size)
        for top, bottom in zip(rows, rows[1:]):
            for left, right in zip(columns, columns[1:]):
                angles = [0, -np.pi / 4, -np.pi / 2, -3 * np.pi / 4]
                counts = graycomatrix(levels[top:bottom, left:right], [1], angles, levels=6)[:, :, 0].mean(2)
                counts = np.floor(counts + 0.5)
                share = counts / max(1, counts.sum())
                i, j = np.indices(share.shape)
                numbers += [(share * (i - j) ** 2).sum(), (share**2).sum()]
        return np.array(numbers)

    expected = 1 / (1 + np.linalg.norm(textures(drawn) - textures(reference)))
    assert scoot(drawn, reference).item() == pytest.approx(expected, rel=1e-6)


def test_fsim_of_flat_pictures_by_hand():
    # Nothing oscillates, so S_PC = 1 and all pixels weigh the same. Outside is 0, so a flat picture of level v has the
    # Scharr gradients v on an edge and sqrt(2) 13/16 v in a corner; a black one has none.
    v = 128.0
    edge, corner = (160 / (g * g + 160) for g in (v, math.sqrt(2) * 13 / 16 * v))
    expected = (36 + 24 * edge + 4 * corner) / 64
    assert fsim(torch.full((1, 1, 8, 8), v / 255), torch.zeros(1, 1, 8, 8)).item() == pytest.approx(expected)


def test_phase_congruency_of_a_bar():
    # A picture that does not change from row to row only meets the filters' row of vertical frequency 0, so its
    # responses are those of one line of pixels.
    size = 64
    line = np.zeros(size)
    line[20:37] = 200
    u = np.fft.fftfreq(size)
    y, x = np.meshgrid(u, u, indexing="ij")
    radius = np.hypot(x, y)
    radius[0, 0] = 1
    low = 1 / (1 + (radius / 0.45) ** 30)
    low[0, 0] = 0
    energy = amplitude = 0
    for turn in range(4):
        away = np.angle(np.exp(1j * (np.arctan2(-y, x) - turn * np.pi / 4)))
        sector = np.exp(-(away**2) / (2 * (np.pi / 4 / 1.2) ** 2))
        bank = [
            np.exp(-(np.log(radius * 6 * 2**scale) ** 2) / (2 * np.log(0.55) ** 2)) * low * sector for scale in range(4)
        ]
        response = np.array([np.fft.ifft(np.fft.fft(line) * one[0]) for one in bank])
        phase = response.sum(0) / (np.abs(response.sum(0)) + 1e-4)
        dot = response.real * phase.real + response.imag * phase.imag
        cross = response.real * phase.imag - response.imag * phase.real
        even = [np.fft.ifft2(one).real * size for one in bank]
        sums = sum(2 * (one**2).sum() for one in even)
        sums += sum(4 * (even[i] * even[j]).sum() for i in range(4) for j in range(i + 1, 4))
        noise = np.median(np.abs(response[0]) ** 2) / -np.log(0.5) / (bank[0] ** 2).sum() * sums
        tau = np.sqrt(noise / 2)
        threshold = (tau * np.sqrt(np.pi / 2) + 2 * np.sqrt((2 - np.pi / 2) * tau**2)) / 1.7
        energy = energy + np.maximum((dot - np.abs(cross)).sum(0) - threshold, 0)
        amplitude = amplitude + np.abs(response).sum(0)
    expected = torch.from_numpy(energy / amplitude)
    assert expected[[19, 20, 36, 37]].min() > 0.6  # the edges of the bar
    assert expected.min() < 0.3
    found = phase_congruency(torch.from_numpy(line).expand(1, size, size))[0]
    torch.testing.assert_close(found, expected.expand(size, size), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chromatic", [False, True])
@pytest.mark.parametrize("crop", [(128, 128), (127, 96)])
def test_fsim_agrees_with_piq(face, crop, chromatic):
    # An independent implementation. It takes the lower of the two middle values for the median, slightly other colour
    # weights, and a much smaller epsilon: hence the tolerance.
    piq = pytest.importorskip("piq")
    face = face[..., : crop[0], : crop[1]]
    for drawn in (face.roll(2, 3), face.flip(3), face.sqrt(), (face + 0.1 * torch.randn(face.shape)).clamp(0, 1)):
        expected = piq.fsim(drawn, face, chromatic=chromatic)
        torch.testing.assert_close(fsim(drawn, face, chromatic=chromatic)[0], expected, rtol=0, atol=7e-4)


@pytest.mark.parametrize(("size", "factor"), [(383, 1), (384, 2), (639, 2), (640, 3)])
def test_fsim_shrinks_large_pictures(size, factor):
    image = torch.rand(1, 1, size, 700)
    planes = _planes(image)
    assert planes.shape == (1, 1, -(-size // factor), -(-700 // factor))
    # the box around every factor-th pixel: pixels i and i + 1 for two, i - 1 to i + 1 for three
    first = 5 * factor - (factor - 1) // 2
    box = image[0, 0, first : first + factor, first : first + factor]
    assert planes[0, 0, 5, 5].item() == pytest.approx(255 * box.mean().item(), rel=1e-6)


@pytest.mark.parametrize("measure", [scoot, fsim])
def test_laws(face, measure):
    other = face.flip(3)
    assert measure(face, face).item() == pytest.approx(1)
    torch.testing.assert_close(measure(face, other), measure(other, face))
    assert 0 < measure(face, other) < 1
    # a picture's value does not depend on its batch mates
    batch = measure(torch.cat((other, face, face * 0.9)), torch.cat((face, face, face)))
    torch.testing.assert_close(batch[:1], measure(other, face))
    assert measure(face[:0], face[:0]).shape == (0,)


@pytest.mark.parametrize("measure", [scoot, fsim])
def test_more_damage_scores_lower(face, measure):
    noise = torch.randn(face.shape, generator=torch.Generator().manual_seed(0))
    scores = [measure((face + strength * noise).clamp(0, 1), face).item() for strength in (0.02, 0.08, 0.3)]
    assert scores == sorted(scores, reverse=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 20), st.integers(8, 20), st.integers(0, 1000))
def test_any_pictures_give_a_share(height, width, seed):
    a, b = (torch.rand(2, 2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2).clamp(0, 1)
    for score in (scoot(a, b), fsim(a, b), fsim(a, b, chromatic=True)):
        assert ((score > 0) & (score <= 1 + 1e-6)).all()


def test_fsim_of_colour_ignores_colour_and_fsimc_does_not(face):
    shift = torch.tensor([0.1, -0.1 * 0.299 / 0.587, 0.0])[:, None, None] * 0.5  # keeps the luminance
    inner = face * 0.8 + 0.1
    assert fsim(inner + shift, inner).item() == pytest.approx(1, abs=1e-6)
    assert fsim(inner + shift, inner, chromatic=True).item() < 0.9999
    assert Fsim(chromatic=True)(inner + shift, inner) == fsim(inner + shift, inner, chromatic=True)


@pytest.mark.parametrize("make", [Scoot, Fsim])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_wrong_pictures_are_refused(make):
    good = torch.rand(2, 1, 8, 8)
    for drawn, says in [
        (good[0], r"drawn must be a float Tensor\[N, C, H, W\], got float32 \[1, 8, 8\]"),
        ((good * 255).to(torch.uint8), r"float Tensor\[N, C, H, W\], got uint8"),
        (good * 255, r"drawn must be in \[0, 1\]"),
        (good[..., :7], "one shape"),
        (good.expand(-1, 2, -1, -1), "1 or 3 channels"),
    ]:
        with pytest.raises(UserError, match=says):
            make().update(drawn, good)
    with pytest.raises(UserError, match="at least 8 pixels"):
        make().update(good[..., :7], good[..., :7])
    assert make().compute().isnan()
    with pytest.raises(UserError, match="3 channels"):
        Fsim(chromatic=True).update(good, good)
