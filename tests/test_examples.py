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


def execute(name: str, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in `folder`, in this interpreter's own kernel whatever others are installed."""
    write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    work = folder / "work"
    work.mkdir()
    notebook = read(name)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": work}})
    with mock.patch.dict(os.environ, JUPYTER_PATH=str(folder / "jupyter")):
        client.execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stdout")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return a function: name -> the executed notebook and the folder that it worked in, run once."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            done[name] = execute(name, folder), folder / "work"
        return done[name]

    return run


def test_a_transformer_keeps_its_quality_and_its_planned_size(ran):
    notebook, work = ran("quickstart")
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


def test_a_vit_and_a_convnet_keep_their_accuracy(ran):
    text = printed(ran("vision")[0])
    for name in ("vit", "convnet"):
        dense = float(re.search(rf"{name}: [\d,]+ parameters, accuracy ([\d.]+)", text)[1])
        small = re.findall(rf"{name}, \d bits, [\w-]+: accuracy ([\d.]+)", text)
        assert dense > 0.85 and len(small) == 4 and min(map(float, small)) > dense - 0.03
        assert re.search(rf"{name}: [\d,]+ bytes on disk, reload is exact: True", text)


def test_random_codes_train_as_well_as_dense_weights(ran):
    text = printed(ran("training")[0])
    dense, small = map(float, re.search(r"after: dense ([\d.]+), random codes ([\d.]+)", text).groups())
    assert dense > 0.85 and small > dense - 0.05
    assert "codes as they were drawn: True" in text
    assert float(text.split("accuracy of the reload ")[1].split()[0]) == small


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_of_this_code(name, ran):
    """Sizes are exact: what differs in them was stored before a change."""
    stored = read(name)
    sizes = re.compile(r"[\d,]+ bytes")
    assert sizes.findall(printed(stored)) == sizes.findall(printed(ran(name)[0]))
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
