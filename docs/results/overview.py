"""Draw `overview.png`, the picture at the head of the README, from what a comparison left beside this file.

    python docs/results/overview.py

Left are the fronts of `generated.json`; right, one frame of `generated_decisions.png` with the BOPs by region.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

HERE = Path(__file__).parent
METHODS = {  # label, colour, marker
    "per_frame": ("per-frame W8A8 and W4A4", "black", "s"),
    "static_resq": ("static ResQ", "#e69f00", "^"),
    "dynamic_resq": ("Dynamic ResQ (tuned)", "#0072b2", "o"),
    "searched_thresholds": ("searched thresholds", "#009e73", "D"),
    "ppo": ("PPO", "#d55e00", "*"),
}
# Left, upper, right, lower pixel of the second column (frame 18) of `generated_decisions.png`.
PANELS = {
    "frame": (258, 45, 490, 183),
    "prediction with PPO": (258, 540, 490, 679),
    "BOPs by region, Dynamic ResQ: 0.148 of W8A8": (258, 358, 490, 497),
    "BOPs by region, PPO: 0.067 of W8A8": (258, 689, 490, 828),
}


def main() -> None:
    """Draw and write the picture."""
    comparison = json.loads((HERE / "generated.json").read_text(encoding="utf-8"))
    figure = plt.figure(figsize=(10, 3.9), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.12, 1))
    axes = left.subplots()
    for method, (label, colour, marker) in METHODS.items():
        points = sorted((p["bops"], p["accuracy"]) for p in comparison["fronts"][method])
        line = "none" if method == "ppo" else "-"  # points of five seeds
        axes.plot(*zip(*points, strict=True), marker=marker, ls=line, color=colour, label=label, ms=6, lw=1)
    axes.axhline(comparison["float_accuracy"], color="grey", ls="--", lw=1, label="float network")
    axes.set(xscale="log", xlim=(0.06, 1.1), ylim=(0.78, 0.91))
    axes.set_xticks([0.07, 0.1, 0.2, 0.5, 1], labels=["1/14", "1/10", "1/5", "1/2", "1"], minor=False)
    axes.xaxis.minorticks_off()
    axes.set(xlabel="bit-operations per frame, share of W8A8", ylabel=comparison["accuracy_metric"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    picture = Image.open(HERE / "generated_decisions.png").convert("RGB")
    panels: list[Axes] = np.ravel(right.subplots(2, 2)).tolist()
    for panel, (title, box) in zip(panels, PANELS.items(), strict=True):
        panel.imshow(picture.crop(box))
        panel.set_title(title.replace(", ", ",\n", 1) if "," in title else title, fontsize=8)
        panel.axis("off")
    figure.savefig(HERE / "overview.png", dpi=100)


if __name__ == "__main__":
    main()
