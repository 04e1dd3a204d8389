"""Before anything else: torchvision beside a CPU-only torch, which vit-pytorch and transformers import."""

import torch

from rpq_convert.hf import torchvision

torchvision.fix()
torch.set_num_threads(1)  # tests run many small operations; results never depend on it
