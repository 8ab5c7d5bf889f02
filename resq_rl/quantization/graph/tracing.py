"""One trial pass through a wrapped network: which operators are called in which order, and is every call sound?"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from resq_rl.errors import NetworkError, ResqError
from resq_rl.quantization.graph.dependence import Exposure, Follow
from resq_rl.quantization.graph.memory import block_of
from resq_rl.quantization.graph.operators import ResidualOperator, Switch
from resq_rl.quantization.graph.outputs import tensors_of
from resq_rl.quantization.graph.places import Arrangement, Places, Tokens
from resq_rl.quantization.graph.products import ProductSite, decomposed, factors_of, product_macs
from resq_rl.quantization.specification.config import LayerKind
from resq_rl.quantization.specification.costs import LayerSize
from resq_rl.quantization.specification.ledger import coverage_total

log = logging.getLogger(__name__)

__all__ = ["AnySite", "Site", "Traced", "trace"]


@dataclass
class Site:
    """One call of an operator in a forward pass; an operator used twice makes two sites with a state of their own.

    Attributes:
        operator: the operator called.
        input_shape, output_shape: shapes of one clip's input and output, without the clip dimension.
        dtype: type of the output; whatever it is, references and codes are float32.
        arrangement, tokens: where the clips and the tokens of a linear layer lie.
        overwritten: whether later code may overwrite the output in place, or the caller gets it and might, so that the
            stored reference needs a copy.
    """

    operator: ResidualOperator
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    arrangement: Arrangement = field(default_factory=Arrangement)
    tokens: Tokens = field(default_factory=lambda: Tokens.nowhere(1))
    overwritten: bool = False

    @property
    def name(self) -> str:
        """Name of the operator's layer."""
        return self.operator.name

    @property
    def layer_kind(self) -> LayerKind:
        """Kind of the operator."""
        return self.operator.layer_kind

    @property
    def size(self) -> LayerSize:
        """What the cost of a multiply-accumulate may depend on."""
        return LayerSize(self.operator.layer_kind, self.macs, self.input_elements, self.operator.weight.numel())

    @property
    def input_elements(self) -> int:
        """Elements of one clip's input."""
        return int(torch.Size(self.input_shape).numel())

    @property
    def output_elements(self) -> int:
        """Elements of one clip's output."""
        return int(torch.Size(self.output_shape).numel())

    @property
    def output_size(self) -> tuple[int, ...]:
        """Height and width of the output; (1, 1) for a linear layer."""
        return self.output_shape[1:] if self.operator.channel_axis == 1 else (1, 1)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one frame; padding is not counted."""
        if self.operator.channel_axis == -1:
            return len(self.tokens.index) * self.operator.macs_per_tap
        size = self.input_shape[1], self.input_shape[2]
        return coverage_total(self.operator.geometry.coverage(size)) * self.operator.macs_per_tap


AnySite = Site | ProductSite


class Traced(NamedTuple):
    """What one pass through a network calls.

    Attributes:
        sites: the calls of operators and of products of activations, in order.
        constant: which of all products of matrices, by number in order, do not depend on the frame.
        overwrites: whether the pass writes to its own inputs, or may.
    """

    sites: list[AnySite]
    constant: frozenset[int]
    overwrites: bool


def trace(network: nn.Module, switch: Switch, inputs: tuple[Tensor, ...]) -> Traced:
    """Run a batch of clips once in float and list the calls in order.

    Raises:
        UnsupportedOperatorError: multiply-accumulates that nothing counts, named by layer.
        NetworkError: the network does not accept the inputs, or the clip dimension does not lead somewhere.
    """
    inputs = tuple(part.clone() for part in inputs)
    calls = _Calls(inputs, _located(network, switch, tuple(part.clone() for part in inputs)))
    switch.execute = calls.operator
    try:
        with torch.no_grad(), decomposed(), ExitStack() as stack:
            for name, module in network.named_modules():
                _name(stack, calls.follow, name, module)
            stack.enter_context(Exposure(calls.follow))
            stack.enter_context(calls.follow)
            returned = network(*inputs)
    except ResqError:
        raise
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} cannot run on frames of shape "
            f"{' and '.join(str(tuple(part.shape)) for part in inputs)}: {error} "
            "It must take any number of clips (export programs with a dynamic batch dimension)."
        ) from error
    finally:
        switch.execute = ResidualOperator.float_output
    if not calls.outputs:
        raise NetworkError(f"{type(network).__name__} calls none of its layers in its forward.")
    touched = calls.follow.written | {block_of(t) for t in tensors_of(returned)}
    for site, y, before in calls.outputs:
        changed = not torch.equal(y.nan_to_num(), before.nan_to_num())  # by code that no mode of torch sees
        site.overwritten = changed or block_of(y) in touched
    overwrites = any(block_of(part) in calls.follow.written for part in inputs)
    return Traced(calls.sites, frozenset(calls.constant), overwrites)


def _located(network: nn.Module, switch: Switch, inputs: tuple[Tensor, ...]) -> list[tuple[Arrangement | None, Tokens]]:
    """Where clips and tokens lie in the input of each operator call; shorter where the pass ends in an error."""
    found: list[tuple[Arrangement | None, Tokens]] = []
    linear = (nn.Linear, nn.Conv1d, ResidualOperator)
    if not any(isinstance(module, linear) for module in network.modules()):
        return found
    clips, places = len(inputs[0]), Places(inputs)

    def locate(operator: ResidualOperator, x: Tensor) -> Tensor:
        places.inside = True
        y = operator.float_output(x)
        arrangement = None
        if operator.channel_axis == -1:
            arrangement = places.arrangement(x, clips)
            places.linear(x, y)
        else:
            places.begin(y, placed=not operator.geometry.line)
        known = None if arrangement is None else places.tokens(x, arrangement, clips)
        found.append((arrangement, known or Tokens.nowhere(1)))
        places.inside = False
        return y

    switch.execute = locate
    try:
        with torch.no_grad(), decomposed(), places:
            network(*inputs)
    except Exception:
        log.debug("Places are known of the first %d calls only.", len(found), exc_info=True)
    return found


class _Calls:
    """Collects the calls of one pass in float.

    Attributes:
        outputs: the sites of operators, each with its output and a copy of it.
        constant: as of `Traced`.
    """

    def __init__(self, inputs: tuple[Tensor, ...], located: list[tuple[Arrangement | None, Tokens]]) -> None:
        self.clips = len(inputs[0])
        self.located = located
        self.follow = Follow(inputs, self.product)
        self.sites: list[AnySite] = []
        self.outputs: list[tuple[Site, Tensor, Tensor]] = []
        self.constant: list[int] = []
        self._modules: list[str] = []  # of all products that depend on the frame

    def operator(self, operator: ResidualOperator, x: Tensor) -> Tensor:
        """Run an operator in float and add its site."""
        arrangement, tokens = self._where(operator, x)
        if arrangement is None:
            raise NetworkError(
                f"Layer {operator.name!r} is called on a tensor of shape {tuple(x.shape)} for a batch of {self.clips} "
                "clips; the clip dimension must lead in every layer."
            )
        self.follow.inside = True
        y = operator.float_output(x)
        shape = arrangement.gathered(x).shape
        made = (operator.out_channels,) if operator.channel_axis == -1 else ()
        outer = (*shape[1:-1], *made) if made else tuple(y.shape[1:])
        site = Site(operator, tuple(shape[1:]), outer, y.dtype, arrangement, tokens)
        self.sites.append(site)
        self.outputs.append((site, y, y.clone()))
        self.follow.inside = False
        self.follow.begin(y)
        return y

    def _where(self, operator: ResidualOperator, x: Tensor) -> tuple[Arrangement | None, Tokens]:
        """How the clips and the tokens lie in an operator's input; None for clips that do not lie apart."""
        number = len(self.outputs)
        if operator.channel_axis == -1 and number < len(self.located):
            return self.located[number]
        leads = len(x) == self.clips and (x.dim() == 4 or (operator.channel_axis == -1 and x.dim() > 1))
        count = x.numel() // max(1, self.clips * x.shape[-1]) if operator.channel_axis == -1 else 1
        return Arrangement() if leads else None, Tokens.nowhere(count, known=count == 1)

    def product(self, func: OpOverload, args: Any, own: list[Tensor]) -> None:
        """Add the site of a product of matrices, of which the factors in `own` depend on the frame."""
        if not own:
            self.constant.append(len(self.constant) + len(self._modules))
            return
        module = self.follow.stack[-1] if self.follow.stack else ""
        self._modules.append(module)
        name = f"{module}.product{self._modules.count(module)}".lstrip(".")
        macs, contracted = product_macs(func, args), factors_of(func, args)[0].shape[-1]
        if macs % self.clips or any(t.numel() % self.clips for t in own):
            raise NetworkError(
                f"Product {name!r} ({func.name()}) for a batch of {self.clips} clips multiplies tensors of shapes "
                f"{' and '.join(str(tuple(t.shape)) for t in factors_of(func, args))}: "
                "it mixes clips. Compute everything clip by clip."
            )
        entering, made = sum(t.numel() for t in own) // self.clips, macs // self.clips // max(1, contracted)
        self.sites.append(ProductSite(name, macs // self.clips, entering, made, contracted))


def _name(stack: ExitStack, follow: Follow, name: str, module: nn.Module) -> None:
    """Tell `follow` while the module runs."""

    def enter(*_: Any) -> None:
        follow.stack.append(name)

    def leave(*_: Any) -> None:
        follow.stack.pop()

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)
