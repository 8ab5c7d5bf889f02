"""A pair of policies in the report: the clips for the player, and the BOPs by layer and by region."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float64, Num, UInt8
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from resq_rl.envs import Trace
from resq_rl.experiments.results.methods import method_of
from resq_rl.experiments.study.decisions import TracedPair
from resq_rl.experiments.study.study import Study
from resq_rl.quantization import ResQModel

__all__ = ["film", "layer_rows", "region_maps", "sheet"]

# The sheets of all clips together hold at most this many pixels, which keeps the page at a few megabytes.
MOST_PIXELS: Final = 16_000_000
LONGEST_SIDE: Final = 320
MOST_FRAMES: Final = 240
COLUMNS: Final = 8
QUALITY: Final = 82
# The quantile of the regions' BOPs in residual frames at which the scale of the bit map ends.
TOP_QUANTILE: Final = 0.99
SCALE_COLOURS: Final = 64
# Activation bits and weight bits of the unit of all BOPs.
UNIT_BITS: Final = 8


def film(study: Study, pair: TracedPair) -> dict[str, Any]:
    """The data of the player, ready for JSON: for each clip the sheets, the bit maps and the BOPs of each frame."""
    problem = study.problem
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
        "names": [method_of(key).title for key in pair.methods],
        "top": _top(pair),
        "scale": [to_hex(colormaps["cividis"](place)) for place in np.linspace(0, 1, SCALE_COLOURS)],
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
    """An image with values in 0..255 as an array of bytes, channels last."""
    picture: np.ndarray = image.float().round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return picture


def _cell_size(frame: tuple[int, int], cells: int) -> tuple[int, int]:
    """Width and height of a picture: the size of a frame, scaled down where frames are large or many."""
    height, width = frame
    scale = min(1.0, LONGEST_SIDE / max(frame), math.sqrt(MOST_PIXELS / (cells * height * width)))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _costs(trace: Trace, frames: int) -> dict[str, Any]:
    """BOPs of each frame, their running mean, and the BOPs by region in thousandths of W8A8."""
    bops = trace.bops[:frames]
    running = bops.cumsum(0) / torch.arange(1, frames + 1)
    return {
        "share": (1000 * trace.share[:frames]).round().int().tolist(),
        "bops": [round(float(b), 6) for b in bops],
        "running": [round(float(b), 6) for b in running],
        "keyframe": trace.keyframe[:frames].int().tolist(),
    }


def _top(pair: TracedPair) -> float:
    """End of the scale of the bit maps, in thousandths of W8A8: nearly the most expensive region of residual frames."""
    both = [trace.share[~trace.keyframe].flatten() for own in pair.traces for trace in own]
    shares = np.concatenate([part.numpy() for part in both])
    return max(1.0, 1000 * float(np.quantile(shares, TOP_QUANTILE))) if shares.size else 1000.0


def layer_rows(model: ResQModel, pair: TracedPair) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for the layer groups and for all layers: their part of a W8A8 frame, and the BOPs that both policies spend.

    The BOPs of residual frames are given as a share of the layer's BOPs at W8A8, and as mean activation bits: with
    BOPs = MACs x weight bits x activation bits, the one width for all pixels that would cost the same.
    """
    macs = torch.tensor([float(site.macs) for site in model.sites], dtype=torch.float64)
    widths = torch.tensor(
        [float(model.config.weight_bits(site.layer_kind, site.name)) for site in model.sites], dtype=torch.float64
    )
    part = macs / macs.sum()
    spent = [_mean_layers([own[i] for own in pair.traces]) for i in (0, 1)]
    layers = []
    for i, name in enumerate(_unique([site.name for site in model.sites])):
        row = _row(part[[i]], widths[[i]], [s[[i]] for s in spent])
        layers.append({"name": name, "group": model.groups[int(model.group_of_site[i])]} | row)
    groups = []
    for g, group in enumerate(model.groups):
        mine = model.group_of_site == g
        row = _row(part[mine], widths[mine], [s[mine] for s in spent])
        groups.append({"name": group, "layers": int(mine.sum())} | row)
    return groups, layers


def _row(part: Tensor, widths: Tensor, spent: Sequence[Tensor]) -> dict[str, Any]:
    """Part of a W8A8 frame that one or several layers take together, and the BOPs that each policy spends there."""
    own = float(part.sum())
    # Bits weighted by multiply-accumulates: BOPs / (MACs x weight bits), both in units of a W8A8 frame.
    unit = float((part * widths).sum()) / UNIT_BITS
    values = [float(s.sum()) for s in spent]
    return {"part": own, "share": [v / own for v in values], "bits": [UNIT_BITS * v / unit for v in values]}


def _mean_layers(traces: Sequence[Trace]) -> Float64[Tensor, " s"]:
    """Mean BOPs of each layer in residual frames, as a share of a W8A8 frame; 0 where there are none."""
    residual = torch.cat([trace.layers[~trace.keyframe] for trace in traces])
    return residual.mean(0) if len(residual) else traces[0].layers.new_zeros(traces[0].layers.shape[1])


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where a layer is called more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return result


def region_maps(pair: TracedPair) -> dict[str, Any]:
    """Mean share of W8A8 of each region in residual frames, for both policies, with the colours of one scale."""
    maps = []
    for i in (0, 1):
        shares = torch.cat([own[i].share[~own[i].keyframe] for own in pair.traces])
        maps.append(shares.mean(0).numpy() if len(shares) else np.zeros(pair.traces[0][i].share.shape[1:]))
    top = max(float(np.max(maps)), 1e-9)
    scale = colormaps["cividis"]
    colored = [
        [
            [
                {
                    "value": float(value),
                    "fill": to_hex(scale(value / top)),
                    # Black on the lighter colours of the scale and white on the darker, at a contrast of 4.5 to 1.
                    "ink": "#000" if value / top > 0.45 else "#fff",
                }
                for value in row
            ]
            for row in own
        ]
        for own in maps
    ]
    return {"maps": colored, "means": [float(own.mean()) for own in maps], "top": top}
