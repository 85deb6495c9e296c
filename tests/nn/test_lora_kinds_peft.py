"""Every kind of layer with adapters against PEFT's, wherever PEFT's is right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from tests.adapters.oracle import peft, peft_model
from tests.nn.lora_kinds import KINDS
from tests.nn.test_lora_kinds import assert_same, gradients

# of what PEFT does for Conv1D, and cannot do for groups
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:LoRA adapter added")

# A of PEFT's convolutions has neither the base's dilation nor its padding mode
RIGHT = [name for name in KINDS if not name.endswith(("dilated", "same", "reflect", "circular"))]
RIGHT = [name for name in RIGHT if not name.endswith(("valid", "replicate"))]
GROUPED = ["conv1d_groups", "conv2d_depthwise"]
OPTIONS = {"target_modules": ["0"], "r": 4, "lora_alpha": 6, "init_lora_weights": False}


def pair(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """PEFT's model of one layer, and ours with the same numbers."""
    model = nn.Sequential(KINDS[name].make())
    theirs = peft_model(model, **OPTIONS, **options)
    ours = lowrank.inject(copy.deepcopy(model), lowrank.LoRAConfig(**OPTIONS, **options))
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    prefix = "base_model.model.0."
    tensors = {key.removeprefix(prefix): t for key, t in state.items()}
    base, config = ours[0].unmerged_base, ours[0].config["default"]
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    assert type(ours[0]).file_shapes(base, config) == shapes
    ours[0].from_file("default", tensors)
    written = ours[0].to_file("default")
    assert written.keys() == shapes.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in shapes)
    return theirs.base_model.model, ours


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_output_and_gradients_are_pefts(name, use_dora):
    if use_dora and name in GROUPED:
        return  # PEFT: the size of a tensor must match
    theirs, ours = pair(name, use_dora=use_dora)
    x = KINDS[name].x()
    dy = torch.randn_like(ours(x))
    want, got = gradients(theirs, theirs, x, dy), gradients(ours, ours, x, dy)
    for plain in got.keys() & {"y", "x"}:
        assert_same({plain: got.pop(plain)}, {plain: want.pop(plain)}, 1e-5)
    mine = {n: g.flatten() for n, g in got.items()}
    other = {n.replace("embedding_", ""): g.flatten() for n, g in want.items()}
    other = {n if n.endswith(".weight") else f"{n}.weight": g for n, g in other.items()}
    assert_same(mine, other, 1e-5)


@pytest.mark.parametrize(
    "name", [n for n in RIGHT if KINDS[n].make().__dict__.get("groups", 1) == 1]
)
def test_merged_weight_is_pefts(name):
    theirs, ours = pair(name)
    theirs[0].merge()
    ours[0].merge()
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_merged_where_peft_refuses(name):
    theirs, ours = pair(name)
    x = KINDS[name].x()
    with pytest.raises(NotImplementedError):
        theirs[0].merge()
    ours[0].merge()
    torch.testing.assert_close(ours(x), theirs(x))


def test_padding_has_no_gradient():
    table = nn.Embedding(9, 4, padding_idx=3)
    model = lowrank.inject(nn.Sequential(table), lowrank.LoRAConfig(**OPTIONS))
    model(torch.arange(9)).sum().backward()
    grad = model[0].lora_A["default"].weight.grad
    assert not grad[:, 3].any() and grad[:, [0, 1, 2, 4, 5, 6, 7, 8]].all()


def test_gradients_are_scaled_by_frequency_as_pefts_are():
    model = nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True))
    theirs = peft_model(model, **OPTIONS).base_model.model
    ours = lowrank.inject(copy.deepcopy(model), lowrank.LoRAConfig(**OPTIONS))
    A, B = theirs[0].lora_embedding_A["default"], theirs[0].lora_embedding_B["default"]
    with torch.no_grad():
        ours[0].lora_A["default"].weight.copy_(A)
        ours[0].lora_B["default"].weight.copy_(B)
    x = torch.tensor([1, 1, 1, 4, 4, 8])
    for run in (theirs, ours):
        run(x).square().sum().backward()
    torch.testing.assert_close(ours[0].lora_A["default"].weight.grad, A.grad)
    torch.testing.assert_close(ours[0].lora_B["default"].weight.grad, B.grad)
