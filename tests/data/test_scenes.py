import hashlib
import subprocess
import sys

import numpy as np
import pytest

from pyface.data.scenes import KINDS, TEXTURE_FILES, _power_noise, scene
from pyface.errors import UserError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 33, 96])
def test_every_kind_paints_at_any_size(kind, size):
    picture = scene(3, 1, size, kind)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8


def test_same_numbers_same_picture_whatever_was_painted_before():
    first = [scene(5, index, 48) for index in range(12)]
    again = [scene(5, index, 48) for index in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({picture.tobytes() for picture in first}) == 12
    assert not np.array_equal(first[0], scene(6, 0, 48))


def test_same_picture_in_another_process():
    code = "import hashlib; from pyface.data.scenes import scene; print(hashlib.sha256(scene(9, 4, 40)).hexdigest())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == hashlib.sha256(scene(9, 4, 40)).hexdigest()


def test_pictures_vary():
    spread = [scene(0, index, 64, kind).std() for kind in ("face", "leaves", "texture") for index in range(8)]
    assert np.median(spread) > 25


@pytest.mark.parametrize("exponent", [0.7, 1.2, 1.8])
def test_noise_has_the_spectrum_it_is_asked_for(exponent):
    noise = _power_noise(np.random.default_rng(0), 256, exponent)
    amplitude = np.abs(np.fft.fft2(noise, axes=(0, 1))).mean(2)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    band = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(amplitude[band]), 1)[0]
    assert abs(slope + exponent) < 0.05


def test_validation_photographs_are_not_training_textures():
    kept_back = ("astronaut", "coffee", "chelsea", "rocket", "lfw", "camera")
    assert not [name for name in TEXTURE_FILES if name.startswith(kept_back)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0, 4), "size >= 8"), ((-1, 0), "seed >= 0"), ((0, -1), "index >= 0"), ((0, 0, 64, "cat"), "unknown kind")],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        scene(*arguments)
