"""The methods of a comparison: their keys in files, and how tables and figures name and draw them."""

from dataclasses import dataclass
from typing import Final

__all__ = ["METHODS", "Method", "method_of"]


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        key: name in `comparison.json`.
        title: name in tables and figures.
        colour: hexadecimal RGB. The colours are Okabe and Ito's palette, a grey and Paul Tol's wine, which the
            colour-blind can tell apart.
        marker: Matplotlib's code of the marker.
    """

    key: str
    title: str
    colour: str
    marker: str


# In the order of the report, weakest to strongest.
METHODS: Final = (
    Method("per_frame", "per-frame", "#000000", "s"),
    Method("static_resq", "static ResQ", "#E69F00", "^"),
    Method("skip_gate", "skip gate", "#F0E442", "v"),
    Method("random", "random", "#999999", "X"),
    Method("dynamic_resq", "Dynamic ResQ", "#0072B2", "o"),
    Method("frame_magnitude", "frame magnitude", "#56B4E9", "h"),
    Method("searched_thresholds", "searched thresholds", "#009E73", "D"),
    Method("random_search", "random search", "#882255", "<"),
    Method("ppo", "PPO", "#D55E00", "*"),
    Method("oracle", "oracle", "#CC79A7", "P"),
)
_BY_KEY: Final = {method.key: method for method in METHODS}


def method_of(key: str) -> Method:
    """The method of a key; an unknown key, such as that of a user's own method, gets its words as title and a grey."""
    return _BY_KEY.get(key, Method(key, key.replace("_", " "), "#6E7781", "p"))
