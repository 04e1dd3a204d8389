"""Every Python block of docs/stack.md runs, in order, in one fresh process."""

import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow  # a minute on two cores
def test_the_page_runs(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    blocks = BLOCK.findall((ROOT / "docs" / "stack.md").read_text("utf8"))
    assert len(blocks) > 8
    prepared = "from rpq_convert.hf import torchvision\ntorchvision.fix()\n"  # transformers needs one that works
    prepared += "import torch\nwords = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))\n"
    (tmp_path / "page.py").write_text(prepared + "\n".join(blocks), "utf8")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch.Size([2, 17])" in done.stdout
    assert "_attn.q_proj.weight" in done.stdout  # a row of the report, of both layers
    small, dense = (sum(p.stat().st_size for p in tmp_path.glob(f"{n}/*.safetensors")) for n in ("tiny-rpq", "tiny"))
    assert small < dense
    assert (tmp_path / "vit.pt2").exists() and (tmp_path / "vit.onnx").exists()
