"""Make `import torchvision` work beside a CPU-only torch.

PyPI's torchvision for Linux is a CUDA build. Beside a CPU-only torch its compiled half does not load, the import ends in
"operator torchvision::nms does not exist", and transformers and vit-pytorch fail with it. Its Python half (transforms,
models) needs only that the two operators are declared. They are, right after the compiled half has failed to load and
before anything asks for them, whoever imports torchvision; one that works is never touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # a library's operators live as long as it does


def declare() -> None:
    """Declare the operators if torchvision's compiled half did not; called when that was tried."""
    if _LIBRARIES or sys.modules["torchvision.extension"]._has_ops():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)


def mend() -> bool:
    """Import torchvision now, if it is installed; return whether it had to be mended."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    importlib.import_module("torchvision")
    return bool(_LIBRARIES)
