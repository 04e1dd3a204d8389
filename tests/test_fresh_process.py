"""From one process to the next: what a user wrote yesterday is there today, by files alone.

Each test does one thing that a user does, in an interpreter that holds nothing else. Others do so in their own files:
`from_pretrained` and its bounded memory (test_pretrained), the hub (test_hub), notebooks (test_examples), a server
(test_serving), compilers and exports (test_stack).
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, outputs
from paths import ROOT, SUPPORT
from safetensors.torch import save_file

import rpq_convert as rpq

CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


FIXED = "from rpq_convert.hf import torchvision; torchvision.fix()\n"  # transformers needs one that works


def fresh(code, *arguments, where, words=("-c",)):
    """Run Python code in a process of its own; return what it printed."""
    code = FIXED + code if words == ("-c",) else code
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, where)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words, code, *map(str, arguments)], capture_output=True, text=True, cwd=where,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def state(model):
    return {k: t.clone() for k, t in model.state_dict().items()}


CARDS = """
import sys, torch
from pathlib import Path
from architectures import outputs

place, wrong = Path(sys.argv[1]), []
for folder in sorted(p.parent for p in place.glob("*/config.json")):
    scope = {}
    exec((folder / "card.py").read_text("utf8"), scope)
    model, told = scope["model"].eval(), torch.load(folder / "told.pt")
    found = model.state_dict()
    exact = found.keys() == told["state"].keys() and all(torch.equal(t, found[k]) for k, t in told["state"].items())
    near = (outputs(model) - told["outputs"]).abs().max() < 1e-6 * told["outputs"].abs().max()
    if not exact or not near or type(model).__name__ != told["class"]:
        wrong.append(folder.name)
    print(folder.name)
assert not wrong, wrong
"""


@pytest.mark.slow  # minutes on two cores
def test_every_architecture_loads_by_the_code_on_its_card(tmp_path):
    """The card names an Auto class; under it every tensor comes back bit for bit. Outputs: see test_architectures."""
    for name, build in ARCHITECTURES.items():
        torch.manual_seed(0)
        model, folder = build(64).eval(), tmp_path / name.replace(" ", "-")
        rpq.convert(model, bits=4, grow=True, fit="random")
        rpq.save(model, folder)
        (code,) = [c for c in CODE.findall((folder / "README.md").read_text("utf8")) if "import rpq_convert" in c]
        assert f'from_pretrained("{folder.name}")' in code
        (folder / "card.py").write_text(code, "utf8")
        told = {"state": state(model), "outputs": outputs(model), "class": type(model).__name__}
        torch.save(told, folder / "told.pt")
    assert len(fresh(CARDS, tmp_path, where=tmp_path).split()) == len(ARCHITECTURES) >= 50


FIT = """
import torch, sys
import rpq_convert
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(64)})), pad_token="w0")
rows = []
for i in range(16):  # a prompt, of which nothing is learnt, and its completion
    prompt, answer = [5 + i % 3, 6, 7][: 2 + i % 2], [9, 10, 11, 12]
    rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
arguments = TrainingArguments(
    sys.argv[1], max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=2e-2,
    gradient_checkpointing=True, report_to=[], save_steps=3, logging_steps=1, use_cpu=True, disable_tqdm=True, seed=0,
)
def trainer():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("small-rpq")
    if sys.argv[1] == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(words))

def losses(t):
    return [h["loss"] for h in t.state.log_history if "loss" in h]

whole = trainer()
whole.train()
assert losses(whole)[-1] < 0.8 * losses(whole)[0], losses(whole)
again = trainer()
again.train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-3")
assert losses(again) == losses(whole), (losses(again), losses(whole))
whole.save_model(sys.argv[1] + "/last")
with torch.no_grad():
    torch.save(whole.model.eval()(torch.arange(12)[None]).logits, sys.argv[1] + "/logits.pt")
"""
MERGE = """
import torch
import rpq_convert as rpq
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("adapter/last").eval()
ids = torch.arange(12)[None]
with torch.no_grad():
    said = model(ids).logits
    assert torch.equal(said, torch.load("adapter/logits.pt"))
    with model.disable_adapter():
        before = model(ids).logits
merged, report = rpq.merge_adapter(model)
assert all(row.error < 0.02 for row in report.rows if row.decision == "rpq")
merged.save_pretrained("merged")
with torch.no_grad():
    assert (merged(ids).logits - said).norm() < 0.5 * (before - said).norm()
    torch.save(merged(ids).logits, "merged.pt")
"""
LOAD = """
import sys, torch
import rpq_convert
from transformers import AutoModelForCausalLM

with torch.no_grad():
    found = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()(torch.arange(12)[None]).logits
assert torch.equal(found, torch.load(sys.argv[2]))
"""


@pytest.mark.slow  # minutes on two cores
def test_fine_tuning_goes_on_and_its_adapter_is_merged(tmp_path):
    """Trainer as for chats: completions alone are learnt, a run goes on from its checkpoint with the same losses."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    rpq.convert_checkpoint(tmp_path / "small", tmp_path / "small-rpq", bits=4, grow=True)
    fresh(FIT, "all", where=tmp_path)
    fresh(LOAD, "all/last", "all/logits.pt", where=tmp_path)
    fresh(FIT, "adapter", where=tmp_path)
    held = json.loads((tmp_path / "adapter" / "last" / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == "small-rpq"
    fresh(MERGE, where=tmp_path)
    fresh(LOAD, "merged", "merged.pt", where=tmp_path)


PICTURES = '''
"""A vit-pytorch model, and one as timm builds them: a standardised convolution, a mask on a parameter's device."""

import torch
from rpq_convert.hf import torchvision

torchvision.fix()
from torch import nn
from torch.nn import functional as F
from vit_pytorch import ViT


def vit():
    return ViT(image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, mlp_dim=128)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = Standardised(3, 64, 8, 8), nn.Linear(64, 100)
        self.register_buffer("mask", torch.arange(64, device=self.head.weight.device) % 2, persistent=False)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)) * self.mask)
'''
SEE = """
import sys, torch
import rpq_convert as rpq

scope = {}
exec(open(sys.argv[1] + "/card.py").read(), scope)
with torch.no_grad():
    torch.save(scope["model"](torch.ones(2, 3, 32, 32)), sys.argv[1] + ".pt")
"""


@pytest.mark.slow  # minutes on two cores
def test_models_of_a_factory(tmp_path, monkeypatch):
    (tmp_path / "pictures.py").write_text(PICTURES, "utf8")
    monkeypatch.syspath_prepend(tmp_path)
    import pictures

    for name in ("vit", "Pictures"):
        torch.manual_seed(0)
        model = getattr(pictures, name)().eval()
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        options = ["--factory", f"pictures:{name}", "--out", f"{name}-rpq", "--bits", 4, "--grow", "--quiet"]
        fresh("rpq_convert.cli", f"{name}.safetensors", *options, where=tmp_path, words=("-c", CONVERT))
        card = (tmp_path / f"{name}-rpq" / "README.md").read_text("utf8")
        assert f'rpq.load("{name}-rpq", factory="pictures:{name}")' in card
        (tmp_path / f"{name}-rpq" / "card.py").write_text(CODE.findall(card)[0], "utf8")
        fresh(SEE, f"{name}-rpq", where=tmp_path)
        rpq.convert(model, bits=4, grow=True)
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / f"{name}-rpq.pt"), model(torch.ones(2, 3, 32, 32)))


CONVERT = "import sys; from rpq_convert.cli import main; sys.argv[:2] = ['rpq-convert']; main()"
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "peft", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import rpq_convert as rpq

build = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64))
model = build().eval()
rpq.convert(model, bits=4, grow=True)
rpq.save(model, "plain-rpq")
assert torch.equal(rpq.load("plain-rpq", factory=build)(torch.ones(1, 64)), model(torch.ones(1, 64)))
"""


@pytest.mark.slow
def test_nothing_of_transformers_is_needed_for_other_models(tmp_path):
    fresh(ABSENT, where=tmp_path)
