"""Numbers chosen by agents, and the decisions that they make."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resq_rl.envs import FRAME_FEATURES, ActionKind, ActionScheme, Agents, Observation, region_features
from resq_rl.errors import PolicyError, SettingsError
from resq_rl.quantization import LevelField, ThresholdField

THRESHOLDS = (0.5, 1.0, 4.0)


def scheme(
    kind: Any, agents: Any = "frame", *, groups: int = 3, grid: tuple[int, int] = (2, 4), **more: Any
) -> ActionScheme:
    return ActionScheme(kind, agents, groups, grid, **({"thresholds": THRESHOLDS} | more))


@pytest.mark.parametrize(
    ("made", "nvec", "agents", "features"),
    [
        (scheme("frame_bits"), (4, 4, 4, 2), 1, 2 * 12 + 5),
        (scheme("keyframe"), (2,), 1, 2 * 12 + 5),
        (scheme("region_bits"), (4,) * 24 + (2,), 1, 8 * 12 + 5),
        (scheme("region_bits", by_group=False), (4,) * 8 + (2,), 1, 8 * 12 + 5),
        (scheme("region_thresholds", by_group=False), (3,) * 8 + (2,), 1, 8 * 12 + 5),
        (scheme("region_bits", "region"), (4, 4, 4), 8, 12 + 5),
        (scheme("region_thresholds", "region"), (3, 3, 3), 8, 12 + 5),
        (scheme("region_thresholds", "region", by_group=False), (3,), 8, 12 + 5),
    ],
)
def test_sizes(made: ActionScheme, nvec: tuple[int, ...], agents: int, features: int) -> None:
    assert made.nvec == nvec
    assert made.agents_per_clip == agents
    assert made.observation_size == len(made.feature_names) == features
    assert len(set(made.feature_names)) == features


def test_names_of_features() -> None:
    region = region_features(3)
    assert scheme("region_bits", "region").feature_names == region + FRAME_FEATURES
    whole = scheme("region_bits").feature_names
    assert whole[0] == "residual_mean[0,0]"
    assert whole[12 * 5 + 1] == "residual_max[1,1]"


@given(st.data())
def test_each_number_lands_in_its_region_and_group(data: st.DataObject) -> None:
    """Regions row by row, the groups of a region beside each other, the keyframe decision last."""
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups, by_group = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    kind, agents = (
        data.draw(st.sampled_from(["region_bits", "region_thresholds"])),
        data.draw(st.sampled_from(["frame", "region"])),
    )
    made = scheme(kind, agents, groups=groups, grid=grid, by_group=by_group)
    clips = data.draw(st.integers(1, 3))
    rows = clips * made.agents_per_clip
    actions = np.array([[data.draw(st.integers(0, n - 1)) for n in made.nvec] for _ in range(rows)])
    due = torch.tensor([data.draw(st.booleans()) for _ in range(clips)])
    decision = made.decide(actions, due)
    values = decision.field.levels if isinstance(decision.field, LevelField) else decision.field.thresholds
    assert values.shape == (clips, groups, *grid)
    for clip in range(clips):
        refresh = bool(due[clip]) if agents == "region" else actions[clip, -1] == 1
        assert bool(decision.refresh[clip]) == refresh
        for r in range(grid[0]):
            for c in range(grid[1]):
                for g in range(groups):
                    region, column = r * grid[1] + c, g if by_group else 0
                    width = groups if by_group else 1
                    chosen = (
                        actions[clip * grid[0] * grid[1] + region, column]
                        if agents == "region"
                        else actions[clip, region * width + column]
                    )
                    expected = np.float32(THRESHOLDS[chosen]) if kind == "region_thresholds" else chosen
                    assert values[clip, g, r, c].item() == expected


def test_levels_of_a_frame_are_by_group() -> None:
    decision = scheme("frame_bits").decide(np.array([[3, 0, 2, 1], [1, 1, 0, 0]]))
    assert isinstance(decision.field, LevelField)
    assert decision.field.levels[..., 0, 0].tolist() == [[3, 0, 2], [1, 1, 0]]
    assert decision.refresh.tolist() == [True, False]


def test_keyframe_agents_choose_when_and_take_the_field_as_it_is() -> None:
    made = scheme("keyframe")
    field = LevelField(torch.randint(4, (3, 3, 2, 4)))
    decision = made.decide(np.array([[0], [1], [0]]), field=field)
    assert decision.refresh.tolist() == [False, True, False]
    assert decision.field is field
    assert made.uniform_action(2).tolist() == [0], "no keyframe"
    with pytest.raises(PolicyError, match="the field of another policy"):
        made.decide(np.array([[1]]))


def test_thresholds_carry_kappa() -> None:
    decision = scheme("region_thresholds", "region", kappa=(1.0, 3.0, 9.0)).decide(np.zeros((8, 3), dtype=np.int64))
    assert isinstance(decision.field, ThresholdField)
    assert tuple(decision.field.kappa) == (1.0, 3.0, 9.0)
    assert decision.refresh.tolist() == [False]


@pytest.mark.parametrize("kind", ["frame_bits", "region_bits", "region_thresholds"])
@pytest.mark.parametrize("agents", ["frame", "region"])
@pytest.mark.parametrize("by_group", [True, False])
def test_a_uniform_action_is_a_constant_field(kind: Any, agents: Any, by_group: bool) -> None:
    if kind == "frame_bits" and agents == "region":
        return
    made = scheme(kind, agents, by_group=by_group)
    for choice in (0, 2):
        field = made.decide(np.tile(made.uniform_action(choice), (made.agents_per_clip, 1))).field
        values = field.levels if isinstance(field, LevelField) else field.thresholds
        expected = THRESHOLDS[choice] if kind == "region_thresholds" else choice
        assert bool(torch.all(values == expected))
        assert values.shape[1] == 3


def test_a_uniform_action_by_group() -> None:
    for kind, agents in (("frame_bits", "frame"), ("region_bits", "frame"), ("region_bits", "region")):
        made = scheme(kind, agents)
        field = made.decide(np.tile(made.uniform_action([2, 0, 1]), (made.agents_per_clip, 1))).field
        assert isinstance(field, LevelField)
        assert (field.levels == torch.tensor([2, 0, 1])[None, :, None, None]).all()
    with pytest.raises(PolicyError, match=r"3 layer groups, is needed, got \[1, 2\]"):
        scheme("frame_bits").uniform_action([1, 2])


def test_errors_say_which_agent_gave_what() -> None:
    actions = np.zeros((8, 3), dtype=np.int64)
    actions[5, 1] = 4
    with pytest.raises(PolicyError, match="agent 5 gave 4 in column 1, where 0 to 3 are known"):
        scheme("region_bits", "region").decide(actions)


@pytest.mark.parametrize("value", [0.0, float("nan"), 1j])
def test_actions_are_integers(value: Any, unchecked_types: None) -> None:
    with pytest.raises(PolicyError, match="integers"):
        scheme("frame_bits").decide(np.full((1, 4), value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "bits"}, "bits"),
        ({"agents": "pixel"}, "pixel"),
        ({"kind": "frame_bits", "agents": "region"}, "frame_bits decides for the whole frame"),
        ({"kind": "keyframe", "agents": "region"}, "keyframe decides for the whole frame"),
        ({"thresholds": (2.0, 1.0)}, "ascending"),
        ({"thresholds": (0.0, 1.0)}, "positive"),
        ({"thresholds": ()}, "positive"),
    ],
)
def test_impossible_schemes_are_refused(settings: dict[str, Any], message: str, unchecked_types: None) -> None:
    with pytest.raises(SettingsError, match=message):
        scheme(**({"kind": "region_bits", "agents": "region"} | settings))


@pytest.mark.parametrize(
    ("kind", "agents"), [("region_thresholds", "region"), ("region_bits", "frame"), ("frame_bits", "frame")]
)
def test_agents_do_not_see_what_is_ignored(kind: ActionKind, agents: Agents) -> None:
    groups, grid = 2, (2, 3)
    generator = torch.Generator().manual_seed(0)
    regions = torch.rand(4, *grid, len(region_features(groups)), generator=generator) + 0.1
    observation = Observation(regions, torch.rand(4, len(FRAME_FEATURES), generator=generator) + 0.1)
    every = scheme(kind, agents, groups=groups, grid=grid)
    some = replace(every, ignored=("uncertainty", "spent_*", "trade_off"))
    seen, full = some.observe(observation), every.observe(observation)
    hidden = [any(part in name for part in ("uncertainty", "spent_group", "trade_off")) for name in some.feature_names]
    assert 0 < sum(hidden) < len(hidden)
    assert (seen[:, hidden] == 0).all()
    assert (seen[:, ~np.array(hidden)] == full[:, ~np.array(hidden)]).all()
    assert (full > 0).all()


def test_only_known_features_can_be_ignored() -> None:
    with pytest.raises(SettingsError, match=r"named 'uncertain', to be ignored.*'residual_mean'"):
        scheme("region_bits", ignored=("uncertain",))


# Factors of a base ---------------------------------------------------------------------------------------------------


def test_factors_multiply_the_thresholds_of_their_layers() -> None:
    """By hand: four layers in three groups, and a base that is interpolated by its logarithm."""
    made = scheme("region_thresholds", "region", grid=(1, 1)).on([(1, 2, 3, 4), (4, 8, 12, 16)], (0, 1, 1, 2))
    one = made.neutral
    actions = np.array([[one, one + 2, one - 2]] * 3)
    field = made.decide(actions, place=torch.tensor([0.0, 0.5, 1.0])).field
    assert isinstance(field, ThresholdField)
    expected = torch.tensor([[1.0, 4, 6, 2], [2.0, 8, 12, 4], [4.0, 16, 24, 8]])
    torch.testing.assert_close(field.thresholds[:, :, 0, 0], expected)


def test_a_base_of_one_lambda_is_the_same_everywhere() -> None:
    made = scheme("region_thresholds", "region", grid=(1, 1)).on([(1, 2, 3)], (0, 1, 2))
    field = made.decide(np.full((2, 3), made.neutral), place=torch.tensor([0.0, 0.9])).field
    assert isinstance(field, ThresholdField)
    torch.testing.assert_close(field.thresholds[:, :, 0, 0], torch.tensor([[1.0, 2, 3]] * 2))


def test_a_base_that_does_not_fit_is_refused() -> None:
    region = scheme("region_thresholds", "region")
    with pytest.raises(SettingsError, match="positive threshold for every layer"):
        region.on([(1.0, 2.0)], (0, 1, 2))
    with pytest.raises(SettingsError, match="positive threshold for every layer"):
        region.on([(1.0, 0.0, 2.0)], (0, 1, 2))
    with pytest.raises(SettingsError, match="make up the 3 layer groups"):
        region.on([(1.0, 2.0)], (0, 1))
    with pytest.raises(SettingsError, match="1 must be among them"):
        replace(region, base=((1.0, 2.0, 3.0),), layers=(0, 1, 2), thresholds=(0.5, 2.0))
    with pytest.raises(SettingsError, match="only actions that choose thresholds have a base"):
        scheme("region_bits", "region").on([(1.0, 2.0, 3.0)], (0, 1, 2))
    with pytest.raises(PolicyError, match="depend on lambda"):
        region.on([(1.0, 2.0, 3.0)], (0, 1, 2)).decide(np.zeros((8, 3), dtype=int))
