"""The shape of the code: foreign libraries stay in their files, the wheel is whole. `lint-imports` holds the order of imports."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

# Who may import what is slow to import or optional.
HOMES = {
    "transformers": {
        "hf/loading.py",
        "hf/module_source.py",
        "hf/tasks.py",
        "inputs/files.py",
        "integrations/chat.py",
        "integrations/serving.py",
        "integrations/transformers/",
        "models/opt.py",
    },
    "vit_pytorch": {"models/vit.py"},
    "torchvision": set(),
    "huggingface_hub": {"hf/hub.py", "hf/model_card.py", "checkpoint/publishing.py", "integrations/serving.py"},
    "msgspec": {"schemas"},
    "datasets": {"inputs/hub_data.py"},
    "fsspec": {"storage/addresses.py"},
    "ray": {"conversion/cluster.py"},
    "pyarrow": {"inputs/tables.py"},
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"report/charts.py"},
    "PIL": {"report/charts.py", "inputs/"},
    "jinja2": {"report/html.py"},
    "squarify": {"report/html.py"},
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
def test_slow_and_optional_libraries_stay_in_their_files(file):
    for name in imports(file):
        homes = HOMES.get(name.partition(".")[0])
        assert homes is None or any(place(file).startswith(home) for home in homes), f"{place(file)} imports {name}"


def test_nothing_imports_the_command_line():
    assert not [
        place(f)
        for f in FILES
        if not place(f).startswith("cli/") and any(n.startswith("rpq_convert.cli") for n in imports(f))
    ]


def test_a_wheel_holds_types_commands_and_presets(tmp_path):
    """From a copy, as a build leaves files behind."""
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(
        ".*", "*.egg-info", "build", "demo-out", "__pycache__", "docs", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    packages = {f"rpq_convert/{place(f)}" for f in FILES}
    presets = {f"rpq_convert/configs/{p.name}" for p in (ROOT / "configs").iterdir() if p.suffix in (".toml", ".json")}
    templates = {f"rpq_convert/{place(t)}" for t in (ROOT / "rpq_convert/report/templates").iterdir()}
    assert presets and templates and packages | presets | templates | {"rpq_convert/py.typed"} <= held
    assert not [name for name in held if name.startswith(("cli/", "configs/", "tests/"))]


def test_every_folder_is_a_package():
    assert all((f / "__init__.py").is_file() for f in {p.parent for p in FILES} | {ROOT / "configs"})


def test_every_public_name_exists():
    import rpq_convert

    for name in rpq_convert.__all__:
        assert getattr(rpq_convert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rpq_convert.nothing
