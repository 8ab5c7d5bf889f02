"""`nn.MultiheadAttention` with projections that are layers.

Torch's own module hands the weights of its projections to one function, in which no layer is called. Here the same
projections are residual operators, and attention between them is as torch computes it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resq_rl.quantization.graph.operators import Geometry, ResidualOperator, Switch

__all__ = ["divide_attention"]


def divide_attention(network: nn.Module, switch: Switch) -> None:
    """Make the projections of every `nn.MultiheadAttention` residual operators, in place.

    Modules with a forward of their own, or that add keys (`add_bias_kv`, `add_zero_attn`), stay as they are: their
    projections are products of matrices at key precision.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention) and _is_plain(module):
            vars(module)["forward"] = _Attention(name, module, switch).forward


def _is_plain(module: nn.MultiheadAttention) -> bool:
    own = type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module)
    return not (own or module.bias_k is not None or module.bias_v is not None or module.add_zero_attn)


class _Attention:
    """The forward pass of one module, whose output projection is a layer already.

    Attributes:
        packed: the three projections of self-attention as one operator; None where they take other numbers of channels.
        projections: those of queries, keys and values.
    """

    def __init__(self, name: str, module: nn.MultiheadAttention, switch: Switch) -> None:
        self.module = module
        biases: Any = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)

        def operator(which: str, weight: Tensor, bias: Tensor | None) -> ResidualOperator:
            return ResidualOperator(f"{name}.{which}".lstrip("."), Geometry("linear"), weight, bias, switch)

        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        self.packed = None
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
            self.packed = operator("in_proj", module.in_proj_weight, module.in_proj_bias)
        names = ("q_proj", "k_proj", "v_proj")
        self.projections = [operator(*parts) for parts in zip(names, weights, biases, strict=True)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of `nn.MultiheadAttention`."""
        module = self.module
        if query.dim() != 3 or query.is_nested:
            given = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return nn.MultiheadAttention.forward(module, query, key, value, *given)
        q, k, v = (self._by_head(part) for part in self._projected(query, key, value))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        weights = None
        if need_weights:  # as torch does, which scales the queries and adds the mask within one product
            q, size = q.flatten(0, 1) * math.sqrt(1 / q.shape[-1]), (*q.shape[:3], k.shape[2])
            k, v = k.flatten(0, 1).mT, v.flatten(0, 1)
            scores = torch.bmm(q, k) if mask is None else torch.baddbmm(mask.expand(size).flatten(0, 1), q, k)
            weights = scores.softmax(-1)
            y = torch.bmm(weights, v).unflatten(0, size[:2])
            weights = weights.unflatten(0, size[:2])
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        y = y.transpose(1, 2).flatten(2)
        output: Tensor = module.out_proj(y if module.batch_first else y.transpose(0, 1))
        return output, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.packed is not None and query is key and key is value:
            return self.packed(query).chunk(3, -1)  # type: ignore[no-any-return]
        return tuple(project(x) for project, x in zip(self.projections, (query, key, value), strict=True))

    def _by_head(self, x: Tensor) -> Tensor:
        """Projected vectors as (clips, heads, tokens, channels)."""
        x = x if self.module.batch_first else x.transpose(0, 1)
        by_head: Tensor = x.unflatten(2, (self.module.num_heads, -1)).transpose(1, 2)
        return by_head

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """What is added to the products of queries and keys, broadcast over (clips, heads, queries, keys)."""
        masks = []
        if attention is not None:
            attention = _added(attention, q.dtype)
            masks.append(attention if attention.dim() == 2 else attention.unflatten(0, (len(q), -1)))
        if padding is not None:
            masks.append(_added(padding, q.dtype)[:, None, None, :])
        return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add: a boolean one leaves out what it marks."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
