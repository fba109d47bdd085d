"""Cross-forgery protocols: families, splits and clips, of procedural people and of the layouts of real data sets."""

from __future__ import annotations

import importlib
import shutil

import numpy as np
import pytest

from pyface.data.forgery import FORGERIES
from pyface.data.protocols import Part, describe, face_clips, families, parse_parts
from pyface.data.sets.synthesis import LAYOUTS, Progress
from pyface.errors import UserError


def centre(pixels):
    """A detector that finds the face where the procedural clips have it."""
    side = min(pixels.shape[:2]) // 2
    return [((pixels.shape[1] - side) // 2, (pixels.shape[0] - side) // 2, side, side)]


HERE = f"{__name__}:centre"


def synthesize(layout, out, count, **settings):
    """A small data set of very short videos."""
    write = importlib.import_module(LAYOUTS[layout].module).synthesize
    write(out, count, seed=0, image_size=24, progress=Progress(), frames=2, **settings)
    return out


@pytest.fixture(scope="module")
def ffpp(tmp_path_factory):
    return synthesize("ffpp", tmp_path_factory.mktemp("sets") / "ffpp", 6, compressions=("c23",))


def test_items_are_families_data_sets_or_both(ffpp):
    assert families("procedural") == FORGERIES
    assert set(families(ffpp)) == {"Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures"}
    assert parse_parts("all", "procedural") == [Part("procedural")]
    assert parse_parts("splice, texture,splice", "procedural") == [Part("procedural", ("splice", "texture"))]
    text = f"splice,{ffpp}:FaceSwap,{ffpp}:Deepfakes"
    assert parse_parts(text, "procedural") == [
        Part("procedural", ("splice",)),
        Part(str(ffpp), ("FaceSwap", "Deepfakes")),
    ]
    assert parse_parts(f"{ffpp}", "procedural") == [Part(str(ffpp))]
    for wrong in ("", "nothing", "nowhere:splice", f"{ffpp}:splice"):
        with pytest.raises(UserError):
            parse_parts(wrong, "procedural")


def test_procedural_clips_share_their_real_videos_and_know_the_gaze():
    part = Part("procedural", ("splice", "reenactment"))
    clips = face_clips(part, "train", size=32, frames=3, videos=2, seed=5, step=1)
    assert describe(clips) == "2 real, 2 reenactment, 2 splice"
    assert all(clip.faces.shape == (3, 32, 32, 3) and clip.gaze.shape == (3, 2) for clip in clips)
    real, spliced, acted = clips[:3]
    assert real.identity == spliced.identity == acted.identity
    assert real.source == "" != spliced.source
    assert np.array_equal(real.gaze, spliced.gaze)
    assert np.abs(real.gaze - acted.gaze).max() > 0.1
    assert not np.array_equal(real.faces, spliced.faces)
    others = face_clips(part, "test", size=32, frames=1, videos=2, seed=5)
    assert not {clip.identity for clip in clips} & {clip.identity for clip in others}
    again = face_clips(Part("procedural", ("splice",)), "train", size=32, frames=3, videos=1, seed=5, step=1)
    assert np.array_equal(again[1].faces, spliced.faces)


def test_cache_holds_what_memory_would(tmp_path):
    part = Part("procedural", ("texture",))
    wanted = face_clips(part, "val", size=32, frames=2, videos=1)
    for _ in range(2):
        kept = face_clips(part, "val", size=32, frames=2, videos=1, cache=tmp_path)
        assert [clip.id for clip in kept] == [clip.id for clip in wanted]
        for one, other in zip(kept, wanted):
            assert isinstance(one.faces, np.memmap)
            assert np.array_equal(one.faces, other.faces)
            assert np.array_equal(one.gaze, other.gaze)
    larger = face_clips(part, "val", size=48, frames=2, videos=1, cache=tmp_path)
    assert larger[0].faces.shape[1] == 48
    for file in tmp_path.rglob("texture/*-0000.npy"):
        file.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="1 of 2 videos"):
        face_clips(Part("procedural", ("texture",)), "val", size=32, frames=2, videos=1, cache=tmp_path)


def test_faceforensics_folder_by_family_and_split(ffpp, tmp_path):
    part = Part(str(ffpp), ("FaceSwap",))
    clips = face_clips(part, "train", size=24, frames=4, videos=1, detector=HERE, cache=tmp_path)
    assert describe(clips) == "1 real, 1 FaceSwap"
    assert all(clip.faces.shape == (2, 24, 24, 3) and clip.gaze is None for clip in clips)
    assert {clip.identity for clip in clips}.isdisjoint(
        clip.identity for clip in face_clips(part, "test", size=24, frames=1, detector=HERE)
    )
    every = face_clips(Part(str(ffpp)), "test", size=24, frames=1, detector=HERE)
    assert describe(every) == "2 real, 2 Deepfakes, 2 Face2Face, 2 FaceSwap, 2 NeuralTextures"


@pytest.mark.parametrize(("layout", "family"), [("celebdf", "Celeb-synthesis"), ("wilddeepfake", "unknown")])
def test_sets_without_validation_make_one_of_other_identities(layout, family, tmp_path):
    root = synthesize(layout, tmp_path / layout, 12)
    assert families(root) == (family,)
    who = {}
    for split in ("train", "val", "test"):
        clips = face_clips(Part(str(root)), split, size=16, frames=1, detector=HERE)
        who[split] = {clip.identity for clip in clips}
        assert {clip.label for clip in clips} <= {0, 1}
    assert who["train"]
    assert who["val"]
    assert who["train"].isdisjoint(who["val"])


def test_test_sets_are_not_trained_on(tmp_path):
    root = synthesize("dfd", tmp_path / "dfd", 1)
    assert describe(face_clips(Part(str(root)), "test", size=16, frames=1, detector=HERE)) == (
        "1 real, 1 DeepFakeDetection"
    )
    with pytest.raises(UserError, match="only, none for train"):
        face_clips(Part(str(root)), "train", size=16, frames=1, detector=HERE)


def test_unusable_videos_are_counted_and_bad_requests_refused(ffpp, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(ffpp, root)
    videos = sorted((root / "manipulated_sequences/FaceSwap/c23/videos").glob("*.mp4"))
    for video in videos:
        video.write_bytes(video.read_bytes()[:500])
    with pytest.warns(UserWarning, match=r"cannot be used.*left out"):
        clips = face_clips(Part(str(root), ("FaceSwap",)), "train", size=16, frames=1, detector=HERE)
    assert {clip.label for clip in clips} == {0}
    for wrong in ({"size": 8}, {"frames": 0}, {"videos": 0}, {"margin": 0}, {"step": 0}):
        with pytest.raises(UserError, match="need size"):
            face_clips(Part("procedural"), "train", **({"size": 16} | wrong))
    with pytest.raises(UserError, match="no forgery family"):
        face_clips(Part("procedural", ("magic",)), "train", size=16)
    with pytest.raises(UserError, match="no split"):
        face_clips(Part("procedural"), "dev", size=16)
