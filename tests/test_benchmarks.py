"""The comparison with other tools: a shuffled model is the same model, bytes are counted once, the best row is the best."""

import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import figures
from benchmarks.quality.drawing import frontier
from benchmarks.quality.peers import by_matrix, packed, rounding
from benchmarks.quality.shuffle import shuffle_channels
from benchmarks.quality.sources import Sources
from benchmarks.quality.table import document, pictures


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def test_a_shuffled_llama_computes_the_same_with_the_same_numbers_in_other_places():
    model, ids = llama(), torch.arange(14).view(2, 7)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        shuffle_channels(model)
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values), name
        assert not torch.equal(parameter, before[name]), name


def test_a_tied_head_is_quantized_as_the_embedding_and_counted_once():
    model = llama()
    dense = model.model.embed_tokens.weight.detach().clone()
    asked = []

    def linear(weight):
        asked.append(tuple(weight.shape))
        return weight * 0, 7

    total = by_matrix(model, linear)
    assert len(asked) == 14 and (50, 24) not in asked
    assert torch.equal(model.lm_head.weight, dense) and not model.model.layers[0].mlp.up_proj.weight.any()
    norms = 5 * 24
    assert total == 14 * 7 + 2 * (50 * 24 + norms)
    assert by_matrix(model, linear, embedding=lambda w: (w * 0, 1)) == 14 * 7 + 1 + 2 * norms
    assert not model.lm_head.weight.any()


def test_rounding_keeps_what_lies_on_a_grid_and_counts_codes_scales_and_zero_points():
    weight = (torch.arange(64.0).view(4, 16) % 16 - 5) * 0.25
    decoded, size = rounding(4, 16)(weight)
    assert torch.equal(decoded, weight)
    assert size == 64 * 4 // 8 + 4 * 2 + 4 * 4 // 8
    assert packed(3, 3) == 2


@pytest.fixture
def rows():
    def row(peer, bits, size, perplexity):
        metrics = {"perplexity": perplexity, "base_perplexity": 30.0, "ratio": 1.0, "kl": 0.1, "top1_agreement": 0.9}
        return {
            "task": "smollm2", "peer": peer, "settings": {"bits": bits}, "bytes": size, "minutes": 1, "peak_mb": 1,
            "metrics": metrics,
        }  # fmt: skip

    return [row("rpq", 4, 66_000_000, 40.0), row("hqq", 4, 67_000_000, 41.0), row("bnb", 4, 68_000_000, 39.0)]


def test_a_row_is_bold_when_nothing_of_its_size_or_below_is_better(rows):
    failed = {"task": "smollm2", "peer": "gptq", "settings": {"bits": 3}, "error": "no GPU"}
    page = document([*rows, failed])
    lines = [line for line in page.splitlines() if "4 bits" in line and " MB" not in line]
    assert [line.startswith("| **") for line in lines[:3]] == [True, False, True]
    assert "| 4.1 | bitsandbytes NF4, 4 bits | 39.000 | rpq-convert, 4 bits | 40.000 |" in page
    assert "3 bits: `no GPU`" in page


def test_the_picture_has_a_line_per_tool_and_leaves_out_what_a_smaller_one_beats(rows):
    (name, picture), *more = pictures([*rows, {**rows[0], "bytes": 67_000_000, "settings": {"bits": 5}}]).items()
    assert name == "quality-smollm2.svg" and [n for n, _ in more] == ["size-quality.svg"]
    assert name in document(rows)
    assert picture.count("<polyline") == 3 and picture.count('r="3"') == 4
    assert frontier([(3, 1.0), (1, 5.0), (2, 6.0), (4, 1.0)]) == [(1, 5.0), (3, 1.0)]


def test_the_landing_picture_tells_conversions_without_data_apart_and_leaves_out_ruined_models(rows):
    ours = {**rows[0], "settings": {"bits": 4, "calibrated": True}, "bytes": 60_000_000}
    ruined = {**rows[1], "peer": "kmeans", "metrics": {**rows[1]["metrics"], "ratio": 666.0}}
    picture = pictures([*rows, ours, ruined])["size-quality.svg"]
    names = re.findall(r'<text[^>]* x="\d+\.0" y="\d+">([^<]+)</text>', picture)
    assert names == ["rpq-convert, some text", "rpq-convert, no data", "HQQ", "bitsandbytes NF4"]
    assert picture.count("<polyline") == 4 and picture.count("stroke-dasharray") == 2  # the line and its key
    assert "prefers-color-scheme:dark" in picture


def test_sentences_are_the_texts_own_and_wordnets_examples_and_glosses(tmp_path):
    (tmp_path / "text").write_text(" A lobster is an animal of the sea . It can live for 40 years . \n Too short . \n")
    (tmp_path / "data.verb").write_text(
        "  1 the licence | of nothing at all\n"
        '01 29 v | become hazy or dull; "his eyes grew dull with age"; "too short"  \n'
        '02 29 v | burn to charcoal; "the fire will char everything"  \n'
    )
    assert Sources(fit=tmp_path / "text", wordnet=tmp_path).sentences() == [
        " A lobster is an animal of the sea .", "It can live for 40 years .",
        "his eyes grew dull with age", "the fire will char everything", "become hazy or dull",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="--wordnet"):
        Sources(fit=tmp_path / "text").sentences()


def test_speed_figures_are_compared_with_the_last_ones_of_the_same_processor(tmp_path):
    def figure(value, processor="A", case="Small layers | 768 x 768 | dim 4 in"):
        return {
            "case": case,
            "value": value,
            "unit": "ms",
            "processor": processor,
            "threads": "2",
            "date": "2026-01-01",
            "commit": "c",
        }

    file = tmp_path / "speed.jsonl"
    assert figures.read(file) == []
    figures.append([figure(9.0), figure(1.0)], file)
    figures.append([figure(5.0, "B")], file)
    before = figures.read(file)
    assert figures.compared([figure(1.05)], before)[0].startswith("0 of 1 figures moved by more than 10%; 0 have")
    slower, summary = figures.compared([figure(1.3), figure(2.0, case="new")], before)
    assert slower.startswith("+30%  Small layers") and "1 ms (2026-01-01, c), now 1.3" in slower
    assert summary.startswith("1 of 1") and summary.endswith("1 have no figure before")
    (stamped,) = figures.stamped([{"case": "x", "value": 1.0, "unit": "ms"}], "A", "2")
    assert stamped.keys() == figure(1.0).keys()


@pytest.mark.slow
def test_faults_races_and_flipped_bits_leave_whole_folders():
    """A sample of what docs/reliability.md tells of; each command fails where one of them does harm."""
    for arguments in (("inject", "--every", "67"), ("races", "--count", "2"), ("flips", "--count", "40")):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.reliability", *arguments], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0 and "FAULT" not in done.stdout, (arguments, done.stdout, done.stderr[-2000:])
