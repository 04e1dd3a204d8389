"""Import torchvision beside a CPU-only torch.

PyPI's torchvision for Linux is a CUDA build. Its compiled half does not load beside a CPU-only torch. The import then ends in
"operator torchvision::nms does not exist", and transformers and vit-pytorch fail with it. The Python half (transforms,
models) only needs the two operators to be declared. `fix` imports torchvision and declares them if the compiled half did not.

Only code of rpq-convert that needs torchvision calls `fix`: commands, loading by `rpq.load`, the models in `rpq_convert.models`.
`import rpq_convert` does not, so a torchvision that is broken stays broken for everyone else; `rpq env` reports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # a library's operators live as long as it does


def fix() -> bool:
    """Import torchvision now, if it is installed and not imported yet; return whether its operators had to be declared."""
    spec = None if "torchvision" in sys.modules else importlib.util.find_spec("torchvision")
    if spec is None or spec.loader is None:
        return False
    package = sys.modules["torchvision"] = importlib.util.module_from_spec(spec)
    try:
        if not importlib.import_module("torchvision.extension")._has_ops():  # it loads the compiled half
            _declare()
        spec.loader.exec_module(package)
    except BaseException:
        sys.modules.pop("torchvision", None)
        raise
    return bool(_LIBRARIES)


def _declare() -> None:
    if _LIBRARIES:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
