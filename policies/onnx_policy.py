"""A learned policy with its preprocessing as one ONNX graph, which any ONNX runtime can run before each frame.

Needs the extra `onnx` (onnx, onnxruntime). The graph is traced from the functions that make observations here, so both
give the same numbers but for the order of sums.
"""

import importlib
import json
import warnings
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resq_rl.envs import Decision, FrameView, Observation
from resq_rl.envs.observation import Seen, frame_values, observed
from resq_rl.errors import PolicyError
from resq_rl.files import write_atomic
from resq_rl.policies.learned import LearnedPolicy
from resq_rl.quantization import Budget, LevelField, Reference, ThresholdField

__all__ = ["OnnxPolicy", "export_onnx"]

OPSET = 18
FORMAT = "resq_rl onnx policy 1"
INPUTS = ("frame", "reference_frame", "key_frame", "output", "spent", "age", "trade_off")
BUDGET_LEFT = "budget_left"  # a further input of policies under a budget: how full the bucket is, 0..1
OUTPUTS = ("choice", "refresh")


class _Graph(nn.Module):
    """Maps the inputs of a device before a frame of one clip to the threshold or level of every group and region."""

    def __init__(self, policy: LearnedPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The choices, (1, groups, rows, columns), and whether to run a keyframe, (1,)."""
        policy, seen = self.policy, Seen(*inputs[: len(INPUTS)])
        closed_loop = policy.reference == "previous"
        regions, residual, foreground = observed(seen, policy.scheme.grid, closed_loop=closed_loop)
        left = inputs[len(INPUTS)] if len(inputs) > len(INPUTS) else torch.ones_like(seen.trade_off)
        frame = frame_values(seen.age, seen.trade_off, policy.trade_off_range, left, residual, foreground)
        decision = policy.decision(Observation(regions, frame), seen.age)
        field = decision.field
        choice = field.levels if isinstance(field, LevelField) else field.thresholds
        return choice + torch.zeros(1, 1, *policy.scheme.grid, dtype=choice.dtype), decision.refresh


def export_onnx(policy: LearnedPolicy, path: Path, budget: Budget | None = None) -> None:
    """Write a policy as an ONNX file, for frames of the size it was trained on.

    Args:
        budget: with it, the graph takes how full the bucket is (`budget_left`), and the file names the budget; to keep
            it is up to the runtime of the network.

    Raises:
        PolicyError: the extra `onnx` is not installed, or the policy knows no frame size.
        ResultsError: the file cannot be written.
    """
    onnx = _extra("onnx")
    if min(policy.frame_size) < 1:
        raise PolicyError("The policy does not know the size of its frames: train it anew to export it as ONNX.")
    grid, groups = policy.scheme.grid, policy.scheme.groups
    frame = torch.zeros(1, 3, *policy.frame_size, dtype=torch.uint8)
    example = (
        *(frame.clone() for _ in range(3)),
        torch.rand(1, *grid, 3),
        torch.rand(1, *grid, groups),
        torch.ones(1, dtype=torch.int64),
        torch.tensor([policy.trade_off]),
        *(() if budget is None else (torch.ones(1),)),
    )
    buffer = BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter that traces needs no further package; sizes that become constants are meant to.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Graph(policy),
            example,
            buffer,  # type: ignore[arg-type]
            input_names=[*INPUTS, BUDGET_LEFT][: len(example)],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            dynamo=False,
            keep_initializers_as_inputs=False,
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    about = _about(policy) | {"budget": None if budget is None else asdict(budget)}
    onnx.helper.set_model_props(model, {"resq_rl": json.dumps(about)})
    onnx.checker.check_model(model)
    write_atomic(path, model.SerializeToString())


def _about(policy: LearnedPolicy) -> dict[str, Any]:
    """The settings that a runtime needs beside the graph."""
    return {
        "format": FORMAT,
        "choice": "threshold" if policy.scheme.by_threshold else "level",
        "kappa": list(policy.scheme.kappa),
        "reference": policy.reference,
        "trade_off": policy.trade_off,
        "trade_off_range": list(policy.trade_off_range),
        "macs": policy.macs,
        "bits": policy.bits,
        "network": list(policy.network),
        "settings": policy.settings,
    }


@dataclass(frozen=True, eq=False)
class OnnxPolicy:
    """A policy that `export_onnx` wrote, run by ONNX Runtime on what a device has before each frame."""

    session: Any
    kappa: tuple[float, ...]
    by_threshold: bool
    reference: Reference
    trade_off: float
    trade_off_range: tuple[float, float]
    macs: int
    bits: int
    settings: dict[str, object]

    @staticmethod
    def load(path: Path) -> "OnnxPolicy":
        """The policy of a file.

        Raises:
            PolicyError: the extra `onnx` is not installed, or the file is missing, damaged or of something else.
        """
        runtime = _extra("onnxruntime")
        try:
            options = runtime.SessionOptions()
            options.intra_op_num_threads = 1
            session = runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
            about = json.loads(session.get_modelmeta().custom_metadata_map["resq_rl"])
        except OSError as error:
            raise PolicyError(f"No policy at {path}: {error.strerror or error}.") from error
        except Exception as error:  # damaged graphs fail in many ways
            raise PolicyError(f"{path} is no policy written by `resq-rl export`, or is damaged: {error}") from error
        if about.get("format") != FORMAT:
            raise PolicyError(f"{path} is not of format {FORMAT!r}.")
        names = ("reference", "trade_off", "macs", "bits", "settings")
        return OnnxPolicy(
            session,
            tuple(about["kappa"]),
            about["choice"] == "threshold",
            trade_off_range=tuple(about["trade_off_range"]),
            **{name: about[name] for name in names},
        )

    def decide(self, view: FrameView) -> Decision:
        """The graph's decision for every clip, one at a time."""
        seen = view.seen
        columns = {name: getattr(seen, name).numpy() for name in INPUTS}
        columns[BUDGET_LEFT] = view.conditions.budget_left.numpy()
        known = [node.name for node in self.session.get_inputs()]  # what a policy does not look at is no input
        rows = [
            self.session.run(OUTPUTS, {name: columns[name][i : i + 1] for name in known}) for i in range(view.clips)
        ]
        choice = torch.from_numpy(np.concatenate([row[0] for row in rows]))
        refresh = torch.from_numpy(np.concatenate([row[1] for row in rows]))
        return Decision(refresh, ThresholdField(choice, self.kappa) if self.by_threshold else LevelField(choice))


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PolicyError(f"ONNX needs the extra 'onnx' ({error}). Run: pip install 'resq-rl[onnx]'") from error
