"""Tasks whose network takes its own last prediction: the streams, the teacher and what is refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resq_rl.envs import Decision, Problem, measure, respond, tabulate
from resq_rl.envs.table_cache import fingerprint
from resq_rl.errors import SettingsError, VideoError
from resq_rl.perception import MaskPropagation, clip_inputs, j_and_f, predict_clip
from resq_rl.policies import DynamicResQ
from resq_rl.quantization import LevelField, ResQModel, ThresholdField, to_float
from resq_rl.sealed import ContentStore
from resq_rl.video import IGNORE, Clip
from tests.envs import problems
from tests.envs.problems import GRID, clips_of_objects

TASK = MaskPropagation()


def colours_of(clip: Clip) -> Tensor:
    """Two colours of the object in the first frame, in 0..1, to the next byte: its darker and its lighter half."""
    assert clip.labels is not None
    pixels = clip.frames[0].permute(1, 2, 0)[clip.labels[0] == 1].double()
    dark = pixels.mean(1) <= torch.quantile(pixels.mean(1), 0.5, interpolation="lower")
    colours = torch.cat([pixels[dark].mean(0), pixels[~dark].mean(0)])
    return (colours.round() / 255).float()[None, :, None, None]


def float_masks(model: ResQModel, clip: Clip) -> Tensor:
    """The float network's masks, frame by frame: the label first, then what it says of frame and last mask."""
    assert clip.labels is not None
    masks = [clip.labels[0]]
    for frame in clip.frames[1:]:
        logits = model.float_forward((frame[None] / 255, masks[-1][None, None].float(), colours_of(clip)))
        masks.append((logits[0, 1] > logits[0, 0]).to(torch.uint8))
    return torch.stack(masks)


def test_the_teacher_rolls_out_on_its_own_masks(recurrent_problem: Problem) -> None:
    model = recurrent_problem.model
    for clip, teacher, targets in zip(
        recurrent_problem.clips, recurrent_problem.teacher, recurrent_problem.targets, strict=True
    ):
        expected = float_masks(model, clip)
        assert torch.equal(teacher, expected)
        assert clip.labels is not None
        assert torch.equal(targets[1:-1], clip.labels[1:-1])
        assert bool((targets[0] == IGNORE).all())
        assert bool((targets[-1] == IGNORE).all())
        frames, masks, colours = clip_inputs(model.float_forward, TASK, clip)
        assert torch.equal(colours / 255, colours_of(clip).expand(len(clip), -1, -1, -1))
        assert torch.equal(frames, clip.frames)
        assert torch.equal(masks[1:, 0], expected[:-1] * 255)
        assert torch.equal(masks[0, 0], clip.labels[0] * 255)
    assert len({float(t.float().mean()) for teacher in recurrent_problem.teacher for t in teacher}) > 3


def stepped(model: ResQModel, clip: Clip, refresh: list[bool], taus: list[float]) -> list[Tensor]:
    """The quantized network's masks of one clip alone, its own last one fed back by hand."""
    assert clip.labels is not None
    state, previous, masks = model.new_state(1), clip.labels[0], []
    for t, frame in enumerate(clip.frames):
        field = ThresholdField.constant(taus[t], 1, len(model.groups), GRID)
        inputs = to_float(frame[None]), previous[None, None].float(), colours_of(clip)
        logits, _ = model.step(inputs, state, torch.tensor([refresh[t]]), field)
        previous = clip.labels[0] if t == 0 else (logits[0, 1] > logits[0, 0]).to(torch.uint8)
        masks.append(previous)
    return masks


def test_every_slot_feeds_its_own_last_mask_back(recurrent_problem: Problem) -> None:
    """Three clips step together under other decisions each; one ends and another begins beside those that go on."""
    model = recurrent_problem.model
    streams = problems.streams(recurrent_problem, 3)
    order, taus = [0, 1, 2], [0.0, 0.8, 3.0]
    refresh = [[True, False, False, True, False], [True] + [False] * 6, [True, False, True, False, False, False]]
    expected = [stepped(model, recurrent_problem.clips[c], refresh[c], [taus[c]] * 9) for c in order]
    streams.start(order, order)
    for t in range(1, 5):
        levels = torch.tensor(taus)[:, None, None, None].expand(3, len(model.groups), *GRID)
        flags = torch.tensor([r[t] for r in refresh])
        result = streams.step(Decision(flags, ThresholdField(levels)))
        for slot in range(3):
            assert torch.equal(result.prediction[slot], expected[slot][t]), (slot, t)
    first = streams.start([0], [2])  # clip 0 is over; clip 2 begins anew in its slot
    assert recurrent_problem.clips[2].labels is not None
    assert torch.equal(first.prediction[0], recurrent_problem.clips[2].labels[0])
    expected[0] = stepped(model, recurrent_problem.clips[2], [True] + [False] * 6, [taus[0]] * 9)
    levels = torch.tensor(taus)[:, None, None, None].expand(3, len(model.groups), *GRID)
    branch = streams.branch()
    for run in (branch, streams):
        result = run.step(Decision(torch.zeros(3, dtype=torch.bool), ThresholdField(levels)))
        for slot, t in enumerate((1, 5, 5)):
            assert torch.equal(result.prediction[slot], expected[slot][t]), (slot, t)


def test_a_wrong_mask_goes_on(recurrent_problem: Problem) -> None:
    """What a frame gives depends on the decision before it, though both run at the finest level since."""
    model = recurrent_problem.model
    results = []
    for level in (0, 3):
        streams = problems.streams(recurrent_problem.subset([1]))
        streams.start([0], [0])
        for t in range(1, 5):
            field = LevelField.constant(level if t == 1 else 3, 1, len(model.groups), GRID)
            result = streams.step(Decision(torch.tensor([t == 2]), field))
        results.append(result.prediction)
    assert not torch.equal(*results)


def test_accuracy_is_j_and_f_without_first_and_last_frames(recurrent_problem: Problem) -> None:
    """Measured over clips of one length, it is the mean over them of `j_and_f`."""
    model = recurrent_problem.model
    pair = recurrent_problem.subset([1]), Problem.prepare(model, TASK, clips_of_objects([7, 7], seed=3), grid=GRID)
    policy = DynamicResQ(interval=3, tau=0.5)
    for own in pair:
        figures = []
        for clip in own.clips:
            assert clip.labels is not None
            masks = stepped(model, clip, [t % 3 == 0 for t in range(9)], [0.5] * 9)
            figures.append(j_and_f(torch.stack(masks), clip.labels)[2])
        found = measure(own, policy)
        assert found.accuracy == pytest.approx(sum(figures) / len(figures))
    own = pair[1]
    expected = [j_and_f(float_masks(model, clip), clip.labels)[2] for clip in own.clips if clip.labels is not None]
    assert own.float_accuracy == pytest.approx(sum(expected) / 2)
    teacher = Problem.prepare(model, TASK, own.clips, source="teacher")
    assert teacher.float_accuracy == 1.0


def test_tables_of_responses_are_refused(recurrent_problem: Problem, tmp_path: Path) -> None:
    for call in (respond, partial(tabulate, store=ContentStore(tmp_path))):
        with pytest.raises(SettingsError, match=r"MaskPropagation feeds predictions back.*another environment"):
            call(recurrent_problem, 0)


def test_clips_without_an_object_to_follow_are_refused(recurrent_problem: Problem) -> None:
    model = recurrent_problem.model
    clip = clips_of_objects([5])[0]
    assert clip.labels is not None
    late, many = clip.labels.clone(), clip.labels.clone()
    late[0], many[3, 0, 0] = 0, 2
    for wrong, message in (
        (replace(clip, labels=None), "has no labels, but MaskPropagation begins"),
        (replace(clip, labels=late), "first frame's mask shows no object"),
        (replace(clip, labels=many), "labels reach class 2"),
        (replace(clip, frames=clip.frames[:2], labels=clip.labels[:2]), "no frame of 2 counts"),
    ):
        with pytest.raises(VideoError, match=message):
            predict_clip(model.float_forward, TASK, wrong)
        with pytest.raises(VideoError, match=message):
            Problem.prepare(model, TASK, [wrong], source="teacher")


def test_fingerprints_tell_what_is_given_with_a_clip(recurrent_problem: Problem) -> None:
    """Masks of the first frame alone differ, which no target shows: first frames do not count."""
    model = recurrent_problem.model
    clip = clips_of_objects([5])[0]
    assert clip.labels is not None
    other = clip.labels.clone()
    other[0, :6] = 0
    own = [Problem.prepare(model, TASK, [c]) for c in (clip, clip, replace(clip, labels=other))]
    first, again, given = (fingerprint(p, 0) for p in own)
    assert first == again
    assert first != given
