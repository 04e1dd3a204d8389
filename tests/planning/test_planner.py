"""What sizes mean: which layout a parameter gets."""

import torch
from torch import nn

import rpq_convert as rpq


def test_bits_alone_are_entropy_coded_where_that_is_best():
    with torch.device("meta"):
        model = nn.ModuleDict({"large": nn.Linear(256, 256), "small": nn.Linear(64, 64)})

    def large(**options):
        return next(j for j in rpq.plan(model, **options).jobs if j.name == "large.weight")

    for bits in (3, 4, 5, 7):
        job = large(bits=bits)
        assert (job.spec.rate, job.spec.dim, job.fit) == (bits, 1, "ecvq")
    for bits in (0.5, 1, 2, 2.5, 8):
        assert large(bits=bits).spec.rate is None
    for other in ({"storage": "bytes"}, {"fit": "kmeans"}, {"fit": "random"}):
        job = large(bits=4, **other)
        assert (job.spec.rate, job.spec.dim) == (None, 2)
    assert {j.spec.rate for j in rpq.plan(model, preset="4bit").jobs} == {None}
    assert next(j for j in rpq.plan(model, bits=4).jobs if j.name == "small.weight").spec.rate is None


def test_rules_change_what_bits_alone_mean():
    with torch.device("meta"):
        model = nn.ModuleDict({"large": nn.Linear(256, 256)})

    def ruled(**settings):
        (job,) = rpq.plan(model, bits=4, rules=[{"match": "large", **settings}]).jobs
        return job

    assert (ruled(fit="kmeans").spec.rate, ruled(fit="kmeans").fit) == (None, "kmeans")
    assert ruled(storage="bytes").spec.dim == 2
    assert ruled(bits=5).spec.rate == 5
    assert ruled(bits=8).spec.rate is None
    assert ruled(dim=4).spec.dim == 4
    assert ruled(books=2).spec.books == 2
