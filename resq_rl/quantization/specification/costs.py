"""What a multiply-accumulate costs: one of three conventions, or a table of some hardware.

A convention says it by the two widths alone, in bit-operations. A table says it by kind of layer and widths, and knows
what conventions leave out: widths that the hardware lacks, memory traffic, tiles that run or are skipped as a whole,
and overheads that a skipped layer takes too. Its unit is its own (bit-operations, nanoseconds, picojoules): every
figure is a share of the W8A8 frame under the same table.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field

from resq_rl.checked import Checked, Count, convert_dataclass
from resq_rl.errors import SettingsError

__all__ = ["ByBits", "Convention", "Cost", "CostTable", "LayerKind", "LayerSize", "cost_name", "mac_cost"]

Convention = Literal["clipped", "max", "product"]
LayerKind = Literal["conv", "depthwise", "grouped", "linear", "pointwise", "transposed"]
NotBelowZero = Annotated[float, Field(ge=0)]
Width = Annotated[int, Field(ge=1, le=16)]
ByBits = Mapping[Width, Mapping[Width, NotBelowZero]]

CLIPPED_MINIMUM_BITS = 4
_TABLES = files("resq_rl.quantization.specification") / "tables"
SHIPPED = tuple(sorted(file.name.removesuffix(".yaml") for file in _TABLES.iterdir() if file.name.endswith(".yaml")))


@dataclass(frozen=True)
class LayerSize:
    """What the cost of a layer's multiply-accumulates may depend on.

    Attributes:
        kind: kind of layer, or a product of activations.
        macs: multiply-accumulates of a frame; padding is not counted.
        inputs, weights: elements of one clip's input, and of the weights.
    """

    kind: LayerKind | Literal["product"]
    macs: int
    inputs: int
    weights: int


@dataclass(frozen=True)
class CostTable(Checked):
    """Costs of some hardware, all in one unit.

    Attributes:
        name: name in files and on figures.
        source: where the numbers are from.
        macs: cost of a multiply-accumulate, by kind of layer ("any" for those not named; "product" of activations),
            weight bits and activation bits. A width between two listed ones costs as the next wider one; one beyond the
            widest is refused.
        weight_traffic, activation_traffic: cost of moving a weight or an input element of 8 bits, other widths in
            proportion. The layer takes as long as the slowest of multiplying, moving inputs and moving weights, which
            is shared evenly among its multiply-accumulates. Both are paid where codes are multiplied only.
        tile: rows and columns of a convolution's input pixels that are computed together: each costs as the dearest.
        operator: overhead of each call of an operator in each frame, skipped or not.
        frame: overhead of each frame.
    """

    name: str
    source: str
    macs: Mapping[LayerKind | Literal["any", "product"], ByBits]
    weight_traffic: NotBelowZero = 0.0
    activation_traffic: NotBelowZero = 0.0
    tile: tuple[Count, Count] = (1, 1)
    operator: NotBelowZero = 0.0
    frame: NotBelowZero = 0.0

    _group = "cost."

    def _check(self) -> None:
        if not self.macs or not all(rows and all(rows.values()) for rows in self.macs.values()):
            raise SettingsError(f"Setting 'cost.macs' of table {self.name!r} must list a cost for each kind it names.")

    def mac(self, weight_bits: int, activation_bits: int, layer: LayerSize) -> float:
        """Cost of one multiply-accumulate of a layer.

        Raises:
            SettingsError: the table has no such kind of layer or width.
        """
        rows = self.macs.get(layer.kind, self.macs.get("any"))
        if rows is None:
            raise SettingsError(
                f"The cost table {self.name!r} has no costs of {layer.kind} layers: add them, or 'any'."
            )
        columns = self._at(rows, weight_bits, "weights")
        compute = self._at(columns, activation_bits, "activations")
        moved = (
            layer.inputs * self.activation_traffic * activation_bits / 8,
            layer.weights * self.weight_traffic * weight_bits / 8,
        )
        return max(float(compute), *(traffic / max(1, layer.macs) for traffic in moved))

    def _at(self, row: Mapping[int, Any], bits: int, what: str) -> Any:
        wide = [width for width in row if width >= bits]
        if not wide:
            raise SettingsError(
                f"The cost table {self.name!r} has no cost of {what} with {bits} bits, only up to {max(row)}: add it, "
                "or lower the bits in 'quantization'."
            )
        return row[min(wide)]


def _read(value: Any) -> Any:
    """A convention as it is; a table from its name, its file or its fields."""
    if isinstance(value, CostTable) or value in get_args(Convention):
        return value
    values = value if isinstance(value, Mapping) else _loaded(value)
    return convert_dataclass(_complete(values), CostTable, "cost.")


def _loaded(value: Any) -> Mapping[Any, Any]:
    """The fields of a table, from its name or its file."""
    if not isinstance(value, str) or not (value in SHIPPED or value.endswith((".yaml", ".yml"))):
        raise ValueError("no such cost")
    path = _TABLES / f"{value}.yaml" if value in SHIPPED else Path(value)
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"Cannot read the cost table {value}: {' '.join(str(error).split())}.") from error
    if not isinstance(values, Mapping):
        raise SettingsError(f"Cannot read the cost table {value}: it must hold a mapping with name, source and macs.")
    return values


def _complete(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields with their defaults; widths, which are text in JSON, as numbers."""
    defaults = {field.name: field.default for field in fields(CostTable) if field.default is not MISSING}
    return defaults | {str(name): _numbered(value) for name, value in values.items()}


def _numbered(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {int(key) if str(key).isdecimal() else key: _numbered(item) for key, item in value.items()}


Cost = Annotated[
    str | Mapping[str, Any] | CostTable,
    BeforeValidator(_read),
    Field(
        description=f"one of {', '.join(get_args(Convention))}; or a cost table, one of {', '.join(SHIPPED)} or the "
        "path of a YAML file"
    ),
]


def cost_name(cost: Convention | CostTable) -> str:
    """The name of a cost in files and on figures."""
    return cost.name if isinstance(cost, CostTable) else cost


def mac_cost(cost: Convention | CostTable, weight_bits: int, activation_bits: int, layer: LayerSize) -> float:
    """Cost of one multiply-accumulate of a layer; 0 where either operand has no bits.

    product: w * a. max: max(w, a)^2, for units of one width. clipped: the product with each width at least 4, for
    hardware without narrower units. A table: `CostTable.mac`.

    Raises:
        SettingsError: the table has no such kind of layer or width.
    """
    if weight_bits == 0 or activation_bits == 0:
        return 0
    if isinstance(cost, CostTable):
        return cost.mac(weight_bits, activation_bits, layer)
    if cost == "max":
        return max(weight_bits, activation_bits) ** 2
    if cost == "clipped":
        return max(weight_bits, CLIPPED_MINIMUM_BITS) * max(activation_bits, CLIPPED_MINIMUM_BITS)
    return weight_bits * activation_bits
