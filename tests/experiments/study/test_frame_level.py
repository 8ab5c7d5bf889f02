"""Frame-level decisions: the share of the oracle's gap, on hand-made numbers, a tiny study, and the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resq_rl.envs import Measurement, NetworkEngine, Policy, Problem, Streams, TableEngine
from resq_rl.errors import SettingsError
from resq_rl.experiments.cli.app import main
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.results.comparison import Comparison
from resq_rl.experiments.results.entries import BdEntry
from resq_rl.experiments.results.methods import tuned_methods
from resq_rl.experiments.study import measuring
from resq_rl.experiments.study.frame_level import gap_closed, is_frame_level, oracle_front, share_of_gap, tabulated
from resq_rl.experiments.study.study import Study
from resq_rl.policies import LearnedPolicy, PerFrame, best_schedule, oracle_measurement
from resq_rl.video import IGNORE, Framing, Split
from tests.envs.problems import TINY_NETWORK, scheme, tiny_network, with_clips
from tests.policies.test_learned import made
from tests.policies.test_oracle import Replay, same

Array = np.ndarray[Any, Any]
TRADE_OFFS = (0.02, 0.3)

# Share of the gap --------------------------------------------------------------------------------------------------

BASE = np.array([[0.5, 0.7], [0.9, 1.1]])
BEST = np.array([[0.3, 0.4], [0.6, 0.4]])


def share(base: Array, own: Array, best: Array) -> BdEntry:
    return share_of_gap(base, own, best, seed=0)


@pytest.mark.parametrize("closed", [0.0, 0.5, 1.0, 1.2, -0.4])
@pytest.mark.parametrize("seeds", [1, 3])
def test_share_of_the_gap_in_percent(closed: float, seeds: int) -> None:
    entry = share(BASE, np.stack([BASE - closed * (BASE - BEST)] * seeds), BEST)
    assert entry.value == pytest.approx(100 * closed)
    assert entry.ci95 == pytest.approx((100 * closed, 100 * closed))
    assert (entry.reason, entry.accuracy_range, entry.undefined_replicates) == (None, None, 0)


@pytest.mark.parametrize(
    ("base", "own", "percent"),
    [
        # Over lambda, shares of 100% and 0% are averaged, whatever the gaps; over clips gaps are summed: 1 of 2 + 4.
        ([[1, 1], [4, 4]], [[[0, 0], [4, 4]]], 50),
        ([[2, 4]], [[[1, 4]]], 100 / 6),
        ([[2, 2]], [[[0, 0]], [[2, 2]]], 50),
        ([[2, 2]], [[[0, 0]], [[2, 2]], [[4, 2]]], 100 / 6),
    ],
    ids=["lambda", "clips", "seeds", "worse seed"],
)
def test_what_the_share_is_averaged_over(base: Any, own: Any, percent: float) -> None:
    base, own = np.array(base, np.float64), np.array(own, np.float64)
    assert share(base, own, np.zeros_like(base)).value == pytest.approx(percent)


@pytest.mark.parametrize("best", [1.1, 1.2])
def test_without_a_gap_at_some_lambda_there_is_no_share(best: float) -> None:
    entry = share(BASE, BASE[None], np.array([BEST[0], [0.9, best]]))
    assert (entry.value, entry.ci95) == (None, None)
    assert entry.reason is not None
    assert "as good as the oracle" in entry.reason


def test_a_single_clip_gives_a_share_without_an_interval() -> None:
    entry = share(BASE[:, :1], BASE[None, :, :1], BEST[:, :1])
    assert (entry.value, entry.ci95, entry.reason) == (0.0, None, "one clip gives no interval")


def test_replicates_without_a_gap_are_counted() -> None:
    """Of two clips one has a gap: a quarter of the replicates draw only the other."""
    base, best = np.array([[1.0, 1.0]]), np.array([[0.0, 1.0]])
    entry = share(base, base[None], best)
    assert (entry.value, entry.ci95) == (0.0, None)
    assert 200 < entry.undefined_replicates < 300
    assert entry.reason is not None
    assert "bootstrap replicates" in entry.reason


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_holds_the_share_and_shrinks_with_clips(seed: int) -> None:
    generator = np.random.default_rng(seed)
    width = []
    for clips in (30, 300):
        base = generator.uniform(1, 2, (2, clips))
        gap = generator.uniform(0.1, 0.5, (2, clips))
        own = base - gap * generator.normal(0.6, 0.3, (3, 2, clips))
        entry = share(base, own, base - gap)
        assert entry == share(base, own, base - gap)
        assert entry.value is not None
        assert entry.ci95 is not None
        assert entry.ci95[0] < entry.value < entry.ci95[1]
        width.append(entry.ci95[1] - entry.ci95[0])
    assert entry.value == pytest.approx(60, abs=5)
    assert width[1] < 0.6 * width[0]


# On a tiny network -------------------------------------------------------------------------------------------------


def study_of(parts: Problem, *overrides: str, unlabelled: bool = False) -> Study:
    """The tiny network with three splits, labelled by itself in float; nearly two thirds of each frame may be not."""
    settings = load_settings(
        "compare",
        [
            "+experiment=frame_level",
            "environment.grid=[2,3]",
            "environment.clips_per_batch=3",
            f"environment.trade_off=[{TRADE_OFFS[0]},{TRADE_OFFS[1]}]",
            "training.trade_offs=2",
            "heuristic.intervals=[3,0]",
            "heuristic.frame_taus=[0.3]",
            "heuristic.scene_changes=[0.4]",
            *overrides,
        ],
    )

    def on(lengths: list[int], seed: int) -> Problem:
        own = with_clips(parts, lengths, seed=seed, source="teacher")
        if not unlabelled:
            return own
        labels = [teacher.clone() for teacher in own.teacher]
        for label in labels:
            label[:, :, :30] = IGNORE
        clips = [replace(clip, labels=label) for clip, label in zip(own.clips, labels, strict=True)]
        return Problem.prepare(parts.model, parts.task, clips, grid=parts.grid)

    problems: dict[Split, Problem] = {
        "train": on([4, 4, 4], 30),
        "validation": on([3, 4, 3], 40),
        "test": on([6, 4, 7], 50),
    }
    calibration = problems["train"].frame_tensors
    return Study(settings, tiny_network(), problems, calibration, "tiny", Framing(parts.model.frame_size))


def heuristics_of(study: Study) -> list[Any]:
    """All candidates of the methods that are tuned."""
    methods = tuned_methods(study.settings)
    return [policy for method in methods if method.candidates for policy in method.candidates(study.settings)]


def learned(parts: Problem, seed: int) -> LearnedPolicy:
    policy = made(scheme(parts, "frame_level", "frame"), seed=seed, reference="keyframe")
    return replace(policy, trade_off_range=TRADE_OFFS)


@dataclass(frozen=True)
class Tiny:
    parts: Problem
    plain: Study
    tabulated: Study


@pytest.fixture(scope="module")
def tiny(problem: Problem) -> Tiny:
    plain = study_of(problem)
    return Tiny(problem, plain, tabulated(plain))


def test_only_agents_of_frame_levels_have_an_oracle(problem: Problem) -> None:
    assert is_frame_level(study_of(problem))
    assert not is_frame_level(study_of(problem, "environment=region_thresholds"))
    assert not is_frame_level(study_of(problem, "environment=region_thresholds", "environment.reference=previous"))
    with pytest.raises(SettingsError, match=r"'environment.reference' must be keyframe .* received 'previous'"):
        study_of(problem, "environment.reference=previous")


def test_tables_give_a_study_what_the_network_does(tiny: Tiny) -> None:
    policies = [PerFrame("keyframe"), *heuristics_of(tiny.plain)]
    for policy in (*policies, learned(tiny.parts, 1)):
        done: list[int] = []
        same(tiny.tabulated.measure(policy, "validation", done.append), tiny.plain.measure(policy, "validation"))
        assert sum(done) == 10


def test_agents_train_on_tables_where_there_are_some(tiny: Tiny) -> None:
    on_tables, on_network = (study.agents().streams for study in (tiny.tabulated, tiny.plain))
    assert isinstance(on_tables.engine, TableEngine)
    assert isinstance(on_network.engine, NetworkEngine)
    for streams in (on_tables, on_network):
        assert (streams.slots, streams.problem.grid, streams.reference) == (3, (2, 3), "keyframe")
        assert streams.trade_off_range == TRADE_OFFS


def test_the_oracle_has_a_point_for_each_lambda(tiny: Tiny) -> None:
    front = oracle_front(tiny.tabulated, "test")
    assert [m.settings["trade_off"] for m in front] == pytest.approx(TRADE_OFFS)
    one = replace(
        tiny.tabulated, settings=load_settings("compare", ["+experiment=frame_level", "environment.trade_off=0.1"])
    )
    assert [m.settings["trade_off"] for m in oracle_front(one, "test")] == pytest.approx([0.1])


# The gap, from rewards ---------------------------------------------------------------------------------------------


def objective(study: Study, policies: Policy | Sequence[Policy], split: Split) -> Array:
    """Mean of error + lambda * BOPs per frame on the network, deciding included, by lambda and clip.

    `policies` are one for all clips, or one for each.
    """
    problem = study.problems[split]
    by_clip = [policies] * len(problem) if isinstance(policies, Policy) else policies
    values = []
    for index, (clip, policy) in enumerate(zip(problem.clips, by_clip, strict=True)):
        share = policy.macs * policy.bits**2 / study.model.reference_bops()
        streams = Streams(
            NetworkEngine(problem.subset([index])),
            slots=1,
            reference="keyframe",
            trade_off_range=policy.trade_off_range,
        )
        results = [result for _, result in streams.run(policy)]
        rewards = torch.cat([result.reward(torch.tensor(TRADE_OFFS)) for result in results]).view(-1, len(TRADE_OFFS))
        deciding = share * (len(clip) - 1) / len(clip)
        values.append(1 - rewards.double().mean(0).numpy() + deciding * np.array(TRADE_OFFS))
    return np.stack(values, 1)


def at_each(study: Study, policies: Sequence[Policy | Sequence[Policy]], split: Split) -> Array:
    """The objective of one policy, or of one for each clip, for each lambda."""
    return np.stack([objective(study, policy, split)[i] for i, policy in enumerate(policies)])


@pytest.mark.parametrize("unlabelled", [False, True])
def test_the_share_closed_follows_from_rewards_on_the_network(unlabelled: bool, problem: Problem) -> None:
    more = [] if unlabelled else ["heuristic.intervals=[2,3,5,0]"]
    own = tabulated(study_of(problem, *more, unlabelled=unlabelled))
    tables = own.tables["test"].tables
    policies = {seed: learned(problem, seed) for seed in (1, 3)}
    heuristics = heuristics_of(own)
    tuned = np.stack([objective(own, p, "validation").mean(1) for p in heuristics]).argmin(0)
    tried = np.stack([objective(own, p, "test") for p in heuristics])
    assert unlabelled or (tuned != tried.mean(2).argmin(0)).any(), "the test clips would choose the same heuristics"
    base = np.stack([tried[chosen, i] for i, chosen in enumerate(tuned)])
    reached = np.stack([at_each(own, [p.at(t) for t in TRADE_OFFS], "test") for p in policies.values()])
    replays = [[Replay([best_schedule(table, t)]) for table in tables] for t in TRADE_OFFS]
    best = at_each(own, replays, "test")
    assert (best <= np.concatenate([tried, reached]) + 1e-6).all()
    gaps = (base - best).sum(1)
    assert (gaps > 1e-3).all()
    closed = (base - reached.mean(0)).sum(1)
    found = gap_closed(own, policies, "test")
    assert found.value == pytest.approx(float(np.mean(100 * closed / gaps)), rel=1e-3)


# The command -------------------------------------------------------------------------------------------------------

TINY = [
    "+experiment=frame_level",
    *TINY_NETWORK,
    "tracking=disabled",
    "threads=1",
    "video.size=[32,48]",
    "video.frames=6",
    "video.train=3",
    "video.validation=2",
    "video.test=3",
    "environment.grid=[2,3]",
    "environment.clips_per_batch=3",
    "environment.trade_off=[0.05,1.0]",
    "training.frames=100",
    "training.seeds=[0]",
    "training.n_steps=8",
    "training.trade_offs=2",
    "heuristic.intervals=[2,0]",
    "heuristic.frame_taus=[0.2]",
    "heuristic.scene_changes=[0.3]",
    "quantization.calibration_clips=2",
    "quantization.weight_rounding=nearest",
]


@dataclass(frozen=True)
class Compared:
    """What the command wrote, and what it measured the gap with."""

    comparison: Comparison
    study: Study
    policies: Mapping[int, LearnedPolicy]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder: Path = tmp_path_factory.mktemp("results")
    seen: list[tuple[Study, Mapping[int, LearnedPolicy]]] = []

    def watched(study: Study, policies: Mapping[int, LearnedPolicy], split: Split) -> BdEntry:
        seen.append((study, policies))
        return gap_closed(study, policies, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "gap_closed", watched)
        assert main(["compare", *TINY, f"results={folder}"]) == 0
    (run,) = (folder / "compare").iterdir()
    (arguments,) = seen
    assert (run / "decisions.png").is_file(), "the network runs where tables know no predictions"
    return Compared(Comparison.read(run / "comparison.json"), *arguments)


def test_compare_has_fronts_of_frame_level_methods_only(compared: Compared) -> None:
    points = {method: len(front) for method, front in compared.comparison.fronts.items()}
    assert {method for method, count in points.items() if count} == {
        "per_frame", "static_resq", "frame_magnitude", "ppo", "oracle"
    }  # fmt: skip
    assert [point.settings["trade_off"] for point in compared.comparison.fronts["oracle"]] == pytest.approx([0.05, 1.0])
    assert set(compared.comparison.bd_bops) == {
        "gap_to_oracle_closed_by_ppo", "ppo_vs_frame_magnitude", "ppo_vs_static_resq"
    }  # fmt: skip


def test_compare_reports_the_gap_or_why_not(compared: Compared) -> None:
    entry = compared.comparison.bd_bops["gap_to_oracle_closed_by_ppo"]
    assert entry == gap_closed(compared.study, compared.policies, "test")
    assert entry.reason if entry.value is None else entry.value <= 100
    assert set(compared.policies) == {0}


@pytest.mark.parametrize("trade_off", [0.05, 1.0])
def test_nothing_comes_below_the_oracle(trade_off: float, compared: Compared) -> None:
    study = compared.study
    table = study.problems["test"].error_table.double()

    def total(result: Measurement) -> float:
        pixels = result.counts.double()
        assert int(pixels.sum()) == 3 * 6 * 32 * 48
        return float((pixels * table).sum()) / (32 * 48) + trade_off * float(result.clip_bops.sum())

    least = total(oracle_measurement(study.task, study.tables["test"].tables, trade_off))
    for policy in (*heuristics_of(study), *(p.at(trade_off) for p in compared.policies.values()), PerFrame("keyframe")):
        assert least <= total(study.measure(policy, "test")) + 1e-6, f"{policy.settings}"


def test_the_points_of_ppo_are_what_the_network_gives(compared: Compared) -> None:
    on_network = replace(compared.study, tables={})
    for point in compared.comparison.fronts["ppo"]:
        policy = compared.policies[point.settings["seed"]].at(point.settings["trade_off"])
        result = on_network.measure(policy, "test")
        assert point.accuracy == result.accuracy
        assert point.bops == pytest.approx(result.bops, rel=1e-12)
        assert point.peak_bops == pytest.approx(float(result.peak.max()), rel=1e-12)
        assert point.policy_bops == pytest.approx(float(result.policy.sum()) / 18, rel=1e-12)
