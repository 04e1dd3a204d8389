"""A converted model behind `transformers serve`, asked through OpenAI's client."""

import socket
import subprocess
import sys
import time

import pytest
import torch
from openai import APIConnectionError, OpenAI
from paths import ROOT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rpq_convert as rpq


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w1")
    tokenizer.chat_template = "{% for m in messages %}w0 {{ m['content'] }} {% endfor %}"
    model.save_pretrained(tmp_path / "src")
    tokenizer.save_pretrained(tmp_path / "src")
    rpq.convert_checkpoint(tmp_path / "src", tmp_path / "small", bits=4, grow=True)
    return tmp_path / "small"


@pytest.mark.slow
def test_a_server_answers_what_generate_says(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from cli import group; group()", "serve", str(folder), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=None)
        while True:  # until it answers or ends
            try:
                listed = client.models.list()
                break
            except APIConnectionError:
                assert server.poll() is None, server.communicate()[0][-3000:]
                time.sleep(0.5)
        answer = client.chat.completions.create(
            model=str(folder), messages=[{"role": "user", "content": "w5 w6 w7"}], max_tokens=6, temperature=0
        )
        assert [m.id for m in listed.data][:2] == [folder.name, str(folder)]
        named = client.chat.completions.create(
            model=folder.name, messages=[{"role": "user", "content": "w5 w6 w7"}], max_tokens=6, temperature=0
        )
        assert named.choices[0].message.content == answer.choices[0].message.content
    finally:
        server.terminate()
        print(server.communicate()[0][-3000:])  # shown where the test fails
    model = rpq.load(folder)
    prompt = torch.tensor([[0, 5, 6, 7]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    said = [int(w[1:]) for w in (answer.choices[0].message.content or "").split()]
    assert said == expected[: len(said)] and len(said) >= 1
