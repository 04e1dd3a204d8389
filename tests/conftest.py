"""Before anything else: torchvision beside a CPU-only torch, which vit-pytorch and transformers import."""

import torch

from rpq_convert.hf import torchvision

torchvision.fix()
torch.set_num_threads(1)  # tests run many small operations; results never depend on it

# What takes longest starts first, so that no worker is left with it at the end.
SLOWEST = (
    "tests/kernels/gpu", "tests/conversion", "tests/cli", "tests/test_examples.py", "tests/planning", "tests/test_folders.py",
    "tests/calibration", "tests/integrations", "tests/test_fresh_process.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: next((i for i, place in enumerate(SLOWEST) if item.nodeid.startswith(place)), len(SLOWEST))
    )
