"""Thresholds learned by gradients, on problems of a tiny network."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resq_rl.envs import Decision, Measurement, NetworkEngine, Policy, Problem, measure
from resq_rl.errors import SettingsError
from resq_rl.policies import GroupThresholds
from resq_rl.policies.gradient import GradientSettings, LearnedThresholds, _Constant, _trade_offs, learn_thresholds
from resq_rl.policies.unrolled_clips import UNROLLED, UnrolledClips
from resq_rl.quantization import DEFAULT_KAPPA, Reference, ThresholdField
from tests.envs.problems import make_problem, tiny_clips

FEW = GradientSettings(frames=80, window=2, clips=1)
QUICK = GradientSettings(frames=300, window=3, clips=3)


def agreeing(problem: Problem) -> Problem:
    """The same problem with the float network's predictions as targets."""
    return Problem.prepare(problem.model, problem.task, problem.clips, grid=problem.grid, source="teacher")


@pytest.fixture(scope="module")
def trained() -> tuple[Problem, LearnedThresholds]:
    """Clips of 12 frames and the thresholds that were learned on them."""
    problem = make_problem((12,) * 6)
    settings = GradientSettings(frames=2000, window=5, clips=6, learning_rate=0.1)
    return problem, learn_thresholds(problem, settings, trade_offs=(3.4e-4, 0.054))  # where constants differ


def divergence(problem: Problem, policy: GroupThresholds) -> tuple[float, float]:
    """Mean divergence and share of W8A8 BOPs, of plain steps over all clips of equal length."""
    clips, total = torch.arange(len(problem)), torch.zeros(2, dtype=torch.float64)
    state, frames = problem.model.new_state(len(clips), policy.reference), len(problem.clips[0])
    field = ThresholdField(torch.tensor(policy.taus).expand(len(clips), -1)[:, :, None, None], policy.kappa)
    for t in range(frames):
        x = torch.stack([clip.frames[t] for clip in problem.clips]).float() / 255
        raw, cost = problem.model.step(x, state, torch.full((len(clips),), t == 0), field)
        teacher = problem.model.float_forward(x)
        size = problem.model.frame_size
        apart = problem.task.divergence(problem.task.output(raw, size), problem.task.output(teacher, size))
        total += torch.stack([apart.double().mean(), cost.total.mean() / problem.reference_bops])
    return float(total[0]) / frames, float(total[1]) / frames


def test_learned_thresholds_beat_the_best_constant_one(trained: tuple[Problem, LearnedThresholds]) -> None:
    """At every lambda, in what is minimised, as exact levels on whole clips have it."""
    problem, learned = trained
    assert len(learned.policies) == 3
    constants = np.array(
        [divergence(problem, replace(learned.policies[0], taus=(float(t),) * 3)) for t in np.geomspace(0.1, 6, 25)]
    )
    ratios = []
    for trade_off, policy in zip(learned.trade_offs, learned.policies, strict=True):
        own = float(np.array(divergence(problem, policy)) @ [1, trade_off])
        ratios.append(own / float((constants @ [1, trade_off]).min()))
    assert max(ratios) < 1, f"{ratios} of the best constant's loss, with {learned}"
    assert np.mean(ratios) < 0.97


def test_a_higher_lambda_spends_less(trained: tuple[Problem, LearnedThresholds]) -> None:
    problem, learned = trained
    measured: list[Measurement] = [measure(agreeing(problem), policy, slots=6) for policy in learned.spread(5)]
    bops = [result.bops for result in measured]
    assert bops == sorted(bops, reverse=True)
    assert bops[-1] < 0.8 * bops[0]


def test_thresholds_between_two_values_of_lambda_are_interpolated() -> None:
    ends = [GroupThresholds("keyframe", 4, taus=taus, kappa=(1.0, 2.0)) for taus in ((0.5, 4.0), (2.0, 1.0))]
    spread = LearnedThresholds((0.1, 0.4), tuple(ends), 0).spread(3)
    assert np.allclose([policy.taus for policy in spread], [(0.5, 4.0), (1.0, 2.0), (2.0, 1.0)])
    assert all((policy.reference, policy.interval, policy.kappa) == ("keyframe", 4, (1.0, 2.0)) for policy in spread)


@pytest.mark.parametrize(("reference", "interval"), [("previous", 0), ("keyframe", 2)])
def test_a_seed_gives_the_same_thresholds_again(problem: Problem, reference: Reference, interval: int) -> None:
    runs = [
        learn_thresholds(problem, QUICK, reference=reference, interval=interval, kappa=(1.0, 3.0, 9.0), seed=seed)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert runs[0].policies != runs[2].policies
    for policy in runs[0].policies:
        assert (policy.reference, policy.interval, policy.kappa) == (reference, interval, (1.0, 3.0, 9.0))
        assert len(policy.taus) == len(problem.model.sites)


def test_frames_are_counted_and_kept_to(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of backpropagation counts three times; a window at most is spent beyond the budget."""
    run: list[int] = []
    unrolled = NetworkEngine.unrolled

    def counted(self: NetworkEngine, inputs: Any, state: Any, decision: Decision, sharpness: float) -> Any:
        assert isinstance(decision.field, ThresholdField)
        run.append(len(inputs.pixels) * (3 if decision.field.thresholds.requires_grad else 1))
        return unrolled(self, inputs, state, decision, sharpness)

    monkeypatch.setattr(NetworkEngine, "unrolled", counted)
    spent: list[int] = []
    learned = learn_thresholds(problem, QUICK, progress=spent.append)
    assert learned.frames == sum(run) == sum(spent)
    assert QUICK.frames <= learned.frames < QUICK.frames + 3 * QUICK.window * QUICK.clips


def test_the_range_of_lambda_may_be_given(problem: Problem) -> None:
    assert learn_thresholds(problem, FEW, trade_offs=(0.02, 0.5)).trade_offs == pytest.approx((0.02, 0.1, 0.5))
    one = learn_thresholds(problem, FEW, trade_offs=(0.1, 0.1))
    assert one.trade_offs == (0.1,)
    assert one.spread(3) == list(one.policies) * 3


@pytest.mark.parametrize("name", ["recurrent_problem", "pose_problem", "uneven_problem"])
def test_every_kind_of_task_is_learned(name: str, request: pytest.FixtureRequest) -> None:
    problem: Problem = request.getfixturevalue(name)
    policies: list[Policy] = list(learn_thresholds(problem, FEW).spread(2))
    results = [measure(problem, policy, slots=len(problem)) for policy in policies]
    assert results[0].bops > results[1].bops


def test_unlabelled_clips_of_any_length_will_do(problem: Problem) -> None:
    clips = tiny_clips((1, 2, 9), labels=False)
    unlabelled = Problem.prepare(problem.model, problem.task, clips, grid=problem.grid, source="teacher")
    assert learn_thresholds(unlabelled, QUICK).frames >= QUICK.frames


def test_clips_of_one_frame_have_nothing_to_learn_from(problem: Problem) -> None:
    still = Problem.prepare(problem.model, problem.task, tiny_clips((1, 1)), grid=problem.grid)
    with pytest.raises(SettingsError, match="give training clips of 2 frames or more"):
        learn_thresholds(still, QUICK)


def test_a_network_that_bits_do_not_change_is_refused(problem: Problem) -> None:
    """Every frame is a keyframe, so no threshold matters."""
    with pytest.raises(SettingsError, match="no constant threshold brings the output nearer"):
        learn_thresholds(problem, QUICK, interval=1)


@pytest.mark.parametrize("name", ["frames", "window", "clips", "learning_rate", "sharpness", "knots"])
def test_settings_are_positive(name: str, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=f"gradient {name}"):
        GradientSettings(**{name: 0})


def test_the_range_of_lambda_is_from_where_constants_begin_to_lose_to_where_they_lost() -> None:
    found = [(0.1, 0.5, 0.01, 0.97), (0.2, 0.4, 0.01, 0.97), (0.4, 0.3, 0.02, 0.965), (0.7, 0.2, 0.06, 0.94)]
    found += [(1.0, 0.1, 0.26, 0.8), (1.4, 0.05, 0.76, 0.6)]
    constants = [_Constant(*values) for values in found]
    assert _trade_offs(constants) == pytest.approx((0.4 / 4, 2.0 * 4))  # from 0.4 to 1.0
    robust = [c._replace(agreement=0.95 + c.agreement / 50) for c in constants]  # the whole range loses 0.0074
    assert _trade_offs(robust) == pytest.approx(
        (0.4 / 4, 10.0 * 4)
    )  # from 0.4, the last to lose less than a twentieth of it
    equal = [c._replace(agreement=0.9) for c in constants]
    assert _trade_offs(equal) == pytest.approx((2.0 / 4, 10.0 * 4))  # the last three
    reversed_errors = [c._replace(divergence=1 - c.divergence) for c in constants]
    with pytest.raises(SettingsError, match="no constant threshold brings the output nearer"):
        _trade_offs(reversed_errors)


def test_where_memory_is_short_the_same_is_learned_in_parts(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    each = UNROLLED * QUICK.window * problem.model.simulation_bytes

    def available(clips: float) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=int(clips * each * 4 / 3) + 1))

    def parts() -> list[int]:
        clips = UnrolledClips.of_layers(problem, "previous", 0, DEFAULT_KAPPA, QUICK, 0)
        clips.start(clips.draw())
        return [len(part.clip) for part in clips.parts]

    found = []
    for memory, sizes in ((100, [QUICK.clips]), (2, [2, 1]), (1, [1, 1, 1])):
        available(memory)
        assert parts() == sizes
        found.append(learn_thresholds(problem, QUICK))
    for other in found[1:]:
        assert other.frames == found[0].frames
        assert other.trade_offs == pytest.approx(found[0].trade_offs, rel=1e-4)
        for mine, theirs in zip(found[0].policies, other.policies, strict=True):
            assert theirs.taus == pytest.approx(mine.taus, rel=1e-3)
    available(0.5)
    with pytest.raises(SettingsError, match=r"takes about .* GiB, and less is free"):
        parts()


def test_gradients_keep_no_more_than_is_estimated(problem: Problem) -> None:
    """What autograd holds until the backward pass, each memory counted once."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    clips = UnrolledClips.of_layers(problem, "previous", 0, DEFAULT_KAPPA, QUICK, 0)
    clips.start(clips.draw())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (part,) = clips.parts
        result = clips.window(part, torch.zeros(clips.count, len(problem.model.sites)).requires_grad_())
    kept = sum(held.values()) / clips.count / QUICK.window
    assert 0.3 * problem.model.simulation_bytes < kept < UNROLLED * problem.model.simulation_bytes
    assert result.requires_grad


def test_values_of_lambda_are_spread_evenly_by_ratio(trained: tuple[Problem, LearnedThresholds]) -> None:
    _, learned = trained
    low, high = learned.trade_offs[0], learned.trade_offs[-1]
    assert learned.spread_trade_offs(3) == pytest.approx((low, (low * high) ** 0.5, high))
    assert len(learned.spread_trade_offs(5)) == len(learned.spread(5))
