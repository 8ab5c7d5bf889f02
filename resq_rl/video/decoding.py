"""Decoding video files to upright pictures of square pixels, each with its time in the container."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Final, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from jaxtyping import UInt8
from PIL import Image

from resq_rl.errors import VideoError
from resq_rl.video.images import opaque
from resq_rl.video.parts import listed

__all__ = ["Clock", "FileFrames", "Picture", "rgb"]

_MOST_STRETCHED: Final = 8  # pixels wider or higher than this are a damaged header
_AHEAD: Final = 8  # packets read ahead, whose stamps tell the rate until frames do
_RATE_TOLERANCE: Final = 0.05


class Picture(NamedTuple):
    """A decoded frame, RGB and upright with square pixels, and its time in seconds since the source's first frame."""

    image: Image.Image
    time: float


class Clock:
    """Times and rate of the frames of a source, from their stamps.

    Args:
        rate: frames per second that the source declares, or None.
    """

    def __init__(self, rate: float | None) -> None:
        self._declared = rate
        self._first = self._last = 0.0
        self._frames = 0

    def time(self, stamp: float | None) -> float:
        """Seconds from the first frame to the next one, whose stamp is given.

        Where a stamp is missing or does not lie after the one before, the frame follows at the rate.
        """
        if self._frames == 0:
            self._first = self._last = stamp or 0.0
        elif stamp is not None and stamp > self._last:
            self._last = stamp
        else:
            self._last += 1 / (self.rate or 25.0)
        self._frames += 1
        return self._last - self._first

    @property
    def rate(self) -> float | None:
        """Frames per second: as declared, unless the stamps so far tell another rate; None where neither is known."""
        if self._frames < 2 or self._last <= self._first:
            return self._declared
        seen = (self._frames - 1) / (self._last - self._first)
        if self._declared is None or abs(seen / self._declared - 1) > _RATE_TOLERANCE:
            return seen
        return self._declared


class FileFrames:
    """Frames of a video file.

    Attributes:
        count: frames decoded so far.
        declared: frames that the file declares; None where it does not, and before the first frame.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clock = Clock(None)
        self.count = 0
        self.declared: int | None = None

    @property
    def rate(self) -> float | None:
        """Frames per second, as far as the file and the frames so far tell."""
        return self._clock.rate

    def frames(self, start: int, stride: int, stop: int | None) -> Iterator[Picture]:
        """Every `stride`-th frame from `start` on, before `stop`; counts the frames decoded on the way.

        Raises:
            VideoError: the file holds no video, is damaged or ends early, or its pixels cannot be shown upright.
        """
        try:
            with av.open(str(self._path)) as container:
                for number, frame in enumerate(self._decode(container)):
                    if stop is not None and number >= stop:
                        return
                    self.count += 1
                    time = self._clock.time(frame.time)
                    if number >= start and (number - start) % stride == 0:
                        yield Picture(_upright(frame, container.streams.video[0], self._path), time)
        except av.FFmpegError as error:
            raise VideoError(
                f"Cannot decode {self._path} ({self._path.stat().st_size} bytes) after {self.count} frames: "
                f"{error.strerror or error}. The file is empty, cut short or not a video; copy or re-encode it."
            ) from error

    def _decode(self, container: InputContainer) -> Iterator[av.VideoFrame]:
        """All frames; after the last of them, checks that the file was whole."""
        stream = self._stream(container)
        packets, ahead, failure = container.demux(stream), [], None
        try:
            for packet in islice(packets, _AHEAD):
                ahead.append(packet)
        except av.FFmpegError as error:
            failure = error  # the frames before it can be had
        stamps = [float(p.pts * p.time_base) for p in ahead if p.pts is not None and p.time_base is not None]
        self._clock = Clock(_rate(stream, stamps))
        frames = len(stream.index_entries) if stream.frames and _is_mp4(container) else stream.frames
        self.declared = frames or round((container.duration or 0) / av.time_base * (self.rate or 0)) or None
        read, ends, last = 0, 0.0, 0.0
        for packet in chain(ahead, packets):
            if packet.size == 0 and packet.dts is not None:
                continue  # stands for a repeated frame; decoding it would end the stream
            read += packet.size > 0
            if packet.pts is not None and packet.time_base is not None and not packet.is_discard:
                ends = max(ends, float(packet.pts * packet.time_base))
            for frame in packet.decode():
                last = frame.time if isinstance(frame, av.VideoFrame) and frame.time is not None else last
                if isinstance(frame, av.VideoFrame):
                    yield frame
        if failure is not None:
            raise failure
        self._check_whole(container, read, ends, last)

    def _stream(self, container: InputContainer) -> av.VideoStream:
        if not container.streams.video:
            raise VideoError(
                f"No picture in {self._path}: found streams of {listed({s.type for s in container.streams})}. Give a "
                "file with video."
            )
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1":
            raise VideoError(
                f"Video {self._path} is transparent by a second layer, which is not decoded. Lay it over a ground, for "
                "example with the filter overlay of ffmpeg, and encode it again."
            )
        return stream

    def _check_whole(self, container: InputContainer, read: int, ends: float, last: float) -> None:
        """Check that the file held the packets and the time that it declares, and that frames came up to the last.

        Frames are not counted against the number in the header: an edit list leaves frames out, a recorder drops some,
        and a packet may hold one field. An index names the packets that are there. The declared time counts only where
        no other stream, such as a longer sound track, can be meant, and less where there is no number of frames.

        Args:
            container: read to its end.
            read: packets that were there.
            ends: greatest time of a packet whose frame is shown, and `last`: time of the last frame, in seconds.
        """
        stream = container.streams.video[0]
        begins = (container.start_time or 0) / av.time_base
        seconds = (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0
        indexed = sum(entry.size > 0 for entry in stream.index_entries) if stream.frames else 0
        if stream.frames and not _is_mp4(container) and stream.average_rate:
            rate = float(stream.average_rate)
            seconds, share, slack = stream.frames / rate, 0.95, 2 / rate
        else:
            share, slack = (0.0, 0.0) if stream.frames else (0.8, 1 / 8)
        if read < indexed - max(2, indexed // 20):
            found = f"{read} packets of frames read, {indexed} declared"
        elif last - begins < share * seconds - slack:
            found = f"{self.count} frames decoded, {seconds:.1f} s declared"
        elif ends - last > max(1.0, 0.05 * seconds):
            found = f"{self.count} frames decoded, up to {last:.1f} s of {ends:.1f} s"
        else:
            return
        raise VideoError(
            f"Video {self._path} is cut short: {found}. Copy it again, or take its first frames alone with "
            f"frames={max(self.count, 1)}."
        )


def _is_mp4(container: InputContainer) -> bool:
    """Whether the container's reader applies edit lists to its index, beside which the header counts all frames."""
    return "mp4" in container.format.name


def _rate(stream: av.VideoStream, stamps: Iterable[float]) -> float | None:
    """The rate that a stream declares, or, where the stamps of its first packets, in seconds, tell another, theirs."""
    declared = float(stream.average_rate or stream.guessed_rate or 0) or None
    steps = np.diff(np.unique(list(stamps)))
    if len(steps) < 2:
        return declared
    step = float(np.median(steps))  # the mean would count the gaps that reordered packets leave
    return declared if declared and abs(declared * step - 1) <= _RATE_TOLERANCE else 1 / step


def _upright(frame: av.VideoFrame, stream: av.VideoStream, path: Path) -> Image.Image:
    """A decoded frame as RGB with square pixels, turned and mirrored as the file asks for."""
    image = rgb(frame)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / _MOST_STRETCHED <= aspect <= _MOST_STRETCHED:
        raise VideoError(
            f"Video {path} declares pixels {float(aspect):g} times as wide as high, which no camera records. Correct "
            "its sample aspect ratio, for example with the filter setsar of ffmpeg."
        )
    width = max(1, round(image.width * aspect))
    if width != image.width:
        image = image.resize((width, image.height), Image.Resampling.BILINEAR)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return image
    return Image.fromarray(_oriented(np.array(image), np.frombuffer(bytes(matrix), np.int32), path))


def _oriented(
    pixels: UInt8[np.ndarray, "source_h source_w 3"], matrix: np.ndarray, path: Path
) -> UInt8[np.ndarray, "h w 3"]:
    """Turn and mirror pixels by a display matrix, a b u c d v x y w, which maps (x, y) to (a x + c y, b x + d y)."""
    a, b, _, c, d = (float(value) for value in matrix[:5])
    across, swapped = max(abs(a), abs(d)), max(abs(b), abs(c))
    if 60 * min(across, swapped) > max(across, swapped) or 0.0 in ((a, d) if across > swapped else (b, c)):
        raise VideoError(
            f"Video {path} asks to be shown turned by an angle that is no quarter turn, or slanted (display matrix "
            f"{matrix[:5].tolist()}). Encode it upright, for example with ffmpeg, which turns it by itself."
        )
    if swapped > across:
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def rgb(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame as RGB; a transparent one lies on black."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        return opaque(Image.fromarray(frame.to_ndarray(format="rgba")))
    return Image.fromarray(frame.to_ndarray(format="rgb24"))
