"""The memory and the disk that a conversion takes are said beforehand, and what cannot fit is refused."""

from dataclasses import replace

import pytest
import torch

from rpq_convert.core.axes import WeightView
from rpq_convert.errors import PlanError
from rpq_convert.planning import needs
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.planner import make_plan
from rpq_convert.planning.slots import Slot


def plan(*shapes, dtype=torch.float16, **options):
    slots = [Slot(f"{i}.weight", (), "Linear", (), s, dtype, WeightView("out in")) for i, s in enumerate(shapes)]
    size = {"bits": 4} if "fit" in options else {"bits": 4, "storage": "bytes"}
    return make_plan(slots, PlanOptions(**(size | options)))


def test_the_model_may_be_as_long_as_it_likes():
    large, small = (4096, 4096), (512, 512)
    one = needs.memory(plan(large, small), 1)
    assert needs.memory(plan(*[large] * 99, small), 1) == one
    assert needs.memory(plan(*[large] * 99), 2) - needs.BASE == 2 * (one - needs.BASE)
    assert needs.memory(plan(large, small), 8) < needs.memory(plan(large, large), 8)


def test_memory_follows_the_largest_weight_and_what_is_made_of_it():
    shape = (32000, 5120)
    numbers = shape[0] * shape[1]
    found = {
        name: needs.fit_bytes(plan(shape, **options).jobs[0])
        for name, options in {
            "plain": {}, "single": {"dtype": "float32"}, "coded": {"storage": "rans"}, "rotated": {"rotation": 64}, "random": {"fit": "random"},
        }.items()
    }  # fmt: skip
    assert found["plain"] < 5 * numbers + needs.FIT  # 14 bytes of a weight were needed once
    assert found["single"] - found["plain"] == 2 * numbers
    assert found["coded"] > found["plain"] and found["rotated"] > found["plain"] + 12 * numbers
    drawn = needs.fit_bytes(plan(shape, fit="random").jobs[0], drawn=True)
    assert drawn < found["random"] - 2 * numbers


def test_dense_tensors_count_too():
    dense = plan((64, 64), (32000, 5120), exclude=("1.*",))
    assert needs.memory(dense, 1) - needs.BASE == 2 * 2 * 32000 * 5120


def test_what_does_not_fit_is_refused():
    jobs = plan((512, 512), (4096, 4096)).jobs
    needs.check_memory(jobs, None)
    needs.check_memory(jobs, 1 << 40)
    needs.check_memory((), 0)
    with pytest.raises(
        PlanError, match=r"1\.weight \[4096, 4096\] needs about 0\.4 GB of memory.*0\.2 GB are left.*exclude='1"
    ):
        needs.check_memory(jobs, 200_000_000)


def test_words():
    made = plan((4096, 4096))
    assert needs.described(made, 1, 3_000_000_000).startswith("needs about 1.1 GB of memory and 3.0 GB of disk")
    assert "with 2 fits at once (1.1 GB with one)" in needs.described(made, 2, 0)
    assert needs.memory(replace(made, jobs=()), 4) == needs.BASE
