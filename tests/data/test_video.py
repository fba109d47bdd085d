"""Videos: any frame by index, writing, and files that are not what they should be."""

from __future__ import annotations

import pickle
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader

from pyface.data.images import write_png
from pyface.data.video import FrameFolder, Video, ahead, open_video, write_video
from pyface.errors import UserError

LENGTH, HEIGHT, WIDTH = 45, 36, 52


def picture(index: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth pattern that moves, and a patch whose grey is the index."""
    noise = gaussian_filter(np.random.default_rng(5).random((height, width, 3)), (4, 4, 0))
    noise = 0.8 * noise[..., :1] + 0.2 * noise  # yuv420p halves the resolution of colour
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    moved = np.roll(noise, 2 * index, 1)
    moved[:12, :12] = (index * 5 % 256) / 255
    return (moved * 255).round().astype(np.uint8)


def sequential(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encode(path, codec: str, options: dict[str, str], times=None, muxer: dict[str, str] | None = None) -> None:
    """Straight through PyAV: containers and settings that write_video does not offer."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = HEIGHT, WIDTH
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(LENGTH):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "größe 日本.mp4"
    write_video(path, (picture(index) for index in range(LENGTH)), gop=13, crf=12)
    return path


@pytest.fixture(scope="module")
def expected(clip):
    return sequential(clip)


def test_the_clip_tests_what_it_should(clip):
    """Random access is only hard with B-frames and several key frames."""
    with av.open(str(clip)) as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    assert kinds.count(av.video.frame.PictureType.B) > 10
    assert kinds.count(av.video.frame.PictureType.I) >= 4


def test_every_single_frame_is_the_one_of_a_sequential_decode(clip, expected):
    assert len(Video(clip)) == len(expected) == LENGTH
    for index in range(LENGTH):
        assert np.array_equal(Video(clip).pixels([index])[0], expected[index]), index


@settings(deadline=None, max_examples=40)
@given(calls=st.lists(st.lists(st.integers(0, LENGTH - 1), max_size=8), max_size=4))
def test_any_order_of_reading_gives_the_same_frames(clip, expected, calls):
    video = Video(clip)
    for indices in calls:
        assert np.array_equal(video.pixels(indices), expected[np.array(indices, int)])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("open.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=10:min-keyint=10:scenecut=0"}),
        ("b.mkv", "libx264", {"g": "9"}),
        ("old.avi", "mpeg4", {"bf": "2", "g": "9"}),
        ("packed.mp4", "mpeg4", {"bf": "2", "g": "9"}),
    ],
)
def test_other_codecs_and_containers(tmp_path, name, codec, options):
    encode(tmp_path / name, codec, options)
    expected = sequential(tmp_path / name)
    video = Video(tmp_path / name)
    assert len(video) == len(expected)
    for index in np.random.default_rng(1).permutation(len(expected)):
        assert np.array_equal(video.pixels([index])[0], expected[index]), index


def test_times_are_those_of_the_file(tmp_path):
    times = np.random.default_rng(2).integers(20, 90, LENGTH).cumsum()
    encode(tmp_path / "uneven.mp4", "libx264", {"g": "9", "bf": "2"}, times.tolist())
    np.testing.assert_allclose(Video(tmp_path / "uneven.mp4").times, (times - times[0]) / 1000, atol=1e-4)
    write_video(tmp_path / "even.mp4", [picture(index) for index in range(5)], fps=12.5)
    np.testing.assert_allclose(Video(tmp_path / "even.mp4").times, np.arange(5) / 12.5, atol=1e-6)
    for number in (3, 4, 9):
        write_png(tmp_path / "frames" / f"{number}.png", picture(number))
    np.testing.assert_allclose(FrameFolder(tmp_path / "frames", 10).times, (0, 0.1, 0.6))


@pytest.mark.parametrize("size", [1, 4])
def test_ahead_gives_the_same_and_no_more_than_asked(size):
    made, most = 0, 0

    def items():
        nonlocal made
        for index in range(40):
            made += 1
            yield index

    for given_, item in enumerate(ahead(items(), size)):
        assert item == given_
        most = max(most, made - given_)
    assert made == 40
    assert most <= size + 3  # one given, size waiting, one to be put there, one being made


def test_ahead_raises_what_its_items_raise_and_stops_when_it_is_left():
    def items(closed):
        try:
            yield 1
            raise UserError("damaged")
        finally:
            closed.append(True)

    first, second = [], []
    run = ahead(items(first), 1)
    assert next(run) == 1
    with pytest.raises(UserError, match="damaged"):
        next(run)
    before = threading.active_count()
    run = ahead(items(second), 1)
    next(run)
    run.close()
    assert first == second == [True]
    assert threading.active_count() == before


def test_frames_at_uneven_times_are_counted_not_timed(tmp_path):
    times = np.random.default_rng(2).integers(20, 90, LENGTH).cumsum().tolist()
    encode(tmp_path / "uneven.mp4", "libx264", {"g": "9"}, times)
    expected = sequential(tmp_path / "uneven.mp4")
    video = Video(tmp_path / "uneven.mp4")
    assert len(video) == LENGTH
    assert np.array_equal(video.pixels([40, 3, 22]), expected[[40, 3, 22]])


def test_frames_are_floats_in_zero_to_one(clip, expected):
    frames = Video(clip).frames([7, 2])
    assert frames.dtype == torch.float32
    assert frames.is_contiguous()
    assert torch.equal(frames, torch.from_numpy(expected[[7, 2]]).permute(0, 3, 1, 2).float() / 255)
    assert Video(clip).frames().shape == (LENGTH, 3, HEIGHT, WIDTH)
    assert Video(clip).frames([]).shape == (0, 3, HEIGHT, WIDTH)


def test_what_is_written_is_what_is_read_but_for_the_codec(tmp_path):
    pictures = np.stack([picture(index) for index in range(12)])
    errors = {}
    for crf in (0, 23, 40):
        write_video(tmp_path / f"{crf}.mp4", pictures, crf=crf, fps=30)
        video = Video(tmp_path / f"{crf}.mp4")
        assert (len(video), video.size, video.fps) == (12, (HEIGHT, WIDTH), 30)
        errors[crf] = 10 * np.log10(255**2 / np.mean((video.pixels(range(12)) - pictures.astype(float)) ** 2))
    assert errors[0] > 38
    assert errors[0] > errors[23] + 1 > errors[40] + 4


def test_tensors_and_arrays_are_written_alike_and_twice_the_same(tmp_path):
    pictures = [picture(index) for index in range(6)]
    write_video(tmp_path / "a.mp4", pictures)
    write_video(tmp_path / "b.mp4", [torch.from_numpy(p).permute(2, 0, 1) / 255 for p in pictures])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_an_odd_side_grows_by_its_last_row_or_column(tmp_path):
    pictures = [picture(index, 35, 51) for index in range(5)]
    write_video(tmp_path / "odd.mp4", pictures, crf=0)
    video = Video(tmp_path / "odd.mp4")
    assert video.size == (36, 52)
    pixels = video.pixels([4])[0].astype(int)
    assert abs(pixels[:35, :51] - pictures[4]).mean() < 4
    assert abs(pixels[35, :51] - pictures[4][34]).mean() < 6
    assert abs(pixels[:35, 51] - pictures[4][:, 50]).mean() < 6


def test_a_video_survives_pickling(clip, expected):
    video = Video(clip)
    video.pixels([20])
    assert np.array_equal(pickle.loads(pickle.dumps(video)).pixels([21])[0], expected[21])


def test_forked_workers_and_their_parent_do_not_move_each_other(tmp_path):
    """The file must be longer than what FFmpeg reads ahead, or its shared position would not matter."""
    noise = np.random.default_rng(3).integers(0, 256, (60, 64, 80, 3), dtype=np.uint8)
    write_video(tmp_path / "long.mp4", noise, crf=10, gop=10)
    assert (tmp_path / "long.mp4").stat().st_size > 200_000
    expected = sequential(tmp_path / "long.mp4")
    video = Video(tmp_path / "long.mp4")
    video.pixels([3])
    loader = DataLoader(_Single(video), batch_size=5, num_workers=2, multiprocessing_context="fork", timeout=60)
    batches = []
    for number, batch in enumerate(loader):
        batches.append(batch)
        assert np.array_equal(video.pixels([4 + number])[0], expected[4 + number])
    assert np.array_equal(torch.cat(batches).numpy(), expected)


class _Single(torch.utils.data.Dataset):
    def __init__(self, video):
        self.video = video

    def __len__(self):
        return len(self.video)

    def __getitem__(self, index):
        return torch.from_numpy(self.video.pixels([index])[0])


def extract(clip, folder, names) -> None:
    for index, name in names.items():
        write_png(folder / name, Video(clip).pixels([index])[0])


def test_a_folder_of_frames_is_read_like_a_video(clip, expected, tmp_path):
    extract(clip, tmp_path / "ünï", {index: f"frame{index}.png" for index in range(12)})
    (tmp_path / "ünï" / "notes.txt").write_text("no frame")
    (tmp_path / "ünï" / ".hidden.png").write_text("no frame")
    folder = open_video(tmp_path / "ünï")
    assert isinstance(folder, FrameFolder)
    assert (len(folder), folder.size, list(folder.numbers)) == (12, (HEIGHT, WIDTH), list(range(12)))
    assert np.array_equal(folder.pixels([11, 2, 2]), expected[[11, 2, 2]])
    assert torch.equal(folder.frames([5]), Video(clip).frames([5]))


def test_missing_frames_of_a_folder_show_in_the_numbers(clip, tmp_path):
    extract(clip, tmp_path, {3: "0003.png", 4: "0004.png", 8: "0008.png"})
    assert list(FrameFolder(tmp_path).numbers) == [3, 4, 8]
    extract(clip, tmp_path, {9: "title.png"})
    assert list(FrameFolder(tmp_path).numbers) == [0, 1, 2, 3]


def test_an_index_outside_the_video_is_named(clip):
    for index in (-1, LENGTH):
        with pytest.raises(UserError, match=f"0 to {LENGTH - 1}; frame {index} is not one"):
            Video(clip).pixels([0, index])


def test_a_video_cut_off_names_the_missing_frame(tmp_path):
    """With the index at the front, as in videos for the web, all but the end can be read."""
    front = tmp_path / "front.mp4"
    encode(front, "libx264", {"g": "13"}, muxer={"movflags": "faststart"})
    whole = front.read_bytes()
    assert len(Video(front).pixels([30])) == 1
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 7 // 10])
    with pytest.raises(UserError, match=rf"cut\.mp4 is cut off: frame \d+ of {LENGTH} is missing"):
        Video(tmp_path / "cut.mp4").pixels([0])


def test_a_video_without_its_index_is_refused(clip, tmp_path):
    whole = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.mp4 is not a video that can be read, or it is cut off"):
        len(Video(tmp_path / "cut.mp4"))


def test_damage_inside_names_file_and_frame(clip, tmp_path):
    content = bytearray(clip.read_bytes())
    start = content.find(b"mdat") + 2500
    for place in range(start, start + 3000):
        content[place] = content[place] * 7 + 3 & 255
    (tmp_path / "hurt.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"frame \d+ of .*hurt\.mp4 cannot be decoded"):
        Video(tmp_path / "hurt.mp4").pixels(range(LENGTH))


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match=r"text\.mp4 is not a video"):
        Video(tmp_path / "text.mp4").frames([0])
    with pytest.raises(UserError, match="no such file"):
        len(Video(tmp_path / "none.mp4"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="no pictures in it"):
        len(Video(tmp_path / "sound.mp4"))


def test_bad_folders_of_frames_are_refused(clip, tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        FrameFolder(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        FrameFolder(tmp_path / "none")
    extract(clip, tmp_path, {0: "0000.png", 1: "0001.png"})
    write_png(tmp_path / "0002.png", picture(0, 20, 30))
    (tmp_path / "0003.png").write_bytes((tmp_path / "0000.png").read_bytes()[:200])
    folder = FrameFolder(tmp_path)
    assert len(folder.frames([0, 1])) == 2
    with pytest.raises(UserError, match=rf"frame 2 of .* is 30 x 20 pixels, the first is {WIDTH} x {HEIGHT}"):
        folder.frames([0, 2])
    with pytest.raises(UserError, match=r"frame 3 of .*0003\.png"):
        folder.frames([3])


def test_nothing_is_left_of_a_video_that_failed(tmp_path):
    def frames():
        yield picture(0)
        raise RuntimeError("camera unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        write_video(tmp_path / "a.mp4", frames())
    with pytest.raises(UserError, match="there are no frames"):
        write_video(tmp_path / "a.mp4", [])
    with pytest.raises(UserError, match=r"frame 1 is \[20, 30, 3\], the first is"):
        write_video(tmp_path / "a.mp4", [picture(0), picture(0, 20, 30)])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_video_is_kept(clip):
    before = clip.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        write_video(clip, [picture(0)])
    assert clip.read_bytes() == before


def test_without_pyav_the_command_is_named(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (lambda: len(Video(clip)), lambda: write_video(tmp_path / "a.mp4", [picture(0)])):
        with pytest.raises(UserError, match="pip install av"):
            call()
