"""What a step is said to take, beside torch's own record of what it allocated."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lowrank
from lowrank import quant
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.plan import model as models
from lowrank.plan.step import backward_peaks

# enough that the states of random numbers which recomputing keeps, 5 kB a block, are nothing
ROWS, LENGTH = 3, 130


def config(layers: int = 5, **changes) -> DecoderConfig:
    sizes = dict(
        vocab_size=331,
        hidden_size=64,
        intermediate_size=152,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return DecoderConfig(**{**sizes, **changes})


def allocated(model, ids) -> int:
    """Bytes that torch allocates at most in a forward and backward, by its profiler."""
    model.loss(ids, ids).backward()  # buffers that are kept from step to step
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model.loss(ids, ids).backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("full", True), ("lora", False), ("nf4", True), ("nf4", "selective"), ("int8", False)],
)
def test_a_step_takes_what_torch_allocates(kind, checkpointing):
    cfg = config(layers=4)
    lora = None if kind == "full" else lowrank.LoRAConfig(r=4, target_modules="all-linear")
    quantizer = None if kind in ("full", "lora") else quant.get(kind)
    real = Decoder(cfg)
    if quantizer is not None:
        lowrank.quantize(real, quantizer, skip=["lm_head"])
    if lora is not None:
        lowrank.inject(real, lora)
    real.train()
    real.gradient_checkpointing = checkpointing
    measured = allocated(real, torch.randint(0, cfg.vocab_size, (ROWS, LENGTH)))

    planned = models.build(cfg, lora, quantizer, torch.float32, ("lm_head",), False)
    models.stand_in(planned)
    peaks = backward_peaks(
        planned, 4, batch_size=ROWS, length=LENGTH, checkpointing=checkpointing,
        accumulates=False, device="cpu",
    )  # fmt: skip
    assert max(sum(p.values()) for p in peaks) == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(("rank", "checkpointing"), [(None, True), (4, False), (200, True)])
def test_blocks_that_are_alike_are_counted_as_if_all_were_run(rank, checkpointing, monkeypatch):
    """With rank 200 and full training, gradients outweigh activations: the other peak leads."""
    lora = rank and lowrank.LoRAConfig(r=rank, target_modules="all-linear")
    model = models.build(config(layers=7), lora, None, torch.float32, ("lm_head",), False)
    run = dict(batch_size=1, length=9, checkpointing=checkpointing, accumulates=False, device="cpu")
    few = backward_peaks(model, 7, **run)
    monkeypatch.setattr("lowrank.plan.step.are_alike", lambda blocks: False)
    every = backward_peaks(model, 7, **run)
    most = [max(sum(p.values()) for p in peaks) for peaks in (few, every)]
    assert most[0] == pytest.approx(most[1], rel=0.01)
    assert len(models.blocks(model, 7)) == 7


def test_a_failed_run_leaves_the_model_whole():
    model = models.build(config(), None, None, torch.float32, ("lm_head",), False)
    with pytest.raises(RuntimeError):
        backward_peaks(
            model, 5, batch_size=1, length=-1, checkpointing=True, accumulates=True, device="cpu"
        )
    assert len(models.blocks(model, 5)) == 5 and model.gradient_checkpointing is False
    assert all(p.grad is None for p in model.parameters())
