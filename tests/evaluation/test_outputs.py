"""What outputs of every shape are compared by: no figure without a meaning."""

import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import EvaluateError


class Gives(nn.Module):
    """A model whose output is a function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Output(dict):
    @property
    def logits(self):
        return self.get("logits")


def compare(base, model, *data):
    return rpq.evaluate(Gives(base), Gives(model), list(data))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NUMBERS = {"mean_difference", "relative_error", "correlation"}
CLASSES = {"cosine", "relative_error", "top1_agreement"}
SHAPES = {
    "[samples, 1]": ((20, 1), NUMBERS), "[samples]": ((20,), NUMBERS), "[samples, steps, 1]": ((4, 5, 1), NUMBERS),
    "[samples, classes]": ((20, 6), CLASSES), "[samples, steps, classes]": ((4, 5, 6), CLASSES),
    "pictures": ((4, 3, 8, 8), CLASSES - {"top1_agreement"}), "videos": ((2, 3, 4, 8, 8), CLASSES - {"top1_agreement"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_figures_follow_the_shape(name):
    shape, names = SHAPES[name]
    a, b = noise(*shape), noise(*shape, seed=1)
    found = compare(lambda x: a, lambda x: b, torch.zeros(shape[0], 2))
    assert set(found.metrics) == names
    same = compare(lambda x: a, lambda x: a, torch.zeros(shape[0], 2)).metrics
    for figure in ("cosine", "correlation", "top1_agreement"):
        if figure in names:
            assert same[figure] == pytest.approx(1, abs=1e-5)
            assert found.metrics[figure] < 0.6  # two that have nothing to do with each other
    assert same["relative_error"] == 0 < found.metrics["relative_error"]


def test_numbers_over_several_inputs():
    x, y = noise(30), noise(30, seed=1)
    found = compare(lambda i: x[i], lambda i: y[i], *(torch.arange(30).view(-1, 1).split(7)))
    wanted = torch.corrcoef(torch.stack([x, y]))[0, 1]
    assert found.metrics["correlation"] == pytest.approx(float(wanted), rel=1e-4) and found.samples == 30
    assert found.metrics["mean_difference"] == pytest.approx(float((x - y).abs().mean()), rel=1e-4)


def test_single_numbers_and_constants_have_no_correlation():
    one = compare(lambda x: x.mean(), lambda x: x.mean() + 1, torch.ones(4, 3)).metrics
    assert one == {"mean_difference": 1.0, "relative_error": 1.0}
    constant = compare(lambda x: torch.ones(5), lambda x: torch.full((5,), 2.0), torch.zeros(5, 2)).metrics
    assert constant == {"mean_difference": 1.0, "relative_error": 1.0}


def test_a_vector_without_an_axis_for_samples():
    found = compare(lambda x: x, lambda x: -x, noise(8))
    assert found.metrics["cosine"] == pytest.approx(-1) and set(found.metrics) == {"cosine", "relative_error"}


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_whole_numbers_and_truth_values_agree_or_do_not(kind):
    a, b = torch.tensor([1, 0, 1, 1]).to(kind), torch.tensor([1, 1, 1, 1]).to(kind)
    assert compare(lambda x: a, lambda x: b, torch.zeros(4, 1)).metrics == {"agreement": 0.75}


def test_complex_outputs():
    a = torch.complex(noise(4, 6), noise(4, 6, seed=1))
    found = compare(lambda x: a, lambda x: a * 1j, torch.zeros(4, 1)).metrics
    assert found["relative_error"] == pytest.approx(2) and found["cosine"] == pytest.approx(0, abs=1e-6)


def test_logits_of_pixels_are_classes_and_hidden_states_are_not():
    a, b = noise(2, 5, 8, 8), noise(2, 5, 8, 8, seed=1)
    found = compare(lambda x: Output(logits=a), lambda x: Output(logits=b), torch.zeros(2, 1))
    assert found.metrics["top1_agreement"] == pytest.approx(float((a.argmax(1) == b.argmax(1)).float().mean()))
    a, b = noise(2, 7, 8), noise(2, 7, 8, seed=1)
    found = compare(lambda x: Output(last_hidden_state=a), lambda x: Output(last_hidden_state=b), torch.zeros(2, 1))
    assert set(found.metrics) == {"cosine", "relative_error"}


def test_masked_logits_count_as_equal():
    a, b = noise(4, 6), noise(4, 6, seed=1)
    wanted = compare(lambda x: a[:, :5], lambda x: b[:, :5], torch.zeros(4, 1)).metrics
    a[:, 5] = b[:, 5] = -torch.inf
    assert compare(lambda x: a, lambda x: b, torch.zeros(4, 1)).metrics == pytest.approx(wanted)


def test_labels_need_classes():
    item = {"x": noise(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(EvaluateError, match="labels need an output with one number for each class"):
        rpq.evaluate(nn.Identity(), nn.Identity(), [{"input": noise(4, 1), "labels": item["labels"]}])
    base = Gives(lambda x: x)
    assert rpq.evaluate(base, base, [item]).metrics["accuracy"] == pytest.approx(
        float((item["x"].argmax(-1) == 0).float().mean())
    )
