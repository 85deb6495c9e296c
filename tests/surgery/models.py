"""What the tests of model editing share: names, states, refusals, models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from tests.adapters.oracle import tiny_llama


def names_of(model: nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def state(model: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    values = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    return {"modules": [n for n, _ in model.named_modules()], **values}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state(model)
    assert after.keys() == before.keys() and after["modules"] == before["modules"]
    for name in before.keys() - {"modules"}:
        assert torch.equal(after[name][0], before[name][0]) and after[name][1] == before[name][1], (
            name
        )


@contextmanager
def refused(model: nn.Module, error: type[Exception], says: str | None = None) -> Iterator[None]:
    """What is done within raises `error`, in one line, and leaves the model as it was."""
    before = state(model)
    with pytest.raises(error, match=says) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def two_adapters(**options) -> nn.Module:
    model = tiny_llama()
    config = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 3}
    lowrank.inject(model, LoRAConfig(**{**config, **options}), adapter="a")
    lowrank.inject(
        model, LoRAConfig(**{**config, "target_modules": ["v_proj", "up_proj"]}), adapter="b"
    )
    return model


class Mixed(nn.Module):
    """A layer of each kind: an embedding, a convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.linear = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(self.table(ids).mT).mT)
