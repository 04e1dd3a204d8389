"""Every property of a converted layer, held against every row of the zoo.

The reference decoder below is written from the definition of the format alone: one Python loop over the entries of the
parameter, no view, no spec method. All else follows from it: forward, gradients, what is read, saved and restored.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
import weakref

import pytest
import torch
import zoo
from often import often
from torch import nn
from torch.func import functional_call

import rpq_convert as rpq
from rpq_convert.core.axes import WeightView
from rpq_convert.layers.lazy_weight import ComputedWeight
from rpq_convert.layers.surgery import RPQLayer, layers_of
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.layer_types import LAYERS

DIM = 3  # divides few of the widths
LAYOUTS = {
    "out, one book, scales": {"axis": "out", "books": 1, "stages": 1, "scales": "float32"},
    "out, a book per block": {"axis": "out", "books": "blocks", "stages": 1, "scales": "none"},
    "in, a book per block": {"axis": "in", "books": "blocks", "stages": 1, "scales": "none"},
    "in, one book, two stages": {"axis": "in", "books": 1, "stages": 2, "scales": "float32"},
    "out, two books, two stages": {"axis": "out", "books": 2, "stages": 2, "scales": "none"},
}
DEFAULT = LAYOUTS["out, one book, scales"]
rows = pytest.mark.parametrize("row", zoo.ZOO, ids=lambda r: r.name)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def pair(row: zoo.Row, layout=None) -> tuple[nn.Module, nn.Module]:
    """Return (the dense model, its converted twin with random codes)."""
    torch.manual_seed(0)
    dense = row.build()
    model = copy.deepcopy(dense)
    settings = {"dim": DIM, "codebook_dtype": "float32", **(layout or DEFAULT)}
    rules = [{"match": m, **settings, **s} for m, s in row.rules] + [{"match": "*", **settings}]
    rpq.convert(model, rules=rules, fit="random", grow=True, executor="serial")
    for name, weight in layers_of(model).items():
        if weight.scales is not None:  # random codes start with equal scales, which would hide a swapped axis
            weight.scales.data.uniform_(0.5, 2, generator=generator())
        assert weight.spec.axis == settings["axis"], name
    return dense, model


def reference(row: zoo.Row, name: str, weight: RPQWeight, codebooks=None, scales=None) -> torch.Tensor:
    """Decode by the definition, entry by entry; differentiable in the codebooks and scales that are passed."""
    spec, shape, axes = weight.spec, weight.shape, row.views[name].split()
    codebooks = weight.codebooks.detach() if codebooks is None else codebooks
    scales = weight.scales.detach() if scales is None and weight.scales is not None else scales
    cut = [i for i, a in enumerate(axes) if (a == "out") == (spec.axis == "out") and a != "expert"]
    kept = [i for i in range(len(axes)) if i not in cut]
    length = 1
    for i in cut:
        length *= shape[i]
    blocks = -(-length // spec.dim)
    stages = weight.codes if spec.stages > 1 else weight.codes[None]
    if name in row.lookups and spec.axis == "in":  # an embedding keeps the codes of one entry together
        stages = stages.transpose(1, 2)
    assert stages.shape == (spec.stages, blocks, math.prod(shape[i] for i in kept)), name
    assert scales is None or scales.numel() == math.prod(s for s, a in zip(shape, axes) if a in ("expert", "out")), name
    stages = stages.tolist()
    books = codebooks if spec.stages > 1 else codebooks[None]
    at: list[list[tuple[int, int, int]]] = [[] for _ in range(spec.stages)]
    scale_at = []
    for index in itertools.product(*map(range, shape)):
        n = column = out = 0
        for i in kept:
            n = n * shape[i] + index[i]
        for i in cut:
            column = column * shape[i] + index[i]
        for i, a in enumerate(axes):
            if a in ("expert", "out"):
                out = out * shape[i] + index[i]
        block, within = divmod(column, spec.dim)
        for s in range(spec.stages):
            at[s].append((block * spec.books // blocks, stages[s][block][n], within))
        scale_at.append(out)
    total = sum(books[s][tuple(torch.tensor(at[s]).T)] for s in range(spec.stages)).to(row.dtype)
    if scales is not None:
        total = total * scales.flatten().to(row.dtype)[scale_at]
    total = total.reshape(shape)
    if name in row.zero_rows:
        mask = torch.ones(shape[0], 1)
        mask[row.zero_rows[name]] = 0
        total = total * mask
    return total


def references(row, model, **parts) -> dict[str, torch.Tensor]:
    """Return every converted path -> its reference; tied paths share one tensor."""
    made: dict[int, torch.Tensor] = {}
    for name, weight in layers_of(model).items():
        if id(weight) not in made:
            made[id(weight)] = reference(row, name, weight, **parts.get(name, {}))
    return {name: made[id(weight)] for name, weight in layers_of(model).items()}


def run(model: nn.Module, inputs, weights=None) -> torch.Tensor:
    out = functional_call(model, weights, inputs, tie_weights=False) if weights else model(*inputs)
    return out[0] if isinstance(out, tuple) else out


def close(a, b, dtype=torch.float32, msg=None):
    tolerance = {torch.bfloat16: 3e-2}.get(dtype, 2e-6)  # codebooks are float32, whatever the weight is
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=True, msg=msg)


def close_gradients(a, b, dtype, msg, least=0.0):
    """The same relative to the largest: in float32 those behind norms and softmax miss the exact ones by 4e-6 of it, dense ones too.

    least: what counts as the largest where all are less; some gradients are zero but for rounding.
    """
    scale = max(float(b.abs().max()), least) or 1.0
    tolerance = {torch.bfloat16: 3e-2}.get(dtype, 8e-6)
    torch.testing.assert_close(a / scale, b / scale, rtol=tolerance, atol=tolerance, check_dtype=True, msg=msg)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> None:
    x, y = tensors(a), tensors(b)
    assert list(x) == list(y)
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), name


def check_decode(row: zoo.Row, layout) -> None:
    """Raise AssertionError where a weight does not come back as the definition says."""
    _, model = pair(row, layout)
    found = layers_of(model)
    assert set(found) == set(row.views)
    for name, expected in references(row, model).items():
        assert torch.equal(found[name](), expected), name


@layouts
@rows
def test_decode_equals_the_definition(row, layout):
    check_decode(row, layout)


@pytest.mark.parametrize("kind, name", [(k, n) for k, views in LAYERS.items() for n in views], ids=str)
def test_a_wrong_view_makes_a_row_fail(kind, name, monkeypatch):
    view = LAYERS[kind][name]
    first, second, *rest = view.axes
    wrong = WeightView(" ".join((second, first, *rest)), view.axis)
    monkeypatch.setitem(LAYERS, kind, {**LAYERS[kind], name: wrong})
    for row in zoo.ZOO:
        try:
            check_decode(row, DEFAULT)
        except AssertionError:
            return
    pytest.fail(f"no row notices that {name} of {kind} is read as {wrong.names}")


@layouts
@rows
def test_forward_and_gradients_equal_the_dense_layer_with_the_decoded_weight(row, layout):
    dense, model = pair(row, layout)
    inputs = row.inputs(generator())
    leaves, parts = {}, {}
    for name, weight in layers_of(model).items():
        if id(weight) not in leaves:
            leaves[id(weight)] = {
                k: getattr(weight, k).detach().clone().requires_grad_()
                for k in ("codebooks", "scales")
                if getattr(weight, k) is not None
            }
        parts[name] = leaves[id(weight)]
    for module in dense.modules():  # a sparse gradient cannot flow on into a reference; its values are the same
        if getattr(module, "sparse", False):
            module.sparse = False
    expected = run(dense, inputs, references(row, model, **parts))
    got = run(model, inputs)
    close(got, expected, row.dtype)
    weights = torch.randn(got.shape, generator=generator()).to(got.dtype)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, weight in layers_of(model).items():
        for part, leaf in leaves[id(weight)].items():
            gradient = getattr(weight, part).grad
            assert gradient is not None and gradient.layout == torch.strided, (name, part)
            close_gradients(gradient, leaf.grad, row.dtype, msg=lambda m, n=name, p=part: f"{n} {p}: {m}")
        assert weight.codes.grad is None and not weight.codes.requires_grad
    dense_grads = {n: p.grad for n, p in dense.named_parameters() if p.is_leaf and p.grad is not None}
    for name, p in model.named_parameters():
        if name in dense_grads:
            close_gradients(p.grad, dense_grads[name], row.dtype, msg=lambda m, n=name: f"{n}: {m}", least=1.0)
    model.eval(), dense.eval()
    with torch.no_grad():
        close(run(model, inputs), run(dense, inputs, references(row, model)), row.dtype)


@rows
def test_weight_reads_like_the_dense_one(row):
    dense, model = pair(row)
    for name, expected in references(row, model).items():
        module, _, leaf = name.rpartition(".")
        owner, before = model.get_submodule(module), dense.get_parameter(name)
        weight = getattr(owner, leaf)
        assert isinstance(owner, RPQLayer) and isinstance(owner, type(dense.get_submodule(module)))
        assert type(owner).__name__ == "RPQ" + type(dense.get_submodule(module)).__name__
        assert isinstance(weight, ComputedWeight) and weight.shape == before.shape and weight.dtype == before.dtype
        assert (weight.ndim, weight.numel(), weight.device) == (before.ndim, before.numel(), before.device)
        assert weight.requires_grad and len(weight) == len(before)
        assert torch.equal(weight.detach().clone(), expected)
        assert torch.equal(weight[0], expected[0]) and torch.equal(
            weight.T if weight.ndim == 2 else weight.mT, expected.mT
        )
        assert torch.equal(weight * 2, expected * 2) and torch.equal(weight.abs().sum(), expected.abs().sum())
        assert leaf not in owner._parameters


WRITES = {
    "add_": lambda m, n, w: w.add_(1),
    "mul_ without gradients": lambda m, n, w: torch.no_grad()(lambda: w.mul_(0))(),
    "setitem": lambda m, n, w: w.__setitem__(0, 0.0),
    "iadd": lambda m, n, w: w.__iadd__(1),
    "data": lambda m, n, w: w.data.zero_(),
    "data is set": lambda m, n, w: setattr(w, "data", torch.zeros(w.shape)),
    "detach": lambda m, n, w: w.detach().zero_(),
    "row": lambda m, n, w: w[0].zero_(),
    "row of a transpose": lambda m, n, w: w.transpose(0, 1)[0].fill_(1),
    "flat": lambda m, n, w: w.view(-1)[0].fill_(1),
    "chunk": lambda m, n, w: w.data.split(1)[0].zero_(),
    "out=": lambda m, n, w: torch.add(torch.ones(w.shape), 1, out=w),
    "copy_": lambda m, n, w: w.copy_(torch.zeros(w.shape)),
    "init": lambda m, n, w: nn.init.normal_(w),
    "init by name": lambda m, n, w: nn.init.zeros_(tensor=w),
    "inplace=True by name": lambda m, n, w: nn.functional.relu(input=w, inplace=True),
    "inplace=True": lambda m, n, w: nn.functional.relu(w, inplace=True),
    "foreach": lambda m, n, w: torch._foreach_add_([w], 1.0),
    "assign": lambda m, n, w: setattr(m, n, nn.Parameter(torch.zeros(w.shape))),
    "assign a tensor": lambda m, n, w: setattr(m, n, torch.zeros(w.shape)),
    "grad": lambda m, n, w: setattr(w, "grad", torch.zeros(w.shape)),
    "delete": lambda m, n, w: delattr(m, n),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    "name",
    often(
        ["Linear", "Conv2d", "Embedding padding", "tied", "MultiheadAttention kdim", "experts", "weight norm", "LSTM"],
        ("Linear", "tied", "experts", "LSTM"),
    ),
)
def test_writing_raises_and_changes_nothing(name, write):
    row = zoo.BY_NAME[name]
    _, model = pair(row)
    before = tensors(model)
    for path in row.views:
        module, _, leaf = path.rpartition(".")
        owner = model.get_submodule(module)
        with pytest.raises((RuntimeError, AttributeError)):
            write(owner, leaf, getattr(owner, leaf))
    after = tensors(model)
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("name", ["weight norm", "spectral norm"])
def test_assigning_to_a_parametrized_weight_raises(name):
    """torch would turn the value into what the weight is computed from: codes, which cannot take it."""
    _, model = pair(zoo.BY_NAME[name])
    layer = next(m for m in model.eval().modules() if nn.utils.parametrize.is_parametrized(m))
    before = tensors(model)
    with pytest.raises(RuntimeError, match="would be lost"):
        layer.weight = torch.zeros_like(layer.weight)
    assert all(torch.equal(t, before[k]) for k, t in tensors(model).items())


def test_a_recurrent_layer_lets_go_of_its_dense_weights():
    """It keeps a list of its parameters for C++, beside the modules' own table."""
    model = nn.LSTM(5, 6)
    dense = weakref.ref(model.weight_hh_l0)
    rpq.convert(model, dim=2, fit="random", grow=True)
    assert dense() is None
    rpq.restore(model)
    assert model._flat_weights[1] is model.weight_hh_l0 and type(model) is nn.LSTM


@rows
def test_save_and_load_are_exact(row, tmp_path):
    _, model = pair(row)
    model.eval()
    rpq.save(model, tmp_path / "out")
    rpq.verify(tmp_path / "out")
    loaded = rpq.load(tmp_path / "out", factory=row.build)
    same(loaded, model)
    assert not any(t.is_meta for t in loaded.state_dict().values())
    inputs = row.inputs(generator())
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert len(set(layers_of(loaded).values())) == len(set(layers_of(model).values()))  # what was shared is shared


@rows
@torch.no_grad()  # a recurrent model keeps its state, which could not be copied with its history
def test_copies_are_exact_and_independent(row):
    _, model = pair(row)
    model.eval()
    inputs = row.inputs(generator())
    expected = run(model, inputs)
    fresh = pair(row)[1].eval()
    for weight in layers_of(fresh).values():
        weight.codebooks.data.zero_()
    fresh.load_state_dict(model.state_dict())
    copies = {"deepcopy": copy.deepcopy(model), "state_dict": fresh}
    if not row.parametrized:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies |= {
            "pickle": pickle.loads(pickle.dumps(model)),
            "torch.save": torch.load(buffer, weights_only=False),
        }
    for how, twin in copies.items():
        same(twin, model)
        assert row.parametrized or type(twin) is type(model), how
        assert torch.equal(run(twin, inputs), expected), how
        for weight in layers_of(twin).values():
            weight.codebooks.add_(1)
        assert torch.equal(run(model, inputs), expected), how


@rows
def test_restore_gives_the_original_classes_and_equal_outputs(row):
    dense, model = pair(row)
    model.eval()
    inputs = row.inputs(generator())
    expected, weights = run(model, inputs).detach(), references(row, model)
    assert rpq.restore(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert set(model.state_dict()) == set(dense.state_dict())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in dense.named_parameters()}
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        assert type(parameter) is nn.Parameter and parameter.requires_grad and torch.equal(parameter, weight)
    close(run(model, inputs), expected, row.dtype)


@rows
def test_train_eval_and_casts(row):
    _, model = pair(row)
    model.eval()
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())
    codes = {n: w.codes.clone() for n, w in layers_of(model).items()}
    before = references(row, model)
    model.to(torch.float64)
    inputs = tuple(i.double() if i.is_floating_point() else i for i in row.inputs(generator()))
    assert run(model, inputs).dtype == torch.float64
    for name, weight in layers_of(model).items():
        assert torch.equal(weight.codes, codes[name]) and weight.codes.dtype == torch.uint8
        assert weight().dtype == torch.float64 and weight.codebooks.dtype == torch.float64
        close(weight().to(row.dtype), before[name], row.dtype)


@rows
def test_functional_call_replaces_codebooks(row):
    _, model = pair(row)
    model.eval()
    inputs = row.inputs(generator())
    swapped = {n: p * 0.5 + 1 for n, p in model.named_parameters() if n.endswith("codebooks")}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in {id(w): w for w in layers_of(other).values()}.values():
            weight.codebooks.mul_(0.5).add_(1)
    expected, before = run(other, inputs), run(model, inputs)
    assert torch.equal(run(model, inputs, swapped), expected) and torch.equal(run(model, inputs), before)


def big(name: str) -> nn.Module:
    """The layer types again, large enough for a standard deviation."""
    return {
        "Linear": lambda: nn.Linear(300, 200),
        "Conv1d": lambda: nn.Conv1d(64, 128, 5),
        "Conv2d groups": lambda: nn.Conv2d(64, 128, 3, groups=4),
        "Conv3d": lambda: nn.Conv3d(24, 40, 3),
        "ConvTranspose1d": lambda: nn.ConvTranspose1d(64, 96, 5),
        "ConvTranspose2d groups": lambda: nn.ConvTranspose2d(64, 96, 3, groups=4),
        "ConvTranspose3d": lambda: nn.ConvTranspose3d(24, 40, 3),
        "Bilinear": lambda: nn.Bilinear(30, 40, 50),
        "Embedding": lambda: nn.Embedding(500, 96),
        "EmbeddingBag": lambda: nn.EmbeddingBag(500, 96),
        "MultiheadAttention": lambda: nn.MultiheadAttention(96, 4),
        "MultiheadAttention kdim": lambda: nn.MultiheadAttention(96, 4, kdim=64, vdim=48),
        "LSTM": lambda: nn.LSTM(100, 200, 2, proj_size=80),
        "GRUCell": lambda: nn.GRUCell(100, 200),
        "transformers Conv1D": lambda: __import__("transformers").pytorch_utils.Conv1D(300, 200),
    }[name]()


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("books", [1, "blocks"])
@pytest.mark.parametrize("name", [
    "Linear", "Conv1d", "Conv2d groups", "Conv3d", "ConvTranspose1d", "ConvTranspose2d groups", "ConvTranspose3d",
    "Bilinear", "Embedding", "EmbeddingBag", "MultiheadAttention", "MultiheadAttention kdim", "LSTM", "GRUCell",
    "transformers Conv1D",
])  # fmt: skip
def test_random_codes_have_the_deviation_of_the_dense_layers_own_init(name, books, where):
    torch.manual_seed(0)
    dense = big(name)
    model = copy.deepcopy(dense) if where == "cpu" else copy.deepcopy(dense).to("meta")
    rule = {"match": "*", "dim": 4, "books": books, "codebook_dtype": "float32", "scales": "none"}
    rpq.convert(model, rules=[rule], fit="random", grow=True, executor="serial")
    found = layers_of(model)
    assert found
    for path, weight in found.items():
        expected = float(dense.get_parameter(path).detach().std())
        assert float(weight().detach().std()) == pytest.approx(expected, rel=0.1), path


@pytest.mark.parametrize(
    "training", [True, False], ids=["train", "eval"]
)  # Lightning and many loops leave a loaded model in eval
@pytest.mark.parametrize("kept", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_trains_what_is_stored_in_fewer_bits(dtype, kept, training, tmp_path):
    """The squares of small gradients underflow in float16: without wider copies the first step gives NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)).to(dtype).eval()
    name = str(kept).removeprefix("torch.")
    plan = rpq.plan(model, bits=4, grow=True, rules=[{"match": "*", "codebook_dtype": name}])
    rpq.convert(model, plan=plan)
    x = torch.randn(8, 64, generator=generator()).to(dtype)
    found = layers_of(model).values()
    assert {p.dtype for w in found for p in w.parameters()} == {torch.float32}  # in memory, whatever the mode
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rpq.save(model.train(training), tmp_path / "untrained")
    assert (tmp_path / "untrained" / "model.safetensors").stat().st_size == plan.file_bytes
    losses = []
    for _ in range(20):
        loss = 1e-5 * (model(x) - 1).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    rpq.save(model, tmp_path / "trained")
    build = lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)).to(dtype)  # noqa: E731
    same(rpq.load(tmp_path / "trained", factory=build), model)


class Sliced(nn.Module):
    """Some rows of a weight go through another layer, as DeBERTa's embeddings of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer = nn.Embedding(11, 6), nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer(self.positions.weight[2:9]) + (self.positions.weight[:7] @ self.layer.weight.T).sum()


def test_gradients_flow_where_a_view_of_one_weight_meets_another():
    dense, x = Sliced(), torch.randn(2, 7, generator=generator())
    model = copy.deepcopy(dense)
    rpq.convert(model, dim=2, fit="random", grow=True)
    found = layers_of(model)
    weights = {name: weight().detach().requires_grad_() for name, weight in found.items()}
    functional_call(dense, weights, (x,)).sum().backward()
    model(x).sum().backward()
    for name, weight in found.items():
        (expected,) = torch.autograd.grad(weight(), weight.codebooks, weights[name].grad)
        close(weight.codebooks.grad, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    row = zoo.BY_NAME["nested"]
    _, model = pair(row)
    (x,) = row.inputs(generator())
    model(x).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    again = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(plain) == set(again) and any("codebooks" in n for n in plain)
    for n in plain:
        assert torch.equal(plain[n], again[n]), n


def test_data_parallel_trains_as_one_process_does(tmp_path):
    row = zoo.BY_NAME["tied"]
    _, model = pair(row)
    inputs = row.inputs(generator())
    alone = copy.deepcopy(model)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for m in (parallel, alone):
            optimiser = torch.optim.SGD(m.parameters(), lr=0.1)
            m(*inputs).square().sum().backward()
            optimiser.step()
        same(parallel.module, alone)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_the_padding_row_stays_zero_and_other_rows_train(kind):
    model = kind(11, 8, padding_idx=2)
    rpq.convert(model, dim=4, fit="random", grow=True)
    assert not model.weight[2].any() and model.weight[3].any()
    before = model.weight.detach().clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[2, 3, 4]])).square().sum().backward()
    optimiser.step()
    after = model.weight.detach()
    assert not after[2].any() and not torch.equal(after[3], before[3])


@pytest.mark.parametrize("index", [-1, 11, -12])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_index_out_of_range_raises(kind, index):
    model = kind(11, 8)
    rpq.convert(model, dim=4, fit="random", grow=True)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        model(torch.tensor([[0, index]]))


def test_frozen_parameters_stay_frozen():
    model = nn.Linear(6, 9)
    model.weight.requires_grad_(False)
    rpq.convert(model, dim=3, fit="random", grow=True)
    assert not model.weight.requires_grad and not model.weight_rpq.codebooks.requires_grad
    model(torch.randn(2, 6)).sum().backward()
    assert model.weight_rpq.codebooks.grad is None and model.bias.grad is not None


def test_a_fit_decodes_to_the_weight():
    """At most 256 sub-vectors for a codebook: the fit is exact, so encoding and decoding agree on every view."""
    exact = {"dim": 2, "books": "blocks", "scales": "none", "codebook_dtype": "float32"}
    for row in zoo.ZOO:
        torch.manual_seed(0)
        dense = row.build()
        model = copy.deepcopy(dense)
        rules = [{"match": m, **exact, **s} for m, s in row.rules] + [{"match": "*", **exact}]
        rpq.convert(model, rules=rules, grow=True)
        for name, weight in layers_of(model).items():
            expected = dense.get_parameter(name).detach()
            close(weight().detach(), expected, row.dtype, msg=lambda m, r=row, n=name: f"{r.name} {n}: {m}")


@pytest.mark.parametrize("bits", [2, 8])
def test_a_weight_is_scaled_in_place_where_that_is_exact(bits):
    layer = nn.Linear(64, 64).eval()
    rpq.convert(layer, bits=bits, grow=True)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.weight.div_(4)
        assert torch.equal(layer.weight, before / 4)
        layer.weight.mul_(8)
        assert torch.equal(layer.weight, before * 2)
        for bad in (lambda w: w.mul_(3), lambda w: w.div_(-2), lambda w: w.mul_(2.0**200), lambda w: w.mul_(w)):
            with pytest.raises(RuntimeError, match="would be lost"):
                bad(layer.weight)
    with pytest.raises(RuntimeError, match="would be lost"):
        layer.weight.mul_(2)
    assert torch.equal(layer.weight, before * 2)
