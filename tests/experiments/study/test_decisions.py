"""Which two policies the figure of decisions shows, and what it draws of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from resq_rl.envs import Measurement, Problem, Trace, trace
from resq_rl.experiments.results.plots import plot_decisions, save_figure
from resq_rl.experiments.study.decisions import comparable_pair
from resq_rl.perception import Segmentation
from resq_rl.policies import DynamicResQ, PerFrame
from resq_rl.policies.tuning import Measured
from tests.envs.problems import make_problem

PAINTED = True
TASK = Segmentation(classes=2)
GROUPS = ("stem", "body", "head")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem((6, 2))


def at(accuracy: float) -> Measured:
    """A policy measured at an accuracy: the mean IoU of the two classes of one image."""
    confusion = torch.tensor([[[0, 0], [0, 10_000]]])
    if math.isfinite(accuracy):
        wrong = round(10_000 * (1 - accuracy))
        confusion = torch.tensor([[[10_000 - wrong, wrong], [0, 0]]])
    zeros = torch.zeros(1, dtype=torch.float64)
    count = torch.ones(1, dtype=torch.int64)
    return DynamicResQ(tau=accuracy), Measurement(
        TASK, confusion, zeros, count, zeros, zeros, zeros, zeros, count, zeros, 0, {}
    )


@pytest.mark.parametrize(
    ("heuristics", "learned", "expected"),
    [
        ((0.80, 0.885, 0.89), (0.81, 0.886, 0.88), (0.885, 0.886)),
        ((0.80, 0.895), (0.80, 0.89), (0.895, 0.89)),  # nearer to 1 to 2 points than the pair of one accuracy
        ((0.80, 0.85), (0.84, 0.70), (0.85, 0.84)),
        ((0.899,), (0.60,), (0.899, 0.60)),
    ],
)
def test_the_pair_is_near_in_accuracy_and_loses_little(
    heuristics: tuple[float, ...], learned: tuple[float, ...], expected: tuple[float, float]
) -> None:
    pair = comparable_pair([at(a) for a in heuristics], [at(a) for a in learned], 0.9)
    assert pair is not None
    assert tuple(policy.settings["tau"] for policy, _ in pair) == expected


def test_without_accuracies_there_is_no_pair() -> None:
    assert comparable_pair([], [at(0.8)], 0.9) is None
    assert comparable_pair([at(0.8)], [], 0.9) is None
    assert comparable_pair([at(0.8)], [at(0.7)], math.nan) is None


def traced(problem: Problem, policy: DynamicResQ | PerFrame, clip: int = 0) -> Trace:
    return trace(problem, policy, clip=clip)


def drawn(problem: Problem, traces: dict[str, tuple[str, Trace]], clip: int = 0) -> Figure:
    frames = problem.clips[clip].frames
    choices = (0.5, 1.0)
    return plot_decisions(
        problem.task, frames, traces, choices=choices, meaning="threshold", groups=GROUPS, title="tiny"
    )


def test_the_figure_shows_what_the_traces_hold(problem: Problem) -> None:
    traces = {
        "dynamic_resq": ("the heuristic", traced(problem, DynamicResQ("previous", 0, tau=1.0))),
        "ppo": ("the learned", traced(problem, DynamicResQ("previous", 4, tau=0.5))),
    }
    figure = drawn(problem, traces)
    images = [ax.images[0] for ax in figure.axes if ax.images]
    times = (1, 2, 4, 5)
    assert [ax.get_title() for ax in figure.axes[:4]] == [f"frame {t}" for t in times]
    for method, first in ((0, 8), (1, 16)):
        own = list(traces.values())[method][1]
        for image, time in zip(images[first : first + 4], times, strict=True):
            assert torch.equal(torch.as_tensor(image.get_array()), own.share[time])
            assert f"{float(own.bops[time]):.3f} of W8A8" in image.axes.get_xlabel()
    assert "keyframe" in images[18].axes.get_xlabel(), "every fourth frame"
    assert "keyframe" not in images[10].axes.get_xlabel()
    shown = [own.share[t] for _, own in traces.values() for t in times if not own.keyframe[t]]
    top = float(torch.stack(shown).max())
    assert {image.get_clim() for image in images[8:12] + images[16:20]} == {(0.0, top)}, "one scale of colours"
    bars, curves = figure.axes[-2], figure.axes[-1]
    patches = [patch for patch in bars.patches if isinstance(patch, Rectangle)]
    assert sum(patch.get_height() for patch in patches) == pytest.approx(1.0)
    assert {patch.get_height() for patch in patches if patch.get_x() > 0.5} == {0.0}, "it always chose 0.5"
    for line, (_, own) in zip(curves.lines, traces.values(), strict=False):
        assert np.asarray(line.get_ydata()).tolist() == own.bops.tolist()


def test_a_clip_of_few_frames_all_of_them_keyframes_can_be_drawn(problem: Problem, tmp_path: Path) -> None:
    found = traced(problem, PerFrame(), clip=1)
    figure = drawn(problem, {"per_frame": ("all keyframes", found), "ppo": ("the same", found)}, clip=1)
    assert save_figure(figure, tmp_path / "drawn")[0].is_file()
