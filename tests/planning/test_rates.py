"""An average of bits is shared by what errors cost."""

import math
import re

import pytest
import torch
from torch import nn

import rpq_convert as rpq


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 64)
        self.up, self.down = nn.Linear(64, 512), nn.Linear(512, 64)
        self.head = nn.Linear(64, 1000)

    def forward(self, ids):
        return self.head(self.down(self.up(self.table(ids)).relu()))


def rates(plan):
    return {j.name.removesuffix(".weight"): j.spec.rate for j in plan.jobs}


def stream_bytes(plan):
    return sum(
        math.prod(shape) for j in plan.jobs for part, (_, shape) in j.spec.stored(j.weight_view, j.shape).items() if part == "stream"
    )  # fmt: skip


EQUAL = [{"match": "*", "bits": 4}]


def test_the_bytes_are_those_of_equal_rates():
    model = Model()
    equal = rpq.plan(model, bits=4, rules=EQUAL)
    assert set(rates(equal).values()) == {4.0}
    for sensitivity in (None, "shape", {"up.weight": 1.0, "down.weight": 1e-3}):
        plan = rpq.plan(model, bits=4, sensitivity=sensitivity)
        assert len(set(rates(plan).values())) > 1
        assert stream_bytes(equal) * 0.999 < stream_bytes(plan) <= stream_bytes(equal)
        assert all(3.3 <= rate <= 5.2 for rate in rates(plan).values())


def test_shapes_alone_give_a_table_fewer_bits_and_a_head_more():
    found = rates(rpq.plan(Model(), bits=4))
    assert found["table"] < found["up"] == found["down"] < found["head"]


def test_calibrated_weights_take_bits_from_a_table_that_is_only_looked_up_alone():
    data = [torch.randint(1000, (2, 8))]
    found = {r.name.removesuffix(".weight"): r.spec for r in rpq.convert(Model(), bits=4, calibration=data).rows}
    bits = {name: re.search(r"([\d.]+) bits", found[name])[1] for name in ("table", "up", "down", "head")}
    assert bits["up"] == bits["down"] == bits["head"] > bits["table"]


def test_what_costs_more_gets_more_bits():
    weights = {"up.weight": 512 * 64, "down.weight": 512 * 64, "table.weight": 64000, "head.weight": 64000}
    found = rates(
        rpq.plan(Model(), bits=4, sensitivity={n: w * (2.0 if n == "up.weight" else 1.0) for n, w in weights.items()})
    )
    assert found["up"] > found["down"] == found["table"] == found["head"] < 4
    losses = {n: {3: w * 0.02, 4: w * 0.005} for n, w in weights.items()}
    losses["up.weight"] = {3: 10.0, 4: weights["up.weight"] * 0.01}
    assert rates(rpq.plan(Model(), bits=4, sensitivity=losses)) == found


def test_a_rule_keeps_its_bits_and_one_weight_has_them_all():
    model = Model()
    plan = rpq.plan(model, bits=4, rules={"up": {"bits": 6}})
    assert rates(plan)["up"] == 6 and "on average" not in next(j.rule for j in plan.jobs if j.name == "up.weight")
    assert "4 bits on average" in plan.explain("down")
    assert rates(rpq.plan(model, bits=4, include="down"))["down"] == 4.0
    assert set(rates(rpq.plan(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), bits=3.3)).values()) == {3.3}


def test_little_room_is_kept_to():
    for bits in (2.1, 6.9, 0.5):
        plan = rpq.plan(Model(), bits=bits, storage="rans", sensitivity={"up.weight": 1e30, "down.weight": 1e-30})
        assert all(
            max(bits - 0.7, bits / 2) - 1e-9 <= rate <= min(7, bits + 1.2) + 1e-9 for rate in rates(plan).values()
        )
        equal = rpq.plan(Model(), bits=bits, storage="rans", rules=[{"match": "*", "bits": bits}])
        assert stream_bytes(plan) <= stream_bytes(equal)


@pytest.mark.parametrize("wrong", [{"nothing": 1.0}, {"up": 1.0}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(rpq.PlanError, match=f"names {next(iter(wrong))}"):
        rpq.plan(Model(), bits=4, sensitivity=wrong)
