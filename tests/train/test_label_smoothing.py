"""Smoothed labels against transformers' LabelSmoother, in every way that a loss is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import ConfigError
from lowrank.train import TrainConfig, Trainer

from .support import Small, examples, windows
from .test_decoder_training import decoder

utils = pytest.importorskip(
    "transformers.trainer_pt_utils", reason="the oracle; pip install transformers"
)


def smoothed(logits, labels, epsilon):
    """transformers' loss: a mean over the labelled tokens, of logits [B, S, V]."""
    smoother = utils.LabelSmoother(epsilon)
    return smoother({"logits": logits}, labels, shift_labels=True)


def padded(rows):
    """input_ids and labels [B, S] of rows, as tensors."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = [torch.tensor([-100, *row["labels"][1:]]) for row in rows]
    return ids, pad(labels, batch_first=True, padding_value=-100)


@pytest.mark.parametrize("epsilon", [0.1, 0.7])
def test_trains_as_with_the_smoother_of_transformers(tmp_path, generator, epsilon):
    """Of any module; the held-out loss is that of the labels themselves."""
    rows, model = examples(8, generator), Small().double()
    theirs = copy.deepcopy(model)
    settings = TrainConfig(
        tmp_path / "run", max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=2, lr_scheduler_type="constant", max_grad_norm=0.0,
        label_smoothing_factor=epsilon,
    )  # fmt: skip
    trainer = Trainer(model, settings, rows, rows)
    result = trainer.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for window in windows(rows, 42, 3, 4):
        ids, labels = padded(window)
        loss = smoothed(theirs(ids), labels, epsilon)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(result.losses, losses, rtol=1e-6, atol=0)  # theirs adds in float32
    ids, labels = padded(rows)
    held_out = smoothed(model(ids), labels, 0.0).item()
    assert trainer.evaluate() == result.eval_losses[-1][1] == pytest.approx(held_out, rel=1e-6)


@pytest.mark.parametrize("head", ["frozen", "trained", "quantized", "adapted"])
@pytest.mark.parametrize("epsilon", [0.1, 0.6])
def test_the_loss_in_chunks(generator, head, epsilon):
    """Of the library's decoder, whose head forms no logits that are not asked for: the loss and
    the gradient of every parameter, against all logits in float64.
    """
    model = decoder()
    model.lm_head.weight.requires_grad_(head == "trained")
    if head == "quantized":
        model.lm_head = lowrank.QuantLinear.from_linear(model.lm_head, "nf4")
    if head == "adapted":
        lowrank.inject(model, lowrank.LoRAConfig(r=3, target_modules=["lm_head", "q_proj"]))
        nn.init.normal_(model.lm_head.lora_B["default"].weight, std=0.1)
    ids, labels = padded(examples(7, generator))
    mask = (ids != 0).long()
    count = int((labels != -100).sum())

    loss = model.loss(ids, labels, attention_mask=mask, label_smoothing=epsilon)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    exact = smoothed(model(ids, attention_mask=mask).double(), labels, epsilon) * count
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 1
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("padding_free", [True, False])
def test_packed_and_padded_alike(tmp_path, generator, padding_free):
    rows, model = examples(8, generator), decoder()
    settings = TrainConfig(
        tmp_path / "run", max_steps=1, label_smoothing_factor=0.2, padding_free=padding_free
    )
    ids, labels = padded(rows)
    expected = smoothed(model(ids, attention_mask=(ids != 0).long()), labels, 0.2).item()
    assert Trainer(model, settings, rows).train().losses == [pytest.approx(expected, rel=1e-5)]


def test_a_loss_that_cannot_be_smoothed_is_refused(tmp_path, generator):
    class Own(Small):
        supports_packing = True

        def loss(self, input_ids, labels, position_ids=None, attention_mask=None):
            raise NotImplementedError

    settings = TrainConfig(tmp_path / "run", label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="label_smoothing_factor is 0.1, but Own.loss has no arg"):
        Trainer(Own(), settings, examples(4, generator))
    assert not (tmp_path / "run").exists()
