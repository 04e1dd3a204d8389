"""What is done to converted folders, through the command line with a real tokenizer, and the inputs that files hold."""

import copy
import json

import factories
import pytest
import torch
import transformers as tf
from often import often
from paths import SUPPORT
from PIL import Image
from rpq_convert.cli import group
from safetensors.torch import save_file
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.checkpoint.opening import open_checkpoint
from rpq_convert.errors import CalibrationError
from rpq_convert.inputs.files import read_inputs

SIZE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "language model": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, max_position_embeddings=100)),
    "outputs": lambda: tf.BertModel(tf.BertConfig(**SIZE, initializer_range=0.3)),
    "encoder-decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    ),
}


@pytest.fixture(scope="module", params=often(MODELS, ("language model", "outputs")))
def spoken(request, tmp_path_factory):
    """A dense checkpoint with a tokenizer, and a text: (kind, folder, file)."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(folder / "base")
    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i + 2 for i in range(200)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder / "base")
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(7 * i + j) % 200}" for j in range(20 + i)) for i in range(40)))
    return request.param, folder / "base", text


def run(*arguments, code=0):
    done = CliRunner().invoke(group, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_calibrate_then_eval(spoken, tmp_path):
    kind, base, text = spoken
    run("convert", base, "--out", tmp_path / "plain", "--bits", 2, "--grow", "--effort", "fast", "--no-check", "-q")
    told = run(
        "convert",
        base,
        "--out",
        tmp_path / "fed",
        "--bits",
        2,
        "--grow",
        "--calibrate",
        text,
        "--samples",
        30,
        "--json",
    )
    report = json.loads(told.stdout)
    assert report["options"]["calibration"]["items"] > 1
    seen = {row["name"]: row["inputs"] for row in report["rows"] if row["decision"] == "rpq"}
    assert sum(n is not None for n in seen.values()) >= len(seen) - 3  # tables that are looked up, a pooler
    if kind == "language model":  # windows no longer than the model's positions
        assert set(filter(None, seen.values())) == {15 * 100}
    if kind == "encoder-decoder":
        return
    found = {
        name: json.loads(run("eval", base, tmp_path / name, "--text", text, "--window", 64, "--json").stdout)
        for name in ("plain", "fed")
    }
    assert all(f["kind"] == kind and f["samples"] > 10 for f in found.values())
    metric = {"language model": "kl", "outputs": "cosine"}[kind]
    plain, fed = (f["metrics"][metric] for f in found.values())
    assert fed < plain if metric == "kl" else fed > plain


def test_calibrate_on_inputs_of_its_own(spoken, tmp_path):
    kind, base, _ = spoken
    asked = (
        "convert",
        base,
        "--out",
        tmp_path / "own",
        "--bits",
        2,
        "--grow",
        "--calibrate",
        "self",
        "--samples",
        8,
        "--json",
    )
    if kind == "encoder-decoder":
        assert "cannot be made" in run(*asked, code=4).stderr
        return
    before = torch.random.get_rng_state()
    report = json.loads(run(*asked).stdout)
    assert torch.equal(torch.random.get_rng_state(), before)
    if kind == "outputs":  # an encoder: as many random tokens, up to a whole batch
        assert all(
            8 * 128 <= row["inputs"] < 8 * (128 + 25) for row in report["rows"] if row["name"].endswith("query.weight")
        )
        return
    assert {row["inputs"] for row in report["rows"] if row["layer"] == "Linear"} == {8 * 128}
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    again = rpq.convert(model, bits=2, grow=True, calibration=lambda m: rpq.own_inputs(m, samples=8))
    assert again.options["calibration"] == report["options"]["calibration"]
    sized = (*asked[:3], tmp_path / "sized", "--bits", 6.5, *asked[6:])
    run(*sized)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    rpq.convert(model, bits=6.5, grow=True, calibration=lambda m: rpq.own_inputs(m, samples=8))
    found = rpq.load(tmp_path / "sized").state_dict()
    assert all(torch.equal(t, found[name]) for name, t in model.state_dict().items())


def test_synthetic_pictures():
    torch.manual_seed(0)
    vit = tf.ViTModel(
        tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=(32, 48), num_channels=1)
    )
    resnet = tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))  # any size: 224 pixels
    found = [torch.cat([b["pixel_values"] for b in rpq.own_inputs(model, samples=20)]) for model in (vit, resnet)]
    assert [list(f.shape) for f in found] == [[20, 1, 32, 48], [20, 3, 224, 224]]
    assert torch.allclose(found[1].var((2, 3)).mean(1), torch.ones(20), atol=0.3)
    beside = (found[1][..., 1:] - found[1][..., :-1]).square().mean((1, 2, 3))
    assert beside.max() < 0.6  # of white noise it would be 2
    again = torch.cat([b["pixel_values"] for b in rpq.own_inputs(resnet, samples=20)])
    other = torch.cat([b["pixel_values"] for b in rpq.own_inputs(resnet, samples=20, seed=1)])
    assert torch.equal(found[1], again) and not torch.equal(again, other)
    clip = tf.CLIPModel(
        tf.CLIPConfig(
            text_config=SIZE, vision_config={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        )
    )
    for model in (
        clip,
        torch.nn.Linear(4, 4),
        tf.T5ForConditionalGeneration(tf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1)),
    ):
        with pytest.raises(CalibrationError, match=f"{type(model).__name__} cannot be made"):
            rpq.own_inputs(model)


def test_a_model_of_texts_and_pictures_writes_texts():
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, image_size=28, patch_size=14
    )
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=tf.LlamaConfig(**SIZE), vision_config=vision, image_token_index=299)
    )
    found = rpq.own_inputs(model, samples=2, window=5)
    assert [list(b["input_ids"].shape) for b in found] == [[2, 5]]


def test_synthetic_pictures_serve_convolutions():
    torch.manual_seed(0)
    dense = torch.nn.Sequential(
        *(m for a, b in ((1, 32), (32, 32), (32, 32)) for m in (torch.nn.Conv2d(a, b, 3, padding=1), torch.nn.ReLU()))
    ).eval()
    plain, fed = copy.deepcopy(dense), copy.deepcopy(dense)
    rpq.convert(plain, bits=2, grow=True)
    rpq.convert(fed, bits=2, grow=True, calibration=lambda m: rpq.own_inputs(m, shape=(1, 16, 16)))
    pictures = torch.cat(rpq.own_inputs(dense, shape=(1, 16, 16), seed=1))
    with torch.no_grad():
        wanted = dense(pictures)
        errors = [float((model(pictures) - wanted).norm() / wanted.norm()) for model in (plain, fed)]
    assert errors[1] < 0.8 * errors[0]


def test_what_cannot_be_calibrated_is_told(spoken, tmp_path):
    _, base, text = spoken
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    asked = ("convert", base, "--out", tmp_path / "out", "--bits", 2, "--grow")
    assert "empty" in run(*asked, "--calibrate", empty, code=4).stderr
    assert "no.txt" in run(*asked, "--calibrate", tmp_path / "no.txt", code=4).stderr
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)))
    assert "binary.txt" in run(*asked, "--calibrate", binary, code=4).stderr
    run("eval", base, "no", "--text", text, code=4)
    assert not (tmp_path / "out").exists()


def test_tune(spoken, tmp_path):
    kind, base, text = spoken
    if kind == "encoder-decoder":
        return
    run("convert", base, "--out", tmp_path / "small", "--bits", 1, "--grow", "--effort", "fast", "--no-check", "-q")
    asked = ("tune", base, tmp_path / "small", "--text", text, "--window", 40, "--steps", 8, "--out")
    found = json.loads(run(*asked, tmp_path / "tuned", "--json").stdout)
    assert found["after"] <= found["before"] and found["history"][0] == [0, found["before"]]
    run("verify", tmp_path / "tuned")
    assert (tmp_path / "tuned" / "tokenizer.json").is_file() and not list(tmp_path.glob("*.tuning*"))
    old, new = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("small", "tuned"))
    assert old == new
    assert "exists" in run(*asked, tmp_path / "tuned", code=4).stderr


def test_a_converted_folder_is_fitted_to_inputs_later(spoken, tmp_path):
    kind, base, text = spoken
    if kind == "encoder-decoder":
        return
    run("convert", base, "--out", tmp_path / "plain", "--bits", 2, "--grow", "--effort", "fast", "--no-check", "-q")
    asked = ("recalibrate", base, tmp_path / "plain", "--out", tmp_path / "fed", "--json", "-q")
    report = json.loads(run(*asked, "--data", text, "--samples", 30).stdout)
    assert report["options"]["calibration"]["items"] > 1
    run("verify", tmp_path / "fed")
    found = {
        name: json.loads(run("eval", base, tmp_path / name, "--text", text, "--window", 64, "--json", "-q").stdout)
        for name in ("plain", "fed")
    }
    metric = {"language model": "kl", "outputs": "relative_error"}[kind]
    assert found["fed"]["metrics"][metric] < found["plain"]["metrics"][metric]
    assert "exists" in run(*asked, "--data", text, code=4).stderr


def test_pairs_are_ranked_and_kept_in_report_and_card(spoken, tmp_path):
    kind, base, _ = spoken
    if kind != "outputs":
        return
    run("convert", base, "--out", tmp_path / "small", "--bits", 4, "--grow", "--effort", "fast", "--no-check", "-q")
    rows = [(f"w{i} w{i + 1} w{i + 2}", f"w{i} w{2 * i + 5} w{3 * i}", i % 7) for i in range(20)]
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("first,second,score\n" + "".join(f"{a},{b},{s}\n" for a, b, s in rows))
    asked = ("eval", base, tmp_path / "small", "--pairs", pairs, "--json")
    found = json.loads(run(*asked, "--save").stdout)
    assert found["kind"] == "sentence pairs" and found["samples"] == 20

    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    model = tf.AutoModel.from_pretrained(base).eval()

    def embed(sentence):
        with torch.no_grad():
            return model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state.mean(1)[0]

    likeness = [float(torch.cosine_similarity(embed(a), embed(b), dim=0)) for a, b, _ in rows]
    wanted = stats.spearmanr(likeness, [s for *_, s in rows]).statistic
    assert found["metrics"]["base_spearman"] == pytest.approx(wanted, abs=1e-4)
    run(*asked, "--save")  # takes the place of the first
    report = rpq.audit(tmp_path / "small")
    (kept,) = report.evaluations
    assert kept["metrics"] == found["metrics"] and kept["on"] == "pairs.csv"
    assert "pairs.csv" in run("audit", tmp_path / "small").stdout and "pairs.csv" in report.to_html()
    card = (tmp_path / "small" / "README.md").read_text()
    assert card.count("## Quality") == 1 and card.count("base spearman") == 1 and "## How it was made" in card
    run("verify", tmp_path / "small")
    pairs.write_text("first,second,score\nw1,w2,1\nw3\n")
    assert "line 3" in run(*asked, code=4).stderr
    assert "give one of" in run(*asked, "--text", pairs, code=2).stderr
    (tmp_path / "small" / "rpq_report.json").unlink()
    assert "leave out --save" in run(*asked, "--save", code=4).stderr


def test_a_classifier_of_any_kind(tmp_path, monkeypatch):
    """Convert on given inputs, measure accuracy, tune and fit again; all from files."""
    monkeypatch.syspath_prepend(str(SUPPORT))
    torch.manual_seed(0)
    model = factories.classifier()
    x = torch.randn(60, 3, 8, 8)
    with torch.no_grad():
        labels = model(x).argmax(-1)
    labels[:6] = (labels[:6] + 1) % 10  # the base is right in 54 of 60
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    save_file({"picture": x, "labels": labels}, tmp_path / "data.safetensors")
    how, on = ("--factory", "factories:classifier"), tmp_path / "data.safetensors"
    source, out = tmp_path / "net.safetensors", tmp_path / "small"
    told = run("convert", source, *how, "--out", out, "--bits", 1, "--grow", "--calibrate", on, "--json", "-q")
    rows = json.loads(told.stdout)["rows"]
    assert {r["name"]: r["inputs"] for r in rows if r["decision"] == "rpq"}["4.weight"] == 60
    evaluated = ("--inputs", on, *how, "--layers", "--json", "-q")
    found = json.loads(run("eval", source, out, *evaluated).stdout)
    assert found["metrics"]["base_accuracy"] == 0.9 and found["metrics"]["accuracy"] < 0.9
    assert set(found["layers"]) == {"0.weight", "2.weight", "4.weight"}
    options = (*how, "--data", on, "--steps", 8, "--blocks", 4, "--recompute", "-q")
    run("tune", source, out, *options, "--out", tmp_path / "tuned")
    told = run(
        "tune",
        source,
        out,
        *options,
        "--recode",
        0.01,
        "--bfloat16",
        "--loss",
        "mse",
        "--json",
        "--out",
        tmp_path / "coded",
    )
    tuned = json.loads(told.stdout)
    assert tuned["after"] <= tuned["before"]
    run("verify", tmp_path / "coded")
    run("recalibrate", source, tmp_path / "tuned", *how, "--data", on, "--out", tmp_path / "fed", "-q")
    after = json.loads(run("eval", source, tmp_path / "tuned", *evaluated).stdout)
    assert after["metrics"]["relative_error"] < found["metrics"]["relative_error"]
    save_file({"picture": x, "labels": labels[:5]}, on)
    assert "different numbers" in run("eval", source, out, *evaluated, code=4).stderr
    (tmp_path / "text.txt").write_text("a few words")
    for kind, code, says in (
        (tmp_path / "text.txt", 2, "no tokenizer"),
        ("self", 0, "synthetic inputs: noise pictures of"),
    ):
        assert says in run("convert", source, *how, "--out", tmp_path / "no", "--calibrate", kind, code=code).stderr


def test_a_folder_of_texts_and_one_of_pictures(spoken, tmp_path):
    kind, base, text = spoken
    if kind != "language model":
        return
    lines = text.read_text().splitlines()
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("\n".join(lines[:20]))
    (tmp_path / "texts" / "more" / "b.md").write_text("\n".join(lines[20:]))
    model = open_checkpoint(base, need="headers").model
    one, many = (read_inputs(path, base, model=model, samples=9) for path in (text, tmp_path / "texts"))
    assert len(one) == len(many) == 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, many))
    (tmp_path / "empty").mkdir()
    with pytest.raises(rpq.SourceError, match="neither texts"):
        read_inputs(tmp_path / "empty", base)

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vit = tf.ViTForImageClassification(tf.ViTConfig(**small, image_size=16, patch_size=8, num_labels=3))
    vit.save_pretrained(tmp_path / "vit")
    size = {"height": 16, "width": 16}
    tf.ViTImageProcessorPil(size=size).save_pretrained(tmp_path / "vit")
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        noise = torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{i}.png")
    run(
        "convert",
        tmp_path / "vit",
        "--out",
        tmp_path / "out",
        "--bits",
        2,
        "--grow",
        "--calibrate",
        tmp_path / "pictures",
    )
    found = json.loads(
        run("eval", tmp_path / "vit", tmp_path / "out", "--inputs", tmp_path / "pictures", "--json").stdout
    )
    assert found["samples"] == 5
    (tmp_path / "pictures" / "0.png").write_bytes(b"no picture")
    assert (
        "cannot be read"
        in run("eval", tmp_path / "vit", tmp_path / "out", "--inputs", tmp_path / "pictures", code=4).stderr
    )
