"""LoRA+: the groups are those of PEFT's optimizer, and the trainer's rates follow them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.train import TrainConfig, Trainer
from tests.adapters.oracle import peft_model, tiny_llama

create_loraplus_optimizer = pytest.importorskip(
    "peft.optimizers", reason="needs peft, the oracle: pip install peft"
).create_loraplus_optimizer

TARGETS = ["q_proj", "up_proj", "embed_tokens"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_groups_are_pefts(use_dora):
    base = tiny_llama(attention_bias=True)
    options = {"r": 3, "target_modules": TARGETS, "bias": "all", "use_dora": use_dora}
    theirs = peft_model(base, **options)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    model = lowrank.inject(copy.deepcopy(base), LoRAConfig(**options))
    groups = lowrank.lora_plus_groups(model, 1e-3, 8.0, weight_decay=0.1)
    torch.optim.AdamW(groups)  # it takes them as they are

    def rates(model, groups) -> dict[str, tuple]:
        names = {p: n for n, p in model.named_parameters()}
        found = {}
        for group in groups:
            for p in group["params"]:
                name = names[p].removeprefix("base_model.model.").removesuffix(".weight")
                name = name.replace("lora_embedding_", "lora_")
                found[name] = (group["lr"], group["weight_decay"], tuple(p.shape))
        return found

    want = rates(theirs, [g for g in reference.param_groups if g["params"]])
    got = rates(model, groups)
    assert got.keys() == want.keys()
    # PEFT takes an embedding's magnitude for no part of it, by the depth of its name
    want.pop("model.embed_tokens.lora_magnitude_vector.default", None)
    for name in want:
        assert got[name][:2] == pytest.approx(want[name][:2]), name
        assert got[name][2] == want[name][2]
    assert len({rate for rate, _, _ in got.values()}) == 3


def test_a_training_step_moves_b_by_the_ratio(tmp_path):
    ids = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 8
    moved = {}
    for ratio in (None, 4.0):
        torch.manual_seed(5)
        model = lowrank.inject(
            tiny_llama(), LoRAConfig(target_modules=["q_proj"], init_lora_weights=False)
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        config = TrainConfig(
            tmp_path / str(ratio), max_steps=1, learning_rate=1e-4, lr_scheduler_type="constant",
            warmup_ratio=0.0, loraplus_lr_ratio=ratio,
        )  # fmt: skip
        Trainer(model, config, ids).train()
        now = dict(model.named_parameters())
        moved[ratio] = {n: (now[n] - p).norm().item() for n, p in before.items()}
    for name, distance in moved[4.0].items():
        expected = 4.0 if "lora_B" in name else 1.0
        assert distance / moved[None][name] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan, "16", True])
def test_wrong_numbers(bad, tmp_path):
    model = lowrank.inject(nn.Sequential(nn.Linear(3, 3)), LoRAConfig(target_modules=["0"]))
    for name in ("lr", "ratio", "lr_embedding"):
        with pytest.raises(ConfigError, match=f"{name}: expected a finite number above 0"):
            lowrank.lora_plus_groups(model, **{"lr": 1e-3, name: bad})
    with pytest.raises(ConfigError, match="loraplus_lr_ratio must be None or a number above 0"):
        TrainConfig(tmp_path, loraplus_lr_ratio=bad)
    with pytest.raises(TargetError, match="nothing in the model trains"):
        lowrank.lora_plus_groups(nn.Linear(3, 3).requires_grad_(False), 1e-3)
