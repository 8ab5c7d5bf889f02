"""How the frames of a source are brought to the network, in one place for training, measuring and deployment."""

from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import VideoDataset
from resq_rl.video.images import Box, check_count, check_size, resize_frame, resize_labels

__all__ = ["Fit", "Framing", "framing_of"]

Fit = Literal["stretch", "crop", "pad"]
"""How a frame of other proportions fills the size: distorted, cut evenly on both sides, or with its edges repeated."""

FITS: Final[tuple[Fit, ...]] = get_args(Fit)
LARGEST_WINDOW = 100  # times the picture's width and height, since what lies beyond is filled in


@dataclass(frozen=True)
class Framing:
    """How the frames of a source are brought to the network, with their labels.

    Readers of video frame their clips by it. Saved beside a network (`to_json`) and applied to every frame of another
    source, it gives a deployed network the pixels that it was trained and measured on.

    Attributes:
        size: height and width in pixels of a framed picture; None for those of the source.
        fit: "stretch" brings the whole frame to `size`, "crop" cuts its longer side evenly to keep the proportions, and
            "pad" keeps all of it and repeats its edges where it does not reach.
        crop: height of a window that follows an object, as a multiple of the object's height; None where frames are
            framed as a whole. Whoever frames them then gives the window of each frame, and `fit` plays no part.
        stride: the first and every `stride`-th frame after it are used.
        label_size: height and width that label maps are brought to; None for those of the picture.
        reader: whose settings these are, for messages.

    Raises:
        SettingsError: a setting out of its range.
    """

    size: tuple[int, int] | None = None
    fit: Fit = "stretch"
    crop: float | None = None
    stride: int = 1
    label_size: tuple[int, int] | None = None
    reader: InitVar[str] = "Framing"

    def __post_init__(self, reader: str) -> None:
        object.__setattr__(self, "size", check_size(self.size, reader))
        object.__setattr__(self, "label_size", check_size(self.label_size, reader))
        check_count(self.stride, "stride", reader)
        if self.fit not in FITS:
            raise SettingsError(f"Setting fit of {reader} must be one of {', '.join(FITS)}, got {self.fit!r}.")
        if self.crop is not None and (self.size is None or not 0 < self.crop <= 100):
            raise SettingsError(
                f"Setting crop of {reader} must be a factor above 0, at most 100, together with a size, got crop "
                f"{self.crop} and size {self.size}. Set both, such as crop=1.3 and size=(256, 256)."
            )

    def frame(
        self, picture: Image.Image | UInt8[np.ndarray, "source_h source_w 3"], window: Box | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Frame an RGB picture by antialiased bilinear weights.

        Args:
            picture: upright, with square pixels.
            window: the part of it to use, which may reach beyond its edges; wanted where `crop` is set.

        Raises:
            VideoError: a window is wanted and none was given, or there is nothing of the picture in it.
        """
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
        return resize_frame(image, self.size, self._part(image.size, window))

    def labels(self, labels: UInt8[np.ndarray, "source_h source_w"], window: Box | None = None) -> np.ndarray:
        """Frame a label map by the nearest pixel, as `frame` frames its picture; `IGNORE` beyond its edges.

        Raises:
            VideoError: a window is wanted and none was given, or there is nothing of the picture in it.
        """
        height, width = labels.shape
        return resize_labels(labels, self.label_size or self.size, self._part((width, height), window))

    def points(
        self, points: Float32[np.ndarray, "k 3"], extent: tuple[int, int], window: Box | None = None
    ) -> Float32[np.ndarray, "k 3"]:
        """Move points (x, y, whether it counts) along with a picture of `extent` (width, height).

        Points beyond the framed picture do not count.

        Raises:
            VideoError: a window is wanted and none was given, or there is nothing of the picture in it.
        """
        left, top, right, bottom = self._part(extent, window) or (0.0, 0.0, float(extent[0]), float(extent[1]))
        height, width = self.size or (extent[1], extent[0])
        scale = np.array([width / (right - left), height / (bottom - top)])
        place = (points[:, :2] + 0.5 - np.array([left, top])) * scale
        inside = ((place >= 0) & (place < np.array([width, height]))).all(1)
        return np.concatenate([place - 0.5, (points[:, 2] * inside)[:, None]], 1).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """The settings as values that JSON can hold; `from_json` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Framing":
        """Read what `to_json` wrote.

        Raises:
            SettingsError: a setting is missing, unknown or out of its range.
        """
        names = [field.name for field in fields(cls)]
        if sorted(content) != sorted(names):
            raise SettingsError(
                f"A framing must hold {', '.join(names)}, got {', '.join(map(str, content)) or 'nothing'}. The file is "
                "damaged or of another version of resq_rl."
            )
        size = content["size"]
        values = dict(content) | {"size": tuple(size) if isinstance(size, list) else size}
        try:
            return cls(**values, reader="a saved framing")
        except (TypeError, ValueError) as error:
            raise SettingsError(f"A saved framing holds a value of a wrong type ({error}): {dict(content)}.") from error

    def _check(self, window: Box, extent: tuple[int, int]) -> None:
        """Raise VideoError unless a part of a picture of `extent` (width, height) lies in the window."""
        edges = np.asarray(window)
        numbers = edges.shape == (4,) and edges.dtype.kind in "iuf" and bool(np.isfinite(edges).all())
        if not numbers or not (edges[:2] < edges[2:]).all() or not ((edges[:2] < extent) & (edges[2:] > 0)).all():
            raise VideoError(
                f"A window is (left, top, right, bottom) in pixels of the picture, of which a part must lie in it; got "
                f"{window} for a picture of {extent[0]}x{extent[1]} (width x height)."
            )
        if (edges[2:] - edges[:2] > LARGEST_WINDOW * np.array(extent)).any():
            raise VideoError(f"The window {window} is more than {LARGEST_WINDOW} times as large as the picture.")
        if self.size is None:
            raise VideoError("A window is brought to a size, and the framing has none: give it one, Framing(size).")

    def _part(self, extent: tuple[int, int], window: Box | None) -> Box | None:
        """The part of a picture of `extent` (width, height) that is used; None for all of it."""
        if self.crop is not None and window is None:
            raise VideoError(
                f"Frames are windows that follow an object, {self.crop:g} times as high as it is (crop), and no window "
                "was given. Give the window of each frame, or use a network that was trained on whole frames."
            )
        if window is not None:
            self._check(window, extent)
        if window is not None or self.size is None or self.fit == "stretch":
            return window
        scales = extent[0] / self.size[1], extent[1] / self.size[0]
        scale, bound = (min(scales), max) if self.fit == "crop" else (max(scales), min)
        # Rounding must not push the side that fits beyond the frame, or inside it.
        across, down = (bound(0.0, (extent[i] - scale * self.size[1 - i]) / 2) for i in (0, 1))
        return across, down, extent[0] - across, extent[1] - down


def framing_of(dataset: VideoDataset) -> Framing:
    """How a dataset brings frames to its clips: its own `framing`, or else whole frames stretched to its `size`."""
    framing = getattr(dataset, "framing", None)
    return framing if isinstance(framing, Framing) else Framing(getattr(dataset, "size", None))
