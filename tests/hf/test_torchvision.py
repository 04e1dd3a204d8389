"""torchvision beside a torch that it was not built for: our own code imports it, everyone else meets what they have."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")


def alone(code):
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=path)


@pytest.mark.slow
def test_an_import_of_rpq_convert_neither_fixes_nor_breaks_it():
    plain, beside = alone("import torchvision"), alone("import rpq_convert, torchvision")
    assert beside.returncode == plain.returncode
    assert plain.stderr.splitlines()[-1:] == beside.stderr.splitlines()[-1:]


FIXED = """
import sys
from rpq_convert.hf import torchvision as ours
changed = ours.fix()
import torchvision
assert sys.modules["torchvision"] is torchvision and torchvision.extension is sys.modules["torchvision.extension"]
assert changed == (not torchvision.extension._has_ops())
torchvision.models.resnet18(), torchvision.transforms.Resize(8)
assert ours.fix() is False  # it is imported already
import transformers.image_transforms, vit_pytorch
"""


@pytest.mark.slow
def test_fixed_it_serves_models_and_transformers():
    done = alone(FIXED)
    assert done.returncode == 0, done.stderr[-2000:]
