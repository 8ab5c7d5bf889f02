"""Copies of networks whose layers can be replaced: frozen, with plain weights, all on one device."""

import copy
import warnings
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from resq_rl.errors import NetworkError

__all__ = ["copy_of", "program_graphs"]


def program_graphs(network: nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """The graphs of exported programs in a network, with the prefix of their nodes' names: itself, or parts of it."""
    return [
        (f"{name}." if name else "", module)
        for name, module in network.named_modules()
        if isinstance(module, fx.GraphModule)
        and any(isinstance(node.target, OpOverload | HigherOrderOperator) for node in module.graph.nodes)
    ]


def copy_of(network: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy in evaluation mode, weights as plain tensors; programs keep the mode they were exported in.

    Args:
        network: any network; it may carry gradients, pruned weights and parametrizations. What `torch.compile` wraps is
            taken as it is without.
        device: where the frames lie; programs that make tensors elsewhere make them there.

    Raises:
        NetworkError: the network cannot be copied, is a TorchScript module, has layers whose weights have no shape yet,
            or lies on another device.
    """
    network = _uncompiled(network)
    for name, module in network.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise NetworkError(
                f"Layer {name!r} is lazy, and its weights have no shape yet: run the network on a frame before."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NetworkError(
                f"{name or type(network).__name__!r} is a TorchScript module, whose layers cannot be replaced. Give "
                "the original module, or export it: torch.export.export(module, (example,)).module()."
            )
    duplicate = _duplicate(network)
    try:
        duplicate.eval()
    except NotImplementedError:  # modules of exported programs have no mode to switch, and stop those after them
        for module in duplicate.modules():
            module.training = False
    for module in list(duplicate.modules()):
        for name, child in list(module.named_children()):
            if (plain := _uncompiled(child)) is not child:
                setattr(module, name, plain)
        forward: Any = vars(module).get("forward")
        if hasattr(forward, "_torchdynamo_orig_callable"):  # compiled, and still of the network that was copied
            method = unwrap(forward)
            module.forward = MethodType(getattr(method, "__func__", method), module)
        _settle(module)
    elsewhere = {f"{t.device}" for t in [*duplicate.parameters(), *duplicate.buffers()] if t.device != device}
    if elsewhere:
        raise NetworkError(
            f"{type(network).__name__} has tensors on {', '.join(sorted(elsewhere))}, the example lies on {device}: "
            "move one of them."
        )
    for _, graph in program_graphs(duplicate):
        _move(graph, device)
    return duplicate.requires_grad_(False)


def _duplicate(network: nn.Module) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying a program's tree of outputs
            return copy.deepcopy(network, _computed(network))
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} cannot be copied: {error}. Remove what it holds besides layers and tensors "
            "(locks, open files, generators), or export it."
        ) from error


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, else the module itself."""
    wrapped = getattr(module, "_orig_mod", None)
    return wrapped if isinstance(wrapped, nn.Module) and type(module).__name__ == "OptimizedModule" else module


def _computed(network: nn.Module) -> dict[int, Any]:
    """Copies of tensors that belong to a graph of gradients, by identity: `copy.deepcopy` refuses to copy them."""
    held = [value for module in network.modules() for value in tree_leaves(list(vars(module).values()))]
    held += network.buffers()
    return {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and t.grad_fn is not None}


def _settle(module: nn.Module) -> None:
    """Turn weights that are computed from others (pruned, normalised, parametrized) into plain ones."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):  # the class stays alone, which copies of the module share
        parametrizations: Any = module.parametrizations
        values = {name: getattr(module, name).detach().clone() for name in parametrizations}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            setattr(module, name, nn.Parameter(value, requires_grad=False))


def _move(graph: fx.GraphModule, device: torch.device) -> None:
    """Make a program that was exported on another device create its tensors on `device`."""
    moved = [node for node in graph.graph.nodes if node.kwargs.get("device", device) not in (device, None)]
    for node in moved:
        node.kwargs = node.kwargs | {"device": device}
    if moved:
        graph.recompile()
