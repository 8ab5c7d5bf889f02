"""What training begins from: the range of lambda from constant fields, and the best that was tried."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_rl.envs import ActionScheme, Measurement, Policy
from resq_rl.errors import SettingsError, ShortMemoryError
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.runs.progress import Advance
from resq_rl.experiments.study import start
from resq_rl.experiments.study.start import Start, begin, first_choice, first_choices, prepare_training
from resq_rl.experiments.study.study import Study, build_study
from resq_rl.policies import GroupThresholds, StaticResQ, Tried, unrolled_clips
from resq_rl.video import Split
from tests.envs.problems import TINY_NETWORK


def fields(*points: tuple[float, float, float]) -> Start:
    """From (error, BOPs, accuracy) of levels 0, 1, ..."""
    return Start(tuple(Tried(StaticResQ(level=i), *point) for i, point in enumerate(points)))


def level(start: Start, trade_off: float) -> int:
    policy = start.best(trade_off)
    assert isinstance(policy, StaticResQ)
    return policy.level


def test_the_range_ends_at_the_slopes_of_the_hull() -> None:
    known = fields((0.10, 0.5, 0.9), (0.11, 0.3, 0.88), (0.19, 0.2, 0.82), (0.69, 0.1, 0.5))
    # A quarter of 0.01 / 0.2, and 0.08 / 0.1; the last point is too far below the first.
    assert known.trade_off_range() == pytest.approx((0.012, 0.8))


def test_points_above_the_hull_do_not_count() -> None:
    known = fields((0.10, 0.5, 0.9), (0.30, 0.45, 0.85), (0.11, 0.3, 0.88), (0.19, 0.2, 0.82), (0.12, 0.6, 0.9))
    assert known.trade_off_range() == pytest.approx((0.012, 0.8))


def test_all_points_count_where_none_comes_near() -> None:
    known = fields((0.5, 0.5, 0.4), (0.6, 0.3, 0.2))
    assert known.trade_off_range() == pytest.approx((0.12, 0.5))


@pytest.mark.parametrize("points", [[(0.1, 0.5, 0.9)], [(0.1, 0.5, 0.9), (0.05, 0.2, 0.9)], [(0.1, 0.5, 0.9)] * 2])
def test_no_range_is_said(points: list[tuple[float, float, float]]) -> None:
    with pytest.raises(SettingsError, match="no constant choice is more accurate for more bits"):
        fields(*points).trade_off_range()


@given(
    st.lists(
        st.tuples(st.floats(0, 1, allow_subnormal=False), st.floats(0.01, 1), st.floats(0.75, 0.9)),
        min_size=2,
        max_size=8,
    ),
    st.floats(-4, 2),
)
def test_the_best_choice_and_the_range_agree(points: list[tuple[float, float, float]], exponent: float) -> None:
    """Beyond the upper end the choice never changes any more among those near the float network."""
    known = fields(*points)
    trade_off = 10.0**exponent
    chosen = level(known, trade_off)
    losses = [error + trade_off * bops for error, bops, _ in points]
    assert losses[chosen] == min(losses)
    try:
        low, high = known.trade_off_range()
    except SettingsError:
        return
    assert 0 < low <= high
    if all(p[2] >= 0.8 for p in points):
        beyond = {points[level(known, t)][:2] for t in np.geomspace(1.06 * high + 1e-9, 1e6, 5)}
        assert len(beyond) == 1


def test_searched_thresholds_are_taken_where_they_are_better() -> None:
    scheme = ActionScheme("region_thresholds", "region", 2, (2, 2), thresholds=(0.5, 1.0, 2.0))
    constants = [Tried(GroupThresholds(taus=(t, t)), e, b, 0.9) for t, e, b in ((0.5, 0.1, 0.5), (2.0, 0.5, 0.1))]
    start = Start(tuple(constants), (Tried(GroupThresholds(taus=(0.5, 2.0)), 0.15, 0.2),))
    assert [first_choice(scheme, start.best(t)).choices for t in (0.01, 0.5, 9.0)] == [[0, 0], [0, 2], [2, 2]]
    assert start.trade_off_range() == pytest.approx((0.25, 1.0)), "constants alone set the range"


def test_a_base_is_the_best_of_what_was_learned_and_says_at_which_lambda() -> None:
    """Lambda of rewards picks; lambda of divergence, at which the thresholds were learned, goes with them."""
    learned = [
        Tried(GroupThresholds(taus=(t, 2 * t)), e, b) for t, e, b in ((0.5, 0.1, 0.5), (1.0, 0.2, 0.2), (2.0, 0.5, 0.1))
    ]
    start = Start((), learned=tuple(learned), learned_at=(0.02, 0.2, 2.0))
    assert start.base((0.01, 1.0, 9.0)) == (((0.5, 1.0), (1.0, 2.0), (2.0, 4.0)), (0.02, 0.2, 2.0))
    assert start.base((9.0, 9.0)) == (((2.0, 4.0),) * 2, (2.0, 2.0))


def test_a_level_stands_for_all_layer_groups() -> None:
    scheme = ActionScheme("frame_bits", "frame", 3, (2, 2))
    own = first_choice(scheme, StaticResQ(interval=5, level=2))
    assert scheme.uniform_action(own.choices).tolist() == [2, 2, 2, 0]
    assert own.interval == 5


def test_constants_are_spread_evenly_from_most_to_fewest_bops() -> None:
    constants = [
        Tried(GroupThresholds("previous", interval, taus=(tau,)), error=0.9 - tau, bops=1 / tau)
        for interval in (8, 0)
        for tau in (2.0, 0.5, 1.0)
    ]
    start = Start(tuple(constants))
    places = [start.even(p) for p in (0.0, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0)]
    assert [p.taus[0] for p in places if isinstance(p, GroupThresholds)] == [0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0]


# On a study --------------------------------------------------------------------------------------------------------

SMALL = [
    *TINY_NETWORK,
    "threads=1",
    "video.size=[32,48]",
    "video.frames=6",
    "video.train=2",
    "environment.grid=[2,3]",
    "environment.keyframe_intervals=[4,0]",
    "environment.trade_off=[0.05,1.0]",
    "environment.thresholds=[0.3,1.0,100.0]",
    "quantization.calibration_clips=1",
]
CASES = {
    "constants and searched": (["training.warm_start=best", "training.search_frames=30"], 2 * 3 + 3),
    "a share of one setting counts as a whole": (["training.warm_start=best", "training.search_frames=1"], 2 * 3 + 1),
    "constants": (["training.search_frames=0"], 2 * 3),
    "even": (["training.warm_start=even", "training.search_frames=30"], 2 * 3),
    "one lambda": (["environment.trade_off=0.3", "training.warm_start=best", "training.search_frames=12"], 2 * 3 + 1),
    "even with one lambda": (["environment.trade_off=0.3", "training.warm_start=even"], 2 * 3),
    "frame agents do not search": (["environment.agents=frame", "training.search_frames=30"], 2 * 3),
    "levels": (["environment=region_bits", "environment.grid=[2,3]", "environment.trade_off=[0.05,1.0]"], 2 * 4),
}


@pytest.fixture(scope="module")
def built() -> Study:
    """A study of a calibrated network, for settings that leave network and clips as they are."""
    return build_study(load_settings("train", SMALL), ["train"])


@pytest.mark.parametrize("case", CASES)
def test_what_training_begins_from(case: str, built: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, settings = CASES[case]
    simulated = 0
    measure = Study.measure

    def counted(self: Study, policy: Policy, split: Split, advance: Advance | None = None) -> Measurement:
        nonlocal simulated
        simulated += self.problems[split].frames
        return measure(self, policy, split, advance)

    monkeypatch.setattr(Study, "measure", counted)
    study, start = prepare_training(replace(built, settings=load_settings("train", [*SMALL, *changes])))
    assert start is not None
    assert start.frames == simulated == settings * 2 * 6
    first = first_choices(study, start)
    assert first is not None
    scheme = study.scheme()
    for trade_off in (0.05, 0.3, 1.0):
        assert scheme.uniform_action(first(trade_off).choices) is not None
        assert first(trade_off).interval in (4, 0)


LEARNING = [*SMALL, "training.search_frames=200"]


def begun(built: Study, *changes: str, seed: int = 0) -> tuple[Study, Start]:
    """What a seed begins from, and the study of its agents."""
    study, start = begin(
        *prepare_training(replace(built, settings=load_settings("train", [*LEARNING, *changes]))), seed
    )
    assert start is not None
    return study, start


def test_training_begins_at_learned_thresholds_unless_told_otherwise(built: Study) -> None:
    study, start = begun(built)
    assert study.base is not None
    assert not start.searched
    assert start.learned
    assert start == begun(built, "training.warm_start=gradient")[1]
    first = first_choices(study, start)
    assert first is not None
    assert first(0.3).choices == study.scheme().neutral, "the factor 1 everywhere"


def test_each_seed_learns_its_own_thresholds(built: Study) -> None:
    (one, first), (other, second) = (begun(built, seed=seed) for seed in (0, 1))
    assert one.base != other.base
    assert first.constants == second.constants
    assert begun(built, seed=1)[1] == second


def test_what_cannot_be_learned_is_searched(
    built: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SettingsError("Thresholds cannot be learned: no constant one differs.")

    monkeypatch.setattr(start, "learn_thresholds", refuse)
    study, searched = begun(built)
    assert study.base is None
    assert searched == begun(built, "training.warm_start=best")[1]
    assert searched.searched
    assert "cannot be learned" in caplog.text
    with pytest.raises(SettingsError, match="no constant one differs"):
        begun(built, "training.warm_start=gradient")


@pytest.mark.parametrize("changes", [[], ["training.warm_start=gradient"], ["training.trainer=gradient"]])
def test_short_memory_stops_what_would_begin_elsewhere(
    changes: list[str], built: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured; what asks for no gradients goes on."""
    monkeypatch.setattr(unrolled_clips, "clips_that_fit", lambda *_: 0)
    monkeypatch.setattr(Study, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ShortMemoryError, match=r"takes about .* GiB, and less is free.*training\.warm_start=best"):
        begun(built, *changes)
    monkeypatch.undo()
    assert begun(built, "training.warm_start=best")[1].searched


@pytest.mark.parametrize(
    "agents", [["environment.agents=frame"], ["environment=region_bits", "environment.grid=[2,3]"]]
)
def test_other_agents_begin_at_constants(agents: list[str], built: Study) -> None:
    study, start = begun(built, *agents, "environment.trade_off=[0.05,1.0]")
    assert study.base is None
    assert not start.learned
    assert not start.searched


def test_at_random_without_a_warm_start(built: Study) -> None:
    settings = load_settings("train", [*SMALL, "training.warm_start=none"])
    study, start = prepare_training(replace(built, settings=settings))
    assert start is None
    assert first_choices(study, start) is None
