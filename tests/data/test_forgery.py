from dataclasses import replace
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from pyface.data import forgery
from pyface.data.forgery import FORGERIES, blend_face, forge, generate_texture, splice_face, transfer_appearance
from pyface.data.procedural import draw_clip, draw_person, render
from pyface.errors import UserError

SIZE, FRAMES, CLIPS = 96, 4, 3
HEAD = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])


def views(clip):
    return [replace(view, occluder=None, hat="none", glasses="none") for view in draw_clip(11, clip, FRAMES)]


@cache
def forged(method, clip=0, seed=5):
    person, source = draw_person(11, 2 * clip), draw_person(11, 2 * clip + 1)
    return forge(method, person, views(clip), source, seed=seed, image_size=SIZE)


@cache
def samples(clip=0):
    return render([draw_person(11, 2 * clip)] * FRAMES, views(clip), SIZE)


every_method = pytest.mark.parametrize("method", FORGERIES)
every_clip = pytest.mark.parametrize("clip", range(CLIPS))


@every_method
@every_clip
def test_what_a_forgery_says_about_itself(method, clip):
    result = forged(method, clip)
    assert result.images.shape == result.originals.shape == (FRAMES, 3, SIZE, SIZE)
    assert result.masks.shape == (FRAMES, 1, SIZE, SIZE)
    assert 0 <= result.masks.min()
    assert result.masks.max() <= 1
    assert (result.method, result.identity, result.source_identity) == (method, 2 * clip, 2 * clip + 1)
    assert torch.equal(result.originals, torch.stack([sample["image"] for sample in samples(clip)]))
    levels = result.images * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


@every_method
@every_clip
def test_outside_the_mask_the_frame_is_the_original(method, clip):
    result = forged(method, clip)
    outside = (result.masks == 0).expand_as(result.images)
    difference = (result.images - result.originals).abs()
    if method == "splice":  # saved once
        assert difference[outside].mean() < 0.01
    else:
        assert difference[outside].max() == 0
    core = (result.masks > 0.9).expand_as(result.images)
    assert difference[core].mean() > 1 / 255


@every_method
@every_clip
def test_the_mask_lies_on_the_head(method, clip):
    head = torch.stack([torch.isin(sample["parsing"], HEAD) for sample in samples(clip)])[:, None]
    masks = forged(method, clip).masks
    assert (masks.sum((1, 2, 3)) > 0.01 * SIZE**2).all()
    assert (masks * head).sum() > 0.95 * masks.sum()


@every_method
def test_same_arguments_same_clip(method):
    again = forge(method, draw_person(11, 0), views(0), draw_person(11, 1), seed=5, image_size=SIZE)
    assert torch.equal(forged(method).images, again.images)
    assert torch.equal(forged(method).masks, again.masks)
    if method != "colour_transfer":  # the one family that draws nothing
        assert not torch.equal(forged(method).images, forged(method, seed=6).images)


@every_method
@every_clip
def test_a_clip_does_not_flicker(method, clip):
    """Inside the mask, frames follow each other about as smoothly as the originals do."""
    result = forged(method, clip)
    inside = ((result.masks[1:] > 0.5) & (result.masks[:-1] > 0.5)).expand(-1, 3, -1, -1)
    was, now = (x.diff(dim=0).abs()[inside].mean() for x in (result.originals, result.images))
    assert now < 1.7 * was + 0.01


@every_method
def test_a_single_frame_is_a_clip(method):
    result = forge(method, draw_person(11, 0), views(0)[:1], draw_person(11, 1), image_size=48)
    assert result.images.shape == (1, 3, 48, 48)
    assert result.masks.max() > 0.5


@every_method
@every_clip
def test_gaze_disagrees_in_reenactment_only(method, clip):
    result = forged(method, clip)
    torch.testing.assert_close(result.original_gaze, torch.stack([sample["gaze"] for sample in samples(clip)]))
    off = (result.gaze - result.original_gaze).norm(dim=1)
    if method != "reenactment":
        assert not off.any()
        return
    low, high = forgery.GAZE_OFFSET
    assert ((off > low - 0.08) & (off < high + 0.08)).all()
    poses = torch.stack([sample["head_pose"][:2] for sample in samples(clip)])
    from_head = (result.gaze - poses).mean(0).norm()
    assert low - 0.08 < from_head < forgery.GAZE_LIMIT + 0.08


@every_clip
def test_the_eyes_of_a_reenactment_look_where_it_says(clip):
    result = forged("reenactment", clip)
    person = draw_person(11, 2 * clip)
    said = [replace(view, gaze=tuple(map(float, gaze))) for view, gaze in zip(views(clip), result.gaze)]
    true = torch.stack([sample["image"] for sample in render([person] * FRAMES, said, SIZE)])
    parsing = torch.stack([sample["parsing"] for sample in samples(clip)])
    eyes = torch.isin(parsing, torch.tensor([4, 5]))[:, None].expand_as(true)
    assert (result.images - true)[eyes].abs().mean() < 0.7 * (result.images - result.originals)[eyes].abs().mean()


def checkerboard(images, masks):
    """Power of the finest detail inside the masks at the Nyquist frequency, against that of frequencies nearby."""
    grey = torch.log(images.mean(1, keepdim=True) + 0.02)
    detail = grey - torch.nn.functional.avg_pool2d(grey, 5, 1, 2, count_include_pad=False)
    power = torch.fft.fft2((detail * masks.square())[:, 0]).abs().square().sum(0)
    half = SIZE // 2
    return max(line[half] / line[half - 9 : half - 2].mean() for line in (power[0], power[:, 0]))


@every_clip
def test_the_spectrum_of_up_sampling_is_in_textures_only(clip):
    for method in FORGERIES:
        result = forged(method, clip)
        peak, before = (checkerboard(x, result.masks) for x in (result.images, result.originals))
        assert before < 6, method
        if method == "texture":
            assert peak > 12
        else:
            assert peak < 6, method


def test_the_generators_ripple_has_periods_two_and_four():
    flat = torch.full((1, 3, 64, 64), 0.5)
    out = generate_texture(flat, flat, torch.ones(1, 1, 64, 64), seed=3)
    spectrum = torch.fft.fft2(out[0, 0] - out[0, 0].mean()).abs() / 64**2 / 0.5
    for (row, col), ripple in (((0, 32), forgery.RIPPLE[0]), ((32, 0), forgery.RIPPLE[0]),
                               ((0, 16), forgery.RIPPLE[1] / 2), ((16, 0), forgery.RIPPLE[1] / 2)):  # fmt: skip
        assert 0.5 * ripple < spectrum[row, col] < 1.6 * ripple
    assert spectrum[0, 11] < 0.002


def slope(images):
    """Size of the gradient, [T, 1, H, W], 0 in the last row and column."""
    across, down = images.diff(dim=-1)[..., :-1, :], images.diff(dim=-2)[..., :-1]
    return torch.nn.functional.pad((across.square() + down.square()).sum(1, keepdim=True).sqrt(), (0, 1, 0, 1))


@every_clip
def test_colour_transfer_leaves_no_seam(clip):
    result = forged("colour_transfer", clip)
    rim = (result.masks > 0) & (result.masks < 0.3)
    assert slope(result.images)[rim].mean() < 1.05 * slope(result.originals)[rim].mean() + 0.002
    # The same rule sees the seam of a splice.
    hard = forged("splice", clip)
    inner = -torch.nn.functional.max_pool2d(-hard.masks, 3, 1, 1)
    rim = torch.nn.functional.max_pool2d(hard.masks, 3, 1, 1) - inner > 0
    assert slope(hard.images)[rim].mean() > 1.05 * slope(hard.originals)[rim].mean() + 0.002


@every_clip
def test_colour_transfer_brings_the_sources_colours(clip):
    result = forged("colour_transfer", clip)
    source = render([draw_person(11, 2 * clip + 1)] * FRAMES, views(clip), SIZE)
    skin, other = (torch.stack([s["parsing"] == 1 for s in x])[:, None] for x in (samples(clip), source))
    core = skin & other & (result.masks > 0.95)
    was, now, wanted = (
        torch.stack([channel[core[:, 0]].mean() for channel in x.unbind(1)])
        for x in (result.originals, result.images, torch.stack([s["image"] for s in source]))
    )
    assert (now - wanted).norm() < 0.5 * (was - wanted).norm() + 0.02


def resaved(images, quality):
    frames = []
    for frame in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0)
        frames.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255


def ghost(images, masks):
    """Where saving again at some quality changes the mask's inside least, against the trend of the qualities around."""
    blocks = torch.nn.functional.avg_pool2d((masks > 0.5).float(), 8) == 1
    inside = torch.nn.functional.interpolate(blocks.float(), scale_factor=8) > 0
    qualities = list(range(40, 92))
    change = [((images - resaved(images, q)).square() * inside).sum() / (3 * inside.sum()) for q in qualities]
    change = torch.stack(change).sqrt()
    trend = torch.nn.functional.avg_pool1d(change[None], 15, 1, 7, count_include_pad=False)[0]
    dip = (change / trend)[4:-4]
    return qualities[4 + int(dip.argmin())], float(dip.min())


@every_clip
def test_only_the_spliced_face_was_saved_twice(clip):
    result = forged("splice", clip)
    quality, dip = ghost(result.images, result.masks)
    assert forgery.SPLICE_QUALITY[0] - 1 <= quality <= forgery.SPLICE_QUALITY[1] + 1
    assert dip < 0.8
    assert ghost(result.images, 1 - result.masks)[1] > 0.85
    assert ghost(result.originals, result.masks)[1] > 0.85


def real_face():
    """scikit-image's astronaut, and 68 points that lie about on her face: a procedural face's, moved there."""
    picture = torch.from_numpy(data.astronaut()[20:200, 130:320].copy()).permute(2, 0, 1).float() / 255
    points = samples()[0]["landmarks"]
    points = (points - points.mean(0)) / (points.amax(0) - points.amin(0)) * torch.tensor([78.0, 90.0])
    return picture[None], (points + torch.tensor([92.0, 85.0]))[None]


def test_image_steps_serve_real_photos_of_any_shape():
    picture, points = real_face()
    again, masks = blend_face(picture, picture, points, points)
    assert again.shape == picture.shape
    assert 0.005 < (again - picture).abs()[(masks > 0.9).expand_as(picture)].mean() < 0.1  # the same face, decoded
    assert torch.equal(again[(masks == 0).expand_as(again)], picture[(masks == 0).expand_as(picture)])
    again, masks = splice_face(picture, picture[0], points, points[0])
    assert masks.unique().tolist() == [0, 1]
    assert (again - picture).abs().mean() < 0.03
    heads = torch.zeros(1, 1, *picture.shape[-2:])
    heads[..., 20:150, 40:150] = 1
    again, masks = transfer_appearance(picture, picture.flip(1), heads, heads)
    assert masks.max() == 1
    wanted = picture.flip(1)[0, :, 60:110, 70:120].mean((1, 2))
    torch.testing.assert_close(again[0, :, 60:110, 70:120].mean((1, 2)), wanted, atol=0.05, rtol=0)


def test_steps_name_a_tensor_of_the_wrong_shape():
    picture, points = real_face()
    with pytest.raises(UserError, match=r"blend_face: landmarks must be Tensor\[1, 68, 2\], got \(68, 2\)"):
        blend_face(picture, picture, points[0], points)
    with pytest.raises(UserError, match=r"splice_face: target must be a floating point Tensor\[T, 3, H, W\]"):
        splice_face(picture[0], picture[0], points, points[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "faceswap"}, "unknown method 'faceswap'; known: blend_swap"),
        ({"views": []}, "at least one view"),
        ({"source": draw_person(11, 0)}, "another person"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_mistakes_are_explained(changes, message):
    call = {"method": "splice", "person": draw_person(11, 0), "views": views(0), "source": draw_person(11, 1)}
    with pytest.raises(UserError, match=message):
        forge(**{**call, **changes})
