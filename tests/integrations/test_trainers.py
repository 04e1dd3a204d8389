"""Trainers of other libraries on converted models: Lightning, skorch, TRL, sentence-transformers. Slow, since they import much."""

import copy

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rpq_convert as rpq
from rpq_convert.errors import SourceError
from rpq_convert.layers.surgery import layers_of

pytestmark = pytest.mark.slow
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [weight.codes.plain.clone() for weight in layers_of(model).values()]


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net().eval()  # Lightning leaves it so
            rpq.convert(self.net, bits=8, grow=True)

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def fitted(epochs=2, callbacks=(), checkpoint=None, **how):
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=list(callbacks), **how,
        )  # fmt: skip
        module = Module()
        before = codes(module)
        trainer.fit(module, DataLoader(TensorDataset(X, Y), 16), ckpt_path=checkpoint)
        assert all(torch.equal(a, b) for a, b in zip(before, codes(module)))
        assert all(p.isfinite().all() for p in module.parameters())
        return module, trainer

    module, trainer = fitted()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Module()
    fresh.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(fresh.net(X), module.eval().net(X))
    resumed, straight = fitted(4, checkpoint=tmp_path / "a.ckpt")[0], fitted(4)[0]
    assert torch.equal(resumed.eval().net(X), straight.eval().net(X))
    fitted(callbacks=[EMAWeightAveraging(decay=0.9)])
    fitted(4, callbacks=[StochasticWeightAveraging(1e-2, swa_epoch_start=1)])
    fitted(precision="bf16-mixed")


def test_skorch(tmp_path):
    skorch = pytest.importorskip("skorch")
    model_selection = pytest.importorskip("sklearn.model_selection")

    def classifier():
        model = net()
        rpq.convert(model, bits=8, grow=True)
        return skorch.NeuralNetClassifier(model, criterion=nn.CrossEntropyLoss, max_epochs=15, lr=0.1, verbose=0)

    x, y = X.numpy(), Y.numpy()
    fitted = classifier().fit(x, y)
    assert fitted.history[-1, "train_loss"] < 0.9 * fitted.history[0, "train_loss"]
    fitted.save_params(f_params=tmp_path / "p.pt")
    again = classifier().initialize()
    again.load_params(f_params=tmp_path / "p.pt")
    assert (again.predict_proba(x) == fitted.predict_proba(x)).all()
    assert model_selection.GridSearchCV(classifier(), {"lr": [0.1, 0.01]}, cv=2).fit(x, y).best_score_ > 0


def test_trl(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    ids = torch.arange(12)[None]
    dense = ARCHITECTURES["Llama"](64)
    dense.save_pretrained(tmp_path / "dense")
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", bits=8, grow=True)
    how = {
        "max_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "bf16": False,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    rows = {"input_ids": [list(range(12))] * 4}
    words = Tokenizer(models.WordLevel({str(i): i for i in range(12)}, unk_token="0"))
    reader = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(tmp_path / "run", **how), train_dataset=datasets.Dataset.from_dict(rows), processing_class=reader
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "tuned")
    trained, again = trainer.model.eval(), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    assert torch.equal(again(ids).logits, trained(ids).logits)
    assert not torch.equal(trained(ids).logits, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits)


def bert_tokenizer(place):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]
    (place / "vocab.txt").write_text("\n".join(words))
    return tf.BertTokenizerFast(str(place / "vocab.txt"))


def test_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as modules

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 11,
    }
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "bert")
    encoder = modules.Transformer(str(tmp_path / "bert"))
    dense = st.SentenceTransformer(modules=[encoder, modules.Pooling(64, pooling_mode="mean"), modules.Dense(64, 32)])
    dense.save_pretrained(str(tmp_path / "dense"))
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", bits=8, grow=True)
    texts = ["the cat sat", "on a mat"]
    converted = st.SentenceTransformer(str(tmp_path / "out"))
    wanted = torch.tensor(converted.encode(texts))
    assert F.cosine_similarity(wanted, torch.tensor(dense.encode(texts))).min() > 0.999
    converted.save_pretrained(str(tmp_path / "again"))
    rpq.verify(tmp_path / "again")
    assert torch.equal(torch.tensor(st.SentenceTransformer(str(tmp_path / "again")).encode(texts)), wanted)
    rpq.convert(memory := copy.deepcopy(dense), bits=8, grow=True)
    wanted = torch.tensor(memory.encode(texts))
    assert torch.allclose(wanted, torch.tensor(dense.encode(texts)), atol=0.05)
    with pytest.warns(UserWarning, match="Dense: saved dense"):
        memory.save_pretrained(str(tmp_path / "theirs"))
    assert layers_of(memory[2]), "the model in memory keeps its codes"
    with pytest.warns(UserWarning, match="Dense: saved dense"):
        report = rpq.save(memory, tmp_path / "ours")
    assert report.to_json() and {"1_Pooling/config.json", "2_Dense/model.safetensors", "tokenizer.json"} <= set(
        rpq.verify(tmp_path / "ours")
    )
    for folder in ("theirs", "ours"):
        again = torch.tensor(st.SentenceTransformer(str(tmp_path / folder)).encode(texts))
        assert torch.allclose(again, wanted, atol=1e-6)


def test_other_models_of_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as modules

    texts, pairs = ["the cat sat", "on a mat"], [("the cat", "sat on"), ("a mat", "the mat")]
    for kind, sizes in ((tf.BertForSequenceClassification, {"num_labels": 1}), (tf.BertForMaskedLM, {})):
        torch.manual_seed(0)
        small = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 11,
        }
        kind(tf.BertConfig(**small, **sizes)).save_pretrained(tmp_path / kind.__name__)
        bert_tokenizer(tmp_path).save_pretrained(tmp_path / kind.__name__)

    def cross(folder):
        model = st.CrossEncoder(str(folder))
        return model, torch.tensor(model.predict(pairs))

    def sparse(folder):
        model = st.SparseEncoder(str(folder))
        return model, model.encode(texts).to_dense()

    for source, read in (("BertForSequenceClassification", cross), ("BertForMaskedLM", sparse)):
        model, dense = read(tmp_path / source)
        rpq.convert(model, bits=8, grow=True)
        model.save_pretrained(str(tmp_path / source / "theirs"))
        rpq.save(model, tmp_path / source / "ours")
        rpq.convert_checkpoint(tmp_path / source, tmp_path / source / "streamed", bits=8, grow=True)
        found = [read(tmp_path / source / name)[1] for name in ("theirs", "ours", "streamed")]
        assert torch.allclose(found[0], dense, atol=0.01) and all(torch.equal(f, found[0]) for f in found)

    static = st.SentenceTransformer(
        modules=[
            modules.StaticEmbedding(
                Tokenizer.from_file(str(tmp_path / "BertForMaskedLM" / "tokenizer.json")), embedding_dim=64
            )
        ]
    )
    routed = st.SentenceTransformer(modules=[modules.Router.for_query_document(
        [static[0]], [modules.Transformer(str(tmp_path / "BertForMaskedLM")), modules.Pooling(64)]
    )])  # fmt: skip
    rpq.convert(routed, bits=8, grow=True)
    for model in (static, routed):
        wanted = torch.tensor(model.encode_query(texts))
        with pytest.warns(UserWarning, match="StaticEmbedding: saved dense"):
            model.save_pretrained(str(tmp_path / f"saved{len(model)}{model is static}"))
        again = st.SentenceTransformer(str(tmp_path / f"saved{len(model)}{model is static}"))
        assert torch.allclose(torch.tensor(again.encode_query(texts)), wanted, atol=1e-6)
        with pytest.raises(SourceError, match="keeps no model in the folder itself"), pytest.warns(UserWarning):
            rpq.save(model, tmp_path / "no")
