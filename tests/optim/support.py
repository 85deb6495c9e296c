"""Parameters of awkward shapes, gradients, and what is compared of two optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHAPES = [(700, 512), (33,), (512, 300), (3, 70001), (), (300_000,), (4097, 16), (0, 3), (5, 7, 9)]


def parameters(shapes=SHAPES, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_gradients(*lists: list[nn.Parameter], none: tuple[int, ...] = ()) -> None:
    """The same random gradient to the parameters of every list; to those of `none`, none."""
    for i, same in enumerate(zip(*lists, strict=True)):
        g = None if i in none else torch.randn_like(same[0]) * 0.1
        for p in same:
            p.grad = None if g is None else g.clone()


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def assert_same_state(ours: dict, theirs: dict) -> None:
    """Two state dicts, to the bit."""
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        for name, value in state.items():
            other = ours["state"][key][name]
            if isinstance(value, Tensor):
                assert other.dtype == value.dtype and torch.equal(other, value.cpu()), (key, name)
            else:
                assert other == value, (key, name)
