"""Putting residual operators into a network: any `nn.Module` and any exported program (`.pt2`).

A module's convolutions, transposed convolutions and linear layers stay where they are and call an operator, after
BatchNorm has been folded into them; in the graph of an exported program the same operators are replaced node by node.
A convolution along one axis is a linear layer of its vectors if it has one tap, and else a convolution of an image of
one row. The projections of `nn.MultiheadAttention` are linear layers (`attention`).
Products of matrices stay as they are (`products`); whatever else multiplies and accumulates is refused by name
(`dependence`).
"""

import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from resq_rl.errors import NetworkError, UnsupportedOperatorError
from resq_rl.quantization.graph.attention import divide_attention
from resq_rl.quantization.graph.copying import program_graphs
from resq_rl.quantization.graph.dependence import SUPPORTED, multiplies
from resq_rl.quantization.graph.operators import Geometry, LineOperator, ResidualOperator, Switch

__all__ = ["fold_batch_norm", "insert_operators"]

_Module = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def fold_batch_norm(network: nn.Module) -> list[str]:
    """Fold BatchNorm layers that directly follow a convolution or linear layer into it, in place.

    Returns:
        Names of BatchNorm layers that could not be folded; they run in float on the layers' sums.
    """
    unfolded = [name for prefix, graph in program_graphs(network) for name in _fold_graph(prefix, graph)]
    names = [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if not names:
        return unfolded
    try:
        graph = fx.Tracer().trace(network)
    except Exception:
        return unfolded + names  # control flow that depends on data: the layers stay as they are
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or node.target not in names or called.count(node.target) > 1 or not node.args:
            continue
        source = node.args[0]
        if source.op != "call_module" or len(source.users) > 1 or called.count(source.target) > 1:
            continue
        layer, norm = network.get_submodule(source.target), network.get_submodule(node.target)
        if _fold_pair(layer, norm):
            _replace_everywhere(network, norm, nn.Identity())
            names.remove(node.target)
    return unfolded + names


def _fold_pair(layer: nn.Module, norm: Any) -> bool:
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or norm.running_mean is None:
        return False
    if isinstance(layer, nn.Linear):
        if layer.weight.shape[0] != norm.num_features:
            return False
        folded: _Module = fuse_linear_bn_eval(layer, norm)
    elif isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1:
        return False
    else:
        folded = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.ConvTranspose2d))
    # In place, because the layer may be registered under other names too.
    layer.weight, layer.bias = folded.weight, folded.bias
    return True


def insert_operators(network: nn.Module, switch: Switch) -> None:
    """Make every supported operator of `network` a `ResidualOperator`, in place.

    Raises:
        UnsupportedOperatorError: a layer does multiply-accumulates that residual quantization cannot express.
        NetworkError: the network has no operator to quantize.
    """
    layers = {m: n for n, m in network.named_modules() if isinstance(m, _LAYERS)}
    for layer, name in layers.items():
        _from_module(name, layer, switch).attach(layer)
    divide_attention(network, switch)
    count = len(layers) + sum(_replace_nodes(prefix, graph, switch) for prefix, graph in program_graphs(network))
    if count == 0:
        raise NetworkError(f"{type(network).__name__} has no layer to quantize: it needs at least one of {SUPPORTED}.")


def _from_module(name: str, module: _Module, switch: Switch) -> ResidualOperator:
    own = type(module).forward not in [kind.forward for kind in _LAYERS]
    for convolution in (nn.Conv1d, nn.Conv2d):
        own |= isinstance(module, convolution) and type(module)._conv_forward is not convolution._conv_forward
    if own or "forward" in vars(module):
        raise UnsupportedOperatorError(
            f"Layer {name!r} ({type(module).__name__}) has a forward of its own, so its operator cannot be replaced. "
            f"Supported: {SUPPORTED}."
        )
    if isinstance(module, nn.Linear):
        return ResidualOperator(name, Geometry("linear"), module.weight, module.bias, switch)
    if module.padding_mode != "zeros":
        raise UnsupportedOperatorError(
            f"Layer {name!r} pads with {module.padding_mode!r}; the residual path knows zero padding only. "
            "Pad outside the layer (nn.ReflectionPad2d and the like) and set padding=0."
        )
    settings = (module.stride, module.padding, module.dilation, module.groups)
    if isinstance(module, nn.Conv1d):
        return _along_line(name, module.weight, module.bias, switch, *settings)
    kind = "conv_transpose2d" if isinstance(module, nn.ConvTranspose2d) else "conv2d"
    geometry = _geometry(kind, module.weight, *settings, module.output_padding)
    return ResidualOperator(name, geometry, module.weight, module.bias, switch)


def _along_line(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    switch: Switch,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> LineOperator:
    """The operator of a 1-D convolution with weight (out, in / groups, taps)."""
    stride, dilation = _pair(stride)[1], _pair(dilation)[1]
    if padding == "same":
        total = dilation * (weight.shape[2] - 1)
        sides = (total // 2, total - total // 2, 0, 0)
    else:
        side = 0 if padding == "valid" else _pair(padding)[1]
        sides = (side, side, 0, 0)
    if weight.shape[2] == 1 and (stride, sides, groups) == (1, (0, 0, 0, 0), 1):
        return LineOperator(name, Geometry("linear"), weight[:, :, 0], bias, switch)
    kernel = (1, weight.shape[2])
    geometry = Geometry("conv2d", kernel, (1, stride), sides, (1, dilation), int(groups), line=True)
    return LineOperator(name, geometry, weight[:, :, None], bias, switch)


def _geometry(
    kind: Any,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    output_padding: Any = 0,
) -> Geometry:
    kernel = (weight.shape[2], weight.shape[3])
    dilation = _pair(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        top, left = (0, 0) if padding == "valid" else _pair(padding)
        sides = (left, left, top, top)
    return Geometry(kind, kernel, _pair(stride), sides, dilation, int(groups), _pair(output_padding))


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _replace_everywhere(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under every name that it is registered by."""
    for name in [n for n, m in network.named_modules(remove_duplicate=False) if m is old]:
        _set_submodule(network, name, new)


# Graphs of exported programs -----------------------------------------------------------------------------------------

_ATEN = torch.ops.aten
_OPERATORS: dict[Any, str] = {
    _ATEN.conv1d.default: "conv1d",
    _ATEN.conv1d.padding: "conv1d",
    _ATEN.conv2d.default: "conv2d",
    _ATEN.conv2d.padding: "conv2d",
    _ATEN.conv_transpose2d.input: "conv_transpose2d",
    _ATEN.linear.default: "linear",
    _ATEN.convolution.default: "convolution",
    _ATEN.addmm.default: "addmm",
    _ATEN.mm.default: "mm",
}
_TRANSPOSES = (_ATEN.t.default, _ATEN.permute.default, _ATEN.transpose.int)
# Operators that torch breaks down to products of matrices.
_PRODUCTS = re.compile(
    r"^aten::(mm|bmm|mv|addmm|addmv|addbmm|baddbmm|matmul|linear|tensordot|linalg_multi_dot|chain_matmul"
    r"|scaled_dot_product_attention)$"
)
_ARGUMENTS = {
    "conv1d": ("stride", "padding", "dilation", "groups"),
    "conv2d": ("stride", "padding", "dilation", "groups"),
    "conv_transpose2d": ("stride", "padding", "output_padding", "groups", "dilation"),
    "convolution": ("stride", "padding", "dilation", "transposed", "output_padding", "groups"),
}


def _replace_nodes(prefix: str, network: fx.GraphModule, switch: Switch) -> int:
    count = 0
    for node in list(network.graph.nodes):
        if node.op != "call_function" or node.target not in _OPERATORS:
            _check_node(prefix + node.name, node.target)
            continue
        if not _is_layer(network, node):
            continue
        operator = _from_node(prefix + node.name, network, node, switch)
        name = f"resq_{node.name}"
        network.add_submodule(name, operator)
        with network.graph.inserting_before(node):
            source = node.args[1] if _OPERATORS[node.target] == "addmm" else node.args[0]
            new = network.graph.call_module(name, (source,))
        node.replace_all_uses_with(new)
        network.graph.erase_node(node)
        count += 1
    if count:
        network.graph.eliminate_dead_code()
        network.recompile()
    return count


def _check_node(name: str, target: Any) -> None:
    """Refuse control flow, and multiply-accumulates that nothing counts."""
    known = isinstance(target, OpOverload) and (_PRODUCTS.match(target.name().split(".")[0]) or not multiplies(target))
    if isinstance(target, HigherOrderOperator) or (isinstance(target, OpOverload) and not known):
        raise UnsupportedOperatorError(
            f"Node {name!r} ({target}) cannot be quantized as a residual. Supported: {SUPPORTED}."
        )


def _is_layer(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of `_OPERATORS` has constant weights; products of matrices need none.

    Decomposed programs write a linear layer as bias + x @ weight.t(), without factors.
    """
    kind = _OPERATORS[node.target]
    if kind == "linear":
        return all(_source(a) is not None for a in node.args[1:]) and not node.kwargs
    if kind == "mm":
        return _source(node.args[1]) is not None
    if kind == "addmm":
        shift = _source(node.args[0])
        plain = shift is not None and _constant(network, node, shift).dim() == 1 and not node.kwargs
        return plain and _source(node.args[2]) is not None
    return True


def _source(argument: Any) -> fx.Node | None:
    """The node of the constant that an argument is, or is the transpose of; None where it is computed."""
    if isinstance(argument, fx.Node) and argument.target in _TRANSPOSES:
        argument = argument.args[0]
    return argument if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def _from_node(name: str, network: fx.GraphModule, node: fx.Node, switch: Switch) -> ResidualOperator:
    kind = _OPERATORS[node.target]
    if kind in ("addmm", "mm"):
        weight = _transposed_constant(network, node, node.args[2 if kind == "addmm" else 1])
        shift = _constant(network, node, node.args[0]) if kind == "addmm" else None
        return ResidualOperator(name, Geometry("linear"), weight, shift, switch)
    arguments: list[Any] = [*node.args, *([None] * (3 - len(node.args)))]
    bias_node = node.kwargs.get("bias", arguments[2])
    found = _constant(network, node, arguments[1])
    bias = None if bias_node is None else _constant(network, node, bias_node)
    if kind == "linear":
        return ResidualOperator(name, Geometry("linear"), found, bias, switch)
    settings = dict(zip(_ARGUMENTS[kind], arguments[3:], strict=False)) | {
        k: v for k, v in node.kwargs.items() if k != "bias"
    }
    if kind == "convolution":
        kind = "conv_transpose2d" if settings.pop("transposed") else "conv2d"
    if found.dim() == 3 and kind != "conv_transpose2d":
        settings.pop("output_padding", None)
        return _along_line(name, found, bias, switch, **settings)
    if found.dim() != 4:
        raise UnsupportedOperatorError(f"Node {name!r} is a {found.dim() - 2}-D convolution. Supported: {SUPPORTED}.")
    return ResidualOperator(name, _geometry(kind, found, **settings), found, bias, switch)


def _constant(network: fx.GraphModule, node: fx.Node, source: Any) -> Tensor:
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        raise UnsupportedOperatorError(
            f"Node {node.name!r} ({node.target}) has a weight that is computed in the graph, by {source}. "
            "Residual quantization needs constant weights: export the network with its weights as parameters."
        )
    value: Any = network
    for part in str(source.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise NetworkError(f"Node {node.name!r} has a weight {source.target!r} that is not a tensor.")
    return value.detach()


def _transposed_constant(network: fx.GraphModule, node: fx.Node, source: Any) -> Tensor:
    if isinstance(source, fx.Node) and source.target in _TRANSPOSES:
        return _constant(network, node, source.args[0])
    return _constant(network, node, source).t()


def _fold_graph(prefix: str, network: fx.GraphModule) -> list[str]:
    """Fold `aten.batch_norm` nodes that are the only user of a convolution node, and return the names of the others."""
    unfolded = []
    for node in list(network.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.batch_norm.default:
            continue
        source, training = node.args[0], node.args[5]
        if training or None in node.args[3:5] or _OPERATORS.get(source.target) != "conv2d" or len(source.users) > 1:
            unfolded.append(prefix + node.name)
            continue
        gamma, beta = (None if a is None else _constant(network, node, a) for a in node.args[1:3])
        mean, variance = (_constant(network, node, a) for a in node.args[3:5])
        scale = (variance + node.args[7]).rsqrt() * (1 if gamma is None else gamma)
        weight = _constant(network, source, source.args[1])
        bias_node = source.args[2] if len(source.args) > 2 else None
        bias = torch.zeros_like(scale) if bias_node is None else _constant(network, source, bias_node)
        shift = (bias - mean) * scale + (0 if beta is None else beta)
        names = [f"{source.name}_folded_weight", f"{source.name}_folded_bias"]
        for name, value in zip(names, (weight * scale[:, None, None, None], shift), strict=True):
            network.register_buffer(name, value)
        with network.graph.inserting_before(source):
            folded = [network.graph.get_attr(name) for name in names]
        source.args = (source.args[0], *folded, *source.args[3:])
        node.replace_all_uses_with(source)
        network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.recompile()
    return unfolded
