import dataclasses
import json
import logging
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from playwright.sync_api import Browser

from resq_rl.errors import TrackingError
from resq_rl.experiments.config.settings import TrackingSettings
from resq_rl.experiments.tracking.outbox import JOURNAL, LOCAL, Operation, Outbox, recorded_run
from resq_rl.experiments.tracking.store import Store, store_uri
from resq_rl.experiments.tracking.sync import sync
from resq_rl.experiments.tracking.tracker import NullTracker, Tracker, open_tracker, run_name
from resq_rl.files import write_atomic
from tests.experiments.conftest import free_port, serving
from tests.experiments.killing import PRELOADED


def settings(uri: str | None = None, **changes: Any) -> TrackingSettings:
    plain = TrackingSettings(enabled=True, uri=uri, experiment="tests", tags={}, parent_run=None)
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def results(tmp_path: Path, empty_store: Path) -> Path:
    """A results folder with an empty store."""
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def open_local(results: Path, *, parent: str | None = None, resume: bool = False, **changes: Any) -> Tracker:
    folder = results / "run"
    return open_tracker(settings(**changes), results=results, folder=folder, name="a run", parent=parent, resume=resume)


def local_client(results: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=store_uri(None, results))


def figure() -> Figure:
    made = Figure(figsize=(2, 2))
    made.add_subplot().plot([0, 1], [1, 0])
    return made


def record_everything(tracker: Tracker, folder: Path) -> str:
    """Use every method of a tracker and of a child; return the child's id."""
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("hello")
    (folder / "model").mkdir()
    (folder / "model" / "MLmodel").write_text("flavors: {}")
    tracker.log_parameters({"seed": 3, "group": {"rate": 1e-4, "sizes": (32, 32)}, "none": None})
    tracker.set_tags({"owner": "tests"})
    tracker.log_artifact(folder / "notes.txt", "texts")
    tracker.log_model(folder / "model", "a model")
    tracker.log_figure(figure(), "curve")
    with tracker.child("seed 0", {"seed": 0}) as child:
        for step in range(1100):  # more than one request takes
            child.log_metrics({"loss": 1 / (step + 1)}, step)
        assert child.run_id is not None
        return child.run_id


def check_everything(client: MlflowClient, run_id: str, child_id: str) -> None:
    run, child = client.get_run(run_id), client.get_run(child_id)
    assert run.data.params == {"seed": "3", "group.rate": "0.0001", "group.sizes": "[32, 32]", "none": "None"}
    assert run.data.tags["owner"] == "tests"
    assert (run.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == run_id
    assert child.info.run_name == "seed 0"
    history = client.get_metric_history(child_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / (step + 1)) for step in range(1100)]
    assert {item.path for item in client.list_artifacts(run_id)} == {"texts", "model", "curve.png", "curve.svg"}
    assert [item.path for item in client.list_artifacts(run_id, "texts")] == ["texts/notes.txt"]
    assert [version.name for version in client.search_model_versions(f"run_id = '{run_id}'")] == ["a model"]


def test_a_run_in_the_default_store(results: Path) -> None:
    with open_local(results) as tracker:
        child = record_everything(tracker, results / "files")
    assert tracker.run_id is not None
    check_everything(local_client(results), tracker.run_id, child)
    artifacts = results / "mlartifacts" / tracker.run_id / "artifacts"
    assert (artifacts / "texts" / "notes.txt").read_text() == "hello"
    assert tracker.hint.startswith(f"mlflow ui --backend-store-uri sqlite:///{results}/mlflow.db, then http://")
    assert sorted(path.name for path in (results / "run").iterdir()) == ["curve.png", "curve.svg", "tracking.jsonl"]


def runs_of(client: MlflowClient) -> list[Any]:
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))


def test_a_run_without_a_store_is_sent_from_wherever_its_folder_is_moved(
    results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with open_local(results, uri="offline") as tracker:
        record_everything(tracker, results / "run")
    assert "send it with resq-rl sync" in caplog.text
    (results / "run").rename(tmp_path / "moved")
    for _ in range(2):  # sending again changes nothing
        ((journal, _, hint),) = sync(tmp_path / "moved")
        assert journal == tmp_path / "moved" / JOURNAL
        assert hint.startswith("mlflow ui")
        run, child = runs_of(local_client(results))
        check_everything(local_client(results), run.info.run_id, child.info.run_id)
    assert "refused" not in caplog.text


def test_a_run_that_goes_on_is_recorded_once(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each record of the run arrives once, whatever it logs again; the value that it changes becomes a tag."""
    killed = open_local(results)
    child = killed.child("seed 0", {"seed": 0})
    killed.log_parameters({"seed": 3, "threads": 1})
    for step in range(4):
        child.log_metrics({"loss": 1.0, "reward": step}, step)
    child.flush()
    journal_file = results / "run" / JOURNAL
    with journal_file.open("a") as file:
        file.write('{"kind": "metrics", "run": "loc')  # cut short by the kill
    with open_local(results, resume=True) as again:
        again.log_parameters({"seed": 3, "threads": 2, "clips": 5})
        with again.child("seed 0", {"seed": 0}) as child_again:
            for step in range(2, 6):
                child_again.log_metrics({"loss": 1.0, "reward": step}, step)
    client = local_client(results)
    run, child_run = runs_of(client)
    assert (
        (run.info.run_id, child_run.info.run_id) == (killed.run_id, child.run_id) == (again.run_id, child_again.run_id)
    )
    assert run.data.params == {"seed": "3", "threads": "1", "clips": "5"}
    assert run.data.tags["threads"] == "2"
    for name, expected in (("loss", [1.0] * 6), ("reward", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])):
        history = client.get_metric_history(child_run.info.run_id, name)
        assert sorted((m.step, m.value) for m in history) == list(enumerate(expected))
    assert [r.info.status for r in (run, child_run)] == ["FINISHED"] * 2
    assert len(journal(results / "run")) == len([json.loads(line) for line in journal_file.read_text().splitlines()])
    assert "refused" not in caplog.text


def test_a_run_on_a_real_server(mlflow_server: str, tmp_path: Path) -> None:
    with open_tracker(settings(mlflow_server + "/"), results=tmp_path, folder=tmp_path, name="a run") as tracker:
        child = record_everything(tracker, tmp_path)
    client = MlflowClient(tracking_uri=mlflow_server)
    assert tracker.run_id is not None
    check_everything(client, tracker.run_id, child)
    copy = client.download_artifacts(tracker.run_id, "texts/notes.txt", str(tmp_path / "texts_back"))
    assert Path(copy).read_text() == "hello"
    assert tracker.hint.startswith(f"{mlflow_server}/#/experiments/")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's list of sockets")
def test_the_server_listens_on_this_machine_only(mlflow_server: str) -> None:
    port, listening = int(mlflow_server.rpartition(":")[2]), []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
        listening += [row[1].partition(":") for row in rows if row[3] == "0A"]  # state: listening
    assert {address for address, _, number in listening if int(number, 16) == port} == {"0100007F"}  # 127.0.0.1


def test_a_name_says_what_was_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "2026-01-02"
    assert run_name("compare", ["results=x", "tracking.uri=y", "threads=1"], folder) == "compare 2026-01-02"
    assert run_name("compare", ["+experiment=demo", "threads=1"], folder) == "compare +experiment=demo"
    words = [
        "policy=results/train/2026-01-02/seed0",
        "source=package://some/where/clip.mp4",
        "video.paths.test=[a/b/c,d]",
    ]
    assert (
        run_name("run", words, folder) == "run policy=2026-01-02/seed0 source=where/clip.mp4 video.paths.test=[b/c,d]"
    )
    assert len(run_name("train", ["a=1"] * 100, folder)) == 120


def test_the_page_of_runs_shows_parents_with_their_children_and_curves(
    mlflow_server: str, browser: Browser, tmp_path: Path
) -> None:
    own = settings(mlflow_server, experiment="in a browser")
    with open_tracker(own, results=tmp_path, folder=tmp_path, name="compare +experiment=demo") as tracker:
        tracker.describe("PPO needs half.")
        tracker.log_artifact(write_atomic(tmp_path / "report.html", "<h1>a report</h1>"))
        with tracker.child("ppo seed 0") as child:
            child.log_metrics({"train/reward": 1.0}, 960)
            child.log_metrics({"train/reward": 2.0}, 1920)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)  # milliseconds; the page is large
    page.goto(tracker.hint)
    parent = page.get_by_role("link", name="compare +experiment=demo")
    parent.wait_for()
    assert page.get_by_role("link", name="ppo seed 0").count() == 0, "children are folded away"
    parent.click()
    page.get_by_text("PPO needs half.").wait_for()
    page.get_by_role("link", name="ppo seed 0").click()
    page.get_by_role("heading", name="ppo seed 0").wait_for()
    page.get_by_role("tab", name="Model metrics").click()
    page.locator(".js-plotly-plot .scatterlayer path.js-line").first.wait_for()
    ticks = {text.replace(",", "") for text in page.locator(".js-plotly-plot .xtick").all_text_contents()}
    assert any(1000 <= float(tick.replace("k", "e3")) <= 2000 for tick in ticks), "curves are by environment frames"
    page.goto(tracker.hint.replace("/runs?", f"/runs/{tracker.run_id}/artifacts/report.html?"))
    page.frame_locator("iframe").get_by_role("heading", name="a report").wait_for()
    page.close()


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tracking.jsonl").read_text().splitlines()]


class Cable(socketserver.ThreadingTCPServer):
    """Forwards connections to a server as long as it is plugged in, and refuses them otherwise."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, to: tuple[str, int]) -> None:
        cable = self
        self.plugged = True

        class Forward(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if cable.plugged:
                    with socket.create_connection(to) as server:
                        back = threading.Thread(target=pump, args=(server, self.request), daemon=True)
                        back.start()
                        pump(self.request, server)
                        back.join()

        super().__init__(("127.0.0.1", port), Forward)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def cable(mlflow_server: str) -> Iterator[Cable]:
    host, _, port = mlflow_server.removeprefix("http://").partition(":")
    with Cable(0, (host, int(port))) as made:
        yield made
        made.shutdown()


@pytest.fixture
def own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection for every request, so that pulling the cable shows at once."""
    import requests

    send = requests.Session.request

    def closing(self: requests.Session, *arguments: Any, **options: Any) -> Any:
        options["headers"] = {**(options.get("headers") or {}), "Connection": "close"}
        return send(self, *arguments, **options)

    monkeypatch.setattr(requests.Session, "request", closing)


@pytest.mark.usefixtures("own_requests")
def test_a_server_that_dies_and_comes_back_loses_nothing(
    cable: Cable, mlflow_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with open_tracker(settings(cable.address), results=tmp_path, folder=tmp_path, name="a run") as tracker:
        tracker.log_metrics({"loss": 3.0}, 0)
        tracker.flush()
        cable.plugged = False
        child = tracker.child("seed 0")
        for step in range(1, 4):
            tracker.log_metrics({"loss": 3.0 - step}, step)
            child.log_metrics({"reward": step}, step)
            tracker.flush()
        kept = [tuple(v[:2]) for r in journal(tmp_path) if r["kind"] == "metrics" for v in r["payload"]["values"]]
        assert sorted(kept) == sorted(
            [("loss", 3.0 - s) for s in (0, 1, 2, 3)] + [("reward", float(s)) for s in (1, 2, 3)]
        )
        cable.plugged = True
        child.close()
    client = MlflowClient(tracking_uri=mlflow_server)
    assert tracker.run_id is not None
    assert child.run_id is not None
    assert [m.value for m in client.get_metric_history(tracker.run_id, "loss")] == [3.0, 2.0, 1.0, 0.0]
    assert [m.value for m in client.get_metric_history(child.run_id, "reward")] == [1.0, 2.0, 3.0]
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == tracker.run_id
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in warnings if "does not answer" in text]) == 1
    assert any("answers again" in record.message for record in caplog.records)


class Logging(threading.Thread):
    """A run that logs a metric every 50 ms until it is told to end."""

    def __init__(self, uri: str, folder: Path) -> None:
        super().__init__()
        self._uri, self._folder, self._end, self.steps, self.run_id = uri, folder, threading.Event(), 0, ""

    def run(self) -> None:
        with open_tracker(settings(self._uri), results=self._folder, folder=self._folder, name="a run") as tracker:
            while not self._end.wait(0.05):
                tracker.log_metrics({"loss": 1 / (self.steps + 1)}, self.steps)
                self.steps += 1
        self.run_id = tracker.run_id or ""

    def finish(self) -> None:
        self._end.set()
        self.join(120)


@pytest.mark.slow
def test_a_server_that_is_killed_and_away_for_a_minute_loses_no_metric(tmp_path: Path, empty_store: Path) -> None:
    """`make test ARGS="-m slow -k away_for_a_minute -s"`."""
    store, port = tmp_path / "server", free_port()
    store.mkdir()
    shutil.copy(empty_store, store / "mlflow.db")
    with serving(store, port) as (address, server):
        run = Logging(address, tmp_path / "run")
        run.start()
        time.sleep(10)
        os.killpg(server.pid, signal.SIGKILL)
    before, gone = run.steps, time.monotonic()
    time.sleep(60)
    away = run.steps - before
    with serving(store, port) as (address, _):
        seconds = time.monotonic() - gone
        time.sleep(5)
        run.finish()
        history = MlflowClient(tracking_uri=address).get_metric_history(run.run_id, "loss")
    found = [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)]
    lost = run.steps - len(found)
    print(f"{run.steps} metrics, {away} of them while the server was away for {seconds:.0f} s: {lost} lost")
    assert away > 100
    assert found == [(step, 1 / (step + 1)) for step in range(run.steps)]


WRITERS = 3


def write_metrics(results: str, number: int, start: Any) -> None:
    """One of several writers, which open the store at the same time."""
    folder = Path(results)
    output = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    start.wait()
    with open_tracker(settings(), results=folder, folder=folder / str(number), name=f"writer {number}") as tracker:
        for step in range(40):
            tracker.log_metrics({"loss": number + step / 100}, step)
            tracker.flush()


def test_several_processes_make_one_sqlite_file_and_write_to_it(tmp_path: Path) -> None:
    """One of them makes the store, beside what a process has left that was killed while it did so."""
    (tmp_path / "mlflow.db.new").write_bytes(b"SQLite format 3")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    start = context.Barrier(WRITERS)
    writers = [context.Process(target=write_metrics, args=(str(tmp_path), n, start)) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    assert (tmp_path / "said").read_text() == "", "MLflow reports none of its migrations"
    runs = {run.info.run_name: run.info.run_id for run in runs_of(local_client(tmp_path))}
    assert sorted(runs) == [f"writer {number}" for number in range(WRITERS)]
    for number in range(WRITERS):
        history = local_client(tmp_path).get_metric_history(runs[f"writer {number}"], "loss")
        assert [m.value for m in sorted(history, key=lambda m: m.step)] == [number + s / 100 for s in range(40)]


@pytest.mark.parametrize("name", ["what?x", "50%41#1", "a b'c;d&e=f", "résumé 文"])
def test_the_store_is_in_the_results_folder_whatever_its_name(name: str, tmp_path: Path, empty_store: Path) -> None:
    results = tmp_path / name
    results.mkdir()
    shutil.copy(empty_store, results / "mlflow.db")
    (results / "notes.txt").write_text("hello")
    with open_local(results) as tracker:
        tracker.log_artifact(results / "notes.txt")
    with sqlite3.connect(results / "mlflow.db") as database:
        assert database.execute("SELECT run_uuid, status FROM runs").fetchall() == [(tracker.run_id, "FINISHED")]
    assert tracker.run_id is not None
    assert (results / "mlartifacts" / tracker.run_id / "artifacts" / "notes.txt").read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is written elsewhere"
    uri = shlex.split(tracker.hint.partition(", then")[0])[-1]
    assert MlflowClient(tracking_uri=uri).get_run(tracker.run_id).info.run_name == "a run"


@pytest.mark.slow
def test_a_sqlite_file_that_another_process_keeps_locked(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused at the start, and waited for later; each try takes SQLite's 20 seconds."""
    with open_local(results) as tracker:
        other = sqlite3.connect(results / "mlflow.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingError, match=r"Cannot use the tracking store sqlite.*database is locked"):
            open_tracker(settings(), results=results, folder=results / "second", name="another run")
        tracker.log_metrics({"loss": 1.0})
        tracker.flush()
        assert "database is locked" in caplog.text
        other.execute("COMMIT")
        other.close()
    assert tracker.run_id is not None
    assert local_client(results).get_run(tracker.run_id).data.metrics == {"loss": 1.0}


@pytest.mark.usefixtures("own_requests")
def test_a_server_that_stays_away_does_not_end_the_run(
    cable: Cable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    with open_tracker(settings(cable.address), results=tmp_path, folder=tmp_path, name="a run") as tracker:
        cable.plugged = False
        for step in range(50):
            tracker.log_metrics({"loss": step}, step)
            tracker.flush()
        tracker.log_figure(figure(), "curve")
    assert time.monotonic() - started < 20
    records = journal(tmp_path)
    values = [value for record in records if record["kind"] == "metrics" for value in record["payload"]["values"]]
    assert [(value[0], value[1], value[3]) for value in values] == [("loss", step, step) for step in range(50)]
    assert records[-1]["payload"]["status"] == "FINISHED"
    assert (tmp_path / "curve.png").is_file()
    assert "records for MLflow" in caplog.text
    assert len([r for r in caplog.records if "does not answer" in r.message]) == 1


def test_an_unreachable_server_is_an_error_within_seconds(tmp_path: Path) -> None:
    uri = "http://127.0.0.1:9"
    started = time.monotonic()
    with pytest.raises(TrackingError) as raised:
        open_tracker(settings(uri), results=tmp_path, folder=tmp_path, name="a run")
    assert time.monotonic() - started < 10
    for part in (uri, "mlflow server", "tracking.enabled=false"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_server_that_never_answers_is_an_error_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError, match="no answer in time"):
            open_tracker(settings(uri), results=tmp_path, folder=tmp_path, name="a run")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("uri", ["sqlite:////proc/nothing/mlflow.db", "no-such-scheme://x"])
def test_a_store_that_cannot_be_used_is_an_error(uri: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="Cannot use the tracking store"):
        open_tracker(settings(uri), results=tmp_path, folder=tmp_path, name="a run")


def test_a_deleted_experiment_is_an_error(results: Path) -> None:
    with open_local(results):
        pass
    client = local_client(results)
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    client.delete_experiment(experiment.experiment_id)
    assert client.search_experiments(view_type=ViewType.DELETED_ONLY)
    with pytest.raises(TrackingError, match=r"'tests' .* is deleted. Restore it"):
        open_local(results)


def test_an_unknown_parent_is_an_error(results: Path) -> None:
    with pytest.raises(TrackingError, match="nobody"):
        open_local(results, parent_run="nobody")


def test_long_and_odd_parameters(results: Path) -> None:
    long = {"patterns": [f"layer{i}" for i in range(2000)], "text": "x" * 7000, "a b%c": 1, "k" * 300: 2}
    with open_local(results) as tracker:
        tracker.log_parameters(long)
    assert tracker.run_id is not None
    recorded = local_client(results).get_run(tracker.run_id).data.params
    assert len(recorded["patterns"]) == len(recorded["text"]) == 6000
    assert recorded["text"].endswith("…")
    assert recorded["a b_c"] == "1"
    assert len(recorded) == 4


def test_more_parameters_than_one_request_takes(results: Path) -> None:
    with open_local(results) as tracker:
        tracker.log_parameters({f"p{i}": i for i in range(250)})
    assert tracker.run_id is not None
    assert len(local_client(results).get_run(tracker.run_id).data.params) == 250


def test_metrics_that_are_not_finite_or_oddly_named(results: Path) -> None:
    with open_local(results) as tracker:
        tracker.log_metrics({"nan": math.nan, "inf": math.inf, "share %": 0.5}, 1)
    assert tracker.run_id is not None
    metrics = local_client(results).get_run(tracker.run_id).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] > 1e300
    assert metrics["share _"] == 0.5


def test_a_refused_record_is_reported_and_the_rest_goes_on(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_local(results) as tracker:
        for name in ("missing.txt", "missing too.txt"):
            tracker.log_artifact(results / name)
        tracker.log_metrics({"loss": 1.0})
    assert tracker.run_id is not None
    run = local_client(results).get_run(tracker.run_id)
    assert (run.data.metrics, run.info.status) == ({"loss": 1.0}, "FINISHED")
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING and "refused a record" in r.message]) == 1
    assert [r["payload"]["path"] for r in journal(results / "run") if r["kind"] == "artifact"] == [
        str(results / name) for name in ("missing.txt", "missing too.txt")
    ]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_the_end_of_a_run_is_recorded(results: Path, error: type[BaseException] | None, status: str) -> None:
    tracker = open_local(results)
    try:
        with tracker:
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    tracker.close()
    assert tracker.run_id is not None
    assert local_client(results).get_run(tracker.run_id).info.status == status


@pytest.mark.parametrize("by", ["setting", "journal"])
def test_runs_nest_under_a_parent_from_elsewhere(results: Path, by: str) -> None:
    """A parent that the settings name is a run of the store; a sweep's is known from its journal."""
    sweep = results / "sweep"
    with open_tracker(settings(), results=results, folder=sweep, name="a sweep") as parent:
        local = recorded_run(sweep)
        assert local is not None
        assert local.startswith(LOCAL)
        given = {"parent_run": parent.run_id} if by == "setting" else {"parent": local}
        with open_local(results, **given) as child:
            pass
    assert child.run_id is not None
    assert local_client(results).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_the_store_does_not_depend_on_the_working_folder(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(results)
    with open_tracker(settings("sqlite:///mlflow.db"), results=tmp_path, folder=results / "run", name="x") as tracker:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        tracker.log_metrics({"loss": 1.0})
        (tmp_path / "elsewhere" / "notes.txt").write_text("hello")
        tracker.log_artifact(Path("notes.txt"))
    assert tracker.run_id is not None
    assert local_client(results).get_run(tracker.run_id).data.metrics == {"loss": 1.0}
    assert (results / "mlartifacts" / tracker.run_id / "artifacts" / "notes.txt").is_file()
    assert list((tmp_path / "elsewhere").iterdir()) == [tmp_path / "elsewhere" / "notes.txt"]


def test_disabled_tracking_records_nothing_but_writes_figures(tmp_path: Path) -> None:
    tracker = open_tracker(settings(enabled=False), results=tmp_path, folder=tmp_path / "run", name="a run")
    assert isinstance(tracker, NullTracker)
    assert (tracker.run_id, tracker.hint) == (None, "")
    with tracker, tracker.child("seed 0") as child:
        tracker.log_parameters({"a": 1})
        tracker.log_metrics({"a": 1})
        tracker.set_tags({"a": 1})
        tracker.log_artifact(tmp_path / "x")
        assert tracker.log_figure(figure(), "curve")[0] == tmp_path / "run" / "curve.png"
        child.log_figure(figure(), "curve")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"run/{folder}curve.{ending}" for folder in ("", "seed_0/") for ending in ("png", "svg")}


class Recorder:
    """A store that remembers what it was sent, and fails with the errors it is given."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.sizes: list[int] = []

    def log_batch(self, run: str, metrics: Any = (), **_: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.sizes.append(len(metrics))


def metric(step: int) -> Operation:
    return Operation("metrics", "r", {"values": [("loss", 0.5, 0, step)]})


def outbox_to(recorder: Recorder, folder: Path) -> Outbox:
    return Outbox(Store("here", "tests", recorder, "1"), folder, retry_after=5.0)  # type: ignore[arg-type]


def test_metrics_are_sent_in_full_batches(tmp_path: Path) -> None:
    recorder = Recorder()
    outbox = outbox_to(recorder, tmp_path)
    for step in range(2300):
        outbox.add(metric(step))
    assert outbox.send()
    assert recorder.sizes == [1000, 1000, 300]


def test_retries_wait_longer_and_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("resq_rl.experiments.tracking.outbox.time.monotonic", lambda: clock[0])
    recorder = Recorder(*[ConnectionError("gone")] * 4)
    outbox = outbox_to(recorder, tmp_path)
    tries = []
    for second in range(60):
        clock[0], before = float(second), len(recorder.errors)
        outbox.add(metric(second))
        outbox.send()
        if len(recorder.errors) < before:
            tries.append(second)
        if not outbox.pending:
            break
    assert tries == [0, 5, 15, 35]  # 5, 10, 20 seconds apart; the fifth try, 40 seconds on, goes through
    assert len(journal(tmp_path)) == 60
    assert outbox.send(force=True)
    assert sum(recorder.sizes) == 60


def http_error(status: int) -> Exception:
    import requests

    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("refused", response=response)


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ConnectionRefusedError(111, "refused"), True),
        (TimeoutError("timed out"), True),
        (MlflowException("down"), True),
        (http_error(503), True),
        (http_error(403), False),
        (MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST), False),
        (FileNotFoundError(2, "no such file"), False),
        (ValueError("odd"), False),
    ],
)
def test_what_is_tried_again_and_what_is_left_out(
    error: Exception, kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = outbox_to(Recorder(error), tmp_path)
    outbox.add(metric(0))
    outbox.send()
    assert bool(outbox.pending) == kept
    assert ("refused a record" in caplog.text) != kept
    assert len(journal(tmp_path)) == 1
