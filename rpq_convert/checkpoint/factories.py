"""Factories: the function that builds a model which is not transformers', named as text. Free of torch.

`package.module:function`, `package.module.function` and `file.py:function` mean the same. `check_factory` reads a module's source to
say what is wrong before it is imported; `find_factory` imports it.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

from rpq_convert.errors import SourceError
from rpq_convert.storage.sources import did_you_mean

Factory = Callable[[], Any]
NOTATION = "write it as package.module:function or file.py:function"


def check_factory(factory: str) -> None:
    """Refuse a factory that cannot be meant, by its module's source; nothing is imported but packages that it lies in.

    Raises:
        SourceError: wrong notation, no such module or function, or a function that needs arguments.
    """
    module, name = _parts(factory)
    path = Path(module) if module.endswith(".py") else _source_of(factory, module)
    if path is None or path.suffix != ".py":
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as e:
        raise SourceError(f"factory {factory!r}: {path} is no Python: {e}") from None
    found: dict[str, Any] = {}
    for node in ast.walk(tree) if name.count(".") == 0 else ():
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            return  # its names cannot be known
        found |= dict.fromkeys(_bound(node), node)
    if not found or "__getattr__" in found:
        return
    if name not in found:
        functions = [n for n, node in found.items() if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        raise SourceError(f"factory {factory!r}: {path} has no {name!r}{_meant(name, functions)}")
    function = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    if function is not None and not function.decorator_list:
        a = function.args
        needed = [p.arg for p in (*a.posonlyargs, *a.args)][: len(a.posonlyargs) + len(a.args) - len(a.defaults)]
        _refuse_arguments(factory, [*needed, *(p.arg for p, d in zip(a.kwonlyargs, a.kw_defaults) if d is None)])


def find_factory(factory: str | Factory) -> Factory:
    """Return a factory that can be called without arguments.

    Raises:
        SourceError: wrong notation, no such module or function, or what is there builds no model.
    """
    if not isinstance(factory, str):
        found: Any = factory
    else:
        module, name = _parts(factory)
        found = _attribute(factory, _imported(factory, module), name)
    if hasattr(found, "state_dict") and not isinstance(found, type):
        raise SourceError(f"factory {_told(factory)} is a model; give a function that builds it")
    if not callable(found):
        raise SourceError(f"factory {_told(factory)} is not callable; {NOTATION}")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # of compiled code
        return found  # type: ignore[no-any-return]
    empty, open_ended = inspect.Parameter.empty, (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _refuse_arguments(factory, [p.name for p in parameters if p.default is empty and p.kind not in open_ended])
    return found  # type: ignore[no-any-return]


def _told(factory: str | Factory) -> str:
    return repr(factory) if isinstance(factory, str) else getattr(factory, "__qualname__", type(factory).__name__)


def _parts(factory: str) -> tuple[str, str]:
    """Return the module, as a name or the path of a file, and the name in it."""
    text = factory.strip().removesuffix("()")
    if text.endswith(".py"):
        raise SourceError(f"factory {factory!r} names no function; {NOTATION}")
    module, _, name = text.rpartition(":" if ":" in text else ".")
    if not module.endswith(".py") and ("/" in module or "\\" in module):
        module += ".py"
    names = name.split(".") if module.endswith(".py") else [*module.split("."), *name.split(".")]
    if not module or not all(part.isidentifier() for part in names):
        raise SourceError(f"factory {factory!r} names no function of a module; {NOTATION}")
    if module.endswith(".py") and not Path(module).is_file():
        raise SourceError(
            f"factory {factory!r}: {module} does not exist{did_you_mean(module, lambda p: p.suffix == '.py')}"
        )
    return module, name


def _source_of(factory: str, module: str) -> Path | None:
    """Return the file of a module, without importing it; None where that is not known."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None:
        raise SourceError(_no_module(factory, first))
    places, file = [Path(p) for p in spec.submodule_search_locations or ()], Path(spec.origin or "")
    for part in rest:
        tried = [p / part / "__init__.py" for p in places] + [p / f"{part}.py" for p in places]
        existing = next((p for p in tried if p.is_file()), None)
        if existing is None:
            return None  # a namespace, compiled, or an attribute
        places, file = [existing.parent] if existing.name == "__init__.py" else [], existing
    return file


def _no_module(factory: str, module: str) -> str:
    files = [p.stem for p in Path().glob("*.py")]
    return (
        f"factory {factory!r}: no module {module!r} in the working directory or among installed packages"
        f"{_meant(module, files)}; {NOTATION}"
    )


def _imported(factory: str, module: str) -> Any:
    try:
        return importlib.import_module(module) if not module.endswith(".py") else _run_file(Path(module))
    except ModuleNotFoundError as e:
        if e.name is not None and f"{module}.".startswith(f"{e.name}."):
            raise SourceError(_no_module(factory, e.name)) from None
        raise SourceError(f"factory {factory!r}: {module} imports {e.name!r}, which is not installed") from e
    except Exception as e:  # the user's code
        raise SourceError(f"factory {factory!r}: importing {module} raised {type(e).__name__}: {e}") from e


def _run_file(path: Path) -> Any:
    """Import a file; what lies beside it can be imported by it."""
    name = path.stem
    if (known := sys.modules.get(name)) is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # it ends in .py
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    before, made = sys.modules.get(name), importlib.util.module_from_spec(spec)
    if before is None:
        sys.modules[name] = made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        if before is None:
            sys.modules.pop(name, None)
        raise
    return made


def _attribute(factory: str, module: Any, name: str) -> Any:
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError:
        names = [n for n in dir(module) if callable(getattr(module, n, None)) and not n.startswith("_")]
        raise SourceError(f"factory {factory!r}: {module.__name__} has no {name!r}{_meant(name, names)}") from None


def _meant(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _refuse_arguments(factory: str | Factory, needed: list[str]) -> None:
    if needed:
        raise SourceError(
            f"factory {_told(factory)} needs arguments ({', '.join(needed)}); give a function without any that passes them"
        )


def _bound(node: ast.AST) -> list[str]:
    """Return the names that a statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(a.asname or a.name).partition(".")[0] for a in node.names]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
