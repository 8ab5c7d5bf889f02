"""The commands on a world so small that they end in seconds, through the command line as a user would."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from resq_rl.envs import ActionScheme
from resq_rl.experiments.cli.app import main
from resq_rl.experiments.results.comparison import Comparison
from resq_rl.experiments.study import start as beginning
from resq_rl.perception import compact_ddrnet, load_weights
from resq_rl.perception.compact_networks import CompactDDRNet
from resq_rl.policies import LearnedPolicy
from resq_rl.policies.gradient_policy import adaptable
from resq_rl.quantization import ResQModel, save_model
from resq_rl.sealed import Checkpoints
from tests.envs.problems import TINY_NETWORK, moving_frames, tiny_network
from tests.policies.test_learned import made

TINY = [
    "tracking=disabled",
    "threads=1",
    "video.size=[32,48]",
    "video.frames=6",
    "video.train=3",
    "video.validation=2",
    "video.test=3",
    "environment.grid=[2,3]",
    "environment.clips_per_batch=3",
    "environment.keyframe_intervals=[4,0]",
    "environment.trade_off=[0.05,1.0]",
    "environment.thresholds=[0.3,1.0,100.0]",
    "training.frames=120",
    "training.seeds=[0,1]",
    "training.n_steps=5",
    "training.trade_offs=2",
    "training.search_frames=30",
    "training.warm_start=best",
    "training.checkpoint_every=2",
    "heuristic.intervals=[4]",
    "heuristic.references=[previous,keyframe]",
    "heuristic.taus=[0.3,1.0]",
    "quantization.calibration_clips=2",
    "quantization.weight_rounding=nearest",
]
BOUND = ["heuristic.clairvoyant_points=2", "heuristic.clairvoyant_horizon=2"]
BOUND += ["heuristic.searches=[greedy,greedy_by_layer,cma_es,gradient]"]
BOUND += ["heuristic.other_kappas=[[0.7,1.0,1.2]]", "heuristic.scene_changes=[0.4]"]
STAGES = ("checkpoints", "keyframes")


def run(tmp_path: Path, command: str, *overrides: str, network: Sequence[str] = TINY_NETWORK) -> Path:
    """Run a command in a results folder of its own; returns the newest run folder."""
    code = main([command, *TINY, *network, f"results={tmp_path}", *overrides])
    assert code == 0
    return max((tmp_path / command).iterdir(), key=lambda p: p.stat().st_mtime)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("results"), "compare", *BOUND)


def test_compare_writes_every_promised_name(compared: Path) -> None:
    values = json.loads((compared / "comparison.json").read_text())
    assert {
        "task", "video", "split", "clips", "frames", "accuracy_metric", "float_accuracy", "bops_convention",
        "reference_bops_per_frame", "env_frames_used_for_training", "wall_seconds", "fronts", "bd_bops", "efforts",
        "budget", "at_budget", "gains",
    } == set(values)  # fmt: skip
    assert (values["clips"], values["frames"]) == (3, 18)
    for method in ("per_frame", "static_resq", "dynamic_resq", "searched_thresholds", "gradient_thresholds", "ppo"):
        assert values["fronts"][method], method
    for points in values["fronts"].values():
        for point in points:
            assert {
                "accuracy", "accuracy_ci95", "bops", "bops_ci95", "peak_bops", "policy_bops", "state_bytes", "settings",
                "keyframe_bops",
            } == set(point)  # fmt: skip
    assert {"ppo_vs_dynamic_resq", "oracle_vs_searched_thresholds"} <= set(values["bd_bops"])
    assert {"fronts.png", "training.svg", "decisions.png", "report.html"} <= {path.name for path in compared.iterdir()}


@pytest.mark.slow
def test_the_same_settings_give_the_same_comparison_twice(compared: Path, tmp_path: Path) -> None:
    again = run(tmp_path, "compare", *BOUND)
    values = [json.loads((f / "comparison.json").read_text().replace(str(f), "RUN")) for f in (compared, again)]
    assert all(found.pop("wall_seconds") > 0 for found in values)
    assert all(effort.pop("seconds") > 0 for found in values for effort in found["efforts"].values())
    assert values[0] == values[1]
    names = [
        f"seed{seed}/{name}" for seed in (0, 1) for name in ("policy.safetensors", "policy.json", "model.safetensors")
    ]
    assert [name for name in names if (compared / name).read_bytes() != (again / name).read_bytes()] == []


def test_the_bound_of_regions_spans_the_range_of_lambda(compared: Path) -> None:
    settings = [point.settings for point in Comparison.read(compared / "comparison.json").fronts["oracle"]]
    assert [(s["trade_off"], s["horizon"]) for s in settings] == [(pytest.approx(0.05), 2), (pytest.approx(1.0), 2)]


@pytest.mark.parametrize("method", ["gradient_thresholds", "searched_by_layer", "cma_es"])
def test_thresholds_of_layers_are_tried_at_the_intervals(compared: Path, method: str) -> None:
    points = Comparison.read(compared / "comparison.json").fronts[method]
    layers = len(ResQModel(tiny_network(), torch.zeros(1, 3, 32, 48)).sites)
    assert points
    for settings in (point.settings for point in points):
        assert len(settings["taus"]) == layers
        assert settings["interval"] in (4, 0)


def test_under_a_budget_methods_are_compared_at_it(tmp_path: Path) -> None:
    few = [*FEW[1:], "heuristic.taus=[0.3,1.0]", "training.seeds=[0,1]"]
    folder = run(
        tmp_path, "compare", *few, "training.frames=40", "environment.budget={peak: 0.4, mean: 0.3, bucket: 2}"
    )
    found = Comparison.read(folder / "comparison.json")
    assert found.budget is not None
    assert (found.budget["peak"], found.budget["mean"], found.budget["bucket"]) == (0.4, 0.3, 2)
    assert {"static_resq", "dynamic_resq", "rate_control", "ppo"} <= set(found.at_budget)
    for method, row in found.at_budget.items():
        assert row.peak_bops <= 0.4 + 1e-9, method
        assert row.used is not None
        assert 0 < row.used <= (0.4 + 5 * 0.3) / (6 * 0.3) + 1e-9, method  # the first of six frames may spend the peak
        assert row.accuracy in [pytest.approx(p.accuracy) for p in found.fronts[method]] or method == "ppo"
    gain = found.gains["ppo_vs_rate_control"]
    expected = found.at_budget["ppo"].accuracy - found.at_budget["rate_control"].accuracy
    assert gain.points == pytest.approx(100 * expected)
    assert "At the budget" in (folder / "report.html").read_text()


def test_per_frame_is_the_unit_of_all_bops(compared: Path) -> None:
    comparison = Comparison.read(compared / "comparison.json")
    w8a8, w4a4 = comparison.fronts["per_frame"]
    assert w8a8.bops == pytest.approx(1.0)
    assert w8a8.peak_bops == pytest.approx(1.0)
    assert w4a4.bops == pytest.approx(0.25)


def test_ppo_is_charged_for_its_network_and_its_first_keyframe(compared: Path) -> None:
    comparison = Comparison.read(compared / "comparison.json")
    policy = LearnedPolicy.load(compared / "seed0")
    share = policy.macs * policy.bits**2 / comparison.reference_bops_per_frame
    for point in comparison.fronts["ppo"]:
        assert point.policy_bops == pytest.approx(share * 5 / 6)  # it decides five of six frames
        assert point.bops >= 1 / 6 + point.policy_bops - 1e-9  # equal where it learned to skip everything
        assert point.peak_bops >= 1.0
    assert {point.settings["seed"] for point in comparison.fronts["ppo"]} == {0, 1}


def test_evaluate_agrees_with_compare(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "evaluate", f"policy={compared / 'seed1'}")
    following = capsys.readouterr().err.splitlines()[-1]
    assert following.startswith("Next: for the same against tuned heuristics: resq-rl compare tracking=disabled ")
    assert f"policy={compared / 'seed1'}" in following
    evaluated = json.loads((folder / "summary.json").read_text())["points"]
    comparison = Comparison.read(compared / "comparison.json")
    for point in comparison.fronts["ppo"]:
        if point.settings["seed"] != 1:
            continue
        key = (point.settings["trade_off"], point.settings["interval"])
        twin = next(p for p in evaluated if (p["settings"]["trade_off"], p["settings"]["interval"]) == key)
        assert (twin["accuracy"], twin["bops"]) == (point.accuracy, point.bops)


def test_compare_measures_policies_of_another_run(compared: Path, tmp_path: Path) -> None:
    """On the same video it gives what that run gave."""
    few = ["heuristic.references=[previous]", "heuristic.taus=[1.0]", "heuristic.other_kappas=[]"]
    few += ["heuristic.scene_changes=[]", "heuristic.searches=[]"]
    again = Comparison.read(run(tmp_path / "a", "compare", f"policy={compared}", *few) / "comparison.json")
    before = Comparison.read(compared / "comparison.json")
    first, second = ([(p.accuracy, p.bops, p.settings["seed"]) for p in c.fronts["ppo"]] for c in (before, again))
    assert first == second
    start = (2 * 3 + 2) * 18  # every threshold at both intervals on the training clips, and two searched settings
    assert again.env_frames_used_for_training == start + 120, "so many frames as training would take"
    one = run(tmp_path / "b", "compare", f"policy={compared / 'seed1'}", "video.speed=3.0", *few)
    other = Comparison.read(one / "comparison.json")
    assert {p.settings["seed"] for p in other.fronts["ppo"]} == {0}
    assert not (one / "seed0").exists()
    assert other.float_accuracy != before.float_accuracy


def test_evaluate_without_a_policy_says_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *TINY, *TINY_NETWORK, f"results={tmp_path}"]) == 2
    assert "policy=FOLDER" in capsys.readouterr().err
    assert main(["evaluate", *TINY, *TINY_NETWORK, f"results={tmp_path}", f"policy={tmp_path}/none"]) == 2
    assert "policy.json" in capsys.readouterr().err


def test_compare_looks_for_given_policies_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *TINY, *TINY_NETWORK, f"results={tmp_path}", f"policy={tmp_path}/none"]) == 2
    error = capsys.readouterr().err
    assert "No policy in" in error
    assert "reading video" not in error


def test_training_resumes_from_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, "train", "training.seeds=[0]", "training.frames=60")
    report = report_of(first / "seed0" / "checkpoints")
    assert report["done"]
    assert report["frames"] >= 60
    summary = (first / "summary.json").read_text()
    (first / "summary.json").unlink()
    resume = ["training.seeds=[0]", "training.frames=60", f"training.resume={first}"]
    assert run(tmp_path, "train", *resume) == first
    assert not (first / "summary.json").exists(), "a finished run is not run again"
    assert main(["train", "trusted=true", f"training.resume={first}"]) == 0
    assert not (first / "summary.json").exists(), "with the settings in its folder it is the same run"
    (first / "run.json").unlink()
    assert main(["train", "trusted=true", f"training.resume={first}"]) == 0
    assert (first / "summary.json").read_text() == summary
    capsys.readouterr()
    assert main(["train", "trusted=true", f"training.resume={first}", "training.frames=120"]) == 2
    assert "was begun with training.frames=60 and cannot go on with 120" in capsys.readouterr().err
    other = ["train", *TINY, *TINY_NETWORK, "video.speed=2.0", f"results={tmp_path}", f"training.resume={first}"]
    assert main(other) == 2
    assert "has other settings of video" in capsys.readouterr().err
    assert "speed: 2.0" not in (first / "config.yaml").read_text()


def report_of(checkpoints: Path) -> dict[str, Any]:
    state = Checkpoints(checkpoints).load()
    assert state is not None
    report: dict[str, Any] = state["report"]
    return report


def test_compare_learns_keyframes_and_counts_their_frames(tmp_path: Path) -> None:
    few = ["training.seeds=[0]", "training.frames=60", "training.keyframe_frames=150", "training.trade_offs=2"]
    few += ["heuristic.searches=[]", "heuristic.other_kappas=[]", "heuristic.scene_changes=[]", "heuristic.taus=[1.0]"]
    folder = run(tmp_path, "compare", *few, "heuristic.references=[previous]", "environment.keyframe_intervals=[0]")
    policy = LearnedPolicy.load(folder / "seed0")
    assert policy.keyframes is not None
    frames = [report_of(folder / "seed0" / stage)["frames"] for stage in STAGES]
    assert frames[0] >= 60
    assert frames[1] >= 150
    comparison = Comparison.read(folder / "comparison.json")
    start = (3 + 2) * 18  # every threshold on the training clips, and two searched settings
    assert comparison.env_frames_used_for_training == sum(frames) + start
    for point in comparison.fronts["ppo"]:
        learned = point.settings.get("keyframes") == "learned"
        assert learned != ("interval" in point.settings)
        share = (policy if learned else policy.at(0.1, 0)).macs * policy.bits**2 / comparison.reference_bops_per_frame
        assert point.policy_bops == pytest.approx(share * 5 / 6)
    evaluated = run(tmp_path, "evaluate", *few, "environment.keyframe_intervals=[0]", f"policy={folder / 'seed0'}")
    points = [point["settings"] for point in json.loads((evaluated / "summary.json").read_text())["points"]]
    assert sorted(p.get("keyframes", p.get("interval")) == "learned" for p in points) == [False] * 2 + [True] * 2


@pytest.mark.parametrize(
    ("environment", "agents", "seeds"),
    [
        ("frame_bits", "frame", [0, 1]),
        ("region_bits", "region", [0]),
        ("region_bits", "frame", [0]),
        ("region_thresholds", "frame", [0]),
    ],
)
def test_ppo_trains_on_every_environment(tmp_path: Path, environment: str, agents: str, seeds: list[int]) -> None:
    folder = run(
        tmp_path,
        "train",
        f"environment={environment}",
        f"environment.agents={agents}",
        f"training.seeds={seeds}",
        "training.frames=40",
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert [policy["seed"] for policy in summary["policies"] if policy["validation_front"]] == seeds
    assert list(summary["curves"]) == [str(seed) for seed in seeds]
    assert all(curve[-1]["frames"] >= 40 for curve in summary["curves"].values())


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's folder for the network that ships with the package."""
    folder = tmp_path_factory.mktemp("deployed")
    model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, 32, 48)).calibrate([moving_frames(4)])
    scheme = ActionScheme("region_thresholds", "region", len(model.groups), (2, 3), levels=len(model.config.levels))
    made(scheme, frame_size=(32, 48), network=model.groups).save(folder)
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/deploy.md"])
def test_what_is_shown_of_a_runner_runs(
    page: str,
    deployed: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / page).read_text(encoding="utf-8"), re.DOTALL)
    (shown,) = [block for block in blocks if "Runner" in block]
    (tmp_path / "policy").symlink_to(deployed)
    write_video(tmp_path / "drive.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    exec(shown, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:2] == ["True", "False"]
    assert len(lines) == 3


def test_a_comparisons_policy_runs_from_its_folder_alone(compared: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "drive.mp4", frames=3)
    assert (
        main(
            [
                "run",
                "tracking=disabled",
                "threads=1",
                "trusted=true",
                f"results={tmp_path}",
                f"policy={compared}",
                f"source={video}",
            ]
        )
        == 0
    )
    (folder,) = (tmp_path / "run").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["frames"], summary["ended"]) == (3, "finished")
    assert summary["policy"] == str(compared / "seed0")


def write_video(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in moving_frames(frames, (48, 64)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path


VOS = ["video=generated_objects", "model=mask_propagation", "task=mask_propagation"]


def test_masks_are_trained_for_propagated_and_compared(tmp_path: Path) -> None:
    few = ["pretraining.steps=4", "pretraining.batch=2", "pretraining.validate_every=2"]
    trained = run(tmp_path, "pretrain", *VOS, "model.pretrained=false", "model.width=8", *few, network=())
    assert json.loads((trained / "summary.json").read_text())["metric"] == "J&F"
    short = ["video.frames=4", "video.train=2", "video.test=2"]
    own = [*VOS, *short, "model.width=8", f"model.weights={trained / 'weights.safetensors'}", "training.seeds=[0]"]
    quick = ["training.frames=40", "heuristic.taus=[0.5]", "heuristic.searches=[]", "heuristic.other_kappas=[]"]
    quick += ["quantization.weight_rounding=nearest", "quantization.calibration_clips=1", "training.warm_start=none"]
    comparison = Comparison.from_json(
        (run(tmp_path, "compare", *own, *quick, network=()) / "comparison.json").read_text()
    )
    assert (comparison.task, comparison.accuracy_metric) == ("maskpropagation", "J&F")
    assert comparison.fronts["ppo"]
    assert all(0 <= point.accuracy <= 1 for points in comparison.fronts.values() for point in points)


def test_pretrain_writes_weights_that_load(tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        "pretrain",
        "model.pretrained=false",
        "pretraining.steps=4",
        "pretraining.batch=2",
        "pretraining.validate_every=2",
        network=(),
    )
    network = CompactDDRNet()
    load_weights(network, folder / "weights.safetensors")
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["test_miou"] <= 1
    assert summary["best_step"] in (2, 4)
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 6, 32, 48)


def test_no_labels_is_said_before_anything_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["video=carphone", "++video.frames=3", "task=foreground", "environment.accuracy=labels"]
    tiny = [o for o in TINY if not o.startswith("video.") or o.startswith("video.size")]
    code = main(["compare", *tiny, f"results={tmp_path}", *overrides])
    assert code == 2
    assert capsys.readouterr().err.count("\n") <= 8


# Policies that are learned by gradients ------------------------------------------------------------------------------

FEW = ["training.seeds=[0]", "heuristic.references=[previous]", "heuristic.taus=[1.0]", "heuristic.other_kappas=[]"]
FEW += ["heuristic.scene_changes=[]", "heuristic.searches=[]"]


def test_a_policy_learned_by_gradients_is_compared_and_runs_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a", "compare", "training.trainer=gradient", "training.frames=400", *FEW)
    comparison = Comparison.read(folder / "comparison.json")
    assert not comparison.fronts["ppo"]
    points, policy = comparison.fronts["gradient_policy"], LearnedPolicy.load(folder / "seed0")
    assert "gradient_policy_vs_dynamic_resq" in comparison.bd_bops
    assert comparison.efforts["gradient_policy"].frames == comparison.env_frames_used_for_training >= 400
    assert (folder / "report.html").exists()
    static = [bool(point.settings.get("static")) for point in points]
    assert policy.static == all(static)
    assert adaptable(policy)
    assert all((point.policy_bops == 0) == own for point, own in zip(points, static, strict=True))
    again = Comparison.read(run(tmp_path / "b", "compare", f"policy={folder}", *FEW[1:]) / "comparison.json")
    assert again.fronts["gradient_policy"]
    capsys.readouterr()
    assert main(["evaluate", *TINY, *TINY_NETWORK, f"results={tmp_path}", f"policy={folder}"]) == 0


def test_ppo_begins_at_gradient_thresholds(tmp_path: Path) -> None:
    folder = run(tmp_path, "compare", "training.warm_start=gradient", *FEW)
    comparison = Comparison.read(folder / "comparison.json")
    policy = LearnedPolicy.load(folder / "seed0")
    assert len(policy.scheme.base[0]) == len(policy.scheme.layers)
    assert adaptable(policy)
    constants, spread = 2 * 3 * 18, beginning.SPREAD * 18  # on three clips of six frames
    assert comparison.env_frames_used_for_training >= constants + spread + 30 + 120
    for point in comparison.fronts["ppo"]:
        assert (point.policy_bops == 0) == bool(point.settings.get("static"))
