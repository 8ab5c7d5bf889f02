"""What a float network predicts for a clip under a task that is not recurrent; the others have tests of their own."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resq_rl.perception import (
    MaskPropagation,
    Pose,
    Segmentation,
    clip_inputs,
    compact_ddrnet,
    compact_pose,
    compact_segformer,
    degenerate_output,
    example_inputs,
    judged_targets,
    mask_propagation_net,
    predict_clip,
)
from resq_rl.quantization import as_tuple
from resq_rl.video import FigureVideo, GeneratedObjects, GeneratedVideo


def test_single_frames_run_together() -> None:
    clip = GeneratedVideo(size=(32, 48), frames=5).clip("train", 0)
    assert clip.labels is not None
    network, task = compact_ddrnet(), Segmentation()
    done: list[int] = []
    found = predict_clip(lambda inputs: network(*as_tuple(inputs)), task, clip, batch=2, progress=done.append)
    with torch.no_grad():
        expected = [network(frame[None] / 255).argmax(1)[0] for frame in clip.frames]
    assert torch.equal(found.long(), torch.stack(expected))
    assert done == [2, 2, 1]
    assert clip_inputs(network, task, clip) is clip.frames
    assert judged_targets(task, clip.labels) is clip.labels
    example = example_inputs(task, clip)
    assert isinstance(example, torch.Tensor)
    assert torch.equal(example, clip.frames[:1] / 255)


WRONG_FRAMES = r"looks degenerate on the training clips: {}.* set model\.mean, model\.std, model\.channels"


def predictions(network: nn.Module, task: Any, video: Any, clips: int = 2) -> list[Tensor]:
    with torch.no_grad():
        return [
            predict_clip(lambda inputs: network(*as_tuple(inputs)), task, clip) for clip in video.clips("train")[:clips]
        ]


@pytest.mark.parametrize(
    ("network", "task", "video"),
    [
        (compact_ddrnet, Segmentation(), GeneratedVideo(frames=3, train=2)),
        (compact_segformer, Segmentation(), GeneratedVideo(frames=3, train=2)),
        (compact_pose, Pose(), FigureVideo(frames=3, train=2)),
        (mask_propagation_net, MaskPropagation(), GeneratedObjects(frames=3, train=2)),
    ],
)
def test_networks_that_work_are_no_cause_for_a_warning(network: Any, task: Any, video: Any) -> None:
    assert degenerate_output(task, predictions(network(), task, video)) is None


class Constant(nn.Module):
    """Puts out the same whatever it is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, frames: Tensor) -> Tensor:
        return self.output.expand(len(frames), *self.output.shape[1:])


BOX: dict[str, Any] = {"normaliser": "box", "points": 3}


@pytest.mark.parametrize(
    ("output", "task", "reason"),
    [
        (torch.eye(6)[2].view(1, 6, 1, 1), Segmentation(), r"each of the 6 frames is of one class \(found: 2\)"),
        (torch.zeros(1, 1, 8, 8), Segmentation(2, "probability"), "nothing is ever foreground"),
        (torch.ones(1, 1, 8, 8), Segmentation(2, "probability"), r"each of the 6 frames is of one class \(found: 1\)"),
        (torch.rand(1, 3, 24, 40), Pose(**BOX), "every point stays at one place in all 6 frames"),
        (torch.rand(1, 6), Pose(kind="landmarks", **BOX), "every point stays at one place .*coordinates and axes"),
    ],
)
def test_output_that_never_changes_is_warned_of(output: Tensor, task: Any, reason: str) -> None:
    found = degenerate_output(task, predictions(Constant(output), task, GeneratedVideo(frames=3, train=2)))
    assert found is not None
    assert re.search(WRONG_FRAMES.format(reason), found)


def test_landmarks_in_another_unit_are_warned_of() -> None:
    """Shares of the frame that are read as pixels lie in its corner, pixels that are read as shares outside of it."""
    shares = torch.rand(6, 3, 2)
    size = torch.tensor([160.0, 96.0])
    wrong: list[tuple[Any, Tensor]] = [("pixels", shares), ("frame", shares * size + 1)]
    right: list[tuple[Any, Tensor]] = [("frame", shares), ("pixels", shares * size)]
    for coordinates, raw in wrong:
        task = Pose(kind="landmarks", coordinates=coordinates, **BOX)
        assert degenerate_output(task, [task.predict(task.output(raw, (96, 160)))]) is not None
    for coordinates, raw in right:
        task = Pose(kind="landmarks", coordinates=coordinates, **BOX)
        assert degenerate_output(task, [task.predict(task.output(raw, (96, 160)))]) is None


def test_heatmaps_of_probabilities_are_warned_of_where_logits_are_expected() -> None:
    logits, task = 144 * torch.rand(6, 3, 24, 40), Pose(**BOX)
    probabilities = logits.flatten(2).softmax(2).view_as(logits)
    assert degenerate_output(task, [task.predict(task.output(logits))]) is None
    found = degenerate_output(task, [task.predict(task.output(probabilities))])
    assert found is not None
    assert "must be logits: set task.kind=probabilities" in found
    told = Pose(kind="probabilities", **BOX)
    assert degenerate_output(told, [told.predict(told.output(probabilities))]) is None


def test_an_object_that_is_lost_at_once_is_warned_of() -> None:
    masks = torch.zeros(4, 8, 12, dtype=torch.uint8)
    masks[0, 2:5, 3:7] = 1  # the first one is given
    found = degenerate_output(MaskPropagation(), [masks, masks])
    assert found is not None
    assert "nothing is ever foreground" in found


@pytest.mark.usefixtures("unchecked_types")
def test_tasks_that_know_nothing_of_it_are_warned_of_what_is_always_the_same() -> None:
    class Counting:
        """A user's task."""

    same = torch.full((3, 2), 7)
    found = degenerate_output(Counting(), [same, same])  # type: ignore[arg-type]
    assert found is not None
    assert "the prediction is the same for all 6 frames" in found
    assert degenerate_output(Counting(), [same, same + torch.arange(3)[:, None]]) is None  # type: ignore[arg-type]
