"""A video that shows the prediction beside the bits of every region, and the BOPs spent so far."""

from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from resq_rl.errors import ResultsError
from resq_rl.perception import Task
from resq_rl.policies.runner import REFERENCE_BITS, RunCost

__all__ = ["OverlayVideo", "draw"]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Written piece by piece, so that what is there can be played even where the end is missing; no more is held in memory.
PIECE_SECONDS = 2
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_CODECS = ("libx264", "mpeg4")
_COLORS = "cividis"  # even in lightness, and the same to the colour-blind
_TINT = 0.65  # opacity of the bits by region over the grey frame
TICKS = 1000  # of the clock of frames, in a second


def draw(
    painted: Float[Tensor, "3 h w"],
    frame: UInt8[Tensor, "3 h w"],
    cost: RunCost,
    text: str,
    size: tuple[int, int],
) -> Image.Image:
    """One picture of the overlay: the painted prediction, bits by region with their scale, and a line of text.

    Args:
        painted: the prediction drawn over the frame, RGB in 0..1.
        frame: as the model saw it.
        size: height and width of each of the two panels, in pixels.
    """
    height, width = size
    line = max(12, height // 18)
    canvas = Image.new("RGB", (2 * width, _even(height + 2 * line)), "black")
    shown = (painted.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    canvas.paste(Image.fromarray(shown).resize((width, height), Image.Resampling.BILINEAR), (0, 0))
    canvas.paste(Image.fromarray(_bit_map(frame, cost)).resize((width, height), Image.Resampling.NEAREST), (width, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(line * 0.75)
    pen.text((line // 3, height + line), text, fill="white", font=font, anchor="lm")
    if cost.keyframe:
        pen.rectangle((0, 0, 2 * width - 1, height - 1), outline="white", width=max(2, line // 6))
    _draw_scale(canvas, pen, (2 * width, height), line, font)
    return canvas


def _bit_map(frame: UInt8[Tensor, "3 h w"], cost: RunCost) -> UInt8[np.ndarray, "h w 3"]:
    """The bits of every region as a colour over the grey frame: 0 is dark, `REFERENCE_BITS` and more are light."""
    height, width = frame.shape[1:]
    rows, columns = (
        np.minimum((np.arange(length) + 0.5) * cells // length, cells - 1).astype(int)
        for length, cells in zip((height, width), cost.regions.shape, strict=True)
    )
    share: Float[np.ndarray, "h w"] = cost.regions.numpy()[rows][:, columns]
    tint = colormaps[_COLORS](np.sqrt(share.clip(0, 1)))[..., :3]
    grey = frame.float().mean(0).numpy()[..., None] / 255
    mixed: np.ndarray = (255 * (_TINT * tint + (1 - _TINT) * grey)).round().astype(np.uint8)
    return mixed


def _draw_scale(canvas: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], line: int, font: Font) -> None:
    """Draw the scale of the bit map's colours under its right end."""
    bar, (right, top) = (6 * line, line // 2), corner
    ramp = (255 * colormaps[_COLORS](np.linspace(0, 1, bar[0]))[:, :3]).astype(np.uint8)[None].repeat(bar[1], 0)
    left = right - bar[0] - 2 * line
    canvas.paste(Image.fromarray(ramp), (left, top + line - bar[1] // 2))
    pen.text((left - line // 3, top + line), "bits 0", fill="white", font=font, anchor="rm")
    pen.text((left + bar[0] + line // 3, top + line), f"{REFERENCE_BITS}", fill="white", font=font, anchor="lm")


class OverlayVideo:
    """Writes `path` picture by picture; use it in a `with` statement, whose end completes the file.

    Args:
        task: draws a prediction.
        height: of a panel in pixels; the width follows from the pictures.
        rate: frames per second that players are told; each frame is shown at its own time.

    Raises:
        ResultsError: the file cannot be written.
    """

    def __init__(self, path: Path, task: Task, height: int, rate: float) -> None:
        self._path, self._task, self._height = path, task, _even(height)
        self._size: tuple[int, int] | None = None
        self._rate, self._tick = rate, -1
        codec = next((name for name in _CODECS if name in av.codecs_available), _CODECS[-1])
        try:
            self._container = av.open(str(path), "w", format="mp4", options=_FRAGMENTS)
            self._stream: av.VideoStream = self._container.add_stream(  # type: ignore[assignment]
                codec, rate=Fraction(rate).limit_denominator(1001)
            )
            self._stream.codec_context.time_base = Fraction(1, TICKS)
        except (av.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def add(
        self,
        frame: UInt8[Tensor, "3 h w"],
        prediction: Tensor,
        cost: RunCost,
        text: str,
        *,
        time: float,
        proportions: float,
    ) -> None:
        """Append a frame.

        Args:
            frame: the frame at the model's size.
            time: seconds since the first frame.
            proportions: width over height of the panels.

        Raises:
            ResultsError: the file cannot be written.
        """
        first, width = self._size is None, _even(round(self._height * proportions))
        self._size = self._size or (self._height, max(width, _even(self._height // 2)))
        image = draw(self._task.overlay(frame.float() / 255, prediction), frame, cost, text, self._size)
        try:
            if first:
                self._stream.width, self._stream.height = image.size
                self._stream.pix_fmt = "yuv420p"
                self._stream.codec_context.gop_size = max(1, round(PIECE_SECONDS * self._rate))
            shown = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
            self._tick = max(self._tick + 1, round(TICKS * time))
            shown.pts, shown.time_base = self._tick, Fraction(1, TICKS)
            self._container.mux(self._stream.encode(shown))
        except (av.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ResultsError:
        reason = getattr(error, "strerror", None) or error
        return ResultsError(
            f"Cannot write {self._path}: {reason}. Free some space, choose a writable folder, or do without: "
            "running.overlay=false."
        )

    def __enter__(self) -> "OverlayVideo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._size is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
        except (av.FFmpegError, OSError) as failure:
            if error is None:
                raise self._failed(failure) from failure


def _even(length: int) -> int:
    """The next even length, which video encoders need."""
    return length + length % 2
