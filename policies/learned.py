"""A trained policy as it is deployed: a small quantized network, its actions and the setting it was trained for."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from resq_rl.envs import ActionScheme, Decision, FrameView, Observation
from resq_rl.errors import PolicyError, ResqError
from resq_rl.files import write_atomic
from resq_rl.policies.fixed import check_timing, periodic, rule_from_json, rule_to_json, scene_changed
from resq_rl.quantization import Reference, symmetric_limit
from resq_rl.sealed import checksum

__all__ = ["LearnedPolicy"]

FORMAT = "resq_rl policy 4"
WITHOUT_RULE = "resq_rl policy 3"  # for changes of scene
UNCHECKED = "resq_rl policy 2"  # without a checksum either


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """A multi-layer perceptron with tanh between its layers, that gives the place of every decision among its choices.

    Without layers it is the static thresholds of its scheme's base, where its network's factors begin (`beginning`).

    The nearest choice is taken: thresholds and levels are ordered, and so is keyframe (1) or not (0). With `bits` below
    32 it runs as it is charged: weights symmetric per output row, observations (in [0, 1]) and hidden values (in
    [-1, 1]) uniform, all at `bits` bits.

    Attributes:
        weights, biases: one per layer, (out, in) and (out,).
        scheme: actions and observations.
        trade_off: lambda to decide for; one network may serve a whole range.
        trade_off_range: range of lambda it was trained over.
        interval: frames between keyframes where the agents do not decide them (0: first frame only).
        scene_change: mean residual above which a frame runs as a keyframe too (`scene_changed`), likewise.
        reference: reference mode it was trained for.
        bits: bits of weights and activations.
        frame_size: height and width in pixels of the frames it was trained on.
        network: layer groups of the network it was trained with, to catch a mismatch.
        keyframes: beside region agents, a policy of actions "keyframe" that decides when to run one; without it they
            follow the interval.
    """

    weights: tuple[Float[Tensor, "_ _"], ...]
    biases: tuple[Float[Tensor, " _"], ...]
    scheme: ActionScheme
    trade_off: float
    trade_off_range: tuple[float, float]
    interval: int = 16
    reference: Reference = "previous"
    bits: int = 8
    frame_size: tuple[int, int] = (0, 0)
    network: tuple[str, ...] = ()
    keyframes: "LearnedPolicy | None" = None
    scene_change: float = math.inf

    def __post_init__(self) -> None:
        self._check_layers()
        if self.bits != 32 and not 2 <= self.bits <= 16:
            raise PolicyError(f"A policy runs at 2 to 16 bits, or at 32 in float, got {self.bits}.")
        low, high = self.trade_off_range
        if not (self.trade_off > 0 and 0 < low <= high):
            raise PolicyError(
                f"A policy needs a positive lambda and range of lambda, got {self.trade_off} and "
                f"{self.trade_off_range}."
            )
        check_timing(self.interval, self.scene_change)
        if self.decides_keyframes and self.scene_change < math.inf:
            raise PolicyError("A policy that decides on keyframes follows no rule for changes of scene beside.")
        if self.static:
            return
        inputs, outputs = self.weights[0].shape[1], self.weights[-1].shape[0]
        if inputs != self.scheme.observation_size or outputs != len(self.scheme.nvec):
            raise PolicyError(
                f"The policy's network maps {inputs} numbers to {outputs}; its actions need "
                f"{self.scheme.observation_size} to {len(self.scheme.nvec)}."
            )
        if self.keyframes is not None:
            self._check_keyframes(self.keyframes)

    @property
    def static(self) -> bool:
        """Whether it has no network, and so decides the same everywhere."""
        return not self.weights

    @property
    def decides_keyframes(self) -> bool:
        """Whether keyframes are decided by agents, and not by the interval and the rule for changes of scene."""
        return self.keyframes is not None or self.scheme.agents == "frame"

    @property
    def place(self) -> float:
        """Lambda's place in its range by ratio, from 0 to 1; 0 in a range of one value."""
        low, high = self.trade_off_range
        return math.log(self.trade_off / low) / math.log(high / low) if high > low else 0.0

    def beginning(self) -> "LearnedPolicy":
        """The static thresholds of its base, without a network that would cost anything.

        Raises:
            PolicyError: its scheme has no base.
        """
        if not self.scheme.base:
            raise PolicyError(
                "The policy chooses thresholds or levels, not factors of a base, so it has no static beginning to run: "
                "leave out running.static, or train with training.trainer=gradient or training.warm_start=gradient."
            )
        return replace(self, weights=(), biases=(), keyframes=None)

    def _check_keyframes(self, keyframes: "LearnedPolicy") -> None:
        if (self.scheme.agents, keyframes.scheme.kind) != ("region", "keyframe"):
            raise PolicyError(
                "Learned keyframes are a policy of actions 'keyframe' beside one of region agents, got "
                f"{keyframes.scheme.kind!r} beside {self.scheme.agents!r} agents."
            )
        if keyframes.scheme.groups != self.scheme.groups or keyframes.scheme.grid != self.scheme.grid:
            raise PolicyError(
                f"The keyframe policy sees {keyframes.scheme.groups} layer groups and grid {keyframes.scheme.grid}, "
                f"the region agents {self.scheme.groups} and {self.scheme.grid}: train both in one environment."
            )
        for name in _SHARED:
            if getattr(keyframes, name) != getattr(self, name):
                raise PolicyError(
                    f"{name} must be the same in the policy of region agents and in its keyframe policy, got "
                    f"{getattr(self, name)!r} and {getattr(keyframes, name)!r}."
                )

    def _check_layers(self) -> None:
        shapes = [tuple(w.shape) for w in self.weights]
        enough = len(shapes) > 0 or bool(self.scheme.base)
        fit = enough and [tuple(b.shape) for b in self.biases] == [shape[:1] for shape in shapes]
        if not fit or any(len(s) != 2 for s in shapes) or any(a[0] != b[1] for a, b in pairwise(shapes)):
            raise PolicyError(
                f"The policy's layers do not fit each other: weights of shape {shapes}, biases of shape "
                f"{[tuple(b.shape) for b in self.biases]}."
            )
        for tensor in (*self.weights, *self.biases):
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise PolicyError("The policy's weights must be finite float32 numbers.")

    @property
    def macs(self) -> int:
        """Multiply-accumulates per frame, over all agents and the keyframe policy."""
        own = sum(w.numel() for w in self.weights) * self.scheme.agents_per_clip
        return own + (self.keyframes.macs if self.keyframes is not None else 0)

    @property
    def settings(self) -> dict[str, object]:
        """Settings that identify the policy in tables and files."""
        timing: dict[str, object] = {"interval": self.interval} if self.keyframes is None else {"keyframes": "learned"}
        timing |= {"scene_change": self.scene_change} if self.scene_change < math.inf else {}
        return {
            "trade_off": self.trade_off,
            **timing,
            "reference": self.reference,
            "bits": self.bits,
            "action": self.scheme.kind,
            "agents": self.scheme.agents,
            **({"static": True} if self.static else {}),
        }

    def at(self, trade_off: float, interval: int | None = None) -> "LearnedPolicy":
        """The same network at another lambda; with an interval, keyframes follow it and are no longer learned."""
        if interval is not None:
            return replace(self, trade_off=trade_off, interval=interval, keyframes=None)
        keyframes = None if self.keyframes is None else self.keyframes.at(trade_off)
        return replace(self, trade_off=trade_off, keyframes=keyframes)

    def places(self, observations: Float[Tensor, "n i"]) -> Float[Tensor, "n k"]:
        """Place of every decision on the scale of its choices, 0 to n - 1; it may lie beyond the ends."""
        x = observations
        if self.bits < 32:
            top = 2**self.bits - 1
            x = torch.round(x * top) / top
        for layer, (weight, bias) in enumerate(zip(self._weights(), self.biases, strict=True)):
            if layer:
                x = torch.tanh(x)
                if self.bits < 32:
                    limit = symmetric_limit(self.bits)
                    x = torch.round(x * limit) / limit
            x = torch.nn.functional.linear(x, weight, bias)
        return x

    def _weights(self) -> Sequence[Tensor]:
        if self.bits >= 32:
            return self.weights
        limit = symmetric_limit(self.bits)
        quantized = []
        for weight in self.weights:
            step = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / limit
            quantized.append(torch.round(weight / step) * step)
        return quantized

    def choose(self, observations: Float[Tensor, "n i"]) -> Int[Tensor, "n k"]:
        """The choice nearest to every place, as an index."""
        if self.static:
            return torch.full((len(observations), len(self.scheme.nvec)), self.scheme.neutral)
        highest = torch.tensor(self.scheme.nvec) - 1
        return self.places(observations).round().clamp(torch.zeros_like(highest), highest).long()

    def decision(self, observation: Observation, age: Int64[Tensor, " b"]) -> Decision:
        """The decision for every clip.

        Args:
            observation: the observation.
            age: frames since each clip's keyframe.

        Raises:
            PolicyError: its actions are "keyframe", which choose no field.
        """
        refresh = periodic(age, self.interval)
        if self.scene_change < math.inf:
            refresh = refresh | scene_changed(observation, self.scene_change)
        if self.keyframes is not None:
            refresh = self.keyframes.choose(self.keyframes.scheme.observe(observation))[:, -1] == 1
        chosen = self.choose(self.scheme.observe(observation))
        return self.scheme.decision(chosen, refresh, place=observation.trade_off)

    def decide(self, view: FrameView) -> Decision:
        """The nearest action of every agent.

        Raises:
            PolicyError: it was trained for another network, grid or range of lambda, or its actions are "keyframe",
                which choose no field.
        """
        self.check_view(view)
        if self.keyframes is not None:
            self.keyframes.check_view(view)
        return self.decision(view.observation, view.age)

    def check_view(self, view: FrameView) -> None:
        """Raise PolicyError unless it was trained for such a network, grid and range of lambda."""
        if (view.groups, view.grid) != (self.scheme.groups, self.scheme.grid):
            raise PolicyError(
                f"The policy decides for {self.scheme.groups} layer groups and grid {self.scheme.grid}; the network "
                f"and environment have {view.groups} and {view.grid}. Use the network and grid it was trained with."
            )
        if self.network and self.network != view.network:
            raise PolicyError(
                f"The policy was trained with a network of layer groups {list(self.network)}, this one has "
                f"{list(view.network)}. Use the network it was trained with."
            )
        if self.trade_off_range != view.trade_off_range:
            raise PolicyError(
                f"The policy knows lambda by its place in {self.trade_off_range}, the environment shows it in "
                f"{view.trade_off_range}. Give both one range (trade_off_range, environment.trade_off)."
            )

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write `policy.safetensors` and `policy.json` into `folder`."""
        about, tensors = self._pack()
        write_atomic(folder / "policy.safetensors", save_tensors(tensors))
        whole = {"format": FORMAT, **about}
        whole["sha256"] = checksum(whole, tensors)
        write_atomic(folder / "policy.json", json.dumps(whole, indent=2) + "\n")

    def _pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content of the two files."""
        tensors = {f"weight{i}": w.contiguous() for i, w in enumerate(self.weights)}
        tensors |= {f"bias{i}": b.contiguous() for i, b in enumerate(self.biases)}
        about: dict[str, Any] = {"layers": len(self.weights), "scheme": asdict(self.scheme)}
        for name in _PLAIN:
            about[name] = getattr(self, name)
        about["features"] = list(self.scheme.feature_names)
        about["scene_change"] = rule_to_json(self.scene_change)
        if self.keyframes is not None:
            about["keyframes"], own = self.keyframes._pack()
            tensors |= {_KEYFRAMES + name: tensor for name, tensor in own.items()}
        return about, tensors

    @staticmethod
    def load(folder: Path) -> "LearnedPolicy":
        """Read a policy that `save` wrote.

        Raises:
            PolicyError: a file is missing, damaged or changed, or of another format.
        """
        try:
            about = json.loads((folder / "policy.json").read_text())
            tensors = load_tensors((folder / "policy.safetensors").read_bytes())
        except OSError as error:
            raise PolicyError(
                f"No policy in {folder}: {error.strerror} ({error.filename}). Give the folder that `resq-rl train` "
                "wrote (it holds policy.safetensors and policy.json)."
            ) from error
        except (SafetensorError, ValueError) as error:  # of which JSON and text decoding errors are kinds
            raise PolicyError(f"The policy in {folder} is damaged: {error}. Train it anew or copy it again.") from error
        if not isinstance(about, dict) or about.get("format") not in (FORMAT, WITHOUT_RULE, UNCHECKED):
            raise PolicyError(f"{folder / 'policy.json'} is not of format {FORMAT!r}.")
        expected = about.pop("sha256", None)
        try:
            policy = LearnedPolicy._unpack(about, tensors)
        except KeyError as error:
            raise PolicyError(f"The policy in {folder} lacks {error}. Train it anew or copy it again.") from error
        except (AttributeError, TypeError, ValueError, ResqError) as error:
            raise PolicyError(
                f"The policy in {folder} cannot be used: {error} Train it anew or copy it again."
            ) from error
        if expected != checksum(about, tensors) and not (expected is None and about["format"] == UNCHECKED):
            raise PolicyError(
                f"The policy in {folder} is damaged or was changed: its checksum is wrong. Train it anew or copy both "
                "its files again."
            )
        return policy

    @staticmethod
    def _unpack(about: dict[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> "LearnedPolicy":
        layers = range(int(about["layers"]))
        scheme = ActionScheme(**{k: _tuples(v) for k, v in about["scheme"].items()})
        if about["features"] != list(scheme.feature_names):
            raise PolicyError("its observations are not those of this version")
        return LearnedPolicy(
            tuple(tensors[f"{prefix}weight{i}"] for i in layers),
            tuple(tensors[f"{prefix}bias{i}"] for i in layers),
            scheme,
            **{name: _tuples(about[name]) for name in _PLAIN},
            keyframes=LearnedPolicy._unpack(about["keyframes"], tensors, _KEYFRAMES) if "keyframes" in about else None,
            scene_change=rule_from_json(about.get("scene_change")),
        )


_KEYFRAMES = "keyframes."
# Equal in a policy and its keyframes: what they are charged by, decide for and see.
_SHARED = ("bits", "reference", "trade_off", "trade_off_range", "network")
_PLAIN = ("trade_off", "trade_off_range", "interval", "reference", "bits", "frame_size", "network")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
