"""Layer groups: which operator calls share a decision."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from resq_rl.errors import SettingsError
from resq_rl.quantization.graph.tracing import AnySite, Site

__all__ = ["layer_groups"]

MOST_GROUPS = 8


def layer_groups(
    sites: list[AnySite], setting: Literal["auto"] | Mapping[str, str | Sequence[str]]
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the layer groups, and the group index of each site: a product of activations joins the layer before it.

    Raises:
        SettingsError: the patterns of the setting do not match every layer exactly once.
    """
    layers = [site for site in sites if isinstance(site, Site)]
    names, index = _groups_of_layers(layers, setting)
    before = torch.tensor([isinstance(site, Site) for site in sites]).cumsum(0) - 1
    return names, index[before.clamp_min(0)]


def _groups_of_layers(
    sites: list[Site], setting: Literal["auto"] | Mapping[str, str | Sequence[str]]
) -> tuple[tuple[str, ...], Tensor]:
    if isinstance(setting, Mapping):
        return _given_groups(sites, setting)
    tops = _top_children([s.operator.name.split(".") for s in sites])
    names = list(dict.fromkeys(tops))
    if 2 <= len(names) <= MOST_GROUPS:
        return tuple(names), torch.tensor([names.index(t) for t in tops])
    return _groups_by_resolution(sites)


def _top_children(names: list[list[str]]) -> list[str]:
    """The child of the network that each layer lies in; of a single child that holds all layers, its own child."""
    while len({name[0] for name in names}) == 1 and min(map(len, names)) > 1:
        names = [name[1:] for name in names]
    return [name[0] for name in names]


def _given_groups(sites: list[Site], setting: Mapping[str, str | Sequence[str]]) -> tuple[tuple[str, ...], Tensor]:
    patterns = [[p] if isinstance(p, str) else list(p) for p in setting.values()]
    index = []
    for site in sites:
        name = site.operator.name
        own = [i for i, ps in enumerate(patterns) if any(fnmatchcase(name, p) for p in ps)]
        if len(own) != 1:
            raise SettingsError(
                f"Layer {name!r} matches {len(own)} of the groups {list(setting)}; it must match exactly one. "
                f"Layers are {[s.operator.name for s in sites]}."
            )
        index.append(own[0])
    empty = [name for i, name in enumerate(setting) if i not in index]
    if empty:
        raise SettingsError(f"The groups {empty} match no layer. Layers are {[s.operator.name for s in sites]}.")
    order = list(dict.fromkeys(index))  # of execution, so that groups of one layer each are ordered as the layers are
    return tuple(list(setting)[i] for i in order), torch.tensor([order.index(i) for i in index])


def _groups_by_resolution(sites: list[Site], most: int = 5) -> tuple[tuple[str, ...], Tensor]:
    """Runs of consecutive sites with one output resolution, the cheapest merged into a neighbour down to `most`."""
    runs: list[list[int]] = []
    for i, site in enumerate(sites):
        if runs and sites[runs[-1][0]].output_size == site.output_size:
            runs[-1].append(i)
        else:
            runs.append([i])
    while len(runs) > most:
        macs = [sum(sites[i].macs for i in run) for run in runs]
        pair = min(range(len(runs) - 1), key=lambda r: macs[r] + macs[r + 1])
        runs[pair : pair + 2] = [runs[pair] + runs[pair + 1]]
    index = torch.zeros(len(sites), dtype=torch.int64)
    for group, run in enumerate(runs):
        index[run] = group
    return tuple(f"group{g}" for g in range(len(runs))), index
