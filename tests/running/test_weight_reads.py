"""What operations multiply weights by, held to what the layers give: one tensor may be read in many ways."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import rpq_convert as rpq
from rpq_convert.calibration import sequential
from rpq_convert.calibration.hessian import Hessian
from rpq_convert.running.weight_reads import Watch


class Branches(nn.Module):
    """Everything that may read one picture x [N, 8, H, W]."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d
        self.branches = nn.ModuleDict({
            "three": conv(8, 6, 3, padding=1), "three again": conv(8, 4, 3, padding=1), "stride": conv(8, 6, 3, 2, 1),
            "shortcut": conv(8, 6, 1, 2), "one": conv(8, 6, 1), "dilation 2": conv(8, 6, 3, padding=2, dilation=2),
            "dilation 4": conv(8, 6, 3, padding=4, dilation=4), "same": conv(8, 6, 3, padding="same"),
            "no padding": conv(8, 6, 3), "high": conv(8, 6, (3, 1), padding=(1, 0)), "wide": conv(8, 6, (1, 3), padding=(0, 1)),
            "reflect": conv(8, 6, 3, padding=1, padding_mode="reflect"), "circular": conv(8, 6, 3, padding=1, padding_mode="circular"),
            "groups": conv(8, 6, 3, padding=1, groups=2), "depthwise": conv(8, 8, 3, padding=1, groups=8),
            "up": nn.ConvTranspose2d(8, 6, 4, 2, 1), "up groups": nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2),
            "up depthwise": nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8),
            "up odd": nn.ConvTranspose2d(8, 6, 3, 3, 2, output_padding=1, dilation=2),
        })  # fmt: skip
        self.linear = nn.Linear(8, 5)
        self.after = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        x = x + 0  # our own, since it is written to
        found = [branch(x) for branch in self.branches.values()]
        found.append(self.linear(x.movedim(1, -1)))
        found.append(self.after(x.relu_()))  # the same tensor, which holds something else now
        return sum(y.mean() for y in found)


def branches_of(dims):
    """The same for sequences and volumes."""
    conv, up = ((nn.Conv1d, nn.ConvTranspose1d), (), (nn.Conv3d, nn.ConvTranspose3d))[dims - 1]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layers = conv(4, 3, 3, padding=1), conv(4, 3, 1), conv(4, 4, 3, stride=2, dilation=2, padding=2, groups=4)
            layers += up(4, 3, 3, 2, 1, output_padding=1), up(4, 4, 2, 2, groups=2), up(4, 3, 3, 1, 1)
            self.branches = nn.ModuleList(layers)

        def forward(self, x):
            return sum(layer(x).mean() for layer in self.branches)

    return Net(), (2, 4, *(6,) * dims)


NETS = {
    "pictures": lambda: (Branches(), (2, 8, 9, 8)),
    "sequences": lambda: branches_of(1),
    "volumes": lambda: branches_of(3),
}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("kind", NETS)
def test_every_reader_of_one_tensor_gets_statistics_of_its_own(kind, axis):
    """`tr(W H W^T)` is the squared norm of the output without bias."""
    torch.manual_seed(0)
    model, shape = NETS[kind]()
    energies = {}
    for name, module in model.named_modules():
        if hasattr(module, "bias"):
            nn.init.zeros_(module.bias)
            module.register_forward_hook(
                lambda m, args, out, name=name: energies.__setitem__(name, float(out.double().square().sum()))
            )
    x = torch.randn(shape)
    plan = rpq.plan(model, bits=8, grow=True, axis=axis)
    seen = 0
    for jobs, statistics in sequential.walk(model, plan.jobs, [x]):
        for job in jobs:
            layer = model.get_submodule(job.name.removesuffix(".weight"))
            hessian = statistics[job.name].hessian
            parts = hessian if hessian.ndim == 3 else hessian[None]
            upwards = job.weight_view.axes[0] == "in"
            weights = layer.weight.detach().double().chunk(len(parts))  # a run of outputs, or of inputs
            matrices = [job.weight_view.to_matrix(w, "in") for w in weights]
            assert len(matrices) == getattr(layer, "groups", 1), (job.name, upwards)
            found = sum(float(((w @ h) * w).sum()) for w, h in zip(matrices, parts))
            assert found == pytest.approx(energies[job.name.removesuffix(".weight")], rel=1e-3), job.name
            seen += 1
    assert seen == len(plan.jobs) == len(energies)


@pytest.mark.parametrize(
    "options", [{}, {"axis": "in"}, {"axis": "in", "rotation": 8}, {"rotation": 8}, {"outliers": 0.1}]
)
@pytest.mark.parametrize("build", [
    lambda: nn.ConvTranspose2d(16, 32, 3, 2, 1, groups=2), lambda: nn.ConvTranspose2d(16, 256, 3, groups=16),
    lambda: nn.Conv2d(32, 64, 3, groups=2),
])  # fmt: skip
def test_calibrated_groups_are_nearer_to_the_dense_layer(build, options):
    torch.manual_seed(0)
    dense = build()
    width = dense.in_channels
    mix = torch.randn(width, width)
    data = [torch.einsum("oi,nihw->nohw", mix, torch.randn(2, width, 6, 6)) for _ in range(4)]
    errors = []
    for calibration in (None, data):
        model = copy.deepcopy(dense)
        rpq.convert(model, dim=8, grow=True, calibration=calibration, **options)
        errors.append(rpq.evaluate(dense, model, data).metrics["relative_error"])
    assert errors[1] < errors[0]


def grouped_names(model, *inputs):
    plan = rpq.plan(model, bits=8, grow=True)
    walk = sequential.walk(model, plan.jobs, [inputs])
    return {frozenset(job.name for job in jobs) for jobs, _ in walk}


def test_readers_of_the_same_vectors_share_one_measurement():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
            self.a, self.b, self.c = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 4, 3), nn.Conv1d(8, 4, 3, groups=2)

        def forward(self, x):
            return self.q(x).sum() + self.k(x).sum() + self.a(x).sum() + self.b(x).sum() + self.c(x).sum()

    found = grouped_names(Net(), torch.randn(2, 8, 8))
    assert found == {frozenset(n + ".weight" for n in names) for names in ("qk", "ab", "c")}


# Recurrent layers: what each weight multiplies, held to steps that are written out.


def steps(kind, weights, x, place, reverse, hidden, cell):
    """Run one direction of one layer on one sequence [steps, features]; note what its weights multiply."""
    w = {name.removesuffix(place): value for name, value in weights.items()}
    zero = torch.zeros(())
    b_ih, b_hh = w.get("bias_ih", zero), w.get("bias_hh", zero)
    seen, outputs = {"weight_ih": [], "weight_hh": [], "weight_hr": []}, []
    for row in x.flip(0) if reverse else x:
        seen["weight_ih"].append(row)
        seen["weight_hh"].append(hidden)
        i, h = w["weight_ih"] @ row + b_ih, w["weight_hh"] @ hidden + b_hh
        if kind is nn.LSTM:
            a, f, g, o = (i + h).chunk(4)
            cell = f.sigmoid() * cell + a.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            if "weight_hr" in w:
                seen["weight_hr"].append(hidden)
                hidden = w["weight_hr"] @ hidden
        elif kind is nn.GRU:
            (ir, iz, i_n), (hr, hz, hn) = i.chunk(3), h.chunk(3)
            z = (iz + hz).sigmoid()
            hidden = (1 - z) * (i_n + (ir + hr).sigmoid() * hn).tanh() + z * hidden
        else:
            hidden = (i + h).tanh()
        outputs.append(hidden)
    return torch.stack(outputs[::-1] if reverse else outputs), seen


def expected(layer, sequences, state):
    """Return the Hessian of every weight of a recurrent layer."""
    found = {name: Hessian() for name, _ in layer.named_parameters() if "weight" in name}
    for number, x in enumerate(sequences):
        for level in range(layer.num_layers):
            outputs = []
            for direction in range(2 if layer.bidirectional else 1):
                place = f"_l{level}" + "_reverse" * direction
                weights = {n: p for n, p in layer.named_parameters() if n.endswith(place)}
                at = level * (1 + layer.bidirectional) + direction
                begin = [s[at, number] for s in state]
                out, seen = steps(type(layer), weights, x, place, direction == 1, begin[0], begin[-1])
                outputs.append(out)
                for name, rows in seen.items():
                    if rows:
                        found[name + place].add(torch.stack(rows))
            x = torch.cat(outputs, -1)
    return found


RECURRENT = {
    "LSTM": lambda: nn.LSTM(5, 6, 2), "batch first": lambda: nn.LSTM(5, 6, 2, batch_first=True),
    "both ways": lambda: nn.LSTM(5, 6, 3, bidirectional=True), "no bias": lambda: nn.LSTM(5, 6, bias=False),
    "projected": lambda: nn.LSTM(5, 6, 2, proj_size=3, bidirectional=True, batch_first=True),
    "projected without bias": lambda: nn.LSTM(5, 6, proj_size=3, bias=False),
    "GRU": lambda: nn.GRU(5, 6, 2, bidirectional=True, batch_first=True), "RNN": lambda: nn.RNN(5, 6, 2, batch_first=True),
}  # fmt: skip


@pytest.mark.parametrize("how", ["padded", "packed", "one sequence"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_weights_multiply_inputs_and_hidden_states(name, how):
    torch.manual_seed(0)
    layer = RECURRENT[name]().eval()
    lengths = {"padded": (7, 7, 7), "packed": (7, 4, 4), "one sequence": (7,)}[how]
    sequences = [torch.randn(n, 5) for n in lengths]
    places = layer.num_layers * (1 + layer.bidirectional)
    width = layer.proj_size or layer.hidden_size
    state = [torch.randn(places, len(lengths), width)]
    if isinstance(layer, nn.LSTM):
        state.append(torch.randn(places, len(lengths), layer.hidden_size))
    x, begin = torch.stack(sequences, 0 if layer.batch_first else 1) if how == "padded" else sequences[0], state
    if how == "packed":
        x = pack_sequence(sequences)
    elif how == "one sequence":
        begin = [s[:, 0] for s in state]
    watched = {n: (p, ("out", "in")) for n, p in layer.named_parameters() if "weight" in n}
    found = {n: Hessian() for n in watched}

    def see(name, reading, part):
        for _, rows in reading.vectors():
            found[name].add(rows)

    with torch.no_grad(), Watch(watched, see):
        layer(x, tuple(begin) if len(begin) > 1 else begin[0])
    with torch.no_grad():
        wanted = expected(layer, sequences, state)
    for weight, hessian in wanted.items():
        assert found[weight].rows == hessian.rows == sum(lengths)
        assert torch.allclose(found[weight].matrix(), hessian.matrix(), atol=1e-4), weight


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(6, 6)

    def forward(self, x):
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("build", [
    lambda: nn.LSTM(6, 6, bidirectional=True, batch_first=True), lambda: nn.GRU(6, 6, batch_first=True),
    lambda: Cells(nn.LSTMCell), lambda: Cells(nn.GRUCell), lambda: Cells(nn.RNNCell),
])  # fmt: skip
def test_recurrent_layers_are_calibrated(build):
    torch.manual_seed(0)
    dense = build().eval()
    data = [torch.randn(8, 9, 6) @ torch.randn(6, 6) for _ in range(4)]
    model = copy.deepcopy(dense)
    report = rpq.convert(model, bits=2, grow=True, calibration=data)
    assert all(row.inputs for row in report.rows if row.decision == "rpq")
    plain = copy.deepcopy(dense)
    rpq.convert(plain, bits=2, grow=True)
    error, without = (rpq.evaluate(dense, m, data).metrics["relative_error"] for m in (model, plain))
    assert error < without


# Ways to call a product.


class Way(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(*shape)), function

    def forward(self, x):
        return self.function(x, self.w)


WAYS = {
    "matmul other=": (lambda x, w: torch.matmul(x, other=w), "in out", (4, 3)),
    "mm mat2=": (lambda x, w: torch.mm(x, mat2=w), "in out", (4, 3)),
    "method": (lambda x, w: x.matmul(w), "in out", (4, 3)),
    "on the left": (lambda x, w: w @ x.T, "out in", (3, 4)),
    "on the left, bmm": (lambda x, w: torch.bmm(w, x.T[None].expand(2, 4, 7)), "expert out in", (2, 3, 4)),
    "broadcast": (lambda x, w: x @ w, "expert in out", (2, 4, 3)),
    "bmm mat2=": (lambda x, w: torch.bmm(x[None].expand(2, 7, 4), mat2=w), "expert in out", (2, 4, 3)),
    "mv": (lambda x, w: torch.stack([torch.mv(w, row) for row in x]), "out in", (3, 4)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(3), x, w), "in out", (4, 3)),
    "addmm mat2=": (lambda x, w: torch.addmm(torch.zeros(3), x, mat2=w), "in out", (4, 3)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(1, 1, 3), x[None], w), "expert in out", (1, 4, 3)),
    "linear of a transposed one": (lambda x, w: F.linear(x, w.mT), "in out", (4, 3)),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), "out in", (3, 4)),
    "einsum, weight first": (lambda x, w: torch.einsum("oi,bi", w, x), "out in", (3, 4)),
    "einsum of a list": (lambda x, w: torch.einsum("...i,io->...o", [x[None], w]), "in out", (4, 3)),
    "einsum of numbers": (lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2]), "out in", (3, 4)),
    "einsum of experts": (lambda x, w: torch.einsum("bi,eoi->ebo", x, w).sum(0), "expert out in", (1, 3, 4)),
    "einsum of two inputs": (lambda x, w: torch.einsum("bij,oij->bo", x.view(7, 2, 2), w), "out in in2", (3, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_call_a_product_is_seen(name):
    function, view, shape = WAYS[name]
    torch.manual_seed(0)
    model, x, found = Way(function, *shape), torch.randn(7, 4), Hessian()

    def see(_, reading, part):
        for offset, rows in reading.vectors():
            found.add(rows, part + offset)

    with torch.no_grad(), Watch({"w": (model.w, view.split())}, see):
        y = model(x)
    weights = model.w.detach().double()
    matrices = list(weights) if "expert" in view else [weights]
    own = rpq.WeightView(view.replace("expert ", ""))
    energy = sum(
        float(((m @ found.parts[i]) * m).sum()) for i, m in enumerate(own.to_matrix(w, "in") for w in matrices)
    )
    assert energy == pytest.approx(float(y.double().square().sum()), rel=1e-4)


def test_products_of_other_tensors_are_left_alone():
    """Whatever an operation is called with, it is torch's business where no weight takes part."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            h = self.f(x)
            out = torch.bmm(h[None], mat2=h.T[None])[0] @ h
            torch.addmm(input=h, mat1=h, mat2=torch.eye(8), beta=0.5)
            return torch.einsum("ab,ab->ab", h, out) + torch.einsum("ab,bc,cd->ad", h, torch.eye(8), torch.eye(8))

    model = Net()
    report = rpq.convert(model, bits=8, grow=True, calibration=[torch.randn(4, 8)])
    assert report.rows[0].inputs == 4


@pytest.mark.parametrize("separate", [False, True])
def test_attention_reads_all_of_its_projections(separate):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(
        8, 2, batch_first=True, kdim=6 if separate else None, vdim=6 if separate else None
    )
    attention.eval()
    attention.out_proj.bias = None
    q, kv = torch.randn(2, 5, 8), torch.randn(2, 7, 6 if separate else 8)
    names = [n for n, p in attention.named_parameters() if p.ndim == 2]
    found = {n: Hessian() for n in names}

    def see(name, reading, part):
        for _, rows in reading.vectors():
            found[name].add(rows)

    with torch.no_grad(), Watch({n: (attention.get_parameter(n), ("out", "in")) for n in names}, see):
        y, _ = attention(q, kv, kv)
    out = attention.out_proj.weight.detach().double()
    energy = float(((out @ found["out_proj.weight"].matrix()) * out).sum())
    assert energy == pytest.approx(float(y.double().square().sum()), rel=1e-4)
    rows = {n: h.rows for n, h in found.items()}
    joint = {"q_proj_weight": 10, "k_proj_weight": 14, "v_proj_weight": 14} if separate else {"in_proj_weight": 24}
    assert rows == {**joint, "out_proj.weight": 10}


def test_what_vmap_and_gradients_multiply_is_seen():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            return torch.vmap(torch.vmap(self.layer))(x) + torch.func.vjp(self.layer, x)[0]

    torch.manual_seed(0)
    mapped = Mapped()
    plain, data = copy.deepcopy(mapped.layer), [torch.randn(3, 4, 16) for _ in range(3)]
    for model in (mapped, plain):
        rpq.convert(model, bits=4, grow=True, calibration=data)
    torch.testing.assert_close(mapped.layer.weight.detach() * 1, plain.weight.detach() * 1)
