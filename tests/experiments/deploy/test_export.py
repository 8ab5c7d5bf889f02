"""`resq-rl export`: every file is read back and decides as the policy does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from resq_rl.envs import ActionKind, Agents, Problem
from resq_rl.experiments.cli.app import main
from resq_rl.experiments.deploy.served import choices_of
from resq_rl.perception import Segmentation
from resq_rl.policies import LearnedPolicy, Runner
from resq_rl.policies.onnx_policy import OnnxPolicy
from resq_rl.policies.threshold_table import ThresholdTable
from resq_rl.quantization import Budget, save_model
from resq_rl.video import Framing
from tests.envs.problems import CLASSES, moving_frames, scheme, tiny_network
from tests.experiments.conftest import free_port
from tests.policies.test_learned import made

VIDEO = {"_target_": "tests.experiments.deploy.test_export.TinyVideo"}
MODEL = {"_target_": "tests.envs.problems.tiny_network"}
TASK = {"_target_": "resq_rl.perception.Segmentation", "classes": CLASSES}


class TinyVideo:
    """Two clips of each split, without labels."""

    classes = ()

    def clips(self, split: str) -> list[Any]:
        from resq_rl.video import Clip

        start = {"train": 0, "validation": 10, "test": 20}[split]
        return [Clip(moving_frames(6, seed=start + i), None, 25.0, f"{split}{i}", "test") for i in range(2)]


def deploy(problem: Problem, folder: Path, kind: ActionKind = "region_thresholds", agents: Agents = "region") -> Path:
    model = problem.model
    policy = made(scheme(problem, kind, agents), network=model.groups, frame_size=model.frame_size, interval=4)
    policy.save(folder)
    save_model(problem.model, folder)
    framing = Framing(model.frame_size).to_json()
    making = {"model": MODEL, "task": TASK, "video": VIDEO, "framing": framing}
    (folder / "network.json").write_text(json.dumps(making))
    return folder


def export(tmp_path: Path, *words: str, code: int = 0) -> Path:
    words = ("threads=1", "trusted=true", "environment.accuracy=teacher", f"results={tmp_path}/results", *words)
    assert main(["export", *words]) == code
    return next((tmp_path / "results" / "export").iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, problem: Problem, empty_store: Path) -> Path:
    """The results of an export in all formats, registered in a store."""
    folder = tmp_path_factory.mktemp("export")
    policy = deploy(problem, folder / "policy")
    (folder / "results").mkdir()
    shutil.copy(empty_store, folder / "results" / "mlflow.db")
    return export(folder, f"policy={policy}", "exporting.trade_offs=2", "exporting.name=tiny")


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


def test_all_that_a_runner_needs_is_exported(exported: Path, problem: Problem) -> None:
    assert summary(exported)["portable"]["equal"] is True
    assert not [p for p in (exported / "policy").iterdir() if p.suffix not in (".json", ".safetensors")]
    runner = Runner.load(exported / "policy", tiny_network(), Segmentation(CLASSES))
    assert runner(problem.clips[0].frames[0])[1].bops == 1.0


def test_the_graph_is_equal_on_the_clip(exported: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    assert summary(exported)["onnx"]["equal"] is True
    assert (exported / "policy.onnx").stat().st_size > 1000


def test_the_table_tells_its_loss(exported: Path) -> None:
    table = ThresholdTable.load(exported / "thresholds.json")
    low, high = LearnedPolicy.load(exported / "policy").trade_off_range
    assert [row.trade_off for row in table.rows] == [pytest.approx(low), pytest.approx(high)]
    assert table.groups == ("stem", "body", "head")
    for row, told in zip(table.rows, summary(exported)["thresholds"]["rows"], strict=True):
        assert (0 < row.bops < 1, 0 <= row.accuracy <= 1) == (True, True)
        assert row.accuracy_lost == told["accuracy_lost"]


def test_under_a_budget_all_formats_name_it_and_decide_as_the_policy_does(tmp_path: Path, problem: Problem) -> None:
    budget = "environment.budget={peak: 0.9, mean: 0.7, bucket: 2}"
    words = (f"policy={deploy(problem, tmp_path / 'policy')}", "exporting.trade_offs=1", budget, "tracking=disabled")
    folder = export(tmp_path, *words)
    found = summary(folder)
    assert {name: found[name]["equal"] for name in ("portable", "onnx")} == {"portable": True, "onnx": True}
    table = ThresholdTable.load(folder / "thresholds.json")
    assert table.budget == Budget(peak=0.9, mean=0.7, bucket=2.0)
    session = OnnxPolicy.load(folder / "policy.onnx").session
    assert "budget_left" in {node.name for node in session.get_inputs()}
    assert json.loads(session.get_modelmeta().custom_metadata_map["resq_rl"])["budget"]["mean"] == 0.7


@pytest.mark.parametrize(("kind", "agents"), [("region_bits", "region"), ("frame_bits", "frame")])
def test_policies_that_choose_bits_have_no_table(
    kind: ActionKind, agents: Agents, problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = deploy(problem, tmp_path / "policy", kind, agents)
    folder = export(tmp_path, f"policy={policy}", "tracking=disabled")
    shipped = os.path.relpath(folder / "policy")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"Next: run it from its files alone: resq-rl run policy={shipped} trusted=true source=VIDEO"
    found = summary(folder)
    assert "skipped" in found["thresholds"]
    assert found["portable"]["equal"]
    assert (folder / "mlflow_model").is_dir()


def test_without_the_extra_the_graph_is_skipped_with_the_reason(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    policy = deploy(problem, tmp_path / "policy")
    folder = export(tmp_path, f"policy={policy}", "tracking=disabled", "exporting.formats=[onnx,portable]")
    assert "resq-rl[onnx]" in summary(folder)["onnx"]["skipped"]
    assert not (folder / "policy.onnx").exists()
    assert "portable" in capsys.readouterr().out


def test_a_policy_without_its_model_is_one_error(
    problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = deploy(problem, tmp_path / "policy")
    (policy / "model.safetensors").unlink()
    export(tmp_path, f"policy={policy}", "tracking=disabled", code=2)
    assert "No calibrated model" in capsys.readouterr().err


# MLflow ------------------------------------------------------------------------------------------------------------


def observations(folder: Path) -> np.ndarray[Any, Any]:
    policy = LearnedPolicy.load(folder / "policy")
    return np.random.default_rng(0).random((7, policy.scheme.observation_size), dtype=np.float32)


def test_it_is_registered_and_loads_in_a_fresh_process(exported: Path) -> None:
    store = f"sqlite:///{exported.parents[1] / 'mlflow.db'}"
    (version,) = MlflowClient(store).search_model_versions("name='tiny'")
    assert version.version in ("1", 1)
    code = (
        "import json, sys, numpy as np, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/tiny/1')\n"
        "print(json.dumps(model.predict(np.array(json.load(sys.stdin), np.float32)).tolist()))\n"
    )
    seen = observations(exported)
    done = subprocess.run(
        [sys.executable, "-c", code, store], input=json.dumps(seen.tolist()), capture_output=True, text=True, check=True
    )
    expected = choices_of(LearnedPolicy.load(exported / "policy"), seen)
    np.testing.assert_array_equal(np.array(json.loads(done.stdout.splitlines()[-1]), np.float32), expected)


def test_the_model_holds_no_pickle_and_says_what_it_takes(exported: Path) -> None:
    files = [p for p in (exported / "mlflow_model").rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".pkl", ".pickle", ".pt", ".zip", ".cloudpickle")]
    text = (exported / "mlflow_model" / "MLmodel").read_text()
    assert "float32" in text
    assert "residual_mean" in text


@pytest.mark.slow
def test_it_is_served(exported: Path) -> None:
    port, seen = free_port(), observations(exported)
    command = [sys.executable, "-m", "mlflow", "models", "serve", f"--model-uri={exported / 'mlflow_model'}"]
    command += ["--env-manager=local", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    with (exported / "serve.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path}, start_new_session=True
        )
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": seen.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        deadline, answer = time.monotonic() + 180, None
        while answer is None and time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    answer = json.load(response)
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        assert answer is not None, (exported / "serve.log").read_text()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
    expected = choices_of(LearnedPolicy.load(exported / "policy"), seen)
    np.testing.assert_array_equal(np.array(answer["predictions"], np.float32), expected)
