"""The clips of a pair of policies as the report's player shows them: pictures in sheets, and what each frame cost."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Num, UInt8
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from resq_rl.envs import Trace
from resq_rl.experiments.results.comparison import TITLES
from resq_rl.experiments.study.decisions import Pair
from resq_rl.experiments.study.study import Study

__all__ = ["film", "sheet"]

# Together the sheets of all clips hold at most so many pixels, which keeps the page at a few megabytes.
MOST_PIXELS: Final = 16_000_000
LONGEST_SIDE: Final = 320
MOST_FRAMES: Final = 240
COLUMNS: Final = 8
QUALITY: Final = 82
# Of the regions of residual frames: where the scale of the bit map ends.
TOP_QUANTILE: Final = 0.99
SCALE_STOPS: Final = 16


def film(study: Study, pair: Pair) -> dict[str, Any]:
    """What the player needs, as JSON takes it: for each clip the sheets, the bit maps and the BOPs of each frame."""
    problem = study.problems[study.settings.split]
    clips = [clip for clip, _ in zip(problem.clips, pair.traces, strict=False)]
    cells = 3 * sum(min(len(clip), MOST_FRAMES) for clip in clips)
    size = _cell_size(clips[0].size, cells)
    shown = []
    for clip, traces in zip(clips, pair.traces, strict=True):
        frames = list(clip.frames[:MOST_FRAMES])
        methods = []
        for trace in traces:
            drawn = [study.task.overlay(f.float() / 255, p) for f, p in zip(frames, trace.prediction, strict=False)]
            predictions = sheet([_picture(255 * image) for image in drawn], size)
            methods.append({"sheet": predictions, **_costs(trace, len(frames))})
        plain = sheet([_picture(frame) for frame in frames], size)
        shown.append({"name": clip.name, "fps": clip.fps, "all": len(clip), "sheet": plain, "methods": methods})
    return {
        "clips": shown,
        "cell": size,
        "columns": COLUMNS,
        "names": [TITLES.get(pair.method, pair.method), TITLES["ppo"]],
        "top": _top(pair),
        "scale": [to_hex(colormaps["cividis"](place)) for place in np.linspace(0, 1, SCALE_STOPS)],
    }


def sheet(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], size: tuple[int, int]) -> str:
    """Pictures side by side in rows of `COLUMNS`, each scaled to `size` (width, height), as a WebP data URI."""
    width, height = size
    rows = math.ceil(len(pictures) / COLUMNS)
    page = Image.new("RGB", (COLUMNS * width, rows * height))
    for index, picture in enumerate(pictures):
        scaled = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
        page.paste(scaled, (index % COLUMNS * width, index // COLUMNS * height))
    buffer = io.BytesIO()
    page.save(buffer, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _picture(image: Num[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image of values in 0..255 as pictures have it."""
    picture: np.ndarray = image.float().round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return picture


def _cell_size(frame: tuple[int, int], cells: int) -> tuple[int, int]:
    """Width and height of a picture: the frame's, made smaller where it is large or there are many."""
    height, width = frame
    scale = min(1.0, LONGEST_SIDE / max(frame), math.sqrt(MOST_PIXELS / (cells * height * width)))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _costs(trace: Trace, frames: int) -> dict[str, Any]:
    """BOPs of each frame, their running mean, and by region in thousandths of W8A8."""
    bops = trace.bops[:frames]
    running = bops.cumsum(0) / torch.arange(1, frames + 1)
    return {
        "share": (1000 * trace.share[:frames]).round().int().tolist(),
        "bops": [round(float(b), 6) for b in bops],
        "running": [round(float(b), 6) for b in running],
        "keyframe": trace.keyframe[:frames].int().tolist(),
    }


def _top(pair: Pair) -> float:
    """End of the scale of the bit maps, in thousandths: nearly the dearest region of a residual frame."""
    both = [trace.share[~trace.keyframe].flatten() for own in pair.traces for trace in own]
    shares = np.concatenate([part.numpy() for part in both])
    return max(1.0, 1000 * float(np.quantile(shares, TOP_QUANTILE))) if shares.size else 1000.0
