"""A converted model and its base in different precision: everything that runs both, and what is left of it."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.evaluation.answers import batch_answers
from rpq_convert.layers.precision import cast, dtype_of, fitting, kept_dtype, widened, widest

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)
        self.register_buffer("shift", torch.zeros(64))

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)) + self.shift)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(64, 8)).eval()


def dtypes(model):
    """Of everything that says what a model computes in; codebooks and scales may be wider in memory than in files."""
    held = {n: t.dtype for n, t in (*model.named_parameters(), *model.named_buffers()) if "_rpq." not in n}
    return held | {n: w.dtype for n, w in rpq.layers.surgery.layers_of(model).items()}


@pytest.mark.parametrize(
    ("base", "own"), [(F32, BF16), (BF16, BF16), (BF16, F32), (F16, BF16), (F32, F16), (F64, F32), (F64, F64)]
)
def test_two_models_of_any_precision_run_together(base, own):
    dense, small = net().to(base), net()
    rpq.convert(small, bits=2, grow=True, progress=False)
    small.to(own)
    for rest in (small[0][0].norm, small[0][1].norm):
        assert rest.weight.dtype == own
    data = [torch.randn(4, 64, dtype=base) for _ in range(3)]
    before = dtypes(small), dtypes(dense)
    assert rpq.evaluate(dense, small, data).metrics["cosine"] > 0.8
    assert set(rpq.layer_errors(dense, small, data)) == {"0.0.linear.weight", "0.1.linear.weight", "1.weight"}
    assert len(batch_answers(dense, small, data, 2)) == 2
    tuned = copy.deepcopy(small)
    found = rpq.tune(tuned, dense, data, held_out=data, steps=4, every=2)
    assert found.after < found.before and dtypes(tuned) == before[0]
    blocks = copy.deepcopy(small)
    assert set(rpq.tune_blocks(blocks, dense, data, steps=2)) == {"0", "1"} and dtypes(blocks) == before[0]
    report = rpq.recalibrate(fed := copy.deepcopy(small), dense, data, progress=False)
    assert report.output_error < 0.2 and dtypes(fed) == before[0]
    assert fed(data[0].to(own)).dtype == own and dtypes(dense) == before[1]


def test_what_fails_leaves_every_dtype():
    dense, small = net(), net().to(BF16)
    rpq.convert(small, bits=4, grow=True, progress=False)
    before = dtypes(small)
    small[1].register_forward_pre_hook(lambda *_: 1 / 0)
    for run in (rpq.recalibrate, rpq.tune):
        with pytest.raises(ZeroDivisionError):
            run(small, dense, [torch.randn(4, 64)] * 3)
        assert dtypes(small) == before and not any(hasattr(p, "_rpq_kept") for p in small.parameters())


def test_a_model_is_widened_for_a_while():
    model = net().to(F16)
    rpq.convert(model, bits=4, grow=True, progress=False)
    before, books = dtypes(model), model[1].weight_rpq.codebooks
    assert (dtype_of(model), widest(model), widest(model, torch.ones(1, dtype=BF16))) == (F16, F16, F32)
    with widened(model, F32), widened(model, F16):
        assert dtype_of(model) == widest(model) == F32 and model[1].weight_rpq.codebooks is books
        assert model[0][0].shift.dtype == F32 and kept_dtype(model[0][0].shift) == F16
        assert model(torch.randn(2, 64)).dtype == F32
    assert dtypes(model) == before


def test_inputs_are_cast_where_models_differ():
    ids, x = torch.arange(3), torch.ones(3)
    item = {"ids": ids, "x": (x, [x.double()]), "other": None, "flag": x > 0}
    made = cast(item, BF16)
    assert (
        made["ids"] is ids and made["x"][0].dtype == made["x"][1][0].dtype == BF16 and made["flag"].dtype == torch.bool
    )
    assert fitting(item, net(), net()) is item and fitting(x, net(), net().to(F64)).dtype == F64
    assert dtype_of(nn.ReLU()) == F32


def test_a_conversion_to_another_dtype_runs_in_the_models_own():
    data = [torch.randn(16, 64) for _ in range(2)]
    small = net()
    report = rpq.convert(small, bits=2, grow=True, dtype="bfloat16", calibration=data, progress=False, check=data)
    assert report.output_error < 0.2 and report.evaluations[0]["metrics"]["cosine"] > 0.8
    assert set(dtypes(small).values()) == {BF16} and small(data[0].to(BF16)).dtype == BF16


def test_a_factorys_dtype_counts_and_not_that_of_its_file(tmp_path):
    save_file(net().to(BF16).state_dict(), tmp_path / "net.safetensors")
    save_file({"input": torch.randn(20, 64, dtype=F64)}, tmp_path / "data.safetensors")
    how = {"factory": net, "bits": 4, "grow": True, "progress": False}
    report = rpq.convert_checkpoint(
        tmp_path / "net.safetensors", tmp_path / "out", calibration=tmp_path / "data.safetensors", **how
    )
    assert report.output_error is not None
    small = rpq.load(tmp_path / "out", factory=net)
    assert set(dtypes(small).values()) == {F32} and small(torch.randn(2, 64)).dtype == F32
