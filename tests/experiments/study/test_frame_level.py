"""Frame-level decisions: the share of the oracle's gap, on hand-made numbers, a tiny world, and the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resq_rl.envs import ClipStore, Measurement, Policy, Simulator, TableSimulator, frames_of
from resq_rl.errors import SettingsError
from resq_rl.experiments.cli.app import main
from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.jobs import compare
from resq_rl.experiments.results.comparison import BdEntry, Comparison
from resq_rl.experiments.study.frame_level import (
    frame_heuristics,
    gap_closed,
    is_frame_level,
    oracle_front,
    share_of_gap,
    tabulated,
)
from resq_rl.experiments.study.world import World
from resq_rl.policies import (
    FrameMagnitude,
    LearnedPolicy,
    PerFrame,
    Scheduled,
    StaticResQ,
    best_schedule,
    oracle_measurement,
)
from resq_rl.video import IGNORE, Split
from tests.envs.worlds import World as Parts
from tests.envs.worlds import tiny_network
from tests.policies.test_learned import made
from tests.policies.test_oracle import same

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


def world_of(parts: Parts, *overrides: str, unlabelled: bool = False) -> World:
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

    def store(lengths: list[int], seed: int) -> ClipStore:
        own = parts.with_clips(lengths, seed=seed, source="teacher").store
        if not unlabelled:
            return own
        labels = [teacher.clone() for teacher in own.teacher]
        for label in labels:
            label[:, :, :30] = IGNORE
        clips = [replace(clip, labels=label) for clip, label in zip(own.clips, labels, strict=True)]
        return ClipStore.prepare(parts.model, parts.task, clips)

    stores: dict[Split, ClipStore] = {
        "train": store([4, 4, 4], 30),
        "validation": store([3, 4, 3], 40),
        "test": store([6, 4, 7], 50),
    }
    calibration = stores["train"].frame_tensors
    return World(settings, tiny_network(), parts.model, parts.task, stores, calibration, "tiny")


def learned(parts: Parts, seed: int) -> LearnedPolicy:
    policy = made(parts.scheme("frame_level", "frame"), seed=seed, reference="keyframe")
    return replace(policy, trade_off_range=TRADE_OFFS)


@dataclass(frozen=True)
class Tiny:
    parts: Parts
    plain: World
    tabulated: World


@pytest.fixture(scope="module")
def tiny(world: Parts) -> Tiny:
    plain = world_of(world)
    return Tiny(world, plain, tabulated(plain))


def test_only_agents_of_frame_levels_have_an_oracle(world: Parts) -> None:
    assert is_frame_level(world_of(world))
    assert not is_frame_level(world_of(world, "environment=region_thresholds"))
    assert not is_frame_level(world_of(world, "environment=region_thresholds", "environment.reference=previous"))
    with pytest.raises(SettingsError, match=r"'environment.reference' must be keyframe .* received 'previous'"):
        world_of(world, "environment.reference=previous")


def test_the_heuristics_tried_are_all_combinations(tiny: Tiny) -> None:
    found = frame_heuristics(tiny.plain)
    assert set(found) == {"static_resq", "frame_magnitude"}
    assert len(set(found["static_resq"])) == 2 * 4
    assert len(set(found["frame_magnitude"])) == 2 * 1 * 2
    assert StaticResQ("keyframe", 3, level=2) in found["static_resq"]
    for scene_change in (0.4, float("inf")):
        policy = FrameMagnitude("keyframe", 0, tau=0.3, kappa=(0.5, 1.0, 1.4), scene_change=scene_change)
        assert policy in found["frame_magnitude"]


def test_tables_give_a_world_what_the_network_does(tiny: Tiny) -> None:
    policies = [PerFrame("keyframe"), *(p for own in frame_heuristics(tiny.plain).values() for p in own)]
    for policy in (*policies, learned(tiny.parts, 1)):
        done: list[int] = []
        same(tiny.tabulated.measure(policy, "validation", done.append), tiny.plain.measure(policy, "validation"))
        assert sum(done) == 10


def test_agents_train_on_tables_where_there_are_some(tiny: Tiny) -> None:
    on_tables, on_network = (world.agents().simulator for world in (tiny.tabulated, tiny.plain))
    assert isinstance(on_tables, TableSimulator)
    assert not isinstance(on_network, TableSimulator)
    for simulator in (on_tables, on_network):
        assert (simulator.slots, simulator.grid, simulator.reference) == (3, (2, 3), "keyframe")
        assert simulator.trade_off_range == TRADE_OFFS


def test_the_oracle_has_a_point_for_each_lambda(tiny: Tiny) -> None:
    front = oracle_front(tiny.tabulated, "test")
    assert [m.settings["trade_off"] for m in front] == pytest.approx(TRADE_OFFS)
    one = replace(
        tiny.tabulated,
        settings=load_settings("compare", ["+experiment=frame_level", "environment.trade_off=0.1"]),
    )
    assert [m.settings["trade_off"] for m in oracle_front(one, "test")] == pytest.approx([0.1])


# The gap, from rewards ---------------------------------------------------------------------------------------------


def objective(world: World, policy: Policy, split: Split) -> Array:
    """Mean of error + lambda * BOPs per frame on the network, deciding included, by lambda and clip."""
    store = world.stores[split]
    share = policy.macs * policy.bits**2 / world.model.reference_bops()
    values = []
    for index, clip in enumerate(store.clips):
        simulator = Simulator(
            world.model,
            world.task,
            store.subset([index]),
            slots=1,
            grid=(2, 3),
            reference="keyframe",
            trade_off_range=policy.trade_off_range,
        )
        results = list(frames_of(simulator, policy))
        rewards = torch.cat([result.reward(torch.tensor(TRADE_OFFS)) for result in results]).view(-1, len(TRADE_OFFS))
        deciding = share * (len(clip) - 1) / len(clip)
        values.append(1 - rewards.double().mean(0).numpy() + deciding * np.array(TRADE_OFFS))
    return np.stack(values, 1)


def at_each(world: World, policies: Sequence[Policy], split: Split) -> Array:
    """The objective of one policy for each lambda."""
    return np.stack([objective(world, policy, split)[i] for i, policy in enumerate(policies)])


@pytest.mark.parametrize(
    "unlabelled",
    [False, True],
)
def test_the_share_closed_follows_from_rewards_on_the_network(unlabelled: bool, world: Parts) -> None:
    own = tabulated(world_of(world, unlabelled=unlabelled))
    store, tables = own.stores["test"], own.responses["test"].tables
    policies = {seed: learned(world, seed) for seed in (1, 3)}
    heuristics = [p for found in frame_heuristics(own).values() for p in found]
    tuned = np.stack([objective(own, p, "validation").mean(1) for p in heuristics]).argmin(0)
    tried = np.stack([objective(own, p, "test") for p in heuristics])
    assert unlabelled or (tuned != tried.mean(2).argmin(0)).any(), "the test clips would choose the same heuristics"
    base = np.stack([tried[chosen, i] for i, chosen in enumerate(tuned)])
    reached = np.stack([at_each(own, [p.at(t) for t in TRADE_OFFS], "test") for p in policies.values()])
    replays = [Scheduled(store, tuple(best_schedule(table, t) for table in tables)) for t in TRADE_OFFS]
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
    "tracking=disabled",
    "threads=1",
    "video.size=[48,64]",
    "video.frames=6",
    "video.train=3",
    "video.validation=2",
    "video.test=3",
    "environment.grid=[2,3]",
    "environment.clips_per_batch=3",
    "environment.trade_off=[0.05,1.0]",
    "training.frames=200",
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
    world: World
    policies: Mapping[int, LearnedPolicy]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder: Path = tmp_path_factory.mktemp("results")
    seen: list[tuple[World, Mapping[int, LearnedPolicy]]] = []

    def watched(world: World, policies: Mapping[int, LearnedPolicy], split: Split) -> BdEntry:
        seen.append((world, policies))
        return gap_closed(world, policies, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "gap_closed", watched)
        assert main(["compare", *TINY, f"results={folder}"]) == 0
    (run,) = (folder / "compare").iterdir()
    (arguments,) = seen
    assert (run / "decisions.png").stat().st_size > 1000, "the network runs where tables know no predictions"
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
    assert entry == gap_closed(compared.world, compared.policies, "test")
    assert entry.reason if entry.value is None else entry.value <= 100
    assert set(compared.policies) == {0}


@pytest.mark.parametrize("trade_off", [0.05, 1.0])
def test_nothing_comes_below_the_oracle(trade_off: float, compared: Compared) -> None:
    world = compared.world
    table = world.stores["test"].error_table.double()

    def total(result: Measurement) -> float:
        pixels = result.counts.double()
        assert int(pixels.sum()) == 3 * 6 * 48 * 64
        return float((pixels * table).sum()) / (48 * 64) + trade_off * float(result.clip_bops.sum())

    least = total(oracle_measurement(world.task, world.responses["test"].tables, trade_off))
    heuristics = [p for own in frame_heuristics(world).values() for p in own]
    for policy in (*heuristics, *(p.at(trade_off) for p in compared.policies.values()), PerFrame("keyframe")):
        assert least <= total(world.measure(policy, "test")) + 1e-6, f"{policy.settings}"


def test_the_points_of_ppo_are_what_the_network_gives(compared: Compared) -> None:
    on_network = replace(compared.world, responses={})
    for point in compared.comparison.fronts["ppo"]:
        policy = compared.policies[point.settings["seed"]].at(point.settings["trade_off"])
        result = on_network.measure(policy, "test")
        assert point.accuracy == result.accuracy
        assert point.bops == pytest.approx(result.bops, rel=1e-12)
        assert point.peak_bops == pytest.approx(float(result.peak.max()), rel=1e-12)
        assert point.policy_bops == pytest.approx(float(result.policy.sum()) / 18, rel=1e-12)
