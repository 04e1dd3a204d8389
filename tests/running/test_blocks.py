"""Recomputation in the backward pass keeps inputs of blocks alone, however a model lists its blocks."""

import torch
from torch import nn
from vit_pytorch import ViT

from rpq_convert.running.blocks import recomputed


def kept(run) -> int:
    """Return the bytes that autograd keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def check(model: nn.Module, x: torch.Tensor) -> None:
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    plain = kept(lambda: model(x))
    model.zero_grad()
    with recomputed(model):
        assert kept(lambda: model(x)) < plain / 2
        model(x).sum().backward()
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert kept(lambda: model(x)) == plain


def test_blocks_of_a_sequence():
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))  # noqa: E731
    check(nn.Sequential(*(block() for _ in range(4))), torch.randn(50, 8))


def test_pairs_in_a_list_that_nobody_calls():
    torch.manual_seed(0)
    vit = ViT(image_size=16, patch_size=4, num_classes=3, dim=32, depth=4, heads=4, dim_head=8, mlp_dim=64)
    check(vit, torch.randn(8, 3, 16, 16))
