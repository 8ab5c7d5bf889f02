"""Frames one at a time, however many there are: of a video file, a folder of frames or a camera."""

import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from resq_rl.errors import VideoError
from resq_rl.video.files import FileFrames, FolderFrames, locate
from resq_rl.video.images import resize_frame

__all__ = ["CameraFrames", "VideoStream"]

# By platform, how FFmpeg calls cameras, and the address of one.
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}:none")}
_DEFAULT_RATE = 25.0


class VideoStream:
    """Frames of a source, decoded one at a time as they are asked for; only one is held in memory.

    Args:
        source: path of a video file, of a folder of images (in natural order), "package://DISTRIBUTION/FILE", or the
            index of a camera.
        size: height and width in pixels that frames are brought to, as by `VideoFiles`; None for the source's own.

    Attributes:
        name: of the source, for messages.
        rate: frames per second, and `length`, the number of frames that the source declares or None: known once the
            first frame came.

    Raises:
        VideoError: there is no such source; from the iteration: it is empty, damaged or cut short.
    """

    def __init__(self, source: str | Path | int, size: tuple[int, int] | None = None) -> None:
        self.size = size
        self._frames: CameraFrames | FileFrames | FolderFrames
        if str(source).isdecimal():
            self._frames, self.name = camera(int(str(source))), f"camera {source}"
        else:
            path = locate(str(source))
            self._frames, self.name = FolderFrames(path) if path.is_dir() else FileFrames(path), str(path)

    @property
    def rate(self) -> float:
        """Frames per second; 25 where the source does not tell."""
        return self._frames.rate or _DEFAULT_RATE

    @property
    def length(self) -> int | None:
        """How many frames the source declares; None where it does not."""
        return self._frames.declared or None

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        empty = True
        for image in self._frames.frames(0, 1, None):
            empty = False
            yield resize_frame(image, self.size)
        if empty:
            raise VideoError(f"No frame in {self.name}: check that the file is whole and holds pictures.")


class CameraFrames:
    """Frames of a capture device, until it is unplugged or the caller stops.

    Args:
        device: address of the device, as FFmpeg takes it.
        driver: FFmpeg's input device, such as "v4l2".
    """

    rate: float | None = None
    declared: int | None = None

    def __init__(self, device: str, driver: str) -> None:
        self._device, self._driver = device, driver

    def frames(self, start: int, stride: int, stop: int | None) -> Iterator[Image.Image]:
        """Every `stride`-th frame from `start` on, before `stop`."""
        try:
            with av.open(self._device, format=self._driver) as container:
                stream = container.streams.video[0]
                self.rate = float(stream.average_rate or stream.guessed_rate or 0) or None
                for number, frame in enumerate(container.decode(stream)):
                    if stop is not None and number >= stop:
                        return
                    if number >= start and (number - start) % stride == 0:
                        yield Image.fromarray(frame.to_ndarray(format="rgb24"))
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
