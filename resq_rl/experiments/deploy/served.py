"""The MLflow model of a policy (pyfunc), as code: MLflow runs this file where the model is loaded.

It takes the observations of agents, a row each in the order of `features` in policy.json, and gives the threshold or
level that each chooses for every layer group.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel

from resq_rl.policies import LearnedPolicy

__all__ = ["ServedPolicy", "choices_of"]

ARTIFACT = "policy"


def choices_of(policy: LearnedPolicy, observations: np.ndarray) -> np.ndarray:
    """The thresholds or levels that agents with these observations choose, a row for each."""
    index = policy.choose(torch.from_numpy(np.asarray(observations, dtype=np.float32)))
    scheme = policy.scheme
    chosen: np.ndarray = np.asarray(scheme.values, dtype=np.float32)[index.numpy()]
    return chosen


class ServedPolicy(PythonModel):
    """A policy behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Read the policy from the model's artifacts."""
        self._policy = LearnedPolicy.load(Path(context.artifacts[ARTIFACT]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """`choices_of` the model's policy."""
        return choices_of(self._policy, model_input)


mlflow.models.set_model(ServedPolicy())
