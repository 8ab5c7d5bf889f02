"""Small networks of the kinds that people bring: each runs right, or is refused by an error that names the place.

To add one, add a line to ACCEPTED or REFUSED. A network is a function of a module `m` with some layers and the frames.
"""

import random
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

SIZE = (8, 8)

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Convolutions `a` (3 to 4 channels, 3x3) and `b` (4 to 4, 3x3), more layers by name, and a function of them."""

    def __init__(self, call: Forward, **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4).view(1, 4, 1, 1))
        self.call = call
        self.memory: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


@dataclass
class Logits:
    """An output of a type that torch knows nothing of."""

    logits: Tensor
    names: tuple[str, ...] = ("a",)


class Record:
    """An output that is a plain object."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class ModelOutput(OrderedDict[str, Tensor]):
    """As the outputs of a well-known library: a dictionary with attributes."""


Pair = namedtuple("Pair", ["first", "second"])


class Half(nn.Module):
    """Convolutions in another type than the frames."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1).to(dtype)
        self.b = nn.Conv2d(4, 2, 1).to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x.to(self.dtype)))).float()
        return y


def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = m.b(torch.relu(m.a(x)))
        return y.float()


def in_numpy(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y.detach().numpy()[:] *= 0.5
    return m.b(y)


def written(write: Callable[[Tensor], Any]) -> Forward:
    """A network that writes to a layer's output by one of torch's ways."""

    def call(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        write(y)
        return m.b(y)

    return call


def as_array(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    np.asarray(y)[:, 0] = 0.0
    return m.b(y)


def attributes(m: Any, x: Tensor) -> Any:
    stride, width = m.a.stride[0], m.b.in_channels
    y = m.a(x.to(m.a.weight.dtype).to(next(m.parameters()).device))
    assert isinstance(m.a, nn.Conv2d)
    return m.b(y.repeat_interleave(stride, 2)[:, :width]) * len(m.a.kernel_size)


def carrying_gradients() -> Any:
    network: Any = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    network(torch.rand(1, 3, *SIZE)).sum().backward()
    network.memory = network.a(torch.rand(1, 3, *SIZE))  # a tensor with a graph
    return network


def pruned(permanent: bool) -> nn.Module:
    network: Any = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    for layer in (network.a, network.b):
        prune.l1_unstructured(layer, "weight", 0.3)
        prune.random_unstructured(layer, "weight", 0.2)
        if permanent:
            prune.remove(layer, "weight")
    if not permanent:
        network.a.weight_orig.data.mul_(2.0)  # the computed weight is stale until a call
    laid: nn.Module = network
    return laid


def old_norm(norm: Callable[..., nn.Module]) -> nn.Module:
    network = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm(network.a)
    return network


def normalised() -> nn.Module:
    network = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    parametrizations.weight_norm(network.a)
    parametrizations.orthogonal(network.b)
    return network


def program_of(device: str) -> Any:
    """A program that makes a tensor on the device that it was exported on."""
    network: Any = exported(Net(lambda m, x: m.b(m.a(x) + torch.ones(4, 1, 1, device=x.device))))
    for node in network.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device(device)}
    network.recompile()
    return network


def exported(network: nn.Module) -> Any:
    """The module of an exported program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = {"x": {0: torch.export.Dim("clips", min=1, max=64)}}
        return torch.export.export(network.eval(), (torch.rand(2, 3, *SIZE),), dynamic_shapes=shapes).module()


def squeeze(m: Any, x: Tensor) -> Any:
    y = F.silu(m.a(x))
    y = y * torch.sigmoid(m.c(y.mean((2, 3), keepdim=True)))
    return m.d(y.mean((2, 3)))


def by_slices(m: Any, x: Tensor) -> Any:
    y, weight = F.pad(m.a(x), (1, 1, 1, 1)), m.b.weight
    taps = (y[:, :, i : i + 8, j : j + 8] * weight[None, :, 0, i, j, None, None] for i in range(3) for j in range(3))
    return sum(taps)


def by_rolls(m: Any, x: Tensor) -> Any:
    out = torch.zeros(len(x), 4, 8, 8)
    y = m.a(x)
    for shift in range(4):
        out[:, 1:3] += m.weight[0, shift] * y.roll(shift, 3)[:, 1:3]
    return out


def by_unfold(m: Any, x: Tensor) -> Any:
    columns = F.unfold(m.a(x), 3, padding=1)
    return (columns[:, None] * m.b.weight.flatten(1)[None, :, :, None]).sum(2).unflatten(-1, SIZE)


def by_buffer(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    buffer = torch.empty(4, len(x), 4, 8, 8)
    for k in range(4):
        buffer[k] = y.roll(k, 2) * m.weight[0, k]
    return buffer.sum(0)


def layer_norm(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y = y - y.mean(1, keepdim=True)
    y = y / (y.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * m.weight + 0.1
    return m.d(y.mean((2, 3)))


def rms_norm(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.d((y * torch.rsqrt((y * y).mean(1, keepdim=True) + 1e-3)).mean((2, 3)))


def boxes(m: Any, x: Tensor) -> Any:
    y = m.a(x).sigmoid()
    centre, extent = y[:, :2] * 2 - 0.5, (y[:, 2:] * 2) ** 2
    return torch.cat([centre - extent / 2, centre + extent / 2], 1)


def remembers(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    out = m.b(y) if m.memory is None or m.memory.shape != y.shape else m.b(y + 0.5 * m.memory)
    m.memory = y.detach()
    return out


def keeps_a_key(m: Any, x: Tensor) -> Any:
    if m.calls % 8 == 0 or m.memory.shape[0] != len(x):
        m.memory = m.a(x).detach()
    m.calls += 1
    return m.b(m.a(x) - m.memory)


def averages(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    m.weight.data.mul_(0.5).add_(0.5 * y.detach().mean((0, 2, 3), keepdim=True))
    return m.b(y * m.weight)


def keeps_features(m: Any, x: Tensor) -> Any:
    m.memory = m.a(x).detach()  # for a caller to look at
    m.calls += 1
    return m.b(torch.relu(m.memory))


def channels_last() -> nn.Module:
    network: Any = Net(lambda m, x: m.b(torch.relu(m.a(x))))
    laid: nn.Module = network.to(memory_format=torch.channels_last)
    return laid


def returns_features(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return {"scores": m.b(y), "features": [y]}


def both_gates(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return y * m.c(y).sigmoid() + y * m.c(y.mean((2, 3), keepdim=True)).sigmoid()


def haar(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b((y[:, :, ::2, ::2] + y[:, :, 1::2, ::2] - y[:, :, ::2, 1::2]) / 2)


def linear_clamped(m: Any, x: Tensor) -> Any:
    return m.d(m.c(m.a(x).mean((2, 3))).data.clamp_(0))


def swish(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.d((y * y.sigmoid()).mean((2, 3)))


def hard_swish(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return (y * F.relu6(y + 3) / 6).mean((2, 3))


def two_sizes(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x), output_size=[15, 15]).mean((2, 3), True) + m.c(m.a(x), [16, 16])


def grey(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x)) + 0.3 * x[:, :1] + 0.6 * x[:, 1:2] + 0.1 * x[:, 2:]


def blur(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return y.roll(1, 2) + 2 * y + y.roll(-1, 2)


def folded(m: Any, x: Tensor) -> Any:
    return F.fold(F.unfold(m.a(x), 3) * m.weight.repeat(1, 9, 1, 1)[0, :, 0], 8, 3)


def spatial_attention(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    query, key, value = (part.flatten(2) for part in (y, m.b(y), y.relu()))
    places = (query.transpose(1, 2) @ key).softmax(-1)
    return m.b((value @ places.transpose(1, 2)).unflatten(2, SIZE))


def channel_attention(m: Any, x: Tensor) -> Any:
    y = m.a(x).flatten(2)
    energy = torch.bmm(y, y.transpose(1, 2))
    return m.b(torch.matmul((energy.amax(-1, keepdim=True) - energy).softmax(-1), y).unflatten(2, SIZE))


def fused_attention(m: Any, x: Tensor) -> Any:
    query, key, value = m.c(m.a(x).flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return m.b(y.transpose(1, 2).unflatten(2, SIZE))


def sdpa(**settings: Any) -> Forward:
    """Attention over 8 rows, whose heads are channels: 4 of the queries, and 2 of keys and values if grouped."""

    def call(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        other = y[:, :2] if settings.get("enable_gqa") else y
        return m.b(F.scaled_dot_product_attention(y, other.flip(2), other.relu(), **settings))

    return call


def multihead(m: Any, x: Tensor, **settings: Any) -> Any:
    """Attention of 64 pixels to those of another layer, in the arrangement that the module wants."""
    tokens = [m.a(x).flatten(2).mT, m.b(m.a(x)).flatten(2).mT.contiguous()]
    query, other = tokens if m.c.batch_first else [t.transpose(0, 1) for t in tokens]
    y, weights = m.c(query, other[..., : m.c.kdim], other[..., : m.c.vdim], **settings)
    return y if m.c.batch_first else y.transpose(0, 1), weights


def encoder(m: Any, x: Tensor) -> Any:
    return m.c(m.a(x).flatten(2).transpose(1, 2))


def attention() -> nn.Module:
    return nn.MultiheadAttention(4, 2, batch_first=True)


def up(stride: int = 2, padding: int = 0) -> nn.Module:
    return nn.ConvTranspose2d(4, 2, 3, stride, padding)


def viewed(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(torch.as_strided(y, (len(x), 4, 8, 8), (256, 64, 1, 8)))


ACCEPTED: dict[str, Callable[[], nn.Module]] = {
    # Types inside the network
    "float64": lambda: Half(torch.float64),
    "float16": lambda: Half(torch.float16),
    "bfloat16": lambda: Half(torch.bfloat16),
    "autocast": lambda: Net(under_autocast),
    "double_between": lambda: Net(lambda m, x: m.b(torch.relu(m.a(x).double()).float())),
    # Outputs
    "dataclass": lambda: Net(lambda m, x: Logits(m.b(m.a(x)))),
    "object": lambda: Net(lambda m, x: Record(m.b(m.a(x)))),
    "named_tuple": lambda: Net(lambda m, x: Pair(m.b(m.a(x)), m.a(x))),
    "model_output": lambda: Net(lambda m, x: ModelOutput(logits=m.b(m.a(x)))),
    "nested": lambda: Net(lambda m, x: {"out": [Logits(m.b(m.a(x))), (None, "name")]}),
    "returns_features": lambda: Net(returns_features),
    # Writes that autograd does not see
    "data_clamp": lambda: Net(written(lambda y: y.data.clamp_(-0.1, 0.1))),
    "data_rarely": lambda: Net(written(lambda y: y.data.clamp_(max=1e6))),
    "detach_mul": lambda: Net(written(lambda y: y.detach().mul_(0.5))),
    "detach_slice": lambda: Net(written(lambda y: y.detach()[:, 1].zero_())),
    "numpy": lambda: Net(in_numpy),
    "asarray": lambda: Net(as_array),
    "dlpack": lambda: Net(written(lambda y: torch.utils.dlpack.from_dlpack(y.detach()).add_(1.0))),
    "set_item": lambda: Net(written(lambda y: y.__setitem__((slice(None), 0), 0.0))),
    "out": lambda: Net(written(lambda y: torch.clamp(y, 0, 1, out=y))),
    "linear_data": lambda: Net(linear_clamped, c=nn.Linear(4, 4), d=nn.Linear(4, 2)),
    "transposed_data": lambda: Net(lambda m, x: m.b(m.c(x).data.clamp_(-0.2, 0.2)), c=nn.ConvTranspose2d(3, 4, 2, 2)),
    # Elementwise work and pooling
    "squeeze_excitation": lambda: Net(squeeze, c=nn.Conv2d(4, 4, 1), d=nn.Linear(4, 2)),
    "swish_by_hand": lambda: Net(swish, d=nn.Linear(4, 2)),
    "hard_swish_by_hand": lambda: Net(hard_swish),
    "spatial_gate": lambda: Net(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.a(x).amax(1, keepdim=True)))),
    "both_gates": lambda: Net(both_gates, c=nn.Conv2d(4, 4, 1)),
    "group_norm": lambda: Net(lambda m, x: m.b(m.c(m.a(x))).mean((2, 3)), c=nn.GroupNorm(2, 4)),
    "instance_norm": lambda: Net(lambda m, x: m.b(m.c(m.a(x))), c=nn.InstanceNorm2d(4, affine=True)),
    "layer_norm_by_hand": lambda: Net(layer_norm, d=nn.Linear(4, 2)),
    "rms_norm_by_hand": lambda: Net(rms_norm, d=nn.Linear(4, 2)),
    "softmax_by_hand": lambda: Net(lambda m, x: (lambda e: e / e.sum(1, keepdim=True))(torch.exp(m.a(x)))),
    "layer_scale": lambda: Net(lambda m, x: m.b(m.a(x) + m.weight * torch.relu(m.b(m.a(x)))).mean(1)),
    "weighted_fusion": lambda: Net(lambda m, x: m.b(0.2 * m.a(x) + 0.3 * m.b(m.a(x)) + 0.5 * torch.relu(m.a(x)))),
    "box_corners": lambda: Net(boxes),
    "haar": lambda: Net(haar),
    "standardised_input": lambda: Net(lambda m, x: m.b(m.a((x - torch.tensor([[[0.4]], [[0.5]], [[0.6]]])) / 0.2))),
    "resizing": lambda: Net(lambda m, x: F.interpolate(m.b(F.avg_pool2d(m.a(x), 2)), SIZE, mode="bilinear")),
    "constant_product": lambda: Net(lambda m, x: m.b(m.a(x)) + m.weight.flatten() @ m.weight.flatten()),
    # Products of activations
    "spatial_attention": lambda: Net(spatial_attention),
    "channel_attention": lambda: Net(channel_attention),
    "fused_attention": lambda: Net(fused_attention, c=nn.Linear(4, 12)),
    "multihead_attention": lambda: Net(lambda m, x: m.c(*[m.a(x).flatten(2).mT] * 3), c=attention()),
    "encoder_layer": lambda: Net(encoder, c=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
    "fixed_factor": lambda: Net(lambda m, x: m.b(m.a(x) @ m.c.weight), c=nn.Linear(8, 8)),
    "einsum": lambda: Net(lambda m, x: torch.einsum("nchw,oc->nohw", m.a(x), m.b.weight[..., 0, 0])),
    "einsum_of_three": lambda: Net(lambda m, x: torch.einsum("nchw,nchv,ndhw->nvd", m.a(x), m.a(x), m.b(m.a(x)))),
    "baddbmm": lambda: Net(
        lambda m, x: torch.baddbmm(m.a(x)[:, 0], m.a(x)[:, 1], m.a(x)[:, 2].mT, beta=0.5, alpha=2.0)
    ),
    "addbmm": lambda: Net(lambda m, x: torch.stack([torch.addbmm(y[0], y, y.mT) for y in m.a(x)])),
    "outer": lambda: Net(lambda m, x: m.a(x).flatten(2)[:, :, :, None] @ m.a(x).flatten(2)[:, :, None, :8]),
    "masked": lambda: Net(sdpa(attn_mask=torch.eye(8).bool() | (torch.arange(8) < 3))),
    "biased": lambda: Net(sdpa(attn_mask=torch.linspace(-2, 2, 64).view(8, 8))),
    "causal": lambda: Net(sdpa(is_causal=True)),
    "scaled": lambda: Net(sdpa(scale=0.9)),
    "grouped": lambda: Net(sdpa(enable_gqa=True)),
    "cross_attention": lambda: Net(lambda m, x: multihead(m, x)[0], c=nn.MultiheadAttention(4, 2, kdim=3, vdim=2)),
    "padded_attention": lambda: Net(
        lambda m, x: multihead(m, x, key_padding_mask=(torch.arange(64) > 40).expand(len(x), -1)), c=attention()
    ),
    "masked_attention": lambda: Net(
        lambda m, x: multihead(
            m, x, attn_mask=torch.linspace(-1, 1, 2 * 4096).view(2, 64, 64).repeat(len(x), 1, 1), need_weights=False
        )[0],
        c=attention(),
    ),
    "attention_by_head": lambda: Net(lambda m, x: multihead(m, x, average_attn_weights=False), c=attention()),
    "attention_with_more_keys": lambda: Net(
        lambda m, x: multihead(m, x)[0], c=nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True)
    ),
    "decoder_layer": lambda: Net(
        lambda m, x: m.c(m.a(x).flatten(2).mT, m.b(m.a(x)).flatten(2).mT),
        c=nn.TransformerDecoderLayer(4, 2, 8, batch_first=True),
    ),
    "gru": lambda: Net(lambda m, x: m.c(m.a(x).flatten(2))[0], c=nn.GRU(64, 5, batch_first=True)),
    # Convolutions along one axis
    "one_tap": lambda: Net(lambda m, x: m.b(m.c(m.a(x).flatten(2)).unflatten(2, SIZE)), c=nn.Conv1d(4, 4, 1)),
    "rows": lambda: Net(lambda m, x: m.c(m.a(x).flatten(2)), c=nn.Conv1d(4, 6, 5, 2, 3, groups=2)),
    "channel_gate": lambda: Net(
        lambda m, x: m.b(m.a(x) * m.c(m.a(x).mean((2, 3))[:, None]).sigmoid().view(-1, 4, 1, 1)),
        c=nn.Conv1d(1, 1, 3, padding="same", bias=False),
    ),
    "program_of_rows": lambda: exported(
        Net(
            lambda m, x: m.d(m.c(m.a(x).flatten(2))),
            c=nn.Conv1d(4, 6, 5, 2, 3, groups=2, dilation=2),
            d=nn.Conv1d(6, 2, 1),
        )
    ),
    "program_of_attention": lambda: exported(Net(fused_attention, c=nn.Linear(4, 12))),
    # Ways of calling layers
    "output_size": lambda: Net(lambda m, x: m.c(m.a(x).relu(), output_size=(16, 15)), c=up(2, 1)),
    "output_sizes": lambda: Net(two_sizes, c=up(2, 1)),
    "keyword": lambda: Net(lambda m, x: m.b(input=torch.relu(m.a(input=x)))),
    "attributes": lambda: Net(attributes),
    "linear_attributes": lambda: Net(lambda m, x: m.c(m.a(x).flatten(1)[:, : m.c.in_features]), c=nn.Linear(9, 2)),
    "call_forward": lambda: Net(lambda m, x: m.b.forward(m.a.__call__(x))),
    "batch_norm_keyword": lambda: Net(lambda m, x: m.c(input=m.a(x)), c=nn.BatchNorm2d(4)),
    # Weights
    "gradients": carrying_gradients,
    "pruned": lambda: pruned(False),
    "pruned_for_good": lambda: pruned(True),
    "parametrized": normalised,
    "old_weight_norm": lambda: old_norm(nn.utils.weight_norm),
    "old_spectral_norm": lambda: old_norm(nn.utils.spectral_norm),
    "program": lambda: exported(Net(lambda m, x: m.b(F.silu(m.a(x))))),
    "program_of_another_device": lambda: program_of("cuda:0"),
    # Layout
    "view": lambda: Net(lambda m, x: m.b(m.a(x).view(len(x), 2, 2, 64).transpose(1, 2).reshape(len(x), 4, 8, 8))),
    "as_strided": lambda: Net(viewed),
    "channels_last_weights": channels_last,
    # State that changes nothing
    "keeps_features": lambda: Net(keeps_features),
}  # fmt: skip

REFERENCES = {"program_of_another_device": lambda: program_of("cpu")}
"""What stands for a network that cannot run here by itself."""

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # Dependence on more than the frame
    "memory": (lambda: Net(remembers), "Net gives another output .* memory"),
    "key_memory": (lambda: Net(keeps_a_key), "Net gives another output"),
    "running_average": (lambda: Net(averages), "Net gives another output .* memory"),
    "first_clip": (lambda: Net(lambda m, x: m.a(x - x[:1].mean())), "Net gives another output for a clip"),
    "last_clip": (lambda: Net(lambda m, x: m.a(x - x[-1:].mean())), "Net gives another output for a clip"),
    "second_clip": (lambda: Net(lambda m, x: m.a(x) - x[1:2].mean()), "Net gives another output for a clip"),
    "flipped_clips": (lambda: Net(lambda m, x: m.a(x) + m.a(x).flip(0)), "Net gives another output for a clip"),
    "batch_size": (lambda: Net(lambda m, x: m.a(x) / len(x)), "Net gives another output for a clip"),
    "batch_softmax": (lambda: Net(lambda m, x: m.a(x).softmax(0)), "Net gives another output for a clip"),
    "in_a_dataclass": (lambda: Net(lambda m, x: Logits(m.a(x) - x.mean())), "Net gives another output for a clip"),
    "in_an_object": (lambda: Net(lambda m, x: Record(m.a(x) - x.mean())), "Net gives another output for a clip"),
    "of_classes": (lambda: Net(lambda m, x: (m.a(x) - m.a(x).mean((0, 2, 3), True)).argmax(1)), "another output"),
    "opaque_output": (lambda: Net(lambda m, x: (lambda y: lambda: y)(m.a(x))), "output holds a function"),
    "no_tensor": (lambda: Net(lambda m, x: float(m.a(x).sum())), "Net returns no tensor"),
    "noise": (lambda: Net(lambda m, x: m.a(x) + torch.randn(1)), "Net draws random numbers"),
    "seeded": (lambda: Net(lambda m, x: m.a(x) + torch.manual_seed(0).initial_seed() + torch.rand(1)), "Net draws ran"),
    "numpy_noise": (lambda: Net(lambda m, x: m.a(x) + np.random.rand()), "Net draws random numbers"),  # noqa: NPY002
    "python_noise": (lambda: Net(lambda m, x: m.a(x) + random.random()), "Net gives another output"),
    # Multiply-accumulates that nothing counts
    "unfold": (lambda: Net(by_unfold), "product of tensors that is summed .* in the network's forward"),
    "slices": (lambda: Net(by_slices), "sum of 3 parts of one tensor with different factors in the network's forward"),
    "rolls": (lambda: Net(by_rolls), "sum of 3 parts of one tensor with different factors"),
    "buffer": (lambda: Net(by_buffer), "product of tensors that is summed"),
    "grey": (lambda: Net(grey), "sum of 3 parts"),
    "blur": (lambda: Net(blur), "sum of 3 parts"),
    "broadcast_matmul": (lambda: Net(lambda m, x: (m.a(x)[:, None] * m.b.weight[..., :1, :1]).sum(2)), "product of"),
    "scaled_product": (lambda: Net(lambda m, x: (m.a(x) * m.weight * 2).sum(1)), "product of tensors that is summed"),
    "moved_product": (lambda: Net(lambda m, x: (m.a(x) * m.weight).permute(0, 2, 3, 1).mean(-1)), "product of"),
    "in_place_product": (lambda: Net(lambda m, x: m.a(x).clone().mul_(m.weight).sum(1)), "product of tensors"),
    "dot_product": (lambda: Net(lambda m, x: (m.a(x) * m.b(m.a(x))).sum(1)), "product of tensors that is summed"),
    "attention_pooling": (lambda: Net(lambda m, x: (m.a(x) * m.b(m.a(x)).softmax(3)).mean((2, 3))), "product of t"),
    "correlation": (lambda: Net(lambda m, x: (m.a(x) * m.a(x).roll(1, 3)).sum((2, 3))), "product of tensors"),
    "weighted_window": (lambda: Net(lambda m, x: F.avg_pool2d(m.a(x) * torch.linspace(0, 1, 8), 3)), "product of"),
    "addcmul": (lambda: Net(lambda m, x: torch.addcmul(torch.zeros(1), m.a(x), m.weight).sum(1)), "product"),
    "fold": (lambda: Net(folded), "product"),
    "cumulated": (lambda: Net(lambda m, x: (m.a(x) * m.weight).cumsum(1)[:, -1]), "product of tensors that is summed"),
    "dropped": (lambda: Net(sdpa(dropout_p=0.5)), "Net draws random numbers"),
    "two_taps_back": (
        lambda: Net(lambda m, x: m.c(m.a(x).flatten(2)), c=nn.ConvTranspose1d(4, 2, 2)),
        "convolution in layer 'c'",
    ),
    "lstm": (lambda: Net(lambda m, x: m.c(m.a(x).flatten(2))[0], c=nn.LSTM(64, 5, batch_first=True)), "in layer 'c'"),
    "functional": (lambda: Net(lambda m, x: F.conv2d(m.a(x), m.b.weight * 2)), "convolution in the network"),
    "in_a_layer": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Net(lambda m, x: (x * m.weight).sum(1))), "in layer '1'"),
    # Calls, weights and devices
    "script": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), "TorchScript .* torch.export"),
    "script_inside": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(nn.Conv2d(3, 3, 1))), "'1' is a "),
    "impossible_size": (lambda: Net(lambda m, x: m.c(m.a(x), output_size=(40, 40)), c=up()), "cannot run"),
    "meta": (lambda: Net(lambda m, x: m.b(m.a(x))).to("meta"), "on meta, the example lies on cpu"),
}  # fmt: skip
