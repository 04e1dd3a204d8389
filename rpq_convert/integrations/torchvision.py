"""Make `import torchvision` work beside a CPU-only torch.

PyPI's torchvision for Linux is a CUDA build. Beside a CPU-only torch its compiled half does not load, the import ends in
"operator torchvision::nms does not exist", and transformers and vit-pytorch fail with it. Its Python half (transforms,
models) needs only that the two operators are declared. Declared only after the import has failed in just this way, so a
working torchvision is never touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # a library's operators live as long as it does


def mend() -> bool:
    """Declare the missing operators if torchvision is installed and broken in this way; return whether that was so."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as e:
        if "torchvision::nms does not exist" not in str(e):
            return False
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    return True
