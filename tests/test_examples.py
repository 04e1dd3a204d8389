"""The notebook runs from start to end in an empty folder, and says what it said when it was stored."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def printed(notebook):
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stdout")


def test_quickstart(tmp_path):
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    text = printed(fresh)
    assert "reload is exact: True" in text
    cosine = float(text.split("mean cosine to the original: ")[1].split()[0])
    assert cosine > 0.999
    size = next(line for line in text.splitlines() if line.endswith("bytes on disk"))
    assert size in printed(stored)  # sizes are exact, so the stored notebook cannot be stale
    assert (tmp_path / "minilm-rpq" / "model.safetensors").is_file()
    assert any("text/html" in o.get("data", {}) for c in fresh.cells for o in c.get("outputs", ()))
