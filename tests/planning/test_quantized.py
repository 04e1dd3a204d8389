"""Models that another tool has quantized are refused in memory, before anything is touched."""

import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import PlanError


class Packed(torch.Tensor):
    """As torchao's and quanto's tensors: a subclass that holds codes and scales."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


class Int8Linear(nn.Module):
    """As torchao's older layers and many own ones."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(32, 32, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(32))


class GPTQLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.ones(4, 32, dtype=torch.int32))
        self.register_buffer("qzeros", torch.ones(1, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 32))


def of_tool(place):
    return type("QLinear", (nn.Linear,), {"__module__": place})(32, 32)


def subclassed():
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(Packed(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 1)), requires_grad=False)
    return layer


def dynamic():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(32, 32)), {nn.Linear})


class Float8Linear(nn.Linear):
    """As compressed-tensors leaves an ordinary layer."""

    def __init__(self):
        super().__init__(32, 32)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(32, 1))


QUANTIZED = {
    "int8 and scales": Int8Linear, "gptq": GPTQLinear, "float8 and a scale": Float8Linear, "tensor subclass": subclassed, "torch.ao dynamic": dynamic,
    "bitsandbytes": lambda: of_tool("bitsandbytes.nn.modules"), "quanto": lambda: of_tool("optimum.quanto.nn.qlinear"),
    "torchao": lambda: of_tool("torchao.quantization.linear"), "hqq": lambda: of_tool("hqq.core.quantize"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_models_of_other_tools_are_refused_before_anything_is_touched(kind):
    model = nn.Sequential(nn.Linear(64, 64), QUANTIZED[kind]())
    calls = []
    for act in (
        lambda: rpq.plan(model, bits=8),
        lambda: rpq.convert(model, bits=8),
        lambda: rpq.convert(model, bits=8, calibration=lambda m: calls.append(m)),
    ):
        with pytest.raises(PlanError, match=r"1(.0)? .*is quantized already"):
            act()
    assert type(model[0]) is nn.Linear and not calls


def test_ordinary_models_with_whole_numbers_are_not():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("relative_position_index", torch.ones(4, 4, dtype=torch.int64))
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.uint8))

    model = Indexed()
    assert len(rpq.plan(model, bits=8).jobs) == 1
    rpq.convert(model, bits=8)
    assert len(rpq.plan(model, bits=8).skips) > 4  # a converted model is none of another tool's
