"""Tasks whose network takes its own last prediction: the simulator, the teacher and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resq_rl.envs import ClipStore, Decision, Simulator, TableCache, measure, respond
from resq_rl.envs.table_cache import fingerprint
from resq_rl.errors import SettingsError, VideoError
from resq_rl.perception import MaskPropagation, clip_inputs, j_and_f, predict_clip
from resq_rl.policies import DynamicResQ
from resq_rl.quantization import LevelField, ResQModel, ThresholdField, to_float
from resq_rl.video import IGNORE, Clip
from tests.envs.worlds import GRID, SIZE, moving_frames

TASK = MaskPropagation()


class Follower(nn.Module):
    """A tiny network of frame and mask whose output depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.ConvTranspose2d(8, 2, 2, 2)

    def forward(self, frames: Tensor, masks: Tensor, colours: Tensor) -> Tensor:
        mixed: Tensor = self.head(self.stem(torch.cat([frames - colours[:, :3], masks], 1)))
        return mixed


def objects(lengths: list[int], seed: int = 0) -> list[Clip]:
    """Clips with a box that moves one pixel per frame."""
    clips = []
    for i, length in enumerate(lengths):
        labels = torch.zeros(length, *SIZE, dtype=torch.uint8)
        for t in range(length):
            labels[t, 4 : SIZE[0] - 4, 2 + t : 10 + t] = 1
        frames = moving_frames(length, SIZE, seed + i, speed=1 + i)
        clips.append(Clip(frames, labels, 25.0, f"objects/{seed + i}", "test"))
    return clips


@pytest.fixture(scope="module")
def model() -> ResQModel:
    """A calibrated follower; its logits hang on the mask fed back."""
    torch.manual_seed(1)
    network = Follower()
    first = network.stem[0]
    assert isinstance(first, nn.Conv2d)
    with torch.no_grad():
        first.weight[:, 3] += 0.3
    found = ResQModel(network, (torch.zeros(1, 3, *SIZE), torch.zeros(1, 1, *SIZE), torch.zeros(1, 6, 1, 1)))
    return found.calibrate([clip_inputs(found.float_forward, TASK, clip) for clip in objects([6, 6], seed=50)])


@pytest.fixture(scope="module")
def store(model: ResQModel) -> ClipStore:
    """Clips of several lengths."""
    return ClipStore.prepare(model, TASK, objects([5, 7, 6]))


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


def test_the_teacher_rolls_out_on_its_own_masks(model: ResQModel, store: ClipStore) -> None:
    for clip, teacher, targets in zip(store.clips, store.teacher, store.targets, strict=True):
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
    assert len({float(t.float().mean()) for teacher in store.teacher for t in teacher}) > 3


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


def test_every_slot_feeds_its_own_last_mask_back(model: ResQModel, store: ClipStore) -> None:
    """Three clips step together under other decisions each; one ends and another begins beside those that go on."""
    simulator = Simulator(model, TASK, store, slots=3, grid=GRID)
    order, taus = [0, 1, 2], [0.0, 0.8, 3.0]
    refresh = [[True, False, False, True, False], [True] + [False] * 6, [True, False, True, False, False, False]]
    expected = [stepped(model, store.clips[c], refresh[c], [taus[c]] * 9) for c in order]
    simulator.start(order, order)
    for t in range(1, 5):
        levels = torch.tensor(taus)[:, None, None, None].expand(3, len(model.groups), *GRID)
        flags = torch.tensor([r[t] for r in refresh])
        result = simulator.step(Decision(flags, ThresholdField(levels)))
        for slot in range(3):
            assert torch.equal(result.prediction[slot], expected[slot][t]), (slot, t)
    first = simulator.start([0], [2])  # clip 0 is over; clip 2 begins anew in its slot
    assert store.clips[2].labels is not None
    assert torch.equal(first.prediction[0], store.clips[2].labels[0])
    expected[0] = stepped(model, store.clips[2], [True] + [False] * 6, [taus[0]] * 9)
    levels = torch.tensor(taus)[:, None, None, None].expand(3, len(model.groups), *GRID)
    branch = simulator.branch()
    for run in (branch, simulator):
        result = run.step(Decision(torch.zeros(3, dtype=torch.bool), ThresholdField(levels)))
        for slot, t in enumerate((1, 5, 5)):
            assert torch.equal(result.prediction[slot], expected[slot][t]), (slot, t)


def test_a_wrong_mask_goes_on(model: ResQModel, store: ClipStore) -> None:
    """What a frame gives depends on the decision before it, though both run at the finest level since."""
    results = []
    for level in (0, 3):
        simulator = Simulator(model, TASK, store.subset([1]), slots=1, grid=GRID)
        simulator.start([0], [0])
        for t in range(1, 5):
            field = LevelField.constant(level if t == 1 else 3, 1, len(model.groups), GRID)
            result = simulator.step(Decision(torch.tensor([t == 2]), field))
        results.append(result.prediction)
    assert not torch.equal(*results)


def test_accuracy_is_j_and_f_without_first_and_last_frames(model: ResQModel, store: ClipStore) -> None:
    """Measured over clips of one length, it is the mean over them of `j_and_f`."""
    pair = store.subset([1]), ClipStore.prepare(model, TASK, objects([7, 7], seed=3))
    policy = DynamicResQ(interval=3, tau=0.5)
    for own in pair:
        figures = []
        for clip in own.clips:
            assert clip.labels is not None
            masks = stepped(model, clip, [t % 3 == 0 for t in range(9)], [0.5] * 9)
            figures.append(j_and_f(torch.stack(masks), clip.labels)[2])
        found = measure(model, TASK, own, policy, grid=GRID)
        assert found.accuracy == pytest.approx(sum(figures) / len(figures))
    own = pair[1]
    expected = [j_and_f(float_masks(model, clip), clip.labels)[2] for clip in own.clips if clip.labels is not None]
    assert own.float_accuracy == pytest.approx(sum(expected) / 2)
    teacher = ClipStore.prepare(model, TASK, own.clips, source="teacher")
    assert teacher.float_accuracy == 1.0


def test_tables_of_responses_are_refused(model: ResQModel, store: ClipStore, tmp_path: Path) -> None:
    for call in (respond, TableCache(tmp_path).respond):
        with pytest.raises(SettingsError, match=r"MaskPropagation feeds predictions back.*another environment"):
            call(model, TASK, store, 0, grid=GRID)


def test_clips_without_an_object_to_follow_are_refused(model: ResQModel) -> None:
    clip = objects([5])[0]
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
            ClipStore.prepare(model, TASK, [wrong], source="teacher")


def test_fingerprints_tell_what_is_given_with_a_clip(model: ResQModel) -> None:
    """Masks of the first frame alone differ, which no target shows: first frames do not count."""
    clip = objects([5])[0]
    assert clip.labels is not None
    other = clip.labels.clone()
    other[0, :6] = 0
    stores = [ClipStore.prepare(model, TASK, [c]) for c in (clip, clip, replace(clip, labels=other))]
    first, again, given = (fingerprint(model, TASK, store, 0, GRID, None) for store in stores)
    assert first == again
    assert first != given
