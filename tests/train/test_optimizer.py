"""What `optim` names: AdamW is torch's fused one, bit for bit, and comes without the compiler."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from lowrank.optim import AdamW8bit, Lion8bit
from lowrank.train import TrainConfig, Trainer
from lowrank.train.optimizer import OPTIMIZERS, parameter_groups

from .support import Small, examples

FEW = """
import sys, tempfile
from tests.train.support import Small, examples
import torch
from lowrank.train import TrainConfig, Trainer
with tempfile.TemporaryDirectory() as folder:
    rows = examples(8, torch.Generator().manual_seed(1))
    Trainer(Small(), TrainConfig(folder + "/run", max_steps=2), rows, rows).train()
print(sorted(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


def test_equals_torch_bit_for_bit():
    model = Small()
    model.idle = torch.nn.Linear(3, 3)
    reference = copy.deepcopy(model)
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, fused=True)
    numbers = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    config = TrainConfig("out", learning_rate=1e-2, weight_decay=0.1, **numbers)
    groups = parameter_groups(model, model.parameters(), config)
    ours = OPTIMIZERS["adamw_torch"](groups, config)
    for step in range(7):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step in (0, 3):  # no gradient: neither moved nor decayed, and its own count of steps
            for linear in (model.idle, reference.idle):
                linear.weight.grad = linear.bias.grad = None
        for group in ours.param_groups + theirs.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        ours.step()
        theirs.step()
        ours.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_run_does_not_import_the_compiler():
    """It would be a second, and more memory than the adapter and its optimizer state together."""
    done = subprocess.run([sys.executable, "-c", FEW], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_those_of_transformers():
    names = pytest.importorskip("transformers.training_args").OptimizerNames
    assert OPTIMIZERS.keys() <= {name.value for name in names}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_name_trains(optim, tmp_path, generator):
    rows = examples(16, generator)
    model = Small()
    before = [p.detach().clone() for p in model.parameters()]
    rate = {"sgd": 1e-1}.get(optim, 1e-2)
    config = TrainConfig(tmp_path / "run", optim=optim, max_steps=12, learning_rate=rate)
    result = Trainer(model, config, rows).train()
    assert result.losses[-1] < result.losses[0]
    assert not any(map(torch.equal, model.parameters(), before))


def test_numbers_reach_the_optimizer():
    model = Small()
    config = TrainConfig("out", learning_rate=1e-3, adam_beta1=0.7, adam_beta2=0.8)
    for optim, kind in (("adamw_bnb_8bit", AdamW8bit), ("lion_8bit", Lion8bit)):
        groups = parameter_groups(model, model.parameters(), config)
        made = OPTIMIZERS[optim](groups, config)
        assert isinstance(made, kind)
        for group in made.param_groups:
            assert group["betas"] == (0.7, 0.8) and group["lr"] == 1e-3
