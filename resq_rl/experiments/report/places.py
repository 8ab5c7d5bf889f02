"""Where in the network and in the frame a pair of policies spends its bits, averaged over the traced clips."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor

from resq_rl.envs import Trace
from resq_rl.experiments.study.decisions import Pair
from resq_rl.quantization import ResQModel

__all__ = ["layer_rows", "region_maps"]

# Activation bits and weight bits of the unit of all BOPs.
UNIT_BITS = 8


def layer_rows(model: ResQModel, pair: Pair) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for the layer groups and for all layers: what each takes of a W8A8 frame, and what both policies spend.

    What is spent in residual frames is given as a share of what the layer costs at W8A8, and in mean activation bits:
    with BOPs = MACs x weight bits x activation bits, those that one width for all pixels would need for the same.
    """
    macs = torch.tensor([float(site.macs) for site in model.sites], dtype=torch.float64)
    widths = torch.tensor(
        [float(model.config.weight_bits(site.operator.layer_kind)) for site in model.sites], dtype=torch.float64
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
    """Of one layer, or of several together: its part of a W8A8 frame, and for each policy what it spends."""
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
    """Names with a number behind those of a layer that is called more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return result


def region_maps(pair: Pair) -> dict[str, Any]:
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
