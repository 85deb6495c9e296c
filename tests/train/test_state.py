"""What training holds beside the weights goes through JSON and safetensors and comes back exact."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.errors import FileFormatError, TrainingError
from lowrank.io.safetensors import load_safetensors, save_safetensors
from lowrank.train.state import (
    join,
    optimizer_state,
    rng_state,
    set_optimizer_state,
    set_rng_state,
    split,
)


def through_files(value, folder):
    tensors = {}
    text = json.dumps(split(value, "x", tensors), allow_nan=False)
    save_safetensors(folder / "x.safetensors", tensors)
    return join(json.loads(text), load_safetensors(folder / "x.safetensors"))


def test_what_json_lacks(tmp_path):
    floats = [random.uniform(-1, 1) * 10.0 ** random.randint(-300, 300) for _ in range(50)]
    value = {
        "floats": [*floats, math.inf, -math.inf, -0.0],
        "betas": (0.9, 0.999),
        3: {"one": None, "two": [True, 2**70, "ü"]},
        "$tensor": "a text of that key",
        "deep": [{"t": torch.randn(3, 5).bfloat16()}, (torch.tensor(7),)],
    }
    again = through_files(value, tmp_path)
    for tensor, copy in (
        (value["deep"][0]["t"], again["deep"][0]["t"]),
        (value["deep"][1][0], again["deep"][1][0]),
    ):
        assert tensor.dtype == copy.dtype and torch.equal(tensor, copy)
    del value["deep"], again["deep"]
    assert again == value and isinstance(again["betas"], tuple)
    assert math.copysign(1, again["floats"][-1]) == -1
    assert math.isnan(through_files(math.nan, tmp_path))


def test_a_tensor_is_a_copy(tmp_path):
    tensors, live = {}, torch.zeros(3)
    split({"a": live}, "x", tensors)
    live += 1
    assert torch.equal(tensors["x//a"], torch.zeros(3))
    with pytest.raises(FileFormatError, match="has no tensor 'x//a'"):
        join({"a": {"$tensor": "x//a"}}, {})


def test_what_would_need_pickle_is_refused():
    with pytest.raises(TrainingError, match="callbacks.mine: expected numbers.*; got object"):
        split({"mine": object()}, "callbacks", {})


def test_random_numbers_to_come(tmp_path):
    def draws():
        return (
            torch.rand(5).tolist(),
            [random.random(), random.gauss(0, 1), random.getrandbits(70)],
            [*np.random.standard_normal(3), *np.random.randint(0, 2**40, 3)],
        )

    random.gauss(0, 1), np.random.standard_normal()  # one of a pair of normals is left over
    state = through_files(rng_state([torch.device("cpu")]), tmp_path)
    expected = draws()
    draws()
    set_rng_state(state)
    assert draws() == expected


def test_an_optimizer_goes_on_under_names(tmp_path):
    """Whatever the grouping: the state of a parameter is found by its name."""

    def model():
        return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2, bias=False)}).double()

    def step(net, optimizer, generator):
        net["b"](
            net["a"](torch.randn(5, 3, dtype=torch.double, generator=generator))
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, generator = model(), torch.Generator().manual_seed(random.randrange(2**31))
    names = {p: name for name, p in one.named_parameters()}
    first = torch.optim.AdamW(list(names), lr=1e-2)
    for _ in range(3):
        step(one, first, generator)
    state = through_files(optimizer_state(first, names), tmp_path)
    assert set(state) == {"a.weight", "a.bias", "b.weight"}
    assert set(state["a.bias"]) == {"step", "exp_avg", "exp_avg_sq"}

    two = model()
    two.load_state_dict(one.state_dict())
    names = {p: name for name, p in two.named_parameters()}
    groups = [{"params": [two["b"].weight], "lr": 1e-2}, {"params": two["a"].parameters()}]
    second = torch.optim.AdamW(groups, lr=1e-2)
    set_optimizer_state(second, names, state)
    again = torch.Generator()
    again.set_state(generator.get_state())
    for _ in range(3):
        step(one, first, generator)
        step(two, second, again)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
