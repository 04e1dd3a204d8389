"""The import hook, and what `import rpq_convert` changes in a process: nothing but what transformers and torch.export need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rpq_convert.integrations.import_hook import when_imported

ROOT = Path(__file__).parents[2]
ACTED = """
import sys
calls = ["imported"]
def act():
    calls.append(sys.modules["watched"].ready)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Two modules on the path: `watched`, and `acted`, which acts when that is imported."""
    (tmp_path / "watched.py").write_text("ready = True\n", "utf8")
    (tmp_path / "acted.py").write_text(ACTED, "utf8")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = before
    for name in ("watched", "acted"):
        sys.modules.pop(name, None)


def test_acts_right_after_the_module_ran_and_once(modules):
    before = list(sys.meta_path)
    when_imported("watched", "acted:act")
    when_imported("watched", "acted:act")
    assert "watched" not in sys.modules and "acted" not in sys.modules
    assert len(sys.meta_path) == len(before) + 1
    import watched

    assert watched.ready and sys.modules["acted"].calls == ["imported", True]
    assert sys.meta_path == before
    assert watched.__spec__.name == "watched" and watched.__file__ == str(modules / "watched.py")


def test_a_module_without_a_function_is_imported(modules):
    when_imported("watched", "acted")
    import watched  # noqa: F401

    assert sys.modules["acted"].calls == ["imported"]


def test_acts_at_once_where_the_module_is_imported_already(modules):
    before = list(sys.meta_path)
    import watched  # noqa: F401

    when_imported("watched", "acted:act")
    assert sys.modules["acted"].calls == ["imported", True] and sys.meta_path == before


def test_other_imports_are_left_alone(modules):
    (modules / "other.py").write_text("", "utf8")
    when_imported("watched", "acted:act")
    import other

    assert "acted" not in sys.modules and type(other.__spec__.loader).__module__.startswith(("importlib", "_frozen_"))
    sys.modules.pop("other")


def test_a_module_that_does_not_exist_is_still_missing(modules):
    when_imported("watched_not", "acted:act")
    with pytest.raises(ModuleNotFoundError, match="watched_not"):
        import watched_not  # noqa: F401
    assert "acted" not in sys.modules


def test_a_module_that_fails_raises_its_own_error(modules):
    (modules / "watched.py").write_text("raise OSError('its own')\n", "utf8")
    when_imported("watched", "acted:act")
    with pytest.raises(OSError, match="its own"):
        import watched  # noqa: F401
    assert "acted" not in sys.modules and "watched" not in sys.modules


UNCHANGED = """
import sys
import torch, transformers
from torch import nn
from torch.nn.modules import module

def state():
    hooks = {name: dict(value) for name, value in vars(module).items() if name.startswith("_global_") and name.endswith("_hooks")}
    classes = {c: dict(vars(c)) for c in (nn.Module, nn.Linear, nn.Parameter, torch.Tensor)}
    return hooks, classes, list(sys.path_hooks), sys.excepthook, dict(torch.nn.functional.__dict__)

before, finders = state(), list(sys.meta_path)
import rpq_convert
assert state() == before
names = [f.name for f in sys.meta_path if f not in finders]
assert sorted(names) == ["peft.peft_model", "torch.export.pt2_archive._package", "transformers.quantizers.auto"], names
assert not any(name.partition(".")[0] in ("torchvision", "numba") for name in sys.modules)
"""
REGISTERED = """
import rpq_convert
from rpq_convert.hf import torchvision
torchvision.fix()  # transformers needs one that works
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["rpq"].__name__ == "RPQQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["rpq"] is rpq_convert.RPQConfig
try:
    auto.register_quantizer("rpq")(auto.HfQuantizer)
    raise SystemExit("registered twice")
except ValueError:
    pass
"""


def alone(code):
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=path)


def test_the_import_changes_nothing_else_in_a_process():
    done = alone(UNCHANGED)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_transformers_knows_the_method_as_soon_as_its_quantizers_are_imported():
    done = alone(REGISTERED)
    assert done.returncode == 0, done.stderr[-2000:]
