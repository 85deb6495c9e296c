"""Activations that wait in host memory: the same bits come back, and few are on the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from lowrank.data import collate, tokenize_all
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.train.loss import batch_loss
from lowrank.train.offload import Offload, offloaded
from tests.train.support import examples


def decoder() -> nn.Module:
    config = DecoderConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = lowrank.quantize(Decoder(config), "nf4")
    options = {"target_modules": "all-linear", "lora_dropout": 0.2, "init_lora_weights": False}
    return lowrank.inject(model, lowrank.LoRAConfig(r=4, **options)).train()


def gradients(loss, model, seed):
    model.zero_grad()
    torch.manual_seed(seed)
    value = loss()
    value.backward()
    return value, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", [False, True, "selective"])
def test_gradients_are_the_same_bits(way, seed):
    """On a CPU, where what leaves goes from memory to memory."""
    model = decoder()
    model.gradient_checkpointing = way
    ids = torch.randint(0, 96, (2, 17))
    expected = gradients(lambda: model.loss(ids, ids), model, seed)
    offload = Offload(torch.device("cpu"), model.parameters(), least=1)

    def loss():
        with offload:
            return model.loss(ids, ids)

    for _ in range(2):
        value, found = gradients(loss, model, seed)
        assert torch.equal(value, expected[0])
        assert all(torch.equal(found[name], g) for name, g in expected[1].items())


def test_what_is_kept_may_change_after_it_has_left(seed):
    """The copy is what it was; several layers' one input leaves once, and a parameter never."""
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    y = x * 2
    with Offload(torch.device("cpu"), [weight], least=1):
        loss = (y @ weight).sum() + (y.T.contiguous().T @ weight).sin().sum() + (y * y).sum()
    (y2,) = (x.detach() * 2,)
    y2.requires_grad_()
    expected = torch.autograd.grad(
        (y2 @ weight).sum() + (y2 @ weight).sin().sum() + (y2 * y2).sum(), [y2, weight]
    )
    y.detach().zero_()
    found = torch.autograd.grad(loss, [y, weight])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [False, "selective"])
def test_on_a_gpu_it_is_the_same_and_smaller(way, generator):
    rows = tokenize_all(
        [{"input_ids": [7, *row["input_ids"]] * 40} for row in examples(4, generator)]
    )
    model = decoder().cuda()
    model.gradient_checkpointing = way
    batch = collate(rows, range(4), True, 0).to("cuda")
    plain = batch_loss(model)
    results, peaks = [], []
    for loss in (plain, offloaded(plain, model, torch.device("cuda"))):
        gradients(lambda loss=loss: loss(batch), model, 0)
        torch.cuda.reset_peak_memory_stats()
        results.append(gradients(lambda loss=loss: loss(batch), model, 0))
        peaks.append(torch.cuda.max_memory_allocated())
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-6, atol=1e-7)
    assert peaks[1] < peaks[0]
