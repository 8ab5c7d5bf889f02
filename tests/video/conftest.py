"""Tiny datasets and videos that the tests of the readers make for themselves."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np
import pytest
from PIL import Image


def grey(number: int) -> np.ndarray:
    """Frame `number` of the test videos."""
    pixels = np.full((48, 64, 3), number * 12 % 256, dtype=np.uint8)
    pixels[:24, :32] = (255, 0, 0)
    return pixels


WriteVideo = Callable[..., Path]
WriteImage = Callable[..., Path]


@pytest.fixture
def write_image() -> WriteImage:
    """Writes an image file of an array, (h, w) or (h, w, 3), in `mode`, and returns its path."""

    def write(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(values.astype(np.uint8))
        if mode == "P":
            palette = Image.new("P", image.size)
            palette.putpalette([index * 7 % 256 for index in range(768)])
            palette.putdata(values.ravel().tolist())
            image = palette
        elif mode is not None:
            image = image.convert(mode)
        image.save(path)
        return path

    return write


@pytest.fixture
def write_video() -> WriteVideo:
    """Writes a 64x48 video whose frame n is grey 12 n, red in its upper left quarter, and returns its path.

    `times` are the stamps of the frames in seconds, `matrix` the linear part a, b, c, d of a display matrix, `aspect`
    the width of a pixel over its height.
    """

    def write(
        path: Path,
        frames: int = 20,
        codec: str = "libx264",
        flags: Sequence[str] = (),
        *,
        options: Mapping[str, str] = MappingProxyType({}),
        pixels: str = "yuv420p",
        times: Sequence[float] | None = None,
        matrix: Sequence[int] | None = None,
        aspect: Fraction | None = None,
    ) -> Path:
        given = dict(options) | ({"movflags": "+".join(flags)} if flags else {})
        with av.open(str(path), "w", options=given) as container:
            stream = container.add_stream(codec, rate=24 if times is None else 1000)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if matrix is not None:
                a, b, c, d = (value << 16 for value in matrix)
                stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(grey(number), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write
