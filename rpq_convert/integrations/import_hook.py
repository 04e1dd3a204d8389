"""Register with a library when it is imported, and not before: `import rpq_convert` waits for no transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Finder(MetaPathFinder):
    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.then)
        return spec


class _Then(Loader):
    """Run a module as its own loader does, then what waited for it."""

    def __init__(self, loader: Loader, then: str) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _act(self.then)


def _act(then: str) -> None:
    module, _, function = then.partition(":")
    found = importlib.import_module(module)
    if function:
        getattr(found, function)()


def when_imported(name: str, then: str) -> None:
    """Import the module `then` right after `name`, now or whenever that is imported; once, however often it is asked.

    Of `module:function` the function is called too, perhaps more than once.
    """
    if name in sys.modules:
        _act(then)
    elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))
