"""Adapters on some of the outputs of a linear layer, as q and v of a fused projection."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import LowrankError
from tests.adapters.oracle import peft, quiet, transformers
from tests.surgery.models import refused

SPANS = [(0, 4), (8, 12)]
OPTIONS = {"r": 3, "lora_alpha": 5, "target_modules": ["qkv"], "init_lora_weights": False}


def model() -> nn.Module:
    return nn.ModuleDict({"qkv": nn.Linear(6, 12), "conv": nn.Conv1d(2, 4, 1)})


@pytest.mark.parametrize("quantizer", [None, "int8"])
def test_the_other_rows_are_the_bases(quantizer):
    plain = model()
    if quantizer:
        lowrank.quantize(plain, quantizer)
    ours = lowrank.inject(copy.deepcopy(plain), LoRAConfig(**OPTIONS, target_rows={"qkv": SPANS}))
    layer = ours["qkv"]
    assert layer.lora_B["default"].weight.shape == (8, 3)
    for rows in (2, 40):
        x = torch.randn(rows, 6)
        y, was = layer(x), plain["qkv"](x)
        torch.testing.assert_close(y[:, 4:8], was[:, 4:8])
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = layer.scaling["default"] * x @ A.T @ B.T
        got = (y - was)[:, [0, 1, 2, 3, 8, 9, 10, 11]]
        torch.testing.assert_close(got, delta, rtol=1e-4, atol=1e-5)
        y.sum().backward()
        assert layer.lora_B["default"].weight.grad.all()
    lowrank.merge(ours)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


def test_files_are_whole_for_others_and_come_back(tmp_path, generator):
    config = transformers.GPT2Config(
        vocab_size=48, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    plain = transformers.GPT2LMHeadModel(config).eval()
    options = {**OPTIONS, "target_modules": ["c_attn"]}
    ours = copy.deepcopy(plain)
    lowrank.inject(ours, LoRAConfig(**options, target_rows={"c_attn": [(0, 8), (16, 24)]}))
    lowrank.save_adapter(ours, tmp_path)
    ids = torch.randint(48, (2, 9), generator=generator)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    again = lowrank.load_adapter(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(again(ids).logits, ours(ids).logits)
    y = ours(ids).logits
    with torch.no_grad():
        ours.transformer.h[0].attn.c_attn.lora_B["default"].weight.zero_()
    lowrank.load_adapter(ours, tmp_path)
    assert torch.equal(ours(ids).logits, y)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"target_rows": {"qkv": [(0, 13)]}},
            "expected rows of qkv, up to 12; got 13",
        ),
        ({"target_rows": {"kqv": SPANS}}, "target_rows: 'kqv' matches none of the 1 targets"),
        ({"target_rows": {"qkv": [(4, 2)]}}, "expected rows as"),
        ({"target_rows": {"qkv": [(0, 4), (3, 5)]}}, "rising"),
        ({"target_rows": {"qkv": 3}}, "expected rows as"),
        ({"target_rows": {"qkv": SPANS}, "use_dora": True}, "plain LoRA"),
        (
            {"target_rows": {"conv": [(0, 2)]}, "target_modules": ["conv"]},
            "target_rows: expected linear layers; conv is Conv1d",
        ),
    ],
)
def test_wrong_requests_change_nothing(options, match):
    plain = model()
    with refused(plain, LowrankError, match):
        lowrank.inject(plain, LoRAConfig(**{**OPTIONS, **options}))
