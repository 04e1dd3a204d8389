"""Random descriptions and tensors through every road that reads them: an error in one line, or a model that runs. A program."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import math
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.core.axes import WeightView
from rpq_convert.core.spec import CODEBOOK_DTYPES, DTYPES, LAYOUTS, ROTATIONS, Spec
from rpq_convert.errors import FolderError, SourceError, VerifyError

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 256, 4096, 1 << 31, 1 << 63, 10**40, 1.0, 0.5, float("nan"), float("inf"), "", "in",
    "out", "float16", "int8", "x" * 300, [], [1], [64, 64], [4096, 64], [-1, 64], [1 << 40, 1 << 40], {}, "out in", "in out", "\x1b[2J",
)  # fmt: skip
KINDS = [*CODEBOOK_DTYPES.values(), torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
MOST = 1 << 27  # bytes of one weight
LAYERS = ("Linear", "Conv2d", "Embedding", "ConvTranspose1d")


def layer(kind: str, r: random.Random) -> tuple[nn.Module, str, torch.Tensor]:
    a, b = r.choice((1, 3, 8, 16, 33, 64)), r.choice((1, 2, 7, 16, 64, 70))
    if kind == "Linear":
        return nn.Linear(b, a), "out in", torch.randn(r.choice((1, 3, 20)), b)
    if kind == "Conv2d":
        k = r.choice((1, 3))
        return nn.Conv2d(b, a, k), "out in kh kw", torch.randn(2, b, 5, 5)
    if kind == "Embedding":
        return nn.Embedding(a, b), "out in", torch.randint(0, a, (r.choice((1, 5, 70)),))
    return nn.ConvTranspose1d(b, a, 3), "in out k", torch.randn(2, b, 9)


def spec(r: random.Random, view: WeightView, shape: tuple[int, ...]) -> Spec:
    axis = r.choice(("in", "out"))
    length, inputs = view.matrix_shape(shape, axis)[1], view.matrix_shape(shape, "in")[1]
    dim = r.choice((1, 2, 3, 4, 8, 16, length, length + 1, 2 * length))
    blocks = math.ceil(length / dim)
    rotation = r.choice([k for k in ROTATIONS if not k or inputs % k == 0])
    outliers = 0 if rotation else r.choice((0, 0, min(2, inputs // 2)))
    dtype = r.choice(list(CODEBOOK_DTYPES))
    scales = r.choice((None, *DTYPES)) if dtype != "float8_e4m3fn" else "float16"
    return Spec(
        dim,
        r.choice((1, blocks, r.randint(1, blocks))),
        r.choice((1, 1, 2, 3)),
        axis,
        dtype,
        scales,
        r.choice(LAYOUTS),
        rotation,
        outliers,
    )


def tensor(r: random.Random, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 256 if dtype == torch.uint8 else 2, shape).to(dtype)


def change(
    r: random.Random, description: dict[str, Any], tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    """Break one thing, or make another description with tensors that fit it."""
    way = r.randrange(7)
    if way == 0:
        description[r.choice(list(description))] = r.choice(ODD)
    elif way == 1:
        description.pop(r.choice(list(description)))
    elif way == 2:
        key = r.choice(list(tensors))
        tensors[key] = tensors[key].to(r.choice(KINDS))
    elif way == 3:
        key = r.choice(list(tensors))
        size = [max(0, s + r.choice((-1, 0, 0, 1, 8))) for s in tensors[key].shape]
        tensors[key] = torch.zeros(size, dtype=tensors[key].dtype)
    elif way == 4:
        tensors.pop(r.choice(list(tensors)))
    elif way == 5:
        config[r.choice(("modules", "tied", "guard", "format_version"))] = r.choice(ODD)
    else:
        key = next((k for k in tensors if k.endswith("positions")), None)
        if key is not None:
            tensors[key] = tensors[key] + r.choice((-1, 1, 1000))


def write(place: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({k: t.contiguous() for k, t in tensors.items()}, place / "model.safetensors")
    files = {}
    for file in place.iterdir():
        data = file.read_bytes()
        files[file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "rpq_manifest.json").write_text(json.dumps({"files": files}))


def run(model: nn.Module, x: torch.Tensor) -> str:
    try:
        _run(model, x)
    except (RuntimeError, NotImplementedError) as e:  # torch's own word on a bias of another float dtype
        return type(e).__name__
    return "right"


def _run(model: nn.Module, x: torch.Tensor) -> None:
    for copy in (x, x[:1]):
        model(copy)
    [weight] = {id(m): m for m in model.modules() if type(m).__name__ == "RPQWeight"}.values() or [None]
    if weight is not None:
        weight()
        if weight.codebooks.dtype != torch.float8_e4m3fn:
            model.train()
            model(x).float().square().sum().backward()


def case(seed: int, place: Path) -> str:
    r = random.Random(seed)
    torch.manual_seed(seed)
    built, names, x = layer(r.choice(LAYERS), r)
    model = nn.Sequential(built)
    shape, view = tuple(built.weight.shape), WeightView(names)
    described = (
        shape if r.random() < 0.8 else tuple(max(1, s * r.choice((1, 2, 64)) // r.choice((1, 2))) for s in shape)
    )
    if math.prod(described) > MOST // 64:
        described = shape  # no spec of it would be small enough
    while sum((made := spec(r, view, described)).nbytes(view, described).values()) > MOST:
        pass
    tensors = {f"0.weight_rpq.{k}": tensor(r, d, s) for k, (d, s) in made.tensors(view, described).items()}
    tensors |= {f"0.{n}": p.detach().clone() for n, p in built.named_parameters() if n != "weight"}
    description = {
        **made.to_dict(),
        "view": names,
        "shape": list(described),
        "dtype": "float32",
        "zero_row": r.choice((None, None, 0)),
    }
    if names != "out in":
        description["zero_row"] = None
    config: dict[str, Any] = {
        "quant_method": "rpq",
        "format_version": 1,
        "modules": {"0.weight": description},
        "tied": {},
        "guard": None,
    }
    for _ in range(r.choice((0, 0, 1, 1, 2))):
        if tensors and description:
            change(r, description, tensors, config)
    write(place / "folder", config, tensors)
    shutil.rmtree(place / "dense", ignore_errors=True)
    shutil.rmtree(place / "dense.partial", ignore_errors=True)
    ended = []
    for name, act in (
        ("load", lambda: run(rpq.load(place / "folder", factory=lambda: nn.Sequential(built)), x)),
        ("verify", lambda: rpq.verify(place / "folder")),
        ("restore", lambda: rpq.restore_checkpoint(place / "folder", place / "dense")),
    ):
        try:
            ended.append(f"{name} {act() if name == 'load' else act() and 'right'}")
        except (SourceError, VerifyError, FolderError) as e:
            assert "\n" not in str(e), e
            ended.append(f"{name} refused")
    del model
    return ", ".join(ended)


def main(place: Path, seconds: float, first: int) -> None:
    faulthandler.enable()
    until, seed, ended = time.monotonic() + seconds, first, Counter[str]()
    while time.monotonic() < until:
        (place / "seed").write_text(str(seed))
        try:
            ended[case(seed, place)] += 1
        except BaseException:
            print(f"seed {seed}")
            raise
        seed += 1
    print(f"{seed - first} cases from seed {first}: {dict(ended)}")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else time.time_ns() % 1_000_000_000
    )
