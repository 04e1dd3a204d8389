"""Calibration: what the statistics are, that feedback pays, and that a calibrated model is like any other."""

import copy
from functools import partial

import architectures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from often import often
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import rpq_convert as rpq
from rpq_convert.calibration import hessian, sequential
from rpq_convert.core import results
from rpq_convert.encoding import encode
from rpq_convert.fit import fit_gptq, fit_kmeans, gptq
from rpq_convert.fit.additive import fit_additive
from rpq_convert.layers import surgery
from rpq_convert.running.blocks import arrivals, chains
from rpq_convert.running.weight_reads import Watch


def decode(fitted, n, length):
    stages, books = fitted.codebooks.shape[:2]
    blocks = fitted.codes.shape[1]
    tables = fitted.codebooks.float()
    rows = [
        sum(tables[s, b * books // blocks][fitted.codes[s, b].long()] for s in range(stages)) for b in range(blocks)
    ]
    return torch.cat(rows, 1)[:n, :length]


def cost(error, hessian, axis):
    """What an error of the matrix [n, L] costs: the sum over outputs of `e H e`."""
    error = error if axis == "in" else error.T  # [outputs, inputs]
    return float(((error.double() @ hessian) * error.double()).sum())


@st.composite
def problems(draw):
    axis = draw(st.sampled_from(["in", "out"]))
    dim, stages = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2), (8, 1)]))
    inputs, outputs = draw(st.integers(3, 150)), draw(st.integers(1, 40))
    length = inputs if axis == "in" else outputs
    blocks = -(-length // dim)
    books = draw(st.sampled_from([1, blocks] if blocks < 9 else [1]))
    rows = draw(st.integers(1, 400))
    return axis, dim, stages, books, inputs, outputs, rows, draw(st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_feedback_never_costs_more_than_none(problem):
    axis, dim, stages, books, inputs, outputs, rows, seed = problem
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    hessian = x.T.double() @ x.double()
    n, length = (outputs, inputs) if axis == "in" else (inputs, outputs)
    matrix = torch.randn(n, length, generator=g)
    common = {"dim": dim, "books": books, "stages": stages, "seed": seed}
    power = (hessian.diagonal() / hessian.diagonal().mean() + 0.01).float()
    importance = power.expand(n, length) if axis == "in" else power[:, None]
    none = decode(fit_additive(matrix, importance=importance, **common), n, length)
    fed = decode(fit_gptq(matrix, hessian, axis=axis, **common), n, length)
    assert cost(matrix - fed, hessian, axis) <= cost(matrix - none, hessian, axis) * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("shape", "axis", "dim", "books"), [
    ((600, 77), "in", 2, 1), ((100, 77), "in", 3, 2), ((40, 50), "in", 1, 1), ((33, 40), "in", 40, 1),
    ((150, 50), "out", 4, 1), ((100, 601), "out", 3, 2), ((70, 9), "out", 16, 1),
])  # fmt: skip
def test_compiled_steps_equal_those_of_torch(shape, axis, dim, books, scaled, monkeypatch):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=g)
    outputs, inputs = shape if axis == "in" else shape[::-1]
    x = torch.randn(400, inputs, generator=g) @ (torch.eye(inputs) + 0.1 * torch.randn(inputs, inputs, generator=g))
    hessian, scales = x.T.double() @ x.double(), 1 + torch.rand(outputs, generator=g) if scaled else None
    common = {"axis": axis, "dim": dim, "books": books, "stages": 1, "seed": 0, "scales": scales}
    fast = fit_gptq(matrix, hessian, **common)
    monkeypatch.setattr(gptq._Part, "_one_stage", gptq._Part._stages)
    slow = fit_gptq(matrix, hessian, **common)
    assert (fast.codes != slow.codes).float().mean() < 0.01  # sums are rounded in other places
    torch.testing.assert_close(fast.codebooks, slow.codebooks, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("inputs", [3, 383, 384, 600])
def test_gram(inputs):
    x = torch.randn(50, inputs, generator=torch.Generator().manual_seed(0))
    found = hessian.gram(x)
    torch.testing.assert_close(found, x.T @ x)
    assert torch.equal(found, found.T) or inputs < 384


def test_feedback_pays_where_inputs_are_correlated():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=g) @ torch.randn(128, 128, generator=g)
    hessian, matrix = x.T.double() @ x.double(), torch.randn(192, 128, generator=g)
    common = {"dim": 2, "books": 1, "stages": 1, "seed": 0}
    plain = decode(fit_kmeans(matrix, **common), 192, 128)
    fed = decode(fit_gptq(matrix, hessian, axis="in", **common), 192, 128)
    assert cost(matrix - fed, hessian, "in") < 0.6 * cost(matrix - plain, hessian, "in")


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("dim", [1, 4])
def test_what_256_codewords_can_say_is_recovered(axis, dim):
    g = torch.Generator().manual_seed(1)
    words = torch.randn(256, dim, generator=g)
    matrix = words[torch.randint(256, (60, 12), generator=g)].reshape(60, 12 * dim)
    inputs = 60 if axis == "out" else 12 * dim
    x = torch.randn(500, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    fitted = fit_gptq(matrix, x.T.double() @ x.double(), axis=axis, dim=dim, books=1, stages=1, seed=0)
    assert torch.allclose(decode(fitted, 60, 12 * dim), matrix, atol=1e-5)


def test_parts_are_fitted_to_their_own_inputs():
    g = torch.Generator().manual_seed(2)
    matrix = torch.randn(3 * 40, 24, generator=g)
    x = [torch.randn(300, 24, generator=g) @ torch.randn(24, 24, generator=g) for _ in range(3)]
    moments = torch.stack([a.T.double() @ a.double() for a in x])
    common = {"axis": "in", "dim": 2, "books": 1, "stages": 1, "seed": 0}

    def total(fitted):
        errors = (matrix - decode(fitted, 120, 24)).split(40)
        return sum(cost(e, h, "in") for e, h in zip(errors, moments))

    own, mean = fit_gptq(matrix, moments, **common), fit_gptq(matrix, moments.mean(0), **common)
    assert total(own) < 0.9 * total(mean)


@pytest.mark.parametrize(
    ("hessian", "said"),
    [(torch.eye(7), "7, 7"), (torch.full((8, 8), torch.nan), "finite"), (-torch.eye(8), "finite second moments")],
)
def test_statistics_that_cannot_be_are_refused(hessian, said):
    with pytest.raises(ValueError, match=said):
        fit_gptq(torch.randn(4, 8), hessian, axis="in", dim=2, books=1, stages=1, seed=0)


# What is measured: moments of everything that reads a weight.


def hessian_of(module, name, view, *inputs):
    """Return the Hessian of one parameter as `Watch` sees them."""
    found = hessian.Hessian()

    def see(_, reading, part):
        for offset, x in reading.vectors():
            found.add(x, part + offset)

    with torch.no_grad(), Watch({name: (module.get_parameter(name), view.split())}, see):
        module(*inputs)
    return found


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), "out in", (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), "out in k", (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), "out in kh kw", (2, 4, 7, 8)),
    "same": (lambda: nn.Conv2d(3, 5, 4, padding="same"), "out in kh kw", (2, 3, 6, 7)),
    "reflect": (lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), "out in kh kw", (2, 3, 6, 7)),
    "unbatched": (lambda: nn.Conv2d(3, 5, 3), "out in kh kw", (3, 6, 7)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1), "out in kh kw", (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), "out in kh kw", (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), "out in kd kh kw", (2, 2, 3, 4, 3)),
    "transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), "in out k", (2, 3, 5)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=2, dilation=2), "in out kh kw", (2, 4, 5, 4)),
    "transpose cut": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=1, padding=1), "in out kh kw", (2, 4, 5, 4)),
    "transpose groups": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=3, groups=2), "in out kh kw", (2, 4, 3, 4)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), "in out kd kh kw", (1, 2, 3, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_moments_give_the_energy_of_the_output(name):
    """`tr(W H W^T)` is the squared norm of the output without bias, so the vectors and their order are right."""
    build, view, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    layer.bias = None
    x = torch.randn(shape)
    found = hessian_of(layer, "weight", view, x)
    groups = getattr(layer, "groups", 1)
    weight = rpq.WeightView(view).to_matrix(layer.weight.detach(), "in").double()  # [outputs, inputs]
    if "in out" in view and groups > 1:  # stored [in, out / groups, …]: a group's inputs are a run of the first axis
        parts = [rpq.WeightView(view).to_matrix(w, "in").double() for w in layer.weight.detach().chunk(groups)]
    else:
        parts = weight.chunk(groups)
    energy = sum(float(((w @ found.parts[g]) * w).sum()) for g, w in enumerate(parts))
    assert energy == pytest.approx(float(layer(x).detach().double().square().sum()), rel=1e-4)


def test_moments_of_bilinear_and_attention():
    torch.manual_seed(0)
    bilinear = nn.Bilinear(3, 4, 5, bias=False)
    a, b = torch.randn(7, 3), torch.randn(7, 4)
    w = bilinear.weight.detach().reshape(5, 12).double()
    found = hessian_of(bilinear, "weight", "out in in2", a, b).matrix()
    assert float(((w @ found) * w).sum()) == pytest.approx(
        float(bilinear(a, b).detach().double().square().sum()), rel=1e-4
    )

    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8)
    found = hessian_of(attention, "in_proj_weight", "out in", x, x, x)
    flat = x.reshape(-1, 8).double()
    assert found.rows == 10 and torch.allclose(found.matrix(), flat.T @ flat, atol=1e-4)


class OneExpertAtATime(nn.Module):
    is_transposed = False

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return sum(F.linear(x[e], self.up_proj[e]) for e in range(3))


class AllExpertsAtOnce(OneExpertAtATime):
    def forward(self, x):
        return torch.bmm(x, self.up_proj.transpose(1, 2)).sum(0)


@pytest.mark.parametrize("kind", [OneExpertAtATime, AllExpertsAtOnce])
def test_experts_have_moments_of_their_own(kind):
    x = torch.randn(3, 5, 4)
    found = hessian_of(kind(), "up_proj", "expert out in", x).matrix(3)
    assert torch.allclose(found, torch.stack([a.T.double() @ a.double() for a in x]), atol=1e-4)


def test_moments_in_a_stream_are_those_at_once():
    x = torch.randn(1000, 16)
    once, stream = hessian.Hessian(), hessian.Hessian()
    once.add(x)
    for part in x.split(33):
        stream.add(part)
    assert stream.rows == once.rows == 1000
    assert torch.allclose(stream.matrix(), once.matrix(), rtol=1e-5, atol=1e-3)


# Whole models.


def llama(**config):
    torch.manual_seed(0)
    model = architectures.ARCHITECTURES["Llama"](64)
    return model.eval()


@pytest.fixture(scope="module")
def tokens():
    g = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 256, (2, 24), generator=g)} for _ in range(6)]


BITS = {"bits": 2, "grow": True}


def output_error(dense, model, data):
    return rpq.evaluate(dense, model, data).metrics["relative_error"]


def test_a_calibrated_model_is_nearer_and_saves_loads_repeats(tokens, tmp_path):
    dense = llama()
    plain, fed, again = (copy.deepcopy(dense) for _ in range(3))
    rpq.convert(plain, **BITS)
    report = rpq.convert(fed, calibration=tokens[:4], **BITS)
    rpq.convert(again, calibration=iter(tokens[:4]), executor="serial", **BITS)
    assert all(row.inputs == 4 * 48 for row in report.rows if row.decision == "rpq" and "embed" not in row.name)
    assert output_error(dense, fed, tokens[:4]) < 0.8 * output_error(dense, plain, tokens[:4])
    state = fed.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in again.state_dict().items())
    rpq.save(fed, tmp_path / "out")
    loaded = rpq.load(tmp_path / "out")
    assert torch.equal(loaded(**tokens[5]).logits, fed(**tokens[5]).logits)
    assert rpq.audit(tmp_path / "out").options["calibration"]["items"] == 4


def test_tied_weights_stay_tied_and_get_the_moments_of_the_head(tokens):
    model = architectures.ARCHITECTURES["GPT-2"](64).eval()
    report = rpq.convert(model, calibration=tokens, **BITS)
    assert model.lm_head.weight_rpq is model.transformer.wte.weight_rpq
    row = next(r for r in report.rows if "wte" in r.name)
    assert row.inputs == 6 * 48


def test_a_chain_of_blocks_gives_what_runs_from_the_start_give(tokens):
    def stack():
        torch.manual_seed(5)
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16)) for _ in range(3)]
        return nn.Sequential(*blocks).eval()

    class Broken(nn.Module):
        """Runs the same blocks with copies between them."""

        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            for block in self.body:
                x = block(x).clone()
            return x

    data = [torch.randn(50, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    chained, broken = stack(), Broken(stack())
    assert chains(chained, data[0]) == [["0", "1", "2"]]
    assert "body" not in [c[0].rpartition(".")[0] for c in chains(broken, data[0])]
    rpq.convert(chained, calibration=data, bits=4, grow=True)
    rpq.convert(broken, calibration=data, bits=4, grow=True)
    ours, theirs = chained.state_dict(), broken.body.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


@pytest.mark.parametrize("name", often(["BERT", "T5", "Mixtral", "gpt-oss", "GPT-2"], ("T5", "Mixtral")))
def test_architectures(name, tokens):
    torch.manual_seed(0)
    dense = architectures.ARCHITECTURES[name](64).eval()
    data = [{**t, "decoder_input_ids": t["input_ids"]} for t in tokens] if name == "T5" else tokens
    plain, fed = copy.deepcopy(dense), copy.deepcopy(dense)
    rpq.convert(plain, **BITS)
    report = rpq.convert(fed, calibration=data, **BITS)
    assert output_error(dense, fed, data) < output_error(dense, plain, data)
    assert not [w for w in report.warnings if "not reached" in w and "pooler" not in w]


def test_a_convolutional_net_with_all_kinds():
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, groups=4, padding=1), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16 * 16, 10),
    ).eval()  # fmt: skip
    data = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    plain, fed = copy.deepcopy(dense), copy.deepcopy(dense)
    rpq.convert(plain, bits=2, grow=True)
    report = rpq.convert(fed, calibration=data, bits=2, grow=True)
    assert all(row.inputs for row in report.rows if row.decision == "rpq")
    assert output_error(dense, fed, data) < output_error(dense, plain, data)
    assert any("give more calibration samples" in w for w in report.warnings)  # 32 images for 2048 inputs


def test_training_mode_and_cache_setting_survive(tokens):
    model = llama().train()
    model.config.use_cache = True
    rpq.convert(model, calibration=tokens[:1], **BITS)
    assert model.training and model.model.layers[0].mlp.training and model.config.use_cache is True


def test_what_was_never_run_is_fitted_to_its_weights_and_said_so(tokens):
    class WithSpare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    model = WithSpare()
    report = rpq.convert(model, calibration=[torch.randn(64, 32)], bits=4, grow=True)
    assert any("spare.weight" in w for w in report.warnings)
    assert {r.name: r.inputs for r in report.rows if r.decision == "rpq"} == {"used.weight": 64, "spare.weight": None}


@pytest.mark.parametrize("when", ["input", "weight"])
def test_a_failure_leaves_the_model_as_it_was(tokens, when):
    model = llama()
    if when == "weight":
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = {k: t.clone() for k, t in model.state_dict().items()}
    data = [*tokens[:2], {"input_ids": torch.tensor([[10**6]])}] if when == "input" else tokens[:2]
    with pytest.raises((IndexError, ValueError)):
        rpq.convert(model, calibration=data, **BITS)
    assert not surgery.layers_of(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t.nan_to_num(7), after[k].nan_to_num(7)) for k, t in before.items())


def test_bad_data_is_refused():
    with pytest.raises(rpq.CalibrationError, match="empty"):
        rpq.convert(llama(), calibration=[], **BITS)
    with torch.device("meta"):
        empty = nn.Linear(64, 64)
    with pytest.raises(rpq.PlanError, match="meta"):
        rpq.convert(empty, calibration=[torch.randn(1, 64)], **BITS)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return x

    with pytest.raises(rpq.CalibrationError, match="multiplied by anything"):
        rpq.convert(Table(), calibration=[torch.randn(1, 64)], **BITS)


def test_checkpoint_equals_memory_and_goes_on_after_a_kill(tokens, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "dense")
    done = []

    def stop(job, encoded):
        done.append(job.name)
        if len(done) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", calibration=tokens, progress=stop, **BITS)
    with pytest.raises(rpq.FolderError, match="unfinished run"):
        rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", calibration=tokens[:3], **BITS)
    fresh = []
    rpq.convert_checkpoint(
        tmp_path / "dense",
        tmp_path / "out",
        calibration=tokens,
        progress=lambda j, e: fresh.append((j.name, e)),
        **BITS,
    )
    assert sum(e is None for _, e in fresh) >= 6  # taken from the first run
    rpq.convert(model, calibration=tokens, **BITS)
    loaded = rpq.load(tmp_path / "out")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


def test_asymmetric_calibration_goes_half_way():
    """Inputs that drifted by an invertible map: the matrix that undoes it is known."""
    g = torch.Generator().manual_seed(0)
    dense, x = torch.randn(6, 8, generator=g), torch.randn(5000, 8, generator=g)
    back = torch.eye(8) + 0.3 * torch.randn(8, 8, generator=g)  # the dense inputs are x back^T
    seen = hessian.Hessian()
    seen.add(x)
    seen.add_cross(x @ back.T, x)
    found = encode._asymmetric(dense, results.Statistics(seen.matrix(), len(x), seen.cross))
    torch.testing.assert_close(found, dense + (dense @ back - dense) / 2, rtol=0.05, atol=0.05)


def test_a_block_is_given_the_drift_of_the_blocks_before_it(tokens, monkeypatch):
    """Without the dense twin, a chain's output is further from the dense one's."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Linear(48, 48), nn.Tanh()) for _ in range(6)))
    for p in base.parameters():
        p.data.mul_(2)
    data = [torch.randn(256, 48) for _ in range(8)]
    found = {}
    for share in (0.0, 0.5):
        monkeypatch.setattr(encode, "ASYMMETRIC", share)
        model = copy.deepcopy(base)
        rpq.convert(model, bits=2, grow=True, calibration=data)
        found[share] = rpq.evaluate(base, model, [torch.randn(2000, 48)]).metrics["relative_error"]
    assert found[0.5] < 0.95 * found[0.0]


class _WritesOver(nn.Module):
    """A block that writes over what its first layer was given before the second one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(x.mul_(y.tanh())) + y


@pytest.mark.parametrize("block", [_WritesOver, lambda: nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))])
def test_what_dense_blocks_multiply_is_the_same_kept_or_made_again(block, monkeypatch):
    torch.manual_seed(0)
    base, data = nn.Sequential(*(block() for _ in range(3))), [torch.randn(40, 32) for _ in range(3)]
    found, runs = [], []
    for kept in (1 << 30, 0):
        monkeypatch.setattr(sequential, "KEPT", kept)
        model, calls = copy.deepcopy(base), []
        for part in model:
            part.register_forward_pre_hook(
                lambda *_, calls=calls: calls.append(1)
            )  # dense copies of it have the hook too
        rpq.convert(model, bits=2, grow=True, calibration=[x.clone() for x in data])
        found.append(model.state_dict())
        runs.append(len(calls))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())
    if block is _WritesOver:  # what it multiplies cannot be kept
        assert runs[0] == runs[1]
    else:
        assert runs[0] < runs[1]


def test_data_that_was_made_in_inference_mode_serves():
    """Such tensors count no versions, and a weight may multiply one as it comes."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.given = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
            return self.own(x).tanh() + self.given(given)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Reads() for _ in range(3))

        def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x, given)
            return x

    torch.manual_seed(0)
    base, data = Net(), [(torch.randn(40, 32), torch.randn(40, 32)) for _ in range(2)]
    with torch.inference_mode():
        made = [tuple(x.clone() for x in item) for item in data]
    found = []
    for items in (data, made):
        model = copy.deepcopy(base)
        rpq.convert(model, bits=2, grow=True, calibration=items)
        found.append(model.state_dict())
    assert made[0][1].is_inference()
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


def test_padding_is_not_counted(tokens):
    """A batch with padding gives the statistics of its sentences alone: the first layer's are the same to the bit."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 256,
    }
    dense = BertModel(BertConfig(**sizes)).eval()
    ids = torch.randint(5, 200, (1, 9))
    short = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    padded = [{k: F.pad(v, (0, 7)) for k, v in short[0].items()}]
    found = []
    for data in (short, padded):
        model = copy.deepcopy(dense)
        report = rpq.convert(model, bits=4, grow=True, calibration=data)
        found.append({r.name: r.inputs for r in report.rows if r.inputs})
    assert found[0] == found[1] and found[0] and set(found[0].values()) <= {9, 1}


def test_recalibration_never_makes_a_layer_worse_under_its_inputs():
    """And a failure leaves the model as it was."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).eval()
    model = copy.deepcopy(base)
    mix = torch.randn(64, 64) * torch.logspace(0, -2, 64)
    data = [torch.randn(100, 64) @ mix for _ in range(3)]
    rpq.convert(model, dim=4, grow=True)
    before = rpq.evaluate(base, model, data).metrics["relative_error"]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(rpq.CalibrationError, match=r"2.weight \[64, 96\] is no dense parameter"):
        rpq.recalibrate(model, nn.Sequential(base[0], base[1]), data)
    with pytest.raises(RuntimeError):
        rpq.recalibrate(model, base, [*data, torch.randn(2, 7)])
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    report = rpq.recalibrate(model, base, data)
    after = rpq.evaluate(base, model, data).metrics["relative_error"]
    assert after < before
    assert {r.name: r.inputs for r in report.rows if r.decision == "rpq"} == {"0.weight": 300, "2.weight": 300}
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    for _ in range(2):  # what has been reached is not lost
        rpq.recalibrate(model, base, data)
        now = rpq.evaluate(base, model, data).metrics["relative_error"]
        assert now <= after * 1.02
        after = now


@pytest.mark.parametrize("changed", [False, True])
def test_arguments_are_taken_from_the_dense_runs_where_conversion_leaves_them(changed):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x, shift):
            return self.linear(x) + shift

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.runs = nn.Linear(16, 16), nn.ModuleList(Block() for _ in range(3)), 0

        def forward(self, x):
            y = self.first(x)
            shift = y.mean() if changed else x.mean()
            for block in self.body:
                self.runs += block is self.body[1]
                y = block(y, shift)
            return y

    torch.manual_seed(0)
    model, other = Stack().eval(), Stack().eval()
    other.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    runs = [[partial(m, torch.full((2, 16), float(i))) for i in range(4)] for m in (model, other)]
    chain = [f"body.{i}" for i in range(3)]
    like = arrivals(model, chain, runs[0])
    alone = arrivals(other, chain, runs[1])
    other.runs = 0
    found = arrivals(other, chain, runs[1], like)
    assert other.runs == (4 if changed else 1)  # past the first block
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a.hidden, b.hidden)
        assert all(torch.equal(a.rest[c][0][0], b.rest[c][0][0]) for c in chain)
