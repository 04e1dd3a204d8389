"""The open table of RPQ-pytorch: ViT-B/16 against RPQ-ViT-B/16 on ImageNet, 90 epochs. It has not been run.

    torchrun --nproc-per-node 8 -m benchmarks.training.imagenet --data imagenet --model dense --output dense
    torchrun --nproc-per-node 8 -m benchmarks.training.imagenet --data imagenet --model rpq --output rpq

`--data` holds `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`. A run that is started again goes on after its last whole epoch. The recipe is
that of DeiT without a teacher and mixing: AdamW, warm-up and cosine, crops, flips, RandAugment, label smoothing. Each epoch prints a line
of JSON: accuracy, pictures a second, peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import rpq_convert as rpq
from benchmarks.training import measuring
from benchmarks.training.memory import BASE
from rpq_convert.hf import torchvision
from rpq_convert.models import RPQViT
from rpq_convert.models.vit import SeedViT

WARM, DECAY, SMOOTHING = 5, 0.05, 0.1  # epochs; AdamW's; of labels


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=("dense", "rpq"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch", type=int, default=128, help="pictures of one process")
    parser.add_argument(
        "--rate", type=float, default=5e-4, help="for 512 pictures a step; scaled by how many there are"
    )
    parser.add_argument("--workers", type=int, default=8)
    sizes = parser.add_argument_group("the model")
    for name, value in BASE.items():
        if name != "num_classes":
            sizes.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    return parser.parse_args()


def loaders(asked: argparse.Namespace) -> tuple[DataLoader[Any], DataLoader[Any], DistributedSampler[Any], int]:
    """Return batches to train on, batches to judge on, what draws the first, and how many classes there are."""
    torchvision.fix()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    size = asked.image_size
    end = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.RandAugment(), *end])
    whole = v2.Compose([v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size), *end])
    train, judged = ImageFolder(asked.data / "train", crop), ImageFolder(asked.data / "val", whole)
    if train.classes != judged.classes:
        raise SystemExit(f"{asked.data}: train and val hold other classes")
    draw: DistributedSampler[Any] = DistributedSampler(train, drop_last=True)
    how: dict[str, Any] = {
        "batch_size": asked.batch,
        "num_workers": asked.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    parts = DistributedSampler(judged, shuffle=False)
    return (
        DataLoader(train, sampler=draw, drop_last=True, **how),
        DataLoader(judged, sampler=parts, **how),
        draw,
        len(train.classes),
    )


def factor(epoch: float, epochs: int) -> float:
    """Return what the learning rate is multiplied by."""
    warm = min(WARM, epochs / 10)
    return min((epoch + 0.01) / (warm + 0.01), (1 + math.cos(math.pi * max(0.0, epoch - warm) / (epochs - warm))) / 2)


def moved(batches: DataLoader[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: DataLoader[Any], device: torch.device) -> float:
    """Return the share of right answers over all processes (a sampler may repeat a few pictures to share them out evenly)."""
    model.eval()
    counts = torch.zeros(2, device=device)
    for x, y in moved(batches, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            counts += torch.tensor([float((model(x).argmax(-1) == y).sum()), len(y)], device=device)
    distributed.all_reduce(counts)
    return float(counts[0] / counts[1])


def main() -> None:
    asked = arguments()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    first = distributed.get_rank() == 0
    train, judged, draw, classes = loaders(asked)
    torch.manual_seed(0)
    shape = {name: getattr(asked, name) for name in BASE if name != "num_classes"}
    build = RPQViT if asked.model == "rpq" else SeedViT
    model = build(**shape, num_classes=classes, channels=3).to(device)
    rate = asked.rate * asked.batch * distributed.get_world_size() / 512
    optimizer = torch.optim.AdamW(rpq.parameter_groups(model, rate, weight_decay=DECAY), betas=(0.9, 0.999))
    begin = [group["lr"] for group in optimizer.param_groups]
    asked.output.mkdir(parents=True, exist_ok=True)
    saved, start = asked.output / "state.pt", 0
    if saved.is_file():
        state = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    shared = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)  # codes stay as they are
    for epoch in range(start, asked.epochs):
        draw.set_epoch(epoch)
        shared.train()
        clock = time.perf_counter()
        for step, (x, y) in enumerate(moved(train, device)):
            now = factor(epoch + step / len(train), asked.epochs)
            for group, lr in zip(optimizer.param_groups, begin, strict=True):
                group["lr"] = lr * now
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = F.cross_entropy(shared(x), y, label_smoothing=SMOOTHING)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        speed = len(train) * asked.batch * distributed.get_world_size() / (time.perf_counter() - clock)
        right = accuracy(model, judged, device)
        if first:
            peak = torch.cuda.max_memory_allocated() if cuda else measuring.peak()
            line = {"epoch": epoch + 1, "accuracy": right, "pictures a second": speed, "peak": peak}
            print(json.dumps(line), flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
        distributed.barrier()
    if first:
        rpq.save(model.cpu(), asked.output / "model", overwrite=True) if asked.model == "rpq" else None
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
