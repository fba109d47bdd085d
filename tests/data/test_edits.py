from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyface.data import edits
from pyface.data.edits import ATTRIBUTES, COMPONENTS, edit, parse_sequence, sequence_labels, sequence_name
from pyface.data.procedural import draw_person, draw_view, render
from pyface.errors import UserError

SIZE = 96


def face(index, **changes):
    """A person and a view in which nothing covers the face."""
    view = replace(draw_view(3, index), hat="none", glasses="none", occluder=None, eye_open=1.0, **changes)
    return draw_person(3, index), view


def edited(sequence, index=0, seed=0, **changes):
    return edit(sequence, *face(index, **changes), seed=seed, image_size=SIZE)


sequences = st.sampled_from([COMPONENTS, ATTRIBUTES]).flatmap(
    lambda kinds: st.lists(st.sampled_from(kinds), unique=True, max_size=5).map(lambda steps: (kinds, steps))
)


@given(sequences)
def test_names_labels_and_steps_say_the_same(case):
    kinds, steps = case
    name = "-".join(steps) or "original"
    labels = sequence_labels(steps)
    assert parse_sequence(name) == steps
    assert sequence_labels(name) == labels
    assert len(labels) == 5
    assert labels[: len(steps)] == [kinds.index(step) + 1 for step in steps]
    assert not any(labels[len(steps) :])
    assert sequence_name(labels, kinds) == name


def test_the_example_of_the_data_set():
    assert sequence_labels("nose-eye-lip") == [1, 2, 4, 0, 0]
    assert sequence_labels("original") == [0, 0, 0, 0, 0]
    assert sequence_labels("Young-Bangs") == [5, 1, 0, 0, 0]


def test_no_step_gives_the_original_bit_for_bit():
    person, view = face(1)
    result = edit("original", person, view, image_size=SIZE)
    assert torch.equal(result.image, render([person], [view], SIZE)[0]["image"])
    assert torch.equal(result.image, result.original)
    assert (result.labels, result.steps, result.masks) == ([0] * 5, [], [])


@pytest.mark.parametrize("sequence", ["nose-eye-lip-eyebrow-hair", "Smiling-Bangs-Young-Beard-Eyeglasses"])
def test_all_five_steps(sequence):
    person, view = face(2)
    result = edit(sequence, person, view, image_size=SIZE)
    assert torch.equal(result.original, render([person], [view], SIZE)[0]["image"])
    assert result.labels == sequence_labels(sequence)
    assert torch.equal(result.steps[-1], result.image)
    levels = result.image * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    before = result.original
    for image, mask in zip(result.steps, result.masks):
        assert image.shape == (3, SIZE, SIZE)
        assert mask.shape == (1, SIZE, SIZE)
        assert 0 < mask.max() <= 1
        inside = (image - before).abs().amax(0)[mask[0] > 0.9]
        assert inside.max() > 0.05, "a step must be visible"
        before = image
    untouched = torch.stack(result.masks).amax(0)[0] == 0
    assert untouched.any()
    assert torch.equal(result.image[:, untouched], result.original[:, untouched])


def test_same_arguments_same_picture():
    first, again, other = (edited("lip-hair-nose", seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_changes_in_its_own_region(name):
    ids = {"nose": [2], "eye": [4, 5], "eyebrow": [6, 7], "lip": [10, 11, 12], "hair": [13]}[name]
    for index in range(3):
        person, view = face(index)
        result = edit([name], person, view, seed=index, image_size=SIZE)
        before = render([person], [view], SIZE)[0]["parsing"]
        region = torch.isin(before, torch.tensor(ids))
        assert region.any()
        mask = result.masks[0][0]
        assert (mask[region] == 1).all()
        if name != "hair":  # the new hair may hang where none was
            reach = round((edits.BORDER + 0.06) * SIZE)
            near = torch.nn.functional.max_pool2d(region[None].float(), 2 * reach + 1, 1, reach)[0] > 0
            assert not mask[~near].any()


def test_attributes_toggle_what_they_name():
    for index in range(4):
        person, view = face(index)
        before = render([person], [view], SIZE)[0]
        for name in ATTRIBUTES:
            after = edits._change_attribute(name, person, view, before, np.random.default_rng(index))[2]
            key = "No_Beard" if name == "Beard" else name
            assert after["attributes"][key] != before["attributes"][key], (index, name)


def test_what_covers_a_component_goes_with_the_edit():
    person, view = face(1)
    hidden = replace(view, occluder="mask", glasses="sunglasses", hat="beanie", eye_open=0.0)
    for name in COMPONENTS + ATTRIBUTES:
        result = edit([name], person, hidden, image_size=SIZE)
        change = (result.image - result.original).abs().amax(0)
        assert change[result.masks[0][0] > 0.9].max() > 0.05, name


def test_the_later_of_two_overlapping_edits_is_on_top():
    for index in range(3):
        first, second = edited("eye-eyebrow", index), edited("eyebrow-eye", index)
        overlap = torch.minimum(*first.masks)[0] > 0.25
        assert overlap.any()
        assert (first.image - second.image).abs().amax(0)[overlap].mean() > 0.002
        assert (first.steps[0] - second.steps[0]).abs().amax() > 0.05


def test_what_was_generated_earlier_is_softer():
    """So the order of edits that do not touch can be read off the picture, too."""
    for one, other in permutations(("hair", "lip", "nose"), 2):
        steps = edited([one, other])
        region = steps.masks[0][0] * (1 - steps.masks[1][0]) > 0.9
        fresh, aged = (roughness(image)[region].mean() for image in steps.steps)
        assert aged < 0.95 * fresh


def roughness(image):
    """Size of the Laplacian, [H, W], 0 at the edge."""
    grey = image.mean(0)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return torch.nn.functional.pad((4 * grey[1:-1, 1:-1] - around).abs(), (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_sequence("nose-ear"), "unknown step 'ear'"),
        (lambda: parse_sequence("nose-lip-nose"), "'nose' comes twice"),
        (lambda: parse_sequence(["nose", "Smiling"]), "mixes edits of components and of attributes"),
        (lambda: sequence_name([1, 0, 2, 0, 0]), "zeros at the end only"),
        (lambda: sequence_name([6, 0, 0, 0, 0]), "from 0 to 5"),
        (lambda: sequence_name([1, 1, 0, 0, 0]), "comes twice"),
        (lambda: edited("nose", seed=-1), "seed must be at least 0"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(UserError, match=message):
        call()
