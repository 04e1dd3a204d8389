"""The shape of the code: imports run one way, foreign libraries stay in their files."""

import ast
from pathlib import Path

import pytest
from paths import ROOT

# Rooms. Each line may import the lines below it.
LEVELS = [
    ["nn", "cli"],
    ["folders", "integrations", "models"],
    ["conversion", "evaluation"],
    ["calibration"],
    ["inputs"],
    ["checkpoint"],
    ["hf", "encoding", "tuning"],
    ["storage", "layers", "fit"],
    ["planning", "kernels"],
    ["core"],
    ["report", "running"],
    ["errors", "version", "schemas"],
    ["showing"],
][::-1]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
# Who may import what is slow to import or optional.
HOMES = {
    "transformers": {
        "hf/loading.py",
        "hf/tasks.py",
        "inputs/files.py",
        "integrations/serving.py",
        "integrations/transformers.py",
        "models/opt.py",
    },
    "vit_pytorch": {"models/vit.py"},
    "torchvision": set(),
    "huggingface_hub": {"hf/hub.py", "hf/model_card.py", "checkpoint/publishing.py", "integrations/serving.py"},
    "msgspec": {"schemas"},
    "typer": {"cli"},
    "rich": {"cli"},
    "numba": {"kernels", "fit/loops"},
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
            up = LEVEL[parts[1]] >= LEVEL[own] and parts[1] != own
            assert not up, f"{place(file)} imports {name}, which stands above it or beside it"
        elif parts[0] in HOMES:
            homes = HOMES[parts[0]]
            assert any(place(file).startswith(home) for home in homes), f"{place(file)} imports {parts[0]}"


def test_every_folder_is_a_package():
    assert all((f / "__init__.py").is_file() for f in {p.parent for p in FILES} | {ROOT / "configs"})


def test_every_public_name_exists():
    import rpq_convert

    for name in rpq_convert.__all__:
        assert getattr(rpq_convert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rpq_convert.nothing
