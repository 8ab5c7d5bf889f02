"""Measuring a policy against a plain loop over clips."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from resq_rl.envs import Decision, FrameView, Policy, Problem, measure, trace
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.perception import mean_iou
from resq_rl.policies import DynamicResQ, PerFrame, SkipGate, StaticResQ
from resq_rl.quantization import LevelField, Reference, ThresholdField, to_float
from tests.envs import problems
from tests.envs.problems import CLASSES


@dataclass(frozen=True)
class Charged(DynamicResQ):
    """A heuristic that pretends to cost something."""

    macs: int = 1000
    bits: int = 5


@dataclass(frozen=True)
class Watching(DynamicResQ):
    """Decides from the observation: coarser where the residual is small."""

    def decide(self, view: FrameView) -> Decision:
        coarse = view.observation.regions[..., 0] < 0.25
        taus = torch.where(coarse, 3.0, 0.5)[:, None].expand(-1, view.groups, -1, -1)
        return Decision(view.age + 1 >= self.interval, ThresholdField(taus, self.kappa))


def by_hand(problem: Problem, policy: Any, decide: Any) -> dict[str, list[Any]]:
    """Each clip on its own, frame by frame."""
    out: dict[str, list[Any]] = {k: [] for k in ("counts", "keyframe", "residual", "peak", "keyframes", "elementwise")}
    reference = problem.reference_bops
    own = policy.macs * policy.bits**2 / reference
    for clip, targets in zip(problem.clips, problem.targets, strict=True):
        state = problem.model.new_state(1, policy.reference)
        confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
        sums = {"keyframe": 0.0, "residual": 0.0, "peak": 0.0, "elementwise": 0.0}
        keyframes = 0
        for t, frame in enumerate(clip.frames):
            refresh = torch.tensor([t == 0 or (policy.interval > 0 and t % policy.interval == 0)])
            raw, cost = problem.model.step(to_float(frame[None]), state, refresh, decide())
            prediction = problem.task.predict(problem.task.output(raw, problem.model.frame_size))
            confusion += problem.task.counts(prediction, targets[t : t + 1])[0]
            total = float(cost.total[0]) / reference
            sums["keyframe" if refresh else "residual"] += total
            sums["elementwise"] += float(cost.elementwise[0])
            sums["peak"] = max(sums["peak"], total + (own if t else 0.0))
            keyframes += int(refresh)
        for name, value in {**sums, "counts": confusion, "keyframes": keyframes}.items():
            out[name].append(value)
    return out


POLICIES: list[tuple[Any, Any]] = [
    (DynamicResQ("previous", 3, tau=0.5), lambda: ThresholdField.constant(0.5, 1, 3)),
    (DynamicResQ("keyframe", 0, tau=1.0), lambda: ThresholdField.constant(1.0, 1, 3)),
    (StaticResQ("previous", 4, level=2), lambda: LevelField.constant(2, 1, 3)),
    (SkipGate("keyframe", 2, tau=0.7), lambda: ThresholdField.constant(0.7, 1, 3, kappa=(1.0, 1.0, 1.0))),
    (PerFrame(), lambda: LevelField.constant(0, 1, 3)),
    (Charged("previous", 3, tau=0.5), lambda: ThresholdField.constant(0.5, 1, 3)),
]


@pytest.mark.parametrize(("policy", "decide"), POLICIES, ids=[repr(p) for p, _ in POLICIES])
def test_counts_equal_a_loop_over_clips(policy: Any, decide: Any, problem: Problem) -> None:
    result, expected = measure(problem, policy), by_hand(problem, policy, decide)
    assert (result.counts == torch.stack(expected["counts"])).all()
    assert result.keyframes.tolist() == expected["keyframes"]
    assert result.frames.tolist() == [len(c) for c in problem.clips]
    for name in ("keyframe", "residual", "peak", "elementwise"):
        assert getattr(result, name).tolist() == pytest.approx(expected[name], rel=1e-12), name
    assert result.accuracy == float(mean_iou(torch.stack(expected["counts"]).sum(0)))
    assert result.settings == policy.settings
    assert result.state_bytes == problem.model.state_bytes(policy.reference)


@pytest.mark.parametrize("slots", [1, 2, 3, 100])
def test_the_number_of_slots_does_not_matter(slots: int, problem: Problem) -> None:
    policy = Watching("previous", 4)
    expected, result = measure(problem, policy, slots=32), measure(problem, policy, slots=slots)
    assert (result.counts == expected.counts).all()
    for name in ("keyframe", "residual", "peak", "elementwise", "policy"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-12, atol=0)
    assert expected.residual.std() > 0


def test_parts_add_up_and_the_policy_is_charged_for_every_decision(problem: Problem) -> None:
    free, charged = (
        measure(problem, DynamicResQ("previous", 3, tau=0.5)),
        measure(problem, Charged("previous", 3, tau=0.5)),
    )
    share = 1000 * 5**2 / problem.reference_bops
    assert charged.policy.tolist() == pytest.approx([(len(c) - 1) * share for c in problem.clips])
    assert not free.policy.any()
    assert (charged.keyframe == free.keyframe).all()
    assert (charged.residual == free.residual).all()
    for result in (free, charged):
        total = result.keyframe + result.residual + result.policy
        assert (result.clip_bops == total).all()
        assert result.bops == pytest.approx(float(total.sum()) / problem.frames)
    # The dearest frame is a periodic keyframe, before which the policy ran too.
    torch.testing.assert_close(charged.peak, free.peak + share)


def test_per_frame_quantization_is_the_unit(problem: Problem) -> None:
    result = measure(problem, PerFrame())
    assert result.bops == pytest.approx(1.0, rel=1e-12)
    assert result.peak.tolist() == pytest.approx([1.0] * 4)
    assert (result.keyframes == result.frames).all()
    assert not result.residual.any()


def test_without_keyframes_only_the_first_frame_is_one(problem: Problem) -> None:
    result = measure(problem, StaticResQ("previous", 0, level=0))
    assert result.keyframes.tolist() == [1, 1, 1, 1]
    assert result.bops == pytest.approx(4 / problem.frames)


def test_clips_of_one_frame_are_their_keyframe(problem: Problem) -> None:
    own = problems.with_clips(problem, [1, 4, 1])
    result = measure(own, Charged("previous", 3, tau=0.5))
    assert result.frames.tolist() == [1, 4, 1]
    assert result.policy[[0, 2]].tolist() == [0, 0]
    assert result.clip_bops[[0, 2]].tolist() == pytest.approx([1.0, 1.0])
    assert result.peak[[0, 2]].tolist() == pytest.approx([1.0, 1.0])


def test_resamples_weigh_clips_by_their_frames(problem: Problem) -> None:
    result = measure(problem, DynamicResQ("previous", 0, tau=0.5))
    everything = torch.arange(4)
    assert result.resampled(everything) == (result.accuracy, result.bops)
    accuracy, bops = result.resampled(torch.tensor([1, 1, 3]))
    total = 2 * result.clip_bops[1] + result.clip_bops[3]
    assert bops == pytest.approx(float(total) / (7 + 7 + 6))
    assert accuracy == pytest.approx(float(mean_iou(2 * result.counts[1] + result.counts[3])))


def test_progress_counts_every_frame(problem: Problem) -> None:
    seen: list[int] = []
    measure(problem, PerFrame(), slots=2, progress=seen.append)
    assert sum(seen) == problem.frames


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize(
    "policy", [Charged("previous", 3, tau=0.5), Watching("keyframe", 4), StaticResQ("previous", 0, level=1)]
)
def test_a_trace_is_what_is_measured(policy: Policy, clip: int, problem: Problem) -> None:
    found, result = trace(problem, policy, clip=clip), measure(problem, policy)
    frames = int(result.frames[clip])
    assert float(found.bops.mean()) == pytest.approx(float(result.clip_bops[clip] / result.frames[clip]), rel=1e-12)
    assert float(found.bops.max()) == pytest.approx(float(result.peak[clip]), rel=1e-12)
    assert int(found.keyframe.sum()) == int(result.keyframes[clip])
    confusion = problem.task.counts(found.prediction, problem.targets[clip]).sum(0)
    assert (confusion == result.counts[clip]).all()
    own = float(result.policy[clip]) / (frames - 1)
    by_region = found.share.double().mean((1, 2))
    assert (by_region[1:] + own).tolist() == pytest.approx(found.bops[1:].tolist(), rel=1e-5)
    assert found.chosen.shape[:2] == (frames - int(result.keyframes[clip]), 3)


def test_choices_are_counted_by_layer_group_on_residual_frames(problem: Problem) -> None:
    found = trace(problem, Watching("previous", 3), clip=1)  # keyframes at 0, 3 and 6 of 7 frames
    assert found.chosen.shape == (4, 3, *problem.grid)
    shares = found.choice_shares((0.5, 1.0, 3.0))
    coarse = float((found.chosen == 3.0).double().mean())
    assert 0 < coarse < 1
    torch.testing.assert_close(shares, torch.tensor([[1 - coarse, 0.0, coarse]] * 3, dtype=torch.float64) / 3)
    levels = trace(problem, StaticResQ("previous", 0, level=2), clip=0).choice_shares(range(4))
    torch.testing.assert_close(levels, torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 3, dtype=torch.float64) / 3)


def test_without_residual_frames_nothing_was_chosen(problem: Problem) -> None:
    for own in (problem, problems.with_clips(problem, [1])):
        found = trace(own, PerFrame(), clip=0)
        assert found.keyframe.all()
        assert not found.choice_shares(range(4)).any()


def test_the_policy_is_shown_its_lambda(problem: Problem) -> None:
    shown: list[Tensor] = []

    @dataclass(frozen=True)
    class Shown(Watching):
        trade_off: float = 0.1
        trade_off_range: tuple[float, float] = (0.01, 1.0)

        def decide(self, view: FrameView) -> Decision:
            shown.append(view.observation.frame[:, 1])
            return super().decide(view)

    measure(problem, Shown())
    assert torch.cat(shown).tolist() == pytest.approx([0.5] * (problem.frames - 4), abs=1e-6)


def test_a_view_is_what_the_streams_show(problem: Problem) -> None:
    view = problems.view(problem, 2, trade_off_range=(0.1, 0.4))
    assert (view.clips, view.groups, view.grid) == (2, 3, problem.grid)
    assert view.network == ("stem", "body", "head")
    assert view.trade_off_range == (0.1, 0.4)
    assert view.age.tolist() == [0, 0]
    assert view.observation.regions.shape == (2, *problem.grid, 12)


def test_fixed_policies_are_policies() -> None:
    assert isinstance(DynamicResQ(), Policy)
    assert not isinstance(object(), Policy)


def test_at_least_one_clip_must_step(problem: Problem) -> None:
    with pytest.raises(SettingsError, match="At least one clip must step at a time, got 0"):
        measure(problem, PerFrame(), slots=0)


def test_levels_that_the_model_lacks_are_refused(problem: Problem) -> None:
    reference: Reference = "previous"
    with pytest.raises(PolicyError, match="Levels must be 0 to 3"):
        measure(problem, StaticResQ(reference, 8, level=7))


def test_where_memory_is_short_fewer_clips_step_together(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = measure(problem, DynamicResQ("previous", 0, tau=0.5))
    free = 4 * 2 * problem.model.simulation_bytes // 3 + 1  # three quarters hold two clips
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    steps: list[int] = []
    short = measure(problem, DynamicResQ("previous", 0, tau=0.5), progress=steps.append)
    assert max(steps) == 2
    assert torch.equal(short.counts, everything.counts)
    with pytest.raises(SettingsError, match=r"3 clips of 32x48 do not fit into memory .* at most 2 step"):
        problems.agents(problem, 3)
