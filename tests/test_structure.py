"""The shape of the code: imports run one way, foreign libraries stay in their files, the package lists what is on disk."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each line may import the lines above it, and its own.
LEVELS = [
    ["version", "allocation", "view", "executors", "source", "empty", "kernels", "fit", "calling", "reading", "blocks", "rotation"],
    ["spec"],
    ["weight"],
    ["computed"],
    ["operations"],
    ["tracing"],
    ["layers"],
    ["walk", "evaluation"],
    ["rules", "report"],
    ["heads", "planning"],
    ["budget", "integrations", "encode"],
    ["folder", "calibration", "recoding"],
    ["sensitivity", "hub"],
    ["card"],
    ["opened", "record"],
    ["conversion", "tuning", "adapters", "inputs"],
    ["checkpoint", "models", "nn", "recalibration"],
    ["pretrained", "later", "publish"],
    ["cli"],
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
# Who may import what is slow to import or optional.
HOMES = {
    "transformers": {
        "integrations/transformers.py",
        "integrations/serving.py",
        "integrations/tasks.py",
        "models/opt.py",
        "pretrained.py",
        "inputs.py",
    },
    "vit_pytorch": {"models/vit.py"},
    "torchvision": set(),
    "huggingface_hub": {"hub.py", "card.py", "publish.py", "integrations/serving.py"},
    "typer": {"cli"},
    "rich": {"cli"},
    "numba": {"kernels"},
    "triton": {"kernels"},
}
FILES = sorted([*(ROOT / "rpq_convert").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names]
    return found


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix().removeprefix("rpq_convert/")


@pytest.mark.parametrize("file", FILES, ids=place)
def test_imports_run_one_way(file):
    own = place(file).removesuffix(".py").split("/")[0]
    if own == "__init__":
        return  # the public names, by text
    assert own in LEVEL, f"{place(file)} has no line in LEVELS"
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "rpq_convert":
            assert LEVEL[parts[1]] <= LEVEL[own], f"{place(file)} imports {name}, which stands above it"
        elif parts[0] in HOMES:
            homes = HOMES[parts[0]]
            assert place(file) in homes or own in homes, f"{place(file)} imports {parts[0]}"


def test_package_list_is_what_is_on_disk():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["tool"]["setuptools"]
    folders = {p.parent for p in FILES} | {ROOT / "configs"}
    assert all((f / "__init__.py").is_file() for f in folders)
    on_disk = set()
    for folder in folders:
        name = folder.relative_to(ROOT).as_posix().replace("/", ".")
        on_disk.add(name if name.startswith("rpq_convert") else f"rpq_convert.{name}")
    assert set(tool["packages"]) == on_disk


def test_every_public_name_exists():
    import rpq_convert

    for name in rpq_convert.__all__:
        assert getattr(rpq_convert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rpq_convert.nothing
