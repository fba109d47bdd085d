from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pyface.data.sets.digits import DigitsAsImages
from pyface.errors import UserError


def test_every_digit_once_and_in_proportion():
    train, test = DigitsAsImages(), DigitsAsImages("test")
    assert (len(train), len(test)) == (1442, 355)
    assert sorted(r.index for r in [*train.records, *test.records]) == list(range(1797))
    target = load_digits().target
    for reader in (train, test):
        assert all(record.label == target[record.index] for record in reader.records)
    every, tested = Counter(target.tolist()), Counter(r.label for r in test.records)
    assert all(tested[label] == every[label] // 5 for label in range(10))


def test_pictures():
    reader = DigitsAsImages("test", size=8)
    sample = reader[3]
    record = reader.records[3]
    expected = load_digits().images[record.index] / 16
    assert sample["image"].shape == (3, 8, 8)
    assert sample["image"].dtype == torch.float32
    assert np.allclose(sample["image"][1], expected)
    large = DigitsAsImages("test", size=32)[3]["image"]
    assert large.shape == (3, 32, 32)
    assert large.min() >= 0
    assert large.max() <= 1
    assert torch.allclose(large.mean(), sample["image"].mean(), atol=0.02)
    assert reader.summary()["images"] == 355


def test_errors():
    with pytest.raises(UserError, match="no split 'val'; there are train, test"):
        DigitsAsImages("val")
    with pytest.raises(UserError, match="size is 4"):
        DigitsAsImages(size=4)
