"""Decoding image files and bringing frames and labels to a size."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE
from resq_rl.video.parts import listed

__all__ = [
    "IMAGE_SUFFIXES",
    "Box",
    "check_count",
    "check_size",
    "image_paths",
    "is_animation",
    "map_labels",
    "natural_key",
    "opaque",
    "read_frame",
    "read_labels",
    "resize_frame",
    "resize_labels",
]

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels of the source; may reach beyond it."""

_GREY_STEPS: Final = {"L;2": 85, "L;4": 17}  # of 8-bit grey, by how PNGs of fewer bits are stored

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def check_size(size: Sequence[int] | None, reader: str) -> tuple[int, int] | None:
    """Return `size` as a pair of height and width, or None.

    Raises:
        SettingsError: it is not two positive lengths.
    """
    if size is None:
        return None
    if len(size) != 2 or min(size) < 1:
        raise SettingsError(
            f"Setting size of {reader} must be a height and a width in pixels, or None for the size of the "
            f"source, got {size!r}. Choose two positive numbers."
        )
    return int(size[0]), int(size[1])


def check_count(value: int | None, name: str, reader: str, least: int = 1, most: int | None = None) -> None:
    """Check a number of frames; None passes.

    Raises:
        SettingsError: it is below `least` or above `most`.
    """
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"{least} or more" if most is None else f"from {least} to {most}"
        raise SettingsError(f"Setting {name} of {reader} must be {allowed}, got {value!r}. Choose another value.")


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts frame2 before frame10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces] + [(0, path.name)]


def image_paths(folder: Path) -> list[Path]:
    """Image files of a folder in natural order; hidden files are left out.

    Raises:
        VideoError: the folder is missing or holds no image.
    """
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise VideoError(
            f"No folder of frames at {folder}: found {listed(beside)} in {folder.parent}. "
            "Check the name and the root of the dataset."
        )
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise VideoError(
            f"No image in {folder}: looked for {', '.join(IMAGE_SUFFIXES)}, found "
            f"{listed(path.name for path in files)}. Check the folder, or convert the files."
        )
    return sorted(images, key=natural_key)


def read_frame(path: Path, upright: bool = False) -> Image.Image:
    """Decode an image file to RGB of 8 bits; transparent pictures lie on black.

    Args:
        path: the file.
        upright: turn the picture as its EXIF orientation asks for. Frames of labelled datasets stay as they are stored,
            for so do their labels.

    Raises:
        VideoError: the file is missing, empty, damaged, grey of more than 8 bits, or holds several pictures.
    """
    image = _decode(path, "frame", upright)
    if image.mode.startswith(("I", "F")):
        raise VideoError(f"Frame {path} must have 8 bits per channel, got mode {image.mode}. Convert it to 8-bit RGB.")
    return opaque(image)


def opaque(image: Image.Image) -> Image.Image:
    """An image as RGB, laid over black where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")


def is_animation(path: Path) -> bool:
    """Whether a file holds an animation; other files that show one of several pictures, such as MPO, do not.

    Raises:
        VideoError: the file is no image, or damaged.
    """
    with _opened(path, "frame") as image:
        return _animated(image)


def read_labels(path: Path) -> UInt8[np.ndarray, "h w"]:
    """Decode a label image of one channel: grey values, or indices of its palette.

    Raises:
        VideoError: the file is missing, empty or damaged, has channels that differ, or hides values by transparency.
    """
    image = _decode(path, "label")
    if image.mode in ("L", "P"):
        return np.array(image)
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode in ("RGB", "RGBA", "LA"):
        values = np.array(image)
        colours = values[..., :1] if image.mode == "LA" else values[..., :3]
        hidden = (values[..., -1] < 255) & (colours[..., 0] > 0) if image.mode in ("LA", "RGBA") else np.False_
        if hidden.any():
            raise VideoError(
                f"Label {path} hides values other than 0 under {int(hidden.sum())} transparent pixels. Save it without "
                "transparency, so that each pixel is one class index."
            )
        if (colours == colours[..., :1]).all():
            return np.ascontiguousarray(colours[..., 0])
    raise VideoError(
        f"Label {path} must be an 8-bit grey or palette image, got mode {image.mode} with channels that differ or more "
        "bits. Convert it so that each pixel is one class index."
    )


def _decode(path: Path, kind: str, upright: bool = False) -> Image.Image:
    with _opened(path, kind) as image:
        if _animated(image):
            raise VideoError(
                f"The {kind} {path} is an animation of {getattr(image, 'n_frames', 2)} pictures. Split it into one "
                "file for each, or give it as a video."
            )
        tile = getattr(image, "tile", None)
        stored = str(tile[0][3]) if image.format == "PNG" and tile else ""
        image.load()
        _match_transparency(image, stored, path)
        if not upright:
            return image.copy()
        _check_square(image, path)
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF fails in many ways, and viewers show such pictures as they are stored
            return image.copy()


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """An image file, whose damage becomes one error wherever it is found."""
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VideoError(
            f"Missing {kind} {path}: found {listed(beside)} in {path.parent}. Add the file, or leave its sequence out."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, and of large images, which are errors at twice the size
            with Image.open(path) as image:
                yield image
    except _DAMAGE as error:
        raise VideoError(
            f"Cannot decode {kind} {path} ({path.stat().st_size} bytes): {error}. The file is empty, cut short or not "
            "an image; copy it again."
        ) from error


def _animated(image: Image.Image) -> bool:
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def _match_transparency(image: Image.Image, stored: str, path: Path) -> None:
    """Bring the transparent value of a PNG, which counts in its own bits, to the 8 bits of the decoded image.

    Raises:
        VideoError: the picture was reduced from 16 bits, so that its transparent colour cannot be told any more.
    """
    key = image.info.get("transparency")
    if key is None:
        return
    if stored in _GREY_STEPS:
        image.info["transparency"] = key * _GREY_STEPS[stored]
    elif stored == "RGB;16B":
        raise VideoError(
            f"Picture {path} has 16 bits per channel and a transparent colour. Convert it to 8 bits, or give it an "
            "opacity channel."
        )


def _check_square(image: Image.Image, path: Path) -> None:
    """Check that an image does not declare the proportions of its pixels, which programs write and read both ways."""
    density = image.info.get("jfif_density") if image.info.get("jfif_unit") == 0 else image.info.get("aspect")
    if density and 0 not in density and density[0] != density[1]:
        raise VideoError(
            f"Frame {path} declares pixels that are not square ({density[0]}:{density[1]}). Bring it to square ones, "
            "for example with the filter scale=iw*sar:ih,setsar=1 of ffmpeg where it comes from a video."
        )


def map_labels(values: UInt8[np.ndarray, "h w"], mapping: Mapping[int, int], path: Path) -> UInt8[np.ndarray, "h w"]:
    """Replace the values of a label file by class indices.

    Raises:
        VideoError: a value is not in `mapping`.
    """
    unknown = sorted(set(np.unique(values).tolist()) - set(mapping))
    if unknown:
        raise VideoError(
            f"Label {path} holds values outside the classes: {', '.join(map(str, unknown[:8]))}, where "
            f"{', '.join(map(str, sorted(mapping)))} are known. Check that it belongs to this dataset."
        )
    table = np.full(256, IGNORE, dtype=np.uint8)
    for value, index in mapping.items():
        table[value] = index
    return np.asarray(table[values])


def resize_frame(
    image: Image.Image, size: tuple[int, int] | None, box: Box | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Bring an RGB image, or the `box` of it, to `size` by antialiased bilinear weights.

    What of the box lies outside the image repeats its nearest edge.
    """
    box = box or (0.0, 0.0, float(image.width), float(image.height))
    if size is None:
        return np.array(image)
    margins = _margins(image.size, box)
    if any(margins):
        left, top, right, bottom = margins
        padded = np.pad(np.array(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
        image = Image.fromarray(padded)
        box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
    return np.array(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box))


def resize_labels(
    labels: UInt8[np.ndarray, "h w"], size: tuple[int, int] | None, box: Box | None = None
) -> UInt8[np.ndarray, "oh ow"]:
    """Bring labels, or the `box` of them, to `size` by the nearest pixel; `IGNORE` outside the labels."""
    if size is None:
        return labels
    height, width = labels.shape
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    rows = np.floor(top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]).astype(np.int64)
    columns = np.floor(left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]).astype(np.int64)
    picked = labels[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)[None, :]]
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    return np.where(inside, picked, np.uint8(IGNORE))


def _margins(extent: tuple[int, int], box: Box) -> tuple[int, int, int, int]:
    """Whole pixels by which `box` leaves an image of `extent` (width, height): left, top, right, bottom."""
    width, height = extent
    left, top, right, bottom = box
    return (
        max(0, -int(np.floor(left))),
        max(0, -int(np.floor(top))),
        max(0, int(np.ceil(right)) - width),
        max(0, int(np.ceil(bottom)) - height),
    )
