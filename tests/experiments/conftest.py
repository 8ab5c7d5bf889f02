"""Fixtures of the experiment tests."""

import copy
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from matplotlib.figure import Figure
from mlflow import MlflowClient
from playwright.sync_api import Browser, Error, sync_playwright

from resq_rl.experiments.study import start
from resq_rl.policies import ppo

# Pictures of nothing.
UNPAINTED = {"svg": b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>', "png": b"\x89PNG\r\n\x1a\n"}
PAINT = Figure.savefig
STARTED_WITHIN = 120  # seconds; the server imports much, and test machines are small


@pytest.fixture(autouse=True)
def _restored_process_state() -> Iterator[None]:
    """Put back what a command changes in its process: log handlers and levels, and the number of threads."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    package = logging.getLogger("resq_rl")
    handlers, levels = root.handlers[:], (root.level, package.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _quick_composition() -> Iterator[None]:
    """Hydra reads the files of the package and composes the same settings once, however often it is asked.

    Nor does a command compose its settings a first time to look for `hydra.mode`, which no test sets.
    """

    def remembered(result_of: Callable[..., Any], key_of: Callable[..., Hashable]) -> Callable[..., Any]:
        """What a method of Hydra gave for the same key, unless it depends on a test's own files, which may change."""
        known: dict[Hashable, Any] = {}

        def call(*arguments: Any, **settings: Any) -> Any:
            key = key_of(*arguments, **settings)
            if any(own in str(key) for own in ("file://", "searchpath=")):
                return result_of(*arguments, **settings)
            if key not in known:
                try:
                    known[key] = result_of(*arguments, **settings)
                except HydraException as error:
                    known[key] = error
            if isinstance(known[key], HydraException):
                raise known[key]
            return copy.deepcopy(known[key])

        return call

    def file(repository: ConfigRepository, config_path: str) -> Hashable:
        return config_path, *(f"{source.scheme()}://{source.path}" for source in repository.sources)

    def composition(loader: ConfigLoaderImpl, *arguments: Any, **settings: Any) -> Hashable:
        return str(loader.config_search_path), JobRuntime().get("name"), os.getcwd(), repr(arguments), repr(settings)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, key in (
            (ConfigRepository, "load_config", file),
            (ConfigLoaderImpl, "load_configuration", composition),
        ):
            patch.setattr(owner, name, remembered(getattr(owner, name), key))
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_start() -> Iterator[None]:
    """A short fit of PPO's first choices, which tests/policies/test_ppo.py checks, and few learned thresholds tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "_fit_first_choices", partial(ppo._fit_first_choices, steps=100))
        patch.setattr(start, "SPREAD", 3)
        yield


@pytest.fixture(scope="module", autouse=True)
def _unpainted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are made, and written without being painted, which takes almost half of the time of a comparison.

    A module that looks at its pictures sets `PAINTED`, a test of another one takes the fixture `painted`.
    """

    def write(figure: Figure, file: Any, *, format: str, **settings: Any) -> None:
        file.write(UNPAINTED[format])

    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "PAINTED", False):
            patch.setattr(Figure, "savefig", write)
        yield


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are painted."""
    monkeypatch.setattr(Figure, "savefig", PAINT)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with MLflow's tables and nothing in them, which takes seconds to make: copy it."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    """The address of a real MLflow server, with a store and artifacts of its own."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    with serving(folder, free_port()) as (address, _):
        yield address


@contextmanager
def serving(folder: Path, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real MLflow server of the store `mlflow.db` in a folder: its address and process (of a group of its own)."""
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("a") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, folder / "log")
        yield f"http://127.0.0.1:{port}", server
    finally:
        with suppress(ProcessLookupError):  # killed by a test
            os.killpg(server.pid, signal.SIGTERM)  # a session of its own: the server and its workers, nothing else
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTED_WITHIN
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"the MLflow server did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium: RESQ_RL_CHROMIUM, the system's, or one that Playwright has installed."""
    names = (os.environ.get("RESQ_RL_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next((where for name in names if name and (where := shutil.which(name))), None)
    # What Chromium would otherwise ask of the network at its start; root may not use its sandbox.
    flags = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=path, args=flags, chromium_sandbox=os.getuid() != 0)
        except Error as error:
            if path is not None:
                raise
            pytest.skip(f"no Chromium (Debian: apt install chromium; or set RESQ_RL_CHROMIUM): {error.message[:60]}")
        yield found
        found.close()
