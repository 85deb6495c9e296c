"""AdamW against torch.optim's own fused one, bit for bit; it comes without the compiler."""

from __future__ import annotations

import copy
import subprocess
import sys

import torch

from lowrank.train import TrainConfig
from lowrank.train.optimizer import AdamW, parameter_groups

from .support import Small

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
    config = TrainConfig("out", learning_rate=1e-2, weight_decay=0.1)
    ours = AdamW(parameter_groups(model, model.parameters(), config), (0.8, 0.9), 1e-6)
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
