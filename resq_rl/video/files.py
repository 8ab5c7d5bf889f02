"""Video files and folders of frames, without labels."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import UInt8

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.assembly import ClipFrames, Decoded, check_clip_frames, clip_length, cut_clips
from resq_rl.video.clip import Clip, Split, check_split
from resq_rl.video.decoding import Picture
from resq_rl.video.framing import Fit, Framing
from resq_rl.video.images import check_count
from resq_rl.video.parts import Part, check_disjoint, check_splits, listed
from resq_rl.video.sources import DEFAULT_RATE, locate, open_source

__all__ = ["VideoFiles"]

_BYTE_LIMIT: Final = 4 * 2**30


@dataclass(frozen=True)
class VideoFiles:
    """Clips from video files and from folders of frames alike.

    An entry of `paths` is the path of a video file, of any format that PyAV decodes, or of a folder of images
    (png, jpg, jpeg, bmp, webp), which are taken in natural order (frame2 before frame10). "PATH[start:stop]" is a part
    of it, in frames of the source, so that one video can serve several splits; a file or folder of that very name comes
    first. "package://DISTRIBUTION/FILE" is a file of an installed distribution. Sources are decoded at each call, frame
    by frame, and never beyond the last frame wanted.

    Frames come upright (by EXIF orientation, or the display matrix of a video), with square pixels, and over black
    where they are transparent.

    Attributes:
        paths: for each split, what its clips are read from.
        size: height and width in pixels that frames are brought to, antialiased; None for the size of the source.
        frames: most frames taken from each entry; None for all.
        start: frames of each entry that are left out before the first.
        stride: the first and every `stride`-th frame after it are taken; the frame rate of the clips falls with it.
        clip_frames: cuts each entry into clips of this many frames, and drops a shorter rest; None for one clip.
            Or lengths by split, such as {train: 48}.
        fps: frame rate of the sources; None for what the file and the stamps of its frames tell, and 25 for folders.
        fit: "stretch" brings the whole frame to `size`; "crop" cuts the longer side evenly to keep its proportions;
            "pad" keeps the proportions and the whole frame, and repeats its edges where it does not reach.

    Raises:
        SettingsError: a setting out of its range.
        VideoError: an entry that does not exist, or splits that overlap.
    """

    paths: Mapping[Split, Sequence[str | Path | Part]]
    size: tuple[int, int] | None = None
    frames: int | None = None
    start: int = 0
    stride: int = 1
    clip_frames: ClipFrames = None
    fps: float | None = None
    fit: Fit = "stretch"

    def __post_init__(self) -> None:
        reader = "VideoFiles"
        object.__setattr__(self, "size", self.framing.size)
        check_count(self.frames, "frames", reader)
        check_count(self.start, "start", reader, least=0)
        check_clip_frames(self.clip_frames, reader)
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise SettingsError(
                f"Setting fps of {reader} must be positive, got {self.fps}. Give frames per second, or None."
            )
        check_disjoint(self._parts(), reader)

    @property
    def classes(self) -> tuple[str, ...]:
        """Empty: there are no labels."""
        return ()

    @property
    def framing(self) -> Framing:
        """How the frames of a source are brought to the clips."""
        return Framing(self.size, self.fit, stride=self.stride, reader="VideoFiles")

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
            decoded = self._read(part, part.name if stem in twice else stem)
            clips += cut_clips(decoded, clip_length(self.clip_frames, split))
        return clips

    def _parts(self) -> dict[Split, list[Part]]:
        """The entries of each split with absolute paths."""
        check_splits(self.paths, "VideoFiles")
        return {split: [locate(entry) for entry in entries] for split, entries in self.paths.items()}

    def _read(self, part: Part, name: str) -> Decoded:
        """Decode one entry."""
        path, first = Path(part.name), part.start + self.start
        source = open_source(path)
        frames = self._gather(islice(source.frames(first, self.stride, part.stop), self.frames), path)
        if not frames:
            raise VideoError(
                f"No frame to take from {path}: it holds {source.count} frames, wanted from frame {first} on. Check "
                "that the file is whole, or lower start."
            )
        return Decoded(
            frames=frames,
            labels=None,
            part=replace(part, name=name),
            first=first,
            stride=self.stride,
            fps=(self.fps or source.rate or DEFAULT_RATE) / self.stride,
            origin=str(path),
        )

    def _gather(self, pictures: Iterator[Picture], path: Path) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Frame each picture as it comes, so that only one is held at the size of the source."""
        frames: list[UInt8[np.ndarray, "h w 3"]] = []
        extent: tuple[int, int] | None = None
        for image, _ in pictures:
            extent = extent or image.size
            if image.size != extent:
                raise VideoError(
                    f"Frames of {path} must be of one size, got {_extent(*extent)} first and then "
                    f"{_extent(*image.size)} after {len(frames)} frames. Bring them to one size."
                )
            frames.append(self.framing.frame(image))
            if len(frames) * frames[0].nbytes > _BYTE_LIMIT:
                raise VideoError(
                    f"Frames of {path} need more than {_BYTE_LIMIT // 2**30} GiB: {len(frames)} of them so far, "
                    f"{_extent(frames[0].shape[1], frames[0].shape[0])} each. Set size, frames or stride."
                )
        return frames


def _extent(width: int, height: int) -> str:
    return f"{width}x{height}"
