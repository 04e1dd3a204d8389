"""The notebook runs from start to end in an empty folder, and says what it said when it was stored.

`python tests/test_examples.py` runs it and stores its outputs afresh.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def execute(folder: Path) -> nbformat.NotebookNode:
    """Run the notebook in `folder`, in this interpreter's own kernel whatever others are installed."""
    write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    work = folder / "work"
    work.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": work}})
    with mock.patch.dict(os.environ, JUPYTER_PATH=str(folder / "jupyter")):
        client.execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stdout")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    return execute(folder), folder / "work"


def test_quality_and_exact_reload(fresh):
    text = printed(fresh[0])
    assert float(text.split("mean cosine to the original: ")[1].split()[0]) > 0.99
    assert "reload is exact: True" in text


def test_planned_size_is_the_size_on_disk(fresh):
    notebook, work = fresh
    planned, on_disk = re.search(r"planned ([\d,]+) bytes, ([\d,]+) bytes on disk", printed(notebook)).groups()
    written = sum(p.stat().st_size for p in (work / "minilm-rpq").glob("*.safetensors"))
    assert planned == on_disk == f"{written:,}"


def test_report_is_drawn(fresh):
    drawn = [
        o.data["text/html"] for c in fresh[0].cells for o in c.get("outputs", ()) if "text/html" in o.get("data", {})
    ]
    assert len(drawn) == 1 and "encoder.layer.{0…5}.attention.self.query.weight" in drawn[0]


def test_stored_outputs_are_of_this_code(fresh):
    """Sizes are exact: what differs in them was stored before a change."""
    stored = nbformat.read(NOTEBOOK, as_version=4)
    sizes = re.compile(r"[\d,]+ bytes")
    assert sizes.findall(printed(stored)) == sizes.findall(printed(fresh[0]))
    assert all(c.execution_count for c in stored.cells if c.cell_type == "code")
    assert not re.search(r"/(home|tmp|Users|site-packages)/", nbformat.writes(stored))
    assert not any(o.get("name") == "stderr" for c in stored.cells for o in c.get("outputs", ()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = execute(Path(place))
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times of day
        if "outputs" in cell:  # progress bars and warnings, with paths of this machine
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(made, NOTEBOOK)
