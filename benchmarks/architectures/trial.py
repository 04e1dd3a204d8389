"""One model class end to end: built, saved dense, converted in every way, and loaded by every class that its dense folder serves.

What each way gives is compared tensor by tensor with the dense model and with the other ways.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rpq_convert as rpq
from benchmarks.architectures.inputs import outputs
from rpq_convert.errors import CalibrationError, EncodeError, FolderError, PlanError, SourceError, VerifyError

OPTIONS: dict[str, Any] = {"bits": 8, "grow": True}
REFUSALS = (SourceError, PlanError, EncodeError, FolderError, VerifyError, CalibrationError)
NEAR = 0.1  # relative error of a decoded weight at 8 bits; far above what it has, far below that of another weight
LARGE = 70_000_000  # parameters: what SECONDS are enough for


class NotBuilt(Exception):
    """transformers itself does not build, save or reload the model."""


class Wrong(Exception):
    """The result differs from what it must be."""


def size_of(kind: Any, config: Any) -> int:
    """Return the parameters of a class, tied ones under each of their names."""
    with torch.device("meta"):
        model = kind._from_config(copy.deepcopy(config))
    return sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))


def build(kind: Any, config: Any) -> Any:
    """Return a model with random weights, none of them zero or alike."""
    torch.manual_seed(0)
    if (size := size_of(kind, config)) > LARGE:
        raise NotBuilt(f"{size:,} parameters even so")
    model = kind._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_(0, 0, 0).clamp_(-8, 8)  # some classes leave memory as they found it
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def try_class(kind: Any, config: Any, loaders: Sequence[Any], place: Path) -> Iterator[tuple[str, str]]:
    """Try a class with all loaders of its folder; yield what was tried and what was seen there, `right` or what else.

    Its own class goes all ways. The others load the converted folder, and find what they find in the dense one.

    Raises:
        NotBuilt: there is nothing to try.
    """
    dense, out = place / "dense", place / "out"
    try:
        model = build(kind, config)
        model.save_pretrained(dense)
        first, info = load(kind, dense)
    except NotBuilt:
        raise
    except Exception as e:
        raise NotBuilt(said(e)) from None
    if info["missing_keys"] or (odd := differing(first, model)):
        raise NotBuilt(f"reloads otherwise than it was saved: {', '.join(sorted(info['missing_keys'])[:2]) or odd}")
    yield "convert", judged(rpq.convert_checkpoint, dense, out, executor="serial", **OPTIONS)
    if not out.exists():
        return
    for loader in loaders:
        try:
            plain, info = load(loader, dense)
        except Exception:
            continue  # the dense folder does not serve it
        if 2 * len(info["missing_keys"]) > len(plain.state_dict()):
            continue
        yield f"load by {loader.__name__}", judged(loaded, loader, plain, info, place)
    yield "in memory", judged(in_memory, first, out)
    yield "on load", judged(on_load, kind, dense, first)
    yield "save again", judged(saved_again, kind, place)
    yield "restore", judged(restored, kind, place)


def judged(act: Callable[..., Any], *given: Any, **how: Any) -> str:
    """Run a step; return `right`, or what is the matter."""
    try:
        act(*given, **how)
    except Wrong as e:
        return f"wrong: {e}"
    except REFUSALS as e:
        return f"refused: {said(e)}"
    except Exception as e:
        return f"wrong: {said(e)}"
    return "right"


def said(e: BaseException) -> str:
    lines = [line for line in str(e).strip().splitlines() if line.strip()] or [""]
    return f"{type(e).__name__}: {' '.join(lines[:2])}"[:240]


def load(kind: Any, folder: Path, **how: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model in evaluation mode, and what transformers says of its loading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model, info = kind.from_pretrained(folder, output_loading_info=True, **how)
    return model.eval(), info


def in_memory(model: Any, out: Path) -> None:
    """Convert the dense model in memory: the same tensors as in the folder, and outputs as of its decoded weights."""
    rpq.convert(model, executor="serial", **OPTIONS)
    if odd := differing(rpq.load(out), model):
        raise Wrong(f"rpq.load is not what rpq.convert gives: {odd}")
    found = outputs(copy.deepcopy(model))  # a forward pass may cast weights (Switch Transformers' router)
    decoded = rpq.restore(copy.deepcopy(model))
    if isinstance(found, Tensor):
        wanted = outputs(decoded)
        if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
            raise Wrong(f"outputs of the decoded model: {wanted if isinstance(wanted, str) else 'another shape'}")
        if not bool((found.isfinite() == wanted.isfinite()).all()):
            raise Wrong("outputs are not finite where the decoded model's are")
        held = wanted.isfinite()
        if float((found - wanted)[held].abs().max()) > 1e-3 * float(wanted[held].abs().max() + 1e-6):
            raise Wrong("outputs differ from the decoded model's")


def loaded(loader: Any, plain: Any, info: dict[str, Any], place: Path) -> None:
    """Load the converted folder: the tensors of the dense one, nothing made anew that was there."""
    model, found = load(loader, place / "out")
    if type(model) is not type(plain):
        raise Wrong(f"gives {type(model).__name__}, of the dense folder {type(plain).__name__}")
    no_more(found, info, ("missing_keys", "mismatched_keys"))
    near(rpq.restore(model), plain, info["missing_keys"])


def on_load(kind: Any, dense: Path, memory: Any) -> None:
    """Convert while the dense folder is loaded."""
    model, found = load(kind, dense, quantization_config=rpq.RPQConfig(**OPTIONS))
    if found["missing_keys"]:
        raise Wrong(f"missing: {sorted(found['missing_keys'])[0]}")
    if odd := differing(model, memory):
        raise Wrong(f"not what rpq.convert gives: {odd}")


def saved_again(kind: Any, place: Path) -> None:
    """Load, save by transformers, load."""
    model, _ = load(kind, place / "out")
    model.save_pretrained(place / "again")
    again, found = load(kind, place / "again")
    if found["missing_keys"]:
        raise Wrong(f"missing: {sorted(found['missing_keys'])[0]}")
    if odd := differing(again, model):
        raise Wrong(odd)


def restored(kind: Any, place: Path) -> None:
    """Write a dense folder: exactly what the converted one decodes to."""
    rpq.restore_checkpoint(place / "out", place / "back")
    model, found = load(kind, place / "back")
    if found["missing_keys"] or found["unexpected_keys"]:
        raise Wrong(f"missing or unexpected: {sorted((*found['missing_keys'], *found['unexpected_keys']))[0]}")
    if odd := differing(model, rpq.restore(load(kind, place / "out")[0])):
        raise Wrong(odd)


def no_more(found: dict[str, Any], dense: dict[str, Any], kinds: Sequence[str]) -> None:
    """Raise if more is missing than in the dense folder; where aliases find a tensor that transformers misses, there is less."""
    for what in kinds:
        if strange := sorted(map(str, set(found[what]) - set(dense[what]))):
            raise Wrong(f"{what}: {', '.join(strange[:3])}")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a model under each of its names, buffers that are not saved too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def differing(a: nn.Module, b: nn.Module) -> str:
    """Return what the first tensor is in which two models differ; an empty text where they are the same."""
    x, y = tensors(a), tensors(b)
    if strange := sorted(x.keys() ^ y.keys()):
        return f"{strange[0]} in one alone"
    for name, tensor in x.items():
        other = y[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {other.dtype} {list(other.shape)}"
        if not torch.equal(tensor.nan_to_num(), other.nan_to_num()):
            return f"{name} has other values"
    return ""


def near(model: nn.Module, plain: nn.Module, missing: Any) -> None:
    """Raise if a decoded weight is not nearly the dense one, or anything else not exactly as it was."""
    x, y = tensors(model), tensors(plain)
    if strange := sorted(x.keys() ^ y.keys()):
        raise Wrong(f"{strange[0]} is in one of dense and decoded alone")
    for name, wanted in y.items():
        found = x[name]
        if name in missing:
            continue
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            raise Wrong(f"{name} is {found.dtype} {list(found.shape)}, dense {wanted.dtype} {list(wanted.shape)}")
        a, b = found.detach().double().nan_to_num(), wanted.detach().double().nan_to_num()
        if float((a - b).norm()) > NEAR * float(b.norm()):
            raise Wrong(f"{name} is far from the dense one")
