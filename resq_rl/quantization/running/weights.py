"""The integer weights of a model's operators."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from resq_rl.errors import CalibrationError, NetworkError, unknown_name
from resq_rl.quantization.graph.operators import ResidualOperator, laid_out
from resq_rl.quantization.kernels.plain import sums_are_exact
from resq_rl.quantization.quantizers.residual import largest_code
from resq_rl.quantization.quantizers.rounding import FINE, IntegerWeight, integer_weight
from resq_rl.quantization.running.calibration import SiteRecorder
from resq_rl.quantization.specification.config import LayerKind, Part, QuantizationConfig

__all__ = ["Weights", "weighed"]


def weighed(config: QuantizationConfig) -> tuple[Part, ...]:
    """The weights whose rounding is fitted to calibration clips."""
    if config.weight_rounding == "nearest":
        return ()
    return ("keyframe", "residual") if config.key_weight_bits < FINE else ("residual",)


class Weights:
    """Weights of every operator for keyframes and residuals, rounded once for each width.

    Args:
        operators: the operators.
        layout: how weights of four dimensions lie in memory.
        config: their widths, and how they are rounded.

    Attributes:
        moments: second moments of what weights multiply, by which they are rounded; none before calibration, and None
            for weights from a file, which holds no moments.
    """

    def __init__(
        self, operators: Sequence[ResidualOperator], layout: torch.memory_format, config: QuantizationConfig
    ) -> None:
        self._operators, self._layout = operators, layout
        self.moments: dict[tuple[ResidualOperator, Part], Tensor] | None = {}
        self._rounded: dict[tuple[ResidualOperator, Part, int], IntegerWeight] = {}
        self.round(config)

    def round(self, config: QuantizationConfig) -> None:
        """Round the weights to the widths of a configuration, each when it is first asked for.

        Raises:
            NetworkError: a weight or bias is not finite. SettingsError: widths for a layer that is not there.
        """
        if isinstance(config.residual_weight_bits, Mapping):
            known = {*get_args(LayerKind), *(operator.name for operator in self._operators)}
            for name in config.residual_weight_bits:
                if name not in known:
                    raise unknown_name(name, known, prefix="residual_weight_bits.")
        for operator in self._operators:
            if not all(bool(torch.isfinite(v).all()) for v in (operator.weight, operator.bias) if v is not None):
                raise NetworkError(f"Layer {operator.name!r} has weights that are not finite: load other weights.")
        self._config = config

    def weigh(self, recorders: Sequence[SiteRecorder]) -> None:
        """Take the moments that calibration recorded, summed over the calls of an operator; rounding begins anew."""
        moments: dict[tuple[ResidualOperator, Part], Tensor] = {}
        for recorder in recorders:
            for part, moment in recorder.moments.items():
                key = recorder.site.operator, part
                moments[key] = moments[key] + moment if key in moments else moment
        self.moments, self._rounded = moments, {}

    def put(self, operator: ResidualOperator, part: Part, bits: int, weight: IntegerWeight) -> None:
        """Set a weight from a file."""
        self.moments, self._rounded[operator, part, bits] = None, self._laid_out(weight)

    def of(self, operator: ResidualOperator) -> dict[Part, IntegerWeight]:
        """The weights of an operator by part.

        Raises:
            CalibrationError: other bits are wanted than those of weights from a file.
        """
        residual_bits = self._config.weight_bits(operator.layer_kind, operator.name)
        return {
            "keyframe": self._of(operator, "keyframe", self._config.key_weight_bits),
            "residual": self._of(operator, "residual", residual_bits),
        }

    def sums_are_exact(self, operator: ResidualOperator) -> bool:
        """Whether float32 holds every sum of an operator's products, whatever its input."""
        weights = self.of(operator)
        most = {"keyframe": 2**self._config.key_activation_bits - 1, "residual": largest_code(self._config.levels)}
        return all(sums_are_exact(operator.geometry, weights[part].codes, most[part]) for part in weights)

    def _of(self, operator: ResidualOperator, part: Part, bits: int) -> IntegerWeight:
        if bits == self._config.key_weight_bits:
            part = "keyframe"  # the same weights serve for both, so residuals do not drift
        key = operator, part, bits
        if key not in self._rounded:
            moment = self._moment(operator, part, bits)
            self._rounded[key] = self._laid_out(integer_weight(operator, bits, self._config.range_estimator, moment))
        return self._rounded[key]

    def _moment(self, operator: ResidualOperator, part: Part, bits: int) -> Tensor | None:
        """The second moment by which a weight is rounded; None where it is rounded to nearest."""
        if self.moments is None and part in weighed(self._config) and bits < FINE:
            raise CalibrationError(
                f"Layer {operator.name!r} came from a file without weights of {bits} bits, and rounding them needs the "
                "calibration clips: calibrate the network anew, or ask for 8 bits or more."
            )
        return None if self.moments is None else self.moments.get((operator, part))

    def _laid_out(self, weight: IntegerWeight) -> IntegerWeight:
        return replace(weight, codes=laid_out((weight.codes,), self._layout)[0])
