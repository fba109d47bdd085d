"""The procedural world: what its pictures show, what is said about them, and that both agree."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyface.data.procedural import (
    Background,
    Beard,
    Camera,
    Framing,
    Light,
    Person,
    ProceduralFaces,
    View,
    contact_sheet,
    draw_clip,
    draw_person,
    draw_view,
    render,
)
from pyface.errors import UserError

STUDIO = View(
    background=Background("plain", (0.5, 0.5, 0.5)),
    light=Light(azimuth=0.0, elevation=0.6, ambient=0.6, softness=1.0),
    camera=Camera(noise=0.0, vignette=0.0, blur=0.3),
)
BARE = replace(draw_person(0, 3), female=0.0, beard=Beard())
BARE = replace(BARE, hair=replace(BARE.hair, style="buzz"), skin=replace(BARE.skin, tone=0.2, moles=0))


def one(person: Person, view: View, size: int = 96) -> dict:
    return render([person], [view], size)[0]


def where(sample: dict, *idents: int) -> torch.Tensor:
    return torch.isin(sample["parsing"], torch.tensor(idents, dtype=torch.uint8))


def centre(mask: torch.Tensor) -> tuple[float, float]:
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return columns.double().mean().item(), rows.double().mean().item()


def numbers(thing) -> list[float]:
    """All floats of a nested dataclass."""
    if is_dataclass(thing):
        return [n for f in fields(thing) if f.name not in ("seed", "moles") for n in numbers(getattr(thing, f.name))]
    if isinstance(thing, tuple):
        return [n for item in thing for n in numbers(item)]
    return [float(thing)] if isinstance(thing, float) else []


# --- The contract of a sample ---


@pytest.mark.parametrize("size", [16, 33, 64])
def test_keys_types_and_ranges(size):
    sample = ProceduralFaces(3, size, seed=2)[1]
    shapes = {
        "image": ((3, size, size), torch.float32),
        "gaze": ((2,), torch.float32),
        "head_pose": ((3,), torch.float32),
        "landmarks": ((68, 2), torch.float32),
        "depth": ((1, size, size), torch.float32),
        "parsing": ((size, size), torch.uint8),
        "occluder": ((1, size, size), torch.bool),
    }
    for key, (shape, dtype) in shapes.items():
        assert (tuple(sample[key].shape), sample[key].dtype) == (shape, dtype), key
    assert set(sample) == {*shapes, "identity", "attributes", "caption", "index"}
    assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
    levels = sample["image"] * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert sample["parsing"].max() <= 19
    assert torch.equal(sample["occluder"][0], sample["parsing"] == 19)
    assert all(isinstance(value, bool) for value in sample["attributes"].values())
    assert sample["caption"].endswith(".")
    assert sample["index"] == 1


def test_same_sample_alone_and_in_any_batch():
    faces = ProceduralFaces(40, 48, seed=5)
    batch = faces.__getitems__([7, 3, 30, 3])
    for sample in (batch[1], batch[3], faces[3], ProceduralFaces(4, 48, seed=5)[3]):
        for key, value in faces[3].items():
            same = torch.equal(value, sample[key]) if isinstance(value, torch.Tensor) else value == sample[key]
            assert same, key


def test_threads_do_not_matter():
    faces, before = ProceduralFaces(9, 64, seed=1), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = faces[8]["image"]
        torch.set_num_threads(2)
        assert torch.equal(single, faces[8]["image"])
    finally:
        torch.set_num_threads(before)


def test_workers_give_the_same_samples():
    faces = ProceduralFaces(6, 32, seed=4)
    loader = torch.utils.data.DataLoader(faces, batch_size=3, num_workers=1, collate_fn=list)
    samples = [sample for batch in loader for sample in batch]
    assert [sample["index"] for sample in samples] == list(range(6))
    assert all(torch.equal(sample["image"], faces[i]["image"]) for i, sample in enumerate(samples))


def test_seeds_are_different_worlds():
    assert draw_person(0, 1) != draw_person(1, 1)
    assert not torch.equal(ProceduralFaces(1, 32, 0)[0]["image"], ProceduralFaces(1, 32, 1)[0]["image"])


def test_identity_rules():
    faces = ProceduralFaces(20, 32, seed=0)
    assert [faces.identity(i) for i in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    few = ProceduralFaces(20, 32, seed=0, identities=3)
    assert [few.identity(i) for i in range(5)] == [0, 1, 2, 0, 1]
    assert few[4]["identity"] == 1
    assert few.parameters(1)[0] == few.parameters(4)[0]
    assert few.parameters(1)[1] != few.parameters(4)[1]
    assert len(list(iter(ProceduralFaces(3, 16)))) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: ProceduralFaces(0),
        lambda: ProceduralFaces(5, image_size=8),
        lambda: ProceduralFaces(5, image_size=2000),
        lambda: ProceduralFaces(5, image_size=64.0),
        lambda: ProceduralFaces(5, seed=-1),
        lambda: ProceduralFaces(5, identities=0),
        lambda: ProceduralFaces(True),
        lambda: draw_person(-1, 0),
        lambda: draw_person(0, -3),
        lambda: draw_person(0, 1.5),
        lambda: draw_view(0, -1),
        lambda: draw_clip(0, 0, 0),
        lambda: render([BARE], [], 32),
        lambda: render([BARE], [replace(STUDIO, glasses="monocle")], 32),
        lambda: render([BARE], [replace(STUDIO, occluder="cat")], 32),
        lambda: render([BARE], [replace(STUDIO, pose=(0.0, 2.0, 0.0))], 32),
        lambda: render([BARE], [replace(STUDIO, smile=math.nan)], 32),
        lambda: render([replace(BARE, hair=replace(BARE.hair, style="mohawk"))], [STUDIO], 32),
        lambda: contact_sheet([]),
        lambda: contact_sheet([torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(UserError):
        call()


def test_index_out_of_range_ends_iteration():
    with pytest.raises(IndexError):
        ProceduralFaces(3, 16)[3]
    with pytest.raises(UserError, match="numbered from 0 to 2"):
        ProceduralFaces(3, 16)[-1]


# --- Do they look like faces? ---


def test_a_detector_trained_on_photographs_finds_them():
    """At least 80 % of near-frontal faces: the cascade has only ever seen real ones."""
    from pyface.data.detect import detect_faces

    faces, tried, found, index = ProceduralFaces(1000, 160, seed=12, occluders=False), 0, 0, 0
    while tried < 30:
        index += 4
        view = faces.parameters(index)[1]
        if abs(view.pose[1]) > math.radians(15) or view.glasses == "sunglasses":
            continue
        sample, tried = faces[index], tried + 1
        x, y = sample["landmarks"].mean(0).tolist()
        photo = (sample["image"].permute(1, 2, 0) * 255).round().byte().numpy()
        found += any(a < x < a + w and b < y < b + h and w > 40 for a, b, w, h in detect_faces(photo))
    assert found >= 24


def test_everybody_is_drawn_with_a_face():
    for sample in ProceduralFaces(48, 64, seed=8, occluders=False).__getitems__(range(0, 48, 3)):
        assert where(sample, 1).float().mean() > 0.05
        assert where(sample, 2).sum() > 8
        assert where(sample, 11, 12).sum() > 4


# --- Geometry ---


@pytest.mark.parametrize("pose", [(0.0, 0.0, 0.0), (0.1, 0.3, 0.1), (-0.2, -0.25, -0.1)])
def test_landmarks_lie_on_their_parts(pose):
    sample = one(BARE, replace(STUDIO, pose=pose, gaze=pose[:2], mouth_open=0.6), 256)
    parts = {
        "nose": (range(27, 31), (2,)),
        "left eye": ([37, 38, 40, 41], (4,)),
        "right eye": ([43, 44, 46, 47], (5,)),
        "left brow": (range(18, 21), (6,)),
        "right brow": (range(23, 26), (7,)),
        "lips": ([50, 51, 52, 56, 57, 58], (11, 12)),
        "inner mouth": ([61, 62, 63, 65, 66, 67], (10, 11, 12)),
    }
    for name, (points, idents) in parts.items():
        mask = where(sample, *idents)
        near = torch.nn.functional.max_pool2d(mask[None].float(), 7, 1, 3)[0] > 0
        for point in points:
            x, y = sample["landmarks"][point].round().long().tolist()
            assert near[y, x], (name, point)


def test_landmarks_are_in_ibug_order():
    points = one(BARE, STUDIO, 128)["landmarks"]
    x, y = points[:, 0], points[:, 1]
    assert (x[:16].diff() > 0).all()
    assert y[8] == y.max()
    assert (y[27:31].diff() > 0).all()
    assert x[36] < x[39] < x[42] < x[45]
    assert x[48] < x[51] < x[54]
    assert y[51] < y[62] <= y[66] < y[57]
    assert y[19] < y[37] < y[41] < y[33] < y[51]


def test_depth_is_zero_on_the_background_alone_and_the_nose_is_nearest():
    sample = one(BARE, STUDIO, 128)
    depth, parsing = sample["depth"][0], sample["parsing"]
    assert torch.equal(depth == 0, parsing == 0)
    assert depth[parsing == 2].max() == depth.max()
    ears = depth[where(sample, 8, 9)]
    assert ears.numel()
    assert ears.mean() < depth[parsing == 1].mean() < depth[parsing == 2].mean()


def test_depth_follows_the_pose():
    turned = one(BARE, replace(STUDIO, pose=(0.0, 0.6, 0.0)), 128)
    x, y = turned["landmarks"].round().long().unbind(1)
    depth = turned["depth"][0]
    assert depth[y[45], x[45]] > depth[y[36], x[36]] + 0.03  # turned to the left, the right eye is nearer


@settings(max_examples=8, deadline=None)
@given(st.floats(0.1, 0.7), st.floats(-0.3, 0.3))
def test_yaw_is_mirror_symmetric(yaw, pitch):
    person = replace(BARE, hair=replace(BARE.hair, style="bald", part=0.0))
    left, right = render([person] * 2, [replace(STUDIO, pose=(pitch, s * yaw, 0.0), gaze=(pitch, s * yaw))
                                        for s in (1, -1)], 64)  # fmt: skip
    assert (left["depth"] - right["depth"].flip(-1)).abs().mean() < 0.004
    points = right["landmarks"].clone()
    points[:, 0] = 63 - points[:, 0]
    for group in (range(17), range(17, 27), [36, 39, 42, 45], [48, 54]):
        mine = left["landmarks"][list(group)]
        theirs = points[list(group)[::-1]]
        assert (mine - theirs).abs().max() < 0.2


def test_landmarks_turn_with_the_head():
    """The nose tip moves by its distance from the axis times the sine of the angle, against the sides of the jaw."""
    shift = []
    for yaw in (-0.4, 0.0, 0.4):
        points = one(BARE, replace(STUDIO, pose=(0.0, yaw, 0.0)), 128)["landmarks"]
        shift.append(points[30, 0] - (points[36, 0] + points[45, 0]) / 2)
    assert shift[0] > 4
    assert abs(shift[1]) < 0.5
    assert shift[2] < -4
    raised = one(BARE, replace(STUDIO, pose=(0.35, 0.0, 0.0)), 128)["landmarks"]
    level = one(BARE, STUDIO, 128)["landmarks"]
    assert raised[30, 1] - raised[27, 1] < level[30, 1] - level[27, 1] - 2
    tilted = one(BARE, replace(STUDIO, pose=(0.0, 0.0, 0.3)), 128)["landmarks"]
    across = tilted[45] - tilted[36]
    assert abs(math.atan2(across[1], across[0]) - 0.3) < 0.02  # clockwise, y down


def test_iris_follows_the_gaze():
    """Dark pixels within an open eye move to the side that the eyes look to."""
    person = replace(BARE, eyes=replace(BARE.eyes, iris=(0.05, 0.03, 0.02), size=1.0, roundness=1.0, tilt=0.0))

    def iris(gaze):
        sample = one(person, replace(STUDIO, gaze=gaze, eye_open=1.2), 256)
        places = []
        for ident in (4, 5):
            mask = sample["parsing"] == ident
            weight = (0.6 - sample["image"].mean(0)).clamp(min=0) * mask
            weight = torch.where(weight > 0.6 * weight.max(), weight, 0)
            rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
            places.append(((columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()))
        return np.array(places)

    ahead, left, right = iris((0, 0)), iris((0, 0.35)), iris((0, -0.35))
    assert (left[:, 0] < ahead[:, 0] - 2).all()
    assert (right[:, 0] > ahead[:, 0] + 2).all()
    assert (iris((0.25, 0))[:, 1] < iris((-0.25, 0))[:, 1] - 1).all()
    sample = one(person, replace(STUDIO, gaze=(0.1, -0.2), pose=(0.3, 0.2, 0.1)))
    assert torch.allclose(sample["gaze"], torch.tensor([0.1, -0.2]))
    assert torch.allclose(sample["head_pose"], torch.tensor([0.3, 0.2, 0.1]))


def test_expression_moves_the_face():
    rest = one(BARE, STUDIO, 128)
    points = rest["landmarks"]
    assert not (rest["parsing"] == 10).any()
    opened = one(BARE, replace(STUDIO, mouth_open=0.8), 128)
    assert (opened["parsing"] == 10).sum() > 20
    assert opened["landmarks"][8, 1] > points[8, 1] + 2
    smiling = one(BARE, replace(STUDIO, smile=1.0), 128)["landmarks"]
    assert smiling[54, 0] - smiling[48, 0] > points[54, 0] - points[48, 0] + 2
    assert (smiling[[48, 54], 1] < points[[48, 54], 1] - 0.8).all()
    closed = one(BARE, replace(STUDIO, eye_open=0.0), 128)
    assert not where(closed, 4, 5).any()
    assert (closed["landmarks"][37, 1] - closed["landmarks"][41, 1]).abs() < 1
    raised = one(BARE, replace(STUDIO, brow_raise=1.0), 128)["landmarks"]
    assert (raised[17:27, 1] < points[17:27, 1] - 0.8).all()


def test_light_comes_from_its_side():
    side = replace(STUDIO.light, azimuth=1.2, elevation=0.2, ambient=0.3)
    sample = one(BARE, replace(STUDIO, light=side), 96)
    x, _ = centre(where(sample, 2))
    skin = where(sample, 1)
    columns = torch.arange(96)[None].expand(96, 96)
    brightness = sample["image"].mean(0)
    assert brightness[skin & (columns > x)].mean() > brightness[skin & (columns < x)].mean() + 0.08


def test_framing_places_the_face():
    eyes = one(BARE, STUDIO, 128)["landmarks"][36:48].mean(0)
    assert abs(eyes[0] - 63.5) < 2
    assert abs(eyes[1] - 64) < 4
    moved = one(BARE, replace(STUDIO, framing=Framing(x=0.1, y=-0.05)), 128)["landmarks"][36:48].mean(0)
    assert torch.allclose(moved - eyes, torch.tensor([12.8, -6.4]), atol=0.05)
    small = one(BARE, replace(STUDIO, framing=Framing(scale=0.5 * Framing().scale)), 128)["landmarks"]
    assert abs((small[45, 0] - small[36, 0]) * 2 / (one(BARE, STUDIO, 128)["landmarks"][[36, 45], 0].diff()) - 1) < 0.02
    far = one(BARE, replace(STUDIO, framing=Framing(x=3.0)), 64)  # nobody in the picture
    assert (far["parsing"] == 0).all()
    assert (far["depth"] == 0).all()


# --- Attributes agree with what is drawn ---


@pytest.mark.parametrize(("glasses", "worn"), [("none", False), ("glasses", True), ("sunglasses", True)])
def test_glasses(glasses, worn):
    sample = one(BARE, replace(STUDIO, glasses=glasses))
    assert sample["attributes"]["Eyeglasses"] is worn
    assert (sample["parsing"] == 3).any().item() is worn
    assert where(sample, 4, 5).any().item() is (glasses != "sunglasses")


@pytest.mark.parametrize("hat", ["none", "beanie", "cap"])
def test_hats(hat):
    sample = one(BARE, replace(STUDIO, hat=hat))
    assert sample["attributes"]["Wearing_Hat"] is (hat != "none")
    assert (sample["parsing"] == 14).any().item() is (hat != "none")


@pytest.mark.parametrize("style", ["bald", "buzz", "short", "parted", "bob", "long", "tied", "afro"])
def test_hair(style):
    person = replace(BARE, age=30.0, hair=replace(BARE.hair, style=style, colour=(0.1, 0.08, 0.08), recession=0.0))
    sample = one(person, STUDIO)
    shown = sample["attributes"]
    assert shown["Bald"] is (style == "bald")
    assert (sample["parsing"] == 13).any().item() is (style != "bald")
    assert shown["Black_Hair"] is (style != "bald")
    assert [shown[k] for k in ("Blond_Hair", "Brown_Hair", "Gray_Hair")] == [False] * 3
    long = where(sample, 13)[70:].sum() > 60
    assert long.item() is (style in ("bob", "long"))


def test_bangs_cover_the_forehead():
    person = replace(BARE, hair=replace(BARE.hair, style="bob", curl=0.0, recession=0.0))
    amounts = []
    for bangs in (False, True):
        sample = one(person, replace(STUDIO, bangs=bangs))
        assert sample["attributes"]["Bangs"] is bangs
        amounts.append(where(sample, 1)[:50].sum())
    assert amounts[1] < 0.75 * amounts[0]
    assert not one(BARE, replace(STUDIO, bangs=True))["attributes"]["Bangs"]  # nothing to comb


def test_beard_darkens_the_chin():
    bearded = replace(BARE, age=35.0, beard=Beard(1.0, "full"), hair=replace(BARE.hair, colour=(0.1, 0.08, 0.08)))
    chin = []
    for amount in (0.0, 1.0):
        sample = one(bearded, replace(STUDIO, beard=amount))
        assert sample["attributes"]["No_Beard"] is (amount == 0)
        x, y = sample["landmarks"][8].round().long().tolist()
        chin.append(sample["image"][:, y - 6 : y - 2, x - 3 : x + 4].mean())
    assert chin[1] < chin[0] - 0.15
    assert one(replace(bearded, female=1.0), STUDIO)["attributes"]["No_Beard"]
    assert one(replace(bearded, age=10.0), STUDIO)["attributes"]["No_Beard"]


@pytest.mark.parametrize("occluder", ["hand", "mask", "paper", "microphone"])
def test_occluders_cover_part_of_the_face(occluder):
    free = one(BARE, STUDIO)
    assert not free["occluder"].any()
    covered = one(BARE, replace(STUDIO, occluder=occluder, occluder_seed=5))
    mask = covered["occluder"][0]
    face = where(free, 1, 2, 4, 5, 6, 7, 10, 11, 12)
    assert 0.02 < (mask & face).sum() / face.sum() < 0.9
    changed = (covered["image"] - free["image"]).abs().amax(0) > 0.03
    assert changed[mask].float().mean() > 0.6
    assert not ProceduralFaces(1, 32, occluders=False)[0]["occluder"].any()


def test_earrings_are_said_where_they_are_seen():
    for style, female, seen in (("tied", 1.0, True), ("long", 1.0, False), ("short", 0.0, False)):
        person = replace(BARE, female=female, hair=replace(BARE.hair, style=style))
        sample = one(person, replace(STUDIO, earrings=True))
        assert sample["attributes"]["Wearing_Earrings"] is seen
        assert (sample["parsing"] == 15).any().item() is seen


def test_attributes_have_celeba_names_and_captions_say_them():
    view = replace(STUDIO, smile=0.8, glasses="sunglasses", hat="beanie", occluder="mask", years=0)
    man = replace(BARE, age=70.0, female=0.0)
    shown, text = one(man, view, 32)["attributes"], one(man, view, 32)["caption"]
    assert {"Bangs", "Eyeglasses", "No_Beard", "Smiling", "Young", "Male", "Pale_Skin", "Wavy_Hair"} <= set(shown)
    assert shown["Male"]
    assert shown["Smiling"]
    assert not shown["Young"]
    for word in ("man", "sunglasses", "beanie", "smiling"):
        assert word in text, text
    assert one(replace(man, age=25.0), view, 32)["attributes"]["Young"]


# --- People ---


def test_population_is_balanced():
    people = [draw_person(0, i) for i in range(400)]
    women = np.mean([p.female > 0.5 for p in people])
    ages = np.array([p.age for p in people])
    tones = np.array([p.skin.tone for p in people])
    assert 0.42 < women < 0.58
    assert 5 <= ages.min() < 9
    assert 80 < ages.max() <= 85
    assert (np.histogram(tones, 5, (0, 1))[0] > 30).all()
    assert {p.hair.style for p in people} == {"bald", "buzz", "short", "parted", "bob", "long", "tied", "afro"}
    assert not any(p.beard.amount > 0 for p in people if p.female > 0.5)


def test_a_person_stays_the_same_and_people_differ():
    """Two views of one person, brought to a common pose and light, differ less than two people do."""
    people = [draw_person(3, i) for i in range(10)]
    worn = [replace(STUDIO, years=years, smile=smile) for years, smile in ((-1.0, 0.0), (1.0, 0.3))]
    first, second = (
        torch.stack([sample["image"] for sample in render(people, [view] * 10, 48)]).flatten(1) for view in worn
    )
    distance = torch.cdist(first, second)
    assert (distance.argmin(1) == torch.arange(10)).all()
    assert distance.diag().mean() < 0.4 * distance[~torch.eye(10, dtype=bool)].mean()
    vectors = np.array([numbers(p) for p in people])
    assert (vectors == np.array([numbers(draw_person(3, i)) for i in range(10)])).all()
    assert all(np.linalg.norm(a - b) > 1 for i, a in enumerate(vectors) for b in vectors[:i])


@pytest.mark.parametrize(
    ("component", "idents", "least"),
    [("nose", (2,), 0.6), ("brows", (6, 7), 0.4), ("lips", (10, 11, 12), 0.5), ("hair", (13,), 0.5)],
)
def test_replacing_a_component_changes_its_region(component, idents, least):
    """Most of the change lies in the old or new region of the component, or within a soft border around it."""
    base, other = BARE, draw_person(0, 8)
    changed = replace(base, **{component: getattr(other, component)})
    before, after = one(base, STUDIO, 128), one(changed, STUDIO, 128)
    difference = (before["image"] - after["image"]).abs().sum(0)
    region = where(before, *idents) | where(after, *idents)
    near = torch.nn.functional.max_pool2d(region[None].float(), 15, 1, 7)[0] > 0
    assert difference.sum() > 1
    assert difference[near].sum() > least * difference.sum()
    assert (difference[~near] > 0.25).float().mean() < 0.02


def test_age_shows():
    young, old = render([replace(BARE, age=25.0), replace(BARE, age=80.0)], [STUDIO] * 2, 64)
    assert (young["image"] - old["image"]).abs().mean() > 0.004
    assert old["attributes"]["Bags_Under_Eyes"]


# --- Clips ---


def test_clips_are_smooth_and_alive():
    clip = draw_clip(1, 2, 120)
    poses, gazes = np.array([v.pose for v in clip]), np.array([v.gaze for v in clip])
    assert np.abs(np.diff(poses, axis=0)).max() < 0.06
    assert poses.std(0).max() > 0.01
    steps = np.abs(np.diff(gazes, axis=0)).max(1)
    assert np.median(steps) < 0.01 < steps.max()  # fixations, and jumps between them
    assert len({v.background for v in clip}) == len({v.light for v in clip}) == 1
    assert min(v.eye_open for v in clip) < 0.3 < max(v.eye_open for v in clip)
    assert draw_clip(1, 2, 30)[:30] == draw_clip(1, 2, 30)
    frames = torch.stack([s["image"] for s in render([draw_person(1, 2)] * 6, clip[:6], 48)])
    strangers = torch.stack([one(draw_person(1, i), draw_view(1, i), 48)["image"] for i in range(6)])
    assert frames.diff(dim=0).abs().mean() < 0.25 * strangers.diff(dim=0).abs().mean()


def test_a_longer_clip_begins_like_a_shorter_one():
    short, long = draw_clip(5, 1, 10), draw_clip(5, 1, 40)
    assert [v.pose for v in short] == [v.pose for v in long[:10]]
    assert [v.gaze for v in short] == [v.gaze for v in long[:10]]


# --- Sheets ---


def test_contact_sheet():
    red, blue = torch.zeros(3, 4, 6), np.zeros((3, 4, 6), np.uint8)
    red[0] = 1
    blue[2] = 255
    sheet = contact_sheet([red, blue, torch.full((1, 4, 6), 0.5)], columns=2, gap=1)
    assert sheet.shape == (9, 13, 3)
    assert sheet.dtype == np.uint8
    assert (sheet[0, 0] == (255, 0, 0)).all()
    assert (sheet[3, 7] == (0, 0, 255)).all()
    assert (sheet[5, 0] == 128).all()
    assert (sheet[4] == 255).all()
    assert (sheet[5:, 7:] == 255).all()


# --- What is done to faces ---


def test_sketch_forge_and_edit_of_a_sample():
    faces = ProceduralFaces(8, 64, seed=6, occluders=False)
    assert faces.sketch(2, 1).shape == (1, 64, 64)
    forgery = faces.forge(2, "splice", frames=2)
    assert forgery.images.shape == (2, 3, 64, 64)
    assert forgery.identity != forgery.source_identity
    edited = faces.edit(2, ["nose", "hair"])
    assert edited.image.shape == (3, 64, 64)
    assert torch.equal(edited.original, faces[2]["image"])
