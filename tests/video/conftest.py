"""Tiny datasets and videos that the tests of the readers make for themselves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

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
    """Writes a 64x48 video whose frame n is grey 12 n, red in its upper left quarter, and returns its path."""

    def write(path: Path, frames: int = 20, codec: str = "libx264", flags: Sequence[str] = ()) -> Path:
        options = {"movflags": "+".join(flags)} if flags else {}
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream(codec, rate=24)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(frames):
                pixels = np.full((48, 64, 3), number * 12 % 256, dtype=np.uint8)
                pixels[:24, :32] = (255, 0, 0)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write
