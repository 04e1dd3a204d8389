"""Tasks: a real model, what it may be fitted on, and what is measured after its weights were made small.

Each has `prepare`, which runs once, in this project's environment, and writes a folder: the dense model and its inputs as
tensors; `load`, `calibration` and `tuning`, which need torch, transformers and safetensors alone, so that they run in any
peer's environment; and `measure`, which compares what a peer has left with the dense model. `loss` is what tuning makes
small, `columns` are the metrics that a table shows, `best` the one that decides, `parameters` what its bits are counted over.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality.language import Encoder, LanguageModel
from benchmarks.quality.pictures import Classifier, Pretrained, efficientnet, resnet, vit
from rpq_convert.hf import torchvision

torchvision.fix()  # or transformers does not import beside a CPU build of torch

TASKS: dict[str, Any] = {
    "smollm2": LanguageModel(shuffled=True),
    "smollm2-as-shipped": LanguageModel(shuffled=False),
    "minilm": Encoder(),
    "efficientnet": Pretrained("EfficientNet-Lite0", efficientnet, 4_652_008, 0, 0.0),
    "resnet": Classifier("A small ResNet (Fashion-MNIST)", resnet, 516_458, 2, 4e-3),
    "vit": Classifier("A small ViT (Fashion-MNIST)", vit, 803_114, 3, 1e-3),
}
