"""Codes are buffers that guard themselves: training habits over parameters, buffers and state dicts leave them as they are."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import rpq_convert as rpq
from rpq_convert.layers.codes import Codes, unguarded


def converted(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.BatchNorm1d(16)).eval()
    rpq.convert(model, **{"bits": 4, "grow": True, "outliers": 0.02, "executor": "serial", **options})
    return model


@pytest.fixture(scope="module")
def model():
    return converted()


@pytest.fixture(scope="module")
def other():
    return converted(seed=1)


X = torch.randn(8, 64)


def same(one, two):
    wanted = two(X)
    assert (one(X) - wanted).norm() < 1e-2 * wanted.norm()  # codebooks are float16
    for name, codes in two.named_buffers():
        assert not isinstance(codes, Codes) or torch.equal(one.get_buffer(name), codes)


def state_loop(update):
    def average(mean, model):
        with torch.no_grad():
            for key, value in model.state_dict().items():
                update(mean.state_dict()[key], value)

    return average


def parameter_loop(update):
    def average(mean, model):
        with torch.no_grad():
            for p, q in zip(mean.parameters(), model.parameters(), strict=True):
                update(p, q)

    return average


def over_buffers(update):
    def average(mean, model):
        with torch.no_grad():
            for p, q in zip(mean.buffers(), model.buffers(), strict=True):
                if p.ndim:
                    update(p, q)

    return average


def through_vectors(mean, model):
    vectors = [nn.utils.parameters_to_vector(m.parameters()) for m in (mean, model)]
    nn.utils.vector_to_parameters(0.9 * vectors[0] + 0.1 * vectors[1], mean.parameters())


def through_states(mean, model):
    states = [m.state_dict() for m in (mean, model, mean)]
    mean.load_state_dict({k: sum(s[k] for s in states) / 3 for k in states[0]})


def summed_in_place(mean, model):
    total = mean.state_dict()
    for key, value in model.state_dict().items():
        total[key] = total[key].clone()
        total[key] += value
        total[key] = total[key] / 2
    mean.load_state_dict(total)


def assign_data(p, q):
    p.data = p.data * 0.3 + q.data * 0.7


HABITS = {
    "timm ModelEmaV2": state_loop(lambda p, q: p.copy_(0.9999 * p + (1 - 0.9999) * q)),
    "lerp over state": state_loop(lambda p, q: p.copy_(torch.lerp(p.float(), q.float(), 2e-5))),
    "Polyak": parameter_loop(lambda p, q: p.data.mul_(0.95).add_(q.data, alpha=0.05)),
    "data of parameters": parameter_loop(assign_data),
    "data of buffers": over_buffers(assign_data),
    "lerp of buffers": over_buffers(lambda p, q: p.lerp_(q, 0.1)),
    "foreach of buffers": lambda mean, model: torch._foreach_lerp_(
        [b for b in mean.buffers() if b.ndim], [b for b in model.buffers() if b.ndim], 0.5
    ),
    "vectors": through_vectors,
    "averaged states": through_states,
    "states added in place": summed_in_place,
}


@pytest.mark.parametrize("name", HABITS)
def test_a_model_averaged_with_itself_is_itself(model, name):
    mean = copy.deepcopy(model)
    for _ in range(3):
        HABITS[name](mean, model)
    same(mean, model)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9999)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.99998)},
        {"avg_fn": get_ema_avg_fn(0.9)},
    ],
    ids=["swa", ".9999", ".99998", "one by one"],
)
def test_averaged_models_of_torch(model, other, how, buffers):
    mean = AveragedModel(model, use_buffers=buffers, **how)
    for _ in range(4):
        mean.update_parameters(model)
    same(mean.module, model)
    with pytest.raises(RuntimeError, match=r"RPQ codes, which are indices"):
        mean.update_parameters(other)


@pytest.mark.parametrize("name", [n for n in HABITS if n not in ("Polyak", "data of parameters", "vectors")])
def test_models_of_other_codes_are_not_averaged(model, other, name):
    mean = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="average"):
        HABITS[name](mean, other)
    for key, codes in mean.named_buffers():
        assert not isinstance(codes, Codes) or torch.equal(codes, model.get_buffer(key))


def test_parameters_are_what_can_be_trained(model):
    model = copy.deepcopy(model)
    assert all(p.is_floating_point() for p in model.parameters())
    model.requires_grad_(False).requires_grad_(True)
    for p in model.parameters():
        p.requires_grad = True
    sum(torch.norm(p) + p.pow(2).sum() for p in model.parameters()).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 1e-3).clamp_(-1, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    values = torch.func.functional_call(model, {n: p * 2 for n, p in model.named_parameters()}, (X,))
    assert values.isfinite().all()


def test_codes_ask_for_no_gradient_and_take_what_is_loaded(model, other):
    model, codes = copy.deepcopy(model), model[0].weight_rpq.codes
    assert not codes.requires_grad_().requires_grad
    codes.requires_grad = True
    assert not codes.requires_grad
    keys = set(model.state_dict())
    assert {"0.weight_rpq.codes", "0.weight_rpq.positions", "0.weight_rpq.codebooks"} <= keys
    for assign in (False, True):
        for source in (other, converted()):
            model.load_state_dict(source.state_dict(), assign=assign)
            same(model, source)
            assert isinstance(model[0].weight_rpq.codes, Codes)
    with torch.no_grad():  # as distributed checkpoints are read: ordinary tensors into those of the state
        for key, value in model.state_dict().items():
            value.copy_(unguarded(other.state_dict()[key]).clone())
    same(model, other)


def test_copies_files_and_casts_keep_the_guard(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(type(t) is torch.Tensor for t in state.values())
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(memory, weights_only=False)]
    for twin in (*twins, copy.deepcopy(model).double().float(), copy.deepcopy(model).to("meta").to_empty(device="cpu")):
        assert isinstance(twin[0].weight_rpq.codes, Codes)
        assert twin[0].weight_rpq.codes.data_ptr() != model[0].weight_rpq.codes.data_ptr()
        twin.load_state_dict(state)
        same(twin, model)
    shared = copy.deepcopy(model).share_memory()
    assert shared[0].weight_rpq.codes.is_shared()
    same(shared, model)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, "torch.HalfTensor"])
def test_a_cast_of_everything_leaves_codes_alone(model, kind):
    """`type` casts whole numbers too."""
    cast = copy.deepcopy(model).type(kind)
    weight = cast[0].weight_rpq
    assert isinstance(weight.codes, Codes) and weight.codes.dtype == torch.uint8
    assert torch.equal(weight.codes, model[0].weight_rpq.codes)
    assert torch.equal(weight.positions, model[0].weight_rpq.positions) and weight.dtype == cast[0].bias.dtype
    wanted = model(X)
    assert (cast(X.to(weight.dtype)).float() - wanted).norm() < 2e-2 * wanted.norm()


def test_a_model_pickled_with_codes_as_parameters_is_read(model):
    old = copy.deepcopy(model)
    for layer in (old[0], old[2]):
        weight = layer.weight_rpq
        for name in ("codes", "positions"):
            weight._parameters[name] = nn.Parameter(weight._buffers.pop(name).plain, requires_grad=False)
    same(pickle.loads(pickle.dumps(old)), model)


def test_whole_numbers_are_written_and_others_are_not(model):
    model = copy.deepcopy(model)
    codes, before = model[0].weight_rpq.codes, model(X)
    changed = (codes[0] + 1).to(torch.uint8)
    codes[0] = changed
    assert torch.equal(codes[0], changed) and not torch.equal(model(X), before)
    for write in (
        lambda: codes.add_(1),
        lambda: codes.mul_(0.99),
        lambda: codes.zero_(),
        lambda: codes.__setitem__(0, 0.5),
        lambda: codes.clamp_(max=3),
        lambda: torch.mul(codes, 0, out=codes),
        lambda: nn.init.constant_(codes, 3),
        lambda: setattr(codes, "data", codes.data[:1]),
    ):
        with pytest.raises(RuntimeError, match="indices and not numbers"):
            write()
    assert torch.equal(codes[0], changed)
    codes.mul_(1).add_(0).clamp_(0, 255)


def test_fully_sharded_and_distributed_models_train(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wanted = converted(outliers=0).train()(X)
        for wrap in (
            lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True),
            lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
            lambda m: fully_shard(m, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,))),
            nn.parallel.DistributedDataParallel,
        ):
            model = wrap(converted(outliers=0).train())
            out = model(X)
            torch.testing.assert_close(out, wanted)
            out.square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            assert not torch.equal(model(X), out)
        for training in (True, False):  # wrapped in eval, as a model is that was just loaded
            model = nn.parallel.DistributedDataParallel(converted(outliers=0).eval()).train(training)
            optimiser = torch.optim.AdamW(model.parameters())
            for _ in range(2):
                model(X).square().sum().backward()
                optimiser.step()
            assert all(p.isfinite().all() for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_the_first_parameter_has_the_dtype_that_weights_expand_to(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3, bias=False), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64 * 36, 8)
    ).eval()
    rpq.convert(model, bits=4, grow=True)
    dtype = next(model.parameters()).dtype
    assert dtype == torch.float32
    x = torch.randn(1, 16, 8, 8)
    wanted = model(x.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    rpq.save(model, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")["0.weight_rpq.codebooks"].dtype == torch.float16
    loaded = rpq.load(
        tmp_path / "saved",
        factory=lambda: nn.Sequential(
            nn.Conv2d(16, 64, 3, bias=False), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64 * 36, 8)
        ),
    )
    assert torch.equal(loaded.eval()(x), wanted) and next(loaded.parameters()).dtype == dtype
    assert next(model.half().parameters()).dtype == torch.float16


def test_accelerate_fills_an_empty_model(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    empty = copy.deepcopy(model).to("meta")
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    same(filled, model)
