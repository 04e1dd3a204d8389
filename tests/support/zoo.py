"""The zoo: one row per layer type and per trap that broke some converter, as small as it can be and still show it.

A row states the axes of every parameter that must be converted, by hand: the tests decode from these, never from the
library's own layer table, so a wrong view there makes its row fail.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One animal.

    Args:
        build: makes the dense model; arguments come from `inputs`, which draws them from the generator.
        views: dotted parameter path = its stored axes, for everything that is converted; aliases included.
        lookups: the paths among them that are read by rows (embeddings).
        zero_rows: path = padding row that random codes leave at zero.
        rules: extra rules, as (pattern, settings).
        parametrized: by torch, which makes a class for every module: it does not pickle, and a copy has a class of its own.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    views: Mapping[str, str]
    lookups: tuple[str, ...] = ()
    zero_rows: Mapping[str, int] = field(default_factory=dict)
    rules: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    dtype: torch.dtype = torch.float32
    parametrized: bool = False


class OwnForward(nn.Linear):
    """A Linear whose forward is not Linear's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tanh(), self.bias) * 3


class Adapter(ABC, Generic[T]):
    """What libraries put before a torch layer; its objects are laid out in another way than a module's."""

    @abstractmethod
    def name(self) -> str: ...


class AdaptedLinear(Adapter[int], nn.Linear):
    def name(self) -> str:
        return "adapted"


class Standardised(nn.Conv2d):
    """A Conv2d that standardises its weight, as in BiT; its epsilon is large, or the scales' gradients would cancel."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, var = w.mean(dim=(1, 2, 3), keepdim=True), w.var(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean) / (var + 1).sqrt(), self.bias, self.stride, self.padding)


class ScaledEmbedding(nn.Embedding):
    """Gemma's embedding: rows times a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 7.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh())


class Twice(nn.Module):
    """One module under two names, and once more in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.more = nn.ModuleList([self.first, nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.more[1](self.second(self.first(x).tanh()))


class Experts(nn.Module):
    """Fused mixture-of-experts weights, in transformers' names."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (6, 10), (5, 6)
        order = (lambda s: s) if is_transposed else (lambda s: s[::-1])
        self.gate_up_proj = nn.Parameter(torch.randn(3, *order(up)))
        self.down_proj = nn.Parameter(torch.randn(3, *order(down)))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, value = torch.bmm(x, up).chunk(2, dim=-1)
        return torch.bmm(gate.sigmoid() * value, down)


class Scorer(nn.Module):
    """A raw parameter, which only a rule can name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 9), nn.Sequential(nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 4)))
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.offset


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def shift(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 1,)


def hooked() -> nn.Module:
    layer = nn.Linear(6, 8)
    layer.register_forward_hook(double)
    layer.register_forward_pre_hook(shift)
    return layer


class Relative(nn.Module):
    """XLNet's attention, whose weights are raw parameters [width, heads, head size]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import XLNetConfig
        from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

        self.attention = XLNetRelativeAttention(XLNetConfig(d_model=6, n_head=3, d_inner=8, dropout=0.0))
        for p in self.attention.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.attention(x, None, None, None, r, None)[0]


class Calls(nn.Module):
    """A module of transformers, its parameters drawn anew (most wait for an initialisation by their model) and its call."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.layer, *inputs)


def jetmoe() -> nn.Module:
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    return Calls(JetMoeParallelExperts(3, 6, 5), split_evenly)


def split_evenly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, [2, 1, 3])


def csm() -> nn.Module:
    from transformers.models.csm.modeling_csm import CsmCodebooksHead

    return Calls(CsmCodebooksHead(6, 4, 5), second_and_third)


def second_and_third(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, torch.tensor([1, 2]))


def gated() -> nn.Module:
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    return Calls(RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=8, num_attention_heads=2)), from_the_start)


def from_the_start(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, torch.arange(x.shape[1])[None])


def funnel() -> nn.Module:
    from transformers import FunnelConfig
    from transformers.models.funnel.modeling_funnel import FunnelRelMultiheadAttention

    config = FunnelConfig(d_model=6, n_head=2, d_head=4, d_inner=8, attention_type="factorized")
    config.attention_dropout = config.hidden_dropout = 0.0
    return Calls(FunnelRelMultiheadAttention(config, 0).eval(), at_positions)


def at_positions(layer: nn.Module, x: Tensor, *positions: Tensor) -> Tensor:
    return layer(x, x, x, (positions, None, torch.ones(len(x), x.shape[1]), None))[0]


def simulated(kind: str) -> nn.Module:
    """I-BERT's layers, which are no subclass of torch's and return a pair."""
    from transformers.models.ibert import quant_modules

    return Calls(getattr(quant_modules, kind)(11, 8), first_of)


def first_of(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2)  # per position, as in Wav2Vec2


def spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)))


@torch.no_grad()  # a weight with a history cannot be copied
def old_weight_norm() -> nn.Module:
    return nn.utils.weight_norm(nn.Conv1d(4, 6, 3), dim=2)  # of outputs, scales would cancel and have no gradient


@torch.no_grad()
def old_weight_norm_of_inputs() -> nn.Module:
    return nn.utils.weight_norm(nn.ConvTranspose1d(4, 6, 3))  # as HiFi-GAN's ups


@torch.no_grad()
def old_spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)).eval())


@torch.no_grad()
def pruned() -> nn.Module:
    layer = nn.Linear(6, 8)
    nn.utils.prune.l1_unstructured(layer, "weight", 0.3)
    return layer


class OtherLinear(nn.Module):
    """A linear layer of another library (PyG's, Megatron's): no subclass of torch's, and square."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels = 6, 6
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MyLinear(nn.Module):
    """A linear layer that says nothing of its sizes, stored the other way round, as its bias shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.zeros(9))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class EqualizedConv(nn.Module):
    """StyleGAN's: a convolution with a gain, whose class is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels = 3, 5
        self.weight = nn.Parameter(torch.randn(5, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.2, padding=1)


def orthogonal() -> nn.Module:
    return nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), use_trivialization=False)


def hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 6)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda g: (torch.randn(shape, generator=g).to(dtype),)


def normals(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda g: tuple(torch.randn(s, generator=g) for s in shapes)


def ids(high: int, *shape: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda g: (torch.randint(high, shape, generator=g),)


def bags(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (9,), generator=g), torch.tensor([0, 4, 4, 6])


def _layer(name: str, build: Any, inputs: Any, view: str, **kw: Any) -> Row:
    """A row of one layer with one parameter `weight`."""
    return Row(name, build, inputs, {"weight": view}, **kw)


def _embedding(name: str, build: Any, inputs: Any = None, zero: int | None = None) -> Row:
    zeros = {} if zero is None else {"weight": zero}
    return Row(name, build, inputs or ids(11, 2, 6), {"weight": "out in"}, ("weight",), zeros)


LINEAR, CONV1, CONV2, CONV3 = "out in", "out in k", "out in kh kw", "out in kd kh kw"
UP1, UP2, UP3 = "in out k", "in out kh kw", "in out kd kh kw"

ZOO = [
    _layer("Linear", lambda: nn.Linear(6, 9), normal(2, 6), LINEAR),
    _layer("Linear no bias", lambda: nn.Linear(10, 7, bias=False), normal(2, 10), LINEAR),
    _layer("Linear one output", lambda: nn.Linear(10, 1), normal(2, 10), LINEAR),
    _layer("Linear own forward", lambda: OwnForward(6, 8), normal(2, 6), LINEAR),
    _layer("Linear hooks", hooked, normal(2, 6), LINEAR),
    _layer(
        "Linear bf16",
        lambda: nn.Linear(6, 9).bfloat16(),
        normal(2, 6, dtype=torch.bfloat16),
        LINEAR,
        dtype=torch.bfloat16,
    ),
    _layer(
        "Linear fp64", lambda: nn.Linear(6, 9).double(), normal(2, 6, dtype=torch.float64), LINEAR, dtype=torch.float64
    ),
    _layer("Conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), normal(2, 4, 9), CONV1),
    _layer(
        "Conv1d dilated circular",
        lambda: nn.Conv1d(4, 6, 3, dilation=2, padding=2, padding_mode="circular"),
        normal(2, 4, 9),
        CONV1,
    ),
    _layer("Conv2d", lambda: nn.Conv2d(3, 5, (2, 3), stride=(1, 2), padding=(1, 0)), normal(2, 3, 6, 7), CONV2),
    _layer(
        "Conv2d groups reflect",
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect"),
        normal(1, 4, 5, 5),
        CONV2,
    ),
    _layer(
        "Conv2d same", lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False), normal(1, 3, 6, 6), CONV2
    ),
    _layer("Conv2d depthwise", lambda: nn.Conv2d(6, 6, 3, groups=6), normal(1, 6, 5, 5), CONV2),
    _layer("Conv2d standardised", lambda: Standardised(3, 5, 3, padding=1), normal(1, 3, 5, 5), CONV2),
    _layer("Conv3d", lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1)), normal(1, 2, 3, 5, 5), CONV3),
    _layer("ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), normal(2, 4, 5), UP1),
    _layer(
        "ConvTranspose2d groups",
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, padding=1),
        normal(1, 4, 4, 5),
        UP2,
    ),
    _layer(
        "ConvTranspose3d",
        lambda: nn.ConvTranspose3d(3, 4, (1, 2, 2), stride=2, output_padding=1),
        normal(1, 3, 2, 3, 3),
        UP3,
    ),
    _layer("Bilinear", lambda: nn.Bilinear(3, 4, 5), normals((2, 3), (2, 4)), "out in in2"),
    _layer("transformers Conv1D", hf_conv1d, normal(2, 6), "in out"),
    _embedding("Embedding", lambda: nn.Embedding(11, 8)),
    _embedding("Embedding odd width", lambda: nn.Embedding(11, 7)),
    _embedding("Embedding padding", lambda: nn.Embedding(11, 8, padding_idx=2), zero=2),
    _embedding("Embedding negative padding", lambda: nn.Embedding(11, 8, padding_idx=-1), zero=10),
    _embedding("Embedding max_norm", lambda: nn.Embedding(11, 8, max_norm=0.5)),
    _embedding("Embedding frequency", lambda: nn.Embedding(11, 8, scale_grad_by_freq=True)),
    _embedding("Embedding sparse", lambda: nn.Embedding(11, 8, sparse=True)),
    _embedding("Embedding scaled", lambda: ScaledEmbedding(11, 8, padding_idx=0), zero=0),
    _embedding("EmbeddingBag mean", lambda: nn.EmbeddingBag(11, 8), bags),
    _embedding("EmbeddingBag sum", lambda: nn.EmbeddingBag(11, 8, mode="sum", padding_idx=3), bags, zero=3),
    _embedding("EmbeddingBag max", lambda: nn.EmbeddingBag(11, 8, mode="max")),
    Row(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        normals(*[(2, 3, 8)] * 3),
        {"in_proj_weight": LINEAR, "out_proj.weight": LINEAR},
    ),
    Row(
        "MultiheadAttention kdim",
        lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6),
        normals((3, 2, 8), (4, 2, 5), (4, 2, 6)),
        {"q_proj_weight": LINEAR, "k_proj_weight": LINEAR, "v_proj_weight": LINEAR, "out_proj.weight": LINEAR},
    ),
    Row(
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        normal(2, 3, 8),
        {
            "self_attn.in_proj_weight": LINEAR,
            "self_attn.out_proj.weight": LINEAR,
            "linear1.weight": LINEAR,
            "linear2.weight": LINEAR,
        },
    ),
    Row(
        "experts",
        lambda: Experts(False),
        normal(3, 2, 6),
        {"gate_up_proj": "expert out in", "down_proj": "expert out in"},
    ),
    Row(
        "experts transposed",
        lambda: Experts(True),
        normal(3, 2, 6),
        {"gate_up_proj": "expert in out", "down_proj": "expert in out"},
    ),
    Row(
        "XLNet attention",
        Relative,
        normals((4, 2, 6), (8, 2, 6)),
        {**{f"attention.{n}": "in expert out" for n in "qkvr"}, "attention.o": "out in in2"},
    ),
    Row("JetMoE experts", jetmoe, normal(6, 6), {"layer.weight": "expert out in"}),
    Row("CSM head", csm, normal(2, 2, 6), {"layer.weight": "expert in out"}),
    Row(
        "RecurrentGemma gates",
        gated,
        normal(2, 3, 8),
        dict.fromkeys(("layer.input_gate_weight", "layer.recurrent_gate_weight"), "expert in out"),
    ),
    Row(
        "Funnel attention",
        funnel,
        normals((2, 3, 6), *[(3, 6)] * 4),
        {f"layer.{n}_head.weight": LINEAR for n in "qkv"}
        | {"layer.post_proj.weight": LINEAR, "layer.r_kernel": "in expert out"},
    ),
    Row("I-BERT linear", lambda: simulated("QuantLinear"), normal(2, 11), {"layer.weight": LINEAR}),
    Row(
        "I-BERT embedding",
        lambda: simulated("QuantEmbedding"),
        ids(11, 2, 6),
        {"layer.weight": LINEAR},
        ("layer.weight",),
    ),
    Row("weight norm", weight_norm, normal(2, 4, 7), {"parametrizations.weight.original1": CONV1}, parametrized=True),
    Row(
        "spectral norm", spectral_norm, normal(2, 6), {"0.parametrizations.weight.original": LINEAR}, parametrized=True
    ),
    Row("orthogonal", orthogonal, normal(2, 6), {"parametrizations.weight.original": LINEAR}, parametrized=True),
    _layer("Linear behind an abstract generic class", lambda: AdaptedLinear(6, 9), normal(2, 6), LINEAR),
    Row("old weight norm", old_weight_norm, normal(2, 4, 7), {"weight_v": CONV1}),
    Row("old weight norm of inputs", old_weight_norm_of_inputs, normal(2, 4, 7), {"weight_v": UP1}),
    Row("old spectral norm", old_spectral_norm, normal(2, 6), {"0.weight_orig": LINEAR}),
    Row("pruned", pruned, normal(2, 6), {"weight_orig": LINEAR}),
    _layer("Linear of another library", OtherLinear, normal(2, 6), LINEAR),
    _layer("Linear of its own, turned", MyLinear, normal(2, 6), "in out"),
    _layer("convolution of its own", EqualizedConv, normal(1, 3, 5, 5), CONV2),
    Row(
        "LSTM",
        lambda: nn.LSTM(5, 6, 2, bidirectional=True, proj_size=4),
        normal(3, 2, 5),
        {
            f"weight_{part}_l{layer}{way}": LINEAR
            for part in ("ih", "hh", "hr")
            for layer in (0, 1)
            for way in ("", "_reverse")
        },
    ),
    Row(
        "GRU no bias",
        lambda: nn.GRU(5, 6, bias=False),
        normal(3, 2, 5),
        dict.fromkeys(("weight_ih_l0", "weight_hh_l0"), LINEAR),
    ),
    Row("GRUCell", lambda: nn.GRUCell(5, 6), normal(2, 5), dict.fromkeys(("weight_ih", "weight_hh"), LINEAR)),
    Row("raw parameter", Scorer, normal(2, 7), {"table": "in out"}, rules=(("table", {"view": "in out"}),)),
    Row(
        "shared module",
        Twice,
        normal(2, 6),
        dict.fromkeys(("first.weight", "second.weight", "more.0.weight", "more.1.weight"), LINEAR),
    ),
    Row(
        "tied",
        Tied,
        ids(11, 2, 6),
        {"embed.weight": "out in", "head.weight": "out in"},
        ("embed.weight", "head.weight"),
    ),
    Row("nested", Nested, normal(2, 5), {"body.0.weight": LINEAR, "body.1.2.weight": LINEAR}),
]
BY_NAME = {row.name: row for row in ZOO}
