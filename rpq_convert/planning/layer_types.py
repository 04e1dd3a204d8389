"""Layer types: which parameters of which classes are weights, and what their axes mean.

A new layer type is one line of `register_layer`; types of other libraries are named by a dotted string, so that nothing is
imported for them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from rpq_convert.core.axes import WeightView

MARK = "_rpq_names"  # an attribute of every class that surgery makes: whoever looks for it need not know surgery
LAYERS: dict[type | str, dict[str, WeightView]] = {}


def register_layer(kind: type | str, **views: WeightView | str) -> None:
    """Teach the walker a layer type: which of its parameters are weights, and their axes.

    Args:
        kind: a class, or its dotted name (`"transformers.pytorch_utils.Conv1D"`). Subclasses are found through it.
        views: parameter name, or a pattern as in `fnmatch` = `WeightView`, or just its axis names.

    Example:
        >>> register_layer("my_code.Scorer", table="out in")
    """
    LAYERS[kind] = {name: WeightView(v) if isinstance(v, str) else v for name, v in views.items()}


EMBEDDING = WeightView("out in", axis="in")
register_layer(nn.Linear, weight="out in")
register_layer(nn.Conv1d, weight="out in k")
register_layer(nn.Conv2d, weight="out in kh kw")
register_layer(nn.Conv3d, weight="out in kd kh kw")
register_layer(nn.ConvTranspose1d, weight="in out k")
register_layer(nn.ConvTranspose2d, weight="in out kh kw")
register_layer(nn.ConvTranspose3d, weight="in out kd kh kw")
register_layer(nn.Embedding, weight=EMBEDDING)
register_layer(nn.EmbeddingBag, weight=EMBEDDING)
register_layer(nn.Bilinear, weight="out in in2")
register_layer(
    nn.MultiheadAttention,
    in_proj_weight="out in", q_proj_weight="out in", k_proj_weight="out in", v_proj_weight="out in",
)  # fmt: skip
register_layer(nn.RNNBase, **{"weight_*": "out in"})
register_layer(nn.RNNCellBase, **{"weight_*": "out in"})
register_layer("transformers.pytorch_utils.Conv1D", weight="in out")
# Raw parameters of transformers' models, and layers that are no subclass of torch's.
_MODELS = "transformers.models"
_HEADS = "in expert out"  # [width, heads, head size]: each head a matrix of its own
register_layer(
    f"{_MODELS}.xlnet.modeling_xlnet.XLNetRelativeAttention", q=_HEADS, k=_HEADS, v=_HEADS, r=_HEADS, o="out in in2"
)
register_layer(f"{_MODELS}.funnel.modeling_funnel.FunnelRelMultiheadAttention", r_kernel=_HEADS)
register_layer(f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts", weight="expert out in")
register_layer(f"{_MODELS}.csm.modeling_csm.CsmCodebooksHead", weight="expert in out")
register_layer(
    f"{_MODELS}.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru",
    input_gate_weight="expert in out", recurrent_gate_weight="expert in out",
)  # fmt: skip
register_layer(f"{_MODELS}.ibert.quant_modules.QuantLinear", weight="out in")
register_layer(f"{_MODELS}.ibert.quant_modules.QuantEmbedding", weight=EMBEDDING)
# Fused mixture-of-experts weights: transformers marks those that are stored the other way round with `is_transposed`.
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "gate_proj", "down_proj")


def class_names(kind: type) -> tuple[str, ...]:
    """Return the dotted names of a class and its ancestors, nearest first, RPQ's generated classes left out."""
    return tuple(f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__ if MARK not in vars(c))


def find_view(module: nn.Module, name: str, shape: tuple[int, ...]) -> WeightView | None:
    """Return the view of the parameter `name` of this module, or None where nothing tells its axes."""
    for kind, dotted in ((c, f"{c.__module__}.{c.__qualname__}") for c in type(module).__mro__):
        for key in (kind, dotted):
            if key in LAYERS:
                return next((v for pattern, v in LAYERS[key].items() if fnmatchcase(name, pattern)), None)
    if name in EXPERT_WEIGHTS and len(shape) == 3:
        return WeightView("expert in out" if getattr(module, "is_transposed", False) is True else "expert out in")
    return _by_attributes(module, shape) if name == "weight" else None


# What layers call their numbers of outputs and inputs.
SIZES = (
    ("out_features", "in_features"), ("out_channels", "in_channels"), ("out_dim", "in_dim"), ("output_dim", "input_dim"),
    ("output_size", "input_size"), ("nf", "nx"),
)  # fmt: skip


def _by_attributes(module: nn.Module, shape: tuple[int, ...]) -> WeightView | None:
    """Return the view of `weight` in a class that says how many outputs and inputs it has, or by its name is a linear layer.

    So the many classes of other libraries that are no subclass of torch's Linear, Embedding or convolutions are read as these. A
    wrong guess would cost quality and speed, no correctness: the axes only say which way codes and scales lie.
    """
    if len(shape) not in range(2, 6):
        return None
    kernel = [f"k{i}" for i in range(len(shape) - 2)]
    for out, into in SIZES:
        found = tuple(getattr(module, n, None) for n in (out, into))
        groups = getattr(module, "groups", 1)
        if found == shape[:2] or (kernel and isinstance(groups, int) and found == (shape[0], shape[1] * groups)):
            return WeightView(" ".join(["out", "in", *kernel]))
        if found[::-1] == shape[:2]:
            return WeightView(" ".join(["in", "out", *kernel]))
    if kernel:
        return None
    if (getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None)) == shape:
        return EMBEDDING
    if not any(word in original_class(module).__name__.lower() for word in ("linear", "dense")):
        return None
    bias = getattr(module, "bias", None)
    turned = isinstance(bias, Tensor) and len(bias.shape) == 1 and len(bias) == shape[1] != shape[0]
    return WeightView("in out" if turned else "out in")


def original_class(module: nn.Module) -> Any:
    return module._rpq_original if is_rpq(module) else type(module)


def is_rpq(module: nn.Module) -> bool:
    """Say whether some of a module's parameters are RPQ weights."""
    return hasattr(type(module), MARK)
