"""NEFTune's noise against the hook of transformers; it is on what is learned from alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowrank.data import TokenizedExamples, collate
from lowrank.errors import ConfigError
from lowrank.train import TrainConfig, Trainer
from lowrank.train.neftune import example_lengths, neftune

from .support import VOCAB, Small, examples, windows
from .test_decoder_training import decoder

neftune_hooks = pytest.importorskip(
    "transformers.integrations.neftune", reason="the oracle; pip install transformers"
)


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 5, "per_device_train_batch_size": 4, **settings}
    return TrainConfig(path / "run", learning_rate=1e-2, lr_scheduler_type="constant", **settings)


def test_trains_as_with_the_hook_of_transformers(tmp_path, generator, seed):
    """Examples of one length, as theirs counts padding too: the same noise, the same losses."""
    rows = [{"input_ids": torch.randint(2, VOCAB, (9,)).tolist()} for _ in range(8)]
    for row in rows:
        row["labels"] = row["input_ids"]
    ours = Small()
    theirs = copy.deepcopy(ours)
    settings = config(tmp_path, neftune_noise_alpha=5.0, max_grad_norm=0.0, seed=seed)
    result = Trainer(ours, settings, rows).train()

    theirs.embed.neftune_noise_alpha = 5.0
    theirs.embed.register_forward_hook(neftune_hooks.neftune_post_forward_hook)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    torch.manual_seed(seed)
    losses = []
    for window in windows(rows, seed, 3, 4)[:5]:
        ids = torch.tensor([row["input_ids"] for row in window])
        loss = nn.functional.cross_entropy(theirs(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(result.losses, losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("end_to_end", [True, False])
@pytest.mark.parametrize("packs", [[[0], [1], [2], [3]], [[2, 0], [3, 1]]])
def test_the_noise_is_by_the_length_of_ones_own_example(generator, end_to_end, packs):
    """Each token's noise is uniform up to alpha / sqrt(L d), whatever lies beside its example."""
    lengths, width, alpha = [3, 11, 5, 24], 16, 7.0
    data = TokenizedExamples(
        torch.zeros(43, dtype=torch.int32), torch.zeros(43, dtype=torch.int32),
        [0, 3, 14, 19, 43], lengths,
    )  # fmt: skip
    batch = collate(data, packs, end_to_end)
    order = torch.tensor([lengths[i] for pack in packs for i in pack])
    expected = order.repeat_interleave(order).float()
    real = batch.attention_mask.bool() if batch.attention_mask is not None else None
    if real is None:
        real = torch.ones_like(batch.input_ids, dtype=torch.bool)
    elif real.ndim == 4:
        filled = [[sum(lengths[i] for i in pack)] for pack in packs]
        real = torch.arange(real.shape[-1]) < torch.tensor(filled)
    assert torch.equal(example_lengths(batch)[real], expected)

    model, seen = Small(width), []
    nn.init.zeros_(model.embed.weight)

    def loss(batch):
        seen.append(model.embed(batch.input_ids)[real])
        return seen[-1].sum()

    with neftune(model, loss, alpha) as noisy:
        for _ in range(40):
            noisy(batch)
        clean = model.embed(batch.input_ids)
    assert not clean.any() and not model.embed(batch.input_ids).any()
    relative = torch.stack(seen) / (alpha / (expected * width).sqrt())[:, None]
    assert 0.99 < relative.abs().max() <= 1.0 + 1e-6
    assert relative.mean().abs() < 0.05
    third = torch.full((43,), 1 / 3)
    torch.testing.assert_close(relative.square().mean(dim=(0, 2)), third, rtol=0.25, atol=0)


def test_only_what_is_learned_from_is_noisy(tmp_path, generator):
    """Evaluations in the middle of the run are without noise, and see what the noise has done."""
    rows, model = examples(9, generator), decoder()
    start = copy.deepcopy(model)
    settings = config(tmp_path / "noisy", neftune_noise_alpha=20.0, eval_steps=1)
    trainer = Trainer(model, settings, rows, rows)
    before = trainer.evaluate()
    result = trainer.train()
    quiet = Trainer(start, config(tmp_path / "quiet", eval_steps=1), rows, rows).train()
    assert result.eval_losses[0] == quiet.eval_losses[0] == (0, before)
    assert result.losses[0] != quiet.losses[0]
    assert trainer.evaluate() == result.eval_losses[-1][1] != quiet.eval_losses[-1][1]


def test_a_model_without_an_embedding_is_refused(tmp_path, generator):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(VOCAB, VOCAB)

        def forward(self, input_ids):
            return self.head(nn.functional.one_hot(input_ids, VOCAB).float())

    with pytest.raises(
        ConfigError, match="neftune_noise_alpha needs an embedding; got a Counts wi"
    ):
        Trainer(Counts(), config(tmp_path, neftune_noise_alpha=5.0), examples(4, generator))
