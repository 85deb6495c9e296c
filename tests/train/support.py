"""What the training tests share: a small causal model, a byte tokenizer, the loop written out."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import nn

from lowrank.data import epoch_order

VOCAB = 96


class Small(nn.Module):
    """A recurrent language model: causal by construction, of no class the library knows."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.mix = nn.RNN(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids):
        return self.head(self.dropout(self.mix(self.embed(input_ids))[0]))


class Bytes:
    """One token a byte, folded into VOCAB; 0 ends a text and 1 begins it where `bos`."""

    eos_token_id, pad_token_id = 0, 0

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1 if bos else None

    def encode(self, text, add_special_tokens=False):
        start = [1] if add_special_tokens and self.bos_token_id is not None else []
        return start + [2 + b % (VOCAB - 2) for b in text.encode()]


def examples(count: int, generator: torch.Generator) -> list[dict]:
    """Token examples of ragged lengths, of which a random part is learned (never none)."""
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 13, (), generator=generator))
        ids = torch.randint(2, VOCAB, (length,), generator=generator)
        start = int(torch.randint(0, length - 1, (), generator=generator))
        labels = torch.where(torch.arange(length) >= start, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def example_loss(model: nn.Module, row: dict) -> tuple[torch.Tensor, int]:
    """Sum of the next-token cross entropy of one example, and its number of learned tokens."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    logits = model(ids[None])
    logits = getattr(logits, "logits", logits)[0, :-1]
    count = int((labels[1:] != -100).sum())
    return F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"), count


def plain_loop(model, windows, lrs, *, max_norm=0.0, weight_decay=0.0, **adamw):
    """Losses and gradient norms of AdamW steps, each over all the examples of a window at once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False, **adamw)
    losses, norms = [], []
    for window, lr in zip(windows, lrs, strict=True):
        optimizer.zero_grad()
        parts = [example_loss(model, row) for row in window]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        if max_norm and norm > max_norm:
            for p in parameters:
                p.grad.mul_(max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


def windows(rows, seed, epochs, size):
    """The examples of each step, from the published order of an epoch."""
    found = []
    for epoch in range(epochs):
        order = epoch_order(len(rows), seed, epoch)
        found += [[rows[i] for i in order[s : s + size]] for s in range(0, len(rows), size)]
    return found


def metrics_lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
