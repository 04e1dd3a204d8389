"""Every model type of transformers, converted and loaded: `python -m benchmarks.architectures`."""

from rpq_convert.hf import torchvision

torchvision.fix()  # before transformers is imported
