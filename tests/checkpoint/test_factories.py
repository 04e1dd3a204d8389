"""Factories as people name them, and what is said of those that build nothing."""

import sys
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.checkpoint.factories import check_factory, find_factory
from rpq_convert.errors import SourceError

NETS = """
import torch
from torch import nn
from functools import partial

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 64))

class Sized(nn.Module):
    def __init__(self, width): ...

class Home:
    build = staticmethod(Net)

def build():
    return Net()

def sized(width, *, depth):
    return Net()

def easy(width=64, *args, **kwargs):
    return Net()

def failing():
    raise RuntimeError("no such card")

def state():
    return Net().state_dict()

ready, number, bound = Net(), 3, partial(easy, 64)
for made in (1,):
    globals()["later"] = build
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    (tmp_path / "own" / "inner").mkdir(parents=True)
    for file in ("nets_of_mine.py", "own/__init__.py", "own/inner/nets.py"):
        (tmp_path / file).write_text(NETS)
    (tmp_path / "wrong.py").write_text("def build(:\n")
    (tmp_path / "needs.py").write_text("import a_package_that_is_not_there\n\ndef build(): ...\n")
    (tmp_path / "loud.py").write_text("def build(): ...\n\n1 / 0\n")
    save_file(nn.Sequential(nn.Linear(64, 64)).state_dict(), tmp_path / "net.safetensors")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("nets_of_mine", "own", "nets", "needs", "loud", "wrong"):
            del sys.modules[name]


@pytest.mark.parametrize("factory", [
    "nets_of_mine:build", "nets_of_mine.build", "nets_of_mine.py:build", "./nets_of_mine.py:build", "nets_of_mine:build()", " nets_of_mine:build",
    "own:build", "own.build", "own.inner.nets:build", "own.inner.nets.build", "own/inner/nets.py:build", "own/inner/nets:build",
    "nets_of_mine:Net", "nets_of_mine:easy", "nets_of_mine:bound", "nets_of_mine:Home.build",
])  # fmt: skip
def test_every_notation_builds_the_model(factory, place):
    check_factory(factory)
    assert isinstance(find_factory(factory)(), nn.Module)
    assert len(rpq.plan("net.safetensors", factory=factory, bits=4, grow=True).jobs) == 1


REFUSED = {  # factory -> what is said before it is imported, or after
    "nets_of_mine": "names no function of a module; write it as package.module:function or file.py:function",
    "nets_of_mine.py": "names no function; write it as",
    "nets_of_mine:": "names no function of a module",
    ":build": "names no function of a module",
    "nets of mine:build": "names no function of a module",
    "lambda: Net()": "names no function of a module",
    "nets_of_mien:build": "no module 'nets_of_mien' in the working directory or among installed packages; did you mean 'nets_of_mine'?",
    "nets_of_mien.py:build": "nets_of_mien.py does not exist; did you mean nets_of_mine.py?",
    "own.outer.nets:build": "no module 'own.outer'",
    "nets_of_mine:biuld": "has no 'biuld'; did you mean 'build'?",
    "own.inner.nets.biuld": "has no 'biuld'; did you mean 'build'?",
    "nets_of_mine.py:Nett": "has no 'Nett'; did you mean 'Net'?",
    "nets_of_mine:sized": "needs arguments (width, depth); give a function without any",
    "nets_of_mine:Sized": "needs arguments (width)",
    "nets_of_mine:number": "is not callable",
    "nets_of_mine:ready": "is a model; give a function that builds it",
    "nets_of_mine:failing": "raised RuntimeError: no such card",
    "nets_of_mine:state": "returned OrderedDict, not a module",
    "wrong:build": "importing wrong raised SyntaxError",
    "needs:build": "needs imports 'a_package_that_is_not_there', which is not installed",
    "needs.py:build": "imports 'a_package_that_is_not_there', which is not installed",
    "loud:build": "importing loud raised ZeroDivisionError: division by zero",
}  # fmt: skip


@pytest.mark.parametrize("factory", REFUSED)
def test_what_builds_no_model_is_named(factory, place):
    with pytest.raises(SourceError) as told:
        rpq.plan("net.safetensors", factory=factory, bits=4)
    assert REFUSED[factory] in str(told.value) and repr(factory) in str(told.value)


@pytest.mark.parametrize(
    "factory", ["nets_of_mine:later", "nets_of_mine:bound", "torch.nn:Identity", "own.inner.nets:Home.build"]
)
def test_what_only_an_import_can_tell_is_not_refused_before(factory, place):
    if factory.endswith("later"):  # a name that no statement binds is refused, unless names cannot be known
        (place / "nets_of_mine.py").write_text("from own import *\n" + NETS)
    check_factory(factory)


def test_functions_are_told_by_their_names(place):
    def sized(width):
        return nn.Linear(width, 3)

    with pytest.raises(SourceError, match=r"wrong\.py is no Python"):
        check_factory("wrong:build")
    assert (
        len(rpq.plan("net.safetensors", factory=partial(nn.Sequential, nn.Linear(64, 64)), bits=4, grow=True).jobs) == 1
    )
    for factory, says in (
        (sized, r"sized needs arguments \(width\)"),
        (nn.Linear(3, 3), "is a model; give a function"),
        (3, "int is not callable"),
    ):
        with pytest.raises(SourceError, match=says):
            rpq.plan("net.safetensors", factory=factory, bits=4)
    assert torch.nn.Identity is find_factory(torch.nn.Identity)
