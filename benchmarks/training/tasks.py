"""Tasks: data that a package registry carries, models of any width, and how a batch is judged.

Data: Fashion-MNIST (Debian's package dataset-fashion-mnist), of whose 60,000 training pictures the last 5,000 choose learning
rates; a text (tiny shakespeare), character by character, whose last tenth is half validation, half test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.pictures import Residual, fashion

VALIDATION, CONTEXT, TEST_WINDOWS = 5_000, 64, 600


@dataclass(frozen=True)
class Task:
    """One model family on one set of data.

    Args:
        build: a width -> a dense model.
        widths: those that are measured; step: widths are multiples of it.
        steps: of a full run; batch: examples in one.
        rate: where the search for a learning rate of a dense model begins.
        metric: "accuracy", where more is better, or "loss" in nats for a character.
    """

    name: str
    build: Callable[[int], nn.Module]
    widths: tuple[int, ...]
    step: int
    steps: int
    batch: int
    rate: float
    metric: str

    @property
    def better(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.metric == "accuracy" else -1


def vit(width: int) -> nn.Module:
    from rpq_convert.hf import torchvision

    torchvision.fix()
    from vit_pytorch import ViT

    return ViT(
        image_size=28, patch_size=7, channels=1, num_classes=10, dim=width, depth=2, heads=4, dim_head=round(width / 4),
        mlp_dim=2 * width,
    )  # fmt: skip


def resnet(width: int) -> nn.Module:
    """Three stages of `width`, twice and four times as many channels."""
    stages: list[nn.Module] = []
    for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
        stages += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), Residual(after)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def opt(width: int) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=96, hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=2, num_attention_heads=4,
            ffn_dim=4 * width, max_position_embeddings=CONTEXT, dropout=0.0, pad_token_id=None, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip


TASKS = {
    t.name: t
    for t in (
        Task("vit", vit, (128, 192), 2, 1_200, 64, 1e-3, "accuracy"),
        Task("opt", opt, (128, 192), 4, 1_200, 16, 3e-3, "loss"),
        Task("resnet", resnet, (24, 32), 1, 1_200, 64, 3e-3, "accuracy"),
    )
}


@dataclass(frozen=True)
class Data:
    """Tensors of a task: inputs and labels of each part; of a text the labels are the inputs, one character on."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@lru_cache
def data_of(task: str, pictures: Path | None, text: Path | None) -> Data:
    """Read what a task is trained and judged on.

    Raises:
        SystemExit: the files were not named.
    """
    if task == "opt":
        if text is None:
            raise SystemExit("opt needs --text (tiny shakespeare: one file of plain text)")
        ids = (torch.tensor(list(text.read_bytes())) - 31).clamp(0, 95)  # a new line is 0
        nine, half = len(ids) * 9 // 10, len(ids) * 19 // 20
        train, validation, test = ids[:nine], ids[nine:half], ids[half:]
        return Data((train, train), _windows(validation), _windows(test))
    if pictures is None:
        raise SystemExit(f"{task} needs --pictures (the folder of Fashion-MNIST's four .gz files)")
    x, y = fashion(pictures, "train")
    return Data((x[:-VALIDATION], y[:-VALIDATION]), (x[-VALIDATION:], y[-VALIDATION:]), fashion(pictures, "t10k"))


def _windows(ids: Tensor) -> tuple[Tensor, Tensor]:
    count = min(TEST_WINDOWS, (len(ids) - 1) // CONTEXT)
    return ids[: count * CONTEXT].view(-1, CONTEXT), ids[1 : count * CONTEXT + 1].view(-1, CONTEXT)


def batch_of(task: Task, data: Data, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a step, the same for every model."""
    draw = torch.Generator().manual_seed(1_000_003 * seed + step)
    inputs, labels = data.train
    if task.name == "opt":
        at = torch.randint(len(inputs) - CONTEXT - 1, (task.batch, 1), generator=draw) + torch.arange(CONTEXT)
        return inputs[at], inputs[at + 1]
    at = torch.randint(len(inputs), (task.batch,), generator=draw)
    return inputs[at], labels[at]


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return logits, the last axis being classes."""
    found = model(inputs)
    return found.logits if hasattr(found, "logits") else found  # type: ignore[no-any-return]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(answers(model, batch[0]).flatten(0, -2), batch[1].flatten())


@torch.inference_mode()
def judge(task: Task, model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Return the task's metric on a part."""
    model.eval()
    total = 0.0
    for x, y in zip(part[0].split(200), part[1].split(200)):
        found = answers(model, x)
        one = (found.argmax(-1) == y).float().mean() if task.metric == "accuracy" else loss_of(model, (x, y))
        total += float(one) * len(x)
    return total / len(part[0])
