"""A policy exported as ONNX decides as it does here, from what a device has."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resq_rl.envs import ActionKind, Agents, Problem, measure, trace
from resq_rl.envs.observation import FRAME_FEATURES
from resq_rl.errors import PolicyError
from resq_rl.policies import LearnedPolicy
from resq_rl.policies.onnx_policy import OnnxPolicy, export_onnx
from resq_rl.quantization import ThresholdField
from tests.envs import problems
from tests.policies.test_learned import made

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

KINDS: list[tuple[ActionKind, Agents]] = [
    ("region_thresholds", "region"),
    ("region_bits", "region"),
    ("frame_bits", "frame"),
    ("region_thresholds", "frame"),
]


def policy_of(
    problem: Problem, kind: ActionKind = "region_thresholds", agents: Agents = "region", **more: Any
) -> LearnedPolicy:
    shape: dict[str, Any] = {"frame_size": problem.model.frame_size, "network": problem.model.groups, "interval": 4}
    return made(problems.scheme(problem, kind, agents, **more), **shape)


@pytest.mark.parametrize(("kind", "agents"), KINDS)
def test_clips_run_the_same(kind: ActionKind, agents: Agents, uneven_problem: Problem, tmp_path: Path) -> None:
    """Where the grid does not divide the frame; below it does."""
    problem = uneven_problem
    policy = policy_of(problem, kind, agents)
    export_onnx(policy, tmp_path / "policy.onnx")
    loaded = OnnxPolicy.load(tmp_path / "policy.onnx")
    mine, theirs = (trace(problem, p, clip=1) for p in (policy, loaded))
    assert torch.equal(mine.keyframe, theirs.keyframe)
    assert torch.equal(mine.chosen.expand_as(theirs.chosen), theirs.chosen)
    assert torch.equal(mine.prediction, theirs.prediction)
    assert torch.equal(mine.bops, theirs.bops)
    assert loaded.settings == policy.settings


def _between(problem: Problem) -> float:
    """A mean residual that the first residual frame of one clip exceeds and that of the other does not."""
    return float(problems.view(problem, 2).observation.frame[:, FRAME_FEATURES.index("frame_residual_mean")].mean())


@pytest.mark.parametrize("change", ["keyframes", "scene", "reference", "lambda", "float", "ignored"])
def test_every_part_of_a_policy_is_in_the_graph(change: str, problem: Problem, tmp_path: Path) -> None:
    policy = policy_of(problem, ignored=("spent_*", "texture")) if change == "ignored" else policy_of(problem)
    if change == "keyframes":
        policy = replace(
            policy, keyframes=made(problems.scheme(problem, "keyframe", "frame"), seed=13, network=problem.model.groups)
        )
    changes: dict[str, Any] = {
        "scene": {"scene_change": _between(problem), "interval": 0},
        "reference": {"reference": "keyframe"},
        "lambda": {"trade_off": 0.9},
        "float": {"bits": 32},
    }
    policy = replace(policy, **changes.get(change, {}))
    export_onnx(policy, tmp_path / "policy.onnx")
    loaded = OnnxPolicy.load(tmp_path / "policy.onnx")
    results = [measure(problem, p) for p in (policy, loaded)]
    if change == "scene":
        assert len(results[0].keyframes.unique()) > 1, "the rule tells the clips apart"
    assert torch.equal(results[0].clip_bops, results[1].clip_bops)
    assert torch.equal(results[0].keyframes, results[1].keyframes)
    assert results[0].accuracy == results[1].accuracy


def test_lambda_is_an_input_of_the_graph(problem: Problem, tmp_path: Path) -> None:
    """One file serves the whole range; what differs for another lambda differs as in the policy."""
    policy = policy_of(problem)
    export_onnx(policy, tmp_path / "policy.onnx")
    loaded = OnnxPolicy.load(tmp_path / "policy.onnx")
    fields = []
    for trade_off in (0.05, 1.0):
        streams = problems.streams(problem, 2, trade_off_range=policy.trade_off_range)
        streams.start([0, 1], [0, 1], [trade_off] * 2)
        view = streams.view()
        (mine, theirs) = (p.decide(view).field for p in (policy.at(trade_off), loaded))
        assert isinstance(mine, ThresholdField)
        assert isinstance(theirs, ThresholdField)
        assert torch.equal(mine.thresholds, theirs.thresholds)
        fields.append(mine.thresholds)
    assert not torch.equal(*fields)


def test_the_file_says_what_its_numbers_mean(problem: Problem, tmp_path: Path) -> None:
    export_onnx(policy_of(problem), tmp_path / "policy.onnx")
    model = onnx.load(tmp_path / "policy.onnx")
    about = json.loads({p.key: p.value for p in model.metadata_props}["resq_rl"])
    assert (about["choice"], about["kappa"], about["network"]) == (
        "threshold",
        [1.0, 2.0, 8.0],
        ["stem", "body", "head"],
    )
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert shapes["frame"] == [1, 3, 32, 48]
    assert shapes["output"] == [1, 2, 3, 3]


def test_without_the_extra_it_says_what_to_install(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PolicyError, match=r"resq-rl\[onnx\]"):
        export_onnx(policy_of(problem), tmp_path / "policy.onnx")


@pytest.mark.parametrize("content", [b"", b"no graph" * 20, None])
def test_what_is_no_policy_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "policy.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"policy\.onnx"):
        OnnxPolicy.load(path)
