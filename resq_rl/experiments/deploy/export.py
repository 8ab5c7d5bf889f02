"""`resq-rl export`: a trained policy as files for other runtimes, each read back and checked on a clip."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from resq_rl import __version__
from resq_rl.envs import NetworkEngine, Policy, Streams, Trace
from resq_rl.errors import PolicyError
from resq_rl.experiments.config.settings import Settings
from resq_rl.experiments.results.comparison import write_summary
from resq_rl.experiments.results.methods import controlled
from resq_rl.experiments.runs.progress import stage
from resq_rl.experiments.study.deployment import FILES, deployed_study, policy_folder, policy_words
from resq_rl.experiments.study.study import Study
from resq_rl.experiments.tracking.tracker import Tracker, quiet_mlflow
from resq_rl.policies import LearnedPolicy
from resq_rl.policies.onnx_policy import OnnxPolicy, export_onnx
from resq_rl.policies.search import Tried
from resq_rl.policies.threshold_table import Controller, TableRow, ThresholdTable, typical_thresholds
from resq_rl.quantization import Budget

__all__ = ["run"]

log = logging.getLogger(__name__)

PORTABLE = "policy"
# Validation clips whose choices are looked at for the table, and the shares of choices that are tried as thresholds.
TABLE_CLIPS = 6
SHARES = (0.35, 0.5, 0.65, 0.8)
# Of decisions that another runtime may make otherwise, because it sums in another order.
MOST_OTHER = 1e-3


class _SkippedError(Exception):
    """A format that cannot be written for this policy or on this machine; the text says why."""


@dataclass(frozen=True)
class _Export:
    """A policy to export, its study and its destination."""

    study: Study
    policy: LearnedPolicy
    folder: Path
    run_dir: Path
    tracker: Tracker

    @property
    def budget(self) -> Budget | None:
        """What frames may cost, of the settings."""
        return self.study.settings.environment.budget

    def trace(self, policy: Policy) -> Trace:
        """A policy on the first of the reported clips."""
        return self.study.trace(policy, self.study.settings.split)


def run(settings: Settings, run_dir: Path, tracker: Tracker) -> str:
    """Export; `summary.json` says for each format which files it is and how it was checked.

    Returns:
        What is useful next.
    """
    folder = policy_folder(settings.policy)
    policy = LearnedPolicy.load(folder)
    study = deployed_study(settings, folder, policy.scheme.grid, ["validation", settings.split])
    work = _Export(study, policy, folder, run_dir, tracker)
    reference = work.trace(policy)
    writers: dict[str, Callable[[_Export, Trace], dict[str, Any]]] = {
        "portable": _portable,
        "thresholds": _thresholds,
        "onnx": _onnx,
        "mlflow": _mlflow,
    }
    summary: dict[str, Any] = {"policy": str(folder), "split": settings.split, "frames": len(reference.bops)}
    table = Table("format", "files", "checked", title=str(folder))
    for name in settings.exporting.formats:
        try:
            summary[name] = writers[name](work, reference)
            table.add_row(name, summary[name]["path"], summary[name]["checked"])
        except _SkippedError as skipped:
            summary[name] = {"skipped": str(skipped)}
            table.add_row(name, "-", f"skipped: {skipped}")
        tracker.log_artifact(write_summary(run_dir / "summary.json", summary))
    Console().print(table)
    shipped = run_dir / PORTABLE if "portable" in summary else folder
    return f"run it from its files alone: resq-rl run {policy_words(shipped)} source=VIDEO"


def _portable(work: _Export, reference: Trace) -> dict[str, Any]:
    """The policy and the frozen model as safetensors and JSON."""
    target = _copied(work)
    for name in FILES:
        work.tracker.log_artifact(target / name, "policy")
    copied = replace(
        work,
        policy=LearnedPolicy.load(target),
        study=deployed_study(work.study.settings, target, work.policy.scheme.grid, [work.study.settings.split]),
    )
    return {"path": PORTABLE, **_same("portable", reference, copied.trace(copied.policy), 0.0)}


def _copied(work: _Export) -> Path:
    target = work.run_dir / PORTABLE
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(work.folder / name, target / name)
    return target


def _onnx(work: _Export, reference: Trace) -> dict[str, Any]:
    """The policy with its preprocessing as a graph."""
    path = work.run_dir / "policy.onnx"
    try:
        export_onnx(work.policy, path, work.budget)
        loaded = OnnxPolicy.load(path)
    except PolicyError as error:
        if isinstance(error.__cause__, ImportError):
            raise _SkippedError(str(error)) from error
        raise
    work.tracker.log_artifact(path)
    return {"path": path.name, **_same("ONNX", reference, work.trace(loaded), MOST_OTHER)}


def _same(name: str, expected: Trace, found: Trace, most: float) -> dict[str, Any]:
    """How two traces of a clip compare.

    Raises:
        PolicyError: a larger share of decisions than `most` differs.
    """
    if not torch.equal(expected.keyframe, found.keyframe):
        raise PolicyError(f"Read back, the {name} policy runs other keyframes on the checked clip.")
    other = float((expected.chosen != found.chosen).double().mean()) if expected.chosen.numel() else 0.0
    if other > most:
        raise PolicyError(f"Read back, the {name} policy makes {100 * other:.2g}% of the checked decisions otherwise.")
    equal = torch.equal(expected.prediction, found.prediction) and torch.equal(expected.bops, found.bops)
    checked = "equal bit for bit" if equal else f"{100 * other:.2g}% of decisions differ"
    return {"checked": checked, "other_decisions": other, "equal": equal}


# Thresholds ----------------------------------------------------------------------------------------------------------


def _thresholds(work: _Export, reference: Trace) -> dict[str, Any]:
    """The table, fitted to the policy on validation clips and measured on the reported ones."""
    study, scheme, split = work.study, work.policy.scheme, work.study.settings.split
    if not scheme.by_threshold:
        raise _SkippedError(f"a table holds thresholds, and the policy chooses {scheme.kind.replace('_', ' ')}")
    layers = tuple(site.name for site in study.model.sites)
    table = ThresholdTable(
        layers if scheme.base else study.model.groups,
        study.model.config.levels,
        scheme.kappa,
        work.policy.reference,
        tuple(_row(work, trade_off) for trade_off in _trade_offs(work)),
        work.budget,
    )
    path = work.run_dir / "thresholds.json"
    table.save(path)
    work.tracker.log_artifact(path)
    loaded = ThresholdTable.load(path)
    again = [study.measure(loaded.policy(row), split) for row in loaded.rows]
    if loaded != table or [(m.accuracy, m.bops) for m in again] != [(row.accuracy, row.bops) for row in table.rows]:
        raise PolicyError("Read back, the threshold table gives other results on the reported clips.")
    lost = max(row.accuracy_lost for row in table.rows)
    added = float(np.mean([row.bops_added for row in table.rows]))
    checked = f"equal; up to {100 * lost:.1f} points and on average {100 * added:+.0f}% BOPs against the policy"
    rows = [
        {"trade_off": r.trade_off, "accuracy_lost": r.accuracy_lost, "bops_added": r.bops_added} for r in table.rows
    ]
    return {"path": path.name, "checked": checked, "rows": rows}


def _trade_offs(work: _Export) -> list[float]:
    low, high = work.policy.trade_off_range
    return [float(t) for t in np.geomspace(low, high, work.study.settings.exporting.trade_offs if high > low else 1)]


def _row(work: _Export, trade_off: float) -> TableRow:
    """The thresholds with the highest reward on validation clips among those typical of the policy's choices."""
    study, policy = work.study, work.policy.at(trade_off)
    settings, problem = study.settings, study.problems["validation"]
    few = range(min(TABLE_CLIPS, len(problem)))
    with stage(f"distilling lambda {trade_off:.3g}", None) as advance:
        traces = [study.trace(policy, "validation", clip) for clip in few]
        intervals = settings.environment.keyframe_intervals if policy.keyframes else (policy.interval,)
        rows = [
            row
            for taus in typical_thresholds(torch.cat([trace.chosen for trace in traces]), SHARES)
            for interval in intervals
            for row in _controlled(work, TableRow(trade_off, interval, taus, scene_change=policy.scene_change))
        ]
        losses = []
        for row in rows:
            rule = row.policy(policy.reference, policy.scheme.kappa)
            result = study.measure(rule, "validation", advance)
            losses.append(Tried(rule, result.mean_error, result.bops).loss(trade_off))
        best = rows[int(np.argmin(losses))]
        own = best.policy(policy.reference, policy.scheme.kappa)
        mine, theirs = (study.measure(p, settings.split, advance) for p in (own, policy))
    return replace(
        best, accuracy=mine.accuracy, bops=mine.bops, policy_accuracy=theirs.accuracy, policy_bops=theirs.bops
    )


def _controlled(work: _Export, row: TableRow) -> list[TableRow]:
    """A row, and under a mean the same thresholds with rate controllers."""
    if work.budget is None or work.budget.mean is None:
        return [row]
    controllers = controlled(row.policy(work.policy.reference, work.policy.scheme.kappa))
    return [row, *(replace(row, controller=Controller(own.integral, own.fill)) for own in controllers)]


# MLflow --------------------------------------------------------------------------------------------------------------


def _mlflow(work: _Export, reference: Trace) -> dict[str, Any]:
    """The policy as an MLflow model: observations of agents in, their choices out."""
    quiet_mlflow()
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from resq_rl.experiments.deploy import served

    seen = np.concatenate(list(_observations(work)))
    expected = served.choices_of(work.policy, seen)
    path = work.run_dir / "mlflow_model"
    mlflow.pyfunc.save_model(
        path,
        python_model=str(Path(served.__file__)),
        artifacts={served.ARTIFACT: str(_copied(work))},
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype(np.float32), (-1, seen.shape[1]))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, expected.shape[1]))]),
        ),
        input_example=seen[:2],
        pip_requirements=[f"resq-rl=={__version__}"],
        metadata={"features": list(work.policy.scheme.feature_names), "settings": work.policy.settings},
    )
    loaded = mlflow.pyfunc.load_model(str(path))
    if not np.array_equal(loaded.predict(seen), expected):
        raise PolicyError("Read back, the MLflow model makes other choices on the checked clip.")
    name = work.study.settings.exporting.name
    work.tracker.log_model(path, name)
    registered = f", registered as {name}" if name and work.tracker.run_id else ""
    checked = f"equal on {len(seen)} observations{registered}; serve it with --env-manager local"
    log.info(
        "The MLflow model needs resq-rl %s where it is served, and no index has it. Install its wheel there, and let "
        "MLflow use that environment (mlflow models serve --env-manager local).",
        __version__,
    )
    return {"path": path.name, "checked": checked, "name": name}


def _observations(work: _Export) -> Iterator[np.ndarray]:
    """The agents' observations on the checked clip, frame by frame."""
    study, policy = work.study, work.policy
    streams = Streams(
        NetworkEngine(study.problem.subset([0])),
        slots=1,
        reference=policy.reference,
        trade_off_range=policy.trade_off_range,
    )
    result = streams.start([0], [0], [policy.trade_off])
    while not bool(result.last.all()):
        view = streams.view()
        yield policy.scheme.observe(view.observation).numpy()
        result = streams.step(policy.decide(view))
