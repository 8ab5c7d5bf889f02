"""Hydra's launcher `ray`: jobs of a sweep as tasks of a Ray cluster. Hydra finds launchers in `hydra_plugins` only.

A job whose process or node is lost goes on from its newest checkpoint elsewhere. Ray's own retries would not do: a task
is not told that it is a retry, and would begin the job anew. All nodes must have this package at the same version, and
the folder in which the sweep is started at the same path: the results are written there.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from resq_rl.errors import LaunchError

__all__ = ["RayLauncher"]

log = logging.getLogger(__name__)

INHERITED = ("RESQ_RL_", "MLFLOW_", "GOMP_", "OMP_WAIT_")  # prefixes of the environment variables that jobs receive
LOOPBACK = ("127.0.0.1", "localhost")
INTERRUPTION_SECONDS = 20.0  # granted to running jobs to record that they were interrupted
OBJECT_STORE_BYTES = 80_000_000  # the least that Ray accepts; jobs return next to nothing


@dataclass(frozen=True)
class _Sweep:
    """What all jobs of a sweep share, sent to their processes."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    singletons: Mapping[Any, Any]
    folder: str
    environment: Mapping[str, str]


@dataclass
class _Job:
    number: int
    overrides: Sequence[str]
    losses: int = 0


class RayLauncher(Launcher):
    """Runs each job as a task of Ray.

    Args:
        address: "HOST:PORT" of a cluster's head node. None means the environment variable RAY_ADDRESS or, where that is
            not set, a cluster of this machine that listens on loopback only and ends with the sweep.
        cpus_per_job: processors that Ray reserves for a job.
        memory_per_job: bytes of memory that Ray reserves for a job; None for none.
        retries: how often a job that lost its process is started again.
    """

    def __init__(self, address: str | None, cpus_per_job: float, memory_per_job: int | None, retries: int) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.resources = {"num_cpus": cpus_per_job, "memory": memory_per_job}
        self.retries = retries

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs, in any order.

        Raises:
            LaunchError: Ray is missing or does not answer, or a job lost its process more often than it may.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = [_Job(initial_job_idx + index, overrides) for index, overrides in enumerate(job_overrides)]
        for job in jobs:
            log.info("\t#%d : %s", job.number, " ".join(filter_overrides(job.overrides)))
        with _cluster(self.address) as ray:
            environment = {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}
            state = Singleton.get_state()
            sweep = _Sweep(self._context, self._config, self._task, state, os.getcwd(), environment)
            returns = self._run(ray, ray.put(sweep), jobs)
        return [returns[job.number] for job in jobs]

    def _run(self, ray: Any, sweep: Any, jobs: Sequence[_Job]) -> dict[int, JobReturn]:
        task = ray.remote(_run_job).options(max_retries=0, **self.resources)
        running = {task.remote(sweep, job.number, list(job.overrides), False): job for job in jobs}
        returns: dict[int, JobReturn] = {}
        lost: list[str] = []
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done)
                try:
                    returns[job.number] = ray.get(done)
                except ray.exceptions.RayTaskError as error:  # raised by the task, so it would be raised again
                    lost.append(f"{job.number} ({_last_line(error)})")
                except ray.exceptions.RayError as error:
                    job.losses += 1
                    if job.losses > self.retries:
                        lost.append(f"{job.number} ({type(error).__name__} after {self.retries} retries)")
                        continue
                    log.warning("Job %d lost its process (%s): it goes on.", job.number, type(error).__name__)
                    running[task.remote(sweep, job.number, list(job.overrides), True)] = job
        except KeyboardInterrupt:
            _interrupt(ray, list(running))
            raise
        if lost:
            raise LaunchError(f"These jobs could not be run on Ray: {'; '.join(lost)}. All others came to their ends.")
        return returns


def _run_job(sweep: _Sweep, number: int, overrides: Sequence[str], again: bool) -> JobReturn:
    """Run a job in a process of Ray; with `again`, go on where a lost process has left it."""
    os.environ.update(sweep.environment)
    try:
        os.chdir(sweep.folder)
    except OSError as error:
        raise LaunchError(
            f"This node has no folder {sweep.folder} ({error.strerror}), from which the sweep was started: start it "
            "in a folder that all nodes share."
        ) from error
    setup_globals()
    Singleton.set_state(sweep.singletons)
    config = sweep.context.config_loader.load_sweep_config(sweep.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
        if again:
            config.training.resume = str(config.hydra.sweep.dir)
    HydraConfig.instance().set_config(config)
    done = run_job(
        hydra_context=sweep.context,
        task_function=sweep.task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    sys.stderr.flush()
    return done


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine that ends with the context."""
    wishes = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
    wishes["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # the default of future releases; without it Ray warns
    if address is None:
        wishes["RAY_AUTH_MODE"] = "token"
    if address is None or address.rpartition(":")[0] in LOOPBACK:
        wishes["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system, it makes Ray stay on the loopback interface
    for name, value in wishes.items():  # which Ray reads when it is imported
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise LaunchError("hydra/launcher=ray needs Ray: pip install 'resq-rl[ray]'.") from error
    settings: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address is None else {}
    )
    try:
        ray.init(address or "local", logging_level=logging.WARNING, **settings)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise LaunchError(f"Cannot use the Ray cluster {address or 'of this machine'}: {_last_line(error)}") from error
    log.info("%d processors on %d nodes of Ray", ray.cluster_resources().get("CPU", 0), len(ray.nodes()))
    try:
        yield ray
    finally:
        ray.shutdown()


def _interrupt(ray: Any, running: list[Any]) -> None:
    """Stop the running jobs and give them time to record it."""
    with suppress(ray.exceptions.RayError):
        for job in running:
            ray.cancel(job)
        ray.wait(running, num_returns=len(running), timeout=INTERRUPTION_SECONDS)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
