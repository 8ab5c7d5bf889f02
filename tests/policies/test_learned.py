"""The deployed policy: its arithmetic, its cost, its choices and its files."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from resq_rl.envs import ActionKind, ActionScheme, Agents, Decision, Problem, measure
from resq_rl.envs.observation import FRAME_FEATURES
from resq_rl.errors import PolicyError
from resq_rl.policies import LearnedPolicy
from resq_rl.quantization import LevelField, ThresholdField
from resq_rl.sealed import checksum
from tests.envs import problems

HIDDEN = (8, 5)
RANGE = (0.05, 1.0)


def made(scheme: ActionScheme, bits: int = 8, seed: int = 0, **more: Any) -> LearnedPolicy:
    """A random policy for a scheme."""
    generator = torch.Generator().manual_seed(seed)
    widths = [scheme.observation_size, *HIDDEN, len(scheme.nvec)]
    weights = tuple(torch.randn(o, i, generator=generator) for i, o in pairwise(widths))
    biases = [torch.randn(o, generator=generator) for o in widths[1:]]
    biases[-1] = biases[-1] + (torch.tensor(scheme.nvec) - 1) / 2
    return LearnedPolicy(weights, tuple(biases), scheme, 0.2, RANGE, bits=bits, **more)


@pytest.fixture
def policy(problem: Problem) -> LearnedPolicy:
    """A policy of region agents over thresholds."""
    return made(problems.scheme(problem), frame_size=(32, 48), network=("stem", "body", "head"))


def observations(policy: LearnedPolicy, count: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, policy.scheme.observation_size, generator=torch.Generator().manual_seed(seed))


# Arithmetic and cost -----------------------------------------------------------------------------------------------


def test_in_float_it_is_the_multi_layer_perceptron(problem: Problem) -> None:
    policy = made(problems.scheme(problem), bits=32)
    layers: list[nn.Module] = []
    for weight, bias in zip(policy.weights, policy.biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, bias
        layers += [layer, nn.Tanh()]
    network = nn.Sequential(*layers[:-1])
    x = observations(policy)
    torch.testing.assert_close(policy.places(x), network(x), rtol=1e-5, atol=1e-5)


def integer_places(policy: LearnedPolicy, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same network on integers: int64 sums of products of codes, rescaled once per layer."""
    bits = policy.bits
    top, limit = 2**bits - 1, 2 ** (bits - 1) - 1
    codes, step = np.rint(x.astype(np.float64) * top).astype(np.int64), 1 / top
    for layer, (weight, bias) in enumerate(zip(policy.weights, policy.biases, strict=True)):
        w = weight.double().numpy()
        scale = np.abs(w).max(1) / limit
        weight_codes = np.rint(w / scale[:, None]).astype(np.int64)
        assert np.abs(weight_codes).max() <= limit
        total = codes @ weight_codes.T
        assert total.dtype == np.int64
        y: np.ndarray[Any, Any] = total * (scale * step) + bias.double().numpy()
        if layer == len(policy.weights) - 1:
            return y
        codes, step = np.rint(np.tanh(y) * limit).astype(np.int64), 1 / limit
    raise AssertionError


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_it_equals_integer_arithmetic(bits: int, problem: Problem) -> None:
    policy = made(problems.scheme(problem), bits=bits)
    x = observations(policy)
    expected = integer_places(policy, x.numpy())
    np.testing.assert_allclose(policy.places(x).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_more_bits_come_closer_to_float(problem: Problem) -> None:
    exact = made(problems.scheme(problem), bits=32)
    x = observations(exact)
    errors = [float((replace(exact, bits=b).places(x) - exact.places(x)).abs().mean()) for b in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize(
    ("kind", "agents", "macs"),
    [
        # 12 features of a region and 5 of the frame; a place for each of 3 groups; 6 regions.
        ("region_thresholds", "region", 6 * (17 * 8 + 8 * 5 + 5 * 3)),
        ("region_bits", "region", 6 * (17 * 8 + 8 * 5 + 5 * 3)),
        ("frame_bits", "frame", 29 * 8 + 8 * 5 + 5 * (3 + 1)),
        ("region_thresholds", "frame", 77 * 8 + 8 * 5 + 5 * (6 * 3 + 1)),
    ],
)
def test_multiply_accumulates_of_all_agents_count(
    kind: ActionKind, agents: Agents, macs: int, problem: Problem
) -> None:
    assert made(problems.scheme(problem, kind, agents)).macs == macs


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_the_policy_is_charged_its_macs_times_its_bits_squared(bits: int, problem: Problem) -> None:
    policy = made(problems.scheme(problem), bits=bits)
    result = measure(problem, policy)
    per_frame = policy.macs * bits * bits / problem.reference_bops
    assert result.policy.tolist() == pytest.approx([(len(c) - 1) * per_frame for c in problem.clips], rel=1e-12)


# Choices -----------------------------------------------------------------------------------------------------------


def field_values(decision: Decision) -> torch.Tensor:
    field = decision.field
    return field.levels if isinstance(field, LevelField) else field.thresholds


def test_every_agent_takes_the_choice_nearest_to_its_place(policy: LearnedPolicy, problem: Problem) -> None:
    view = problems.view(problem, 2)
    values = field_values(policy.decide(view))
    seen = view.observation.per_region()
    for clip in range(2):
        for r in range(problem.grid[0]):
            for c in range(problem.grid[1]):
                places = policy.places(seen[clip, r, c][None])[0].tolist()
                for group in range(3):
                    distances = [abs(i - places[group]) for i in range(policy.scheme.choices)]
                    best = policy.scheme.thresholds[int(np.argmin(distances))]
                    assert values[clip, group, r, c].item() == pytest.approx(best)


def test_a_frame_agent_decides_on_keyframes_itself(problem: Problem) -> None:
    policy = made(problems.scheme(problem, "frame_bits", "frame"), interval=1)
    *weights, last = policy.weights
    for wanted in (False, True):
        bias = policy.biases[-1].clone()
        bias[-1] = 100.0 if wanted else -100.0
        own = replace(policy, biases=(*policy.biases[:-1], bias))
        assert own.decide(problems.view(problem, 2)).refresh.tolist() == [wanted, wanted]
    assert len(weights) == 2
    assert last.shape[0] == 3 + 1


def test_region_agents_follow_the_interval(policy: LearnedPolicy, problem: Problem) -> None:
    own = problems.with_clips(problem, [8])
    for interval in (0, 3):
        result = measure(own, policy.at(0.1, interval))
        assert result.keyframes.tolist() == [1 if interval == 0 else 3]


def test_a_change_of_scene_is_a_keyframe_beside_the_interval(policy: LearnedPolicy, problem: Problem) -> None:
    view = problems.view(problem, 2)
    residual = view.observation.frame[:, FRAME_FEATURES.index("frame_residual_mean")]
    between = float(residual.mean())
    assert len(residual.unique()) == 2
    quiet, watching = replace(policy, interval=0), replace(policy, interval=0, scene_change=between)
    assert not quiet.decide(view).refresh.any()
    assert watching.decide(view).refresh.tolist() == (residual > between).tolist()
    assert (field_values(watching.decide(view)) == field_values(quiet.decide(view))).all()
    assert watching.settings == quiet.settings | {"scene_change": between}
    assert replace(watching, interval=1).decide(view).refresh.all()
    assert watching.at(0.5, 3).scene_change == between


def test_agents_that_decide_on_keyframes_follow_no_rule(policy: LearnedPolicy, problem: Problem) -> None:
    for own in (replace(policy, keyframes=timing(problem)), made(problems.scheme(problem, "frame_bits", "frame"))):
        with pytest.raises(PolicyError, match="decides on keyframes"):
            replace(own, scene_change=0.4)


def test_lambda_and_interval_can_be_set_anew(policy: LearnedPolicy, problem: Problem) -> None:
    other = policy.at(0.5, 0)
    assert (other.trade_off, other.interval) == (0.5, 0)
    assert policy.at(0.5).interval == policy.interval
    assert other.settings == policy.settings | {"trade_off": 0.5, "interval": 0}
    column = policy.scheme.feature_names.index("trade_off")
    weight = policy.weights[0].clone()
    weight[:, column] = 100.0 * torch.tensor([1, -1]).repeat(HIDDEN[0] // 2)
    deciding = replace(policy, weights=(weight, *policy.weights[1:]))
    shown = {measure(problem, deciding.at(t)).bops for t in (0.05, 1.0)}
    assert len(shown) == 2, "lambda reaches the network"


def test_another_environment_is_refused(policy: LearnedPolicy, problem: Problem) -> None:
    with pytest.raises(PolicyError, match=r"grid \(2, 3\).*\(3, 2\)"):
        policy.decide(problems.view(replace(problem, grid=(3, 2)), 2, trade_off_range=RANGE))
    with pytest.raises(PolicyError, match=r"\(0.05, 1.0\).*\(0.1, 0.2\)"):
        policy.decide(problems.view(problem, 2, trade_off_range=(0.1, 0.2)))


def test_another_network_is_refused(policy: LearnedPolicy, problem: Problem) -> None:
    with pytest.raises(PolicyError, match=r"layer groups \['a', 'b', 'c'\].*\['stem', 'body', 'head'\]"):
        replace(policy, network=("a", "b", "c")).decide(problems.view(problem, 2))
    four = made(ActionScheme("region_thresholds", "region", 4, problem.grid))
    with pytest.raises(PolicyError, match="4 layer groups"):
        four.decide(problems.view(problem, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"bits": 1}, "2 to 16 bits, or at 32"),
        (lambda p: {"bits": 20}, "2 to 16 bits, or at 32"),
        (lambda p: {"trade_off": 0.0}, "positive lambda"),
        (lambda p: {"trade_off": float("nan")}, "positive lambda"),
        (lambda p: {"interval": -1}, r"interval must be 0 .* or more"),
        (lambda p: {"scene_change": 0.0}, "change of scene must be positive"),
        (lambda p: {"scene_change": float("nan")}, "change of scene must be positive"),
        (lambda p: {"trade_off_range": (1.0, 0.5)}, "range of lambda"),
        (lambda p: {"weights": ()}, "do not fit each other"),
        (lambda p: {"weights": p.weights[:-1]}, "do not fit each other"),
        (lambda p: {"biases": p.biases[::-1]}, "do not fit each other"),
        (lambda p: {"weights": p.weights[:1], "biases": p.biases[:1]}, "maps 17 numbers to 8; .* 17 to 3"),
        (lambda p: {"biases": (p.biases[0] * float("nan"), *p.biases[1:])}, "finite"),
        (lambda p: {"biases": (p.biases[0].double(), *p.biases[1:])}, "float32"),
    ],
)
def test_impossible_policies_are_refused(
    change: Callable[[LearnedPolicy], dict[str, Any]], message: str, policy: LearnedPolicy, unchecked_types: None
) -> None:
    with pytest.raises(PolicyError, match=message):
        replace(policy, **change(policy))


# Learned keyframes -------------------------------------------------------------------------------------------------


def timing(problem: Problem, refresh: bool | None = None, **more: Any) -> LearnedPolicy:
    """A random keyframe policy, or one that wants a keyframe always or never."""
    own = made(
        problems.scheme(problem, "keyframe", "frame"),
        seed=5,
        frame_size=(32, 48),
        network=("stem", "body", "head"),
        **more,
    )
    if refresh is None:
        return own
    bias = torch.tensor([1e3 if refresh else -1e3])
    return replace(own, biases=(*own.biases[:-1], bias))


@pytest.mark.parametrize("refresh", [False, True])
def test_learned_keyframes_come_instead_of_the_interval(refresh: bool, policy: LearnedPolicy, problem: Problem) -> None:
    own = problems.with_clips(problem, [8])
    joint = replace(policy, keyframes=timing(problem, refresh), interval=2)
    result = measure(own, joint)
    assert result.keyframes.tolist() == [8 if refresh else 1]


def test_keyframes_are_learned_and_fields_stay(policy: LearnedPolicy, problem: Problem) -> None:
    own = problems.with_clips(problem, [6] * 8)
    keyframes = timing(problem)
    view = problems.view(own, 8)
    seen = view.observation.per_frame()
    bias = keyframes.biases[-1] + 0.5 - keyframes.places(seen).median()
    keyframes = replace(keyframes, biases=(*keyframes.biases[:-1], bias))  # some clips on either side
    decision = replace(policy, keyframes=keyframes).decide(view)
    assert decision.refresh.tolist() == (keyframes.places(seen)[:, 0] > 0.5).tolist()
    assert 0 < int(decision.refresh.sum()) < 8
    assert (field_values(decision) == field_values(policy.decide(view))).all()


def test_both_networks_are_charged(policy: LearnedPolicy, problem: Problem) -> None:
    joint = replace(policy, keyframes=timing(problem))
    macs = 6 * (17 * 8 + 8 * 5 + 5 * 3) + (29 * 8 + 8 * 5 + 5 * 1)
    assert joint.macs == macs
    result = measure(problem, joint)
    per_frame = macs * 8 * 8 / problem.reference_bops
    assert result.policy.tolist() == pytest.approx([(len(c) - 1) * per_frame for c in problem.clips], rel=1e-12)


def test_learned_keyframes_are_said_and_given_up_for_an_interval(policy: LearnedPolicy, problem: Problem) -> None:
    joint = replace(policy, keyframes=timing(problem))
    assert joint.settings == {k: v for k, v in policy.settings.items() if k != "interval"} | {"keyframes": "learned"}
    moved = joint.at(0.5)
    assert moved.keyframes is not None
    assert (moved.trade_off, moved.keyframes.trade_off) == (0.5, 0.5)
    fixed = joint.at(0.5, 4)
    assert fixed.keyframes is None
    assert fixed.settings == policy.at(0.5, 4).settings
    assert fixed.macs == policy.macs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, w: {"keyframes": p}, "'region_thresholds' beside 'region' agents"),
        (lambda p, w: {"keyframes": timing(w, bits=4)}, "bits must be the same.*8 and 4"),
        (lambda p, w: {"keyframes": timing(w, reference="keyframe")}, "reference must be the same"),
        (lambda p, w: {"keyframes": timing(w).at(0.7)}, "trade_off must be the same.*0.2 and 0.7"),
        (lambda p, w: {"keyframes": replace(timing(w), network=("a",))}, "network must be the same"),
        (
            lambda p, w: {"keyframes": made(replace(problems.scheme(w, "keyframe", "frame"), grid=(3, 2)))},
            r"grid \(3, 2\)",
        ),
    ],
)
def test_keyframes_of_another_kind_or_setting_are_refused(
    change: Callable[[LearnedPolicy, Problem], dict[str, Any]], message: str, policy: LearnedPolicy, problem: Problem
) -> None:
    with pytest.raises(PolicyError, match=message):
        replace(policy, **change(policy, problem))


def test_a_frame_agent_has_no_other_keyframes_and_keyframes_alone_no_field(problem: Problem) -> None:
    whole = made(problems.scheme(problem, "frame_bits", "frame"), network=("stem", "body", "head"))
    with pytest.raises(PolicyError, match="beside 'frame' agents"):
        replace(whole, keyframes=timing(problem))
    with pytest.raises(PolicyError, match="the field of another policy"):
        timing(problem).decide(problems.view(problem, 2, trade_off_range=RANGE))


def test_learned_keyframes_are_in_the_same_files(policy: LearnedPolicy, problem: Problem, tmp_path: Path) -> None:
    joint = replace(policy, keyframes=timing(problem))
    joint.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"policy.safetensors", "policy.json"}
    about, tensors = json.loads((tmp_path / "policy.json").read_text()), load_file(tmp_path / "policy.safetensors")
    assert about["format"] == "resq_rl policy 4"
    assert about["keyframes"]["scheme"]["kind"] == "keyframe"
    assert {"weight0", "bias2", "keyframes.weight0", "keyframes.bias2"} <= set(tensors)
    loaded = LearnedPolicy.load(tmp_path)
    assert loaded.keyframes is not None
    assert loaded.settings == joint.settings
    assert loaded.macs == joint.macs
    for mine, theirs in ((policy, loaded), (timing(problem), loaded.keyframes)):
        assert mine.scheme == theirs.scheme
        assert (mine.places(observations(mine)) == theirs.places(observations(mine))).all()
    policy.save(tmp_path)
    assert "keyframes" not in json.loads((tmp_path / "policy.json").read_text()), "as before there were any"
    assert LearnedPolicy.load(tmp_path).keyframes is None


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: edit_tensors(f, lambda t: t.pop("keyframes.bias1")), "lacks 'keyframes.bias1'"),
        (lambda f: edit(f, lambda a: a["keyframes"].pop("scheme")), "lacks 'scheme'"),
        (lambda f: edit(f, lambda a: a.update(keyframes="learned")), "cannot be used"),
        (lambda f: edit(f, lambda a: a["keyframes"].update(keyframes=dict(a["keyframes"]))), "cannot be used"),
    ],
)
def test_damaged_files_of_learned_keyframes_are_refused(
    harm: Callable[[Path], object], message: str, policy: LearnedPolicy, problem: Problem, tmp_path: Path
) -> None:
    replace(policy, keyframes=timing(problem)).save(tmp_path)
    harm(tmp_path)
    with pytest.raises(PolicyError, match=message):
        LearnedPolicy.load(tmp_path)


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "agents"), [("region_thresholds", "region"), ("frame_bits", "frame")])
def test_a_saved_policy_comes_back_the_same(kind: ActionKind, agents: Agents, problem: Problem, tmp_path: Path) -> None:
    scheme = problems.scheme(problem, kind, agents, thresholds=(0.1, 1 / 3, 7.0), kappa=(1.0, 2.5, 8.0))
    policy = made(scheme, bits=4, interval=5, reference="keyframe", frame_size=(32, 48), network=("a", "b", "c"))
    policy.save(tmp_path / "new" / "folder")
    loaded = LearnedPolicy.load(tmp_path / "new" / "folder")
    for mine, theirs in zip((*policy.weights, *policy.biases), (*loaded.weights, *loaded.biases), strict=True):
        assert (mine == theirs).all()
    for name in ("scheme", "trade_off", "trade_off_range", "interval", "reference", "bits", "frame_size", "network"):
        assert getattr(loaded, name) == getattr(policy, name), name
    assert hash(loaded.scheme) == hash(policy.scheme)
    assert loaded.settings == policy.settings
    assert (loaded.places(observations(policy)) == policy.places(observations(policy))).all()


@pytest.mark.parametrize("scene_change", [0.4, math.inf])
def test_the_rule_for_changes_of_scene_is_in_the_file(
    scene_change: float, policy: LearnedPolicy, tmp_path: Path
) -> None:
    replace(policy, scene_change=scene_change).save(tmp_path)
    assert "Infinity" not in (tmp_path / "policy.json").read_text(), "which is no JSON"
    assert LearnedPolicy.load(tmp_path).scene_change == scene_change


def test_a_file_from_before_the_rule_has_none(policy: LearnedPolicy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    tensors = load_file(tmp_path / "policy.safetensors")

    def older(about: dict[str, Any]) -> None:
        for name in ("scene_change", "sha256"):
            del about[name]
        about["format"] = "resq_rl policy 3"
        about["sha256"] = checksum(about, tensors)

    edit(tmp_path, older)
    assert LearnedPolicy.load(tmp_path).settings == policy.settings


def test_a_loaded_policy_decides_the_same(policy: LearnedPolicy, problem: Problem, tmp_path: Path) -> None:
    policy.save(tmp_path)
    view = problems.view(problem, 2)
    mine, theirs = policy.decide(view), LearnedPolicy.load(tmp_path).decide(view)
    assert isinstance(mine.field, ThresholdField)
    assert (field_values(mine) == field_values(theirs)).all()
    assert (mine.refresh == theirs.refresh).all()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of a saved policy."""
    about = json.loads((folder / "policy.json").read_text())
    change(about)
    (folder / "policy.json").write_text(json.dumps(about))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a saved policy."""
    tensors = load_file(folder / "policy.safetensors")
    change(tensors)
    save_file(tensors, folder / "policy.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda f: (f / "policy.json").unlink(), "No policy in"),
    "no tensors": (lambda f: (f / "policy.safetensors").unlink(), "No policy in"),
    "empty json": (lambda f: (f / "policy.json").write_text(""), "damaged"),
    "half of the json": (lambda f: (f / "policy.json").write_text((f / "policy.json").read_text()[:99]), "damaged"),
    "bytes for json": (lambda f: (f / "policy.json").write_bytes(b"\xff\xfe\x00\x80"), "damaged"),
    "a list": (lambda f: (f / "policy.json").write_text("[]"), "not of format"),
    "another format": (lambda f: edit(f, lambda a: a.update(format="resq_rl policy 99")), "not of format"),
    "empty tensors": (lambda f: (f / "policy.safetensors").write_bytes(b""), "damaged"),
    "half of the tensors": (
        lambda f: (f / "policy.safetensors").write_bytes((f / "policy.safetensors").read_bytes()[:-40]),
        "damaged",
    ),
    "a tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop("weight1")), "lacks 'weight1'"),
    "a tensor of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update(bias0=torch.zeros(3))),
        "do not fit each other",
    ),
    "not a number": (lambda f: edit_tensors(f, lambda t: t["weight0"].fill_(float("nan"))), "finite"),
    "no scheme": (lambda f: edit(f, lambda a: a.pop("scheme")), "lacks 'scheme'"),
    "a scheme that is none": (lambda f: edit(f, lambda a: a.update(scheme="x")), "cannot be used"),
    "an unknown key": (lambda f: edit(f, lambda a: a["scheme"].update(colour=1)), "cannot be used.*colour"),
    "an unknown kind": (lambda f: edit(f, lambda a: a["scheme"].update(kind="x")), "cannot be used.*'x'"),
    "other actions": (lambda f: edit(f, lambda a: a["scheme"].update(by_group=False)), "cannot be used.*17 to 1"),
    "other features": (
        lambda f: edit(f, lambda a: a["features"].reverse()),
        "observations are not those of this version",
    ),
    "no lambda": (lambda f: edit(f, lambda a: a.pop("trade_off")), "lacks 'trade_off'"),
    "lambda in words": (lambda f: edit(f, lambda a: a.update(trade_off="much")), "cannot be used"),
    "layers in words": (lambda f: edit(f, lambda a: a.update(layers="three")), "cannot be used.*three"),
    "no layers": (lambda f: edit(f, lambda a: a.update(layers=0)), "cannot be used"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_the_folders_name(
    damage: str, policy: LearnedPolicy, tmp_path: Path, unchecked_types: None
) -> None:
    policy.save(tmp_path)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(PolicyError, match=f"(?s){message}") as caught:
        LearnedPolicy.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="resq-rl train"):
        LearnedPolicy.load(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(PolicyError, match="No policy in"):
        LearnedPolicy.load(file)
