"""The notebooks run from start to end in empty folders, and say what they said when they were stored.

`PYTHONPATH=tests/support python tests/test_examples.py [NAME …]` runs them and stores their outputs afresh.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from paths import ROOT

EXAMPLES = ROOT / "examples"
NAMES = sorted(p.stem for p in EXAMPLES.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def execute(name: str, folder: Path, *, times: int = 1) -> nbformat.NotebookNode:
    """Run a notebook in `folder`, in this interpreter's own kernel whatever others are installed.

    Args:
        times: how often, without a new kernel and over the files of the run before.
    """
    write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    work = folder / "work"
    work.mkdir()
    notebook = read(name)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": work}})
    with mock.patch.dict(os.environ, JUPYTER_PATH=str(folder / "jupyter")), client.setup_kernel():
        for cell in times * list(enumerate(notebook.cells)):
            client.execute_cell(cell[1], cell[0])
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stdout")


def check_quickstart(notebook: nbformat.NotebookNode, work: Path) -> None:
    """A transformer keeps its quality and has its planned size."""
    text = printed(notebook)
    assert float(text.split("mean cosine to the original: ")[1].split()[0]) > 0.99
    assert "reload is exact: True" in text
    planned, on_disk = re.search(r"planned ([\d,]+) bytes, ([\d,]+) bytes on disk", text).groups()
    written = sum(p.stat().st_size for p in (work / "minilm-rpq").glob("*.safetensors"))
    assert planned == on_disk == f"{written:,}"
    drawn = [
        o.data["text/html"] for c in notebook.cells for o in c.get("outputs", ()) if "text/html" in o.get("data", {})
    ]
    assert len(drawn) == 1 and "encoder.layer.{0…5}.attention.self.query.weight" in drawn[0]


def check_vision(notebook: nbformat.NotebookNode, work: Path) -> None:
    """A ViT and a convnet keep their accuracy."""
    text = printed(notebook)
    for name in ("vit", "convnet"):
        dense = float(re.search(rf"{name}: [\d,]+ parameters, accuracy ([\d.]+)", text)[1])
        small = re.findall(rf"{name}, \d bits, [\w-]+: accuracy ([\d.]+)", text)
        assert dense > 0.85 and len(small) == 4 and min(map(float, small)) > dense - 0.03
        assert re.search(rf"{name}: [\d,]+ bytes on disk, reload is exact: True", text)


def check_training(notebook: nbformat.NotebookNode, work: Path) -> None:
    """Random codes train as well as dense weights."""
    text = printed(notebook)
    dense, small = (
        float(re.search(rf"^{n}: [\d.]+ before, ([\d.]+) after", text, re.M)[1]) for n in ("dense", "random codes")
    )
    assert dense > 0.85 and small > dense - 0.05
    assert "codes as they were drawn: True" in text
    assert float(text.split("accuracy of the reload ")[1].split()[0]) == small


CHECKS = {"quickstart": check_quickstart, "vision": check_vision, "training": check_training}


def test_every_notebook_is_run():
    assert set(NAMES) == set(CHECKS)


@pytest.mark.slow  # minutes; the Python of the documentation's pages runs in tests/test_docs.py
@pytest.mark.parametrize("name", CHECKS)
def test_notebook(name, tmp_path):
    """Run twice, it says what it promises, and what was stored is of this code: sizes are exact, and change with a file's content."""
    notebook, stored = execute(name, tmp_path, times=2), read(name)
    CHECKS[name](notebook, tmp_path / "work")
    sizes = re.compile(r"[\d,]+ bytes")
    assert sizes.findall(printed(stored)) == sizes.findall(printed(notebook))
    assert all(c.execution_count for c in stored.cells if c.cell_type == "code")
    assert not re.search(r"/(home|tmp|Users|site-packages)/", nbformat.writes(stored))
    assert not any(o.get("name") == "stderr" for c in stored.cells for o in c.get("outputs", ()))


if __name__ == "__main__":
    for asked in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as place:
            made = execute(asked, Path(place))
        for cell in made.cells:
            cell.metadata.pop("execution", None)  # times of day
            if "outputs" in cell:  # progress bars and warnings, with paths of this machine
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        nbformat.write(made, EXAMPLES / f"{asked}.ipynb")
