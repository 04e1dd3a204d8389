"""Classifiers of pictures: two small networks trained here on Fashion-MNIST, and EfficientNet-Lite0 with pretrained weights.

No registry carries ImageNet's pictures, so the pretrained network sees Fashion-MNIST's, enlarged: what is measured is how often
the network still gives its own first answer of 1,000. The two others have labels too, and keep Fashion-MNIST's training part
for training and calibration, its test part for the measurement.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.sources import Sources

CALIBRATION, TUNING, TEST = 512, 25_600, 10_000  # pictures; the first two from the training part


def fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return pictures [n, 1, 28, 28] float32 and labels [n] of `train` or `t10k`, from the idx files of the data set."""

    def read(name: str, header: int) -> Tensor:
        with gzip.open(folder / f"{part}-{name}-ubyte.gz") as file:
            return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)

    pictures = read("images-idx3", 16).view(-1, 1, 28, 28).float() / 255
    return (pictures - 0.2860) / 0.3530, read("labels-idx1", 8).long()


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet() -> nn.Module:
    def halved(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    stages = [m for a, b in ((1, 32), (32, 64), (64, 128)) for m in (*halved(a, b), Residual(b))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*stages, *head)


def vit() -> nn.Module:
    from vit_pytorch import ViT

    return ViT(
        image_size=28, patch_size=4, num_classes=10, dim=128, depth=6, heads=4, dim_head=32, mlp_dim=256, channels=1
    )


def train(model: nn.Module, pictures: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """AdamW under one cycle of the rate, batches of 128."""
    draw = torch.Generator().manual_seed(0)
    steps = len(pictures) // 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(pictures), generator=draw)[: steps * 128].view(-1, 128):
            optimizer.zero_grad()
            F.cross_entropy(model(pictures[part]), labels[part]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


class Classifier:
    """Accuracy on the test pictures, and how often the answer is the dense model's."""

    columns: tuple[str, ...] = ("accuracy", "agreement")
    note = """Columns: accuracy on 10,000 test pictures (dense: {base_accuracy:.4f}); how often the answer is the dense model's.
Calibrating tools see 512 training pictures, tuning 25,600. Tools for linear layers alone are left out where there are
convolutions. Some rows are of a network that was trained again: dense accuracies differ by 0.001."""
    best = "agreement"
    loss = "kl"

    def __init__(self, title: str, build: Any, parameters: int, epochs: int, rate: float) -> None:
        self.title, self.build, self.parameters, self.epochs, self.rate = title, build, parameters, epochs, rate

    def prepare(self, folder: Path, sources: Sources) -> None:
        if sources.pictures is None:
            raise SystemExit("the classifiers need --pictures (Fashion-MNIST's .gz files)")
        torch.manual_seed(0)
        model = self.build()
        fit, labels = fashion(sources.pictures, "train")
        train(model, fit, labels, self.epochs, self.rate)
        test, gold = fashion(sources.pictures, "t10k")
        save_file(model.state_dict(), folder / "model.safetensors")
        data = {"fit": fit[:TUNING].clone(), "test": test[:TEST], "gold": gold[:TEST]}
        save_file({**data, "base": _answers(model, data["test"])}, folder / "data.safetensors")

    def load(self, folder: Path) -> nn.Module:
        model = self.build()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    def calibration(self, folder: Path) -> list[Any]:
        return list(load_file(folder / "data.safetensors")["fit"][:CALIBRATION].split(64))

    def tuning(self, folder: Path) -> list[Any]:
        return list(load_file(folder / "data.safetensors")["fit"].split(128))

    def measure(self, model: nn.Module, folder: Path) -> dict[str, float]:
        data = load_file(folder / "data.safetensors")
        found = _answers(model, data["test"])
        same = float((found == data["base"]).float().mean())
        if "gold" not in data:
            return {"agreement": same}
        return {
            "accuracy": float((found == data["gold"]).float().mean()),
            "base_accuracy": float((data["base"] == data["gold"]).float().mean()),
            "agreement": same,
        }


@torch.inference_mode()
def _answers(model: nn.Module, pictures: Tensor, batch: int = 50) -> Tensor:
    """Return the class of every picture, enlarged to what the network was made for."""
    size = getattr(model, "picture_size", None)
    found = []
    for part in pictures.split(batch):
        found.append(model(enlarged(part, size) if size else part).argmax(-1))
    return torch.cat(found)


def enlarged(pictures: Tensor, size: int) -> Tensor:
    """Return grey pictures [n, 1, 28, 28] as colour ones of size x size, in the same range."""
    return F.interpolate(pictures, (size, size), mode="bilinear").expand(-1, 3, -1, -1)


class Pretrained(Classifier):
    """EfficientNet-Lite0 on enlarged pictures that it was not made for: agreement alone."""

    columns = ("agreement",)
    note = """No registry carries ImageNet. Agreement: how often the first of 1,000 answers is the dense model's on 500 enlarged
pictures of Fashion-MNIST. Calibrating tools see 64 others, tuning 2,048."""

    def prepare(self, folder: Path, sources: Sources) -> None:
        if sources.pictures is None:
            raise SystemExit("the classifiers need --pictures (Fashion-MNIST's .gz files)")
        from efficientnet import efficientnet_lite0

        model = efficientnet_lite0()
        model.picture_size = 224
        fit, test = fashion(sources.pictures, "train")[0][:TUNING], fashion(sources.pictures, "t10k")[0][:500]
        save_file(model.state_dict(), folder / "model.safetensors")
        save_file(
            {"fit": fit.clone(), "test": test.clone(), "base": _answers(model, test)}, folder / "data.safetensors"
        )

    def load(self, folder: Path) -> nn.Module:
        model = super().load(folder)
        model.picture_size = 224
        return model

    def calibration(self, folder: Path) -> list[Any]:
        return [enlarged(p, 224) for p in load_file(folder / "data.safetensors")["fit"][:64].split(16)]

    def tuning(self, folder: Path) -> list[Any]:
        return [enlarged(p, 224) for p in load_file(folder / "data.safetensors")["fit"][:2048].split(16)]


def efficientnet() -> nn.Module:
    from efficientnet import EfficientNetLite0

    return EfficientNetLite0()
