"""The order of data: every way of sharing it among processes and parts gives the same global batches."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_method.recipe import LENGTH, Config, Numbers, Regression

from pyface.engine.run import Run
from pyface.engine.sampling import Order, _Samples, seed_everything


def steps(ranks, accumulate, first, count, batch_size=8, seed=0):
    """Global batches (epoch, place, index) of some steps, put together from all processes' parts."""
    config = Config.preset(batch_size=batch_size, accumulate=accumulate, seed=seed)
    recipe = Regression(config)
    feeds = []
    for rank in range(ranks):
        run = SimpleNamespace(config=config, ranks=ranks, rank=rank, part=0)
        run.share = Run.share.__get__(run)
        feeds.append(Order(recipe, Numbers()).parts(run, first))
    return [[key for _ in range(accumulate) for feed in feeds for key in next(feed)] for _ in range(count)]


@settings(max_examples=25)
@given(ranks=st.sampled_from([1, 2, 4]), accumulate=st.sampled_from([1, 2]), first=st.integers(0, 30))
def test_global_batches_depend_on_the_step_alone(ranks, accumulate, first):
    whole = steps(1, 1, 0, first + 5)
    assert steps(ranks, accumulate, first, 5) == whole[first:]


def test_an_epoch_takes_every_sample_once():
    keys = list(itertools.chain.from_iterable(steps(1, 1, 0, 3 * 10, batch_size=7)))
    for epoch in range(3):
        mine = keys[epoch * LENGTH : (epoch + 1) * LENGTH]
        assert {e for e, _, _ in mine} == {epoch}
        assert [place for _, place, _ in mine] == list(range(LENGTH))
        assert sorted(index for _, _, index in mine) == list(range(LENGTH))
    first, second = ([i for e, _, i in keys if e == epoch] for epoch in (0, 1))
    assert first != second


def test_the_last_incomplete_batch_is_left_out():
    keys = steps(1, 1, 0, 9)
    assert [key[0] for key in keys[7]] == [0] * 8
    assert [key[:2] for key in keys[8]] == [(1, place) for place in range(8)]


def test_seeds_change_the_order():
    assert steps(1, 1, 0, 3) != steps(1, 1, 0, 3, seed=1)


def test_augmentation_depends_on_the_place_alone():
    samples = _Samples(Regression(Config.preset()), Numbers())
    keys = [(0, 0, 5), (0, 1, 5), (1, 0, 5)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    together = [sample["x"] for sample in samples.__getitems__(keys)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    apart = [samples.__getitems__([key])[0]["x"] for key in reversed(keys)]
    assert all(torch.equal(a, b) for a, b in zip(together, reversed(apart), strict=True))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], together[2])
    other = _Samples(Regression(Config.preset(seed=1)), Numbers()).__getitems__(keys)
    assert not torch.equal(other[0]["x"], together[0])


def test_pairs_are_augmented_alike():
    recipe = Regression(Config.preset())
    recipe.alike = 2
    values = [sample["x"] for sample in _Samples(recipe, Numbers()).__getitems__([(0, place, 5) for place in range(4)])]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[2], values[3])
    assert not torch.equal(values[0], values[2])


def test_data_sets_that_read_many_at_once_are_asked_once():
    class Many(Numbers):
        asked = []

        def __getitems__(self, indices):
            self.asked.append(list(indices))
            return [self[index] for index in indices]

    data = Many()
    _Samples(Regression(Config.preset()), data).__getitems__([(0, 0, 3), (0, 1, 9)])
    assert data.asked == [[3, 9]]


def test_steps_and_processes_have_their_own_randomness():
    def draws(*where):
        import random

        seed_everything(*where)
        return torch.rand(1).item(), np.random.rand(), random.random()

    every = [draws(*where) for where in itertools.product((0, 1), (0, 1, 2), (0, 1))]
    assert len(set(every)) == 12
    assert draws(0, 2, 1) == draws(0, 2, 1)
