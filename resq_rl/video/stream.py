"""Frames one at a time, however many there are: of a video file, a folder of frames or a camera."""

import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from resq_rl.errors import VideoError
from resq_rl.video.decoding import Clock, Picture, rgb
from resq_rl.video.framing import Framing
from resq_rl.video.parts import Part
from resq_rl.video.sources import DEFAULT_RATE, Source, locate, open_source

__all__ = ["CameraFrames", "VideoStream"]

# By platform, what FFmpeg calls cameras, and the address of one.
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}:none")}


class VideoStream:
    """Frames of a source, decoded one at a time as they are asked for; only one is held in memory.

    Args:
        source: path of a video file, of an image or of a folder of images (in natural order), "PATH[start:stop]" for
            some of its frames, "package://DISTRIBUTION/FILE", or the index of a camera. What exists under the very name
            wins: a folder "0001" is no camera, and a file "a[1:2].mp4" no part of another.
        size: height and width in pixels that frames are stretched to; None for the source's own.
        stride: the first and every `stride`-th frame after it are used.

    Attributes:
        name: what the source is called in messages.

    Raises:
        SettingsError: size or stride out of range.
        VideoError: there is no such source; from the iteration: it is empty, damaged or cut short.
    """

    def __init__(self, source: str | Path | int, size: tuple[int, int] | None = None, stride: int = 1) -> None:
        self._framing = Framing(size, stride=stride, reader="VideoStream")
        self._part, self._source, self.name = _opened(source)

    @property
    def rate(self) -> float:
        """Frames per second of this stream, known once the first frame came; 25 where the source does not tell.

        Where the source declares another rate than the stamps of its frames, theirs counts.
        """
        return (self._source.rate or DEFAULT_RATE) / self._framing.stride

    @property
    def length(self) -> int | None:
        """How many frames this stream has as far as the source declares it, once the first frame came; else None."""
        if not self._source.declared:
            return None
        return len(range(self._source.declared)[self._part.start : self._part.stop : self._framing.stride])

    def timed(self) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], float]]:
        """Each frame with its time, in seconds since the stream's first frame, by the container's stamps."""
        begins: float | None = None
        for image, time in self._source.frames(self._part.start, self._framing.stride, self._part.stop):
            begins = time if begins is None else begins
            yield self._framing.frame(image), time - begins
        if begins is None:
            raise VideoError(f"No frame in {self.name}: check that the file is whole and holds pictures.")

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        return (frame for frame, _ in self.timed())


class CameraFrames:
    """Frames of a capture device, until it is unplugged or the caller stops.

    Args:
        device: address of the device, as FFmpeg takes it.
        driver: FFmpeg's input device, such as "v4l2".
    """

    declared: int | None = None

    def __init__(self, device: str, driver: str) -> None:
        self._device, self._driver = device, driver
        self._clock = Clock(None)
        self.count = 0

    @property
    def rate(self) -> float | None:
        """Frames per second, as far as the device and the frames so far tell."""
        return self._clock.rate

    def frames(self, start: int, stride: int, stop: int | None) -> Iterator[Picture]:
        """Every `stride`-th frame from `start` on, before `stop`."""
        try:
            with av.open(self._device, format=self._driver) as container:
                stream = container.streams.video[0]
                self._clock = Clock(float(stream.average_rate or stream.guessed_rate or 0) or None)
                for number, frame in enumerate(container.decode(stream)):
                    if stop is not None and number >= stop:
                        return
                    self.count, time = number + 1, self._clock.time(frame.time)
                    if number >= start and (number - start) % stride == 0:
                        yield Picture(rgb(frame), time)
        except av.FFmpegError as error:
            raise VideoError(
                f"Cannot read the camera {self._device} ({self._driver}): {error.strerror or error}. Check that it is "
                "connected, that no other program uses it and that you may read it, or give the path of a video."
            ) from error


def camera(index: int) -> CameraFrames:
    """The camera of this machine with an index, 0 for the first.

    Raises:
        VideoError: cameras cannot be read on this platform.
    """
    if sys.platform not in _CAMERAS:
        raise VideoError(f"Cameras cannot be read on {sys.platform}: give the path of a video or a folder of frames.")
    driver, address = _CAMERAS[sys.platform]
    return CameraFrames(address.format(index), driver)


def _opened(source: str | Path | int) -> tuple[Part, Source, str]:
    """The part that a user names, its source, and what it is called."""
    text = str(source)
    try:
        part = locate(text)
    except VideoError:
        # An index is written as Python writes it: "0001", or digits of other scripts, are names of folders.
        if not (text.isascii() and text.isdecimal() and str(int(text)) == text):
            raise
        return Part(text), camera(int(text)), f"camera {text}"
    path = Path(part.name)
    if path.is_char_device() and sys.platform in _CAMERAS:
        return Part(text), CameraFrames(part.name, _CAMERAS[sys.platform][0]), f"camera {part.name}"
    return part, open_source(path), part.name
