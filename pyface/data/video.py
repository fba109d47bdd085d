"""Frames of videos by index, from a video file or a folder of pictures, and writing H.264."""

from __future__ import annotations

import bisect
import os
import queue
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyface.data.images import SUFFIXES, read_photo, replacing
from pyface.data.sets.folders import natural, to_pixels
from pyface.errors import UserError

Item = TypeVar("Item")

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"))


def open_video(path: str | os.PathLike) -> Footage:
    """The video at ``path``: a :class:`Video` if it is a file, a :class:`FrameFolder` if it is a folder."""
    return FrameFolder(path) if os.path.isdir(path) else Video(path)


class Footage(ABC):
    """Frames of one video, read where asked; the frames have one size.

    Attributes:
        name: where the frames come from, for messages.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @property
    @abstractmethod
    def fps(self) -> float:
        """Frames per second."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""

    @property
    def numbers(self) -> Sequence[int]:
        """The number of each frame in the video it was taken from, rising; 0, 1, 2... if none is missing."""
        return range(len(self))

    @property
    def times(self) -> Sequence[float]:
        """Seconds from the first frame to each; where the file does not say them, by number and frame rate."""
        first = self.numbers[0]
        return [(number - first) / self.fps for number in self.numbers]

    @abstractmethod
    def _read(self, order: Sequence[int]) -> Iterable[np.ndarray]:
        """ndarray[H, W, 3] uint8 for each position in ``order``, which rises and is within the video."""

    def pixels(self, indices: Iterable[int]) -> np.ndarray:
        """ndarray[T, H, W, 3] uint8, RGB: the frames at these positions, in the order given; repeats are welcome.

        Raises:
            UserError: a position outside the video, or a frame that cannot be read, each named.
        """
        indices = [int(index) for index in indices]
        for index in indices:
            if not 0 <= index < len(self):
                raise UserError(f"{self.name} has {len(self)} frames, 0 to {len(self) - 1}; frame {index} is not one")
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        order = sorted(places)
        out = np.empty((len(indices), *self.size, 3), np.uint8)
        for index, frame in zip(order, self._read(order)):
            if frame.shape != out.shape[1:]:
                raise UserError(
                    f"frame {index} of {self.name} is {frame.shape[1]} x {frame.shape[0]} pixels, "
                    f"the first is {self.size[1]} x {self.size[0]}; frames of a video must have one size"
                )
            out[places[index]] = frame
        return out

    def frames(self, indices: Iterable[int] | None = None) -> Tensor:
        """Tensor[T, 3, H, W] float32 in [0, 1]: the frames at these positions, or all of them."""
        pixels = torch.from_numpy(self.pixels(range(len(self)) if indices is None else indices))
        return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)


class Video(Footage):
    """A video file, decoded by PyAV where asked.

    Nothing is read until it is needed. Then one pass over the packets, which decodes nothing, finds when each frame
    is shown and which are key frames, so frame ``i`` is frame ``i`` whatever the codec's order. Reading goes to
    the key frame before and decodes on from there; a frame that follows the last one read costs no new search.
    A key frame every few seconds is usual, so single frames in random order are slow: sort them, or extract them.
    Sound is left out, and a rotation flag is not applied.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._cursor: _Cursor | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._index.shown)

    @property
    def fps(self) -> float:
        return self._index.fps

    @property
    def size(self) -> tuple[int, int]:
        return self._index.size

    @property
    def times(self) -> Sequence[float]:
        shown, tick = self._index.shown, self._index.tick
        return [float((time - shown[0]) * tick) for time in shown]

    @cached_property
    def _index(self) -> _Index:
        av = import_av()
        if not self.path.is_file():
            raise UserError(f"cannot read {self.name}: there is no such file")
        shown, keys, promised = [], [], 0
        try:
            with av.open(self.name, "r") as container:
                if not container.streams.video:
                    raise UserError(f"{self.name} has no pictures in it, only sound or data")
                stream = container.streams.video[0]
                fps, promised = float(stream.average_rate or 0), stream.frames
                size = (stream.codec_context.height, stream.codec_context.width)
                tick = stream.time_base
                packets = 0
                for packet in container.demux(stream):
                    if packet.dts is None and packet.pts is None:  # the empty packet that ends the stream
                        continue
                    if packet.is_corrupt:
                        break
                    packets += 1
                    if packet.pts is None:
                        raise UserError(f"{self.name} does not say when its frames are shown; re-encode it to mp4")
                    if packet.is_discard:
                        continue
                    shown.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append((packet.pts, packet.dts if packet.dts is not None else packet.pts))
        except av.error.FFmpegError as error:
            raise UserError(f"{self.name} is not a video that can be read, or it is cut off ({error})") from error
        if packets < promised:
            raise UserError(f"{self.name} is cut off: frame {packets} of {promised} is missing")
        if not shown or not keys:
            raise UserError(f"{self.name} holds no frames")
        return _Index(sorted(shown), sorted(keys), fps, size, tick)

    def _read(self, order: Sequence[int]) -> Iterable[np.ndarray]:
        with self._lock:
            for index in order:
                yield self._decode(index)

    def _decode(self, index: int) -> np.ndarray:
        av, times = import_av(), self._index
        wanted = times.shown[index]
        shown, decoded = times.keys[max(0, bisect.bisect_right(times.keys, wanted, key=lambda key: key[0]) - 1)]
        cursor = self._cursor
        try:
            # A cursor that a worker process inherited shares its file position with the parent: never touch it.
            if cursor is None or cursor.process != os.getpid():
                self._cursor = cursor = _Cursor(av.open(self.name, "r"))
            if not cursor.next <= index or times.shown[cursor.next] < shown:
                cursor.seek(decoded)
            for frame in cursor.frames:
                if frame.pts is None:
                    continue
                cursor.next = bisect.bisect_right(times.shown, frame.pts)
                if frame.pts == wanted and not frame.is_corrupt:
                    return _rgb(frame)
                if frame.pts >= wanted:
                    break
        except av.error.FFmpegError as error:
            self._cursor = None
            raise UserError(f"frame {index} of {self.name} cannot be decoded; the file is damaged ({error})") from error
        self._cursor = None
        raise UserError(
            f"frame {index} of {self.name} cannot be decoded; the file is damaged or cut off, or gives "
            f"wrong times: re-encode it to mp4"
        )


@dataclass(frozen=True)
class _Index:
    """When each frame is shown; (shown, decoded) times of the key frames; both in ticks of so many seconds."""

    shown: list[int]
    keys: list[tuple[int, int]]
    fps: float
    size: tuple[int, int]
    tick: Fraction


class _Cursor:
    """An open decoder, and the index of the frame that it gives next.

    It starts no threads: FFmpeg's wait for each other when they are freed, and a process forked from this one, such
    as a worker of a DataLoader, would free threads that it does not have and hang.
    """

    def __init__(self, container) -> None:
        self.container, self.process = container, os.getpid()
        self.stream = container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.frames = container.decode(self.stream)
        self.next = 0

    def seek(self, decoded: int) -> None:
        self.container.seek(decoded, stream=self.stream)
        self.frames = self.container.decode(self.stream)


def _rgb(frame) -> np.ndarray:
    try:
        return frame.to_ndarray(format="rgb24", threads=1)
    except TypeError:  # an older PyAV, which never starts threads here and so has no such argument
        return frame.to_ndarray(format="rgb24")


class Pictures(Footage):
    """Frames that are pictures of their own.

    Args:
        name: for messages.
        names: file names of the frames, in order. Their last run of digits is the frame's number.
        fps: frames per second, which pictures do not say.
    """

    def __init__(self, name: str, names: Sequence[str], fps: float = 25.0) -> None:
        if not names:
            raise UserError(f"{name} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        self.name, self.names, self._fps = name, list(names), fps

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fps(self) -> float:
        return self._fps

    @cached_property
    def size(self) -> tuple[int, int]:
        (first,) = self._read([0])
        return first.shape[:2]

    @cached_property
    def numbers(self) -> Sequence[int]:
        digits = [re.findall(r"\d+", Path(name).stem) for name in self.names]
        if all(digits):
            numbers = [int(groups[-1]) for groups in digits]
            if all(a < b for a, b in zip(numbers, numbers[1:])):
                return numbers
        return range(len(self))


class FrameFolder(Pictures):
    """A folder of frames as pictures, in natural order of their names; sub-folders are not entered.

    Args:
        path: of the folder.
        fps: frames per second, which pictures do not say.
        reduce: bring pictures of more than 8 bits per channel to 8, instead of refusing them.
    """

    def __init__(self, path: str | os.PathLike, fps: float = 25.0, *, reduce: bool = False) -> None:
        self.path, self.reduce = Path(path), reduce
        try:
            names = [entry.name for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        names = sorted((name for name in names if Path(name).suffix.lower() in SUFFIXES), key=natural)
        super().__init__(str(path), names, fps)

    def _read(self, order: Sequence[int]) -> Iterable[np.ndarray]:
        for index in order:
            try:
                yield read_photo(self.path / self.names[index], reduce=self.reduce).pixels
            except UserError as error:
                raise UserError(f"frame {index} of {self.name}: {error}") from error


def ahead(items: Iterable[Item], size: int) -> Iterator[Item]:
    """The items, made in a thread that runs at most ``size`` of them ahead; what it raises is raised here.

    The thread ends, and closes the iterator that it reads, when this generator is closed or has ended.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(size)
    stop = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not put((True, item)):
                    break
            else:
                put((False, None))
        except BaseException as error:
            put((False, error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stop.set()
        thread.join()


def write_video(
    path: str | os.PathLike,
    frames: Iterable[Tensor | np.ndarray],
    *,
    fps: float = 25.0,
    crf: int = 23,
    gop: int = 250,
    overwrite: bool = False,
) -> None:
    """Write an mp4 of H.264 in yuv420p; it appears whole or not at all, and the same frames give the same file.

    Args:
        path: of the file.
        frames: Tensor[3, H, W] in [0, 1] or ndarray[H, W, 3] uint8, all of one size. The format needs even sides:
            an odd one grows by repeating its last row or column.
        fps: frames per second.
        crf: x264's constant rate factor. 0 loses nothing but half the colour resolution; 23 and 40 are the "c23" and
            "c40" of FaceForensics++.
        gop: frames from one key frame to the next at most.

    Raises:
        UserError: no frames, mixed sizes, PyAV or x264 is missing, ``path`` exists and ``overwrite`` is not set.
    """
    av = import_av()
    if "libx264" not in av.codecs_available:
        raise UserError("this PyAV was built without libx264; install the wheel from PyPI: pip install --upgrade av")
    with replacing(path, overwrite=overwrite) as temporary:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream, size = None, None
            for number, frame in enumerate(frames):
                pixels = to_pixels(frame) if isinstance(frame, Tensor) else frame
                if stream is None:
                    size = pixels.shape
                    # One thread: x264 writes other bytes with another number of threads.
                    options = {"crf": str(crf), "g": str(gop), "threads": "1"}
                    rate = Fraction(fps).limit_denominator(1001)
                    stream = container.add_stream("libx264", rate=rate, options=options)
                    stream.pix_fmt = "yuv420p"
                    stream.height, stream.width = (side + side % 2 for side in size[:2])
                if pixels.shape != size:
                    raise UserError(
                        f"cannot write {path}: frame {number} is {list(pixels.shape)}, the first is {list(size)}"
                    )
                even = np.pad(pixels, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
                container.mux(stream.encode(picture))
            if stream is None:
                raise UserError(f"cannot write {path}: there are no frames")
            container.mux(stream.encode())


def import_av():
    """PyAV. UserError with the command that installs it if it is missing."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"reading and writing videos needs PyAV ({error}); install it: pip install av") from error
    return av
